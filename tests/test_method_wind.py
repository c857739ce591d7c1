"""WIND's risks and the game they solve, on tables and on a model of 31 responses."""

import itertools
import math

import pytest
import torch
from tables import (
    all_responses,
    distance,
    expectation,
    gradient,
    make_small_world,
    posterior,
    samplers,
    slow,
    table,
    train,
)

import wind

ARMS = 4000
PREFERENCES = ["hard", "bradley-terry"]


def game(rewards: torch.Tensor, preference: str = "hard") -> torch.Tensor:
    """P(y ≻ y′) of a scalar reward, [arms, arms]: ties ½, or odds exp(r) : exp(r′)."""
    mine, theirs = rewards.double()[:, None], rewards.double()
    if preference == "hard":
        return (mine > theirs).double() + 0.5 * (mine == theirs)
    return mine.exp() / (mine.exp() + theirs.exp())


ROCK_PAPER_SCISSORS = torch.tensor(
    [[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64
)


def exact_step(previous, ref, preference, beta, eta):
    """Log of the step's solution: π_t^{1/(1+βη)} π_ref^{βη/(1+βη)} exp(η/(1+βη)·g_t), normalised."""
    g = preference @ previous.exp()
    return ((previous + beta * eta * ref + eta * g) / (1 + beta * eta)).log_softmax(0)


def equilibrium(ref, preference, beta, steps=20_000):
    """Log of π* ∝ π_ref·exp(g_π*/β), by exact steps of η = 4β."""
    policy = ref
    for _ in range(steps):
        policy, old = exact_step(policy, ref, preference, beta, 4 * beta), policy
        if (policy - old).abs().max() < 1e-15:
            break
    return policy


def loss(logprobs, ref, previous, win_rate, **flags):
    """wind.py's loss [P] of log-probs [P, N]."""
    return wind.wind_loss(logprobs, ref, previous, win_rate, wind.Args(**flags))


# ── the estimates ──
def test_eq2_win_rates():
    """By hand, with a tie; with itself the mean is ½, and so is it without."""
    rewards = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(
        wind.win_rates(rewards, "square"), torch.tensor([[3.5, 2.0, 2.0, 0.5]]) / 4
    )
    for risk in ("kl", "nce"):
        torch.testing.assert_close(
            wind.win_rates(rewards, risk), torch.tensor([[3.0, 1.5, 1.5, 0.0]]) / 3
        )
        mean = wind.win_rates(table(0, 5, 7), risk).mean(1)
        torch.testing.assert_close(mean, torch.full((5,), 0.5, dtype=torch.float64))


def test_eq2_win_rates_of_bradley_terry():
    """By hand, with a reward of log 3, so that it wins 3 of 4 against 0; with itself, and without."""
    rewards = torch.tensor([[math.log(3), 0.0, 0.0]])
    torch.testing.assert_close(
        wind.win_rates(rewards, "square", "bradley-terry"), torch.tensor([[2.0, 1.25, 1.25]]) / 3
    )
    for risk in ("kl", "nce"):
        torch.testing.assert_close(
            wind.win_rates(rewards, risk, "bradley-terry"), torch.tensor([[1.5, 0.75, 0.75]]) / 2
        )


@pytest.mark.parametrize("risk", ["square", "kl"])
def test_bradley_terry_between_a_coin_and_the_higher_reward(risk):
    """A constant in the rewards changes nothing; without spread all win half; with a large one the
    higher reward wins, as with hard preferences."""
    rewards = table(0, 4, 6)
    win_rate = wind.win_rates(rewards, risk, "bradley-terry")
    torch.testing.assert_close(wind.win_rates(rewards + 7, risk, "bradley-terry"), win_rate)
    coin = torch.full((4, 6), 0.5, dtype=torch.float64)
    torch.testing.assert_close(win_rate.mean(1), coin[:, 0])
    flat = wind.win_rates(rewards * 1e-9, risk, "bradley-terry")
    torch.testing.assert_close(flat, coin, atol=1e-8, rtol=0)
    steep = wind.win_rates(rewards * 1e9, risk, "bradley-terry")
    torch.testing.assert_close(steep, wind.win_rates(rewards, risk))


def test_eq1_eq3_by_hand():
    """β = 1, η = 2: ψ = 1.5·log π − log π_ref − ½·log π_t."""
    logprobs, ref, previous = (
        torch.tensor([x]) for x in ([-1.0, -2.0], [-2.0, -2.0], [-1.0, -3.0])
    )
    win_rate = torch.tensor([[0.75, 0.25]])
    psi = [1.5 * -1 + 2 + 0.5, 1.5 * -2 + 2 + 1.5]
    residual = psi[0] - 0.75 - (psi[1] - 0.25)
    got = loss(logprobs, ref, previous, win_rate, beta=1.0, eta=2.0)
    assert got.item() == pytest.approx((residual / 2) ** 2)


def test_eq3_first_loss_is_the_variance_of_the_win_rates():
    """Where policy, opponent and reference are one, ψ is 0."""
    logprobs, rewards = table(0, 3, 8), table(1, 3, 8)
    win_rate = wind.win_rates(rewards, "square").double()
    torch.testing.assert_close(
        loss(logprobs, logprobs, logprobs, win_rate, beta=0.3, eta=2.0),
        win_rate.var(1, correction=0),
    )
    assert win_rate.var(1, correction=0)[0].item() == pytest.approx((1 - 1 / 64) / 12)


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("n", [2, 3])
def test_eq3_pairing_rule(n, preference):
    """The exact mean gradient of `square` over all n-tuples is 0 at the exact step with win rates
    that include self, and is not with leave-one-out win rates."""
    ref, previous, rewards = table(0, 4).log_softmax(0), table(1, 4).log_softmax(0), table(2, 4)
    beta, eta = 0.3, 0.9
    solution = exact_step(previous, ref, game(rewards, preference), beta, eta)

    def mean_gradient(risk):
        def one(picks):
            win_rate = wind.win_rates(rewards[picks][None], risk, preference)
            return gradient(
                solution,
                lambda q: loss(
                    q[picks][None],
                    ref[picks][None],
                    previous[picks][None],
                    win_rate,
                    beta=beta,
                    eta=eta,
                    risk="square",
                ),
            )

        return expectation(previous, n, one)

    assert mean_gradient("square").abs().max() < 1e-12
    assert mean_gradient("kl").norm() > 1e-3


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("risk", ["kl", "nce"])
def test_eq4_eq5_are_least_where_s_is_the_win_rate(risk, preference):
    """A group with each response as often as its probability says, so that ĝ is g but for 1/K: the
    gradient of a response vanishes where ψ is g up to a constant, and not where it is else."""
    picks = torch.tensor([0] * 100 + [1] * 200 + [2] * 300 + [3] * 400)
    distribution, rewards = picks.bincount() / 1000.0, torch.tensor([2.0, 0.0, 3.0, 1.0])
    g = game(rewards, preference) @ distribution.double()
    win_rate = wind.win_rates(rewards[picks][None], risk, preference).double()
    none = torch.zeros(1, 1000, dtype=torch.float64)

    def slopes(psi):  # β 1, η large: ψ = log π − log π_ref
        psi = psi[picks][None].requires_grad_()
        out = loss(psi, none, none, win_rate, beta=1.0, eta=1e12, risk=risk)
        (slope,) = torch.autograd.grad(out.sum(), psi)
        return torch.zeros(4, dtype=torch.float64).index_add(0, picks, slope[0])

    for constant in (0.0, -0.3):
        assert slopes(g + constant).abs().max() < 3e-3
        off = slopes(g * 0.5 + constant)
        assert off.abs().max() > 0.05 and ((off < 0) == (g > 0.5)).all()


def test_smooth_log():
    """The logarithm above FLOOR; below it value, slope and curvature go on, and nothing is infinite."""
    x = torch.tensor([1.0, 0.3, wind.FLOOR, 0.0, -1e3], dtype=torch.float64, requires_grad=True)
    y = wind.smooth_log(x)
    torch.testing.assert_close(y[:3], x[:3].log())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and slope.isfinite().all()
    assert slope[3].item() == pytest.approx(2 / wind.FLOOR) and slope[4] > slope[3]
    near = torch.tensor([wind.FLOOR - 1e-6, wind.FLOOR + 1e-6], dtype=torch.float64)
    assert wind.smooth_log(near).diff().item() == pytest.approx(2e-6 / wind.FLOOR, rel=1e-4)


def test_sppo_is_the_limit_of_a_small_beta():
    """β = 0: the loss is that of SPPO, (log π/π_t − η(P̂ − ½))²/η² with log Z cancelled."""
    logprobs, ref, previous, rewards = (table(i, 3, 5) for i in range(4))
    win_rate = wind.win_rates(rewards, "square").double()
    ours = loss(logprobs, ref, previous, win_rate, beta=0.0, eta=3.0)
    residual = (logprobs - previous) - 3.0 * (win_rate - 0.5)
    residual = residual - residual.mean(1, keepdim=True)
    torch.testing.assert_close(ours, residual.square().mean(1) / 9)


def test_invariances():
    """Monotone transforms of the reward, the order of samples, a constant in the log-probs."""
    logprobs, ref, previous, rewards = (table(i, 3, 5) for i in range(4))
    for risk in ("square", "kl", "nce"):
        win_rate = wind.win_rates(rewards, risk)
        torch.testing.assert_close(wind.win_rates(rewards.exp() * 7 - 2, risk), win_rate)
        order = torch.randperm(5)
        expected = loss(logprobs, ref, previous, win_rate, risk=risk)
        got = loss(*(x[:, order] for x in (logprobs, ref, previous, win_rate)), risk=risk)
        torch.testing.assert_close(got, expected)
    shifted = loss(logprobs + table(8, 3, 1), ref, previous, wind.win_rates(rewards, "square"))
    torch.testing.assert_close(
        shifted, loss(logprobs, ref, previous, wind.win_rates(rewards, "square"))
    )


# ── the game ──
@pytest.mark.parametrize(
    "beta, win, kl",
    [(0.1, 0.9000, 2.6974), (0.25, 0.7687, 0.5952), (0.5, 0.6565, 0.1614), (1.0, 0.5820, 0.0413)],
)
def test_closed_forms_without_ties(beta, win, kl):
    """Win rate 1/(1−e^{−1/β}) − β and KL log(β(1−e^{−1/β})) + 1/(2β) of the equilibrium against
    π_ref; `square` has no gradient there."""
    ref = torch.full((ARMS,), -math.log(ARMS), dtype=torch.float64)

    def preference_of(policy):
        return policy.exp().cumsum(0) - policy.exp() / 2  # g without a matrix

    policy, eta = ref, 4 * beta
    for _ in range(400):
        policy = (
            (policy + beta * eta * ref + eta * preference_of(policy)) / (1 + beta * eta)
        ).log_softmax(0)
    g = preference_of(policy)
    assert (policy.exp() * preference_of(ref)).sum().item() == pytest.approx(win, abs=2e-4)
    assert (policy.exp() * (policy - ref)).sum().item() == pytest.approx(kl, abs=3e-3)
    assert win == pytest.approx(1 / (1 - math.exp(-1 / beta)) - beta, abs=1e-4)
    psi_loss = loss(policy[None], ref[None], policy[None], g[None], beta=beta, eta=eta)
    assert psi_loss.item() < 1e-9


@pytest.mark.parametrize("a", [10.0, 1.0, 0.1])
def test_closed_form_of_the_first_constant(a):
    """Without ties the first exact step has c = a·log(a(e^{1/a} − 1)), a = β + 1/η."""
    beta = a / 4
    eta = 1 / (a - beta)
    ref = torch.full((ARMS,), -math.log(ARMS), dtype=torch.float64)
    g = (torch.arange(ARMS, dtype=torch.float64) + 0.5) / ARMS
    step = ((ref + beta * eta * ref + eta * g) / (1 + beta * eta)).log_softmax(0)
    psi = wind.step_value(step[None], ref[None], ref[None], wind.Args(beta=beta, eta=eta))[0]
    torch.testing.assert_close(g - psi, (g - psi).mean().expand(ARMS))
    c = a * math.log(a * math.expm1(1 / a))
    assert (g - psi).mean().item() == pytest.approx(c, abs=1e-6)
    assert 0.5 - psi.mean().item() == pytest.approx(c, abs=1e-6)


def test_bradley_terry_with_close_rewards_is_the_posterior():
    """σ(r − r′) is nearly ½ + (r − r′)/4, so the equilibrium is nearly p·exp(r/(4β))/Z."""
    ref, rewards = table(0, 6).log_softmax(0), table(1, 6)
    gaps = []
    for scale in (1.0, 0.3, 0.1):
        star = equilibrium(ref, game(scale * rewards, "bradley-terry"), 0.3 * scale)
        gaps.append(distance(star, posterior(ref, rewards, 4 * 0.3)))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] and gaps[2] < 1e-3
    assert distance(ref, star) > 0.05


@pytest.mark.parametrize(
    "preference",
    [game(table(4, 3)), game(table(4, 3), "bradley-terry"), ROCK_PAPER_SCISSORS],
    ids=[*PREFERENCES, "rock-paper-scissors"],
)
@pytest.mark.parametrize("eta_over_beta", [1.0, 4.0])
def test_linear_rate_of_the_exact_step(preference, eta_over_beta):
    """KL(π*‖π_t) ≤ (1+βη)^−t · KL(π*‖π_0) for η ≤ 4β, scalar and rock-paper-scissors."""
    beta = 0.1
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    star, eta = equilibrium(ref, preference, beta), eta_over_beta * beta
    residual = star - (ref + preference @ star.exp() / beta).log_softmax(0)
    assert residual.abs().max() < 1e-9
    policy, start = ref, (star.exp() * (star - ref)).sum()
    for t in range(1, 200):
        policy = exact_step(policy, ref, preference, beta, eta)
        kl = (star.exp() * (star - policy)).sum()
        assert kl <= (1 + beta * eta) ** -t * start + 1e-12


def test_iterative_bond_with_mixing_is_the_step_on_log_win_rates():
    """Bo2(π)(y) = 2π(y)·g_π(y), ties included; mixed with π_ref by exponents α₁ + α₂ = 1 it is the
    step with log g, η = 1, β = α₂/α₁; for β > 1 its limit is best of β/(β−1)."""
    policy, rewards = table(0, 6).log_softmax(0), torch.tensor([1.0, 2, 2, 3, 3, 3]).double()
    below = torch.stack([policy.exp()[rewards < r].sum() for r in rewards])
    upto = torch.stack([policy.exp()[rewards <= r].sum() for r in rewards])
    best_of_2 = policy.exp() * (upto**2 - below**2) / (upto - below)
    torch.testing.assert_close(best_of_2, 2 * policy.exp() * (game(rewards) @ policy.exp()))
    arms, first = 4000, 0.4
    u = torch.arange(1, arms + 1, dtype=torch.float64) / arms
    ref = torch.full((arms,), 1 / arms, dtype=torch.float64)
    distribution = ref
    for _ in range(300):
        g = distribution.cumsum(0) - distribution / 2
        distribution = (first * (distribution * g).log() + (1 - first) * ref.log()).softmax(0)
    beta = (1 - first) / first
    assert (distribution.cumsum(0) - u ** (beta / (beta - 1))).abs().max() < 2e-3


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world of 6 responses."""
    return make_small_world(tmp_path_factory.mktemp("wind"), 1) | {"beta": 0.4, "eta": 2.0}


@pytest.mark.parametrize("risk", ["kl", "nce"])
@pytest.mark.parametrize("win_rate", [1 / 7, 0.5, 6 / 7])
def test_eq4_eq5_pull_back_from_both_sides(risk, win_rate):
    """However far s is below 0 or above 1, the slope is finite and leads back to the win rate."""
    for s in (-30.0, -3.0, -0.6, 1.6, 4.0, 30.0):
        psi = torch.zeros(1, 10, dtype=torch.float64)
        psi[0, 0] = s - 0.5  # the others' mean is 0
        out = loss(
            psi.requires_grad_(),
            *[torch.zeros(1, 10).double()] * 2,
            torch.full((1, 10), win_rate).double(),
            beta=1.0,
            eta=1e12,
            risk=risk,
        )
        slope = torch.autograd.grad(out.sum(), psi)[0][0, 0].item()
        assert math.isfinite(slope) and (slope > 0) == (s > 1)


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("risk", ["square", slow("kl"), slow("nce")])
def test_the_loop_reaches_the_equilibrium(world, tmp_path, risk, preference):
    """main() comes within 0.02 in total variation of π* ∝ π_ref·exp(g_π*/β), by either preference."""
    ref, rewards = all_responses(world, world["policy"])
    hard, soft = (equilibrium(ref, game(rewards, kind), world["beta"]) for kind in PREFERENCES)
    star = hard if preference == "hard" else soft
    after, _ = train(wind, world, tmp_path / "run", True, risk=risk, preference=preference)
    assert distance(ref, star) > 0.1 and distance(hard, soft) > 0.05
    assert distance(after, star) < 0.02


def test_the_opponent_is_renewed(world, tmp_path, monkeypatch):
    """Samples come from one model for --refresh-every steps, then from another."""
    draws = samplers(monkeypatch)
    train(wind, world, tmp_path / "run", steps=9, refresh_every=4, warmup_steps=0)
    same = [torch.equal(first, second) for first, second in itertools.pairwise(draws)]
    assert same == [True] * 3 + [False] + [True] * 3 + [False]
