"""PPO's equations on a tree and on models whose every response can be listed."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import make_model, make_prompts, save, word_tokenizer
from tables import (
    WORDS,
    all_responses,
    distance,
    expectation,
    make_small_world,
    posterior,
    table,
    train,
)

import brain
import common
import ppo

# A tree of three states (the start, behind "a", behind "b") and three tokens (end, "a", "b"): its 7
# responses of at most two tokens.
RESPONSES = [[0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
MASK = torch.tensor([[True, len(ids) > 1] for ids in RESPONSES])
TOKEN = torch.tensor([(ids + [0])[:2] for ids in RESPONSES])
STATE = torch.tensor([[0, ids[0]] for ids in RESPONSES])
REF, LOGITS, REWARDS, BETA = table(0, 3, 3), table(1, 3, 3), table(2, 7), 0.7
GAE, RLOO = (ppo.Args(advantage=name, clip=0.2) for name in ("gae", "rloo"))
ALONE = SimpleNamespace(average=lambda sums: sums)  # a run of one process


def tokens_of(logits: torch.Tensor) -> torch.Tensor:
    """Log-probs [7, 2] of the tokens, 0 behind the end of a response."""
    return logits.log_softmax(1)[STATE, TOKEN] * MASK


def paid(logits: torch.Tensor) -> torch.Tensor:
    """R_t [7, 2] of a policy that drew the samples."""
    old, ref = tokens_of(logits)[None], tokens_of(REF)[None]
    return ppo.token_rewards(REWARDS[None], old, ref, MASK[None], BETA)[0]


def objective(logits: torch.Tensor) -> torch.Tensor:
    """E[r] − β·KL(π‖p), by enumeration."""
    ours, ref = tokens_of(logits).sum(1), tokens_of(REF).sum(1)
    return (ours.exp() * (REWARDS - BETA * (ours - ref))).sum()


def gradient_of(value, logits: torch.Tensor) -> torch.Tensor:
    """∂ value(logits) / ∂ logits."""
    variable = logits.clone().requires_grad_()
    return torch.autograd.grad(value(variable), variable)[0]


def true_values(logits: torch.Tensor) -> torch.Tensor:
    """The value [7, 2] of each token's state: the mean of what is paid from there on."""
    to_go, prob = paid(logits).flip(1).cumsum(1).flip(1), tokens_of(logits).sum(1).exp()
    values = torch.zeros(3, dtype=torch.float64)
    for state in range(3):
        here = (STATE == state) & MASK
        weights = prob[:, None] * here
        values[state] = (weights * to_go).sum() / weights.sum()
    return values[STATE] * MASK


def target() -> torch.Tensor:
    """Logits of (T) = p·exp(r/β)/Z."""
    prob = posterior(tokens_of(REF).sum(1), REWARDS, BETA).exp()
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for p, states, tokens, mask in zip(prob, STATE, TOKEN, MASK):
        for state, token in zip(states[mask], tokens[mask]):
            counts[state, token] += p
    return counts.log()


def expected_gradient(logits: torch.Tensor, values: torch.Tensor, gae_lambda: float):
    """Mean gradient, over all responses, of the loss of one sample."""
    advantage = ppo.gae(paid(logits)[None], values[None], gae_lambda)[0]
    old, prob = tokens_of(logits), tokens_of(logits).sum(1).exp()

    def loss(variable):
        ours = tokens_of(variable)[:, None]
        return (prob * ppo.policy_loss(ours, old[:, None], advantage[:, None], GAE)).sum()

    return gradient_of(loss, logits)


