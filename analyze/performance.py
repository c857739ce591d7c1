"""Writes docs/performance.md and docs/step_time.png from the raw files of the benchmarks.

    python -m analyze.performance

Of several lines of one measurement the last counts: a benchmark that is run again adds its lines.
"""

import statistics

from analyze.tables import ROOT, median_and_range, read, table

PHASES = ("sample", "score", "log-probs", "update")
PEERS = {"grpo": "GRPOTrainer", "online_dpo": "OnlineDPOTrainer", "rloo": "RLOOTrainer"}
GROWTH = {
    "n": "N, samples per prompt",
    "prompt": "L, prompt tokens",
    "response": "T, response tokens",
    "count": "P, prompts",
    "vocabulary": "V, vocabulary",
    "width": "D, width of the model",
}
HEAD = """# Performance

Made by `python -m analyze.performance` from the raw files in `benchmarks/results/`; every section
names the command that made its lines. Ratios are a peer's cost over ours, measured in turns in one
process; a ratio above 1 means that ours is faster, or smaller.
"""


def where(lines: list[dict]) -> str:
    """Machine, versions and commits of some lines."""
    first, commits = lines[0], sorted({line["commit"][:7] for line in lines})
    peer = f", TRL {first['trl']}" if "trl" in first else ""
    return (
        f"{first['cores']} {first['machine']} cores, torch {first['torch']}, transformers "
        f"{first['transformers']}{peer}; commit {', '.join(commits)}.\n"
    )


def spread(line: dict) -> str:
    """A ratio with its least and greatest turn."""
    return f"{line['ratio']:.2f} ({line['ratio_least']:.2f} to {line['ratio_most']:.2f})"


def shape(line: dict) -> str:
    """The lengths that a line was measured at."""
    return f"{line['prompt']}, {line['response']}"


def memory(line: dict, peer: str) -> str:
    """Both peaks and their ratio."""
    ours, theirs = line["our_peak_mib"], line[f"{peer}_peak_mib"]
    return f"{ours} / {theirs} = {line['memory_ratio']:.2f}"


def dpo_steps() -> str:
    """Section on DPO."""
    lines = read("dpo_step", "prompt", "response")
    head = ["prompt, response", "time ratio", "ours, s", "TRL, s", "turns"]
    rows = [
        [shape(x), spread(x), x["our_s"], x["trl_s"], x["repeats"], memory(x, "trl")] for x in lines
    ]
    return (
        "\n## A DPO step against TRL's DPOTrainer\n\n`python -m benchmarks.dpo_step`: 4 pairs, a "
        "Llama of 6 layers, width 256, vocabulary 8,000, float32. Seconds are medians.\n\n"
        + table([*head, "peak memory, ours / TRL, MiB"], rows)
        + "\n\n"
        + where(lines)
    )


def online_steps() -> str:
    """Section on steps that sample."""
    lines = read("online_step", "peer", "prompt", "response")
    head = ["peer, N", "prompt, response"]
    columns = ["time ratio", "ours, s", "TRL, s", "turns", "peak memory, ours / TRL, MiB"]
    phases = [f"{phase}, ours / TRL" for phase in PHASES]
    ratios, parts = [], []
    for x in lines:
        setting = [f"{PEERS[x['peer']]}, {x['samples']}", shape(x)]
        values = [spread(x), x["our_s"], x["trl_s"], x["repeats"], memory(x, "trl")]
        ratios.append(setting + values)
        pairs = [(x[f"ours_{phase}_s"], x[f"trl_{phase}_s"]) for phase in PHASES]
        parts.append(setting + [f"{ours:.2f} / {theirs:.2f}" for ours, theirs in pairs])
    return (
        "\n## An online step against TRL's online trainers\n\n`python -m benchmarks.online_step` "
        "and `--peer online_dpo`: 2 prompts; sampling, a reward model, reference log-probs, one "
        "update; brain.py reads its proposal's log-probs too. Same models as above; TRL generates "
        "with transformers.\n\n"
        + table(head + columns, ratios)
        + "\n\n"
        + where(lines)
        + "\n![Where a step's time goes](step_time.png)\n\nSeconds of the phases (medians): "
        "sampling, reward model, log-probs without gradient, update and the rest.\n\n"
        + table(head + phases, parts)
        + "\n"
    )


