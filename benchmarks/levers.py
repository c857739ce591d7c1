"""What each idea for speed is worth alone: the code as it is against the code without the idea.

    python -m benchmarks.levers [--repeats 7] [--only WORD]

The model of the other benchmarks; 2 prompts with 8 responses, 4 prompts with 2 for the third shape;
responses of random lengths, up to the one named. With and without take turns in one process; a
ratio above 1 says that the idea saves time. Adds a line per lever and shape to
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
import plumbing.cache
import plumbing.models
from benchmarks import side_by_side
from benchmarks.fed_tokens import only_whole_rows
from benchmarks.side_by_side import VOCABULARY, make_policy, make_prompts
from benchmarks.where import add

SHAPES = ((256, 48, 2, 8), (64, 256, 2, 8), (64, 256, 4, 2))


@dataclass
class Args:
    repeats: int = 7
    """turns of each side, after one that does not count"""
    only: str = ""
    """only levers whose names contain this"""


def make_batch(prompt: int, response: int, count: int, n: int) -> common.Batch:
    """Prompts of one length, responses of random lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(response // 4, response + 1, (count, n), generator=draw).tolist()
    responses = [
        [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in group]
        for group in lengths
    ]
    return common.Batch(make_prompts(prompt, count), responses)


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


def optimizer_step(**options) -> Callable:
    """A step of AdamW on the weights of the policy."""
    weights = list(make_policy().parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return torch.optim.AdamW(weights, 1e-6, **options).step


def levers(shape: tuple[int, int, int, int]) -> dict[str, tuple[Callable, Callable]]:
    """(with, without) by name, at one shape."""
    model, batch = make_policy(), make_batch(*shape)
    prompts, n = batch.prompts, shape[3]

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

    copying = patch.object(plumbing.cache, "GrowingLayer", lambda slots: DynamicLayer())
    unturned = patch.object(plumbing.models, "FEW_ROWS", 0)
    staying = patch.object(common, "MOST_ENDED", 2)
    whole_rows = patch.object(common, "_leave", only_whole_rows)
    whole = patch.object(common, "CHUNK", 2**40)
    again = patch.object(common, "MOST_LOGITS", 0)
    many = list(range(1, VOCABULARY * 4 // shape[1]))  # end tokens: lengths of many kinds
    sample_ends = under(patch.object(model, "end_tokens", many), sample)
    found = {
        "update: rows of several responses, not of one": (update, under(width(1), update)),
        "update: the head in chunks of 16 MiB, not at once": (update, under(whole, update)),
        "update: logits kept, not computed again": (update, under(again, update)),
        "update: all threads, not one": (update, on_one_thread),
        "log-probs: no entropy where none is asked for": (
            lambda: common.logprobs(model, batch, 1.0),
            torch.no_grad()(lambda: common.logprobs_and_entropy(model, batch, 1.0)),
        ),
        "sampling: rows of several responses, not of one": (sample, under(width(1), sample)),
        "sampling: a cache that copies nothing": (sample, under(copying, sample)),
        "sampling: responses of many lengths, ended rows leave": (
            sample_ends,
            under(staying, sample_ends),
        ),
        "sampling: single responses leave, not only rows": (
            sample_ends,
            under(whole_rows, sample_ends),
        ),
        "sampling: products of few rows turned": (sample, under(unturned, sample)),
        "sampling: inference mode": (torch.inference_mode()(sample), sample),
    }
    # Where the rule puts all responses of a prompt into one row there is nothing to compare.
    if common._row_width(model, shape[0], batch.lengths().mean().item(), n) < n:
        name = "update: rows as wide as the rule says, not of all responses"
        found[name] = (update, under(width(n), update))
    if common._row_width(model, shape[0], shape[1] / 2, n) < n:
        name = "sampling: rows as wide as the rule says, not of all responses"
        found[name] = (sample, under(width(n), sample))
    return found


def levers_without_shape() -> dict[str, tuple[Callable, Callable]]:
    """Those that know nothing of prompts and responses."""
    return {
        "draw: inverse transform, not Gumbel noise, vocabulary 8,000": (
            draw_by_inverse(8_000),
            draw_by_gumbel(8_000),
        ),
        "draw: inverse transform, not Gumbel noise, vocabulary 150,000": (
            draw_by_inverse(150_000),
            draw_by_gumbel(150_000),
        ),
        "AdamW: fused, not a loop": (optimizer_step(fused=True), optimizer_step(foreach=False)),
    }


def main(args: Args) -> None:
    """Measures all levers at all shapes."""
    for shape in SHAPES:
        found = levers(shape) | (levers_without_shape() if shape == SHAPES[0] else {})
        for name, (after, before) in found.items():
            if args.only not in name:
                continue
            times = side_by_side.take_turns({"with": after, "without": before}, args.repeats)
            line = {"lever": name} | dict(zip(("prompt", "response", "prompts", "samples"), shape))
            line |= side_by_side.ratio(times["with"], times["without"])
            medians = {f"{side}_s": round(statistics.median(x), 5) for side, x in times.items()}
            add("levers", line | medians)


if __name__ == "__main__":
    main(tyro.cli(Args))
