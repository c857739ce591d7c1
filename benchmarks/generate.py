"""Our sampling against transformers' `generate`, on real checkpoints.

    python -m benchmarks.generate [--models assets/real/base assets/real/gemma] [--repeats 7]

The folders are those of `prepare.real`; one that is not there is left out, and said. Both sides
hold the weights in float32 and draw so many tokens per response, as no token ends one: from
prompts of equal length, at temperature 1, without top-k or top-p. Adds a line per model and shape
to benchmarks/results/generate.jsonl.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import tyro

import brain
import common
from benchmarks.side_by_side import DEVICE, ratio, take_turns
from benchmarks.where import ROOT, add
from plumbing.models import load_causal_lm

SHAPES = ((2, 8, 12, 16), (8, 8, 12, 64), (2, 8, 256, 48))  # prompts, responses, their tokens


@dataclass
class Args:
    models: tuple[str, ...] = ("assets/real/base", "assets/real/gemma")
    """folders of checkpoints"""
    repeats: int = 7
    """turns of each side, after one that does not count"""


def measure(folder: Path, repeats: int) -> None:
    """All shapes of one checkpoint."""
    tokenizer = common.load_tokenizer("--models", str(folder))
    args = replace(brain.Args(), policy=str(folder), dtype="float32")
    policy = load_causal_lm(args, tokenizer, tokenizer.eos_token_id, DEVICE)
    policy.end_tokens = []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.to(DEVICE).eval()
    for count, n, length, most in SHAPES:
        draw = torch.Generator().manual_seed(1)
        size = (count, length)
        tokens = torch.randint(100, policy.config.vocab_size - 100, size, generator=draw)
        prompts = [common.Prompt("", row) for row in tokens.tolist()]
        inputs = {"input_ids": tokens.to(DEVICE), "attention_mask": torch.ones_like(tokens)}
        config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            min_new_tokens=most,
            num_return_sequences=n,
            pad_token_id=0,
        )

        def ours_s(prompts=prompts, n=n, most=most) -> None:
            batch = common.sample(policy, prompts, n, most, 1.0, seed=1)
            assert batch.lengths().min() == most

        def theirs_s(inputs=inputs, config=config, end=length + most) -> None:
            assert theirs.generate(**inputs, generation_config=config).shape[1] == end

        times = take_turns({"ours": ours_s, "generate": theirs_s}, repeats)
        line = {"model": f"{folder.name}, {policy.config.model_type}"}
        line["weights"] = sum(weight.numel() for weight in theirs.parameters())
        line |= {"prompts": count, "samples": n, "prompt": length, "response": most}
        line |= ratio(times["ours"], times["generate"])
        line |= {f"{side}_s": round(statistics.median(x), 3) for side, x in times.items()}
        line |= {"device": DEVICE.type, "threads": torch.get_num_threads()}
        add("generate", line)


def main(args: Args) -> None:
    """One checkpoint after the other."""
    for name in args.models:
        folder = ROOT / name
        if folder.exists():
            measure(folder, args.repeats)
        else:
            print(f"{name}: not there; `python -m prepare.real` makes it")


if __name__ == "__main__":
    main(tyro.cli(Args))
