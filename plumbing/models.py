"""Checkpoints become models: weights, precision, end tokens, copies, several processes.

`common` loads policy and reward model through here and checks how they must be fed; the scripts
make their frozen copies here. What is computed with a model stands in `common`.
"""

import copy
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from plumbing.run import found, require

FEW_ROWS, LARGE = 32, 2**16  # rows and weights of a product that is turned round on a CPU


class Model(torch.nn.Module):
    """A checkpoint's model, and what we know about it.

    model(function, *inputs) is function(model, *inputs): FSDP2 gathers weights around a call of a
    module, and log-probs or samples are made of more, or less, than the library's own call.
    """

    def __init__(self, module, end_tokens: list[int] = ()):
        super().__init__()
        self.module = module  # transformers' own
        self.end_tokens = list(end_tokens)  # each of them ends a response
        self.shared_rows = True  # all responses in one row with their prompt; else plain rows
        self.mixed = False  # float32 weights that compute in bfloat16
        self.config = module.config.get_text_config()
        self.context = _context(self.config)  # tokens, or None: no limit
        self.window = _known(self.config, "sliding_window")  # tokens a windowed layer looks back
        self.layer_types = _known(self.config, "layer_types")  # which are windowed, if not all
        # What some models do to their logits behind the head: Cohere, Granite, Gemma.
        self.logit_scale = _known(self.config, "logit_scale") or 1.0
        self.logit_scale /= _known(self.config, "logits_scaling") or 1.0
        self.logit_cap = _known(self.config, "final_logit_softcapping")

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.module.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which attention is computed."""
        return torch.bfloat16 if self.mixed else self.module.dtype

    def autocast(self):
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def forward(self, function, *inputs):
        """function(self, *inputs), with the weights gathered."""
        return function(self, *inputs)


def _known(config, name: str):
    """A value of a configuration, under the name that all architectures share, or None."""
    return getattr(config, name, None)


def _context(config) -> int | None:
    """How many tokens a model can read. Beyond the original length of a longrope model its numbers
    would depend on the longest row of the batch."""
    rope = _known(config, "rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return _known(config, "max_position_embeddings")


# ── Loading ───────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(flag: str, name: str):
    """The tokenizer of a checkpoint; it needs an end token, but no pad token."""
    from transformers import AutoTokenizer

    with found(flag, name) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    require(
        tokenizer.eos_token_id is not None,
        f"{flag} {name}: its tokenizer has no end token: no response could end; set eos_token in "
        "tokenizer_config.json",
    )
    return tokenizer


def _load_config(flag: str, name: str):
    from transformers import AutoConfig

    with found(flag, name) as path:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _load_module(flag: str, name: str, auto_class, dtype: torch.dtype, device: torch.device):
    """A model from safetensors, without dropout, which would break log-ratios."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with found(flag, name) as path:
        module, info = auto_class.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # else transformers would ask at a terminal
            output_loading_info=True,
        )
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    require(
        not missing,
        f"{flag} {name}: a {type(module).__name__} needs {missing}, which the checkpoint lacks",
    )
    module.to(device).eval()
    if device.type == "cpu" and torch.backends.mkl.is_available():
        turn_products(module)
    return module


def load_causal_lm(args, tokenizer, device: torch.device) -> Model:
    """The model of --policy, with its end tokens."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    flag, name = "--policy", args.policy
    config = _load_config(flag, name).get_text_config()
    need = args.max_prompt_tokens + args.max_response_tokens
    limit = _context(config) or need
    require(
        need <= limit,
        f"{flag} {name}: its context of {limit} tokens is shorter than --max-prompt-tokens + "
        f"--max-response-tokens = {need}; lower one of them",
    )
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    module = _load_module(flag, name, AutoModelForCausalLM, dtype, device)
    own = module.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    module.generation_config = GenerationConfig(  # final/ samples as it was trained
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Model(module, ends)


def load_classifier(args, device: torch.device) -> Model:
    """The frozen model of --reward-model, in bfloat16 on a GPU."""
    from transformers import AutoModelForSequenceClassification

    flag, name = "--reward-model", args.reward_model
    labels = _load_config(flag, name).num_labels
    require(labels == 1, f"{flag} {name}: num_labels is {labels}, but a reward is one number")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = _load_module(flag, name, AutoModelForSequenceClassification, dtype, device)
    require(
        hasattr(module, "score"),
        f"{flag} {name}: a {type(module).__name__} does not score the end of a text; take a "
        "decoder's sequence classifier",
    )
    module.requires_grad_(False).score.float()  # bfloat16 rewards near 5 tie in steps of 0.03
    return Model(module)


# ── Copies and several processes ──────────────────────────────────────────────────────────────────


def frozen_copy(model: Model) -> Model:
    """A copy that is not trained, spread over the processes. Make it before the model is spread."""
    return shard(copy.deepcopy(model).requires_grad_(False))


def shard(model: Model) -> Model:
    """Spreads the weights over all processes by FSDP2, in place; on one process does nothing.

    One group per block, one for the rest. Embeddings, last norm and head belong to the root: they
    stay gathered from the begin of a call of the model to its end, and again in the backward pass,
    since `common` calls body and head apart, and the head once more in the backward pass.
    """
    if not dist.is_initialized():
        return model
    from torch.distributed import fsdp

    blocks = _blocks(model)
    name = type(model.module).__name__
    require(blocks, f"a {name} has no list of blocks: run it on one process")
    mesh = dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    for module in (*blocks, model):
        precision = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    return model


def _blocks(model: Model) -> list[torch.nn.Module]:
    """The blocks of a model: its largest list of modules."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    return [*max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=())]


@contextmanager
def gathered(model: Model):
    """Weights stay whole after the first pass, so that each process may go on at its own pace."""
    parts = []
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


# ── A CPU's products ──────────────────────────────────────────────────────────────────────────────


class TurnedLinear(torch.nn.Module):
    """A linear layer whose x Wᵀ is computed as (W xᵀ)ᵀ where x has few rows, as in decoding.

    MKL does the first far below the speed of memory, the second two to three times as fast. Not
    where W is small: it stays in the core's cache, and the turning costs more.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        outputs, inputs = self.weight.shape
        if x.numel() > FEW_ROWS * inputs:
            return F.linear(x, self.weight, self.bias)
        out = (self.weight @ x.reshape(-1, inputs).T).T.contiguous()
        out = out.view(*x.shape[:-1], outputs)
        return out if self.bias is None else out + self.bias


def turn_products(module: torch.nn.Module) -> None:
    """Puts a `TurnedLinear` in the place of each large linear layer, with the same weights."""
    for name, part in list(module.named_modules()):
        if type(part) is torch.nn.Linear and part.weight.numel() >= LARGE:
            module.set_submodule(name, TurnedLinear(part))
