"""Bad input ends in one line that names flag and value, exit code 2, and leaves no run folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import (
    TEMPLATE,
    argv,
    model,
    read_log,
    refusal,
    rows,
    save,
    train,
    word_tokenizer,
    word_world,
    write_jsonl,
)
from safetensors.torch import load_file

import brain
import common

ROOT = Path(brain.__file__).parent
CHAT = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a short run on good input."""
    return word_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def flags(world, tmp_path):
    """The same, with a run folder of this test's own, which must not be there in the end."""
    run = tmp_path / "run"
    yield world | {"--run-dir": str(run)}
    assert not run.exists() or (run / "args.json").exists(), "half a run folder is left"


def refused(flags, capsys, **change) -> str:
    """The error line of a run with changed flags; it must name each of them with its value."""
    change = {"--" + name.replace("_", "-"): str(value) for name, value in change.items()}
    error = refusal(flags | change, capsys)
    assert not Path(flags["--run-dir"]).exists()
    for flag, value in change.items():
        assert f"{flag} {value}" in error or f"{flag}: {value}" in error, error
    return error


# ── flags ──
@pytest.mark.parametrize(
    "flag, value, reason",
    [
        ("samples_per_prompt", 1, "2 or more"),
        ("samples_per_prompt", 0, "2 or more"),
        ("beta", 0.0, "more than 0"),
        ("beta", -0.1, "more than 0"),
        ("temperature", 0.0, "more than 0"),
        ("temperature", -1.0, "more than 0"),
        ("steps", -3, "more than 0"),
        ("steps", 0, "more than 0"),
        ("lr", "nan", "more than 0"),
        ("lr", "inf", "more than 0"),
        ("lr", 0.0, "more than 0"),
        ("beta", "nan", ""),
        ("max_grad_norm", 0.0, "more than 0"),
        ("warmup_steps", -1, "at least 0"),
        ("micro_batch", -1, "at least 0"),
        ("prompts_per_step", 0, "more than 0"),
        ("eval_every", 0, "more than 0"),
        ("eval_prompts", 0, "more than 0"),
        ("save_every", 0, "more than 0"),
        ("updates_per_sample", 0, "more than 0"),
        ("minibatches", 0, "more than 0"),
        ("refresh_every", -1, "at least 0"),
        ("max_response_tokens", 0, "more than 0"),
    ],
)
def test_a_number_out_of_range(flags, capsys, flag, value, reason):
    """Before anything is loaded: the policy is missing as well, and is not what is complained of."""
    flags = flags | {"--policy": "/no/such/policy"}
    assert reason in refused(flags, capsys, **{flag: value})


def test_minibatches_that_would_be_uneven(flags, capsys):
    message = refused(flags, capsys, prompts_per_step=4, minibatches=3)
    assert "--prompts-per-step 4" in message and "--minibatches 3" in message


