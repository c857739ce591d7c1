"""Rows of a data set become prompts.

Reading, splitting and choosing rows is the `datasets` library's and is called through
`load_prompts`; here rows of the usual column formats become a `Prompt`, laid out by the policy's
chat template, with the answers that the data set gives. `common` lays the same prompts out once
more for the reward model.
"""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from plumbing.models import is_function, load_tokenizer, room
from plumbing.run import explained, found, require, seed_of

COLUMNS = ("prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy reads it, and what the data set answers to it."""

    text: str
    tokens: list[int]
    reference: str | None = None  # the data set's completion, or else its chosen response
    chosen: str | None = None
    rejected: str | None = None
    source: str | list[dict] | None = None  # as the data set has it, where that is not `text`
    reference_reward: float | None = None  # set on held-out prompts

    def __post_init__(self):
        object.__setattr__(self, "source", self.source or self.text)


# ── How a model reads text ────────────────────────────────────────────────────────────────────────


class Layout:
    """What stands before and behind an answer, as one model was trained to read it.

    Where its tokenizer has a chat template, text too becomes a user's turn, unless `raw`. The
    methods raise whatever a template raises at messages that it refuses.
    """

    def __init__(self, tokenizer, raw: bool = False, arguments: str = "{}"):
        self.tokenizer = tokenizer
        self.raw = raw
        with explained(f"--chat-template-kwargs {arguments}"):
            self.arguments = dict(json.loads(arguments))

    def turns(self, prompt: str | list[dict]) -> list[dict] | None:
        """The prompt as chat messages, or None where it is read as plain text."""
        has_template = bool(self.tokenizer.chat_template)
        if isinstance(prompt, str):
            return _turns_of(prompt) if has_template and not self.raw else None
        if not has_template:
            name = self.tokenizer.name_or_path
            raise ValueError(f"chat messages, but {name} has no chat template")
        return prompt

    def before(self, prompt: str | list[dict]) -> str:
        """The text that a policy continues."""
        turns = self.turns(prompt)
        return self._write(turns, add_generation_prompt=True) if turns else prompt

    def around(self, prompt: str | list[dict]) -> tuple[str, list[int]]:
        """(text before an answer, tokens behind it) in a finished conversation.

        A template may write more there than it lets a policy continue: Qwen3 an empty thought.
        """
        turns = self.turns(prompt)
        if not turns:
            return prompt, [self.tokenizer.eos_token_id]
        whole = self._write([*turns, {"role": "assistant", "content": "<answer>"}])
        before, _, behind = whole.rpartition("<answer>")
        return before, encode_behind(self.tokenizer, "<answer>", [behind])[0]

    def _write(self, turns: list[dict], **more) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **self.arguments, **more)

    def end_token(self) -> int:
        """What ends a policy's answer: the end of a chat turn, or of the text."""
        if self.turns(""):
            first = self.around("")[1][:1]
            if first and first[0] in self.tokenizer.get_added_vocab().values():
                return first[0]
        return self.tokenizer.eos_token_id

    def encode(self, prompt: str | list[dict], text: str) -> list[int]:
        """Tokens of `text`, the prompt laid out: one start token, where there is one, no end."""
        bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.turns(prompt):
            return bare  # a template writes the start token itself
        tokens = self.tokenizer(text)["input_ids"]
        return tokens[:-1] if tokens[-1:] != bare[-1:] else tokens


def encode_behind(tokenizer, text: str, answers: list[str]) -> list[list[int]]:
    """Tokens of each answer behind `text`.

    Both are encoded together and cut: alone, an answer would begin with the space that
    SentencePiece writes before any text. Where its first letters melt into the last token of
    `text`, it is encoded alone.
    """
    encode = partial(tokenizer, add_special_tokens=False)
    start = encode(text)["input_ids"]
    together = encode([text + answer for answer in answers])["input_ids"]
    pairs = zip(together, encode(answers)["input_ids"])
    size = len(start)
    return [both[size:] if both[:size] == start else alone for both, alone in pairs]


