"""BOND and J-BOND: best-of-N distillation (Sessa et al., 2407.14622).

The target is the law of the best of N samples of an anchor π_a. With p_<(y) and p_≤(y) the anchor's
probabilities of a reward below, and not above, that of y:

    π_BoN(y) = π_a(y) · p_≤^{N−1} · Σ_{i=1..N} (p_</p_≤)^{i−1}                               (1)
    J^b      = (1−b)·KL(π_BoN‖π_θ) + b·KL(π_θ‖π_BoN)                                         (2)
    forward part    −(1−b)·log π_θ(y_best),  y_best the best of N anchor samples             (3)
    backward part   −b·log π_θ(y)·(A − B),  A = (N−1)·log p̂_≤(y) − ℓ,  y ~ π_θ               (4)
    p̂_≤(y) = share of k anchor samples with r(y_i) ≤ r(y), at least 1/(2k)                   (5)

ℓ = log π_θ(y) − log π_a(y) and A are detached; B is the mean of the other samples' A in the batch.
J-BOND (--anchor ema) is the step for N = 2 with two anchor samples y′ and an anchor that follows:

    r_J(y) = −log 16 if r(y) < min(r(y′_1), r(y′_2)), else 0;   A = r_J − ℓ                  (6)
    L      = (3) + (4) + γ·log π_θ(y)·ℓ                                                      (7)
    anchor ← (1−η)·anchor + η·policy, after every optimizer step                             (8)

    --anchor ema     J-BOND                 (3), (4) with (6), (7), (8)
    --anchor fixed   BOND                   (3), (4) with (5); the anchor is the start model
    --anchor copy    iterative BOND         the same; the anchor is renewed every 1/η steps

P prompts a step, N samples of the policy a prompt (`samples_per_prompt`, not the N above, which is
--best-of) and k anchor samples beside them. Log-probs are sums over the tokens of a response, end
token included, in nats at the sampling temperature; they and the rewards are [P, N + k].
    π_θ = logprobs    π_a = anchor_logprobs    b = --jeffreys    η = --eta    γ = --gamma

How this differs from the paper (read: arXiv v1, not the ICLR version):
 1. The γ term has a plus sign. Algorithm 2 of v1 prints a minus, with which a larger γ drives the
    policy away from the anchor; with (7) it holds it back, as the paper's figure says.
 2. The paper draws one sample of the policy a prompt; --samples-per-prompt 1 does that.
 3. The floor in (5) is ours, as the paper does not say what log 0 should be. (5) keeps p_≤^{N−1} of
    (1) and drops the sum, as the paper does in practice.
    With few anchor samples it is biased: for b = 1, N = k = 2 aims at a win rate of 0.61, not 0.67
    (J-BOND, made for two samples, has (6) instead); N = 8, k = 16 at 0.892, not 0.889. Take
    --anchor-samples 2N or more for fixed and copy.
 4. "every 1/η steps" for --anchor copy is the paper's own comparison (η = 0.02 against 50 steps).
    η is 0.1 by default, for a run of 100 steps; the paper's main runs have 0.02.
 5. With --updates-per-sample above 1 the later updates reuse y, A and ℓ of the first without
    importance weights: then (4) and (7) hold approximately.

    python bond.py                                      # the embedded default, no GPU needed
    python bond.py --policy SFT --reward-model RM --dataset PROMPTS --lr 3e-6 --eta 0.02

Step 0 must show eval/kl 0 and the start model's win rate (about 0.47 on the default). At step 1 of
J-BOND a third of the samples is worse than both anchor samples (bond/penalised), less with ties.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common
import runlog


@dataclass
class Args:
    policy: str = "assets/tiny/sft"
    """causal LM to train, and the reference it starts from: a folder or a hub name"""
    reward_model: str = "assets/tiny/reward"
    """sequence classifier with one label: a folder or a hub name"""
    reward_eos: bool = True
    """close a response that ended with the reward model's own end token before it is scored"""
    dataset: str = "assets/tiny/data"
    """prompts and reference completions: .jsonl, .parquet, a folder or a hub name"""
    prompts_per_step: int = 16
    """prompts P a step, over all processes"""
    samples_per_prompt: int = 8
    """responses N a prompt"""
    max_prompt_tokens: int = 512
    """longer prompts are dropped, and counted"""
    max_response_tokens: int = 64
    """a response is cut after so many tokens"""
    temperature: float = 1.0
    """softmax temperature of sampling and of all log-probs alike"""
    steps: int = 100
    """batches of samples to train on"""
    updates_per_sample: int = 1
    """optimizer steps on each batch of samples"""
    micro_batch: int = 0
    """prompts a forward and backward pass, to save memory; 0 = all; gradients stay the same"""
    lr: float = 5e-4
    """AdamW's step size after the warm-up; 1e-6 suits models of 1B parameters and more"""
    warmup_steps: int = 10
    """updates in which the step size grows linearly from 0"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    dtype: Literal["mixed", "float32", "bfloat16"] = "mixed"
    """of the policy: float32 weights with bfloat16 autocast on a GPU, or pure"""
    seed: int = 1
    """of sampling and of the order of the prompts"""
    eval_every: int = 20
    """steps between evaluations"""
    eval_prompts: int = 256
    """held-out prompts an evaluation samples one response for"""
    save_every: int = 50
    """steps between checkpoints: what a kill can lose"""
    run_dir: str = ""
    """folder of the run; empty = runs/<script>-<seed>-<time>"""
    resume: str = ""
    """folder of a run to go on with, under its own flags"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """tracker to send the metrics to as well; by default nothing leaves the machine"""

    # BOND
    anchor: Literal["ema", "fixed", "copy"] = "ema"
    """ema: J-BOND; fixed: BOND, the anchor is the start model; copy: iterative BOND"""
    best_of: int = 2
    """the N of best-of-N; J-BOND has 2"""
    anchor_samples: int = 2
    """responses k of the anchor a prompt, of which the first --best-of compete; J-BOND has 2"""
    jeffreys: float = 0.5
    """b, the weight of the backward KL; 1 − b is that of the forward KL"""
    eta: float = 0.1
    """η, how fast the anchor follows: share of the policy an update, or a copy every 1/η steps"""
    gamma: float = 0.0
    """γ, the weight of one more KL to the anchor, which slows the policy down"""


def log_quantile(rewards: Tensor, anchor_rewards: Tensor) -> Tensor:
    """log p̂_≤ [P, N] of rewards [P, N] among the anchor's [P, k], in nats."""
    below = anchor_rewards[:, None, :] <= rewards[:, :, None]  # [P, N, k]
    return below.float().mean(2).clamp(min=0.5 / below.shape[2]).log()  # (5)


