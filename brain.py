"""BRAIn: Bayesian reward-conditioned amortized inference (Pandey et al., ICML 2024, 2402.02479).

The target is a posterior: the start model p is the prior, "y is good" (G = 1) is the evidence, and
a Bradley-Terry reward model r gives its likelihood:

    p(y|x, G=1) = p(y|x) · exp(r(x,y) / τ) / Z(x)                                            (T)

BRAIn draws N responses of a prompt from a proposal q′, weighs them by the posterior and by the
policy q_θ, normalises both weights over the N samples, and minimises their divergence:

    a_i = log p(y_i|x) + r_i/τ − log q′(y_i|x)        α̂ = softmax_i(a), without gradient     (1)
    b_i = log q_θ(y_i|x) − log q′(y_i|x)              β̂ = softmax_i(b)                       (2)
    L   = KL(α̂ ‖ β̂) = Σ_i α̂_i log(α̂_i / β̂_i)                                                (3)
    ∇L  = − Σ_i (α̂_i − β̂_i) ∇ log q_θ(y_i|x)                                                (4)

β̂ is the self-normalised baseline. At q_θ = (T) both weights agree on every batch, so every single
gradient is exactly zero, whatever q′ is; without β̂, or with its unnormalised form, it is not.
N = 2 with arg-max in place of softmax in (1) and q′ = p is DPO with coefficient 1.

P prompts a step, N samples a prompt. Log-probs are sums over the tokens of a response, end token
included, in nats at the sampling temperature; they and the rewards are [P, N].
    p = ref_logprobs    q′ = proposal_logprobs    q_θ = logprobs    r = rewards    τ = --beta

How this differs from the paper, whose body could not be read (sources: abstract, authors' blog and
code of their toy example):
 1. (T) is the limit γ_x → ∞ of p(G=1|x,y) = σ((r − γ_x)/τ); γ_x cancels in (1). Whether the paper
    keeps a finite γ_x is unconfirmed.
 2. The proposal is p at first and then a copy of the policy, replaced every --refresh-every steps.
    The paper "includes samples of the latest policy"; its period is unconfirmed.
 3. --estimator holds the paper's ablation; the exact weights of its two other arms are derived.

    python brain.py                                     # the embedded default, no GPU needed
    python brain.py --policy SFT --reward-model RM --dataset PROMPTS --lr 1e-6 --beta 0.1

Step 0 must show eval/kl 0 and the start model's win rate (about 0.47 on the default); step 1 has a
uniform β̂, so its loss is log N − entropy(α̂). A weights/ess near 1/N says that --beta is too small
for the spread of the rewards: one sample of N then takes all the weight.
"""

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

    # BRAIn
    beta: float = 0.2
    """τ, the KL weight of the target: reward units a nat"""
    estimator: Literal["brain", "no-self-norm", "no-baseline"] = "brain"
    """brain: weights α̂ − β̂; no-self-norm: α̂ − (1/N)·q_θ/q′; no-baseline: α̂"""
    refresh_every: int = 10
    """steps between renewals of the proposal from the policy; 0 = the start model throughout"""


def posterior_weights(ref_logprobs: Tensor, rewards: Tensor, proposal_logprobs: Tensor,
                      beta: float) -> Tensor:
    """α̂ [P, N], which sums to 1 over the N samples of a prompt, from three [P, N]."""
    return torch.softmax(ref_logprobs + rewards / beta - proposal_logprobs, dim=1)  # (1)


def brain_loss(logprobs: Tensor, proposal_logprobs: Tensor, alpha: Tensor,
               estimator: str = "brain") -> Tensor:
    """Loss [P] in nats of logprobs, proposal_logprobs and alpha, [P, N] each."""
    b = logprobs - proposal_logprobs
    if estimator == "brain":
        log_beta = torch.log_softmax(b, dim=1)  # (2)
        return (torch.xlogy(alpha, alpha) - alpha * log_beta).sum(1)  # (3)
    # The ablations have no loss of their own: this has the gradient (4) with their weights.
    raw = b.exp().detach() / b.shape[1] if estimator == "no-self-norm" else 0.0
    return -((alpha - raw) * logprobs).sum(1)  # (4)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.beta > 0, f"--beta {args.beta}: must be more than 0")
    common.require(args.samples_per_prompt > 1, f"--samples-per-prompt {args.samples_per_prompt}: "
                   "weights are normalised over the samples of a prompt; take 2 or more")


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
    proposal = run.frozen_copy(ref) if args.refresh_every else ref
    done = run.open({"policy": policy, "optimizer": optimizer, "proposal": proposal})

    # ── start ──
    evaluation, samples = common.evaluate(run, done, policy, ref, reward_model, held_out)
    if done == 0:
        run.log(0, evaluation, samples)

    for step in range(done + 1, args.steps + 1):
        # ── sample ──
        prompts = common.pick(train_prompts, step, args, run.rank, run.world)
        started = run.clock()
        batch, _ = common.sample(proposal, prompts, args.samples_per_prompt,
                                 args.max_response_tokens, args.temperature,
                                 common.seed_of(args.seed, step, run.rank))

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        common.require_finite(rewards, "the reward", batch)
        scored = run.clock()

        # ── targets ──
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        proposal_logprobs = common.logprobs(proposal, batch, args.temperature, args.micro_batch)
        alpha = posterior_weights(ref_logprobs, rewards, proposal_logprobs, args.beta)

        # ── update ──
        for update in range(args.updates_per_sample):
            warm = ((step - 1) * args.updates_per_sample + update + 1) / max(1, args.warmup_steps)
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, warm)
            passes = []
            for rows in common.micro_batches(len(prompts), args.micro_batch):
                part = batch[rows]
                logprobs, entropy = common.logprobs_and_entropy(policy, part, args.temperature)
                loss = brain_loss(logprobs, proposal_logprobs[rows], alpha[rows], args.estimator)
                common.require_finite(loss, "the loss", part)
                (loss.sum() / len(prompts)).backward()
                passes.append((logprobs.detach(), entropy, loss.detach()))
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            common.require(grad_norm.isfinite(), f"the gradient of step {step} is NaN or infinite; "
                           "the last checkpoint is kept")
            optimizer.step()
            optimizer.zero_grad()

        # ── renew ──
        if args.refresh_every and step % args.refresh_every == 0:
            proposal.load_state_dict(policy.state_dict())

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
        metrics["weights/ess"] = (1 / alpha.square().sum(1)).mean() / args.samples_per_prompt

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
