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
import torch

import bond
import brain
import common
import dpo
import gdc
from analyze import claims, compare, results_page, sweep
from analyze.intervals import over_seeds
from analyze.readme import filled
from analyze.sweep import Planned
from plumbing.run import ROOT

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
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C

    def judge(samples: list[dict]) -> dict:  # called when the first run has ended
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        return {}

    before = f"sh -c '\"$@\"; exit $?' {checkout}"
    try:
        with pytest.raises(SystemExit) as stopped:
            sweep.sweep(runs, path, judge, jobs=1, before=before)
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


def test_runs_are_planned_in_the_order_of_their_use():
    world = compare.WORLDS["tiny"]
    runs, others = compare.planned(world, (1, 2, 3, 4)), len(world.arms) - 8
    assert [run.seed for run in runs[:24]] == [1] * 8 + [2] * 8 + [3] * 8
    assert [run.seed for run in runs[24:][: 3 * others]] == [1, 2, 3] * others
    assert {run.seed for run in runs[24 + 3 * others :]} == {4}
    assert len({run.command for run in runs}) == len(runs) == 4 * len(world.arms)
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


# ── verdicts ──
def claim(*holds: bool | None, derived: bool = False) -> claims.Claim:
    checks = [claims.Check("x", held) for held in holds]
    return claims.Claim("paper", "text", "experiment", checks, "game", derived=derived)


@pytest.mark.parametrize(
    "holds, verdict",
    [
        ((True, True), "reproduced"),
        ((True, False), "partly"),
        ((False, False), "not"),
        ((True, None), "open"),
        ((True, False, None), "partly"),
        ((False, None), "open"),
        ((), "open"),
    ],
)
def test_a_verdict_follows_from_the_checks(holds, verdict):
    assert claim(*holds).verdict == verdict


def test_of_a_paper_that_was_not_read_a_claim_is_partly_reproduced_at_most():
    assert claim(True, derived=True).verdict == "partly"
    assert claim(False, derived=True).verdict == "not"


def test_larger_asks_for_an_interval_above_0_and_for_three_seeds():
    assert claims.larger("x", [0.1, 0.12, 0.11]).holds is True
    assert claims.larger("x", [-0.1, -0.12, -0.11]).holds is False
    assert claims.larger("x", [0.3, -0.1, 0.2]).holds is False  # 0 is within the interval
    assert claims.larger("x", [0.1, 0.12, 0.11], least=0.1).holds is False
    assert claims.larger("x", [0.1, 0.11]).holds is None
    says = claims.larger("x", [0.1, 0.12, 0.11]).says
    assert says == "x: +0.11 (+0.09 to +0.13), 3 seeds"


def test_as_large_asks_for_an_interval_within_the_margin():
    assert claims.as_large("x", [0.01, -0.01, 0.0], 0.05).holds is True
    assert claims.as_large("x", [0.3, -0.3, 0.0], 0.05).holds is False  # no difference seen
    assert claims.as_large("x", [0.06, 0.06, 0.06], 0.05).holds is False
    assert claims.as_large("x", [-0.06, -0.06, -0.06], 0.05).holds is False
    assert claims.as_large("x", [], 0.05).holds is None


def test_differences_are_between_runs_of_one_seed():
    lines = [line_of("a", seed, [0, seed], [0.5, 0.5 + seed / 10]) for seed in (1, 2, 4)]
    lines += [line_of("b", seed, [0, 1], [0.5, 0.5]) for seed in (4, 3, 2)]
    found = claims.differences(lines, "a", "b", claims.final("win_rate"))
    assert found == pytest.approx([0.2, 0.4])
    # At 2 nats b has no value, and a has one from seed 2 on.
    assert claims.differences(lines, "a", "b", claims.where("win_rate", 2.0)) == []
    assert claims.objective(lines[0]) == pytest.approx(2 * 0.6 - 0.2 * 1)


def world_of(better: str, worse: str) -> list[dict]:
    """Runs in which one method wins more often, at the end and at each KL."""
    lines = [line_of(better, s, [0, 4], [0.5, 0.9 + s / 100]) for s in range(1, 6)]
    return lines + [line_of(worse, s, [0, 4], [0.5, 0.7]) for s in range(1, 6)]


