"""DPO and SLiC: preference pairs in place of rewards.

Sources: Rafailov et al., NeurIPS 2023, 2305.18290 (DPO); Zhao et al., 2023, 2305.10425 (SLiC);
Liu et al., ICLR 2024, 2309.06657 (the hinge with a reference; pairs sampled from the start model).

The optimum of KL-regularised reward maximisation, p(y|x) · exp(r(x,y)/τ) / Z(x), turned round, says
which reward a policy is optimal for, up to a constant of the prompt: τ · log(π_θ/π_ref). Put into a
Bradley-Terry model of pairs (y_w preferred to y_l), this gives a loss without reward or sampling:

    Δ       = [log π_θ(y_w) − log π_ref(y_w)] − [log π_θ(y_l) − log π_ref(y_l)]
    sigmoid   −log σ(τΔ)                                                 DPO                 (1)
    hinge     max(0, 1 − τΔ)                                             SLiC, normalised    (2)
    slic      max(0, δ − log π_θ(y_w) + log π_θ(y_l)) − λ log π_θ(y_ref)   SLiC as published   (3)

--pairs sampled draws N responses of each prompt from the start model and takes the best and the
worst by the reward model (DPO-sft at N = 2), --pairs policy draws them from the policy as it is
(online DPO), --pairs dataset takes the columns chosen and rejected.

P prompts per step, N samples per prompt. Log-probs are sums over the tokens of a response, end
token included, in nats at the sampling temperature. The batch that is trained on holds y_w, y_l
(and, for slic, y_ref: the data set's completion, or else its chosen response) of each prompt:
logprobs and ref_logprobs are [P, 2 or 3].
    π_θ = logprobs    π_ref = ref_logprobs    τ = --beta    δ = --margin    λ = --reference-weight

How this differs from the papers (more in docs/dpo.md):
 1. Pairs of equal rewards, or equal texts, are ties: they give no gradient, and are counted.
 2. SLiC ranks samples by a ranking model or by humans; here it is the reward model or the data set.
 3. AdamW, not RMSprop (DPO) or Adafactor (Liu et al.).

    python dpo.py                                       # the embedded default, no GPU needed
    python dpo.py --policy SFT --reward-model RM --dataset PAIRS --pairs dataset --lr 1e-6

Step 1 must show the loss ln 2 = 0.6931 (sigmoid) or 1 (hinge). logprob/chosen and logprob/rejected
usually both fall during training: the loss only asks that the rejected one falls faster.
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

    # DPO
    beta: float = 0.2
    """τ, the KL weight of the target: reward units per nat"""
    loss: Literal["sigmoid", "hinge", "slic"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC against a reference; slic: SLiC as published"""
    pairs: Literal["sampled", "policy", "dataset"] = "sampled"
    """best against worst of N samples of the start model, or of the policy as it is (online DPO);
    or the data set's chosen and rejected"""
    max_pair_tokens: int = 512
    """the data set's responses are cut after so many tokens"""
    margin: float = 1.0
    """δ of --loss slic, in nats"""
    reference_weight: float = 0.1
    """λ of --loss slic, the weight of the data set's completion"""


def best_and_worst(rewards: Tensor) -> Tensor:
    """Indices [P, 2] of the samples with the highest and the lowest reward, of rewards [P, N]."""
    return torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, tied: Tensor, args: Args) -> Tensor:
    """Loss [P] of log-probs of y_w, y_l (and y_ref), [P, 2 or 3]; no gradient of Δ if tied [P]."""
    ratios = logprobs if args.loss == "slic" else logprobs - ref_logprobs
    delta = (ratios[:, 0] - ratios[:, 1]).where(~tied, 0.0)
    if args.loss == "sigmoid":
        return -F.logsigmoid(args.beta * delta)  # (1)
    if args.loss == "hinge":
        return F.relu(1 - args.beta * delta)  # (2)
    return F.relu(args.margin - delta) - args.reference_weight * logprobs[:, 2]  # (3)


def unlike_pairs(tokenizer, policy: common.Model, prompts: list, max_tokens: int) -> list:
    """The prompts whose chosen and rejected response differ once they are cut; it says how many."""
    texts = [[prompt.chosen, prompt.rejected] for prompt in prompts]
    pairs = common.encode_responses(tokenizer, policy, prompts, texts, max_tokens)
    cut = int((~pairs.ended(policy.end_tokens)).sum())
    kept = [p for p, (chosen, rejected) in zip(prompts, pairs.responses) if chosen != rejected]
    equal = len(prompts) - len(kept)
    print(f"{len(kept):,} pairs, {equal:,} of equal responses dropped; {cut:,} responses were cut")
    common.require(kept, "--dataset: no pair of unlike responses; raise --max-pair-tokens")
    return kept


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.beta > 0, f"--beta {args.beta}: must be more than 0")
    common.require(
        args.pairs == "dataset" or args.samples_per_prompt > 1,
        f"--samples-per-prompt {args.samples_per_prompt}: a pair needs 2 or more",
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
    where = f"--dataset {args.dataset}: a prompt has no"
    for prompt in train_prompts:
        pair = prompt.chosen is not None and prompt.rejected is not None
        common.require(pair or args.pairs != "dataset", f"{where} chosen and rejected response")
        has_reference = prompt.reference is not None
        common.require(has_reference or args.loss != "slic", f"{where} reference response")
    if args.pairs == "dataset":
        train_prompts = unlike_pairs(tokenizer, policy, train_prompts, args.max_pair_tokens)
    models = {"policy": policy}

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
        if args.pairs != "dataset":
            sampler = policy if args.pairs == "policy" else ref
            batch = common.sample(sampler, prompts, n, most_tokens, args.temperature, seed)
        else:
            texts = [[prompt.chosen, prompt.rejected] for prompt in prompts]
            batch = common.encode_responses(tokenizer, policy, prompts, texts, args.max_pair_tokens)

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        scored = run.clock()

        # ── targets ──
        tied = torch.zeros(len(prompts), dtype=torch.bool, device=run.device)
        if args.pairs != "dataset":
            batch = batch.choose(best_and_worst(rewards))
            tied = rewards.amax(1) == rewards.amin(1)
        if args.loss == "slic":
            texts = [[prompt.reference] for prompt in prompts]
            references = common.encode_responses(
                tokenizer, policy, prompts, texts, args.max_pair_tokens
            )
            batch = batch.beside(references)
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        proposal_logprobs = ref_logprobs
        if args.pairs == "policy":
            proposal_logprobs = common.logprobs(policy, batch, args.temperature, args.micro_batch)

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
                part_loss = dpo_loss(part_logprobs, ref_logprobs[rows], tied[rows], args)
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
        log_ratio = logprobs - ref_logprobs
        metrics |= {
            "logprob/chosen": logprobs[:, 0].mean(),
            "logprob/rejected": logprobs[:, 1].mean(),
            "dpo/accuracy": (log_ratio[:, 0] > log_ratio[:, 1]).float().mean(),
            "dpo/ties": tied.float().mean(),
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
