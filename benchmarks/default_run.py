"""Times the default run of a script as a user starts it: a fresh process, imports and all.

    python -m benchmarks.default_run [--script brain] [--seeds 1 2 3 4 5]

Adds a line per run to benchmarks/results/default_run.jsonl: wall-clock seconds of the whole
process, the first and the last evaluation, the gold win rates, and where it ran.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.where import ROOT, add
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
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            command = [f"{args.script}.py", "--seed", str(seed)]
            load, begin = os.getloadavg()[0], time.perf_counter()
            subprocess.run(
                [sys.executable, *command, "--run-dir", run],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            seconds = time.perf_counter() - begin
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
