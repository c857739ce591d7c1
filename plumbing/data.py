"""Rows of a data set become prompts.

Reading, splitting and choosing rows is the `datasets` library's and is called through
`load_prompts`; here rows of the usual column formats become a `Prompt`, which holds the tokens that
the policy reads, and the answers that the data set gives. `common` calls `encode_prompt` once more
for a reward model with a tokenizer of its own.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from plumbing.run import explained, found, require, seed_of


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


def load_prompts(args, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts in random order, as many as the run needs; fixed held-out prompts)."""
    name = args.dataset
    splits = _read_splits(name)
    test = [split for split in splits if split.startswith(("test", "valid", "eval"))]
    train = [split for split in splits if split not in test]
    require(train, f"--dataset {name}: has splits {list(splits)}, and none to train on")
    rows = splits[train[0]]
    columns = rows.column_names
    require(
        "prompt" in columns or {"chosen", "rejected"} <= set(columns),
        f"--dataset {name}: has columns {columns[:20]}; needed are prompt (+ completion), or "
        "chosen and rejected",
    )
    if test:
        count, held_out = len(rows), splits[test[0]]
    else:
        require(len(rows) > 1, f"--dataset {name}: no usable row beside the one to hold out")
        count = len(rows) - min(args.eval_prompts, len(rows) // 2)
        held_out = rows.skip(count)
        print(f"--dataset {name}: one split only, so its rows from {count} on are held out")
    order = random.Random(args.seed).sample(range(count), count)
    most = args.steps * args.prompts_per_step
    train_prompts = _keep(args, tokenizer, rows.select(order), most, "training")
    return train_prompts, _keep(args, tokenizer, held_out, args.eval_prompts, "held-out")


def _read_splits(name: str) -> dict:
    """The splits of a local file or folder, or of a data set of the hub."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nothing leaves the machine
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    with found("--dataset", name) as path:
        if kind:
            return datasets.load_dataset(kind, data_files=path)
        return datasets.load_dataset(path)


def _keep(args, tokenizer, rows, most: int, what: str) -> list[Prompt]:
    """The first `most` usable prompts of `rows`; what is dropped is counted and said."""
    kept, empty, long = [], 0, 0
    for number in range(len(rows)):
        if len(kept) == most:
            break
        with explained(f"--dataset {args.dataset}: {what} row {number}"):
            prompt, reference, chosen, rejected = split_row(rows[number])
            text, tokens = encode_prompt(tokenizer, prompt) if prompt else ("", [])
        answers = [answer for answer in (reference, chosen, rejected) if answer is not None]
        if not tokens or not all(answer.strip() for answer in answers):
            empty += 1
        elif len(tokens) > args.max_prompt_tokens:
            long += 1
        else:
            messages = prompt if isinstance(prompt, list) else None
            kept.append(Prompt(text, tokens, reference, chosen, rejected, messages))
    print(
        f"{len(kept):,} {what} prompts; dropped {empty} with an empty prompt or completion and "
        f"{long} longer than --max-prompt-tokens {args.max_prompt_tokens}"
    )
    require(kept, f"--dataset {args.dataset}: no usable {what} prompt")
    return kept


def split_row(row: dict) -> tuple:
    """(prompt, reference, chosen, rejected) of a row; the prompt is text or a list of messages.

    Columns: prompt (+ completion); or prompt, chosen, rejected; or chosen, rejected, each with the
    prompt in front. Each is text or a list of chat messages, whose last one is the answer. Raises
    ValueError where a column is neither.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_transcripts(chosen, rejected)
    answers = [answer for answer in (completion, chosen, rejected) if answer is not None]
    if answers and isinstance(answers[0], list) and not isinstance(prompt, list):
        prompt = answers[0][:-1]  # whole conversations: all but their last message
    for part in (prompt, *answers):
        if not isinstance(part, str) and not _is_chat(part):
            raise ValueError(
                "needs text, or lists of messages with role and content, as prompt, completion, "
                f"chosen, rejected; found {str(part):.60}"
            )
    completion, chosen, rejected = _answer(completion), _answer(chosen), _answer(rejected)
    return prompt, chosen if completion is None else completion, chosen, rejected


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Anthropic's HH: the prompt is what both share, up to the assistant's last turn."""
    shared, turn = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
    end = shared.rfind(turn) + len(turn) if turn in shared else shared.rfind(" ") + 1
    return chosen[:end], chosen[end:], rejected[end:]


def _is_chat(part) -> bool:
    return isinstance(part, list) and bool(part) and all(_is_message(item) for item in part)


def _is_message(item) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str)
    )


def _answer(part: str | list[dict] | None) -> str | None:
    return part[-1]["content"] if isinstance(part, list) else part


def encode_prompt(tokenizer, prompt: str | list[dict]) -> tuple[str, list[int]]:
    """(text, tokens) of a prompt with one start token, where there is one, and no end token.

    Chat messages go through the tokenizer's template, which writes the start token itself. Raises
    whatever a template raises at roles that it refuses.
    """
    if isinstance(prompt, list):
        if not tokenizer.chat_template:
            raise ValueError(f"chat messages, but {tokenizer.name_or_path} has no chat template")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(prompt)["input_ids"]
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt, tokens[:-1] if tokens[-1:] != bare[-1:] else tokens


def pick(prompts: list[Prompt], step: int, args, rank: int, world: int) -> list[Prompt]:
    """This process's share of the prompts of `step` (from 1). Each epoch has its own order."""
    picked, orders = [], {}
    for number in range((step - 1) * args.prompts_per_step, step * args.prompts_per_step):
        epoch, place = divmod(number, len(prompts))
        if epoch not in orders:
            shuffled = random.Random(seed_of(args.seed, "order", epoch))
            orders[epoch] = shuffled.sample(prompts, len(prompts))
        picked.append(orders[epoch][place])
    return picked[rank::world]
