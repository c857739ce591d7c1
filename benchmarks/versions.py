"""Two versions of this project against each other: default runs, in turns.

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before [--scripts brain dpo] [--turns 5] [--steps 20]

Adds a line per script to benchmarks/results/versions.jsonl. `step` is how many times as fast the
median step of this version is as that of the version before (sampling, scores and updates), and
`process` the same of the whole process; both are medians over the turns. Runs follow each other at
once, so that a shared machine is as busy for one as for the other.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from analyze.differences import NAMES
from benchmarks import fresh
from benchmarks.where import ROOT, add
from plumbing.report import read_lines

PHASES = ("time/sample_s", "time/score_s", "time/update_s")


@dataclass
class Args:
    before: tyro.conf.Positional[str]
    """folder of the other version"""
    scripts: tuple[str, ...] = tuple(NAMES)
    """without .py"""
    turns: int = 5
    """runs of each version"""
    steps: int = 20
    """of each run; the first two are not timed"""


def run(root: Path, script: str, steps: int) -> tuple[float, float]:
    """Seconds of a median step, and of the whole process."""
    command = [f"{script}.py", "--steps", str(steps), "--eval-prompts", "32"]
    begin = time.perf_counter()
    with fresh.run(command, root) as folder:
        whole = time.perf_counter() - begin
        lines = read_lines(folder / "metrics.jsonl")
    steps = [sum(line[phase] for phase in PHASES) for line in lines[3:]]
    return statistics.median(steps), whole


def main(args: Args) -> None:
    """One script after the other."""
    before = Path(args.before).resolve()
    for script in args.scripts:
        ratios = []
        for turn in range(args.turns):
            seconds = {}
            for root in ((ROOT, before), (before, ROOT))[turn % 2]:
                seconds[root] = run(root, script, args.steps)
            old, new = seconds[before], seconds[ROOT]
            ratios.append([one / other for one, other in zip(old, new, strict=True)])
        step, process = zip(*ratios, strict=True)
        line = {"script": script, "turns": args.turns}
        for name, values in (("step", step), ("process", process)):
            line[name] = round(statistics.median(values), 3)
            line[f"{name}, each"] = [round(value, 3) for value in values]
        add("versions", line)


if __name__ == "__main__":
    main(tyro.cli(Args))
