"""Times the default run of a script as a user starts it: a fresh process, imports and all.

    python -m benchmarks.default_run [--script brain] [--seeds 1 2 3 4 5]

Adds a line per run to benchmarks/results/default_run.jsonl: wall-clock seconds of the whole
process, the first and the last evaluation, the gold win rates, and where it ran.
"""

import os
import statistics
import time
from dataclasses import dataclass

import tyro

from benchmarks import fresh
from benchmarks.where import add
from plumbing.report import read_lines
from prepare import gold


@dataclass
class Args:
    script: str = "brain"
    """script to run, without .py"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """one run each"""


def main(args: Args) -> None:
    """Runs the script once per seed, one after the other."""
    times = []
    for seed in args.seeds:
        command = [f"{args.script}.py", "--seed", str(seed)]
        load, begin = os.getloadavg()[0], time.perf_counter()
        with fresh.run(command) as run:
            seconds = time.perf_counter() - begin
            lines = read_lines(run / "metrics.jsonl")
            judged = gold.main(gold.Args(str(run)))
        ends = {
            f"{when} {key}": lines[at][f"eval/{key}"]
            for at, when in ((0, "first"), (-1, "last"))
            for key in ("win_rate", "reward", "kl")
        }
        ends |= {"first gold_win_rate": judged[0][1], "last gold_win_rate": judged[-1][1]}
        line = {"command": " ".join(["python", *command]), "seconds": round(seconds, 1)}
        line |= {key: round(value, 4) for key, value in ends.items()}
        add("default_run", line | {"load_before": round(load, 2)})
        times.append(seconds)
    print(f"median {statistics.median(times):.1f} s, {min(times):.1f} to {max(times):.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
