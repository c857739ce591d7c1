"""How many lines differ between any two scripts, outside their docstrings.

    python -m analyze.differences

A line that is changed counts once; docstrings are left out. Prints the README's table.
"""

import difflib

from analyze.tables import ROOT, table

NAMES = ["brain", "gdc", "dpo", "wind", "bond", "ppo"]


def code(name: str) -> list[str]:
    """The lines of a script behind its docstring."""
    return (ROOT / f"{name}.py").read_text().split('"""', 2)[2].splitlines()


def aligned(first: list[str], second: list[str]) -> difflib.SequenceMatcher:
    """The alignment of two lists of lines, in which no line is too common to count."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False)


def differing_lines(first: str, second: str) -> int:
    """Lines that are not the same in both."""
    count = 0
    opcodes = aligned(code(first), code(second)).get_opcodes()
    for tag, begin, end, other_begin, other_end in opcodes:
        if tag != "equal":
            count += max(end - begin, other_end - other_begin)
    return count


def main() -> None:
    """Prints the table."""
    rows = []
    for place, first in enumerate(NAMES):
        cells = [differing_lines(first, second) for second in NAMES[place + 1 :]]
        rows.append([f"`{first}.py`", len(code(first)), *[""] * (place + 1), *cells])
    print(table(["", "lines", *(f"`{name}.py`" for name in NAMES)], rows))


if __name__ == "__main__":
    main()
