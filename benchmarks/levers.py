"""What each idea for speed is worth alone: the code as it is against the code without the idea.

    python -m benchmarks.levers [--repeats 7]

The model of the other benchmarks; 2 prompts with 8 responses, 4 prompts with 2 for the third shape;
responses of random lengths, up to the one named. With and without take turns in one process; a
ratio above 1 says that the idea saves time. Adds a line a lever and shape to
benchmarks/results/levers.jsonl.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
import tyro
from transformers.cache_utils import DynamicLayer

import common
from benchmarks import side_by_side
from benchmarks.side_by_side import VOCABULARY, make_model, make_ours
from benchmarks.where import about

SHAPES = ((256, 48, 2, 8), (64, 256, 2, 8), (64, 256, 4, 2))


@dataclass
class Args:
    repeats: int = 7
    """turns of each side, after one that does not count"""


def make_batch(prompt: int, response: int, count: int, n: int) -> common.Batch:
    """Prompts of one length, responses of random lengths."""
    draw = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()

    lengths = torch.randint(response // 4, response + 1, (count, n), generator=draw).tolist()
    prompts = [tokens(prompt) for _ in range(count)]
    return common.make_batch([common.Prompt("", ids) for ids in prompts], prompts,
                             [[tokens(x) for x in row] for row in lengths], torch.device("cpu"))


def draw_by_gumbel(vocabulary: int) -> Callable:
    """A token for each of 16 responses as the largest log-prob plus Gumbel noise."""
    logprobs = torch.randn(16, vocabulary).log_softmax(1)
    return lambda: (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(1)


def draw_by_inverse(vocabulary: int) -> Callable:
    """The same from one uniform number each, as `common.sample` does."""
    logprobs = torch.randn(16, vocabulary).log_softmax(1)

    def draw():
        cumulative = logprobs.exp().cumsum(1, dtype=torch.float64)
        return torch.searchsorted(cumulative, torch.rand(16, 1, dtype=torch.float64))
    return draw


def levers(shape: tuple[int, int, int, int]) -> dict[str, tuple[Callable, Callable]]:
    """(with, without) by name, at one shape."""
    model, batch = make_ours(), make_batch(*shape)
    read_rows, prompts, n = common._read_rows, batch.prompts, shape[3]
    optimizers = [torch.optim.AdamW(make_model().parameters(), 1e-6, **options)
                  for options in ({"fused": True}, {"foreach": False})]
    for weight in (w for x in optimizers for g in x.param_groups for w in g["params"]):
        weight.grad = torch.zeros_like(weight)

    def update() -> None:
        common.logprobs_and_entropy(model, batch, 1.0)[0].sum().backward()
        model.zero_grad()

    def sample() -> None:
        common.sample(model, prompts, n, shape[1], 1.0, seed=1)

    def under(patched, run: Callable) -> Callable:
        def inner() -> None:
            with patched:
                run()
        return inner

    def on_one_thread() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        update()
        torch.set_num_threads(before)

    def width(value: int):
        return patch.object(common, "_row_width", lambda *_: value)

    padded = patch.object(common, "_read_rows", lambda model, batch, fed: read_rows(
        model, batch, torch.ones_like(fed)))
    copying = patch.object(common, "_GrowingLayer", lambda size: DynamicLayer())
    many = patch.object(model, "end_tokens", list(range(1, VOCABULARY * 4 // shape[1])))

    def sample_ends() -> None:
        with many:
            sample()

    whole = patch.object(common, "CHUNK", 2**40)
    again = patch.object(common, "MOST_LOGITS", 0)
    unturned = patch.object(common, "FEW_ROWS", 0)
    return {
        "update: rows of the cheapest width, not plain rows": (update, under(width(1), update)),
        "update: rows of the cheapest width, not all responses in one":
            (update, under(width(n), update)),
        "update: rows without gaps": (update, under(padded, update)),
        "update: the head in chunks of 16 MiB, not at once": (update, under(whole, update)),
        "update: logits kept, not computed again": (update, under(again, update)),
        "update: all threads, not one": (update, on_one_thread),
        "log-probs: no entropy where none is asked for":
            (lambda: common.logprobs(model, batch, 1.0),
             torch.no_grad()(lambda: common.logprobs_and_entropy(model, batch, 1.0))),
        "sampling: rows of the cheapest width, not plain rows": (sample, under(width(1), sample)),
        "sampling: rows of the cheapest width, not all responses in one":
            (sample, under(width(n), sample)),
        "sampling: a cache that copies nothing": (sample, under(copying, sample)),
        "sampling: responses of many lengths, ended rows leave":
            (sample_ends, under(patch.object(common, "MOST_ENDED", 2), sample_ends)),
        "sampling: products of few rows turned": (sample, under(unturned, sample)),
        "sampling: inference mode": (torch.inference_mode()(sample), sample),
        "draw: inverse transform, not Gumbel noise, vocabulary 8,000":
            (draw_by_inverse(8_000), draw_by_gumbel(8_000)),
        "draw: inverse transform, not Gumbel noise, vocabulary 150,000":
            (draw_by_inverse(150_000), draw_by_gumbel(150_000)),
        "AdamW: fused, not a loop": tuple(optimizer.step for optimizer in optimizers),
    }


def main(args: Args) -> None:
    """Measures all levers at all shapes."""
    for shape in SHAPES:
        for name, (after, before) in levers(shape).items():
            if name.startswith(("draw", "AdamW")) and shape != SHAPES[0]:
                continue
            times = side_by_side.take_turns({"with": after, "without": before}, args.repeats)
            ratios = [b / a for a, b in zip(times["with"], times["without"])]
            side_by_side.add("levers", {
                "lever": name, "prompt": shape[0], "response": shape[1], "prompts": shape[2],
                "samples": shape[3], "ratio": round(statistics.median(ratios), 2),
                "ratio_least": round(min(ratios), 2), "ratio_most": round(max(ratios), 2),
                "with_s": round(statistics.median(times["with"]), 5),
                "without_s": round(statistics.median(times["without"]), 5),
                "repeats": args.repeats} | about())


if __name__ == "__main__":
    main(tyro.cli(Args))
