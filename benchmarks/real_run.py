"""Runs scripts on the real checkpoints of `python -m prepare.real`, as docs/real.md shows them.

    OMP_NUM_THREADS=1 python -m benchmarks.real_run [--runs brain "brain, LoRA" dpo "dpo, LoRA"]

Adds a line per evaluation to benchmarks/results/real_run.jsonl, with what the independent judge
thinks of the same samples, and the first pairs of samples before and after, in the order of the
file, to real_samples.jsonl. The data set's own completions are other people's words: left out.
"""

import resource
import shlex
import statistics
import time
from dataclasses import dataclass

import torch
import tyro

from benchmarks import fresh
from benchmarks.where import add
from plumbing.report import read_lines
from prepare.real import judge

SHARED = (
    "--policy assets/real/policy --reward-model assets/real/reward --dataset assets/real/data "
    "--prompts-per-step 8 --max-response-tokens 24 --eval-prompts 128"
)
RUNS = {
    "brain": f"brain.py {SHARED} --steps 40 --lr 1e-4 --beta 0.1 --refresh-every 4",
    "brain, LoRA": (
        f"brain.py {SHARED} --steps 20 --lr 1e-3 --beta 0.1 --refresh-every 4 --lora-rank 16"
    ),
    "dpo": f"dpo.py {SHARED} --steps 40 --lr 5e-5",
    "dpo, LoRA": f"dpo.py {SHARED} --steps 40 --lr 5e-4 --lora-rank 16",
}
SHOWN = 6  # pairs of samples


@dataclass
class Args:
    runs: tuple[str, ...] = tuple(RUNS)
    """names of runs, see RUNS"""


def main(args: Args) -> None:
    """Runs one after the other."""
    for name in args.runs:
        begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with fresh.run(shlex.split(RUNS[name]), shown=True) as run:
            seconds = time.perf_counter() - begin
            metrics, samples = read_lines(run / "metrics.jsonl"), read_lines(run / "samples.jsonl")
        about = {"run": name, "command": f"python {RUNS[name]}", "seconds": round(seconds)}
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        about["cpu_seconds"] = round(cpu)  # what a machine without other work would need
        about["threads"] = torch.get_num_threads()
        for line in metrics:
            if "eval/reward" in line:
                there = [sample for sample in samples if sample["step"] == line["step"]]
                add("real_run", about | line | judged(there))
        before, after = (
            [sample for sample in samples if sample["step"] == step][:SHOWN]
            for step in (0, metrics[-1]["step"])
        )
        for first, last in zip(before, after, strict=True):
            pair = {"run": name, "prompt": first["prompt"]}
            for when, sample in (("before", first), ("after", last)):
                pair |= {when: sample["response"], f"reward_{when}": round(sample["reward"], 2)}
            add("real_samples", pair)


def judged(samples: list[dict]) -> dict[str, float]:
    """The judge's mean rating of the samples, and how often it is above the data set's own."""
    prompts = [sample["prompt"] for sample in samples]
    ours = judge(prompts, [sample["response"] for sample in samples])
    theirs = judge(prompts, [sample["reference"] for sample in samples])
    wins = [float(mine > other) for mine, other in zip(ours, theirs, strict=True)]
    return {
        "judge/rating": statistics.mean(ours),
        "judge/rating_of_people": statistics.mean(theirs),
        "judge/win_rate": statistics.mean(wins),
    }


if __name__ == "__main__":
    main(tyro.cli(Args))