def decode_behind(tokenizer, tokens: list[int], answers: list[list[int]]) -> list[str]:
    """Texts of the answers behind the tokens of a prompt, special tokens included."""
    decode = partial(
        tokenizer.batch_decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    before = tokens[-1:]  # a tokenizer may drop the space that begins a text
    (start,) = decode([before])
    return [text[len(start) :] for text in decode([before + answer for answer in answers])]


def policy_layout(args, tokenizer) -> Layout:
    """How --policy reads text."""
    return Layout(tokenizer, args.template in ("raw", "raw-policy"), args.chat_template_kwargs)


def reward_layout(args) -> Layout:
    """How --reward-model reads text."""
    tokenizer = load_tokenizer("--reward-model", args.reward_model)
    return Layout(tokenizer, args.template in ("raw", "raw-reward"))


def _turns_of(text: str) -> list[dict]:
    """Text as one turn of a user; a transcript of Anthropic's HH as its turns."""
    if not text.startswith("\n\nHuman:") or not text.endswith("\n\nAssistant:"):
        return [{"role": "user", "content": text}]
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2])
    return [{"role": roles[who], "content": said.strip()} for who, said in pairs]


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def load_prompts(args, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts in random order, as many as the run needs; fixed held-out prompts)."""
    name, selectors = _selected(args.dataset)
    splits = _read_splits(name, selectors.pop("config", None))
    test = [split for split in splits if split.startswith(("test", "valid", "eval"))]
    train = [split for split in splits if split not in test]
    require(train, f"--dataset {name}: has splits {list(splits)}, and none to train on")
    train = selectors.pop("split", train[0])
    test.sort(key=lambda split: split != train.replace("train", "test"))  # train_x with test_x
    test = selectors.pop("test", test[0] if test else None)
    for split in (train, test or train):
        require(split in splits, f"--dataset {args.dataset}: has splits {list(splits)}")
    rows = _renamed(args.dataset, splits[train], selectors)
    held_out = _renamed(args.dataset, splits[test], selectors) if test else rows
    # The seed of a run does not choose what it is evaluated on.
    order, apart = _in_random_order(len(rows), args.seed), _in_random_order(len(held_out), 0)
    counts = len(rows), len(held_out)
    if not test:
        require(len(rows) > 1, f"--dataset {name}: no usable row beside the one to hold out")
        apart = list(islice(apart, min(args.eval_prompts, len(rows) // 2)))
        held = set(apart)
        order = (number for number in order if number not in held)
        counts = len(rows) - len(apart), len(apart)
    said = "{:,} rows of split {} to train on, {:,} held out, of split {}"
    print(f"--dataset {name}:", said.format(counts[0], train, counts[1], test or train))
    reader = _Reader(args, tokenizer)
    most = args.steps * args.prompts_per_step
    train_prompts = reader.keep(rows, order, most, "training")
    return train_prompts, reader.keep(held_out, apart, args.eval_prompts, "held-out")


def _in_random_order(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count`, each once. It remembers those that were taken, not all."""
    draw, taken = random.Random(seed), set()
    while len(taken) < count:
        number = draw.randrange(count)
        if number not in taken:
            taken.add(number)
            yield number


def _selected(dataset: str) -> tuple[str, dict]:
    """(name, selectors) of NAME, NAME:CONFIG or NAME:split=train_prefs,prompt=question."""
    if Path(dataset).exists():
        return dataset, {}
    name, _, rest = dataset.partition(":")
    parts = [part if "=" in part else f"config={part}" for part in rest.split(",") if part]
    selectors = dict(part.split("=", 1) for part in parts)
    known = ("config", "split", "test", *COLUMNS)
    for selector in selectors:
        require(selector in known, f"--dataset {dataset}: {selector} is none of {', '.join(known)}")
    return name, selectors


