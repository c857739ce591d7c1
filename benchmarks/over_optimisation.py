"""What happens to the gold score when the reward model is optimised too hard.

    python -m benchmarks.over_optimisation

Runs `wind.py` without its KL term and for longer, and adds what the reward model and the gold score
say, a line per evaluation, to benchmarks/results/over_optimisation.jsonl.
"""

from benchmarks import fresh
from benchmarks.where import add
from plumbing.report import read_lines
from prepare import gold

COMMAND = "wind.py --beta 0 --lr 1e-3 --steps 400 --eval-every 40 --seed 1".split()


def main() -> None:
    """Runs, judges, writes."""
    with fresh.run(COMMAND, shown=True) as run:
        lines = read_lines(run / "metrics.jsonl")
        judged = {row[0]: row for row in gold.main(gold.Args(str(run)))}
    for line in lines:
        if "eval/reward" in line:
            _, gold_win_rate, gold_score, _ = judged[line["step"]]
            found = {
                "step": line["step"],
                "win_rate": line["eval/win_rate"],
                "kl": line["eval/kl"],
                "gold_win_rate": gold_win_rate,
                "gold_score": gold_score,
                "command": "python " + " ".join(COMMAND),
            }
            add("over_optimisation", found)


if __name__ == "__main__":
    main()
