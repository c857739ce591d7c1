"""A DPO step side by side: dpo.py's against TRL's DPOTrainer, same model, same pairs, one process.

    python -m benchmarks.dpo_step [--repeats 7]

A step is reference log-probs, loss, backward pass, clipping and AdamW on 4 pairs with a shared
prompt, float32, on batches that are already tokens. The two sides take turns; the ratio of a turn
is TRL's time over ours. Peak memory is that of a fresh process for each side, without imports.
Adds a line per shape to benchmarks/results/dpo_step.jsonl.
"""

import tempfile
from dataclasses import dataclass, field
from functools import partial

import datasets
import torch
import tyro

import common
import dpo
from benchmarks import side_by_side
from benchmarks.side_by_side import DEVICE, VOCABULARY, make_module, make_policy, make_tokenizer
from benchmarks.where import add

PAIRS, BETA = 4, 0.1


@dataclass
class Args:
    shapes: list[tuple[int, int]] = field(
        default_factory=lambda: [(256, 48), (512, 53), (128, 128), (64, 512)]
    )
    """(prompt, response) lengths in tokens"""
    repeats: int = 7
    """turns of each side, after one that does not count"""
    memory_of: str = ""
    """print the peak memory of one side (ours or trl) on the first shape, in MiB, and end"""


def make_rows(prompt: int, response: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Token lists of prompts [4] and of chosen and rejected responses [4][2]."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (PAIRS, prompt + 2 * response), generator=draw).tolist()
    prompts = [row[:prompt] for row in ids]
    pairs = [[row[prompt : prompt + response], row[prompt + response :]] for row in ids]
    return prompts, pairs


def our_step(prompt: int, response: int, **model):
    """A function that takes one step of dpo.py's and returns its loss."""
    policy = make_policy(**model)
    ref, args = common.frozen_copy(policy), dpo.Args(beta=BETA)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    prompts, responses = make_rows(prompt, response)
    batch = common.Batch([common.Prompt("", ids) for ids in prompts], responses)
    tied = torch.zeros(PAIRS, dtype=torch.bool, device=DEVICE)

    def step() -> float:
        ref_logprobs = common.logprobs(ref, batch, 1.0)
        logprobs, _ = common.logprobs_and_entropy(policy, batch, 1.0)
        loss = dpo.dpo_loss(logprobs, ref_logprobs, tied, args).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def trl_step(prompt: int, response: int, **model):
    """A function that takes one step of TRL's and returns its loss."""
    import trl

    prompts, responses = make_rows(prompt, response)
    rows = {
        "prompt_ids": prompts,
        "chosen_ids": [pair[0] for pair in responses],
        "rejected_ids": [pair[1] for pair in responses],
    }
    dummy = {"prompt": ["2"] * PAIRS, "chosen": ["3"] * PAIRS, "rejected": ["4"] * PAIRS}
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PAIRS,
        beta=BETA,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        bf16=DEVICE.type == "cuda",
        max_length=None,
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        make_module(**model),
        ref_model=make_module(**model),
        args=config,
        train_dataset=datasets.Dataset.from_dict(dummy),
        processing_class=make_tokenizer(),
    )
    batch = trainer.data_collator([dict(zip(rows, values)) for values in zip(*rows.values())])
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-6, fused=True)

    def step() -> float:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(args: Args) -> None:
    """Measures all shapes."""
    import trl  # noqa: F401 - both sides start from the same imports

    makers = {"ours": our_step, "trl": trl_step}
    if args.memory_of:
        print(side_by_side.peak_memory(partial(makers[args.memory_of], *args.shapes[0])))
        return
    for shape in args.shapes:
        sides = {name: make(*shape) for name, make in makers.items()}
        ours, theirs = sides["ours"](), sides["trl"]()  # from equal weights
        assert abs(ours - theirs) < 1e-4, f"other losses: {ours} and {theirs}"
        times = side_by_side.take_turns(sides, args.repeats)
        memory = {
            name: side_by_side.memory_of("benchmarks.dpo_step", name, shape) for name in sides
        }
        line = {"prompt": shape[0], "response": shape[1], "pairs": PAIRS}
        add("dpo_step", line | side_by_side.summary(times, memory, "trl"))


if __name__ == "__main__":
    main(tyro.cli(Args))
