"""Checkpoints become models: weights, adapters, end tokens, copies, several processes; and back.

`common` loads policy and reward model through here and checks how they must be fed; the scripts
make their frozen copies here. What is computed with a model stands in `common`.
"""

import copy
import importlib.util
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from plumbing.run import explained, found, require, seed_of

FEW_ROWS, LARGE = 32, 2**16  # rows and weights of a product that is turned round on a CPU
NO_LIMIT = 2**30  # tokens, of a context that has no end
LORA = ".lora_"  # in the names of adapters' weights, and of no others


class Model(torch.nn.Module):
    """A checkpoint's model, and what we know about it.

    model(function, *inputs) is function(model, *inputs): FSDP2 gathers weights around a call of a
    module, and log-probs or samples are made of more, or less, than the library's own call.
    """

    def __init__(self, module, end_tokens: list[int] = ()):
        from plumbing.cache import share_heads  # late, as it imports transformers

        super().__init__()
        self.module = module  # transformers' own
        self.end_tokens = list(end_tokens)  # each of them ends a response
        self.shared_rows = True  # all responses in one row with their prompt; else plain rows
        self.own_head = False  # its own forward pass gives the logits: we cannot apply its head
        self.most_prompts = 0  # that are sampled for at once, to save memory; 0 = all
        self.cuda_graph = False  # sampling records its decoding step as a CUDA graph
        self.mixed = False  # float32 weights, all or the adapters', that compute in bfloat16
        self.stored_dtype = module.dtype  # of the checkpoint's files
        self.config = module.config.get_text_config()
        self.context = _context(self.config)  # tokens that it can read
        self.groups = share_heads(module)  # query heads per key head
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

    @property
    def scores_tokens(self) -> bool:
        """Whether it is a decoder's classifier, whose `score` reads the state of any token."""
        return hasattr(self.module, "score")

    def autocast(self):
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def forward(self, function, *inputs):
        """function(self, *inputs), with the weights gathered."""
        return function(self, *inputs)


def _known(config, name: str):
    """A value of a configuration, under the name that all architectures share, or None."""
    return getattr(config, name, None)


def _context(config) -> int:
    """How many tokens a model can read. Beyond the original length of a longrope model its numbers
    would depend on the longest row of the batch."""
    rope = _known(config, "rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return _known(config, "max_position_embeddings") or NO_LIMIT


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


def room(flag: str, name: str) -> int:
    """How many tokens a checkpoint's model can read."""
    return _context(_load_config(flag, name).get_text_config())


def _load_module(flag: str, name: str, auto_class, dtype, device, new_head: bool = False):
    """A model from safetensors, without dropout, which would break log-ratios.

    With `new_head` it is a classifier with one label, whose head the checkpoint lacks.
    """
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
            **({"num_labels": 1} if new_head else {}),
        )
    missing = info["missing_keys"] - ({"score.weight"} if new_head else set())
    missing = ", ".join(sorted(missing)[:3])
    require(
        not missing,
        f"{flag} {name}: a {type(module).__name__} needs {missing}, which the checkpoint lacks",
    )
    module.to(device).eval()
    if device.type == "cpu" and torch.backends.mkl.is_available():
        turn_products(module)
    return module


