"""Sweeps of runs."""

import json
import signal
import subprocess
import tempfile
from types import SimpleNamespace

import pytest

import bond
import brain
import common
import dpo
import gdc
from analyze import sweep
from analyze.sweep import Planned

# A script that takes no time: it writes the log of a run, whose KL is its --beta.
SCRIPT = """
import json, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
beta = float(flags.get("--beta", 0))
if beta < 0:
    raise SystemExit("error: --beta: too small")
time.sleep(float(flags.get("--sleep", 0)))
folder = Path(flags["--run-dir"])
folder.mkdir()
args = {"prompts_per_step": 4, "samples_per_prompt": 3}
about = {"script": "brain.py", "args": args, "commit": "abc", "versions": {}, "device": "cpu"}
(folder / "args.json").write_text(json.dumps(about))
log, samples = [], []
for step in range(5):
    line = {"step": step}
    if step:
        line |= {"time/sample_s": 0.5, "time/score_s": 0.25, "time/update_s": 0.25, "loss": step}
    if step % 2 == 0:
        line |= {"eval/win_rate": step / 10, "eval/reward": 1.0, "eval/kl": beta * step}
        line |= {"eval/length": 9.0, "eval/eos_rate": 1.0}
        samples.append({"step": step, "prompt": "p", "response": "r" * step, "reference": "rr"})
    log.append(line)
for name, lines in (("metrics", log), ("samples", samples)):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in lines))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "brain.py").write_text(SCRIPT)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def length_judge(samples: list[dict]) -> dict[str, float]:
    return {"judge_win_rate": float(sum(len(sample["response"]) for sample in samples))}


# ── sweeps ──
def test_a_line_has_the_curve_what_a_judge_says_seconds_and_samples(checkout):
    run = Planned("a", "brain", "--beta 0.5", 3)
    (line,) = sweep.sweep([run], checkout / "raw.jsonl", length_judge, keep=("loss",))
    assert line["command"] == "python brain.py --beta 0.5 --seed 3"
    assert (line["label"], line["seed"], line["commit"]) == ("a", 3, "abc")
    assert line["seconds"] == 4  # four steps of three phases
    assert line["samples"] == 4 * 4 * 3
    assert [point["kl"] for point in line["curve"]] == [0, 1, 2]
    assert [point["judge_win_rate"] for point in line["curve"]] == [0, 2, 4]
    assert [point.get("loss") for point in line["curve"]] == [None, 2, 4]


def test_a_sweep_goes_on_and_makes_no_run_again(checkout, capsys):
    path = checkout / "raw.jsonl"
    runs = [Planned("a", "brain", f"--beta {beta}", 1) for beta in (1, 2, 3)]
    sweep.sweep(runs[1:2], path)
    lines = sweep.sweep(runs, path, jobs=2)
    assert [line["curve"][-1]["kl"] for line in lines] == [4, 8, 12]
    assert len(path.read_text().splitlines()) == 3
    said = capsys.readouterr().out
    assert "1 of 3 runs are finished already" in said and "3 of 3 runs" in said


def test_a_run_that_fails_leaves_no_line_and_lets_the_others_go_on(checkout, capsys):
    path = checkout / "raw.jsonl"
    runs = [Planned("a", "brain", f"--beta {beta}", 1) for beta in (-1, 2)]
    with pytest.raises(SystemExit, match="1 runs failed: .*ended with 1: error: --beta: too small"):
        sweep.sweep(runs, path, jobs=1)
    assert [line["command"] for line in sweep.read_results(path)] == [runs[1].command]


def test_ctrl_c_drops_what_is_under_way_and_keeps_what_is_finished(checkout, monkeypatch, capsys):
    path, folders = checkout / "raw.jsonl", checkout / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    runs = [Planned("a", "brain", flags, 1) for flags in ("--beta 1", "--sleep 60")]
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C, in a second
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(SystemExit) as stopped:
            sweep.sweep(runs, path, jobs=1, before=f"sh -c '\"$@\"; exit $?' {checkout}")
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert stopped.value.code == 130 and "1 under way are dropped" in capsys.readouterr().out
    assert len(sweep.read_results(path)) == 1
    assert not list(folders.iterdir())  # of no run a folder is left, and no process:
    assert str(folders) not in subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout


def test_time_left_is_shared_by_the_jobs():
    assert sweep.left([60, 180], 10, 2) == "about 10 min left"
    assert sweep.left([], 10, 2) == "time left unknown"


def test_the_gold_judge_counts_a_tie_half():
    prompt = "write a review of the inn in lima by mei. points to cover: garden, cake. review:"
    good, bad = " the garden was lovely and the cake was delicious.", " the garden was dark."
    samples = [{"prompt": prompt, "response": a, "reference": b} for a, b in ((good, bad),) * 3]
    samples.append({"prompt": prompt, "response": bad, "reference": bad})
    assert sweep.gold_judge(samples)["judge_win_rate"] == 3.5 / 4


@pytest.mark.parametrize(
    "script, flags",
    [
        (brain, {}),
        (gdc, {"proposal": "adaptive", "test_every": 2}),
        (gdc, {"proposal": "policy"}),
        (bond, {"anchor": "fixed", "anchor_samples": 3}),
        (dpo, {}),
        (dpo, {"pairs": "dataset"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_samples_are_counted_as_a_script_draws_them(script, flags, tmp_path, monkeypatch):
    drawn, sample = [], common.sample

    def counting(model, prompts, n, *others, **named):
        if not named:  # the check at load, which is no part of the method, names them
            drawn.append(len(prompts) * n)
        return sample(model, prompts, n, *others, **named)

    monkeypatch.setattr(common, "sample", counting)
    monkeypatch.setattr(common, "evaluate", lambda *_: ({"eval/reward": 0.0}, []))
    small = {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 4, "max_response_tokens": 3}
    script.main(script.Args(run_dir=str(tmp_path / "run"), eval_prompts=2, **small, **flags))
    args = SimpleNamespace(**vars(script.Args(**small, **flags)))
    assert sum(drawn) == sweep.samples_drawn(script.__name__, args, 3)


def test_of_a_command_the_last_line_counts(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"command": "c", "n": n}) + "\n" for n in (1, 2)))
    assert sweep.read_results(path) == [{"command": "c", "n": 2}]
    assert sweep.read_results(tmp_path / "none.jsonl") == []
