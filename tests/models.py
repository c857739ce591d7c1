"""Tiny random checkpoints of real architectures, and the flags to run on them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel

import brain
import common
from plumbing.data import Layout
from plumbing.models import Model

os.environ["HF_HUB_OFFLINE"] = "1"
WORDS = "the a good bad film was and it very i loved hated so plot actor".split()
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
NARROW = {"head_dim": 8, "num_key_value_heads": 2}
ARCHITECTURES = {  # the windows of 4 tokens are shorter than the rows of the tests
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": SMALL | {"rotary_pct": 0.5},
    "llama": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | NARROW,
    "gemma2": SMALL | NARROW | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": SMALL
    | NARROW
    | {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 4},
}


def make_model(architecture: str, vocab_size: int = 24, labels: int = 0, seed: int = 0, **more):
    """A Model: a causal LM, or a classifier if `labels`. Weights are large: attention must matter."""
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        **ARCHITECTURES[architecture]
        | {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
        | more,
    )
    if labels:
        config.num_labels = labels
    torch.manual_seed(seed)
    auto = (
        transformers.AutoModelForSequenceClassification
        if labels
        else transformers.AutoModelForCausalLM
    )
    return Model(with_large_weights(auto.from_config(config)), [] if labels else [1])


def with_large_weights(module, std: float = 0.25):
    """The module with random weights that are large enough for attention to matter."""
    for name, weight in module.eval().named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5 if "score" in name else std)
    return module


def word_tokenizer(words=WORDS, bos: bool = False, **special):
    """Word-level, `<pad> <eos> <unk> <bos>` first; `special` overrides, e.g. pad_token=None."""
    names = ["<pad>", "<eos>", "<unk>", "<bos>"]
    vocab = {word: i for i, word in enumerate(names + list(words))}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    special |= {"bos_token": "<bos>"} if bos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def bpe_tokenizer(text: str, size: int = 300, end: str = "<|endoftext|>", **special):
    """Byte-level BPE as GPT-NeoX, Llama 3 and Qwen have; end = pad."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, **special
    )


def save(folder: Path, model, tokenizer) -> str:
    """Writes a checkpoint; returns the folder's path."""
    module = model.module if isinstance(model, Model) else model
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Writes rows; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_world(folder: Path, architecture: str = "llama", **more) -> brain.Args:
    """Checkpoints and prompts of a small word world in `folder`, and flags for a short run on them."""
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    save(folder / "sft", make_model(architecture, size), tokenizer)
    save(folder / "rm", make_model("gpt2", size, labels=1, seed=1), tokenizer)
    rows = [
        {
            "prompt": " ".join(WORDS[(i * k) % 15] for k in range(1, 3 + i % 5)),
            "completion": " " + WORDS[i % 15],
        }
        for i in range(60)
    ]
    write_jsonl(folder / "data" / "train.jsonl", rows[:40])
    write_jsonl(folder / "data" / "test.jsonl", rows[40:])
    args = brain.Args(
        policy=str(folder / "sft"),
        reward_model=str(folder / "rm"),
        dataset=str(folder / "data"),
        run_dir=str(folder / "run"),
        steps=4,
        prompts_per_step=4,
        samples_per_prompt=4,
        max_prompt_tokens=16,
        max_response_tokens=6,
        eval_prompts=8,
        eval_every=2,
        save_every=2,
    )
    return replace(args, **more)


def flags(args: brain.Args, **more) -> list[str]:
    """The command line that means `args`."""
    default, values = brain.Args(), vars(args) | more
    words = ["--lr", str(values.pop("lr"))]  # which a policy of one's own needs, whatever it is
    for name, value in values.items():
        if isinstance(value, bool):
            words += [] if value == getattr(default, name) else [f"--no-{name.replace('_', '-')}"]
        elif value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def encode_prompt(tokenizer, prompt) -> tuple[str, list[int]]:
    """(text, tokens) that a policy of this tokenizer reads of a prompt of the data set."""
    layout = Layout(tokenizer)
    text = layout.before(prompt)
    return text, layout.encode(prompt, text)


def make_prompts(*rows: list[int]) -> list[common.Prompt]:
    """Prompts of given tokens."""
    return [common.Prompt(text=str(row), tokens=row, reference="good") for row in rows]
