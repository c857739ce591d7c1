"""How the time and the memory of a brain.py step grow, one size at a time.

    python -m benchmarks.growth [--sizes n prompt …]

Each point is a fresh process: three steps of benchmarks/online_step.py's after one that does not
count, the median of each phase, and the peak memory less that of weights, gradients, moments and
imports. A line per point goes to benchmarks/results/growth.jsonl.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass

import transformers
import tyro

from benchmarks.online_step import PHASES, our_step
from benchmarks.side_by_side import make_module, peak_memory
from benchmarks.where import ROOT, add

BASE = {
    "n": 8,
    "prompt": 256,
    "response": 48,
    "count": 2,
    "vocabulary": 8_000,
    "width": 256,
    "layers": 4,
}
POINTS = {
    "n": (1, 2, 4, 8, 16, 32, 64),
    "prompt": (64, 128, 256, 512, 1024),
    "response": (16, 32, 64, 128, 256),
    "count": (1, 2, 4, 8),
    "vocabulary": (8_000, 32_000, 75_000, 150_000),
    "width": (128, 256, 512, 1024),
}


@dataclass
class Args:
    sizes: tuple[str, ...] = tuple(POINTS)
    """sizes to vary: n (samples per prompt), prompt, response (tokens), count (prompts), …"""
    point: str = ""
    """measure one point, given as JSON, in this process, and print it"""


def weights(module: transformers.PreTrainedModel) -> int:
    """How many a model has."""
    return sum(weight.numel() for weight in module.parameters())


def measure(point: dict) -> dict:
    """Seconds of a step and its phases, and MiB beside the models, at one point."""
    shape = dict(point)
    main = [shape.pop(name) for name in ("prompt", "response", "n")]
    made, times = [], []

    def make():
        made.append(our_step(*main, **shape))
        return lambda: times.append(made[0]())

    peak = peak_memory(make, steps=4)
    shape.pop("count")
    policy = weights(make_module(**shape))
    reward_model = weights(make_module(transformers.LlamaForSequenceClassification, **shape))
    # The policy with gradients and two moments, reference and proposal; and the reward model.
    models = 4 * (6 * policy + reward_model) / 2**20
    phases = {
        f"{phase}_s": round(statistics.median(x[phase] for x in times[1:]), 4) for phase in PHASES
    }
    total = statistics.median(sum(x.values()) for x in times[1:])
    return {"step_s": round(total, 4)} | phases | {"beside_models_mib": round(peak - models)}


def main(args: Args) -> None:
    """Measures all points of the sizes asked for."""
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return
    for size in args.sizes:
        for value in POINTS[size]:
            point = BASE | {size: value}
            command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            add("growth", {"varied": size} | point | result)


if __name__ == "__main__":
    main(tyro.cli(Args))
