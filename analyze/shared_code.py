"""Writes docs/shared_code.md: what common.py and plumbing/ hold, what for, and who calls it.

    python -m analyze.shared_code

All of it is read from the sources: the first sentence of each docstring, and the names that other
functions and files use. Of a class, the functions of its own file that make one are named.
"""

import ast
import re
from functools import cache
from pathlib import Path

from analyze.differences import NAMES
from analyze.tables import ROOT, one_line, table

FILES = [
    "common.py",
    *(f"plumbing/{name}.py" for name in ("data", "models", "check", "cache", "run")),
]
FILES.append("plumbing/report.py")
AIMS = {"common.py": 500, "plumbing/": 700}  # lines of code
GROUPS = {  # who would miss it: what of the shared code, by file
    "who brings a model that we have not seen: the check at load": {
        "common.py": ["_tried"],
        "plumbing/check.py": ["choose_rows", "_some_tokens", "_gap", "_alone", "_own_logits"],
    },
    "who has a chat model, or answers that SentencePiece would begin with a space": {
        "plumbing/data.py": ["Layout", "encode_behind", "decode_behind", "_turns_of"],
    },
    "who has several cards": {
        "plumbing/models.py": ["shard", "_blocks", "gathered"],
        "plumbing/run.py": ["Run._join_processes", "Run.average", "whole_weights"],
    },
    "who stops and goes on, reads `--help`, or fills a disk": {
        "plumbing/run.py": [
            "Run._listen",
            "Run._grow",
            "Run._lock",
            "Run._trim_logs",
            "read_checkpoint",
            "_grouped",
            "_replace",
            "_say_thread",
            "_say_known",
        ],
    },
    "who scores with an encoder as DeBERTa, or by a rule": {
        "common.py": ["_rewards_of_pairs", "_rewards_by_function"],
        "plumbing/check.py": ["require_single_texts"],
        "plumbing/models.py": ["is_function", "load_function"],
    },
    "who has one card, and a model of 8B": {
        "plumbing/models.py": ["_add_adapters", "_merged", "_rounded", "_recompute"],
    },
    "`ppo.py`, and who wants a value model of their own": {
        "common.py": ["token_values", "_token_values", "_by_response", "load_value_model"],
        "plumbing/models.py": ["load_critic"],
    },
    "who samples on a card: a decoding step launched as one": {
        "common.py": ["_make_step", "_static_step"],
        "plumbing/check.py": ["choose_graph"],
        "plumbing/cache.py": ["Recorded"],
    },
    "who has a card at all: types, and heads that share keys": {
        "plumbing/models.py": ["frozen_copy", "_matrices_in_bfloat16", "_in_bfloat16"],
        "plumbing/cache.py": ["share_heads", "grouped_attention"],
    },
    "who looks at the picture and the samples at the end": {
        "plumbing/report.py": ["show_samples", "_show", "panels", "curve", "plot"],
    },
    "who must choose τ, or doubts a number": {
        "common.py": ["say_effective_samples", "sampling_gap", "_say_input"],
    },
    "who has responses of many lengths: those that have ended leave": {
        "common.py": ["_leave"],
        "plumbing/cache.py": ["GrowingLayer.keep", "_kept"],
    },
    "who has a data set with other columns, or a transcript": {
        "plumbing/data.py": ["_selected", "_renamed", "_split_transcripts"],
    },
    "who has a vocabulary of 150,000 words": {"common.py": ["_read_in_chunks"]},
    "who has no card: products two to three times as fast": {
        "plumbing/models.py": ["TurnedLinear", "turn_products"],
    },
}
FOLDERS = ("prepare", "analyze", "benchmarks")
PAGE = ROOT / "docs" / "shared_code.md"
HEAD = """# What the shared code holds

Made by `python -m analyze.shared_code` from the sources. *Used by* names the scripts first ("all
six", where it is all of them), then the other functions of the same file, then other files and
folders. A name with an underscore is a helper of its own file.

To understand what a script computes, read the rows of `common.py`. Nothing in `plumbing/` changes
what is computed, but for `data.py`, which decides what a prompt's tokens are, and `models.py`,
which decides which weights are trained, and in which type.
"""


