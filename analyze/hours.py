"""Memory and hours of the chain sft -> reward -> method on GPUs: computed, for docs/recipes.md.

    python -m analyze.hours            # prints the two tables
    python -m analyze.hours --count    # counts a decoding pass anew, on a CPU, with small models

No GPU was used. Hours follow from three counts of the work and from rates that are assumed:

1. Operations of matrix products and attention, by formula, at the full length of prompts and
   responses: `tests/test_recipes.py` holds it against torch's own counter. They are done at 40 % of
   989 TFLOP/s, or at 10 %: what others publish of DPO's training is 2.5 to 22.5 %.
2. Bytes that a sampled token reads: weights, keys and values once per pass, at 4.8 TB/s (H200).
3. Operators that a decoding pass calls: counted by running `common.sample` on small models, per
   block and besides. Each costs 10 µs of the host, or nothing where it is hidden.

The least hours have 40 % and no operators, the most 10 % and all of them. Evaluations, loading and
checkpoints are not counted. Memory is that of analyze/memory.py, which is for Llamas: of GPT-NeoX
it is an upper bound (a feed-forward layer without gate keeps less).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

import common
from analyze.memory import CARDS, FLOPS, FREE, GB, MODELS, Batch, Llama, Setup, at_once, kept
from analyze.memory import most as most_of_method
from analyze.tables import ROOT, table
from benchmarks.limit import bytes_read
from benchmarks.where import add
from plumbing.models import Model
from plumbing.report import read_lines

SHARES = (0.4, 0.1)  # of the card's operations, at best and at worst
CALL = 10e-6  # seconds of the host per operator, at worst
BANDWIDTH = CARDS["H200"][1]
RESULTS = ROOT / "analyze" / "results"
COUNTED_AT = (2, 4)  # blocks of the small models


@dataclass
class NeoX(Llama):
    """A decoder of Pythia's form: no gate in the feed-forward layer, and biases."""

    @property
    def block(self) -> int:
        """Parameters that multiply in one block."""
        return self.hidden * (4 * self.hidden + 2 * self.inner)

    @property
    def parameters(self) -> int:
        """All of them; each norm has a bias."""
        biases_and_norms = 9 * self.hidden + self.inner
        return self.layers * (self.block + biases_and_norms) + self.root + self.hidden


PYTHIA = NeoX(16, 2048, 8192, 8, 8, 256, 50304)


@dataclass
class Link:
    """A command, its model, and what a step of it reads."""

    name: str
    flags: str
    model: Llama
    batch: Batch
    steps: int
    setup: Setup
    kind: str  # sft, reward or method

    @property
    def command(self) -> str:
        """The whole command, with the flags that follow from batch and set-up."""
        batch, setup = self.batch, self.setup
        words = [
            f"python {self.flags} --steps {self.steps}",
            f"--prompts-per-step {batch.prompts} --micro-batch {batch.micro_batch}",
            f"--samples-per-prompt {batch.samples}" * (self.kind == "method"),
            f"--max-prompt-tokens {batch.prompt_tokens}",
            f"--max-response-tokens {batch.response_tokens}",
            f"--dtype bfloat16 --lora-rank {setup.rank}" * (setup.rank > 0),
            "--checkpointing" * setup.checkpointing,
        ]
        return " ".join(word for word in words if word)


TLDR_POSTS, TLDR_PAIRS, HH_PAIRS = 116_722, 92_858, 160_800  # rows to train on
ONE, ADAPTERS = Setup(), Setup(1, 2, 16, True)
TLDR = Batch(64, 1, 512, 53, 16)
HH = Batch(64, 1, 512, 128, 8)
RECIPES = {
    "TL;DR, Pythia 1B": [
        Link(
            "sft",
            "-m prepare.sft --policy EleutherAI/pythia-1b-deduped --dataset trl-lib/tldr "
            "--lr 3e-6 --weight-decay 0.01 --run-dir runs/tldr/sft",
            PYTHIA,
            TLDR,
            math.ceil(TLDR_POSTS / 64),
            ONE,
            "sft",
        ),
        Link(
            "reward",
            "-m prepare.reward --policy runs/tldr/sft/final --dataset trl-lib/tldr-preference "
            "--lr 3e-6 --center 0.01 --run-dir runs/tldr/reward",
            PYTHIA,
            replace(TLDR, samples=2, micro_batch=8),
            math.ceil(TLDR_PAIRS / 64),
            ONE,
            "reward",
        ),
        Link(
            "method",
            "brain.py --policy runs/tldr/sft/final --reward-model runs/tldr/reward/final "
            "--dataset trl-lib/tldr --missing-eos-penalty 1 --lr 3e-6 --beta 0.1 "
            "--run-dir runs/tldr/brain",
            PYTHIA,
            replace(TLDR, samples=8, micro_batch=4),
            1_000,
            ONE,
            "method",
        ),
    ],
    "HH, Llama 3.1 8B": [
        Link(
            "sft",
            "-m prepare.sft --policy meta-llama/Llama-3.1-8B --dataset Anthropic/hh-rlhf "
            "--lr 1e-4 --run-dir runs/hh/sft",
            MODELS["8B"],
            HH,
            math.ceil(HH_PAIRS / 64),
            ADAPTERS,
            "sft",
        ),
        Link(
            "reward",
            "-m prepare.reward --policy runs/hh/sft/final --dataset Anthropic/hh-rlhf "
            "--lr 1e-4 --center 0.01 --run-dir runs/hh/reward",
            MODELS["8B"],
            replace(HH, samples=2, micro_batch=4),
            math.ceil(HH_PAIRS / 64),
            ADAPTERS,
            "reward",
        ),
        Link(
            "method",
            "brain.py --policy runs/hh/sft/final --reward-model runs/hh/reward/final "
            "--dataset Anthropic/hh-rlhf --lr 1e-5 --beta 0.1 --run-dir runs/hh/brain",
            MODELS["8B"],
            replace(HH, samples=8, micro_batch=2),
            500,
            ADAPTERS,
            "method",
        ),
    ],
}