def _read_splits(name: str, config: str | None = None) -> dict:
    """The splits of a local file or folder, or of a data set of the hub."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nothing leaves the machine
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    with found("--dataset", name) as path:
        if kind:
            return datasets.load_dataset(kind, data_files=path)
        return datasets.load_dataset(path, config)


def _renamed(dataset: str, rows, columns: dict):
    """The rows with the columns that --dataset names under our names."""
    found_columns = rows.column_names
    for theirs in columns.values():
        require(theirs in found_columns, f"--dataset {dataset}: has columns {found_columns[:20]}")
    hidden = [ours for ours, theirs in columns.items() if ours in found_columns and ours != theirs]
    names = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    rows = rows.remove_columns(hidden).rename_columns(names)
    require(
        "prompt" in rows.column_names or {"chosen", "rejected"} <= set(rows.column_names),
        f"--dataset {dataset}: has columns {found_columns[:20]}; needed are prompt (+ completion), "
        "or chosen and rejected",
    )
    return rows


class _Reader:
    """Rows become prompts that both models can read."""

    def __init__(self, args, tokenizer):
        self.dataset = args.dataset
        self.policy = policy_layout(args, tokenizer)
        response = args.max_response_tokens
        context = room("--policy", args.policy)
        self.limit = args.max_prompt_tokens or context - response
        require(
            self.limit > 0,
            f"--policy {args.policy}: its context of {context} tokens leaves no room for a prompt "
            f"in front of --max-response-tokens {response}; lower it",
        )
        self.reward = None
        if args.reward_model and not is_function(args.reward_model):
            self.reward = reward_layout(args)
            self.reward_limit = room("--reward-model", args.reward_model) - response

    def keep(self, rows, order: Iterable[int], most: int, what: str) -> list[Prompt]:
        """The first `most` usable prompts of the rows; what is dropped is counted and said."""
        kept, dropped = [], Counter()
        for number in order:
            if len(kept) == most:
                break
            with explained(f"--dataset {self.dataset}: {what} row {number}"):
                prompt, problem = self.read(rows[number])
            if problem:
                dropped[problem] += 1
            else:
                kept.append(prompt)
        said = [f"dropped {count:,} {problem}" for problem, count in dropped.most_common(5)]
        said = "; ".join([f"{len(kept):,} {what} prompts", *said])
        print(said)
        require(kept, f"--dataset {self.dataset}: no usable {what} prompt; {said}")
        return kept

    def read(self, row: dict) -> tuple[Prompt | None, str]:
        """The prompt of a row, or else what is wrong with it."""
        from jinja2 import TemplateError

        source, *answers = split_row(row)
        if not source or not all(answer.strip() for answer in answers if answer is not None):
            return None, "with an empty prompt or completion"
        try:
            text = self.policy.before(source)
            if self.reward:
                scored, closing = self.reward.around(source)
        except TemplateError as error:
            return None, f"that a chat template refuses ({error})"
        tokens = self.policy.encode(source, text)
        if not tokens:
            return None, "with an empty prompt or completion"
        if len(tokens) > self.limit:
            return None, f"longer than --max-prompt-tokens {self.limit}"
        if self.reward:
            length = len(self.reward.encode(source, scored)) + len(closing)
            if length > self.reward_limit:
                return None, "that leave --reward-model's context no room for a response"
        if self.policy.turns(source):  # behind a turn's begin no space is due
            answers = [answer and answer.strip() for answer in answers]
        return Prompt(text, tokens, *answers, source), ""


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
    texts = ("role", "content")
    return isinstance(item, dict) and all(isinstance(item.get(text), str) for text in texts)


def _answer(part: str | list[dict] | None) -> str | None:
    return part[-1]["content"] if isinstance(part, list) else part


def pick(prompts: list[Prompt], step: int, args, rank: int, world: int) -> list[Prompt]:
    """This process's share of the prompts of `step` (from 1). Each epoch has its own order.

    The first keeps that of `prompts`: a run of more steps, which reads more of them, begins alike.
    """
    picked, orders = [], {0: prompts}
    for number in range((step - 1) * args.prompts_per_step, step * args.prompts_per_step):
        epoch, place = divmod(number, len(prompts))
        if epoch not in orders:
            shuffled = random.Random(seed_of(args.seed, "order", epoch))
            orders[epoch] = shuffled.sample(prompts, len(prompts))
        picked.append(orders[epoch][place])
    return picked[rank::world]
