"""Ask the independent judge: how does the gold score of the tiny world see a run's samples?

    python -m prepare.gold RUN_FOLDER

Prints, for each evaluated step of RUN_FOLDER/samples.jsonl, how often the samples beat the
references (ties 1/2), by the gold score and by the reward model that the run trained on.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from prepare.tiny import gold_score


@dataclass
class Args:
    """Judge the samples of a run by the gold score."""

    run: tyro.conf.Positional[str]  # a run folder


def win(gap: float) -> float:
    """1 where the sample is ahead of the reference, 0 where it is behind, ½ for a tie."""
    return (gap > 0) + 0.5 * (gap == 0)


def main(args: Args) -> list[tuple[int, float, float, float]]:
    """Prints and returns, for each step: gold win rate, mean gold score, reward win rate."""
    steps: dict[int, list[tuple[float, float, float]]] = {}
    for line in (Path(args.run) / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        gold = gold_score(row["prompt"], row["response"])
        gap = gold - gold_score(row["prompt"], row["reference"])
        reward_gap = row["reward"] - row["reference_reward"]
        steps.setdefault(row["step"], []).append((win(gap), gold, win(reward_gap)))
    print("  step  gold win rate  gold score  reward win rate")
    table = [(s, *(sum(x) / len(x) for x in zip(*steps[s], strict=True))) for s in sorted(steps)]
    for step, gold_wins, gold, reward_wins in table:
        print(f"{step:6d}  {gold_wins:13.3f}  {gold:10.2f}  {reward_wins:15.3f}")
    return table


if __name__ == "__main__":
    main(tyro.cli(Args))
