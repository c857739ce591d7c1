"""DPO's and SLiC's losses on tables and on a model whose every response can be listed."""

import math

import pytest
import torch
from models import make_model, word_tokenizer, write_jsonl
from tables import (
    all_responses,
    distance,
    expectation,
    gradient,
    make_small_world,
    posterior,
    samplers,
    table,
    train,
)

import common
import dpo

FREE = torch.zeros(1, dtype=torch.bool)


def loss(logprobs, ref, tied=FREE, **flags):
    """dpo.py's loss [P] with the given flags."""
    return dpo.dpo_loss(logprobs, ref, tied, dpo.Args(**flags))


def test_bug26_eq1_eq2_eq3_by_hand():
    """log π = (−1, −3), log π_ref = (−2, −2.5), so Δ = 1.5; y_ref has −4."""
    logprobs, ref = torch.tensor([[-1.0, -3.0, -4.0]]), torch.tensor([[-2.0, -2.5, -7.0]])
    assert loss(logprobs, ref, beta=0.4).item() == pytest.approx(math.log(1 + math.exp(-0.6)))
    assert loss(logprobs, ref, beta=0.4, loss="hinge").item() == pytest.approx(0.4)
    assert loss(logprobs, ref, beta=2.0, loss="hinge").item() == 0
    slic = loss(logprobs, ref, loss="slic", margin=3.0, reference_weight=0.5)
    assert slic.item() == pytest.approx(3 - 2 + 0.5 * 4)
    assert loss(logprobs, ref, loss="slic", margin=1.0, reference_weight=0.0).item() == 0


@pytest.mark.parametrize("name, start", [("sigmoid", math.log(2)), ("hinge", 1.0), ("slic", 5.0)])
def test_bug18_ties_have_no_gradient_and_the_start_has_its_value(name, start):
    """At π = π_ref the loss is ln 2, or 1; a tied pair keeps that value and has gradient zero."""
    ref = table(0, 2, 3)
    logprobs = ref.clone().requires_grad_()
    tied = torch.tensor([False, True])
    out = loss(logprobs, ref, tied, loss=name, reference_weight=0.0, margin=5.0)
    assert out[1].item() == pytest.approx(start)
    if name != "slic":  # SLiC as published knows no reference
        assert out[0].item() == pytest.approx(start)
    out.sum().backward()
    assert logprobs.grad[1].abs().max() == 0
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]


def test_eq1_gradient():
    """−∂L/∂log π(y_w) = τ·σ(−τΔ), and the opposite for y_l."""
    logprobs, ref = table(0, 4, 2).requires_grad_(), table(1, 4, 2)
    loss(logprobs, ref, torch.zeros(4, dtype=torch.bool), beta=0.7).sum().backward()
    delta = ((logprobs - ref)[:, 0] - (logprobs - ref)[:, 1]).detach()
    expected = 0.7 * torch.sigmoid(-0.7 * delta)
    torch.testing.assert_close(logprobs.grad, torch.stack([-expected, expected], 1))


def pair_gradient(logits, ref, label, beta, name="sigmoid", sampler=None):
    """Exact mean gradient over pairs of samples of the start model, or of another distribution, each
    order with its probability."""

    def one(picks):
        if picks[0] == picks[1]:
            return torch.zeros_like(logits)
        wins = label(picks)
        return sum(
            p
            * gradient(
                logits,
                lambda q, order=order: loss(
                    q[picks[order]][None], ref[picks[order]][None], beta=beta, loss=name
                ),
            )
            for p, order in ((wins, [0, 1]), (1 - wins, [1, 0]))
        )

    return expectation(ref if sampler is None else sampler, 2, one)


def test_eq1_zero_gradient_at_the_target_with_bradley_terry_labels():
    """P(w ≻ l) = σ(r_w − r_l) and coefficient τ: the optimum is p·exp(r/τ)/Z."""
    ref, rewards, beta = table(0, 4).log_softmax(0), table(1, 4), 0.6
    target = posterior(ref, rewards, beta)

    def labels(picks):
        return torch.sigmoid(rewards[picks[0]] - rewards[picks[1]])

    for sampler in (ref, target, table(2, 4).log_softmax(0)):  # of the start, the policy, any model
        assert pair_gradient(target, ref, labels, beta, sampler=sampler).abs().max() < 1e-12
    assert pair_gradient(target, ref, labels, 2 * beta).norm() > 1e-2
    assert pair_gradient(ref, ref, labels, beta).norm() > 1e-2


