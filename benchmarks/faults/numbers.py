"""Bad numbers in step 5: a run must stop and say which prompt, or carry on with finite metrics."""

import itertools
from collections.abc import Callable, Iterator

import torch

import common
from benchmarks.faults.world import FLAGS, Outcome, World, read, refused

INFINITY = float("inf")


def numbers(world: World) -> Iterator[Outcome]:
    """Bad numbers in step 5: stop and say which prompt, or carry on with finite metrics."""
    for name, (prepare, needed, more) in NUMBERS.items():
        folder = world.new()
        if "beta" in more and world.script == "bond":
            continue  # it has none
        process = world.start(folder, prepare, **more)
        code, error = process.end()
        process.said.seek(0)
        advised = process.said.read().count("reward/std ")
        steps = read(folder / "metrics.jsonl")
        problems, seen = [], {"exit code": code, "line": error}
        for line in steps:
            bad = [key for key, value in line.items() if value != value or abs(value) == INFINITY]
            problems += [f"step {line['step']}: {bad} not finite"] * bool(bad)
        if needed is None:  # carries on
            problems += [f"exit code {code}: {error}"] * (code != 0 or error != "")
            problems += ["steps are missing"] * (len(steps) != FLAGS["--steps"] + 1)
        else:
            problems += refused(code, error, *needed)
            state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
            problems += [f"checkpoint of step {state['step']}, not 4"] * (state["step"] != 4)
            problems += world.finish(folder)  # without the fault
        if "weights/ess" in steps[-1]:
            seen["weights/ess"] = round(steps[min(5, len(steps) - 1)]["weights/ess"], 3)
            problems += [f"advice on --beta given {advised} times"] * (advised != 1)
        yield Outcome(name, problems, seen)


def at_step(step: int, change: Callable) -> Callable:
    """`prepare` that lets `change` alter the rewards of a step, as if the model gave them."""

    def prepare():
        rewards_of, sample, now = common._rewards, common.sample, [False]
        seeds = {common.seed_of(1, step, 0), common.seed_of(1, "anchor", step, 0)}

        def watched(model, prompts, n, max_tokens, temperature, seed):
            now[0] = seed in seeds
            return sample(model, prompts, n, max_tokens, temperature, seed)

        def altered(model, batch):
            rewards = rewards_of(model, batch)
            return change(rewards) if now[0] else rewards

        common.sample, common._rewards = watched, altered

    return prepare


def spoil(value: float) -> Callable:
    """Sets the reward of the first prompt's second response."""

    def change(rewards):
        rewards[0, 1] = value
        return rewards

    return at_step(5, change)


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN for the last prompt."""

    @staticmethod
    def forward(context, x):
        """Changes nothing."""
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        """Spoils the last row."""
        gradient = gradient.clone()
        gradient[-1] = float("nan")
        return gradient


def nan_gradient(inside: bool) -> Callable:
    """NaN in the gradient in update 5, of the log-probs or inside the model."""

    def prepare():
        read, calls = common.token_logprobs_and_entropy, itertools.count(1)

        def spoiled(model, batch, temperature, *more):
            if not torch.is_grad_enabled() or next(calls) != 5:
                return read(model, batch, temperature, *more)
            if inside:
                weight = next(model.parameters())
                handle = weight.register_hook(lambda g: (handle.remove(), g * float("nan"))[1])
                return read(model, batch, temperature, *more)
            logprobs, entropy = read(model, batch, temperature, *more)
            return BadGradient.apply(logprobs), entropy

        common.token_logprobs_and_entropy = spoiled

    return prepare


def responses(change: Callable) -> Callable:
    """`prepare` that alters every batch of samples, as if the policy had drawn them so."""

    def prepare():
        sample = common.sample

        def altered(model, prompts, n, *more, **named):
            batch = sample(model, prompts, n, *more, **named)
            if prompts[0].text:  # not of the check at load, which compares log-probs
                change(batch.responses, model.end_tokens[0])
            return batch

        common.sample = altered

    return prepare


def ends_at_once(responses: list, end: int) -> None:
    """The first prompt gets the end token and nothing else."""
    responses[0] = [[end] for _ in responses[0]]


def one_far_longer(responses: list, end: int) -> None:
    """All responses end at once but the very first, which never ends."""
    longest = [5] * max(len(ids) for group in responses for ids in group)
    responses[:] = [[[end] for _ in group] for group in responses]
    responses[0][0] = longest


def huge(rewards):
    """±1e4."""
    return 1e4 * rewards.sign()


STOP = ("the prompt '", "checkpoint is kept")
NUMBERS: dict[str, tuple[Callable | None, tuple[str, ...] | None, dict]] = {
    "a reward of NaN": (spoil(float("nan")), ("reward", *STOP), {}),
    "a reward of inf": (spoil(INFINITY), ("reward", *STOP), {}),
    "a reward of -inf": (spoil(-INFINITY), ("reward", *STOP), {}),
    "gradient of the log-probs NaN": (nan_gradient(False), ("gradient", "step 5"), {}),
    "gradient NaN inside the model": (nan_gradient(True), ("gradient", "step 5"), {}),
    "all rewards equal": (at_step(5, torch.zeros_like), None, {}),
    "rewards of ±1e4": (at_step(5, huge), None, {}),
    "--beta 1e-4": (None, None, {"beta": 1e-4}),
    "a prompt whose responses end at once": (responses(ends_at_once), None, {}),
    "one response far longer": (responses(one_far_longer), None, {"max_response_tokens": 64}),
}
