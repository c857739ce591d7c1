"""The pages of the methods, docs/<method>.md: alike in form, and true of the code."""

import dataclasses
import inspect
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from models import make_world
from tables import table

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze import pages, ranges
from benchmarks import lessons

ROOT = Path(brain.__file__).parent
SCRIPTS = {script.__name__: script for script in (brain, gdc, dpo, wind, bond, ppo)}
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in SCRIPTS}
HEADINGS = [
    "## In one paragraph",
    "## Objective and derivation",
    "## From equation to line",
    "## Differs from the paper, derived by us, reported by others",
    "### Differs from the paper",
    "### Derived by us",
    "### Reported by others",
    "## Flags that matter and how to choose them",
    "## Logged metrics and healthy ranges",
    "## What breaks it and how that looks in the metrics",
    "## Results",
    "## Exercises",
    "## References",
]
HEADS = {  # of the tables that every page has
    "## From equation to line": "| equation | what it is | computed in | proved by |",
    "## Flags that matter and how to choose them": "| flag | default | what it does | how to choose it |",
    "## Results": "| claim | by whom | here | status |",
}
AIMED_AT = {("bond", "2")}  # what a loss aims at: no function computes it
each_page = pytest.mark.parametrize("name", SCRIPTS)


def section(name: str, heading: str) -> str:
    """The text of a section of a page."""
    return PAGES[name].split(f"\n{heading}\n")[1].split("\n## ")[0]


def rows(name: str, heading: str) -> list[list[str]]:
    """The cells of the table that every page has in this section."""
    behind = section(name, heading).split(HEADS[heading] + "\n|---|---|---|---|\n")[1]
    return [line.strip("| ").split(" | ") for line in behind.split("\n\n")[0].strip().splitlines()]


# ── alike in form ──
@each_page
def test_pages_have_the_same_headings(name):
    """Word for word, in the same order, so that pages can be diffed as scripts can."""
    assert re.findall(r"^##+ .*$", PAGES[name], re.M) == HEADINGS


@each_page
def test_a_result_says_whether_it_was_reproduced(name):
    """Claims of the papers are marked, and what was reproduced has a test, a page or a raw file."""
    claims = rows(name, "## Results")
    assert len(claims) >= 3
    for _, _, here, status in claims:
        assert status in ("reproduced", "partly", "not")
        assert status != "reproduced" or re.search(r"`test_|\]\(", here), here


# ── true of the code ──
def of_tests() -> set[str]:
    """The names of all tests."""
    sources = [path.read_text() for path in ROOT.glob("tests/test_*.py")]
    return set(re.findall(r"^def (test_\w+)", "".join(sources), re.M))


@each_page
def test_names_of_tests_and_files_exist(name):
    """Whatever a page calls test_… is a test; a path is there; a metric is documented."""
    named = set(re.findall(r"`(test_\w+)`", PAGES[name]))
    assert named and named <= of_tests()
    paths = re.findall(r"`((?:tests|benchmarks|analyze|prepare|assets|docs)/[\w./]+)`", PAGES[name])
    assert all((ROOT / path).exists() for path in paths), paths
    keys = set(
        re.findall(r"`((?:eval|kl|reward|weights|gdc|dpo|wind|bond|ppo|logprob)/\w+)`", PAGES[name])
    )
    documented = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"| `{key}` |" in documented for key in keys), keys


@each_page
def test_flags_exist_and_have_the_defaults_of_the_table(name):
    """The table has all of the method's own flags; the text names no flag that is not there."""
    script = SCRIPTS[name]
    defaults = {
        "--" + field.name.replace("_", "-"): field.default
        for field in dataclasses.fields(script.Args)
    }
    own = list(defaults)[list(defaults).index("--track") + 1 :]
    told = {
        flag.strip("`"): default
        for flag, default, _, _ in rows(name, "## Flags that matter and how to choose them")
    }
    assert list(told)[: len(own)] == own, "the method's own flags come first, in their order"
    for flag, default in told.items():
        expected = defaults[flag]
        assert (
            default == ("empty" if expected == "" else str(expected)) or float(default) == expected
        )
    parsed = [each.Args for each in (*SCRIPTS.values(), ranges, lessons)]
    known = {field.name for args in parsed for field in dataclasses.fields(args)}
    known = {"--" + name.replace("_", "-") for name in known}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[name])) <= known


