"""analyze/ablation.py and analyze/wind_cost.py: what they compute is right, and their pages are fresh."""

import itertools
import math

import pytest
import torch
from tables import expectation, make_small_world

import brain
import common
from analyze import ablation, gradient_pool, wind_cost
from analyze.ablation import Setting, train
from plumbing.report import read_lines

SHORT = 600  # steps: BRAIn is at the target, the ablations where they stop
EASY = {"scale": 0.5, "steps": SHORT}


# ── the product world ──


def test_the_sum_over_its_tokens_is_a_response_and_the_kl_is_exact():
    first, second = (part[None, :3, :2].log_softmax(-1) for part in ablation.world(3, 1.0))
    tokens = torch.tensor(list(itertools.product(range(2), repeat=3))).T[None]  # all 8 responses
    p, q = (ablation.of_responses(part, tokens)[0] for part in (first, second))
    assert p.exp().sum() == pytest.approx(1)
    assert ablation.kl(first, second).item() == pytest.approx((p.exp() * (p - q)).sum().item())


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    ref, _ = ablation.world(0, 1.0)
    ref = torch.stack([ref, ref.flip(-1)])
    tokens = ablation.draw_tokens(ref, 20_000, torch.Generator().manual_seed(1))
    shares = torch.nn.functional.one_hot(tokens, ablation.WORDS).double().mean(2)
    assert (shares - ref.exp()).abs().max() < 4 * 0.5 / math.sqrt(20_000)


def test_the_notes_numbers_brain_reaches_the_target_and_both_ablations_stop_where_1_says():
    at = {name: train(Setting(name, **EASY), (0, 1)) for name in ablation.ESTIMATORS}
    assert at["brain"]["kl_of_target"][0] == pytest.approx(1.79, abs=0.005)
    assert max(at["brain"]["kl_from_target"]) < 0.01
    stops = ablation.stop(Setting("no-baseline", **EASY), (0, 1))
    assert stops[0] == pytest.approx(0.313, abs=0.02)
    for name in ("no-baseline", "no-self-norm"):
        assert at[name]["kl_from_target"] == pytest.approx(stops, rel=0.15)


def test_with_a_renewed_proposal_all_three_agree():
    for name in ablation.ESTIMATORS:
        assert max(train(Setting(name, refresh=50, **EASY), (0, 1))["kl_from_target"]) < 0.02


def test_seeds_side_by_side_are_runs_of_their_own():
    # The gradient of a seed's logits is that of its own responses, divided by its own groups only.
    settings = Setting("no-baseline", scale=0.5, steps=300)
    together, alone = train(settings, (4, 5)), train(settings, (5,))
    assert together["kl_of_target"][1] == alone["kl_of_target"][0]
    assert together["kl_from_target"][1] == pytest.approx(alone["kl_from_target"][0], rel=0.2)


def test_1_is_at_most_log_n_nats_from_the_proposal_by_enumeration():
    rewards = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    prior = rewards.flip(0).log_softmax(-1)

    def chosen(picks):
        none = torch.zeros(1, len(picks), dtype=torch.float64)
        weights = brain.posterior_weights(none, rewards[picks][None], none, 1.0)[0]
        return torch.zeros(4, dtype=torch.float64).index_add(0, picks, weights)

    for n in (2, 3):
        mixed = expectation(prior, n, chosen)
        assert mixed.sum() == pytest.approx(1)
        assert (mixed / prior.exp()).max() < n
        assert 0 < (mixed * (mixed.log() - prior)).sum() < math.log(n)


# ── the bandit ──


def test_win_rates_and_best_of_n_of_the_bandit_by_enumeration():
    ref, rewards = wind_cost.world((1,), arms=5)
    policy, ref, rewards = ref[0], ref[1], rewards[0]
    duels = ((rewards[:, None] - rewards).sign() + 1) / 2
    torch.testing.assert_close(wind_cost.win_rates_over(policy), duels @ policy.exp())
    best = expectation(ref, 3, lambda picks: torch.eye(5).double()[picks.max()])  # ascending
    torch.testing.assert_close(wind_cost.best_of(ref, 3).exp(), best)


@pytest.mark.parametrize(("beta", "win", "nats"), [(0.25, 0.7687, 0.5952), (1.0, 0.5820, 0.0413)])
def test_the_equilibrium_is_one_and_is_near_the_closed_forms(beta, win, nats):
    ref, rewards = wind_cost.world((1,))
    star = wind_cost.equilibrium(ref, beta)
    residual = star - (ref + wind_cost.win_rates_over(star) / beta).log_softmax(-1)
    assert residual.abs().max() < 1e-10
    at = wind_cost.standing(star, ref, star, rewards)
    assert at["win_rate"].mean().item() == pytest.approx(win, abs=2e-3)
    assert at["kl"].mean().item() == pytest.approx(nats, abs=1e-2)
    assert at["kl_from_equilibrium"].abs().max() < 1e-12