@pytest.mark.parametrize(
    "words",
    [["--no-such-flag", "1"], ["--estimator", "best"], ["--dtype", "float16"], ["--steps", "many"]],
)
def test_words_that_are_no_flags(words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_args(brain.Args, words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words[0] in error and "Traceback" not in error


@pytest.mark.parametrize("flag", ["policy", "reward_model", "dataset"])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nobody/nothing-here"])
def test_missing_folders_and_hub_names_offline(flags, capsys, flag, name):
    refused(flags, capsys, **{flag: name})


# ── data ──
@pytest.mark.parametrize(
    "data, reason",
    [
        ([{"question": "a", "answer": "b"}] * 8, "columns ['question', 'answer']"),
        ([{"prompt": 3, "completion": "b"}] * 8, "needs text"),
        ([{"prompt": "a film", "completion": 3}] * 8, "needs text"),
        ([{"prompt": {"text": "a"}, "completion": "b"}] * 8, "needs text"),
        ([{"prompt": ["a", "film"], "completion": "b"}] * 8, ""),
        ([{"prompt": None, "completion": "b"}] * 8, "needs text"),
        ([{"chosen": "a good", "rejected": 5}] * 8, "needs text"),
        ([{"prompt": "a film", "chosen": [], "rejected": []}] * 8, "needs text"),
        ([{"prompt": "", "completion": "b"}] * 8, "no usable training prompt"),
        ([{"prompt": "a film", "completion": ""}] * 8, "no usable training prompt"),
        ([{"prompt": "the film " * 9, "completion": "b"}] * 8, "no usable training prompt"),
        ([{"prompt": "a film", "completion": "b"}], "no usable"),
        ([], ""),
        ([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 8, "no chat template"),
        ([{"chosen": CHAT, "rejected": CHAT}] * 8, "no chat template"),
    ],
)
def test_data_that_cannot_be_used(flags, capsys, tmp_path, data, reason):
    """Columns are listed, a row of a wrong type is named and shown."""
    path = write_jsonl(tmp_path / "data.jsonl", data)
    assert reason in refused(flags, capsys, dataset=path)


@pytest.mark.parametrize(
    "message",
    [
        "the film",
        {"text": "the film"},
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "user", "content": None},
    ],
)
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_messages_without_role_or_content(flags, capsys, tmp_path, message, column):
    """With a template that would otherwise meet them, and one way or the other fail or misread."""
    tokenizer = word_tokenizer(chat_template=TEMPLATE)
    policy = save(tmp_path / "policy", model("llama", tokenizer), tokenizer)
    data = [{"prompt": CHAT[:1], "completion": CHAT[1:]} | {column: [message]}] * 8
    path = write_jsonl(tmp_path / "data.jsonl", data)
    assert "needs text" in refused(flags | {"--policy": policy}, capsys, dataset=path)


def test_chat_data_and_a_reward_model_without_a_template(flags, capsys, tmp_path):
    """A reward model that cannot read what the policy reads is an error, not a traceback."""
    tokenizer = word_tokenizer(chat_template=TEMPLATE)
    policy = save(tmp_path / "policy", model("llama", tokenizer), tokenizer)
    path = write_jsonl(tmp_path / "data.jsonl", [{"chosen": CHAT, "rejected": CHAT}] * 8)
    error = refusal(flags | {"--policy": policy, "--dataset": path}, capsys)
    assert "chat messages, but " in error and "reward has no chat template" in error


@pytest.mark.parametrize(
    "content",
    [
        b"{not json\n",
        b'{"prompt": "a\xff\xfe"}\n',
        b"\x00\x01\x02",
        b'{"prompt": "a film"}\n{"prompt": 3}\n',
        b"\n\n",
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_that_are_not_what_they_say(flags, capsys, tmp_path, content, suffix):
    (path := tmp_path / f"data{suffix}").write_bytes(content)
    refused(flags, capsys, dataset=path)


def test_an_empty_folder_and_a_text_file_as_data(flags, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(flags, capsys, dataset=tmp_path / "empty")
    (tmp_path / "data.txt").write_text("the film was good\n")
    refused(flags, capsys, dataset=tmp_path / "data.txt")


def test_a_test_split_alone(flags, capsys, tmp_path):
    write_jsonl(tmp_path / "data" / "test.jsonl", rows(9))
    assert "none to train on" in refused(flags, capsys, dataset=tmp_path / "data")


# ── checkpoints ──
def no_end_token(folder):
    tokenizer = word_tokenizer()
    return save(folder, model("llama", tokenizer), word_tokenizer(eos_token=None))


def no_end_token_to_score(folder):
    made = model("llama", word_tokenizer(), labels=1)
    return save(folder, made, word_tokenizer(eos_token=None))


def no_tokenizer(folder):
    model("llama", word_tokenizer()).save_pretrained(folder)
    return str(folder)


def pickle_only(folder):
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


def no_weights(folder):
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    (folder / "model.safetensors").unlink()
    return str(folder)


def cut_short(folder, at=3000):
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:at])
    return str(folder)


def no_bytes(folder):
    return cut_short(folder, 0)


def bad_config(folder):
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return str(folder)


def unknown_architecture(folder):
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    return str(folder)


def empty(folder):
    folder.mkdir()
    return str(folder)


def a_classifier(folder):
    return save(folder, model("llama", word_tokenizer(), labels=1), word_tokenizer())


def nan_weights(folder):
    made = model("llama", word_tokenizer())
    made.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    return save(folder, made, word_tokenizer())


def two_labels(folder):
    return save(folder, model("llama", word_tokenizer(), labels=2), word_tokenizer())


def a_causal_lm(folder):
    made = model("llama", word_tokenizer())
    made.config.num_labels = 1
    return save(folder, made, word_tokenizer())


def a_plain_causal_lm(folder):
    return save(folder, model("llama", word_tokenizer()), word_tokenizer())


def an_encoder(folder):
    return save(folder, model("bert", word_tokenizer(), labels=1), word_tokenizer())


def nan_rewards(folder):
    made = model("llama", word_tokenizer(), labels=1)
    made.score.weight.data.fill_(float("nan"))
    return save(folder, made, word_tokenizer())


@pytest.mark.parametrize(
    "flag, make, reason",
    [
        *(
            ("policy", make, reason)
            for make, reason in (
                (no_end_token, "no end token"),
                (no_tokenizer, ""),
                (pickle_only, "safetensors"),
                (no_weights, "safetensors"),
                (cut_short, ""),
                (no_bytes, ""),
                (bad_config, ""),
                (unknown_architecture, "no-such-model"),
                (empty, ""),
                (a_classifier, "lm_head"),
                (nan_weights, "nan"),
            )
        ),
        *(
            ("reward_model", make, reason)
            for make, reason in (
                (two_labels, "num_labels is 2"),
                (a_causal_lm, "score.weight"),
                (a_plain_causal_lm, ""),
                (nan_rewards, "nan"),
                (no_end_token_to_score, "no end token"),
                (pickle_only, ""),
                (cut_short, ""),
                (no_tokenizer, ""),
                (empty, ""),
            )
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used(flags, capsys, tmp_path, flag, make, reason):
    error = refused(flags, capsys, **{flag: make(tmp_path / "checkpoint")})
    assert reason in error.replace("NaN", "nan"), error


def test_a_truncated_checkpoint_says_that_it_is_a_file_that_is_wrong(flags, capsys, tmp_path):
    """The words of the library that failed are passed on, and they are words."""
    for make in (cut_short, no_bytes):
        folder = make(tmp_path / make.__name__)
        reason = refused(flags, capsys, policy=folder).split(folder, 1)[1].strip(": \n")
        assert len(reason.split()) > 2, reason


@pytest.mark.parametrize("limit, fits", [(12, False), (13, True)])
def test_context_of_the_policy(flags, capsys, tmp_path, limit, fits):
    """8 prompt and 5 response tokens; learned positions would fail in the middle of a run."""
    tokenizer = word_tokenizer()
    folder = save(tmp_path / "policy", model("gpt2", tokenizer, n_positions=limit), tokenizer)
    if fits:
        train(flags | {"--policy": folder, "--steps": "1"})
        return
    error = refused(flags, capsys, policy=folder)
    assert "12" in error and "--max-prompt-tokens + --max-response-tokens = 13" in error


@pytest.mark.parametrize("limit, fits", [(5, False), (10, True)])
def test_a_context_that_leaves_a_prompt_no_room(flags, capsys, tmp_path, limit, fits):
    """By default a prompt may be as long as the context leaves beside 5 response tokens."""
    tokenizer = word_tokenizer()
    folder = save(tmp_path / "policy", model("gpt2", tokenizer, n_positions=limit), tokenizer)
    own = flags | {"--policy": folder, "--max-prompt-tokens": "0", "--steps": "1"}
    if fits:
        train(own)
        return
    assert refusal(own, capsys) == (
        f"error: --policy {folder}: its context of 5 tokens leaves no room for a prompt in front "
        "of --max-response-tokens 5; lower it\n"
    )


def test_context_of_the_reward_model(flags, capsys, tmp_path):
    """It has its own tokenizer: only its own rows show what is too long for it, and all are."""
    tokenizer = word_tokenizer()
    folder = save(tmp_path / "rm", model("gpt2", tokenizer, 1, n_positions=4), tokenizer)
    error = refusal(flags | {"--reward-model": folder}, capsys)
    assert "no usable training prompt" in error
    assert "that leave --reward-model's context no room for a response" in error


# ── numbers that turn bad in the middle of a run ──
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_reward_that_is_nan_names_the_prompt(flags, capsys, tmp_path, split):
    """Of a training prompt, or of a held-out one: a win rate must not count it as a loss. The
    reward model is bad at position 40, where one prompt alone gets to."""
    tokenizer, long = word_tokenizer(), "so " * 40 + "long"
    made = model("gpt2", tokenizer, labels=1)
    made.transformer.wpe.weight.data[40] = float("nan")
    data = {"train": rows(12), "test": rows(18)[12:]}
    data[split][3]["prompt"] = long
    for name, part in data.items():
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", part)
    error = refusal(
        flags
        | {
            "--reward-model": save(tmp_path / "rm", made, tokenizer),
            "--max-prompt-tokens": "50",
            "--dataset": str(tmp_path / "data"),
            "--save-every": "1",
            "--eval-every": "9",
        },
        capsys,
    )
    assert "reward" in error and "NaN" in error and f"{long!r}" in error


def test_a_loss_that_is_nan_names_the_prompt_and_keeps_the_last_checkpoint(flags, capsys):
    """A step size of 1e30 throws the weights out of the range of float32 in the first update."""
    wild = flags | {"--lr": "1e30", "--save-every": "1", "--eval-every": "9", "--steps": "6"}
    error = refusal(wild, capsys)
    assert "loss is NaN or infinite for the prompt '" in error and "checkpoint is kept" in error
    run = Path(flags["--run-dir"])
    prompt = error.split("prompt '")[1].split("'")[0]
    assert prompt in {row["prompt"] for row in rows(30)}
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert saved["step"] == read_log(run / "metrics.jsonl")[-1]["step"] >= 1
    assert not (run / "final").exists()


# ── the run folder ──
def test_a_run_folder_that_exists_is_left_as_it_is(flags, capsys, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes").write_text("mine")
    error = refusal(flags | {"--run-dir": str(there)}, capsys)
    assert f"--run-dir {there}" in error and "--resume" in error
    assert [path.name for path in there.iterdir()] == ["notes"]


def test_a_run_folder_that_cannot_be_made(flags, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(flags, capsys, run_dir=tmp_path / "file" / "run")
    if os.getuid():  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(flags, capsys, run_dir=tmp_path / "locked" / "run")


@pytest.fixture(scope="module")
def finished(world):
    """The folder of a run of two steps."""
    return train(world | {"--steps": "2"})


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_resume_of_what_is_no_run(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        error = refusal({"--resume": str(folder)}, capsys)
        assert f"--resume {folder}" in error and "args.json" in error
    assert not (tmp_path / "none").exists() and not list(tmp_path.iterdir())


def change_about(run: Path, **change) -> None:
    """Changes keys of args.json."""
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | change))


def test_resume_of_another_scripts_run(run, capsys):
    change_about(run, script="other.py")
    error = refusal({"--resume": str(run)}, capsys)
    assert f"--resume {run}" in error and "other.py" in error


def test_resume_with_flags_that_contradict(run, capsys):
    error = refusal({"--resume": str(run), "--beta": "7.5", "--lr": "9"}, capsys)
    assert "--beta 7.5" in error and "--lr 9.0" in error and str(run) in error


def test_resume_with_flags_that_agree(run):
    train({"--resume": str(run), "--steps": "2"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"script": "brain.py", "args": {"ste',
        "[]",
        "{}",
        '{"script": "brain.py", "args": {"stepps": 3}}',
    ],
)
def test_resume_with_a_damaged_args_json(run, capsys, text):
    (run / "args.json").write_text(text)
    assert f"--resume {run}" in refusal({"--resume": str(run)}, capsys)


def test_resume_of_a_checkpoint_of_other_flags(run, capsys):
    args = json.loads((run / "args.json").read_text())["args"]
    change_about(run, args=args | {"seed": 5})
    assert "other flags" in refusal({"--resume": str(run)}, capsys)


@pytest.mark.parametrize("damage", ["half", "empty", "garbage", "foreign", "older", "bit"])
def test_resume_of_a_damaged_checkpoint(run, capsys, damage):
    """The logs, which resume cuts back, are left as they are."""
    state, log = run / "checkpoint" / "state.pt", (run / "metrics.jsonl").read_text()
    saved, good = torch.load(state, weights_only=True), state.read_bytes()
    if damage == "foreign":
        torch.save({"step": 1}, state)
    elif damage == "older":
        torch.save({name: part for name, part in saved.items() if name != "format"}, state)
    else:
        with zipfile.ZipFile(state) as archive:  # a bit of a weight, not of what lies between
            weight = archive.read(
                max(
                    (entry for entry in archive.infolist() if "/data/" in entry.filename),
                    key=lambda entry: entry.file_size,
                )
            )
        flipped = bytearray(good)
        flipped[good.index(weight) + len(weight) // 2] ^= 16
        state.write_bytes(
            {
                "half": good[: len(good) // 2],
                "empty": b"",
                "bit": flipped,
                "garbage": b"no checkpoint at all",
            }[damage]
        )
    error = refusal({"--resume": str(run)}, capsys)
    assert ("of format None" in error) == (damage in ("foreign", "older"))
    assert f"--resume {run}" in error and "state.pt" in error
    assert (run / "metrics.jsonl").read_text() == log


# ── from the shell ──
def test_the_shell_sees_one_line_and_exit_code_2(flags):
    """In a process of its own nothing else is printed, at the start or at the end of it."""
    command = [sys.executable, ROOT / "brain.py", *argv(flags | {"--reward-model": "/no/such"})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --reward-model /no/such: no such file or folder\n"
