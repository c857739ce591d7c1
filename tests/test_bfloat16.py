"""What a GPU computes in bfloat16, on a CPU: the check at load, copies, what a token moves."""

import sys
from types import SimpleNamespace

import pytest
import torch
from models import ARCHITECTURES, make_model, make_prompts, make_world
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import brain
import common
from plumbing import check
from plumbing import models as loading
from plumbing import run as running


# ── the check at load ──
def with_logits(model, spread: float, offset: float = 0.0):
    """The model in bfloat16, its logits scaled to a standard deviation of `spread` and moved."""
    module = model.module
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 if "lm_head" in name else 0.05)
    head = module.get_output_embeddings().weight.data
    norm = module.base_model.ln_f if hasattr(module.base_model, "ln_f") else module.base_model.norm
    with torch.no_grad():
        logits = module(torch.tensor([[25, 36, 49, 64, 81, 100]])).logits
        norm.weight *= spread / logits.std()
        if offset:
            head[:, 0], norm.weight[0], norm.bias[0] = 1.0, 0.0, offset
    module.to(torch.bfloat16)
    return model


def add_noise(model) -> None:
    """Moves what attention gives up or down by one unit in the last place, or not, at random."""
    generator = torch.Generator().manual_seed(1)

    def moved(part, inputs):
        bits = inputs[0].contiguous().view(torch.int16)
        step = torch.randint(-1, 2, bits.shape, generator=generator, dtype=torch.int16)
        return ((bits + step * (bits != 0)).view(torch.bfloat16),)

    for name, part in model.module.named_modules():
        if name.endswith(("o_proj", "attn.c_proj")):
            part.register_forward_pre_hook(moved)


def shape_of(architecture: str) -> dict:
    """Eight layers, wide enough for rounding to add up as it does in larger models."""
    if architecture == "gpt2":
        return {"n_embd": 128, "n_layer": 8}
    return {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 256}


WIDE = [("llama", 2, 0), ("llama", 3, 0), ("llama", 6, 0), ("gpt2", 3, 0), ("gpt2", 3, -90)]


@pytest.mark.parametrize("architecture, spread, offset", WIDE)
def test_the_check_at_load_passes_another_kernels_rounding(architecture, spread, offset, capsys):
    """A GPU's attention with a mask and without are different kernels. Logits near -90, as those of
    GPT-2 are, stand in steps of a half in bfloat16."""
    model = make_model(architecture, 2000, **shape_of(architecture))
    add_noise(with_logits(model, spread, offset))
    common.choose_rows("--policy", "x", model, common._tried)
    assert model.shared_rows and not capsys.readouterr().out
    gap, allowed = check._gap(model, common._tried)
    assert 0 < gap < allowed  # it was rounding that passed


@pytest.mark.parametrize("labels", [0, 1])
@pytest.mark.parametrize("mistake", ["others seen", "prompt unseen", "raises"])
def test_the_check_at_load_finds_a_wrong_mask_in_bfloat16(labels, mistake, capsys, monkeypatch):
    """Beneath the noise as well; the model then has plain rows, which it says in a line."""
    model = make_model("llama", 2000, labels, **shape_of("llama"))
    if not labels:
        with_logits(model, 3)
        add_noise(model)
    model.module.to(torch.bfloat16)
    if labels:
        model.module.score.float()
    mask = common._attention_mask

    def wrong(model, segment, *more):
        if model.shared_rows and mistake == "raises":
            raise ValueError("unknown mask")
        if model.shared_rows and mistake == "others seen":
            segment = segment.clamp(max=0)
        elif model.shared_rows:
            segment = segment + (segment == 0) * 99
        return mask(model, segment, *more)

    monkeypatch.setattr(common, "_attention_mask", wrong)
    common.choose_rows("--policy", "x", model, common._tried)
    assert not model.shared_rows
    said = "no shared rows (ValueError unknown" if mistake == "raises" else "no shared rows (off by"
    assert said in capsys.readouterr().out


def test_a_model_that_fits_no_rows_is_an_error_in_bfloat16_too(capsys):
    """One that ignores position ids and masks cannot be padded at all."""
    model = make_model("gpt2", 2000, **shape_of("gpt2"))
    add_noise(with_logits(model, 3))
    forward = model.module.transformer.forward
    model.module.transformer.forward = lambda input_ids, **_: forward(input_ids)
    with pytest.raises(SystemExit):
        common.choose_rows("--policy", "x", model, common._tried)
    assert "does not give the numbers of single rows" in capsys.readouterr().err


