"""Every column format of a data set, one start token, no end token, what is dropped, the order."""

import json
from types import SimpleNamespace

import datasets
import pytest
from checkpoints import (
    SPECIAL,
    TEMPLATE,
    bpe_tokenizer,
    model,
    rows,
    save,
    word_tokenizer,
    write_jsonl,
)
from models import encode_prompt

import brain
import common

SYSTEM, USER, MORE = (
    {"role": role, "content": text}
    for role, text in (("system", "it was"), ("user", "the film"), ("user", "and the plot"))
)
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("very good", "very bad"))
PAD, EOS, UNK, BOS = range(4)
# A function gives the rewards: no reward model of these tokenizers is at hand.
READ = {"steps": 10, "max_prompt_tokens": 32, "template": "raw", "reward_model": "builtins:len"}


def read(dataset, tokenizer=None, **flags) -> tuple[list[common.Prompt], list[common.Prompt]]:
    """(training, held-out) prompts of a data set as a run reads them."""
    args = brain.Args(dataset=str(dataset), **READ | flags)
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
        assert isinstance(prompt.source, list) == ("<user>" in text)
    assert len(train) == len(held_out) == 2


def test_messages_are_kept_for_another_template(tmp_path):
    row = FORMATS["chat, whole conversations"][0]
    (prompt, *_), _ = read(write_jsonl(tmp_path / "data.jsonl", [row] * 2))
    assert prompt.source == [USER, GOOD, MORE]


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
    lengths = [sorted(len(prompt.tokens) for prompt in part) for part in (train, held_out)]
    assert sorted(sum(lengths, [])) == [2, 3, 4, 5, 6, 7, 8, 9] and len(lengths[1]) == 2
    assert not kind.startswith("folder") or lengths[1] == [8, 9]


def test_one_split_only_holds_out_other_rows_and_says_so(tmp_path, capsys):
    data = [{"prompt": "a " * i + "film"} for i in range(20)]
    for most, expected in ((6, 6), (256, 10)):
        train, held_out = read(write_jsonl(tmp_path / "data.jsonl", data), eval_prompts=most)
        assert len(held_out) == expected and len(train) == 20 - expected
        assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
        said = (
            f"{20 - expected} rows of split train to train on, {expected} held out, of split train"
        )
        assert said in capsys.readouterr().out


# ── which part of a data set ──
@pytest.fixture
def splits(tmp_path):
    """A folder with three pairs of splits of unlike length, under other names of columns."""
    for number, name in enumerate(("train_sft", "test_sft", "train_prefs", "test_prefs")):
        data = [{"question": "the film", "answer": name, "prompt": "a"}] * (4 + number)
        write_jsonl(tmp_path / f"{name}.jsonl", data)
    return tmp_path


