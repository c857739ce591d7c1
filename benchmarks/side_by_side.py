"""The frame of all timing in turns: the model, its words, the turns, peak memory, the ratio."""

import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import common
from benchmarks.where import ROOT
from plumbing.data import Layout
from plumbing.models import Model, turn_products

VOCABULARY = 8_000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_module(
    kind: type = transformers.LlamaForCausalLM,
    layers: int = 6,
    width: int = 256,
    vocabulary: int = VOCABULARY,
) -> transformers.PreTrainedModel:
    """A Llama with random weights, as the peers take it; by default that of all ratios."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        num_labels=1,
    )
    return kind(config).eval()


def make_policy(**shape) -> Model:
    """The same as `common.load_policy` makes it ready: in `mixed` on a GPU."""
    module = make_module(**shape).to(DEVICE)
    if DEVICE.type == "cpu":
        turn_products(module)
    policy = Model(module, end_tokens=[1])
    policy.mixed = DEVICE.type == "cuda"
    return policy


def make_reward_model(tokenizer, **shape) -> common.RewardModel:
    """A classifier of the same shape, as `common.load_reward_model` makes it ready."""
    module = make_module(transformers.LlamaForSequenceClassification, **shape).to(DEVICE)
    if DEVICE.type == "cpu":
        turn_products(module)
    else:
        module.to(torch.bfloat16).score.float()
    module.requires_grad_(False)
    return common.RewardModel(
        tokenizer,
        [1],
        DEVICE,
        model=Model(module),
        layout=Layout(tokenizer),
        add_end=False,
        same_tokens=True,
    )


def make_prompts(length: int, count: int) -> list[common.Prompt]:
    """Prompts of random tokens, as many tokens each as `length` says."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(2, VOCABULARY, (count, length), generator=draw).tolist()
    return [common.Prompt("", tokens) for tokens in rows]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens.

    Pad and end token have other names: they are found inside other words, so that a "1" would cut a
    "310" in three.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"pad": 0, "end": 1} | {str(i): i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="pad"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="pad", eos_token="end", padding_side="left"
    )


def as_text(prompt: common.Prompt) -> str:
    """The prompt in the words of `make_tokenizer`."""
    return " ".join(map(str, prompt.tokens))


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


def clock() -> float:
    """Seconds, read after the device has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, in turns, after one turn that does not count."""
    times = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, step in sides.items():
            begin = clock()
            step()
            if turn:
                times[name].append(clock() - begin)
    return times


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Their time over ours in one turn: the median over the turns, the least and the most."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2),
        "ratio_most": round(max(ratios), 2),
        "repeats": len(ratios),
    }


def summary(times: dict[str, list[float]], memory: dict[str, float], peer: str) -> dict:
    """Medians of our side and the peer's, what the peer costs more, and the peer's version."""
    ours, theirs = times["ours"], times[peer]
    return ratio(ours, theirs) | {
        "our_s": round(statistics.median(ours), 3),
        f"{peer}_s": round(statistics.median(theirs), 3),
        "our_peak_mib": round(memory["ours"]),
        f"{peer}_peak_mib": round(memory[peer]),
        "memory_ratio": round(memory["ours"] / memory[peer], 2),
        peer: importlib.import_module(peer).__version__,
    }
