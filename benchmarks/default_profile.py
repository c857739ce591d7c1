"""Where the time of the default run's steps goes, by kind of operation.

    python -m benchmarks.default_profile [--script brain] [--steps 20]

Runs the script under torch's profiler and adds up the time each operation spends itself, without
those it calls. The wall clock is that of the steps and evaluations; what no operation accounts for
is Python. The profiler itself slows short operations and Python down. Adds a line to
benchmarks/results/default_profile.jsonl.
"""

import importlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch.profiler import ProfilerActivity, profile

import common
from benchmarks.where import add

KINDS = {  # names of operations, without what follows in _scaled_dot_product_…
    "matrix products": ("mm", "addmm", "bmm", "dot", "vdot"),
    "attention": ("_scaled_dot_product",),
    "views and new memory": (
        "as_strided",
        "view",
        "slice",
        "transpose",
        "t",
        "select",
        "reshape",
        "expand",
        "unsqueeze",
        "squeeze",
        "permute",
        "alias",
        "detach",
        "empty",
        "empty_strided",
        "empty_like",
        "resize_",
        "_unsafe_view",
        "split",
        "split_with_sizes",
        "narrow",
        "lift_fresh",
        "detach_",
        "to",
        "linear",
        "matmul",
        "is_nonzero",
        "item",
        "_local_scalar_dense",
        "result_type",
    ),
}


@dataclass
class Args:
    script: str = "brain"
    """script to run, without .py"""
    steps: int = 20
    """of the run, evaluated before and after"""


def kind_of(name: str) -> str:
    """Kind of an operation; `other arithmetic` is element-wise, sums, gathers and copies."""
    word = name.removeprefix("aten::")
    for kind, names in KINDS.items():
        if word in names or (kind == "attention" and word.startswith(names)):
            return kind
    return "other arithmetic" if name.startswith("aten::") else "autograd and the profiler"


def main(args: Args) -> None:
    """Profiles one run."""
    script, inner = importlib.import_module(args.script), common.evaluate
    profiled, moments = profile(activities=[ProfilerActivity.CPU]), []

    def evaluate(*inputs):
        if not moments:
            profiled.start()
            moments.append(time.perf_counter())
        result = inner(*inputs)
        if inputs[1] == args.steps:
            moments.append(time.perf_counter())
            profiled.stop()
        return result

    common.evaluate = evaluate
    with tempfile.TemporaryDirectory() as folder:
        script.main(
            script.Args(steps=args.steps, eval_every=args.steps, run_dir=str(Path(folder, "run")))
        )
    wall, seconds = moments[1] - moments[0], {}
    for event in profiled.events():
        kind = kind_of(event.name)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    shares = {kind: round(value / wall, 3) for kind, value in sorted(seconds.items())}
    add(
        "default_profile",
        {
            "script": args.script,
            "steps": args.steps,
            "wall_s": round(wall, 2),
            "shares": shares,
            "python": round(1 - sum(shares.values()), 3),
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
