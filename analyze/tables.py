"""What the tables of the docs share: raw lines of results, and Markdown."""

import statistics
from pathlib import Path

from plumbing.report import read_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str, *keys: str) -> list[dict]:
    """Lines of a raw file, the last one for each combination of `keys`."""
    path = RESULTS / f"{name}.jsonl"
    lines = read_lines(path) if path.exists() else []
    return list({tuple(line[key] for key in keys): line for line in lines}.values())


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def one_line(text: str) -> str:
    """A text that fits into a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def median_and_range(values: list[float], digits: int) -> str:
    """Median (least to largest)."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