def test_best_against_worst_has_no_finite_optimum():
    """With noiseless labels a larger Δ is always better: along rewards the loss falls for ever."""
    ref, rewards = table(0, 4).log_softmax(0), table(1, 4)

    def labels(picks):
        return (rewards[picks[0]] > rewards[picks[1]]).double()

    slopes = [
        (pair_gradient(ref + k * rewards, ref, labels, 1.0) * rewards).sum().item()
        for k in (0, 1, 4, 16)
    ]
    assert all(slope < 0 for slope in slopes)


def test_best_and_worst():
    """Indices of the extremes of each prompt."""
    rewards = torch.tensor([[0.0, 3.0, -1.0], [2.0, 2.0, 2.0]])
    assert dpo.best_and_worst(rewards)[0].tolist() == [1, 2]


def test_invariances():
    """A constant in both log-probs of a prompt, and in all of π_ref's, changes nothing."""
    logprobs, ref, free = table(0, 3, 2), table(1, 3, 2), torch.zeros(3, dtype=torch.bool)
    for name in ("sigmoid", "hinge"):
        expected = loss(logprobs, ref, free, loss=name)
        moved = loss(logprobs + table(2, 3, 1), ref - table(3, 3, 1), free, loss=name)
        torch.testing.assert_close(moved, expected)
        torch.testing.assert_close(
            loss(logprobs.float(), ref.float(), free, loss=name).double(),
            expected,
            atol=1e-6,
            rtol=1e-5,
        )


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world with 6 responses."""
    return make_small_world(tmp_path_factory.mktemp("dpo"), 1) | {
        "prompts_per_step": 128,
        "samples_per_prompt": 2,
        "steps": 300,
        "beta": 2.0,
    }


@pytest.mark.slow
def test_the_loop_reaches_the_target_with_bradley_terry_labels(world, tmp_path, monkeypatch):
    """main() comes within 0.02 of p·exp(r/τ)/Z in total variation when two samples are labelled
    with Bradley-Terry noise in place of best against worst."""
    generator = torch.Generator().manual_seed(0)

    def noisy(rewards):
        first = torch.rand(len(rewards), generator=generator) < torch.sigmoid(
            rewards[:, 0] - rewards[:, 1]
        )
        return torch.stack([(~first).long(), first.long()], 1)

    monkeypatch.setattr(dpo, "best_and_worst", noisy)
    ref, rewards = all_responses(world, world["policy"])
    after, lines = train(dpo, world, tmp_path / "run", True, lr=3e-3, prompts_per_step=512)
    target = posterior(ref, rewards, world["beta"])
    assert distance(ref, target) > 0.1 and distance(after, target) < 0.02
    same = (ref.exp()[:, None] * ref.exp() * (rewards[:, None] == rewards)).sum().item()
    ties = sum(line["dpo/ties"] for line in lines[1:]) / len(lines[1:])
    assert ties == pytest.approx(same, abs=0.01)


@pytest.mark.parametrize("name, start", [("sigmoid", math.log(2)), ("hinge", 1.0), ("slic", None)])
@pytest.mark.parametrize("pairs", ["sampled", "dataset"])
def test_first_loss_and_what_training_does(world, tmp_path, name, start, pairs):
    """Step 1 shows ln 2 (or 1) to 1e-6; then the chosen response gains on the rejected one."""
    if pairs == "dataset":  # data sets cannot hold the empty response: "a" against "b"
        world = world | {"prompts_per_step": 8}
    _, lines = train(dpo, world, tmp_path / "run", steps=12, loss=name, pairs=pairs, warmup_steps=0)
    if start:
        assert lines[1]["loss"] == pytest.approx(start, abs=1e-6)
        assert lines[-1]["loss"] < start
    if pairs == "dataset":
        gap = [line["logprob/chosen"] - line["logprob/rejected"] for line in lines[1:]]
        assert gap[-1] > gap[0]


@pytest.mark.parametrize("pairs, moves", [("sampled", False), ("policy", True)])
def test_who_draws_the_pairs(world, tmp_path, monkeypatch, pairs, moves):
    """The start model throughout, or the policy as it is (online DPO)."""
    draws = samplers(monkeypatch)
    train(dpo, world, tmp_path / "run", steps=4, pairs=pairs, warmup_steps=0)
    assert [torch.equal(draws[0], later) for later in draws[1:]] == [not moves] * 3


def test_kl_of_pairs_of_the_policy_has_no_weights(world, tmp_path, monkeypatch):
    """Both samples of --pairs policy count alike, as they are the policy's own: kl/ref is the mean
    log-ratio, which is what an evaluation measures."""
    seen, original = [], common.kl_estimates
    monkeypatch.setattr(common, "kl_estimates", lambda *x: seen.append(x) or original(*x))
    flags = {"steps": 6, "pairs": "policy", "lr": 0.02, "warmup_steps": 0, "loss": "hinge"}
    _, lines = train(dpo, world, tmp_path / "run", **flags)
    for line, (policy, ref, _) in zip(lines[1:], seen, strict=True):
        assert line["kl/ref"] == pytest.approx((policy - ref).mean().item(), abs=1e-5)
    assert lines[-1]["kl/ref"] > 0.05


def test_slic_trains_on_the_references(world, tmp_path):
    """λ alone: the data set's completion "a" gains."""
    ref, _ = all_responses(world, world["policy"])
    after, _ = train(
        dpo,
        world,
        tmp_path / "run",
        steps=20,
        loss="slic",
        margin=1e-9,
        reference_weight=1.0,
        prompts_per_step=8,
    )
    assert after[4] > ref[4] + 0.05  # token 4 is "a"


