"""What a run of brain.py needs of each GPU: bytes by formula, seconds from peak rates.

    python -m analyze.memory

Writes the tables of docs/scaling.md. Nothing in them was measured on a GPU: tests compare the bytes
with tensors of small models on a CPU, in one and in two processes, and with the peak of runs of
SmolLM2-135M on a pretended GPU; the seconds are computed.
"""

import re
from dataclasses import dataclass, replace

from analyze.tables import ROOT, table
from common import DRAWN, GPU_CHUNK, MOST_LOGITS

PAGE = ROOT / "docs" / "scaling.md"
GB = 1e9  # as in the names of cards; a card of 80 GB has a little more
CARDS = {"H100": (80, 3.35e12), "H200": (141, 4.8e12)}  # GB, bytes/s of its memory
FLOPS, SHARE = 989e12, 0.4  # dense bfloat16 of both cards, per second; the share that is assumed
FREE = 0.1  # of a card: the CUDA context, libraries, gaps between tensors
LINKS = {1: 1.0, 8: 450e9, 16: 400e9}  # bytes/s: NVLink; two machines by 8 links of 400 Gbit/s


@dataclass
class Llama:
    """A decoder of Llama's form, by the names of its configuration."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def block(self) -> int:
        """Parameters that multiply in one block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv + 3 * self.inner)

    @property
    def root(self) -> int:
        """Parameters outside the blocks: embeddings, head, last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters beside all that multiplies in the blocks."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 7 * self.hidden + 2 * q + 2 * kv + 3 * self.inner
        return self.layers * rank * sides

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * (self.block + 2 * self.hidden) + self.root


@dataclass
class Batch:
    """What one GPU holds in one step."""

    prompts: int = 4
    samples: int = 8
    prompt_tokens: int = 512
    response_tokens: int = 128
    micro_batch: int = 1

    @property
    def slots(self) -> int:
        """Tokens of one prompt's row, its responses included."""
        return self.prompt_tokens + self.samples * self.response_tokens

    @property
    def passes(self) -> int:
        """Micro-batches of an update."""
        return -(-self.prompts // self.micro_batch)


MODELS = {
    "1B": Llama(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "8B": Llama(32, 4096, 14336, 32, 8, 128, 128256),
    "70B": Llama(80, 8192, 28672, 64, 8, 128, 128256),
}


@dataclass
class Setup:
    """The flags that memory depends on, and the number of GPUs."""

    gpus: int = 1
    weight: int = 4  # bytes of a weight: 4 under --dtype mixed, 2 of a base under bfloat16
    rank: int = 0  # --lora-rank
    checkpointing: bool = False
    frozen: int = 2  # bytes of a number that is not trained, as of the cache; on a CPU 4
    chunk: int = GPU_CHUNK  # logits at once
    reward_models: int = 1  # as large as the policy, in bfloat16; 0 for a Python function

    @property
    def flags(self) -> str:
        """The words of a table."""
        words = ["mixed" if self.weight == 4 else "bfloat16"]
        words += [f"--lora-rank {self.rank}"] * (self.rank > 0)
        return " ".join([*words, *["--checkpointing"] * self.checkpointing])


CASES = [
    *(("1B", Setup(gpus)) for gpus in (1, 8)),
    *(("8B", Setup(gpus)) for gpus in (1, 8, 16)),
    ("8B", Setup(8, checkpointing=True)),
    *(("8B", Setup(gpus, 2, 16)) for gpus in (1, 8)),
    *(("8B", Setup(gpus, 2, 16, True)) for gpus in (1, 8)),
    *(("70B", Setup(gpus, checkpointing=True)) for gpus in (8, 16)),
    *(("70B", Setup(gpus, 2, 16, True)) for gpus in (8, 16)),
]
ON_ONE_CARD = [Setup(), Setup(checkpointing=True), Setup(1, 2, 16), Setup(1, 2, 16, True)]
LONG = Batch(prompts=16, samples=8, prompt_tokens=512, response_tokens=512)


def copied(model: Llama, setup: Setup) -> int:
    """Bytes of a frozen copy: matrices in bfloat16, embeddings and norms as they are.

    A tied head, in bfloat16, is no longer the embeddings' weight.
    """
    matrices = model.layers * model.block + model.vocab * model.hidden
    if setup.frozen == setup.weight:
        return setup.weight * model.parameters
    rest = model.vocab * model.hidden + (2 * model.layers + 1) * model.hidden
    return setup.frozen * matrices + setup.weight * rest


def kept(model: Llama, setup: Setup, copies: int = 2) -> dict[str, float]:
    """Bytes per GPU of what stays for the whole run.

    `copies` counts the frozen ones, a reference and a proposal or anchor. With adapters they share
    the base on one GPU, and have it each on several.
    """
    base = setup.weight * model.parameters / setup.gpus
    adapters = 4 * model.adapters(setup.rank) / setup.gpus
    shared = setup.rank > 0 and setup.gpus == 1
    copy = 0 if shared else copied(model, setup) / setup.gpus
    copy += setup.frozen * model.adapters(setup.rank) / setup.gpus
    return {
        "weights": base + adapters,
        "moments": 2 * adapters if setup.rank else 2 * base,
        "reference": copy,
        "proposal or anchor": (copies - 1) * copy,
        "reward model": 2 * setup.reward_models * model.parameters / setup.gpus,
    }


def sampling(model: Llama, batch: Batch, setup: Setup) -> dict[str, float]:
    """Bytes per GPU while it samples.

    They are a whole frozen copy, which one process need not make, and the cache of keys and values
    of the prompts that are sampled for at once.
    """
    whole = copied(model, setup) + setup.frozen * model.adapters(setup.rank)
    prompts = min(batch.prompts, DRAWN * batch.micro_batch)
    numbers = model.layers * 2 * model.kv_heads * model.head_dim * prompts * batch.slots
    return {"gathered copy": whole * (setup.gpus > 1), "cache": setup.frozen * numbers}


def activations(model: Llama, slots: int, setup: Setup) -> int:
    """Bytes that the blocks keep for the backward pass of so many slots, under autocast.

    All weights: 34 bytes per number of a state and 8 per number of a feed-forward layer. Adapters:
    28 and 8, and 14 per rank. With --checkpointing each block keeps its input, and one at a time
    all that.
    """
    hidden, inner, rank = (28, 8, 14 * setup.rank) if setup.rank else (34, 8, 0)
    each = hidden * model.hidden + inner * model.inner + 4 * model.heads + 8 + rank
    if setup.checkpointing:
        return slots * (model.layers * setup.weight * model.hidden + each)
    return model.layers * slots * each


def update(model: Llama, batch: Batch, setup: Setup) -> dict[str, float]:
    """Bytes per GPU in a backward pass.

    They are the gradients; root and two blocks gathered, and the gradients of root and one block
    before they are reduced, if they have any; bfloat16 copies, which autocast makes, of float32
    weights that multiply in the blocks; activations; such copies of the head; and logits. A chunk
    of these is there five times in float32, for log-probs and entropy, or goes backward, with 14
    bytes each and the head's gradient in bfloat16 and in float32. If there are few logits in all,
    the log-probs of the other chunks are kept.

    Autocast keeps its copies until the backward pass, but for those of weights that are not trained
    if blocks are run again in it: then there are one block's.
    """
    adapters, head = model.adapters(setup.rank), model.vocab * model.hidden
    gathered = 2 * model.root + 3 * model.block
    if setup.rank:
        gathered = model.root + 2 * model.block
    cast = 1 if setup.rank and setup.checkpointing else model.layers
    tokens = batch.micro_batch * batch.samples * batch.response_tokens
    logits, chunk = tokens * model.vocab, max(256 * model.vocab, setup.chunk)
    kept = logits <= MOST_LOGITS
    chunks = -(-logits // chunk) if kept else 1
    mixed = setup.weight == 4
    here = min(chunk, logits)
    backward = 14 * here + 6 * head * (setup.rank == 0)
    return {
        "gradients": 4 * (adapters if setup.rank else model.parameters) / setup.gpus,
        "gathered blocks": setup.weight * gathered * (setup.gpus > 1),
        "autocast's copies": 2 * cast * model.block * mixed + 2 * adapters,
        "activations": activations(model, batch.micro_batch * batch.slots, setup),
        "head": 2 * head * chunks * mixed,
        "logits": max(5 * 4 * here, backward) + 4 * (logits - here) * kept,
    }


def at_once(model: Llama, batch: Batch, setup: Setup) -> float:
    """Bytes of `update` that are there at the same time.

    The gradients of an earlier micro-batch stay. With one micro-batch they take, from block to
    block, the place of activations and copies, and at the begin there is none but the head's, which
    is counted with it.
    """
    parts = update(model, batch, setup)
    if batch.passes > 1:
        return sum(parts.values())
    begin = sum(parts.values()) - parts["gradients"]
    one_block = (parts["activations"] + parts["autocast's copies"]) / model.layers
    return max(begin, parts["gradients"] + parts["gathered blocks"] + one_block)


def seconds(model: Llama, batch: Batch, setup: Setup) -> dict[str, float]:
    """Seconds of a step's parts on H200 cards.

    Nothing is counted but arithmetic, the memory's rate in sampling, and links.
    """
    n, slots, gpus = model.parameters, batch.prompts * batch.slots, setup.gpus
    drawn = batch.response_tokens * setup.frozen * n / CARDS["H200"][1]
    prefill = 2 * n * batch.prompts * batch.prompt_tokens / (FLOPS * SHARE)
    # The update: forward, backward to states and to weights, and forward once more.
    parts = 2 + 2 + 2 * (setup.rank == 0) + 2 * setup.checkpointing
    arithmetic = (parts + 2 + 2 + 2) * n * slots / (FLOPS * SHARE)  # two log-probs, rewards
    # Sampling gathers once. Each pass gathers: reference, proposal, rewards, policy forward and
    # backward, and then reduces the gradients, in float32.
    gradients = 4 * (setup.rank == 0)
    each_pass = 2 * setup.frozen + 2 + 2 * setup.weight + gradients
    traffic = (setup.frozen + batch.passes * each_pass) * n
    links = (gpus > 1) * traffic * (gpus - 1) / gpus / LINKS[gpus]
    return {"sampling": drawn + prefill, "arithmetic": arithmetic, "links": links}


def most(model: Llama, batch: Batch, setup: Setup) -> float:
    """Bytes per GPU at the worst time, the sampling or the backward pass."""
    drawing = sum(sampling(model, batch, setup).values())
    return sum(kept(model, setup).values()) + max(drawing, at_once(model, batch, setup))


def largest_micro_batch(model: Llama, batch: Batch, setup: Setup, size: int) -> int:
    """The most prompts per pass, a power of 2, with which a card of `size` GB has a tenth left; 0
    if not even one."""
    fitting = 0
    for exponent in range(batch.prompts.bit_length()):
        part = replace(batch, micro_batch=2**exponent)
        if most(model, part, setup) <= (1 - FREE) * size * GB:
            fitting = 2**exponent
    return fitting


def memory_table(batch: Batch) -> str:
    """GB per GPU, and whether it fits."""
    rows = []
    for name, setup in CASES:
        model = MODELS[name]
        parts = kept(model, setup) | sampling(model, batch, setup) | update(model, batch, setup)
        peak = most(model, batch, setup)
        fits = [f"{size}" for size, _ in CARDS.values() if peak < size * GB]
        sizes = [f"{x / GB:.1f}" for x in (*parts.values(), peak)]
        rows.append([name, setup.flags, str(setup.gpus), *sizes, ", ".join(fits) or "none"])
    return table(["model", "--dtype", "GPUs", *parts, "most at once", "fits GB"], rows)


def time_table(batch: Batch) -> str:
    """Computed seconds of a step, where it fits a card of 141 GB."""
    rows = []
    for name, setup in CASES:
        parts = seconds(MODELS[name], batch, setup)
        cells = [f"{x:.1f}" for x in (*parts.values(), sum(parts.values()))]
        if most(MODELS[name], batch, setup) < CARDS["H200"][0] * GB:
            rows.append(
                [name, setup.flags, str(setup.gpus), str(setup.gpus * batch.prompts), *cells]
            )
    return table(["model", "--dtype", "GPUs", "prompts a step", *parts, "sum"], rows)


def one_card_table(batch: Batch) -> str:
    """GB on one card, and the largest --micro-batch that leaves a tenth of it free."""
    rows = []
    for name, model in MODELS.items():
        for setup in ON_ONE_CARD:
            stays = sum(kept(model, setup).values())
            drawing = sum(sampling(model, batch, setup).values())
            training = at_once(model, batch, setup)
            numbers = (stays, drawing, training, stays + max(drawing, training))
            sizes = [f"{x / GB:.1f}" for x in numbers]
            largest = [largest_micro_batch(model, batch, setup, size) for size, _ in CARDS.values()]
            fits = [f"`--micro-batch {most}`" if most else "no" for most in largest]
            rows.append([name, setup.flags, *sizes, *fits])
    cards = [f"{size} GB" for size, _ in CARDS.values()]
    head = ["model", "--dtype", "stays", "sampling", "update", "most at once", *cards]
    return table(head, rows)


def page() -> str:
    """docs/scaling.md with these tables in the places of those that it has."""
    tables = iter([one_card_table(LONG), memory_table(Batch()), time_table(Batch())])
    return re.sub(r"(?m)(^\|.*\n)+", lambda _: next(tables) + "\n", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
