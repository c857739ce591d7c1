"""What all scripts need and none explains: batches, sampling, log-probs, rewards, evaluation.

P prompts a step, N samples a prompt, L prompt tokens, T response tokens, S slots of a row, Q of
them asking, D hidden size, V vocabulary. Log-probs: nats, fp32, at the sampling temperature.

One idea shapes every signature: a prompt is held ONCE, with its N responses beside it. A row fed to
a model is [prompt | response 1 | … | response w], with as many of the N as is cheapest; the mask
lets a response see the prompt and itself only, and position ids restart after the prompt. A model
that gives other numbers is fed plain rows.
All randomness is a function of (seed, step, rank): a resumed run needs no random state.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from prompts import Prompt, encode_prompt, load_prompts, pick, seed_of  # noqa: F401 - for scripts
from runlog import load, require
from shards import through

FEWEST_ROWS, CHUNK = 256, 2**22  # tokens of a chunk of the head, and logits of larger ones
MOST_LOGITS = 2**25  # kept for the backward pass, in fp32: 128 MiB; of more, none is kept
FEW_ROWS, LARGE = 32, 2**16  # rows and weights of a product that is turned round on a CPU
MOST_ENDED = 0.25  # of the rows that are sampled: as many have to end for them to leave

def require_finite(values: Tensor, what: str, batch: "Batch") -> None:
    """Ends the run, naming the prompt, if one of `values` [P] or [P, N] is NaN or infinite."""
    for prompt, ok in zip(batch.prompts, values.isfinite().view(len(values), -1).all(1).tolist()):
        require(ok, f"{what} is NaN or infinite for the prompt {prompt.text!r}; checkpoint is kept")

# ── A batch: P prompts, each held once, N responses beside each ───────────────────────────────────
@dataclass
class Batch:
    """`batch[rows]` cuts out prompts with all their responses, and padding none of them needs."""
    prompts: list[Prompt]
    prompt_tokens: Tensor  # [P, L] left-padded
    prompt_mask: Tensor  # [P, L] True on prompt tokens
    response_tokens: Tensor  # [P, N, T] right-padded
    response_mask: Tensor  # [P, N, T] True up to and including the first end token

    def __getitem__(self, rows: slice) -> "Batch":
        part = [getattr(self, field.name)[rows] for field in fields(self)]
        longest = int(part[2].sum(1).max())
        return Batch(part[0], part[1][:, -longest:], part[2][:, -longest:], *part[3:])

    def beside(self, other: "Batch") -> "Batch":
        """The same prompts with the responses of both batches."""
        longest = max(self.response_mask.shape[2], other.response_mask.shape[2])
        both = [[F.pad(x, (0, longest - x.shape[2])) for x in (y.response_tokens, y.response_mask)]
                for y in (self, other)]
        both = (torch.cat(x, 1) for x in zip(*both))
        return Batch(self.prompts, self.prompt_tokens, self.prompt_mask, *both)

def pad(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, mask), [rows, longest] each. Token 0 fills up: a mask, never a token, hides it."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, side)
    return tokens.clamp(min=0).to(device), (tokens >= 0).to(device)

def make_batch(prompts: list[Prompt], prompt_ids: list[list[int]],
               response_ids: list[list[list[int]]], device: torch.device) -> Batch:
    """Batch of P prompts from their token lists [P] and those of their responses [P][N]."""
    responses = pad([ids for group in response_ids for ids in group], "right", device)
    responses = (x.view(len(prompts), len(response_ids[0]), -1) for x in responses)
    return Batch(prompts, *pad(prompt_ids, "left", device), *responses)

def encode_responses(tokenizer, policy, prompts: list[Prompt], texts: list[list[str]],
                     max_tokens: int | None = None) -> Batch:
    """Batch of given responses, texts [P][N], closed by one end token of the policy, then cut."""
    rows = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in group]
            for group in texts]
    ids = [[[*takewhile(lambda token: token not in policy.end_tokens, row), policy.end_tokens[0]]
            [:max_tokens] for row in group] for group in rows]
    return make_batch(prompts, [prompt.tokens for prompt in prompts], ids, policy.device)

def micro_batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` prompts that cover `count` prompts; size 0 = all at once."""
    return [slice(at, at + (size or count)) for at in range(0, count, size or count)]

