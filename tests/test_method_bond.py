"""BOND's and J-BOND's equations on tables and on a model of 31 responses."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import save
from tables import (
    all_responses,
    distance,
    expectation,
    gradient,
    make_small_world,
    slow,
    table,
    train,
)

import bond
import common

ALONE = SimpleNamespace(world=1, average=lambda mean: mean)


def quantiles(distribution: torch.Tensor, rewards: torch.Tensor):
    """(p_<, p_≤) of each response under the distribution (log-probs)."""
    below = torch.stack([distribution.exp()[rewards < r].sum() for r in rewards])
    return below, torch.stack([distribution.exp()[rewards <= r].sum() for r in rewards])


def best_of(distribution: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """Log of (1), as π_a·p_≤^{n−1}·Σ_{i=1..n} (p_</p_≤)^{i−1}."""
    below, upto = quantiles(distribution, rewards)
    series = sum((below / upto) ** i for i in range(n))
    return distribution + (n - 1) * upto.log() + series.log()


def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL of two distributions given by log-probs."""
    return (first.exp() * (first - second)).sum()


def mean_log_best_of(distribution, rewards, n: int, k: int) -> torch.Tensor:
    """The exact mean of bond.py's log(π̂_BoN/π_a) of each response over k anchor samples."""
    below, upto = quantiles(distribution, rewards)
    counts = [(c, t, k - c - t) for c in range(k + 1) for t in range(k + 1 - c)]
    anchors = [[-1.0] * c + [0.0] * t + [1.0] * h for c, t, h in counts]
    estimates = bond.log_best_of(torch.zeros(len(counts), 1), torch.tensor(anchors), n).double()
    counts = torch.tensor(counts, dtype=torch.float64)[:, None]  # [cases, 1, 3]
    shares = torch.stack([below, upto - below, 1 - upto], 1).clamp(min=0)  # [responses, 3]
    log_odds = torch.lgamma(counts.sum(2) + 1) - torch.lgamma(counts + 1).sum(2)
    odds = (log_odds + torch.xlogy(counts, shares).sum(2)).exp()  # [cases, responses]
    torch.testing.assert_close(odds.sum(0), torch.ones_like(distribution))
    return (odds * estimates).sum(0)


def jeffreys_minimum(forward: torch.Tensor, target: torch.Tensor, b: float) -> torch.Tensor:
    """Log of the π that minimises (1−b)·KL(forward‖π) + b·KL(π‖target), target unnormalised."""
    logits = ((1 - b) * forward + b * target).log_softmax(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        distribution = logits.log_softmax(0)
        value = (1 - b) * -(forward.exp() * distribution).sum() + b * kl(distribution, target)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def loss(logprobs, log_ratio, advantage, best, **flags):
    """bond.py's loss [P]."""
    return bond.bond_loss(logprobs, log_ratio, advantage, best, bond.Args(**flags))


# ── the best-of-N distribution ──
TIED = torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 4])
def test_eq1_is_the_distribution_of_the_best_of_n(n):
    """By enumeration of all n-tuples, the first of equal best ones taken; also the other form."""
    distribution = table(0, 6).log_softmax(0)
    exact = torch.zeros(6, dtype=torch.float64)
    for picks in itertools.product(range(6), repeat=n):
        picks = torch.tensor(picks)
        winner = picks[TIED[picks].argmax()]
        exact[winner] += distribution[picks].sum().exp()
    ours = best_of(distribution, TIED, n)
    torch.testing.assert_close(ours.exp(), exact, atol=1e-12, rtol=0)
    below, upto = quantiles(distribution, TIED)
    torch.testing.assert_close(distribution.exp() * (upto**n - below**n) / (upto - below), exact)


