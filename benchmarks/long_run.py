"""2,000 small steps of each script: does memory grow, do files stay open, does it slow down?

    python -m benchmarks.long_run [--scripts brain gdc dpo wind bond] [--steps 2000]

Watches a forked run from outside (resident memory and open files, ten times a second) and reads its
own times a step. The step size is tiny, so that the work of a step does not change; it evaluates
and saves every 100 steps. Adds a line a script to benchmarks/results/long_run.jsonl: the slope of
the resident memory after the first tenth of the steps, the most open files in the first and in the
last quarter, and median seconds a step of the first and the last 100 steps.
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forked import SCRIPTS, Process, command_line, forget_caches, lines  # first

import tyro  # isort: skip

from benchmarks.where import ROOT, about  # isort: skip

FLAGS = {"--prompts-per-step": 1, "--samples-per-prompt": 2, "--max-response-tokens": 3,
         "--eval-prompts": 2, "--eval-every": 100, "--save-every": 100, "--lr": 1e-9}
PATIENCE = 1800  # seconds


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """which scripts"""
    steps: int = 2000
    """steps a script"""
    results: Path = ROOT / "benchmarks" / "results" / "long_run.jsonl"
    """file the lines are added to"""


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line through the points."""
    return statistics.linear_regression(x, y).slope


def watch(script: str, run: Path, steps: int) -> dict:
    """Runs a script, looks at it from outside, and reads its log."""
    flags, seen = FLAGS | {"--steps": steps, "--run-dir": run}, []
    process = Process(script, flags, None, PATIENCE)
    here = Path("/proc", str(process.pid))
    while process.running():
        done = lines(run / "metrics.jsonl") - 1
        if 0 < done < steps:  # the plot at the end takes memory of its own
            pages = int((here / "statm").read_text().split()[1])
            seen.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                         len(os.listdir(here / "fd"))))
        time.sleep(0.1)
    code, error = process.end()
    if code:
        raise SystemExit(f"{script}.py ended with {code}: {error}")
    log = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = [x["time/sample_s"] + x["time/score_s"] + x["time/update_s"] for x in log]
    later = [x for x in seen if x[0] > steps / 10]
    first, last = (statistics.median(seconds[part]) for part in (slice(0, 100), slice(-100, None)))
    return {"steps": len(log), "resident MiB": round(later[-1][1], 1),
            "MiB per 1000 steps": round(1000 * slope(*list(zip(*later))[:2]), 3),
            "open files, first quarter": max(x[2] for x in seen if x[0] <= steps / 4),
            "open files, last quarter": max(x[2] for x in seen if x[0] > 3 * steps / 4),
            "ms a step, first 100": round(1000 * first, 2),
            "ms a step, last 100": round(1000 * last, 2),
            "last / first": round(last / first, 3)}


def main(args: Args) -> None:
    """One script after the other."""
    command = command_line("benchmarks.long_run")
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            result = {"script": script} | watch(script, Path(folder, "run"), args.steps)
        result |= {"load": round(os.getloadavg()[0], 2), "command": command} | about()
        print(json.dumps(result), flush=True)
        with open(args.results, "a") as file:
            file.write(json.dumps(result) + "\n")
    forget_caches()


if __name__ == "__main__":
    main(tyro.cli(Args))