def load_causal_lm(args, tokenizer, end_token: int, device: torch.device) -> Model:
    """The model of --policy, with its end tokens, of which `end_token` is the usual one."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    flag, name = "--policy", args.policy
    config = _load_config(flag, name)
    need = (args.max_prompt_tokens or 1) + args.max_response_tokens
    limit = _context(config.get_text_config())
    require(
        need <= limit,
        f"{flag} {name}: its context of {limit} tokens is shorter than --max-prompt-tokens + "
        f"--max-response-tokens = {need}; lower one of them",
    )
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    module = _load_module(flag, name, AutoModelForCausalLM, dtype, device)
    if args.lora_rank:
        _add_adapters(module, args)
    own = module.generation_config.eos_token_id
    ends = [end_token, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    module.generation_config = GenerationConfig(  # final/ samples as it was trained
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Model(module, ends)
    model.stored_dtype = config.dtype or torch.float32
    if args.checkpointing:
        _recompute(model)
    return model


def _add_adapters(module, args) -> None:
    """Puts x → W x + 2 B A x in the place of each linear layer x → W x but the head (LoRA, Hu et
    al., 2106.09685): A and B, of --lora-rank, are trained, in float32, and B begins at 0."""
    import peft

    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
        base_model_name_or_path=args.policy,
    )
    with warnings.catch_warnings(), torch.random.fork_rng([]), explained("--lora-rank"):
        warnings.simplefilter("ignore")  # that GPT-2 keeps its matrices turned round, peft sees
        torch.manual_seed(seed_of(args.seed, "adapters"))
        peft.inject_adapter_in_model(config, module)
    experts = any(isinstance(part, peft.tuners.lora.ParamWrapper) for part in module.modules())
    require(not experts, f"--lora-rank: {args.policy} has experts, which we cannot merge; take 0")
    for weight in module.parameters():
        if weight.requires_grad:
            weight.data = weight.float()  # the base may be bfloat16, which loses small steps


def _recompute(model: Model) -> None:
    """Lets each block keep no more than its input for the backward pass, which runs it again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = _blocks(model)
    for place, block in enumerate(blocks):
        blocks[place] = checkpoint_wrapper(block, preserve_rng_state=False)  # nothing is random


def load_classifier(args, device: torch.device) -> Model:
    """The frozen model of --reward-model, in bfloat16 on a GPU."""
    from transformers import AutoModelForSequenceClassification

    flag, name = "--reward-model", args.reward_model
    labels = _load_config(flag, name).num_labels
    require(labels == 1, f"{flag} {name}: num_labels is {labels}, but a reward is one number")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = _load_module(flag, name, AutoModelForSequenceClassification, dtype, device)
    model = Model(module.requires_grad_(False))
    if model.scores_tokens:
        module.score.float()  # bfloat16 rewards near 5 tie in steps of 0.03
    return model


def load_critic(args, policy: Model, tokenizer, name: str) -> Model:
    """A classifier to be trained, which reads the policy's tokens: that of --value-model `name`, or
    the body of --policy with a head of zeros. With --lora-rank its body has adapters, and the head
    itself is trained."""
    from transformers import AutoModelForSequenceClassification as Classifier

    flag = "--value-model" if name else "--policy"
    if name:
        labels = _load_config(flag, name).num_labels
        require(labels == 1, f"{flag} {name}: num_labels is {labels}, but a value is one number")
        same = load_tokenizer(flag, name).get_vocab() == tokenizer.get_vocab()
        require(same, f"{flag} {name}: its tokens are not those of --policy {args.policy}")
    like = policy.module
    module = _load_module(flag, name or args.policy, Classifier, like.dtype, like.device, not name)
    model = Model(module)
    model.shared_rows = policy.shared_rows
    require(model.scores_tokens, f"{flag} {name}: a {type(module).__name__} scores no tokens")
    module.score.float()
    if not name:
        torch.nn.init.zeros_(module.score.weight)
    if args.lora_rank:
        _add_adapters(module.base_model, args)  # the score itself stays, and is trained
    if args.checkpointing:
        _recompute(model)
    return model


def is_function(name: str) -> bool:
    """Whether --reward-model names a Python function: FILE.py:FUNCTION or MODULE:FUNCTION."""
    return ":" in name


def load_function(name: str):
    """The function of FILE.py:FUNCTION or MODULE:FUNCTION."""
    where, _, function = name.rpartition(":")
    with explained(f"--reward-model {name}"):
        if not where.endswith(".py"):
            return getattr(importlib.import_module(where), function)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)


# ── Copies and several processes ──────────────────────────────────────────────────────────────────


def frozen_copy(model: Model, exact: bool = False) -> Model:
    """A copy that is not trained, spread over the processes. Make it before the model is spread.

    What training cannot change, the weights below adapters, is the model's own; but for several
    processes, where a weight has one model to be gathered in. Of a model that computes in bfloat16
    the copy holds matrices in bfloat16, to which each pass would cast them: its numbers are the
    same, bit for bit. An `exact` copy keeps float32, for who moves it by small steps.
    """
    alone = not dist.is_initialized()
    shared = {id(p): p for p in model.parameters() if alone and not p.requires_grad}
    cast = {} if exact or not model.mixed else _matrices_in_bfloat16(model, shared)
    copied = copy.deepcopy(model, cast | shared).requires_grad_(False)
    head = copied.module.get_output_embeddings()
    if cast and id(head.weight) not in shared:  # or its weight may be the embeddings', in float32
        head.weight = _in_bfloat16(head.weight)
    return shard(copied)