def formulas(name: str) -> list[tuple[str, str]]:
    """(number or "", LaTeX) of the formulas of a page."""
    blocks = re.findall(r"^```math\n(.*?)\n```$", PAGES[name], re.M | re.S)
    found = [re.fullmatch(r"(.*?)(?: \\qquad \((\w)\))?", block, re.S) for block in blocks]
    return [(match[2] or "", match[1]) for match in found]


@each_page
def test_equations_have_the_numbers_of_the_script(name):
    """In the page, in its table and in the docstring; the named function has the tagged line."""
    script = SCRIPTS[name]
    numbers = [number for number, _ in formulas(name) if number.isdigit()]
    assert numbers == sorted(set(re.findall(r"\((\d)\)$", script.__doc__, re.M)))
    equations = rows(name, "## From equation to line")
    assert [number.strip("()") for number, *_ in equations] == numbers
    of_method = (ROOT / "tests" / f"test_method_{name}.py").read_text()
    for number, _, function, tests in equations:
        proofs = re.findall(r"`(test_\w+)`", tests)
        assert all(f"def {proof}(" in of_method for proof in proofs), proofs
        assert any(f"_eq{number.strip('()')}" in proof for proof in proofs), proofs
        if (name, number.strip("()")) in AIMED_AT:
            assert function == "–"
            continue
        source = inspect.getsource(getattr(script, function.strip("`")))
        assert f"# {number}" in source, (function, number)


# ── each formula beside a computation of its own, and the code ──
# The docstring of a function here is the formula of the page, to the letter. The function returns
# what the formula says, computed number by number, and what the code says.
P, N, BETA = 2, 4, 0.7
REF, PROPOSAL, POLICY = (table(seed, P, N) for seed in (1, 2, 3))
REWARDS = table(4, P, N)


def per_sample(value) -> torch.Tensor:
    """[P, N] of value(p, i)."""
    numbers = [[float(value(p, i)) for i in range(N)] for p in range(P)]
    return torch.tensor(numbers, dtype=torch.float64)


def by_prompt(value) -> torch.Tensor:
    """[P] of value(p)."""
    return torch.tensor([float(value(p)) for p in range(P)], dtype=torch.float64)


def weight(p: int, i: int) -> float:
    """w of GDC, and e^a of BRAIn."""
    return math.exp(REF[p, i]) * math.exp(REWARDS[p, i] / BETA) / math.exp(PROPOSAL[p, i])


def brain_1():
    r"""a_i = \log p(y_i\mid x) + \frac{r(x,y_i)}{\tau} - \log q'(y_i\mid x), \qquad \hat\alpha_i = \frac{e^{a_i}}{\sum_{j=1}^N e^{a_j}}"""
    formula = per_sample(lambda p, i: weight(p, i) / sum(weight(p, j) for j in range(N)))
    return formula, brain.posterior_weights(REF, REWARDS, PROPOSAL, BETA)


def beta_hat() -> torch.Tensor:
    """Weights β̂ of BRAIn."""
    ratio = per_sample(lambda p, i: math.exp(POLICY[p, i]) / math.exp(PROPOSAL[p, i]))
    return per_sample(lambda p, i: ratio[p, i] / sum(ratio[p, j] for j in range(N)))


def brain_2():
    r"""b_i = \log q_\theta(y_i\mid x) - \log q'(y_i\mid x), \qquad \hat\beta_i = \frac{e^{b_i}}{\sum_{j=1}^N e^{b_j}}"""
    # The loss of weights that are all on one sample is −log β̂ of that sample.
    code = [
        brain.brain_loss(POLICY, PROPOSAL, torch.eye(N, dtype=torch.float64)[[i] * P])
        for i in range(N)
    ]
    return beta_hat(), (-torch.stack(code, 1)).exp()


def brain_3():
    r"""L = \mathrm{KL}(\hat\alpha\,\Vert\,\hat\beta) = \sum_{i=1}^N \hat\alpha_i \log\frac{\hat\alpha_i}{\hat\beta_i}"""
    alpha, beta = brain_1()[0], beta_hat()
    formula = by_prompt(
        lambda p: sum(alpha[p, i] * math.log(alpha[p, i] / beta[p, i]) for i in range(N))
    )
    return formula, brain.brain_loss(POLICY, PROPOSAL, alpha)


