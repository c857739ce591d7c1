"""PPO-RLHF: the reward is maximised, with a KL term, by clipped policy gradients.

Schulman et al., 1707.06347, in the form for language models of Huang et al., 2403.17031; without a
value, Ahmadian et al., 2402.14740. Objective: E_{y~π}[ r(x,y) ] − β·KL(π‖p), p the start model. Its
optimum is π ∝ p·exp(r/β), the target of BRAIn, GDC and DPO.

π_old, the policy before the updates of a step, draws the samples. Token t of a response is the
action in the state s_t, the prompt and the tokens before it; V is the value of a state:

    R_t = −β·(log π_old − log p)(y_t|s_t), and r(x,y) more at the last token                 (1)
    A_t = Σ_{k≥0} λ^k·δ_{t+k},  δ_t = R_t + V_old(s_{t+1}) − V_old(s_t),  0 behind the end   (2)
    L   = −mean min(ρ·A, clip(ρ, 1−ε, 1+ε)·A)                 ρ = π_θ/π_old                  (3)
    L_V = ½·mean max((V−G)², (V_old + clip(V−V_old, −ε, ε) − G)²)      G_t = A_t + V_old     (4)
    A   = R − mean of R over the prompt's other samples                R = Σ_t R_t           (5)

--advantage gae is PPO: L + c·L_V, means over the tokens of all processes' responses, and A in (3)
has mean 0 and variance 1 over them. --advantage rloo has no value and takes a response for one
action: its ρ is the product of its tokens', its A is (5), and the mean in (3) is over responses.

P prompts per step, N samples per prompt, T tokens of the longest response; [P, N, T] is 0 behind a
response's end. Log-probs are in nats at the sampling temperature, end token included.
    β = --beta    λ = --gae-lambda    ε = --clip    c = --value-weight

How this differs from common practice (docs/ppo.md):
 1. By default a batch has one update, as in all scripts: ρ is 1 then, and (3) has the gradient of
    REINFORCE. The clipping matters with --updates-per-sample 4 --minibatches 2.
 2. The discount γ is 1. Value and policy share the step size and the norm of the gradient.

    python ppo.py                                       # the embedded default, no GPU needed
    python ppo.py --policy SFT --reward-model RM --dataset PROMPTS --lr 1e-6

Step 0 must show eval/kl 0 and the start model's win rate (about 0.45 on the default); step 1 shows
kl/ref 0 and, with one update per batch, ppo/kl_old 0 at every step.
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

    # PPO
    beta: float = 0.2
    """β, the KL weight of the objective: reward units per nat"""
    advantage: Literal["gae", "rloo"] = "gae"
    """gae: PPO, with a value of each token's state; rloo: against a prompt's other samples"""
    value_model: str = ""
    """classifier that the value starts from; empty = the policy's body with a head of zeros"""
    gae_lambda: float = 0.95
    """λ, how far rewards reach back past the value's own estimate: 0 to the next state, 1 all"""
    clip: float = 0.2
    """ε, how far ρ (from 1) and V (from V_old) may go before they stop to count"""
    value_weight: float = 0.1
    """c, the weight of the value's loss"""


def token_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """R_t [P, N, T] of rewards [P, N] and log-probs [P, N, T]; mask is True at tokens."""
    last = mask.sum(2, keepdim=True) - 1
    kl_term = -beta * (logprobs - ref_logprobs)
    return kl_term.scatter_add(2, last, rewards[:, :, None])  # (1)


def gae(rewards: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """A_t [P, N, T] of R_t and V_old, [P, N, T] each."""
    advantage = rewards + F.pad(values[:, :, 1:], (0, 1)) - values  # δ
    for t in reversed(range(advantage.shape[2] - 1)):
        advantage[:, :, t] += gae_lambda * advantage[:, :, t + 1]  # (2)
    return advantage


def whitened(run, advantage: Tensor, mask: Tensor) -> Tensor:
    """Advantages [P, N, T] with mean 0 and variance 1 over the tokens of all processes."""
    exact = advantage.double()
    sums = torch.stack([mask.sum(), exact.sum(), exact.square().sum()])
    count, total, squares = run.average(sums).tolist()
    mean = total / count
    return mask * (advantage - mean) / (squares / count - mean**2 + 1e-8) ** 0.5


def leave_one_out(returns: Tensor) -> Tensor:
    """A [P, N] of returns R [P, N]."""
    others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return returns - others  # (5)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, args: Args) -> Tensor:
    """Loss [P], summed over actions, of two log-probs [P, N, T] and advantages [P, N, actions]."""
    log_ratio = logprobs - old_logprobs
    if args.advantage == "rloo":
        log_ratio = log_ratio.sum(2, keepdim=True)  # a response is one action
    ratio = log_ratio.exp()
    near = ratio.clamp(1 - args.clip, 1 + args.clip)
    return -torch.min(ratio * advantage, near * advantage).sum((1, 2))  # (3)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Loss [P], summed over tokens, of three [P, N, T]."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.max((values - returns).square(), (near - returns).square())  # (4)
    return errors.sum((1, 2)) / 2


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.gae_lambda <= 1, f"--gae-lambda {args.gae_lambda}: is at most 1")
    common.require(args.clip > 0, f"--clip {args.clip}: must be more than 0")
    common.require(
        args.advantage == "gae" or args.samples_per_prompt > 1,
        f"--samples-per-prompt {args.samples_per_prompt}: rloo compares the samples of a prompt; "
        "take 2 or more",
    )
    common.require(
        args.advantage == "gae" or not args.value_model,
        f"--value-model {args.value_model}: --advantage rloo has no value",
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
    models = {"policy": policy}
    if args.advantage == "gae":
        value = common.load_value_model(run, policy, tokenizer, args.value_model)
        models["value"] = value

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

        # ── score ──
        sampled = run.clock()
        rewards = common.score(reward_model, batch, args.micro_batch)
        scored = run.clock()

        # ── targets ──
        mask = batch.mask().to(run.device)
        old = common.token_logprobs(policy, batch, args.temperature, args.micro_batch)
        ref_tokens = common.token_logprobs(ref, batch, args.temperature, args.micro_batch)
        ref_logprobs, proposal_logprobs = ref_tokens.sum(2), old.sum(2)
        paid = token_rewards(rewards, old, ref_tokens, mask, args.beta)
        if args.advantage == "gae":
            with torch.no_grad():
                old_values = common.token_values(value, batch, args.micro_batch)
            advantage = gae(paid, old_values, args.gae_lambda)
            returns = advantage + old_values
            advantage = whitened(run, advantage, mask)
            actions = run.average(mask.sum()) / len(prompts)  # per prompt
        else:
            advantage, actions = leave_one_out(paid.sum(2))[:, :, None], n

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
                part_loss = policy_loss(token_logprobs, old[rows], advantage[rows], args)
                if args.advantage == "gae":
                    values = common.token_values(value, batch[rows])
                    error = value_loss(values, old_values[rows], returns[rows], args.clip)
                    part_loss += args.value_weight * error
                part_loss /= actions
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
        metrics["ppo/kl_old"] = (proposal_logprobs - logprobs).mean()
        if args.advantage == "gae":
            metrics["ppo/value_error"] = (returns - old_values).square().sum() / tokens

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
