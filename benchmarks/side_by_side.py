"""What the comparisons with others share: the model, its words, turns, peak memory and the file."""

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import common
from benchmarks.where import ROOT, about

VOCABULARY = 8_000


def make_model(kind: type = transformers.LlamaForCausalLM, layers: int = 6, width: int = 256,
               vocabulary: int = VOCABULARY) -> transformers.PreTrainedModel:
    """A Llama with random weights; if nothing is said, that of all ratios."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 43 // 16,
        num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1)
    model = kind(config).eval()
    model.mixed, model.shared_rows, model.end_tokens = False, True, [1]
    return model


def make_ours(*args, **shape) -> transformers.PreTrainedModel:
    """The same as `common.load_model` makes it ready."""
    model = make_model(*args, **shape)
    common.turn_products(model)
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens, but for its pad and end tokens: those
    are found inside other words, so a "1" would cut a "310" in three."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"pad": 0, "end": 1} | {str(i): i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="pad"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="pad",
                                                eos_token="end", padding_side="left")


def peak_memory(make_step: Callable[[], Callable], steps: int = 3) -> float:
    """MiB this process takes at its peak over so many steps, models included, imports not."""
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    before = status("VmRSS")
    step = make_step()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    for _ in range(steps):
        step()
    return (status("VmHWM") - before) / 1024


def memory_of(module: str, side: str, shape: tuple[int, ...]) -> float:
    """`peak_memory` of one side, in a process of its own."""
    command = [sys.executable, "-m", module, "--memory-of", side, "--shapes", *map(str, shape)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def take_turns(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, in turns, after one turn that does not count."""
    times = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, step in sides.items():
            begin = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def summary(times: dict[str, list[float]], memory: dict[str, float], peer: str = "trl") -> dict:
    """Medians, and the peer's cost over ours: the median over the turns, the least and the most."""
    ratios = [b / a for a, b in zip(times["ours"], times[peer])]
    return {"ratio": round(statistics.median(ratios), 2), "ratio_least": round(min(ratios), 2),
            "ratio_most": round(max(ratios), 2),
            "our_s": round(statistics.median(times["ours"]), 3),
            f"{peer}_s": round(statistics.median(times[peer]), 3), "repeats": len(ratios),
            "our_peak_mib": round(memory["ours"]), f"{peer}_peak_mib": round(memory[peer]),
            "memory_ratio": round(memory["ours"] / memory[peer], 2),
            peer: importlib.import_module(peer).__version__} | about()


def add(name: str, line: dict) -> None:
    """Prints a line of results and adds it to benchmarks/results/<name>.jsonl."""
    print(json.dumps(line), flush=True)
    with open(ROOT / "benchmarks" / "results" / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
