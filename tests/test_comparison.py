"""docs/comparison.md: each row of its tables and each relation, proved; and its picture."""

import itertools
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tables import expectation, gradient, make_small_world, posterior, slow, table

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze import targets

ROOT = Path(brain.__file__).parent
PAGE = (ROOT / "docs" / "comparison.md").read_text()
SCRIPTS = {script.__name__: script for script in (brain, gdc, dpo, wind, bond, ppo)}
ALONE = SimpleNamespace(world=1, average=lambda mean: mean)
P, N, BETA = 2, 5, 0.7
REF, PROPOSAL, POLICY = (table(seed, P, N) for seed in (1, 2, 3))
REWARDS = table(4, P, N)


def weights_of(loss, logprobs=POLICY) -> torch.Tensor:
    """−∂ loss / ∂ log-probs: what the log-prob of each sample is pulled with."""
    return -gradient_at(logprobs, loss)


def gradient_at(logprobs, loss) -> torch.Tensor:
    """∂ Σ loss(log-probs) / ∂ log-probs."""
    variable = logprobs.clone().requires_grad_()
    return torch.autograd.grad(loss(variable).sum(), variable)[0]


def gdc_weights(baseline: str, policy=POLICY, proposal=PROPOSAL) -> torch.Tensor:
    """Those of gdc.py with one Ẑ per prompt."""
    log_w = gdc.log_weights(REF, REWARDS, proposal, BETA)
    relative = (log_w - gdc.log_mean_weight(log_w)).exp()
    return weights_of(lambda q: gdc.gdc_loss(q, proposal, relative, baseline), policy)


def brain_weights(estimator: str, policy=POLICY, proposal=PROPOSAL) -> torch.Tensor:
    """Those of brain.py."""
    alpha = brain.posterior_weights(REF, REWARDS, proposal, BETA)
    return weights_of(lambda q: brain.brain_loss(q, proposal, alpha, estimator), policy)


# ── the gradient weight of a sample: the docstring is the page's formula, to the letter ──
def importance() -> torch.Tensor:
    """w, number by number."""
    return torch.exp(REF) * torch.exp(REWARDS / BETA) / torch.exp(PROPOSAL)


def of_brain():
    r"""\hat\alpha_i - \hat\beta_i"""
    alpha, beta = importance(), torch.exp(POLICY) / torch.exp(PROPOSAL)
    formula = alpha / alpha.sum(1, keepdim=True) - beta / beta.sum(1, keepdim=True)
    return formula, brain_weights("brain")


def of_gdc():
    r"""\frac1N\, \frac{w_i}{\hat Z}"""
    return importance() / importance().mean(1, keepdim=True) / N, gdc_weights("none")


def of_gdc_plus_plus():
    r"""\frac1N \left( \frac{w_i}{\hat Z} - \frac{\pi_\theta(y_i)}{q'(y_i)} \right)"""
    ratio = torch.exp(POLICY) / torch.exp(PROPOSAL)
    formula = (importance() / importance().mean(1, keepdim=True) - ratio) / N
    return formula, gdc_weights("gdc++")


def of_dpo():
    r"""\pm\, \tau\, \sigma(-\tau \Delta)"""
    log_ratio = (POLICY - REF)[:, :2]
    delta = log_ratio[:, 0] - log_ratio[:, 1]
    size = BETA / (1 + torch.exp(BETA * delta))
    free, args = torch.zeros(P, dtype=torch.bool), dpo.Args(beta=BETA)
    code = weights_of(lambda q: dpo.dpo_loss(q, REF[:, :2], free, args), POLICY[:, :2])
    return torch.stack([size, -size], 1), code


def of_wind():
    r"""\frac{2a}{N} \left[ (\hat g_i - \bar g) - (\psi_i - \bar\psi) \right]"""
    eta, g = 3.0, wind.win_rates(REWARDS, "square").double()
    a = BETA + 1 / eta
    psi = a * POLICY - BETA * REF - PROPOSAL / eta
    apart = (g - g.mean(1, keepdim=True)) - (psi - psi.mean(1, keepdim=True))
    args = wind.Args(beta=BETA, eta=eta)
    code = weights_of(lambda q: wind.wind_loss(q, REF, PROPOSAL, g, args))
    return 2 * a / N * apart, code


