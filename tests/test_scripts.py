"""The scripts as a user meets them: data, flags, errors, run folders, resume."""

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    bpe_tokenizer,
    encode_prompt,
    flags,
    make_model,
    make_world,
    save,
    word_tokenizer,
    write_jsonl,
)
from safetensors.torch import load_file

import brain
import common
from plumbing.data import split_row

ROOT = Path(brain.__file__).parent
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "a film"), ("assistant", "good"), ("assistant", "bad"))
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a short run on random checkpoints."""
    return make_world(tmp_path_factory.mktemp("world"))


# ── data ──
@pytest.mark.parametrize(
    "row, prompt, reference, rejected",
    [
        ({"prompt": "a"}, "a", None, None),
        ({"prompt": "a TL;DR:", "completion": " b"}, "a TL;DR:", " b", None),
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", " b", " c"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the good",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the bad",
            },
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            " the good",
            " the bad",
        ),
        ({"prompt": [USER], "completion": [GOOD]}, [USER], "good", None),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], "good", "bad"),
        (
            {"prompt": "a film", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            [USER],
            "good",
            "bad",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], "good", "bad"),
    ],
)
def test_every_format_of_a_row(row, prompt, reference, rejected):
    """Text and chat messages; a prompt of its own or inside chosen and rejected."""
    ours = split_row(row)
    assert (*ours[:2], ours[3]) == (prompt, reference, rejected)
    assert ours[2] == (reference if "chosen" in row else None)


def test_a_completion_beside_a_pair():
    """The completion is the reference, the pair stays a pair."""
    row = {"prompt": "a", "completion": " b", "chosen": " c", "rejected": " d"}
    assert split_row(row) == ("a", " b", " c", " d")


def test_bug16_one_start_token_and_no_end_token_in_a_prompt():
    """Whether the tokenizer adds the start token or a chat template writes it."""
    tokenizer = word_tokenizer(bos=True, chat_template="<bos> " + CHAT)
    plain, chat = (encode_prompt(tokenizer, x)[1] for x in ("a film", [USER]))
    assert plain.count(3) == 1 and chat.count(3) == 1
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 3), ("<eos>", 1)]
    )
    assert encode_prompt(tokenizer, "a film")[1] == plain


def test_bug23_dropped_prompts_are_counted(world, tmp_path, capsys):
    """Empty prompts, empty completions and long prompts are dropped, each by its rule."""
    rows = [
        {"prompt": "a film", "completion": "good"},
        {"prompt": "", "completion": "good"},
        {"prompt": "so bad", "completion": " "},
        {"prompt": "a " * 17, "completion": "good"},
        {"prompt": "the plot", "completion": "bad"},
    ]
    args = replace(
        world, dataset=write_jsonl(tmp_path / "data.jsonl", rows * 12), eval_prompts=24, steps=99
    )
    train, test = common.load_prompts(args, word_tokenizer())
    out = capsys.readouterr().out
    assert "36 rows of split train to train on, 24 held out, of split train" in out
    assert len(train + test) == 24 and {p.text for p in train + test} == {"a film", "the plot"}
    for what, count in (("with an empty prompt", 24), ("longer than --max-prompt-tokens", 12)):
        assert sum(map(int, re.findall(rf"dropped (\d+) {what}", out))) == count


def test_parquet_and_order(world, tmp_path):
    """A .parquet file reads as a .jsonl one; a seed fixes the order, another changes it."""
    import pandas

    rows = [{"prompt": f"a {w}", "completion": "good"} for w in "good bad film plot actor".split()]
    pandas.DataFrame(rows * 8).to_parquet(tmp_path / "data.parquet")
    orders = []
    for name, seed in (("data.parquet", 1), ("data.jsonl", 1), ("data.jsonl", 2)):
        write_jsonl(tmp_path / "data.jsonl", rows * 8)
        args = replace(world, dataset=str(tmp_path / name), seed=seed)
        orders.append([p.text for p in common.load_prompts(args, word_tokenizer())[0]])
    assert orders[0] == orders[1] != orders[2]


def test_bug22_processes_share_the_prompts_of_a_step():
    """Disjoint, together those of one process; a lap is a permutation, the next another."""
    prompts = [common.Prompt(str(i), [i]) for i in range(12)]
    args = brain.Args(prompts_per_step=6)
    laps = [
        [p.text for s in (2 * lap + 1, 2 * lap + 2) for p in common.pick(prompts, s, args, 0, 1)]
        for lap in range(3)
    ]
    assert all(sorted(lap) == sorted(p.text for p in prompts) for lap in laps)
    assert laps[0] != laps[1] != laps[2]
    whole = common.pick(prompts, 2, args, 0, 1)
    shares = [common.pick(prompts, 2, args, rank, 3) for rank in range(3)]
    assert sorted(p.text for share in shares for p in share) == sorted(p.text for p in whole)


# ── errors ──
def stops(argv, capsys) -> str:
    """Runs a command line that must end with exit code 2 and one line; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        brain.main(common.parse_args(brain.Args, argv))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error, error
    return error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policy": "/no/such/folder"}, "--policy /no/such/folder: no such file"),
        ({"policy": "nobody/nothing"}, "--policy nobody/nothing: "),
        ({"reward_model": "./nowhere"}, "--reward-model ./nowhere: no such file"),
        ({"dataset": "nowhere.jsonl"}, "--dataset nowhere.jsonl: no such file"),
        ({"samples_per_prompt": 1}, "--samples-per-prompt 1: "),
        ({"steps": 0}, "--steps 0: must be more than 0"),
        ({"temperature": 0.0}, "--temperature 0.0: must be more than 0"),
        ({"micro_batch": -1}, "--micro-batch -1: must be at least 0"),
        ({"lr": float("nan")}, "--lr nan: must be more than 0"),
        ({"beta": 0.0}, "--beta 0.0: must be more than 0"),
        ({"max_prompt_tokens": 300}, "its context of 256 tokens is shorter than"),
        ({"max_prompt_tokens": 1}, "no usable training prompt"),
        ({"track": "trackio"}, "--track trackio: "),
    ],
)
def test_bad_flags(world, tmp_path, capsys, change, message):
    """Each names flag and value, and leaves no folder."""
    run_dir = tmp_path / "run"
    if change.get("track") and __import__("importlib").util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    assert message in stops(flags(world, **change | {"run_dir": str(run_dir)}), capsys)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a"}] * 4, "has columns ['text']; needed are prompt"),
        ([{"prompt": 3, "completion": "b"}] * 4, "needs text, or lists of messages"),
        ([{"prompt": [USER], "completion": [GOOD]}] * 4, "no chat template"),
        ([], "--dataset"),
    ],
)
def test_bad_data(world, tmp_path, capsys, rows, message):
    """Columns found are listed, a bad row has its number."""
    path, run_dir = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "run"
    error = stops(flags(world, dataset=path, run_dir=str(run_dir)), capsys)
    assert "--dataset" in error and message in error and not run_dir.exists()


