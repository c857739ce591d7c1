"""docs/gradient_variance.md and .png: BRAIn's figure of the variance of a gradient estimate.

    python -m analyze.gradient_variance > docs/gradient_variance.md    # seconds on one core

In one dimension the target is N(0, 1), the model N(θ, 1) at θ = 1, and the proposal N(μ, 1) at 20
places from μ = 0, the target, to μ = 1, the model. An estimate has 8 samples, and is of the
direction in which θ goes, −∇KL(target‖model), which is −1. Its variance over 100,000 repetitions is
computed with the scripts' own weights and losses, and for two arms is known (derived):

    Var DPG   = (e^{μ²} (1 + (1+μ)²) − 1) / n                                               (1)
    Var GDC++ = (e^{μ²} (1 + (1+μ)²) + e^{(1−μ)²} (1 + (1−μ)²) − 2 e^{μ²−μ} (1 + μ²) − 1) / n  (2)

The picture has the published arms. The raw lines, in analyze/results/gradient_variance.jsonl, have
the two ablations of BRAIn as well. What the page says of language models is measured by
analyze/gradient_pool.py.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import brain
import gdc
from analyze import gradient_pool
from analyze.tables import ROOT, table
from benchmarks import where
from plumbing.report import COLOURS, panels

RESULTS = ROOT / "analyze" / "results" / "gradient_variance.jsonl"
SAMPLES, REPETITIONS, PLACES = 8, 100_000, 20
PUBLISHED = ("DPG", "GDC++", "BRAIn")
ARMS = (*PUBLISHED, "BRAIn, no-baseline", "BRAIn, no-self-norm")
START = """# The variance of a gradient estimate

The BRAIn authors' figure, made again by `python -m analyze.gradient_variance`, which says what is
measured. Raw lines: `analyze/results/gradient_variance.jsonl`. Points are measured, lines are the
closed forms of DPG and GDC++; BRAIn has none.

![variance and mean of three gradient estimates](gradient_variance.png)

**What the picture does not say by itself.** DPG and GDC++ estimate the gradient, −1, without bias.
BRAIn normalises its weights over 8 samples, and its estimate is {least:.2f} to {most:.2f} on
average: a part of its small variance is a smaller gradient. Divided by the square of its mean, its
variance is {relative}: more than DPG's where the proposal is near the target. And the
ablations, BRAIn without its baseline or without normalising it, do not look bad here. What sets
BRAIn apart from them is where it stops. The last row has the model at the target, where the
true gradient is 0: there every single gradient of BRAIn is 0, and those of its ablations are not
even on average. GDC++ stops there too, because here, unlike for a language model, Z is known.

