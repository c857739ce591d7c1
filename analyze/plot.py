"""Learning curves, the frontier of reward and KL, and the phases of a step, of any runs.

    python -m analyze.plot RUN [RUN ...] [--best-of 64] [--out FOLDER]

Runs of one script with the same flags but for --seed are one group: their mean is drawn, with a
band from the least to the largest; of the frontier each run is drawn, as their KL differs. A label
has the flags in which groups of one script differ.

--best-of M draws M samples per held-out prompt from the SFT model, and the curve of the best of
N = 1, 2, 4 … M of them: its reward and win rate are estimated, its KL is not. At most it is
log N − (N − 1)/N, which is where the curve is drawn: the true curve lies left of it, or on it.

Writes curves, frontier and phases, as .png and .svg, into --out.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy
import tyro

import common
from analyze import evaluate
from analyze.intervals import best_of_mean, kl_bound
from analyze.judges import score_judge
from plumbing.report import COLOURS, curve, panels, read_lines
from plumbing.run import explained, require

CURVES = {
    "eval/win_rate": "win rate against the completions",
    "eval/reward": "reward",
    "eval/kl": "KL from the SFT model, nats",
    "eval/length": "tokens per response",
}
PHASES = {"time/sample_s": "sample", "time/score_s": "score", "time/update_s": "update"}
OF_A_RUN = ("seed", "run_dir", "resume", "track")  # flags that do not make another group
MOST = len(COLOURS) - 1  # groups; black is the best of N's


@dataclass
class Args:
    """Learning curves, frontier and phases of runs."""

    runs: tyro.conf.Positional[list[str]]
    """run folders, finished or not"""
    best_of: int = 0
    """samples per prompt from the SFT model, for the curve of the best of N; 0 = no curve"""
    out: str = ""
    """folder to write; empty = plots/ in the first run folder"""


def read_groups(folders: list[str]) -> dict[str, list[list[dict]]]:
    """The lines of metrics.jsonl of each run of a group, by the group's label."""
    require(folders, "name a run folder")
    members: dict[tuple, list[list[dict]]] = {}
    for folder in folders:
        script, flags = evaluate.read_about(folder)
        own = {key: value for key, value in vars(flags).items() if key not in OF_A_RUN}
        path = Path(folder, "metrics.jsonl")
        with explained(f"{folder}: it has no whole metrics.jsonl"):
            lines = read_lines(path)
        members.setdefault((script, tuple(own.items())), []).append(lines)
    require(len(members) <= MOST, f"{len(members)} groups of runs; at most {MOST} have a colour")
    return {label_of(key, list(members)): runs for key, runs in members.items()}


def label_of(group: tuple, groups: list[tuple]) -> str:
    """The script, and its flags that are not the same in all groups of this script."""
    script, flags = group
    others = [dict(other) for name, other in groups if name == script]
    words = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in flags
        if any(other.get(name) != value for other in others)
    ]
    return " ".join([script, *words])


def over_seeds(runs: list[list[dict]], key: str) -> tuple[list[dict], list, list]:
    """(lines with the mean, least, largest) of a metric, at the steps that all runs have."""
    values = [{line["step"]: line[key] for line in lines if key in line} for lines in runs]
    steps = [step for step in values[0] if all(step in other for other in values)]
    columns = [[other[step] for other in values] for step in steps]
    means = [{"step": s, key: statistics.mean(column)} for s, column in zip(steps, columns)]
    return means, [min(column) for column in columns], [max(column) for column in columns]


def named(label: str, runs: list) -> str:
    """A group's entry in a legend."""
    return label if len(runs) == 1 else f"{label} ({len(runs)} seeds)"


def draw_curves(groups: dict[str, list[list[dict]]]):
    """Four metrics of the evaluations against the step."""
    figure, axes = panels(2, 2, (9, 6.5))
    for axis, (key, title) in zip(axes, CURVES.items()):
        for (label, runs), colour in zip(groups.items(), COLOURS):
            means, least, largest = over_seeds(runs, key)
            curve(axis, means, key, label=named(label, runs), color=colour)
            if len(runs) > 1:
                steps = [line["step"] for line in means]
                axis.fill_between(steps, least, largest, color=colour, alpha=0.2, lw=0)
        axis.set(title=title, xlabel="step")
    axes[0].legend(fontsize=9)
    return figure