def bad_checkpoint(kind: str, folder: Path) -> dict:
    """A flag with a broken checkpoint."""
    tokenizer, policy = word_tokenizer(), make_model("llama", 19)
    if kind == "no end token":
        return {"policy": save(folder, policy, word_tokenizer(eos_token=None))}
    if kind == "two labels":
        return {"reward_model": save(folder, make_model("llama", 19, labels=2), tokenizer)}
    if kind == "no reward head":
        policy.module.config.num_labels = 1
        return {"reward_model": save(folder, policy, tokenizer)}
    if kind == "NaN reward":
        reward = make_model("llama", 19, labels=1)
        reward.module.score.weight.data.fill_(float("nan"))
        return {"reward_model": save(folder, reward, tokenizer)}
    save(folder, policy, tokenizer)
    weights = folder / "model.safetensors"
    if kind == "pickle only":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:2000])
    return {"policy": str(folder)}


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no end token", "its tokenizer has no end token"),
        ("two labels", "num_labels is 2"),
        ("no reward head", "needs score.weight"),
        ("pickle only", "safetensors"),
        ("cut short", ""),
        ("NaN reward", "NaN"),
    ],
)
def test_bad_checkpoints(world, tmp_path, capsys, kind, message):
    """One line that names the flag; no run folder."""
    change = bad_checkpoint(kind, tmp_path / "bad")
    error = stops(flags(world, **change | {"run_dir": str(tmp_path / "run")}), capsys)
    assert message in error and (list(change)[0].replace("_", "-") in error or "NaN" in error)
    assert kind == "NaN reward" or not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_the_prompt(world, tmp_path, capsys, monkeypatch):
    """The run stops; the checkpoint before it is kept."""
    loss, calls = brain.brain_loss, []

    def broken(*inputs):
        calls.append(1)
        return loss(*inputs) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(brain, "brain_loss", broken)
    error = stops(flags(world, run_dir=str(tmp_path / "run")), capsys)
    assert "the loss is NaN or infinite for the prompt '" in error
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert saved["step"] == 2