def test_pairs_of_the_dataset_reach_the_batch(world, tmp_path, monkeypatch):
    """Chosen first, rejected second, each closed by the end token and cut at the most tokens."""
    seen, original = [], common.encode_responses

    def encode_responses(*x, **named):
        seen.append((x[3], original(*x, **named)))
        return seen[-1][1]

    monkeypatch.setattr(common, "encode_responses", encode_responses)
    train(
        dpo,
        world,
        tmp_path / "run",
        steps=1,
        pairs="dataset",
        prompts_per_step=2,
        max_pair_tokens=2,
        max_response_tokens=1,
    )
    texts, batch = seen[-1]
    assert original(
        word_tokenizer(["a", "b"]),
        make_model("llama"),
        [common.Prompt("", [4])],
        [["a <eos> b", "a"]],
        9,
    ).responses == [[[4, 1], [4, 1]]]
    assert texts == [["a", "b"]] * 2
    assert batch.responses == [[[4, 1], [5, 1]]] * 2


def test_a_dataset_without_pairs_is_an_error(world, tmp_path, capsys):
    """--pairs dataset needs both columns, --loss slic a completion."""
    folder = tmp_path / "data"
    write_jsonl(folder / "train.jsonl", [{"prompt": "a b"}] * 4)
    for flags in ({"pairs": "dataset"}, {"loss": "slic"}):
        with pytest.raises(SystemExit) as stop:
            train(dpo, world, tmp_path / "run", dataset=str(folder), **flags)
        assert stop.value.code == 2 and "a prompt has no" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_c7_pairs_that_become_equal_by_cutting_are_dropped_and_counted(capsys):
    """Two responses are cut at 3 tokens and one at the context; one pair is then the same."""
    tokenizer, policy = word_tokenizer(["a", "b"]), make_model("llama")
    policy.context = 9
    pairs = [("a a a b", "a a a a"), ("a b", "b a"), ("a", "a b")]
    prompts = [
        common.Prompt("a", [4] * (1 + 6 * (chosen == "a")), chosen=chosen, rejected=rejected)
        for chosen, rejected in pairs
    ]
    kept = dpo.unlike_pairs(tokenizer, policy, prompts, 3)
    assert kept == prompts[1:]
    assert "2 pairs, 1 of equal responses dropped; 3 responses were cut" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        dpo.unlike_pairs(tokenizer, policy, prompts[:1], 3)
    assert "--dataset: no pair of unlike responses" in capsys.readouterr().err