# ── equations ──
def test_eq1_the_reward_is_paid_at_the_last_token_and_the_kl_at_each():
    """By hand: a response of two tokens, and one of one, behind which there is nothing."""
    old = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]])
    ref = torch.tensor([[[-1.5, -1.0], [-3.0, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    ours = ppo.token_rewards(torch.tensor([[10.0, 20.0]]), old, ref, mask, 0.5)
    torch.testing.assert_close(ours, torch.tensor([[[-0.25, 10.5], [20.0, 0.0]]]))


def test_eq1_sums_to_the_reward_minus_the_log_ratio():
    log_ratio = tokens_of(LOGITS).sum(1) - tokens_of(REF).sum(1)
    torch.testing.assert_close(paid(LOGITS).sum(1), REWARDS - BETA * log_ratio)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_eq2_is_the_published_recursion(gae_lambda):
    """A_t = δ_t + λ·A_{t+1}, token by token, 0 behind the end of each response."""
    lengths = torch.tensor([[5, 2, 1], [3, 4, 5]])
    mask = torch.arange(5) < lengths[:, :, None]
    rewards, values = table(3, 2, 3, 5) * mask, table(4, 2, 3, 5) * mask
    ours = ppo.gae(rewards, values, gae_lambda)
    assert (ours[~mask] == 0).all()
    for p in range(2):
        for n in range(3):
            behind, following = 0.0, 0.0
            for t in reversed(range(lengths[p, n])):
                delta = rewards[p, n, t] + following - values[p, n, t]
                behind, following = delta + gae_lambda * behind, values[p, n, t]
                torch.testing.assert_close(ours[p, n, t], behind)


def test_eq2_without_a_value_and_with_lambda_1_is_the_reward_to_go():
    rewards = paid(LOGITS)[None]
    ours = ppo.gae(rewards, torch.zeros_like(rewards), 1.0)
    torch.testing.assert_close(ours, rewards.flip(2).cumsum(2).flip(2))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_eq2_eq3_with_the_true_value_the_gradient_is_that_of_the_objective(gae_lambda):
    """By enumeration, for every λ; with λ = 1 for every other value of a state too, else not."""
    exact = -gradient_of(objective, LOGITS)
    values = true_values(LOGITS)
    ours = expected_gradient(LOGITS, values, gae_lambda)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)
    other = table(5, 3)[STATE] * MASK
    off = (expected_gradient(LOGITS, other, gae_lambda) - exact).abs().max()
    assert (off < 1e-12) == (gae_lambda == 1.0) and exact.abs().max() > 0.05


def test_eq2_at_the_target_no_token_has_an_advantage():
    """Not only on average: each is 0, as r − β·log(π/p) of a response is the same for all there."""
    best = target()
    torch.testing.assert_close(
        tokens_of(best).sum(1), posterior(tokens_of(REF).sum(1), REWARDS, BETA)
    )
    values = true_values(best)
    for gae_lambda in (0.0, 0.95, 1.0):
        assert ppo.gae(paid(best)[None], values[None], gae_lambda).abs().max() < 1e-12
        assert expected_gradient(best, values, gae_lambda).abs().max() < 1e-12
    assert gradient_of(objective, best).abs().max() < 1e-12
    assert expected_gradient(best, torch.zeros_like(values), 1.0).abs().max() < 1e-12


def test_eq3_where_the_ratio_is_1_it_is_reinforce():
    """Loss −Σ A, gradient −A·∇log π, whatever the clipping."""
    logprobs, advantage = table(6, 2, 3, 4).requires_grad_(), table(7, 2, 3, 4)
    loss = ppo.policy_loss(logprobs, logprobs.detach(), advantage, GAE)
    torch.testing.assert_close(loss, -advantage.sum((1, 2)))
    loss.sum().backward()
    assert torch.equal(logprobs.grad, -advantage)


@pytest.mark.parametrize(
    "ratio, advantage, loss, moves",
    [
        (1.5, 2.0, -2.4, False),  # better, and more likely already: no more of it
        (0.5, 2.0, -1.0, True),  # better, but less likely: back
        (1.5, -2.0, 3.0, True),  # worse, but more likely: back
        (0.5, -2.0, 1.6, False),  # worse, and less likely already: no more of it
        (1.1, 2.0, -2.2, True),
        (0.9, -2.0, 1.8, True),
    ],
)
def test_eq3_clips_on_the_side_of_the_gain_only(ratio, advantage, loss, moves):
    logprobs = torch.tensor([[[ratio]]]).log().requires_grad_()
    ours = ppo.policy_loss(logprobs, torch.zeros(1, 1, 1), torch.tensor([[[advantage]]]), GAE)
    assert ours.shape == (1,) and ours.item() == pytest.approx(loss, rel=1e-6)
    ours.sum().backward()
    gradient = -ratio * advantage if moves else 0.0
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)


def test_eq3_a_response_of_rloo_is_one_action():
    """Its ratio is the product of its tokens': two of 1.15 are past 1.2, while each alone is not."""
    logprobs = torch.tensor([[[1.15, 1.15]]]).log().requires_grad_()
    old, advantage = torch.zeros(1, 1, 2), torch.ones(1, 1, 1)
    ours = ppo.policy_loss(logprobs, old, advantage, RLOO)
    assert ours.item() == pytest.approx(-1.2)
    assert ppo.policy_loss(logprobs, old, advantage, GAE).item() == pytest.approx(-2.3)


@pytest.mark.parametrize(
    "value, loss, moves",
    [
        (0.1, 0.405, True),  # within ε of V_old = 0: plain squares
        (0.5, 0.32, False),  # closer to G = 1 than ε allows: it stops to count
        (-0.5, 1.125, True),  # farther: it counts in full
        (2.5, 1.125, True),  # past G, where the square itself is the larger
    ],
)
def test_eq4_clips_the_value_where_that_is_worse(value, loss, moves):
    values = torch.tensor([[[value]]], requires_grad=True)
    ours = ppo.value_loss(values, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), 0.2)
    assert ours.shape == (1,) and ours.item() == pytest.approx(loss, rel=1e-6)
    ours.sum().backward()
    assert values.grad.item() == pytest.approx(value - 1 if moves else 0.0, rel=1e-6)


def test_eq4_is_at_rest_at_the_true_value():
    """With λ = 1, G is what was paid from there on: the mean gradient is 0 at its mean, V_π."""
    values = true_values(LOGITS)
    returns = ppo.gae(paid(LOGITS)[None], values[None], 1.0)[0] + values
    prob = tokens_of(LOGITS).sum(1).exp()

    def loss(by_state):
        ours = (by_state[STATE] * MASK)[:, None]
        return (prob * ppo.value_loss(ours, values[:, None], returns[:, None], 9.0)).sum()

    by_state = torch.stack([values[STATE == state][0] for state in range(3)])
    by_state[1:] = torch.stack([values[1, 1], values[4, 1]])
    assert gradient_of(loss, by_state).abs().max() < 1e-12
    assert gradient_of(loss, by_state + 0.1).abs().min() > 0.01


def loss_of_rloo(ours, old, returns, picks):
    """ppo.py's loss of the samples `picks` of one prompt."""
    advantage = ppo.leave_one_out(returns[picks][None])[:, :, None]
    return ppo.policy_loss(ours[picks][None], old[picks][None], advantage, RLOO).sum() / len(picks)


@pytest.mark.parametrize("n", [2, 3])
def test_eq5_is_unbiased_over_all_sets_of_samples(n):
    """The mean over all 7^N sample sets is the gradient of E[r] − β·KL."""
    old, returns = tokens_of(LOGITS), paid(LOGITS).sum(1)

    def one(picks):
        return gradient_of(lambda x: loss_of_rloo(tokens_of(x), old, returns, picks), LOGITS)

    ours = expectation(old, n, one)
    exact = -gradient_of(objective, LOGITS)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)


