"""What breaks a method, and what its exercises show: short runs on the embedded default.

    python -m benchmarks.lessons --script brain               # a whole run, and one per lesson
    python -m benchmarks.lessons --script brain --exercises   # one per docs/exercises/brain-*.diff

A lesson is a run with a flag that does not fit, or with a line of the script that is wrong, in a
copy of the script. Adds a line per run to benchmarks/results/lessons.jsonl: what `analyze.ranges`
keeps of a log. The last evaluation is of 64 prompts. All runs are forked from one process, which
has imported the libraries.
"""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from analyze.ranges import summary
from benchmarks import forked
from benchmarks.where import ROOT, add
from plumbing.report import read_lines

STEPS = 30
SHORT = f"--steps {STEPS} --eval-every {STEPS} --eval-prompts 64 --save-every 1000"
EXERCISES = ROOT / "docs" / "exercises"


@dataclass(frozen=True)
class Lesson:
    """Something wrong: by flags, or by `new` text in place of `old` in the script."""

    name: str
    flags: str = ""
    old: str = ""
    new: str = ""


WHOLE = Lesson("nothing")
STEEP = "--lr 5e-3"
COLD = ("most_tokens, args.temperature, seed)", "most_tokens, 0.7 * args.temperature, seed)")
LESSONS = {
    "brain": [
        Lesson("ten times the step size", STEEP),
        Lesson("a tenth of β", "--beta 0.02"),
        Lesson("the proposal is never renewed", "--refresh-every 0"),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
    "gdc": [
        Lesson("ten times the step size", STEEP),
        Lesson("a tenth of β", "--beta 0.02"),
        Lesson("one Ẑ for prompts that differ, with a small β", "--normalizer running --beta 0.05"),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
    "dpo": [
        Lesson("ten times the step size", STEEP),
        Lesson("a tenth of β", "--beta 0.02"),
        Lesson(
            "chosen and rejected are exchanged",
            "",
            "[rewards.argmax(1), rewards.argmin(1)]",
            "[rewards.argmin(1), rewards.argmax(1)]",
        ),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
    "wind": [
        Lesson("ten times the step size", STEEP),
        Lesson("a tenth of η", "--eta 0.5"),
        Lesson("no β", "--beta 0"),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
    "bond": [
        Lesson("ten times the step size", STEEP),
        Lesson("the anchor never follows", "--eta 0"),
        Lesson(
            "the γ term has the sign of the printed algorithm",
            "--gamma 1",
            "+ args.gamma * hold",
            "- args.gamma * hold",
        ),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
    "ppo": [
        Lesson("ten times the step size", STEEP),
        Lesson("eight passes over each batch, without a clip", "--updates-per-sample 8 --clip 100"),
        Lesson(
            "the KL is paid with the wrong sign",
            "",
            "kl_term = -beta * (logprobs",
            "kl_term = beta * (logprobs",
        ),
        Lesson("samples are drawn at another temperature than log-probs are read", "", *COLD),
    ],
}


@dataclass
class Args:
    script: tuple[str, ...] = tuple(LESSONS)
    """scripts, without .py"""
    exercises: bool = False
    """run the exercises, not the lessons"""
    only: str = ""
    """run only what has this text in its name"""
    seed: int = 1
    """of each run"""


def changed(folder: str, script: str, change: Lesson | Path) -> Path:
    """A copy of the script in `folder`, with the wrong text of a lesson or a diff applied to it."""
    copy = Path(shutil.copy(ROOT / f"{script}.py", folder))
    if isinstance(change, Path):
        subprocess.run(["git", "apply", str(change)], cwd=folder, check=True)
    elif change.old:
        text = copy.read_text()
        assert change.old in text, change
        copy.write_text(text.replace(change.old, change.new))
    return copy


def flags_of(diff: Path) -> str:
    """The flags that an exercise is run with: on its first line, `# python brain.py FLAGS`."""
    return " ".join(diff.read_text().splitlines()[0].split()[3:])


def exercises(script: str) -> list[Lesson | Path]:
    """The diffs of a script, and before those with flags a run with these flags alone."""
    found: list[Lesson | Path] = []
    for diff in sorted(EXERCISES.glob(f"{script}-*.diff")):
        flags = flags_of(diff)
        found += [Lesson(f"before {diff.stem}", flags), diff] if flags else [diff]
    return found


def start(path: str, words: list[str], log: str) -> None:
    """What `python PATH WORDS` does, with all that it prints in a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = [path, *words]
        runpy.run_path(path, run_name="__main__")


def run(script: str, change: Lesson | Path, words: list[str]) -> list[dict]:
    """The metrics of a run of a changed script, one dict per step."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = changed(folder, script, change), Path(folder, "log")
        words = [*words, "--run-dir", f"{folder}/run"]
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=start, args=(str(path), words, str(log)))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(log.read_text()[-2000:])
        return read_lines(Path(folder, "run", "metrics.jsonl"))


def main(args: Args) -> None:
    """Runs all of them, one after the other."""
    for script in args.script:
        found: list = exercises(script) if args.exercises else [WHOLE, *LESSONS[script]]
        for change in found:
            is_lesson = isinstance(change, Lesson)
            name = change.name if is_lesson else change.stem
            if args.only not in name:
                continue
            own = change.flags if is_lesson else flags_of(change)
            words = [*own.split(), "--seed", str(args.seed), *SHORT.split()]
            metrics = summary(run(script, change, words))
            line = {"script": script, "name": name}
            line["command"] = " ".join(["python", f"{script}.py", *words])
            line |= {"old": change.old, "new": change.new} if is_lesson and change.old else {}
            add("lessons", line | {"seed": args.seed, "metrics": metrics})
    forked.forget_caches()


if __name__ == "__main__":
    main(tyro.cli(Args))
