"""Signals at random instants, and aimed at the two files that take long to write."""

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.forked import Process, lines  # first

import torch  # isort: skip

from benchmarks.faults.world import FLAGS, Outcome, World, read  # isort: skip

KILLS = [
    kill
    for kill, count in {  # in this order, so that a few kills are of many kinds
        "SIGKILL while the checkpoint is written": 7,
        "SIGKILL while final/ is written": 4,
        "SIGKILL": 9,
        "SIGTERM": 4,
        "SIGINT": 4,
        "SIGKILL of the resumed run as well": 4,
    }.items()
    for _ in range(count)
]


def kills(world: World, count: int) -> Iterator[Outcome]:
    """Signals at random instants, and aimed at the two files that take long to write."""
    order = [
        kill
        for turn in itertools.zip_longest(
            *([kind] * KILLS.count(kind) for kind in dict.fromkeys(KILLS))
        )
        for kill in turn
        if kill
    ]
    for kind in itertools.islice(itertools.cycle(order), count):
        for _ in range(50):  # the run may have ended before the signal, or the file been written
            folder = world.new()
            process = world.start(folder)
            if hit := strike(world, process, folder, kind):
                break
        problems, seen = world.torn(folder), {"exit code": process.code} | hit
        problems += ["never hit"] * (not hit)
        stopped = "stopped after step" in process.end()[1]
        if stopped and not problems:
            saved = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"]
            if saved != read(folder / "metrics.jsonl")[-1]["step"]:
                problems.append("stopped without a checkpoint of the last step")
        if "resumed" in kind:
            process = world.start(folder)
            seen["second"] = strike(world, process, folder, "SIGKILL")
            problems += world.torn(folder)
        yield Outcome(kind, problems + world.finish(folder), seen)


def strike(world: World, process: Process, folder: Path, kind: str) -> dict:
    """Sends the signal at its instant; what was hit, or nothing if it came too late."""
    if "written" in kind:
        aim = folder / ("checkpoint/state.new" if "checkpoint" in kind else "final.new")
        after = world.random.randrange(FLAGS["--steps"]) if "checkpoint" in kind else 0
        process.until(lambda: lines(folder / "metrics.jsonl") > after)
        process.until(aim.exists)
        time.sleep(world.random.uniform(0, 0.01))
    else:
        aim, at = None, world.random.uniform(0, world.seconds)
        process.until(lambda: time.perf_counter() - process.began > at)
    if process.running():
        process.send(getattr(signal, kind.split()[0]))
    seconds = time.perf_counter() - process.began
    code, _ = process.end()
    if aim is None and code == 0 or aim is not None and not aim.exists():
        return {}
    state = folder / "checkpoint" / "state.pt"
    return {
        "seconds": round(seconds, 3),
        "lines": lines(folder / "metrics.jsonl"),
        "checkpoint": state.exists() and torch.load(state, weights_only=True)["step"],
    }
