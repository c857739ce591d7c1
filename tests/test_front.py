"""What is written in Markdown is true: links, commands, flags, counts, spelling, generated parts."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_siblings import BUDGETS, NAMES, SHARED_FILES

import common
from analyze import readme, shared_code
from plumbing.report import read_lines

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "assets/tiny/README.md"])
PAGES += [path for path in ROOT.glob(".github/*.md")]
LISTED = ROOT / "docs" / "commands.md"
WHO = ("CI", "CI, slow", "CI, real", "by hand")


def page_ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# ── links ──
def prose(text: str) -> str:
    """A page without its blocks of code, and without code in a line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found, blocks_out = [], re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.+)$", blocks_out, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def broken_links(path: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere, and the anchors that no heading makes."""
    broken = []
    for target in re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", prose(text)):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if not goal.exists() or not goal.is_relative_to(ROOT):
            broken.append(target)
        elif anchor and goal.suffix == ".md":
            there = text if goal == path else goal.read_text()
            broken += [target] * (anchor not in anchors(there))
    return broken


@pytest.mark.parametrize("path", PAGES, ids=page_ids(PAGES))
def test_every_link_and_anchor_leads_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_a_broken_link_is_found():
    text = "# A page (1)\n[a](#a-page-1) [b](#nowhere) [c](brain.py) [d](none.py) `[e](x)`\n"
    text += "```\n[f](y)\n# no heading\n```\n[g](docs/data.md#templates) [h](docs/data.md#none)"
    text += "[i](#no-heading)"
    broken = ["#nowhere", "none.py", "docs/data.md#none", "#no-heading"]
    assert broken_links(ROOT / "README.md", text) == broken


# ── commands ──
def commands_of(text: str) -> list[str]:
    """The commands of a page that start Python or pytest: lines of code blocks, and code in a line
    of prose."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", rest, re.M)
    blocks = "\n".join([*fenced, *indented]).splitlines()
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in [*blocks, *spans]:
        for part in re.split(r"\s*(?:&&|\||;|>)\s+", re.sub(r"\s#\s.*$", "", line)):
            part = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part.strip())
            if re.match(r"(python (-m )?[\w.]|torchrun |pytest\b)", part):
                found.append(part)
    return found


def literal_values(annotation: ast.AST) -> list | None:
    """The values of a Literal annotation, or None."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return [part.value for part in getattr(annotation.slice, "elts", [annotation.slice])]
    return None


def flags_of(source: str) -> dict[str, ast.AST | None]:
    """The flags that a file reads by tyro (class Args) or argparse, with their annotations."""
    flags = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = field.target.id.replace("_", "-")
                    flags[f"--{name}"] = field.annotation
                    if ast.unparse(field.annotation) == "bool":
                        flags[f"--no-{name}"] = None
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            texts = [x.value for x in node.args if isinstance(x, ast.Constant)]
            flags |= {text: None for text in texts if str(text).startswith("--")}
    return flags


def wrong_in(command: str) -> str:
    """What is wrong with a command: a file, module, flag or value that does not exist; or ''.

    `…`, and a word in capitals, stand for a value.
    """
    words = shlex.split(command.replace("[", " ").replace("]", " "))
    if words[0] == "pytest":
        files = [word.split("::")[0] for word in words if word.startswith("tests/")]
        return next((f"no file {x}" for x in files if "…" not in x and not (ROOT / x).exists()), "")
    if words[:3] == ["python", "-m", "pytest"]:
        return wrong_in(" ".join(words[2:]))
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, x in enumerate(words) if x.endswith(".py")) :]]
    if words[1] == "-m":
        name, words = words[2].replace(".", "/"), words[3:]
        if name.split("/")[0] not in ("analyze", "benchmarks", "prepare"):
            return "" if importlib.util.find_spec(name.split("/")[0]) else f"no module {name}"
        paths = [ROOT / f"{name}.py", ROOT / name / "__main__.py"]
    else:
        paths, words = [ROOT / words[1]], words[2:]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return f"no file {paths[0].relative_to(ROOT)}"
    if path.parent == ROOT / "tests" or "…" in path.name:
        return ""
    flags = flags_of(path.read_text())
    for word, value in zip(words, [*words[1:], "--"]):
        if not word.startswith("--"):
            continue
        word, _, own = word.partition("=")
        value, flag = own or value, word.replace("_", "-")
        if flag == "--help":
            continue
        if flag not in flags:
            return f"{path.relative_to(ROOT)} has no flag {flag}"
        values = literal_values(flags[flag]) if flags[flag] is not None else None
        if values and value not in values and "…" not in value and value != value.upper():
            return f"{flag} is one of {', '.join(values)}, not {value}"
    return ""


