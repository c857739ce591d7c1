"""Reading data that nobody should have written: prompts, or one line that names --dataset."""

import json

import hypothesis
import pytest
from checkpoints import TEMPLATE, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import brain
import common
from benchmarks import hostile

GOOD = b'{"prompt": "the film", "completion": " good"}'
TOKENIZER = word_tokenizer(chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "data.jsonl"


def test_hostile_files(path):
    """A short form of the campaign of benchmarks/faults.py, with another seed."""
    result = path.with_name("result.json")
    hostile.main(result, 300, seed=2)
    counts = json.loads(result.read_text())
    assert counts.pop("problems") == []
    kinds = (
        "refused, row named",
        "refused as a whole",
        "read",
        "read, with rows dropped and counted",
    )
    assert counts["inputs"] == sum(counts[kind] for kind in kinds) == 300
    assert min(counts[kind] for kind in kinds) > 5  # else the files would show little


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "prompt", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from([*hostile.COLUMNS, "x", ""]), ANYTHING, max_size=4)
LINES = (
    ROWS.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=20)
    | ANYTHING.filter(lambda x: x is not None).map(lambda x: json.dumps(x).encode())
    | st.just(GOOD)
)


@given(st.lists(LINES, max_size=5), st.sampled_from([b"\n", b"\r\n"]))
@hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_random_lines(path, lines, end):
    kind, wrong = hostile.outcome(path, end.join(lines), TOKENIZER)
    assert not wrong, (kind, wrong)


def refusal(path, capsys, tokenizer=TOKENIZER) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.load_prompts(brain.Args(dataset=str(path), reward_model="builtins:len"), tokenizer)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", "depth limit"),
        (b'{"prompt": "a\xff"}', "utf-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "prompt": "b"}', "specified twice"),
        (b"[1]", "changed from object"),
        (b'{"prompt": 3}', "needs text"),
        (b'{"prompt": "a"', "missing a comma"),
        (b'{"prompt": "a\x01"}', "invalid encoding in string"),
        (b'{"prompt": null, "chosen": null}', "needs text"),
        (b'{"prompt": [{"role": "user", "content": 3}]}', "needs text"),
        (b'{"prompt": "a", "completion": 5}', "needs text"),  # a number is not taken for text
    ],
)
def test_what_is_wrong_is_said_in_the_training_and_in_the_held_out_part(path, capsys, line, reason):
    for at in (1, 7):
        lines = [GOOD] * 8
        lines[at] = line
        path.write_bytes(b"\n".join(lines))
        error = refusal(path, capsys)
        assert f"--dataset {path}: " in error and reason in error.lower(), error
        if reason == "needs text":
            assert f" row {at}: " in error


def test_a_damaged_file_of_a_folder(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([GOOD] * 3))
    (tmp_path / "test.jsonl").write_bytes(GOOD + b'\n{"prompt": "a\n}')
    assert f"--dataset {tmp_path}: " in refusal(tmp_path, capsys)


def test_a_template_that_refuses_a_role(path, capsys):
    """As Gemma's refuses a system message: the row is dropped, and the template's words are said."""
    chat = {"prompt": [{"role": "system", "content": "be kind"}], "completion": " good"}
    good = {"prompt": [{"role": "user", "content": "the film"}], "completion": " good"}
    path.write_text("\n".join(map(json.dumps, [good, chat, good, good])))
    args = brain.Args(dataset=str(path), reward_model="builtins:len")
    train, held_out = common.load_prompts(args, word_tokenizer(chat_template=hostile.TEMPLATE))
    assert len(train + held_out) == 3
    assert "dropped 1 that a chat template refuses (no system role" in capsys.readouterr().out
