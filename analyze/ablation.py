"""docs/ablation.md and .png: BRAIn without its baseline, without normalising it, and the ladder.

    python -m analyze.ablation      # measures what lacks raw lines, then draws and writes the page

The product world takes two minutes on one core, the tiny language model half a minute per run.

**The product world.** A response is 20 tokens, each drawn from 8 by its own distribution, whatever
the others are. The reward is a sum over the tokens, so the target (T) is a product as well, and a
policy of 20 · 8 logits can be it: the KL from the target is exact. Each seed has its own start
model and rewards, and runs of all seeds are computed side by side, with brain.py's own weights and
losses: 128 responses per step, 1,500 steps of Adam whose size falls from 0.02 to 0.

**Where the ablations stop with a fixed proposal** (derived). Both have the mean gradient of the
loss −E Σ_i α̂_i log q_θ(y_i): the unnormalised baseline has the mean E_q′[(q_θ/q′) ∇log q_θ] = 0.
So they stop where q_θ is closest to the distribution of a response that is chosen with weight α̂
among N of the proposal's:

    q_N(y) = E[ Σ_i α̂_i 1{y_i = y} ],   q_N ≤ N · q′,   KL(q_N‖q′) ≤ log N                   (1)

The policies of this world are products, so they stop at the product of q_N's marginals.

**The tiny language model.** `brain.py` on its embedded default, 60 steps, five seeds: the same
arms. The ladder on it is `benchmarks.ladder`'s.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import tyro
from torch import Tensor

import brain
from analyze import sweep
from analyze.intervals import kl_bound
from analyze.tables import ROOT, median_and_range, table
from benchmarks.where import add
from plumbing.report import COLOURS, panels, read_lines

RESULTS = ROOT / "analyze" / "results"
TINY_RESULTS = RESULTS / "ablation_tiny.jsonl"
SEEDS = tuple(range(10))
TOKENS, WORDS, PER_STEP, STEPS, LR = 20, 8, 128, 1500, 0.02
LONG = 6000  # steps, for the targets that are farthest
SEEN = 30  # points of a curve
GROUPS = 50_000  # groups of N samples that (1) is estimated from
JUDGED = 4096  # responses of policy and start model that a win rate is estimated from
TINY_STEPS, TINY_RENEWAL, TINY_SEEDS = 60, 10, (1, 2, 3, 4, 5)
ESTIMATORS = {"brain": "BRAIn", "no-self-norm": "w/o self-norm", "no-baseline": "w/o baseline"}


class Setting(NamedTuple):
    """Runs of the product world, one per seed."""

    estimator: str = "brain"
    samples: int = 8  # N, of which a step has PER_STEP / N groups
    refresh: int = 0  # steps between renewals of the proposal; 0 = the start model throughout
    scale: float = 1.0  # of the rewards: it sets how far the target is from the start model
    steps: int = STEPS


SCALES, REFRESHES, COUNTS = (0.25, 0.5, 1.0, 1.5, 2.0), (0, 500, 100, 10), (2, 8, 32, 128)
LADDER = {
    "DPO-sft": Setting("arg-max", 2),
    "softmax": Setting("brain", 2),
    "more samples": Setting("brain", 8),
    "renewed proposal": Setting("brain", 8, 100),
}
SETTINGS = dict.fromkeys(
    Setting(estimator, samples, refresh, scale)
    for estimator in ESTIMATORS
    for samples, refresh, scale in [
        *((8, 0, scale) for scale in SCALES),
        *((8, refresh, 1.0) for refresh in REFRESHES),
        *((count, 0, 1.0) for count in COUNTS),
        (8, 100, 0.5),
    ]
) | dict.fromkeys(
    [setting._replace(scale=scale) for setting in LADDER.values() for scale in (0.5, 1.0)]
    + [Setting(scale=scale, steps=LONG) for scale in (1.5, 2.0)]
)
TINY = {  # label: flags of brain.py
    f"{name}, {proposal}": f"--estimator {estimator} --refresh-every {refresh}"
    for proposal, refresh in (("fixed", 0), ("renewed", TINY_RENEWAL))
    for estimator, name in ESTIMATORS.items()
}
RUNS = [  # the fixed proposal first: it is where the estimates differ
    sweep.Planned(label, "brain", f"--steps {TINY_STEPS} {TINY[label]}", seed)
    for labels in (list(TINY)[:3], list(TINY)[3:])
    for seed in TINY_SEEDS
    for label in labels
]


@dataclass
class Args:
    jobs: int = 1
    """runs of the language model at a time"""
    before: str = ""
    """put before the command of each such run, as `nice -n 10`"""


# ── the product world ─────────────────────────────────────────────────────────────────────────────


def world(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """(log-probs of the start model, rewards) of each token at each place, [T, V] each."""
    generator = numpy.random.default_rng(1234 + seed)
    logits, rewards = (generator.normal(size=(TOKENS, WORDS)) for _ in range(2))
    return torch.from_numpy(logits).log_softmax(-1), scale * torch.from_numpy(rewards)


def draw_tokens(logprobs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Responses [S, T, count] of the product distributions [S, T, V]."""
    shape = (*logprobs.shape[:2], count)
    u = torch.rand(shape, generator=generator, dtype=logprobs.dtype)
    upto = logprobs.exp().cumsum(-1)
    return torch.searchsorted(upto, u).clamp(max=logprobs.shape[-1] - 1)


