"""--cuda-graph without a GPU: the decoding step can be recorded, and draws what the growing one does.

Two proofs: tests/replay.py stands for CUDA's graph, and recording must leave nothing of the step to
the host; and torch.compile takes the step as one graph, which any question of the host would break.
"""

import pytest
import replay
import torch
from models import ARCHITECTURES, make_model, make_prompts, make_world

import brain
import common
from plumbing import cache, check

PROMPTS = make_prompts([5, 6, 7, 8], [9, 10], [11, 3, 4], [12])


@pytest.fixture
def replayed(monkeypatch):
    """CUDA's graphs are replayed on the CPU; a list of them."""
    made = []

    class Graph(replay.Graph):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", replay.capture)
    return made


def draw(model, width: int, monkeypatch) -> common.Batch:
    """Responses of many lengths to four prompts, in rows of `width`."""
    monkeypatch.setattr(common, "_row_width", lambda *_: width)
    return common.sample(model, PROMPTS, 4, 20, 0.8, seed=3)


def assert_same(ours: common.Batch, theirs: common.Batch) -> None:
    assert ours.responses == theirs.responses
    torch.testing.assert_close(ours.sampled_logprobs, theirs.sampled_logprobs, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_recorded_step_draws_the_same(architecture, width, replayed, monkeypatch):
    """With windows, with grouped heads; and it is recorded anew when ended responses have left."""
    model = make_model(architecture)
    model.end_tokens = [1, 2, 3]
    growing = draw(model, width, monkeypatch)
    assert len(set(growing.lengths().flatten().tolist())) > 3 and not replayed
    model.cuda_graph = True
    assert_same(draw(model, width, monkeypatch), growing)
    assert len(replayed) > 1 and all(graph.calls for graph in replayed)


def test_a_recorded_step_in_bfloat16(replayed, monkeypatch):
    """Autocast's casts of weights are recorded too, and keys that arrive in float32."""
    model = make_model("llama")
    model.mixed = True
    growing = draw(model, 4, monkeypatch)
    model.cuda_graph = True
    recorded = draw(model, 4, monkeypatch)
    assert recorded.responses == growing.responses and replayed
    torch.testing.assert_close(
        recorded.sampled_logprobs, growing.sampled_logprobs, atol=0.05, rtol=0.01
    )


@pytest.mark.parametrize(
    "architecture",
    [
        name if name == "mistral" else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_a_step_is_one_graph_to_torchs_compiler(architecture, monkeypatch):
    """Nothing in it asks the host, and no shape changes: it is compiled once."""
    model = make_model(architecture)
    model.end_tokens = []
    growing = draw(model, 4, monkeypatch)
    compiled = []

    def compile_step(step):
        torch._dynamo.reset()
        counts.clear()
        compiled.append(torch.compile(step, fullgraph=True, backend="eager", dynamic=False))
        return compiled[-1]

    counts = torch._dynamo.utils.counters
    monkeypatch.setattr(cache, "Recorded", compile_step)
    model.cuda_graph = True
    assert_same(draw(model, 4, monkeypatch), growing)
    assert len(compiled) == 1 and counts["stats"]["unique_graphs"] == 1


def test_what_a_graph_cannot_hold_is_refused_in_recording():
    """The stand-in says what CUDA would: a question of the host is no part of a graph."""
    for ask in (lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x[x > 0]):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            with replay.capture(replay.Graph()):
                ask(torch.ones(3))


def test_without_a_gpu_the_flag_is_refused(tmp_path, capsys):
    args = make_world(tmp_path, cuda_graph=True)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        brain.main(args)
    error = capsys.readouterr().err
    assert error == "error: --cuda-graph: needs a GPU, and a single process; leave it out\n"
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_recorded_is_refused(replayed, capsys, monkeypatch):
    """At load: one that takes no shared rows, one that asks the host, one that draws otherwise."""

    def refused(model) -> str:
        with pytest.raises(SystemExit):
            common.choose_graph("own", model, common._tried)
        return capsys.readouterr().err

    model = make_model("llama")
    common.choose_graph("own", model, common._tried)
    assert model.cuda_graph and len(replayed) == 1
    model.shared_rows = False
    assert refused(model) == (
        "error: --cuda-graph: --policy own takes no shared rows, whose shapes are fixed; "
        "leave it out\n"
    )
    asking = make_model("llama")
    hook = asking.module.get_input_embeddings().register_forward_hook
    hook(lambda part, inputs, states: None if states.sum().item() else None)
    assert refused(asking).startswith(
        "error: --cuda-graph: --policy own cannot be recorded, leave it out: operation not permitted"
    )
    monkeypatch.setattr(check, "_gap", lambda *_: (0.5, 1e-3))
    assert refused(make_model("llama")) == (
        "error: --cuda-graph: --policy own samples otherwise, off by 5.0e-01; leave it out\n"
    )
