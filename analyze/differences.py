"""How many lines differ between any two scripts, outside their docstrings.

    python -m analyze.differences

A line that is changed counts once; docstrings are left out. Prints the README's table.
"""

import difflib
from pathlib import Path

NAMES = ["brain", "gdc", "dpo", "wind", "bond"]


def code(name: str) -> list[str]:
    """The lines of a script behind its docstring."""
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    return path.read_text().split('"""', 2)[2].splitlines()


def differing_lines(first: str, second: str) -> int:
    """Lines that are not the same in both."""
    blocks = difflib.SequenceMatcher(None, code(first), code(second), False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def main() -> None:
    """Prints the table."""
    print("| | lines | " + " | ".join(f"`{name}.py`" for name in NAMES) + " |")
    print("|---|" + "---|" * (len(NAMES) + 1))
    for first in NAMES:
        cells = [str(differing_lines(first, second)) if NAMES.index(first) < NAMES.index(second)
                 else "" for second in NAMES]
        print(f"| `{first}.py` | {len(code(first))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
