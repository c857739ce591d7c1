"""BRAIn's equations on models and tables whose every response can be listed."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from models import make_model
from tables import (
    all_responses,
    distance,
    expectation,
    gradient,
    make_small_world,
    posterior,
    slow,
    table,
)

import brain
import common
import dpo

torch.set_default_dtype(torch.float32)


def step_weights(estimator, logprobs, ref, proposal, rewards, beta):
    """−∂L/∂log q_θ of brain.py's own loss, [P, N]."""
    logprobs = logprobs.clone().requires_grad_()
    alpha = brain.posterior_weights(ref, rewards, proposal, beta)
    brain.brain_loss(logprobs, proposal, alpha, estimator).sum().backward()
    return -logprobs.grad


def expected_gradient(estimator, logits, ref, proposal, rewards, beta, n):
    """Mean gradient in the logits of a table policy, over all n-tuples of responses drawn from the
    proposal, with their exact probabilities."""

    def one(picks):
        alpha = brain.posterior_weights(
            ref[picks][None], rewards[picks][None], proposal[picks][None], beta
        )
        return gradient(
            logits,
            lambda q: brain.brain_loss(q[picks][None], proposal[picks][None], alpha, estimator),
        )

    return expectation(proposal, n, one)


# ── equations ──
def test_eq1_weights_are_the_self_normalised_posterior():
    """By hand: p = (.5, .25), r = (0, τ log 3), q′ = (.25, .5) gives weights 2 : 1.5."""
    alpha = brain.posterior_weights(
        torch.tensor([[0.5, 0.25]]).log(),
        torch.tensor([[0.0, 2 * math.log(3)]]),
        torch.tensor([[0.25, 0.5]]).log(),
        beta=2.0,
    )
    torch.testing.assert_close(alpha, torch.tensor([[4 / 7, 3 / 7]]))


def test_eq1_invariances():
    """Sums to 1 a prompt; a constant in a prompt's rewards or log-probs and any order change
    nothing."""
    ref, proposal, rewards = table(0, 3, 5), table(1, 3, 5), table(2, 3, 5)
    alpha = brain.posterior_weights(ref, rewards, proposal, 0.7)
    torch.testing.assert_close(alpha.sum(1), torch.ones(3, dtype=torch.float64))
    shift = table(3, 3, 1)
    torch.testing.assert_close(
        brain.posterior_weights(ref - shift, rewards + shift, proposal + 2, 0.7), alpha
    )
    order = torch.randperm(5)
    torch.testing.assert_close(
        brain.posterior_weights(ref[:, order], rewards[:, order], proposal[:, order], 0.7),
        alpha[:, order],
    )
    single = [x.float() for x in (ref, rewards, proposal)]
    torch.testing.assert_close(
        brain.posterior_weights(*single, 0.7).double(), alpha, atol=1e-6, rtol=1e-5
    )


def test_eq2_eq3_loss_is_the_divergence_of_the_two_weights():
    """By hand: α̂ = (.4, .6), q_θ/q′ = (1, 3) so β̂ = (.25, .75)."""
    loss = brain.brain_loss(
        torch.tensor([[0.5, 0.5]]).log(),
        torch.tensor([[0.5, 1 / 6]]).log(),
        torch.tensor([[0.4, 0.6]]),
    )
    assert loss.item() == pytest.approx(0.4 * math.log(1.6) + 0.6 * math.log(0.8), abs=1e-6)


def test_eq4_autograd_of_eq3():
    """The gradient of (3) is −(α̂ − β̂) to 1e-10; a constant added to log q_θ changes nothing."""
    logprobs, ref, proposal, rewards = (table(i, 4, 6) for i in range(4))
    alpha = (ref + rewards / 0.5 - proposal).softmax(1)
    weights = step_weights("brain", logprobs, ref, proposal, rewards, 0.5)
    torch.testing.assert_close(
        weights, alpha - (logprobs - proposal).softmax(1), atol=1e-10, rtol=0
    )
    shifted = step_weights("brain", logprobs + table(9, 4, 1), ref, proposal, rewards, 0.5)
    torch.testing.assert_close(shifted, weights, atol=1e-10, rtol=0)


