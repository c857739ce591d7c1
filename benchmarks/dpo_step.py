"""A DPO step side by side: dpo.py's against TRL's DPOTrainer, same model, same pairs, one process.

    python -m benchmarks.dpo_step [--repeats 7]

A step is reference log-probs, loss, backward pass, clipping and AdamW on 4 pairs with a shared
prompt, float32, on batches that are already tokens. The two sides take turns; the ratio of a turn
is TRL's time over ours. Peak memory is that of a fresh process for each side, less what it had
before its first step. Adds a line a shape to benchmarks/results/dpo_step.jsonl.
"""

import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import datasets
import torch
import transformers
import tyro

import common
import dpo
from benchmarks.where import ROOT, about

RESULTS = ROOT / "benchmarks" / "results" / "dpo_step.jsonl"
VOCABULARY, PAIRS, BETA = 8_000, 4, 0.1


@dataclass
class Args:
    shapes: list[tuple[int, int]] = field(
        default_factory=lambda: [(256, 48), (512, 53), (128, 128), (64, 512)])
    """(prompt, response) lengths in tokens"""
    repeats: int = 7
    """turns of each side, after one that does not count"""
    memory_of: str = ""
    """print the peak memory of one side (ours or trl) on the first shape, in MiB, and end"""


def make_model() -> transformers.PreTrainedModel:
    """6 layers of width 256, vocabulary 8,000, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=2048, bos_token_id=None, eos_token_id=1,
        pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.mixed, model.shared_rows, model.end_tokens = False, True, [1]
    return model


def make_rows(prompt: int, response: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Token lists of prompts [4] and of chosen and rejected responses [4][2]."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (PAIRS, prompt + 2 * response), generator=draw).tolist()
    return ([row[:prompt] for row in ids],
            [[row[prompt : prompt + response], row[prompt + response :]] for row in ids])


def our_step(prompt: int, response: int):
    """A function that takes one step of dpo.py's and returns its loss."""
    policy = make_model()
    ref, args = copy.deepcopy(policy).requires_grad_(False), dpo.Args(beta=BETA)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    prompts, responses = make_rows(prompt, response)
    items = [common.Prompt("", ids) for ids in prompts]
    batch = common.make_batch(items, prompts, responses, policy.device)
    tied = torch.zeros(PAIRS, dtype=torch.bool)

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


def trl_step(prompt: int, response: int):
    """A function that takes one step of TRL's and returns its loss."""
    import trl
    from tokenizers import Tokenizer, models

    prompts, responses = make_rows(prompt, response)
    vocab = {str(i): i for i in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="0")), pad_token="0",
        eos_token="1")
    rows = {"prompt_ids": prompts, "chosen_ids": [pair[0] for pair in responses],
            "rejected_ids": [pair[1] for pair in responses]}
    dummy = {"prompt": ["2"] * PAIRS, "chosen": ["3"] * PAIRS, "rejected": ["4"] * PAIRS}
    config = trl.DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=PAIRS,
                           beta=BETA, report_to=[], use_cpu=True, bf16=False, max_length=None,
                           gradient_checkpointing=False)
    trainer = trl.DPOTrainer(make_model(), ref_model=make_model(), args=config,
                             train_dataset=datasets.Dataset.from_dict(dummy),
                             processing_class=tokenizer)
    batch = trainer.data_collator([dict(zip(rows, values)) for values in zip(*rows.values())])
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-6, fused=True)

    def step() -> float:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def peak_memory(step) -> float:
    """MiB by which the process's peak grows over three steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main(args: Args) -> None:
    """Measures all shapes."""
    if args.memory_of:
        side = our_step if args.memory_of == "ours" else trl_step
        print(peak_memory(side(*args.shapes[0])))
        return
    import trl

    for shape in args.shapes:
        sides, times, losses = {"ours": our_step(*shape), "trl": trl_step(*shape)}, {}, {}
        for turn in range(args.repeats + 1):
            for name, step in sides.items():
                begin = time.perf_counter()
                loss = step()
                if turn:
                    times.setdefault(name, []).append(time.perf_counter() - begin)
                losses.setdefault(name, []).append(loss)
        assert abs(losses["ours"][1] - losses["trl"][1]) < 1e-4, losses
        ratios = [b / a for a, b in zip(times["ours"], times["trl"])]
        memory = {}
        for name in sides:
            command = [sys.executable, "-m", "benchmarks.dpo_step", "--memory-of", name, "--shapes",
                       *map(str, shape)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            memory[name] = float(done.stdout.split()[-1])
        line = {"prompt": shape[0], "response": shape[1], "pairs": PAIRS,
                "ratio": round(statistics.median(ratios), 2),
                "ratio_least": round(min(ratios), 2), "ratio_most": round(max(ratios), 2),
                "our_s": round(statistics.median(times["ours"]), 3),
                "trl_s": round(statistics.median(times["trl"]), 3),
                "our_peak_mib": round(memory["ours"]), "trl_peak_mib": round(memory["trl"]),
                "memory_ratio": round(memory["ours"] / memory["trl"], 2),
                "repeats": args.repeats, "trl": trl.__version__} | about()
        print(json.dumps(line), flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
