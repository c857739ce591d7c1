"""Every column format of a data set, one start token, no end token, what is dropped, the order."""

from types import SimpleNamespace

import datasets
import pytest
from checkpoints import SPECIAL, TEMPLATE, bpe_tokenizer, rows, word_tokenizer, write_jsonl

import brain
import common

SYSTEM, USER, MORE = (
    {"role": role, "content": text}
    for role, text in (("system", "it was"), ("user", "the film"), ("user", "and the plot"))
)
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("very good", "very bad"))
PAD, EOS, UNK, BOS = range(4)


def read(dataset, tokenizer=None, **flags) -> tuple[list[common.Prompt], list[common.Prompt]]:
    """(training, held-out) prompts of a data set as a run reads them."""
    args = brain.Args(dataset=str(dataset), **{"steps": 10, "max_prompt_tokens": 32} | flags)
    return common.load_prompts(args, tokenizer or word_tokenizer(chat_template=TEMPLATE))


def hh(*turns: str) -> str:
    """A transcript as Anthropic's HH writes it."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {x}" for i, x in enumerate(turns))


FORMATS = {  # name: (row, text of the prompt, reference, rejected)
    "prompt": ({"prompt": "the film"}, "the film", None, None),
    "prompt, completion": (
        {"prompt": "the film", "completion": " good"},
        "the film",
        " good",
        None,
    ),
    "pair": (
        {"prompt": "the film", "chosen": " good", "rejected": " bad"},
        "the film",
        " good",
        " bad",
    ),
    "other columns too": (
        {"id": 7, "prompt": "the film", "completion": " good", "score": 0.5},
        "the film",
        " good",
        None,
    ),
    "HH": (
        {"chosen": hh("the film", "good"), "rejected": hh("the film", "bad")},
        "\n\nHuman: the film\n\nAssistant:",
        " good",
        " bad",
    ),
    "HH, several turns": (
        {"chosen": hh("a", "b", "c", "good"), "rejected": hh("a", "b", "c", "bad")},
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        " good",
        " bad",
    ),
    "HH, responses share a prefix": (
        {"chosen": hh("a", "it was very good"), "rejected": hh("a", "it was very bad")},
        "\n\nHuman: a\n\nAssistant:",
        " it was very good",
        " it was very bad",
    ),
    "HH, one response starts the other": (
        {"chosen": hh("a", "good"), "rejected": hh("a", "good and long")},
        "\n\nHuman: a\n\nAssistant:",
        " good",
        " good and long",
    ),
    "chat, completion": (
        {"prompt": [USER], "completion": [GOOD]},
        "<user> the film <assistant> ",
        "very good",
        None,
    ),
    "chat, pair": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        "<system> it was <user> the film <assistant> ",
        "very good",
        "very bad",
    ),
    "UltraFeedback": (
        {"prompt": "the film", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "<user> the film <assistant> ",
        "very good",
        "very bad",
    ),
    "chat, whole conversations": (
        {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]},
        "<user> the film <assistant> very good <user> and the plot <assistant> ",
        "very good",
        "very bad",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format(tmp_path, name):
    row, text, reference, rejected = FORMATS[name]
    train, held_out = read(write_jsonl(tmp_path / "data.jsonl", [row] * 4))
    for prompt in train + held_out:
        assert (prompt.text, prompt.reference, prompt.rejected) == (text, reference, rejected)
        assert prompt.tokens == word_tokenizer()(text)["input_ids"]
        assert bool(prompt.messages) == ("<user>" in text)
    assert len(train) == len(held_out) == 2


def test_messages_are_kept_for_another_template(tmp_path):
    row = FORMATS["chat, whole conversations"][0]
    (prompt, *_), _ = read(write_jsonl(tmp_path / "data.jsonl", [row] * 2))
    assert prompt.messages == [USER, GOOD, MORE]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder of jsonl", "folder of parquet"])
def test_kinds_of_files(tmp_path, kind):
    """A folder's test split is held out; a single file is split by row."""
    table = datasets.Dataset.from_list(
        [{"prompt": f"{'a ' * i}film", "completion": " good"} for i in range(1, 9)]
    )
    train, test = table.select(range(6)), table.select(range(6, 8))
    if kind == "jsonl":
        table.to_json(path := tmp_path / "data.jsonl")
    elif kind == "parquet":
        table.to_parquet(path := tmp_path / "data.parquet")
    elif kind == "folder of jsonl":
        train.to_json(tmp_path / "train.jsonl")
        test.to_json((path := tmp_path) / "test.jsonl")
    else:
        train.to_parquet(tmp_path / "train-00000-of-00001.parquet")
        test.to_parquet((path := tmp_path) / "test-00000-of-00001.parquet")
    train, held_out = read(path, eval_prompts=2)
    assert sorted(len(prompt.tokens) for prompt in train) == [2, 3, 4, 5, 6, 7]
    assert [len(prompt.tokens) for prompt in held_out] == [8, 9]


def test_one_split_only_holds_out_other_rows_and_says_so(tmp_path, capsys):
    data = [{"prompt": "a " * i + "film"} for i in range(20)]
    for most, expected in ((6, 6), (256, 10)):
        train, held_out = read(write_jsonl(tmp_path / "data.jsonl", data), eval_prompts=most)
        assert len(held_out) == expected and len(train) == 20 - expected
        assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
        assert f"its rows from {20 - expected} on are held out" in capsys.readouterr().out