def test_c8_a_split_and_its_test_split_are_chosen_by_name(splits, capsys):
    """A folder of files has no splits of such names: a data set's script or card gives them."""
    data = datasets.DatasetDict(
        {path.stem: datasets.Dataset.from_json(str(path)) for path in splits.iterdir()}
    )
    columns = "prompt=question,completion=answer"
    for chosen, train_split, test_split in (
        (f":{columns}", None, None),
        (f":split=train_prefs,{columns}", "train_prefs", "test_prefs"),
        (f":split=train_sft,test=test_prefs,{columns}", "train_sft", "test_prefs"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plumbing.data._read_splits", lambda *_: data)
            train, held_out = read("org/name" + chosen, eval_prompts=99)
        train_split = train_split or next(name for name in data if "train" in name)
        test_split = test_split or train_split.replace("train", "test")
        assert {prompt.text for prompt in train + held_out} == {"the film"}  # not the other prompt
        assert {prompt.reference for prompt in train} == {train_split}
        assert {prompt.reference for prompt in held_out} == {test_split}
        assert len(held_out) == len(data[test_split])
        said = capsys.readouterr().out
        assert f"rows of split {train_split} to train on" in said
        assert f"held out, of split {test_split}\n" in said


def test_c8_a_configuration_is_chosen_by_name(tmp_path):
    """As hh-rlhf's helpful-base: a folder with a card."""
    configs = []
    for name in ("harmless", "helpful"):
        write_jsonl(tmp_path / name / "train.jsonl", [{"prompt": name, "completion": "good"}] * 4)
        configs.append({"config_name": name, "data_files": f"{name}/train.jsonl"})
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for chosen in ("helpful", "config=helpful"):
        train, _ = read(f"{tmp_path}:{chosen}", bpe_tokenizer("helpful harmless " * 9))
        assert {prompt.text for prompt in train} == {"helpful"}


@pytest.mark.parametrize(
    "chosen, reason",
    [
        ("split=nowhere", "has splits ["),
        ("test=nowhere", "has splits ["),
        ("prompt=nowhere", "has columns ["),
        ("colour=red", "colour is none of config, split, test, prompt, completion"),
    ],
)
def test_c8_a_part_that_is_not_there(tmp_path, capsys, chosen, reason):
    write_jsonl(tmp_path / "train.jsonl", rows(9))
    with pytest.raises(SystemExit):
        read(f"{tmp_path}:{chosen}")
    error = capsys.readouterr().err
    assert error.startswith(f"error: --dataset {tmp_path}") and reason in error


@pytest.mark.parametrize("folder", [True, False])
def test_d2_held_out_rows_are_the_same_for_all_seeds_and_no_block(tmp_path, folder):
    """A sorted set would give a sample of one kind."""
    data = [{"prompt": "a " * i + "film"} for i in range(60)]
    path = write_jsonl(tmp_path / "train.jsonl", data)
    if folder:
        write_jsonl(tmp_path / "test.jsonl", data)
    flags = {"eval_prompts": 12, "max_prompt_tokens": 99}
    (train, held_out), (_, again) = (
        read(tmp_path if folder else path, seed=s, **flags) for s in (1, 2)
    )
    lengths = [len(prompt.tokens) for prompt in held_out]
    assert lengths == [len(prompt.tokens) for prompt in again]
    assert min(lengths) < 20 and max(lengths) > 40 and len(set(lengths)) == 12
    assert folder or not {p.text for p in held_out} & {p.text for p in train}


def test_c13_rows_that_the_run_will_not_read_are_not_tokenised(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "the film"}] * 500)
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "the film"}] * 500)
    tokenizer, calls = word_tokenizer(), []
    kind = type(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        original = kind.__call__
        patch.setattr(kind, "__call__", lambda *x, **y: calls.append(1) or original(*x, **y))
        read(tmp_path, tokenizer, steps=2, prompts_per_step=3, eval_prompts=4)
    assert len(calls) <= 2 * (6 + 4)


def test_e1_a_prompt_may_be_as_long_as_the_context_leaves(tmp_path, capsys):
    """--max-prompt-tokens 0, the default, on a policy of 20 tokens."""
    tokenizer = word_tokenizer()
    policy = save(tmp_path / "policy", model("gpt2", tokenizer, n_positions=20), tokenizer)
    data = [{"prompt": "a " * length} for length in (14, 15, 16, 17)]
    write_jsonl(tmp_path / "train.jsonl", data)
    write_jsonl(tmp_path / "test.jsonl", data)
    flags = {"policy": policy, "max_prompt_tokens": 0, "max_response_tokens": 5}
    train, _ = read(tmp_path, **flags)
    assert sorted(len(prompt.tokens) for prompt in train) == [14, 15]
    assert "dropped 2 longer than --max-prompt-tokens 15" in capsys.readouterr().out


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
        _, tokens = encode_prompt(tokenizer, prompt)
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
    assert encode_prompt(tokenizer, "the film")[1] == bare


def policy_of(end: int) -> SimpleNamespace:
    """What `encode_responses` asks of a policy."""
    return SimpleNamespace(end_tokens=[end], context=99)


def test_an_appended_end_token_is_not_doubled_in_a_response():
    for tokenizer in (word_tokenizer(), word_tokenizer(start=True, end=True)):
        prompt, texts = common.Prompt("the film", [9, 8]), [["very good", "bad"]]
        batch = common.encode_responses(tokenizer, policy_of(EOS), [prompt], texts, 99)
        very, good, bad = (len(SPECIAL) + i for i in (5, 6, 7))
        assert batch.responses == [[[very, good, EOS], [bad, EOS]]]


def test_tldr_completions_keep_their_space(tmp_path):
    """tok(prompt) + tok(completion), as in training: the space belongs to the completion."""
    row = {"prompt": "POST: my cat ate my shoe\n\nTL;DR:", "completion": " cat ate shoe"}
    tokenizer = bpe_tokenizer((row["prompt"] + row["completion"]) * 9)
    (prompt, *_), _ = read(write_jsonl(tmp_path / "data.jsonl", [row] * 4), tokenizer)
    policy, texts = policy_of(tokenizer.eos_token_id), [[prompt.reference]]
    ((response,),) = common.encode_responses(tokenizer, policy, [prompt], texts, 99).responses
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
    empty, long = "with an empty prompt or completion", "longer than --max-prompt-tokens 8"
    assert f"4 training prompts; dropped 3 {empty}; dropped 2 {long}\n" in out
    assert f"1 held-out prompts; dropped 1 {long}\n" in out


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
