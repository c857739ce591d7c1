"""Reward model: a causal LM's body below a score, trained on pairs (Bradley and Terry, 1952).

The second link of the chain sft → reward → method. Of two responses to a prompt someone preferred
y_w to y_l. The rewards r of both say how likely that was, and the loss is its negative log (Ouyang
et al., NeurIPS 2022, 2203.02155):

    P(y_w ≻ y_l | x) = σ(r(x, y_w) − r(x, y_l))                                                  (1)
    L = −log σ(r_w − r_l) + c (r_w + r_l)²                                                       (2)

(1) leaves a constant per prompt open. The second term of (2) draws it to where the two rewards of a
pair have the mean 0 (Eisenstein et al., 2023, 2312.09244). c = --center; rewards are [P, 2].

    python -m prepare.reward                           # the embedded pairs: too few to learn from
    python -m prepare.reward --policy SFT --dataset PAIRS --lr 1e-5 --steps 1000 --center 0.01

It reads what `dpo.py --pairs dataset` reads: `prompt`, `chosen`, `rejected`, or the last two with
the prompt in front. Responses are laid out, closed and scored by the functions of `common` that
score them when a method trains, so final/ gives a method the rewards it had here. The score reads
the state of the last token, an end token unless the response was cut. It begins at 0: step 0 must
show eval/loss ln 2 = 0.6931 and eval/accuracy 0.5.

No shift centres the rewards after training: the score of transformers' classifiers has no bias to
hold it. eval/reward, their mean on held-out pairs, says how far from 0 they are. The last table
says whether (1) can be believed (`parts.calibration`); metrics.jsonl has it per evaluation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from plumbing.data import Prompt, policy_layout
from prepare.parts import (
    batch_of,
    calibration,
    pad_apart,
    say_calibration,
    share,
    usable_pairs,
    with_score,
)


@dataclass
class Args:
    # data
    policy: str = "assets/tiny/sft"
    """causal LM whose body the reward model starts from: a folder or a hub name"""
    dataset: str = "assets/tiny/data"
    """.jsonl, .parquet, a folder or a hub name; NAME:CONFIG; NAME:split=train_x,prompt=question"""
    template: Literal["auto", "raw"] = "auto"
    """text prompts become a user's turn if the policy has a chat template, or stay raw"""
    prompts_per_step: int = 32
    """pairs per step (P), all processes together"""
    max_prompt_tokens: int = 0
    """longer prompts are dropped, and counted; 0 = what the context leaves beside a response"""
    max_response_tokens: int = 512
    """a response is cut after so many tokens"""

    # optimisation
    steps: int = 100
    """batches to train on"""
    micro_batch: int = 0
    """pairs per forward and backward pass, to save memory; 0 = all; gradients stay the same"""
    lr: float = 1e-3
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
    """of the order of the pairs"""
    eval_every: int = 20
    """steps between evaluations"""
    eval_prompts: int = 256
    """held-out pairs"""
    save_every: int = 50
    """steps between checkpoints: what a kill can lose"""
    run_dir: str = ""
    """folder of the run; empty = runs/<script>-<seed>-<time>"""
    resume: str = ""
    """run folder to continue, by its own flags; --steps may grow"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """tracker to send the metrics to as well; by default nothing leaves the machine"""

    # reward
    center: float = 0.0
    """c, the weight of the term that draws the rewards of a pair to a mean of 0, as 0.01"""

    # What the shared code asks every script for, and there is no choice of here.
    reward_model: ClassVar[str] = ""
    temperature: ClassVar[float] = 1.0
    updates_per_sample: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    cuda_graph: ClassVar[bool] = False
    chat_template_kwargs: ClassVar[str] = "{}"  # the methods read a reward model without any


def bradley_terry_loss(rewards: Tensor, center: float = 0.0) -> Tensor:
    """Loss [P] of the rewards [P, 2] of y_w and y_l."""
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2  # (2)


def preference(rewards: Tensor) -> Tensor:
    """P(y_w ≻ y_l) [P] of rewards [P, 2]."""
    return torch.sigmoid(rewards[:, 0] - rewards[:, 1])  # (1)


def accuracy(rewards: Tensor) -> Tensor:
    """[P] 1 where rewards [P, 2] put y_w first, 0 where they put y_l first, ½ for a tie."""
    return 0.5 + 0.5 * torch.sign(rewards[:, 0] - rewards[:, 1])


def length(prompt: Prompt) -> int:
    """Characters, which say well enough how many tokens there will be."""
    return len(prompt.text) + max(len(prompt.chosen), len(prompt.rejected))


def encode(reward_model: common.RewardModel, prompts: list[Prompt], args: Args) -> common.Batch:
    """The prompts with two responses each, y_w and y_l, as a policy would have sampled them."""
    texts = [[prompt.chosen, prompt.rejected] for prompt in prompts]
    tokenizer, model = reward_model.policy_tokenizer, reward_model.model
    return common.encode_responses(tokenizer, model, prompts, texts, args.max_response_tokens)


def evaluate(
    run: common.Run, reward_model: common.RewardModel, prompts: list[Prompt], step: int
) -> tuple[dict[str, float], list[dict]]:
    """(metrics over all held-out pairs, on all processes; samples: this process's pairs)."""
    args, parts = run.args, []
    mine, count = share(prompts, run)
    size = args.micro_batch or args.prompts_per_step // run.world
    for rows in common.micro_batches(len(mine), size):
        parts.append(common.score(reward_model, encode(reward_model, mine[rows], args)).cpu())
    own = torch.cat(parts)[:count]
    rewards = torch.zeros(len(prompts), 2, dtype=torch.float64)
    rewards[run.rank :: run.world] = own.double()
    rewards = run.world * run.average(rewards)  # those of all processes
    metrics = {
        "eval/loss": bradley_terry_loss(rewards).mean().item(),
        "eval/accuracy": accuracy(rewards).mean().item(),
        "eval/reward": rewards.mean().item(),
        **calibration(preference(rewards)),
    }
    samples = [
        {"step": step, "prompt": p.text, "response": p.chosen, "reward": chosen}
        | {"rejected": p.rejected, "rejected_reward": rejected}
        for p, (chosen, rejected) in zip(mine, own.tolist())
    ]
    return metrics, samples


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last evaluation by metric name."""
    # ── set up ──
    run = common.Run(args, __file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    train_prompts, held_out = common.load_prompts(args, tokenizer)
    train_prompts = usable_pairs(args.dataset, train_prompts, "training")
    held_out = sorted(usable_pairs(args.dataset, held_out, "held-out"), key=length)
    model = with_score(common.load_policy(run, tokenizer))
    pad_apart(tokenizer, model)
    layout = policy_layout(args, tokenizer)
    reward_model = common.RewardModel(
        tokenizer, model.end_tokens, run.device, model=model, layout=layout, same_tokens=True
    )
    first = common._as_read_by(reward_model, encode(reward_model, train_prompts[:1], args))
    print(f"it reads {tokenizer.decode(first.prompts[0].tokens + first.responses[0][0])!r}")

    # ── start ──
    common.shard(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    done = run.open(torch.nn.ModuleDict({"policy": model}), optimizer)
    evaluation, samples = evaluate(run, reward_model, held_out, done)
    if done == 0:
        run.log(0, evaluation, samples)

    for step in range(done + 1, args.steps + 1):
        # ── read ──
        prompts = batch_of(train_prompts, step, args, length)[run.rank :: run.world]
        started = run.clock()
        batch = encode(reward_model, prompts, args)

        # ── update ──
        lr = common.step_size(args, step)
        optimizer.param_groups[0]["lr"] = lr
        rewards, loss = [], []
        for rows in common.micro_batches(len(prompts), args.micro_batch):
            read = common._as_read_by(reward_model, batch[rows])
            part_rewards = model(common._rewards, read)
            part_loss = bradley_terry_loss(part_rewards, args.center)
            common.require_finite(part_loss, "the loss", batch[rows], "take a smaller --lr")
            (part_loss.sum() / len(prompts)).backward()
            rewards.append(part_rewards.detach())
            loss.append(part_loss.detach())
        rewards, loss = torch.cat(rewards), torch.cat(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        common.require(
            grad_norm.isfinite(),
            f"the gradient of step {step} is NaN or infinite; the last checkpoint is kept",
        )
        optimizer.step()
        optimizer.zero_grad()

        # ── log ──
        metrics = {
            "loss": loss.mean(),
            "accuracy": accuracy(rewards).mean(),
            "reward/mean": rewards.mean(),
            "length/mean": batch.lengths().mean(),
            "length/eos_rate": batch.ended(model.end_tokens).float().mean(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/update_s": run.clock() - started,
            "memory/peak_gib": run.peak_memory(),
        }

        # ── evaluate ──
        samples = []
        if step % args.eval_every == 0 or step == args.steps:
            evaluation, samples = evaluate(run, reward_model, held_out, step)
            metrics |= evaluation
        run.log(step, metrics, samples)

        # ── save ──
        stop = run.stopping()
        if step % args.save_every == 0 or step == args.steps or stop:
            run.save(step)
        if stop:
            run.stop(step)

    # ── finish ──
    run.close(model, tokenizer)
    say_calibration(evaluation)
    return evaluation


if __name__ == "__main__":
    main(common.parse_args(Args))
