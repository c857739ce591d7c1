"""The formulas of analyze/memory.py against tensors, and its tables against docs/scaling.md."""

from pathlib import Path

import pytest
import torch
import transformers
from models import make_prompts

import common
from analyze import memory
from plumbing import cache
from plumbing.models import Model

ROOT = Path(common.__file__).parent


def build(spec: memory.Llama, **more):
    """The model that `spec` describes."""
    config = transformers.LlamaConfig(
        num_hidden_layers=spec.layers,
        hidden_size=spec.hidden,
        intermediate_size=spec.inner,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab,
        tie_word_embeddings=spec.tied,
        **more,
    )
    return Model(transformers.AutoModelForCausalLM.from_config(config).eval(), [1])


@pytest.mark.parametrize("name, billions", [("1B", 1.2358), ("8B", 8.0303), ("70B", 70.5537)])
def test_parameters(name, billions):
    """Of Llama 3.2 1B, 3.1 8B and 3.1 70B."""
    spec = memory.MODELS[name]
    with torch.device("meta"):
        model = build(spec)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters
    assert spec.parameters / 1e9 == pytest.approx(billions, abs=1e-4)


def kept_for_backward(model, batch, mixed: bool) -> int:
    """Bytes that autograd keeps of a forward pass up to the head, but for the model's weights."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address comes twice
        return x

    model.mixed = mixed
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rows = common._pack(model, batch)
        states = common._states(model, rows.tokens, rows.segment, rows.position)
    assert states.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(
    "dtype, mixed, bytes_",
    [
        (torch.float32, False, (40, 16)),
        (torch.float32, True, (34, 8)),
        (torch.bfloat16, False, (24, 8)),
    ],
)
@pytest.mark.parametrize("shape", [(64, 128, 4, 2, 16), (96, 80, 6, 3, 16)])
def test_activations_and_autocasts_copies(dtype, mixed, bytes_, shape):
    """What one more block keeps, exactly."""
    (short, spec), kept = (memory.Llama(n, *shape, 40) for n in (2, 3)), []
    prompts = make_prompts([5] * 8, [6] * 8)
    batch = common.Batch(prompts, [[[7] * 5] * 3] * 2)
    for one in (short, spec):
        kept.append(kept_for_backward(build(one).to(dtype), batch, mixed))
    slots = 2 * (8 + 3 * 5)
    expected = memory.activations(spec, slots, *bytes_) - memory.activations(short, slots, *bytes_)
    assert kept[1] - kept[0] == expected + 2 * spec.block * mixed


def test_cache(monkeypatch):
    """Keys and values of the row that sampling fills, in float32 here."""
    spec, caches, make = memory.Llama(3, 32, 48, 4, 2, 8, 40), [], cache.make_cache
    monkeypatch.setattr(cache, "make_cache", lambda *x: caches.append(make(*x)) or caches[-1])
    common.sample(build(spec), make_prompts([5] * 8, [6] * 8), 3, 5, 1.0, 0)
    ours = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[-1].layers)
    batch = memory.Batch(prompts=2, samples=3, prompt_tokens=8, response_tokens=5)
    assert ours == 2 * memory.sampling(spec, batch, 1)["cache"]


def test_the_tables_of_the_docs_are_up_to_date():
    """And what the page says of 70B is what they say."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    for rows in (memory.memory_table(memory.Batch()), memory.time_table(memory.Batch())):
        assert rows in page
    assert all(
        memory.most(memory.MODELS["70B"], memory.Batch(), gpus, 2) > 141e9
        for gpus in (1, 8, 16, 10**9)
    )