def test_eq5_by_hand_and_at_the_target():
    """A sample against the mean of the others; at (T) all have the same R, and none an A."""
    ours = ppo.leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    torch.testing.assert_close(ours, torch.tensor([[-3.0, -1.5, 4.5]]))
    assert ppo.leave_one_out(paid(target()).sum(1)[None]).abs().max() < 1e-12


def test_advantages_have_mean_0_and_variance_1_over_all_tokens():
    """Not over prompts or samples; behind the end of a response there stays 0."""
    mask = torch.arange(4) < torch.tensor([[4, 1], [2, 3]])[:, :, None]
    advantage = (table(8, 2, 2, 4) * torch.tensor([3.0, 0.1])[:, None, None] + 5) * mask
    ours = ppo.whitened(ALONE, advantage, mask)
    tokens = advantage[mask]
    expected = (tokens - tokens.mean()) / tokens.std(correction=0)
    torch.testing.assert_close(ours[mask], expected, atol=1e-6, rtol=1e-6)
    assert (ours[~mask] == 0).all()
    same = ppo.whitened(ALONE, 5.0 * mask, mask)
    assert same.abs().max() == 0 and same.isfinite().all()


def test_advantages_are_whitened_over_all_processes():
    """Two processes with a prompt each give what one gives to both."""
    mask = torch.arange(4) < torch.tensor([[4, 1], [2, 3]])[:, :, None]
    advantage, sums = (table(8, 2, 2, 4) + 5) * mask, []
    for p in range(2):
        half = SimpleNamespace(average=lambda x: sums.append(x) or x)
        ppo.whitened(half, advantage[p : p + 1], mask[p : p + 1])
    both = SimpleNamespace(average=lambda x: torch.stack(sums).mean(0))
    ours = [ppo.whitened(both, advantage[p : p + 1], mask[p : p + 1]) for p in range(2)]
    torch.testing.assert_close(torch.cat(ours), ppo.whitened(ALONE, advantage, mask))


