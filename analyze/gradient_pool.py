"""Variance and bias of gradient estimates on a real language model, from a pool of responses.

    python -m analyze.gradient_pool             # the tiny world: three minutes on one core
    python -m analyze.gradient_pool --world real --weights last --prompts 4 --pool 128
    python -m analyze.gradient_variance > docs/gradient_variance.md    # draws and writes the page

The real world is SmolLM2-135M as it was shipped, of `python -m prepare.real`.

What is estimated is −∇KL(T‖q_θ) = E_T[∇log q_θ(y)] of one prompt, at the start model: q_θ = p. A
pool of M responses per prompt is drawn once from each proposal, and each response's gradient is
kept in a random projection. An estimate is made of 8 responses drawn from the pool with
replacement, by the weights that the scripts' own losses give them, as often as wanted.

Proposals are models whose weights lie between the start model's (share 0) and those of a policy
that brain.py has trained (share 1); a proposal's own pool says how far it is from the target:

    KL(q′‖T) = E_q′[log q′ − log p − r/τ] + log Z                                            (1)

Z, and the gradient itself, are estimated from all pools at once, as samples of their mixture, with
BRAIn's weights over all of it:

    log q_mix(y) = log mean_q′ q′(y)     G = Σ_j (α̂_j − β̂_j) ∇log q_θ(y_j)                      (2)

All pools are cut into halves A and B. With m the mean of an estimate, the products of what comes
from different halves are without the error of a finite pool:

    |G|² = G_A·G_B     along = ½ (m_A·G_B + m_B·G_A) / |G|²     bias² = (m_A−G_A)·(m_B−G_B)   (3)

`along` is 1 for an estimate without bias. Sums over the prompts, intervals by bootstrap over them.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
import tyro
from torch import Tensor

import brain
import common
import gdc
from analyze.intervals import interval
from analyze.tables import ROOT, table
from benchmarks import fresh
from benchmarks.where import add
from plumbing.report import COLOURS, panels, read_lines

RESULTS = ROOT / "analyze" / "results"
SAMPLES, REPETITIONS = 8, 4000
WIDTH = 4096  # of the random projection
ARMS = ("DPG", "GDC++", "BRAIn", "BRAIn, no-baseline", "BRAIn, no-self-norm")
WORLDS = {
    "tiny": {
        "trained": "--steps 100 --seed 1",
        "shares": (0.0, 0.25, 0.5, 0.75, 1.0),
        "betas": (0.2, 0.4, 0.8, 1.6),
    },
    "real": {
        "policy": "assets/real/base",
        "reward_model": "analyze/gradient_pool.py:rating",
        "dataset": "assets/real/reviews",
        "template": "raw",
        "max_response_tokens": 24,
        "betas": (0.25, 0.5, 1.0, 2.0),
    },
}


@dataclass
class Args:
    world: Literal["tiny", "real"] = "tiny"
    """the embedded default with trained proposals, or SmolLM2 as it was shipped; both at many τ"""
    prompts: int = 8
    """held-out prompts"""
    pool: int = 256
    """responses per prompt and proposal (M)"""
    weights: Literal["all", "last"] = "all"
    """the gradient of all weights, or of those of the last block"""


def rating(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of the real world: how positive a person would find each review, −4 to 4."""
    from prepare.real import judge  # its libraries take seconds to import

    return judge(prompts, responses)


# ── pools ─────────────────────────────────────────────────────────────────────────────────────────


