"""docs/wind_cost.md and .png: WIND, SPPO, J-BOND and iterative BOND, quality against cost.

    python -m analyze.wind_cost     # measures what lacks raw lines, then draws and writes the page

The bandit takes two minutes on one core, the tiny language model half a minute per run.

**The bandit.** 20 contexts with 100 arms each, random probabilities of the start model, normal
rewards, a table of logits. All that is said of a policy is exact, by enumeration: its win rate over
the start model and its KL from it, and, of WIND, whose equilibrium is computed by exact steps, the
KL from that. The losses are those of wind.py and bond.py; a step has 8 samples of the policy for
each context, and takes AdamW by 0.02 with betas of 0.9 and 0.95, as the scripts do. `anchor` counts
what BOND draws of its anchor as well.

**What is counted.** A sample is drawn and scored by the reward model once, in all of them. Where
the preference is a model that reads pairs of responses, WIND and SPPO ask it about all pairs of K
samples, K(K−1)/2 (a pair and its mirror are one question), J-BOND about each sample and the two of
the anchor, and about these two, 2K + 1, and iterative BOND about each sample and k of the anchor,
and about the first two of these.

**The tiny language model.** wind.py and bond.py on their embedded default; its runs of WIND and
J-BOND are those of `analyze.compare`.
"""

import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

import bond
import wind
from analyze import sweep
from analyze.ablation import rounded
from analyze.tables import ROOT, median_and_range, table
from benchmarks.where import add
from plumbing.report import COLOURS, panels, read_lines

RESULTS = ROOT / "analyze" / "results"
TINY_RESULTS = RESULTS / "wind_cost_tiny.jsonl"
CONTEXTS, ARMS, SAMPLES, STEPS, LR, SEEN = 20, 100, 8, 3000, 0.02, 60
SEEDS, BETA = (1, 2, 3, 4, 5), 0.1


class Method(NamedTuple):
    """A script with flags for the bandit, and for the language model."""

    script: str
    flags: dict
    tiny: str = ""  # flags of the language model's runs; none are made where this is empty

    @property
    def anchors(self) -> int:
        """Samples of the anchor per context."""
        return self.args().anchor_samples if self.script == "bond" else 0

    def args(self):
        """The script's flags."""
        return (wind.Args if self.script == "wind" else bond.Args)(**self.flags)

    def comparisons(self) -> int:
        """Questions per context to a preference model that reads pairs of responses."""
        if self.script == "wind":
            return SAMPLES * (SAMPLES - 1) // 2
        return SAMPLES * self.anchors + 1


EVERY = "--eval-every 10 --eval-prompts 128"
METHODS = {
    "WIND": Method("wind", {"beta": BETA}, EVERY),
    "WIND, kl": Method("wind", {"beta": BETA, "risk": "kl"}),
    "WIND, nce": Method("wind", {"beta": BETA, "risk": "nce"}),
    "SPPO (β = 0)": Method("wind", {"beta": 0.0}, f"--beta 0 {EVERY}"),
    "J-BOND": Method("bond", {}, EVERY),
    "iterative BOND": Method(
        "bond",
        {"anchor": "copy", "anchor_samples": 4},
        f"--anchor copy --anchor-samples 4 {EVERY}",
    ),
}
RUNS = [
    sweep.Planned(name, method.script, method.tiny, seed)
    for seed in SEEDS
    for name, method in METHODS.items()
    if method.tiny
]


@dataclass
class Args:
    jobs: int = 1
    """runs of the language model at a time"""
    before: str = ""
    """put before the command of each such run, as `nice -n 10`"""


# ── the bandit ────────────────────────────────────────────────────────────────────────────────────


def world(seeds: tuple[int, ...] = SEEDS, arms: int = ARMS) -> tuple[Tensor, Tensor]:
    """(log-probs of the start model, rewards) [S · contexts, arms], in ascending order of reward.

    The order of the arms means nothing to a table of logits, and makes win rates sums.
    """
    parts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shape = (2, CONTEXTS, arms)
        logits, rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
        parts.append((logits.log_softmax(-1), rewards.sort(-1).values))
    return tuple(torch.cat(part) for part in zip(*parts))