def test_eq4_weights_of_the_ablations():
    """no-self-norm: α̂ − q_θ/(N·q′); no-baseline: α̂."""
    logprobs, ref, proposal, rewards = (table(i, 4, 6) for i in range(4))
    alpha = (ref + rewards / 0.5 - proposal).softmax(1)
    inputs = (logprobs, ref, proposal, rewards, 0.5)
    torch.testing.assert_close(
        step_weights("no-self-norm", *inputs),
        alpha - (logprobs - proposal).exp() / 6,
        atol=1e-10,
        rtol=0,
    )
    torch.testing.assert_close(step_weights("no-baseline", *inputs), alpha, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_gradient_is_zero_at_the_posterior(n):
    """Of every single batch, whatever the proposal: fixed, the policy itself, or any other."""
    ref, rewards = table(0, 9).log_softmax(0), table(1, 9)
    target = posterior(ref, rewards, 0.4)
    for proposal in (ref, target, table(2, 9).log_softmax(0)):
        for seed in range(20):
            picks = torch.randint(9, (5, n), generator=torch.Generator().manual_seed(seed))
            weights = step_weights(
                "brain", target[picks], ref[picks], proposal[picks], rewards[picks], 0.4
            )
            assert weights.abs().max() < 1e-12


@pytest.mark.parametrize("estimator", ["no-self-norm", "no-baseline"])
def test_ablations_have_a_biased_fixed_point(estimator):
    """Their exact expected gradient at the posterior is not zero while q′ stays p, the same for
    both, and shrinks when q′ becomes the policy."""
    ref, rewards = table(0, 4).log_softmax(0), table(1, 4)
    target = posterior(ref, rewards, 0.5)
    fixed = expected_gradient(estimator, target, ref, ref, rewards, 0.5, 3)
    other = expected_gradient("no-baseline", target, ref, ref, rewards, 0.5, 3)
    assert fixed.norm() > 0.01
    torch.testing.assert_close(fixed, other, atol=1e-12, rtol=0)
    renewed = expected_gradient(estimator, target, ref, target, rewards, 0.5, 3)
    assert renewed.norm() < 1e-12
    assert expected_gradient("brain", target, ref, ref, rewards, 0.5, 3).norm() < 1e-12


def test_expected_gradient_tends_to_that_of_the_divergence():
    """As N grows the self-normalised estimate's mean gradient tends to ∇KL(posterior ‖ q_θ)."""
    ref, rewards, logits = table(0, 3).log_softmax(0), table(1, 3), table(2, 3)
    exact = logits.softmax(0) - posterior(ref, rewards, 1.0).exp()
    gaps = [
        (expected_gradient("brain", logits, ref, ref, rewards, 1.0, n) - exact).norm()
        for n in (2, 4, 8)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    picks = torch.multinomial(
        ref.exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )[None]
    weights = step_weights(
        "brain", logits.log_softmax(0)[picks], ref[picks], ref[picks], rewards[picks], 1.0
    )[0]
    limit = -torch.zeros(3, dtype=torch.float64).index_add(0, picks[0], weights)
    torch.testing.assert_close(limit, exact, atol=0.01, rtol=0)


# ── the ladder from DPO ──
def losses_of_a_pair(logprobs, proposal, ref, rewards, beta, estimator="arg-max"):
    """BRAIn's loss [P] of two samples, and DPO's with coefficient 1 and q′ for reference, [P] for
    the sample with the larger weight (1) as the preferred one, and [P] for the other."""
    weights = brain.posterior_weights(ref, rewards, proposal, beta, estimator)
    ours = brain.brain_loss(logprobs, proposal, weights, estimator)
    best, free = weights.argmax(1, keepdim=True), torch.zeros(len(rewards), dtype=torch.bool)
    theirs = []
    for winner in (best, 1 - best):
        pair = torch.cat([winner, 1 - winner], 1)
        both = logprobs.gather(1, pair), proposal.gather(1, pair)
        theirs.append(dpo.dpo_loss(*both, free, dpo.Args(beta=1.0)))
    return ours, *theirs, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_ref", [True, False])
def test_two_samples_and_arg_max_are_dpo_with_coefficient_1(dtype, of_ref):
    """−log β̂ of the better one is −log σ(Δ) against q′, whatever --beta. Bit for bit where q_θ = q′,
    value and gradient; else to rounding. With q′ = p the better one is that of the rewards."""
    ref, rewards, noise, moved = (table(i, 500, 2).to(dtype) for i in range(4))
    proposal = ref if of_ref else ref + noise
    for logprobs, rounding in ((proposal, 0.0), (proposal + moved, 8 * torch.finfo(dtype).eps)):
        logprobs = logprobs.clone().requires_grad_()
        ours, dpos, _, weights = losses_of_a_pair(logprobs, proposal, ref, rewards, 0.3)
        torch.testing.assert_close(ours, dpos, atol=rounding, rtol=rounding)
        slopes = [torch.autograd.grad(x.sum(), logprobs, retain_graph=True) for x in (ours, dpos)]
        torch.testing.assert_close(*slopes, atol=rounding, rtol=rounding)
        assert weights.sort(1).values.unique(dim=0).tolist() == [[0.0, 1.0]]
    assert torch.equal(weights.argmax(1), rewards.argmax(1)) == of_ref


def test_two_samples_and_softmax_are_dpo_with_soft_labels():
    """KL(α̂ ‖ β̂) is the mean of DPO's loss over Bradley-Terry labels, P(w ≻ l) = σ((r_w − r_l)/τ),
    minus the entropy of the labels: the optimum is (T), where with arg-max there is none."""
    logprobs, ref, rewards = (table(i, 50, 2) for i in range(3))
    ours, better, worse, weights = losses_of_a_pair(logprobs, ref, ref, rewards, 0.7, "brain")
    label = torch.sigmoid((rewards.amax(1) - rewards.amin(1)) / 0.7)
    torch.testing.assert_close(weights.amax(1), label)
    entropy = torch.special.entr(weights).sum(1)
    torch.testing.assert_close(ours, label * better + (1 - label) * worse - entropy)


def test_arg_max_of_many_samples_puts_all_weight_on_one():
    """That of the largest (1), which counts log p − log q′ too."""
    weights = brain.posterior_weights(
        torch.tensor([[-1.0, -1.0, -9.0]]),
        torch.tensor([[1.0, 3.0, 2.0]]),
        torch.tensor([[-1.0, -1.0, -15.0]]),
        1.0,
        "arg-max",
    )
    assert weights.tolist() == [[0.0, 0.0, 1.0]]


def test_bug24_one_hot_weights_are_finite():
    """Rewards of ±1e4 at a tiny τ, and log-ratios of hundreds of nats, give no NaN."""
    logprobs = torch.tensor([[-900.0, -1.0, -300.0]], requires_grad=True)
    alpha = brain.posterior_weights(
        torch.zeros(1, 3),
        torch.tensor([[1e4, -1e4, 0.0]]),
        torch.tensor([[-5.0, -2.0, -700.0]]),
        1e-3,
    )
    loss = brain.brain_loss(logprobs, torch.tensor([[-5.0, -2.0, -700.0]]), alpha)
    loss.sum().backward()
    assert (
        alpha.tolist() == [[1, 0, 0]] and loss.isfinite().all() and logprobs.grad.isfinite().all()
    )


def test_no_gradient_reaches_the_target_weights():
    """main computes α̂ from log-probs without gradient."""
    model = make_model("llama")
    batch = common.Batch([common.Prompt("", [5])], [[[6, 1], [7, 1]]])
    assert not common.logprobs(model, batch, 1.0).requires_grad


def test_kl_estimates():
    """On-policy k1 is the mean log-ratio; off-policy both tend to the exact KL; k3 ≥ 0."""
    ref, policy, proposal = (table(i, 6).log_softmax(0) for i in range(3))
    exact = (policy.exp() * (policy - ref)).sum()
    picks = torch.multinomial(
        policy.exp(), 12, replacement=True, generator=torch.Generator().manual_seed(0)
    ).view(3, 4)
    ours = common.kl_estimates(policy[picks], ref[picks], policy[picks])
    torch.testing.assert_close(ours["kl/ref"], (policy - ref)[picks].mean())
    picks = torch.multinomial(
        proposal.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )[None]
    ours = common.kl_estimates(policy[picks], ref[picks], proposal[picks])
    for value in ours.values():
        assert value.item() == pytest.approx(exact.item(), rel=0.03)


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world of 31 responses."""
    return brain.Args(**make_small_world(tmp_path_factory.mktemp("enumerable")) | {"beta": 2.5})


@pytest.mark.parametrize("refresh", [slow(0), 20])
def test_the_loop_reaches_the_posterior(world, tmp_path, refresh):
    """From the start model main() comes within 0.02 in total variation of (T); the
    proposal fixed or renewed."""
    args = replace(world, run_dir=str(tmp_path / "run"), refresh_every=refresh)
    brain.main(args)
    ref, rewards = all_responses(vars(args), args.policy)  # they sum to 1
    target = posterior(ref, rewards, args.beta)
    after, _ = all_responses(vars(args), str(tmp_path / "run" / "final"))
    assert distance(ref, target) > 0.15 and distance(after, target) < 0.02


def test_the_first_rung_of_the_ladder_is_a_run_of_dpo(world, tmp_path):
    """Two samples of the start model, --estimator arg-max: the loss at every step, and the policy
    at the end, of `dpo.py --beta 1`, which puts the better response of a pair first."""
    flags = {"samples_per_prompt": 2, "prompts_per_step": 16, "steps": 20}
    lines, policies = {}, {}
    for script, more in ((brain, {"estimator": "arg-max", "refresh_every": 0}), (dpo, {})):
        given = {name: value for name, value in vars(world).items() if name != "refresh_every"}
        given = {name: value for name, value in given.items() if name in vars(script.Args())}
        beta = world.beta if script is brain else 1.0
        folder = tmp_path / script.__name__
        script.main(script.Args(**given | flags | more | {"beta": beta, "run_dir": str(folder)}))
        text = (folder / "metrics.jsonl").read_text()
        lines[script] = [json.loads(line) for line in text.splitlines()]
        policies[script] = all_responses(vars(world), str(folder / "final"))[0]
    assert lines[brain][1]["loss"] == lines[dpo][1]["loss"] == pytest.approx(math.log(2))
    for ours, theirs in zip(lines[brain][1:], lines[dpo][1:], strict=True):
        for key in ("loss", "reward/mean", "reward/std", "kl/ref", "optim/grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    ref, _ = all_responses(vars(world), world.policy)
    assert distance(*policies.values()) < 1e-3 < 0.1 < distance(ref, policies[brain])


def test_weights_that_overflow_stop_the_run(world, tmp_path, monkeypatch, capsys):
    """q_θ/q′ = e^200 in no-self-norm ends in one line that names the flags to change; brain, whose
    weights are softmaxes, goes on."""
    loss = brain.brain_loss
    monkeypatch.setattr(brain, "brain_loss", lambda q, proposal, *x: loss(q, proposal - 200, *x))
    brain.main(replace(world, run_dir=str(tmp_path / "brain"), steps=2))
    wild = replace(world, run_dir=str(tmp_path / "wild"), steps=2, estimator="no-self-norm")
    with pytest.raises(SystemExit) as stop:
        brain.main(wild)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: the loss is NaN or infinite")
    assert error.endswith("take a smaller --lr or fewer --updates-per-sample")


def test_bug10_bug21_first_lines_and_learning_rate(world, tmp_path):
    """Step 0: KL 0. Step 1: β̂ is uniform, loss = log N − entropy(α̂). Bug 21: warm-up as stated.
    A run with --micro-batch takes the same steps."""
    lines = {}
    for micro_batch in (0, 1):
        args = replace(
            world,
            run_dir=str(tmp_path / str(micro_batch)),
            steps=8,
            warmup_steps=5,
            updates_per_sample=2,
            refresh_every=1,
            micro_batch=micro_batch,
        )
        brain.main(args)
        text = (tmp_path / str(micro_batch) / "metrics.jsonl").read_text()
        lines[micro_batch] = [json.loads(line) for line in text.splitlines()]
    assert lines[0][0]["eval/kl"] == 0
    for k, line in enumerate(lines[0][1:], 1):
        assert line["optim/lr"] == pytest.approx(args.lr * min(1, 2 * k / 5))
    for whole, parts in zip(*lines.values(), strict=True):
        for key in ("loss", "reward/mean", "kl/ref", "optim/grad_norm", "entropy/token"):
            if key in whole:
                assert parts[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-5)


def test_step_1_loss_is_log_n_minus_the_entropy_of_alpha(world, tmp_path, monkeypatch):
    """β̂ is uniform before the first update."""
    seen, loss = [], brain.brain_loss
    monkeypatch.setattr(brain, "brain_loss", lambda *x: seen.append(x[2]) or loss(*x))
    brain.main(replace(world, run_dir=str(tmp_path / "run"), steps=1))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    entropy = torch.special.entr(seen[0]).sum(1).mean().item()
    assert line["loss"] == pytest.approx(math.log(64) - entropy, abs=1e-4)
    share = (1 / seen[0].square().sum(1)).mean().item() / 64
    assert line["weights/ess"] == pytest.approx(share, abs=1e-5)


def test_final_is_a_checkpoint(world, tmp_path):
    """final/ loads with from_pretrained and differs from the start."""
    brain.main(replace(world, run_dir=str(tmp_path / "run"), steps=1, warmup_steps=0))
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    start = transformers.AutoModelForCausalLM.from_pretrained(world.policy)
    assert any(
        not torch.equal(a, b) for a, b in zip(final.parameters(), start.parameters(), strict=True)
    )
