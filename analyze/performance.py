"""Writes docs/performance.md and docs/step_time.png from the raw files of the benchmarks.

    python -m analyze.performance

Of several lines of one measurement the last counts: a benchmark that is run again adds its lines.
"""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PHASES = ("sample", "score", "log-probs", "update")
PEERS = {"grpo": "GRPOTrainer", "online_dpo": "OnlineDPOTrainer"}
GROWTH = {"n": "N, samples a prompt", "prompt": "L, prompt tokens",
          "response": "T, response tokens", "count": "P, prompts", "vocabulary": "V, vocabulary",
          "width": "D, width of the model"}
MEMORY = "peak memory, ours / {}, MiB"
HEAD = """# Performance

Made by `python -m analyze.performance` from the raw files in `benchmarks/results/`; every section
names the command that made its lines. Ratios are a peer's cost over ours, measured in turns in one
process; a ratio above 1 means that ours is faster, or smaller.
"""


def read(name: str, *keys: str) -> list[dict]:
    """Lines of a raw file, the last one for each combination of `keys`."""
    path = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({tuple(line[key] for key in keys): line for line in lines}.values())


def table(head: str, rows: list[list]) -> str:
    """A Markdown table; `head` names its columns, separated by `|`."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def where(lines: list[dict]) -> str:
    """Machine, versions and commits of some lines."""
    first, commits = lines[0], sorted({line["commit"][:7] for line in lines})
    peer = f", TRL {first['trl']}" if "trl" in first else ""
    return (f"{first['cores']} {first['machine']} cores, torch {first['torch']}, transformers "
            f"{first['transformers']}{peer}; commit {', '.join(commits)}.\n")


def spread(line: dict) -> str:
    """A ratio with its least and greatest turn."""
    return f"{line['ratio']:.2f} ({line['ratio_least']:.2f} to {line['ratio_most']:.2f})"


def against_trl() -> str:
    """Sections on DPO and online steps."""
    text, dpo = "", read("dpo_step", "prompt", "response")
    if dpo:
        text += ("\n## A DPO step against TRL's DPOTrainer\n\n`python -m benchmarks.dpo_step`: 4 "
                 "pairs, a Llama of 6 layers, width 256, vocabulary 8,000, float32. Seconds are "
                 "medians.\n\n")
        text += table("prompt, response|time ratio|ours, s|TRL, s|turns|" + MEMORY.format("TRL"),
                      [[f"{x['prompt']}, {x['response']}", spread(x), x["our_s"], x["trl_s"],
                        x["repeats"], f"{x['our_peak_mib']} / {x['trl_peak_mib']} = "
                        f"{x['memory_ratio']:.2f}"] for x in dpo]) + "\n" + where(dpo)
    online = read("online_step", "peer", "prompt", "response")
    if online:
        text += ("\n## An online step against TRL's online trainers\n\n`python -m "
                 "benchmarks.online_step` and `--peer online_dpo`: 2 prompts; sampling, a reward "
                 "model, reference log-probs, one update; brain.py reads its proposal's log-probs "
                 "too. Same models as above; TRL generates with transformers.\n\n")
        text += table(
            "peer, N|prompt, response|time ratio|ours, s|TRL, s|turns|" + MEMORY.format("TRL"),
            [[f"{PEERS[x['peer']]}, {x['samples']}", f"{x['prompt']}, {x['response']}", spread(x),
              x["our_s"], x["trl_s"], x["repeats"], f"{x['our_peak_mib']} / {x['trl_peak_mib']} = "
              f"{x['memory_ratio']:.2f}"] for x in online])
        text += "\n" + where(online) + (
            "\n![Where a step's time goes](step_time.png)\n\nSeconds of the phases (medians): "
            "sampling, reward model, log-probs without gradient, update and the rest.\n\n")
        text += table("peer, N|prompt, response|" + "|".join(
            f"{phase}, ours / TRL" for phase in PHASES), [
            [f"{PEERS[x['peer']]}, {x['samples']}", f"{x['prompt']}, {x['response']}"]
            + [f"{x[f'ours_{phase}_s']:.2f} / {x[f'trl_{phase}_s']:.2f}" for phase in PHASES]
            for x in online])
    return text


def against_disco() -> str:
    """Section on naver/disco."""
    lines = read("gdc_step", "prompt", "response")
    if not lines:
        return ""
    return ("\n## gdc.py against naver/disco's CDPG tuner\n\n`python -m benchmarks.gdc_step`: 2 "
            "prompts, 8 samples each, same models as above. The constructor of its tuner switches "
            "on autograd's anomaly detection for the whole process; the ratio is the one with it "
            "switched off again, the slower one as shipped stands beside it.\n\n" + table(
                "prompt, response|time ratio|as shipped|samples a second, ours / disco|"
                + MEMORY.format("disco"), [
                    [f"{x['prompt']}, {x['response']}", spread(x), x["shipped_ratio"],
                     f"{x['our_samples_per_s']} / {x['disco_samples_per_s']}",
                     f"{x['our_peak_mib']} / {x['disco_peak_mib']} = {x['memory_ratio']:.2f}"]
                    for x in lines]) + "\n" + where(lines))


def fit(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(value at 0, slope) of the least-squares line."""
    slope, start = statistics.linear_regression(xs, ys)
    return start, slope