def test_a_reward_model_whose_last_layer_alone_is_float32_passes(capsys):
    """As it is loaded on a GPU; its own forward pass does not join the two."""
    model = make_model("llama", 2000, labels=1, **shape_of("llama"))
    model.module.to(torch.bfloat16).score.float()
    common.choose_rows("--reward-model", "x", model, common._tried)
    assert model.shared_rows and not capsys.readouterr().out


# ── the memory of a GPU ──
def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_gpu_says_nothing_about_a_model(call, capsys, monkeypatch):
    """Neither that it takes no shared rows nor that its checkpoint is bad."""
    model, calls = make_model("llama"), []
    forward = model.module.forward

    def fill(*inputs, **named):
        calls.append(1)
        return full() if len(calls) == call else forward(*inputs, **named)

    monkeypatch.setattr(model.module, "forward", fill)
    if call == 2:
        monkeypatch.setattr(model.module.base_model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        common.choose_rows("--policy", "x", model, common._tried)
    assert not capsys.readouterr().out


def test_a_full_gpu_ends_in_one_line_that_names_the_flags(capsys):
    """Any other error stays a traceback."""
    with pytest.raises(torch.OutOfMemoryError) as stop:
        full()
    running._say_known(sys.__excepthook__, stop.type, stop.value, None)
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU's memory is full: take a smaller --micro-batch")
    assert "Tried to allocate 2.00 GiB. GPU 0" in said and said.count("\n") == 1
    running._say_known(sys.__excepthook__, ValueError, ValueError("a mistake"), None)
    assert "ValueError: a mistake" in capsys.readouterr().err


def test_micro_batch_bounds_all_passes(tmp_path, monkeypatch):
    """Sampling, which keeps no activations, takes eight times as many prompts; what is scored, and
    all log-probs, those of references and of evaluations included, take so many."""
    args = make_world(tmp_path, steps=1, micro_batch=1, prompts_per_step=12, eval_prompts=20)
    sampled, others = [], []
    for name, seen in (
        ("_sample", sampled),
        ("_rewards", others),
        ("_read_tokens", others),
    ):
        inner = getattr(common, name)

        def watched(model, batch, *more, inner=inner, seen=seen):
            seen.append(len(getattr(batch, "prompts", batch)))
            return inner(model, batch, *more)

        monkeypatch.setattr(common, name, watched)
    monkeypatch.setattr(common, "choose_rows", lambda *_: None)
    brain.main(args)
    assert sampled == [8, 8, 4] + [8, 4] + [8, 8, 4]
    assert set(others) == {1}


def test_a_gpu_has_longer_chunks_of_the_head(monkeypatch):
    """Which read and cast its weights less often."""
    sizes, targets = [], torch.zeros(3000, dtype=torch.long)
    monkeypatch.setattr(common, "_read", lambda model, heat, s, t: sizes.append(len(t)) or (t, t))
    for device in ("cpu", "cuda"):
        model = SimpleNamespace(
            device=torch.device(device), config=SimpleNamespace(vocab_size=2**17)
        )
        common._read_in_chunks(model, torch.zeros(3000, 1), targets, 1.0)
    assert sizes == [256] * 11 + [184] + [1024, 1024, 952]


def test_a_gpus_attention_makes_no_plans(monkeypatch):
    """cuDNN's would, for every new shape; on a CPU nothing is switched."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for there in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(True)
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            common.Run(brain.Args(), brain.__file__)
            assert torch.backends.cuda.cudnn_sdp_enabled() != there
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_each_row_of_a_mask_begins_at_16_bytes():
    """A GPU's attention would copy the mask in every layer; what it says is the same."""
    model, slots = make_model("llama"), torch.arange(11).view(1, -1)
    for length in range(1, 12):
        segment = torch.zeros_like(slots[:, :length])
        mask = common._attention_mask(model, segment, slots[:, :length], slice(None))
        assert mask.shape == (1, 1, length, length) and mask.stride(2) % 8 == 0
        assert torch.equal(mask[0, 0] == 0, torch.ones(length, length).tril().bool())


# ── copies ──
def in_mixed(architecture: str, **more):
    """A model of float32 weights that computes in bfloat16, as on a GPU."""
    model = make_model(architecture, **more)
    model.mixed = True
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_copies_hold_matrices_in_bfloat16_and_give_the_same_bits(architecture, tied):
    """Log-probs and samples, also after the copy was renewed; embeddings stay float32, tied or not.
    An exact copy is float32."""
    model, prompts = in_mixed(architecture, tie_word_embeddings=tied), make_prompts([5, 6, 7], [8])
    ours, exact = loading.frozen_copy(model), loading.frozen_copy(model, exact=True)
    assert {weight.dtype for weight in exact.parameters()} == {torch.float32}
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    for copied in (ours, exact):
        copied.load_state_dict(model.state_dict())  # as the scripts renew a proposal
        found = []
        for one in (model, copied):
            batch = common.sample(one, prompts, 4, 6, 0.8, seed=3)
            found.append([batch.sampled_logprobs, common.logprobs(one, batch, 0.8)])
        assert all(torch.equal(*pair) for pair in zip(*found))
    layers = [part for part in ours.modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    assert {part.weight.dtype for part in layers} == {torch.bfloat16}
    assert ours.module.get_input_embeddings().weight.dtype == torch.float32
    assert not any(weight.requires_grad for weight in (*ours.parameters(), *exact.parameters()))


def test_a_copy_beside_adapters_shares_the_base_and_holds_nothing_else_twice():
    """A matrix in bfloat16 beside the shared one in float32 would cost memory and save none."""
    model = make_model("llama")
    loading._add_adapters(model.module, brain.Args(lora_rank=2))
    model.mixed = True
    copied = loading.frozen_copy(model)
    for (name, ours), theirs in zip(copied.named_parameters(), model.parameters(), strict=True):
        assert (ours is theirs) == (loading.LORA not in name)
        assert ours.dtype == (torch.bfloat16 if loading.LORA in name else torch.float32)


def test_a_checkpoint_restores_a_copy_in_bfloat16(tmp_path):
    """Of the same numbers, and one that was written in float32, as on a CPU."""
    model = in_mixed("llama", tie_word_embeddings=True)
    copied, again = loading.frozen_copy(model), loading.frozen_copy(model)
    for source in (copied, model):
        saved = running.whole_weights(source)
        options = StateDictOptions(full_state_dict=True)
        with torch.no_grad():
            for weight in again.parameters():
                weight.zero_()
        set_model_state_dict(again, saved, options=options)
        for ours, theirs in zip(again.parameters(), copied.parameters(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# ── what a token moves ──
class Moved(TorchDispatchMode):
    """Bytes that casts and copies read and write, and how many weights are cast."""

    COPIES = "_to_copy copy_ clone cat index index_select repeat constant_pad_nd".split()

    def __init__(self, weights):
        super().__init__()
        self.bytes, self.cast, self.weights = 0, 0, {weight.data_ptr() for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.__name__.split(".")[0] in self.COPIES:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
            self.cast += args[0].__class__ is not list and args[0].data_ptr() in self.weights
        return out


@pytest.mark.parametrize("who", ["policy", "copy", "exact copy", "adapters"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_token_moves_weights_and_cache_once(architecture, who):
    """A decoding pass reads the weights in bfloat16 and the cache. Casts and copies move less than a
    tenth of that, where it was three times that; Llama's keys have groups of four heads."""
    shape = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}
    shape = {"n_embd": 256} if architecture == "gpt2" else shape
    model = in_mixed(architecture, vocab_size=2000, **shape)
    if who == "adapters":
        loading._add_adapters(model.module, brain.Args(lora_rank=2))
    if "copy" in who:
        model = loading.frozen_copy(model, exact=who == "exact copy")
    model.end_tokens, prompts = [-1], make_prompts([5] * 64)
    weights = [p for p in model.parameters() if p.dim() > 1 and p.dtype == torch.float32]
    counts = []
    for tokens in (4, 20):
        with Moved(weights) as moved:
            common.sample(model, prompts, 4, tokens, 1.0, seed=1)
        counts.append((moved.bytes, moved.cast))
    each = (counts[1][0] - counts[0][0]) / 16
    read = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    keys = 64 if architecture == "llama" else 256  # numbers per slot
    cache = 2 * 2 * model.config.num_hidden_layers * keys * 64
    assert each < 0.1 * (read + cache)
    assert counts[0][1] == counts[1][1]  # a weight is cast once, if it is
    assert (counts[0][1] > 0) == (who != "copy")  # the casts of this world are seen