class Projection:
    """A random linear map of gradients to WIDTH numbers that keeps products, on average.

    Each weight is added, with a random sign, to one random place (a count sketch).
    """

    def __init__(self, size: int, width: int = WIDTH, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.place = torch.randint(width, (size,), generator=generator)
        self.sign = torch.randint(2, (size,), generator=generator).float() * 2 - 1
        self.width = width

    def __call__(self, gradient: Tensor) -> Tensor:
        """[width] of a gradient [size]."""
        return torch.zeros(self.width).index_add_(0, self.place, gradient * self.sign)


def weights_of(policy, which: str) -> list[Tensor]:
    """The weights whose gradient is looked at; the others are frozen."""
    named = dict(policy.module.named_parameters())
    last = f"layers.{policy.config.num_hidden_layers - 1}."
    chosen = {name for name in named if which == "all" or last in name}
    for name, weight in named.items():
        weight.requires_grad_(name in chosen)
    return [named[name] for name in sorted(chosen)]


def gradients(policy, batch, weights: list[Tensor], project: Projection) -> tuple[Tensor, Tensor]:
    """(log q_θ, gradients [P, N, width] of each response, projected)."""
    logprobs, found = [], []
    for prompt, group in zip(batch.prompts, batch.responses):
        for response in group:
            one = common.Batch([prompt], [[response]])
            logprob = common.logprobs_and_entropy(policy, one, 1.0)[0].sum()
            parts = torch.autograd.grad(logprob, weights)
            found.append(project(torch.cat([part.flatten() for part in parts])))
            logprobs.append(logprob.detach())
    shape = len(batch.prompts), -1
    return torch.stack(logprobs).view(shape).double(), torch.stack(found).view(
        *shape, project.width
    )


def draw_pools(args: Args) -> list[dict]:
    """A pool per proposal: share, log p, log q′, rewards [P, M], gradients [P, M, width]."""
    world = WORLDS[args.world]
    keys = ("policy", "reward_model", "dataset", "template", "max_response_tokens")
    flags = {key: world[key] for key in keys if key in world}
    run = common.Run(brain.Args(**flags, eval_prompts=args.prompts), brain.__file__)
    tokenizer = common.load_tokenizer("--policy", run.args.policy)
    _, held_out = common.load_prompts(run.args, tokenizer)
    policy = common.load_policy(run, tokenizer)
    reward_model = common.load_reward_model(run, policy, tokenizer)
    proposal, start = common.frozen_copy(policy), policy.module.state_dict()
    ends = start
    if "trained" in world:
        with fresh.run(["brain.py", *world["trained"].split()]) as folder:
            trained = brain.Args(**flags | {"policy": str(folder / "final")})
            ends = common.load_policy(common.Run(trained, brain.__file__), tokenizer)
            ends = ends.module.state_dict()
    weights = weights_of(policy, args.weights)
    project = Projection(sum(weight.numel() for weight in weights))
    shares, pools = world.get("shares", (0.0,)), []
    between = [{name: start[name].lerp(ends[name], share) for name in start} for share in shares]
    for share, state in zip(shares, between):
        begun, parts = time.perf_counter(), []
        for i, prompt in enumerate(held_out[: args.prompts]):
            proposal.module.load_state_dict(state)
            batch = common.sample(
                proposal, [prompt], args.pool, run.args.max_response_tokens, 1.0, seed=i
            )
            rewards = common.score(reward_model, batch).double()
            drawn = common.logprobs(proposal, batch, 1.0).double()
            logprobs, found = gradients(policy, batch, weights, project)
            mixed = []
            for other in between:
                proposal.module.load_state_dict(other)
                mixed.append(common.logprobs(proposal, batch, 1.0).double())
            mixed = torch.stack(mixed).logsumexp(0) - math.log(len(mixed))
            parts.append((logprobs, drawn, mixed, rewards, found))
        keys = ("ref", "drawn", "mixed", "rewards", "gradients")
        pool = {key: torch.cat(part) for key, part in zip(keys, zip(*parts))}
        pools.append(pool | {"share": share})
        print(f"share {share}: {time.perf_counter() - begun:.0f} s", flush=True)
    return pools


# ── estimates ─────────────────────────────────────────────────────────────────────────────────────


def sample_weights(arm: str, pool: dict, picks: Tensor, beta: float, log_z: float) -> Tensor:
    """Weights [R, n] of the gradients of one prompt's responses `picks` [R, n] in an estimate.

    pool: log p, log q′ and rewards [M] of the prompt. At the start model q_θ = p.
    """
    ref, drawn, rewards = (pool[key][picks] for key in ("ref", "drawn", "rewards"))
    logprobs = ref.clone().requires_grad_()
    if arm in ("DPG", "GDC++"):
        weights = (gdc.log_weights(ref, rewards, drawn, beta) - log_z).exp()
        loss = gdc.gdc_loss(logprobs, drawn, weights, "none" if arm == "DPG" else "gdc++")
    else:
        estimator = arm.partition(", ")[2] or "brain"
        weights = brain.posterior_weights(ref, rewards, drawn, beta, estimator)
        loss = brain.brain_loss(logprobs, drawn, weights, estimator)
    return -torch.autograd.grad(loss.sum(), logprobs)[0]


def log_weights(pool: dict, beta: float) -> Tensor:
    """log p·e^{r/τ}/q′ [..., M]."""
    return gdc.log_weights(pool["ref"], pool["rewards"], pool["drawn"], beta)


def effective_share(pool: dict, beta: float) -> float:
    """Of a pool's responses, those that count for the target: mean over the prompts."""
    weights = log_weights(pool, beta).softmax(-1)
    return (1 / weights.square().sum(-1) / weights.shape[-1]).mean().item()


def mean_and_variance(
    arm: str, pool: dict, beta: float, log_z: float, seed: int
) -> tuple[Tensor, float]:
    """(mean [width], variance summed over the weights) of an arm's estimates, of one prompt."""
    count = len(pool["ref"])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (REPETITIONS, SAMPLES), generator=generator)
    weights = sample_weights(arm, pool, picks, beta, log_z)
    found = pool["gradients"].double()
    shares = torch.zeros(count, dtype=torch.float64)
    shares.index_add_(0, picks.flatten(), weights.flatten() / REPETITIONS)
    mean = shares @ found
    gram = found @ found.T  # products of the gradients: no estimate need be written out
    among = gram[picks[:, :, None], picks[:, None, :]]  # [R, n, n]
    squares = torch.einsum("ri,rij,rj->r", weights, among, weights)
    return mean, ((squares.mean() - mean @ mean) * REPETITIONS / (REPETITIONS - 1)).item()