def test_the_weights_of_brain_are_those_of_rloo_to_first_order():
    """At q′ = q_θ, α̂ − β̂ of brain.py tends to A·(N−1)/(N²β), A of (5), as the spread of R falls:
    half the spread leaves a quarter of the remainder, so it is of second order."""
    n, remainders = 5, []
    for spread in (0.02, 0.01, 0.005):
        rewards, logprobs = spread * table(9, 3, n), table(10, 3, n)
        alpha = brain.posterior_weights(logprobs, rewards, logprobs, BETA)
        variable = logprobs.clone().requires_grad_()
        brain.brain_loss(variable, logprobs, alpha).sum().backward()
        ours = logprobs.clone().requires_grad_()
        advantage = ppo.leave_one_out(rewards)
        ppo.policy_loss(
            ours[:, :, None], logprobs[:, :, None], advantage[:, :, None], RLOO
        ).sum().backward()
        near = ours.grad * (n - 1) / (n**2 * BETA)
        remainders.append((variable.grad - near).norm().item())
        assert remainders[-1] < 0.05 * near.norm()
    for larger, smaller in zip(remainders, remainders[1:]):
        assert smaller / larger == pytest.approx(1 / 4, rel=0.02)


# ── per token ──
BATCH = common.Batch(make_prompts([5, 6, 7, 8], [9, 10]), [[[5, 6, 7, 1], [8, 1]], [[9], [10, 1]]])


