"""The first two links of the chain: prepare/sft.py and prepare/reward.py, and who uses them."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import transformers
from checkpoints import comparable, read_log, same
from models import SMALL, make_model, make_prompts, make_world, save, word_tokenizer, write_jsonl
from safetensors.torch import load_file
from test_layout import chat_tokenizer

import brain
import common
from analyze import export
from prepare import parts, real, reward, sft, texts, tiny

ROOT = Path(brain.__file__).parent
SCRIPTS = [sft, reward]
PAIR = {"chosen": " good film", "rejected": " bad"}
CPU = torch.device("cpu")


def ids(script) -> str:
    return script.__name__.split(".")[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a short run on random checkpoints; rows have completions and pairs."""
    folder = tmp_path_factory.mktemp("prepare")
    make_world(folder)
    for split in ("train", "test"):
        path = folder / "data" / f"{split}.jsonl"
        rows = [row | PAIR for row in read_log(path)]
        for i, row in enumerate(rows):  # of 1 to 4 words: two processes have unlike shares
            row["completion"] += " very" * (i % 4)
        write_jsonl(path, rows)
    return {
        "policy": str(folder / "sft"),
        "dataset": str(folder / "data"),
        "steps": 4,
        "prompts_per_step": 4,
        "max_response_tokens": 6,
        "eval_prompts": 7,
        "eval_every": 2,
        "save_every": 2,
        "warmup_steps": 2,
        "lr": 1e-2,
    }


def run(script, flags: dict, folder: Path, **more) -> dict:
    """Trains in `folder`; returns the last evaluation."""
    return script.main(script.Args(**flags | more | {"run_dir": str(folder)}))


def weights(folder: Path) -> dict:
    return load_file(folder / "final" / "model.safetensors")


def refusal(script, flags: dict, folder: Path, capsys, **more) -> str:
    """The one line with which a run ends, exit code 2, without a run folder."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, flags, folder, **more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not folder.exists()
    return error


# ── the losses ──
def test_eq1_sft_loss_is_a_loop_over_the_tokens_of_the_completions():
    """Mean over all tokens behind the prompts, the end token among them; no prompt's token."""
    model, tokenizer = make_model("llama"), word_tokenizer()
    prompts = [
        replace(prompt, reference=text)
        for prompt, text in zip(
            make_prompts([5, 6, 7, 8], [9, 10], [11]), [" good film", " bad", " so very good plot"]
        )
    ]
    batch = sft.encode(tokenizer, model, prompts, sft.Args())
    nats, count = 0.0, 0
    for prompt in prompts:
        answer = tokenizer(prompt.reference)["input_ids"] + [tokenizer.eos_token_id]
        row = prompt.tokens + answer
        logprobs = model.module(torch.tensor([row])).logits[0].log_softmax(-1)
        for place in range(len(prompt.tokens), len(row)):
            nats -= logprobs[place - 1, row[place]].item()
            count += 1
    assert count == 3 + 2 + 5
    logprobs = common.logprobs(model, batch, 1.0)[:, 0]
    loss = sft.sft_loss(logprobs, batch.lengths().sum().item())
    assert loss.sum().item() == pytest.approx(nats / count, abs=1e-5)
    args = sft.Args(prompts_per_step=2)  # the last of two passes is smaller
    flags = SimpleNamespace(args=args, rank=0, world=1, average=lambda x: x)
    evaluation = sft.evaluate(flags, model, tokenizer, prompts)
    assert evaluation == {"eval/loss": pytest.approx(nats / count, abs=1e-5)}


def test_eq1_eq2_by_their_definition():
    """P(y_w ≻ y_l) = e^r_w / (e^r_w + e^r_l); the loss is its -log, and the centring term."""
    rewards = torch.tensor([[0.3, -1.2], [-0.5, 2.0], [1.0, 1.0]], requires_grad=True)
    exponents = rewards.detach().exp()
    preferred = exponents[:, 0] / exponents.sum(1)
    torch.testing.assert_close(reward.preference(rewards.detach()), preferred)
    torch.testing.assert_close(reward.bradley_terry_loss(rewards).detach(), -preferred.log())
    centred = reward.bradley_terry_loss(rewards, 0.1)
    expected = -preferred.log() + 0.1 * torch.tensor([0.9**2, 1.5**2, 2.0**2])
    torch.testing.assert_close(centred.detach(), expected)
    reward.bradley_terry_loss(rewards).sum().backward()
    pushed = torch.stack([preferred - 1, 1 - preferred], 1)  # up for y_w, as much down for y_l
    torch.testing.assert_close(rewards.grad, pushed)
    assert reward.accuracy(rewards).tolist() == [1.0, 0.0, 0.5]


