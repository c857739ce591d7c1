"""The fast paths give the plain paths' numbers, do only the work they claim, and are timed right."""

import json
import time
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, make_model, make_prompts, make_world
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, StaticLayer

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze import performance
from plumbing import models as loading
from plumbing import report
from plumbing.cache import GrowingLayer

SCRIPTS = {"brain": brain, "gdc": gdc, "dpo": dpo, "wind": wind, "bond": bond, "ppo": ppo}
PROMPTS, RESPONSES = (
    [[5, 6, 7, 8], [9, 10]],
    [
        [[2, 3, 4, 5, 1], [6, 1], [7, 8, 9, 1], [3, 2, 2, 2, 2, 1]],
        [[4, 1], [5, 6, 7, 1], [8, 9, 10, 11, 12, 13, 1], [2, 2, 1]],
    ],
)


def ragged() -> common.Batch:
    """Two prompts, four responses each of 2 to 7 tokens."""
    return common.Batch(make_prompts(*PROMPTS), RESPONSES)


def set_width(monkeypatch, width: int) -> None:
    """Rows of `width` responses whatever they cost."""
    monkeypatch.setattr(common, "_row_width", lambda *_: width)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_every_width_give_the_numbers_of_plain_rows(architecture, monkeypatch):
    """Log-probs, entropies, gradients, rewards and, from equal draws, samples; also with the
    products of few rows turned."""
    model, judge = make_model(architecture), make_model(architecture, labels=1)
    prompts = make_prompts(*PROMPTS)
    monkeypatch.setattr(loading, "LARGE", 1)
    found = []
    for shared, width, turned in (
        (False, 1, False),
        (True, 1, False),
        (True, 2, False),
        (True, 4, False),
        (True, 4, True),
    ):
        model.shared_rows = judge.shared_rows = shared
        if turned:
            loading.turn_products(model.module)
            loading.turn_products(judge.module)
        set_width(monkeypatch, width)
        logprobs, entropy = common.logprobs_and_entropy(model, ragged(), 0.7)
        model.zero_grad()
        logprobs[0, 1:].sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        drawn = common.sample(model, prompts, 4, 6, 0.7, seed=3)
        with torch.no_grad():
            rewards = common._rewards(judge, ragged())
        tokens = torch.tensor([t for group in drawn.responses for r in group for t in r])
        found.append((logprobs, entropy, gradient, tokens, drawn.sampled_logprobs, rewards))
    for name, *values in zip(
        ("log-probs", "entropy", "gradient", "tokens", "drawn", "rewards"), *found
    ):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], atol=2e-5, rtol=2e-4, msg=name)


def test_no_slot_of_a_row_is_padding_but_at_the_end_of_the_shorter_rows(monkeypatch):
    """Rows are as long as prompt and responses of the fullest row."""
    model, seen = make_model("llama"), []
    inner = model.module.base_model.forward
    monkeypatch.setattr(
        model.module.base_model,
        "forward",
        lambda **inputs: (seen.append(inputs["input_ids"]), inner(**inputs))[1],
    )
    set_width(monkeypatch, 4)
    common.logprobs(model, ragged(), 1.0)
    fed = [sum(len(response) for response in group) for group in RESPONSES]
    assert seen[0].shape == (2, 4 + max(fed))
    assert seen[0][0].tolist() == PROMPTS[0] + [
        token for response in RESPONSES[0] for token in response
    ]


def test_a_part_of_a_batch_leaves_out_padding_that_none_of_it_needs():
    model = make_model("llama")
    whole, part = (common._pack(model, batch).tokens for batch in (ragged(), ragged()[1:]))
    assert whole.shape[1] > part.shape[1] == len(PROMPTS[1]) + sum(map(len, RESPONSES[1]))


def test_rows_are_as_wide_as_the_rule_says():
    """Responses share a row up to the length of the prompt, or twice the hidden size: short ones to
    a long prompt do, long ones to a short prompt do not."""
    model = make_model("llama", hidden_size=256, num_attention_heads=4)
    assert common._row_width(model, 512, 53, 8) == 8
    assert common._row_width(model, 64, 512, 2) == 1
    assert common._row_width(model, 64, 129, 4) == 2
    assert common._row_width(model, 64, 128, 4) == 4
    assert common._row_width(model, 64, 100, 7) == 1  # a divisor of n
    assert common._row_width(model, 4096, 512, 8) == 8
    model.shared_rows = False
    assert common._row_width(model, 512, 53, 8) == 1


