"""docs/targets.png: what each method aims at, and where its own training loop arrives.

    python -m analyze.targets       # a minute on one core; prints the table of docs/comparison.md

One prompt has seven responses of one token each, so that every distribution can be listed. The
start model p is a real causal LM whose output layer is set so that it has the probabilities START;
the reward model is the function `reward` below. The whole script runs, from its flags to its final
checkpoint; then the policy's probabilities are read off. The targets are computed from START and
the rewards alone:

    (T)            p · exp(r/τ) / Z                                   BRAIn, GDC++, PPO, DPO     (1)
    best-of-N      p · (p_≤^N − p_<^N) / (p_≤ − p_<)                  BOND                       (2)
    equilibrium    π* ∝ p · exp(g_π*(y)/β), g_π the win rate over π   WIND                       (3)

DPO's labels are Bradley-Terry ones: the data set holds each pair as often as the start model draws
it and σ(r_w − r_l) prefers it. Three more runs have no finite target: nothing stops them before the
response with the highest reward has all the probability.
"""

import contextlib
import itertools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import tokenizers
import torch
import transformers
from torch import Tensor

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze.tables import ROOT, table
from benchmarks.where import add
from plumbing.report import COLOURS, panels, read_lines

RESULTS = ROOT / "analyze" / "results"
SEEDS = (1, 2)
END = "<end>"  # the empty response
REWARDS = {END: 0.0, "bad": 0.5, "dull": 1.0, "fair": 1.0, "good": 1.5, "great": 2.0, "superb": 3.0}
START = (0.10, 0.25, 0.20, 0.15, 0.15, 0.10, 0.05)
PAIRS = 4000  # of the data set; each kind as often as its probability says, to the nearest whole
BETA, WIND_BETA, BEST_OF = 1.0, 0.3, 4
FEW = "--prompts-per-step 2 --samples-per-prompt 64"
MANY = "--prompts-per-step 32"


@dataclass
class Run:
    """A run of a script, and the distribution that it should arrive at."""

    title: str
    script: ModuleType
    flags: str
    target: str


RUNS = [
    Run("BRAIn", brain, f"--beta {BETA} {FEW}", "(T)"),
    Run("GDC++", gdc, f"--beta {BETA} {FEW}", "(T)"),
    Run("PPO", ppo, f"--beta {BETA} {FEW}", "(T)"),
    Run(
        "DPO, Bradley-Terry labels",
        dpo,
        f"--beta {BETA} --pairs dataset --max-pair-tokens 1 --prompts-per-step 128",
        "(T)",
    ),
    Run("WIND", wind, f"--beta {WIND_BETA} --eta 2 {FEW}", "equilibrium"),
    Run(
        "BOND, fixed anchor",
        bond,
        f"--anchor fixed --best-of {BEST_OF} --anchor-samples 32 {MANY} --samples-per-prompt 4",
        "best-of-4",
    ),
    Run("DPO, best against worst", dpo, f"--beta {BETA} {MANY} --samples-per-prompt 2", "none"),
    Run("J-BOND, moving anchor", bond, f"{MANY} --samples-per-prompt 4", "none"),
    Run("SPPO: WIND at β = 0", wind, f"--beta 0 --eta 2 {FEW}", "none"),
]
SHARED = "--steps 120 --lr 3e-3 --warmup-steps 5 --lr-schedule linear --max-response-tokens 1"


def reward(prompts: list, responses: list[str]) -> list[float]:
    """The reward of each response."""
    return [REWARDS[response.strip() or END] for response in responses]


# ── targets, as log-probs [responses] ──


def tilted(ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(1)."""
    return (ref + rewards / beta).log_softmax(0)


def best_of(ref: Tensor, rewards: Tensor, n: int) -> Tensor:
    """(2)."""
    below = torch.stack([ref.exp()[rewards < r].sum() for r in rewards])
    upto = torch.stack([ref.exp()[rewards <= r].sum() for r in rewards])
    return ref + ((upto**n - below**n) / (upto - below)).log()


def equilibrium(ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """(3), by steps that each go half of the way, in logs, to the best answer to the last one."""
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards)
    policy = ref
    for _ in range(500):
        policy = (0.5 * policy + 0.5 * (ref + wins @ policy.exp() / beta)).log_softmax(0)
    return policy


def targets() -> dict[str, Tensor]:
    """By its name, log-probs of each target and of the start model."""
    ref = torch.tensor(START, dtype=torch.float64).log()
    rewards = torch.tensor(list(REWARDS.values()), dtype=torch.float64)
    return {
        "start": ref,
        "(T)": tilted(ref, rewards, BETA),
        "best-of-4": best_of(ref, rewards, BEST_OF),
        "equilibrium": equilibrium(ref, rewards, WIND_BETA),
    }


def distance(first: Tensor, second: Tensor) -> float:
    """Total variation of two distributions given by log-probs."""
    return 0.5 * (first.exp() - second.exp()).abs().sum().item()


# ── the world, and the runs ──


def write_world(folder: Path) -> str:
    """Writes the start model and the data set; returns the flags that name them."""
    words = list(REWARDS)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(dict(zip(words, itertools.count())), unk_token=END)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END
    ).save_pretrained(folder / "sft")
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    prompt = "fair"
    with torch.no_grad():
        hidden = model.model(torch.tensor([[words.index(prompt)]])).last_hidden_state[0, -1]
        log_probs = torch.tensor(START).log()
        model.lm_head.weight.copy_(log_probs[:, None] * hidden / hidden.square().sum())
    model.save_pretrained(folder / "sft")

    rows = []
    for (chosen, p), (rejected, q) in itertools.permutations(zip(words, START), 2):
        label = 1 / (1 + torch.tensor(REWARDS[rejected] - REWARDS[chosen]).exp().item())
        pair = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        rows += [pair] * round(PAIRS * 2 * p * q * label / (1 - sum(x * x for x in START)))
    (folder / "data").mkdir()
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    names = f"--policy {folder / 'sft'} --dataset {folder / 'data'}"
    return f"{names} --reward-model {Path(__file__).resolve()}:reward --no-reward-eos"


def arrive(run: Run, seed: int, world: str, folder: Path) -> list[float]:
    """Probabilities of the seven responses after a run."""
    flags = f"{run.flags} {SHARED} --seed {seed} --eval-every 1000 --save-every 1000"
    command = f"{world} {flags} --eval-prompts 2 --run-dir {folder}".split()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run.script.main(common.parse_args(run.script.Args, command))
    return probabilities(folder / "final")


def probabilities(checkpoint: Path) -> list[float]:
    """Of the seven responses to the prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("fair")])).logits[0, -1]
    return logits.double().softmax(0).tolist()


