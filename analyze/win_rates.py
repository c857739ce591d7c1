"""What `analyze.evaluate` writes: the table, the picture, the samples of all side by side."""

import json
from dataclasses import dataclass
from pathlib import Path

import common
from analyze.tables import one_line, table
from plumbing.report import COLOURS, panels

SHOWN = 8  # prompts in samples.md


@dataclass
class Answers:
    """One response per held-out prompt, by one model."""

    model: str
    decoding: str
    batch: common.Batch
    ended: float  # share of the responses
    kl: list[float] | None = None  # log π − log p of each, where these are samples
    kl_bound: float | None = None  # of the best of N


def text_of(source: str | list[dict]) -> str:
    """A prompt as a person reads it."""
    if isinstance(source, str):
        return source
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in source)


def with_range(value: dict[str, float] | None) -> str:
    """Value (low to high), or nothing."""
    if value is None:
        return ""
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def as_table(rows: list[dict]) -> str:
    """The rows of eval.json in Markdown."""
    by_verdict = any("position_bias" in row for row in rows)
    head = ["model", "decoding", "judge", "win rate", "length-controlled", "KL, nats", "tokens"]
    head += ["ended"] + ["position bias", "agreement", "unparsable"] * by_verdict
    lines = []
    for row in rows:
        bound = f"at most {row['kl_bound']:.2f}" if "kl_bound" in row else ""
        line = [row["model"], row["decoding"], row["judge"], with_range(row["win_rate"])]
        line += [with_range(row["length_controlled"]), with_range(row.get("kl")) or bound]
        line += [with_range(row["length"]), f"{row['ended']:.2f}"]
        for key in ("position_bias", "agreement", "unparsable") if by_verdict else ():
            line.append(f"{row[key]:.2f}" if key in row else "")
        lines.append(line)
    return table(head, lines)


def draw(rows: list[dict], path: Path) -> None:
    """Win rates with their intervals, by judge; and against the KL, where there is one."""
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    names = list(dict.fromkeys((row["model"], row["decoding"]) for row in rows))
    figure, (left, right) = panels(1, 2, (11, 2 + 0.4 * len(names)))
    for row in rows:
        place, colour = judges.index(row["judge"]), COLOURS[judges.index(row["judge"]) % 7]
        y = names.index((row["model"], row["decoding"])) + 0.15 * (place - (len(judges) - 1) / 2)
        style = {"color": colour, "fmt": "o", "ms": 5, "capsize": 2}
        rate = row["win_rate"]
        left.errorbar(rate["value"], y, xerr=bars(rate), **style)
        if "kl" in row:
            right.errorbar(row["kl"]["value"], rate["value"], bars(rate), bars(row["kl"]), **style)
        elif "kl_bound" in row:  # the arrow: the KL is this or less
            right.errorbar(row["kl_bound"], rate["value"], bars(rate), **style | {"fmt": "<"})
        if place == 0 and ("kl" in row or "kl_bound" in row):
            text = str(1 + names.index((row["model"], row["decoding"])))
            at = (row["kl"]["value"] if "kl" in row else row["kl_bound"], rate["high"])
            style = {"xytext": (2, 4), "textcoords": "offset points", "fontsize": 9}
            right.annotate(text, at, **style)
    for place, judge in enumerate(judges):
        left.plot([], [], "o", color=COLOURS[place % 7], label=f"by {judge[-30:]}")
    left.axvline(0.5, color="grey", lw=1)
    labels = [f"{', '.join(name)}  {number}" for number, name in enumerate(names, 1)]
    left.set_yticks(range(len(names)), labels)
    left.invert_yaxis()
    left.set(xlabel="win rate against the completions, with 95 % intervals", xlim=(-0.02, 1.02))
    left.legend(fontsize=9)
    right.set(xlabel="KL from the SFT model, nats (◂: at most)", ylabel="win rate")
    right.margins(x=0.2, y=0.25)  # room for the numbers
    figure.savefig(path, dpi=110)


def bars(value: dict[str, float]) -> list[list[float]]:
    """An interval as matplotlib wants it: how far it goes below and above the value."""
    return [[value["value"] - value["low"]], [value["high"] - value["value"]]]


def write_samples(out: Path, everyone: list[Answers], references, reader, dataset: str) -> None:
    """outputs.json, of all responses, and samples.md, of the first prompts side by side."""
    written = {f"{answers.model}, {answers.decoding}": answers.batch for answers in everyone}
    written = {
        name: reader(batch) for name, batch in ({"completion": references} | written).items()
    }
    sources = [text_of(prompt.source) for prompt in references.prompts]
    rows = [
        {"dataset": dataset, "instruction": source, "output": text, "generator": name}
        for name, texts in written.items()
        for source, text in zip(sources, texts)
    ]
    (out / "outputs.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    parts = []
    for place, source in enumerate(sources[:SHOWN]):
        rows = [[name, one_line(texts[place])] for name, texts in written.items()]
        parts.append(f"**{one_line(source)}**\n\n{table(['by', 'response'], rows)}\n")
    (out / "samples.md").write_text("\n".join(parts), encoding="utf-8")