# ── counts ────────────────────────────────────────────────────────────────────────────────────────


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.__name__] += 1
        return function(*args, **kwargs or {})


def small(architecture: str, layers: int) -> Model:
    """A model whose responses do not end, with random weights."""
    import transformers

    shape = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 499,
    }
    config = transformers.AutoConfig.for_model(architecture, **shape)
    if architecture == "llama":
        config.num_key_value_heads = 2
    torch.manual_seed(0)
    return Model(transformers.AutoModelForCausalLM.from_config(config).eval(), [10**6])


def operators_per_pass(model: Model) -> float:
    """Operators that sampling one token more calls, of 2 prompts with 4 responses."""
    prompts = [common.Prompt("", [3, 4, 5, 6]), common.Prompt("", [7, 8, 9])]
    counts = []
    for tokens in (8, 16):
        with Calls() as mode:
            common.sample(model, prompts, 4, tokens, 1.0, seed=1)
        counts.append(mode.calls.total())
    return (counts[1] - counts[0]) / 8


def count() -> None:
    """Adds a line per architecture: operators of a decoding pass per block, and besides."""
    for architecture in ("gpt_neox", "llama"):
        few, many = (operators_per_pass(small(architecture, layers)) for layers in COUNTED_AT)
        each = (many - few) / (COUNTED_AT[1] - COUNTED_AT[0])
        line = {"architecture": architecture, "per_block": each}
        add("decoding_operators", line | {"besides": few - COUNTED_AT[0] * each}, RESULTS)


def operators(model: Llama) -> float:
    """Of a decoding pass of a model, from the last line of its architecture."""
    name = "gpt_neox" if isinstance(model, NeoX) else "llama"
    lines = read_lines(RESULTS / "decoding_operators.jsonl")
    line = [line for line in lines if line["architecture"] == name][-1]
    return model.layers * line["per_block"] + line["besides"]


# ── what follows from them ────────────────────────────────────────────────────────────────────────


def work(link: Link) -> float:
    """Operations of a step: 2 per weight and slot, 4 per pair of slots and number of a query.

    A backward pass is two forward passes, or one where the weights are not trained; of attention it
    is 2.5. It makes the forward pass of the vocabulary's head once more, and with --checkpointing
    that of the blocks. Reward models have no such head. A method reads its batch with reference,
    proposal and reward model besides, and the prompts to sample.
    """
    model, batch, setup = link.model, link.batch, link.setup
    method, backward = link.kind == "method", 1 if setup.rank else 2
    slots = batch.slots
    weights = 2 * model.layers * model.block
    pairs = 4 * model.layers * model.heads * model.head_dim
    forward = 1 + setup.checkpointing + 3 * method
    blocks = (forward + backward) * weights * slots + (forward + 2.5) * pairs * slots**2
    heads = 0 if link.kind == "reward" else 2 + backward + 2 * method
    tokens = batch.samples * batch.response_tokens
    prefill = weights * batch.prompt_tokens + pairs * batch.prompt_tokens**2
    head = heads * 2 * model.hidden * model.vocab * tokens
    return batch.prompts * (blocks + head + method * prefill)


def seconds(link: Link, share: float, call: float) -> float:
    """Of a step, if `share` of the card's arithmetic is used and an operator costs `call`."""
    batch, drawn = link.batch, 0.0
    if link.kind == "method":
        at_once = min(batch.prompts, common.DRAWN * batch.micro_batch)
        one = bytes_read(link.model, replace(batch, prompts=at_once), 2) / BANDWIDTH
        turns = math.ceil(batch.prompts / at_once)
        drawn = turns * batch.response_tokens * (one + call * operators(link.model))
    return drawn + work(link) / (share * FLOPS)


def memory(link: Link) -> float:
    """Bytes on one card at the worst time."""
    if link.kind == "method":
        return most_of_method(link.model, link.batch, link.setup)
    parts = kept(link.model, link.setup)
    return parts["weights"] + parts["moments"] + at_once(link.model, link.batch, link.setup)


def hours(link: Link) -> tuple[float, float]:
    """(least, most) of the whole command on one card."""
    bounds = ((SHARES[0], 0.0), (SHARES[1], CALL))
    return tuple(link.steps * seconds(link, *bound) / 3600 for bound in bounds)


def card_table(name: str) -> str:
    """A row per command of a recipe."""
    rows, sums = [], [0.0, 0.0]
    for link in RECIPES[name]:
        least, most = hours(link)
        sums = [sums[0] + least, sums[1] + most]
        need = memory(link)
        fits = [f"{size}" for size, _ in CARDS.values() if need <= (1 - FREE) * size * GB]
        row = [link.name, f"{link.steps:,}", f"{work(link) / 1e15:.2f}", f"{need / GB:.0f}"]
        rows.append([*row, ", ".join(fits) or "none", f"{least:.1f}", f"{most:.1f}"])
    rows.append(["all", "", "", "", "", *(f"{x:.1f}" for x in sums)])
    head = ["", "steps", "operations per step, 10¹⁵", "GB on one card", "fits GB"]
    return table([*head, "hours, least", "hours, most"], rows)


@dataclass
class Args:
    count: bool = False
    """count the operators of a decoding pass"""


def main(args: Args) -> None:
    """Counts, or prints the tables."""
    if args.count:
        count()
        return
    for name, links in RECIPES.items():
        print(f"{name}\n")
        for link in links:
            print(f"    {link.command}")
        print(f"\n{card_table(name)}\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
