"""WIND: win-rate dominance, a regularised game that a policy plays against itself.

Source: Yang et al., AISTATS 2025, 2410.20727. Its body could not be read: the game and the three
kinds of risk are the paper's; every formula below and every default is derived, from its abstract
and from magnetic mirror descent (Sokota et al., 2206.05825). docs/wind.md has the derivations.

P(y ≻ y′) is 1 if r(y) > r(y′), ½ if equal, else 0; or, by --preference bradley-terry, σ(r − r′).
With g_t(y) = E_{y′~π_t} P(y ≻ y′) the game maximises E_{y~π} P(y ≻ π′) − β·KL(π‖π_ref). Its
equilibrium is π* ∝ π_ref · exp(g_π*(y) / β), and a step of size η towards it, with the previous
policy π_t for opponent, is

    π_{t+1} ∝ π_t^{1/(1+βη)} · π_ref^{βη/(1+βη)} · exp(η/(1+βη) · g_t),   in other words
    ψ_θ(y) + c(x) = g_t(y) with ψ_θ = (β + 1/η)·log π_θ − β·log π_ref − (1/η)·log π_t     (1)

K samples of π_t estimate the win rates, and a regression makes the step:

    ĝ_i     = (1/K) Σ_j P(y_i ≻ y_j), with j = i, which counts ½                             (2)
    square    mean_i [ (ψ_i − mean_j ψ_j) − (ĝ_i − mean_j ĝ_j) ]²                            (3)
    kl        −[ ĝ log s + (1−ĝ) log(1−s) ]             with s = ψ + c                       (4)
    nce       −2ĝ log(2s/(1+2s)) − log(1/(1+2s))        with s = ψ + c                       (5)

In (4) and (5) c is ½ minus the mean ψ of the other samples, detached, and ĝ leaves i out; both then
settle beside the equilibrium by O(1/K), while (3) is exact for every K.

P prompts per step, K = N samples per prompt. Log-probs are sums over the tokens of a response, end
token included, in nats at the sampling temperature; they and the rewards are [P, N].
    π_t = proposal_logprobs    π_ref = ref_logprobs    π_θ = logprobs    ĝ = win_rate

    python wind.py                                      # the embedded default, no GPU needed
    python wind.py --policy SFT --reward-model RM --dataset PROMPTS --lr 1e-6

Step 0 must show eval/kl 0 and the start model's win rate (about 0.45 on the default). At step 1, ψ
is 0, so the loss of `square` is the variance of ĝ: close to (1 − 1/K²)/12 if hard, without ties.
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

    # WIND
    beta: float = 0.05
    """β, the KL weight of the game: win rate per nat"""
    eta: float = 5.0
    """η, the step towards the equilibrium that each renewal of the opponent allows"""
    preference: Literal["hard", "bradley-terry"] = "hard"
    """P(y ≻ y′): the higher reward wins, or it wins with probability σ(r − r′)"""
    risk: Literal["square", "kl", "nce"] = "square"
    """how ψ is regressed on the win rate: squared, Bernoulli, or winners against samples"""
    refresh_every: int = 5
    """steps between renewals of the opponent from the policy"""


FLOOR = 0.02  # win rates below it (and above 1 − it) are as good as 0 (1)


def win_rates(rewards: Tensor, risk: str, preference: str = "hard") -> Tensor:
    """ĝ [P, N] in [0, 1] of rewards [P, N]: with itself for `square`, else leave-one-out."""
    gap = rewards[:, :, None] - rewards[:, None, :]  # r − r′
    duels = gap.sigmoid() if preference == "bradley-terry" else (gap.sign() + 1) / 2
    wins, n = duels.sum(2), rewards.shape[1]
    return wins / n if risk == "square" else (wins - 0.5) / (n - 1)  # (2)


def smooth_log(x: Tensor) -> Tensor:
    """log x, below FLOOR continued by its Taylor polynomial of degree 2: concave and finite."""
    # s is a win rate, but nothing keeps it in (0, 1), and clipping would kill the gradient.
    z = (x - FLOOR) / FLOOR
    return torch.where(x > FLOOR, x.clamp(min=FLOOR).log(), math.log(FLOOR) + z - z.square() / 2)


def step_value(
    logprobs: Tensor, ref_logprobs: Tensor, previous_logprobs: Tensor, args: Args
) -> Tensor:
    """ψ [P, N] of three log-probs, [P, N] each."""
    log_step = logprobs - previous_logprobs
    return args.beta * (logprobs - ref_logprobs) + log_step / args.eta  # (1)


def wind_loss(
    logprobs: Tensor, ref_logprobs: Tensor, previous_logprobs: Tensor, win_rate: Tensor, args: Args
) -> Tensor:
    """Loss [P] of three log-probs and the win rates, [P, N] each."""
    psi = step_value(logprobs, ref_logprobs, previous_logprobs, args)
    if args.risk == "square":
        residual = psi - win_rate
        return (residual - residual.mean(1, keepdim=True)).square().mean(1)  # (3)
    others = (psi.sum(1, keepdim=True) - psi).detach() / (psi.shape[1] - 1)
    s = psi + 0.5 - others
    if args.risk == "kl":
        return -(win_rate * smooth_log(s) + (1 - win_rate) * smooth_log(1 - s)).mean(1)  # (4)
    below = s.clamp(-0.5, 0)  # there log(1+2s) goes on as a parabola down to its lowest point
    odds = torch.log1p(2 * s.clamp(min=0)) + 2 * below + 2 * below.square()
    return -(2 * win_rate * (smooth_log(2 * s) - odds) - odds).mean(1)  # (5)


def check(args: Args) -> None:
    """Ends the process where flags do not fit the method."""
    common.require(args.eta > 0, f"--eta {args.eta}: must be more than 0")
    common.require(
        args.refresh_every > 0, f"--refresh-every {args.refresh_every}: must be more than 0"
    )
    common.require(
        args.samples_per_prompt > 1,
        f"--samples-per-prompt {args.samples_per_prompt}: samples duel with each other; take 2 or "
        "more",
    )
    common.require(
        args.risk == "square" or args.samples_per_prompt > 3,
        f"--risk {args.risk}: needs --samples-per-prompt 4 or more",
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
    proposal = common.frozen_copy(policy)  # π_t: it draws the samples and is the opponent
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
        ref_logprobs = common.logprobs(ref, batch, args.temperature, args.micro_batch)
        proposal_logprobs = common.logprobs(proposal, batch, args.temperature, args.micro_batch)
        win_rate = win_rates(rewards, args.risk, args.preference)

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
                part_loss = wind_loss(
                    part_logprobs, ref_logprobs[rows], proposal_logprobs[rows], win_rate[rows], args
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
        if step % args.refresh_every == 0:
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
        psi = step_value(logprobs, ref_logprobs, proposal_logprobs, args)
        metrics |= {
            "wind/psi_std": psi.std(1, correction=0).mean(),
            "wind/win_rate_std": win_rate.std(1, correction=0).mean(),
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
