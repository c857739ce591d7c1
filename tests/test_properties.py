"""Properties of batches, log-probs, sampling, weights and evaluation over shapes of chance."""

import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_model, word_tokenizer

import bond
import brain
import common
import dpo
import gdc
import wind
from plumbing.data import Layout

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("repeatable")
MODELS = {name: make_model(name) for name in ("gpt2", "llama", "gemma2")}
CPU = torch.device("cpu")
tokens = st.integers(2, 23)
rows = st.lists(tokens, min_size=1, max_size=7)


@st.composite
def ragged(draw, most_prompts: int = 3, most_responses: int = 4):
    """(prompts [P], responses [P][N]) of lengths of their own; some responses end, some are cut."""
    count, n = draw(st.integers(1, most_prompts)), draw(st.integers(1, most_responses))
    prompts = draw(st.lists(rows, min_size=count, max_size=count))
    responses = [[draw(rows) + [1] * draw(st.booleans()) for _ in range(n)] for _ in prompts]
    return prompts, responses


def batch_of(prompts, responses) -> common.Batch:
    return common.Batch([common.Prompt(str(p), p) for p in prompts], responses)


def numbers(*shape: int, spread: float = 5.0):
    """A float32 table of numbers within ±spread, ties among them likely."""
    size = math.prod(shape)
    value = st.floats(-spread, spread, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    return st.lists(value, min_size=size, max_size=size).map(
        lambda x: torch.tensor(x).reshape(shape)
    )


tables = st.tuples(st.integers(1, 4), st.integers(2, 6))


# ── batches ──
@given(
    st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=5).filter(any),
    st.sampled_from(["left", "right"]),
)
def test_padding_keeps_every_token_at_its_side(ids, side):
    padded = common._pad(ids, -7, CPU, side == "left")
    longest = max(map(len, ids))
    assert padded.shape == (len(ids), longest)
    for row, expected in zip(padded.tolist(), ids):
        hole = [-7] * (longest - len(expected))
        assert row == (hole + expected if side == "left" else expected + hole)


@given(ragged(), st.booleans())
def test_rows_hold_each_prompt_and_response_where_they_say(drawn, shared):
    """Read back from the rows: segments, positions, the slots before each token, the last ones."""
    prompts, responses = drawn
    model = MODELS["llama"]
    model.shared_rows = shared
    found = common._pack(model, batch_of(prompts, responses))
    assert shared or len(found.tokens) == len(prompts) * len(responses[0])
    before = list(zip(found.before[0].tolist(), found.before[1].tolist()))
    last = list(zip(found.last[0].tolist(), found.last[1].tolist()))
    at = 0
    for number, response in enumerate(r for group in responses for r in group):
        prompt = prompts[number // len(responses[0])]
        row, end = last[number]
        segment = found.segment[row, end].item()
        own = found.segment[row] == segment
        assert found.tokens[row][own].tolist() == response
        assert found.tokens[row][found.segment[row] == 0].tolist() == prompt
        assert found.position[row][own].tolist() == [len(prompt) + i for i in range(len(response))]
        slots = own.nonzero()[:, 0].tolist()
        assert slots[-1] == end
        assert list(before[at : at + len(response)]) == [
            (row, slot) for slot in [len(prompt) - 1, *slots[:-1]]
        ]
        at += len(response)
    assert at == len(before)


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 20))
def test_micro_batches_cover_every_prompt_once(count, size, first):
    parts, all_prompts = common.micro_batches(count, size, first), range(first + count + 7)
    assert [i for part in parts for i in all_prompts[part]] == list(range(first, first + count))
    assert all(0 < len(all_prompts[part]) <= (size or count) for part in parts)


@given(ragged(), ragged())
def test_batches_side_by_side_keep_their_responses(first, second):
    prompts, responses = first
    other = [(second[1] * 3)[i] for i in range(len(prompts))]
    both = batch_of(prompts, responses).beside(batch_of(prompts, other))
    for i, group in enumerate(responses):
        assert both.responses[i] == group + other[i]