def draw_frontier(groups: dict[str, list[list[dict]]], best: list[dict]):
    """Reward and win rate against the KL: a point per evaluation, a line per run."""
    figure, axes = panels(1, 2, (9, 4.2))
    for axis, key in zip(axes, ("eval/reward", "eval/win_rate")):
        for (label, runs), colour in zip(groups.items(), COLOURS):
            for place, lines in enumerate(runs):
                points = [(x["eval/kl"], x[key]) for x in lines if key in x]
                text = named(label, runs) if place == 0 else None
                axis.plot(
                    *numpy.array(points).reshape(-1, 2).T, "o-", ms=4, color=colour, label=text
                )
        if best:
            x, y = [point["kl_bound"] for point in best], [point[key] for point in best]
            axis.plot(x, y, "k<--", ms=5, label="best of N: KL at most")
            for point in best[1:]:
                at = (point["kl_bound"], point[key])
                style = {"xytext": (5, -11), "textcoords": "offset points", "fontsize": 8}
                axis.annotate(str(point["n"]), at, **style)
        axis.set(xlabel="KL from the SFT model, nats per response", title=CURVES[key])
    axes[0].legend(fontsize=9)
    return figure


def draw_phases(groups: dict[str, list[list[dict]]]):
    """Median seconds of the phases of a step, over the steps of all seeds."""
    figure, (axis,) = panels(1, 1, (9, 1.4 + 0.4 * len(groups)))
    left = [0.0] * len(groups)
    names = [named(label, runs) for label, runs in groups.items()]
    for (key, phase), colour in zip(PHASES.items(), COLOURS):
        width = [
            statistics.median(line[key] for lines in runs for line in lines if key in line)
            for runs in groups.values()
        ]
        axis.barh(names, width, left=left, color=colour, label=phase)
        left = [start + more for start, more in zip(left, width)]
    axis.set_axisbelow(True)
    axis.invert_yaxis()
    axis.set(xlabel="seconds per step, median")
    axis.legend(fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def best_of_curve(flags, count: int, seed: int = 1, judge: str = "") -> list[dict]:
    """Reward and win rate of the best of 1, 2, 4 … `count` samples of the SFT model, by the reward
    model of `flags`; and its win rate by another judge, named as in `analyze.evaluate`."""
    device, tokenizer, start, references = evaluate.read_start(0, flags)
    batch = evaluate.sample(start, flags, references.prompts, count, flags.temperature, seed)
    size = flags.micro_batch or flags.prompts_per_step
    judges = {"eval/win_rate": score_judge("reward", flags, device, tokenizer, start)}
    if judge:
        judges["judge_win_rate"] = score_judge(judge, flags, device, tokenizer, start)
    scores, wins = {}, {}
    for key, each in judges.items():
        theirs = common.score(each.reward_model, references).cpu().double().numpy()
        scores[key] = common.score(each.reward_model, batch, size).cpu().double().numpy()
        wins[key] = (scores[key] > theirs) + 0.5 * (scores[key] == theirs)
    ours, points = scores["eval/win_rate"], []
    for n in (2**power for power in range(count.bit_length())):
        point = {"n": n, "kl_bound": kl_bound(n), "eval/reward": best_of_mean(ours, ours, n)}
        points.append(point | {key: best_of_mean(ours, won, n) for key, won in wins.items()})
    return points


def main(args: Args) -> Path:
    """Draws the pictures; returns their folder."""
    groups = read_groups(args.runs)
    require(args.best_of >= 0, f"--best-of {args.best_of}: must be at least 0")
    best = []
    if args.best_of:
        best = best_of_curve(evaluate.shared_flags(args.runs), args.best_of)
    out = Path(args.out or Path(args.runs[0], "plots"))
    pictures = {"curves": draw_curves(groups), "frontier": draw_frontier(groups, best)}
    pictures["phases"] = draw_phases(groups)
    with explained(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(out / f"{name}.png", dpi=110)
            figure.savefig(out / f"{name}.svg")
    print(f"{out}: {', '.join(pictures)}, as .png and .svg")
    return out


if __name__ == "__main__":
    main(tyro.cli(Args))