Variance, and in brackets the mean:
"""
AT_TARGET = {"mu": 1.0, "theta": 0.0}  # of the last row


def estimates(arm: str, samples: Tensor, proposal_mean: float, theta: float = 1.0) -> Tensor:
    """Estimates [R] of −∇KL(target‖model) by the loss of `arm`, from samples [R, n]."""
    theta = torch.full((len(samples), 1), theta, dtype=samples.dtype, requires_grad=True)
    target, proposal = log_density(samples, 0.0), log_density(samples, proposal_mean)
    model = log_density(samples, theta)
    no_reward = torch.zeros_like(samples)  # the target is the prior, at τ = 1
    if arm in ("DPG", "GDC++"):
        weights = gdc.log_weights(target, no_reward, proposal, 1.0).exp()  # Z = 1 is known
        loss = gdc.gdc_loss(model, proposal, weights, "none" if arm == "DPG" else "gdc++")
    else:
        estimator = arm.partition(", ")[2] or "brain"
        weights = brain.posterior_weights(target, no_reward, proposal, 1.0, estimator)
        loss = brain.brain_loss(model, proposal, weights, estimator)
    loss.sum().backward()
    return -theta.grad[:, 0]


def log_density(x: Tensor, mean) -> Tensor:
    """Log-density of N(mean, 1)."""
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def closed_form(arm: str, mu: float, n: int = SAMPLES) -> float:
    """The variance of DPG or GDC++."""
    dpg = math.exp(mu**2) * (1 + (1 + mu) ** 2) - 1
    if arm == "DPG":
        return dpg / n  # (1)
    baseline = math.exp((1 - mu) ** 2) * (1 + (1 - mu) ** 2)
    return (dpg + baseline - 2 * math.exp(mu**2 - mu) * (1 + mu**2)) / n  # (2)


def measure(mu: float, seed: int, theta: float = 1.0, repetitions: int = REPETITIONS) -> list[dict]:
    """A line per arm: variance and mean of its estimates, all from the same samples."""
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, SAMPLES)
    samples = mu + torch.randn(shape, generator=generator, dtype=torch.float64)
    lines = []
    for arm in ARMS:
        found = estimates(arm, samples, mu, theta)
        line = {"arm": arm, "mu": mu, "theta": theta}
        line |= {"variance": found.var().item(), "mean": found.mean().item()}
        if arm in ("DPG", "GDC++") and theta == 1:
            line["closed_form"] = closed_form(arm, mu)
        lines.append(line | {"samples": SAMPLES, "repetitions": repetitions, "seed": seed})
    return lines


def draw(lines: list[dict], path: Path) -> None:
    """Variance and mean of the published arms against the KL of the proposal from the target."""
    figure, (left, right) = panels(1, 2, (9, 3.8))
    for arm, colour in zip(PUBLISHED, COLOURS):
        own = [line for line in lines if line["arm"] == arm and line["theta"] == 1]
        kl = [line["mu"] ** 2 / 2 for line in own]
        if "closed_form" in own[0]:
            left.plot(kl, [line["closed_form"] for line in own], color=colour, lw=1)
        for axis, key in ((left, "variance"), (right, "mean")):
            axis.plot(kl, [line[key] for line in own], "o", ms=5, color=colour, label=arm)
    left.set(title="variance of an estimate (line: closed form)", ylim=(0, None))
    right.axhline(-1, color="black", lw=1, ls="--", label="true gradient")
    right.set(title="mean of an estimate", ylim=(-1.15, -0.6))
    for axis in (left, right):
        axis.set(xlabel="KL(proposal‖target) = μ²/2, nats")
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def page(lines: list[dict]) -> str:
    """docs/gradient_variance.md."""
    own = [line for line in lines if line["arm"] == "BRAIn" and line["theta"] == 1]
    means = [line["mean"] for line in own]
    relative = [line["variance"] / line["mean"] ** 2 for line in own]
    start = START.format(
        least=max(means),
        most=min(means),
        relative=f"{min(relative):.2f} to {max(relative):.2f}",
    )
    rows = []
    for line in own[:: PLACES // 4] + own[-1:]:
        rows.append(row(lines, line["mu"], 1.0))
    rows.append(row(lines, **AT_TARGET))
    head = ["μ", "θ", *ARMS, "DPG, (1)", "GDC++, (2)"]
    on_models = gradient_pool.section(gradient_pool.raw_lines())
    return f"{start}\n{table(head, rows)}\n{on_models}"


def row(lines: list[dict], mu: float, theta: float) -> list[str]:
    """A row of the table: what was measured at μ and θ, and what is known."""
    here = {x["arm"]: x for x in lines if (x["mu"], x["theta"]) == (mu, theta)}
    cells = [
        f"{here[arm]['variance']:.3f} ({round(here[arm]['mean'], 2) + 0.0:.2f})" for arm in ARMS
    ]
    known = [here[arm].get("closed_form") for arm in PUBLISHED[:2]]
    return [f"{mu:.2f}", f"{theta:.0f}", *cells, *("" if x is None else f"{x:.3f}" for x in known)]


def main() -> None:
    """Measures, writes the raw lines, draws, prints the page."""
    begun, lines = time.perf_counter(), []
    for seed, mu in enumerate(torch.linspace(0, 1, PLACES, dtype=torch.float64).tolist()):
        lines += measure(mu, seed)
    lines += measure(**AT_TARGET, seed=PLACES)
    about = {"command": "python -m analyze.gradient_variance"} | where.about()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line | about) + "\n" for line in lines))
    draw(lines, ROOT / "docs" / "gradient_variance.png")
    gradient_pool.draw(gradient_pool.raw_lines(), ROOT / "docs" / "gradient_pool.png")
    print(page(lines))
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
