"""Runs the chain sft -> reward -> method -> evaluate by the commands of docs/recipes.md.

    OMP_NUM_THREADS=1 python -m benchmarks.chain tiny|real [--links sft reward method evaluate]

Adds a line per command to analyze/results/recipes.jsonl as it ends: its wall time and the processor
time of all its threads, the evaluations of its log, the rows of its judges, and the first samples
before and after a method. What the samples are compared with is other people's words: left out.
Commands write into runs/: a link whose folder is there is refused, by the script itself.
"""

import json
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from analyze.tables import ROOT
from benchmarks.where import add
from plumbing.report import read_lines

CHAINS = {
    "tiny": {
        "prepare": "prepare.tiny --chain runs/tiny",
        "sft": (
            "prepare.sft --policy runs/tiny/start --dataset runs/tiny/data --prompts-per-step 48 "
            "--steps 600 --lr 5e-3 --warmup-steps 30 --weight-decay 0.01 --eval-every 100 "
            "--save-every 600 --run-dir runs/tiny/sft"
        ),
        "reward": (
            "prepare.reward --policy runs/tiny/sft/final --dataset runs/tiny/data "
            "--prompts-per-step 64 --steps 600 --lr 1.2e-3 --warmup-steps 30 --weight-decay 0.01 "
            "--eval-every 100 --save-every 600 --run-dir runs/tiny/reward"
        ),
        "method": (
            "brain.py --policy runs/tiny/sft/final --reward-model runs/tiny/reward/final "
            "--dataset runs/tiny/data --lr 1e-3 --run-dir runs/tiny/brain"
        ),
        "evaluate": "analyze.evaluate runs/tiny/brain --judge reward tiny --best-of 16",
    },
    "real": {
        "prepare": "prepare.real --parts base judge reviews pairs",
        "sft": (
            "prepare.sft --policy assets/real/base --dataset assets/real/reviews --template raw "
            "--prompts-per-step 16 --max-response-tokens 48 --steps 120 --lr 1e-4 "
            "--eval-prompts 128 --eval-every 60 --save-every 120 --run-dir runs/real/sft"
        ),
        "reward": (
            "prepare.reward --policy runs/real/sft/final --dataset assets/real/pairs "
            "--template raw --prompts-per-step 16 --max-response-tokens 32 --steps 100 --lr 5e-5 "
            "--center 0.01 --eval-prompts 256 --eval-every 50 --save-every 100 "
            "--run-dir runs/real/reward"
        ),
        "method": (
            "brain.py --policy runs/real/sft/final --reward-model runs/real/reward/final "
            "--dataset assets/real/reviews --template raw --prompts-per-step 8 "
            "--max-response-tokens 24 --steps 15 --lr 1e-4 --beta 0.1 --refresh-every 4 "
            "--eval-prompts 128 --eval-every 15 --save-every 15 --run-dir runs/real/brain"
        ),
        "evaluate": "analyze.evaluate runs/real/brain --judge prepare.real:judge",
    },
}
LINKS = ("sft", "reward", "method", "evaluate")
SHOWN = 5  # samples before and after


@dataclass
class Args:
    chain: tyro.conf.Positional[Literal["tiny", "real"]]
    """tiny: from random weights; real: SmolLM2-135M, once its `prepare` was run"""
    links: tuple[Literal["prepare", "sft", "reward", "method", "evaluate"], ...] = LINKS
    """commands to run"""


def words(command: str) -> list[str]:
    """What follows `python` in a command: a script by its file, the rest as modules."""
    script, *flags = shlex.split(command)
    return [script, *flags] if script.endswith(".py") else ["-m", script, *flags]


def run(command: str) -> dict:
    """Runs a command; returns its times."""
    begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words(command)], cwd=ROOT, check=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {
        "command": shlex.join(["python", *words(command)]),
        "seconds": round(time.perf_counter() - begin),
        "cpu_seconds": round(cpu),  # what a machine without other work would need on one core
        "threads": torch.get_num_threads(),
    }


def said(folder: Path) -> dict:
    """The evaluations of a run's log, and the first samples of the first and of the last."""
    lines = read_lines(folder / "metrics.jsonl")
    peak = max(line.get("memory/peak_gib", 0.0) for line in lines)
    keys = ("eval/", "time/")
    evaluations = [
        {key: value for key, value in line.items() if key == "step" or key.startswith(keys)}
        for line in lines
        if any(key.startswith("eval/") for key in line)
    ]
    return {"evaluations": evaluations, "memory/peak_gib": peak}


def samples(folder: Path) -> list[dict]:
    """The first samples before and after a method, with their rewards."""
    rows = read_lines(folder / "samples.jsonl")
    first, last = (
        [row for row in rows if row["step"] == step][:SHOWN]
        for step in (rows[0]["step"], rows[-1]["step"])
    )
    return [
        {"prompt": before["prompt"]}
        | {"before": before["response"], "reward_before": round(before["reward"], 2)}
        | {"after": after["response"], "reward_after": round(after["reward"], 2)}
        for before, after in zip(first, last, strict=True)
    ]


def main(args: Args) -> None:
    """Runs one command after the other."""
    for link in args.links:
        command = CHAINS[args.chain][link]
        line = {"chain": args.chain, "link": link} | run(command)
        if "--run-dir" in command:
            folder = ROOT / command.split("--run-dir ")[1]
            line |= said(folder)
            if link == "method":
                line["samples"] = samples(folder)
        if link == "evaluate":
            rows = json.loads((ROOT / command.split()[1] / "eval" / "eval.json").read_text())
            drop = ("wins", "score", "reference_score")
            line["results"] = [
                {key: value for key, value in row.items() if key not in drop}
                for row in rows["results"]
            ]
        add("recipes", line, ROOT / "analyze" / "results")


if __name__ == "__main__":
    main(tyro.cli(Args))