def test_bounds_and_composition():
    """KL ≤ log N − (N−1)/N, win rate ≤ N/(N+1), near equality without ties; Bo_n twice = Bo_n²."""
    distribution, rewards = table(0, 2000).log_softmax(0), table(1, 2000)
    for n in (2, 4, 8):
        best = best_of(distribution, rewards, n)
        below, upto = quantiles(distribution, rewards)
        bound = math.log(n) - (n - 1) / n
        assert bound - 0.03 < kl(best, distribution) < bound
        assert n / (n + 1) - 0.01 < (best.exp() * (below + upto) / 2).sum() < n / (n + 1)
    distribution = table(0, 6).log_softmax(0)
    twice = best_of(best_of(distribution, TIED, 3), TIED, 3)
    torch.testing.assert_close(twice, best_of(distribution, TIED, 9))


# ── the loss ──
def test_eq3_eq4_eq7_by_hand():
    """Two policy samples, two anchors of which the second is better."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -5.0]])
    log_ratio, advantage = torch.tensor([[0.5, -0.5]]), torch.tensor([[2.0, -3.0]])
    got = loss(logprobs, log_ratio, advantage, torch.tensor([1]), jeffreys=0.25, gamma=2.0)
    backward, hold = -(-1 * 2 + -2 * -3) / 2, (-1 * 0.5 + -2 * -0.5) / 2
    assert got.item() == pytest.approx(0.75 * 5 + 0.25 * backward + 2 * hold)


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_eq2_expected_gradient_is_that_of_jeffreys_divergence(b):
    """With exact quantiles and no baseline the mean gradient over samples of the policy and pairs of
    the anchor is that of (2), two responses with equal rewards among them."""
    anchor, rewards, logits = table(0, 4).log_softmax(0), torch.tensor([1.0, 0, 0, 2]), table(2, 4)
    policy, n = logits.log_softmax(0), 2
    target = best_of(anchor, rewards, n)

    def over_anchors(picks):
        best = rewards[picks].argmax()[None]

        def over_policy(y):
            log_ratio = (policy - anchor)[y][None]
            quality = (target - anchor)[y][None]
            return gradient(
                logits,
                lambda q: loss(
                    torch.cat([q[y], q[picks]])[None],
                    log_ratio,
                    quality - log_ratio,
                    best,
                    jeffreys=b,
                ),
            )

        return expectation(policy, 1, over_policy)

    got = expectation(anchor, n, over_anchors)
    expected = gradient(logits, lambda q: (1 - b) * kl(target, q) + b * kl(q, target))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_eq4_baseline_is_the_mean_of_the_others():
    """Leave-one-out over the whole batch; with one sample there is nothing to subtract."""
    returns = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    expected = torch.tensor([[1 - 11 / 3, 2 - 10 / 3], [3 - 3.0, 6 - 2.0]])
    torch.testing.assert_close(bond.advantages(ALONE, returns), expected)
    assert bond.advantages(ALONE, torch.tensor([[5.0]])).item() == 5
    halves = [
        bond.advantages(SimpleNamespace(world=2, average=lambda mean: torch.tensor(3.0)), row[None])
        for row in returns
    ]
    torch.testing.assert_close(torch.cat(halves), expected)


def test_eq1_eq5_by_hand():
    """N = 3, p̂_≤² + p̂_≤·p̂_< + p̂_<²: shares (½, ¼) of a tie, (1, 1), (½, ½) and the floor 1/(2k)."""
    anchors = torch.tensor([[2.0, 1.0, 3.0, 4.0]])
    got = bond.log_best_of(torch.tensor([[2.0, 5.0, 2.5, 0.0]]), anchors, 3)
    expected = torch.tensor([[7 / 16, 3.0, 3 / 4, 3 / 64]])
    torch.testing.assert_close(got.exp(), expected)


@pytest.mark.parametrize("n", [2, 4])
def test_eq1_eq5_are_exact_for_anchor_samples_in_proportion(n):
    """k samples, of each response as many as its probability says, two of equal rewards among them:
    the estimate is log(π_BoN/π_a), but for the floor of the lowest level."""
    counts = torch.tensor([1000, 2000, 3000, 4000, 5000, 5000])
    anchor = (counts.double() / counts.sum()).log()
    got = bond.log_best_of(TIED[None], TIED.repeat_interleave(counts)[None], n)[0].double()
    torch.testing.assert_close(got, best_of(anchor, TIED, n) - anchor, atol=3e-4, rtol=0)


def test_eq5_the_bias_that_is_left():
    """What N = 4 aims at by the mean of the estimate over k anchor samples, b = 1: the share of the
    response of 0.64, and the total variation from (1). docs/bond.md has these numbers."""
    anchor = torch.tensor([0.10, 0.64, 0.16, 0.10], dtype=torch.float64).log()
    rewards = torch.arange(4.0)
    exact = best_of(anchor, rewards, 4)
    assert exact.exp().tolist() == pytest.approx([0.0001, 0.2998, 0.3562, 0.3439], abs=5e-5)
    without = (anchor + 3 * quantiles(anchor, rewards)[1].log()).log_softmax(0)
    assert without.exp()[1].item() == pytest.approx(0.545, abs=5e-4)
    assert distance(without, exact) == pytest.approx(0.245, abs=5e-4)
    for k, share, apart in ((4, 0.306, 0.012), (8, 0.298, 0.005), (16, 0.297, 0.003)):
        aim = (anchor + mean_log_best_of(anchor, rewards, 4, k)).log_softmax(0)
        assert aim.exp()[1].item() == pytest.approx(share, abs=5e-4), k
        assert distance(aim, exact) == pytest.approx(apart, abs=5e-4), k


@pytest.mark.parametrize("b, apart", [(0.5, 0.067), (1.0, 0.132)])
def test_eq6_the_bias_of_j_bond(b, apart):
    """Its reward knows p_≤ only: with a response of 0.64 it settles beside best-of-2, against a
    frozen anchor and with any number of samples. docs/bond.md has these numbers."""
    anchor = torch.tensor([0.10, 0.64, 0.16, 0.10], dtype=torch.float64).log()
    rewards = torch.arange(4.0)
    exact, upto = best_of(anchor, rewards, 2), quantiles(anchor, rewards)[1]
    aim = jeffreys_minimum(exact, anchor - math.log(16) * (1 - upto) ** 2, b)
    assert distance(aim, exact) == pytest.approx(apart, abs=5e-4)


def test_eq6_reward_of_j_bond():
    """−log 16 below both anchors, strictly; its mean over anchor pairs is −log16·(1−p_≤)²."""
    got = bond.j_bond_reward(torch.tensor([[0.0, 1.0, 1.5, 3.0]]), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(got, -math.log(16) * torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    anchor = table(0, 6).log_softmax(0)
    mean = expectation(
        anchor, 2, lambda picks: bond.j_bond_reward(TIED[None], TIED[picks][None])[0]
    )
    upto = quantiles(anchor, TIED)[1]
    torch.testing.assert_close(mean.double(), -math.log(16) * (1 - upto) ** 2, atol=1e-6, rtol=0)


def test_eq6_at_the_start():
    """Policy = anchor, no ties: a third is penalised, the mean is −log(16)/3 = −0.9242."""
    rewards = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0))
    got = bond.j_bond_reward(rewards[:, :1], rewards[:, 1:])
    assert (got < 0).double().mean().item() == pytest.approx(1 / 3, abs=0.005)
    assert got.double().mean().item() == pytest.approx(-0.9242, abs=0.015)


def test_eq7_gamma_holds_the_policy_at_the_anchor():
    """The γ term's mean gradient is that of KL(π‖π_a): a step down it comes closer to the anchor."""
    anchor, logits = table(0, 5).log_softmax(0), table(1, 5)
    policy = logits.log_softmax(0)

    def one(picks):
        log_ratio, zero = (policy - anchor)[picks][None], torch.zeros(1, 1).double()
        return gradient(
            logits,
            lambda q: loss(
                torch.cat([q[picks], q[:1]])[None],
                log_ratio,
                zero,
                torch.tensor([0]),
                jeffreys=1.0,
                gamma=0.7,
            ),
        )

    got = expectation(policy, 1, one)
    torch.testing.assert_close(got, gradient(logits, lambda q: 0.7 * kl(q, anchor)))


