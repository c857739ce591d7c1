"""Checkpoints that are damaged, foreign or old."""

import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.forked import lines  # first

import torch  # isort: skip

from benchmarks.faults.world import Outcome, World, refused  # isort: skip


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