@given(ragged(), st.data())
def test_chosen_responses_are_those_of_the_indices(drawn, data):
    prompts, responses = drawn
    index = st.integers(0, len(responses[0]) - 1)
    which = torch.tensor([[data.draw(index), data.draw(index)] for _ in prompts])
    batch = batch_of(prompts, responses)
    batch.sampled_logprobs = torch.rand(len(responses), len(responses[0]))
    chosen = batch.choose(which)
    for group, own, picked in zip(chosen.responses, responses, which.tolist()):
        assert group == [own[i] for i in picked]
    for group, own, picked in zip(chosen.sampled_logprobs, batch.sampled_logprobs, which):
        assert group.tolist() == [own[i] for i in picked]


# ── log-probs ──
@given(
    ragged(), st.sampled_from(list(MODELS)), st.booleans(), st.floats(0.5, 2), st.integers(0, 2**32)
)
def test_a_response_has_its_own_log_prob_whatever_stands_around_it(
    drawn, name, shared, temperature, seed
):
    """In any batch, on shared or plain rows, whatever fills the padding: as alone."""
    model, batch = MODELS[name], batch_of(*drawn)
    noise, pad = random.Random(seed), common._pad

    def filled(rows, fill, *more):  # a token of chance wherever a row is padded with tokens
        return pad(rows, noise.randrange(24) if fill == 0 else fill, *more)

    model.shared_rows = shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_pad", filled)
        together = torch.stack(common.logprobs_and_entropy(model, batch, temperature)).detach()
        model.shared_rows = False
        for i, (prompt, group) in enumerate(zip(*drawn)):
            for j, response in enumerate(group):
                alone = common.logprobs_and_entropy(
                    model, batch_of([prompt], [[response]]), temperature
                )
                torch.testing.assert_close(
                    together[:, i, j], torch.cat(alone).detach()[:, 0], atol=2e-4, rtol=1e-4
                )
    assert (together[0] <= 1e-5).all() and together.dtype == torch.float32
    assert (together[1] <= batch.lengths() * math.log(24) + 1e-3).all()


