"""The formulas of analyze/memory.py against tensors, and its tables against docs/scaling.md."""

import json
import shutil
import weakref

import pretend_gpu
import pytest
import torch
import transformers
from checkpoints import read_log
from models import make_prompts
from torch.utils._python_dispatch import TorchDispatchMode

import brain
import common
from analyze import memory
from plumbing import cache, models
from plumbing.models import Model
from plumbing.run import ROOT

SMOLLM2 = memory.Llama(30, 576, 1536, 9, 3, 64, 49152, tied=True)


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


def kept_for_backward(model, batch) -> int:
    """Bytes that autograd keeps of a forward pass up to the head, but for the model's weights."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address comes twice
        return x

    model.mixed = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rows = common._pack(model, batch)
        states = common._states(model, rows.tokens, rows.segment, rows.position)
    assert states.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("weight, rank", [(4, 0), (4, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [(64, 128, 4, 2, 16), (96, 80, 6, 3, 16)])
def test_activations_and_autocasts_copies(weight, rank, checkpointing, shape):
    """What one more block keeps, exactly."""
    setup, kept, counted = memory.Setup(1, weight, rank, checkpointing), [], []
    prompts = make_prompts([5] * 8, [6] * 8)
    batch = common.Batch(prompts, [[[7] * 5] * 3] * 2)
    same = memory.Batch(2, 3, 8, 5, micro_batch=2)
    for layers in (2, 3):
        spec = memory.Llama(layers, *shape, 40)
        model = build(spec).to({4: torch.float32, 2: torch.bfloat16}[weight])
        if rank:
            models._add_adapters(model.module, brain.Args(lora_rank=rank))
        if checkpointing:
            models._recompute(model)
        kept.append(kept_for_backward(model, batch))
        parts = memory.update(spec, same, setup)
        copies = 0 if checkpointing else parts["autocast's copies"]  # then made anew, and dropped
        counted.append(parts["activations"] + copies)
    assert kept[1] - kept[0] == counted[1] - counted[0] > 0


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and live: `most` of them."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.counted = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.counted:
            self.counted.add(address)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.counted.discard(address)
        self.live -= size


def backward_peak(spec, setup, batch: memory.Batch) -> int:
    """Bytes that an update of a random model in mixed adds at the most."""
    model = build(spec, max_position_embeddings=4096)
    model.mixed = True
    if setup.rank:
        models._add_adapters(model.module, brain.Args(lora_rank=setup.rank))
    responses = [[[7] * batch.response_tokens] * batch.samples] * batch.prompts
    whole = common.Batch(make_prompts(*[[5] * batch.prompt_tokens] * batch.prompts), responses)
    with Peak() as peak:
        for rows in common.micro_batches(batch.prompts, batch.micro_batch):
            common.logprobs_and_entropy(model, whole[rows], 1.0)[0].sum().backward()
    return peak.most


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    "hidden, vocab, response",
    [(64, 30_000, 40), (64, 20_000, 250), (64, 200, 60), (256, 200, 8)],
    ids=["few logits", "many logits", "activations", "gradients"],
)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_what_a_backward_pass_adds(rank, hidden, vocab, response, micro_batch):
    """The formula is right to 15 %, whatever decides; with gradients of an earlier pass and
    without."""
    spec = memory.Llama(12, hidden, 2 * hidden, 4, 2, hidden // 4, vocab, tied=True)
    setup = memory.Setup(rank=rank, chunk=common.CHUNK)
    batch = memory.Batch(2, 4, 30, response, micro_batch)
    measured, formula = backward_peak(spec, setup, batch), memory.at_once(spec, batch, setup)
    assert measured == pytest.approx(formula, rel=0.15)


@pytest.mark.parametrize("rank", [4, 7])
def test_adapters(rank):
    """As many numbers as peft makes."""
    spec = memory.Llama(3, 64, 128, 4, 2, 16, 40)
    model = build(spec)
    models._add_adapters(model.module, brain.Args(lora_rank=rank))
    ours = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert ours == spec.adapters(rank)
    assert sum(weight.numel() for weight in model.parameters()) == spec.parameters + ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_frozen_copy(tied, mixed):
    """Its bytes, exactly, of a model that computes in bfloat16 and of one that does not."""
    spec = memory.Llama(3, 64, 128, 4, 2, 16, 40, tied)
    model = build(spec)
    model.mixed = mixed
    copy = models.frozen_copy(model)
    setup = memory.Setup(frozen=2 if mixed else 4)
    assert sum(weight.nbytes for weight in copy.parameters()) == memory.copied(spec, setup)


def test_cache(monkeypatch):
    """Keys and values of the row that sampling fills, in float32 here."""
    spec, caches, make = memory.Llama(3, 32, 48, 4, 2, 8, 40), [], cache.make_cache
    monkeypatch.setattr(cache, "make_cache", lambda *x: caches.append(make(*x)) or caches[-1])
    common.sample(build(spec), make_prompts([5] * 8, [6] * 8), 3, 5, 1.0, 0)
    ours = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[-1].layers)
    batch = memory.Batch(prompts=2, samples=3, prompt_tokens=8, response_tokens=5)
    assert ours == memory.sampling(spec, batch, memory.Setup(frozen=4))["cache"]


def test_the_tables_of_the_docs_are_up_to_date():
    """And what the page says of 70B, and of 8B with adapters on one card, is what they say."""
    assert memory.page() == memory.PAGE.read_text()
    for checkpointing, least in ((False, 1), (True, memory.LONG.prompts)):
        setup = memory.Setup(1, 2, 16, checkpointing)
        assert memory.largest_micro_batch(memory.MODELS["8B"], memory.LONG, setup, 80) >= least
    for gpus in (1, 8, 16, 10**9):
        setup = memory.Setup(gpus, 2, 16, True)
        assert memory.most(memory.MODELS["70B"], memory.Batch(), setup) > 141e9


@pytest.mark.parametrize("micro_batch, rank, checkpointing", [(2, 0, 0), (1, 0, 0), (1, 8, 1)])
@pytest.mark.real
@pytest.mark.skipif(bool(pretend_gpu.problem()), reason=pretend_gpu.problem() or "it can")
@pytest.mark.skipif(not (ROOT / "assets/real/policy").exists(), reason="no assets/real/policy")
def test_the_peak_of_a_real_model(micro_batch, rank, checkpointing, tmp_path):
    """Of two steps with SmolLM2-135M on a pretended GPU, whose tensors are counted: within 15 % in
    all, and within 15 % of what the backward pass adds to what stays."""
    folder = ROOT / "assets/real/policy"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = " ".join(["the film"] * 32)
    (tmp_path / "data.jsonl").write_text((json.dumps({"prompt": prompt}) + "\n") * 8)
    (tmp_path / "reward.py").write_text("def length(prompts, texts): return list(map(len, texts))")
    words = f"brain.py --policy {folder} --dataset {tmp_path}/data.jsonl --template raw --lr 1e-6 "
    words += f"--reward-model {tmp_path}/reward.py:length --run-dir {tmp_path}/run --steps 2 "
    words += "--prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 64 "
    words += f"--eval-prompts 1 --micro-batch {micro_batch} "
    words += f"--dtype bfloat16 --lora-rank {rank} --checkpointing" if rank else ""
    done, counts = pretend_gpu.run(words.split(), tmp_path / "counts.json", ROOT)
    shutil.rmtree(tmp_path / "run" / "checkpoint", ignore_errors=True)  # gigabytes
    shutil.rmtree(tmp_path / "run" / "final", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    setup = memory.Setup(1, 2 if rank else 4, rank, bool(checkpointing), reward_models=0)
    length = len(tokenizer(prompt)["input_ids"])
    last = read_log(tmp_path / "run" / "metrics.jsonl")[-1]  # whose update has moments beside it
    batch = memory.Batch(2, 4, length, round(last["length/mean"]), micro_batch)
    stays = sum(memory.kept(SMOLLM2, setup).values())
    added = memory.at_once(SMOLLM2, batch, setup)
    print(json.dumps({"peak": counts["peak"], "stays": stays, "added": added}))
    assert counts["peak"] == pytest.approx(memory.most(SMOLLM2, batch, setup), rel=0.15)
    assert counts["peak"] - stays == pytest.approx(added, rel=0.15)
