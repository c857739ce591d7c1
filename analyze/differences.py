"""How many lines differ between any two scripts, outside their docstrings.

    python -m analyze.differences

A line that is changed counts once; docstrings are left out. Prints the README's table.
"""

import difflib

from analyze.tables import ROOT, table

NAMES = ["brain", "gdc", "dpo", "wind", "bond"]


def code(name: str) -> list[str]:
    """The lines of a script behind its docstring."""
    return (ROOT / f"{name}.py").read_text().split('"""', 2)[2].splitlines()


def differing_lines(first: str, second: str) -> int:
    """Lines that are not the same in both."""
    blocks = difflib.SequenceMatcher(None, code(first), code(second), False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def main() -> None:
    """Prints the table."""
    rows = []
    for place, first in enumerate(NAMES):
        cells = [differing_lines(first, second) for second in NAMES[place + 1 :]]
        rows.append([f"`{first}.py`", len(code(first)), *[""] * (place + 1), *cells])
    print(table(["", "lines", *(f"`{name}.py`" for name in NAMES)], rows))


if __name__ == "__main__":
    main()