def test_bug16_one_start_token_whoever_writes_it():
    """The tokenizer adds it to text; a template that writes it must not get a second."""
    adds = word_tokenizer(start=True, chat_template="<bos> " + TEMPLATE)
    lacks = word_tokenizer(start=True, chat_template=TEMPLATE)
    for prompt, tokenizer, count in (
        ("the film", adds, 1),
        ([USER], adds, 1),
        ([USER], lacks, 0),
        ("the film", word_tokenizer(), 0),
    ):
        _, tokens = common.encode_prompt(tokenizer, prompt)
        assert tokens.count(BOS) == tokens[:1].count(BOS) == count


def test_bug16_a_run_reads_prompts_with_one_start_token(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "the film"}] * 4)
    train, held_out = read(path, word_tokenizer(start=True))
    assert all(
        prompt.tokens[0] == BOS and prompt.tokens.count(BOS) == 1 and len(prompt.tokens) == 3
        for prompt in train + held_out
    )


@pytest.mark.parametrize("start", [False, True])
def test_no_end_token_in_a_prompt_of_a_tokenizer_that_appends_one(start):
    tokenizer = word_tokenizer(start=start, end=True)
    assert tokenizer("the film")["input_ids"][-1] == EOS  # else this would show nothing
    bare = word_tokenizer(start=start)("the film")["input_ids"]
    assert common.encode_prompt(tokenizer, "the film")[1] == bare


def policy_of(end: int) -> SimpleNamespace:
    """What `encode_responses` asks of a policy."""
    return SimpleNamespace(end_tokens=[end])


def test_an_appended_end_token_is_not_doubled_in_a_response():
    for tokenizer in (word_tokenizer(), word_tokenizer(start=True, end=True)):
        prompt, texts = common.Prompt("the film", [9, 8]), [["very good", "bad"]]
        batch = common.encode_responses(tokenizer, policy_of(EOS), [prompt], texts, None)
        very, good, bad = (len(SPECIAL) + i for i in (5, 6, 7))
        assert batch.responses == [[[very, good, EOS], [bad, EOS]]]


def test_tldr_completions_keep_their_space(tmp_path):
    """tok(prompt) + tok(completion), as in training: the space belongs to the completion."""
    row = {"prompt": "POST: my cat ate my shoe\n\nTL;DR:", "completion": " cat ate shoe"}
    tokenizer = bpe_tokenizer((row["prompt"] + row["completion"]) * 9)
    (prompt, *_), _ = read(write_jsonl(tmp_path / "data.jsonl", [row] * 4), tokenizer)
    policy, texts = policy_of(tokenizer.eos_token_id), [[prompt.reference]]
    ((response,),) = common.encode_responses(tokenizer, policy, [prompt], texts, None).responses
    assert prompt.tokens == tokenizer(row["prompt"])["input_ids"]
    assert response == tokenizer(" cat ate shoe")["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(prompt.tokens + response[:-1]) == row["prompt"] + row["completion"]


def test_what_is_dropped_is_counted(tmp_path, capsys):
    """Empty prompts, empty completions, prompts over the limit; nothing else."""
    good = [{"prompt": "the film", "completion": " good"}] * 3
    empty = [
        {"prompt": "", "completion": " good"},
        {"prompt": "the film", "completion": "  "},
        {"prompt": "the film", "completion": ""},
    ]
    long = [{"prompt": "a " * 9, "completion": " good"}] * 2
    exact = [{"prompt": "a " * 8, "completion": " good " * 50}]
    write_jsonl(tmp_path / "train.jsonl", good + empty + long + exact)
    write_jsonl(tmp_path / "test.jsonl", good[:1] + long[:1])
    train, held_out = read(tmp_path, max_prompt_tokens=8)
    assert sorted(len(prompt.tokens) for prompt in train) == [2, 2, 2, 8] and len(held_out) == 1
    out = capsys.readouterr().out
    assert "4 training prompts; dropped 3 with an empty prompt or completion and 2 longer" in out
    assert "1 held-out prompts; dropped 0 with an empty prompt or completion and 1 longer" in out
    assert "--max-prompt-tokens 8" in out


def test_same_seed_same_order(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{'a ' * i}film"} for i in range(30)])
    first, again, other = (read(path, seed=seed) for seed in (1, 1, 2))
    assert first == again and first[0] != other[0]
    assert [p.tokens for p in first[1]] == [p.tokens for p in other[1]]  # held out is held fixed


def test_a_short_run_takes_no_more_prompts_than_it_needs(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", rows(40))
    train, held_out = read(path, steps=2, prompts_per_step=3, eval_prompts=4)
    assert len(train) == 6 and len(held_out) == 4


PROMPTS = [common.Prompt(str(i), [i]) for i in range(10)]


def drawn(steps, rank: int = 0, world: int = 1, seed: int = 1, **flags) -> list[str]:
    """What `pick` gives one process in these steps."""
    args = brain.Args(prompts_per_step=4, seed=seed, **flags)
    return [p.text for step in steps for p in common.pick(PROMPTS, step, args, rank, world)]


def test_every_lap_is_a_permutation_of_its_own():
    texts = drawn(range(1, 16))  # 60 prompts: 6 laps that do not end where steps do
    laps = [texts[at : at + 10] for at in range(0, 60, 10)]
    assert all(sorted(lap) == sorted(p.text for p in PROMPTS) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 6


def test_bug22_processes_take_disjoint_shares_of_one_process_prompts():
    for world in (2, 4):
        for step in (1, 2, 3, 7):  # step 3 spans two laps
            whole = drawn([step])
            shares = [drawn([step], rank, world) for rank in range(world)]
            assert all(len(share) == 4 // world for share in shares)
            assert sorted(sum(shares, [])) == sorted(whole)


def test_pick_is_a_function_of_seed_and_step():
    assert drawn([5]) == drawn([5]) != drawn([5], seed=2)
    assert drawn([4, 5])[4:] == drawn([5])  # a resumed run needs no past