def slopes(loss, logprobs: torch.Tensor) -> torch.Tensor:
    """∂ Σ loss(log-probs) / ∂ log-probs."""
    variable = logprobs.clone().requires_grad_()
    return torch.autograd.grad(loss(variable).sum(), variable)[0]


def brain_4():
    r"""\nabla L = -\sum_{i=1}^N (\hat\alpha_i - \hat\beta_i)\, \nabla \log q_\theta(y_i\mid x)"""
    alpha = brain_1()[0]
    return beta_hat() - alpha, slopes(lambda q: brain.brain_loss(q, PROPOSAL, alpha), POLICY)


def gdc_1():
    r"""\nabla L = -\,\mathbb{E}_{y\sim q'}\!\left[ \frac{w(y)}{Z}\, \nabla \log \pi_\theta(y\mid x) \right], \qquad w(y) = \frac{p(y\mid x)\, e^{r(x,y)/\tau}}{q'(y\mid x)}"""
    log_w = gdc.log_weights(REF, REWARDS, PROPOSAL, BETA)
    formula = per_sample(lambda p, i: -weight(p, i) / 3 / N)  # Z = 3; E is a mean over N samples
    return formula, slopes(lambda q: gdc.gdc_loss(q, PROPOSAL, log_w.exp() / 3, "none"), POLICY)


def gdc_2():
    r"""\nabla L = -\,\mathbb{E}_{y\sim q'}\!\left[ \left(\frac{w(y)}{Z} - \frac{\pi_\theta(y\mid x)}{q'(y\mid x)}\right) \nabla \log \pi_\theta(y\mid x) \right]"""
    log_w = gdc.log_weights(REF, REWARDS, PROPOSAL, BETA)
    formula = per_sample(
        lambda p, i: -(weight(p, i) / 3 - math.exp(POLICY[p, i]) / math.exp(PROPOSAL[p, i])) / N
    )
    return formula, slopes(lambda q: gdc.gdc_loss(q, PROPOSAL, log_w.exp() / 3, "gdc++"), POLICY)


def gdc_3():
    r"""\hat Z(x) = \frac1N \sum_{i=1}^N w(y_i)"""
    formula = by_prompt(lambda p: sum(weight(p, i) for i in range(N)) / N)
    log_w = gdc.log_weights(REF, REWARDS, PROPOSAL, BETA)
    return formula, gdc.log_mean_weight(log_w).exp()[:, 0]


def gdc_4():
    r"""\widehat{\mathrm{KL}}(p^*\Vert h) = -\log Z + \frac1Z \cdot \frac1N \sum_{i=1}^N w(y_i)\, \bigl(\log P(y_i\mid x) - \log h(y_i\mid x)\bigr), \qquad h \in \{q', \pi_\theta\}"""

    def gap(p: int, i: int) -> float:
        return float(REF[p, i] + REWARDS[p, i] / BETA - POLICY[p, i])

    formula = by_prompt(
        lambda p: -math.log(3) + sum(weight(p, i) * gap(p, i) for i in range(N)) / N / 3
    )
    log_w = gdc.log_weights(REF, REWARDS, PROPOSAL, BETA)
    log_z = torch.full((P, 1), math.log(3), dtype=torch.float64)
    return formula, gdc.kl_from_target(log_w, log_z, REF + REWARDS / BETA, POLICY)


TRIPLE = table(5, P, 3)  # log-probs of y_w, y_l and y_ref
OF_REF = table(6, P, 3)
NO_TIE = torch.zeros(P, dtype=torch.bool)


def delta(p: int) -> float:
    """Δ of DPO."""
    return float(TRIPLE[p, 0] - OF_REF[p, 0] - (TRIPLE[p, 1] - OF_REF[p, 1]))


def dpo_code(**flags) -> torch.Tensor:
    """The loss of dpo.py."""
    return dpo.dpo_loss(TRIPLE, OF_REF, NO_TIE, dpo.Args(beta=BETA, **flags))


def dpo_0():
    r"""\Delta = \bigl[\log \pi_\theta(y_w\mid x) - \log \pi_{\mathrm{ref}}(y_w\mid x)\bigr] - \bigl[\log \pi_\theta(y_l\mid x) - \log \pi_{\mathrm{ref}}(y_l\mid x)\bigr]"""
    return by_prompt(delta), -(dpo_code(loss="sigmoid").exp() - 1).log() / BETA


