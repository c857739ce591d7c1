"""From DPO to BRAIn in four commands: the ladder of docs/brain.md on the embedded default.

    python -m benchmarks.ladder [--seeds 1 2 3]

Every rung draws 128 responses per step. Adds a line per run to benchmarks/results/ladder.jsonl:
what the last evaluation and the gold score say.
"""

from dataclasses import dataclass

import tyro

from benchmarks import fresh
from benchmarks.where import add
from plumbing.report import read_lines
from prepare import gold

PAIRS = "--samples-per-prompt 2 --prompts-per-step 64"
RUNGS = {
    "DPO-sft": f"{PAIRS} --refresh-every 0 --estimator arg-max",
    "softmax": f"{PAIRS} --refresh-every 0",
    "more samples": "--refresh-every 0",
    "renewed proposal": "",
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of each rung per seed"""


def main(args: Args) -> None:
    """Runs all of them, one after the other."""
    for seed in args.seeds:
        for rung, flags in RUNGS.items():
            command = ["brain.py", *flags.split(), "--seed", str(seed)]
            with fresh.run(command) as run:
                last = read_lines(run / "metrics.jsonl")[-1]
                judged = gold.main(gold.Args(str(run)))[-1]
            line = {"rung": rung, "seed": seed, "command": " ".join(["python", *command])}
            for name in ("win_rate", "reward", "kl"):
                line[name] = round(last[f"eval/{name}"], 4)
            add("ladder", line | {"gold_win_rate": round(judged[1], 4)})


if __name__ == "__main__":
    main(tyro.cli(Args))
