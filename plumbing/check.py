"""The check at load: does a model that is fed as we feed it give the numbers of single rows?

`common` calls it once per model, before a run begins, and hands in how it reads a model: nothing
here knows how rows are packed or tokens drawn. Loading itself is in `models.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.data import Prompt
from plumbing.models import Model
from plumbing.run import explained, require

MISTAKE = 1 / 3  # of the effect of an unseen token: what bfloat16 may differ by

# Of a model, prompts and responses [P][N]: (responses, numbers [..., P, N]). The numbers are
# rewards, or log-probs of responses that the model draws in the place of those given.
Read = Callable[[Model, list[Prompt], list], tuple[list, Tensor]]


@torch.no_grad()
def choose_rows(flag: str, name: str, model: Model, read: Read) -> None:
    """Feeds the model shared rows if they give the numbers of single rows, else plain rows.

    It must pass with one of the two, or the run ends.
    """
    with explained(f"{flag} {name}"):
        logits = _own_logits(model, _some_tokens(model)[:8])
    require(logits.isfinite().all(), f"{flag} {name}: its weights give NaN or infinity")
    for model.shared_rows, model.own_head in ((True, False), (False, False), (False, True)):
        try:
            gap, allowed = _gap(model, read)
            problem = f"off by {gap:.1e}"
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except Exception as error:  # a model raises what it likes at a mask it does not know
            gap, allowed, problem = float("inf"), 0.0, f"{type(error).__name__} {error}"
        if gap <= allowed:
            return
        if model.shared_rows:
            print(f"{flag} {name}: no shared rows ({problem:.200}); a prompt is computed N times")
    kind = type(model.module).__name__
    fed = "when it is fed a batch or its cache"
    message = f"{flag} {name}: a {kind} does not give the numbers of single rows {fed} ({problem})"
    require(False, message)


@torch.no_grad()
def choose_graph(name: str, policy: Model, read: Read) -> None:
    """Lets sampling record its decoding step, or ends the run where the model does not allow it."""
    what = f"--cuda-graph: --policy {name}"
    require(
        policy.shared_rows, f"{what} takes no shared rows, whose shapes are fixed; leave it out"
    )
    policy.cuda_graph = True
    with explained(f"{what} cannot be recorded, leave it out"):
        gap, allowed = _gap(policy, read)
    require(gap <= allowed, f"{what} samples otherwise, off by {gap:.1e}; leave it out")


@torch.no_grad()
def require_single_texts(flag: str, name: str, rewards: Callable[[list], Tensor]) -> None:
    """Ends the run if a classifier of texts gives a batch of two other rewards than to each.

    `rewards` gives [1, N], of texts [1][N].
    """
    texts = ["Two.", "Two, three and four."]
    with explained(f"{flag} {name}"):
        alone = torch.cat([rewards([[text]]) for text in texts], 1)
        gap = (rewards([texts]) - alone).abs().max().item()
    require(gap < 1e-3, f"{flag} {name}: scores a batch unlike single texts, off by {gap:.1e}")


def _some_tokens(model: Model) -> list[int]:
    """Tokens that are not padding, to try a model with."""
    vocabulary, pad = model.config.vocab_size, getattr(model.config, "pad_token_id", None)
    return [i for i in (k * k % vocabulary for k in range(5, 60)) if i != pad]


def _gap(model: Model, read: Read) -> tuple[float, float]:
    """How far a model's numbers are from those of single rows, and how far they may be, on two
    prompts of unlike length.

    In float32 they differ by rounding. In bfloat16 other kernels round otherwise, by an amount that
    grows with the model: so the mean difference is compared with that of a mistake made on purpose,
    a token of the prompt that no response sees.
    """
    ids = _some_tokens(model)
    prompts = [ids[:5], ids[5:8]]
    given = [[ids[8:12], ids[12:14]], [ids[12:14], ids[8:12]]]
    responses, ours = read(model, [Prompt("", tokens) for tokens in prompts], given)
    alone = _alone(model, prompts, responses)
    gaps = (ours - alone).abs()
    if model.module.dtype == torch.float32:
        return gaps.max().item(), 1e-3
    shorter = [tokens[:1] + tokens[2:] for tokens in prompts]
    mistake = (_alone(model, shorter, responses) - alone).abs()
    return gaps.mean().item(), MISTAKE * mistake.mean().item()


def _alone(model: Model, prompts: list[list[int]], responses: list[list[list[int]]]) -> Tensor:
    """The log-probs or rewards [P, N] that the model itself gives to rows of one response each."""
    numbers = []
    for prompt, group in zip(prompts, responses):
        for response in group:
            logits = _own_logits(model, prompt + response)
            number = logits[-1]
            if model.end_tokens:
                steps = F.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
                number = sum(steps[place, token] for place, token in enumerate(response))
            numbers.append(number)
    return torch.stack(numbers).view(len(prompts), -1)


def _own_logits(model: Model, row: list[int]) -> Tensor:
    """The logits [S, V], or the reward [1], that the model itself gives to a row of tokens."""
    rough = model.module.dtype == torch.bfloat16
    # A reward model's last layer may be float32 where all else is bfloat16: autocast joins them.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=rough):
        return model.module(torch.tensor([row], device=model.device)).logits[0].float()