def dpo_1():
    r"""L_{\mathrm{sigmoid}} = -\log \sigma(\tau\Delta)"""
    formula = by_prompt(lambda p: -math.log(1 / (1 + math.exp(-BETA * delta(p)))))
    return formula, dpo_code(loss="sigmoid")


def dpo_2():
    r"""L_{\mathrm{hinge}} = \max(0,\ 1 - \tau\Delta)"""
    return by_prompt(lambda p: max(0, 1 - BETA * delta(p))), dpo_code(loss="hinge")


def dpo_3():
    r"""L_{\mathrm{slic}} = \max\bigl(0,\ \delta - \log \pi_\theta(y_w\mid x) + \log \pi_\theta(y_l\mid x)\bigr) - \lambda \log \pi_\theta(y_{\mathrm{ref}}\mid x)"""
    formula = by_prompt(lambda p: max(0, 0.3 - TRIPLE[p, 0] + TRIPLE[p, 1]) - 0.2 * TRIPLE[p, 2])
    return formula, dpo_code(loss="slic", margin=0.3, reference_weight=0.2)


GAME = wind.Args(beta=0.3, eta=2.0)


def psi(p: int, i: int) -> float:
    """ψ of WIND."""
    own = (0.3 + 1 / 2) * POLICY[p, i]
    return float(own - 0.3 * REF[p, i] - PROPOSAL[p, i] / 2)


def wins(p: int, i: int) -> list[float]:
    """What sample i makes of its duels with all samples, itself included."""
    return [
        (REWARDS[p, i] > REWARDS[p, j]) + (REWARDS[p, i] == REWARDS[p, j]) / 2 for j in range(N)
    ]


def wind_0():
    r"""\pi_{t+1} \propto \pi_t^{\frac{1}{1+\beta\eta}}\ \pi_{\mathrm{ref}}^{\frac{\beta\eta}{1+\beta\eta}}\ e^{\frac{\eta}{1+\beta\eta} g_t}"""
    ref, previous, gain = (table(seed, 1, 6).log_softmax(1) for seed in (7, 8, 9))
    share = 1 / (1 + 0.3 * 2)
    powers = previous.exp() ** share * ref.exp() ** (0.6 * share) * (2 * share * gain).exp()
    step = wind.step_value((powers / powers.sum()).log(), ref, previous, GAME) - gain  # −c(x)
    return torch.full_like(step, step.mean().item()), step


def wind_1():
    r"""\psi_\theta(y) + c(x) = g_t(y), \qquad \psi_\theta = \left(\beta + \frac1\eta\right) \log \pi_\theta - \beta \log \pi_{\mathrm{ref}} - \frac1\eta \log \pi_t"""
    return per_sample(psi), wind.step_value(POLICY, REF, PROPOSAL, GAME)


def wind_2():
    r"""\hat g_i = \frac1K \sum_{j=1}^K P(y_i \succ y_j), \qquad \text{with } j = i, \text{ which counts } \tfrac12"""
    return per_sample(lambda p, i: sum(wins(p, i)) / N), wind.win_rates(REWARDS, "square").double()


def wind_3():
    r"""L_{\mathrm{square}} = \frac1K \sum_{i=1}^K \Bigl[ \Bigl(\psi_i - \frac1K \sum_j \psi_j\Bigr) - \Bigl(\hat g_i - \frac1K \sum_j \hat g_j\Bigr) \Bigr]^2"""
    win_rate = wind_2()[0]

    def loss(p: int) -> float:
        mean = sum(psi(p, j) for j in range(N)) / N
        centred = [psi(p, i) - mean - (win_rate[p, i] - win_rate[p].mean()) for i in range(N)]
        return sum(gap**2 for gap in centred) / N

    return by_prompt(loss), wind.wind_loss(POLICY, REF, PROPOSAL, win_rate, GAME)


