"""BOND and J-BOND: best-of-N distillation (Sessa et al., 2407.14622).

The target is the distribution of the best of N samples of an anchor π_a. With p_<(y) and p_≤(y) the
anchor's probabilities of a reward below, and not above, that of y:

    π_BoN(y) = π_a(y) · p_≤^{N−1} · Σ_{i=1..N} (p_</p_≤)^{i−1}                               (1)
    J^b      = (1−b)·KL(π_BoN‖π_θ) + b·KL(π_θ‖π_BoN)                                         (2)
    forward part    −(1−b)·log π_θ(y_best),  y_best the best of N anchor samples             (3)
    backward part   −b·log π_θ(y)·(A − B),  A = log(π̂_BoN/π_a)(y) − ℓ,  y ~ π_θ              (4)
    π̂_BoN           (1) with p̂_<, p̂_≤: shares of k anchor samples, each at least 1/(2k)      (5)

ℓ = log π_θ(y) − log π_a(y) and A are detached; B is the mean of the other samples' A in the batch.
J-BOND (--anchor ema) is the step for N = 2 with two anchor samples y′ and an anchor that follows:

    r_J(y) = −log 16 if r(y) < min(r(y′_1), r(y′_2)), else 0;   A = r_J − ℓ                  (6)
    L      = (3) + (4) + γ·log π_θ(y)·ℓ                                                      (7)
    anchor ← (1−η)·anchor + η·policy, after every optimizer step                             (8)

--anchor fixed is BOND, (3) and (4) with (5); copy renews the anchor every 1/η updates (iterative).

P prompts per step; per prompt N samples of the policy (not the N above, which is --best-of) and k
of the anchor. Log-probs are sums over the tokens of a response, end token included, in nats at the
sampling temperature; they and the rewards are [P, N + k].
    π_θ = logprobs    π_a = anchor_logprobs    b = --jeffreys    η = --eta    γ = --gamma

How this differs from the paper (read: arXiv v1; docs/bond.md says more):
 1. The γ term has a plus sign, which holds the policy back; Algorithm 2 of v1 prints a minus.
 2. The floor in (5) is ours, and so is the sum of (1) in π̂_BoN: the paper drops it in practice.

    python bond.py                                      # the embedded default, no GPU needed
    python bond.py --policy SFT --reward-model RM --dataset PROMPTS --lr 3e-6 --eta 0.02

Step 0 must show eval/kl 0 and the start model's win rate (about 0.45 on the default). At step 1 of
J-BOND a third of the samples is worse than both anchor samples (bond/penalised), less with ties.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common


@dataclass
class Args:
    # data
    policy: str = "assets/tiny/sft"
    """causal LM to train, and the reference it starts from: a folder or a hub name"""
    reward_model: str = "assets/tiny/reward"
    """sequence classifier with one label, a folder or a hub name; or FILE.py:FUNCTION"""
    reward_eos: bool = True
    """close a response that ended with the reward model's own end token before it is scored"""
    missing_eos_penalty: float = 0.0
    """taken off the reward of a response that was cut, in reward units"""
    dataset: str = "assets/tiny/data"
    """.jsonl, .parquet, a folder or a hub name; NAME:CONFIG; NAME:split=train_x,prompt=question"""
    template: Literal["auto", "raw", "raw-policy", "raw-reward"] = "auto"
    """text prompts become a user's turn where a model has a chat template, or stay raw"""
    chat_template_kwargs: str = "{}"
    """JSON for the policy's chat template, as {"enable_thinking": false}"""

    # sampling
    prompts_per_step: int = 16
    """prompts per step (P), all processes together"""
    samples_per_prompt: int = 8
    """responses per prompt (N)"""
    max_prompt_tokens: int = 0
    """longer prompts are dropped, and counted; 0 = what the context leaves beside a response"""
    max_response_tokens: int = 64
    """a response is cut after so many tokens"""
    temperature: float = 1.0
    """softmax temperature of sampling and of all log-probs alike"""
    cuda_graph: bool = False
    """launch the kernels of a decoding step as one, for GPUs that wait for Python"""

    # optimisation
    steps: int = 100
    """batches of samples to train on"""
    updates_per_sample: int = 1
    """passes over each batch of samples (epochs)"""
    minibatches: int = 1
    """optimizer steps per pass, each on another part of the batch, of equally many prompts"""
    micro_batch: int = 0
    """prompts per forward and backward pass, to save memory; 0 = all; gradients stay the same"""
    lr: float = 5e-4
    """AdamW's step size after the warm-up; 1e-6 suits models of 1B parameters and more"""
    warmup_steps: int = 10
    """updates in which the step size grows linearly from 0"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
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
    """of sampling and of the order of the prompts"""
    eval_every: int = 20
    """steps between evaluations"""
    eval_prompts: int = 256
    """held-out prompts, each of which an evaluation samples one response for"""
    save_every: int = 50
    """steps between checkpoints: what a kill can lose"""
    run_dir: str = ""
    """folder of the run; empty = runs/<script>-<seed>-<time>"""
    resume: str = ""
    """run folder to continue, by its own flags; --steps may grow"""
    track: Literal["none", "wandb", "trackio"] = "none"
    """tracker to send the metrics to as well; by default nothing leaves the machine"""

    # BOND
    anchor: Literal["ema", "fixed", "copy"] = "ema"
    """ema: J-BOND; fixed: BOND, the anchor is the start model; copy: iterative BOND"""
    best_of: int = 2
    """the N of best-of-N; J-BOND has 2"""
    anchor_samples: int = 2
    """responses of the anchor per prompt (k), the first --best-of of which compete; J-BOND has 2"""
    jeffreys: float = 0.5
    """b, the weight of the backward KL; 1 − b is that of the forward KL"""
    eta: float = 0.1
    """η, how the anchor follows: the policy's share in each update, or a copy every 1/η updates"""
    gamma: float = 0.0
    """γ, the weight of one more KL to the anchor, which slows the policy down"""


