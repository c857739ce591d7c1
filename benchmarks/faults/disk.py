"""A disk that is full at the moment of a write, a folder that cannot be written."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.world import Outcome, World, before, refused


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


def small_disk(folder: Path) -> Path:
    """A tmpfs that vanishes with this process; only this process and its children see it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=777", "tmpfs", folder], check=True)
    return folder
