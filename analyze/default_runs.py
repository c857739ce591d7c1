"""The default runs of the six scripts in a table, from benchmarks/results/default_run.jsonl.

    python -m analyze.default_runs

Medians over the seeds, and the least and the largest in brackets. Prints the README's table.
"""

from analyze.differences import NAMES
from analyze.tables import median_and_range, read, table

COLUMNS = {
    "first win_rate": "win rate before",
    "last win_rate": "after",
    "first gold_win_rate": "gold before",
    "last gold_win_rate": "after",
    "last kl": "KL, nats",
    "seconds": "seconds",
}


def main() -> None:
    """Prints the table."""
    lines, rows = read("default_run", "command"), []
    for name in NAMES:
        runs = [line for line in lines if line["command"].startswith(f"python {name}.py")]
        cells = [
            median_and_range([run[key] for run in runs], 0 if key == "seconds" else 2)
            for key in COLUMNS
        ]
        rows.append([f"`{name}.py`", *cells])
    print(table(["", *COLUMNS.values()], rows))


if __name__ == "__main__":
    main()