def test_invariances():
    """Monotone transforms of the reward change neither quantile nor r_J nor the best."""
    rewards, anchors = table(0, 3, 4), table(1, 3, 2)
    for f in (torch.exp, lambda x: 3 * x**3 - 1):
        torch.testing.assert_close(
            bond.log_best_of(f(rewards), f(anchors), 3), bond.log_best_of(rewards, anchors, 3)
        )
        torch.testing.assert_close(
            bond.j_bond_reward(f(rewards), f(anchors)), bond.j_bond_reward(rewards, anchors)
        )
    logprobs, log_ratio, advantage = table(2, 3, 6), table(3, 3, 4), table(4, 3, 4)
    best = torch.tensor([0, 1, 0])
    single = loss(logprobs.float(), log_ratio.float(), advantage.float(), best, gamma=0.3)
    torch.testing.assert_close(
        loss(logprobs, log_ratio, advantage, best, gamma=0.3), single.double(), atol=1e-5, rtol=1e-5
    )


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world of 6 responses."""
    return make_small_world(tmp_path_factory.mktemp("bond"), 1) | {
        "prompts_per_step": 64,
        "samples_per_prompt": 4,
    }


@pytest.mark.parametrize("b", [slow(0.0), 0.5, slow(1.0)])
def test_j_bond_reaches_its_stationary_distribution_against_a_frozen_anchor(world, tmp_path, b):
    """η = 0: the minimum of (1−b)·KL(Bo2‖π) + b·KL(π‖π_a·exp(−log16·(1−p_≤)²))."""
    ref, rewards = all_responses(world, world["policy"])
    target = ref - math.log(16) * (1 - quantiles(ref, rewards)[1]) ** 2
    goal = jeffreys_minimum(best_of(ref, rewards, 2), target, b)
    after, _ = train(
        bond,
        world,
        tmp_path / "run",
        True,
        eta=0.0,
        jeffreys=b,
        prompts_per_step=128 if b else 256,  # for b = 0 the best alone teaches, which is noisier
        lr=5e-3,
        steps=150,
    )
    assert distance(ref, goal) > 0.1 and distance(after, goal) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_bond_reaches_best_of_n_of_the_start_model(world, tmp_path, b):
    """--anchor fixed, N = 4: (1) for b = 0.

    For b > 0 it is the distribution that the mean of the estimate over k = 4 anchor samples gives.
    How far that is from (1) is the bias of (5).
    """
    ref, rewards = all_responses(world, world["policy"])
    exact = best_of(ref, rewards, 4)
    goal = jeffreys_minimum(exact, ref + mean_log_best_of(ref, rewards, 4, 4), b)
    after, _ = train(
        bond,
        world,
        tmp_path / "run",
        True,
        anchor="fixed",
        best_of=4,
        anchor_samples=4,
        jeffreys=b,
        prompts_per_step=64 if b else 192,
        lr=5e-3,
        steps=150,
    )
    assert distance(ref, goal) > 0.2 and distance(after, goal) < 0.02


@pytest.fixture(scope="module")
def one_response_of_64_percent(world, tmp_path_factory):
    """The world with a start model that ends at once with probability 0.64."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(world["policy"])
    with torch.no_grad():
        policy.lm_head.weight[1] *= 1.762
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["policy"])
    return world | {"policy": save(tmp_path_factory.mktemp("atom") / "sft", policy, tokenizer)}