def definitions(path: Path) -> dict[str, ast.AST]:
    """Functions and classes at the top of a file, in its order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return {node.name: node for node in body if isinstance(node, kinds)}


@cache
def called_names(node: ast.AST) -> set[str]:
    """The names that a piece of code reads and does not bind; of a class, if it makes one."""
    parts = list(ast.walk(node))
    bound = {part.arg for part in parts if isinstance(part, ast.arg)}
    bound |= {x.id for x in parts if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    names = {part.id for part in parts if isinstance(part, ast.Name)} - bound
    calls = [part.func for part in parts if isinstance(part, ast.Call)]
    made = {call.id for call in calls if isinstance(call, ast.Name)}
    return {name for name in names if not name.lstrip("_")[0].isupper() or name in made}


@cache
def outside_names(path: Path) -> dict[str, set[str]]:
    """What a file takes from other modules: "" and the modules that it imports, by the name that
    it gives to them, each with the names that it takes from there."""
    tree = ast.parse(path.read_text())
    found, modules = {}, {}
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in part.names}
        if isinstance(part, ast.ImportFrom) and part.module:
            for alias in part.names:
                found.setdefault(part.module, set()).add(alias.name)
                modules[alias.asname or alias.name] = f"{part.module}.{alias.name}"
    for part in ast.walk(tree):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module = modules.get(part.value.id, "")
            found.setdefault(module, set()).add(part.attr)
    return found


def uses(path: Path, file: str) -> set[str]:
    """The names that the source at `path` takes from the module `file`.

    A script takes those of plumbing/ through common, which hands them on.
    """
    found = outside_names(path)
    module = file.removesuffix(".py").replace("/", ".")
    return found.get(module, set()) | found.get("common", set())


def callers(file: str) -> dict[str, list[str]]:
    """Who uses each function of a file."""
    own = definitions(ROOT / file)
    found = {name: [] for name in own}
    for name in own:
        by = [script for script in NAMES if name in uses(ROOT / f"{script}.py", file)]
        found[name] += ["all six"] if by == NAMES else [f"`{script}.py`" for script in by]
        inside = [other for other, node in own.items() if name in called_names(node)]
        found[name] += [f"`{other}`" for other in inside if other != name]
        others = [other for other in FILES if other != file]
        found[name] += [f"`{other}`" for other in others if name in uses(ROOT / other, file)]
        for folder in FOLDERS:
            if any(name in uses(path, file) for path in (ROOT / folder).rglob("*.py")):
                found[name].append(f"`{folder}/`")
    return found


def first_sentence(node: ast.AST) -> str:
    """Of a docstring; names of more than one word stay as they are."""
    text = one_line(ast.get_docstring(node) or "")
    return re.split(r"(?<=[.;:]) (?=[A-Z])", text)[0].rstrip(".:;")


def lines_of_code(source: str) -> set[int]:
    """The numbers of the lines that hold code: no blank line, comment or docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    numbered = enumerate(source.splitlines(), 1)
    return {n for n, line in numbered if line.strip() and line.strip()[0] != "#"} - docs


def part_of(path: Path, name: str) -> ast.AST:
    """A function or class at the top of a file, or CLASS.METHOD."""
    of, _, method = name.partition(".")
    found = definitions(path)[of]
    return {x.name: x for x in found.body if hasattr(x, "name")}[method] if method else found


def reasons() -> list[list]:
    """[lines of code, names, who would miss them] of each group."""
    rows = []
    for who, files in GROUPS.items():
        count, names = 0, []
        for file, wanted in files.items():
            path = ROOT / file
            parts = [part_of(path, name) for name in wanted]
            spans = [set(range(part.lineno, part.end_lineno + 1)) for part in parts]
            count += len(set().union(*spans) & lines_of_code(path.read_text()))
            names += [f"`{name}`" for name in wanted]
        rows.append([count, ", ".join(names), who])
    return sorted(rows, key=lambda row: -row[0])


def sizes() -> dict[str, int]:
    """Lines of code of common.py, and of plumbing/ in all."""
    files = {"common.py": [ROOT / "common.py"], "plumbing/": list(ROOT.glob("plumbing/*.py"))}
    return {
        name: sum(len(lines_of_code(path.read_text())) for path in paths)
        for name, paths in files.items()
    }


def why() -> str:
    """Section on the length of the shared code."""
    rows, now = reasons(), sizes()
    above = sum(now.values()) - sum(AIMS.values())
    return (
        "\n## Why it is as long as it is\n\nIt was meant to have "
        f"{AIMS['common.py']} lines of code in `common.py` and {AIMS['plumbing/']} in `plumbing/`. "
        f"It has {now['common.py']} and {now['plumbing/']:,}, that is {above} more; blank lines, "
        "comments and docstrings do not count. Each row below is a thing that one could leave out, "
        f"with who would miss it: {sum(row[0] for row in rows)} lines in all. A test holds that "
        "they explain every line above the aim, and that neither number grows.\n\n"
        + table(["lines", "functions", "who would miss them"], rows)
        + "\n\nA change that adds lines says here what for, or takes as many out.\n"
    )


def page() -> str:
    """The whole of docs/shared_code.md."""
    text = HEAD
    for file in FILES:
        about = first_sentence(ast.parse((ROOT / file).read_text()))
        who = callers(file)
        rows = [
            [f"`{name}`", first_sentence(node), ", ".join(who[name])]
            for name, node in definitions(ROOT / file).items()
        ]
        text += f"\n## {file}\n\n{about}.\n\n{table(['name', 'what for', 'used by'], rows)}\n"
    return text + why()


if __name__ == "__main__":
    PAGE.write_text(page())
