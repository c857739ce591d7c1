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

FILES = ["common.py", *(f"plumbing/{name}.py" for name in ("data", "models", "cache", "run"))]
FILES.append("plumbing/report.py")
GROUPS = {  # who would miss it: what of the shared code, by file
    "who scores with an encoder as DeBERTa, or by a rule": {
        "common.py": ["_rewards_of_pairs", "_pairs_gap", "_rewards_by_function"],
    },
    "who brings a model that we have not seen: the check at load": {
        "common.py": ["_choose_rows", "_gap", "_alone", "_own_logits"],
    },
    "`ppo.py`, and who wants a value model of their own": {
        "common.py": ["token_values", "_token_values", "_by_response", "load_value_model"],
        "plumbing/models.py": ["load_critic"],
    },
    "who must choose τ, or doubts a number": {
        "common.py": ["say_effective_samples", "sampling_gap", "_say_input"],
    },
    "who has one card, and a model of 8B": {
        "plumbing/models.py": ["_add_adapters", "_merged", "_rounded", "_recompute"],
    },
    "who has a card at all": {
        "plumbing/models.py": ["frozen_copy", "_matrices_in_bfloat16", "_in_bfloat16"],
        "plumbing/cache.py": ["share_heads", "grouped_attention"],
    },
    "who has several cards": {"plumbing/models.py": ["shard", "_blocks", "gathered"]},
    "who has a chat model": {
        "plumbing/data.py": ["Layout", "encode_behind", "decode_behind", "_turns_of"],
    },
    "who has a data set with other columns": {"plumbing/data.py": ["_selected", "_renamed"]},
    "who reads `--help`, goes on with a run, or fills a disk": {
        "plumbing/run.py": ["_grouped", "read_checkpoint", "_replace", "_say_thread", "_say_known"],
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


def why() -> str:
    """Section on the length of the shared code."""
    sources = {path: path.read_text() for path in [ROOT / "common.py", *ROOT.glob("plumbing/*.py")]}
    code = {path: lines_of_code(source) for path, source in sources.items()}
    rows = []
    for who, files in GROUPS.items():
        count, names = 0, []
        for file, wanted in files.items():
            path = ROOT / file
            parts = [definitions(path)[name] for name in wanted]
            spans = [set(range(part.lineno, part.end_lineno + 1)) for part in parts]
            count += len(set().union(*spans) & code[path])
            names += [f"`{name}`" for name in wanted]
        rows.append([count, ", ".join(names), who])
    own = len(code[ROOT / "common.py"])
    budget = (ROOT / "tests" / "test_siblings.py").read_text()
    most = re.findall(r"\"code lines of .+\": (\d+),", budget)
    return (
        "\n## Why it is as long as it is\n\nIt was meant to have 500 lines of code in `common.py` "
        f"and 700 in `plumbing/`. It has {own} and {sum(map(len, code.values())) - own:,}; blank "
        f"lines, comments and docstrings do not count. `common.py` may have {most[0]} and "
        f"`plumbing/` {int(most[1]):,}: a test holds that. What one could leave out, and who would "
        "miss it:\n\n"
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
