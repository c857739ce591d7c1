"""Supervised fine-tuning: a causal LM learns to write the completions of a data set.

The first link of the chain sft → reward → method. Of prompts x_p and completions y_p, the end token
included, it minimises the negative log-prob per token of the completions; a prompt's own tokens
are read and not learned:

    L = − Σ_p log π_θ(y_p|x_p) / Σ_p |y_p|        in nats per token, over the P rows of a step   (1)

P prompts per step, all processes together. Log-probs are sums over the tokens of a completion, [P].

    python -m prepare.sft                              # goes on with the embedded policy
    python -m prepare.sft --policy BASE --dataset ROWS --lr 1e-5 --steps 2000 --lr-schedule cosine

It reads what the methods read, in the same way: `completion`, or else the `chosen` one of a pair,
behind `prompt`, laid out by the policy's chat template; `--dataset NAME:completion=summary` names
another column. A completion is closed as the policy will close its samples, so it learns to end
there; one that is cut at --max-response-tokens is not closed, and counts in length/eos_rate.

A step's rows have about one length, so that little is padded. An epoch is rows / P steps; the step
size follows --steps. eval/loss is (1) over the held-out rows. The run folder's final/ is what the
methods take as --policy.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

import common
from plumbing.data import Prompt
from prepare.parts import batch_of, share


@dataclass
class Args:
    # data
    policy: str = "assets/tiny/sft"
    """causal LM to train: a folder or a hub name"""
    dataset: str = "assets/tiny/data"
    """.jsonl, .parquet, a folder or a hub name; NAME:CONFIG; NAME:split=train_x,prompt=question"""
    template: Literal["auto", "raw"] = "auto"
    """text prompts become a user's turn if the policy has a chat template, or stay raw"""
    chat_template_kwargs: str = "{}"
    """JSON for the policy's chat template, as {"enable_thinking": false}"""
    prompts_per_step: int = 32
    """prompts per step (P), all processes together"""
    max_prompt_tokens: int = 0
    """longer prompts are dropped, and counted; 0 = what the context leaves beside a completion"""
    max_response_tokens: int = 512
    """a completion is cut after so many tokens"""

    # optimisation
    steps: int = 100
    """batches to train on"""
    micro_batch: int = 0
    """prompts per forward and backward pass, to save memory; 0 = all; gradients stay the same"""
    lr: float = 5e-4
    """AdamW's step size after the warm-up; 1e-5 suits models of 1B parameters and more"""
    warmup_steps: int = 10
    """steps in which the step size grows linearly from 0"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """the step size after the warm-up: it stays, or falls to 0 by the end of --steps"""
    weight_decay: float = 0.0
    """AdamW's weight decay, of every weight that is trained"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    dtype: Literal["mixed", "float32", "bfloat16"] = "mixed"
    """mixed: float32 weights, bfloat16 arithmetic on a GPU; bfloat16: the base below adapters"""
    lora_rank: int = 0
    """rank of adapters beside the linear layers, trained in place of all weights (0), by peft"""
    checkpointing: bool = False
    """compute each block's activations again in the backward pass, to save memory"""

    # run
    seed: int = 1
    """of the order of the prompts"""
    eval_every: int = 20
    """steps between evaluations"""
    eval_prompts: int = 256
    """held-out prompts with their completions"""
    save_every: int = 50
    """steps between checkpoints: what a kill can lose"""
    run_dir: str = ""
    """folder of the run; empty = runs/<script>-<seed>-<time>"""
    resume: str = ""
    """run folder to continue, by its own flags; --steps may grow"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """tracker to send the metrics to as well; by default nothing leaves the machine"""

    # What the shared code asks every script for, and there is no choice of here.
    reward_model: ClassVar[str] = ""
    temperature: ClassVar[float] = 1.0
    updates_per_sample: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    cuda_graph: ClassVar[bool] = False


def sft_loss(logprobs: Tensor, tokens: float) -> Tensor:
    """Loss [P] of log-probs [P] of completions that hold `tokens` tokens in all: its sum is (1)."""
    return -logprobs / tokens  # (1)


def length(prompt: Prompt) -> int:
    """Characters, which say well enough how many tokens there will be."""
    return len(prompt.text) + len(prompt.reference)


def encode(tokenizer, policy: common.Model, prompts: list[Prompt], args: Args) -> common.Batch:
    """The prompts with one response each, their completion."""
    texts = [[prompt.reference] for prompt in prompts]
    return common.encode_responses(tokenizer, policy, prompts, texts, args.max_response_tokens)


def evaluate(run: common.Run, policy: common.Model, tokenizer, prompts: list[Prompt]) -> dict:
    """eval/loss: (1) over all held-out prompts, on all processes."""
    args, parts = run.args, []
    mine, count = share(prompts, run)
    size = args.micro_batch or args.prompts_per_step // run.world
    for rows in common.micro_batches(len(mine), size):
        batch = encode(tokenizer, policy, mine[rows], args)
        logprobs = common.logprobs(policy, batch, 1.0).cpu()
        parts.append(torch.cat([logprobs, batch.lengths()], 1).double())
    logprob, tokens = run.average(torch.cat(parts)[:count].sum(0)).tolist()
    return {"eval/loss": -logprob / tokens}


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last evaluation by metric name."""
    # ── set up ──
    run = common.Run(args, __file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    train_prompts, held_out = common.load_prompts(args, tokenizer)
    for prompt in train_prompts + held_out:
        where = f"--dataset {args.dataset}: the prompt {prompt.text[-60:]!r} has no"
        common.require(prompt.reference is not None, f"{where} completion or chosen response")
    held_out.sort(key=length)
    policy = common.load_policy(run, tokenizer)
    first = encode(tokenizer, policy, train_prompts[:1], args)
    print(f"--policy learns {tokenizer.decode(first.responses[0][0])!r}")
    print(f"behind {tokenizer.decode(first.prompts[0].tokens)!r}")

    # ── start ──
    common.shard(policy)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    done = run.open(torch.nn.ModuleDict({"policy": policy}), optimizer)
    evaluation = evaluate(run, policy, tokenizer, held_out)
    if done == 0:
        run.log(0, evaluation)

    for step in range(done + 1, args.steps + 1):
        # ── read ──
        prompts = batch_of(train_prompts, step, args, length)[run.rank :: run.world]
        started = run.clock()
        batch = encode(tokenizer, policy, prompts, args)
        lengths = batch.lengths()
        tokens = run.average(lengths.sum()).item()  # mean per process, as gradients are

        # ── update ──
        lr = common.step_size(args, step)
        optimizer.param_groups[0]["lr"] = lr
        loss, entropy = 0.0, 0.0
        for rows in common.micro_batches(len(prompts), args.micro_batch):
            logprobs, part_entropy = common.logprobs_and_entropy(policy, batch[rows], 1.0)
            part_loss = sft_loss(logprobs[:, 0], tokens)
            common.require_finite(part_loss, "the loss", batch[rows], "take a smaller --lr")
            part_loss.sum().backward()
            loss += part_loss.sum().item()
            entropy += part_entropy.sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        common.require(
            grad_norm.isfinite(),
            f"the gradient of step {step} is NaN or infinite; the last checkpoint is kept",
        )
        optimizer.step()
        optimizer.zero_grad()

        # ── log ──
        updated = run.clock()
        metrics = {
            "loss": loss,
            "entropy/token": entropy / tokens,
            "length/mean": lengths.mean(),
            "length/eos_rate": batch.ended(policy.end_tokens).float().mean(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/update_s": updated - started,
            "tokens_per_s": run.world * tokens / (updated - started),
            "memory/peak_gib": run.peak_memory(),
        }

        # ── evaluate ──
        if step % args.eval_every == 0 or step == args.steps:
            evaluation = evaluate(run, policy, tokenizer, held_out)
            metrics |= evaluation
        run.log(step, metrics)

        # ── save ──
        stop = run.stopping()
        if step % args.save_every == 0 or step == args.steps or stop:
            run.save(step)
        if stop:
            run.stop(step)

    # ── finish ──
    run.close(policy, tokenizer)
    return evaluation


if __name__ == "__main__":
    main(common.parse_args(Args))