def win_rates_over(policy: Tensor) -> Tensor:
    """g [..., arms]: how often each arm, in order of reward, beats a sample of `policy`."""
    p = policy.exp()
    return p.cumsum(-1) - p / 2  # an arm ties with itself only


def exact_step(policy: Tensor, ref: Tensor, beta: float, eta: float) -> Tensor:
    """WIND's step, (1) of wind.py, from log-probs [..., arms]."""
    logits = policy + beta * eta * ref + eta * win_rates_over(policy)
    return (logits / (1 + beta * eta)).log_softmax(-1)


def equilibrium(ref: Tensor, beta: float) -> Tensor:
    """Log of π* ∝ π_ref · exp(g_π*/β), by exact steps of η = 4β until they stand still."""
    policy = ref
    for _ in range(20_000):
        policy, old = exact_step(policy, ref, beta, 4 * beta), policy
        if (policy - old).abs().max() < 1e-13:
            return policy
    raise RuntimeError(f"no equilibrium for β = {beta}")


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first‖second) in nats over the last dimension, of log-probs."""
    return (first.exp() * (first - second)).sum(-1)


def best_of(ref: Tensor, n: int) -> Tensor:
    """Log-probs of the best of n samples, exact."""
    upto = ref.exp().cumsum(-1)
    below = torch.cat([torch.zeros_like(upto[..., :1]), upto[..., :-1]], -1)
    return (upto**n - below**n).clamp(min=1e-300).log()


def standing(policy: Tensor, ref: Tensor, star: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """What is said of a policy, of each context."""
    p = policy.exp()
    return {
        "win_rate": (p * win_rates_over(ref)).sum(-1),
        "kl": kl(policy, ref),
        "kl_from_equilibrium": kl(star, policy),
        "reward": (p * rewards).sum(-1),
    }


def train(
    method: Method, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, arms: int = ARMS
) -> dict:
    """Runs a method for all seeds side by side: lists over the seeds, of lists over `steps`."""
    ref, rewards = world(seeds, arms)
    star, args, step_of = equilibrium(ref, BETA), method.args(), STEPS_OF[method.script]
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.AdamW([logits], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    other = ref.clone()  # WIND's opponent or BOND's anchor, logits
    seen, curve = [], {}
    for step in range(steps + 1):
        policy = logits.log_softmax(-1)
        if step % max(1, steps // SEEN) == 0:
            seen.append(step)
            for key, value in standing(policy.detach(), ref, star, rewards).items():
                curve.setdefault(key, []).append(value.view(len(seeds), -1).mean(1))
        if step == steps:
            break
        loss = step_of(args, policy, other.log_softmax(-1), ref, rewards, len(seeds), generator)
        (loss.sum() / CONTEXTS).backward()
        optimizer.step()
        optimizer.zero_grad()
        renew(args, other, logits.detach(), step + 1)
    return {"steps": seen} | {key: torch.stack(part, 1).tolist() for key, part in curve.items()}


def draw_arms(policy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Arms [P, count] of log-probs [P, arms]."""
    return torch.multinomial(policy.exp(), count, replacement=True, generator=generator)


def wind_step(args, policy, opponent, ref, rewards, _, generator) -> Tensor:
    """wind.py's loss [P] on fresh samples of the opponent, π_t."""
    arms = draw_arms(opponent, SAMPLES, generator)
    logprobs, ref, opponent, rewards = (
        part.gather(1, arms) for part in (policy, ref, opponent, rewards)
    )
    win_rate = wind.win_rates(rewards, args.risk, args.preference)
    return wind.wind_loss(logprobs, ref, opponent, win_rate, args)