def against_disco() -> str:
    """Section on naver/disco."""
    lines = read("gdc_step", "prompt", "response")
    head = ["prompt, response", "time ratio", "as shipped", "samples per second, ours / disco"]
    rows = []
    for x in lines:
        rates = f"{x['our_samples_per_s']} / {x['disco_samples_per_s']}"
        rows.append([shape(x), spread(x), x["shipped_ratio"], rates, memory(x, "disco")])
    return (
        "\n## gdc.py against naver/disco's CDPG tuner\n\n`python -m benchmarks.gdc_step`: 2 "
        "prompts, 8 samples each, same models as above. The constructor of its tuner switches on "
        "autograd's anomaly detection for the whole process; the ratio is the one with it switched "
        "off again, the slower one as shipped stands beside it.\n\n"
        + table([*head, "peak memory, ours / disco, MiB"], rows)
        + "\n\n"
        + where(lines)
    )


def default_runs() -> str:
    """Section on whole processes, before the ideas of this page and with them."""
    before, after = read("default_run_before", "command"), read("default_run", "command")
    again = read("default_run_quiet", "command")
    rows, scripts = [], dict.fromkeys(line["command"].split()[1] for line in before)
    for script in scripts:
        times = [
            [line["seconds"] for line in lines if line["command"].split()[1] == script]
            for lines in (before, after, again)
        ]
        rows.append([script, *(median_and_range(x, 0) for x in times[:2]), f"{times[2][0]:.0f}"])
    return (
        "\n## The default runs\n\n`python -m benchmarks.default_run --script X`: seconds of the "
        "whole process, imports, evaluations and the plot included; median over the seeds (range). "
        "*Before* is the version without the ideas of this page; it took 120 steps by default, "
        "*now* is 100. The two were measured on other days, on a machine shared with others whose "
        "speed changed by half between runs: no ratio follows from them. The last column is one "
        "run of seed 1 at a moment when the machine was quiet (one script after the other).\n\n"
        + table(["script", "before", "now", "now, machine quiet"], rows)
        + "\n\n"
        + where([line for line in after + again if line["command"].split()[1] in scripts])
    )


def profile() -> str:
    """Section on what the default run spends its time on."""
    lines = read("default_profile", "script")
    totals = {}
    for kind, share in (item for x in lines for item in x["shares"].items()):
        totals[kind] = totals.get(kind, 0) + share
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    rows = [
        [f"{x['script']}.py", *(f"{x['shares'].get(kind, 0):.0%}" for kind in kinds)]
        + [f"{x['python']:.0%}"]
        for x in lines
    ]
    return (
        "\n## Where the time of a default run goes\n\n`python -m benchmarks.default_profile "
        "--script X`: shares of the wall clock of steps and evaluations, by kind of operation, "
        "under torch's profiler, which itself slows Python and short operations down; start, plot "
        "and end of the process are not in it.\n\n"
        + table(["script", *kinds, "Python, and the profiler's own time"], rows)
        + "\n\n"
        + where(lines)
    )


