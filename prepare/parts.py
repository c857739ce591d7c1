"""What surrounds `sft.py` and `reward.py` and explains neither.

Batches of one length, shares of the held-out rows, pairs that differ, a score in the place of a
head, and the table of calibration.
"""

import copy
import random
from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor

import common
from plumbing.data import Prompt
from plumbing.run import explained

POOL = 32  # batches that are sorted by length together
BINS = 5  # of the probability of the preferred response, from 0.5 to 1


def batch_of(prompts: list[Prompt], step: int, args, size: Callable) -> list[Prompt]:
    """The P prompts of `step` (from 1), all processes together, of about one size(prompt).

    Each epoch takes every prompt, in an order of its own, and fills up its last batch with its
    first prompts. Pools of batches are sorted by size and cut; a pool's batches come in any order.
    """
    per_step = args.prompts_per_step
    batches = -(-len(prompts) // per_step)
    epoch, place = divmod(step - 1, batches)
    order = prompts
    if epoch:  # they were loaded in random order
        order = random.Random(common.seed_of(args.seed, "order", epoch)).sample(order, len(order))
    first = place // POOL * POOL
    pool = islice(cycle(order), first * per_step, min(first + POOL, batches) * per_step)
    pool = sorted(pool, key=size)
    starts = range(0, len(pool), per_step)
    draw = random.Random(common.seed_of(args.seed, "pool", epoch, first))
    start = draw.sample(starts, len(starts))[place - first]
    return pool[start : start + per_step]


def share(prompts: list[Prompt], run: common.Run) -> tuple[list[Prompt], int]:
    """This process's held-out prompts, as many as each other's, and how many of them count.

    A process with a prompt less repeats one: a sharded model needs equally many passes on each.
    """
    most = -(-len(prompts) // run.world)
    mine = list(islice(cycle(prompts), run.rank, most * run.world, run.world))
    return mine, len(prompts[run.rank :: run.world])


def usable_pairs(dataset: str, prompts: list[Prompt], what: str) -> list[Prompt]:
    """The prompts whose chosen and rejected responses differ; ends the run if one has no pair."""
    for prompt in prompts:
        pair = prompt.chosen is not None and prompt.rejected is not None
        where = f"--dataset {dataset}: the prompt {prompt.text[-60:]!r} has no"
        common.require(pair, f"{where} chosen and rejected response")
    kept = [prompt for prompt in prompts if prompt.chosen != prompt.rejected]
    print(f"{len(kept):,} {what} pairs; dropped {len(prompts) - len(kept):,} of equal responses")
    common.require(kept, f"--dataset {dataset}: no {what} pair of unlike responses")
    return kept


def with_score(policy: common.Model) -> common.Model:
    """The causal LM as a classifier with one label, in place: its body, adapters included, below a
    score w · state, w [1, D], that is 0 at first."""
    from transformers import AutoModelForSequenceClassification

    lm, config = policy.module, copy.deepcopy(policy.module.config)
    config.num_labels = 1
    with explained(f"--policy: a {type(lm).__name__} has no classifier"), torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(config)
        if type(module.base_model) is not type(lm.base_model):
            raise ValueError(f"a {type(module).__name__} has another body")
    score = torch.nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.device)
    module.set_submodule(module.base_model_prefix, lm.base_model)
    module.set_submodule("score", score)
    torch.nn.init.zeros_(score.weight)
    if "peft_config" in vars(lm):
        module.peft_config = lm.peft_config  # where peft keeps what its adapters are
    policy.module = module.eval()
    return policy


def pad_apart(tokenizer, model: common.Model) -> None:
    """Gives tokenizer and classifier a pad token that ends no response.

    transformers' own classifiers read the last token that is no padding: where the end token pads
    as well, they would miss it, and read the one before. Where no other special token is left the
    classifier has none, and transformers then refuses more than one row at a time.
    """
    names, ids = tokenizer.all_special_tokens, tokenizer.all_special_ids
    apart = [name for name, i in zip(names, ids) if i not in model.end_tokens]
    if apart and tokenizer.pad_token not in apart:
        tokenizer.pad_token = apart[0]
    pad = tokenizer.pad_token_id if apart else None
    model.module.config.get_text_config().pad_token_id = pad


def calibration(preferred: Tensor) -> dict[str, float]:
    """Whether probabilities mean what they say: the table of P(y_w ≻ y_l) of pairs, [pairs].

    Pairs go into bins by the probability of the response that the model prefers, 0.5 to 1. Per bin
    that is not empty: the number of pairs, the mean of that probability, and the share of pairs
    where that response is y_w, ties ½.
    """
    probability = torch.maximum(preferred, 1 - preferred)
    right = (preferred > 0.5).double() + 0.5 * (preferred == 0.5)
    place = ((probability - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    table = {}
    for i in place.unique().tolist():
        bin = f"{50 + 50 * i // BINS}-{50 + 50 * (i + 1) // BINS}"
        table[f"eval/pairs_{bin}"] = (place == i).sum().item()
        table[f"eval/predicted_{bin}"] = probability[place == i].mean().item()
        table[f"eval/observed_{bin}"] = right[place == i].mean().item()
    return table


def say_calibration(evaluation: dict[str, float]) -> None:
    """Prints the table."""
    print("preferred response   pairs   predicted   observed")
    for key, pairs in evaluation.items():
        _, found, bin = key.partition("eval/pairs_")
        if found:
            predicted = evaluation[f"eval/predicted_{bin}"]
            observed = evaluation[f"eval/observed_{bin}"]
            print(f"{bin + ' %':>18}{pairs:8.0f}{predicted:12.3f}{observed:11.3f}")