@pytest.mark.parametrize(
    "case", [("response", 0.5), slow(("response", 1.0)), slow(("level", 1.0))], ids=str
)
def test_best_of_n_is_reached_where_much_probability_is_in_one_place(
    world, one_response_of_64_percent, tmp_path, monkeypatch, case
):
    """--anchor fixed, N = 4, k = 32: within 0.02 of (1) with a response of 0.64, or with a level of
    reward that three responses share. Without the sum of (1) it would settle more than 0.1 away."""
    place, b = case
    if place == "level":
        flags, score = world, common.score
        monkeypatch.setattr(common, "score", lambda *x: score(*x).round())
    else:
        flags = one_response_of_64_percent
    ref, rewards = all_responses(flags, flags["policy"])
    levels = torch.stack([ref.exp()[rewards == r].sum() for r in rewards])
    assert levels.max().item() == pytest.approx(0.64 if place == "response" else 0.56, abs=0.01)
    exact = best_of(ref, rewards, 4)
    without = jeffreys_minimum(exact, ref + 3 * quantiles(ref, rewards)[1].log(), b)
    after, _ = train(
        bond,
        flags,
        tmp_path / "run",
        True,
        anchor="fixed",
        best_of=4,
        anchor_samples=32,
        jeffreys=b,
        prompts_per_step=16,
        samples_per_prompt=8,
        lr=5e-3,
        steps=150,
    )
    assert distance(after, exact) < 0.02 < 0.1 < distance(without, exact)