@pytest.mark.parametrize("eta", [0.1, 0.4])
def test_the_exact_step_comes_closer_at_the_linear_rate(eta):
    ref, _ = wind_cost.world((2,))
    star, policy = wind_cost.equilibrium(ref, 0.1), ref
    start = wind_cost.kl(star, ref)
    for t in range(1, 100):
        policy = wind_cost.exact_step(policy, ref, 0.1, eta)
        assert (wind_cost.kl(star, policy) <= (1 + 0.1 * eta) ** -t * start + 1e-12).all()


def test_on_the_bandit_wind_comes_to_its_equilibrium_and_the_others_go_past_it(monkeypatch):
    monkeypatch.setattr(wind_cost, "CONTEXTS", 2)
    monkeypatch.setattr(wind_cost, "BETA", 0.5)
    methods = wind_cost.METHODS | {"WIND": wind_cost.Method("wind", {"beta": 0.5})}
    found = {
        name: wind_cost.train(methods[name], (1, 2), steps=300, arms=5)
        for name in ("WIND", "SPPO (β = 0)", "J-BOND", "iterative BOND")
    }
    for name, line in found.items():
        for seed in range(2):
            wins, far = line["win_rate"][seed], line["kl_from_equilibrium"][seed]
            assert wins[0] == pytest.approx(0.5) and far[0] > 0.05
            assert far[-1] < 0.01 if name == "WIND" else far[-1] > 0.1
            assert wins[-1] >= found["WIND"]["win_rate"][seed][-1]


def test_what_a_step_asks():
    asks = {name: method.comparisons() for name, method in wind_cost.METHODS.items()}
    # 8 samples: 28 pairs; 8 against 2 and these against each other; 8 against 4, and 2 of the 4
    assert (asks["WIND"], asks["J-BOND"], asks["iterative BOND"]) == (28, 17, 33)


def test_when_a_curve_first_reaches_a_height():
    assert wind_cost.reached([0, 10, 20], [0.5, 0.7, 0.9], 0.8) == pytest.approx(15)
    assert wind_cost.reached([0, 10, 20], [0.5, 0.9, 0.7], 0.6) == pytest.approx(2.5)
    assert wind_cost.reached([0, 10], [0.5, 0.7], 0.8) is None


def test_what_a_run_has_cost_where_its_win_rate_is_first_reached():
    rates = ((0, 0.5, 0.0), (50, 0.7, 1.0), (100, 0.9, 2.0))
    curve = [dict(zip(("step", "win_rate", "kl"), point)) for point in rates]
    run = {"curve": curve, "samples": 1000, "cpu_seconds": 10.0}
    found = wind_cost.tiny_cost(run, 0.8)
    assert found == pytest.approx({"samples": 750, "cpu_seconds": 7.5, "kl": 1.5})
    assert wind_cost.tiny_cost(run, 0.95) is None


# ── gradients from a pool ──
COUNTS = torch.tensor([10, 10, 8, 6, 4, 2])  # of the responses in the pool: what the proposal is


def exact_pool() -> dict:
    """A pool of one prompt in which six responses are as frequent as the proposal has them."""
    generator = torch.Generator().manual_seed(3)
    ref, rewards = torch.randn((2, 6), generator=generator, dtype=torch.float64)
    ref = ref.log_softmax(0)
    place = torch.arange(6).repeat_interleave(2 * COUNTS)  # so that both halves have them
    gradients = torch.eye(6, dtype=torch.float64) - ref.exp()  # of log-probs by the logits
    values = {"ref": ref, "rewards": rewards, "drawn": (COUNTS / 40).double().log()}
    pool = {key: value[place][None] for key, value in values.items()}
    return pool | {"gradients": gradients[place][None], "share": 0.5} | {"of": (values, gradients)}


def test_means_and_variances_of_estimates_from_a_pool_by_enumeration(monkeypatch):
    monkeypatch.setattr(gradient_pool, "SAMPLES", 2)
    monkeypatch.setattr(gradient_pool, "REPETITIONS", 60_000)
    pool, beta = exact_pool(), 0.7
    values, gradients = pool["of"]
    target = (values["ref"] + values["rewards"] / beta).log_softmax(0)
    log_z = (values["ref"] + values["rewards"] / beta).logsumexp(0).item()
    true = target.exp() - values["ref"].exp()  # −∇KL(T‖p) by the logits
    for line in gradient_pool.measure(pool, pool, beta):

        def estimate(picks, arm=line["arm"]):
            weights = gradient_pool.sample_weights(arm, values, picks[None], beta, log_z)
            return weights[0] @ gradients[picks]

        mean = expectation(values["drawn"], 2, estimate)
        square = expectation(values["drawn"], 2, lambda picks: estimate(picks).square().sum())
        norm, off = true @ true, (mean - true).square().sum()
        found = {key: line[key]["value"] for key in ("variance", "along", "bias2")}
        assert found["variance"] == pytest.approx(((square - mean @ mean) / norm).item(), rel=0.05)
        assert found["along"] == pytest.approx((mean @ true / norm).item(), abs=0.04)
        assert found["bias2"] == pytest.approx((off / norm).item(), abs=0.03)
        unbiased = line["arm"] in ("DPG", "GDC++")
        assert off < 1e-12 if unbiased else off > 0.05 * norm, (line["arm"], off, norm)
        kl = (values["drawn"].exp() * (values["drawn"] - target)).sum().item()
        assert line["kl"] == pytest.approx(kl)