def of_bond():
    r"""\frac bN\, (A_i - B_i)"""
    quality, k = table(5, P, N), 3
    returns = quality - (POLICY - REF)
    others = torch.stack([(returns.sum() - x) / (P * N - 1) for x in returns.flatten()])
    advantage = bond.advantages(ALONE, returns)
    both, best = torch.cat([POLICY, table(6, P, k)], 1), torch.tensor([2, 0])
    args = bond.Args(jeffreys=0.3)
    code = weights_of(lambda q: bond.bond_loss(q, POLICY - REF, advantage, best, args), both)
    assert code[0, N:].tolist() == [0, 0, 0.7] and code[1, N:].tolist() == [0.7, 0, 0]  # y_best
    return 0.3 / N * (returns - others.view(P, N)), code[:, :N]


def of_rloo():
    r"""\frac1N \left( R_i - \frac{1}{N-1} \sum_{j \ne i} R_j \right)"""
    returns = REWARDS - BETA * (POLICY - REF)
    others = (returns.sum(1, keepdim=True) - returns) / (N - 1)
    return (returns - others) / N, rloo_weights(returns)


def rloo_weights(returns, policy=POLICY) -> torch.Tensor:
    """Those of ppo.py --advantage rloo at ρ = 1, of the mean over responses."""
    advantage, args = ppo.leave_one_out(returns)[:, :, None], ppo.Args(advantage="rloo")

    def loss(q):
        return ppo.policy_loss(q[:, :, None], policy[:, :, None], advantage, args) / N

    return weights_of(loss, policy)


WEIGHTS = [of_brain, of_gdc, of_gdc_plus_plus, of_dpo, of_wind, of_bond, of_rloo]


@pytest.mark.parametrize("row", WEIGHTS, ids=lambda row: row.__name__)
def test_the_weight_of_a_sample_is_that_of_the_page(row):
    """Autograd of the script's own loss against the formula."""
    assert f"$`{row.__doc__}`$" in PAGE
    torch.testing.assert_close(*row(), atol=1e-6, rtol=1e-6)


# ── noise at the target ──
T_REF, T_REWARDS = table(1, 4).log_softmax(0), torch.tensor([0.0, 1.0, 1.5, 3.0]).double()
T_TARGET = posterior(T_REF, T_REWARDS, BETA)


def noise_of_gdc(picks):
    """GDC from the start model, Z known."""
    log_z = (T_REF + T_REWARDS / BETA).logsumexp(0)
    weights = (gdc.log_weights(T_REF, T_REWARDS, T_REF, BETA) - log_z).exp()[picks][None]
    return T_TARGET, lambda q: gdc.gdc_loss(q[picks][None], T_REF[picks][None], weights, "none")


def noise_of_gdc_plus_plus(picks):
    """GDC++ on-policy, with the Ẑ of the prompt's own samples."""
    log_w = gdc.log_weights(T_REF, T_REWARDS, T_TARGET, BETA)[picks][None]
    weights = (log_w - gdc.log_mean_weight(log_w)).exp()
    return T_TARGET, lambda q: gdc.gdc_loss(q[picks][None], T_TARGET[picks][None], weights, "gdc++")


def noise_of_dpo(picks):
    """DPO, whose label is a coin even if the first one has the higher reward."""
    pair, free = picks[:2], torch.zeros(1, dtype=torch.bool)
    args = dpo.Args(beta=BETA)
    return T_TARGET, lambda q: dpo.dpo_loss(q[pair][None], T_REF[pair][None], free, args)


def noise_of_wind(picks):
    """WIND, with the equilibrium for policy and opponent."""
    star = targets.equilibrium(T_REF, T_REWARDS, BETA)
    g, args = wind.win_rates(T_REWARDS[picks][None], "square").double(), wind.Args(beta=BETA)
    given = T_REF[picks][None], star[picks][None], g, args
    return star, lambda q: wind.wind_loss(q[picks][None], *given)