def risk_of_s(risk: str, value):
    """Mean over the samples of value(ĝ, s), and what wind.py computes, where s is in (0, 1)."""
    near = PROPOSAL + 0.1 * (POLICY - PROPOSAL)
    ref = PROPOSAL + 0.1 * (REF - PROPOSAL)
    win_rate = wind.win_rates(REWARDS, risk).double()
    step = 0.8 * near - 0.3 * ref - PROPOSAL / 2

    def loss(p: int) -> float:
        total = 0.0
        for i in range(N):
            others = [float(step[p, j]) for j in range(N) if j != i]
            s = float(step[p, i]) + 0.5 - sum(others) / (N - 1)
            assert wind.FLOOR < s < 1 - wind.FLOOR
            total += value(float(win_rate[p, i]), s) / N
        return total

    args = dataclasses.replace(GAME, risk=risk)
    return by_prompt(loss), wind.wind_loss(near, ref, PROPOSAL, win_rate, args)


def wind_4():
    r"""L_{\mathrm{kl}} = -\bigl[\, \hat g \log s + (1 - \hat g) \log (1 - s) \,\bigr], \qquad s = \psi + c"""
    return risk_of_s("kl", lambda g, s: -(g * math.log(s) + (1 - g) * math.log(1 - s)))


def wind_5():
    r"""L_{\mathrm{nce}} = -2 \hat g \log \frac{2s}{1 + 2s} - \log \frac{1}{1 + 2s}, \qquad s = \psi + c"""
    return risk_of_s(
        "nce", lambda g, s: -2 * g * math.log(2 * s / (1 + 2 * s)) - math.log(1 / (1 + 2 * s))
    )


ANCHOR = torch.tensor([[0.0, 1.0, 1.0, 2.0], [3.0, 0.0, 5.0, 4.0]], dtype=torch.float64)
MIXED = torch.tensor([[1.0, 2.0, 1.5, -1.0], [6.0, -1.0, 4.0, 0.0]], dtype=torch.float64)


def log_of_best(p: int, reward: float, n: int) -> float:
    """log of (1) over π_a, with the shares (5)."""
    k = ANCHOR.shape[1]
    upto = max(1 / (2 * k), sum(float(other <= reward) for other in ANCHOR[p]) / k)
    below = max(1 / (2 * k), sum(float(other < reward) for other in ANCHOR[p]) / k)
    return math.log(upto ** (n - 1) * sum((below / upto) ** (i - 1) for i in range(1, n + 1)))


def bond_1():
    r"""\pi_{\mathrm{BoN}}(y) = \pi_a(y)\ p_{\le}(y)^{N-1} \sum_{i=1}^N \left( \frac{p_{<}(y)}{p_{\le}(y)} \right)^{i-1}"""
    inside = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)  # no share is at its floor
    formula = by_prompt(lambda p: sum(log_of_best(p, reward, 3) for reward in inside[p].tolist()))
    return formula, bond.log_best_of(inside, ANCHOR, 3).double().sum(1)


def bond_5():
    r"""\hat p_{\le}(y) = \max\Bigl( \frac{1}{2k},\ \frac1k \sum_{i=1}^k \mathbf{1}\{ r(y'_i) \le r(y) \} \Bigr), \qquad \hat p_{<} \text{ likewise with } <"""
    formula = per_sample(lambda p, i: log_of_best(p, float(MIXED[p, i]), 4))
    return formula, bond.log_best_of(MIXED, ANCHOR, 4).double()


def bond_6():
    r"""r_J(y) = \begin{cases} -\log 16 & \text{if } r(y) < \min(r(y'_1), r(y'_2)) \\ 0 & \text{else} \end{cases}"""
    pair = torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
    formula = per_sample(lambda p, i: -math.log(16) if MIXED[p, i] < min(pair[p]) else 0)
    return formula, bond.j_bond_reward(MIXED, pair).double()


BOTH = table(10, P, N + 2)  # log-probs of N samples of the policy, then of two of the anchor
RATIO, QUALITY, BEST = table(11, P, N), table(12, P, N), torch.tensor([1, 0])


class Alone:
    """One process."""

    world = 1

    @staticmethod
    def average(value: torch.Tensor) -> torch.Tensor:
        return value


def bond_code(b: float, gamma: float = 0.0) -> torch.Tensor:
    """The loss of bond.py."""
    advantage = bond.advantages(Alone, QUALITY - RATIO)
    args = bond.Args(jeffreys=b, gamma=gamma)
    return bond.bond_loss(BOTH, RATIO, advantage, BEST, args)


def forward(b: float) -> torch.Tensor:
    """L_forward of BOND."""
    return by_prompt(lambda p: -(1 - b) * BOTH[p, N + int(BEST[p])])


