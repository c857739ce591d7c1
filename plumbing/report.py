"""What a run tells about itself: args.json, the plot, the table of samples.

`run.py` calls it at the start and at the end of a run. It reads the run folder only, so that it can
be called on a finished run as well.
"""

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch

# Okabe and Ito's colours: readers who are colour-blind tell them apart.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.prop_cycle": f"cycler('color', {COLOURS})"}
PANELS = {
    "reward": ("reward/mean", "eval/reward"),
    "KL from the start model, nats": ("kl/ref", "eval/kl"),
    "win rate, accuracy": ("eval/win_rate", "eval/accuracy"),
    "tokens per response": ("length/mean", "eval/length"),
    "entropy, nats per token": ("entropy/token",),
    "loss": ("loss", "eval/loss"),
}


def about(run) -> dict:
    """The content of args.json: what one must know to make the run again."""
    import datasets
    import transformers

    command = ["git", "-C", str(run.script.resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    return {
        "script": run.script.name,
        "command": sys.argv,
        "args": asdict(run.args),
        "commit": commit,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "versions": {x.__name__: x.__version__ for x in (torch, transformers, datasets)},
    }


def read_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def show_samples(folder: Path, count: int = 3) -> None:
    """Prints what the policy answered to the first held-out prompts, before and after."""
    samples = read_lines(folder / "samples.jsonl")
    before = [sample for sample in samples if sample["step"] == samples[0]["step"]]
    after = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    for first, last in list(zip(before, after))[:count]:
        _show("prompt", first["prompt"])
        _show(f"before {first['reward']:+.2f}", first["response"])
        _show(f"after {last['reward']:+.2f}", last["response"])
        print()


def _show(label: str, text: str) -> None:
    print(textwrap.fill(f"{label:14}{text}", 100, subsequent_indent=" " * 14))


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple:
    """(figure, its axes in reading order), of `size` inches, in the style of all our pictures."""
    from matplotlib import figure, rc_context

    with rc_context(STYLE):
        drawn = figure.Figure(figsize=size, layout="constrained")
        return drawn, list(drawn.subplots(rows, columns, squeeze=False).flat)


def curve(axis, lines: list[dict], key: str, **style) -> None:
    """Draws a metric against the step, of the lines that have it, with a mark per evaluation."""
    steps = [line["step"] for line in lines if key in line]
    values = [line[key] for line in lines if key in line]
    axis.plot(steps, values, "o-" if key.startswith("eval") else "-", ms=4, **style)


def plot(folder: Path) -> None:
    """Draws plots/training.png from metrics.jsonl."""
    lines = read_lines(folder / "metrics.jsonl")
    figure, axes = panels(2, 3, (13, 6.5))
    for axis, (title, keys) in zip(axes, PANELS.items()):
        keys = [key for key in keys if any(key in line for line in lines)]
        for key in keys:
            curve(axis, lines, key)
        axis.set(title=title, xlabel="step", visible=bool(keys))
        axis.legend(axis.lines, keys)
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / "training.png", dpi=100)