def noise_of_bond(picks):
    """BOND, b = 1: one sample of the policy, which is best-of-2, and two of the anchor."""
    goal = targets.best_of(T_REF, T_REWARDS, 2)
    ours, theirs = picks[:1], picks[1:]
    quality = bond.log_best_of(T_REWARDS[ours][None], T_REWARDS[theirs][None], 2)
    log_ratio, args = (goal - T_REF)[ours][None], bond.Args(jeffreys=1.0)
    best, advantage = torch.tensor([0]), quality - log_ratio
    return goal, lambda q: bond.bond_loss(q[picks][None], log_ratio, advantage, best, args)


def noise_of_j_bond(picks):
    """J-BOND, the same, with the reward of (6)."""
    goal, _ = noise_of_bond(picks)
    reward = bond.j_bond_reward(T_REWARDS[picks[:1]][None], T_REWARDS[picks[1:]][None])
    log_ratio, args = (goal - T_REF)[picks[:1]][None], bond.Args(jeffreys=1.0)
    best, advantage = torch.tensor([0]), reward - log_ratio
    return goal, lambda q: bond.bond_loss(q[picks][None], log_ratio, advantage, best, args)


STAYS = [noise_of_gdc, noise_of_dpo, noise_of_wind, noise_of_bond, noise_of_j_bond]


@pytest.mark.parametrize("case", [*STAYS, noise_of_gdc_plus_plus], ids=lambda case: case.__name__)
def test_what_noise_is_left_at_the_target(case):
    """The gradient at the target, of every set of three samples: all are zero, or they differ."""
    found = []
    for picks in itertools.product(range(4), repeat=3):
        goal, loss = case(torch.tensor(picks))
        found.append(gradient(goal, loss))
    spread = (torch.stack(found) - torch.stack(found).mean(0)).norm(dim=1)
    if case in STAYS:
        assert spread.max() > 0.1
    else:
        assert torch.stack(found).abs().max() < 1e-12


# ── GDC++ and BRAIn ──
@pytest.mark.parametrize("gdcs, brains", [("none", "no-baseline"), ("gdc++", "no-self-norm")])
def test_gdc_with_one_z_per_prompt_is_an_ablation_of_brain(gdcs, brains):
    """w/Ẑ is N·α̂, so the two scripts have the same gradient, to rounding."""
    torch.testing.assert_close(gdc_weights(gdcs), brain_weights(brains), atol=1e-12, rtol=0)
    assert (gdc_weights(gdcs) - brain_weights("brain")).norm() > 0.1


def test_gdc_plus_plus_on_policy_is_brain():
    """At q′ = q_θ the baselines are 1/N in both, whether they are normalised or not."""
    ours = gdc_weights("gdc++", PROPOSAL)
    torch.testing.assert_close(ours, brain_weights("brain", PROPOSAL), atol=1e-12, rtol=0)
    assert ours.norm() > 0.1


def test_brain_is_gdc_plus_plus_with_a_known_z_as_n_grows():
    """N·(α̂ − β̂) tends to w/Z − π_θ/q′: a hundred times the samples leave a tenth of the gap."""
    ref, proposal, policy = (table(seed, 6).log_softmax(0) for seed in range(3))
    rewards, gaps = table(3, 6), []
    log_z = (ref + rewards / BETA).logsumexp(0)
    exact = (ref + rewards / BETA - log_z - proposal).exp() - (policy - proposal).exp()
    for count in (100, 10_000):
        draw = torch.Generator().manual_seed(0)
        picks = torch.multinomial(proposal.exp(), 30 * count, True, generator=draw).view(30, count)
        alpha = brain.posterior_weights(ref[picks], rewards[picks], proposal[picks], BETA)
        loss = partial(brain.brain_loss, proposal_logprobs=proposal[picks], target_weights=alpha)
        ours = count * weights_of(loss, policy[picks])
        gaps.append((ours - exact[picks]).square().mean().sqrt().item())
    assert gaps[1] / gaps[0] == pytest.approx(0.1, rel=0.3) and gaps[1] < 0.05


# ── WIND and IPO ──
def ipo(logprobs, ref, tau: float) -> torch.Tensor:
    """IPO's loss [P] of (winner, loser) [P, 2], Azar et al.: (h − 1/(2τ))²."""
    log_ratio = logprobs - ref
    return (log_ratio[:, 0] - log_ratio[:, 1] - 1 / (2 * tau)).square()