def bond_step(args, policy, anchor, _, rewards, seeds, generator) -> Tensor:
    """bond.py's loss [P] on fresh samples of policy and anchor."""
    ours = draw_arms(policy.detach(), SAMPLES, generator)
    arms = torch.cat([ours, draw_arms(anchor, args.anchor_samples, generator)], 1)
    logprobs, anchor, rewards = (part.gather(1, arms) for part in (policy, anchor, rewards))
    mine, theirs = rewards[:, :SAMPLES], rewards[:, SAMPLES:]
    log_ratio = (logprobs.detach() - anchor)[:, :SAMPLES]
    best = theirs[:, : args.best_of].argmax(1)
    if args.anchor == "ema":
        quality = bond.j_bond_reward(mine, theirs)
    else:
        quality = bond.log_best_of(mine, theirs, args.best_of)
    alone = SimpleNamespace(average=lambda value: value, world=1)  # one process
    returns = (quality - log_ratio).view(seeds, -1, SAMPLES)
    advantage = torch.cat([bond.advantages(alone, part) for part in returns])
    return bond.bond_loss(logprobs, log_ratio, advantage, best, args)


STEPS_OF = {"wind": wind_step, "bond": bond_step}


def renew(args, other: Tensor, logits: Tensor, step: int) -> None:
    """The opponent or the anchor after so many steps, as in the scripts."""
    if isinstance(args, bond.Args):
        if args.anchor == "ema":
            other.lerp_(logits, args.eta)
        elif args.anchor == "copy" and step % round(1 / args.eta) == 0:
            other.copy_(logits)
    elif step % args.refresh_every == 0:
        other.copy_(logits)


# ── raw lines ─────────────────────────────────────────────────────────────────────────────────────


def measure_bandit() -> None:
    """Adds a line for each method that has none."""
    done = {line["method"] for line in bandit_lines()}
    for name, method in METHODS.items():
        if name not in done:
            begun = time.perf_counter()
            line = {"method": name, "script": method.script, "flags": method.flags, "seeds": SEEDS}
            line |= {"samples": SAMPLES + method.anchors, "comparisons": method.comparisons()}
            line |= rounded(train(method)) | {"seconds": round(time.perf_counter() - begun, 1)}
            add("wind_cost", line | {"command": "python -m analyze.wind_cost"}, RESULTS)


def bandit_lines() -> list[dict]:
    """The raw lines of the bandit."""
    path = RESULTS / "wind_cost.jsonl"
    return read_lines(path) if path.exists() else []


# ── page and picture ──────────────────────────────────────────────────────────────────────────────

START = """# What WIND costs beside SPPO, J-BOND and iterative BOND

Made by `python -m analyze.wind_cost`, which says what is measured and what is counted; raw lines:
`analyze/results/wind_cost.jsonl`. The numbers of the WIND paper could not be read; these are our
own, of [our derived forms](wind.md), and "SPPO" is `wind.py --beta 0`: SPPO's regression, trained
on all K samples where the paper takes the best and the worst.

![win rate against samples and against KL](wind_cost.png)

## A bandit whose equilibrium is known

{contexts} contexts, {arms} arms each, {seeds} seeds; medians (least to largest) of means over the
contexts. WIND's equilibrium by exact steps, and by the closed forms that hold when no two samples
are the same arm:

{equilibria}

The exact step comes closer to it by the factor 1/(1+βη) or less at each step, for β = {beta}:

{rates}

Sampled, {per_step} responses of the policy per context and step, {steps} steps:

{ends}

* **WIND alone has somewhere to stop.** It comes to the equilibrium's win rate and KL and stays.
  SPPO, J-BOND and iterative BOND have no such goal here: win rate and KL grow until a context has
  one arm left, the best or a good one. Their last lines say when one has stopped, so methods are
  compared on the way, below.
* `square` is exact for every K. `kl` and `nce` settle beside the equilibrium, by O(1/K)
  ([wind.md](wind.md)): both end above it.
* The distance from the equilibrium, KL(π*‖π), falls slowly: arms that the policy has nearly given
  up are seldom drawn, and nothing is learnt of them until they are.

What a win rate of {near} and of {far} costs, in samples per context (each is one call of the reward
model), and at what KL it is there; and in questions to a preference model that reads pairs:

{costs}

All go along the same line of win rate and KL. On the way to {near} WIND and SPPO take {share} of
J-BOND's and iterative BOND's samples; a step size that is the same for all, not tuned for any, and
the samples that BOND draws of its anchor make the difference. If the preference is a model that
reads pairs, J-BOND asks it least: {asks_bond} questions per context and step, where WIND and SPPO
ask {asks}.
"""
NEAR, FAR_RATE = 0.75, 0.9


