"""docs/reliability.md from the raw results of the fault campaign and of the long runs.

python -m analyze.reliability > docs/reliability.md
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

from analyze.differences import NAMES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
START = """# Reliability

What was done to the six scripts, and what came of it. Made by `python -m analyze.reliability`
from `benchmarks/results/faults.jsonl` and `long_run.jsonl`, which have every single fault with
its command, commit and machine. An empty cell has not been tried yet.

A run that was hit is continued with `--resume` and counts as **survived** only if it ends as the
unbroken run did: `metrics.jsonl` without gap or repetition and with the same numbers, the same
`samples.jsonl`, bit-equal weights in `final/` and bit-equal weights, moments and proposal or
anchor in `checkpoint/`, no other file more or less; and only if nothing half-written stood under
its true name before. Where a run must refuse to go on, it counts only if it did so in one line
that names folder, file or prompt, with exit code 2.
"""
TABLE = {
    "checkpoint cut": "checkpoint cut short, at 4 places",
    "checkpoint with one bit flipped": "checkpoint with one bit flipped, anywhere in its data",
}
LONG = (
    "resident MiB",
    "MiB per 1000 steps",
    "open files, first quarter",
    "open files, last quarter",
    "ms a step, first 100",
    "ms a step, last 100",
    "last / first",
)


def read(name: str) -> list[dict]:
    """The lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(head: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def name_of(line: dict) -> str:
    """The row that a fault belongs to."""
    fault = line["fault"]
    return next((TABLE[start] for start in TABLE if fault.startswith(start)), fault)


def counts(faults: list[dict]) -> list[list[object]]:
    """One row per fault, `survived of tried` per script."""
    tried, survived = defaultdict(Counter), defaultdict(Counter)
    for line in faults:
        name = name_of(line)
        tried[name][line["script"]] += 1
        survived[name][line["script"]] += line["survived"]
    return [
        [
            name,
            *(f"{survived[name][s]} of {tried[name][s]}" if tried[name][s] else "" for s in NAMES),
        ]
        for name in tried
    ]


def said(faults: list[dict]) -> list[list[object]]:
    """What the run says, once per fault."""
    lines = {}
    for fault in faults:
        line = (fault["seen"].get("line") or "").strip()
        if line and fault["script"] == "brain":
            lines.setdefault(name_of(fault), line)
    return [[name, f"`{line}`"] for name, line in lines.items()]


def commands(lines: list[dict]) -> str:
    """How the lines came to be, and where."""
    where = Counter(
        (x["commit"][:12], x["cores"], x["machine"], x["torch"], x["transformers"]) for x in lines
    )
    places = "; ".join(
        f"commit {commit}, {cores} cores {machine}, torch {torch}, transformers {hf}"
        for commit, cores, machine, torch, hf in where
    )
    return (
        "```\n"
        + "".join(f"{x}\n" for x in dict.fromkeys(x["command"] for x in lines))
        + f"```\n\n({places}; where other work on the machine cut a command short, a "
        "further one made up for it)\n"
    )


def main() -> None:
    """Prints the page."""
    faults, long = read("faults.jsonl"), read("long_run.jsonl")
    data = [x for x in faults if x["fault"] == "hostile data files"]
    kills = [x for x in faults if x["command"].split("--faults ")[-1].split()[0] == "kills"]
    rest = [x for x in faults if x not in kills and x not in data]
    lost = [x for x in faults if not x["survived"]]
    head = ["fault", *(f"`{name}.py`" for name in NAMES)]
    print(START)
    print(
        f"Faults tried: **{len(faults)}**, survived: **{len(faults) - len(lost)}**, lost: "
        f"**{len(lost) or 'nothing'}**. Beside these, {data[0]['seen']['inputs']:,} hostile data "
        "files.\n"
    )
    for line in lost:
        print(f"* LOST: `{line['script']}.py`, {line['fault']}: {line['problems']}")
    print("## Kills\n")
    early = sum(x["seen"]["checkpoint"] is False for x in kills)
    print(
        f"{len(kills)} kills, {early} of them before the first checkpoint. A signal at a random "
        "instant of the whole process, set-up and end included; or aimed: sent within 10 ms of "
        "the moment at which the new checkpoint, or `final/`, began to be written, and counted "
        "only if the half-written file was left behind.\n"
    )
    print(table(head, counts(kills)))
    print(commands(kills))
    print("## Disks, files, processes, clocks, numbers\n")
    print(
        "The disk is a small tmpfs that is filled just before the write. A folder without the "
        "right to write is met by a process that, if it is root's, has given up root's right to "
        "write everywhere. Bad numbers come in step 5 of 10: where they stop the run, the "
        "checkpoint of step 4 is kept and continues bit-equal.\n"
    )
    print(table(head, counts(rest)))
    print("What a run says (`brain.py`; `…` is the folder):\n")
    print(table(["fault", "line"], said(rest)))
    print(commands(rest))
    print("## Hostile data\n")
    print(
        "`.jsonl` files of good rows, some of which were spoiled: wrong types, nulls, missing, "
        "unknown and repeated columns, control characters, half surrogate pairs, invalid UTF-8, "
        "strings of 1 MB, up to 100,000 levels of nesting, lines cut or mixed with bytes of "
        "chance, messages without role or content, roles that the template refuses. Each must "
        "end in prompts, with every row accounted for, or in one line, exit code 2, that names "
        "`--dataset` and the file. No traceback.\n"
    )
    print(table(["outcome", "files"], [[k, f"{v:,}"] for x in data for k, v in x["seen"].items()]))
    print(commands(data))
    print("## Long runs\n")
    print(
        "Memory and open files were looked at from outside, ten times a second; the slope leaves "
        "out the first tenth of the steps. Milliseconds are medians of the runs' own times: of "
        "the last 100 steps, and of the first 100 of a fresh run started beside them, as the "
        "speed of a shared machine changes within a minute.\n"
    )
    print(
        table(
            ["script", "steps", *LONG],
            [[f"`{x['script']}.py`", f"{x['steps']:,}", *(x[key] for key in LONG)] for x in long],
        )
    )
    print(commands(long))
    print("## In CI\n")
    print(
        "`pytest tests/test_faults.py tests/test_fuzz.py tests/test_properties.py "
        "tests/test_security.py` runs a short form of each.\n"
    )
    print("## Not tried\n")
    print(
        "A power cut (files are flushed to the disk before they are renamed, but no disk was "
        "unplugged), a GPU that fails, faults of runs on several processes, network file "
        "systems. A NaN that arises inside the model, behind the log-probs, is found in the "
        "gradient's norm: the run stops before the update and names the step, not the prompt."
    )


if __name__ == "__main__":
    main()