def growth() -> str:
    """Section on how a step grows."""
    lines = read("growth", "varied", "n", "prompt", "response", "count", "vocabulary", "width")
    if not lines:
        return ""
    text = ("\n## How a step grows\n\n`python -m benchmarks.growth`: a brain.py step; 2 prompts of "
            "256 tokens, 8 responses of 48, 4 layers, width 256, vocabulary 8,000, float32, one of "
            "these varied at a time. Memory is the process's peak beside weights, gradients and "
            "moments. The last row of a table is the slope of the least-squares line: the cost of "
            "one more.\n")
    slopes = {}
    for varied, name in GROWTH.items():
        part = sorted((x for x in lines if x["varied"] == varied), key=lambda x: x[varied])
        if not part:
            continue
        keys = ["step_s", *(f"{phase}_s" for phase in PHASES), "beside_models_mib"]
        rows = [[f"{x[varied]:,}"] + [x[key] for key in keys] for x in part]
        slopes[varied] = {key: fit([x[varied] for x in part], [x[key] for x in part])[1]
                          for key in keys}
        rows.append(["*slope*"] + [f"{slopes[varied][key]:.2g}" for key in keys])
        text += f"\n{name}\n\n" + table("|".join([varied, "step, s", *(f"{phase}, s" for phase in
                                                                      PHASES), "MiB"]), rows)
    if {"n", "prompt"} <= set(slopes):
        n = [x for x in lines if x["varied"] == "n"]
        one = next(x["step_s"] for x in n if x["n"] == 1)
        text += (f"\nOne more response of 48 tokens costs {slopes['n']['step_s'] * 1000:.0f} ms, "
                 f"{slopes['n']['step_s'] / one:.2f} of a step with one response, which also reads "
                 "the prompt of 256; were the prompt read for each, it would cost about that whole "
                 "step.")
    if "vocabulary" in slopes:
        mib = slopes["vocabulary"]["beside_models_mib"] * 1000
        text += (f" A thousand more words in the vocabulary cost {mib:.2f} MiB beside the models; "
                 f"held whole, the logits of the batch in float32 would be "
                 f"{2 * 8 * 48 * 1000 * 4 / 2**20:.2f} MiB a copy, and a loss and its gradient "
                 "need several.")
    return text + "\n\n" + where(lines)


def levers() -> str:
    """Section on each idea alone."""
    shape = ("prompt", "response", "prompts", "samples")
    lines = read("levers", "lever", *shape)
    if not lines:
        return ""
    names = list(dict.fromkeys(line["lever"] for line in lines))
    shapes = list(dict.fromkeys(tuple(line[key] for key in shape) for line in lines))
    found = {(x["lever"], *(x[key] for key in shape)): spread(x) for x in lines}
    return ("\n## What each idea is worth alone\n\n`python -m benchmarks.levers`: time without the "
            "idea over time with it; responses of random lengths up to the one named. Decisions, "
            "and what did not pay, are in [log.md](log.md).\n\n" + table(
                "idea|" + "|".join(f"{p}, {r}; P {count}, N {n}" for p, r, count, n in shapes),
                [[name] + [found.get((name, *key), "") for key in shapes] for name in names])
            + "\n" + where(lines))


