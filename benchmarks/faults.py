"""Kills, full disks, damaged files and bad numbers: what each script makes of them.

    python -m benchmarks.faults [--scripts brain gdc dpo wind bond] [--kills 32]
                                [--faults kills disk files processes clock numbers data]

Every fault hits the real main() of a script, on small flags, in a forked process. A run that was
hit is continued with --resume and must end as the unbroken run did: the same metrics.jsonl without
gap or repetition, the same samples.jsonl, the same bits in final/ and checkpoint/. Adds a line a
fault to benchmarks/results/faults.jsonl; `survived` is false where anything differs, `problems`
says what. Exit code 1 if anything was lost.
"""

import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.forked import SCRIPTS, Process, command_line, forget_caches, lines, run  # first

import torch  # isort: skip
import tyro  # isort: skip

import common  # isort: skip
import runlog  # isort: skip
from benchmarks import hostile  # isort: skip
from benchmarks.where import ROOT, about  # isort: skip

FLAGS = {
    "--prompts-per-step": 2,
    "--samples-per-prompt": 4,
    "--max-response-tokens": 6,
    "--eval-prompts": 4,
    "--steps": 10,
    "--save-every": 2,
    "--eval-every": 3,
}
OWN = {"brain": {"--refresh-every": 3}, "gdc": {"--test-every": 3}, "wind": {"--refresh-every": 3}}
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


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """which scripts"""
    kills: int = 32
    """kills a script"""
    faults: tuple[str, ...] = ("kills", "disk", "files", "processes", "clock", "numbers", "data")
    """which faults"""
    flips: int = 20
    """checkpoints with one flipped bit, a script"""
    inputs: int = 5000
    """hostile data files"""
    seed: int = 1
    """of the instants and of the bits"""
    results: Path = ROOT / "benchmarks" / "results" / "faults.jsonl"
    """file the lines are added to"""


@dataclass
class Outcome:
    """What came of one fault."""

    fault: str
    problems: list[str]
    seen: dict


class World:
    """A script, a folder for its runs, and its unbroken run to compare with."""

    def __init__(self, script: str, folder: Path, seed: int, **more):
        self.script, self.folder, self.random = script, folder, random.Random(f"{script} {seed}")
        self.flags = FLAGS | OWN.get(script, {}) | flags(more)
        folder.mkdir()
        self.whole, self.count = folder / "whole", itertools.count()
        run(script, self.flags | {"--run-dir": folder / "warm"})  # fills caches, so that the next
        began = time.perf_counter()  # one's time is the usual one
        code, error = run(script, self.flags | {"--run-dir": self.whole})
        if code:
            raise SystemExit(f"{script}.py does not run: {error}")
        self.seconds = time.perf_counter() - began

    def new(self) -> Path:
        """The folder of a run to come."""
        return self.folder / f"run-{next(self.count)}"

    def start(self, folder: Path, prepare: Callable | None = None, **more) -> Process:
        """A new run, or, where there is one in the folder, its continuation."""
        if folder.exists():
            return Process(self.script, {"--resume": folder}, prepare)
        return Process(self.script, self.flags | {"--run-dir": folder} | flags(more), prepare)

    def finish(self, folder: Path) -> list[str]:
        """Resumes what is in `folder`; how its end differs from that of the unbroken run."""
        code, error = self.start(folder).end()
        if code:
            return [f"resume ended with {code}: {error.strip()[-300:]}"]
        found = []
        steps = [line["step"] for line in read(folder / "metrics.jsonl")]
        if steps != list(range(self.flags["--steps"] + 1)):
            found.append(f"metrics.jsonl has the steps {steps}")
        if comparable(folder) != comparable(self.whole):
            found.append("metrics.jsonl differs")
        for name in ("samples.jsonl", "final/model.safetensors", "final/tokenizer.json"):
            if (folder / name).read_bytes() != (self.whole / name).read_bytes():
                found.append(f"{name} differs")
        ours, theirs = (
            torch.load(x / "checkpoint" / "state.pt", weights_only=True)
            for x in (folder, self.whole)
        )
        if not same(ours, theirs):
            found.append("checkpoint/ differs")
        names = [
            {str(p.relative_to(x)) for p in x.rglob("*") if "tensorboard" not in p.parts}
            for x in (folder, self.whole)
        ]
        if names[0] != names[1]:
            found.append(f"the folder holds {sorted(names[0] ^ names[1])} more or less")
        return found

    def torn(self, folder: Path) -> list[str]:
        """What a fault left half-written under its true name."""
        found, state = [], folder / "checkpoint" / "state.pt"
        if state.exists() and zipfile.ZipFile(state).testzip():
            found.append("checkpoint/state.pt is half-written")
        theirs = self.whole / "final"
        if (folder / "final").exists() and any(
            not (x := folder / "final" / path.name).exists() or x.read_bytes() != path.read_bytes()
            for path in theirs.iterdir()
        ):
            found.append("final/ is half-written")
        return found