def over_seeds(values: list[float], digits: int) -> str:
    """Median (least to largest)."""
    return median_and_range([round(value, digits) + 0.0 for value in values], digits)


def reached(x: list[float], y: list[float], goal: float) -> float | None:
    """The first x at which the line through (x, y) has the height `goal`; None if it never has."""
    for i in range(len(y)):
        if y[i] >= goal:
            if i == 0:
                return x[0]
            share = (goal - y[i - 1]) / (y[i] - y[i - 1])
            return x[i - 1] + share * (x[i] - x[i - 1])
    return None


def cost(line: dict, goal: float) -> tuple[list[float], list[float]] | None:
    """(steps, KL) of each seed when its win rate is first `goal`; None if one never comes there."""
    steps, kls = [], []
    for rates, kl_of in zip(line["win_rate"], line["kl"]):
        at = reached(line["steps"], rates, goal)
        if at is None:
            return None
        steps.append(at)
        kls.append(reached(kl_of, rates, goal))
    return steps, kls


def equilibria() -> str:
    """Table: the equilibrium of the bandit and of the limit without collisions."""
    ref, rewards = world()
    rows = []
    for beta in (0.05, 0.1, 0.25, 0.5, 1.0):
        star = equilibrium(ref, beta)
        at = {key: part.mean().item() for key, part in standing(star, ref, star, rewards).items()}
        b = torch.tensor(beta, dtype=torch.float64)
        limit = 1 - torch.exp(-1 / b)
        closed = [1 / limit - b, (b * limit).log() + 1 / (2 * b)]
        cells = [at["win_rate"], closed[0].item(), at["kl"], closed[1].item()]
        rows.append([f"{beta:g}", *(f"{cell:.4f}" for cell in cells)])
    head = ["β", "win rate over π_ref", "in the limit", "KL(π*‖π_ref), nats", "in the limit"]
    return table(head, rows)


def rates(seen: tuple[int, ...] = (0, 10, 50, 100, 200)) -> str:
    """Table: KL(π*‖π_t) of exact steps, at most, of all contexts, relative to the bound."""
    ref, _ = world()
    star, rows = equilibrium(ref, BETA), []
    for eta in (BETA, 4 * BETA, 5.0):
        policy, cells = ref, []
        for t in range(seen[-1] + 1):
            if t in seen:
                found = kl(star, policy).mean().item()
                # Smaller ones are rounding, which differs from processor to processor.
                cells.append(f"{found:.1e}" if found > 1e-12 else "below 1e-12")
            policy = exact_step(policy, ref, BETA, eta)
        bounds = [f"{(1 + BETA * eta) ** -t * kl(star, ref).mean().item():.1e}" for t in seen]
        rows += [[f"{eta:g}", "found", *cells], [f"{eta:g}", "bound", *bounds]]
    return table(["η", "mean KL(π*‖π_t)", *(f"t = {t}" for t in seen)], rows)