def mixture(pools: list[dict]) -> dict:
    """All pools as one, drawn from the mixture of their proposals."""
    whole = {key: torch.cat([pool[key] for pool in pools], 1) for key in POOLED}
    return whole | {"drawn": torch.cat([pool["mixed"] for pool in pools], 1)}


POOLED = ("ref", "rewards", "gradients")


def of_prompt(pool: dict, prompt: int, half: int | None = None) -> dict:
    """One prompt's part of a pool, or half of that."""
    values = {key: pool[key][prompt] for key in ("ref", "drawn", "rewards", "gradients")}
    if half is None:
        return values
    return {key: value[half::2] for key, value in values.items()}


def measure(pool: dict, best: dict, beta: float) -> list[dict]:
    """A line per arm, of a proposal's pool, with the gradient from the larger pool `best`."""
    prompts, log_z, kls, norms, true = len(pool["ref"]), [], [], [], []
    for prompt in range(prompts):
        whole, mine = of_prompt(best, prompt), of_prompt(pool, prompt)
        log_z.append(gdc.log_mean_weight(log_weights(whole, beta)[None]).item())
        kls.append((log_z[-1] - log_weights(mine, beta)).mean().item())  # (1)
        halves = [of_prompt(best, prompt, half) for half in (0, 1)]
        every = [torch.arange(len(part["ref"]))[None] for part in halves]
        weights = [
            sample_weights("BRAIn", part, picks, beta, 0.0) for part, picks in zip(halves, every)
        ]
        true.append([w[0] @ part["gradients"].double() for w, part in zip(weights, halves)])  # (2)
        norms.append((true[-1][0] @ true[-1][1]).item())
    lines = []
    for arm in ARMS:
        variances, alongs, biases = [], [], []
        for prompt, (first, second) in enumerate(true):
            m, v = zip(
                *(
                    mean_and_variance(arm, of_prompt(pool, prompt, half), beta, log_z[prompt], half)
                    for half in (0, 1)
                )
            )
            variances.append(sum(v) / 2)
            alongs.append(((m[0] @ second + m[1] @ first) / 2).item())
            biases.append(((m[0] - first) @ (m[1] - second)).item())  # (3)
        line = {"arm": arm, "share": pool["share"], "beta": beta, "kl": numpy.mean(kls).item()}
        for name, values in (("variance", variances), ("along", alongs), ("bias2", biases)):
            line[name] = interval(lambda a, b: a.sum(-1) / b.sum(-1), values, norms)
        lines.append(line)
    return lines