def of_responses(values: Tensor, tokens: Tensor) -> Tensor:
    """The sum over its tokens of each response, [S, count], from [S, T, V] and [S, T, count]."""
    return values.gather(2, tokens).sum(1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first‖second) [S] in nats of product distributions [S, T, V], exact."""
    return (first.exp() * (first - second)).sum((1, 2))


def train(setting: Setting, seeds: tuple[int, ...] = SEEDS) -> dict:
    """Runs a setting for all seeds at once; what was found, a list over the seeds for each key."""
    steps, worlds = setting.steps, [world(seed, setting.scale) for seed in seeds]
    ref, rewards = (torch.stack(part) for part in zip(*worlds))  # [S, T, V]
    target = (ref + rewards).log_softmax(-1)  # (T) with τ = 1
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LR)
    generator = torch.Generator().manual_seed(1)
    proposal, curve, seen = ref, [], []
    for step in range(steps + 1):
        policy = logits.log_softmax(-1)
        if step % max(1, steps // SEEN) == 0:
            seen.append(step)
            curve.append(kl(target, policy.detach()))
        if step == steps:
            break
        if setting.refresh and step % setting.refresh == 0:
            proposal = policy.detach()
        tokens = draw_tokens(proposal, PER_STEP, generator)
        parts = (of_responses(part, tokens) for part in (ref, rewards, proposal, policy))
        ref_logprobs, scores, proposal_logprobs, logprobs = (
            part.reshape(-1, setting.samples) for part in parts
        )
        weights = brain.posterior_weights(
            ref_logprobs, scores, proposal_logprobs, 1.0, setting.estimator
        )
        loss = brain.brain_loss(logprobs, proposal_logprobs, weights, setting.estimator)
        (loss.sum() * setting.samples / PER_STEP).backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    policy = policy.detach()
    ours, starts = (
        of_responses(rewards, draw_tokens(part, JUDGED, generator)) for part in (policy, ref)
    )
    return {
        "kl_of_target": kl(target, ref).tolist(),  # KL(target‖start model)
        "kl_from_target": kl(target, policy).tolist(),  # KL(target‖policy)
        "kl": kl(policy, ref).tolist(),  # KL(policy‖start model)
        "win_rate": (ours > starts).double().mean(1).tolist(),  # no two rewards are equal
        "reward": (policy.exp() * rewards).sum((1, 2)).tolist(),
        "reward_of_target": (target.exp() * rewards).sum((1, 2)).tolist(),
        "steps": seen,
        "curve": torch.stack(curve, 1).tolist(),  # KL(target‖policy) [S, points]
    }


def stop(setting: Setting, seeds: tuple[int, ...] = SEEDS, groups: int = GROUPS) -> list[float]:
    """KL(target‖·) of the product of q_N's marginals, (1), for each seed: the start model proposes.

    Estimated from `groups` groups of N samples per seed.
    """
    found, generator = [], torch.Generator().manual_seed(2)
    for seed in seeds:
        ref, rewards = (part[None] for part in world(seed, setting.scale))
        marginals = torch.zeros_like(ref[0])
        for _ in range(10):
            tokens = draw_tokens(ref, groups // 10 * setting.samples, generator)
            scores = of_responses(rewards, tokens).reshape(-1, setting.samples)
            none = torch.zeros_like(scores)  # the prior proposes: its log-probs cancel
            weights = brain.posterior_weights(none, scores, none, 1.0).reshape(1, -1)
            marginals.scatter_add_(1, tokens[0], weights.expand(TOKENS, -1))
        marginals = (marginals / marginals.sum(1, keepdim=True)).log()[None]
        found.append(kl((ref + rewards).log_softmax(-1), marginals).item())
    return found


# ── raw lines ─────────────────────────────────────────────────────────────────────────────────────


def rounded(found: dict) -> dict:
    """The same with five digits behind the point."""

    def short(value):
        return [short(part) for part in value] if isinstance(value, list) else round(value, 5)

    return {key: short(value) for key, value in found.items()}


def measure_product() -> None:
    """Adds a line for each setting, and for each place where (1) says the ablations stop."""
    done = [Setting(**line["setting"]) for line in lines_of("product")]
    for setting in SETTINGS:
        if setting not in done:
            begun = time.perf_counter()
            found = rounded(train(setting)) | {"seconds": round(time.perf_counter() - begun, 1)}
            save("product", setting, found)
    done = [Setting(**line["setting"]) for line in lines_of("stop")]
    for setting in SETTINGS:
        if setting.estimator == "no-baseline" and not setting.refresh and setting not in done:
            save("stop", setting, rounded({"kl_from_target": stop(setting)}))


def save(part: str, setting: Setting, found: dict) -> None:
    """Adds a raw line."""
    line = {"part": part, "setting": setting._asdict(), "seeds": SEEDS} | found
    add("ablation", line | {"command": "python -m analyze.ablation"}, RESULTS)


def lines_of(part: str) -> list[dict]:
    """The raw lines of a part."""
    path = RESULTS / "ablation.jsonl"
    return [line for line in read_lines(path) if line["part"] == part] if path.exists() else []


# ── page and picture ──────────────────────────────────────────────────────────────────────────────

START = """# The ablation of BRAIn