def test_run_folder_errors(world, tmp_path, capsys):
    """Existing, unwritable, foreign, contradicted and damaged run folders."""
    run = tmp_path / "run"
    brain.main(replace(world, run_dir=str(run), steps=2))
    argv = flags(world, run_dir=str(run), steps=2)
    assert "exists; continue it with --resume" in stops(argv, capsys)
    (tmp_path / "file").write_text("")
    assert "--run-dir" in stops(flags(world, run_dir=str(tmp_path / "file" / "run")), capsys)
    assert "it has no args.json" in stops(["--resume", str(tmp_path)], capsys)
    assert "--beta 7.0" in stops(["--resume", str(run), "--beta", "7"], capsys)
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | {"script": "gdc.py"}))
    assert "a run of gdc.py" in stops(["--resume", str(run)], capsys)
    (run / "args.json").write_text(json.dumps(about | {"args": about["args"] | {"seed": 5}}))
    assert "of other flags" in stops(["--resume", str(run)], capsys)
    (run / "args.json").write_text(json.dumps(about))
    state = run / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    assert "cut short or damaged" in stops(["--resume", str(run)], capsys)


# ── runs ──
KEYS = {
    "step",
    "reward/mean",
    "reward/std",
    "kl/ref",
    "kl/k3",
    "entropy/token",
    "length/mean",
    "length/eos_rate",
    "loss",
    "optim/lr",
    "optim/grad_norm",
    "time/sample_s",
    "time/score_s",
    "time/update_s",
    "tokens_per_s",
    "memory/peak_gib",
    "kl/sampling_gap",
    "weights/ess",
}
EVAL = {
    f"eval/{name}" for name in ("reward", "kl", "win_rate", "win_rate_se", "length", "eos_rate")
}


