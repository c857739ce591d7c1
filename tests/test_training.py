"""What people train with: adapters, recomputed activations, schedules; longer runs; the model that
a run leaves, at any time and in the type that it came in."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import test_architectures as zoo
import torch
import transformers
from checkpoints import comparable, read_log, same
from models import make_model, make_prompts, make_world, save, word_tokenizer
from safetensors.torch import load_file
from tables import WORDS, distance, make_small_world, posterior, slow, train
from tables import all_responses as enumerate_responses

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze import export
from plumbing import models as loading
from plumbing.run import whole_weights

SCRIPTS = [brain, gdc, dpo, wind, bond, ppo]
NAMES = [script.__name__ for script in SCRIPTS]
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "gemma2"]
REFUSED = ("mixtral", "qwen3_moe", "falcon_h1")
SERVED = [name for name, case in zoo.CASES.items() if case[0] not in REFUSED]
PROMPTS = make_prompts([5, 6, 7, 8], [9, 10], [11, 12, 13])
BATCH = common.Batch(PROMPTS, [[[5, 6, 7, 1], [8, 1], [9, 10, 11]]] * 3)
FACTORS = torch.tensor([[1.0, -2.0, 0.5]]).expand(3, 3)  # of the log-probs in a loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a short run on random checkpoints."""
    return make_world(tmp_path_factory.mktemp("world"))


def flags(world, **more) -> brain.Args:
    return replace(world, lora_rank=4, lr=1e-2, warmup_steps=0, **more)


def adapted(architecture: str, rank: int = 4, random: bool = True, dtype=torch.float32, **more):
    """A model with adapters; if `random`, they are no longer the identity."""
    model = make_model(architecture, **more)
    model.module.to(dtype)
    args = brain.Args(policy="somewhere", lora_rank=rank)
    loading._add_adapters(model.module, args)
    torch.manual_seed(3)
    for weight in trained(model) if random else ():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def slow_but(quick: list[str], names) -> list:
    """The names in `quick` run in plain `pytest`, the others in `pytest -m slow`."""
    return [name if name in quick else slow(name) for name in names]


def load(args: brain.Args):
    """The policy, as a script loads it."""
    run_ = common.Run(replace(args, run_dir=""), brain.__file__)
    return common.load_policy(run_, common.load_tokenizer("--policy", args.policy))


def trained(model) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    logprobs = common.logprobs_and_entropy(model, BATCH, 1.0)[0]
    (logprobs * FACTORS).sum().backward()
    return [logprobs.detach(), *(weight.grad for weight in trained(model))]


def load_state(run: Path) -> dict:
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def logits_of(module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor([[5, 6, 7, 8, 9]])).logits.float()


# ── the step size ──
@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
    ],
)
def test_the_step_size_warms_up_and_falls(schedule, expected):
    """4 steps of 2 updates, 4 of them the warm-up; a 9th update would have 0."""
    args = brain.Args(lr=1.0, steps=4, updates_per_sample=2, warmup_steps=4, lr_schedule=schedule)
    ours = [common.step_size(args, update) for update in range(1, 9)]
    assert ours == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 8, 9, 100])
def test_a_schedule_is_never_above_the_warm_up_nor_0(schedule, warmup):
    args = brain.Args(lr=0.5, steps=8, warmup_steps=warmup, lr_schedule=schedule)
    ours = [common.step_size(args, update) for update in range(1, 9)]
    for update, lr in enumerate(ours, 1):
        assert 0 < lr <= 0.5 * min(1, update / max(1, warmup))
    assert warmup > 1 or ours[0] == 0.5


def test_a_run_takes_schedule_and_weight_decay(world, tmp_path, monkeypatch):
    """As AdamW and the log have them."""
    groups, opened = [], common.Run.open

    def open_(self, models, optimizer):
        groups.extend(optimizer.param_groups)
        return opened(self, models, optimizer)

    monkeypatch.setattr(common.Run, "open", open_)
    args = replace(world, lr=0.01, warmup_steps=0, lr_schedule="linear", weight_decay=0.25)
    brain.main(replace(args, run_dir=str(tmp_path / "run")))
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["optim/lr"] for line in lines[1:]] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert groups[0]["weight_decay"] == 0.25 and brain.Args().weight_decay == 0.0


