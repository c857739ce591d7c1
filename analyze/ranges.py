"""Which values the metrics of a default run have: the tables of docs/<method>.md.

    python -m analyze.ranges --script brain                  # prints the table from the raw lines
    python -m analyze.ranges --script brain --run 1 2 3      # runs these seeds first, a line each
    python -m analyze.ranges --read runs/…                   # the same of a finished run

A raw line, in analyze/results/ranges.jsonl, is a run of a script as it is, without flags but for
the seed and how often it evaluates: of every metric its value at the first line of the log that
has it, its mean over each tenth of the run, and its least and largest value after step 10. Times,
speed and memory depend on the machine and are left out; so is the step size.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from analyze.tables import ROOT, table
from benchmarks import fresh, where
from plumbing.report import read_lines

RESULTS = ROOT / "analyze" / "results"
LEFT_OUT = ("step", "time/", "tokens_per_s", "memory/", "optim/lr")
TENTHS = 10
FIRST, SECOND, LAST, SINGLE = (
    "first",
    "steps 11 to 20",
    "steps 91 to 100",
    "one step, from 11 on",
)


@dataclass
class Args:
    script: str = "brain"
    """script, without .py"""
    run: tuple[int, ...] = ()
    """seeds to run before the table is printed"""
    read: str = ""
    """folder of a finished run to take in before the table is printed"""


def digits(value: float) -> float:
    """The number with 4 significant digits."""
    return float(f"{value:.4g}")


def summary(lines: list[dict]) -> dict[str, dict]:
    """What a raw line keeps of a log, by metric."""
    keys = dict.fromkeys(key for line in lines for key in line)
    steps, found = lines[-1]["step"], {}
    for key in keys:
        if key.startswith(LEFT_OUT):
            continue
        values = [(line["step"], line[key]) for line in lines if key in line]
        tenths = [
            [value for step, value in values if i * steps < TENTHS * step <= (i + 1) * steps]
            for i in range(TENTHS)
        ]
        later = [value for step, value in values if step > steps // TENTHS]
        found[key] = {
            "first": digits(values[0][1]),
            "tenths": [digits(statistics.mean(part)) if part else None for part in tenths],
            "least": digits(min(later)),
            "most": digits(max(later)),
        }
    return found


def of_script(script: str) -> list[dict]:
    """Raw lines of a script, the last one per seed."""
    path = RESULTS / "ranges.jsonl"
    lines = read_lines(path) if path.exists() else []
    of_seed = {line["seed"]: line for line in lines if line["script"] == script}
    return [of_seed[seed] for seed in sorted(of_seed)]


def number(value: float | None) -> str:
    """Three digits; nothing for a window in which a metric was not logged."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def rows(script: str) -> str:
    """The table of a script: medians over the seeds; in the last column the extremes."""
    lines = of_script(script)
    cells = []
    for key in lines[0]["metrics"]:
        runs = [line["metrics"][key] for line in lines]

        def middle(values: list) -> str:
            return number(None if None in values else statistics.median(values))

        least, most = min(run["least"] for run in runs), max(run["most"] for run in runs)
        cells.append(
            [
                f"`{key}`",
                middle([run["first"] for run in runs]),
                middle([run["tenths"][1] for run in runs]),
                middle([run["tenths"][-1] for run in runs]),
                f"{number(least)} to {number(most)}",
            ]
        )
    return table(["metric", FIRST, SECOND, LAST, SINGLE], cells)


def of_folder(folder: Path) -> dict:
    """The raw line of a finished run, with the commit and the versions that the run was of."""
    about = json.loads((folder / "args.json").read_text())
    words = about["command"]
    words = words[: words.index("--run-dir")] if "--run-dir" in words else words
    line = {"command": " ".join(["python", *words]), "script": words[0].removesuffix(".py")}
    line |= {
        "seed": about["args"]["seed"],
        "metrics": summary(read_lines(folder / "metrics.jsonl")),
    }
    kept = {name: about["versions"][name] for name in ("torch", "transformers")}
    return line | where.about() | kept | {"commit": about["commit"]}


def main(args: Args) -> None:
    """Runs the seeds, if there are any, and prints the table."""
    if args.read:
        line = of_folder(Path(args.read))
        with open(RESULTS / "ranges.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        args.script = line["script"]
    for seed in args.run:
        command = [f"{args.script}.py", "--seed", str(seed)]
        with fresh.run(command) as run:
            metrics = summary(read_lines(run / "metrics.jsonl"))
        line = {"command": " ".join(["python", *command]), "script": args.script, "seed": seed}
        where.add("ranges", line | {"metrics": metrics}, RESULTS)
    print(rows(args.script))


if __name__ == "__main__":
    main(tyro.cli(Args))
