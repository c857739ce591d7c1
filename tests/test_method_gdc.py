"""GDC's equations on tables and on a model whose every response can be listed."""

import itertools
import math

import pytest
import torch
from models import write_jsonl
from tables import (
    all_responses,
    distance,
    expectation,
    gradient,
    make_small_world,
    posterior,
    samplers,
    slow,
    table,
    train,
)

import common
import gdc

REF, REWARDS, PROPOSAL, LOGITS = table(0, 4).log_softmax(0), table(1, 4), table(2, 4), table(3, 4)
PROPOSAL = PROPOSAL.log_softmax(0)
BETA = 0.8
TARGET = posterior(REF, REWARDS, BETA)
LOG_Z = (REF + REWARDS / BETA).logsumexp(0)


def expected_gradient(baseline, logits, normalizer, n, proposal=PROPOSAL):
    """Exact mean gradient in the logits of gdc.py's loss over all n-tuples of the proposal."""

    def one(picks):
        log_w = gdc.log_weights(REF[picks][None], REWARDS[picks][None], proposal[picks][None], BETA)
        log_z = LOG_Z if normalizer == "exact" else gdc.log_mean_weight(log_w)
        weights = (log_w - log_z).exp()
        return gradient(
            logits, lambda q: gdc.gdc_loss(q[picks][None], proposal[picks][None], weights, baseline)
        )

    return expectation(proposal, n, one)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("baseline", ["none", "gdc++"])
def test_eq1_eq2_expected_gradient_is_that_of_the_divergence(baseline, n):
    """With the true Z both have the mean gradient ∇KL(p*‖π) = π − p*, whatever the proposal."""
    exact = LOGITS.softmax(0) - TARGET.exp()
    torch.testing.assert_close(
        expected_gradient(baseline, LOGITS, "exact", n), exact, atol=1e-10, rtol=0
    )


def test_eq2_every_weight_is_zero_at_the_target():
    """With the true Z, GDC++ has no gradient on any sample where π = p*; GDC has, and its mean is
    zero."""
    picks = torch.arange(4)
    weights = (TARGET - PROPOSAL).exp()[None]
    for baseline, zero in (("gdc++", True), ("none", False)):
        got = gradient(
            TARGET,
            lambda q, baseline=baseline: gdc.gdc_loss(
                q[picks[:1]][None], PROPOSAL[:1][None], weights[:, :1], baseline
            ),
        )
        assert (got.abs().max() < 1e-12) == zero
    assert expected_gradient("none", TARGET, "exact", 2).abs().max() < 1e-12


def test_eq3_by_hand_and_its_bias():
    """Ẑ is the mean of w; N·w/ΣW tends to w/Z as N grows, so the mean gradient at p* tends to 0."""
    log_w = torch.tensor([[1.0, 2.0, 6.0]]).log()
    torch.testing.assert_close(gdc.log_mean_weight(log_w), torch.tensor([[3.0]]).log())
    for baseline in ("none", "gdc++"):
        gaps = [expected_gradient(baseline, TARGET, "prompt", n).norm() for n in (2, 4, 6)]
        assert gaps[0] > gaps[1] > gaps[2] > 1e-3  # biased, less and less
        on_policy = expected_gradient(baseline, TARGET, "prompt", 3, proposal=TARGET)
        assert on_policy.norm() < 1e-12  # not where the proposal has come to the target as well


def test_prompt_normalizer_without_baseline_is_self_normalisation():
    """CDPG's Ẑ(x): w/(N·Ẑ) is softmax(log w)."""
    log_w = table(5, 3, 6)
    weights = (log_w - gdc.log_mean_weight(log_w)).exp() / 6
    torch.testing.assert_close(weights, log_w.softmax(1))


def test_eq4_is_the_divergence_in_expectation():
    """With the true Z the mean over the proposal is KL(p*‖h), of the proposal and of a policy."""
    for h in (PROPOSAL, LOGITS.log_softmax(0)):

        def one(picks, h=h):
            log_w = gdc.log_weights(
                REF[picks][None], REWARDS[picks][None], PROPOSAL[picks][None], BETA
            )
            log_target = (REF + REWARDS / BETA)[picks][None]
            return gdc.kl_from_target(log_w, LOG_Z, log_target, h[picks][None])[0]

        exact = (TARGET.exp() * (TARGET - h)).sum()
        torch.testing.assert_close(expectation(PROPOSAL, 2, one), exact, atol=1e-10, rtol=0)


