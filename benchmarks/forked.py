"""The scripts' own main(), each run in a process forked from one that has imported the libraries.

`faults.py` and `long_run.py` start their runs with it: real files, real signals and real exit
codes, without the seconds an import takes. Import it before anything computes: a fork does not take
threads along.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

_caches = tempfile.mkdtemp(prefix="caches-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_CACHE": _caches,
}

import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import torch.distributed.checkpoint.state_dict  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import bond  # noqa: E402
import brain  # noqa: E402
import common  # noqa: E402
import dpo  # noqa: E402
import gdc  # noqa: E402
import ppo  # noqa: E402
import wind  # noqa: E402

SCRIPTS = {script.__name__: script for script in (brain, gdc, dpo, wind, bond, ppo)}
PATIENCE = 120  # seconds after which a process counts as one that hangs
torch.set_num_threads(1)


def words(flags: dict[str, object]) -> list[str]:
    """`--flag=value` words; a value may start with a minus sign."""
    return [f"{flag}={value}" for flag, value in flags.items()]


class Process:
    """A script in a process of its own; `prepare` is called in there before main()."""

    def __init__(
        self, script: str, flags: dict[str, object], prepare=None, patience: float = PATIENCE
    ):
        self.said, self.errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.began, self.patience = time.perf_counter(), patience
        sys.stdout.flush()
        self.code, self.pid = None, os.fork()
        if self.pid == 0:
            os.dup2(self.errors.fileno(), 2)
            os.dup2(self.said.fileno(), 1)
            self._be(SCRIPTS[script], words(flags), prepare)

    def _be(self, script, argv: list[str], prepare) -> None:
        """What `python SCRIPT.py …` does, up to its exit code."""
        code, sys.argv = 1, [script.__file__, *argv]
        try:
            if prepare:
                prepare()
            script.main(common.parse_args(script.Args))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
            traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        """Whether it has not ended; if it has, `code` is its exit code, -N if a signal ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def until(self, condition=lambda: False) -> bool:
        """Waits for `condition` or the end; whether the process still runs."""
        while self.running() and not condition():
            if time.perf_counter() - self.began > self.patience:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = 999  # hangs
            time.sleep(0.0002)
        return self.code is None

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """(exit code, what stands on stderr), when it has ended."""
        self.until()
        self.errors.seek(0)
        return self.code, self.errors.read()


def run(script: str, flags: dict[str, object], prepare=None) -> tuple[int, str]:
    """(exit code, stderr) of a whole run."""
    return Process(script, flags, prepare).end()


def forget_caches() -> None:
    """Removes the data set caches of this process and of those it forked."""
    shutil.rmtree(_caches, ignore_errors=True)


def command_line(module: str) -> str:
    """How this process was started, but for where its results go."""
    kept = [
        word
        for before, word in zip(["", *sys.argv[1:]], sys.argv[1:])
        if "--results" not in (before, word)
    ]
    return " ".join(["python -m", module, *kept])


def lines(path: Path) -> int:
    """Whole lines of a log."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