def page() -> str:
    """docs/wind_cost.md."""
    lines = {line["method"]: line for line in bandit_lines()}
    ends, costs, taken = [], [], {"wind": [], "bond": []}
    for name, line in lines.items():
        last = {key: [seed[-1] for seed in line[key]] for key in ("win_rate", "kl", "reward")}
        last["far"] = [seed[-1] for seed in line["kl_from_equilibrium"]]
        cells = [over_seeds(last[key], 2) for key in ("win_rate", "kl", "far", "reward")]
        ends.append([name, *cells])
        row = [name, line["samples"], line["comparisons"]]
        for goal in (NEAR, FAR_RATE):
            found = cost(line, goal)
            if found:
                steps, kls = found
                row.append(over_seeds([step * line["samples"] for step in steps], 0))
                row.append(over_seeds(kls, 2))
                row.append(f"{statistics.median(steps) * line['comparisons']:.0f}")
            else:
                row += ["not by all seeds", "", ""]
        costs.append(row)
        steps, _ = cost(line, NEAR)
        taken[line["script"]].append(statistics.median(steps) * line["samples"])
    least = min(taken["wind"]) / max(taken["bond"])
    most = max(taken["wind"]) / min(taken["bond"])
    goals = [
        head
        for goal in (NEAR, FAR_RATE)
        for head in (f"samples to {goal}", "KL there", "pairs asked")
    ]
    bandit = START.format(
        contexts=CONTEXTS,
        arms=ARMS,
        seeds=len(SEEDS),
        equilibria=equilibria(),
        beta=BETA,
        rates=rates(),
        per_step=SAMPLES,
        steps=STEPS,
        ends=table(["method", "win rate", "KL(π‖π_ref)", "KL(π*‖π)", "mean reward"], ends),
        near=NEAR,
        far=FAR_RATE,
        costs=table(["method", "samples per step", "pairs per step", *goals], costs),
        share=f"{least:.0%} to {most:.0%}",
        asks=METHODS["WIND"].comparisons(),
        asks_bond=METHODS["J-BOND"].comparisons(),
    )
    return bandit + tiny_part()


TINY_START = """
## The tiny language model

`wind.py` and `bond.py` on their embedded default, 100 steps of 16 prompts, {seeds}; medians (least
to largest). Raw lines: `analyze/results/wind_cost_tiny.jsonl`. WIND has its default β of {beta},
KL is from the start model, and the win rate is by the reward model against the data set's own
completions. Where a run first reaches {near} is read between evaluations, 10 steps apart; a sample
is one call of the reward model, and CPU seconds are those of the whole process, start and
evaluations included, in proportion to the steps.

{table}

{said}
"""
SAID = """To the same win rate WIND and SPPO take about half of the samples of J-BOND and iterative
BOND or less, as on the bandit, but BOND is there at a lower KL. By the end SPPO, which nothing
holds near the start model, has the highest win rate by the reward model and the lowest by gold: it
has learnt what the reward model gets wrong."""


def tiny_part() -> str:
    """What the page says of the language model: nothing before all methods have a run."""
    lines, rows = sweep.read_results(TINY_RESULTS), []
    names = [name for name, method in METHODS.items() if method.tiny]
    own = {name: [line for line in lines if line["command"] in commands(name)] for name in names}
    if not all(own.values()):
        return ""
    for name, runs in own.items():
        ends = [run["curve"][-1] for run in runs]
        row = [name, len(runs)]
        row += [over_seeds([end[key] for end in ends], 2) for key in TINY_KEYS]
        found = [tiny_cost(run, NEAR) for run in runs]
        if all(found):
            for key, digits in (("samples", 0), ("kl", 2), ("cpu_seconds", 0)):
                row.append(over_seeds([at[key] for at in found], digits))
        else:
            row += ["not in all runs", "", ""]
        rows.append([*row, over_seeds([run["cpu_seconds"] for run in runs], 0)])
    head = ["method", "seeds", "win rate", "by gold", "KL, nats", f"samples to {NEAR}", "KL there"]
    head += ["CPU seconds to there", "of the whole run"]
    count = len(lines)
    seeds = f"{len(SEEDS)} seeds" if count == len(RUNS) else f"{count} of {len(RUNS)} runs so far"
    return TINY_START.format(
        seeds=seeds, beta=wind.Args.beta, near=NEAR, table=table(head, rows), said=SAID
    )


TINY_KEYS = ("win_rate", "judge_win_rate", "kl")