@pytest.mark.parametrize("mixed", [False, True])
def test_eq8_the_anchor_is_the_exact_moving_average(world, tmp_path, monkeypatch, mixed):
    """After every optimizer step, in place, also with several updates a batch; in float32, also
    where the policy computes in bfloat16, as on a GPU."""
    anchors, starts, policies, original = [], [], [], torch.optim.AdamW.step
    load, copy = common.load_policy, common.frozen_copy

    def step(self, *x, **y):
        out = original(self, *x, **y)
        policies.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return out

    def load_policy(*inputs):
        policy = load(*inputs)
        policy.mixed = mixed
        return policy

    def frozen_copy(*inputs):
        anchors.append(copy(*inputs))
        starts.append([p.clone() for p in anchors[-1].parameters()])
        return anchors[-1]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(common, "load_policy", load_policy)
    monkeypatch.setattr(common, "frozen_copy", frozen_copy)
    train(bond, world, tmp_path / "run", steps=3, updates_per_sample=2, eta=0.3, warmup_steps=0)
    assert len(policies) == 6
    for i, (start, now) in enumerate(zip(starts[1], anchors[1].parameters(), strict=True)):
        expected = start.clone()
        for policy in policies:
            expected = 0.7 * expected + 0.3 * policy[i]
        torch.testing.assert_close(now.data, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("updates, expected", [(1, [1, 5, 9]), (2, [1, 3, 5, 7, 9])])
def test_copy_renews_the_anchor_every_1_over_eta_updates(world, tmp_path, updates, expected):
    """bond/kl_anchor is exactly 0 in the step after a copy. Updates count, as for the average."""
    _, lines = train(
        bond,
        world,
        tmp_path / "run",
        steps=9,
        updates_per_sample=updates,
        anchor="copy",
        eta=0.25,
        warmup_steps=0,
        anchor_samples=4,
        best_of=4,
    )
    fresh = [line["step"] for line in lines[1:] if abs(line["bond/kl_anchor"]) < 1e-6]
    assert fresh == expected


@pytest.mark.slow
def test_gamma_slows_the_policy_down(world, tmp_path):
    """KL from the start model after the same steps falls with γ."""
    ref, _ = all_responses(world, world["policy"])
    kls = [
        kl(train(bond, world, tmp_path / str(gamma), steps=80, gamma=gamma, eta=0.2)[0], ref).item()
        for gamma in (0.0, 1.0, 4.0)
    ]
    assert kls[0] > kls[1] > kls[2]


def test_policy_and_anchor_samples_stand_side_by_side(world, tmp_path, monkeypatch):
    """N of the policy first, then k of the anchor, with their own lengths."""
    seen, original = [], common.Batch.beside
    monkeypatch.setattr(
        common.Batch,
        "beside",
        lambda self, other: seen.append((self, other, original(self, other))) or seen[-1][2],
    )
    train(bond, world, tmp_path / "run", steps=1)
    ours, theirs, both = seen[0]
    assert both.lengths().shape == (64, 6)
    for batch, columns in ((ours, slice(0, 4)), (theirs, slice(4, 6))):
        assert [group[columns] for group in both.responses] == batch.responses