def test_a_method_that_wins_more_passes_all_four_checks_and_its_loser_none():
    checks = claims.wins_more(world_of("a", "b"), "a", "b", 2.0)
    assert [check.holds for check in checks] == [True] * 4
    checks = claims.wins_more(world_of("b", "a"), "a", "b", 2.0)
    assert [check.holds for check in checks] == [False] * 4
    checks = claims.wins_more([], "a", "b", 2.0)
    assert [check.holds for check in checks] == [None] * 4


def verdict_of(source: str, word: str, lines: list[dict], best=()) -> str:
    found = claims.claims(claims.Evidence(lines, list(best)))
    (one,) = [x for x in found if x.source.startswith(source) and word in x.text]
    return one.verdict


def test_verdicts_of_runs_turn_with_the_runs():
    dpo_labels = ("DPO, best and worst of 8", "DPO, pairs of the data set")
    for better, verdict in ((True, "reproduced"), (False, "not")):
        lines = []
        for label in dpo_labels:
            part = world_of("BRAIn", label) if better else world_of(label, "BRAIn")
            lines += [line for line in part if line["label"] not in {x["label"] for x in lines}]
        assert verdict_of("BRAIn", "outperforms DPO", lines) == verdict
    assert verdict_of("BRAIn", "outperforms DPO", []) == "open"


def test_verdicts_without_runs():
    assert claims.gap_of_dpo() < 1e-12
    assert claims.gap_of_best_of_2() < 1e-12
    assert verdict_of("BRAIn", "special case", []) == "reproduced"
    assert verdict_of("BRAIn", "variance where the proposal", []) == "reproduced"


def test_dpo_is_no_special_case_of_another_loss(monkeypatch):
    monkeypatch.setattr(brain, "brain_loss", lambda *_: torch.zeros(1000, dtype=torch.float64))
    assert verdict_of("BRAIn", "special case", []) == "not"


def test_bond_is_compared_with_the_best_of_4():
    runs = [line_of("BOND, fixed anchor, N 4", s, [0, 1], [0.5, 0.8 + s / 1000]) for s in (1, 2, 3)]
    curve = [{"n": n, "win_rate": x, "judge_win_rate": x / 2} for n, x in ((1, 0.5), (4, 0.8))]
    assert verdict_of("BOND", "best-of-N", runs, [{"curve": curve}]) == "reproduced"
    curve[1] |= {"win_rate": 0.9}
    assert verdict_of("BOND", "best-of-N", runs, [{"curve": curve}]) == "partly"


# ── page ──
def test_the_page_is_made_of_the_raw_lines():
    """If this fails, run `python -m analyze.results_page` and commit docs/results.md."""
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results_page.page()


def test_the_blocks_of_the_readme_are_made_of_the_raw_lines():
    """If this fails, run `python -m analyze.results_page --readme` and commit README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, results_page.readme_parts()) == text


def test_a_text_that_explains_another_verdict_is_not_shown(monkeypatch):
    monkeypatch.setitem(claims.WHY, "game", ({"partly"}, "Because."))
    assert claim(True, False).why == "Because."
    assert claim(True, True).why.startswith("More runs have changed")
    assert claim(None).why == "Runs are missing."


def test_raw_lines_are_whole_and_few():
    paths = [compare.path_of(world) for world in compare.WORLDS]
    for line in [line for path in paths for line in sweep.read_results(path)]:
        assert {"commit", "versions", "device", "cores", "threads", "seed"} <= line.keys()
        assert line["curve"][0]["kl"] == 0 and len(line["commit"]) == 40
    assert sum(path.stat().st_size for path in paths if path.exists()) < 300_000


def test_the_picture_has_a_line_per_method_and_the_best_of_n(tmp_path):
    lines = [line_of("BRAIn", s, [0, s, 2 * s], [0.4, 0.6, 0.8]) for s in (1, 3)]
    lines += [line_of("PPO", 1, [0, 1], [0.4, 0.6], script="ppo")]
    assert results_page.mean_curve(lines[:2], "win_rate") == [(0, 0.4), (2, 0.6), (4, 0.8)]
    curve = [{"n": n, "kl": n / 4, "win_rate": 0.5, "judge_win_rate": 0.5} for n in (1, 2)]
    figure = results_page.frontier(lines, [{"curve": curve}])
    for axis in figure.axes:
        drawn = [line for line in axis.lines if len(line.get_xdata()) > 1]
        assert len(drawn) == 3
    assert "BRAIn (2)" in [text.get_text() for text in figure.legends[0].texts]
