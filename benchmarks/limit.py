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
On a GPU the policy runs as --dtype bfloat16 does, on a CPU in float32. Adds a line to
benchmarks/results/limit.jsonl.
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
from benchmarks.where import add
from plumbing.models import Model, turn_products

SIZES = {  # layers, width, inner width, heads, key-value heads, vocabulary
    "small": (6, 256, 688, 4, 4, 8_000),
    "medium": (8, 768, 2_048, 12, 4, 32_000),
    "1b": (16, 2_048, 8_192, 32, 8, 128_256),
    "8b": (32, 4_096, 14_336, 32, 8, 128_256),
}


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


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(operations, bytes) per second of the device."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    return (
        2 * side**3 / seconds(lambda: left @ right, 9, device),
        2 * big.numel() / seconds(lambda: target.copy_(big), 9, device),
    )


def main(args: Args) -> None:
    """Measures one shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers, width, inner, heads, kv_heads, vocabulary = SIZES[args.size]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        eos_token_id=vocabulary - 1,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        max_position_embeddings=args.prompt + args.response + 1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if device.type == "cpu":
        turn_products(module)
    model = Model(module, end_tokens=[vocabulary])  # none ends early
    peaks = limits(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    length, t, n, count = args.prompt, args.response, args.samples, args.prompts
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary - 1, (count, length), generator=draw).tolist()
    prompts = [common.Prompt("", row) for row in ids]
    batch = common.sample(model, prompts, n, t, 1.0, seed=1)

    def update() -> None:
        common.logprobs_and_entropy(model, batch, 1.0)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update_s = seconds(update, args.repeats, device)
    sample_s = seconds(lambda: common.sample(model, prompts, n, t, 1.0, 1), args.repeats, device)
    embedded = sum(x.weight.numel() for x in (module.get_input_embeddings(), module.lm_head))
    body = sum(weight.numel() for weight in model.parameters()) - embedded

    def operations(prompt_copies: int) -> float:
        own = t * length + t * (t + 1) / 2  # pairs of slots of one response
        slots = prompt_copies * length + n * (t - 1)
        pairs = prompt_copies * length * (length + 1) / 2 + n * own
        head = n * t * 2 * width * vocabulary
        return 3 * count * (2 * body * slots + 4 * width * layers * pairs + head)

    slot_bytes = 2 * layers * kv_heads * (width // heads) * dtype.itemsize
    read = (body + embedded // 2) * dtype.itemsize + count * slot_bytes * (length + n * (t + 1) / 2)
    add(
        "limit",
        vars(args)
        | {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "weights": body + embedded,
            "peak_tflops": round(peaks[0] / 1e12, 3),
            "peak_gb_s": round(peaks[1] / 1e9, 1),
            "update_s": round(update_s, 4),
            "sample_s": round(sample_s, 4),
            "update_mfu": round(operations(1) / update_s / peaks[0], 3),
            "update_mfu_prompts_counted_n_times": round(operations(n) / update_s / peaks[0], 3),
            "sample_tokens_per_s": round(count * n * t / sample_s, 1),
            "sample_share_of_bandwidth": round(t * read / peaks[1] / sample_s, 3),
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