def _matrices_in_bfloat16(model: Model, left_out: dict) -> dict[int, torch.nn.Parameter]:
    """Copies of the linear layers' weights, by the id of a weight; without those of `left_out` and
    that of the embeddings, whose states are float32."""
    from transformers.pytorch_utils import Conv1D

    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    weights = {id(weight): weight for part in linear for weight in part.parameters(recurse=False)}
    left_out = {*left_out, id(model.module.get_input_embeddings().weight)}
    return {i: _in_bfloat16(weights[i]) for i in weights.keys() - left_out}


def _in_bfloat16(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.bfloat16(), requires_grad=False)


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
    mesh = dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    for module in (*blocks, model):
        precision = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    return model


def _blocks(model: Model) -> torch.nn.ModuleList:
    """The blocks of a model: its largest list of modules."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    kind = type(model.module).__name__
    require(lists, f"a {kind} has no blocks: take one process, and leave --checkpointing out")
    return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))


@contextmanager
def gathered(model: Model):
    """The context of many passes without gradient: weights stay whole, and in the type in which
    they are computed, after the first pass, so that each process may go on at its own pace."""
    parts, frozen = [], []
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    elif model.mixed:  # autocast keeps what it casts of weights that require a gradient only
        frozen = [p for p in model.parameters() if not p.requires_grad]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with model.autocast():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def write_model(model: Model, weights: dict[str, Tensor], tokenizer, folder: Path) -> None:
    """Writes a checkpoint that loads with from_pretrained, of `weights`, the model's by name.

    It has the type that the model came in. Adapters are merged, and lie in adapter/ for peft.
    """
    from safetensors.torch import save_file

    module, plain, cast = model.module, {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in _merged(module, weights).items():
        if id(weight) not in cast:  # a tied weight stays one
            cast[id(weight)] = _rounded(weight, model.stored_dtype, generator)
        plain[name] = cast[id(weight)]
    module.save_pretrained(folder, state_dict=plain)
    module.config.dtype = model.stored_dtype  # save_pretrained took the module's own
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    adapters = {name.replace(".default", ""): weights[name] for name in weights if LORA in name}
    if adapters:
        module.peft_config["default"].save_pretrained(folder / "adapter")
        adapters = {f"base_model.model.{name}": weight for name, weight in adapters.items()}
        save_file(adapters, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})


def _rounded(weight: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A weight in another type; in bfloat16 up or down at random, so that the mean is the weight.

    The nearest number would be the start model's wherever a weight has moved by less than 1/512 of
    its size, which is nearly all that a short run with small steps has trained.
    """
    if not weight.is_floating_point():
        return weight
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.float().view(torch.int32)  # of which bfloat16 keeps the upper half
    bits = bits + torch.randint(2**16, bits.shape, dtype=torch.int32, generator=generator)
    return (bits & -(2**16)).view(torch.float32).to(dtype)


def _merged(module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same model without adapters: W + 2 B A in the place of W, A and B."""
    merged = {}
    for name, weight in weights.items():
        path, below, kind = name.partition(".base_layer.")
        if below and kind == "weight":
            a = weights[f"{path}.lora_A.default.weight"]
            b = weights[f"{path}.lora_B.default.weight"]
            turned = module.get_submodule(path).fan_in_fan_out  # as GPT-2 keeps its matrices
            weight = weight.float() + 2 * ((b @ a).T if turned else b @ a)
        if LORA not in name:
            merged[name.replace(".base_layer.", ".")] = weight
    return merged


# ── A CPU's products ──────────────────────────────────────────────────────────────────────────────


class TurnedLinear(torch.nn.Linear):
    """A linear layer whose x Wᵀ is computed as (W xᵀ)ᵀ where x has few rows, as in decoding.

    MKL does the first far below the speed of memory, the second two to three times as fast. Not
    where W is small: it stays in the core's cache, and the turning costs more.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
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
