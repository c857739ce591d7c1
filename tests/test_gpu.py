"""The scripts on a pretended GPU (tests/pretend_gpu.py), and benchmarks/gpu.py, to its end.

What is counted has bounds, which are what the code does today: lower them as it gets better.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pretend_gpu
import pytest
import torch
from checkpoints import comparable, read_log, same

import brain
from analyze.differences import NAMES

ROOT = Path(brain.__file__).parent
pytestmark = pytest.mark.skipif(
    bool(pretend_gpu.problem()), reason=pretend_gpu.problem() or "it can"
)

# Of a decoding pass of brain.py's default, in mixed, with keys and values of its own for each head.
KERNELS_PER_LAYER = 42
KERNELS_OUTSIDE = 32  # of the layers: masks, embeddings, head, the draw
WEIGHT_CASTS = 0  # or copies of weights
WAITS = 0.18  # of the host, which asks at every eighth token what has ended, and takes it out
FRESH_SHAPES = 0  # for which attention would build a plan

SHORT = {
    "steps": 2,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "max_response_tokens": 24,
    "eval_prompts": 4,
}
SHORTEST = SHORT | {"steps": 1, "max_response_tokens": 4, "eval_prompts": 2}

# What the code chooses by the device, and may change a number: a copy of the sources that chooses on
# a CPU what it does on a GPU gives the pretended GPU's numbers, to the last bit.
CHOICES = [
    ("common.py", 'if device.type == "cpu" or t % 8 == 0:', "if t % 8 == 0:"),
    (
        "plumbing/models.py",
        'dtype = torch.bfloat16 if device.type == "cuda" else torch.float32',
        "dtype = torch.bfloat16",
    ),
    (
        "plumbing/models.py",
        'if device.type == "cpu" and torch.backends.mkl.is_available():',
        "if False:",
    ),
]
# Mistakes that a CPU does not mind: what is planted, and the words with which the run must end, or
# which it must print where the check at load falls back to plain rows.
PLANTS = {
    "a tensor that stays on the CPU": (
        "common.py",
        "segment=_pad(segment, -1, model.device)",
        'segment=_pad(segment, -1, torch.device("cpu"))',
        "all tensors to be on the same device",
    ),
    "rewards moved to the CPU": (
        "brain.py",
        "rewards = common.score(reward_model, batch, args.micro_batch)",
        "rewards = common.score(reward_model, batch, args.micro_batch).cpu()",
        "all tensors to be on the same device",
    ),
    "indices made on the CPU": (
        "common.py",
        "rewards.gather(1, torch.tensor(first, device=rewards.device))",
        "rewards.gather(1, torch.tensor(first))",
        "all tensors to be on the same device",
    ),
    "end tokens made on the CPU": (
        "common.py",
        "torch.tensor(model.end_tokens, device=device)",
        "torch.tensor(model.end_tokens)",
        "all tensors to be on the same device",
    ),
    "a model that is not moved": (
        "plumbing/models.py",
        "module.to(device).eval()",
        "module.eval()",
        "all tensors to be on the same device",
    ),
    "a generator of the CPU": (
        "common.py",
        "torch.Generator(device)",
        "torch.Generator()",
        "Expected a 'cuda' device type for generator",
    ),
    "numpy of a CUDA tensor": (
        "brain.py",
        '"reward/mean": rewards.mean(),',
        '"reward/mean": rewards.mean().numpy(),',
        "can't convert cuda:0 device type tensor to numpy",
    ),
    "a mask of the wrong type": (
        "common.py",
        "dtype=model.compute_dtype, device=visible.device",
        "dtype=torch.float32, device=visible.device",
        "no shared rows (RuntimeError Expected attn_mask dtype",
    ),
    "autocast of another device": (
        "plumbing/models.py",
        "torch.autocast(self.device.type,",
        'torch.autocast("cpu",',
        "Expected attn_mask dtype to be bool",
    ),
}


def words(flags: dict) -> list[str]:
    """A command line: True is a bare flag."""
    found = []
    for name, value in flags.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def pretend(folder: Path, script: str, flags: dict, root: Path = ROOT):
    """(how it ended, what was counted) of a script on the pretended GPU."""
    command = [script, *words(flags | {"run_dir": folder})]
    return pretend_gpu.run(command, folder.with_suffix(".json"), root)


def on_the_cpu(command: list, root: Path = ROOT) -> subprocess.CompletedProcess:
    """`python COMMAND`, by the sources in `root`."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True, timeout=600
    )