def measure() -> None:
    """Runs what has no raw line yet."""
    path = RESULTS / "targets.jsonl"
    known = read_lines(path) if path.exists() else []
    done = {(line["run"], line["flags"], line["seed"]) for line in known}
    for run, seed in itertools.product(RUNS, SEEDS):
        flags = f"{run.flags} {SHARED}"
        if (run.title, flags, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            world = write_world(Path(folder))
            found = arrive(run, seed, world, Path(folder, "run"))
        line = {"run": run.title, "script": run.script.__name__, "flags": flags, "seed": seed}
        add("targets", line | {"probabilities": found}, RESULTS)


def found() -> dict[str, list[Tensor]]:
    """Log-probs that each run arrived at, one per seed, from the raw lines."""
    by_run: dict[str, list[Tensor]] = {run.title: [] for run in RUNS}
    flags = {run.title: f"{run.flags} {SHARED}" for run in RUNS}
    for line in read_lines(RESULTS / "targets.jsonl"):
        if flags.get(line["run"]) == line["flags"]:
            by_run[line["run"]].append(torch.tensor(line["probabilities"]).double().log())
    return by_run


def draw(path: Path) -> None:
    """A panel per run: start model, target, and what the policy is after it."""
    known, reached = targets(), found()
    figure, axes = panels(3, 3, (11, 8.4))
    places, style = range(len(REWARDS)), {"ls": "", "mew": 2, "fillstyle": "none"}
    for axis, run in zip(axes, RUNS):
        axis.bar(places, START, color="0.85", label="start model")
        said = "no finite target"
        if run.target in known:
            goal = known[run.target]
            axis.plot(places, goal.exp(), "_", ms=26, mew=3, color="black", label="target")
            far = max(distance(policy, goal) for policy in reached[run.title])
            total = f"{far:.3f}" if far >= 0.001 else "< 0.001"
            said = f"target: {run.target}; total variation {total}"
        for seed, policy, mark in zip(SEEDS, reached[run.title], "ox"):
            label = f"policy after the run, seed {seed}"
            axis.plot(places, policy.exp(), mark, ms=8, color=COLOURS[1], label=label, **style)
        axis.set_title(f"{run.title} ({run.script.__name__}.py)\n{said}", fontsize=10)
        axis.set_ylim(*((-0.05, 1.05) if run.target == "none" else (-0.015, 0.34)))
        axis.set_xticks(places, [f"{text}\n{r:g}" for text, r in REWARDS.items()], fontsize=8)
        axis.grid(axis="x", visible=False)
    for row in range(3):
        axes[3 * row].set_ylabel("probability")
    axes[7].set_xlabel("response, and its reward")
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper center", ncols=4, fontsize=9, markerscale=0.7)
    figure.savefig(path, dpi=90)


def as_table() -> str:
    """The table of docs/comparison.md: how far from its target each run starts and ends."""
    known, reached, rows = targets(), found(), []
    for run in RUNS:
        ends = reached[run.title]
        row = [run.title, f"`{run.script.__name__}.py {run.flags}`", run.target]
        if run.target in known:
            goal = known[run.target]
            row.append(f"{distance(known['start'], goal):.3f}")
            row.append(", ".join(f"{distance(end, goal):.4f}" for end in ends))
        else:
            row += ["", ""]
        rows.append([*row, ", ".join(f"{end.exp()[-1]:.3f}" for end in ends)])
    head = ["run", "flags", "target", "start to target", "policy to target", "p(superb)"]
    return table(head, rows)


def main() -> None:
    """Runs what has no raw line, draws, prints the table."""
    measure()
    draw(ROOT / "docs" / "targets.png")
    print(as_table())


if __name__ == "__main__":
    main()