What does a run need of BRAIn's weights α̂ − β̂? Without normalising the baseline they are
α̂ − (1/N)·q_θ/q′ ("w/o self-norm"), without any baseline α̂ ("w/o baseline"). Made by
`python -m analyze.ablation`, which says what is measured; raw lines:
`analyze/results/ablation.jsonl`.

![KL from the target](ablation.png)

The BRAIn authors' table, for comparison (win rate against gold, in the order of its header; the
sentence above it names the last two the other way round): TL;DR 95.2, 61.4, 61.1; Anthropic HH
95.4, 59.1, 58.3.

## Where the target is known: the product world

{seeds} seeds, each with its own start model and rewards; medians (least to largest). KL is in nats.
The win rate is over the start model. Rewards of scale 0.5 put the target {half} nats from the
start model, those of scale 1 {whole}.

{ablation}

* **With the proposal fixed at the start model BRAIn reaches the target, and both ablations stop
  short of it, at the same place**: at scale 1 with {share} of the way still to go. Why: the mean
  gradient of both is that of −E Σ α̂_i log q_θ(y_i), so they stop at the distribution of *one
  response chosen with weight α̂ among N of the start model's*. That is a soft best-of-N, at most
  log N nats from the start model (derived; (1) of the script). The column "by (1)" has what this
  says, computed without any training.