# ── page and picture ──────────────────────────────────────────────────────────────────────────────

SECTION = """
# On language models

The same measurement where the gradient is that of a transformer's weights: `python -m
analyze.gradient_pool` says how; raw lines: `analyze/results/gradient_pool.jsonl`. The model is the
start model, an estimate has {samples} responses of one prompt, and Z is estimated from a whole pool
for DPG and GDC++, which know it. The variance is summed over the weights, in units of |G|²; along
is the mean's component in the direction of G, in units of |G|, where 1 is without bias; bias²
counts all directions. An estimate of it may fall below 0. Each has a 95 % interval, by bootstrap
over the prompts. Where the pools are too small to tell |G|² from 0, nothing is resolved.

![variance and mean of the estimates](gradient_pool.png)
"""
SWEEPS = {
    ("tiny", "share"): "Tiny world: proposals between the start model and a trained policy, "
    "τ = {beta:g}",
    ("tiny", "beta"): "Tiny world: the start model proposes, at several τ",
    ("real", "beta"): "SmolLM2-135M: the start model proposes, at several τ",
}


def raw_lines() -> list[dict]:
    """The last line of each world, proposal, target and arm."""
    path = RESULTS / "gradient_pool.jsonl"
    lines = read_lines(path) if path.exists() else []
    keys = ("world", "share", "beta", "arm")
    return list({tuple(line[key] for key in keys): line for line in lines}.values())


def of_sweep(lines: list[dict], world: str, by: str) -> dict[str, list[dict]]:
    """By arm, the lines of a sweep in the order of KL(q′‖T)."""
    own = [line for line in lines if line["world"] == world]
    first = min((line["beta"] for line in own), default=0)
    chosen = [x for x in own if (x["beta"] == first if by == "share" else x["share"] == 0)]
    ordered = sorted(chosen, key=lambda line: line["kl"])
    return {arm: [line for line in ordered if line["arm"] == arm] for arm in ARMS if ordered}


def section(lines: list[dict]) -> str:
    """What docs/gradient_variance.md says of language models; nothing where there are no lines."""
    parts = [SECTION.format(samples=SAMPLES)] if lines else []
    for (world, by), title in SWEEPS.items():
        arms, rows = of_sweep(lines, world, by), []
        for place in zip(*arms.values()):
            for line in place:
                at = f"{line['kl']:.2f}"
                rows.append([at, f"{line[by]:g}", line["arm"], *(cells(line))])
        if rows:
            about = next(iter(arms.values()))[0]
            head = ["KL(q′‖T)", {"share": "share", "beta": "τ"}[by], "estimate"]
            head += ["variance / |G|²", "along", "bias² / |G|²"]
            title = title.format(beta=about["beta"])
            said = f"{about['prompts']} prompts, {about['pool']} responses each per proposal"
            parts.append(f"\n**{title}** ({said}):\n\n{table(head, rows)}\n")
    parts += [FOUND] * bool(lines)
    parts += [FOUND_REAL] * any(line["world"] == "real" for line in lines)
    return "".join(parts)


