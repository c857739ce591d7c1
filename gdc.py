"""DPG, GDC and GDC++: distributional policy gradients towards an energy-based target.

Parshakova et al., 2019, 1912.08517 (DPG); Khalifa et al., ICLR 2021, 2012.11635 (GDC); Korbak et
al., ICML 2022, 2112.00791 (CDPG: prompts); Korbak et al., NeurIPS 2022, 2206.00761 (GDC++).

The target is p*(y|x) = P(y|x) / Z(x) with P(y|x) = p(y|x) · exp(r(x,y) / τ), p the start model. The
policy π_θ comes close to it by gradient steps on KL(p*‖π_θ) with samples of a proposal q′ and
importance weights w = P(y|x) / q′(y|x):

    ∇L  = − E_q′[ (w/Z) ∇ log π_θ ]                                    DPG, GDC              (1)
    ∇L  = − E_q′[ (w/Z − π_θ/q′) ∇ log π_θ ]                           GDC++                 (2)
    Ẑ   = mean of w: over a prompt's own N samples, or over all samples so far               (3)
    K̂L(p*‖h) = −log Z + (1/Z)·mean_q′[ w·(log P − log h) ]             h = q′ or π_θ         (4)

The baseline in (2) is detached and leaves the expected gradient as it is; where π_θ = p* it cancels
every single weight. An adaptive proposal is a copy of an earlier policy; it is replaced when by
(4), on fresh samples, the policy is closer to p*.

P prompts per step, N samples per prompt. Log-probs are sums over the tokens of a response, end
token included, in nats at the sampling temperature; they, the rewards and w are [P, N].
    p = ref_logprobs    q′ = proposal_logprobs    π_θ = logprobs    r = rewards    τ = --beta

Published forms: --baseline none is (1), gdc++ is (2); --normalizer running has one Z for all
prompts (GDC), prompt has Z(x) (CDPG); --proposal policy is on-policy DPG. Differences: docs/gdc.md
 1. The target is the one of KL-regularised reward maximisation; theirs constrain features of y.
 2. Ẑ from a prompt's own N samples makes w/Z self-normalised: exact as N grows, biased at small N.

    python gdc.py                                       # the embedded default, no GPU needed
    python gdc.py --policy SFT --reward-model RM --dataset PROMPTS --lr 1e-6

Step 0 must show eval/kl 0 and the start model's win rate (about 0.45 on the default); step 1 shows
kl/ref 0. The first test should find gdc/kl_policy below gdc/kl_proposal, so gdc/replaced is 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common

MOST = 1e300  # of Ẑ: what is more has no place in a log


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

    # GDC
    beta: float = 0.2
    """τ, the KL weight of the target: reward units per nat"""
    baseline: Literal["none", "gdc++"] = "gdc++"
    """none: weights w/Z; gdc++: w/Z − π_θ/q′"""
    normalizer: Literal["prompt", "running"] = "prompt"
    """Z of a prompt from its own samples, or one for all prompts: the mean over the run so far"""
    proposal: Literal["adaptive", "policy", "sft"] = "adaptive"
    """q′: a copy of the policy, renewed when the policy is closer to the target; the policy; the
    start model"""
    test_every: int = 10
    """steps between the tests of an adaptive proposal"""


def log_weights(
    ref_logprobs: Tensor, rewards: Tensor, proposal_logprobs: Tensor, beta: float
) -> Tensor:
    """log w [P, N], in nats, from three [P, N]."""
    return ref_logprobs + rewards / beta - proposal_logprobs


def log_mean_weight(log_w: Tensor) -> Tensor:
    """log Ẑ(x) [P, 1] from a prompt's own samples."""
    return log_w.logsumexp(1, keepdim=True) - math.log(log_w.shape[1])  # (3)