def flags(named: dict) -> dict[str, object]:
    """Flags by their names on the command line."""
    return {f"--{name.replace('_', '-')}": value for name, value in named.items()}


def read(path: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def comparable(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the memory of the process decides."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "memory/", "tokens_per_s"))
        }
        for line in read(folder / "metrics.jsonl")
    ]


def same(first: object, second: object) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def refused(code: int, error: str, *needed: str) -> list[str]:
    """What is wrong with the end of a run that must say one line with these words, code 2."""
    found = [f"exit code {code}: {error[-300:]}"] if code != 2 else []
    if error.count("\n") != 1 or not error.startswith("error: "):
        found.append(f"not one line: {error[-600:]!r}")
    return found + [f"{word!r} is not in {error!r}" for word in needed if word not in error]


# ── kills ──
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


# ── a disk that is full, a folder that cannot be written ──
def disk(world: World, small: Path) -> Iterator[Outcome]:
    """A small tmpfs, filled at the moment of a write; a folder without the right to write."""
    seldom = World(world.script, world.folder / "seldom", 1, save_every=10)
    folder, filler = small / world.script, small / "filler"
    for where, base, call, left in (
        ("the checkpoint", world, ("save", 2), 200_000),
        ("final/", world, ("close", 1), 200_000),
        ("the first line of the log", world, ("log", 1), 0),
        ("the log", seldom, ("log", 2), 0),
        ("a new run folder", world, None, 0),
    ):
        if call is None:
            fill(filler, 0)
        code, error = base.start(folder, call and filling(filler, *call, left)).end()
        problems = refused(code, error, str(folder), "No space left") + base.torn(folder)
        if call is None:
            problems += ["half a run folder is left"] * folder.exists()
        filler.unlink()
        yield Outcome(f"disk full at {where}", problems + base.finish(folder), {"line": error})
        shutil.rmtree(folder)
    for where, call in (
        ("the checkpoint", ("save", 2)),
        ("the log", ("log", 5)),
        ("final/", ("close", 1)),
    ):
        folder = world.new()
        code, error = world.start(
            folder, lambda c=call, f=folder: before(*c, lambda: deny(f))
        ).end()
        problems = refused(code, error, str(folder), "Permission denied") + world.torn(folder)
        if folder.exists():
            lock(folder, 0o755, 0o644)
        yield Outcome(
            f"folder read-only at {where}", problems + world.finish(folder), {"line": error}
        )


def before(method: str, call: int, what: Callable) -> None:
    """`what` happens before the call-th call of a Run's method."""
    original, calls = getattr(runlog.Run, method), itertools.count(1)

    def replacement(*inputs):
        if next(calls) == call:
            what()
        return original(*inputs)

    setattr(runlog.Run, method, replacement)


def deny(folder: Path) -> None:
    """Takes this process's right to write in a folder, be it root's."""
    if not os.getuid():
        heed_file_modes()
    lock(folder, 0o555, 0o444)