def commands(name: str) -> set[str]:
    """Of a method's runs of the language model."""
    return {run.command for run in RUNS if run.label == name}


def tiny_cost(run: dict, goal: float) -> dict[str, float] | None:
    """Samples, CPU seconds and KL where a run's win rate is first `goal`; None if it never is."""
    curve = {key: [point[key] for point in run["curve"]] for key in ("step", "win_rate", "kl")}
    step = reached(curve["step"], curve["win_rate"], goal)
    if step is None:
        return None
    share = step / curve["step"][-1]
    kl_there = reached(curve["kl"], curve["win_rate"], goal)
    found = {key: share * run[key] for key in ("samples", "cpu_seconds")}
    return found | {"kl": kl_there}


def draw(path) -> None:
    """Win rate against samples and against KL, and the distance from the equilibrium."""
    ref, rewards = world()
    star = equilibrium(ref, BETA)
    goal = {key: part.mean().item() for key, part in standing(star, ref, star, rewards).items()}
    tiny = sweep.read_results(TINY_RESULTS) if tiny_part() else []
    rows = 2 if tiny else 1
    figure, axes = panels(rows, 3, (14, 4.2 * rows))
    colour_of = dict(zip(METHODS, COLOURS))
    for line in bandit_lines():
        colour = colour_of[line["method"]]
        middle = {
            key: torch.tensor(line[key]).median(0).values
            for key in ("win_rate", "kl", "kl_from_equilibrium")
        }
        samples = [step * line["samples"] for step in line["steps"]]
        style = {"color": colour, "lw": 2, "label": line["method"]}
        axes[0].plot(samples, middle["win_rate"], **style)
        axes[1].plot(middle["kl"], middle["win_rate"], **style)
        axes[2].plot(samples, middle["kl_from_equilibrium"], **style)
    best = [standing(best_of(ref, n), ref, star, rewards) for n in (1, 2, 4, 8, 16, 32, 64)]
    x, y = ([part[key].mean().item() for part in best] for key in ("kl", "win_rate"))
    axes[1].plot(x, y, "k:", lw=1.5, label="best of N of π_ref, exact")
    axes[1].plot(goal["kl"], goal["win_rate"], "k*", ms=13, label=f"equilibrium, β = {BETA}")
    axes[0].axhline(goal["win_rate"], color="black", lw=1, ls="--", label="equilibrium")
    axes[0].set(xlabel="samples per context", ylabel="win rate over π_ref", title="bandit")
    axes[1].set(xlabel="KL(π‖π_ref), nats", ylabel="win rate over π_ref", title="bandit")
    axes[2].set(xlabel="samples per context", ylabel="KL(π*‖π), nats", title="bandit")
    axes[2].set(yscale="log")
    for name in METHODS:
        runs = [run for run in tiny if run["command"] in commands(name)]
        for number, run in enumerate(runs):
            style = {"color": colour_of[name], "lw": 1.5, "ms": 3}
            style["label"] = name if number == 0 else None
            y = [point["win_rate"] for point in run["curve"]]
            share = [point["step"] / run["curve"][-1]["step"] for point in run["curve"]]
            axes[3].plot([part * run["samples"] for part in share], y, "o-", **style)
            axes[4].plot([point["kl"] for point in run["curve"]], y, "o-", **style)
            axes[5].plot([part * run["cpu_seconds"] for part in share], y, "o-", **style)
    for axis, label in zip(axes[3:], ("samples", "KL from the start model, nats", "CPU seconds")):
        axis.set(xlabel=label, title="tiny language model")
        axis.set_ylabel("win rate over the completions")
    for axis in axes:
        axis.legend(fontsize=8)
        axis.locator_params(axis="x", nbins=6)  # numbers of five digits need room
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Measures what lacks, draws, writes the page."""
    measure_bandit()
    sweep.sweep(RUNS, TINY_RESULTS, sweep.gold_judge, args.jobs, args.before)
    draw(ROOT / "docs" / "wind_cost.png")
    (ROOT / "docs" / "wind_cost.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
