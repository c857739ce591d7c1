"""One script, the folder of its runs, and the unbroken run that all others are compared with."""

import itertools
import json
import random
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forked import Process, run  # first

import torch  # isort: skip

import common  # isort: skip

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


def before(method: str, call: int, what: Callable) -> None:
    """`what` happens before the call-th call of a Run's method."""
    original, calls = getattr(common.Run, method), itertools.count(1)

    def replacement(*inputs):
        if next(calls) == call:
            what()
        return original(*inputs)

    setattr(common.Run, method, replacement)