def heed_file_modes() -> None:
    """Root may write what it likes; this process gives that up (capabilities(7)) and stays root."""
    libc, version_3 = ctypes.CDLL(None, use_errno=True), 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 capabilities
    override = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capget(header, sets) == 0:
        sets[0] &= ~override
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "cannot give up root's right to write everywhere")


def filling(path: Path, method: str, call: int, left: int) -> Callable:
    """`prepare` that fills the disk before the call-th call of a Run's method."""
    return lambda: before(method, call, lambda: fill(path, left))


def fill(path: Path, left: int) -> None:
    """Writes a file until the disk is full but for `left` bytes."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def lock(folder: Path, folders: int, files: int) -> None:
    """Sets the rights of a folder and all in it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(folders if path.is_dir() else files)


# ── files that are damaged, foreign, old ──
def files(world: World, flips: int) -> Iterator[Outcome]:
    """Checkpoints that are not what was saved; the intact one continues."""
    folder = world.new()
    process = world.start(folder)
    process.until(lambda: lines(folder / "metrics.jsonl") > 6)
    process.send(signal.SIGKILL)
    process.end()
    state, log = folder / "checkpoint" / "state.pt", folder / "metrics.jsonl"
    good, text = state.read_bytes(), log.read_bytes()
    saved = torch.load(state, weights_only=True)
    size = len(good)
    damages: list[tuple[str, Callable, str]] = [
        *(
            (
                f"checkpoint cut at {at} of {size} bytes",
                lambda at=at: state.write_bytes(good[:at]),
                "damaged",
            )
            for at in (0, 100, size // 2, size - 1)
        ),
        *(
            ("checkpoint with one bit flipped", lambda: flip(state, good, world.random), "damaged")
            for _ in range(flips)
        ),
        ("checkpoint that is another file", lambda: state.write_bytes(text), "damaged"),
        ("checkpoint of another program", lambda: torch.save({"model": {}}, state), "format"),
        (
            "checkpoint of another script",
            lambda: torch.save(saved | {"run": saved["run"] | {"script": "other.py"}}, state),
            "another script",
        ),
        (
            "checkpoint of an older version",
            lambda: torch.save(
                {key: value for key, value in saved.items() if key != "format"}, state
            ),
            "format",
        ),
    ]
    for name, damage, word in damages:
        damage()
        code, error = world.start(folder).end()
        problems = refused(code, error, str(folder), word)
        problems += ["metrics.jsonl was changed"] * (log.read_bytes() != text)
        yield Outcome(name, problems, {"line": error})
    state.write_bytes(good)
    yield Outcome("the intact checkpoint again", world.finish(folder), {})
    yield Outcome("final/ exists: resume of a finished run", world.finish(folder), {})


def flip(path: Path, good: bytes, draws: random.Random) -> None:
    """Writes `good` with one bit of a member flipped."""
    damaged, at = bytearray(good), draws.choice(data_bytes(path, good, draws))
    damaged[at] ^= 1 << draws.randrange(8)
    path.write_bytes(damaged)


def data_bytes(path: Path, good: bytes, draws: random.Random) -> range:
    """Where in a checkpoint the bytes of one of its members lie: the rest is padding and names."""
    path.write_bytes(good)
    with zipfile.ZipFile(path) as archive:
        member = draws.choice(archive.infolist())
    name, extra = (
        int.from_bytes(good[member.header_offset + at :][:2], "little") for at in (26, 28)
    )
    start = member.header_offset + 30 + name + extra
    return range(start, start + member.file_size)


# ── two processes, signals that repeat, clocks ──
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


PAUSE = 20


def clock(world: World) -> Iterator[Outcome]:
    """A wall clock that goes back an hour a call, during a run and its continuation."""

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


# ── numbers ──
def numbers(world: World) -> Iterator[Outcome]:
    """Bad numbers in step 5: stop and say which prompt, or carry on with finite metrics."""
    for name, (prepare, needed, more) in NUMBERS.items():
        folder = world.new()
        if "beta" in more and world.script == "bond":
            continue  # it has none
        process = world.start(folder, prepare, **more)
        code, error = process.end()
        process.said.seek(0)
        warned = process.said.read().count("warning: weights/ess")
        steps = read(folder / "metrics.jsonl")
        problems, seen = [], {"exit code": code, "line": error}
        for line in steps:
            bad = [key for key, value in line.items() if value != value or abs(value) == INFINITY]
            problems += [f"step {line['step']}: {bad} not finite"] * bool(bad)
        if warned > 1:
            problems.append(f"{warned} warnings")
        if needed is None:  # carries on
            problems += [f"exit code {code}: {error}"] * (code != 0 or error != "")
            problems += ["steps are missing"] * (len(steps) != FLAGS["--steps"] + 1)
        else:
            problems += refused(code, error, *needed)
            state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
            problems += [f"checkpoint of step {state['step']}, not 4"] * (state["step"] != 4)
            problems += world.finish(folder)  # without the fault
        if "weights/ess" in steps[-1]:
            seen["weights/ess"] = round(steps[min(5, len(steps) - 1)]["weights/ess"], 3)
            low = [x for x in steps[1:] if x["weights/ess"] * FLAGS["--samples-per-prompt"] < 1.25]
            problems += [f"{warned} warnings at {len(low)} steps with one-hot weights"] * (
                warned != bool(low)
            )
        yield Outcome(name, problems, seen)


INFINITY = float("inf")


def at_step(step: int, change: Callable) -> Callable:
    """`prepare` that lets `change` alter the rewards of a step, by way of common.score."""

    def prepare():
        score, sample, now = common.score, common.sample, []
        seeds = {common.seed_of(1, step, 0), common.seed_of(1, "anchor", step, 0)}

        def watched(model, prompts, n, *more):
            now[:] = [more[-1] in seeds and n > 1]
            return sample(model, prompts, n, *more)

        common.sample = watched
        common.score = lambda *inputs: (
            change(score(*inputs)) if now[:1] == [True] else score(*inputs)
        )

    return prepare


def spoil(value: float) -> Callable:
    """Sets the reward of the first prompt's second response."""

    def change(rewards):
        rewards[0, 1] = value
        return rewards

    return at_step(5, change)


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN for the last prompt."""

    @staticmethod
    def forward(context, x):
        """Changes nothing."""
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        """Spoils the last row."""
        gradient = gradient.clone()
        gradient[-1] = float("nan")
        return gradient


def nan_gradient(inside: bool) -> Callable:
    """NaN in the gradient in update 5, of the log-probs or inside the model."""

    def prepare():
        read, calls = common.logprobs_and_entropy, itertools.count(1)

        def spoiled(model, batch, temperature, *more):
            if not torch.is_grad_enabled() or next(calls) != 5:
                return read(model, batch, temperature, *more)
            if inside:
                weight = next(model.parameters())
                handle = weight.register_hook(lambda g: (handle.remove(), g * float("nan"))[1])
                return read(model, batch, temperature, *more)
            logprobs, entropy = read(model, batch, temperature, *more)
            return BadGradient.apply(logprobs), entropy

        common.logprobs_and_entropy = spoiled

    return prepare


def responses(change: Callable) -> Callable:
    """`prepare` that alters every batch of samples, as if the policy had drawn them so."""

    def prepare():
        sample = common.sample

        def altered(model, *more):
            batch, drawn = sample(model, *more)
            tokens, mask = batch.response_tokens.clone(), batch.response_mask.clone()
            change(tokens, mask, model.end_tokens[0])
            return replace(batch, response_tokens=tokens * mask, response_mask=mask), drawn

        common.sample = altered

    return prepare


def ends_at_once(tokens, mask, end: int) -> None:
    """The first prompt gets the end token and nothing else."""
    tokens[0, :, 0], mask[0, :, 1:] = end, False


def one_far_longer(tokens, mask, end: int) -> None:
    """All responses end at once but the very first, which never ends."""
    kept = tokens[0, 0].clone()
    tokens[..., 0], mask[..., 1:] = end, False
    tokens[0, 0], mask[0, 0] = kept.where(kept != end, 5), True


def huge(rewards):
    """±1e4."""
    return 1e4 * rewards.sign()


STOP = ("the prompt '", "checkpoint is kept")
NUMBERS: dict[str, tuple[Callable | None, tuple[str, ...] | None, dict]] = {
    "a reward of NaN": (spoil(float("nan")), ("reward", *STOP), {}),
    "a reward of inf": (spoil(INFINITY), ("reward", *STOP), {}),
    "a reward of -inf": (spoil(-INFINITY), ("reward", *STOP), {}),
    "gradient of the log-probs NaN": (nan_gradient(False), ("gradient", *STOP), {}),
    "gradient NaN inside the model": (nan_gradient(True), ("gradient", "step 5"), {}),
    "all rewards equal": (at_step(5, torch.zeros_like), None, {}),
    "rewards of ±1e4": (at_step(5, huge), None, {}),
    "--beta 1e-4": (None, None, {"beta": 1e-4}),
    "a prompt whose responses end at once": (responses(ends_at_once), None, {}),
    "one response far longer": (responses(one_far_longer), None, {"max_response_tokens": 64}),
}


# ── the campaign ──
def data(world: World, inputs: int) -> Iterator[Outcome]:
    """Hostile data files, all in one forked process: reading them is the same in all scripts."""
    found = world.folder / "hostile.json"
    reading = Process(world.script, {}, lambda: (hostile.main(found, inputs), os._exit(0)))
    code, error = reading.end()
    counts = json.loads(found.read_text()) if found.exists() else {}
    problems = counts.pop("problems", [f"ended with {code}: {error[-600:]}"])
    yield Outcome("hostile data files", problems, counts)


def small_disk(folder: Path) -> Path:
    """A tmpfs that vanishes with this process; only this process and its children see it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=777", "tmpfs", folder], check=True)
    return folder


def campaign(args: Args, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """All outcomes, as they come."""
    if "disk" in args.faults:
        small = small_disk(folder / "small")
    for script in args.scripts:
        world = World(script, folder / script, args.seed)
        groups = {
            "kills": lambda w: kills(w, args.kills),
            "disk": lambda w: disk(w, small),
            "files": lambda w: files(w, args.flips),
            "processes": processes,
            "clock": clock,
            "numbers": numbers,
            "data": lambda w: data(w, args.inputs) if w.script == args.scripts[0] else (),
        }
        for name in args.faults:
            for outcome in groups[name](world):
                yield script, outcome


def main(args: Args) -> None:
    """Runs the campaign and says what was lost."""
    if "disk" in args.faults and not os.environ.get("OWN_MOUNTS"):  # mounts of our own
        command = [
            "unshare",
            "--mount",
            *["--map-root-user"] * bool(os.getuid()),
            sys.executable,
            "-m",
            "benchmarks.faults",
            *sys.argv[1:],
        ]
        raise SystemExit(subprocess.run(command, env=os.environ | {"OWN_MOUNTS": "1"}).returncode)
    where, total, lost = {"command": command_line("benchmarks.faults")} | about(), 0, 0
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o777)
        for script, outcome in campaign(args, folder):
            line = {
                "script": script,
                "fault": outcome.fault,
                "survived": not outcome.problems,
                "problems": outcome.problems,
                "seen": {
                    key: value.replace(name, "…") if isinstance(value, str) else value
                    for key, value in outcome.seen.items()
                },
            }
            with open(args.results, "a") as file:
                file.write(json.dumps(line | where, ensure_ascii=False) + "\n")
            total, lost = total + 1, lost + bool(outcome.problems)
            mark = "ok  " if not outcome.problems else "LOST"
            print(mark, script, outcome.fault, outcome.seen, *outcome.problems, flush=True)
    forget_caches()
    print(f"survived {total - lost} of {total}")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
