"""docs/recipes.md: true of its raw lines, with commands that parse; the counts of what is computed."""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from models import make_prompts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import brain
import common
from analyze import hours, judges, recipes
from analyze.memory import Batch, Llama, Setup
from benchmarks import chain
from plumbing import models as loading
from prepare import parts, real

ROOT = Path(brain.__file__).parent
PAGE = ROOT / "docs" / "recipes.md"
COMMANDS = re.findall(r"(?m)^    (python .*)$", PAGE.read_text())


# ── the page ──
def test_the_page_is_that_of_its_raw_lines():
    assert PAGE.read_text() == recipes.page()


def test_each_chain_has_all_its_commands_on_the_page():
    """Four, what they begin from, and those of a table of computed hours."""
    shown = set(COMMANDS)
    for links in chain.CHAINS.values():
        assert {shlex.join(["python", *chain.words(x)]) for x in links.values()} <= shown
    assert {link.command for links in hours.RECIPES.values() for link in links} <= shown


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    """Each by the flags of its own script, with those that a policy of one's own must name."""
    _, *words = shlex.split(command)
    module = words.pop(0).removesuffix(".py")
    module = words.pop(0) if module == "-m" else module
    args_class = importlib.import_module(module).Args
    if hasattr(args_class, "run_dir"):
        common.parse_args(args_class, words)
    else:
        tyro.cli(args_class, args=words)


def test_a_chain_shows_what_its_commands_gave():
    """Of a command that was run again the last line counts."""
    line = {"seconds": 120, "cpu_seconds": 60}
    lines = {
        "sft": line | {"evaluations": [{"eval/loss": 5.0}, {"eval/loss": 3.25}]},
        "reward": line
        | {
            "evaluations": [
                {"eval/loss": 0.6931, "eval/accuracy": 0.5},
                {"eval/loss": 0.4, "eval/accuracy": 0.75},
            ]
        },
        "method": line
        | {
            "evaluations": [
                {"eval/win_rate": 0.5, "eval/kl": 0.0},
                {"eval/win_rate": 0.875, "eval/kl": 2.34},
            ],
            "memory/peak_gib": 6.04,
        },
        "evaluate": line,
    }
    rows = [row.strip("| ").split(" | ") for row in recipes.times(lines).splitlines()[2:]]
    assert [row[0] for row in rows] == ["sft", "reward", "method", "evaluate", "all but prepare"]
    assert rows[0][1:3] == ["1.0", "2.0"] and "5.00 → 3.25" in rows[0][4]
    assert "0.693 → 0.400" in rows[1][4] and "0.50 → 0.75" in rows[1][4]
    assert rows[2][3] == "6.0" and "0.50 → 0.88" in rows[2][4] and "KL 2.3" in rows[2][4]
    assert rows[4][1].split()[0] == "4.0" and "8.0" in recipes.times(lines).splitlines()[-1]