def growth() -> str:
    """Section on how a step grows."""
    lines = read("growth", "varied", "n", "prompt", "response", "count", "vocabulary", "width")
    text = (
        "\n## How a step grows\n\n`python -m benchmarks.growth`: a brain.py step; 2 prompts of 256 "
        "tokens, 8 responses of 48, 4 layers, width 256, vocabulary 8,000, float32, one of these "
        "varied at a time. Memory is the process's peak beside weights, gradients and moments. The "
        "last row of a table is the slope of the least-squares line: the cost of one more.\n"
    )
    keys = ["step_s", *(f"{phase}_s" for phase in PHASES), "beside_models_mib"]
    units = ["step, s", *(f"{phase}, s" for phase in PHASES), "MiB"]
    slopes = {}
    for varied, name in GROWTH.items():
        part = sorted((x for x in lines if x["varied"] == varied), key=lambda x: x[varied])
        rows = [[f"{x[varied]:,}"] + [x[key] for key in keys] for x in part]
        sizes = [x[varied] for x in part]
        slopes[varied] = {
            key: statistics.linear_regression(sizes, [x[key] for x in part]).slope for key in keys
        }
        rows.append(["*slope*"] + [f"{slopes[varied][key]:.2g}" for key in keys])
        text += f"\n{name}\n\n{table([varied, *units], rows)}\n"
    one = next(x["step_s"] for x in lines if x["varied"] == "n" and x["n"] == 1)
    more, words = slopes["n"]["step_s"], slopes["vocabulary"]["beside_models_mib"] * 1000
    return text + (
        f"\nOne more response of 48 tokens costs {more * 1000:.0f} ms, {more / one:.2f} of a step "
        "with one response, which also reads the prompt of 256; were the prompt read for each, it "
        "would cost about that whole step. A thousand more words in the vocabulary cost "
        f"{words:.2f} MiB beside the models; held whole, the logits of the batch in float32 would "
        f"be {2 * 8 * 48 * 1000 * 4 / 2**20:.2f} MiB per copy, and a loss and its gradient need "
        f"several.\n\n{where(lines)}"
    )


def limit() -> str:
    """Section on the device's own limits."""
    lines = read("limit", "size", "prompt", "response", "prompts", "samples", "device")
    head = ["device, weights", "P, N, prompt, response", "limits", "update", "MFU"]
    head += ["MFU, prompt counted N times", "sampling, tokens per second"]
    rows = []
    for x in lines:
        rows.append(
            [
                f"{x['device']}, {x['weights'] / 1e6:.0f} million, {x['dtype']}",
                f"{x['prompts']}, {x['samples']}, {shape(x)}",
                f"{x['peak_tflops']} TFLOP/s, {x['peak_gb_s']} GB/s",
                f"{x['update_s']} s",
                f"{x['update_mfu']:.0%}",
                f"{x['update_mfu_prompts_counted_n_times']:.0%}",
                x["sample_tokens_per_s"],
                f"{x['sample_share_of_bandwidth']:.0%}",
            ]
        )
    return (
        "\n## Against the limit of the device\n\n`python -m benchmarks.limit`: the limits are "
        "measured in the same process, by a large matrix product and a large copy; what counts as "
        "an operation and as a byte that must be read stands in its docstring. **No GPU was at "
        "hand**: the command chooses one where there is one, but no figure of this page is from a "
        "GPU, and none is claimed.\n\n"
        + table([*head, "share of the bandwidth"], rows)
        + "\n\n"
        + where(lines)
    )


def levers() -> str:
    """Section on each idea alone."""
    keys = ("prompt", "response", "prompts", "samples")
    lines = read("levers", "lever", *keys)
    names = dict.fromkeys(line["lever"] for line in lines)
    shapes = dict.fromkeys(tuple(line[key] for key in keys) for line in lines)
    found = {(x["lever"], *(x[key] for key in keys)): spread(x) for x in lines}
    rows = [[name] + [found.get((name, *at), "") for at in shapes] for name in names]
    head = [f"{prompt}, {response}; P {p}, N {n}" for prompt, response, p, n in shapes]
    return (
        "\n## What each idea is worth alone\n\n`python -m benchmarks.levers`: time without the "
        "idea over time with it; responses of random lengths up to the one named. Decisions, and "
        "what did not pay, are in [log.md](log.md). Ideas that no longer exist in this form are in "
        "`benchmarks/results/levers_before.jsonl`.\n\n"
        + table(["idea", *head], rows)
        + "\n\n"
        + where(lines)
    )


def generation() -> str:
    """Section on sampling alone."""
    lines = read("generate", "model", "prompts", "samples", "prompt", "response")
    rows = [
        [f"{x['model']}, {x['weights'] / 1e6:.0f} million"]
        + [f"{x['prompts']}, {x['samples']}", shape(x), spread(x), x["ours_s"], x["generate_s"]]
        for x in lines
    ]
    head = ["model", "P, N", "prompt, response", "time ratio", "ours, s", "generate, s"]
    threads = sorted({x["threads"] for x in lines})
    return (
        "\n## Sampling against transformers' generate\n\n`python -m benchmarks.generate`: real "
        "checkpoints, float32, no token ends a response; seconds are medians of "
        f"{min(x['repeats'] for x in lines)} turns or more, on "
        f"{' or '.join(map(str, threads))} thread{'s' * (threads != [1])}.\n\n"
        + table(head, rows)
        + "\n\n"
        + where(lines)
    )