def test_tokens_of_a_part_stand_as_in_the_whole_batch():
    """T is that of the whole; 0 behind the end; the sum over the tokens is the response's."""
    model = make_model("llama")
    whole, entropy = common.token_logprobs_and_entropy(model, BATCH, 0.9)
    assert whole.shape == entropy.shape == BATCH.mask().shape == (2, 2, 4)
    assert BATCH.mask().sum(2).tolist() == [[4, 2], [1, 2]]
    assert (whole[BATCH.mask()] < 0).all() and (entropy[BATCH.mask()] > 0).all()
    assert whole[~BATCH.mask()].abs().max() == entropy[~BATCH.mask()].abs().max() == 0
    for micro_batch in (0, 1):
        parts = common.token_logprobs(model, BATCH, 0.9, micro_batch)
        torch.testing.assert_close(parts, whole.detach(), atol=1e-5, rtol=1e-5)
        sums = common.logprobs(model, BATCH, 0.9, micro_batch)
        torch.testing.assert_close(sums, whole.detach().sum(2), atol=1e-5, rtol=1e-5)
    sums, entropies = common.logprobs_and_entropy(model, BATCH, 0.9)
    assert torch.equal(sums, whole.sum(2)) and torch.equal(entropies, entropy.sum(2))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_value_is_of_the_state_before_its_token(architecture, shared):
    """What the classifier itself gives to the prompt and the tokens before, in a row of their own."""
    model = make_model(architecture, labels=1)
    model.shared_rows = shared
    for micro_batch in (0, 1):
        values = common.token_values(model, BATCH, micro_batch)
        assert values.requires_grad and values.shape == (2, 2, 4)
        assert values[~BATCH.mask()].abs().max() == 0
        for p, (prompt, group) in enumerate(zip(BATCH.prompts, BATCH.responses)):
            for n, response in enumerate(group):
                for t in range(len(response)):
                    row = torch.tensor([prompt.tokens + response[:t]])
                    expected = model.module(row).logits.item()
                    assert values[p, n, t].item() == pytest.approx(expected, abs=1e-4)


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world of 31 responses."""
    return make_small_world(tmp_path_factory.mktemp("ppo")) | {"beta": 2.5}


@pytest.mark.parametrize("more", [{}, {"advantage": "rloo"}], ids=["gae", "rloo"])
def test_the_loop_reaches_the_target(world, tmp_path, more):
    """From the start model main() comes within 0.02 in total variation of (T)."""
    ref, rewards = all_responses(world, world["policy"])
    best = posterior(ref, rewards, world["beta"])
    after, lines = train(ppo, world, tmp_path / "run", True, **more)
    assert distance(ref, best) > 0.15 and distance(after, best) < 0.02
    if not more:
        errors = [line["ppo/value_error"] for line in lines[1:]]
        assert sum(errors[-50:]) / 50 < 0.5 * errors[0]  # V explains more than half


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_eq3_the_first_update_of_a_batch_is_reinforce(
    world, tmp_path, monkeypatch, advantage, micro_batch
):
    """The ratio is 1 to the last bit, so loss and gradient are those of −A·log π; a second update
    on the batch moves away from it."""
    seen, original = [], ppo.policy_loss

    def policy_loss(logprobs, old, advantages, args):
        seen.append((logprobs.detach(), old, advantages))
        return original(logprobs, old, advantages, args)

    monkeypatch.setattr(ppo, "policy_loss", policy_loss)
    flags = {"steps": 2, "advantage": advantage, "micro_batch": micro_batch, "max_prompt_tokens": 8}
    _, lines = train(ppo, world, tmp_path / "one", **flags)
    assert len(seen) == 2 * (2 if micro_batch else 1)
    for logprobs, old, advantages in seen:
        assert torch.equal(logprobs, old) and advantages.abs().max() > 0.1
        loss = original(logprobs, old, advantages, GAE if advantage == "gae" else RLOO)
        torch.testing.assert_close(loss, -advantages.sum((1, 2)), atol=1e-4, rtol=1e-5)
    assert all(line["ppo/kl_old"] == 0 for line in lines[1:])
    seen.clear()
    _, lines = train(ppo, world, tmp_path / "two", **flags | {"updates_per_sample": 2})
    parts = 2 if micro_batch else 1
    for i, (logprobs, old, _) in enumerate(seen):
        assert torch.equal(logprobs, old) == (i // parts % 2 == 0)
    assert all(abs(line["ppo/kl_old"]) > 0 for line in lines[1:])


def test_the_gradient_of_a_step_is_that_of_the_tokens_mean(world, tmp_path, monkeypatch):
    """−mean A·log π over all tokens of the batch, A whitened. The value, whose head begins at 0, adds
    c·½·mean G² to the loss."""
    batches, gradients, advantages, sample = [], [], [], common.sample
    clip, whitened, policies = torch.nn.utils.clip_grad_norm_, ppo.whitened, []

    def recorded(model, prompts, n, *more, **named):
        if n == 64:
            policies.append(copy.deepcopy(model))
            batches.append(sample(model, prompts, n, *more, **named))
            return batches[-1]
        return sample(model, prompts, n, *more, **named)

    def clipped(parameters, norm):
        parameters = list(parameters)
        gradients.extend(p.grad.clone() for p in parameters)
        return clip(parameters, norm)

    monkeypatch.setattr(common, "sample", recorded)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(
        ppo, "whitened", lambda *x: advantages.append(whitened(*x)) or advantages[-1]
    )
    _, lines = train(ppo, world, tmp_path / "run", steps=1)
    policy, (batch,), (advantage,) = policies[0], batches, advantages
    logprobs, _ = common.token_logprobs_and_entropy(policy, batch, 1.0)
    (-(advantage * logprobs).sum() / batch.lengths().sum()).backward()
    ours = [p.grad for p in policy.parameters()]
    for mine, theirs in zip(ours, gradients):
        torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-4)
    of_value = gradients[len(ours) :]
    assert sum(gradient.abs().max() > 0 for gradient in of_value) == 1  # the head alone
    mean_square = lines[1]["ppo/value_error"]
    assert lines[1]["loss"] == pytest.approx(0.1 * mean_square / 2, abs=1e-5)  # the mean A is 0


def test_a_value_model_of_ones_own(world, tmp_path, monkeypatch):
    """A classifier is where the value starts from, once it is checked how it is to be fed; without
    one the value is 0 at first."""
    seen, original, checked, choose = [], ppo.gae, [], common.choose_rows

    def choose_rows(flag, name, model, read):
        checked.append(flag)
        choose(flag, name, model, read)

    monkeypatch.setattr(common, "choose_rows", choose_rows)
    advantages, losses, value_loss = [], [], ppo.value_loss

    def gae(rewards, values, gae_lambda):
        seen.append(values)
        advantages.append(original(rewards, values, gae_lambda))
        return advantages[-1].clone()

    monkeypatch.setattr(ppo, "gae", gae)
    monkeypatch.setattr(ppo, "value_loss", lambda *x: losses.append(x) or value_loss(*x))
    for name in ("", world["reward_model"]):
        train(ppo, world, tmp_path / str(len(seen)), steps=1, value_model=name)
        assert ("--value-model" in checked) == bool(name)
        values, old, returns, _ = losses[-1]
        assert torch.equal(values, old) and torch.equal(old, seen[-1])
        assert torch.equal(returns, advantages[-1] + old)  # G of (4)
    assert seen[0].abs().max() == 0 < seen[1].abs().max()
    state = torch.load(tmp_path / "1" / "checkpoint" / "state.pt", weights_only=True)
    assert state["value"].keys() != state["policy"].keys()
    assert "module.score.weight" in state["value"]


def test_a_value_reads_plain_rows_where_the_policy_does(world, tmp_path, monkeypatch):
    """Started from the policy's body it has no numbers of its own to be checked by."""
    seen, original = [], common.token_values

    def token_values(model, *more):
        seen.append(model.shared_rows)
        return original(model, *more)

    def choose_rows(flag, name, model, read):
        model.shared_rows = flag != "--policy"

    monkeypatch.setattr(common, "choose_rows", choose_rows)
    monkeypatch.setattr(common, "token_values", token_values)
    train(ppo, world, tmp_path / "run", steps=1)
    assert seen and not any(seen)


