"""A brain.py step against the limits of the device it runs on.

    python -m benchmarks.limit [--size 1b] [--prompt 512] [--response 53] [--prompts 16]

Measures first what the device can do: operations a second in a large matrix product, bytes a second
in a large copy. Then, with random weights of a Llama of the size asked for:
  update    model FLOPs utilisation. Counted are 2 operations per weight and slot, 4 D per layer
            and pair of slots that see each other, 2 D V per response token for the head, and
            twice as many in the backward pass; not counted are recomputed logits and masked pairs.
            Slots of a shared prompt count once; the second figure counts them once per response.
  sampling  tokens per second against the floor: a step must read the weights once and, of each row,
            the prompt's keys and values once and those of its responses so far.
On a GPU all weights are bfloat16, as no run trains them: it is the limit that counts here. On a CPU
they are float32. Adds a line to benchmarks/results/limit.jsonl.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
import tyro

import common
from analyze.memory import Batch, Llama
from benchmarks.where import add
from plumbing.models import Model, turn_products

SIZES = {
    "small": Llama(6, 256, 688, 4, 4, 64, 8_000),
    "medium": Llama(8, 768, 2_048, 12, 4, 64, 32_000),
    "1b": Llama(16, 2_048, 8_192, 32, 8, 64, 128_256),
    "8b": Llama(32, 4_096, 14_336, 32, 8, 128, 128_256),
}
LARGE, SMALL = (8192, 2**30), (2048, 2**27)  # what is multiplied and copied, on a GPU and a CPU


@dataclass
class Args:
    size: Literal["small", "medium", "1b", "8b"] = "small"
    """of the Llama: 9 million, 105 million, 1.5 billion or 8 billion weights"""
    prompt: int = 256
    """tokens"""
    response: int = 48
    """tokens"""
    prompts: int = 4
    """P, per step"""
    samples: int = 8
    """N, per prompt"""
    repeats: int = 5
    """runs of each part, after one that does not count; their median is given"""


def seconds(run: Callable, repeats: int, device: torch.device) -> float:
    """Median time of `run`."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def limits(device: torch.device, dtype: torch.dtype, side: int, size: int) -> tuple[float, float]:
    """(operations, bytes) per second of the device, by the product of two square matrices with so
    many rows and a copy of so many bytes."""
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn_like(left)
    big = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    return (
        2 * side**3 / seconds(lambda: left @ right, 9, device),
        2 * big.numel() / seconds(lambda: target.copy_(big), 9, device),
    )


def config_of(model: Llama, **more) -> transformers.LlamaConfig:
    """The configuration that transformers reads."""
    return transformers.LlamaConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        vocab_size=model.vocab,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied,
        bos_token_id=None,
        pad_token_id=0,
        **more,
    )


def make_policy(args: Args, device: torch.device, dtype: torch.dtype) -> Model:
    """A Llama with random weights, none of whose responses ends early."""
    vocabulary = SIZES[args.size].vocab
    longest = args.prompt + args.response + 1
    config = config_of(
        SIZES[args.size], eos_token_id=vocabulary - 1, max_position_embeddings=longest
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if device.type == "cpu":
        turn_products(module)
    return Model(module, end_tokens=[vocabulary])


def operations(model: Llama, batch: Batch, prompt_copies: int = 1) -> float:
    """Of a forward pass; a prompt counts so many times. A backward pass has twice as many."""
    length, t, n = batch.prompt_tokens, batch.response_tokens, batch.samples
    own = t * length + t * (t + 1) / 2  # pairs of slots of one response
    slots = prompt_copies * length + n * (t - 1)
    pairs = prompt_copies * length * (length + 1) / 2 + n * own
    body = 2 * model.layers * model.block * slots
    attention = 4 * model.heads * model.head_dim * model.layers * pairs
    head = n * t * 2 * model.hidden * model.vocab
    return batch.prompts * (body + attention + head)


def bytes_read(model: Llama, batch: Batch, itemsize: int) -> float:
    """By a step of sampling, on average: all weights but the embeddings once, and keys and values
    of each row."""
    slot = 2 * model.layers * model.kv_heads * model.head_dim
    slots = batch.prompt_tokens + batch.samples * (batch.response_tokens + 1) / 2
    weights = model.layers * model.block + model.vocab * model.hidden
    return (weights + batch.prompts * slot * slots) * itemsize


def main(args: Args) -> None:
    """Measures one shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_policy(args, device, dtype)
    sizes = LARGE if device.type == "cuda" else SMALL
    peak_operations, peak_bytes = limits(device, dtype, *sizes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    shape = (args.prompts, args.prompt)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size - 1, shape, generator=draw).tolist()
    prompts = [common.Prompt("", row) for row in ids]

    def sample() -> common.Batch:
        return common.sample(model, prompts, args.samples, args.response, 1.0, seed=1)

    batch = sample()

    def update() -> None:
        common.logprobs_and_entropy(model, batch, 1.0)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update_s = seconds(update, args.repeats, device)
    sample_s = seconds(sample, args.repeats, device)
    weights = sum(weight.numel() for weight in model.parameters())
    spec = SIZES[args.size]
    shape = Batch(args.prompts, args.samples, args.prompt, args.response)
    once, n_times = 3 * operations(spec, shape), 3 * operations(spec, shape, args.samples)
    tokens = args.prompts * args.samples * args.response
    read = args.response * bytes_read(spec, shape, dtype.itemsize)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "peak_tflops": round(peak_operations / 1e12, 3),
        "peak_gb_s": round(peak_bytes / 1e9, 1),
        "update_s": round(update_s, 4),
        "sample_s": round(sample_s, 4),
        "update_mfu": round(once / update_s / peak_operations, 3),
        "update_mfu_prompts_counted_n_times": round(n_times / update_s / peak_operations, 3),
        "sample_tokens_per_s": round(tokens / sample_s, 1),
        "sample_share_of_bandwidth": round(read / peak_bytes / sample_s, 3),
    }
    add("limit", vars(args) | found)


if __name__ == "__main__":
    main(tyro.cli(Args))