def test_calibration_by_counting(capsys):
    """0.55 and 0.45 are the same bin, once right and once wrong; a tie is half right."""
    table = parts.calibration(torch.tensor([0.55, 0.45, 0.58, 0.5, 0.95, 1.0, 0.02, 0.75]).double())
    assert table == {
        "eval/pairs_50-60": 4,
        "eval/predicted_50-60": pytest.approx((0.55 + 0.55 + 0.58 + 0.5) / 4),
        "eval/observed_50-60": pytest.approx(2.5 / 4),
        "eval/pairs_70-80": 1,
        "eval/predicted_70-80": pytest.approx(0.75),
        "eval/observed_70-80": 1.0,
        "eval/pairs_90-100": 3,
        "eval/predicted_90-100": pytest.approx((0.95 + 1 + 0.98) / 3),
        "eval/observed_90-100": pytest.approx(2 / 3),
    }
    parts.say_calibration({"eval/loss": 0.1} | table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split() == ["50-60", "%", "4", "0.545", "0.625"]


# ── batches ──
def numbered(count: int) -> list[common.Prompt]:
    """Prompts of 1 to 60 characters, told apart by their tokens."""
    return [common.Prompt("x" * (7 * i % 60 + 1), [i]) for i in range(count)]


def batches(count: int, steps: int, **more) -> list[list[common.Prompt]]:
    args = sft.Args(prompts_per_step=4, **more)
    prompts = numbered(count)
    return [
        parts.batch_of(prompts, step, args, lambda p: len(p.text)) for step in range(1, steps + 1)
    ]


def test_an_epoch_takes_every_prompt_in_batches_of_about_one_length():
    per_epoch = 50  # of 198 prompts: two pools, and two prompts to fill up the last batch
    read = batches(198, 2 * per_epoch)
    epochs = read[:per_epoch], read[per_epoch:]
    for epoch in epochs:
        seen = Counter(prompt.tokens[0] for batch in epoch for prompt in batch)
        assert seen.keys() == set(range(198)) and sorted(seen.values())[-3:] == [1, 2, 2]
        assert all(len(batch) == 4 for batch in epoch)
    # Of 4 prompts out of 60 lengths the longest would be 36 above the shortest on average.
    spread = [max(len(p.text) for p in b) - min(len(p.text) for p in b) for b in read]
    assert sum(spread) / len(spread) < 4
    together = [{tuple(sorted(p.tokens[0] for p in batch)) for batch in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < 10  # each epoch has batches of its own
    longest = [max(len(p.text) for p in batch) for batch in epochs[0][: parts.POOL]]
    assert longest != sorted(longest)  # short and long batches come in turns


def test_a_batch_is_a_function_of_seed_and_step():
    assert batches(198, 70) == batches(198, 70)
    assert batches(198, 70) != batches(198, 70, seed=2)
    assert [len(batch) for batch in batches(3, 5)] == [4] * 5  # fewer prompts than P


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_of_held_out_prompts_are_disjoint_complete_and_equally_long(count, world):
    prompts = numbered(count)
    shares = [parts.share(prompts, SimpleNamespace(rank=r, world=world)) for r in range(world)]
    assert {len(mine) for mine, _ in shares} == {math.ceil(count / world)}
    counted = [mine[:counts] for mine, counts in shares]
    assert [prompts[rank::world] for rank in range(world)] == counted


# ── runs ──
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_run_resumes_bit_equal_and_splits(script, world, tmp_path, monkeypatch):
    """4 steps = 2 steps, stopped and resumed, bit for bit; = micro-batches, but for rounding."""
    evaluation = run(script, world, tmp_path / "whole")
    log = comparable(tmp_path / "whole")
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert evaluation == pytest.approx({k: v for k, v in log[-1].items() if k in evaluation})
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert (tmp_path / "whole" / "plots" / "training.png").exists()

    stop, written = tmp_path / "stopped", common.Run.save

    def save_and_stop(self, step):
        written(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(script, world, stop)
    script.main(common.parse_args(script.Args, ["--resume", str(stop)]))
    assert comparable(stop) == log
    assert same(weights(stop), weights(tmp_path / "whole"))
    ours, theirs = (
        torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
        for folder in (stop, tmp_path / "whole")
    )
    assert ours.pop("run") == theirs.pop("run") and same(ours, theirs)

    run(script, world, tmp_path / "split", micro_batch=1)
    for whole, split in zip(log, comparable(tmp_path / "split"), strict=True):
        assert split == pytest.approx(whole, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_step_size_is_a_cosine_and_evaluations_are_said(script, world, tmp_path, capsys):
    evaluation = run(script, world, tmp_path / "run")
    assert f"eval/loss {evaluation['eval/loss']:.3f}" in capsys.readouterr().out
    rates = [line["optim/lr"] for line in read_log(tmp_path / "run" / "metrics.jsonl")[1:]]
    cosine = [(1 + math.cos(math.pi * done / 3)) / 2 for done in (0, 1, 2)]
    assert rates == pytest.approx([0.005, *(0.01 * left for left in cosine)])


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_picture_shows_what_there_is(script, world, tmp_path, monkeypatch):
    """Panels without a number are left out."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    run(script, world, tmp_path / "run")
    shown = [axis.get_title() for axis in figures[0].axes if axis.get_visible()]
    named = {text.get_text() for axis in figures[0].axes for text in axis.get_legend().get_texts()}
    logged = {key for line in read_log(tmp_path / "run" / "metrics.jsonl") for key in line}
    assert named and named <= logged
    if script is sft:
        assert shown == ["tokens per response", "entropy, nats per token", "loss"]
    else:
        assert shown == ["reward", "win rate, accuracy", "tokens per response", "loss"]


def test_the_end_token_is_learned(world, tmp_path):
    """It comes to stand behind the completion, and does not where every completion was cut."""
    rows = [{"prompt": "so the film was", "completion": " very good"}] * 40
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    tokenizer = common.load_tokenizer("--policy", world["policy"])
    row = torch.tensor([tokenizer("so the film was very good")["input_ids"]])
    ends = []
    for most in (6, 2):
        folder = tmp_path / f"run {most}"
        flags = world | {"dataset": str(tmp_path / "data"), "steps": 15}
        run(sft, flags, folder, max_response_tokens=most)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
        ends.append(model(row).logits[0, -1].softmax(-1)[tokenizer.eos_token_id].item())
        rate = read_log(folder / "metrics.jsonl")[-1]["length/eos_rate"]
        assert rate == (1.0 if most == 6 else 0.0)
    assert ends[0] > 0.9 and ends[1] < 0.5


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_final_scores_as_in_training_by_common_score(world, tmp_path, lora_rank):
    """Of the same texts, to 1e-5: in pairs beside longer ones, alone, and from plain rows."""
    flags = {"lora_rank": lora_rank, "checkpointing": bool(lora_rank), "lr": 0.03}
    run(reward, world, tmp_path / "run", **flags)
    samples = [s for s in read_log(tmp_path / "run" / "samples.jsonl") if s["step"] == 4]
    assert len(samples) == 7
    trained = torch.tensor([[s["reward"], s["rejected_reward"]] for s in samples])
    assert (trained[:, 0] - trained[:, 1]).abs().min() > 1e-3
    args = brain.Args(policy=world["policy"], reward_model=str(tmp_path / "run" / "final"))
    flags = SimpleNamespace(args=args, device=CPU)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    args.max_response_tokens = 16
    policy = common.load_policy(flags, tokenizer)
    judge = common.load_reward_model(flags, policy, tokenizer)
    prompts = [common.Prompt(s["prompt"], tokenizer(s["prompt"])["input_ids"]) for s in samples]
    texts = [[s["response"], s["rejected"]] for s in samples]
    batch = common.encode_responses(tokenizer, policy, prompts, texts, 6)
    long = common.Batch(
        [common.Prompt("the " * 30, [4] * 30)], [[[5] * 40, [6] * 50 + [tokenizer.eos_token_id]]]
    )
    beside = common.Batch(batch.prompts + long.prompts, batch.responses + long.responses)
    torch.testing.assert_close(common.score(judge, beside)[:7], trained, atol=1e-5, rtol=0)
    for i in range(7):
        for j in (0, 1):
            alone = common.Batch(prompts[i : i + 1], [[batch.responses[i][j]]])
            assert common.score(judge, alone).item() == pytest.approx(
                trained[i, j].item(), abs=1e-5
            )
    judge.model.shared_rows = False
    torch.testing.assert_close(common.score(judge, batch), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("special, pad", [({}, "<pad>"), ({"pad_token": "<eos>"}, "<unk>")])
def test_transformers_own_pooling_reads_the_same_token(world, tmp_path, special, pad):
    """final/ in others' hands: right-padded rows of unlike length, closed by an end token. A base
    whose end token pads as well gets another pad token."""
    tokenizer = word_tokenizer(**special)
    save(tmp_path / "base", make_model("llama", len(tokenizer)), tokenizer)
    run(reward, world, tmp_path / "run", policy=str(tmp_path / "base"), lr=0.03)
    final = str(tmp_path / "run" / "final")
    samples = [s for s in read_log(tmp_path / "run" / "samples.jsonl") if s["step"] == 4]
    texts = [f"{s['prompt']} {s['response']} <eos>" for s in samples]
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token == pad
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert (rows["attention_mask"] == 0).any()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(final)
    theirs = model(**rows).logits[:, 0]
    ours = torch.tensor([s["reward"] for s in samples])
    torch.testing.assert_close(theirs.detach(), ours, atol=1e-4, rtol=0)


def test_without_another_special_token_transformers_takes_one_row_at_a_time():
    """It would read the token before the end token of a padded row, and says so instead."""
    tokenizer = word_tokenizer(pad_token="<eos>", unk_token=None)
    model = parts.with_score(make_model("llama"))
    parts.pad_apart(tokenizer, model)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        model.module(torch.tensor([[5, 6, 1], [7, 1, 1]]))


@pytest.mark.parametrize("shared_rows, own_head", [(True, False), (False, False), (False, True)])
def test_a_fresh_score_is_0_and_belongs_to_the_body_of_the_policy(shared_rows, own_head):
    """The three ways to feed a policy; the same states, the score's weights times them."""
    policy = make_model("gpt2")
    body = policy.module.base_model
    model = parts.with_score(policy)
    assert model is policy and model.scores_tokens and model.module.base_model is body
    assert not any(p.is_meta for p in model.parameters()) and model.end_tokens == [1]
    batch = common.Batch(make_prompts([5, 6, 7], [8]), [[[9, 1], [10, 11, 1]]] * 2)
    model.shared_rows, model.own_head = shared_rows, own_head
    assert common._rewards(model, batch).abs().max() == 0
    torch.nn.init.normal_(model.module.score.weight)
    rewards = common._rewards(model, batch)
    states = body(torch.tensor([[5, 6, 7, 10, 11, 1]])).last_hidden_state[0, -1]
    assert rewards[0, 1].item() == pytest.approx(
        (model.module.score.weight[0] @ states).item(), abs=1e-5
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_export_makes_a_model_of_a_checkpoint(script, world, tmp_path):
    run(script, world, tmp_path / "run")
    folder = export.main(export.Args(run=str(tmp_path / "run")))
    assert same(load_file(folder / "model.safetensors"), weights(tmp_path / "run"))
    kind = json.loads((folder / "config.json").read_text())["architectures"]
    assert kind == ["LlamaForCausalLM" if script is sft else "LlamaForSequenceClassification"]


# ── what is read ──
HH = "\n\nHuman: film\n\nAssistant:"
USER = {"role": "user", "content": "film"}
FORMATS = {
    "prompt and completion": {"prompt": "the film was", "completion": " very good"},
    "pairs": {"prompt": "the film was", "chosen": " very good", "rejected": " bad"},
    "HH": {"chosen": f"{HH} very good", "rejected": f"{HH} bad"},
    "UltraFeedback": {
        "prompt": "film",
        "chosen": [USER, {"role": "assistant", "content": "very good"}],
        "rejected": [USER, {"role": "assistant", "content": "bad"}],
        "messages": [USER, {"role": "assistant", "content": "very good"}],
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_formats(script, chat, name, tmp_path, capsys):
    """What is learned, or scored: prompt and answer as the model's template lays them out.

    All rows are one row, so a step's loss is that of the evaluation before it: both read alike.
    """
    if script is reward and name == "prompt and completion":
        return  # no pair: see below
    if name == "UltraFeedback" and not chat:
        return  # messages need a template
    words = ["film", "the", "was", "very", "good", "bad", "Human:", "Assistant:", "user"]
    words += ["assistant", "<think>", "</think>"]
    tokenizer = chat_tokenizer(words=words) if chat else word_tokenizer(words)
    flags = {
        "policy": save(tmp_path / "lm", make_model("llama", len(tokenizer)), tokenizer),
        "dataset": str(tmp_path / "data"),
        "steps": 2,
        "prompts_per_step": 2,
        "max_response_tokens": 6,
        "eval_prompts": 2,
        "eval_every": 1,
        "warmup_steps": 1,
        "lr": 0.01,
        "lr_schedule": "constant",
    }
    write_jsonl(tmp_path / "data" / "train.jsonl", [FORMATS[name]] * 6)
    write_jsonl(tmp_path / "data" / "test.jsonl", [FORMATS[name]] * 2)
    run(script, flags, tmp_path / "run")
    said, log = capsys.readouterr().out, read_log(tmp_path / "run" / "metrics.jsonl")
    for before, after in zip(log, log[1:]):
        assert after["loss"] == pytest.approx(before["eval/loss"], abs=1e-5)
    assert log[1]["eval/loss"] < log[0]["eval/loss"] - 1e-3
    asked = "film" if name in ("HH", "UltraFeedback") else "the film was"
    if not chat:
        before = "Human: film Assistant:" if name == "HH" else asked
        learned = "very good <eos>"
    elif script is sft:
        before, learned = f"<turn> user {asked} <end> <turn> assistant", "very good <end>"
    else:  # a finished answer stands behind an empty thought, as Qwen3's template has it
        before = f"<turn> user {asked} <end> <turn> assistant <think> </think>"
        learned = "very good <end>"
    if script is sft:
        assert f"learns {learned!r}\nbehind {before!r}" in said
    else:
        assert f"it reads {before + ' ' + learned!r}" in said


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_another_column_by_name(script, world, tmp_path, capsys):
    rows = [{"text": "the film was", "summary": " so good", "worse": " bad"}] * 6
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    name = f"{tmp_path / 'data'}:prompt=text,completion=summary"
    if script is reward:
        name = f"{tmp_path / 'data'}:prompt=text,chosen=summary,rejected=worse"
    run(script, world, tmp_path / "run", dataset=name)
    assert "so good <eos>" in capsys.readouterr().out


# ── bad input ──
def test_rows_without_what_is_learned(world, tmp_path, capsys):
    def rows(**columns) -> str:
        folder = tmp_path / "-".join(columns or ["none"])
        return str(
            Path(write_jsonl(folder / "train.jsonl", [{"prompt": "the film"} | columns] * 6)).parent
        )

    new = tmp_path / "run"
    error = refusal(sft, world, new, capsys, dataset=rows())
    assert "--dataset" in error and "has no completion or chosen response" in error
    error = refusal(reward, world, new, capsys, dataset=rows(completion=" good"))
    assert "--dataset" in error and "has no chosen and rejected response" in error
    error = refusal(reward, world, new, capsys, dataset=rows(chosen=" bad", rejected=" bad"))
    assert "--dataset" in error and "no training pair of unlike responses" in error


def test_a_policy_without_a_classifier(world, tmp_path, capsys):
    tokenizer = word_tokenizer()
    config = transformers.CohereConfig(vocab_size=len(tokenizer), **SMALL)
    name = save(tmp_path / "lm", transformers.CohereForCausalLM(config).eval(), tokenizer)
    error = refusal(reward, world, tmp_path / "run", capsys, policy=name)
    assert "--policy: a CohereForCausalLM has no classifier" in error


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_flags(script, world, tmp_path, capsys):
    """A policy of one's own needs data and step size; numbers; help in groups."""
    with pytest.raises(SystemExit):
        common.parse_args(script.Args, ["--policy", "other"])
    error = capsys.readouterr().err
    assert "--policy other: name --dataset, --lr as well" in error and error.count("\n") == 1
    common.parse_args(script.Args, ["--policy", "other", "--dataset", "d", "--lr", "1"])
    error = refusal(script, world, tmp_path / "run", capsys, lr=0.0)
    assert "--lr 0.0: must be more than 0" in error
    error = refusal(script, world, tmp_path / "run", capsys, policy="/no/such")
    assert "--policy /no/such: no such file or folder" in error
    with pytest.raises(SystemExit):
        common.parse_args(script.Args, ["--help"])
    screen = capsys.readouterr().out
    assert "optimisation options" in screen and "--lr-schedule" in screen
    assert "--reward-model" not in screen and "--temperature" not in screen


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_a_stopped_run_says_how_to_go_on(script, world, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "stopping", lambda run: True)
    with pytest.raises(SystemExit) as stop:
        run(script, world, tmp_path / "run")
    assert f"python -m {script.__name__} --resume {tmp_path / 'run'}" in stop.value.code


# ── two processes ──
@pytest.mark.slow
def test_two_processes_are_one(world, tmp_path):
    """Gradients of each update and metrics of each step, to 1e-5; seven held-out rows."""
    (tmp_path / "flags.json").write_text(json.dumps(world))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "tests/ranks.py", str(tmp_path), "check_prepare"]
    done = subprocess.run(
        launch,
        cwd=ROOT,
        text=True,
        timeout=300,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for script in SCRIPTS:
        name = ids(script)
        alone = ranks.train(script, script.Args(**world | {"run_dir": str(tmp_path / name)}))
        for seen in both:
            ours = seen["check_prepare"][name]
            assert len(ours["gradients"]) == len(alone["gradients"]) == 4
            for mine, whole in zip(ours["gradients"], alone["gradients"], strict=True):
                assert max(gradient.abs().max() for gradient in whole) > 1e-3
                torch.testing.assert_close(mine, whole, atol=1e-5, rtol=1e-5)
            assert ours["result"] == pytest.approx(alone["result"], abs=1e-5)
            assert all(ours["sharded"].values())
        two = comparable(tmp_path / f"two {name} 0")
        for mine, whole in zip(two, comparable(tmp_path / name), strict=True):
            assert mine == pytest.approx(whole, rel=1e-5, abs=1e-5)
        samples = [
            [
                (line["step"], line["prompt"])
                for line in read_log(tmp_path / folder / "samples.jsonl")
            ]
            for folder in (name, f"two {name} 0")
        ]
        assert samples[0] == samples[1] and len(samples[0]) == (21 if script is reward else 0)


# ── who uses them ──
def test_sft_learns_on_the_tiny_world(tmp_path):
    """From random weights, 50 steps of 32 of its 1,400 reviews: by 2.5 nats per token at the least."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.make_config(tokenizer))
    flags = {"policy": tiny.save(model, tokenizer, tmp_path / "lm"), "lr": 5e-3, "steps": 50}
    evaluation = run(sft, flags, tmp_path / "run", eval_prompts=64, eval_every=50)
    before = read_log(tmp_path / "run" / "metrics.jsonl")[0]["eval/loss"]
    assert before > 4 and evaluation["eval/loss"] < before - 2.5


def test_the_reward_model_learns_on_the_tiny_world(tmp_path):
    """Which of two writers' reviews has the higher gold score, of 2,240 pairs without noise."""
    rng = random.Random(0)
    rows = []
    while len(rows) < 2_240 + 256:
        prompt = tiny.write_prompt(rng)
        pair = sorted(
            [tiny.write_review(rng, prompt) for _ in range(2)],
            key=lambda review: tiny.gold_score(prompt, review),
        )
        rows.append({"prompt": prompt, "chosen": " " + pair[1], "rejected": " " + pair[0]})
    write_jsonl(tmp_path / "data" / "train.jsonl", rows[256:])
    write_jsonl(tmp_path / "data" / "test.jsonl", rows[:256])
    flags = {"dataset": str(tmp_path / "data"), "lr": 3e-3, "steps": 70, "eval_every": 70}
    evaluation = run(reward, flags, tmp_path / "run")
    first = read_log(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["eval/loss"] == pytest.approx(math.log(2)) and first["eval/accuracy"] == 0.5
    assert evaluation["eval/accuracy"] > 0.7


def test_centred_rewards(world, tmp_path):
    """With --center the mean of a pair's rewards ends nearer to 0."""
    ends = []
    for center in (0.0, 1.0):
        log = tmp_path / f"{center}"
        run(reward, world | {"steps": 12, "eval_every": 12}, log, center=center)
        samples = [s for s in read_log(log / "samples.jsonl") if s["step"] == 12]
        ends.append(max(abs(s["reward"] + s["rejected_reward"]) for s in samples))
    assert ends[1] < ends[0] / 2


@pytest.mark.slow
def test_the_tiny_world_is_made_by_the_two(tmp_path):
    """A short run makes the files that assets/tiny has, of the same kinds."""
    flags = {"sft_steps": 6, "reward_steps": 3, "reward_pairs": 64, "train_rows": 9, "test_rows": 4}
    numbers = tiny.main(tiny.Args(out=str(tmp_path / "tiny"), **flags))
    made, committed = tmp_path / "tiny", ROOT / "assets" / "tiny"
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (made, committed)
    ]
    assert files[0] == files[1]
    for part in ("sft", "reward"):
        ours, theirs = (
            json.loads((folder / part / "config.json").read_text()) for folder in (made, committed)
        )
        assert ours == theirs
        ours, theirs = (
            load_file(folder / part / "model.safetensors") for folder in (made, committed)
        )
        shapes = [{n: (w.shape, w.dtype) for n, w in x.items()} for x in (ours, theirs)]
        assert shapes[0] == shapes[1]
    for split, count in (("train", 9), ("test", 4)):
        rows, theirs = (read_log(x / "data" / f"{split}.jsonl") for x in (made, committed))
        assert len(rows) == count and {row.keys() == theirs[0].keys() for row in rows} == {True}
    readme = [(folder / "README.md").read_text() for folder in (made, committed)]
    names = [[line.split("|")[1] for line in x.splitlines() if line[:2] == "| "] for x in readme]
    assert names[0] == names[1] and len(numbers) == len(names[0]) - 1


def test_the_real_policy_is_made_by_sft(tmp_path):
    """Without chat template, with a pad token of its own; held-out loss before and after."""
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    save(tmp_path / "base", make_model("llama", len(tokenizer)), tokenizer)
    (tmp_path / "base" / "LICENSE").write_text("Apache License")
    reviews = [real.Review("film so very so", " was good", 0.0)] * real.TRAINED
    said = real.write_policy(tmp_path / "base", reviews, 40, tmp_path / "policy")
    before, after = map(float, said[0].split("loss ")[1].split(" nats")[0].split(" -> "))
    assert said[0].startswith("SFT on 40 reviews") and after < before - 1e-3
    made = common.load_tokenizer("--policy", str(tmp_path / "policy"))
    assert not made.chat_template and made.pad_token == "<|endoftext|>"
    assert (tmp_path / "policy" / "LICENSE").exists()
    ours = load_file(tmp_path / "policy" / "model.safetensors")
    theirs = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys() and not same(ours, theirs)
    none = real.write_policy(tmp_path / "base", reviews, 0, tmp_path / "as it was")
    assert none[0] == "SFT on 0 reviews"
    assert same(load_file(tmp_path / "as it was" / "model.safetensors"), theirs)


def test_the_tiny_chain_begins_from_random_weights_and_texts_alone(tmp_path):
    """Prompts that differ; of a pair the better one is chosen oftener, and not always."""
    out = tmp_path / "chain"
    assert tiny.main(tiny.Args(chain=str(out), chain_rows=2_000, test_rows=50)) == {}
    rows = {split: read_log(out / "data" / f"{split}.jsonl") for split in ("train", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 2_000, "test": 50}
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    gaps = [
        tiny.gold_score(row["prompt"], row["chosen"])
        - tiny.gold_score(row["prompt"], row["rejected"])
        for row in rows["train"]
    ]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    assert 0.65 < better / (better + worse) < 0.95
    assert all(row["completion"].startswith(" ") for row in rows["train"])
    config = json.loads((out / "start" / "config.json").read_text())
    assert config["vocab_size"] == len(tiny.make_tokenizer())


# ── real texts: what becomes of them, by hand-made inputs ──
def reviews(count: int) -> list[texts.Review]:
    """Numbered, of ten words; ratings -4, -3.5 … 4, and again."""
    return [
        texts.Review(f"film {i} was so", " one two three four five six", (i % 17 - 8) / 2)
        for i in range(count)
    ]


def test_a_pair_is_two_reviews_that_people_tell_apart():
    a, b, c, d = (
        texts.Review("this film was so", f" {word}", rating)
        for word, rating in (("good", 2.0), ("bad", -1.5), ("poor", -1.0), ("mean", -2.5))
    )
    assert [(row["chosen"], row["rejected"]) for row in texts.pairs_of([a, b, c, d])] == [
        (" this film was so good", " this film was so bad"),  # b and c are less than 1 apart
        (" this film was so poor", " this film was so mean"),
        (" this film was so good", " this film was so poor"),  # and now by two
        (" this film was so bad", " this film was so mean"),
    ]
    assert {row["prompt"] for row in texts.pairs_of([a, b])} == {"Review:"}


def test_the_chain_reads_a_pair_as_it_reads_a_prompt_with_its_response(tmp_path):
    """Sides of the split do not meet, and prompt + response of both files are the same texts."""
    all_reviews = reviews(texts.TRAINED + 500)
    all_reviews[texts.HELD_OUT + 3] = all_reviews[7]._replace(
        completion=" one two three four five six seven"
    )
    texts.write_reviews(all_reviews, tmp_path / "reviews")
    texts.write_pairs(all_reviews, tmp_path / "pairs")
    whole, rated = {}, {}
    for split in ("train", "test"):
        rows = read_log(tmp_path / "reviews" / f"{split}.jsonl")
        whole[split] = {row["prompt"] + row["completion"] for row in rows}
        assert all(row["prompt"].startswith("Review: film ") for row in rows)
        pairs = read_log(tmp_path / "pairs" / f"{split}.jsonl")
        rated[split] = {x["prompt"] + x[side] for x in pairs for side in ("chosen", "rejected")}
        assert len(rated[split]) > 1_000
        assert len(rated[split] - whole[split]) <= 1  # the review whose prompt is held out
    assert not rated["train"] & rated["test"]
    assert len(whole["test"]) == texts.HELD_OUT
    assert len(whole["train"]) == texts.TRAINED - texts.HELD_OUT - 1
    prompts = {split: {text.split(" one")[0] for text in part} for split, part in whole.items()}
    assert not prompts["train"] & prompts["test"]


INDEX = """Package: {name}
Description-md5: 302b8ff8
Description-en: {synopsis}
 {opening} is a program that does one thing well,
 and another badly.
 .
 It reads:
  * files
  * pipes
 and writes what is left of them to the screen.

"""


def test_descriptions_become_text_and_doubles_are_left_out():
    entries = [
        ("one", "tool for this and that", "Alpha"),
        ("two", "tool for this and that", "Beta"),  # the synopsis of the first
        ("three", "library of another kind", "alpha"),  # begins as the first
        ("four", "one thing well,", "Gamma"),  # holds its synopsis
        ("five", "two words", "Delta"),  # too short
        ("six", "screen reader for small files", "Zeta"),
    ]
    index = "".join(INDEX.format(name=n, synopsis=s, opening=o) for n, s, o in entries)
    index += "Package: long\nDescription-en: much to say of it\n" + " word\n" * 91 + "\n"
    found = texts.read_descriptions(index)
    assert [summary.synopsis for summary in found] == [entries[0][1], entries[5][1]]
    assert found[0].description == (
        "Alpha is a program that does one thing well, and another badly.\n\nIt reads:\n* files\n"
        "* pipes and writes what is left of them to the screen."
    )


def test_summaries_are_rows_for_sft_with_held_out_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "HELD_OUT_SUMMARIES", 3)
    names = [f"{chr(97 + i)}{chr(97 + j)}" for i in range(4) for j in range(5)]
    index = tmp_path / "Translation-en"
    index.write_text(
        "".join(INDEX.format(name=x, synopsis=f"tool named {x}", opening=x) for x in names)
    )
    said = texts.write_summaries(index, 1, tmp_path / "summaries")
    assert said == ["20 descriptions, 3 of them held out"]
    rows = [read_log(tmp_path / "summaries" / f"{x}.jsonl") for x in ("train", "test")]
    assert [len(part) for part in rows] == [17, 3]
    for row in rows[0] + rows[1]:
        name = row["prompt"].split()[0]
        assert row["completion"] == f" tool named {name}"
        assert row["prompt"].endswith("screen.\n\nTL;DR:")
    order = [row["prompt"].split()[0] for row in rows[1] + rows[0]]
    assert sorted(order) == names and order != names