def limit() -> str:
    """Section on the device's own limits."""
    lines = read("limit", "size", "prompt", "response", "prompts", "samples", "device")
    if not lines:
        return ""
    return ("\n## Against the limit of the device\n\n`python -m benchmarks.limit`: the limits are "
            "measured in the same process, by a large matrix product and a large copy; what counts "
            "as an operation and as a byte that must be read stands in its docstring. **No GPU was "
            "at hand**: the command chooses one where there is one, but no figure of this page is "
            "from a GPU, and none is claimed.\n\n" + table(
                "device, weights|P, N, prompt, response|limits|update|MFU|MFU, prompt counted N "
                "times|sampling, tokens a second|share of the bandwidth", [
                    [f"{x['device']}, {x['weights'] / 1e6:.0f} million, {x['dtype']}",
                     f"{x['prompts']}, {x['samples']}, {x['prompt']}, {x['response']}",
                     f"{x['peak_tflops']} TFLOP/s, {x['peak_gb_s']} GB/s", f"{x['update_s']} s",
                     f"{x['update_mfu']:.0%}", f"{x['update_mfu_prompts_counted_n_times']:.0%}",
                     x["sample_tokens_per_s"], f"{x['sample_share_of_bandwidth']:.0%}"]
                    for x in lines]) + "\n" + where(lines))


def default_runs() -> str:
    """Section on whole processes, before the ideas of this page and with them."""
    before, after = {}, {}
    lines = [json.loads(x) for x in (RESULTS / "default_run.jsonl").read_text().splitlines()]
    old = [json.loads(x) for x in (RESULTS / "default_run_before.jsonl").read_text().splitlines()]
    again = [json.loads(x) for x in (RESULTS / "default_run_quiet.jsonl").read_text().splitlines()]
    quiet = {line["command"].split()[1]: line for line in again}
    for kept, found in ((before, old), (after, lines)):
        for line in found:
            kept.setdefault(line["command"].split()[1], []).append(line)
    rows = [[name] + [f"{statistics.median(x['seconds'] for x in side[name]):.0f} "
                      f"({min(x['seconds'] for x in side[name]):.0f} to "
                      f"{max(x['seconds'] for x in side[name]):.0f})" for side in (before, after)]
            + [f"{quiet[name]['seconds']:.0f}"] for name in before if name in after]
    return ("\n## The default runs\n\n`python -m benchmarks.default_run --script X`: seconds of "
            "the whole process, imports, evaluations and the plot included; median over the seeds "
            "(range). *Before* is the version without the ideas of this page; it took 120 steps by "
            "default, *now* is 100. The two were measured on other days, on a machine shared with "
            "others whose speed changed by half between runs: no ratio follows from them. The last "
            "column is one run of seed 1 at a moment when the machine was quiet (one script "
            "after the other).\n\n" + table("script|before|now|now, machine quiet", rows) + "\n"
            + where(lines + again))


def profile() -> str:
    """Section on what the default run spends its time on."""
    lines = read("default_profile", "script")
    if not lines:
        return ""
    kinds = sorted({kind for x in lines for kind in x["shares"]},
                   key=lambda kind: -sum(x["shares"].get(kind, 0) for x in lines))
    return ("\n## Where the time of a default run goes\n\n`python -m benchmarks.default_profile "
            "--script X`: shares of the wall clock of steps and evaluations, by kind of operation, "
            "under torch's profiler, which itself slows Python and short operations down; start, "
            "plot and end of the process are not in it.\n\n" + table(
                "script|" + "|".join(kinds) + "|Python, and the profiler's own time",
                [[f"{x['script']}.py", *(f"{x['shares'].get(kind, 0):.0%}" for kind in kinds),
                  f"{x['python']:.0%}"] for x in lines]) + "\n" + where(lines))


def draw() -> None:
    """docs/step_time.png: phases of a step, ours beside TRL's."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read("online_step", "peer", "prompt", "response")
    figure, axes = pyplot.subplots(1, len(lines), figsize=(2.4 * len(lines), 4),
                                   layout="constrained")
    for axis, line in zip(axes, lines):
        bottom = [0.0, 0.0]
        for phase in PHASES:
            heights = [line[f"{side}_{phase}_s"] for side in ("ours", "trl")]
            axis.bar(["brain.py", "TRL"], heights, bottom=bottom, label=phase, width=0.7)
            bottom = [x + y for x, y in zip(bottom, heights)]
        axis.set_title(f"{PEERS[line['peer']]}\nprompt {line['prompt']}, response "
                       f"{line['response']}, N {line['samples']}", fontsize=9)
        axis.text(1, bottom[1], f"{line['ratio']:.1f}×", ha="center", va="bottom")
        axis.margins(y=0.1)
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "step_time.png", dpi=100)


def page() -> str:
    """The whole of docs/performance.md."""
    parts = (against_trl, against_disco, default_runs, profile, growth, limit, levers)
    return HEAD + "".join(part() for part in parts)


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(page())
    draw()