def test_eq4_with_z_of_the_prompt():
    """By hand: w = (1, 3), Ẑ = 2: −log 2 + ½·mean(w·(log P − log h))."""
    log_w, target, h = (torch.tensor([x]).log() for x in ([1.0, 3.0], [0.5, 0.9], [0.25, 0.3]))
    got = gdc.kl_from_target(log_w, gdc.log_mean_weight(log_w), target, h)
    expected = -math.log(2) + (math.log(2) + 3 * math.log(3)) / 4
    assert got.shape == (1,) and got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mu", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_gaussian_closed_forms_of_the_variance(mu):
    """Target N(0,1), model N(1,1), proposal N(μ,1), n = 8: variances of DPG and of GDC++, the
    moments of one sample's gradient integrated on a grid."""
    n, x = 8, torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    theta = torch.ones_like(x, requires_grad=True)
    proposal, target = -(x - mu).square() / 2, -x.square() / 2
    two = math.exp(mu**2) * (1 + (1 + mu) ** 2)
    exact = {
        "none": (two - 1) / n,
        "gdc++": (
            two
            + math.exp((1 - mu) ** 2) * (1 + (1 - mu) ** 2)
            - 2 * math.exp(mu**2 - mu) * (1 + mu**2)
            - 1
        )
        / n,
    }
    for baseline, variance in exact.items():
        loss = gdc.gdc_loss(
            -(x - theta).square() / 2, proposal, (target - proposal).exp(), baseline
        )
        (got,) = torch.autograd.grad(loss.sum(), theta)
        density = proposal.exp() / proposal.exp().sum()
        mean = (density * got).sum()
        assert mean.item() == pytest.approx(1, abs=1e-6)
        assert ((density * (got - mean).square()).sum() / n).item() == pytest.approx(
            variance, rel=1e-6
        )


def test_invariances():
    """The order of samples changes nothing; a constant in the reward is absorbed by Ẑ(x)."""
    ref, rewards, proposal, logprobs = (table(i, 3, 5) for i in range(4))

    def loss(ref, rewards, proposal, logprobs):
        log_w = gdc.log_weights(ref, rewards, proposal, BETA)
        weights = (log_w - gdc.log_mean_weight(log_w)).exp()
        return gdc.gdc_loss(logprobs, proposal, weights, "gdc++")

    expected = loss(ref, rewards, proposal, logprobs)
    order = torch.randperm(5)
    torch.testing.assert_close(
        loss(*(x[:, order] for x in (ref, rewards, proposal, logprobs))), expected
    )
    torch.testing.assert_close(loss(ref, rewards + 3, proposal, logprobs), expected)


# ── the script ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of an enumerable world of 6 responses."""
    return make_small_world(tmp_path_factory.mktemp("gdc"), 1) | {"beta": 2.5}


@pytest.mark.parametrize(
    "more",
    [
        {"max_response_tokens": 2},
        slow({"proposal": "sft"}),
        slow({"proposal": "policy", "baseline": "none", "samples_per_prompt": 256, "lr": 1e-3}),
        {"normalizer": "running", "proposal": "policy"},
        slow({"normalizer": "running", "baseline": "none", "samples_per_prompt": 256, "lr": 1e-3}),
    ],
)
def test_the_loop_reaches_the_target(world, tmp_path, more):
    """main() comes within 0.02 in total variation of p* from the start model, by every variant."""
    ref, rewards = all_responses(world | more, world["policy"])
    target = posterior(ref, rewards, world["beta"])
    after, lines = train(gdc, world, tmp_path / "run", True, **more)
    assert distance(ref, target) > 0.15 and distance(after, target) < 0.02
    log_z = (ref + rewards / world["beta"]).logsumexp(0)
    z = [line["gdc/z"] for line in lines[1:]]
    assert sum(z[-50:]) / 50 == pytest.approx(log_z.exp().item(), rel=0.05)
    assert all(0 < line["weights/ess"] <= 1 + 1e-5 for line in lines[1:])


