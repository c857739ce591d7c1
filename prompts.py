"""Prompts: the rows of a data set, how they are read, kept, encoded and dealt out to the steps."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import datasets

from runlog import load, require

PLACE = None  # a key that no JSON object has: the row's file and line

@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy reads it, and what the data set answers to it."""
    text: str
    tokens: list[int]
    reference: str | None = None  # the data set's completion, or else its chosen response
    chosen: str | None = None
    rejected: str | None = None
    messages: list[dict] | None = None  # set when the data set holds chat messages
    reference_reward: float | None = None  # set on held-out prompts

def read_splits(path: str) -> dict:
    """Rows by the name of their split: a local file or folder, or a hub name, as `datasets` finds
    them. Local .jsonl files are read here: Arrow takes numbers for text, names no bad line, and
    crashes the process on a deeply nested one."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    source = {"path": kind, "data_files": path} if kind else {"path": path}
    files = datasets.load_dataset_builder(**source).config.data_files or {}
    if files and all(x.endswith(".jsonl") and Path(x).exists() for x in sum(files.values(), [])):
        return {str(split): sum(map(read_lines, files[split]), []) for split in files}
    return datasets.load_dataset(**source)

def read_lines(path: str) -> list[dict]:
    """The rows of a .jsonl file, each with its PLACE. Blank lines are no rows; any other line that
    is no object is a ValueError."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {getattr(error, 'msg', error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object, with columns")
        rows.append(row | {PLACE: f"--dataset {where}"})
    return rows

def _object(pairs: list[tuple]) -> dict:
    """A JSON object whose names are unique; Python would keep the last of two."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("two columns have one name")
    return row

def split_row(row: dict) -> tuple:
    """(prompt, reference, chosen, rejected) of a row with columns prompt (+ completion), or prompt,
    chosen, rejected, or chosen, rejected with the prompt in both; texts or lists of messages."""
    names = ("prompt", "completion", "chosen", "rejected")
    prompt, completion, chosen, rejected = (row.get(name) for name in names)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        # Two transcripts: the prompt is what they share, up to the assistant's last turn.
        shared, turn = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
        cut = shared.rfind(turn) + len(turn) if turn in shared else shared.rfind(" ") + 1
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    answers = [x for x in (completion, chosen, rejected) if x is not None]
    if answers and isinstance(answers[0], list) and not isinstance(prompt, list):
        prompt = answers[0][:-1]
    turns = [x for x in (prompt, *answers) if isinstance(x, list)]
    good = all(x and all(isinstance(m, dict) and isinstance(m.get("role"), str)
                         and isinstance(m.get("content"), str) for m in x) for x in turns)
    if not good or not all(isinstance(x, str | list) for x in (prompt, *answers)):
        raise ValueError(f"needs text, or lists of messages with role and content, as {names}")
    completion, chosen, rejected = (answer[-1]["content"] if isinstance(answer, list) else answer
                                    for answer in (completion, chosen, rejected))
    return prompt, chosen if completion is None else completion, chosen, rejected

def encode_prompt(tokenizer, prompt: str | list[dict], where="") -> tuple[str, list[int]]:
    """(text, tokens) of a prompt with one start token, where there is one, and no end token. Chat
    messages go through the tokenizer's template, which writes the start token itself."""
    if isinstance(prompt, list):
        try:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template refuses roles in its own way
            require(False, f"{where or prompt}: chat template of {tokenizer.name_or_path}: {error}")
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, bare = (tokenizer(prompt, add_special_tokens=x)["input_ids"] for x in (True, False))
    return prompt, tokens[:-1] if tokens[-1:] != bare[-1:] else tokens

def keep_prompts(args, tokenizer, rows, order: list[int], most: int, what: str) -> list[Prompt]:
    """The first `most` usable prompts of `rows` in `order`; what is dropped is counted and said."""
    kept, empty, long = [], 0, 0
    for i in order:
        if len(kept) == most:
            break
        where = f"--dataset {args.dataset}: row {i}"
        try:
            row = rows[i]
            where = row.get(PLACE, where)
            prompt, *answers = split_row(row)
        except ValueError as error:
            require(False, f"{where}: {error}")
        messages = prompt if isinstance(prompt, list) else None
        require(not messages or tokenizer.chat_template, f"--dataset {args.dataset}: holds chat "
                f"messages, but the tokenizer of --policy {args.policy} has no chat template")
        text, tokens = encode_prompt(tokenizer, prompt, where) if prompt else ("", [])
        if not tokens or not all(answer is None or answer.strip() for answer in answers):
            empty += 1
        elif len(tokens) > args.max_prompt_tokens:
            long += 1
        else:
            kept.append(Prompt(text, tokens, *answers, messages))
    print(f"{len(kept):,} {what} prompts; dropped {empty} with an empty prompt or completion and "
          f"{long} longer than --max-prompt-tokens {args.max_prompt_tokens}")
    require(kept, f"--dataset {args.dataset}: no usable {what} prompt")
    return kept

def load_prompts(args, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts in random order, as many as the run needs; fixed held-out prompts)."""
    name = args.dataset
    splits = load("--dataset", name, read_splits)
    test = [split for split in splits if split.startswith(("test", "valid", "eval"))]
    train = [split for split in splits if split not in test]
    require(train, f"--dataset {name}: has splits {list(splits)}, and none to train on")
    rows, held_out = splits[train[0]], splits[(test or train)[0]]
    columns = getattr(rows, "column_names", None) or list(dict.fromkeys(
        column for row in rows for column in row if column != PLACE))
    require("prompt" in columns or {"chosen", "rejected"} <= set(columns), f"--dataset {name}: has "
            f"columns {columns[:20]}; needed are prompt (+ completion), or chosen and rejected")
    count, rest = len(rows), range(len(held_out))
    if not test:
        require(count > 1, f"--dataset {name}: no usable row beside the one to hold out")
        count -= min(args.eval_prompts, count // 2)
        rest = rest[count:]
        print(f"--dataset {name}: one split only, so its rows from {count} on are held out")
    order = random.Random(args.seed).sample(range(count), count)
    most = args.steps * args.prompts_per_step
    return (keep_prompts(args, tokenizer, rows, order, most, "training"),
            keep_prompts(args, tokenizer, held_out, rest, args.eval_prompts, "held-out"))

def pick(prompts: list[Prompt], step: int, args, rank: int, world: int) -> list[Prompt]:
    """This process's share of the prompts of `step` (from 1); every lap has an order of its own."""
    steps = range((step - 1) * args.prompts_per_step, step * args.prompts_per_step)
    orders = {lap: random.Random(seed_of(args.seed, "order", lap)).sample(prompts, len(prompts))
              for lap in {i // len(prompts) for i in steps}}
    return [orders[i // len(prompts)][i % len(prompts)] for i in steps][rank::world]

def seed_of(*parts) -> int:
    """A seed for a generator from whatever tells its draws from all others."""
    return random.Random(repr(parts)).getrandbits(63)