FOUND = """
The order is that of the figure in one dimension. DPG and GDC++ are without bias here too, and from
the start model, for a far target, they have the largest variance. BRAIn has the least at every
target, and a part of that is again a smaller mean: the farther the target, the less of G is left
with 8 samples. (There q_θ = q′, so that "no-self-norm" is BRAIn.) A proposal near the target turns
it round: α̂ alone has the least variance and hardly a bias, what has q_θ/q′ unnormalised has the
most, and BRAIn half of G for its mean. So BRAIn's baseline does not pay by this measure where the
model is far from a proposal that is near the target; it pays where runs end, as above. With a
variance of several |G|², the gradient of one prompt is mostly noise for all of them.
"""
FOUND_REAL = """
SmolLM2's responses are longer and differ more, so that variances are tens to hundreds of |G|², and
only the two nearest targets are resolved. There GDC++ has its mean along G, and BRAIn, with 0.59
and 0.79 of its variance, keeps 0.71 and 0.83 of G: less for the farther target, as above. Without a
baseline, DPG and α̂ alone have 1.6 to 6.6 times the variance of GDC++: that of ∇log q itself, which
a baseline takes out. Their means are lost in it, and the intervals, over four prompts, are too
narrow to say so.
"""


def resolved(line: dict) -> bool:
    """Whether |G|² of (3), by which all is divided, is surely above 0: a variance is."""
    return line["variance"]["low"] > 0


def cells(line: dict) -> list[str]:
    """Value (interval) of variance, along and squared bias."""
    digits = {"variance": 2, "along": 2, "bias2": 3}
    if not resolved(line):
        return ["not resolved"] * len(digits)
    return [
        "{value:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(d=d, **line[key])
        for key, d in digits.items()
    ]


TICKS = (0.1, 0.2, 0.5, 1, 2, 5)


def draw(lines: list[dict], path) -> None:
    """Variance and mean of the arms against KL(q′‖T), a column per sweep."""
    sweeps = {key: of_sweep(lines, *key) for key in SWEEPS}
    sweeps = {key: arms for key, arms in sweeps.items() if arms}
    figure, axes = panels(2, len(sweeps), (4.6 * len(sweeps), 7))
    for column, ((world, by), arms) in enumerate(sweeps.items()):
        for place, (arm, colour) in enumerate(zip(arms, COLOURS)):
            shown = [line for line in arms[arm] if resolved(line)]
            x = numpy.array([line["kl"] for line in shown]) * (1 + 0.015 * (place - 2))
            for row, key in enumerate(("variance", "along")):
                found = [line[key] for line in shown]
                y, low, high = (
                    numpy.array([part[name] for part in found]) for name in ("value", "low", "high")
                )
                axis = axes[row * len(sweeps) + column]
                axis.errorbar(
                    x, y, [y - low, high - y], fmt="o-", ms=4, capsize=2, color=colour, label=arm
                )
        top, bottom = axes[column], axes[len(sweeps) + column]
        name = {"tiny": "tiny world", "real": "SmolLM2-135M"}[world]
        title = {"share": "several proposals", "beta": "start model, several τ"}[by]
        top.set(title=f"{name}: {title}", yscale="log")
        bottom.axhline(1, color="black", lw=1, ls="--", label="no bias")
        for axis in (top, bottom):
            axis.set(xlabel="KL(q′‖T), nats", xscale="log")
            axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axis.set_xticks([], minor=True)
    axes[0].set_ylabel("variance / |G|²")
    axes[len(sweeps)].set_ylabel("mean along G / |G|")
    axes[len(sweeps)].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Draws the pools, and adds a line for each proposal, target and arm."""
    begun, pools = time.perf_counter(), draw_pools(args)
    betas = WORLDS[args.world]["betas"]  # of the start model's pool; the others have the first
    places = [(pool, betas[0]) for pool in pools[1:]] + [(pools[0], beta) for beta in betas]
    about = {"world": args.world, "prompts": args.prompts, "pool": args.pool}
    about |= {"weights": args.weights, "samples": SAMPLES, "repetitions": REPETITIONS}
    flags = " ".join(f"--{key} {value}" for key, value in vars(args).items())
    about |= {"command": f"python -m analyze.gradient_pool {flags}"}
    best = mixture(pools)
    for pool, beta in places:
        known = {"effective": round(effective_share(best, beta), 4)}
        for line in measure(pool, best, beta):
            add("gradient_pool", line | known | about, RESULTS)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