def test_the_growing_cache_holds_what_a_static_one_holds_and_copies_nothing():
    torch.manual_seed(0)
    growing = Cache(layer_class_to_replicate=lambda: GrowingLayer(9))
    static = Cache(layer_class_to_replicate=lambda: StaticLayer(9))
    places = set()
    for size, filled in ((4, 4), (2, 6), (2, 8)):
        keys, values = torch.randn(2, 1, 3, size, 5)
        ours, theirs = (cache.update(keys, values, 0) for cache in (growing, static))
        for mine, other in zip(ours, theirs):
            assert mine.shape[2] == filled
            assert torch.equal(mine, other[:, :, :filled])
        places.add(ours[0].data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (loading.FEW_ROWS + 1, 5), (0, 5)])
def test_turned_products_are_those_of_a_linear_layer(bias, shape, monkeypatch):
    """Values, gradients and memory layout."""
    torch.manual_seed(0)
    monkeypatch.setattr(loading, "LARGE", 5 * 7)
    layer, x = torch.nn.Sequential(torch.nn.Linear(5, 7, bias)), torch.randn(shape)
    found = []
    for turn in (False, True):
        if turn:
            loading.turn_products(layer)
            layer.zero_grad()
        x.requires_grad_().grad = None
        out = layer(x)
        out.square().sum().backward()
        assert out.is_contiguous()
        found.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert isinstance(layer[0], loading.TurnedLinear)
    for plain, turned in zip(*found, strict=True):
        torch.testing.assert_close(turned, plain)


def test_cpu_products_of_few_rows_are_turned(tmp_path, monkeypatch):
    """In the large linear layers of a loaded model, where MKL computes them; more rows are not."""
    plain, taken = torch.nn.functional.linear, []
    make_model("llama").module.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "LARGE", 32 * 24)  # the head and the feed-forward layers
    for mkl in (True, False):
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        module = loading._load_module(
            "--policy", str(tmp_path), AutoModelForCausalLM, torch.float32, torch.device("cpu")
        )
        kinds = (torch.nn.Linear, loading.TurnedLinear)
        for layer in (x for x in module.modules() if isinstance(x, kinds)):
            large = layer.weight.numel() >= 32 * 24
            assert isinstance(layer, loading.TurnedLinear) == (mkl and large)
        layer, taken[:] = module.get_output_embeddings(), []
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.functional,
                "linear",
                lambda x, *more: taken.append(len(x)) or plain(x, *more),
            )
            for rows in (loading.FEW_ROWS, loading.FEW_ROWS + 1):
                layer(torch.zeros(rows, 32))
        assert taken == [loading.FEW_ROWS] * (not mkl) + [loading.FEW_ROWS + 1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_responses_that_have_ended_leave_and_change_nothing(width, architecture, monkeypatch):
    """No more are fed than a third above what rows of one width need; and the draws are those of
    plain rows, which stay to the end."""
    model, fed = make_model(architecture), []
    model.end_tokens = [1, 2, 3, 4, 5, 6]  # responses of many lengths
    prompts = make_prompts(*([token, token + 1] for token in range(2, 14)))
    inner = model.module.base_model.forward
    monkeypatch.setattr(
        model.module.base_model,
        "forward",
        lambda **inputs: (fed.append(inputs["input_ids"].numel()), inner(**inputs))[1],
    )
    set_width(monkeypatch, width)
    batch = common.sample(model, prompts, 4, 30, 1.0, seed=5)
    lengths, needed = batch.lengths().view(-1, width), []  # by row
    for t in range(1, int(lengths.max())):
        going = lengths > t
        needed.append(int(going.any(1).sum() * going.sum(1).max()))
    assert len(fed) - 1 == len(needed)
    assert all(need > 0.75 * tokens for tokens, need in zip(fed[1:], needed))
    assert len(set(fed[1:])) > 3
    model.shared_rows = False
    set_width(monkeypatch, 1)
    plain = common.sample(model, prompts, 4, 30, 1.0, seed=5)
    assert batch.responses == plain.responses
    torch.testing.assert_close(batch.sampled_logprobs, plain.sampled_logprobs, atol=2e-5, rtol=2e-4)


def test_a_draw_is_the_first_token_whose_cumulative_probability_passes_u(monkeypatch):
    """Tokens of probability 0 are never drawn, even if u is 0 or as near to 1 as numbers go."""
    model = make_model("llama", vocab_size=6)
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, 0.0, -torch.inf])
    monkeypatch.setattr(
        common, "_logits", lambda model, states: logits.expand(*states.shape[:2], 6)
    )
    distribution = logits.softmax(0).double()
    for u in (0.0, 0.1, 0.2, 0.25, 0.5, 0.7, 0.8, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **_: torch.full(shape, u).double())
        batch = common.sample(model, make_prompts([2, 3]), 1, 1, 1.0, seed=0)
        (((token,),),) = batch.responses
        assert distribution[:token].sum() <= u < distribution[: token + 1].sum() + 1e-7
        assert distribution[token] > 0
        assert batch.sampled_logprobs.item() == pytest.approx(
            distribution[token].log().item(), abs=1e-6
        )