TODAY = [path for path in PAGES if path.name != "CHANGELOG.md"]  # which tells of what was


@pytest.mark.parametrize("path", TODAY, ids=page_ids(TODAY))
def test_commands_name_files_and_flags_that_exist(path):
    """A command that rotted is named with what is wrong."""
    found = {command: wrong_in(command) for command in commands_of(path.read_text())}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_a_rotten_command_is_found():
    text = (
        "`python brain.py --no-such 1` and\n\n```\npython -m analyze.none\npython -m analyze.plot "
    )
    text += (
        "runs/a \\\n    --beast-of 3\npython wind.py --risk none && python gdc.py --beta 1\n```\n"
    )
    text += "\n    torchrun --nproc-per-node 2 dpo.py --pair x  # two\n    pytest tests/none.py\n"
    text += (
        "`python wind.py --risk …`, `python wind.py --no-reward-eos`, `python -m analyze.plot RUN`"
    )
    wrong = [wrong_in(command) for command in commands_of(text)]
    assert [x for x in wrong if x] == [
        "no file analyze/none.py",
        "analyze/plot.py has no flag --beast-of",
        "--risk is one of square, kl, nce, not none",
        "dpo.py has no flag --pair",
        "no file tests/none.py",
        "brain.py has no flag --no-such",
    ]
    assert len(wrong) == 10


def test_commands_of_the_scripts_are_parsed():
    """Those of README without placeholders, by the parser that a run has."""
    count = 0
    for command in commands_of((ROOT / "README.md").read_text()):
        words = shlex.split(command)
        if words[0] == "python" and words[1].removesuffix(".py") in NAMES and "…" not in command:
            script = importlib.import_module(words[1].removesuffix(".py"))
            common.parse_args(script.Args, words[2:])
            count += 1
    assert count >= 2


def listed_commands() -> list[list[str]]:
    """The rows of docs/commands.md: command, who runs it, how long or by which test."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.+) \|$", LISTED.read_text(), re.M)
    return [[cell.strip() for cell in row] for row in rows]


def test_listed_commands_are_run_by_whom_the_list_says():
    """A command that CI runs stands in .ci/run or in the test that its row names."""
    rows, runner = listed_commands(), ROOT / ".ci" / "run"
    assert len(rows) > 30
    assert len({command for command, *_ in rows}) == len(rows)
    for command, who, how in rows:
        assert who in WHO, command
        assert wrong_in(command) == "" or not command.startswith(("python", "torchrun", "pytest"))
        for file, test in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", how):
            source = (ROOT / file).read_text()
            marks = re.search(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {test}\(", source, re.M)
            assert marks, f"{command}: {file} has no {test}"
            assert ("@pytest.mark.slow\n" in marks[1]) == (who == "CI, slow"), (command, test)
        if who == "by hand":
            assert re.search(r"\d", how) or "not measured" in how, f"{command}: how long?"
        elif "`tests/" not in how and runner.exists():
            script = Path(command.split()[-1]).stem
            assert "`.ci/run`" in how, command
            assert command in runner.read_text() or re.search(
                rf"\b{script}\b", runner.read_text()
            ), command


def target_of(command: str) -> str:
    """The file, module or tool that a command starts."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        return next(word for word in words if word.endswith(".py"))
    return words[2] if words[1:2] == ["-m"] else words[1] if words[0] == "python" else words[0]


def test_every_command_is_listed():
    """What a page says, and what can be started in analyze/, benchmarks/ and prepare/."""
    listed = {target_of(command) for command, *_ in listed_commands()}
    found = {target_of(x) for page in TODAY for x in commands_of(page.read_text())}
    for path in [x for folder in shared_code.FOLDERS for x in (ROOT / folder).glob("*.py")]:
        if '__name__ == "__main__"' in path.read_text():
            found.add(f"{path.parent.name}.{path.stem}")
    rows = [f"| `python -m {name}` | by hand | not measured |" for name in sorted(found - listed)]
    assert not rows, "add to docs/commands.md:\n" + "\n".join(rows)


