"""Two processes, started by torchrun, against one: what is computed, what is said, what is written.

tests/ranks.py holds what runs in the processes; they are started once, for all tests but the last.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import transformers
from checkpoints import comparable, read_log, same
from models import flags, make_world
from safetensors.torch import load_file

import brain
import common
from analyze import memory
from plumbing import run as running

ROOT = Path(brain.__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Worlds, and the runs of two processes beside those of one.

    tests/mutants.py names in RANKS_CHECKS the few checks that its tests need.
    """
    for _ in range(2):
        path = tmp_path_factory.mktemp("ranks")
        ranks.make_worlds(path)
        for name in ranks.RESUMED:
            ranks.stop_after(2, *ranks.args_of(path, name, path / f"one to two {name}"))
        done = subprocess.run(
            [*LAUNCH, "tests/ranks.py", str(path), *os.environ.get("RANKS_CHECKS", "").split()],
            cwd=ROOT,
            text=True,
            timeout=600,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        # A thread of gloo itself crashed now and then (SIGSEGV in pt_gloo_runloop, torch 2.13).
        if "(exitcode: -11)" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-4000:]
    (path / "out.txt").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def both(folder):
    """What each of the two processes saw, by check."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder):
    """The same runs in one process, by name."""
    return {
        name: ranks.train(*ranks.args_of(folder, name, folder / f"one {name}"))
        for name in ranks.RUNS
    }


def assert_close(ours, theirs):
    """To 1e-5: what is in float64 but for the gradients' sum over the processes and transformers'
    norms; these are in float32, and one of its roundings is 6e-8 of a number at the most."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_logs_agree(run: Path, other: Path) -> None:
    """Every metric of every step, and every sample: only times and memory may differ."""
    for ours, theirs in zip(comparable(run), comparable(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for ours, theirs in zip(
        read_log(run / "samples.jsonl"), read_log(other / "samples.jsonl"), strict=True
    ):
        assert ours | {"reward": 0, "reference_reward": 0} == theirs | {
            "reward": 0,
            "reference_reward": 0,
        }


# ── what is computed ──
@pytest.mark.parametrize("name", ranks.RUNS)
def test_gradients_losses_and_metrics_are_those_of_one_process(name, folder, both, alone):
    """On the same global batches, to 1e-5: each parameter's gradient in each update, each metric of
    each step. Five held-out prompts: the last pass of rank 1 repeats one."""
    for seen in both:
        ours, theirs = (x["gradients"] for x in (seen["check_runs"][name], alone[name]))
        assert len(ours) == len(theirs) >= 4
        for update, parameters in zip(ours, theirs):
            assert max(p.abs().max() for p in parameters) > 1e-3
            for mine, whole in zip(update, parameters, strict=True):
                assert_close(mine, whole)
        assert seen["check_runs"][name]["result"] == pytest.approx(alone[name]["result"], abs=1e-5)
    assert_logs_agree(folder / f"two {name} 0", folder / f"one {name}")


@pytest.mark.parametrize("name", ranks.RUNS)
def test_prompts_are_disjoint_and_complete(name, both, alone):
    """Dealt out in turn; nothing twice."""
    ours = [seen["check_runs"][name]["prompts"] for seen in both]
    theirs = alone[name]["prompts"]
    if name == "dpo":  # its pairs come from the data set: nothing is sampled
        assert ours == [[], []] and theirs == []
        return
    for first, second, whole in zip(*ours, theirs, strict=True):
        assert len(first) == len(second) and [*zip(first, second)] == [
            *zip(whole[::2], whole[1::2])
        ]


def test_one_held_out_prompt(both, folder):
    """Rank 1 has none of its own."""
    args = ranks.args_of(folder, "brain", folder / "one held-out", eval_prompts=1, steps=1)
    expected = ranks.train(*args)["result"]
    for seen in both:
        assert seen["check_one_held_out_prompt"] == pytest.approx(expected, abs=1e-5)


def test_a_policy_on_plain_rows_and_a_head_in_chunks(both):
    """Log-probs and gradients: the model's own forward pass, and a head recomputed in backward."""
    for seen in both:
        for check in ("check_plain_rows", "check_many_chunks"):
            for ours, theirs in zip(*seen[check], strict=True):
                assert_close(ours, theirs)
                assert theirs.abs().max() > 0


def test_bfloat16_and_a_reward_model_of_two_types(both):
    for seen in both:
        kinds, ours, theirs = seen["check_bfloat16"]
        assert kinds == {("torch.bfloat16", False), ("torch.float32", True)}
        assert_close(ours, theirs)


def test_sharded_copies_in_bfloat16_give_the_same_bits(both):
    """As the policy that they were renewed from, and cast no weight; the policy casts each once."""
    for seen in both:
        for policy, copied, exact in seen["check_mixed"].values():
            for ours, theirs in zip(policy[:2], copied[:2]):
                assert torch.equal(ours, theirs)
            assert torch.equal(policy[0], exact[0])
            assert policy[2][0] == policy[2][1] > 0 and copied[2] == [0, 0]


# ── what is sharded ──
@pytest.mark.parametrize("world", ranks.WORLDS)
def test_every_block_is_a_shard_of_its_own(world, both):
    """Policy, reward model and frozen copy: a group a block and one for the rest, half the bytes."""
    for seen in both:
        for groups, blocks, mine, whole in seen["check_shards"][world]:
            assert groups == blocks + 1 == 3
            assert 0.5 <= mine / whole < 0.51


def test_proposal_and_anchor_are_sharded_too(both):
    for seen in both:
        runs = {name: run["sharded"] for name, run in seen["check_runs"].items()}
        assert runs["gdc"] == {"policy": True, "proposal": True}
        assert runs["brain"] == runs["wind"] == {"policy": True, "proposal": True}
        assert runs["bond"] == runs["bond copy"] == {"policy": True, "anchor": True}
        assert runs["ppo"] == runs["ppo lora"] == {"policy": True, "value": True}


def test_bytes_are_those_of_the_formula(both):
    """analyze/memory.py on 2 GPUs; 19 rows of the vocabulary cannot be halved, hence the 1 %."""
    model = memory.Llama(2, 32, 48, 4, 2, 8, 19)
    batch = memory.Batch()
    setup = memory.Setup(gpus=2, frozen=4)
    expected = memory.kept(model, setup) | memory.sampling(model, batch, setup)
    expected |= memory.update(model, batch, setup)
    for seen in both:
        ours = seen["check_memory"]
        for name in ("weights", "moments", "gradients", "reference", "gathered copy"):
            assert ours[name] == pytest.approx(expected[name], rel=0.01), name
        most = 4 * (model.root + 2 * model.block)  # without the gradients
        assert 4 * (model.root + model.block) <= ours["passing"] <= most * 1.01


# ── sampling ──
@pytest.mark.parametrize("world", ranks.WORLDS)
def test_sampling_gathers_once(world, both):
    """As many all-gathers for 30 tokens as for 3, on weights as they are after the last update, and
    nothing stays gathered."""
    for seen in both:
        this = seen["check_sampling"][world]
        for model in ("policy", "ref"):
            short, long = (this["counts"][model, tokens] for tokens in (3, 30))
            assert short == long and any("allgather" in name for name in long)
        assert this["tokens"] and this["freed"]
        assert this["drawn"] < 1e-5 and this["logprobs"] < 1e-5
        assert max(this["kept"]) < 1000  # bytes: the samples; the weights are more than 100 000


def test_a_rank_that_ends_early_does_not_wait(both):
    """Rank 1 draws one token, rank 0 sixty; then both take part in a forward pass."""
    shapes = [seen["check_early_end"] for seen in both]
    assert shapes == [[3, 4, 60], [3, 4, 1]]


# ── what is written ──
def test_only_rank_0_writes_and_speaks(folder, both):
    """Rank 1 was told to write elsewhere: nothing is there."""
    assert not list(folder.glob("two * 1"))
    out = (folder / "out.txt").read_text()
    for name in ranks.RUNS:
        assert (folder / f"two {name} 0" / "final").is_dir()
        assert out.count(f"two {name} 0: metrics.jsonl") == 1
    assert "rank 0 speaks" in out and "rank 1 speaks" not in out
    assert " 1: metrics.jsonl" not in out


def test_metrics_are_means_and_samples_are_all_there(folder, both):
    run = folder / "two log"
    assert read_log(run / "metrics.jsonl") == [{"step": 0, "x": 1.5, "y": 2.0}]
    assert [line["prompt"] for line in read_log(run / "samples.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["brain gpt2", "bond gpt_neox", "bond"])
def test_final_is_a_checkpoint_of_the_whole_policy(name, folder, both, alone):
    run = folder / f"two {name} 0"
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["policy"]
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, saved[f"module.{key}"].to(weight.dtype))
    came = load_file(folder / ranks.RUNS[name][1] / "sft" / "model.safetensors")
    ours = load_file(run / "final" / "model.safetensors")
    theirs = load_file(folder / f"one {name}" / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys() == came.keys()
    (architecture,) = json.loads((run / "final" / "config.json").read_text())["architectures"]
    assert architecture == type(model).__name__


def test_final_of_adapters_is_merged(folder, both):
    """As one process merges what the checkpoint holds."""
    run = folder / "two brain lora 0"
    state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["policy"]
    assert state and all(".lora_" in name for name in state)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama" / "sft")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    merged = 0
    for name, weight in model.state_dict().items():
        base, at = start.state_dict()[name], f"module.{name.removesuffix('.weight')}.lora_"
        if f"{at}A.default.weight" in state:
            delta = 2 * state[f"{at}B.default.weight"] @ state[f"{at}A.default.weight"]
            merged, base = merged + 1, (base.double() + delta).to(base.dtype)
            assert delta.abs().max() > 1e-6
        torch.testing.assert_close(weight, base, atol=1e-6, rtol=1e-6)
    assert merged == len(state) / 2


# ── resume ──
@pytest.mark.parametrize("name", ranks.RESUMED)
def test_two_processes_resume_bit_equal(name, folder, both):
    """Weights, moments, proposal or anchor, log and samples of a run broken off at step 2."""
    run, other = folder / f"two broken {name}", folder / f"two {name} 0"
    assert comparable(run) == comparable(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    ours, theirs = (
        torch.load(x / "checkpoint" / "state.pt", weights_only=True) for x in (run, other)
    )
    assert ours["step"] == 4 and len(ours["optimizer"]["state"]) > 10
    assert same(ours, theirs)


@pytest.mark.parametrize("name", ranks.RESUMED)
def test_two_resume_on_one_and_one_on_two(name, folder, both, alone):
    """The same batches in either case, so the same run but for rounding."""
    ranks.resume(ranks.SCRIPTS[ranks.RUNS[name][0]], folder / f"two to one {name}")
    for kind in ("two to one", "one to two"):
        assert_logs_agree(folder / f"{kind} {name}", folder / f"one {name}")
        ours, theirs = (
            torch.load(folder / f"{x} {name}" / "checkpoint" / "state.pt", weights_only=True)
            for x in (kind, "one")
        )
        # As JSON: what was resumed holds AdamW's betas as a list in place of a tuple.
        groups = [json.dumps(x["optimizer"].pop("param_groups")) for x in (ours, theirs)]
        assert groups[0] == groups[1]
        assert ours.keys() == theirs.keys() and ours["format"] == theirs["format"]
        for part in set(ours) - {"run", "step", "format"}:
            assert_close(ours[part], theirs[part])


def test_a_weight_that_no_pass_uses_does_not_hinder_a_resume(both):
    """It has no gradient, so AdamW has no moments of it."""
    for seen in both:
        (begun, *ours), (done, *theirs) = seen["check_unused_weight"]
        assert (begun, done) == (0, 1) and len(ours[1]) > 10
        assert any(torch.equal(weight, torch.ones(3)) for weight in ours[0])
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_ctrl_c_heard_by_one_rank_stops_both_after_the_same_step(folder, both):
    run = folder / "two ctrl-c"
    assert [seen["check_ctrl_c"] for seen in both] == [
        f"stopped after step 2; for the model: python -m analyze.export {run}; to continue: python "
        f"dpo.py --resume {run}",
        1,
    ]
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert saved["step"] == read_log(run / "metrics.jsonl")[-1]["step"] == 2


# ── from the command line ──
def children(process: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def environment(process: int) -> dict[str, str]:
    text = Path(f"/proc/{process}/environ").read_bytes().decode()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_resume_goes_on(tmp_path):
    """Rank 1 gets a SIGKILL: torchrun says so and ends rank 0 within a minute. The checkpoint then
    goes on in one process."""
    args = make_world(tmp_path, steps=300, save_every=3, eval_every=300)
    process = subprocess.Popen(
        [*LAUNCH, "brain.py", *flags(args)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    victims = {environment(child)["RANK"]: child for child in children(process.pid)}
    os.kill(victims["1"], signal.SIGKILL)
    killed = time.monotonic()
    out, error = process.communicate(timeout=60)
    print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    assert process.returncode == 1
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", error), error
    assert "Signal 9 (SIGKILL) received by PID" in error
    assert "[rank0]:" not in error  # no traceback of the process that waited
    assert not Path(f"/proc/{victims['0']}").exists()
    assert out.count("training prompts\n") == 1  # rank 0 alone speaks
    before = len(read_log(log))
    done = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert 3 <= done < before < 300

    about = tmp_path / "run" / "args.json"  # a shorter way to the end
    about.write_text(about.read_text().replace('"steps": 300', f'"steps": {done + 2}'))
    brain.main(common.parse_args(brain.Args, ["--resume", str(tmp_path / "run")]))
    assert [line["step"] for line in read_log(log)] == list(range(done + 3))


def test_a_lost_process_is_said_in_one_line(capsys, monkeypatch):
    """What gloo and NCCL raise when the other end is gone; any other error stays a traceback."""
    monkeypatch.setenv("RANK", "1")
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    for error in (gone, torch.distributed.DistBackendError("NCCL communicator was aborted")):
        running._say_known(sys.excepthook, type(error), error, None)
        said = capsys.readouterr().err
        assert said.startswith("error: rank 1 lost another process") and said.count("\n") == 1
        assert "--resume" in said
    running._say_known(sys.__excepthook__, ValueError, ValueError("a mistake"), None)
    assert "ValueError: a mistake" in capsys.readouterr().err


def test_an_error_of_rank_1_is_said_late(capsys, monkeypatch):
    """If rank 0 has the same one, torchrun ends rank 1 before; if not, it must be heard."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(running.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        running.require(False, "--flag: a mistake")
    assert waited == [5] and capsys.readouterr().err == "error: --flag: a mistake\n"


@pytest.mark.slow
def test_the_command_line_ends_clean_and_an_error_is_said_once(tmp_path):
    """A whole run of two processes, then one with a mistake that both processes find."""
    args = make_world(tmp_path, steps=2)
    done = subprocess.run(
        [*LAUNCH, "brain.py", *flags(args)], cwd=ROOT, text=True, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("(?i)warning|destroy_process_group|Traceback", done.stderr), done.stderr
    assert done.stdout.count("metrics.jsonl, samples.jsonl") == 1
    common.load_tokenizer("--policy", str(tmp_path / "run" / "final"))
    done = subprocess.run(
        [*LAUNCH, "brain.py", *flags(args)], cwd=ROOT, text=True, timeout=120, capture_output=True
    )  # the run folder exists
    assert done.returncode == 1 and done.stderr.count("error: --run-dir") == 1, done.stderr


def test_a_slow_rank_does_not_take_the_folder_of_rank_0_for_another_run(tmp_path, monkeypatch):
    args = brain.Args(run_dir=str(tmp_path))  # made by rank 0 while this one was still loading
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setenv("RANK", "1")
    assert common.Run(args, brain.__file__).folder == tmp_path
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        common.Run(args, brain.__file__)