def test_a_run_leaves_what_is_promised(world, tmp_path, monkeypatch, capsys):
    """Files, keys and a line a step; no socket is opened; the last evaluation is returned."""

    def forbidden(*_):
        raise AssertionError("a run must not use the network")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.chdir(tmp_path)
    result = brain.main(replace(world, run_dir="", save_every=3))
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"brain-1-\d{8}-\d{6}", run.name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in (result, *lines):
        assert (line.pop("eval/win_rate_ended", None) is None) == (not line.get("eval/eos_rate"))
    assert set(lines[0]) == EVAL | {"step"} and set(lines[1]) == KEYS
    assert set(lines[2]) == set(lines[4]) == KEYS | EVAL
    assert result == {key: lines[4][key] for key in EVAL}
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in samples] == [0] * 8 + [2] * 8 + [4] * 8
    wins = [
        (x["reward"] > x["reference_reward"]) + (x["reward"] == x["reference_reward"]) / 2
        for x in samples[-8:]
    ]
    assert result["eval/win_rate"] == sum(wins) / 8
    about = json.loads((run / "args.json").read_text())
    assert about["script"] == "brain.py" and about["args"]["steps"] == 4 and about["versions"]
    for name in (
        "plots/training.png",
        "checkpoint/state.pt",
        "tensorboard",
        "brain.py",
        "common.py",
    ):
        assert (run / name).exists()
    transformers.AutoTokenizer.from_pretrained(run / "final")
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and "final/" in out and "\r" not in out


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("data", ["tldr", "hh"])
def test_three_flags_on_real_formats(tmp_path, architecture, data):
    """A policy with its own BPE, a reward model with another, TL;DR or HH data: a finished run."""
    posts = [
        f"SUBREDDIT: r/x\n\nTITLE: {i}\n\nPOST: my cat {'ate ' * (i % 7)}it\n\nTL;DR:"
        for i in range(24)
    ]
    rows = [{"prompt": post, "completion": " cat ate"} for post in posts]
    if data == "hh":
        rows = [
            {
                "chosen": f"\n\nHuman: {p}\n\nAssistant: sure",
                "rejected": f"\n\nHuman: {p}\n\nAssistant: no",
            }
            for p in posts
        ]
    own, other = (
        bpe_tokenizer(" ".join(posts)[:n], size, end)
        for n, size, end in ((2000, 300, "<|endoftext|>"), (500, 280, "</s>"))
    )
    odd = {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    policy = make_model(architecture, len(own), eos_token_id=own.eos_token_id)
    folder = save(tmp_path / "policy", policy, own)
    (tmp_path / "policy" / "generation_config.json").write_text(json.dumps(odd))
    args = {
        "--policy": folder,
        "--reward-model": save(
            tmp_path / "rm",
            make_model("gpt2", len(other), labels=1, eos_token_id=other.eos_token_id),
            other,
        ),
        "--dataset": write_jsonl(tmp_path / "data.jsonl", rows),
    }
    small = [
        "--steps",
        "2",
        "--lr",
        "1e-3",
        "--max-prompt-tokens",
        "200",
        "--max-response-tokens",
        "5",
        "--prompts-per-step",
        "2",
        "--eval-prompts",
        "4",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    brain.main(common.parse_args(brain.Args, [x for pair in args.items() for x in pair] + small))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line["eval/win_rate"] is not None
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert final.generation_config.temperature == 1 and final.generation_config.do_sample


def test_chat_data_runs(world, tmp_path):
    """Messages go through the policy's template."""
    tokenizer = word_tokenizer(["<user>", "a", "film", "good"], chat_template=CHAT)
    size = len(tokenizer)
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}] * 12
    brain.main(
        replace(
            world,
            policy=save(tmp_path / "policy", make_model("llama", size), tokenizer),
            reward_model=save(tmp_path / "rm", make_model("llama", size, labels=1), tokenizer),
            dataset=write_jsonl(tmp_path / "data.jsonl", rows),
            run_dir=str(tmp_path / "run"),
        )
    )
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "<user> a film " and line["reference"] == "good"


def test_ties_count_half(world, tmp_path):
    """A policy that always answers with the reference wins half the time; one that never ends
    never has an end rate."""
    rows = [{"prompt": "a film", "completion": "good"}] * 8
    policy = make_model("llama", 19).module
    good = word_tokenizer().convert_tokens_to_ids("good")
    # "good" after any word but itself, then the end: known at any temperature.
    with torch.no_grad():
        for weight in policy.model.layers.parameters():
            weight.zero_()
        policy.model.embed_tokens.weight.copy_(torch.eye(19, 32))
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[good] = 100
        policy.lm_head.weight[good, good] = 0
        policy.lm_head.weight[1, good] = 100
    args = replace(
        world,
        steps=1,
        dataset=write_jsonl(tmp_path / "data.jsonl", rows),
        policy=save(tmp_path / "policy", policy, word_tokenizer()),
        run_dir=str(tmp_path / "run"),
        lr=1e-9,
    )
    result = brain.main(args)
    assert result["eval/win_rate"] == 0.5 and result["eval/length"] == 2
    assert result["eval/eos_rate"] == 1


# ── form ──
def test_a_checkpoint_with_pickle_inside_is_not_read(tmp_path, capsys):
    """A state.pt that holds code is refused, not run."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (tmp_path / "checkpoint").mkdir()
    torch.save({"step": 1, "code": Evil()}, tmp_path / "checkpoint" / "state.pt")
    run = common.Run(brain.Args(resume=str(tmp_path)), brain.__file__)
    with pytest.raises(SystemExit):
        run.open({}, None)
    assert "Weights only load failed" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
