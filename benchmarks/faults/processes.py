"""Two processes on one folder, signals that repeat, a clock that goes backwards."""

import itertools
import signal
import time
from collections.abc import Iterator

from benchmarks.forked import lines  # first

import torch  # isort: skip

from benchmarks.faults.world import Outcome, World, before, read, refused  # isort: skip

PAUSE = 20  # seconds of a step that does not end


def processes(world: World) -> Iterator[Outcome]:
    """Two processes on one folder; Ctrl-C once and twice."""
    folder = world.new()
    pair = [world.start(folder) for _ in range(2)]
    ends = sorted(process.end() for process in pair)
    problems = [f"the first ended with {ends[0]}"] * (ends[0][0] != 0)
    problems += refused(*ends[1], str(folder))
    yield Outcome(
        "two processes start one run folder", problems + world.finish(folder), {"line": ends[1][1]}
    )
    folder = world.new()
    process = world.start(folder)
    process.until(lambda: lines(folder / "metrics.jsonl") > 3)
    second = world.start(folder)
    problems = refused(*second.end(), str(folder), "another process")
    code, error = process.end()
    problems += [f"the first ended with {code}: {error}"] * (code != 0)
    yield Outcome(
        "--resume of a run that still runs",
        problems + world.finish(folder),
        {"line": second.end()[1]},
    )
    folder = world.new()
    process = world.start(folder)
    process.until(lambda: lines(folder / "metrics.jsonl") > 3)
    process.send(signal.SIGKILL)
    process.end()
    pair = [world.start(folder) for _ in range(2)]
    ends = sorted(process.end() for process in pair)
    problems = [f"the first ended with {ends[0]}"] * (ends[0][0] != 0)
    problems += refused(*ends[1], str(folder), "another process")
    yield Outcome(
        "two processes resume one killed run", problems + world.finish(folder), {"line": ends[1][1]}
    )
    for name in ("SIGINT", "SIGTERM"):
        yield stopped(world, name)
        yield stopped_at_once(world, name)


def stopped(world: World, name: str) -> Outcome:
    """One signal: the step is finished and saved, the command that continues is said."""
    folder = world.new()
    process = world.start(folder)
    process.until(lambda: lines(folder / "metrics.jsonl") > 4)
    process.send(getattr(signal, name))
    code, error = process.end()
    problems = [f"exit code {code}: {error}"] * (code != 1)
    if error.count("\n") != 1 or f"--resume {folder}" not in error:
        problems.append(f"not one line that says how to go on: {error!r}")
    saved = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"]
    last = read(folder / "metrics.jsonl")[-1]["step"]
    problems += [f"checkpoint of step {saved}, last line {last}"] * (saved != last)
    return Outcome(f"{name} once", problems + world.finish(folder), {"line": error})


def stopped_at_once(world: World, name: str) -> Outcome:
    """Two signals within a step that does not end: the process ends, in less than a second."""
    folder, number = world.new(), getattr(signal, name)

    def endless_step():
        before("save", 2, lambda: time.sleep(PAUSE))

    process = world.start(folder, endless_step)
    process.until(lambda: lines(folder / "metrics.jsonl") > 4)
    time.sleep(0.3)
    process.send(number)
    time.sleep(0.3)
    problems = ["one signal ended it within a step"] * (not process.running())
    began = time.perf_counter()
    if process.running():
        process.send(number)
    code, error = process.end()
    seconds = time.perf_counter() - began
    problems += [f"took {seconds:.1f} s"] * (seconds > 1)
    problems += [f"not quiet: {error!r}"] * bool(error)
    return Outcome(
        f"{name} twice",
        problems + world.torn(folder) + world.finish(folder),
        {"exit code": code, "seconds": round(seconds, 3)},
    )


def clock(world: World) -> Iterator[Outcome]:
    """A wall clock that goes back an hour per call, during a run and its continuation."""

    def backwards():
        hours, real = itertools.count(), time.time
        time.time = lambda: real() - 3600 * next(hours)

    folder = world.new()
    process = world.start(folder, backwards)
    process.until(lambda: lines(folder / "metrics.jsonl") > 5)
    process.send(signal.SIGTERM)
    code, error = process.end()
    problems = [f"exit code {code}: {error}"] * (code != 1)
    code, error = world.start(folder, backwards).end()
    problems += [f"resume ended with {code}: {error}"] * (code != 0)
    yield Outcome("clock going backwards", problems + world.finish(folder), {})