def test_wind_of_two_samples_without_a_previous_policy_is_ipo():
    """η → ∞, K = 2, hard preferences: β²/4 times IPO's loss with τ = β, value and gradient."""
    rewards = torch.tensor([[1.0, 0.0]]).double().expand(P, 2)
    win_rate, args = wind.win_rates(rewards, "square").double(), wind.Args(beta=BETA, eta=1e15)

    def ours(q):
        return wind.wind_loss(q, REF[:, :2], PROPOSAL[:, :2], win_rate, args)

    def theirs(q):
        return BETA**2 / 4 * ipo(q, REF[:, :2], BETA)

    pair = POLICY[:, :2]
    torch.testing.assert_close(ours(pair), theirs(pair))
    torch.testing.assert_close(weights_of(ours, pair), weights_of(theirs, pair))


@pytest.mark.parametrize("opponent", ["equilibrium", "any"])
def test_ipo_rests_where_the_game_says(opponent):
    """Its mean gradient over all pairs of μ, each order as often as it wins, is 0 at
    π_ref·exp(g_μ/τ)/Z. If μ is WIND's equilibrium for β = τ that is μ itself: online IPO rests."""
    ref, rewards = table(1, 4).log_softmax(0), torch.tensor([0.0, 1.0, 1.0, 2.0]).double()
    star = targets.equilibrium(ref, rewards, BETA)
    sampler = star if opponent == "equilibrium" else table(2, 4).log_softmax(0)
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards)
    rest = (ref + wins @ sampler.exp() / BETA).log_softmax(0)

    def slope(logits):
        def one(picks):
            share, swapped = wins[picks[0], picks[1]], picks.flip(0)
            orders = ((share, picks), (1 - share, swapped))
            return sum(
                p * gradient(logits, lambda q, x=x: ipo(q[x][None], ref[x][None], BETA))
                for p, x in orders
            )

        return expectation(sampler, 2, one)

    assert slope(rest).abs().max() < 1e-9 and slope(ref).norm() > 0.05
    assert (targets.distance(rest, sampler) < 1e-9) == (opponent == "equilibrium")


# ── BOND and the others ──
def test_bond_with_b_0_is_brain_without_baseline_and_with_arg_max():
    """Both are maximum likelihood on the best of the samples of the start model."""
    one_hot = brain.posterior_weights(REF, REWARDS, REF, BETA, "arg-max")
    theirs = weights_of(lambda q: brain.brain_loss(q, REF, one_hot, "no-baseline"))
    nobody, args = torch.zeros(P, 1).double(), bond.Args(jeffreys=0.0)
    both = torch.cat([nobody, POLICY], 1)
    best = REWARDS.argmax(1)
    ours = weights_of(lambda q: bond.bond_loss(q, nobody, nobody, best, args), both)[:, 1:]
    assert torch.equal(ours, theirs) and ours.sum(1).tolist() == [1, 1]


def test_bond_with_b_1_is_rloo_of_another_reward():
    """Of the reward log(π̂_BoN/π_a) with β = 1, for one prompt: a batch of several has B in common."""
    anchors, policy, ref = table(7, 1, 16), POLICY[:1], REF[:1]
    quality = bond.log_best_of(REWARDS[:1], anchors, 4).double()
    log_ratio = policy - ref
    advantage = bond.advantages(ALONE, quality - log_ratio)
    best, both = torch.tensor([0]), torch.cat([policy, anchors], 1)
    args = bond.Args(jeffreys=1.0)
    ours = weights_of(lambda q: bond.bond_loss(q, log_ratio, advantage, best, args), both)
    theirs = rloo_weights(quality - 1.0 * log_ratio, policy)
    torch.testing.assert_close(ours[:, :N], theirs, atol=1e-12, rtol=0)
    assert ours[:, N:].abs().max() == 0 and theirs.norm() > 0.1


