"""Sweeps of runs, and the comparison that is made of them."""

import importlib
import json
import math
import signal
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
import scipy.stats

import bond
import brain
import common
import dpo
import gdc
from analyze import compare, sweep
from analyze.intervals import over_seeds
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
    assert (
        str(folders) not in subprocess.run(["ps", "-efww"], capture_output=True, text=True).stdout
    )


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


# ── the same KL ──
def line_of(label: str, seed: int, kl: list[float], wins: list[float], **others) -> dict:
    curve = [
        {"step": 10 * i, "kl": x, "win_rate": y, "judge_win_rate": y / 2, "reward": 2 * y}
        for i, (x, y) in enumerate(zip(kl, wins))
    ]
    line = {"label": label, "seed": seed, "curve": curve, "cpu_seconds": 100, "samples": 1000}
    return (
        line | {"script": "brain", "command": f"python brain.py --x {label} --seed {seed}"} | others
    )


def test_a_curve_is_read_where_it_first_reaches_a_kl():
    line = line_of("a", 1, [0, 1, 3, 2, 4], [0.5, 0.6, 0.8, 0.9, 0.9])
    curve = compare.progress(line)
    found = compare.at(curve, 2.0)  # half-way from 1 to 3, and not where it comes back
    assert found["win_rate"] == pytest.approx(0.7)
    assert found["step"] == pytest.approx(15)
    assert found["samples"] == pytest.approx(1000 * 15 / 40)
    assert found["cpu_seconds"] == pytest.approx(100 * 15 / 40)
    assert compare.at(curve, 0.0)["win_rate"] == 0.5
    assert compare.at(curve, 4.0)["win_rate"] == 0.9
    assert compare.at(curve, 4.1) is None
    assert compare.at(curve, 0.7, "win_rate")["kl"] == pytest.approx(2)


def test_a_run_that_never_comes_so_far_is_left_out_and_counted():
    lines = [line_of("a", 1, [0, 3], [0.5, 0.8]), line_of("a", 2, [0, 1], [0.5, 0.9])]
    text = compare.matched_table(lines, ["a"], [], (2.0,))
    assert "| a | 0.70 (1 of 2 seeds) | 0.35 (1 of 2 seeds) |" in text
    assert len(compare.points(lines, 1.0)) == 2 and len(compare.points(lines, None)) == 2


def test_the_table_has_the_sft_model_and_the_mean_with_student_s_interval():
    lines = [line_of("a", seed, [0, 3], [0.5, x]) for seed, x in ((1, 0.7), (2, 0.8), (3, 0.9))]
    text = compare.defaults_table(lines, ["b", "a"])
    half = scipy.stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert f"| a | 0.80 ± {half:.2f} | 0.40 ± {half / 2:.2f} | 3.00 ± 0.00 | 100 ± 0 |" in text
    assert "| SFT model | 0.50 ± 0.00 | 0.25 ± 0.00 | 0 |" in text


@pytest.mark.parametrize("count", range(2, 11))
def test_intervals_over_seeds_are_student_s(count):
    values = [float(x**2) for x in range(count)]
    found = over_seeds(values)
    error = scipy.stats.sem(values)
    low, high = scipy.stats.t.interval(0.95, count - 1, sum(values) / count, error)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=2e-3)


def test_one_seed_says_nothing_of_others():
    assert over_seeds([0.5]) == {"value": 0.5, "low": -math.inf, "high": math.inf}


def test_the_first_methods_get_all_their_seeds_before_the_others_begin():
    world = compare.WORLDS["tiny"]
    runs = compare.planned(world, (1, 2))
    assert [run.seed for run in runs[:16]] == [1] * 8 + [2] * 8
    assert len({run.command for run in runs}) == 2 * len(world.arms)
    assert [run.label for run in compare.planned(world, (3,), ("WIND",))] == ["WIND"]


def test_a_label_that_is_no_method_is_named(capsys):
    with pytest.raises(SystemExit):
        compare.planned(compare.WORLDS["tiny"], (1,), ("WINDY",))
    assert "WINDY" in capsys.readouterr().err


@pytest.mark.parametrize("world", compare.WORLDS)
def test_every_planned_run_has_flags_that_its_script_knows(world):
    for run in compare.planned(compare.WORLDS[world], (1,)):
        script = importlib.import_module(run.script)
        args = common.parse_args(script.Args, run.words[1:])
        script.check(args)
