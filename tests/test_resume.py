"""A run that is killed and resumed ends as the run that never was: bit for bit."""

import gc
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import argv, comparable, read_log, same, train, word_world
from safetensors.torch import load_file

import brain
import common
from plumbing import report

ROOT = Path(brain.__file__).parent
STEPS = {"--steps": "12", "--save-every": "3", "--eval-every": "5", "--refresh-every": "7"}
VARIANTS = {
    "plain": {},
    "bug 29": {
        "--updates-per-sample": "2",
        "--refresh-every": "3",
        "--micro-batch": "2",
        "--warmup-steps": "30",
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a run of 12 steps."""
    return word_world(tmp_path_factory.mktemp("world")) | STEPS


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an unbroken run, by variant."""
    done = {}

    def folder(variant: str) -> Path:
        if variant not in done:
            path = tmp_path_factory.mktemp("whole") / "run"
            done[variant] = train(world | VARIANTS[variant] | {"--run-dir": str(path)})
        return done[variant]

    return folder


def start(flags: dict[str, str]) -> subprocess.Popen:
    """brain.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "brain.py"), *argv(flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(run: Path, count: int, process: subprocess.Popen) -> None:
    """Returns when metrics.jsonl has `count` lines."""
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def assert_same(run: Path, other: Path) -> None:
    """Log, samples, weights, moments and proposal, and every file of the folder."""
    assert comparable(run) == comparable(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    names = [
        sorted(
            str(p.relative_to(x))
            for p in x.rglob("*")
            if "tensorboard" not in p.parts and "__pycache__" not in p.parts
        )
        for x in (run, other)
    ]
    assert names[0] == names[1]
    ours, theirs = (load_file(x / "final" / "model.safetensors") for x in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (
        torch.load(x / "checkpoint" / "state.pt", weights_only=True) for x in (run, other)
    )
    assert ours.pop("run") == theirs.pop("run")
    assert same(ours, theirs)


@pytest.mark.parametrize("variant", [pytest.param("plain", marks=pytest.mark.slow), "bug 29"])
def test_bug29_a_run_killed_at_a_random_step_resumes_bit_equal(world, whole, tmp_path, variant):
    lines = random.Random().randint(5, 10)  # another one each time; it is in the failure's locals
    run = tmp_path / "run"
    process = start(world | VARIANTS[variant] | {"--run-dir": str(run)})
    wait_for_lines(run, lines, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "final").exists()
    assert 1 < len((run / "metrics.jsonl").read_text().splitlines()) < 13
    assert train({"--resume": str(run)}) == run
    assert_same(run, whole(variant))


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint(world, whole, tmp_path):
    """The run starts anew in its folder, with no line twice."""
    run = tmp_path / "run"
    process = start(world | {"--run-dir": str(run), "--save-every": "12"})
    wait_for_lines(run, 3, process)
    process.kill()
    process.communicate()
    assert not (run / "checkpoint").exists()
    train({"--resume": str(run)})
    other = whole("plain")
    assert comparable(run) == comparable(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(world, whole, tmp_path):
    run = tmp_path / "run"
    process = start(world | {"--run-dir": str(run)})
    wait_for_lines(run, 6, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode not in (0, 2) and "Traceback" not in error, error
    step, command = re.search(
        r"stopped after step (\d+).*: python (\S+ --resume \S+)\n", error, re.S
    ).groups()
    assert command == f"brain.py --resume {run}" and error.count("\n") == 1
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert saved["step"] == int(step) == read_log(run / "metrics.jsonl")[-1]["step"]
    assert not (run / "final").exists()
    train({"--resume": str(run)})
    assert_same(run, whole("plain"))


class Killed(BaseException):
    """Ends a run at once: nothing in the scripts catches it."""


def break_at(monkeypatch, target, name: str, call: int, before=lambda *_: None) -> None:
    """The `call`-th call of target.name does `before` in its place, and the run is gone."""
    original, calls = getattr(target, name), []

    def replacement(*inputs, **options):
        calls.append(name)
        if len(calls) == call:
            before(*inputs)
            raise Killed
        return original(*inputs, **options)

    monkeypatch.setattr(target, name, replacement)


def run_until_killed(flags, monkeypatch, *where) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, *where)
        train(flags)
    for number in (signal.SIGINT, signal.SIGTERM):  # else they hold the run, and it the lock
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


def test_a_kill_while_the_checkpoint_is_written_leaves_the_last_one_whole(
    world, whole, tmp_path, monkeypatch
):
    run, half = tmp_path / "run", b"the first half of a checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # who is killed tidies nothing up
        where = (common.torch, "save", 3, lambda saved, file: file.write(half))
        run_until_killed(world | {"--run-dir": str(run)}, patch, *where)
    left = [path.name for path in (run / "checkpoint").iterdir()]
    assert len(left) == 2 and "state.pt" in left  # the new one lies beside it
    assert torch.load(run / "checkpoint" / "state.pt", weights_only=True)["step"] == 6
    assert len(read_log(run / "metrics.jsonl")) == 10
    train({"--resume": str(run)})
    assert_same(run, whole("plain"))


def test_a_kill_between_log_and_checkpoint(world, whole, tmp_path, monkeypatch):
    """And a line that was cut in two: the log is cut back to the checkpoint, no step twice."""
    run = tmp_path / "run"
    run_until_killed(world | {"--run-dir": str(run)}, monkeypatch, common.Run, "save", 2)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rewa')
    train({"--resume": str(run)})
    assert [line["step"] for line in read_log(run / "metrics.jsonl")] == list(range(13))
    assert_same(run, whole("plain"))


@pytest.mark.parametrize("where", ["close", "plot"])
def test_a_kill_at_the_end(world, whole, tmp_path, monkeypatch, where):
    """Before final/ is written, and after it: resume has only to finish."""
    run = tmp_path / "run"
    target = report if where == "plot" else common.Run
    run_until_killed(world | {"--run-dir": str(run)}, monkeypatch, target, where, 1)
    assert (run / "final").exists() == (where == "plot")
    train({"--resume": str(run)})
    assert_same(run, whole("plain"))


def test_resume_of_a_finished_run_changes_nothing(world, whole, tmp_path, capsys):
    run = train(world | {"--run-dir": str(tmp_path / "run")})
    lines = comparable(run)
    args = common.parse_args(brain.Args, ["--resume", str(run)])
    result = brain.main(args)
    assert comparable(run) == lines
    assert_same(run, whole("plain"))
    last = read_log(run / "metrics.jsonl")[-1]
    assert result == {key: last[key] for key in last if key.startswith("eval/")}
    assert str(run) in capsys.readouterr().out


def test_bug25_a_run_depends_on_its_flags_only(world, whole, tmp_path, monkeypatch):
    """Neither on the state of torch's own generator nor on the place it is started from."""
    torch.manual_seed(99)
    monkeypatch.chdir(tmp_path)
    assert_same(train(world | {"--run-dir": "run"}).resolve(), whole("plain"))
    other = train(world | {"--run-dir": "other", "--seed": "2"})
    assert comparable(other) != comparable(whole("plain"))


# TensorBoard's thread, which a kill would have ended, misses the folder.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_resume_from_a_folder_of_another_name(world, whole, tmp_path, monkeypatch):
    """A run folder that was moved goes on where it is now."""
    run_until_killed(
        world | {"--run-dir": str(tmp_path / "run")}, monkeypatch, common.Run, "save", 3
    )
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    train({"--resume": str(moved)})
    assert not (tmp_path / "run").exists()
    assert_same(moved, whole("plain"))