def test_best_of_n_is_the_tilted_target_of_its_own_reward():
    """(T) with r = log(π_BoN/π_a) and τ = 1 is best-of-N, normalised as it is; and WIND's first
    step from π_ref is (T) with the win rate for reward and τ = β + 1/η."""
    ref, rewards = table(1, 6).log_softmax(0), torch.tensor([0.0, 1, 1, 2, 3, 4]).double()
    best = targets.best_of(ref, rewards, 4)
    assert best.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(posterior(ref, best - ref, 1.0), best)
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards)
    g, eta = wins @ ref.exp(), 3.0
    step = posterior(ref, g, BETA + 1 / eta)
    psi = wind.step_value(step[None], ref[None], ref[None], wind.Args(beta=BETA, eta=eta))[0]
    torch.testing.assert_close(psi - psi.mean(), g - g.mean())


# ── what a step holds and does ──
HELD = {  # the rows of the page's table: script and flags; those with flags run in `-m slow`
    "brain.py": (brain, {}),
    "brain.py --refresh-every 0": (brain, {"refresh_every": 0}),
    "gdc.py": (gdc, {"test_every": 5}),
    "gdc.py --proposal policy": (gdc, {"proposal": "policy"}),
    "dpo.py": (dpo, {}),
    "dpo.py --pairs policy": (dpo, {"pairs": "policy"}),
    "dpo.py --pairs dataset": (dpo, {"pairs": "dataset"}),
    "wind.py": (wind, {}),
    "bond.py": (bond, {}),
    "bond.py --anchor fixed": (bond, {"anchor": "fixed"}),
    "ppo.py": (ppo, {}),
    "ppo.py --advantage rloo": (ppo, {"advantage": "rloo"}),
}
COLUMNS = (
    "script",
    "frozen copies",
    "trained models",
    "drawn",
    "scored",
    "without gradient",
    "with gradient",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world; a step has one prompt of 8 samples."""
    small = {"prompts_per_step": 1, "samples_per_prompt": 8, "steps": 1, "eval_prompts": 1}
    return make_small_world(tmp_path_factory.mktemp("comparison"), 1) | small


def rows_of(head: tuple[str, ...]) -> dict[str, list[str]]:
    """The rows of the page's table with this head, by their first cell."""
    start = "| " + " | ".join(head) + " |\n"
    lines = PAGE.split(start)[1].split("\n\n")[0].strip().splitlines()[1:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


SIZES = {"0": 0, "1": 1, "2": 2, "4": 4, "N": 8, "N + 2": 10, "2N": 16, "3N": 24}
SIZES |= {"N + k": 10, "3(N + k)": 30}  # N is 8, k is 2


@pytest.mark.parametrize("command", [slow(row) if "--" in row else row for row in HELD])
def test_a_step_holds_and_does_what_the_page_says(command, world, tmp_path, monkeypatch):
    """Copies are counted where they are made; responses in the loop, by what they go through."""
    script, more = HELD[command]
    seen, within = dict.fromkeys(COLUMNS[1:], 0) | {"trained models": 1}, []

    def count(name, column, size):
        original = getattr(common, name)

        def counted(*given, **named):
            within.append(name)
            out = original(*given, **named)
            within.pop()
            if not within:  # a function that was called by another one counts with that one
                seen[column() if callable(column) else column] += size(given, out)
            return out

        monkeypatch.setattr(common, name, counted)

    def responses(batch):
        return sum(map(len, batch.responses))

    def passes():
        return "with gradient" if torch.is_grad_enabled() else "without gradient"

    original = common.pick

    def pick(*given):  # the loop begins: what was asked before it, at load, is not counted
        seen.update(dict.fromkeys(COLUMNS[3:], 0))
        return original(*given)

    monkeypatch.setattr(common, "pick", pick)
    monkeypatch.setattr(common, "evaluate", lambda *given: ({}, []))
    count("frozen_copy", "frozen copies", lambda given, out: 1)
    count("load_value_model", "trained models", lambda given, out: 1)
    count("sample", "drawn", lambda given, out: responses(out))
    count("score", "scored", lambda given, out: responses(given[1]))
    count("logprobs", "without gradient", lambda given, out: responses(given[1]))
    count("token_logprobs", "without gradient", lambda given, out: responses(given[1]))
    count("token_logprobs_and_entropy", "with gradient", lambda given, out: responses(given[1]))
    count("token_values", passes, lambda given, out: responses(given[1]))
    script.main(script.Args(**world | more | {"run_dir": str(tmp_path / "run")}))
    assert seen == dict(zip(COLUMNS[1:], [SIZES[cell] for cell in rows_of(COLUMNS)[command]]))


# ── the picture ──
def test_targets_are_those_of_the_methods():
    """Each by its own words: the mean of N draws, and a policy that is its own best answer."""
    known = targets.targets()
    ref = torch.tensor(targets.START, dtype=torch.float64)
    rewards = torch.tensor(list(targets.REWARDS.values()), dtype=torch.float64)
    one_hot = torch.eye(7, dtype=torch.float64)
    best = expectation(ref.log(), 4, lambda picks: one_hot[picks[rewards[picks].argmax()]])
    torch.testing.assert_close(known["best-of-4"].exp(), best)
    tilted = ref * (rewards / targets.BETA).exp()
    torch.testing.assert_close(known["(T)"].exp(), tilted / tilted.sum())
    star = known["equilibrium"].exp()
    wins = torch.stack([star[rewards < r].sum() + star[rewards == r].sum() / 2 for r in rewards])
    answer = ref * (wins / targets.WIND_BETA).exp()
    torch.testing.assert_close(star, answer / answer.sum())


def test_the_world_of_the_picture_is_as_it_says(tmp_path, monkeypatch):
    """The start model has the probabilities that are given, a run moves to its target, and the
    pairs prefer one response as often as Bradley-Terry says."""
    flags = targets.write_world(tmp_path)
    found = targets.probabilities(tmp_path / "sft")
    assert found == pytest.approx(targets.START, abs=1e-6)
    monkeypatch.setattr(targets, "SHARED", targets.SHARED.replace("--steps 120", "--steps 40"))
    policy = torch.tensor(targets.arrive(targets.RUNS[0], 1, flags, tmp_path / "run")).log()
    goal = targets.targets()["(T)"]
    assert (
        targets.distance(policy, goal)
        < 0.02
        < 0.3
        < targets.distance(torch.tensor(targets.START).log(), goal)
    )
    text = (tmp_path / "data" / "train.jsonl").read_text()
    better = text.count('"chosen": " superb", "rejected": " bad"')
    worse = text.count('"chosen": " bad", "rejected": " superb"')
    assert math.log(better / worse) == pytest.approx(2.5, abs=0.15) and better > 100


def test_the_table_and_what_it_claims_are_those_of_the_raw_lines():
    """The page has the table that the command prints; six runs arrive, three go to the best."""
    assert targets.as_table() in PAGE and f"`{targets.SHARED}`" in PAGE
    known, reached = targets.targets(), targets.found()
    for run in targets.RUNS:
        assert len(reached[run.title]) == len(targets.SEEDS)
        for policy in reached[run.title]:
            if run.target in known:
                assert targets.distance(policy, known[run.target]) < 0.02
            else:
                assert policy.exp()[-1] > 0.35


# ── the page ──
def test_what_the_page_names_exists():
    """Every test of its list, which the text refers to by number, in order; functions; files."""
    text, _, proofs = PAGE.partition("\n## Proofs\n\n")
    for place, line in enumerate(proofs.strip().splitlines(), 1):
        number, file, test = re.fullmatch(r"(\d+)\. `(test_\w+\.py)::(test_\w+)`", line).groups()
        assert int(number) == place
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
    used = list(dict.fromkeys(map(int, re.findall(r"\[\[(\d+)\]\]\(#proofs\)", text))))
    assert used == list(range(1, place + 1)) and place > 40
    functions = re.findall(r"`(brain|gdc|dpo|wind|bond|ppo)\.(?!py`)(\w+)`", PAGE)
    assert functions and all(hasattr(SCRIPTS[name], it) for name, it in functions), functions
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    known = {field for script in SCRIPTS.values() for field in vars(script.Args())}
    assert flags <= {"--" + name.replace("_", "-") for name in known}, flags


def test_each_relation_and_each_row_has_a_proof():
    relations = rows_of(("relation", "holds", "proved by"))
    assert len(relations) > 15 and all("](#proofs)" in row[-1] for row in relations.values())
    assert list(rows_of(COLUMNS)) == list(HELD)  # and each row of what a step holds is counted
