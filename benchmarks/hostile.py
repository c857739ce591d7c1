"""Data files that nobody should have written, and what reading them comes to.

Each input is a .jsonl file of a few good rows, some of which were spoiled. Reading must end in
prompts, every row that `datasets` found accounted for, or in one line that names --dataset and the
file, exit code 2. Two inputs are left out, as Arrow itself crashes at them: some 20,000 levels of
nesting (here are 3,000 at most), and a first line that is `null`.
"""

import collections
import contextlib
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import brain
import common
from plumbing import data

TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}
{{ raise_exception('no system role') }}{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"""
COLUMNS = ("prompt", "completion", "chosen", "rejected")
TEXTS = [
    "",
    " ",
    "\t\n",
    "\0",
    "a\0b",
    "\x1b[2J\x1b[31m",
    "\x7f",
    "\u2028",
    "\u202e live",
    "\ufeff",
    "\ufffe",
    "a\rb",
    "e\u0301" * 40,
    "\U0001f469\u200d\U0001f680",
    "\U0010ffff",
    "<pad><eos>",
    "../../etc/passwd",
    "%s%n{0}",
    "'; DROP",
    "\\",
    "\n\nAssistant:",
    "NaN",
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3.5,
    1e308,
    10**30,
    [],
    {},
    [[]],
    [None],
    ["a"],
    [{}],
    [1, "a"],
    {"text": "a"},
    {"role": "user", "content": "a"},
]
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "system", "content": "b"},
    {"role": "user"},
    {"content": "a"},
    {"role": None, "content": "a"},
    {"role": "user", "content": None},
    {"role": "user", "content": [{"text": "a"}]},
    {"role": ["user"], "content": "a"},
    {"role": "", "content": ""},
    "user",
    None,
    5,
]
LINES = [
    b"",
    b"   ",
    b"{",
    b"}",
    b"{}",
    b"[]",
    b"5",
    b'"text"',
    b"hello",
    b"\xff\xfe",
    b"\x00",
    b"\xef\xbb\xbf{}",
    b"{'prompt': 'a'}",
    b'{"prompt": "a",}',
    b'{"prompt": "a"} {}',
    b'{"prompt": "a\nb"}',
    b'{"prompt": "a\x01b"}',
    b'{"prompt": "a\xff"}',
    b'{"prompt": NaN}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00\\ud800"}',
    b'{"prompt": "\\u00"}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "x": {"y": 1, "y": 2}}',
    b'{"prompt": "a", "n": 1e999}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"Prompt": "a"}',
    b'{" prompt": "a"}',
    b'{"": "a"}',
    b'{"prompt": "a"\r',
    b'{"prompt"}',
    b"<html>",
    b'prompt,completion\n"a","b"',
    b"\x1f\x8b\x08\x00",
    b"PAR1",
]


def deep(draws: random.Random) -> bytes:
    """A line nested up to 3,000 levels deep."""
    levels = draws.choice([5, 100, 900, 3000])
    opening, closing = draws.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inside = opening * levels + b"1" + closing * draws.choice([levels, levels - 1])
    return b'{"prompt": "a", "completion": "b", "x": ' + inside + b"}"


def row(draws: random.Random, form: int) -> dict:
    """A good row: text, a pair, transcripts, messages."""
    text = " ".join(draws.choice("write a review of the lodge".split()) for _ in range(5))
    user, good, bad = (
        {"role": role, "content": text + end}
        for role, end in (("user", ""), ("assistant", " good"), ("assistant", " bad"))
    )
    return [
        {"prompt": text, "completion": " good"},
        {"prompt": text, "chosen": " good", "rejected": " bad"},
        {
            "chosen": f"\n\nHuman: {text}\n\nAssistant: good",
            "rejected": f"\n\nHuman: {text}\n\nAssistant: bad",
        },
        {"prompt": [user], "completion": [good]},
        {"chosen": [user, good], "rejected": [user, bad]},
    ][form]


def spoil(draws: random.Random, good: dict) -> bytes:
    """A line made from a good row in one of many bad ways."""
    way, column = draws.randrange(9), draws.choice(COLUMNS)
    changed = dict(good)
    if way == 0:
        return draws.choice(LINES)
    if way == 1:
        return deep(draws)
    if way == 2:
        changed[column] = draws.choice(VALUES)
    elif way == 3:
        changed[column] = draws.choice(TEXTS)
    elif way == 4:
        changed.pop(draws.choice(list(good)))
    elif way == 5:
        changed[column] = draws.choices(MESSAGES, k=draws.randrange(4))
    elif way == 6:
        changed[draws.choice(["", "id", "Prompt", "None", "\0", "a" * 1000])] = draws.choice(VALUES)
    elif way == 7:
        size = 2**20 if draws.random() < 0.02 else 2**12
        changed[column] = draws.choice(["a", "the ", "\n", "\u2028", "\U0001f600"]) * size
        changed[column] = changed[column][:size]
    line = json.dumps(changed, ensure_ascii=draws.random() < 0.5).encode("utf-8", "surrogatepass")
    if way == 8:  # cut, or with some bytes of chance in it
        at = draws.randrange(len(line))
        line = line[:at] + draws.randbytes(draws.randrange(4)) + line[at + draws.randrange(3) :]
    return line


def inputs(count: int, seed: int) -> Iterator[bytes]:
    """The contents of `count` hostile files."""
    draws = random.Random(seed)
    for _ in range(count):
        form = draws.randrange(5)
        lines = [json.dumps(row(draws, form)).encode() for _ in range(draws.randrange(1, 9))]
        for _ in range(draws.randrange(1, 4)):
            at = draws.randrange(len(lines))
            lines[at] = spoil(draws, row(draws, draws.choice([form, form, draws.randrange(5)])))
        content = draws.choice([b"\n", b"\n", b"\r\n"]).join(lines)
        yield content + draws.choice([b"\n", b"", b"\n\n"])


def outcome(path: Path, content: bytes, tokenizer) -> tuple[str, str]:
    """(what reading the file came to, what is wrong with that)."""
    path.write_bytes(content)
    said, error = io.StringIO(), io.StringIO()
    args = brain.Args(dataset=str(path), max_prompt_tokens=200, reward_model="builtins:len")
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            kept = common.load_prompts(args, tokenizer)
    except SystemExit as stop:
        line, start = error.getvalue(), f"error: --dataset {path}: "
        good = stop.code == 2 and line.count("\n") == 1 and line.startswith(start)
        wrong = "" if good else f"code {stop.code}: {line[:300]!r}"
        named = re.match(r"(training|held-out) row \d+: ", line.removeprefix(start))
        return "refused, row named" if named else "refused as a whole", wrong
    except BaseException as failure:  # the point of it all
        return "traceback", f"{type(failure).__name__}: {failure!s:.200}"
    dropped = sum(map(int, re.findall(r"dropped (\d+)", said.getvalue())))
    total = sum(map(len, kept)) + dropped
    rows = sum(map(len, data._read_splits(str(path)).values()))
    wrong = "" if total == rows else f"{total} of {rows} rows accounted for"
    return "read" if not dropped else "read, with rows dropped and counted", wrong


def main(result: Path, count: int, seed: int = 1) -> None:
    """Reads `count` files; writes how often each outcome was seen, and what was wrong, as json."""
    tokenizer = common.load_tokenizer("--policy", "assets/tiny/sft")
    counts, problems = collections.Counter(), []
    path = result.with_name("hostile.jsonl")
    for number, content in enumerate(inputs(count, seed)):
        tokenizer.chat_template = TEMPLATE if number % 2 else None
        kind, wrong = outcome(path, content, tokenizer)
        counts[kind] += 1
        if wrong:
            problems.append(f"input {number}: {wrong}")
    result.write_text(json.dumps({"inputs": count, **counts, "problems": problems}))