# ── A row of a model: [prompt | response 1 | … | response w] ──────────────────────────────────────
def _row_width(model, prompt: int, response: float, n: int) -> int:
    """Responses a row holds: the divisor of n whose rows cost the least.

    A layer spends about 24 D² operations on a slot and 4 D on each pair of slots it attends, masked
    or not, so a row of S slots costs S · (6 D + S) in units of 4 D. Wide rows read the prompt
    less often, narrow ones pair fewer slots of different responses.
    """
    per_slot = 6 * model.config.get_text_config().hidden_size

    def cost(width: int) -> float:
        slots = prompt + width * response
        return n / width * slots * (per_slot + slots)

    return min((w for w in range(n, 0, -1) if n % w == 0), key=cost) if model.shared_rows else 1

def _forward(model, tokens: Tensor, start: int, prompt_mask: Tensor, owner: Tensor, offset: Tensor,
             cache: Cache | None = None) -> Tensor:
    """Last hidden states [R, Q, D] of `tokens` [R, Q], which fill the slots of R rows from `start`.

    Behind the prompt, a slot belongs to response `owner` (1 to w, 0 = to none) and lies `offset`
    tokens after the prompt, [R, S - L] both. A policy on plain rows gives logits [R, Q, V] instead.
    """
    asking = slice(start, start + tokens.shape[1])
    in_prompt = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    position = torch.cat([in_prompt, prompt_mask.sum(1, keepdim=True) + offset], 1)[:, :asking.stop]
    valid = torch.cat([prompt_mask, owner > 0], 1)[:, :asking.stop]  # [R, S]
    mask = valid.long()
    if model.shared_rows:
        segment = F.pad(owner, (prompt_mask.shape[1], 0))[:, :asking.stop]  # [R, S], 0 = prompt
        behind = position[:, asking, None] - position[:, None, :]  # [R, Q, S] tokens
        own = (segment == 0)[:, None] | (segment[:, asking, None] == segment[:, None])
        visible = (behind >= 0) & own & valid[:, None]
        mask, config = _additive(model, visible, asking), model.config.get_text_config()
        if getattr(config, "sliding_window", None):
            # A window counts position ids, not slots: response w lies many slots off its prompt.
            near = _additive(model, visible & (behind < config.sliding_window), asking)
            kinds = {"full_attention": mask, "sliding_attention": near}
            mask = kinds if getattr(config, "layer_types", None) else near
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position[:, asking],
              "past_key_values": cache, "use_cache": cache is not None}
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=model.mixed):
        if model.shared_rows or hasattr(model, "score"):
            return model.base_model(**inputs).last_hidden_state
        return model(**inputs).logits

def _additive(model, visible: Tensor, asking: slice) -> Tensor:
    """What to add to attention scores, [R, 1, Q, S]; slots see themselves, or padding was NaN."""
    itself = torch.eye(visible.shape[2], dtype=torch.bool, device=visible.device)[asking]
    dtype = torch.bfloat16 if model.mixed else model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~(visible | itself), torch.finfo(dtype).min)[:, None]

def _head(model, states: Tensor) -> Tensor:
    """Logits [..., V] in fp32 of what `_forward` gave."""
    if model.shared_rows:
        with torch.autocast(states.device.type, torch.bfloat16, enabled=model.mixed):
            states = model.get_output_embeddings()(states)
            cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            states = torch.tanh(states / cap) * cap if cap else states
    return states.float()