def backward(b: float) -> torch.Tensor:
    """L_backward of BOND, mean over the policy's samples."""
    returns = [[float(QUALITY[p, i] - RATIO[p, i]) for i in range(N)] for p in range(P)]
    total = sum(map(sum, returns))

    def loss(p: int) -> float:
        value = 0.0
        for i in range(N):
            others = (total - returns[p][i]) / (P * N - 1)
            value += -b * float(BOTH[p, i]) * (returns[p][i] - others) / N
        return value

    return by_prompt(loss)


def bond_3():
    r"""L_{\mathrm{forward}} = -(1-b) \log \pi_\theta(y_{\mathrm{best}})"""
    return forward(0.0), bond_code(0.0)


def bond_4():
    r"""L_{\mathrm{backward}} = -b\, \log \pi_\theta(y)\, (A - B), \qquad A = \log \frac{\hat\pi_{\mathrm{BoN}}(y)}{\pi_a(y)} - \ell, \qquad \ell = \log \frac{\pi_\theta(y)}{\pi_a(y)}"""
    return backward(1.0), bond_code(1.0)


def bond_7():
    r"""L = L_{\mathrm{forward}} + L_{\mathrm{backward}} + \gamma\, \log \pi_\theta(y)\, \ell"""
    hold = by_prompt(lambda p: sum(0.6 * BOTH[p, i] * RATIO[p, i] for i in range(N)) / N)
    return forward(0.3) + backward(0.3) + hold, bond_code(0.3, 0.6)


def bond_8():
    r"""\theta_a \leftarrow (1-\eta)\, \theta_a + \eta\, \theta"""
    (line,) = re.findall(r"^ *(weight\.lerp_.*?) +# \(8\)$", inspect.getsource(bond.main), re.M)
    weight, new = REF.clone(), POLICY
    eval(line, {"weight": weight, "new": new, "args": bond.Args(eta=0.3)})
    return per_sample(lambda p, i: 0.7 * REF[p, i] + 0.3 * POLICY[p, i]), weight


LENGTHS = [[3, 1, 2, 3], [2, 3, 3, 1]]
MASK = torch.tensor([[[t < length for t in range(3)] for length in group] for group in LENGTHS])
OLD, NOW, START = (table(seed, P, N, 3) * MASK for seed in (13, 14, 15))
VALUES, NEW_VALUES = (table(seed, P, N, 3) * MASK for seed in (16, 17))
EPSILON = 0.2


def per_token(value) -> torch.Tensor:
    """[P, N, T] of value(p, i, t), 0 behind the end."""
    out = torch.zeros(P, N, 3, dtype=torch.float64)
    for p in range(P):
        for i in range(N):
            for t in range(LENGTHS[p][i]):
                out[p, i, t] = float(value(p, i, t))
    return out


def paid(p: int, i: int, t: int) -> float:
    """R_t of PPO."""
    last = t == LENGTHS[p][i] - 1
    return float(-BETA * (OLD[p, i, t] - START[p, i, t]) + last * REWARDS[p, i])


def ppo_1():
    r"""R_t = -\beta \bigl( \log \pi_{\mathrm{old}}(y_t\mid s_t) - \log p(y_t\mid s_t) \bigr) + [t = T_y]\ r(x,y)"""
    return per_token(paid), ppo.token_rewards(REWARDS, OLD, START, MASK, BETA)


def surprise(p: int, i: int, t: int) -> float:
    """δ_t of PPO."""
    following = VALUES[p, i, t + 1] if t + 1 < LENGTHS[p][i] else 0.0
    return paid(p, i, t) + float(following - VALUES[p, i, t])


def advantage(p: int, i: int, t: int) -> float:
    """A_t of PPO at λ = 0.6."""
    return sum(0.6**k * surprise(p, i, t + k) for k in range(LENGTHS[p][i] - t))


def ppo_2():
    r"""A_t = \sum_{k\ge 0} \lambda^k \delta_{t+k}, \qquad \delta_t = R_t + V_{\mathrm{old}}(s_{t+1}) - V_{\mathrm{old}}(s_t), \qquad V_{\mathrm{old}}(s_{T_y+1}) = 0"""
    return per_token(advantage), ppo.gae(per_token(paid), VALUES, 0.6)