def test_the_page_on_performance_is_up_to_date():
    assert performance.page() == (Path(brain.__file__).parent / "docs/performance.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_phase_times_and_tokens_a_second_are_those_of_the_wall_clock(script, tmp_path, monkeypatch):
    """Slow fakes add known seconds to each phase; log and wall clock must agree."""
    slow = {"sample": 0.20, "score": 0.10, "token_logprobs_and_entropy": 0.15}
    calls, tokens = dict.fromkeys(slow, 0), []

    def slowed(name: str):
        inner = getattr(common, name)

        def outer(*args, **kwargs):
            if name != "token_logprobs_and_entropy" or torch.is_grad_enabled():
                time.sleep(slow[name])
                calls[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(common, name, outer)

    module = SCRIPTS[script]
    world = make_world(tmp_path)
    args = module.Args(
        policy=world.policy,
        reward_model=world.reward_model,
        dataset=world.dataset,
        prompts_per_step=2,
        samples_per_prompt=4,
        max_prompt_tokens=8,
        max_response_tokens=6,
        steps=1,
        eval_every=9,
        eval_prompts=2,
        run_dir=str(tmp_path / "run"),
    )
    if script == "gdc":
        args.check_every = 9
    monkeypatch.setattr(common, "choose_rows", lambda *_: None)
    monkeypatch.setattr(common, "evaluate", lambda *_: ({"eval/reward": 0.0}, []))
    monkeypatch.setattr(common, "score_references", lambda judge, policy, prompts, size: prompts)
    monkeypatch.setattr(report, "show_samples", lambda folder: None)
    for name in slow:
        slowed(name)
    begin = []
    monkeypatch.setattr(
        common,
        "pick",
        lambda *args, pick=common.pick: (pick(*args), begin.append(time.perf_counter()))[0],
    )
    ended = common.Batch.ended
    monkeypatch.setattr(
        common.Batch,
        "ended",
        lambda batch, ends: (tokens.append(int(batch.lengths().sum())), ended(batch, ends))[1],
    )
    original = common.Run.log

    def log(run, step, metrics, samples=()):
        if step:
            begin.append(time.perf_counter())
        original(run, step, metrics, samples)

    monkeypatch.setattr(common.Run, "log", log)
    module.main(args)
    line = json.loads(Path(args.run_dir, "metrics.jsonl").read_text().splitlines()[-1])
    times = [line[f"time/{phase}_s"] for phase in ("sample", "score", "update")]
    least = [calls["sample"] * slow["sample"], slow["score"], slow["token_logprobs_and_entropy"]]
    for spent, floor in zip(times, least):
        assert floor <= spent < floor + 0.35
    wall = begin[1] - begin[0]
    assert wall - 0.1 < sum(times) <= wall
    assert line["tokens_per_s"] == pytest.approx(tokens[-1] / sum(times), rel=1e-3)