def log_best_of(rewards: Tensor, anchor_rewards: Tensor, best_of: int) -> Tensor:
    """log(π̂_BoN/π_a) [P, N], in nats, of rewards [P, N] among the anchor's [P, k]."""
    mine, theirs = rewards[:, :, None], anchor_rewards[:, None, :]
    least = 0.5 / theirs.shape[2]
    below = (theirs < mine).float().mean(2).clamp(min=least)  # (5)
    upto = (theirs <= mine).float().mean(2).clamp(min=least)  # (5)
    ties = sum((below / upto) ** i for i in range(best_of))
    return (best_of - 1) * upto.log() + ties.log()  # (1)


def j_bond_reward(rewards: Tensor, anchor_rewards: Tensor) -> Tensor:
    """r_J [P, N] of rewards [P, N] and those of two anchor samples [P, 2]."""
    worse = rewards < anchor_rewards.amin(1, keepdim=True)
    return -math.log(16) * worse.float()  # (6)


def advantages(run, returns: Tensor) -> Tensor:
    """A − B of returns A [P, N]: B is the mean of all others in the batch, over all processes."""
    mean, count = run.average(returns.mean()), returns.numel() * run.world
    return returns - (count * mean - returns) / max(1, count - 1)


def bond_loss(
    logprobs: Tensor, log_ratio: Tensor, advantage: Tensor, best: Tensor, args: Args
) -> Tensor:
    """Loss [P] of logprobs [P, N + k]; log_ratio ℓ and advantage A − B are [P, N], best [P] is
    the place of y_best among the k."""
    n = advantage.shape[1]
    ours, anchors = logprobs[:, :n], logprobs[:, n:]
    forward = -anchors.gather(1, best[:, None])[:, 0]  # (3)
    backward = -(ours * advantage).mean(1)  # (4)
    hold = (ours * log_ratio).mean(1)
    return (1 - args.jeffreys) * forward + args.jeffreys * backward + args.gamma * hold  # (7)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.jeffreys <= 1, f"--jeffreys {args.jeffreys}: is at most 1")
    common.require(args.eta <= 1, f"--eta {args.eta}: is at most 1")
    common.require(
        1 < args.best_of <= args.anchor_samples,
        f"--best-of {args.best_of}: must be 2 or more, and not above --anchor-samples "
        f"{args.anchor_samples}",
    )
    common.require(
        args.anchor != "ema" or args.anchor_samples == 2,
        f"--anchor ema: J-BOND has 2 anchor samples, not {args.anchor_samples}; take fixed or copy",
    )
    common.require(args.anchor != "copy" or args.eta > 0, "--eta 0.0: never copies the anchor")


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last evaluation by metric name."""
    # ── set up ──
    check(args)
    run = common.Run(args, __file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    train_prompts, held_out = common.load_prompts(args, tokenizer)
    policy = common.load_policy(run, tokenizer)
    reward_model = common.load_reward_model(run, policy, tokenizer)
    held_out = common.score_references(run, policy, reward_model, held_out)
    ref = common.frozen_copy(policy)

    # ── models of the method ──
    anchor = ref if args.anchor == "fixed" else common.frozen_copy(policy, args.anchor == "ema")
    models = {"policy": policy, "anchor": anchor}

    # ── start ──
    common.shard(policy)
    models = torch.nn.ModuleDict(models)
    trained = [weight for weight in models.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    done = run.open(models, optimizer)
    evaluation, samples = common.evaluate(run, done, policy, ref, reward_model, held_out)
    if done == 0:
        run.log(0, evaluation, samples)

    for step in range(done + 1, args.steps + 1):
        # ── sample ──
        prompts = common.pick(train_prompts, step, args, run.rank, run.world)
        n, most_tokens = args.samples_per_prompt, args.max_response_tokens
        seed = common.seed_of(args.seed, step, run.rank)
        started = run.clock()
        batch = common.sample(policy, prompts, n, most_tokens, args.temperature, seed)
        k, seed = args.anchor_samples, common.seed_of(args.seed, "anchor", step, run.rank)
        drawn = common.sample(anchor, prompts, k, most_tokens, args.temperature, seed)
        batch = batch.beside(drawn)

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        scored = run.clock()

        # ── targets ──
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        anchor_logprobs = common.logprobs(anchor, batch, args.temperature, args.micro_batch)
        proposal_logprobs = common.logprobs(policy, batch, args.temperature, args.micro_batch)
        log_ratio = (proposal_logprobs - anchor_logprobs)[:, :n]
        proposal_logprobs[:, n:] = anchor_logprobs[:, n:]  # who drew what
        best = rewards[:, n : n + args.best_of].argmax(1)  # of equal ones the first drawn
        if args.anchor == "ema":
            quality = j_bond_reward(rewards[:, :n], rewards[:, n:])
        else:
            quality = log_best_of(rewards[:, :n], rewards[:, n:], args.best_of)
        advantage = advantages(run, quality - log_ratio)

        # ── update ──
        size = len(prompts) // args.minibatches
        for update in range(args.updates_per_sample * args.minibatches):
            updates = (step - 1) * args.updates_per_sample * args.minibatches + update + 1
            lr = common.step_size(args, updates)
            optimizer.param_groups[0]["lr"] = lr
            first = update % args.minibatches * size
            if first == 0:  # a pass begins
                logprobs, entropy, loss = [], [], []
            for rows in common.micro_batches(size, args.micro_batch, first):
                token_logprobs, token_entropy = common.token_logprobs_and_entropy(
                    policy, batch[rows], args.temperature
                )
                part_logprobs, part_entropy = token_logprobs.sum(2), token_entropy.sum(2)
                part_loss = bond_loss(
                    part_logprobs, log_ratio[rows], advantage[rows], best[rows], args
                )
                advice = "take a smaller --lr or fewer --updates-per-sample"
                common.require_finite(part_loss, "the loss", batch[rows], advice)
                (part_loss.sum() / size).backward()
                logprobs.append(part_logprobs.detach())
                entropy.append(part_entropy)
                loss.append(part_loss.detach())
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            common.require(
                grad_norm.isfinite(),
                f"the gradient of step {step} is NaN or infinite; the last checkpoint is kept",
            )
            optimizer.step()
            optimizer.zero_grad()
            if args.anchor == "ema":
                with torch.no_grad():
                    for weight, new in zip(anchor.parameters(), policy.parameters()):
                        weight.lerp_(new, args.eta)  # (8)
            elif args.anchor == "copy" and updates % round(1 / args.eta) == 0:
                anchor.load_state_dict(policy.state_dict())

        # ── log ──
        updated = run.clock()
        logprobs, entropy, loss = torch.cat(logprobs), torch.cat(entropy), torch.cat(loss)
        lengths = batch.lengths()
        tokens = run.average(lengths.sum()).item()
        metrics = {
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(1, correction=0).mean(),
            **common.kl_estimates(logprobs, ref_logprobs, proposal_logprobs),
            **common.sampling_gap(batch, proposal_logprobs),
            "entropy/token": entropy.sum() / tokens,
            "length/mean": lengths.mean(),
            "length/eos_rate": batch.ended(policy.end_tokens).float().mean(),
            "loss": loss.mean(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/sample_s": sampled - started,
            "time/score_s": scored - sampled,
            "time/update_s": updated - scored,
            "tokens_per_s": run.world * tokens / (updated - started),
            "memory/peak_gib": run.peak_memory(),
        }

        # ── log of the method ──
        metrics |= {
            "bond/penalised": (quality < 0).float().mean(),
            "bond/kl_anchor": log_ratio.mean(),
            "bond/quality": quality.mean(),
        }

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
    main(common.parse_args(Args))
