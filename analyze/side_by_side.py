"""docs/side_by_side.html: any two of the six scripts in two aligned columns.

    python -m analyze.side_by_side     # a second; needs Pygments, of requirements-dev.txt

The page is one file without network: what follows from the scripts is put as JSON into the template
analyze/side_by_side.html, whose code draws the pair that is chosen. The alignment and the counts
are those of analyze.differences. To keep the page small, brain.py's lines are written once: of the
other scripts it holds only the lines that do not stand in brain.py as well.
"""

import html
import itertools
import json
import re
from pathlib import Path

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, Token

from analyze.differences import NAMES, aligned, code, differing_lines
from analyze.tables import ROOT

PAGE = ROOT / "docs" / "side_by_side.html"
TEMPLATE = Path(__file__).with_suffix(".html")
CLASSES = {  # of the page's style; what is not named keeps the colour of plain text
    Comment: "c",
    Keyword: "k",
    Operator.Word: "k",
    Name.Builtin: "b",
    Name.Class: "f",
    Name.Decorator: "f",
    Name.Function: "f",
    Number: "m",
    String: "s",
    String.Doc: "d",
}


def source(name: str) -> list[str]:
    """The lines of a script."""
    return (ROOT / f"{name}.py").read_text().splitlines()


def docstring_end(name: str) -> int:
    """The index of the line that closes a script's docstring: code() begins behind its quotes."""
    return len(source(name)) - len(code(name))


def highlighted(lines: list[str]) -> list[str]:
    """The lines as HTML, coloured by Pygments."""
    parts = []
    for kind, text in PythonLexer(stripnl=False).get_tokens("\n".join(lines)):
        while kind not in CLASSES and kind is not Token:
            kind = kind.parent
        for place, piece in enumerate(text.split("\n")):
            escaped = html.escape(piece, quote=False)
            coloured = kind in CLASSES and piece.strip()
            parts.append("\n" if place else "")
            parts.append(f"<i class={CLASSES[kind]}>{escaped}</i>" if coloured else escaped)
    return "".join(parts).split("\n")[: len(lines)]


def sections(name: str) -> list[list]:
    """[index of the first line, title] of each part of a script, in order."""
    found = [[0, "docstring"], [docstring_end(name) + 1, "imports"]]
    for index, line in enumerate(source(name)):
        if line == "@dataclass":
            found.append([index, "flags"])
        if line.startswith("def ") and found[-1][1] == "flags":
            found.append([index, "functions"])
        if line.startswith("def main"):
            found.append([index, "main"])
        if mark := re.fullmatch(r" *# ── (.+) ──", line):
            found.append([index, mark[1]])
    return found


def equations(name: str) -> dict[str, list]:
    """By its number, [index of the line, text] of each equation in a script's docstring.

    A numbered line is indented and ends with its number; lines right above it that are indented
    too, and have no number, belong to it.
    """
    found, before = {}, []
    for index, line in enumerate(source(name)[: docstring_end(name)]):
        numbered = re.fullmatch(r" {4}(.+?) +\((\d|T)\)", line)
        if numbered:
            found[numbered[2]] = [index, "\n".join([*before, numbered[1].strip()])]
        before = [*before, line.strip()] if line.startswith("    ") and not numbered else []
    return found


def tags(name: str) -> dict[int, str]:
    """The number of the equation that a line computes, by the line's index."""
    marks = [re.search(r"# \((\d)\)$", line) for line in source(name)]
    return {index: mark[1] for index, mark in enumerate(marks) if mark}


def same_lines(first: str, second: str) -> list[list[int]]:
    """[index in the first, index in the second, count] of the runs of lines that are the same."""
    ends = docstring_end(first), docstring_end(second)
    docstrings = source(first)[: ends[0]], source(second)[: ends[1]]
    runs = [list(run) for run in aligned(*docstrings).get_matching_blocks()]
    for begin, other, count in aligned(code(first), code(second)).get_matching_blocks():
        runs.append([begin + ends[0], other + ends[1], count])
    return [run for run in runs if run[2]]


def own_lines(name: str) -> list[str]:
    """A script's highlighted lines, for all but the first only those which that one lacks."""
    lines = highlighted(source(name))
    if name != NAMES[0]:
        first = highlighted(source(NAMES[0]))
        for begin, other, count in same_lines(NAMES[0], name):
            assert lines[other : other + count] == first[begin : begin + count]
            lines[other : other + count] = [None] * count
    return [line for line in lines if line is not None]


def facts() -> dict:
    """What the page must know besides the lines."""
    scripts, pairs = {}, {}
    for name in NAMES:
        scripts[name] = {
            "title": source(name)[0].strip('"').partition(":")[0],
            "lines": len(source(name)),
            "sections": sections(name),
            "equations": equations(name),
            "tags": tags(name),
        }
    for first, second in itertools.combinations(NAMES, 2):
        pairs[f"{first} {second}"] = {
            "differing": differing_lines(first, second),
            "same": same_lines(first, second),
        }
    return {"scripts": scripts, "pairs": pairs}


def page() -> str:
    """The page's text."""
    found = json.dumps(facts(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    blocks = [f'<script type="application/json" id="facts">{found}</script>']
    for name in NAMES:
        lines = "\n".join(own_lines(name))
        blocks.append(f'<script type="text/plain" id="{name}">{lines}</script>')
    return TEMPLATE.read_text().replace("{{ data }}", "\n".join(blocks))


def main() -> None:
    """Writes the page."""
    text = page()
    PAGE.write_text(text)
    print(f"{PAGE.relative_to(ROOT)}: {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