def test_the_bias_is_without_the_error_of_small_pools(monkeypatch):
    # DPG has none; the halves of a pool of 40 are each off by more than that.
    monkeypatch.setattr(gradient_pool, "ARMS", ("DPG",))
    pool = exact_pool()
    picks = torch.randint(80, (150, 40), generator=torch.Generator().manual_seed(4))
    pools = {key: pool[key][0][picks] for key in ("ref", "drawn", "rewards", "gradients")}
    (line,) = gradient_pool.measure(pools | {"share": 0.5}, pools, beta=0.7)
    assert line["bias2"]["low"] < 0 < line["bias2"]["high"]
    assert line["along"]["value"] == pytest.approx(1, abs=0.1)
    assert line["bias2"]["high"] - line["bias2"]["low"] < 0.15


def test_a_gradient_that_is_not_told_from_0_is_not_resolved(tmp_path):
    """Ratios to it are in neither the table nor the picture; those of other targets are."""
    found = {"value": 2.0, "low": 1.5, "high": 3.0}
    line = {"variance": found, "along": found, "bias2": found}
    assert gradient_pool.cells(line)[:2] == ["2.00 (1.50 to 3.00)"] * 2
    unknown = line | {"variance": {"value": -700.0, "low": -2500.0, "high": 2200.0}}
    assert gradient_pool.cells(unknown) == ["not resolved"] * 3
    about = {"world": "real", "share": 0.0, "prompts": 4, "pool": 9}
    lines = [
        about | part | {"arm": arm, "beta": beta, "kl": 1 / beta}
        for arm in gradient_pool.ARMS
        for beta, part in ((0.5, line), (1.0, unknown))
    ]
    gradient_pool.draw(lines, tmp_path / "picture.png")
    assert gradient_pool.section(lines).count("not resolved") == 3 * len(gradient_pool.ARMS)


def test_the_projection_keeps_products():
    first, second = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(1))
    second = second + first
    project = gradient_pool.Projection(20_000)
    product = project(first) @ project(second)
    assert product.item() == pytest.approx((first @ second).item(), rel=0.1)
    torch.testing.assert_close(project(first + second), project(first) + project(second))


def test_the_gradients_of_all_responses_cancel(tmp_path):
    # Σ_y p(y) ∇log p(y) = 0, so a gradient that lacks a token or has one twice shows.
    names = ("policy", "reward_model", "dataset", "max_prompt_tokens", "max_response_tokens")
    world = make_small_world(tmp_path, responses=1)
    args = brain.Args(**{name: world[name] for name in names})
    run, tokenizer = common.Run(args, brain.__file__), common.load_tokenizer("", args.policy)
    policy = common.load_policy(run, tokenizer)
    prompts, _ = common.load_prompts(args, tokenizer)
    batch = common.Batch(prompts[:1], [[[i] for i in range(len(tokenizer))]])
    for which in ("all", "last"):
        weights = gradient_pool.weights_of(policy, which)
        project = gradient_pool.Projection(sum(weight.numel() for weight in weights))
        logprobs, found = gradient_pool.gradients(policy, batch, weights, project)
        assert logprobs.exp().sum() == pytest.approx(1, abs=1e-5)
        total = logprobs[0].exp().float() @ found[0]
        assert total.norm() < 1e-4 * found[0].norm(dim=1).max() and found[0].norm(dim=1).min() > 0


# ── pages ──


def test_the_page_of_the_ablation_is_that_of_its_raw_lines():
    lines = read_lines(ablation.RESULTS / "ablation.jsonl")
    assert {line["part"] for line in lines} == {"product", "stop"}
    measured = {Setting(**line["setting"]) for line in ablation.lines_of("product")}
    assert measured == set(ablation.SETTINGS)
    page = ablation.ROOT / "docs" / "ablation.md"
    assert ablation.page() == page.read_text(encoding="utf-8")


def test_the_page_of_the_costs_is_that_of_its_raw_lines():
    lines = wind_cost.bandit_lines()
    assert [line["method"] for line in lines] == list(wind_cost.METHODS)
    page = wind_cost.ROOT / "docs" / "wind_cost.md"
    assert wind_cost.page() == page.read_text(encoding="utf-8")