def clipped(value: float, low: float, high: float) -> float:
    """The nearest number in [low, high]."""
    return min(max(value, low), high)


def ppo_3():
    r"""L = -\mathrm{mean}_t\, \min\bigl( \rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\varepsilon, 1+\varepsilon)\, A_t \bigr), \qquad \rho_t = \frac{\pi_\theta(y_t\mid s_t)}{\pi_{\mathrm{old}}(y_t\mid s_t)}"""

    def term(p: int, i: int, t: int) -> float:
        ratio, gain = math.exp(NOW[p, i, t]) / math.exp(OLD[p, i, t]), advantage(p, i, t)
        return min(ratio * gain, clipped(ratio, 1 - EPSILON, 1 + EPSILON) * gain)

    loss = ppo.policy_loss(NOW, OLD, per_token(advantage), ppo.Args(clip=EPSILON))
    return -per_token(term).sum() / MASK.sum(), loss.sum() / MASK.sum()


def ppo_4():
    r"""L_V = \tfrac12\, \mathrm{mean}_t \max\bigl( (V - G_t)^2,\ (V_{\mathrm{old}} + \mathrm{clip}(V - V_{\mathrm{old}}, -\varepsilon, \varepsilon) - G_t)^2 \bigr), \qquad G_t = A_t + V_{\mathrm{old}}(s_t)"""

    def term(p: int, i: int, t: int) -> float:
        now, old = float(NEW_VALUES[p, i, t]), float(VALUES[p, i, t])
        goal = advantage(p, i, t) + old
        near = old + clipped(now - old, -EPSILON, EPSILON)
        return max((now - goal) ** 2, (near - goal) ** 2)

    returns = per_token(advantage) + VALUES
    loss = ppo.value_loss(NEW_VALUES, VALUES, returns, EPSILON)
    return per_token(term).sum() / 2 / MASK.sum(), loss.sum() / MASK.sum()


def ppo_5():
    r"""A_i = R_i - \frac{1}{N-1} \sum_{j\ne i} R_j, \qquad R_i = \sum_t R_{i,t}"""
    returns = [
        [sum(paid(p, i, t) for t in range(LENGTHS[p][i])) for i in range(N)] for p in range(P)
    ]
    formula = per_sample(
        lambda p, i: returns[p][i] - sum(returns[p][j] for j in range(N) if j != i) / (N - 1)
    )
    return formula, ppo.leave_one_out(per_token(paid).sum(2))


def brain_T():
    r"""p(y\mid x, G{=}1) = \frac{p(y\mid x)\, e^{r(x,y)/\tau}}{Z(x)}"""
    # q′ uniform over all N responses that there are: α̂ is the posterior.
    start, uniform = REF.log_softmax(1), torch.full_like(REF, -math.log(N))
    tilted = per_sample(lambda p, i: math.exp(start[p, i]) * math.exp(REWARDS[p, i] / BETA))
    formula = tilted / tilted.sum(1, keepdim=True)
    return formula, brain.posterior_weights(start, REWARDS, uniform, BETA)


TWINS = {
    name: twin
    for name, twin in list(globals().items())
    if re.fullmatch(rf"({'|'.join(SCRIPTS)})_[0-9T]", name)
}


@pytest.mark.parametrize("name", TWINS)
def test_a_formula_says_what_the_code_computes(name):
    """The formula of the page, computed number by number, is what the script's function returns."""
    page, number = name.split("_")
    formula, code = TWINS[name]()
    torch.testing.assert_close(code, formula, rtol=1e-6, atol=1e-6)
    assert ("" if number == "0" else number, TWINS[name].__doc__) in formulas(page)


@each_page
def test_every_formula_is_executed(name):
    """But for those that no function computes; and GitHub can set it."""
    for number, text in formulas(name):
        assert (name, number) in AIMED_AT or f"{name}_{number or 0}" in TWINS, text
        assert text.count("{") == text.count("}"), text
        for left, right in (
            ("left", "right"),
            ("bigl", "bigr"),
            ("Bigl", "Bigr"),
            ("begin", "end"),
        ):
            counts = [len(re.findall(rf"\\{mark}(?![a-z])", text)) for mark in (left, right)]
            assert counts[0] == counts[1], text
        assert r"\operatorname" not in text, "GitHub refuses it"