* **With a proposal renewed every 100 steps all three agree**, since each renewal lets the soft
  best-of-N start from the best so far, and at q′ = target all α̂ are equal.
* The win rate over the start model hides most of the difference: a soft best-of-8 already wins
  {soft} of the comparisons at scale 1. Nothing of this kind can pass N/(N+1) = 0.89.

How often the proposal is renewed, at scale 1: KL(target‖policy) after {steps} steps. Two renewals
nearly suffice.

{refreshed}

How far the target is, with a fixed proposal and N = 8. Within half a nat the ablations lose
little; beyond, what they lack grows with every nat. The last column has runs of BRAIn of {long}
steps: what it lacks at the farthest targets is time.

{budget}

How many samples, at scale 1 with a fixed proposal and {per_step} responses per step in all: the
ablations come nearer with log N, slowly. At N = 128, where a step has a single group, "w/o
self-norm" ends above (1); why, we have not looked into.

{counts}

## The ladder from DPO-sft to BRAIn

As in [brain.md](brain.md): the arg-max of two samples, their softmax, eight samples, a renewed
proposal. KL(target‖policy), and the mean reward, of which the target has {rewards}.

{ladder}

The arg-max trusts every comparison fully. It has no target, and runs past (T) to higher rewards;
at scale 0.5 it ends farther from (T) than the start model was. From the softmax on every rung has
(T) for its optimum, and in this easy world two samples are enough to reach it: more samples and a
renewed proposal change how fast, not where. The ladder on the tiny language model stands in
[brain.md](brain.md).
"""
TINY_START = """
## The tiny language model

`brain.py` on its embedded default after {steps} steps, {seeds}; medians (least to largest); raw
lines: `analyze/results/ablation_tiny.jsonl`. Here the target is not known, and the runs are still
on their way. The win rate is against the data set's completions; KL is from the start model.

{table}