def j_bond_reward(rewards: Tensor, anchor_rewards: Tensor) -> Tensor:
    """r_J [P, N] of rewards [P, N] and those of two anchor samples [P, 2]."""
    worse = rewards < anchor_rewards.amin(1, keepdim=True)
    return -math.log(16) * worse.float()  # (6)


def advantages(run, returns: Tensor) -> Tensor:
    """A − B of returns A [P, N]: B is the mean of all others in the batch, over all processes."""
    mean, count = run.average(returns.mean()), returns.numel() * run.world
    return returns - (count * mean - returns) / max(1, count - 1)


def bond_loss(logprobs: Tensor, log_ratio: Tensor, advantage: Tensor, best: Tensor,
              args: Args) -> Tensor:
    """Loss [P] of logprobs [P, N + k]; log_ratio ℓ and advantage A − B are [P, N], best [P] is
    the place of y_best among the k."""
    ours, anchors = logprobs.split([advantage.shape[1], logprobs.shape[1] - advantage.shape[1]], 1)
    forward = -anchors.gather(1, best[:, None])[:, 0]  # (3)
    backward = -(ours * advantage).mean(1)  # (4)
    hold = (ours * log_ratio).mean(1)
    return (1 - args.jeffreys) * forward + args.jeffreys * backward + args.gamma * hold  # (7)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    for name in ("jeffreys", "eta"):
        common.require(getattr(args, name) <= 1, f"--{name} {getattr(args, name)}: is at most 1")
    common.require(1 < args.best_of <= args.anchor_samples, f"--best-of {args.best_of}: must be 2 "
                   f"or more, and not above --anchor-samples {args.anchor_samples}")
    common.require(args.anchor != "ema" or args.anchor_samples == 2, f"--anchor ema: J-BOND has 2 "
                   f"anchor samples, not {args.anchor_samples}; take fixed or copy")
    common.require(args.anchor != "copy" or args.eta > 0, "--eta 0.0: never copies the anchor")
    common.require(args.anchor != "ema" or args.dtype != "bfloat16", "--dtype bfloat16: steps of "
                   "--eta are lost in its rounding; take mixed or float32")


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last evaluation by metric name."""
    # ── set up ──
    run = runlog.Run(args, __file__)
    check(args)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    train_prompts, held_out = common.load_prompts(args, tokenizer)
    policy = common.load_policy(run, tokenizer)
    reward_model = common.load_reward_model(run, policy, tokenizer)
    held_out = common.score_references(reward_model, held_out, 2 * args.prompts_per_step)
    ref = run.frozen_copy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0,
                                  fused=True)

    # ── models of the method ──
    anchor = ref if args.anchor == "fixed" else run.frozen_copy(ref)
    followed = list(zip(anchor.parameters(), policy.parameters())) if args.anchor == "ema" else []
    done = run.open({"policy": policy, "optimizer": optimizer, "anchor": anchor})

    # ── start ──
    evaluation, samples = common.evaluate(run, done, policy, ref, reward_model, held_out)
    if done == 0:
        run.log(0, evaluation, samples)

    for step in range(done + 1, args.steps + 1):
        # ── sample ──
        prompts = common.pick(train_prompts, step, args, run.rank, run.world)
        started = run.clock()
        batch, _ = common.sample(policy, prompts, args.samples_per_prompt,
                                 args.max_response_tokens, args.temperature,
                                 common.seed_of(args.seed, step, run.rank))
        beside, _ = common.sample(anchor, prompts, args.anchor_samples,
                                  args.max_response_tokens, args.temperature,
                                  common.seed_of(args.seed, "anchor", step, run.rank))
        batch = batch.beside(beside)

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        common.require_finite(rewards, "the reward", batch)
        scored = run.clock()

        # ── targets ──
        n = args.samples_per_prompt
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        anchor_logprobs = common.logprobs(anchor, batch, args.temperature, args.micro_batch)
        proposal_logprobs = common.logprobs(policy, batch, args.temperature, args.micro_batch)
        log_ratio = (proposal_logprobs - anchor_logprobs)[:, :n]
        proposal_logprobs[:, n:] = anchor_logprobs[:, n:]  # who drew what
        best = rewards[:, n : n + args.best_of].argmax(1)  # of equal ones the first drawn
        if args.anchor == "ema":
            quality = j_bond_reward(rewards[:, :n], rewards[:, n:])
        else:
            quality = (args.best_of - 1) * log_quantile(rewards[:, :n], rewards[:, n:])
        advantage = advantages(run, quality - log_ratio)

        # ── update ──
        for update in range(args.updates_per_sample):
            warm = ((step - 1) * args.updates_per_sample + update + 1) / max(1, args.warmup_steps)
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, warm)
            passes = []
            for rows in common.micro_batches(len(prompts), args.micro_batch):
                part = batch[rows]
                logprobs, entropy = common.logprobs_and_entropy(policy, part, args.temperature)
                loss = bond_loss(logprobs, log_ratio[rows], advantage[rows], best[rows], args)
                common.require_finite(loss, "the loss", part)
                (loss.sum() / len(prompts)).backward()
                passes.append((logprobs.detach(), entropy, loss.detach()))
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            common.require(grad_norm.isfinite(), f"the gradient of step {step} is NaN or infinite; "
                           "the last checkpoint is kept")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, new in followed:
                    weight.lerp_(new, args.eta)  # (8)

        # ── renew ──
        if args.anchor == "copy" and step % round(1 / args.eta) == 0:
            anchor.load_state_dict(policy.state_dict())

        # ── log ──
        updated = run.clock()
        logprobs, entropy, loss = (torch.cat(x) for x in zip(*passes))
        lengths = batch.response_mask.sum(-1)
        tokens = run.average(lengths.sum().float())
        metrics = {
            "reward/mean": rewards.mean(), "reward/std": rewards.std(1, correction=0).mean(),
            **runlog.kl_estimates(logprobs, ref_logprobs, proposal_logprobs),
            "entropy/token": entropy.sum() / tokens, "length/mean": lengths.float().mean(),
            "length/eos_rate": common.ended(policy, batch).float().mean(), "loss": loss.mean(),
            "optim/lr": optimizer.param_groups[0]["lr"], "optim/grad_norm": grad_norm,
            "time/sample_s": sampled - started, "time/score_s": scored - sampled,
            "time/update_s": updated - scored,
            "tokens_per_s": run.world * tokens / (updated - started),
            "memory/peak_gib": run.peak_memory(),
        }

        # ── log of the method ──
        metrics |= {"bond/penalised": (quality < 0).float().mean(),
                    "bond/kl_anchor": log_ratio.mean(), "bond/quality": quality.mean()}

        # ── evaluate ──
        samples = []
        if step % args.eval_every == 0 or step == args.steps:
            evaluation, samples = common.evaluate(run, step, policy, ref, reward_model, held_out)
            metrics |= evaluation
        run.log(step, metrics, samples)

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
    main(runlog.parse_args(Args))
