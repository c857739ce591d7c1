"""What a GPU computes in bfloat16, on a CPU: the check at load, copies, what a token moves."""

import sys

import pytest
import torch
from models import make_model

import common
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
    common._choose_rows("--policy", "x", model)
    assert model.shared_rows and not capsys.readouterr().out
    gap, allowed = common._gap(model, list(range(5, 60)))
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

    def wrong(model, segment, position, asking):
        if mistake == "raises":
            raise ValueError("unknown mask")
        if mistake == "others seen":
            return mask(model, segment.clamp(max=0), position, asking)
        return mask(model, segment + (segment == 0) * 99, position, asking)

    monkeypatch.setattr(common, "_attention_mask", wrong)
    common._choose_rows("--policy", "x", model)
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
        common._choose_rows("--policy", "x", model)
    assert "does not give the numbers of single rows" in capsys.readouterr().err


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
        common._choose_rows("--policy", "x", model)
    assert not capsys.readouterr().out


def test_a_full_gpu_ends_in_one_line_that_names_the_flags(capsys):
    """Any other error stays a traceback."""
    with pytest.raises(torch.OutOfMemoryError) as stop:
        full()
    running._say_full(sys.__excepthook__, stop.type, stop.value, None)
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU's memory is full: take a smaller --micro-batch")
    assert "Tried to allocate 2.00 GiB. GPU 0" in said and said.count("\n") == 1
    running._say_full(sys.__excepthook__, ValueError, ValueError("a mistake"), None)
    assert "ValueError: a mistake" in capsys.readouterr().err
