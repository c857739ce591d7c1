"""2,000 small steps of each script: does memory grow, do files stay open, does it slow down?

    python -m benchmarks.long_run [--scripts brain gdc dpo wind bond ppo] [--steps 2000]

Watches a forked run from outside (resident memory and open files, ten times a second) and reads its
own times per step. The step size is tiny, so that the work of a step does not change; it evaluates
and saves every 100 steps. The speed of a shared machine changes within a minute; so the last 100
steps are compared with the first 100 of a second, fresh run, which starts shortly before the end of
the first and shares its moment. Adds one line per script to benchmarks/results/long_run.jsonl: the
slope of the resident memory after the first tenth of the steps, the median of the open files in the
first and in the last quarter, and median seconds per step of those first and last 100 steps.
"""

import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forked import SCRIPTS, Process, command_line, forget_caches, lines  # first

import tyro  # isort: skip

from benchmarks.where import ROOT, about  # isort: skip

FLAGS = {
    "--prompts-per-step": 1,
    "--samples-per-prompt": 2,
    "--max-response-tokens": 3,
    "--eval-prompts": 2,
    "--eval-every": 100,
    "--save-every": 100,
    "--lr": 1e-9,
}
PATIENCE = 1800  # seconds


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """which scripts"""
    steps: int = 2000
    """steps per script"""
    results: Path = ROOT / "benchmarks" / "results" / "long_run.jsonl"
    """file the lines are added to"""


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line through the points."""
    return statistics.linear_regression(x, y).slope


def seconds(run: Path) -> list[float]:
    """Seconds of a run's steps, by its own log."""
    log = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()][1:]
    return [x["time/sample_s"] + x["time/score_s"] + x["time/update_s"] for x in log]


def watch(script: str, folder: Path, steps: int) -> dict:
    """Runs a script, looks at it from outside, starts it a second time, and reads their logs."""
    flags, seen, fresh = FLAGS | {"--steps": steps}, [], None
    run, second = folder / "run", folder / "second"
    process = Process(script, flags | {"--run-dir": run}, None, PATIENCE)
    here = Path("/proc", str(process.pid))
    while process.running():
        done = lines(run / "metrics.jsonl") - 1
        if 0 < done < steps:  # the plot at the end takes memory of its own
            pages = int((here / "statm").read_text().split()[1])
            seen.append(
                (done, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(here / "fd")))
            )
        if done > steps - 150 and not fresh:  # it takes some 40 steps to set up
            fresh = Process(script, flags | {"--run-dir": second}, None, PATIENCE)
        time.sleep(0.1)
    code, error = process.end()
    if code:
        raise SystemExit(f"{script}.py ended with {code}: {error}")
    if fresh.until(lambda: lines(second / "metrics.jsonl") > 101):
        fresh.send(signal.SIGKILL)
    fresh.end()
    log, later = seconds(run), [x for x in seen if x[0] > steps / 10]
    first, last = statistics.median(seconds(second)[:100]), statistics.median(log[-100:])
    early, late = (
        [x[2] for x in seen if part(x[0])]
        for part in (lambda done: done <= steps / 4, lambda done: done > 3 * steps / 4)
    )
    return {
        "steps": len(log),
        "resident MiB": round(later[-1][1], 1),
        "MiB per 1000 steps": round(1000 * slope(*list(zip(*later))[:2]), 3),
        "open files, first quarter": statistics.median(early),
        "open files, last quarter": statistics.median(late),
        "ms a step, first 100": round(1000 * first, 2),
        "ms a step, last 100": round(1000 * last, 2),
        "last / first": round(last / first, 3),
    }


def main(args: Args) -> None:
    """One script after the other."""
    command = command_line("benchmarks.long_run")
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            result = {"script": script} | watch(script, Path(folder), args.steps)
        result |= {"load": round(os.getloadavg()[0], 2), "command": command} | about()
        print(json.dumps(result), flush=True)
        with open(args.results, "a") as file:
            file.write(json.dumps(result) + "\n")
    forget_caches()


if __name__ == "__main__":
    main(tyro.cli(Args))