# ── what runs showed ──
def test_summary_of_a_log_by_hand():
    """First value, mean of each tenth of the steps, extremes behind the first tenth; 4 digits."""
    lines = [{"step": step, "loss": 10.0 - step, "time/sample_s": 1.0} for step in range(1, 21)]
    lines[0]["eval/kl"] = 7.0
    lines[19]["eval/kl"] = 1 / 3
    kept = ranges.summary(lines)
    assert list(kept) == ["loss", "eval/kl"]
    assert kept["loss"]["first"] == 9
    assert kept["loss"]["tenths"] == [8.5 - 2 * i for i in range(10)]
    assert (kept["loss"]["least"], kept["loss"]["most"]) == (-10, 7)
    assert kept["eval/kl"] == {
        "first": 7,
        "tenths": [7, *[None] * 8, 0.3333],
        "least": 0.3333,
        "most": 0.3333,
    }


@each_page
def test_generated_parts_are_up_to_date(name):
    """`python -m analyze.pages` leaves the page as it is."""
    assert pages.filled(name) == PAGES[name]


@each_page
def test_ranges_have_all_metrics_that_a_run_logs(name):
    """Of three seeds, of one commit, with every key but those that depend on the machine."""
    runs = ranges.of_script(name)
    assert [run["seed"] for run in runs] == [1, 2, 3]
    assert len({json.dumps(list(run["metrics"])) for run in runs}) == 1
    shown = set(
        re.findall(
            r"^\| `([\w/]+)` \|", section(name, "## Logged metrics and healthy ranges"), re.M
        )
    )
    assert shown == set(runs[0]["metrics"])
    own = [key for key in shown if key.split("/")[0] in (name, "weights", "logprob")]
    assert set(pages.OWN[name]) <= set(own)


@each_page
def test_lessons_still_change_the_script(name):
    """The text that a lesson makes wrong stands in the script; its flags are the script's."""
    source = (ROOT / f"{name}.py").read_text()
    for lesson in lessons.LESSONS[name]:
        assert lesson.old in source and lesson.new != lesson.old or lesson.flags, lesson
        common.parse_args(SCRIPTS[name].Args, lesson.flags.split())


DIFFS = sorted(lessons.EXERCISES.glob("*.diff"))
each_diff = pytest.mark.parametrize("diff", DIFFS, ids=[diff.stem for diff in DIFFS])


def test_three_exercises_for_each_method():
    assert [diff.stem for diff in DIFFS] == sorted(
        f"{name}-{i}" for name in SCRIPTS for i in (1, 2, 3)
    )


@each_diff
def test_an_exercise_applies(diff, tmp_path):
    """To the script as it is; what comes out is Python, has the same flags, and is not the same."""
    name = diff.stem.split("-")[0]
    path = lessons.changed(str(tmp_path), name, diff)
    compile(path.read_text(), str(path), "exec")
    assert path.read_text() != (ROOT / f"{name}.py").read_text()
    assert max(map(len, path.read_text().splitlines())) <= 100
    common.parse_args(SCRIPTS[name].Args, lessons.flags_of(diff).split())


@pytest.mark.slow
@each_diff
def test_an_exercise_runs(diff, tmp_path):
    """Two steps on small random models, with finite metrics that are not all the script's own."""
    name = diff.stem.split("-")[0]
    world = vars(make_world(tmp_path / "world"))
    logs = []
    for path in (ROOT / f"{name}.py", lessons.changed(str(tmp_path), name, diff)):
        module = runpy.run_path(str(path), run_name=name)
        args = common.parse_args(module["Args"], lessons.flags_of(diff).split())
        known = {field.name for field in dataclasses.fields(args)}
        folder = tmp_path / f"run-{len(logs)}"
        flags = {key: value for key, value in world.items() if key in known and key != "beta"}
        often = {key: 1 for key in ("refresh_every", "test_every") if key in known}
        args = dataclasses.replace(args, **flags | often | {"steps": 2, "run_dir": str(folder)})
        module["main"](args)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert len(logs[1]) == 3
    assert all(math.isfinite(value) for line in logs[1] for value in line.values())
    keys = [key for key in logs[0][1] if not key.startswith(("time/", "tokens_per_s", "memory/"))]
    assert any(logs[0][i][key] != logs[1][i][key] for i in (1, 2) for key in keys)
