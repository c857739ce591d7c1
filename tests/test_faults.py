"""The fault campaign in its short form, and faults that need no process of their own."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import read_log, refusal, train, word_world

import brain
import common

ROOT = Path(brain.__file__).parent
MOUNTS = ["unshare", "--mount", *["--map-root-user"] * bool(os.getuid()), "true"]


def campaign(results: Path, flags: str) -> list[dict]:
    """Lines of `python -m benchmarks.faults`, none of which may be a loss."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--results", str(results), *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_log(results)
    assert all(line["survived"] and not line["problems"] for line in lines)
    assert f"survived {len(lines)} of {len(lines)}" in done.stdout
    return lines


@pytest.mark.slow
def test_kills_files_processes_clock(tmp_path):
    lines = campaign(
        tmp_path / "faults.jsonl",
        "--scripts brain --kills 3 --flips 1 --faults kills files processes clock",
    )
    faults = [line["fault"] for line in lines]
    for word in (
        "checkpoint is written",
        "final/ is written",
        "SIGTERM",
        "SIGINT once",
        "bit",
        "SIGINT twice",
        "older version",
        "two processes",
        "clock",
    ):
        assert any(word in fault for fault in faults), word


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(MOUNTS, capture_output=True).returncode != 0,
    reason="needs the right to mount a small disk in a namespace of its own",
)
def test_full_disk_and_read_only_folder(tmp_path):
    lines = campaign(tmp_path / "faults.jsonl", "--scripts bond --faults disk")
    assert len(lines) == 8


@pytest.mark.slow
def test_bad_numbers_and_a_kill_of_other_scripts(tmp_path):
    lines = campaign(tmp_path / "faults.jsonl", "--scripts gdc --faults numbers")
    lines = campaign(tmp_path / "more.jsonl", "--scripts dpo ppo --kills 1 --faults kills") + lines
    assert len(lines) == 12
    warned = {line["fault"]: line["seen"].get("weights/ess") for line in lines}
    assert warned["all rewards equal"] > 0.9 > 0.5 > warned["--beta 1e-4"]


# ── in this process ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return word_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world, tmp_path):
    """The folder of a run of two steps of three: killed before the last one was saved."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            common.Run, "stopping", lambda self: len(read_log(folder / "metrics.jsonl")) == 3
        )
        train(world | {"--run-dir": str(folder)})
    return folder


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '{"step": "one"}', "\0\0\0"])
def test_a_damaged_line_of_the_log(run, capsys, line):
    """Is said, not dropped: the lines behind it would be lost."""
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    lines[1] = line
    log.write_text("\n".join(lines) + "\n")
    error = refusal({"--resume": str(run)}, capsys)
    assert f"--resume {run}: {log} is damaged: " in error
    assert log.read_text() == "\n".join(lines) + "\n"


def test_a_file_system_without_locks_is_said(run, monkeypatch, capsys):
    flock = fcntl.flock

    def refusing(file, *how):
        if os.readlink(f"/proc/self/fd/{file}") == str(run / ".lock"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return flock(file, *how)

    monkeypatch.setattr(fcntl, "flock", refusing)
    error = refusal({"--resume": str(run)}, capsys)
    assert "cannot write .lock" in error and os.strerror(errno.EIO) in error


def locked(run: Path) -> bool:
    """Whether somebody holds the run folder."""
    with open(run / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_run_holds_its_folder_until_it_ends(run, monkeypatch):
    seen, log = [], common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda *inputs: (seen.append(locked(run)), log(*inputs)))
    train({"--resume": str(run)})
    assert seen == [True] and not locked(run)


def test_a_second_process_is_kept_out(run, capsys):
    """A lock of another process, as the system sees it, on the folder of a run."""
    with open(run / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process runs it" in refusal({"--resume": str(run)}, capsys)
    train({"--resume": str(run)})


@pytest.mark.parametrize("others, expected", [(0.0, False), (0.25, True)])
def test_all_processes_stop_when_one_is_asked_to(others, expected):
    """The mean over all processes decides, not each one's own flag: else the rest would wait."""
    run = SimpleNamespace(
        interrupted=False, device="cpu", average=lambda tensor: torch.full_like(tensor, others)
    )
    assert common.Run.stopping(run) is expected


def test_one_hot_weights_are_said_once(world, tmp_path, capsys):
    """With what --beta leaves of the samples at the first step, which is what the run logs."""
    flags = world | {"--run-dir": str(tmp_path / "run"), "--beta": "1e-5"}
    train(flags)
    said = capsys.readouterr().out
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert said.count("reward/std") == 1 and "--beta 1e-05 leaves 1.0 of 3 samples" in said
    assert lines[1]["weights/ess"] * 3 == pytest.approx(1, abs=0.05)
    assert all(line["weights/ess"] * 3 < 1.25 for line in lines[1:])
    train(world | {"--run-dir": str(tmp_path / "even"), "--beta": "1e5"})
    assert "--beta 100000.0 leaves 3.0 of 3 samples" in capsys.readouterr().out


def test_a_gradient_that_is_nan_changes_no_weight(world, tmp_path, monkeypatch, capsys):
    """The optimizer would spread it over all weights, and the next checkpoint would keep them."""
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self)))
    norm = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, most):
        parameters = list(parameters)
        if len(steps) == 1:
            parameters[0].grad[0] = float("nan")
        return norm(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    flags = world | {"--run-dir": str(tmp_path / "run"), "--save-every": "1"}
    assert "gradient of step 2 is NaN" in refusal(flags, capsys)
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert len(steps) == 1 == state["step"]
    assert all(weight.isfinite().all() for weight in state["policy"].values())
    assert json.loads((tmp_path / "run" / "args.json").read_text())


def test_the_page_on_reliability_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "analyze.reliability"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == (ROOT / "docs" / "reliability.md").read_text()
    assert "lost: **nothing**" in done.stdout


@pytest.mark.slow
def test_a_longer_run_leaks_nothing(tmp_path):
    """The short form of benchmarks/long_run.py; the slope of so few steps is rough."""
    results = tmp_path / "long.jsonl"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.long_run",
            "--scripts",
            "dpo",
            "--steps",
            "200",
            "--results",
            str(results),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (line,) = read_log(results)
    assert line["steps"] == 200 and line["MiB per 1000 steps"] < 50
    assert line["open files, last quarter"] <= line["open files, first quarter"]