def tokenizer_of_others(folder: Path) -> str:
    return save(folder, make_model("gpt2", 7, labels=1), word_tokenizer([*WORDS, "c"]))


def two_labels(folder: Path) -> str:
    return save(folder, make_model("gpt2", 6, labels=2), word_tokenizer(WORDS))


@pytest.mark.parametrize(
    "make, message",
    [
        (tokenizer_of_others, "its tokens are not those of --policy"),
        (two_labels, "num_labels is 2"),
    ],
)
def test_a_value_model_that_does_not_fit_is_refused(world, tmp_path, capsys, make, message):
    name = make(tmp_path / "value")
    capsys.readouterr()  # what saving says
    with pytest.raises(SystemExit) as stop:
        train(ppo, world, tmp_path / "run", steps=1, value_model=name)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith(f"error: --value-model {name}: ")
    assert message in error and "\n" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_the_value_is_restored_with_its_moments(world, tmp_path, monkeypatch, more):
    """A run that is broken off and resumed has the same value, moments and log, bit for bit."""
    flags = {"steps": 4, "save_every": 2, "updates_per_sample": 2, "eval_every": 2} | more
    states, logs = [], []
    for name in ("whole", "broken"):
        folder, save_ = tmp_path / name, common.Run.save

        def save_and_stop(self, step, save_=save_):
            save_(self, step)
            if step == 2:
                raise KeyboardInterrupt

        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(common.Run, "save", save_and_stop)
                train(ppo, world, folder, **flags)
            ppo.main(common.parse_args(ppo.Args, ["--resume", str(folder)]))
        else:
            train(ppo, world, folder, **flags)
        states.append(torch.load(folder / "checkpoint" / "state.pt", weights_only=True))
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines[1:]])
    assert logs[0] == logs[1]
    for part in ("policy", "value"):
        assert all(torch.equal(x, states[1][part][name]) for name, x in states[0][part].items())
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    assert any(name.startswith("value.") for name in moments[0])
    for name, ours in moments[0].items():
        assert all(torch.equal(x, moments[1][name][key]) for key, x in ours.items())