With the proposal fixed the three part here too: BRAIn has a win rate of {brain} at {brain_kl}
nats, its ablations of {others} at {others_kl} nats. By (1) these cannot go much farther: the best
of 8 itself, to which α̂ tends for a small τ, is at most {bound:.2f} nats from the start model.
{renewed}
"""
LATER = "Runs with a renewed proposal have not been made yet."
RENEWED = """With a proposal that is renewed every {every} steps all three end within {win_rate} and
{kl} nats: next to nothing is lost, as in the product world."""


def value(line: dict, key: str = "kl_from_target", digits: int = 3) -> str:
    """Median (least to largest) over the seeds."""
    return median_and_range([round(part, digits) + 0.0 for part in line[key]], digits)  # no -0.0


class Product:
    """The lines of the product world by setting."""

    def __init__(self):
        self.trained = {Setting(**line["setting"]): line for line in lines_of("product")}
        self.stops = {Setting(**line["setting"]): line for line in lines_of("stop")}

    def middle(self, setting: Setting, key: str = "kl_from_target") -> float:
        """Median over the seeds."""
        return statistics.median(self.trained[setting][key])

    def by_estimator(self, *settings: Setting) -> list[str]:
        """Cells: KL from the target of each estimator, at each of the settings."""
        return [
            value(self.trained[setting._replace(estimator=estimator)])
            for setting in settings
            for estimator in ESTIMATORS
        ]

    def stops_at(self, setting: Setting) -> str:
        """Cell: what (1) says of the ablations."""
        return value(self.stops[setting._replace(estimator="no-baseline")])


def page() -> str:
    """docs/ablation.md."""
    world = Product()
    at_half, at_one = Setting(scale=0.5), Setting()
    left = world.trained[at_one._replace(estimator="no-baseline")]
    shares = [a / b for a, b in zip(left["kl_from_target"], left["kl_of_target"])]
    ablation = []
    for setting in (at_half, at_one, Setting("brain", 8, 100, 0.5), Setting("brain", 8, 100)):
        for estimator, name in ESTIMATORS.items():
            line = world.trained[setting._replace(estimator=estimator)]
            stops = not setting.refresh and estimator != "brain"
            row = ["renewed" if setting.refresh else "fixed", f"{setting.scale:g}", name]
            row += [value(line), world.stops_at(setting) if stops else ""]
            ablation.append([*row, value(line, "kl", 2), value(line, "win_rate", 2)])
    names = list(ESTIMATORS.values())
    budget = []
    for scale in SCALES:
        setting = Setting(scale=scale)
        row = [f"{scale:g}", value(world.trained[setting], "kl_of_target", 2)]
        longer = world.trained.get(setting._replace(steps=LONG))
        cells = [*world.by_estimator(setting), world.stops_at(setting)]
        budget.append([*row, *cells, value(longer) if longer else ""])
    counts = []
    for count in COUNTS:
        setting = Setting(samples=count)
        counts.append([count, *world.by_estimator(setting), world.stops_at(setting)])
    ladder = []
    for rung, setting in LADDER.items():
        lines = [world.trained[setting._replace(scale=scale)] for scale in (0.5, 1.0)]
        cells = [cell for line in lines for cell in (value(line), value(line, "reward", 2))]
        ladder.append([rung, *cells])
    of_target = [world.trained[s] for s in (at_half, at_one)]
    product = START.format(
        seeds=len(left["seeds"]),
        half=value(of_target[0], "kl_of_target", 2),
        whole=value(of_target[1], "kl_of_target", 2),
        ablation=table(
            [*"proposal scale estimate KL(target‖policy)".split(), "by (1)", "KL(policy‖start)"]
            + ["win rate"],
            ablation,
        ),
        share=f"{min(shares):.0%} to {max(shares):.0%}",
        soft=f"{world.middle(at_one._replace(estimator='no-baseline'), 'win_rate'):.2f}",
        steps=STEPS,
        per_step=PER_STEP,
        refreshed=table(
            ["steps between renewals", *names],
            [
                [refresh or "fixed", *world.by_estimator(Setting(refresh=refresh))]
                for refresh in REFRESHES
            ],
        ),
        long=LONG,
        budget=table(
            ["scale", "KL(target‖start)", *names, "by (1)", f"BRAIn, {LONG} steps"], budget
        ),
        counts=table(["N", *names, "by (1)"], counts),
        rewards=" and ".join(value(line, "reward_of_target", 2) for line in of_target),
        ladder=table(["rung", "scale 0.5: KL", "reward", "scale 1: KL", "reward"], ladder),
    )
    return product + tiny_part()


def tiny_part() -> str:
    """What the page says of the language model: nothing before there is a run."""
    lines, rows = sweep.read_results(TINY_RESULTS), []
    for label in TINY:
        ends = ends_of(lines, label)
        if ends:
            keys = ("win_rate", "judge_win_rate", "reward", "kl")
            cells = [median_and_range([end[key] for end in ends], 2) for key in keys]
            rows.append([label, len(ends), *cells])
    whole = len(lines) == len(RUNS)
    seeds = f"{len(TINY_SEEDS)} seeds" if whole else f"{len(lines)} of {len(RUNS)} runs"
    head = ["run", "seeds", "win rate by the reward model", "by gold", "reward", "KL, nats"]
    fixed, renewed = ([f"{name}, {how}" for name in ESTIMATORS.values()] for how in HOW)
    if not all(ends_of(lines, label) for label in fixed):
        return ""
    brain_ends, *others = (ends_of(lines, label) for label in fixed)
    others = [end for ends in others for end in ends]
    said, ends = LATER, [ends_of(lines, label) for label in renewed]
    if all(ends):
        ends = [end for some in ends for end in some]
        spans = {"win_rate": span(ends, "win_rate"), "kl": span(ends, "kl")}
        said = RENEWED.format(every=TINY_RENEWAL, **spans)
    return TINY_START.format(
        steps=TINY_STEPS,
        seeds=seeds,
        table=table(head, rows),
        brain=span(brain_ends, "win_rate"),
        brain_kl=span(brain_ends, "kl"),
        others=span(others, "win_rate"),
        others_kl=span(others, "kl"),
        bound=kl_bound(8),
        renewed=said,
    )


HOW = ("fixed", "renewed")


def ends_of(lines: list[dict], label: str) -> list[dict]:
    """The last evaluation of each run with this label."""
    return [line["curve"][-1] for line in lines if line["label"] == label]


def span(ends: list[dict], key: str) -> str:
    """Least to most, or the only one."""
    found = sorted({f"{end[key]:.2f}" for end in ends})
    return " to ".join(dict.fromkeys((found[0], found[-1])))


def draw(path: Path) -> None:
    """Curves, and where runs end against the KL of the target and against N."""
    world = Product()
    figure, (curves, budget, counts, tiny) = panels(2, 2, (11, 8))
    tiny.set(visible=bool(tiny_part()))
    for (estimator, name), colour in zip(ESTIMATORS.items(), COLOURS):
        for refresh, style in ((0, "-"), (100, ":")):
            line = world.trained[Setting(estimator, 8, refresh)]
            seeds = numpy.array(line["curve"]).clip(1e-4)
            middle = numpy.median(seeds, 0)
            label = f"{name}, {'renewed' if refresh else 'fixed'} proposal"
            curves.plot(line["steps"], middle, style, color=colour, lw=2, label=label)
            if not refresh:
                least, most = seeds.min(0), seeds.max(0)
                curves.fill_between(line["steps"], least, most, color=colour, alpha=0.15)
        mark = {"brain": "o-", "no-self-norm": "s-", "no-baseline": "^--"}[estimator]
        far = [Setting(estimator, scale=scale) for scale in SCALES]
        x = [world.middle(setting, "kl_of_target") for setting in far]
        budget.plot(x, [world.middle(setting) for setting in far], mark, color=colour, label=name)
        many = [Setting(estimator, samples=count) for count in COUNTS]
        counts.plot(COUNTS, [world.middle(s) for s in many], mark, color=colour, label=name)
    for axis, settings, x in (
        (budget, [Setting("no-baseline", scale=scale) for scale in SCALES], None),
        (counts, [Setting("no-baseline", samples=count) for count in COUNTS], COUNTS),
    ):
        x = x or [world.middle(setting, "kl_of_target") for setting in settings]
        y = [statistics.median(world.stops[setting]["kl_from_target"]) for setting in settings]
        axis.plot(x, y, "kx", ms=9, label="by (1), without training")
    if tiny_part():
        lines = sweep.read_results(TINY_RESULTS)
        for label in TINY:
            name, _, how = label.partition(", ")
            if how:
                colour = COLOURS[list(ESTIMATORS.values()).index(name)]
                for i, run in enumerate(line for line in lines if line["label"] == label):
                    x, y = ([point[key] for point in run["curve"]] for key in ("step", "kl"))
                    style = "-" if how == "fixed" else ":"
                    tiny.plot(x, y, style, color=colour, label="" if i else f"{label} proposal")
        tiny.axhline(kl_bound(8), color="black", lw=1, ls="--", label="best of 8, at most")
        tiny.set(xlabel="step", title="tiny language model", ylabel="KL(policy‖start model), nats")
        tiny.legend(fontsize=8)
    curves.set(yscale="log", ylim=(5e-4, 20), xlabel="step", title="scale 1, N = 8")
    budget.set(xlabel="KL(target‖start model), nats", title="fixed proposal, N = 8")
    counts.set(xlabel="samples per prompt, N", title="fixed proposal, scale 1")
    counts.set_xscale("log", base=2)
    curves.set_ylabel("KL(target‖policy), nats")
    for axis in (curves, budget, counts):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Measures what lacks, draws, writes the page."""
    measure_product()
    sweep.sweep(RUNS, TINY_RESULTS, sweep.gold_judge, args.jobs, args.before)
    draw(ROOT / "docs" / "ablation.png")
    (ROOT / "docs" / "ablation.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