def gdc_loss(logprobs: Tensor, proposal_logprobs: Tensor, weights: Tensor, baseline: str) -> Tensor:
    """Loss [P] of logprobs, proposal_logprobs and weights w/Z, [P, N] each: its gradient counts."""
    advantage = weights  # (1)
    if baseline == "gdc++":
        advantage = weights - (logprobs.detach() - proposal_logprobs).exp()  # (2)
    return -(advantage * logprobs).mean(1)


def kl_from_target(log_w: Tensor, log_z: Tensor, log_target: Tensor, logprobs: Tensor) -> Tensor:
    """Estimate [P] of KL(p*‖h) in nats, h given by its logprobs; log_target = log P; log_z a number
    for each prompt [P, 1] or for all."""
    return ((log_w - log_z).exp() * (log_target - logprobs)).mean(1) - log_z.mean(-1)  # (4)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.beta > 0, f"--beta {args.beta}: must be more than 0")
    common.require(args.test_every > 0, f"--test-every {args.test_every}: must be more than 0")
    common.require(
        args.normalizer == "running" or args.samples_per_prompt > 1,
        f"--samples-per-prompt {args.samples_per_prompt}: --normalizer prompt needs 2 or more",
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
    if args.proposal == "adaptive":
        proposal = common.frozen_copy(policy)
    else:
        proposal = policy if args.proposal == "policy" else ref
    running = torch.nn.Module()  # checkpoints keep a module's numbers as they keep weights
    running.register_buffer("z", torch.zeros(1, dtype=torch.float64, device=run.device))
    models = {"policy": policy, "proposal": proposal, "running": running}

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
        log_w = log_weights(ref_logprobs, rewards, proposal_logprobs, args.beta)
        raw_weights = log_w.double().exp()
        if args.normalizer == "running":  # an infinite mean would make all weights 0
            common.require_finite(raw_weights, "the weight", batch, "take a larger --beta")
        mean_weight = run.average(raw_weights.clamp(max=MOST).mean())
        running.z.lerp_(mean_weight, 1 / step)  # the mean over all samples so far
        log_z = log_mean_weight(log_w) if args.normalizer == "prompt" else running.z.log()
        weights = (log_w - log_z).exp().float()

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
                part_loss = gdc_loss(
                    part_logprobs, proposal_logprobs[rows], weights[rows], args.baseline
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
        tested = {}
        if args.proposal == "adaptive" and step % args.test_every == 0:
            seed = common.seed_of(args.seed, "test", step, run.rank)
            unseen = common.pick(train_prompts, step + 1, args, run.rank, run.world)
            fresh = common.sample(proposal, unseen, n, most_tokens, args.temperature, seed)
            fresh_rewards = common.score(reward_model, fresh, args.micro_batch)
            start = common.logprobs(ref, fresh, args.temperature, args.micro_batch)
            old = common.logprobs(proposal, fresh, args.temperature, args.micro_batch)
            new = common.logprobs(policy, fresh, args.temperature, args.micro_batch)
            fresh_w = log_weights(start, fresh_rewards, old, args.beta)
            fresh_z = log_mean_weight(fresh_w) if args.normalizer == "prompt" else log_z
            log_target = start + fresh_rewards / args.beta
            kl_old = kl_from_target(fresh_w, fresh_z, log_target, old).double().mean()
            kl_new = kl_from_target(fresh_w, fresh_z, log_target, new).double().mean()
            kl_old, kl_new = run.average(torch.stack([kl_old, kl_new])).tolist()
            if kl_new < kl_old:
                proposal.load_state_dict(policy.state_dict())
            tested = {"gdc/kl_proposal": kl_old, "gdc/kl_policy": kl_new}
            tested["gdc/replaced"] = kl_new < kl_old

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
        ess = 1 / log_w.softmax(1).square().sum(1) / args.samples_per_prompt
        z = log_z.double().exp().clamp(max=MOST)
        metrics |= {"weights/ess": ess.mean(), "gdc/z": z.mean(), **tested}

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
