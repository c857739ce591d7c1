"""What the scripts share: batches, sampling, log-probs, reward scores, evaluation.

P prompts per step, N responses per prompt; R rows fed to a model, S slots per row, Q queries; D
hidden size, V vocabulary. Log-probs are in nats, in float32, at the sampling temperature.

One idea shapes this file: a prompt is computed once, not once for each of its responses. A row is

    [ prompt | response 1 | response 2 | ... | response w ]

with three numbers for each slot: the token; its `segment` (0 = prompt, i = i-th response of the
row, -1 = padding); and its `position`, which restarts behind the prompt for every response. A token
sees the prompt and its own response, up to itself: `_attention_mask`. A model that gives other
numbers this way is fed plain rows, of one response each.

Outside of this file a batch is prompts and lists of token ids; nothing padded leaves it. All
randomness is a function of (seed, step, rank), so a resumed run needs no random state.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plumbing.check import choose_graph, choose_rows, require_single_texts
from plumbing.data import (
    Layout,
    Prompt,
    decode_behind,
    encode_behind,
    load_prompts,
    pick,
    policy_layout,
    reward_layout,
)
from plumbing.models import (
    Model,
    frozen_copy,
    gathered,
    is_function,
    load_causal_lm,
    load_classifier,
    load_critic,
    load_function,
    load_tokenizer,
    shard,
)
from plumbing.run import Run, parse_args, require, seed_of

__all__ = [
    "Run",
    "frozen_copy",
    "load_prompts",
    "load_tokenizer",
    "parse_args",
    "pick",
    "shard",
]  # for the scripts

CHUNK = 2**22  # logits in one chunk of the vocabulary head, 16 MiB
GPU_CHUNK = 2**27  # the same on a GPU, 512 MiB: each chunk reads, casts and adds the head's weights
MOST_LOGITS = 2**25  # kept for the backward pass, 128 MiB; of more, none is kept
DRAWN = 8  # prompts sampled for at once, per prompt of --micro-batch: no activations are kept
MOST_ENDED = 0.25  # of the responses being sampled: as many must have ended for them to leave


# ── A batch ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Batch:
    """P prompts with N responses each, as lists of token ids, end token included.

    `batch[rows]` cuts out prompts with all their responses. What belongs to tokens is [P, N, T], 0
    behind a response's end; T is the same for all parts of a batch.
    """

    prompts: list[Prompt]
    responses: list[list[list[int]]]  # [P][N]
    sampled_logprobs: Tensor | None = None  # [P, N], as drawn; of sampled batches only
    longest: int = 0  # T, the tokens of the longest response, which a part may lack

    def __post_init__(self):
        self.longest = self.longest or int(self.lengths().max())

    def __getitem__(self, rows: slice) -> "Batch":
        logprobs = None if self.sampled_logprobs is None else self.sampled_logprobs[rows]
        return Batch(self.prompts[rows], self.responses[rows], logprobs, self.longest)

    def beside(self, other: "Batch") -> "Batch":
        """The same prompts with the responses of both batches."""
        responses = [ours + theirs for ours, theirs in zip(self.responses, other.responses)]
        sampled = [self.sampled_logprobs, other.sampled_logprobs]
        logprobs = None
        if all(part is not None for part in sampled):
            logprobs = torch.cat(sampled, dim=1)
        return Batch(self.prompts, responses, logprobs)

    def choose(self, which: Tensor) -> "Batch":
        """The responses with the indices `which` [P, K], in that order."""
        pairs = zip(self.responses, which.tolist())
        responses = [[group[i] for i in chosen] for group, chosen in pairs]
        sampled = self.sampled_logprobs
        logprobs = None if sampled is None else sampled.gather(1, which)
        return Batch(self.prompts, responses, logprobs)

    def lengths(self) -> Tensor:
        """Tokens per response, [P, N], on the CPU."""
        return torch.tensor([[float(len(ids)) for ids in group] for group in self.responses])

    def mask(self) -> Tensor:
        """[P, N, T] True at the tokens of a response, False behind its end, on the CPU."""
        return torch.arange(self.longest) < self.lengths()[:, :, None]

    def ended(self, end_tokens: list[int]) -> Tensor:
        """[P, N] True where a response closes with an end token, False where it was cut."""
        return torch.tensor([[ids[-1] in end_tokens for ids in group] for group in self.responses])


def encode_responses(
    tokenizer, policy: Model, prompts: list[Prompt], texts: list[list[str]], max_tokens: int
) -> Batch:
    """Batch of given responses, texts [P][N], as the policy would sample them.

    They are closed by its usual end token, and cut to `max_tokens` and to its context.
    """
    responses = []
    for prompt, group in zip(prompts, texts):
        ids = encode_behind(tokenizer, prompt.text, group)
        closed = [up_to_end([*row, policy.end_tokens[0]], policy.end_tokens) for row in ids]
        most = min(max_tokens, policy.context - len(prompt.tokens))
        responses.append([row[:most] for row in closed])
    return Batch(prompts, responses)


def up_to_end(ids: list[int], end_tokens: list[int]) -> list[int]:
    """The tokens up to and including the first end token, or all of them."""
    for place, token in enumerate(ids, 1):
        if token in end_tokens:
            return ids[:place]
    return ids


def micro_batches(count: int, size: int, first: int = 0) -> list[slice]:
    """Slices of at most `size` prompts that cover `count` prompts from `first` on; size 0 = all at
    once."""
    size, end = size or count, first + count
    return [slice(i, min(i + size, end)) for i in range(first, end, size)]


def require_finite(values: Tensor, what: str, batch: Batch, advice: str = "") -> None:
    """Ends the run, naming the prompt, if one of `values` [P] or [P, N] is NaN or infinite."""
    finite = values.isfinite().view(len(values), -1)
    for prompt, is_finite in zip(batch.prompts, finite.all(1).tolist()):
        message = f"{what} is NaN or infinite for the prompt {prompt.text!r}; checkpoint is kept"
        require(is_finite, f"{message}; {advice}" if advice else message)


# ── Rows: a batch as a model reads it ─────────────────────────────────────────────────────────────


@dataclass
class Rows:
    """R rows of S slots, and where in them the responses are. Padding is at the end of a row."""

    tokens: Tensor  # [R, S]
    segment: Tensor  # [R, S]
    position: Tensor  # [R, S]
    before: tuple[Tensor, Tensor]  # row and slot of the token before each response token
    last: tuple[Tensor, Tensor]  # row and slot of each response's last token, P · N of them


def _row_width(model: Model, prompt: int, response: float, n: int) -> int:
    """Responses per row, a divisor of n: as many as are together no longer than the prompt, or than
    twice the hidden size.

    Wide rows read the prompt less often, but attention costs the square of a row, also where one
    response is hidden from another. Up to about that length the model's weights cost more.
    """
    most = max(prompt, 2 * model.config.hidden_size) if model.shared_rows else 0
    widths = [width for width in range(1, n + 1) if n % width == 0]
    return max(width for width in widths if width == 1 or width * response <= most)


def _pack(model: Model, batch: Batch) -> Rows:
    """The batch in rows without gaps between responses."""
    tokens, segment, position = [], [], []
    before, last = ([], []), ([], [])
    longest = max(len(prompt.tokens) for prompt in batch.prompts)
    n = len(batch.responses[0])
    width = _row_width(model, longest, batch.lengths().mean().item(), n)
    for prompt, responses in zip(batch.prompts, batch.responses):
        length = len(prompt.tokens)
        for start in range(0, n, width):
            row = len(tokens)
            tokens.append(list(prompt.tokens))
            segment.append([0] * length)
            position.append(list(range(length)))
            for i, response in enumerate(responses[start : start + width], 1):
                first = len(tokens[row])
                slots = [length - 1, *range(first, first + len(response))]  # prompt's last, its own
                before[0].extend([row] * len(response))
                before[1].extend(slots[:-1])
                last[0].append(row)
                last[1].append(slots[-1])
                tokens[row] += response
                segment[row] += [i] * len(response)
                position[row] += range(length, length + len(response))
    return Rows(
        tokens=_pad(tokens, 0, model.device),
        segment=_pad(segment, -1, model.device),
        position=_pad(position, 0, model.device),
        before=tuple(_integers(before, model.device)),
        last=tuple(_integers(last, model.device)),
    )


def _pad(rows: list[list[int]], fill: int, device: torch.device, left: bool = False) -> Tensor:
    """The rows as one tensor [R, S], padded on the right or on the left."""
    longest = max(len(row) for row in rows)
    padding = [[fill] * (longest - len(row)) for row in rows]
    pairs = zip(padding, rows) if left else zip(rows, padding)
    return _integers([first + second for first, second in pairs], device)


def _integers(values: list, device: torch.device) -> Tensor:
    """A tensor of a list, or of a list of lists; `torch.tensor` alone takes five times as long."""
    return torch.from_numpy(numpy.array(values, dtype=numpy.int64)).to(device)


def _attention_mask(
    model: Model, segment: Tensor, position: Tensor, asking: slice, groups: int = 1
) -> Tensor | dict[str, Tensor]:
    """What to add to the attention scores, [R, 1, groups · Q, S], of the slots `asking` for all S
    slots, as often as `groups` says; by type of layer where only some have a window.

    On plain rows, whose masks the library makes, 1 for each slot [R, S] that is no padding.
    """
    if not model.shared_rows:
        return (segment >= 0).long()
    place = position[:, asking].repeat(1, groups)[:, :, None]  # [R, Q, 1]
    own = segment[:, asking].repeat(1, groups)[:, :, None] == segment[:, None]  # [R, Q, S]
    visible = (position[:, None] <= place) & (own | (segment == 0)[:, None])

    def additive(visible: Tensor) -> Tensor:
        # A GPU's attention would copy, in each layer, a mask whose rows do not begin at 16 bytes.
        shape = *visible.shape[:2], -(-visible.shape[2] // 8) * 8
        mask = torch.zeros(shape, dtype=model.compute_dtype, device=visible.device)
        mask = mask[..., : visible.shape[2]]
        return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]

    if not model.window:
        return additive(visible)
    # A window counts positions, not slots: response w lies many slots behind its prompt.
    windowed = additive(visible & (position[:, None] > place - model.window))
    if not model.layer_types:
        return windowed
    return {"full_attention": additive(visible), "sliding_attention": windowed}


def _states(model: Model, tokens: Tensor, segment: Tensor, position: Tensor) -> Tensor:
    """What `_forward` gives for whole rows, of three [R, S]."""
    mask = _attention_mask(model, segment, position, slice(None))
    return _forward(model, tokens, position, mask)


def _forward(model: Model, tokens: Tensor, position: Tensor, mask, cache=None) -> Tensor:
    """Last hidden states [R, Q, D] of `tokens` at `position`, [R, Q] each, with what
    `_attention_mask` gives for all slots up to the last of them.

    Of a language model whose head we cannot apply, its own logits [R, Q, V] instead.
    """
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": position,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    with model.autocast():
        if model.own_head and not model.scores_tokens:
            return model.module(**inputs).logits
        return model.module.base_model(**inputs).last_hidden_state


def _logits(model: Model, states: Tensor) -> Tensor:
    """Logits [..., V] in float32 of what `_forward` gave."""
    if model.own_head:
        return states.float()
    with model.autocast():
        logits = model.module.get_output_embeddings()(states)
        if model.logit_scale != 1:
            logits = logits * model.logit_scale
        if model.logit_cap:
            logits = torch.tanh(logits / model.logit_cap) * model.logit_cap
    return logits.float()


# ── Log-probs ─────────────────────────────────────────────────────────────────────────────────────


def token_logprobs_and_entropy(
    model: Model, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of each token of each response, [P, N, T] each, in nats: its log-prob, with gradient, and the
    entropy of the distribution that it is from, without (0 where no gradient is asked for).

    The end token counts once, nothing after it counts: the sum over the tokens is the response's.
    """
    return model(_read_tokens, batch, temperature)