# ── what is counted ──
def test_parameters_of_pythia():
    """Pythia 1B has 1.01 billion, of which so many multiply in its blocks."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == hours.PYTHIA.parameters
    blocks = [w for n, w in model.named_parameters() if ".layers." in n and w.dim() == 2]
    assert sum(weight.numel() for weight in blocks) == 16 * hours.PYTHIA.block


SHAPE = {"layers": 2, "hidden": 64, "inner": 128, "heads": 4, "head_dim": 16, "vocab": 500}
SPECS = {"llama": Llama(**SHAPE, kv_heads=2), "gpt_neox": hours.NeoX(**SHAPE, kv_heads=4)}
BATCH = Batch(3, 4, 24, 16, 3)


ATEN = torch.ops.aten
ATTENTION = {  # of a CPU, which torch's counter leaves out
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


@pytest.mark.parametrize("kind", ["sft", "reward", "method"])
@pytest.mark.parametrize("architecture", SPECS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(architecture, kind, checkpointing, monkeypatch):
    """Of a script's update, and of what a method reads besides. Computed again, a block stops before
    its last product."""
    monkeypatch.setattr(common, "MOST_LOGITS", 0)  # as with real vocabularies: logits twice
    model = hours.small(architecture, 2)
    score = parts.with_score(hours.small(architecture, 2))
    if checkpointing:
        for one in (model, score):
            loading._recompute(one)
    rows = replace(BATCH, samples={"sft": 1, "reward": 2, "method": 4}[kind])
    prompts = make_prompts(*([list(range(3, 3 + rows.prompt_tokens))] * rows.prompts))
    batch = common.Batch(prompts, [[[9] * rows.response_tokens] * rows.samples] * rows.prompts)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        if kind == "reward":
            loss = score(common._rewards, batch)
        else:
            loss = common.logprobs_and_entropy(model, batch, 1.0)[0]
        loss.sum().backward()
        if kind == "method":
            with torch.no_grad():
                common.logprobs(model, batch, 1.0)  # reference
                common.logprobs(model, batch, 1.0)  # proposal
                score(common._rewards, batch)
                common.sample(model, prompts, 1, 1, 1.0, seed=1)  # reads the prompts
    link = hours.Link("", "", SPECS[architecture], rows, 1, Setup(1, 4, 0, checkpointing), kind)
    ratio = hours.work(link) / counter.get_total_flops()
    assert 0.999 < ratio < (1.06 if checkpointing else 1.001)


def test_adapters_need_no_gradient_of_the_weights():
    full = hours.Link("", "", hours.PYTHIA, BATCH, 1, Setup(), "sft")
    least = replace(full, setup=Setup(1, 2, 16))
    assert 0.6 < hours.work(least) / hours.work(full) < 0.76


@pytest.mark.parametrize("architecture, spec", [("llama", "8B"), ("gpt_neox", "pythia")])
def test_operators_are_counted_per_block(architecture, spec):
    """Linear in the blocks; the raw line is that of this code, or near it with another version."""
    counts = [hours.operators_per_pass(hours.small(architecture, n)) for n in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 20
    model = hours.PYTHIA if spec == "pythia" else hours.MODELS[spec]
    now = counts[0] + (model.layers - 1) * (counts[1] - counts[0])
    assert hours.operators(model) == pytest.approx(now, rel=0.2)


def test_hours_add_up():
    """By hand: twice as fast at twice the share; drawing takes its turns."""
    link = hours.RECIPES["TL;DR, Pythia 1B"][2]
    work = hours.work(link)
    fast, slow = (hours.seconds(link, share, 0.0) for share in (0.4, 0.2))
    assert slow - fast == pytest.approx(work / (0.4 * 989e12), rel=1e-6)
    calls = hours.seconds(link, 0.4, 1e-5) - fast
    turns = 64 / (common.DRAWN * link.batch.micro_batch)
    assert calls == pytest.approx(turns * 53 * 1e-5 * hours.operators(hours.PYTHIA))
    least, most = hours.hours(link)
    assert least == pytest.approx(1_000 * fast / 3600) and least < most


# ── judges and rewards ──
def test_a_judge_serves_as_reward_and_a_reward_as_judge(tmp_path, monkeypatch):
    """By the same names: functions, the judge of real texts among them, and the gold score."""
    fitted = {"layer": torch.tensor(0), "weight": torch.ones(1), "bias": torch.tensor(0.5)}
    monkeypatch.setattr(real, "load_judge", lambda folder: (None, None, fitted))

    def lengths(encoder, tokenizer, texts):
        return torch.tensor([[[float(len(text))] for text in texts]])

    monkeypatch.setattr(real, "features", lengths)
    file = tmp_path / "mine.py"
    file.write_text("def count(prompts, responses): return [float(len(r)) for r in responses]\n")
    flags = brain.Args(steps=1, prompts_per_step=2, eval_prompts=2)
    tokenizer = common.load_tokenizer("--policy", flags.policy)
    run = SimpleNamespace(args=flags, device=torch.device("cpu"))
    policy = common.load_policy(run, tokenizer)
    _, prompts = common.load_prompts(flags, tokenizer)
    texts = [[prompt.reference] for prompt in prompts]
    batch = common.encode_responses(tokenizer, policy, prompts, texts, 48)
    for reward_name, judge_name in (
        ("analyze.judges:gold_scores", "tiny"),
        (f"{file}:count", f"{file}:count"),
        ("prepare.real:judge", "prepare.real:judge"),
        ("prepare.real:gemma_judge", "prepare.real:gemma_judge"),
    ):
        run.args = replace(flags, reward_model=reward_name)
        rewards = common.score(common.load_reward_model(run, policy, tokenizer), batch)
        judge = judges.score_judge(judge_name, flags, run.device, tokenizer, policy)
        assert torch.equal(common.score(judge.reward_model, batch), rewards)
        assert rewards.unique().numel() == 2