def test_eq4_the_proposal_is_replaced_when_the_policy_is_closer(world, tmp_path, monkeypatch):
    """Decisions follow the two estimates, are logged when they are made, and change who draws."""
    draws = samplers(monkeypatch)
    _, lines = train(gdc, world, tmp_path / "run", steps=60, test_every=5)
    tests = [line for line in lines if "gdc/replaced" in line]
    assert [line["step"] for line in tests] == list(range(5, 61, 5))
    for line in tests:
        assert line["gdc/replaced"] == (line["gdc/kl_policy"] < line["gdc/kl_proposal"])
    assert tests[0]["gdc/replaced"] == 1
    changes = [not torch.equal(first, second) for first, second in itertools.pairwise(draws)]
    replaced = {line["step"] for line in tests if line["gdc/replaced"]}
    assert {step for step, change in enumerate(changes, 1) if change} == replaced - {60}


def test_eq4_the_proposal_is_tested_on_prompts_that_come_next(world, tmp_path, monkeypatch):
    """Those of the next step: on those of this step the policy, just trained on them, looks better
    than it is."""
    texts = [" ".join(words) for n in (1, 2, 3) for words in itertools.product("ab", repeat=n)]
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": text} for text in texts])
    seen, original = [], common.sample

    def sample(model, prompts, n, *more, **named):
        if n == 5:
            seen.append([prompt.text for prompt in prompts])
        return original(model, prompts, n, *more, **named)

    monkeypatch.setattr(common, "sample", sample)
    flags = {"dataset": data, "steps": 3, "test_every": 2, "samples_per_prompt": 5}
    gdc.main(gdc.Args(**world | flags | {"run_dir": str(tmp_path / "run")}))
    first, second, test, third = seen
    assert test == third and not set(test) & set(first + second)


def test_eq3_running_normalizer_is_the_mean_over_all_samples(world, tmp_path, monkeypatch):
    """gdc/z of step t is the mean of w over the steps 1 to t, also across --resume."""
    seen, original = [], gdc.log_weights
    monkeypatch.setattr(gdc, "log_weights", lambda *x: seen.append(original(*x)) or seen[-1])
    _, lines = train(gdc, world, tmp_path / "run", steps=7, normalizer="running")
    means = torch.stack([x.double().exp().mean() for x in seen])
    for t, line in enumerate(lines[1:], 1):
        assert line["gdc/z"] == pytest.approx(means[:t].mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    "more, behind, flags",
    [
        ({}, -200.0, "--lr or fewer --updates-per-sample"),
        ({"normalizer": "running", "beta": 1e-3}, 0.0, "--beta"),
    ],
    ids=["policy", "target"],
)
def test_weights_that_overflow_stop_the_run(
    world, tmp_path, monkeypatch, capsys, more, behind, flags
):
    """π_θ/q′ = e^200, or P/q′ > e^709, ends in one line that names the flag to change."""
    loss = gdc.gdc_loss
    monkeypatch.setattr(gdc, "gdc_loss", lambda q, proposal, *x: loss(q, proposal + behind, *x))
    with pytest.raises(SystemExit) as stop:
        train(gdc, world, tmp_path / "run", steps=2, **more)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: the ") and "\n" not in error
    assert "is NaN or infinite for the prompt 'a b'" in error and flags in error


@pytest.mark.parametrize("proposal, moves", [("sft", False), ("policy", True)])
def test_bug27_the_fixed_proposal_stays(world, tmp_path, monkeypatch, proposal, moves):
    """--proposal sft draws from the start model throughout, policy from the policy."""
    draws = samplers(monkeypatch)
    _, lines = train(gdc, world, tmp_path / "run", steps=4, proposal=proposal)
    assert all("gdc/replaced" not in line for line in lines)
    assert [torch.equal(draws[0], later) for later in draws[1:]] == [not moves] * 3
