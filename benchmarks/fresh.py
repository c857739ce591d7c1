"""A script in a process of its own, as a user starts it: imports and all."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.where import ROOT


@contextmanager
def run(words: list[str], root: Path = ROOT, shown: bool = False) -> Iterator[Path]:
    """The folder of a finished run of `words`, a script and its flags; it is removed afterwards.

    Run by the checkout at `root`; what it prints goes to stderr if it is `shown`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        output = {"stdout": sys.stderr} if shown else {"capture_output": True}
        command = [sys.executable, *words, "--run-dir", str(path)]
        subprocess.run(command, cwd=root, check=True, **output)
        yield path
