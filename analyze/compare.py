"""All methods and their variants: win rates at the defaults and at the same KL, and cost.

    python -m analyze.compare [--world tiny] [--seeds 1 2 3 4 5] [--jobs 2]
    python -m analyze.compare --world real --seeds 1 2   # needs `python -m prepare.real`

Makes the runs that are missing in analyze/results/compare_<world>.jsonl (`analyze.sweep`: Ctrl-C
and the same command go on), and the best of N samples of the SFT model, and prints the table.

The methods stop at different distances from the SFT model, and a method that goes further wins
more often, up to a point. So each run is also read where its curve first reaches a KL of K nats:

    f(K) = f_i + (K − k_i)/(k_{i+1} − k_i) · (f_{i+1} − f_i),   k_i ≤ K ≤ k_{i+1}              (1)

for the first two evaluations i, i + 1 that K lies between; f is a win rate, or what it took
so far. A run that never comes so far has no value at K.

Intervals hold 95 %: the mean over seeds and Student's t. They know nothing of other held-out
prompts, which are the same for all seeds. CPU seconds are those of a run's whole process, imports
and evaluations too: other work on the machine changes the wall-clock time and hardly these.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tyro

import brain
from analyze.intervals import over_seeds
from analyze.plot import best_of_curve
from analyze.sweep import Planned, gold_judge, read_results, real_judge, sweep
from analyze.tables import table
from benchmarks import where
from plumbing.run import ROOT, require

RESULTS = ROOT / "analyze" / "results"
WIN_RATES, COSTS = ("win_rate", "judge_win_rate"), ("cpu_seconds", "samples")
EVERY = "--eval-every 10 --eval-prompts 128"  # more points for (1), at the price of the defaults
OFTEN = "--eval-every 4 --eval-prompts 128"  # DPO begins with two nats in ten steps
TINY = {  # label: script, flags
    "BRAIn": ("brain", EVERY),
    "GDC++, Z per prompt": ("gdc", EVERY),
    "GDC": ("gdc", f"--baseline none --normalizer running {EVERY}"),
    "DPO, best and worst of 8": ("dpo", OFTEN),
    "WIND": ("wind", EVERY),
    "J-BOND": ("bond", EVERY),
    "PPO": ("ppo", EVERY),
    "RLOO": ("ppo", f"--advantage rloo {EVERY}"),
    "DPO, pairs of the data set": ("dpo", f"--pairs dataset {OFTEN}"),
    "SLiC": ("dpo", f"--loss slic {OFTEN}"),
    "BOND, fixed anchor, N 4": (
        "bond",
        f"--anchor fixed --best-of 4 --anchor-samples 8 {EVERY}",
    ),
    "DPG, proposal SFT": ("gdc", f"--baseline none --normalizer running --proposal sft {EVERY}"),
    "GDC++": ("gdc", f"--normalizer running {EVERY}"),
    "online DPO": ("dpo", f"--pairs policy {OFTEN}"),
    "BRAIn, τ 0.05": ("brain", f"--beta 0.05 {EVERY}"),
}
MODELS = (
    "--policy assets/real/policy --reward-model assets/real/reward --dataset assets/real/data "
    "--max-response-tokens 24"
)
SHORT = (
    f"{MODELS} --prompts-per-step 8 --samples-per-prompt 8 --steps 12 --warmup-steps 2 "
    "--lr 1e-4 --eval-every 3 --eval-prompts 128"
)
REAL = {
    "BRAIn": ("brain", f"{SHORT} --beta 0.1 --refresh-every 4"),
    "DPO, best and worst of 8": ("dpo", f"{SHORT} --beta 0.1"),
    "WIND": ("wind", SHORT),
    "J-BOND": ("bond", SHORT),
    "PPO": ("ppo", f"{SHORT} --beta 0.1"),
}


@dataclass(frozen=True)
class World:
    """Where methods are compared."""

    arms: dict[str, tuple[str, str]]  # script and flags, by label
    flags: dict  # of `brain.Args`, for the best of N
    judge: object  # of sweep.sweep
    judge_name: str  # of analyze.evaluate
    budgets: tuple[float, ...]  # K of (1), in nats
    best_of: int  # the most samples per prompt that a best one is chosen from
    first: int  # so many arms come before the others


WORLDS = {
    "tiny": World(TINY, {"eval_prompts": 128}, gold_judge, "tiny", (1.0, 1.5, 4.0), 32, 8),
    "real": World(
        REAL,
        {
            "policy": "assets/real/policy",
            "reward_model": "assets/real/reward",
            "dataset": "assets/real/data",
            "max_response_tokens": 24,
            "prompts_per_step": 8,
            "eval_prompts": 128,
        },
        real_judge,
        "prepare.real:judge",
        (0.5, 1.0, 2.0),
        16,
        5,
    ),
}


@dataclass
class Args:
    """Compares the methods."""

    world: str = "tiny"
    """tiny: the embedded models, judged by the gold score; real: those of `prepare.real`"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """a run of each method per seed"""
    jobs: int = 0
    """runs at a time; 0 = one per core"""
    before: str = ""
    """put before the command of each run, as "nice -n 10" """
    only: tuple[str, ...] = ()
    """labels of the methods to run; none = all"""


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


def path_of(world: str) -> Path:
    """The raw lines of a world."""
    return RESULTS / f"compare_{world}.jsonl"


def planned(world: World, seeds: tuple[int, ...], only: tuple[str, ...] = ()) -> list[Planned]:
    """All runs, in the order in which one wants them: three seeds before the rest, the first
    methods before the others, of those a seed of all, of these all seeds of one at a time."""
    unknown = [label for label in only if label not in world.arms]
    require(not unknown, f"--only {unknown}: the labels are {', '.join(world.arms)}")
    labels = [label for label in world.arms if not only or label in only]
    first, others = labels[: world.first], labels[world.first :]
    pairs = []
    for some in (seeds[:3], seeds[3:]):
        pairs += [(label, seed) for seed in some for label in first]
        pairs += [(label, seed) for label in others for seed in some]
    return [Planned(label, *world.arms[label], seed) for label, seed in pairs]


def best_of_lines(name: str, seeds: tuple[int, ...]) -> list[dict]:
    """The raw lines of the best of N, made where they are missing."""
    path, world = RESULTS / f"best_of_{name}.jsonl", WORLDS[name]
    known = {line["command"] for line in read_results(path)}
    for seed in seeds:
        command = f"python -m analyze.compare --world {name} --seeds {seed}"
        if command not in known:
            print(f"best of {world.best_of}, seed {seed}", flush=True)
            flags = SimpleNamespace(**vars(brain.Args(**world.flags, steps=1)))
            curve = best_of_curve(flags, world.best_of, seed, world.judge_name)
            names = {"n": "n", "kl_bound": "kl", "eval/win_rate": "win_rate"}
            names |= {"eval/reward": "reward", "judge_win_rate": "judge_win_rate"}
            curve = [{new: round(point[old], 5) for old, new in names.items()} for point in curve]
            line = {"label": "best of N", "seed": seed, "command": command}
            line |= {"device": "cpu", "curve": curve} | where.about()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    found = {line["command"]: line for line in read_results(path)}
    return list(found.values())


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def progress(line: dict) -> list[dict]:
    """The curve of a run, with the CPU seconds and samples that it took up to each evaluation, as
    if each step took as much."""
    last = line["curve"][-1]["step"]
    return [
        point | {key: line[key] * point["step"] / last for key in COSTS} for point in line["curve"]
    ]


def at(curve: list[dict], level: float, of: str = "kl") -> dict | None:
    """(1): all metrics where `of` first reaches a level on a curve; None where it never does."""
    for before, after in itertools.pairwise(curve):
        if before[of] <= level <= after[of]:
            gap = after[of] - before[of]
            share = (level - before[of]) / gap if gap else 0.0
            both = [key for key in before if key in after]
            return {key: before[key] + share * (after[key] - before[key]) for key in both}
    return None


def by_label(lines: list[dict], labels: list[str]) -> dict[str, list[dict]]:
    """The runs of each label that has some, by seed."""
    groups = {label: [line for line in lines if line["label"] == label] for label in labels}
    return {
        label: sorted(group, key=lambda line: line["seed"])
        for label, group in groups.items()
        if group
    }


def points(runs: list[dict], budget: float | None) -> list[dict]:
    """Of each run its end or, with a budget, where it reaches that KL, if it does."""
    curves = [progress(line) for line in runs]
    found = [curve[-1] if budget is None else at(curve, budget) for curve in curves]
    return [point for point in found if point]


def of_best(lines: list[dict], budget: float, key: str) -> list[float]:
    """A metric of the best of N where the bound of its KL is `budget`, for each seed."""
    found = [at(line["curve"], budget) for line in lines]
    return [point[key] for point in found if point]


def shown(values: list[float], digits: int = 2) -> str:
    """Mean ± half of the interval, of one value per seed; of two seeds the mean alone, as Student's
    interval of two says next to nothing."""
    if not values:
        return ""
    found = over_seeds(values)
    text = f"{found['value']:.{digits}f}"
    if len(values) > 2:
        text += f" ± {found['high'] - found['value']:.{digits}f}"
    return text


def defaults_table(lines: list[dict], labels: list[str]) -> str:
    """What each method gives at the end of its run, and the SFT model before."""
    groups, rows = by_label(lines, labels), []
    starts = {line["seed"]: line["curve"][0] for line in lines}
    if starts:
        cells = [shown([point[key] for point in starts.values()]) for key in WIN_RATES]
        rows.append(["SFT model", *cells, "0", "", "", len(starts)])
    for label, runs in groups.items():
        ends = points(runs, None)
        cells = [shown([point[key] for point in ends]) for key in (*WIN_RATES, "kl")]
        cells.append(shown([point["cpu_seconds"] for point in ends], 0))
        cells.append(f"{ends[0]['samples']:,.0f}")
        rows.append([label, *cells, len(runs)])
    head = ["", "win rate by the reward model", "by the judge", "KL, nats", "CPU seconds"]
    return table([*head, "samples", "seeds"], rows)


def matched_table(lines: list[dict], labels: list[str], best: list[dict], budgets) -> str:
    """Win rates where each method first reaches a KL, with the seconds and samples up to there."""
    rows = []
    for label, runs in by_label(lines, labels).items():
        cells = []
        for budget in budgets:
            there = points(runs, budget)
            reached = f" ({len(there)} of {len(runs)} seeds)" if 0 < len(there) < len(runs) else ""
            cells += [shown([point[key] for point in there]) + reached for key in WIN_RATES]
            cells.append(shown([point["cpu_seconds"] for point in there], 0))
        rows.append([label, *cells])
    if best:
        cells = []
        for budget in budgets:
            cells += [shown(of_best(best, budget, key)) for key in WIN_RATES] + [""]
        rows.append(["best of N, whose KL is at most this", *cells])
    head = [""]
    for budget in budgets:
        head += [f"{budget:g} nats: win rate by the reward model", "by the judge", "CPU seconds"]
    return table(head, rows)


def main(args: Args) -> None:
    """Makes what is missing, and prints both tables."""
    require(args.world in WORLDS, f"--world {args.world}: it is {' or '.join(WORLDS)}")
    world = WORLDS[args.world]
    lines = sweep(
        planned(world, args.seeds, args.only),
        path_of(args.world),
        world.judge,
        args.jobs,
        args.before,
    )
    best = best_of_lines(args.world, args.seeds)
    print(defaults_table(lines, list(world.arms)), "\n")
    print(matched_table(lines, list(world.arms), best, world.budgets))


if __name__ == "__main__":
    main(tyro.cli(Args))