def _read_rows(model, batch: Batch, fed: Tensor) -> tuple[Tensor, Tensor]:
    """(states [slots, D], before [P, N, T + 1]) of the prompts and the response tokens in `fed`
    [P, N, T], a mask: states[before[..., i]] is what the model knows before response token i.

    The responses of a row lie one behind the other without gaps: padding costs nothing but at the
    end of rows shorter than the longest.
    """
    count, n, t = fed.shape
    width = _row_width(model, batch.prompt_tokens.shape[1], fed.sum().item() / (count * n), n)
    prompt, prompt_mask = (x.repeat_interleave(n // width, 0)
                           for x in (batch.prompt_tokens, batch.prompt_mask))
    fed, tokens = fed.reshape(-1, width, t), batch.response_tokens.reshape(-1, width, t)
    lengths, first = fed.sum(2), prompt.shape[1]
    size, begin = first + int(lengths.sum(1).max()), first + lengths.cumsum(1) - lengths  # [R, w]
    offset, owner, row = (torch.arange(x, device=fed.device) for x in (t + 1, width, len(prompt)))
    before = torch.where(offset > 0, begin[..., None] + offset - 1, first - 1)  # [R, w, T + 1]
    before += size * row[:, None, None]
    parts = (tokens, (owner + 1)[:, None].expand_as(fed), offset[:-1].expand_as(fed))
    rows = torch.zeros(3, len(prompt), size, dtype=torch.long, device=fed.device)
    rows.view(3, -1)[:, before[..., 1:][fed]] = torch.stack([part[fed] for part in parts])
    rows[0, :, :first] = prompt
    states = _forward(model, rows[0], 0, prompt_mask, *rows[1:, :, first:])
    return states.flatten(0, 1), before.view(count, n, t + 1)

def _last_states(model, batch: Batch) -> Tensor:
    """States [P, N, D] at each response's last token, even if it is the pad token."""
    states, before = _read_rows(model, batch, batch.response_mask)
    return states[before.gather(2, batch.response_mask.sum(2, keepdim=True))[..., 0]]

@through("blockwise")
def logprobs_and_entropy(model, batch: Batch, temperature: float,
                         with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Sums over each response's tokens, [P, N] each, in nats: its log-prob (with gradient), and the
    entropies of the next-token distributions it passed through (without; 0 if not asked for).

    The end token counts once, nothing after it counts. The vocabulary head runs on response tokens
    only, in chunks; if their logits are too many to keep, the backward pass computes them again.
    """
    mask, targets = batch.response_mask, batch.response_tokens[batch.response_mask]  # [tokens]
    states, before = _read_rows(model, batch, F.pad(mask[..., 1:], (0, 1)))  # all but the last
    states = states[before[..., :-1][mask]]  # [tokens, D]

    def read(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = _head(model, states)
        logprobs = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        entropy = torch.zeros_like(logprobs[:, 0])
        if with_entropy:
            finite = logprobs.detach().clamp(min=torch.finfo(torch.float32).min)  # 0 · log 0 = 0
            entropy = -torch.linalg.vecdot(finite.exp(), finite)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    vocabulary = model.config.get_text_config().vocab_size
    rows = max(FEWEST_ROWS, CHUNK // vocabulary)
    if len(targets) * vocabulary > MOST_LOGITS:
        read = partial(checkpoint, read, use_reentrant=False)
    pieces = [read(*piece) for piece in zip(states.split(rows), targets.split(rows))]
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy = (zeros.masked_scatter(mask, torch.cat(x)).sum(-1) for x in zip(*pieces))
    if logprobs.requires_grad:
        logprobs.register_hook(lambda grad: require_finite(grad, "the gradient", batch))
    return logprobs, entropy

@torch.no_grad()
def logprobs(model, batch: Batch, temperature: float, micro_batch: int = 0) -> Tensor:
    """Log-probs [P, N] of responses in nats, without gradient, `micro_batch` prompts a pass."""
    slices = micro_batches(len(batch.prompts), micro_batch)
    return torch.cat([logprobs_and_entropy(model, batch[s], temperature, False)[0] for s in slices])

class _GrowingLayer(StaticLayer):
    """A layer's keys and values in memory taken once; attention sees the filled slots, as a view:
    nothing is copied when a token is added."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.filled = 0
        new = slice(self.filled, self.filled + keys.shape[2])
        self.keys[:, :, new], self.values[:, :, new], self.filled = keys, values, new.stop
        return self.keys[:, :, : new.stop], self.values[:, :, : new.stop]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

@through("whole")
@torch.no_grad()
def sample(model, prompts: list[Prompt], n: int, max_tokens: int, temperature: float,
           seed: int) -> tuple[Batch, Tensor]:
    """Draws n responses a prompt from softmax(logits / temperature) and nothing else: no top-k, no
    top-p, no penalty, whatever the checkpoint's generation defaults say.

    The prompt is computed once a row; each step then feeds one token of each of the row's responses
    as queries of that row. Rows whose responses have all ended leave, with their cache, as soon as
    they are MOST_ENDED of those left. Returns the batch and, [P, N, T], the log-probs of its tokens
    as they were drawn (0 after the end).
    """
    device = model.device
    prompt, prompt_mask = pad([prompt.tokens for prompt in prompts], "left", device)
    width = _row_width(model, prompt.shape[1], max_tokens / 2, n)  # a row fills up as it goes
    row, mask = (x.repeat_interleave(n // width, 0) for x in (prompt, prompt_mask))
    owner = torch.arange(1, width + 1, device=device).repeat(len(row), max_tokens)
    offset = torch.arange(max_tokens, device=device).repeat_interleave(width).expand_as(owner)
    layer = partial(_GrowingLayer, row.shape[1] + owner.shape[1])
    cache = (Cache(layer_class_to_replicate=layer) if model.shared_rows
             else DynamicCache(config=model.config))
    generator = torch.Generator(device).manual_seed(seed)
    end = torch.tensor(model.end_tokens, device=device)
    left = torch.arange(len(row), device=device)  # rows with a response that has not ended
    shape = (len(row), width, max_tokens)
    tokens, drawn, alive = (torch.zeros(shape, dtype=dtype, device=device)
                            for dtype in (torch.long, torch.float32, torch.bool))
    alive[..., 0] = True
    states = _forward(model, row, 0, mask, owner, offset, cache)[:, -1:]
    for t in range(max_tokens):
        # [R, Q, V]; behind the prompt Q = 1 distribution serves all w responses, later Q = w.
        token_logprobs = F.log_softmax(_head(model, states) / temperature, dim=-1)
        # Inverse transform sampling: the first token whose cumulative probability passes u.
        cumulative = token_logprobs.exp().cumsum(-1, dtype=torch.float64)
        u = torch.rand(*shape[:2], dtype=torch.float64, device=device, generator=generator)
        u = u[left].view(*states.shape[:2], -1) * (1 - 2**-52)  # the product stays below the sum
        token = torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)
        now = alive[left, :, t]
        drawn[left, :, t] = token_logprobs.gather(-1, token).view_as(now).where(now, 0.0)
        tokens[left, :, t] = token = token.view_as(now).where(now, 0)
        now = now & ~torch.isin(token, end)
        if t + 1 == max_tokens:
            break
        alive[left, :, t + 1] = now
        # Asking a GPU how many have ended stalls it: ask at every eighth token.
        if device.type == "cpu" or t % 8 == 7:
            stay = now.any(1).nonzero()[:, 0]
            if len(stay) == 0:
                break
            if model.shared_rows and len(stay) <= (1 - MOST_ENDED) * len(left):
                cache.batch_select_indices(stay)
                left, token, mask, owner, offset = (
                    x[stay] for x in (left, token, mask, owner, offset))
        states = _forward(model, token, row.shape[1] + t * width, mask, owner, offset, cache)
    longest = int(alive.sum(-1).max())
    parts = [x[..., :longest].reshape(len(prompts), n, -1) for x in (tokens, alive, drawn)]
    return Batch(prompts, prompt, prompt_mask, *parts[:2]), parts[2]

def ended(model, batch: Batch) -> Tensor:
    """[P, N] True where a response closes with an end token, False where it was cut."""
    last = batch.response_tokens.gather(2, batch.response_mask.sum(2, keepdim=True) - 1)[..., 0]
    return torch.isin(last, torch.tensor(model.end_tokens, device=last.device))

# ── Rewards ───────────────────────────────────────────────────────────────────────────────────────
@dataclass
class RewardModel:
    """A sequence classifier with one label, its tokenizer, and the policy it reads from."""
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    policy: transformers.PreTrainedModel
    policy_tokenizer: transformers.PreTrainedTokenizerBase
    add_end: bool  # close a response that ended, as the reward model was trained to see it

    def __post_init__(self):  # the policy's tokens may need no translation
        own, theirs = ([tokenizer.get_vocab(), tokenizer("One, two."), tokenizer.chat_template]
                       for tokenizer in (self.tokenizer, self.policy_tokenizer))
        self.same_tokens = own == theirs

def read_as(judge: RewardModel, batch: Batch) -> Batch:
    """The batch in the reward model's own tokens and template."""
    own, closing = judge.tokenizer, judge.tokenizer.eos_token
    if batch.prompts[0].messages:  # a chat template closes the assistant's turn in its own way
        require(own.chat_template, f"--reward-model {own.name_or_path}: the data set holds chat "
                "messages, but its tokenizer has no chat template")
        turn = [*batch.prompts[0].messages, {"role": "assistant", "content": "<answer>"}]
        closing = own.apply_chat_template(turn, tokenize=False).rpartition("<answer>")[2]
    closing = own(closing, add_special_tokens=False)["input_ids"] * judge.add_end
    prompt_ids = [p.tokens if judge.same_tokens else encode_prompt(own, p.messages or p.text)[1]
                  for p in batch.prompts]
    response_ids = []
    finished = ended(judge.policy, batch).cpu()
    for tokens, mask, ends in zip(batch.response_tokens.cpu(), batch.response_mask.cpu(), finished):
        ids = [t[m].tolist()[: -1 if end else None] for t, m, end in zip(tokens, mask, ends)]
        if not judge.same_tokens:
            texts = judge.policy_tokenizer.batch_decode(ids, skip_special_tokens=True)
            ids = own(texts, add_special_tokens=False)["input_ids"]
        response_ids.append([i + closing * bool(end) for i, end in zip(ids, ends)])
    return make_batch(batch.prompts, prompt_ids, response_ids, judge.model.device)

@through("blockwise")
def _read_scores(model, batch: Batch) -> Tensor:
    """Rewards [P, N] in fp32, read at each response's last token."""
    longest = int((batch.prompt_mask.sum(1) + batch.response_mask.sum(2).amax(1)).max())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    require(longest <= limit, f"--reward-model: its context of {limit} tokens is shorter than a "
            f"prompt and response of {longest}; lower --max-prompt-tokens or --max-response-tokens")
    return model.score(_last_states(model, batch).float())[..., 0]

@torch.no_grad()
def score(judge: RewardModel, batch: Batch, micro_batch: int = 0) -> Tensor:
    """Rewards [P, N] in reward units, `micro_batch` prompts a pass. Equal responses to a prompt get
    equal ones, that of the first: rounding depends on where in its row a response lies."""
    slices = micro_batches(len(batch.prompts), micro_batch)
    rewards = torch.cat([_read_scores(judge.model, read_as(judge, batch[s])) for s in slices])
    tokens = batch.response_tokens.masked_fill(~batch.response_mask, -1)
    return rewards.gather(1, (tokens[:, :, None] == tokens[:, None]).all(-1).byte().argmax(2))

# ── Loading ───────────────────────────────────────────────────────────────────────────────────────
def load_tokenizer(flag: str, name: str):
    """The tokenizer of a checkpoint; it needs an end token, but no pad token."""
    tokenizer = load(flag, name, transformers.AutoTokenizer.from_pretrained)
    require(tokenizer.eos_token_id is not None, f"{flag} {name}: its tokenizer has no end token: "
            "no response could end; set eos_token in tokenizer_config.json")
    return tokenizer

def load_model(run, flag: str, name: str, auto_class, dtype: torch.dtype):
    """A model from safetensors, on the run's device, without dropout: it would break log-ratios."""
    model, info = load(flag, name, auto_class.from_pretrained, dtype=dtype, use_safetensors=True,
                       output_loading_info=True)
    require(not info["missing_keys"], f"{flag} {name}: a {type(model).__name__} needs "
            f"{', '.join(sorted(info['missing_keys'])[:3])}, which the checkpoint lacks")
    model.to(run.device).eval()
    if run.device.type == "cpu" and torch.backends.mkl.is_available():
        turn_products(model)
    model.mixed = dtype == torch.float32 and run.device.type == "cuda" and run.args.dtype == "mixed"
    _choose_rows(flag, name, model)
    return model

class _TurnedLinear(torch.nn.Linear):
    """x Wᵀ computed as (W xᵀ)ᵀ where x has few rows, as in a decoding step: MKL does the first far
    below the speed of memory, the second two to three times as fast. Not where W is small: it stays
    in the core's cache, and the turning costs more."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > FEW_ROWS * self.in_features:
            return super().forward(x)
        out = (self.weight @ x.reshape(-1, self.in_features).T).T.contiguous()
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

def turn_products(model) -> None:
    """Gives the model's large linear layers the forward of `_TurnedLinear`, and leaves weights."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.numel() >= LARGE:
            module.__class__ = _TurnedLinear

@torch.no_grad()
def _choose_rows(flag: str, name: str, model) -> None:
    """Sets `model.shared_rows` by trying: two padded prompts with two responses each must give what
    the model itself says at the end of each of the four rows alone."""
    config, device = model.config.get_text_config(), model.device
    ids = [i for i in (k * k % config.vocab_size for k in range(5, 60)) if i != config.pad_token_id]
    prompts, responses = [ids[:5], ids[5:8]], [[ids[8:12], ids[12:14]], [ids[14:18], ids[18:20]]]
    rows = [p + r for p, group in zip(prompts, responses) for r in group]
    batch = make_batch([Prompt("", p) for p in prompts], prompts, responses, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=model.mixed):
        own = [model(torch.tensor([row], device=device)).logits[0, -1].float() for row in rows]
    require(torch.stack(own).isfinite().all(), f"{flag} {name}: its weights give NaN or infinity")
    allowed = 1e-3 if model.dtype == torch.float32 and not model.mixed else 0.25
    for model.shared_rows in (True, False):
        try:
            states = _last_states(model, batch).flatten(0, 1)
            ours = model.score(states)[:, 0] if hasattr(model, "score") else _head(model, states)
            if (gap := (ours - torch.stack(own)).abs().max()) < allowed:
                return
            problem = f"off by {gap:.1e}"
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
            problem = f"{type(error).__name__} {error}"
        if model.shared_rows:
            print(f"{flag} {name}: no shared rows ({problem:.200}); a prompt is computed N times")
    require(False, f"{flag} {name}: padded rows do not give the numbers of single rows ({problem})")

def load_policy(run, tokenizer):
    """The model of --policy; its `end_tokens` are the tokens that end a response."""
    args, name = run.args, run.args.policy
    config = load("--policy", name, transformers.AutoConfig.from_pretrained).get_text_config()
    need = args.max_prompt_tokens + args.max_response_tokens
    limit = getattr(config, "max_position_embeddings", need)
    require(need <= limit, f"--policy {name}: its context of {limit} tokens is shorter than "
            f"--max-prompt-tokens + --max-response-tokens = {need}; lower one of them")
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    policy = load_model(run, "--policy", name, transformers.AutoModelForCausalLM, dtype)
    ends = policy.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    policy.end_tokens = list(dict.fromkeys(end for end in ends if end is not None))
    policy.generation_config = transformers.GenerationConfig(  # final/ samples as it was trained
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0,
        eos_token_id=policy.end_tokens, pad_token_id=tokenizer.pad_token_id)
    return run.shard(policy)

def load_reward_model(run, policy, policy_tokenizer) -> RewardModel:
    """The frozen RewardModel of --reward-model, in bfloat16 on a GPU."""
    flag, name = "--reward-model", run.args.reward_model
    labels = load(flag, name, transformers.AutoConfig.from_pretrained).num_labels
    require(labels == 1, f"{flag} {name}: num_labels is {labels}, but a reward is one number")
    tokenizer = load_tokenizer(flag, name)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    model = load_model(run, flag, name, transformers.AutoModelForSequenceClassification, dtype)
    require(hasattr(model, "score"), f"{flag} {name}: a {type(model).__name__} does not score the "
            "end of a text; take a decoder's sequence classifier")
    model.requires_grad_(False).score.float()  # bfloat16 rewards near 5 tie in steps of 0.03
    return RewardModel(run.shard(model), tokenizer, policy, policy_tokenizer, run.args.reward_eos)

# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────
def score_references(judge: RewardModel, prompts: list[Prompt], size: int) -> list[Prompt]:
    """The prompts with the rewards of their references, if all have one; `size` prompts a pass."""
    if any(prompt.reference is None for prompt in prompts):
        return prompts
    parts = (prompts[rows] for rows in micro_batches(len(prompts), size))
    rewards = torch.cat([score(judge, encode_responses(judge.policy_tokenizer, judge.policy, part, [
        [prompt.reference] for prompt in part])) for part in parts])[:, 0].tolist()
    return [replace(prompt, reference_reward=x) for prompt, x in zip(prompts, rewards)]

def evaluate(run, step: int, policy, ref, reward_model: RewardModel,
             prompts: list[Prompt]) -> tuple[dict, list[dict]]:
    """(metrics, samples): one response to each held-out prompt, drawn with the same noise at every
    evaluation, against the data set's own completion. eval/kl is the policy's KL from `ref`.
    Metrics are means over all processes, samples this one's. A process with a prompt less repeats
    one, uncounted: a sharded model needs as many passes on each of them."""
    args, count, totals, samples = run.args, len(prompts[run.rank :: run.world]), [], []
    equal = len(prompts) + -len(prompts) % run.world
    mine = (prompts * run.world)[run.rank : equal : run.world]
    for rows in micro_batches(len(mine), 4 * args.prompts_per_step // run.world):
        part = mine[rows]
        batch, _ = sample(policy, part, 1, args.max_response_tokens, args.temperature,
                          seed_of(args.seed, "evaluate", run.rank, rows.start))
        values = {"reward": score(reward_model, batch, args.micro_batch),
                  "kl": logprobs(policy, batch, args.temperature, args.micro_batch)
                  - logprobs(ref, batch, args.temperature, args.micro_batch),
                  "length": batch.response_mask.sum(2), "eos_rate": ended(policy, batch)}
        require_finite(values["reward"], "the reward", batch)
        if part[0].reference_reward is not None:
            theirs = torch.tensor([[prompt.reference_reward] for prompt in part], device=run.device)
            values["win_rate"] = (values["reward"] > theirs) + 0.5 * (values["reward"] == theirs)
        totals.append(values)
        texts = [reward_model.policy_tokenizer.decode(tokens[mask], skip_special_tokens=True) for
                 tokens, mask in zip(batch.response_tokens[:, 0], batch.response_mask[:, 0])]
        samples += [{"step": step, "prompt": prompt.text, "response": text, "reward": reward,
                     "reference": prompt.reference, "reference_reward": prompt.reference_reward}
                    for prompt, text, reward in zip(part, texts, values["reward"][:, 0].tolist())]
    sums = {name: torch.cat([x[name] for x in totals])[:count].double().sum() for name in totals[0]}
    return {f"eval/{name}": run.average(x / (len(prompts) / run.world)).item()
            for name, x in sums.items()}, samples[:count]
