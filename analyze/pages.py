"""The generated parts of docs/<method>.md: tables from raw lines, and the diffs of the exercises.

    python -m analyze.pages

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`: `runs` and `ranges` are from
analyze/results/ranges.jsonl, `lessons` and `observations` from benchmarks/results/lessons.jsonl,
and `brain-1` shows docs/exercises/brain-1.diff. What stands around them is written by hand.
"""

import statistics
from pathlib import Path

from analyze import ranges, readme
from analyze.differences import NAMES
from analyze.tables import ROOT, read, table
from benchmarks.lessons import EXERCISES, LESSONS, WHOLE, exercises, flags_of

SHOWN = [
    "eval/win_rate",
    "eval/kl",
    "kl/ref",
    "kl/sampling_gap",
    "entropy/token",
    "optim/grad_norm",
]
OWN = {  # metrics that only this script has
    "brain": ["weights/ess"],
    "gdc": ["weights/ess", "gdc/kl_proposal", "gdc/kl_policy", "gdc/replaced"],
    "dpo": ["dpo/accuracy", "logprob/chosen", "logprob/rejected"],
    "wind": ["wind/psi_std", "wind/win_rate_std"],
    "bond": ["bond/penalised", "bond/kl_anchor"],
    "ppo": ["ppo/kl_old", "ppo/value_error"],
}


def runs(script: str) -> str:
    """The default runs that the ranges are of."""
    lines = ranges.of_script(script)
    cells = []
    for line in lines:
        metrics = line["metrics"]
        ends = [
            f"{metrics[f'eval/{key}'][when]:.2f}"
            if when == "first"
            else f"{metrics[f'eval/{key}']['tenths'][-1]:.2f}"
            for key in ("win_rate", "reward", "kl")
            for when in ("first", "last")
        ]
        hardware = f"CPU, {line['cores']} cores ({line['machine']}), torch {line['torch']}"
        cells.append([f"`{line['command']}`", line["commit"][:7], hardware, *ends])
    head = ["command", "commit", "hardware", "win rate before", "after"]
    return table([*head, "reward before", "after", "KL, nats, before", "after"], cells)


def late(line: dict, key: str) -> str:
    """Mean of a metric over the last three tenths of a run."""
    parts = line["metrics"].get(key, {"tenths": []})["tenths"][-3:]
    values = [part for part in parts if part is not None]
    return ranges.number(statistics.mean(values) if values else None)


def compared(script: str, named: list[tuple[str, str]]) -> str:
    """A table of short runs, (name of the raw line, what the table calls it) each."""
    lines = {
        line["name"]: line for line in read("lessons", "script", "name") if line["script"] == script
    }
    keys = [*SHOWN, *OWN[script]]
    cells = [[shown, *(late(lines[name], key) for key in keys)] for name, shown in named]
    return table(["run", *(f"`{key}`" for key in keys)], cells)


def lessons(script: str) -> str:
    """A whole run and the broken ones."""
    named = [(WHOLE.name, "as it is")]
    for lesson in LESSONS[script]:
        how = [f"`{lesson.flags}`"] if lesson.flags else []
        how += [f"`{lesson.new}` for `{lesson.old}`"] if lesson.old else []
        named.append((lesson.name, f"**{lesson.name}**: {', '.join(how)}"))
    return compared(script, named)


def observations(script: str) -> str:
    """A whole run, and those with the diffs of the exercises."""
    named = [(WHOLE.name, "as it is")]
    for each in exercises(script):
        if isinstance(each, Path):
            named.append((each.stem, f"exercise {each.stem[-1]}"))
        else:
            named.append((each.name, f"`{each.flags}` without the diff"))
    return compared(script, named)


def exercise(diff: Path) -> str:
    """A diff, and how to try it."""
    name = diff.stem.split("-")[0]
    command = f"python {name}.py {flags_of(diff)}".strip()
    _, text = diff.read_text().split("\n", 1)
    lines = [
        f"    git apply docs/exercises/{diff.name} && {command}",
        "",
        "```diff",
        text.rstrip(),
        "```",
    ]
    return "\n".join(lines)


def filled(script: str) -> str:
    """docs/<script>.md with its generated parts made anew."""
    page = (ROOT / "docs" / f"{script}.md").read_text()
    parts = {"runs": runs(script), "ranges": ranges.rows(script), "lessons": lessons(script)}
    parts["observations"] = observations(script)
    for diff in sorted(EXERCISES.glob(f"{script}-*.diff")):
        parts[diff.stem] = exercise(diff)
    return readme.filled(page, parts)


def main() -> None:
    """Writes the six pages."""
    for script in NAMES:
        (ROOT / "docs" / f"{script}.md").write_text(filled(script))


if __name__ == "__main__":
    main()
