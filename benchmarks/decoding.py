"""What a decoding pass costs a GPU, counted on a pretended one: kernels, copies, waits.

    python -m benchmarks.decoding [--only WORD]

brain.py takes one step on random checkpoints of several architectures, on tests/pretend_gpu.py: 2
prompts of 64 tokens, 8 responses of 24. Widths are those of a small model; what is counted per
layer is that of a large one of the same structure. Adds a line per model to
benchmarks/results/decoding.jsonl:

  kernels_per_layer, kernels_outside   of a pass of the sampler, in a layer and outside of all
  weight_casts       casts and copies of weights, per pass
  moved              bytes that casts and copies read and write in a pass, over the floor: the
                     matrices in bfloat16, and the cache, each read once
  waits_per_token    of the host for the device, in the sampler's passes
  waits_per_step     in sampling, rewards, log-probs and update of a step
  fresh_shapes       per pass, for which attention would make a plan
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

from benchmarks.side_by_side import VOCABULARY, make_tokenizer
from benchmarks.where import ROOT, add

PROMPTS, SAMPLES, PROMPT, RESPONSE = 2, 8, 64, 24
PASS = "sample > token"
STEP = ("sample", "score", "logprobs", "forward", "backward", "clip", "AdamW")
COPIES = "copy_ cat index repeat constant_pad_nd".split()
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS = {  # name: (architecture, what differs from the shape above)
    "Llama, 4 heads per key head": ("llama", {}),
    "Llama, a key head each": ("llama", {"num_key_value_heads": 8}),
    "Qwen 3": ("qwen3", {}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 32}),
    "GPT-2": ("gpt2", None),
}
WAYS = {
    "mixed": ["--dtype", "mixed"],
    "bfloat16, adapters": ["--dtype", "bfloat16", "--lora-rank", "16"],
}


@dataclass
class Args:
    only: str = ""
    """only models whose names contain this"""


def make(folder: Path, architecture: str, more: dict | None) -> int:
    """Policy, reward model and prompts in a folder; returns the floor of a pass, in bytes."""
    tokenizer = make_tokenizer()
    shape = {"n_embd": 256, "n_layer": 2, "n_head": 8} if more is None else SHAPE | more
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, num_labels=1, **shape | ends
    )
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_config(config)
    reward = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, module in (("policy", policy), ("reward", reward)):
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(1)
    texts = [" ".join(str(draw.randrange(2, VOCABULARY)) for _ in range(PROMPT)) for _ in range(40)]
    lines = [json.dumps({"prompt": text, "completion": "2 3"}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    embeddings = policy.get_input_embeddings().weight
    head = policy.get_output_embeddings().weight
    read = sum(p.numel() for p in policy.parameters() if p.dim() > 1 and p is not embeddings)
    read += head.numel() * (head is embeddings)
    slots = PROMPTS * (PROMPT + SAMPLES * RESPONSE / 2)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = 2 * config.num_hidden_layers * slots * heads * (256 // config.num_attention_heads)
    return int(2 * (read + cache))


def count(folder: Path, way: list[str]) -> dict:
    """The counts of one step."""
    run, counts = folder / f"run {way[1]}", folder / "counts.json"
    command = [sys.executable, "tests/pretend_gpu.py", "--counts", counts, "brain.py"]
    command += ["--policy", folder / "policy", "--reward-model", folder / "reward"]
    command += ["--dataset", folder / "prompts.jsonl", "--lr", "1e-6", "--steps", "1"]
    command += ["--prompts-per-step", PROMPTS, "--samples-per-prompt", SAMPLES]
    command += ["--max-response-tokens", RESPONSE, "--eval-prompts", "2", "--eval-every", "99"]
    words = [str(word) for word in [*command, "--save-every", "99", "--run-dir", run, *way]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no shared rows" not in done.stdout, done.stdout + done.stderr
    return json.loads(counts.read_text())


def summary(counts: dict, floor: int) -> dict:
    """What the page shows."""
    outside, layers = counts["phases"][PASS], counts["phases"][f"{PASS} > block"]
    passes = outside["entered"]
    both = [*outside["ops"].items(), *layers["ops"].items()]
    moved = sum(size for name, (_, size) in both if re.split(r"\W+", name)[1] in COPIES)
    waits = [(phase, times) for phase, *_, times in counts["waits"]]
    fresh = layers["ops"].get("cuDNN plan", [0])[0]
    return {
        "kernels_per_layer": round(layers["kernels"] / layers["entered"], 1),
        "kernels_outside": round(outside["kernels"] / passes, 1),
        "weight_casts": sum(calls for name, (calls, _) in both if "of a weight" in name) / passes,
        "moved": round(moved / passes / floor, 3),
        "waits_per_token": round(sum(n for at, n in waits if at.startswith(PASS)) / passes, 2),
        "waits_per_step": sum(n for at, n in waits if at.split(" > ")[0] in STEP),
        "fresh_shapes": fresh / passes,
    }


def main(args: Args) -> None:
    """One model after the other."""
    for name, (architecture, more) in MODELS.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            floor = make(Path(folder), architecture, more)
            for way, words in WAYS.items():
                counts = count(Path(folder), words)
                add("decoding", {"model": name, "dtype": way} | summary(counts, floor))


if __name__ == "__main__":
    main(tyro.cli(Args))
