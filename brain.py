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

β̂ is the self-normalised baseline: at q_θ = (T) both weights agree on every batch, so every single
gradient is exactly zero, whatever q′ is.

P prompts per step, N samples per prompt. Log-probs are sums over the tokens of a response, end
token included, in nats at the sampling temperature; they, the rewards and all weights are [P, N].
    p = ref_logprobs    q′ = proposal_logprobs    q_θ = logprobs    r = rewards    τ = --beta

How this differs from the paper, of which abstract, blog and toy code could be read: docs/brain.md
 1. (T) is the limit γ_x → ∞ of p(G=1|x,y) = σ((r − γ_x)/τ); γ_x cancels in (1).
 2. The proposal is p at first, then a copy of the policy, renewed every --refresh-every steps.
 3. --estimator holds the paper's ablation, whose two other arms are derived, and arg-max, with
    which N = 2 and q′ = p are DPO.

    python brain.py                                     # the embedded default, no GPU needed
    python brain.py --policy SFT --reward-model RM --dataset PROMPTS --lr 1e-6

Step 0 must show eval/kl 0 and the start model's win rate (about 0.45 on the default); step 1 has a
uniform β̂, so its loss is log N − entropy(α̂). A weights/ess near 1/N: --beta is too small.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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

    # BRAIn
    beta: float = 0.2
    """τ, the KL weight of the target: reward units per nat"""
    estimator: Literal["brain", "arg-max", "no-self-norm", "no-baseline"] = "brain"
    """brain: weights α̂ − β̂; arg-max: the same with an arg-max for the softmax in α̂;
    no-self-norm: α̂ − (1/N)·q_θ/q′; no-baseline: α̂"""
    refresh_every: int = 10
    """steps between renewals of the proposal from the policy; 0 = the start model throughout"""


def posterior_weights(
    ref_logprobs: Tensor,
    rewards: Tensor,
    proposal_logprobs: Tensor,
    beta: float,
    estimator: str = "brain",
) -> Tensor:
    """α̂ [P, N], which sums to 1 over the N samples of a prompt, from three [P, N]."""
    log_weights = ref_logprobs + rewards / beta - proposal_logprobs
    if estimator == "arg-max":
        return F.one_hot(log_weights.argmax(1), log_weights.shape[1]).to(log_weights.dtype)
    return torch.softmax(log_weights, dim=1)  # (1)


def brain_loss(
    logprobs: Tensor, proposal_logprobs: Tensor, target_weights: Tensor, estimator: str = "brain"
) -> Tensor:
    """Loss [P] in nats of logprobs, proposal_logprobs and target_weights α̂, [P, N] each."""
    log_ratio = logprobs - proposal_logprobs
    if estimator in ("brain", "arg-max"):
        log_policy_weights = torch.log_softmax(log_ratio, dim=1)  # (2)
        return F.kl_div(log_policy_weights, target_weights, reduction="none").sum(1)  # (3)
    # The ablations have no loss of their own: this has the gradient (4) with their weights.
    baseline = log_ratio.exp().detach() / log_ratio.shape[1] if estimator == "no-self-norm" else 0.0
    return -((target_weights - baseline) * logprobs).sum(1)  # (4)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.beta > 0, f"--beta {args.beta}: must be more than 0")
    common.require(
        args.samples_per_prompt > 1,
        f"--samples-per-prompt {args.samples_per_prompt}: weights are normalised over the samples "
        "of a prompt; take 2 or more",
    )


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
    proposal = common.frozen_copy(policy) if args.refresh_every else ref
    models = {"policy": policy, "proposal": proposal}

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
        batch = common.sample(proposal, prompts, n, most_tokens, args.temperature, seed)

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        scored = run.clock()

        # ── targets ──
        if step == 1:
            common.say_effective_samples(rewards, "--beta", args.beta)
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        proposal_logprobs = common.logprobs(proposal, batch, args.temperature, args.micro_batch)
        target_weights = posterior_weights(
            ref_logprobs, rewards, proposal_logprobs, args.beta, args.estimator
        )

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
                part_loss = brain_loss(
                    part_logprobs, proposal_logprobs[rows], target_weights[rows], args.estimator
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

        # ── renew ──
        if args.refresh_every and step % args.refresh_every == 0:
            proposal.load_state_dict(policy.state_dict())

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
        samples_that_count = 1 / target_weights.square().sum(1)
        metrics["weights/ess"] = samples_that_count.mean() / args.samples_per_prompt

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
