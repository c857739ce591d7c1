"""Makers of tiny random checkpoints, of their tokenizers and of data, and what runs on them share.

Nothing here is trained: a checkpoint has the files, the architecture and the tokenizer of a real
one, so that a test reaches the scripts by the three flags a user gives.
"""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import brain
import common

WORDS = "a film the plot was very good bad and long so it again".split()
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "gpt_neox": SHAPE,
    "llama": SHAPE | {"num_key_value_heads": 2},
    "qwen3": SHAPE | {"num_key_value_heads": 2, "head_dim": 8},
    "bert": SHAPE,
}


def word_tokenizer(start: bool = False, end: bool = False, **special):
    """Word-level; puts <bos> first if `start` and <eos> last if `end`, as some real ones do."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> " * start + "$A" + " <eos>" * end,
            special_tokens=[(name, vocab[name]) for name in ("<bos>", "<eos>")],
        )
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    if start:
        special["bos_token"] = "<bos>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def bpe_tokenizer(text: str, size: int = 300, end: str = "<|endoftext|>", **special):
    """Byte-level BPE trained on `text`, with no token but the end token and none to pad with."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, **special)


def model(architecture: str, tokenizer, labels: int = 0, seed: int = 0, **more):
    """A random causal LM, or a sequence classifier with `labels` labels."""
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        **CONFIGS[architecture]
        | {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
        | more,
    )
    kind = transformers.AutoModelForCausalLM
    if labels:
        config.num_labels, kind = labels, transformers.AutoModelForSequenceClassification
    torch.manual_seed(seed)
    made = kind.from_config(config).eval()
    for weight in made.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return made


def save(folder: Path, made, tokenizer) -> str:
    """Writes a checkpoint as `save_pretrained` does; returns its folder."""
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Writes one row a line; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict]:
    """Prompts of 2 to 5 words, with completions."""
    return [
        {
            "prompt": " ".join(WORDS[(i + k) % 11] for k in range(2 + i % 4)),
            "completion": " " + WORDS[i % 8],
        }
        for i in range(count)
    ]


def word_world(folder: Path) -> dict[str, str]:
    """Flags of the shortest run there is, on word-level checkpoints and 40 rows in `folder`."""
    tokenizer = word_tokenizer()
    write_jsonl(folder / "data" / "train.jsonl", rows(30))
    write_jsonl(folder / "data" / "test.jsonl", rows(40)[30:])
    return {
        "--policy": save(folder / "policy", model("llama", tokenizer), tokenizer),
        "--reward-model": save(folder / "reward", model("gpt2", tokenizer, 1, 1), tokenizer),
        "--dataset": str(folder / "data"),
        "--run-dir": str(folder / "run"),
        "--steps": "3",
        "--prompts-per-step": "4",
        "--samples-per-prompt": "3",
        "--max-prompt-tokens": "8",
        "--max-response-tokens": "5",
        "--eval-prompts": "6",
        "--eval-every": "2",
        "--save-every": "2",
        "--warmup-steps": "0",
        "--lr": "1e-2",
    }


def argv(flags: dict[str, str]) -> list[str]:
    """`--flag=value` words: a value may start with a minus sign."""
    return [f"{flag}={value}" for flag, value in flags.items()]


def train(flags: dict[str, str]) -> Path:
    """Runs brain.py's main in this process; returns the run folder."""
    args = common.parse_args(brain.Args, argv(flags))
    brain.main(args)
    return Path(args.resume or args.run_dir)


def refusal(flags: dict[str, str], capsys) -> str:
    """The one line on stderr with which a run must end, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def comparable(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the memory of the process decides."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "memory/")) and key != "tokens_per_s"
        }
        for line in read_log(run / "metrics.jsonl")
    ]


def same(ours, theirs) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs
