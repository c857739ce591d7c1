"""Many runs of the scripts, a raw line each: shown, interrupted and continued.

    from analyze import sweep
    runs = [sweep.Planned("τ 0.1", "brain", "--beta 0.1", seed) for seed in range(1, 6)]
    sweep.sweep(runs, Path("analyze/results/mine.jsonl"), sweep.gold_judge, jobs=2)

A run is a process of its own, `python brain.py --beta 0.1 --seed 1`. What its log and a judge say
at each evaluation becomes one line of the file when it has ended; its folder is removed. Ctrl-C
drops the runs under way, and the same call goes on behind it: a run whose command has a line is
not made again. A run that fails leaves no line; the others go on, and the process ends with 1.

A line has label, script, flags, seed, command, commit, versions, device, cores and threads, and

    seconds       sampling, scoring and updating, of all steps, without start and evaluations
    cpu_seconds   processor time of the whole process, which other work on the machine leaves alone
    samples       responses that were sampled to train on
    curve         for each evaluation: step, win_rate, reward, kl, length, eos_rate, what the judge
                  adds, and the metrics of the log that were asked for
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from analyze.evaluate import read_about
from plumbing.report import read_lines
from plumbing.run import ROOT
from prepare.gold import win
from prepare.tiny import gold_score

OF_AN_EVALUATION = ("win_rate", "reward", "kl", "length", "eos_rate")
PHASES = ("time/sample_s", "time/score_s", "time/update_s")
Judge = Callable[[list[dict]], dict[str, float]]  # of the lines of samples.jsonl of one step


@dataclass(frozen=True)
class Planned:
    """A run that is to be made."""

    label: str  # runs of one label differ by their seed
    script: str  # brain, gdc, …
    flags: str  # as on a command line, without --seed
    seed: int

    @property
    def words(self) -> list[str]:
        """What follows `python`."""
        return [f"{self.script}.py", *shlex.split(self.flags), "--seed", str(self.seed)]

    @property
    def command(self) -> str:
        """As one types it: a finished run is known by it."""
        return shlex.join(["python", *self.words])


# ── Judges ────────────────────────────────────────────────────────────────────────────────────────


def against_references(samples: list[dict], ours: list[float], theirs: list[float]) -> dict:
    """judge_win_rate, of the samples against the completions of the data set (½ for a tie), and
    judge_score, the samples' mean."""
    wins = [win(mine - other) for mine, other in zip(ours, theirs, strict=True)]
    return {"judge_win_rate": statistics.mean(wins), "judge_score": statistics.mean(ours)}


def gold_judge(samples: list[dict]) -> dict[str, float]:
    """The gold score, which is how good a review of the tiny world really is."""
    ours = [gold_score(sample["prompt"], sample["response"]) for sample in samples]
    theirs = [gold_score(sample["prompt"], sample["reference"]) for sample in samples]
    return against_references(samples, ours, theirs)


def real_judge(samples: list[dict]) -> dict[str, float]:
    """The independent judge of `prepare.real`: how positive a person would find a review."""
    from prepare.real import judge  # its libraries take seconds to import

    prompts = [sample["prompt"] for sample in samples]
    ours = judge(prompts, [sample["response"] for sample in samples])
    theirs = judge(prompts, [sample["reference"] for sample in samples])
    return against_references(samples, ours, theirs)


# ── What is kept of a run ─────────────────────────────────────────────────────────────────────────


def samples_drawn(script: str, flags: SimpleNamespace, steps: int) -> int:
    """Responses that a script has sampled to train on after so many steps.

    Each of them is scored by the reward model once, and `dpo.py --pairs dataset` draws none.
    """
    prompts, per_prompt = flags.prompts_per_step, flags.samples_per_prompt
    if script == "dpo" and flags.pairs == "dataset":
        return 0
    if script == "bond":
        per_prompt += flags.anchor_samples
    tests = script == "gdc" and flags.proposal == "adaptive" and steps // flags.test_every
    return prompts * per_prompt * (steps + tests)