@given(ragged(), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_micro_batches_change_no_log_prob(drawn, size, dtype):
    model, batch = make_model("llama").to(dtype), batch_of(*drawn)
    whole, parts = (common.logprobs(model, batch, 1.0, x) for x in (0, size))
    assert whole.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(parts, whole, atol=tolerance, rtol=tolerance / 2)


# ── sampling ──
@given(
    st.lists(rows, min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(list(MODELS)),
    st.floats(0.3, 3),
    st.lists(tokens, max_size=2, unique=True),
    st.integers(0, 2**63 - 1),
)
def test_samples_end_at_their_first_end_token_and_nowhere_else(
    prompts, n, longest, name, temperature, ends, seed
):
    model = MODELS[name]
    model.end_tokens = [1, *ends]
    prompts = [common.Prompt("", ids) for ids in prompts]
    for model.shared_rows in (True, False):
        batch = common.sample(model, prompts, n, longest, temperature, seed)
        again = common.sample(model, prompts, n, longest, temperature, seed)
        assert batch.responses == again.responses
        finished = batch.ended(model.end_tokens)
        for group, ended in zip(batch.responses, finished.tolist()):
            for response, end in zip(group, ended):
                stops = [token in model.end_tokens for token in response]
                assert sum(stops) == end == stops[-1]
                assert end or len(response) == longest
                assert 1 <= len(response) <= longest
        own = common.logprobs(model, batch, temperature)
        torch.testing.assert_close(batch.sampled_logprobs, own, atol=3e-4, rtol=1e-4)


# ── weights, quantiles, win rates ──
@given(
    tables.flatmap(lambda x: st.tuples(numbers(*x), numbers(*x), numbers(*x))),
    st.floats(0.05, 5),
    st.floats(-100, 100),
    st.randoms(use_true_random=False),
)
def test_weights_of_the_posterior(drawn, beta, constant, draws):
    """They sum to 1, do not see a constant of the prompt, follow their samples, and have an
    effective number of samples from 1 to N."""
    ref, rewards, proposal = drawn
    alpha = brain.posterior_weights(ref, rewards, proposal, beta)
    torch.testing.assert_close(alpha.sum(1), torch.ones(len(alpha)))
    moved = brain.posterior_weights(ref, rewards + constant, proposal, beta)
    torch.testing.assert_close(moved, alpha, atol=2e-3, rtol=2e-2)
    order = draws.sample(range(ref.shape[1]), ref.shape[1])
    assert torch.allclose(
        brain.posterior_weights(ref[:, order], rewards[:, order], proposal[:, order], beta),
        alpha[:, order],
    )
    size = 1 / alpha.square().sum(1)
    assert (size >= 1 - 1e-4).all() and (size <= ref.shape[1] + 1e-3).all()
    loss = brain.brain_loss(ref, proposal, alpha)
    assert (loss >= -1e-4).all() and loss.isfinite().all()


@given(
    tables.flatmap(lambda x: st.tuples(numbers(*x), numbers(*x), numbers(*x))), st.floats(0.05, 5)
)
def test_weights_of_a_prompt_have_mean_1(drawn, beta):
    ref, rewards, proposal = drawn
    log_w = gdc.log_weights(ref, rewards, proposal, beta)
    log_z = gdc.log_mean_weight(log_w)
    exact = (log_w.double().exp().mean(1, keepdim=True)).log()
    torch.testing.assert_close(log_z.double(), exact, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        (log_w - log_z).exp().mean(1), torch.ones(len(ref)), atol=1e-3, rtol=1e-3
    )


@given(tables, st.integers(1, 5), st.integers(2, 6), st.data())
def test_best_of_n_by_counting(shape, k, n, data):
    """And never log 0; a higher reward is never less likely to be the best."""
    rewards, anchors = data.draw(numbers(*shape)), data.draw(numbers(shape[0], k))
    ours = bond.log_best_of(rewards, anchors, n)
    for i, group in enumerate(rewards.tolist()):
        for j, reward in enumerate(group):
            upto = max(sum(x <= reward for x in anchors[i].tolist()) / k, 0.5 / k)
            below = max(sum(x < reward for x in anchors[i].tolist()) / k, 0.5 / k)
            exact = sum(upto ** (n - i) * below ** (i - 1) for i in range(1, n + 1))
            assert ours[i, j].item() == pytest.approx(math.log(exact), abs=1e-5)
    order = rewards.argsort(1)
    assert (ours.gather(1, order).diff(dim=1) >= 0).all()


def points(mine: float, theirs: float, preference: str) -> float:
    """What a reward wins against another: 1, ½ or 0; or σ of their difference."""
    if preference == "hard":
        return (mine > theirs) + 0.5 * (mine == theirs)
    return 1 / (1 + math.exp(theirs - mine))


@given(
    tables.flatmap(lambda x: numbers(*x)),
    st.sampled_from(["square", "kl"]),
    st.sampled_from(["hard", "bradley-terry"]),
)
def test_win_rates_by_counting(rewards, risk, preference):
    """With itself or without; every duel gives one point away."""
    ours, n = wind.win_rates(rewards, risk, preference), rewards.shape[1]
    for i, group in enumerate(rewards.tolist()):
        for j, mine in enumerate(group):
            others = group if risk == "square" else group[:j] + group[j + 1 :]
            won = sum(points(mine, x, preference) for x in others)
            assert ours[i, j].item() == pytest.approx(won / len(others), abs=1e-6)
    torch.testing.assert_close(ours.sum(1), torch.full((len(ours),), n / 2))


@given(tables.flatmap(lambda x: numbers(*x)))
def test_best_and_worst_by_counting(rewards):
    best, worst = dpo.best_and_worst(rewards).T
    for group, i, j in zip(rewards.tolist(), best, worst):
        assert group[i] == max(group) and group[j] == min(group)


@given(tables.flatmap(lambda x: st.tuples(numbers(*x), numbers(*x), numbers(*x))))
def test_kl_estimates_by_counting(drawn):
    """k3 is never negative; both are 0 where policy and start model agree."""
    policy, ref, proposal = (x.double() for x in drawn)
    ours = common.kl_estimates(policy, ref, proposal)
    k1 = k3 = 0.0
    for p, r, q in zip(policy.tolist(), ref.tolist(), proposal.tolist()):
        weights = [math.exp(a - b) for a, b in zip(p, q)]
        for w, a, b in zip(weights, p, r):
            k1 += w / sum(weights) * (a - b) / len(policy)
            k3 += w / sum(weights) * (math.exp(b - a) - 1 - (b - a)) / len(policy)
    assert ours["kl/ref"].item() == pytest.approx(k1, abs=1e-6)
    assert ours["kl/k3"].item() == pytest.approx(k3, rel=1e-6, abs=1e-6) and k3 > -1e-9
    assert not any(x.any() for x in common.kl_estimates(ref, ref, proposal).values())


# ── evaluation ──
WORDS = word_tokenizer()
POLICY, REF = (make_model("llama", len(WORDS), seed=seed) for seed in (0, 1))
JUDGE = common.RewardModel(
    WORDS,
    [1],
    torch.device("cpu"),
    model=make_model("gpt2", len(WORDS), labels=1, seed=2),
    layout=Layout(WORDS),
    same_tokens=True,
)


@given(
    st.lists(st.tuples(rows, st.floats(-1, 1, width=32)), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
)
@hypothesis.settings(max_examples=12)
def test_an_evaluation_is_the_mean_of_its_samples(prompts, per_step, longest, micro, references):
    """Whatever the number of prompts and the size of a pass: a ragged end counts as all others."""
    held_out = [
        common.Prompt(
            str(i),
            [t % len(WORDS) for t in ids],
            "good",
            reference_reward=score if references else None,
        )
        for i, (ids, score) in enumerate(prompts)
    ]
    args = brain.Args(prompts_per_step=per_step, max_response_tokens=longest, micro_batch=micro)
    run = SimpleNamespace(args=args, rank=0, world=1, device=CPU, average=lambda x: x)
    metrics, samples = common.evaluate(run, 3, POLICY, REF, JUDGE, held_out)
    assert [x["prompt"] for x in samples] == [p.text for p in held_out]
    assert metrics["eval/reward"] == pytest.approx(
        sum(x["reward"] for x in samples) / len(samples), abs=1e-5
    )
    assert ("eval/win_rate" in metrics) == references
    if references:
        wins = [
            (x["reward"] > x["reference_reward"]) + 0.5 * (x["reward"] == x["reference_reward"])
            for x in samples
        ]
        assert metrics["eval/win_rate"] == pytest.approx(sum(wins) / len(samples), abs=1e-9)
        error = statistics.pstdev(wins) / len(wins) ** 0.5
        assert metrics["eval/win_rate_se"] == pytest.approx(error, abs=1e-6)
        ended = [win for win, x in zip(wins, samples) if x["ended"]]
        assert ("eval/win_rate_ended" in metrics) == bool(ended)
        if ended:
            assert metrics["eval/win_rate_ended"] == pytest.approx(statistics.mean(ended))
    assert [x["ended"] for x in samples].count(True) == metrics["eval/eos_rate"] * len(samples)
    assert 1 <= metrics["eval/length"] <= longest and 0 <= metrics["eval/eos_rate"] <= 1
    same, _ = common.evaluate(run, 9, POLICY, REF, JUDGE, [replace(p) for p in held_out])
    assert same == metrics
    assert common.evaluate(run, 3, POLICY, POLICY, JUDGE, held_out)[0]["eval/kl"] == 0