def fed_tokens() -> str:
    """Section on what responses that have ended cost."""
    lines = read("fed_tokens", "prompts", "samples", "mean", "response")
    ways = ["nothing leaves", "rows leave", "responses leave"]
    rows = [
        [f"{x['prompts']}, {x['samples']}", f"{x['mean']}, {x['response']}"]
        + [f"{x[way]:.0%}" for way in ways]
        for x in lines
    ]
    return (
        "\n## Of the tokens fed, how many are of a response that goes on\n\n`python -m "
        "benchmarks.fed_tokens`: counted, with the scripts' sampler and geometric lengths that are "
        "cut. A row holds the N responses to a prompt. It must be as wide as the row with the most "
        "responses that go on, so some ended ones are still fed.\n\n"
        + table(["P, N", "mean length uncut, cut at", *ways], rows)
        + "\n\n"
        + where(lines)
    )


def decoding() -> str:
    """Section on what a decoding pass costs a GPU."""
    lines = read("decoding", "model", "dtype")
    keys = ["kernels_per_layer", "kernels_outside", "weight_casts", "moved", "waits_per_token"]
    keys += ["waits_per_step", "fresh_shapes"]
    rows = [[x["model"], x["dtype"]] + [f"{x[key]:g}" for key in keys] for x in lines]
    larger = [
        f"{x['model']}, {x['dtype']}: "
        + " and ".join(
            f"{layers * x['kernels_per_layer'] + x['kernels_outside']:,.0f}" for layers in (16, 32)
        )
        for x in lines
    ]
    head = ["model", "dtype", "kernels per layer", "outside of layers", "weights cast or copied"]
    head += ["moved by casts and copies, of the floor", "waits per token", "waits per step"]
    return (
        "\n## What a decoding pass costs a GPU, counted\n\n`python -m benchmarks.decoding`: "
        "brain.py on a GPU that is pretended on a CPU, 2 prompts of 64 tokens with 8 responses of "
        "24, random weights of width 256. The floor is every matrix in bfloat16 and the cache, "
        "read once; of the rest that is moved most is the logits, 8,000 words here, which become "
        "float32. A wait is the host's for the device; in a step, those of sampling, rewards, "
        "log-probs and update.\n\n"
        + table([*head, "fresh shapes of attention per pass"], rows)
        + "\n\nExtrapolated per layer, the kernels of a pass with 16 layers (a Llama of 1B) and "
        f"with 32 (8B): {'; '.join(larger)}. The share of the floor falls with the width, as "
        "weights grow with its square and activations do not.\n\n" + where(lines)
    )


def draw() -> None:
    """docs/step_time.png: phases of a step, ours beside TRL's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read("online_step", "peer", "prompt", "response")
    size = (2.4 * len(lines), 4)
    figure, axes = pyplot.subplots(1, len(lines), figsize=size, layout="constrained")
    for axis, line in zip(axes, lines):
        bottom = [0.0, 0.0]
        for phase in PHASES:
            heights = [line[f"{side}_{phase}_s"] for side in ("ours", "trl")]
            axis.bar(["brain.py", "TRL"], heights, bottom=bottom, label=phase, width=0.7)
            bottom = [x + y for x, y in zip(bottom, heights)]
        setting = f"prompt {line['prompt']}, response {line['response']}, N {line['samples']}"
        axis.set_title(f"{PEERS[line['peer']]}\n{setting}", fontsize=9)
        axis.text(1, bottom[1], f"{line['ratio']:.1f}×", ha="center", va="bottom")
        axis.margins(y=0.1)
    axes[0].set_ylabel("seconds per step")
    axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "step_time.png", dpi=100)


def page() -> str:
    """The whole of docs/performance.md."""
    parts = [dpo_steps, online_steps, against_disco, generation, fed_tokens, decoding]
    parts += [default_runs, profile, growth, limit, levers]
    return HEAD + "".join(part() for part in parts)


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(page())
    draw()
