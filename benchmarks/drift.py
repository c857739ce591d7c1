"""How far a policy drifts from the model that draws the samples, in nats per response.

    python -m benchmarks.drift [--lrs 5e-4] [--most-tokens 64] [--policy … --reward-model …]

Runs brain.py on fresh samples of the start model at every step (--refresh-every 0, no warm-up) and
looks at log q_θ/q′ of these samples after 1, 2, 5, 10 and 20 updates. Adds a line per step size,
length and number of updates to benchmarks/results/drift.jsonl, each a mean over the seeds: `spread`
is the standard deviation over the samples of a prompt, `share` the effective share of N samples
weighted by q_θ/q′, `length` the tokens of a response.
"""

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

import brain
from benchmarks.where import add
from plumbing.report import read_lines

UPDATES = (1, 2, 5, 10, 20)


@dataclass
class Args:
    lrs: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
    """step sizes"""
    most_tokens: tuple[int, ...] = (4, 8, 64)
    """values of --max-response-tokens"""
    most_updates: int = 20
    """where a run ends"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """one run each"""
    policy: str = brain.Args.policy
    """as for brain.py, like the flags that follow"""
    reward_model: str = brain.Args.reward_model
    dataset: str = brain.Args.dataset
    beta: float = brain.Args.beta
    prompts_per_step: int = brain.Args.prompts_per_step


def drift(args: Args, lr: float, most_tokens: int, seed: int) -> list[dict]:
    """What one run shows at each of its steps."""
    seen, loss = [], brain.brain_loss

    def record(logprobs: Tensor, proposal_logprobs: Tensor, *more) -> Tensor:
        log_ratio = (logprobs - proposal_logprobs).detach()
        share = 1 / log_ratio.softmax(1).square().sum(1) / log_ratio.shape[1]
        found = {"spread": log_ratio.var(1).mean().sqrt(), "share": share.mean()}
        seen.append({name: value.item() for name, value in found.items()})
        return loss(logprobs, proposal_logprobs, *more)

    names = ("policy", "reward_model", "dataset", "beta", "prompts_per_step")
    flags = {name: getattr(args, name) for name in names} | {"lr": lr, "seed": seed}
    flags |= {"max_response_tokens": most_tokens, "steps": args.most_updates + 1}
    flags |= {"warmup_steps": 0, "refresh_every": 0, "eval_every": 10**6, "eval_prompts": 16}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        brain.brain_loss = record
        try:
            brain.main(brain.Args(**flags, save_every=10**6, run_dir=str(run)))
        finally:
            brain.brain_loss = loss
        lines = read_lines(run / "metrics.jsonl")
    return [at | {"length": line["length/mean"]} for at, line in zip(seen, lines[1:], strict=True)]


def main(args: Args) -> None:
    """Runs all of them, one after the other."""
    for lr, most_tokens in itertools.product(args.lrs, args.most_tokens):
        runs = [drift(args, lr, most_tokens, seed) for seed in args.seeds]
        for updates in UPDATES:
            if updates <= args.most_updates:
                line = {"policy": args.policy, "lr": lr, "updates": updates}
                for name in ("length", "spread", "share"):
                    mean = statistics.mean(run[updates][name] for run in runs)
                    line[name] = round(mean, 4)
                add("drift", line | {"seeds": len(args.seeds)})


if __name__ == "__main__":
    main(tyro.cli(Args))