def copy_of_the_sources(folder: Path, changes: list[tuple[str, str, str]]) -> Path:
    """A checkout with other texts in the places of given ones, which must occur once."""
    for name in ("plumbing", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "assets").mkdir()
    os.symlink(ROOT / "assets" / "tiny", folder / "assets" / "tiny")
    for file, old, new in changes:
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old}"
        (folder / file).write_text(text.replace(old, new))
    return folder


def succeeded(done: subprocess.CompletedProcess) -> None:
    """It ended well, and no device error was taken for a model that needs plain rows."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no shared rows" not in done.stdout


def weights_of(folder: Path) -> dict:
    """The policy and its moments, as a checkpoint holds them."""
    return torch.load(folder / "checkpoint" / "state.pt", weights_only=True)


def of_a_weight(ops: dict) -> int:
    """How often a weight was cast or copied."""
    return sum(calls for name, (calls, _) in ops.items() if "of a weight" in name)


def test_a_short_run_and_what_its_decoding_costs(tmp_path):
    """Two steps in mixed end well, and a pass of the sampler costs no more than it did."""
    done, counts = pretend(tmp_path / "run", "brain.py", SHORT)
    succeeded(done)
    line = read_log(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["step"] == 2 and 0 < line["memory/peak_gib"] * 2**30 <= counts["peak"]
    phases = counts["phases"]
    outside, layers = phases["sample > token"], phases["sample > token > block"]
    passes = outside["entered"]
    assert passes > SHORT["max_response_tokens"] and layers["entered"] == 2 * passes
    assert layers["kernels"] / layers["entered"] <= KERNELS_PER_LAYER
    assert outside["kernels"] / passes <= KERNELS_OUTSIDE
    casts = of_a_weight(layers["ops"]) + of_a_weight(outside["ops"])
    assert casts / passes <= WEIGHT_CASTS
    waits = sum(count for phase, *_, count in counts["waits"] if phase.startswith("sample > token"))
    assert waits / passes <= WAITS
    fresh = layers["ops"].get(pretend_gpu.PLAN, [0])[0]
    assert fresh / passes <= FRESH_SHAPES
    say = {
        "kernels per pass and layer": layers["kernels"] / layers["entered"],
        "kernels per pass outside of layers": outside["kernels"] / passes,
        "casts and copies of weights per pass": casts / passes,
        "waits per pass": waits / passes,
        "fresh shapes per pass": fresh / passes,
    }
    print(json.dumps(say))


@pytest.mark.slow
def test_a_recorded_step_asks_nothing_and_draws_the_same(tmp_path):
    """--cuda-graph, where the graph is one that the CPU replays."""
    flags, said = SHORT | {"dtype": "float32", "steps": 1}, []
    for name, more in (("plain", {}), ("recorded", {"cuda_graph": True})):
        done, counts = pretend(tmp_path / name, "brain.py", flags | more)
        succeeded(done)
        said.append([line["response"] for line in read_log(tmp_path / name / "samples.jsonl")])
    assert said[0] == said[1] and counts["phases"]["sample > token > replay"]["entered"] > 10
    assert not any("replay" in phase for phase, *_ in counts["waits"])


@pytest.mark.slow
def test_a_step_that_asks_the_host_is_not_recorded(tmp_path):
    change = ("common.py", "layer.slots = slots", "layer.slots = slots + 0 * int(slots[0])")
    root = copy_of_the_sources(tmp_path / "sources", [change])
    done, _ = pretend(tmp_path / "run", "brain.py", SHORTEST | {"cuda_graph": True}, root)
    assert done.returncode and "cannot be recorded, leave it out: operation not" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_script_takes_two_steps_of_its_default(name, tmp_path):
    done, _ = pretend(tmp_path / "run", f"{name}.py", {"steps": 2})
    succeeded(done)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.slow
def test_adapters_on_a_bfloat16_base_with_blocks_run_again(tmp_path):
    flags = SHORT | {"dtype": "bfloat16", "lora_rank": 4, "checkpointing": True}
    done, _ = pretend(tmp_path / "run", "brain.py", flags)
    succeeded(done)


@pytest.mark.slow
def test_float32_is_bit_equal_to_a_cpu_that_chooses_as_a_gpu(tmp_path):
    flags = SHORT | {"dtype": "float32", "save_every": 1}
    done, _ = pretend(tmp_path / "gpu", "brain.py", flags)
    succeeded(done)
    root = copy_of_the_sources(tmp_path / "sources", CHOICES)
    succeeded(on_the_cpu(["brain.py", *words(flags | {"run_dir": tmp_path / "cpu"})], root))
    assert comparable(tmp_path / "gpu") == comparable(tmp_path / "cpu")
    ours, theirs = (weights_of(tmp_path / name) for name in ("gpu", "cpu"))
    assert same(ours["policy"], theirs["policy"]) and same(ours["optimizer"], theirs["optimizer"])


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path):
    """Stopped after its first step and continued it is the run that was not."""
    flags = SHORT | {"save_every": 1, "eval_every": 1}
    for folder, more in (("whole", {"steps": 2}), ("cut", {"steps": 1})):
        succeeded(pretend(tmp_path / folder, "brain.py", flags | more)[0])
    command = ["brain.py", "--resume", tmp_path / "cut", "--steps", "2"]
    succeeded(pretend_gpu.run(command, tmp_path / "counts.json", ROOT)[0])
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "cut")
    ours, theirs = (weights_of(tmp_path / name) for name in ("whole", "cut"))
    assert all(same(ours[name], theirs[name]) for name in ("policy", "proposal", "optimizer"))


def test_the_places_of_the_planted_mistakes_exist():
    """The test below is slow: a change of the code should hear of it at once."""
    for file, old, _, _ in PLANTS.values():
        assert (ROOT / file).read_text().count(old) == 1, (file, old)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_mistake_is_reported(plant, tmp_path):
    *change, said = PLANTS[plant]
    root = copy_of_the_sources(tmp_path / "sources", [change])
    done, _ = pretend(tmp_path / "run", "brain.py", SHORTEST, root)
    assert said in done.stdout + done.stderr
    assert done.returncode or "no shared rows" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "pretended"])
def test_the_benchmark_runs_to_its_end(device, tmp_path):
    """Small shapes, of the scripts the first and the longest. On the pretended GPU without TRL,
    whose trainers ask for more of a device, and without what tests above do there."""
    parts = ["check", "brain default", "brain 8B bfloat16 LoRA", "brain recorded 1B mixed"]
    through = ["--through", "tests/pretend_gpu.py"]
    if device == "cpu":
        parts[3:] = ["ppo default", "brain 1B mixed", "resume", "TRL DPO", "TRL GRPO"]
        through = []
    command = ["-m", "benchmarks.gpu", "--tiny", "--results", tmp_path, *through]
    done = on_the_cpu([*command, "--only", *parts])
    lines = {line["part"]: line for line in read_log(tmp_path / "gpu.jsonl")}
    failed = {name: line["failed"] for name, line in lines.items() if "failed" in line}
    assert not failed and done.returncode == 0, (failed, done.stderr)
    assert all(any(part in name for name in lines) for part in parts)
    assert device != "cpu" or lines["resume"]["equal"]
    assert lines["device"]["device"] == ("cpu" if device == "cpu" else "pretended GPU")