def read_run(folder: Path, judge: Judge | None, keep: tuple[str, ...] = ()) -> dict:
    """What a line says of a run but for how it was planned and where it ran; `keep` names metrics
    of the log that its curve is to have as well."""
    script, flags = read_about(str(folder))
    about = json.loads((folder / "args.json").read_text())
    log, curve, groups = read_lines(folder / "metrics.jsonl"), [], {}
    for sample in read_lines(folder / "samples.jsonl"):
        groups.setdefault(sample["step"], []).append(sample)
    for line in log:
        if "eval/reward" not in line:
            continue
        point = {name: line[f"eval/{name}"] for name in OF_AN_EVALUATION if f"eval/{name}" in line}
        point |= {name: line[name] for name in keep if name in line}
        point |= judge(groups[line["step"]]) if judge else {}
        rounded = {name: float(f"{value:.5g}") for name, value in point.items()}
        curve.append({"step": line["step"]} | rounded)
    seconds = sum(line.get(phase, 0) for line in log for phase in PHASES)
    return {
        "commit": about["commit"],
        "versions": about["versions"],
        "device": about["device"],
        "seconds": round(seconds, 2),
        "samples": samples_drawn(script, flags, log[-1]["step"]),
        "curve": curve,
    }


def read_results(path: Path) -> list[dict]:
    """The lines of a file of raw lines, none if it is not there; of a command the last."""
    lines = read_lines(path) if path.exists() else []
    return list({line["command"]: line for line in lines}.values())


# ── Running ───────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A run under way."""

    def __init__(self, run: Planned, before: list[str], threads: int):
        self.run, self.threads, self.began = run, threads, time.monotonic()
        self.place = tempfile.TemporaryDirectory()
        self.folder, self.errors = Path(self.place.name, "run"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*before, sys.executable, *run.words, "--run-dir", str(self.folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches this process only, which ends the group
        )

    def ended(self) -> bool:
        """Whether it has ended; if so, `code` and `cpu_seconds` say how."""
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = used.ru_utime + used.ru_stime
        return bool(pid)

    def line(self, judge: Judge | None, keep: tuple[str, ...]) -> dict:
        """Its raw line."""
        run = self.run
        line = {"label": run.label, "script": run.script, "flags": run.flags, "seed": run.seed}
        line |= {"command": run.command} | read_run(self.folder, judge, keep)
        line |= {"cpu_seconds": round(self.cpu_seconds, 1)}
        return line | {"cores": os.cpu_count(), "threads": self.threads}

    def why(self) -> str:
        """The last words of a run that failed."""
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or [""]
        return f"{self.run.command} ended with {self.code}: {said[-1]}"

    def drop(self) -> None:
        """Ends it, and removes what it left."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()
        self.place.cleanup()


def left(times: list[float], count: int, jobs: int) -> str:
    """How long `count` runs will take, in words, from how long some took."""
    if not times:
        return "time left unknown"
    return f"about {statistics.mean(times) * count / jobs / 60:.0f} min left"


def sweep(
    runs: list[Planned],
    path: Path,
    judge: Judge | None = None,
    jobs: int = 0,
    before: str = "",
    keep: tuple[str, ...] = (),
) -> list[dict]:
    """Makes the runs that have no line in `path` yet, and returns the lines of all, in order.

    `jobs` at a time, 0 for one per core, which share the cores. `before` is put before each
    command, as `nice -n 10`. `keep` names metrics of the log that a line's curve is to have.
    """
    known = {line["command"] for line in read_results(path)}
    waiting = [run for run in runs if run.command not in known]
    jobs, cores = jobs or os.cpu_count(), os.cpu_count()
    running, failed, times = [], [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", flush=True)
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs))
                running.append(Process(waiting.pop(0), shlex.split(before), threads))
            time.sleep(0.1)
            for process in [process for process in running if process.ended()]:
                times.append(time.monotonic() - process.began)
                if process.code == 0:
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(process.line(judge, keep)) + "\n")
                else:
                    failed.append(process.why())
                    print(failed[-1], flush=True)
                running.remove(process)
                process.drop()
                count = len(waiting) + len(running)
                done = f"{len(runs) - count - len(failed)} of {len(runs)} runs"
                say = [done, left(times, count, jobs), process.run.command]
                print("; ".join(say), flush=True)
    except KeyboardInterrupt:
        dropped = f"{len(running)} under way are dropped"
        print(f"stopped; {dropped}, the finished ones are in {path}: run it again to go on")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, usual)
        for process in running:
            process.drop()
    if failed:
        raise SystemExit(f"error: {len(failed)} runs failed: {'; '.join(failed)}")
    found = {line["command"]: line for line in read_results(path)}
    return [found[run.command] for run in runs]
