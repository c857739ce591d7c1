"""Policies that are tables, and a real model so small that all its responses can be listed."""

import itertools
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from models import make_model, save, word_tokenizer, write_jsonl
from torch.optim import AdamW

import brain
import common

WORDS = ["a", "b"]


def slow(value):
    """A parameter whose test is long; plain `pytest` leaves it out."""
    return pytest.param(value, marks=pytest.mark.slow)


def table(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(ref: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Log of p·exp(r/τ)/Z over all responses, the last dimension."""
    return (ref + rewards / beta).log_softmax(-1)


def expectation(distribution: torch.Tensor, n: int, value) -> torch.Tensor:
    """Mean of value(picks [n]) over all n-tuples sampled from `distribution` (log-probs), exactly."""
    mean = 0
    for picks in itertools.product(range(len(distribution)), repeat=n):
        picks = torch.tensor(picks)
        mean = mean + distribution[picks].sum().exp() * value(picks)
    return mean


def gradient(logits: torch.Tensor, loss) -> torch.Tensor:
    """∂ loss(log-probs of a table policy) / ∂ logits."""
    variable = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(variable.log_softmax(-1)).sum(), variable)[0]


def make_small_world(folder: Path, responses: int = 2) -> dict:
    """Flags (by name) of an enumerable world of 6 tokens, one of them the end.

    It has 31 responses of at most 2 tokens or, with `responses` 1, 6 responses of one token.
    """
    tokenizer = word_tokenizer(WORDS)
    size = len(tokenizer)
    policy = make_model("llama", size)
    with torch.no_grad():
        # <pad>, <unk>, <bos>: plain words to this model
        policy.module.lm_head.weight[[0, 2, 3]] = 0
    save(folder / "sft", policy, tokenizer)
    save(folder / "rm", make_model("llama", size, labels=1, seed=2), tokenizer)
    rows = [{"prompt": "a b", "completion": "a", "chosen": "a", "rejected": "b"}] * 2
    write_jsonl(folder / "data" / "train.jsonl", rows)
    write_jsonl(folder / "data" / "test.jsonl", rows)
    return {
        "policy": str(folder / "sft"),
        "reward_model": str(folder / "rm"),
        "dataset": str(folder / "data"),
        "max_prompt_tokens": 8,
        "max_response_tokens": responses,
        "prompts_per_step": 2,
        "samples_per_prompt": 64,
        "steps": 250,
        "lr": 1.5e-3,
        "warmup_steps": 5,
        "eval_every": 10**6,
        "eval_prompts": 2,
        "save_every": 10**6,
    }


def all_responses(flags: dict, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of `policy`, rewards) in float64 of all responses to the one prompt, [responses]."""
    names = {field.name for field in fields(brain.Args)}
    args = brain.Args(
        **{name: value for name, value in flags.items() if name in names}
        | {"policy": policy, "run_dir": ""}
    )
    run = common.Run(args, brain.__file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    model = common.load_policy(run, tokenizer)
    reward_model = common.load_reward_model(run, model, tokenizer)
    prompts, _ = common.load_prompts(args, tokenizer)
    end, vocabulary = 1, range(len(tokenizer))
    ids = (
        [[end]] + [[i, j] for i in vocabulary if i != end for j in vocabulary]
        if args.max_response_tokens == 2
        else [[i] for i in vocabulary]
    )
    batch = common.Batch(prompts[:1], [ids])
    logprobs = common.logprobs(model, batch, 1.0).double()[0]
    assert abs(logprobs.exp().sum() - 1) < 1e-5
    return logprobs, common.score(reward_model, batch).double()[0]


def train(
    script, flags: dict, folder: Path, decay=False, **more
) -> tuple[torch.Tensor, list[dict]]:
    """Runs a script's main(); (log-probs of all responses after it, its metrics).

    With `decay` the step size falls to 0, so that the noise of the last samples does not hide where
    the loop goes.
    """
    args, step, taken = script.Args(**flags | {"run_dir": str(folder)} | more), AdamW.step, []

    def smaller_step(self, *inputs, **options):
        group, taken[:] = self.param_groups[0], [*taken, 1]
        kept, group["lr"] = group["lr"], group["lr"] * (1 - len(taken) / (args.steps + 1))
        out = step(self, *inputs, **options)
        group["lr"] = kept
        return out

    with pytest.MonkeyPatch.context() as patch:
        if decay:
            patch.setattr(AdamW, "step", smaller_step)
        script.main(args)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return all_responses(flags | more, str(folder / "final"))[0], lines


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Total variation of two distributions given by log-probs."""
    return 0.5 * (first.exp() - second.exp()).abs().sum().item()


def samplers(monkeypatch) -> list[torch.Tensor]:
    """A list that gets a weight of the model that samples, at each step's sampling.

    Evaluations and tests of fresh samples are left out.
    """
    weights, original, seeds = [], common.sample, common.seed_of

    def sample(model, prompts, n, max_tokens, temperature, seed):
        if seed in training:
            weights.append(next(model.parameters()).detach().clone())
        return original(model, prompts, n, max_tokens, temperature, seed)

    def seed_of(*parts):
        seed = seeds(*parts)
        if all(isinstance(part, int) for part in parts):  # (seed, step, rank)
            training.add(seed)
        return seed

    training: set[int] = set()
    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(common, "seed_of", seed_of)
    return weights