# ── numbers ──
@pytest.mark.parametrize("name", ["README.md", "docs/shared_code.md"])
def test_generated_parts_are_up_to_date(name):
    """If this fails, run the command that it names and commit the page."""
    module = {"README.md": readme, "docs/shared_code.md": shared_code}[name]
    assert module.page() == (ROOT / name).read_text(), f"run `python -m {module.__name__}`"


def test_a_page_without_its_markers_is_an_error():
    page = "a <!-- x -->\n\nold\n\n<!-- /x --> b"
    assert readme.filled(page, {"x": "new"}) == "a <!-- x -->\n\nnew\n\n<!-- /x --> b"
    for wrong in ("a", page * 2, "<!-- x -->"):
        with pytest.raises(ValueError, match="must each occur once"):
            readme.filled(wrong, {"x": "new"})


def test_an_idea_has_at_most_ten_words_and_a_target_is_reached():
    """README calls a script exact; sibling tests show that each equation has a test."""
    assert list(readme.METHODS) == NAMES
    for name, (_, idea, _, _, status) in readme.METHODS.items():
        assert len(idea.split()) <= 10, name
        tests = (ROOT / "tests" / f"test_method_{name}.py").read_text()
        assert ("exact" in status) == bool(re.search(r"^def test_\w+_reaches_\w+\(", tests, re.M))


def test_claims_are_counted_in_the_pages():
    found = {name: readme.claims(name) for name in NAMES}
    for name, text in found.items():
        total, *parts = map(int, re.findall(r"\b(\d+)\b", text))
        assert total == sum(parts) >= 3, name


def test_who_calls_what_is_read_from_the_sources():
    found = shared_code.callers("common.py")
    assert found["say_effective_samples"] == ["`brain.py`", "`gdc.py`"]
    assert found["token_values"] == ["`ppo.py`"]
    assert found["_draw"] == ["`_draw_next`"]
    assert found["step_size"][0] == "all six"
    assert all(found.values())  # nothing that nobody calls


