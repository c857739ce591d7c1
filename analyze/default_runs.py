"""The default runs of the five scripts in a table, from benchmarks/results/default_run.jsonl.

    python -m analyze.default_runs

Medians over the seeds, and the least and the largest in brackets. Prints the README's table.
"""

import json
import statistics
from pathlib import Path

from analyze.differences import NAMES

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"first win_rate": "win rate before", "last win_rate": "after",
           "first gold_win_rate": "gold before", "last gold_win_rate": "after",
           "last kl": "KL, nats", "seconds": "seconds"}


def cell(values: list[float], digits: int) -> str:
    """Median (least to largest)."""
    least, middle, most = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({least} to {most})"


def main() -> None:
    """Prints the table."""
    lines = (ROOT / "benchmarks" / "results" / "default_run.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    print("| | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for name in NAMES:
        runs = [row for row in rows if row["command"].startswith(f"python {name}.py")]
        cells = [cell([run[key] for run in runs], 0 if key == "seconds" else 2) for key in COLUMNS]
        print(f"| `{name}.py` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