def logprobs_and_entropy(model: Model, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """The same, summed over the tokens of each response, [P, N] each."""
    logprobs, entropy = token_logprobs_and_entropy(model, batch, temperature)
    return logprobs.sum(2), entropy.sum(2)


def _read_tokens(model: Model, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    rows = _pack(model, batch)
    states = _states(model, rows.tokens, rows.segment, rows.position)  # [R, S, D]
    states = states[rows.before]  # [tokens, D]
    targets = [token for group in batch.responses for ids in group for token in ids]
    targets = _integers(targets, model.device)
    logprobs, entropy = _read_in_chunks(model, states, targets, temperature)  # [tokens]
    return _by_response(batch, logprobs), _by_response(batch, entropy)


def _by_response(batch: Batch, values: Tensor) -> Tensor:
    """What belongs to all tokens of a batch, [tokens], as [P, N, T]."""
    mask = batch.mask().to(values.device)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _read_in_chunks(
    model: Model, states: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` [tokens] and entropies, of the distributions that `states` give.

    The logits of all tokens at once would be the peak of memory, so the head runs in chunks. If
    there are too many to keep, the backward pass computes them again.
    """
    vocabulary = model.config.vocab_size
    # Chunks of fewer than 256 tokens would be bound by reading the head's weights.
    chunk = CHUNK if model.device.type == "cpu" else GPU_CHUNK
    size = max(256, chunk // vocabulary)
    read = partial(_read, model, temperature)
    if len(targets) * vocabulary > MOST_LOGITS:
        read = partial(checkpoint, read, use_reentrant=False)
    logprobs, entropy = [], []
    for some_states, some_targets in zip(states.split(size), targets.split(size)):
        some_logprobs, some_entropy = read(some_states, some_targets)
        logprobs.append(some_logprobs)
        entropy.append(some_entropy)
    return torch.cat(logprobs), torch.cat(entropy)


def _read(
    model: Model, temperature: float, states: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = _logits(model, states)
    if temperature != 1:
        logits = logits / temperature
    logprobs = F.log_softmax(logits, dim=-1)
    entropy = torch.zeros_like(logprobs[:, 0])
    if torch.is_grad_enabled():
        finite = logprobs.detach().clamp(min=torch.finfo(torch.float32).min)  # 0 · log 0 = 0
        entropy = -torch.linalg.vecdot(finite.exp(), finite)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


@torch.no_grad()
def token_logprobs(model: Model, batch: Batch, temperature: float, micro_batch: int = 0) -> Tensor:
    """Log-probs [P, N, T] of the tokens, without gradient, `micro_batch` prompts per pass."""
    parts = [batch[rows] for rows in micro_batches(len(batch.prompts), micro_batch)]
    return torch.cat([token_logprobs_and_entropy(model, part, temperature)[0] for part in parts])


def logprobs(model: Model, batch: Batch, temperature: float, micro_batch: int = 0) -> Tensor:
    """The same for the responses, [P, N]."""
    return token_logprobs(model, batch, temperature, micro_batch).sum(2)


def token_values(model: Model, batch: Batch, micro_batch: int = 0) -> Tensor:
    """Values [P, N, T] that a classifier gives to the state before each token, with gradient."""
    slices = micro_batches(len(batch.prompts), micro_batch)
    return torch.cat([model(_token_values, batch[rows]) for rows in slices])


def _token_values(model: Model, batch: Batch) -> Tensor:
    rows = _pack(model, batch)
    states = _states(model, rows.tokens, rows.segment, rows.position)  # [R, S, D]
    values = model.module.score(states[rows.before].float())  # [tokens, 1]
    return _by_response(batch, values[:, 0])


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sample(
    model: Model, prompts: list[Prompt], n: int, max_tokens: int, temperature: float, seed: int
) -> Batch:
    """n responses per prompt from softmax(logits / temperature) and nothing else.

    No top-k, no top-p, no penalty, whatever the checkpoint's generation defaults say. The batch
    holds the log-probs of the responses as they were drawn. How many prompts are sampled for at
    once changes nothing but rounding.
    """
    device = model.device
    shape = (max_tokens, len(prompts), n)
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)  # in [0, 1)
    with gathered(model):
        parts = [
            model(_sample, prompts[rows], u[:, rows], temperature)
            for rows in micro_batches(len(prompts), model.most_prompts)
        ]
    responses = [group for part in parts for group in part.responses]
    return Batch(prompts, responses, torch.cat([part.sampled_logprobs for part in parts]))


def _sample(model: Model, prompts: list[Prompt], u: Tensor, temperature: float) -> Batch:
    """The responses that u [T, P, N] draws.

    The prompt is computed once per row; each step feeds one token of each of the row's responses.
    """
    from plumbing.cache import make_cache  # late, as it imports transformers

    device = model.device
    max_tokens, count, n = u.shape
    first = max(len(prompt.tokens) for prompt in prompts)
    width = _row_width(model, first, max_tokens / 2, n)  # a row fills up as it goes
    tokens, segment, position = _prompt_rows(model, prompts, n // width)  # [R, L]
    cache = make_cache(model, first + max_tokens * width)
    mask = _attention_mask(model, segment, position, slice(None))
    # The prompt's last state speaks for all responses of the row: [R, 1, D], later [R, w, D].
    states = _forward(model, tokens, position, mask, cache)[:, -1:]
    # The slots that may come, [R, S] in all.
    response = torch.arange(1, width + 1, device=device).repeat(max_tokens)
    place = torch.arange(1, max_tokens + 1, device=device).repeat_interleave(width)
    segment = torch.cat([segment, response.expand(len(tokens), -1)], 1)
    position = torch.cat([position, position[:, -1:] + place], 1)

    which = torch.arange(count * n, device=device).view(-1, width)
    rows = Decoding(model, temperature, cache, first, u.flatten(1), which, segment, position)
    _draw_next(rows, states)
    running = torch.ones(count * n, dtype=torch.bool, device=device)
    ends = torch.tensor(model.end_tokens, device=device)
    step = _make_step(rows)
    for t in range(1, max_tokens):
        # Asking a GPU how many have ended stalls it: ask at every eighth token.
        if device.type == "cpu" or t % 8 == 0:
            running &= ~torch.isin(rows.drawn[max(0, t - 8) : t], ends).any(0)
            going = running[rows.which].cpu()
            if not going.any():
                break
            if model.shared_rows and _leave(rows, going, t):
                step = _make_step(rows)
        step()
    responses = rows.drawn.T.view(count, n, max_tokens).tolist()
    responses = [[up_to_end(ids, model.end_tokens) for ids in group] for group in responses]
    ended = torch.isin(rows.drawn, ends).int()
    up_to_first = ended.cumsum(0) == ended  # [T, P · N]
    logprobs = rows.logprobs.where(up_to_first, 0).sum(0)
    return Batch(prompts, responses, logprobs.view(count, n))


@dataclass
class Decoding:
    """R rows of w responses each while they are sampled, and the S slots that they will fill.

    The slots behind the prompt go to the responses in turn: L + t · w + i is token t of response i.
    """

    model: Model
    temperature: float
    cache: object
    first: int  # slot behind the prompt, L
    u: Tensor  # [T, P · N] in [0, 1), which draws the tokens
    which: Tensor  # [R, w], a row's responses, of P · N
    segment: Tensor  # [R, S]
    position: Tensor  # [R, S]
    t: int | Tensor = 0  # the token to be drawn next
    mask: Tensor | None = None  # of the last slots, where a token's is a part of it

    def __post_init__(self):
        self.drawn = torch.zeros_like(self.u, dtype=torch.long)  # [T, P · N], the tokens
        self.logprobs = torch.zeros(self.u.shape, device=self.u.device)  # [T, P · N], theirs


def _leave(rows: Decoding, going: Tensor, t: int) -> bool:
    """Takes out what is not `going` [R, w] before token t, if it is enough; returns whether.

    All rows are of one width: those of which fewer responses are going keep ended ones.
    """
    most = (1 - MOST_ENDED) * going.numel()  # to be fed
    if going.sum() > most:
        return False
    stay = going.any(1).nonzero()[:, 0]
    before, width = going.shape[1], int(going.sum(1).max())
    if len(stay) * width > most:
        return False
    kept = going[stay].int().argsort(dim=1, descending=True, stable=True)[:, :width]
    both = torch.cat([stay[:, None], kept], 1).to(rows.u.device)  # one copy to a GPU
    stay, kept = both[:, 0], both[:, 1:]
    slots = torch.arange(rows.segment.shape[1], device=stay.device)
    own = (slots[rows.first :: before, None] + kept[:, None]).flatten(1)
    slots = torch.cat([slots[: rows.first].expand(len(stay), -1), own], 1)
    filled = slots[:, : rows.first + (t - 1) * width]
    for layer in rows.cache.layers:
        layer.keep(stay, filled, slots.shape[1])
    rows.which = rows.which[stay].gather(1, kept)
    rows.segment = rows.segment[stay].gather(1, slots)
    rows.position = rows.position[stay].gather(1, slots)
    rows.t = t
    return True


def _make_step(rows: Decoding) -> Callable[[], None]:
    """What feeds the last token of each response and draws the next one."""
    from plumbing.cache import Recorded

    if not rows.model.cuda_graph:
        rows.mask = None
        if not rows.model.window:  # each token's is the last one's, cut where its own slots end
            last = slice(-rows.which.shape[1], None)
            rows.mask = _mask(rows, last)
        return partial(_growing_step, rows)
    rows.t = torch.tensor([rows.t], device=rows.u.device)
    return Recorded(partial(_static_step, rows))


def _growing_step(rows: Decoding) -> None:
    """Attention sees the slots that are filled, of which each step has more."""
    width = rows.which.shape[1]
    filled = rows.first + rows.t * width
    now = slice(filled - width, filled)
    mask = _mask(rows, now, filled) if rows.mask is None else rows.mask[..., :filled]
    _feed_last(rows, rows.position[:, now], mask)


def _static_step(rows: Decoding) -> None:
    """The same in shapes that never change, and without a number of the host's: attention sees all
    slots, and the mask hides those behind the ones that this step fills, by their position."""
    width = rows.which.shape[1]
    slots = torch.arange(rows.first, rows.first + width, device=rows.u.device)
    slots = slots + (rows.t - 1) * width
    for layer in rows.cache.layers:
        layer.slots = slots
    _feed_last(rows, rows.position[:, slots], _mask(rows, slots))


def _mask(rows: Decoding, asking: slice | Tensor, end: int | None = None):
    segment, position = rows.segment[:, :end], rows.position[:, :end]
    return _attention_mask(rows.model, segment, position, asking, rows.model.groups)


def _feed_last(rows: Decoding, position: Tensor, mask) -> None:
    token = rows.drawn[rows.t - 1, rows.which]  # [R, w]
    _draw_next(rows, _forward(rows.model, token, position, mask, rows.cache))


def _draw_next(rows: Decoding, states: Tensor) -> None:
    now, logits = (rows.t, rows.which), _logits(rows.model, states)
    rows.drawn[now], rows.logprobs[now] = _draw(logits, rows.temperature, rows.u[now])
    rows.t += 1


def _prompt_rows(model: Model, prompts: list[Prompt], copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, segment, position) [R, L] of each prompt `copies` times, padded on the left."""
    pad = partial(_pad, device=model.device, left=True)
    rows = [prompt.tokens for prompt in prompts for _ in range(copies)]
    segment = [[0] * len(row) for row in rows]
    position = [list(range(len(row))) for row in rows]
    return pad(rows, 0), pad(segment, -1), pad(position, 0)


def _draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R, w] and their log-probs, from logits [R, 1 or w, V] and u [R, w] in [0, 1).

    Inverse transform sampling: the first token whose cumulative probability passes u. It needs one
    random number per token, where Gumbel noise needs one per word of the vocabulary.
    """
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    u = u.view(logits.shape[0], logits.shape[1], -1)
    u = u * (1 - 2**-52) * cumulative[..., -1:]  # stays below the sum
    token = torch.searchsorted(cumulative, u, right=True)
    return token.flatten(1), logprobs.gather(-1, token).flatten(1)


# ── Rewards ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class RewardModel:
    """What gives a reward, how it reads text, and how the policy writes it.

    A sequence classifier with one label, or a Python function of texts.
    """

    policy_tokenizer: object
    policy_ends: list[int]
    device: torch.device
    function: Callable | None = None
    model: Model | None = None
    layout: Layout | None = None
    add_end: bool = True  # close a response that ended, as the reward model was trained to see it
    same_tokens: bool = False  # the policy's tokens need no translation
    missing_eos_penalty: float = 0.0  # taken off the reward of a response that was cut


@torch.no_grad()
def score(reward_model: RewardModel, batch: Batch, micro_batch: int = 0) -> Tensor:
    """Rewards [P, N] in reward units, `micro_batch` prompts per pass; ends the run if one is NaN.

    Equal responses to a prompt get equal rewards, those of the first: rounding depends on where in
    its row a response stands, and would decide ties.
    """
    parts = []
    for rows in micro_batches(len(batch.prompts), micro_batch):
        part = batch[rows]
        if reward_model.function:
            parts.append(_rewards_by_function(reward_model, part))
        elif reward_model.model.scores_tokens:
            parts.append(reward_model.model(_rewards, _as_read_by(reward_model, part)))
        else:
            texts = _texts(reward_model, part)
            inputs = reward_model.layout, part.prompts, texts
            parts.append(reward_model.model(_rewards_of_pairs, *inputs))
    rewards = torch.cat(parts).to(reward_model.device)
    require_finite(rewards, "the reward", batch)
    first = [[group.index(ids) for ids in group] for group in batch.responses]
    rewards = rewards.gather(1, torch.tensor(first, device=rewards.device))
    was_cut = ~batch.ended(reward_model.policy_ends).to(rewards.device)
    return rewards - reward_model.missing_eos_penalty * was_cut


def _open(reward_model: RewardModel, group: list[list[int]]) -> list[list[int]]:
    """The responses to a prompt without the end tokens that close them."""
    return [ids[:-1] if ids[-1] in reward_model.policy_ends else ids for ids in group]


def _texts(reward_model: RewardModel, batch: Batch) -> list[list[str]]:
    """The responses as text, [P][N], without the end token."""
    tokenizer = reward_model.policy_tokenizer
    return [
        decode_behind(tokenizer, prompt.tokens, _open(reward_model, group))
        for prompt, group in zip(batch.prompts, batch.responses)
    ]


def _as_read_by(reward_model: RewardModel, batch: Batch) -> Batch:
    """The batch in the reward model's own tokens and chat template.

    A response that has too many of these for its context is cut there.
    """
    layout, prompts, responses = reward_model.layout, [], []
    for prompt, group in zip(batch.prompts, batch.responses):
        ended = [ids[-1] in reward_model.policy_ends for ids in group]
        text, closing = layout.around(prompt.source)
        if reward_model.same_tokens and text == prompt.text:
            group = _open(reward_model, group)
        else:
            (texts,) = _texts(reward_model, Batch([prompt], [group]))
            if layout.turns(prompt.source):  # behind a turn's begin no space is due
                texts = [text.lstrip() for text in texts]
            prompt = replace(prompt, text=text, tokens=layout.encode(prompt.source, text))
            group = encode_behind(layout.tokenizer, text, texts)
        if reward_model.add_end:
            group = [ids + closing if end else ids for ids, end in zip(group, ended)]
        room = reward_model.model.context - len(prompt.tokens)
        prompts.append(prompt)
        responses.append([ids[:room] for ids in group])
    return Batch(prompts, responses)


def _rewards(model: Model, batch: Batch) -> Tensor:
    """Rewards [P, N] in float32, read at each response's last token."""
    rows = _pack(model, batch)
    states = _states(model, rows.tokens, rows.segment, rows.position)  # [R, S, D]
    rewards = model.module.score(states[rows.last].float())  # [P · N, 1]
    return rewards.view(len(batch.prompts), -1)


def _rewards_of_pairs(
    model: Model, layout: Layout, prompts: list[Prompt], texts: list[list[str]]
) -> Tensor:
    """Rewards [P, N] of a classifier that reads prompt and response as a pair of texts.

    These are encoders, as DeBERTa: their own head and special tokens are used, and what does not
    fit behind the prompt is cut.
    """
    firsts = [
        layout.around(prompt.source)[0] for prompt, group in zip(prompts, texts) for _ in group
    ]
    seconds = [text for group in texts for text in group]
    longest = min(model.context, layout.tokenizer.model_max_length)
    rows = layout.tokenizer(
        firsts,
        seconds,
        padding=True,
        truncation="only_second",
        max_length=longest,
        return_tensors="pt",
    )
    with model.autocast():
        rewards = model.module(**rows.to(model.device)).logits
    return rewards.float().view(len(prompts), -1)


def _rewards_by_function(reward_model: RewardModel, batch: Batch) -> Tensor:
    """Rewards [P, N] of a Python function, called with a list entry per response: the prompts as
    the data set has them, the texts of the responses and, if it needs a third argument, the data
    set's own completions."""
    texts = _texts(reward_model, batch)
    prompts = [prompt for prompt, group in zip(batch.prompts, texts) for _ in group]
    inputs = [[prompt.source for prompt in prompts], [text for group in texts for text in group]]
    parameters = inspect.signature(reward_model.function).parameters.values()
    needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if len(needed) > 2:
        inputs.append([prompt.reference for prompt in prompts])
    rewards = reward_model.function(*inputs)
    require(
        len(rewards) == len(prompts),
        f"--reward-model: its function gave {len(rewards)} rewards for {len(prompts)} responses",
    )
    return torch.tensor(rewards, dtype=torch.float32).view(len(batch.prompts), -1)


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load_policy(run: Run, tokenizer) -> Model:
    """The model of --policy, whole: `shard` spreads it once its copies are made."""
    end_token = policy_layout(run.args, tokenizer).end_token()
    policy = load_causal_lm(run.args, tokenizer, end_token, run.device)
    choose_rows("--policy", run.args.policy, policy, _tried)
    if run.args.cuda_graph:
        choose_graph(run.args.policy, policy, _tried)
    policy.mixed = run.device.type == "cuda" and run.args.dtype != "float32"
    policy.most_prompts = DRAWN * run.args.micro_batch
    return policy


def load_value_model(run: Run, policy: Model, tokenizer, name: str) -> Model:
    """The classifier `name`, to be trained, or the policy's own body with a head of zeros."""
    value = load_critic(run.args, policy, tokenizer, name)
    if name:
        choose_rows("--value-model", name, value, _tried)
    value.mixed = policy.mixed
    return shard(value)


def load_reward_model(run: Run, policy: Model, policy_tokenizer) -> RewardModel:
    """The frozen model of --reward-model, or the Python function that it names."""
    flag, name = "--reward-model", run.args.reward_model
    reward_model = RewardModel(policy_tokenizer, policy.end_tokens, run.device)
    reward_model.missing_eos_penalty = run.args.missing_eos_penalty
    if is_function(name):
        reward_model.function = load_function(name)
        return reward_model
    model, layout = load_classifier(run.args, run.device), reward_layout(run.args)
    if model.scores_tokens:
        choose_rows(flag, name, model, _tried)
    else:
        rewards = partial(_rewards_of_pairs, model, layout, [Prompt("One", [])])
        require_single_texts(flag, name, rewards)
    probe = "One, two."  # the same words split in the same way
    reward_model.same_tokens = (
        layout.tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        and layout.tokenizer(probe)["input_ids"] == policy_tokenizer(probe)["input_ids"]
    )
    reward_model.model, reward_model.layout = shard(model), layout
    reward_model.add_end = run.args.reward_eos
    return reward_model


def _tried(
    model: Model, prompts: list[Prompt], responses: list[list[list[int]]]
) -> tuple[list[list[list[int]]], Tensor]:
    """What the check at load compares: responses and their numbers.

    Of a classifier the rewards [P, N] of `responses`. Of a language model log-probs [2, P, N] of
    others: as they were drawn, through the cache, and as they are recomputed.
    """
    if not model.end_tokens:
        return responses, _rewards(model, Batch(prompts, responses))
    batch = sample(model, prompts, n=4, max_tokens=4, temperature=1.0, seed=0)
    return batch.responses, torch.stack([batch.sampled_logprobs, logprobs(model, batch, 1.0)])


# ── The step size ─────────────────────────────────────────────────────────────────────────────────


def step_size(args, update: int) -> float:
    """AdamW's step size of an update, counted from 1.

    It grows linearly to --lr in the warm-up, then stays, or falls to 0, which the update behind the
    last one would have: on a line, or as half a cosine.
    """
    warmup = max(1, args.warmup_steps)
    behind = args.steps * args.updates_per_sample * args.minibatches + 1
    left = min(1.0, (behind - update) / max(1, behind - warmup))
    share = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return args.lr * min(1.0, update / warmup) * share[args.lr_schedule]


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def score_references(
    run: Run, policy: Model, reward_model: RewardModel, prompts: list[Prompt]
) -> list[Prompt]:
    """The prompts with the rewards of their references if all have one, cut as samples are.

    It prints what both models read of the first.
    """
    tokenizer, layout = reward_model.policy_tokenizer, reward_model.layout
    encode = partial(encode_responses, tokenizer, policy, max_tokens=run.args.max_response_tokens)
    first = encode(prompts[:1], [[prompts[0].reference or ""]])
    _say_input("--policy", tokenizer, first)
    if layout:
        _say_input("--reward-model", layout.tokenizer, _as_read_by(reward_model, first))
    if any(prompt.reference is None for prompt in prompts):
        return prompts
    scored = []
    for rows in micro_batches(len(prompts), 2 * run.args.prompts_per_step):
        batch = encode(prompts[rows], [[prompt.reference] for prompt in prompts[rows]])
        rewards = score(reward_model, batch, run.args.micro_batch)[:, 0].tolist()
        scored += [replace(p, reference_reward=reward) for p, reward in zip(prompts[rows], rewards)]
    return scored


def _say_input(flag: str, tokenizer, batch: Batch) -> None:
    tokens = batch.prompts[0].tokens + batch.responses[0][0]
    print(f"{flag} reads {tokenizer.decode(tokens)!r}")


def evaluate(
    run: Run, step: int, policy: Model, ref: Model, reward_model: RewardModel, prompts: list[Prompt]
) -> tuple[dict, list[dict]]:
    """(metrics, samples): one response per held-out prompt, against the data set's own completion.

    The noise is the same at every evaluation; eval/kl is the policy's KL from `ref`. Metrics are
    means over all processes, samples are this one's. A process with a prompt less repeats one,
    uncounted: a sharded model needs equally many passes on each process.
    """
    args, values, samples = run.args, defaultdict(list), []
    count = len(prompts[run.rank :: run.world])
    equal = len(prompts) + -len(prompts) % run.world
    mine = (prompts * run.world)[:equal][run.rank :: run.world]
    size = 4 * args.prompts_per_step // run.world
    for rows in micro_batches(len(mine), size):
        part = mine[rows]
        seed = seed_of(args.seed, "evaluate", run.rank, rows.start)
        batch = sample(policy, part, 1, args.max_response_tokens, args.temperature, seed)
        kl = logprobs(policy, batch, args.temperature, args.micro_batch)
        kl = kl - logprobs(ref, batch, args.temperature, args.micro_batch)
        rewards = score(reward_model, batch, args.micro_batch)[:, 0].tolist()
        values["reward"] += rewards
        values["kl"] += kl[:, 0].tolist()
        values["length"] += batch.lengths()[:, 0].tolist()
        ended = batch.ended(policy.end_tokens)[:, 0].tolist()
        values["eos_rate"] += ended
        for prompt, (text,), reward, end in zip(part, _texts(reward_model, batch), rewards, ended):
            theirs = prompt.reference_reward
            if theirs is not None:
                won = (reward > theirs) + 0.5 * (reward == theirs)
                values["win_rate"].append(won)
                values["won_squared"].append(won**2)
                values["won_and_ended"].append(won * end)
            line = {"step": step, "prompt": prompt.text, "response": text, "ended": end}
            line |= {"reward": reward, "reference": prompt.reference, "reference_reward": theirs}
            samples.append(line)
    means = {}
    for name, parts in values.items():
        total = run.world * torch.tensor(parts[:count], dtype=torch.float64).sum()
        means[name] = run.average(total).item() / len(prompts)
    if "win_rate" in means:
        variance = means.pop("won_squared") - means["win_rate"] ** 2
        means["win_rate_se"] = (max(0.0, variance) / len(prompts)) ** 0.5
        won_and_ended = means.pop("won_and_ended")
        if means["eos_rate"]:
            means["win_rate_ended"] = won_and_ended / means["eos_rate"]
    return {f"eval/{name}": mean for name, mean in means.items()}, samples[:count]


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, proposal_logprobs: Tensor) -> dict:
    """kl/ref (k1) and kl/k3, in nats per response: the policy's KL from the reference, [P, N] each.

    The samples are the proposal's; self-normalised importance weights turn them into the policy's.
    """
    weights = torch.softmax((logprobs - proposal_logprobs).double(), dim=1)
    ratio = (ref_logprobs - logprobs).double()
    return {
        "kl/ref": (weights * -ratio).sum(1).mean(),
        "kl/k3": (weights * (ratio.exp() - 1 - ratio)).sum(1).mean(),
    }


def sampling_gap(batch: Batch, proposal_logprobs: Tensor) -> dict:
    """kl/sampling_gap, in nats per response: how far the log-probs as drawn are, on average, from
    those of the same model recomputed. More than rounding shows a broken sampler.

    Responses of the data set were not drawn, and have none.
    """
    if batch.sampled_logprobs is None:
        return {}
    return {"kl/sampling_gap": (batch.sampled_logprobs - proposal_logprobs).abs().mean()}


def say_effective_samples(rewards: Tensor, flag: str, temperature: float) -> None:
    """Prints how many of the first samples count in a target exp(r / τ), of rewards r [P, N] and
    the τ of `flag`, and which τ would leave half of them: 1 / Σ weight², mean over the prompts."""
    n = rewards.shape[1]
    spread = rewards.std(1, correction=0).mean().item()
    if spread == 0:
        print(f"reward/std 0: all samples of a prompt have the same reward, whatever {flag}")
        return
    # From a thousandth to a thousand times the spread, in steps of 1 %, and the τ in use.
    grid = spread * torch.logspace(-3, 3, 1_400, dtype=torch.float64)
    tried = torch.cat([grid.new_tensor([temperature]), grid])
    weights = torch.softmax(rewards.double().cpu() / tried[:, None, None], dim=2)  # [τ, P, N]
    left = (1 / weights.square().sum(2)).mean(1)  # the larger τ, the more are left
    half = 1 + int((left[1:] < n / 2).sum())
    print(
        f"reward/std {spread:.3g}: {flag} {temperature} leaves {left[0]:.1f} of {n} samples, "
        f"{flag} {tried[half]:.2g} would leave {left[half]:.1f}"
    )