# ── adapters: what is computed ──
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_begin_as_nothing(architecture):
    """The start model's samples and log-probs, but for a kernel's rounding."""
    plain, model = make_model(architecture), adapted(architecture, random=False)
    ours, theirs = (common.sample(one, PROMPTS, 4, 6, 1.0, 7) for one in (model, plain))
    assert ours.responses == theirs.responses
    pairs = [
        (ours.sampled_logprobs, theirs.sampled_logprobs),
        (common.logprobs(model, BATCH, 1.0), common.logprobs(plain, BATCH, 1.0)),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-6)
    # The gradient of A is 0 where B is, so B alone moves first.
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for name, gradient in zip(names, gradients(model)[1:], strict=True):
        assert (gradient.abs().max() > 0) == (".lora_B." in name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_adapters(architecture):
    """Against autograd of the plain model with W + 2 B A in the place of W; no other weight has one,
    and every linear layer but the head has adapters."""
    model, plain = adapted(architecture), make_model(architecture).module
    logprobs, *ours = gradients(model)
    weights = {n: w for n, w in model.module.named_parameters() if w.requires_grad}
    assert not [n for n, w in model.named_parameters() if w.grad is not None and ".lora_" not in n]
    merged, seen = {}, set()
    for name, weight in plain.named_parameters():
        path, at = (
            name.rpartition(".weight")[0],
            f"{name.rpartition('.weight')[0]}.lora_A.default.weight",
        )
        if at in weights:
            delta = 2 * weights[f"{path}.lora_B.default.weight"] @ weights[at]
            seen.add(path)
            weight = weight + (delta.T if architecture == "gpt2" else delta)
        merged[name] = weight
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    head = plain.get_output_embeddings()
    assert seen == {n for n, m in plain.named_modules() if isinstance(m, linear) and m is not head}
    loss = 0.0
    for i, prompt in enumerate(PROMPTS):
        for j, response in enumerate(BATCH.responses[i]):
            row = torch.tensor([prompt.tokens + response])
            logits = torch.func.functional_call(plain, merged, (row,)).logits[0]
            steps = logits[len(prompt.tokens) - 1 : -1].log_softmax(-1)
            logprob = steps[torch.arange(len(response)), response].sum()
            assert logprob.item() == pytest.approx(logprobs[i, j].item(), abs=1e-4)
            loss = loss + FACTORS[i, j] * logprob
    theirs = torch.autograd.grad(loss, list(weights.values()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
        assert other.abs().max() > 1e-3


def test_adapters_on_turned_products(monkeypatch):
    """A CPU's products, which take the place of linear layers before adapters do."""
    monkeypatch.setattr(loading, "LARGE", 1)
    plain = adapted("llama")
    model = make_model("llama")
    loading.turn_products(model.module)
    loading._add_adapters(model.module, brain.Args(lora_rank=4))
    kinds = {type(part.base_layer) for part in model.modules() if hasattr(part, "base_layer")}
    assert kinds == {loading.TurnedLinear}
    for ours, theirs in zip(trained(model), trained(plain), strict=True):
        ours.data.copy_(theirs)
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    batch = common.sample(model, PROMPTS, 4, 6, 1.0, 7)
    torch.testing.assert_close(
        batch.sampled_logprobs, common.logprobs(model, batch, 1.0), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_are_those_of_a_plain_model(architecture):
    """All of them, under its names."""
    model, plain = adapted(architecture), make_model(architecture).module
    weights = loading._merged(model.module, whole_weights(model.module))
    plain.load_state_dict(weights)
    start = make_model(architecture).module
    torch.testing.assert_close(logits_of(plain), logits_of(model.module), atol=1e-4, rtol=1e-4)
    assert (logits_of(plain) - logits_of(start)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "architecture, message",
    [("mixtral", "has experts, which we cannot merge"), ("falcon_h1", "incompatible with Mamba")],
)
def test_a_model_that_adapters_do_not_fit_is_refused(architecture, message, capsys):
    model = zoo.make(architecture, **zoo.CASES[architecture][1])
    with pytest.raises(SystemExit):
        loading._add_adapters(model.module, brain.Args(policy="it", lora_rank=4))
    error = capsys.readouterr().err
    assert error.startswith("error: --lora-rank") and message in error


@pytest.mark.parametrize("name", slow_but(["gpt_oss", "bloom"], SERVED))
def test_adapters_and_recomputation_on_other_architectures(name):
    """Merged they give the same log-probs; computed again, the same gradients."""
    architecture, config, shared = zoo.CASES[name]
    model, plain = (zoo.make(architecture, **config) for _ in range(2))
    model.shared_rows = plain.shared_rows = shared
    loading._add_adapters(model.module, brain.Args(lora_rank=4))
    torch.manual_seed(3)
    for weight in trained(model):
        torch.nn.init.normal_(weight, std=0.05)
    plain.module.load_state_dict(loading._merged(model.module, whole_weights(model.module)))
    ours, theirs = common.logprobs(model, BATCH, 1.0), common.logprobs(plain, BATCH, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    once = gradients(model)
    assert same(once, gradients(recomputed(model)))
    assert all(gradient.abs().max() > 0 for gradient in once[1:])


def test_a_value_below_adapters_trains_its_own_score(world):
    """A plain linear layer, which begins at 0 and has a gradient there; of the body adapters."""
    args = flags(world)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    value = common.load_critic(args, load(args), tokenizer, "")
    score = value.module.score
    assert type(score) is torch.nn.Linear and score.weight.requires_grad
    names = {name for name, weight in value.named_parameters() if weight.requires_grad}
    assert names - {"module.score.weight"} == {name for name in names if ".lora_" in name}
    values = common.token_values(value, BATCH)
    assert not values.any()
    (values - 1).square().sum().backward()
    assert score.weight.grad.abs().max() > 1e-3


def test_copies_share_the_base_and_hold_adapters_of_their_own():
    model = adapted("llama")
    copy = loading.frozen_copy(model)
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        assert (ours.data_ptr() == theirs.data_ptr()) == (not theirs.requires_grad)
        assert torch.equal(ours, theirs) and not ours.requires_grad
    before = common.logprobs(copy, BATCH, 1.0)
    with torch.no_grad():
        for weight in trained(model):
            weight.add_(0.1)
    assert torch.equal(common.logprobs(copy, BATCH, 1.0), before)
    now = common.logprobs(model, BATCH, 1.0)
    assert (now - before).abs().min() > 1e-3
    copy.load_state_dict(model.state_dict())  # as the scripts renew a proposal
    assert torch.equal(common.logprobs(copy, BATCH, 1.0), now)
    assert sum(p.data_ptr() == q.data_ptr() for p, q in zip(copy.parameters(), model.parameters()))


def test_a_copy_of_a_model_without_adapters_shares_nothing():
    model = make_model("llama")
    pairs = zip(loading.frozen_copy(model).parameters(), model.parameters(), strict=True)
    assert not any(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)


# ── adapters: a run ──
VARIANTS = [
    (brain, {"refresh_every": 1}),
    (gdc, {"normalizer": "running", "test_every": 1}),
    (dpo, {}),
    (wind, {"refresh_every": 1}),
    (bond, {"updates_per_sample": 2}),
    (bond, {"anchor": "copy", "eta": 1.0}),
    (ppo, {"updates_per_sample": 2}),
]


def one_per_script(variants):
    """The first two run in plain `pytest`, the others in `pytest -m slow`."""
    return [slow(variant) if i > 1 else variant for i, variant in enumerate(variants)]


def run(script, args: brain.Args, folder: Path, **more) -> Path:
    """A whole run of a script with the shared flags of `args`."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    shared = {name: value for name, value in vars(args).items() if name in names - {"beta"}}
    shared = {name: value for name, value in shared.items() if name != "refresh_every"}
    script.main(script.Args(**shared | more | {"run_dir": str(folder)}))
    return folder


def resume(script, folder: Path, *more: str):
    return script.main(common.parse_args(script.Args, ["--resume", str(folder), *more]))


def stopped(script, args, folder: Path, at: int, monkeypatch, **more) -> Path:
    """A run that is broken off when the checkpoint of step `at` is written."""
    save_ = common.Run.save

    def save_and_stop(self, step):
        save_(self, step)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", save_and_stop)
        run(script, args, folder, **more)
    return folder


@pytest.mark.parametrize("variant", one_per_script(VARIANTS))
def test_a_run_with_adapters(world, tmp_path, monkeypatch, variant):
    """The start model at first; a checkpoint of nothing but adapters; resumed bit for bit;
    final/ loads plain, and with the adapter beside it on the start model."""
    script, more = variant
    whole = run(script, flags(world), tmp_path / "whole", **more)
    lines = comparable(whole)
    assert abs(lines[0]["eval/kl"]) < 1e-5 and abs(lines[-1]["eval/kl"]) > 1e-3

    state = load_state(whole)
    for name, weights in state.items():
        if name in ("policy", "proposal", "anchor"):
            assert weights and all(".lora_" in key for key in weights), name
    for moments in state["optimizer"]["state"].values():
        assert moments["exp_avg"].dtype == torch.float32
    value = [key for key in state.get("value", {}) if ".lora_" not in key]
    assert [key.endswith("score.weight") for key in value] == [True] * (script is ppo)
    trained_weights = len(state["policy"]) + len(state.get("value", {}))
    assert len(state["optimizer"]["state"]) == trained_weights
    assert script is not ppo or state["value"][value[0]].abs().max() > 1e-4  # it began at 0

    half = stopped(script, flags(world), tmp_path / "half", 2, monkeypatch, **more)
    resume(script, half)
    assert comparable(half) == lines and same(load_state(half), state)

    policy = adapted("llama", random=False, vocab_size=len(word_tokenizer()))
    policy.load_state_dict(state["policy"], strict=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(whole / "final")
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    start = transformers.AutoModelForCausalLM.from_pretrained(world.policy)
    moved = (logits_of(plain) - logits_of(start)).abs().max()
    assert moved > 1e-3
    with_adapter = peft.PeftModel.from_pretrained(start, whole / "final" / "adapter")
    torch.testing.assert_close(logits_of(with_adapter), logits_of(plain), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(policy.module), logits_of(plain), atol=1e-4, rtol=1e-4)


MINIBATCHED = [(brain, {}), (gdc, {}), (dpo, {}), (wind, {}), (bond, {}), (ppo, {})]
MINIBATCHED += [(ppo, {"advantage": "rloo"}), (bond, {"anchor": "copy", "eta": 1.0})]


@pytest.mark.parametrize("variant", MINIBATCHED)
def test_the_minibatches_of_a_pass_add_up_to_the_batch(world, tmp_path, monkeypatch, variant):
    """While the weights stay, their gradients average to that of the batch, in each pass, and the
    metrics are those of the batch."""
    script, more = variant
    gradients = []

    def step(optimizer, *inputs, **named):
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        gradient = torch.cat([w.grad.flatten().clone() for w in weights])
        if gradient.any():  # of zeros are those with which torch prepares the optimizer's state
            gradients.append(gradient)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    more = more | {"steps": 1, "max_grad_norm": 1e9, "prompts_per_step": 4, "lora_rank": 0}
    folder = run(script, flags(world), tmp_path / "whole", **more)
    whole = read_log(folder / "metrics.jsonl")[-1]
    (expected,) = gradients
    gradients.clear()
    more |= {"minibatches": 2, "updates_per_sample": 2, "micro_batch": 1}
    folder = run(script, flags(world), tmp_path / "parts", **more)
    parts = read_log(folder / "metrics.jsonl")[-1]
    assert len(gradients) == 4
    torch.testing.assert_close(gradients[2:], gradients[:2])
    scale = expected.abs().max().item()
    assert (gradients[0] - gradients[1]).abs().max() > 0.05 * scale
    torch.testing.assert_close(sum(gradients[:2]) / 2, expected, atol=2e-5 * scale, rtol=1e-3)
    for name in ("loss", "kl/ref", "entropy/token"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5)


def test_the_step_size_falls_over_all_minibatches():
    args = brain.Args(lr=1.0, steps=2, updates_per_sample=2, minibatches=2, warmup_steps=0)
    args = replace(args, lr_schedule="linear")
    sizes = [common.step_size(args, update) for update in range(1, 10)]
    assert sizes == pytest.approx([1 - i / 8 for i in range(9)])


@pytest.mark.parametrize("more", one_per_script([{}, {}, {"updates_per_sample": 3}])[1:])
def test_an_anchor_of_adapters_follows(world, tmp_path, more):
    """As (8) says, factor by factor; what lies below stays, to the last bit."""
    moved, bases, policies = [], [], []

    def shard(model):
        policies.append(model)
        return model

    def step(optimizer, *inputs, original=torch.optim.AdamW.step, **named):
        out = original(optimizer, *inputs, **named)
        weights = list(policies[-1].parameters())
        moved.append([w.detach().clone() for w in weights if w.requires_grad])
        bases.append([w.detach().clone() for w in weights if not w.requires_grad])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(common, "shard", shard)
        state = load_state(run(bond, flags(world), tmp_path / "run", eta=0.25, **more))
    start = start_weights(world)
    assert len(moved) == 4 * more.get("updates_per_sample", 1)
    for i, (name, ours) in enumerate(state["anchor"].items()):
        theirs = start[name]
        for weights in moved:
            theirs = theirs.lerp(weights[i], 0.25)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        assert (ours - state["policy"][name]).abs().max() > 1e-4
    assert bases[0] and all(same(base, bases[0]) for base in bases)


def start_weights(world) -> dict[str, torch.Tensor]:
    """The weights of the policy at step 0, by name."""
    return load(flags(world)).state_dict()


def test_adapters_depend_on_the_seed_only(world):
    torch.manual_seed(5)
    ours = start_weights(world)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    theirs, others = start_weights(world), start_weights(replace(world, seed=2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's noise changes
    assert same(dict(ours), dict(theirs))
    assert any(not torch.equal(ours[name], others[name]) for name in ours if "lora_A" in name)


def test_without_peft_one_line_says_what_to_install(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stop:
        run(brain, flags(world), tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--lora-rank 4: pip install peft" in error and not (tmp_path / "run").exists()
    run(brain, replace(world, steps=1), tmp_path / "run")  # all weights need no peft


@pytest.mark.slow
@pytest.mark.parametrize("rank", [32, 1])
def test_adapters_reach_the_target_of_all_weights(tmp_path, rank):
    """(T) of brain.py over all 31 responses. 32 is full rank. The head, which has no adapters, must
    tell all words apart: that of the small world gives three of them the same logit."""
    world = make_small_world(tmp_path)
    save(Path(world["policy"]), make_model("llama", 6), word_tokenizer(WORDS))
    more = {"beta": 1.0, "lr": 3e-3, "lora_rank": rank, "lr_schedule": "linear"}
    reached, _ = train(brain, world, tmp_path / "run", **more)
    ref, rewards = enumerate_responses(world, world["policy"])
    target = posterior(ref, rewards, 1.0)
    assert distance(ref, target) > 0.5
    assert distance(reached, target) < 0.02


# ── types ──
@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_pure_bfloat16_trains_adapters_only(world, tmp_path, capsys, script):
    """All weights in it would lose small steps: one line, before anything is loaded."""
    with pytest.raises(SystemExit) as stop:
        run(script, replace(world, dtype="bfloat16", policy="nowhere"), tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--dtype bfloat16" in error and "--lora-rank" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", one_per_script([bond, brain, gdc, dpo, wind, ppo]))
def test_a_base_in_bfloat16(world, tmp_path, script):
    """With adapters in float32, which move by steps that bfloat16 would lose."""
    args = replace(flags(world), dtype="bfloat16", lr=1e-6)
    model = load(args)
    kinds = {(weight.dtype, weight.requires_grad) for weight in model.parameters()}
    assert kinds == {(torch.float32, True), (torch.bfloat16, False)}
    folder = run(script, args, tmp_path / "run")
    start = model.state_dict()
    for name, weight in load_state(folder)["policy"].items():
        assert weight.dtype == torch.float32
        assert 0 < (weight - start[name]).abs().max() < 4.2e-6
    assert abs(comparable(folder)[0]["eval/kl"]) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [0, 4])
def test_final_has_the_type_that_the_policy_came_in(world, tmp_path, dtype, rank):
    """Weights and config.json; a tied weight once; it is the policy, but for rounding to it."""
    tokenizer, kind = word_tokenizer(), getattr(torch, dtype)
    start = make_model("llama", len(tokenizer), tie_word_embeddings=True)
    policy = save(tmp_path / "policy", start.module.to(kind), tokenizer)
    args = replace(world, policy=policy, lora_rank=rank, lr=1e-2, warmup_steps=0)
    final = run(brain, args, tmp_path / "run") / "final"
    weights = load_file(final / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {kind}
    assert weights.keys() == load_file(Path(policy, "model.safetensors")).keys()
    assert json.loads((final / "config.json").read_text())["dtype"] == dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(final)
    assert loaded.dtype == kind and loaded.generation_config.do_sample
    if rank == 0:
        state, step = load_state(tmp_path / "run")["policy"], torch.finfo(kind).eps
        for name, weight in loaded.state_dict().items():
            exact = state[f"module.{name}"]
            assert ((weight.float() - exact).abs() <= step * exact.abs() + 1e-7).all(), name


def test_rounding_to_bfloat16_keeps_small_moves():
    """The mean of many weights is right where the nearest number would be the start model's; what
    has not moved stays."""
    start = torch.tensor([0.25, -0.25, 3.0, 1e-3]).to(torch.bfloat16).float()
    move = start.abs() * 2**-10  # an eighth of the step to the next number above a power of two
    weights = (start + move).expand(40_000, 4)
    assert torch.equal(weights.to(torch.bfloat16).float(), start.expand(40_000, 4))
    generator = torch.Generator().manual_seed(0)
    ours = loading._rounded(weights, torch.bfloat16, generator).float()
    torch.testing.assert_close(ours.mean(0) - start, move, rtol=0.1, atol=0)
    assert torch.equal(loading._rounded(start, torch.bfloat16, generator).float(), start)
    assert loading._rounded(torch.arange(3), torch.bfloat16, generator).dtype == torch.int64
    halves = loading._rounded(weights, torch.float16, generator)
    assert torch.equal(halves, weights.to(torch.float16))


def test_a_checkpoint_that_names_no_type_is_written_in_float32(world, tmp_path):
    path = Path(save(tmp_path / "policy", make_model("llama", 19), word_tokenizer()), "config.json")
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    folder = run(brain, replace(world, policy=str(path.parent), steps=1), tmp_path / "run")
    weights = load_file(folder / "final" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


# ── recomputed activations ──
def recomputed(model):
    loading._recompute(model)
    return model


def saved_bytes(model) -> int:
    """Bytes that autograd keeps of a forward pass, weights left out."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rows = common._pack(model, BATCH)
        states = common._states(model, rows.tokens, rows.segment, rows.position)
    assert states.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_recomputed_gradients_are_the_same(architecture, rank, mixed):
    """To the last bit, from less memory, under the same names; samples too, through the cache."""

    def make():
        model = adapted(architecture, rank) if rank else make_model(architecture)
        model.mixed = mixed
        return model

    plain, model = make(), recomputed(make())
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    ours, theirs = (common.sample(one, PROMPTS, 4, 6, 1.0, 7) for one in (model, plain))
    assert ours.responses == theirs.responses
    assert torch.equal(ours.sampled_logprobs, theirs.sampled_logprobs)
    assert saved_bytes(model) < 0.5 * saved_bytes(plain)


def test_a_block_keeps_its_input_alone():
    """One block more: a float32 state of each slot."""
    few, many = (recomputed(make_model("llama", num_hidden_layers=n)) for n in (2, 3))
    slots = common._pack(many, BATCH).tokens.numel()
    assert saved_bytes(many) - saved_bytes(few) == 4 * 32 * slots


@pytest.mark.parametrize("rank", [0, slow(4)])
def test_a_run_with_recomputed_activations(world, tmp_path, monkeypatch, rank):
    """The same run, bit for bit; stopped and resumed as well; final/ loads."""
    args = replace(world, lora_rank=rank, micro_batch=3)
    plain = run(bond, args, tmp_path / "plain")
    ours = stopped(bond, replace(args, checkpointing=True), tmp_path / "run", 2, monkeypatch)
    resume(bond, ours)
    assert comparable(ours) == comparable(plain)
    states = load_state(ours), load_state(plain)
    assert all(state.pop("run") for state in states) and same(*states)
    assert same(*(load_file(one / "final" / "model.safetensors") for one in (ours, plain)))
    transformers.AutoModelForCausalLM.from_pretrained(ours / "final")


def test_a_model_without_blocks_is_refused(capsys):
    model = make_model("llama")
    model.module = torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit):
        loading._recompute(model)
    assert "a Linear has no blocks" in capsys.readouterr().err


# ── longer runs ──
@pytest.mark.parametrize("script", one_per_script([ppo, brain, gdc, dpo, wind, bond]))
def test_steps_may_grow(world, tmp_path, capsys, script):
    """4 steps, then 12, is the run of 12, bit for bit: 40 prompts, 4 a step, so that the fewer steps
    read a part of them and the more begin a second lap. args.json and final/ follow."""
    longer = run(script, replace(world, steps=12), tmp_path / "longer")
    folder = run(script, world, tmp_path / "run")
    capsys.readouterr()
    resume(script, folder, "--steps", "12")
    assert f"{folder}: goes on to step 12, no longer 4\n" in capsys.readouterr().out
    assert comparable(folder) == comparable(longer)
    samples = [(one / "samples.jsonl").read_bytes() for one in (folder, longer)]
    assert samples[0] == samples[1]
    assert same(load_state(folder), load_state(longer))
    weights = [load_file(one / "final" / "model.safetensors") for one in (folder, longer)]
    assert same(*weights)
    assert json.loads((folder / "args.json").read_text())["args"]["steps"] == 12


def test_a_longer_run_goes_on_after_a_stop(world, tmp_path, monkeypatch, capsys):
    """By --resume alone; the shorter run's final/ is gone meanwhile. Fewer steps are refused."""
    longer = run(brain, replace(world, steps=8), tmp_path / "longer")
    folder = run(brain, world, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save_ = common.Run.save

        def save_and_stop(self, step):
            save_(self, step)
            raise KeyboardInterrupt

        patch.setattr(common.Run, "save", save_and_stop)
        resume(brain, folder, "--steps", "8")
    assert not (folder / "final").exists()
    for steps in ("4", "7"):
        with pytest.raises(SystemExit):
            resume(brain, folder, "--steps", steps)
        assert f"--steps {steps}: {folder} has another value" in capsys.readouterr().err
    resume(brain, folder)
    assert comparable(folder) == comparable(longer)
    assert same(load_state(folder), load_state(longer))
    assert (folder / "final").exists()


def test_no_other_flag_may_grow(world, tmp_path, capsys):
    folder = run(brain, replace(world, steps=1), tmp_path / "run")
    for flag in ("--lr 1.0", "--eval-every 7", "--lora-rank 2"):
        with pytest.raises(SystemExit):
            resume(brain, folder, "--steps", "3", *flag.split())
        assert f"{flag}: {folder} has another value" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_weight_is_refused(world, tmp_path, capsys):
    """torch itself would leave the start model's weight in its place."""
    for name, args in (("all", world), ("adapters", flags(world))):
        folder = run(brain, replace(args, steps=2), tmp_path / name)
        state = load_state(folder)
        lost = sorted(state["proposal"])[-1]
        del state["proposal"][lost]
        torch.save(state, folder / "checkpoint" / "state.pt")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            resume(brain, folder)
        assert f"proposal lacks {lost}" in capsys.readouterr().err


# ── a model at any time ──
@pytest.mark.parametrize("rank", [0, 4])
def test_export_makes_a_checkpoint_a_model(world, tmp_path, monkeypatch, rank):
    """What a run of as many steps leaves as final/, from one that was broken off."""
    args = replace(world, lora_rank=rank, lr=1e-2, warmup_steps=0)
    whole = run(brain, replace(args, steps=2), tmp_path / "whole")
    folder = stopped(brain, args, tmp_path / "run", 2, monkeypatch)
    assert not (folder / "final").exists()
    monkeypatch.chdir(tmp_path)
    export.main(export.Args(str(folder)))
    exported = folder / "step-2"
    names = [
        sorted(str(path.relative_to(one)) for path in one.rglob("*"))
        for one in (exported, whole / "final")
    ]
    assert names[0] == names[1] and ("adapter" in names[0]) == (rank > 0)
    for path in (path for path in exported.rglob("*") if path.is_file()):
        theirs = whole / "final" / path.relative_to(exported)
        assert path.read_bytes() == theirs.read_bytes(), path.name
    resume(brain, folder)
    assert (folder / "final").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no folder", "has no args.json"),
        ("no checkpoint", "has no checkpoint yet"),
        ("twice", "exists"),
    ],
)
def test_export_says_what_is_wrong_in_a_line(world, tmp_path, capsys, damage, message):
    folder = run(brain, replace(world, steps=1), tmp_path / "run")
    if damage == "twice":
        export.main(export.Args(str(folder)))
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    if damage == "no checkpoint":
        (folder / "checkpoint" / "state.pt").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main(export.Args(str(folder)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error
