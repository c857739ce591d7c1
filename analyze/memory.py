"""What a run of brain.py needs of each GPU: bytes by formula, seconds from peak rates.

    python -m analyze.memory

Prints the tables of docs/scaling.md. Nothing in them was measured on a GPU: tests compare the bytes
with tensors of small models on a CPU, in one and in two processes; the seconds are computed.
"""

from dataclasses import dataclass

GB = 1e9  # as in the names of cards; a card of 80 GB has a little more
CARDS = {"H100": (80, 3.35e12), "H200": (141, 4.8e12)}  # GB, bytes/s of its memory
FLOPS, SHARE = 989e12, 0.4  # dense bfloat16 of both cards, per second; the share that is assumed
LINKS = {1: 1.0, 8: 450e9, 16: 400e9}  # bytes/s: NVLink; two machines by 8 links of 400 Gbit/s
DTYPES = {4: "mixed", 2: "bfloat16"}


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


MODELS = {
    "1B": Llama(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "8B": Llama(32, 4096, 14336, 32, 8, 128, 128256),
    "70B": Llama(80, 8192, 28672, 64, 8, 128, 128256),
}

CASES = [
    (name, weight, gpus)
    for name, weight in (("1B", 4), ("8B", 4), ("8B", 2), ("70B", 4), ("70B", 2))
    for gpus in (1, 8, 16)
]


def kept(model: Llama, gpus: int, weight: int = 4, copies: int = 2) -> dict[str, float]:
    """Bytes per GPU of what stays for the whole run.

    `weight` is the bytes of one weight, 4 under --dtype mixed and 2 under bfloat16; `copies` counts
    the frozen ones, a reference and a proposal or anchor. The reward model is as large as the
    policy, and in bfloat16.
    """
    n = model.parameters / gpus
    return {
        "weights": weight * n,
        "moments": 2 * weight * n,
        "reference": weight * n,
        "proposal or anchor": (copies - 1) * weight * n,
        "reward model": 2 * n,
    }


def sampling(model: Llama, batch: Batch, gpus: int, weight: int = 4) -> dict[str, float]:
    """Bytes per GPU while it samples.

    They are a whole copy, which one process need not make, and the cache of keys and values in
    bfloat16.
    """
    numbers = model.layers * 2 * model.kv_heads * model.head_dim * batch.prompts * batch.slots
    return {"gathered copy": weight * model.parameters * (gpus > 1), "cache": 2 * numbers}


def activations(model: Llama, slots: int, hidden: int = 34, inner: int = 8) -> int:
    """Bytes that the blocks keep for the backward pass of so many slots.

    `hidden` and `inner` are bytes per number of a state and of a feed-forward layer: 34 and 8 under
    autocast, which keeps the norms in float32; 24 and 8 in bfloat16; 40 and 16 in float32.
    """
    each = hidden * model.hidden + inner * model.inner + 4 * model.heads + 8
    return model.layers * slots * each


def update(model: Llama, batch: Batch, gpus: int, weight: int = 4) -> dict[str, float]:
    """Bytes per GPU in a backward pass.

    They are the gradients; root and two blocks gathered, and the gradients of root and one block
    before they are reduced; bfloat16 copies, which autocast keeps, of all that multiplies in the
    blocks; activations; logits in float32, three times a chunk.
    """
    gathered = weight * (2 * model.root + 3 * model.block) * (gpus > 1)
    logits = batch.micro_batch * batch.samples * batch.response_tokens * model.vocab
    return {
        "gradients": weight * model.parameters / gpus,
        "gathered blocks": gathered,
        "autocast's copies": 2 * model.layers * model.block * (weight == 4),
        "activations": activations(
            model, batch.micro_batch * batch.slots, 34 if weight == 4 else 24
        ),
        "logits": 3 * 4 * min(max(256 * model.vocab, 2**22), logits),
    }


def seconds(model: Llama, batch: Batch, gpus: int, weight: int = 4) -> dict[str, float]:
    """Seconds of a step's parts on H200 cards.

    Nothing is counted but arithmetic, the memory's rate in sampling, and links.
    """
    n, slots = model.parameters, batch.prompts * batch.slots
    passes = -(-batch.prompts // batch.micro_batch)
    # A sampled token reads all weights; autocast also writes and reads them again in bfloat16.
    drawn = batch.response_tokens * (8 if weight == 4 else 2) * n / CARDS["H200"][1]
    prefill = 2 * n * batch.prompts * batch.prompt_tokens / (FLOPS * SHARE)
    arithmetic = (6 + 2 + 2 + 2) * n * slots / (FLOPS * SHARE)  # update, two log-probs, rewards
    # Sampling gathers once. Each pass gathers: reference, proposal, rewards, policy forward and
    # backward, and then reduces the gradients, in float32.
    traffic = weight * n + passes * (4 * weight + 2 + 4) * n
    links = (gpus > 1) * traffic * (gpus - 1) / gpus / LINKS[gpus]
    return {"sampling": drawn + prefill, "arithmetic": arithmetic, "links": links}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def most(model: Llama, batch: Batch, gpus: int, weight: int = 4) -> float:
    """Bytes per GPU at the worst time, the sampling or the backward pass."""
    drawing, training = (
        sum(part(model, batch, gpus, weight).values()) for part in (sampling, update)
    )
    return sum(kept(model, gpus, weight).values()) + max(drawing, training)


def memory_table(batch: Batch) -> str:
    """GB per GPU, and whether it fits."""
    rows = []
    for name, weight, gpus in CASES:
        model = MODELS[name]
        parts = (
            kept(model, gpus, weight)
            | sampling(model, batch, gpus, weight)
            | update(model, batch, gpus, weight)
        )
        peak = most(model, batch, gpus, weight)
        fits = [f"{size}" for size, _ in CARDS.values() if peak < size * GB]
        rows.append(
            [
                name,
                DTYPES[weight],
                str(gpus),
                *(f"{x / GB:.1f}" for x in parts.values()),
                f"{peak / GB:.1f}",
                ", ".join(fits) or "none",
            ]
        )
    return table(["model", "--dtype", "GPUs", *parts, "most at once", "fits GB"], rows)


def time_table(batch: Batch) -> str:
    """Computed seconds of a step, where it fits a card of 141 GB."""
    rows = []
    for name, weight, gpus in CASES:
        parts = seconds(MODELS[name], batch, gpus, weight)
        cells = [f"{x:.1f}" for x in (*parts.values(), sum(parts.values()))]
        if most(MODELS[name], batch, gpus, weight) < CARDS["H200"][0] * GB:
            rows.append([name, DTYPES[weight], str(gpus), str(gpus * batch.prompts), *cells])
    return table(["model", "--dtype", "GPUs", "prompts a step", *parts, "sum"], rows)


def main() -> None:
    """Prints both tables."""
    print(memory_table(Batch()), time_table(Batch()), sep="\n\n")


if __name__ == "__main__":
    main()
