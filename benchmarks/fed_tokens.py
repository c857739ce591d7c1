"""How many of the tokens that sampling feeds belong to a response that has not ended: counted.

    python -m benchmarks.fed_tokens

Lengths are geometric, cut at T; the sampler is the one of the scripts, on a model of one small
layer whose logits are replaced. Rows hold all N responses, as they do for models of usual width. A
share is what must be fed, each response's tokens but the last, over what was fed: if everything
stays to the end; if a row leaves once all its responses have ended; and if single responses leave.
Adds a line per shape to benchmarks/results/fed_tokens.jsonl.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch

import common
from benchmarks.side_by_side import make_policy
from benchmarks.where import add

SHAPES = ((16, 8, 24, 64), (64, 8, 24, 64), (64, 8, 200, 512))
LEAVE = common._leave


def only_whole_rows(rows: common.Decoding, going: torch.Tensor, t: int) -> bool:
    """A response that has ended stays as long as another one of its row is going."""
    return LEAVE(rows, going.any(1, keepdim=True).expand_as(going), t)


def logits_of(mean: float) -> Callable:
    """In the place of `common._logits`: two words, of which the second one ends."""
    words = torch.tensor([math.log(1 - 1 / mean), math.log(1 / mean)])
    return lambda model, states: words.expand(*states.shape[:2], 2)


def share(model, prompts: list[common.Prompt], n: int, mean: float, most: int) -> float:
    """What must be fed over what was fed, prompts left out."""
    fed = []

    def count(body, args, inputs) -> None:
        fed.append(inputs["input_ids"].numel())

    hook = model.module.base_model.register_forward_pre_hook(count, with_kwargs=True)
    with (
        patch.object(common, "_logits", logits_of(mean)),
        patch.object(common, "_row_width", lambda *_: n),
    ):
        batch = common.sample(model, prompts, n, most, 1.0, seed=1)
    hook.remove()
    return round((batch.lengths() - 1).sum().item() / sum(fed[1:]), 3)


def main() -> None:
    """Counts at all shapes."""
    model = make_policy(layers=1, width=64, vocabulary=2)
    for count, n, mean, most in SHAPES:
        line = {"prompts": count, "samples": n, "mean": mean, "response": most}
        ways = {
            "nothing leaves": patch.object(common, "MOST_ENDED", 2),
            "rows leave": patch.object(common, "_leave", only_whole_rows),
            "responses leave": nullcontext(),
        }
        for name, way in ways.items():
            with way:
                line[name] = share(model, [common.Prompt("", [0] * 4)] * count, n, mean, most)
        add("fed_tokens", line)


if __name__ == "__main__":
    main()