def test_trl_has_what_readme_says_of_it():
    """Names in the column on TRL, and the methods that it lacks, in the installed package."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("TRL comes with requirements-dev.txt")
    folder = Path(spec.origin).parent
    assert f"trl=={readme.TRL}" in (ROOT / "requirements-dev.txt").read_text()
    sources = {path: path.read_text() for path in folder.rglob("*.py")}
    files = [path.name for path in [*sources, *folder.rglob("*.yaml")]]
    everything = "\n".join(sources.values())
    for _, _, theirs in readme.FEATURES:
        for name in re.findall(r"`([\w.]+)`", theirs.replace("trl.experimental", "experimental")):
            assert name in files or re.search(rf"\b{name}\b", everything), name
    for name in ("brain", "gdc", "wind", "bond", "ppo"):
        assert f"{name}_trainer.py" not in files
    losses = (
        sources[folder / "trainer" / "dpo_config.py"]
        .split("Possible values are:")[1]
        .split("If multiple")[0]
    )
    assert len(re.findall(r"`'\w+'`", losses)) == readme.DPO_LOSSES
    assert (
        len(sources[folder / "trainer" / "dpo_trainer.py"].splitlines()) == readme.DPO_TRAINER_LINES
    )


def test_budgets_that_are_quoted_are_those_that_tests_hold():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    most = {
        name.replace(" ", "_").replace("/", "").replace(".", "_"): x for name, x in BUDGETS.items()
    }
    for sentence in (
        "at most {lines_of_a_script} lines (`ppo.py` {lines_of_ppo_py})",
        "its docstring takes at most {lines_of_a_docstring}.",
        "at most {differing_lines} differing lines, with `ppo.py` {differing_lines_of_ppo_py},",
        "at most {tokens_per_line} tokens on average",
        "at most {lines_of_a_function} lines.",
    ):
        assert sentence.format(**most) in text
    shared = (ROOT / "docs" / "shared_code.md").read_text()
    common, plumbing = BUDGETS["code lines of common.py"], BUDGETS["code lines of plumbing/"]
    assert f"It has {common} and {plumbing:,}, that is" in shared


def test_each_line_above_the_aims_has_a_reason():
    """What could be left out, and who would miss it, adds up to what is more than was meant; none
    of it is counted twice."""
    above = sum(shared_code.sizes().values()) - sum(shared_code.AIMS.values())
    assert sum(row[0] for row in shared_code.reasons()) >= above
    files = [file for group in shared_code.GROUPS.values() for file in group.items()]
    names = [(file, name) for file, wanted in files for name in wanted]
    assert len(names) == len(set(names))


def test_the_number_of_mutants_is_not_overstated():
    tree = ast.parse((ROOT / "tests" / "mutants.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (mutants,) = [x.value for x in assigned if ast.unparse(x.targets[0]) == "MUTANTS"]
    stated = re.search(r"more than (\d+) small faults", (ROOT / "README.md").read_text())
    assert len(mutants.elts) > int(stated[1])


# ── the tour ──
def test_what_the_tour_pastes_prints_what_it_says(capsys):
    """Its blocks of Python, one after the other, and the blocks that show the output."""
    page = (ROOT / "docs" / "tour.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    shown = re.findall(r"^```\n((?:weights|without) .*?)^```$", page, re.M | re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and capsys.readouterr().out == "".join(shown)


def test_runs_that_are_quoted_are_those_of_the_raw_lines():
    """The tour's table and the lines of the default run, in README and in the tour."""
    lines = read_lines(ROOT / "analyze" / "results" / "tour.jsonl")
    found = {(line["run"], line["step"]): line for line in lines}
    tour, first = (ROOT / "docs" / "tour.md").read_text(), (ROOT / "README.md").read_text()
    for run in ("default", "fixed", "no-baseline"):
        end = found[run, 100]
        assert f"| `runs/{run}` | {end['eval/win_rate']:.2f} | {end['eval/kl']:.2f} |" in tour
    ours, gdc = found["default", 100], found["gdc", 100]
    assert (
        f"`gdc.py` is at a win rate of {gdc['eval/win_rate']:.2f} and a KL of {gdc['eval/kl']:.2f}, "
        f"`brain.py` at {ours['eval/win_rate']:.2f} and {ours['eval/kl']:.2f}"
    ) in " ".join(tour.split())
    renewed = found["no-baseline, renewed", 100]["eval/win_rate"]
    assert f"ends at a win rate of {renewed:.2f}" in " ".join(tour.split())
    for page in (tour, first):
        for step, *numbers in re.findall(
            r"^step +(\d+) .*eval/reward (\S+)  eval/kl (\S+)  eval/win_rate (\S+)$", page, re.M
        ):
            line = found["default", int(step)]
            values = [line[f"eval/{key}"] for key in ("reward", "kl", "win_rate")]
            assert numbers == [f"{value:.3f}" for value in values], step


# ── form ──
def test_versions_of_changelog_and_citation_agree():
    """The newest version of the changelog is the one to cite; each says if metrics stay comparable."""
    log = (ROOT / "CHANGELOG.md").read_text()
    sections = re.split(r"^## ", log, flags=re.M)[1:]
    titles = [section.splitlines()[0] for section in sections]
    versions = [re.match(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", x) for x in titles]
    assert titles[0] == "Unreleased" and all(versions[1:]) and len(versions) > 3
    numbers = [(tuple(map(int, x.groups()[:3])), x[4]) for x in versions[1:]]
    assert numbers == sorted(numbers, reverse=True)
    for section in sections:
        assert re.search(r"comparable|Metrics|metrics", section), section[:40]
    cited = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert {"cff-version", "message", "title"} <= set(cited) and cited["license"] == "MIT"
    assert titles[1] == f"{cited['version']} ({cited['date-released']})"


def test_spelling():
    """codespell on all text and code that git knows; words it need not know are in pyproject.toml."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["codespell"]
    assert "nce" in settings["ignore-words-list"].split(",")
    ends = (".md", ".py", ".txt", ".toml", ".cff", ".cpp", "run")
    files = [file for file in listed.stdout.split() if file.endswith(ends)]
    assert len(files) > 100
    command = [sys.executable, "-m", "codespell_lib", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


def test_no_place_of_one_machine_is_named():
    """No absolute path below /tmp, /home, /root or /work, in text or code."""
    for path in [*PAGES, *ROOT.glob("*.py"), *SHARED_FILES, *ROOT.glob("analyze/*.py")]:
        places = re.findall(r"(?<![\w.…])/(?:tmp|home|root|work)/\w+", path.read_text())
        assert not places, (path.name, places)
