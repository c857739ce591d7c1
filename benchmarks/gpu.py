"""What one GPU gives, in one call, for the day a card is there.

    python -m benchmarks.gpu                           # no more than 8 minutes
    python -m benchmarks.gpu --only 8B                 # all parts with this word in their name
    python -m benchmarks.gpu --tiny --results /tmp/x   # small shapes, anywhere: does it still run?

A part runs in processes of its own and has a limit of time; as it ends, it adds a line to
benchmarks/results/gpu.jsonl. One that fails or takes too long costs only its line, which then says
why. The parts:

  device     the card, its versions, and what it can do: operations and bytes per second
  check      the check at load and kl/sampling_gap, of random checkpoints of four architectures, and
             of those in assets/real where they are
  X default  a script, with its default flags, for 4 steps
  X 1B, 8B   a script on random weights in the shapes of Llama 3.2 1B and 3.1 8B, by the dtype, or
             with adapters; brain.py, or by --only every script. Killed after its second step
  X recorded 1B, 8B  the same with --cuda-graph, for GPUs only; 1B in mixed, or by --only all
  resume     whether a run that stopped and went on is the one that did not, bit for bit
  TRL        a step of DPO and of GRPO against ours, in turns

Of a script's steps but the first, medians. For brain.py in the large shapes also:

  sample_ms_per_token, sample_tokens_per_s   the time of sampling over --max-response-tokens, and
             all responses' tokens over it
  share_of_bandwidth  the time that it takes to read weights and cache, in bfloat16, once for each
             token, over the time of sampling
  update_mfu  of the reference's, the proposal's and the policy's log-probs and the backward pass;
             what --checkpointing computes again is not counted
  peak_gib, formula_gib  tensors at the most, and what analyze/memory.py says; on a GPU only
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
import tyro

import brain
import common
from analyze import memory
from analyze.differences import NAMES
from benchmarks import limit
from benchmarks.side_by_side import make_tokenizer
from benchmarks.where import RESULTS, ROOT, add

STEPS = 2  # of a large shape: one to warm up, one that is measured
LARGE = memory.Batch(prompts=8, samples=8, prompt_tokens=512, response_tokens=512)
SHAPES = {name: (memory.MODELS[name], LARGE) for name in ("1B", "8B")}
SMALL = memory.Batch(prompts=2, samples=4, prompt_tokens=16, response_tokens=8)
TINY_SHAPES = {
    "1B": (memory.Llama(2, 64, 128, 4, 2, 16, 8_000, tied=True), SMALL),
    "8B": (memory.Llama(3, 64, 128, 4, 2, 16, 8_000), SMALL),
}
SETUPS = {
    "mixed": memory.Setup(),
    "mixed LoRA": memory.Setup(1, 4, 16, True),
    "bfloat16 LoRA": memory.Setup(1, 2, 16, True),
}
BY_DEFAULT = {("1B", "mixed"), ("1B", "bfloat16 LoRA"), ("8B", "bfloat16 LoRA")}  # of brain.py
ARCHITECTURES = {  # of the check: what is asked of a configuration of 8 layers beside its sizes
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64},
}


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """run all parts that have one of these in their name; by default those that fit the time"""
    seconds: float = 480
    """of all parts together; what has not begun by then is left out, with a line that says so"""
    results: Path = RESULTS
    """folder of gpu.jsonl"""
    tiny: bool = False
    """small shapes, to see that this file runs"""
    through: tuple[str, ...] = ()
    """words before a script's name, as tests/pretend_gpu.py"""
    inner: str = ""
    """run one of the parts that are no script, in this process"""
    folder: Path = field(default_factory=Path)
    """where that part finds or puts checkpoints"""


@dataclass
class Part:
    """One line of the results."""

    name: str
    limit: float  # seconds
    run: Callable[[float], dict]  # of the time when it must have ended
    by_default: bool = True


# ── Parts that are no script, each in a process of its own ────────────────────────────────────────


def device(args: Args) -> dict:
    """The card and what it can do."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "cpu"
    sizes = limit.LARGE if gpu and not args.tiny else (256, 2**20)
    rates = limit.limits(torch.device("cuda" if gpu else "cpu"), torch.bfloat16, *sizes)
    found = {"device": name, "tflops": rates[0] / 1e12, "gb_per_s": rates[1] / 1e9}
    if gpu and torch.version.cuda:
        found |= {
            "memory_gb": torch.cuda.get_device_properties(0).total_memory / memory.GB,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def make(args: Args) -> dict:
    """Random checkpoints of `shape`, a policy and a reward model, and prompts, in args.folder.

    The reward model's files are the policy's under other names, and a head.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, batch = (TINY_SHAPES if args.tiny else SHAPES)[args.folder.name]
    tokenizer, policy, reward = make_tokenizer(), args.folder / "policy", args.folder / "reward"
    longest = batch.prompt_tokens + batch.response_tokens + 1
    config = limit.config_of(model, eos_token_id=1, max_position_embeddings=longest)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    reward.mkdir()
    tokenizer.save_pretrained(reward)
    files = {}
    for place, path in enumerate(sorted(policy.glob("*.safetensors"))):
        os.link(path, reward / f"body-{place}.safetensors")
        with safe_open(path, "pt") as weights:
            files |= dict.fromkeys(weights.keys(), f"body-{place}.safetensors")
    head = {"score.weight": torch.randn(1, model.hidden, dtype=torch.bfloat16)}
    save_file(head, reward / "head.safetensors", {"format": "pt"})
    files["score.weight"] = "head.safetensors"
    index = {"metadata": {}, "weight_map": files}
    (reward / "model.safetensors.index.json").write_text(json.dumps(index))
    config.num_labels, config.architectures = 1, ["LlamaForSequenceClassification"]
    config.save_pretrained(reward)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 8_000, (64 + batch.prompts * 8, batch.prompt_tokens), generator=draw)
    rows = [json.dumps({"prompt": " ".join(map(str, row))}) for row in tokens.tolist()]
    (args.folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return {"weights": model.parameters}


def check(args: Args) -> dict:
    """What the check at load says of each checkpoint, and how far samples are from what is
    recomputed, in nats per response of 16 tokens."""
    said, folder = {}, args.folder / "check"
    width = 128 if args.tiny else 512
    for name, more in ARCHITECTURES.items():
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": 2 if args.tiny else 8,
            "num_attention_heads": width // 64,
            "intermediate_size": 3 * width,
        }
        if name == "gpt2":
            sizes = {"n_embd": width, "n_layer": sizes["num_hidden_layers"], "n_head": width // 64}
        special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "num_labels": 1}
        config = transformers.AutoConfig.for_model(name, vocab_size=8_000, **sizes | special | more)
        for what, kind in (
            ("policy", transformers.AutoModelForCausalLM),
            ("reward", transformers.AutoModelForSequenceClassification),
        ):
            torch.manual_seed(0)
            module = kind.from_config(config)
            embeddings = module.get_input_embeddings().weight  # also the head, where they are tied
            head = module.get_output_embeddings() if what == "policy" else None
            spread = 3 / width**0.5  # logits with a standard deviation of about 3
            torch.nn.init.normal_(embeddings if head is None else head.weight, std=spread)
            module.save_pretrained(folder / name / what)
            make_tokenizer().save_pretrained(folder / name / what)
        said[name] = _checks(folder / name / "policy", folder / name / "reward")
    real = ROOT / "assets" / "real"
    if real.exists() and not args.tiny:
        for policy in sorted(real.iterdir()):
            if "CausalLM" in _architecture(policy):
                said[f"real {policy.name}"] = _checks(policy, real / "reward")
    return said


def _architecture(folder: Path) -> str:
    path = folder / "config.json"
    return json.loads(path.read_text())["architectures"][0] if path.exists() else ""


def _checks(policy: Path, reward: Path) -> dict:
    """By dtype, what loading printed and how far off the samples are."""
    found = {}
    for dtype, flags in (("mixed", []), ("bfloat16", ["--dtype", "bfloat16", "--lora-rank", "8"])):
        words = ["--policy", str(policy), "--reward-model", str(reward), "--dataset", "none"]
        args = common.parse_args(brain.Args, [*words, "--lr", "1e-5", *flags])
        out = io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(out):
                run = common.Run(args, brain.__file__)
                tokenizer = common.load_tokenizer("--policy", args.policy)
                model = common.load_policy(run, tokenizer)
                judge = common.load_reward_model(run, model, tokenizer)
        except SystemExit:
            found[dtype] = {"refused": out.getvalue()}
            continue
        prompts = [common.Prompt(text, tokenizer(text)["input_ids"]) for text in ("12 345", "67")]
        batch = common.sample(model, prompts, 4, 16, 1.0, seed=0)
        gap = common.sampling_gap(batch, common.logprobs(model, batch, 1.0))["kl/sampling_gap"]
        found[dtype] = {
            "shared_rows": [model.shared_rows, judge.model.shared_rows],
            "said": out.getvalue(),
            "sampling_gap": gap.item(),
        }
    return found


def trl_dpo(args: Args) -> dict:
    """Seconds of dpo.py's step and TRL's, on a Llama of 16 layers and width 1024."""
    from benchmarks import dpo_step, side_by_side

    shape, model, repeats = _peers_shape(args)
    sides = {"ours": dpo_step.our_step(*shape, **model), "trl": dpo_step.trl_step(*shape, **model)}
    times = side_by_side.take_turns(sides, repeats)
    return {"shape": shape, **side_by_side.ratio(times["ours"], times["trl"]), "seconds": times}


def trl_grpo(args: Args) -> dict:
    """Seconds of brain.py's step and GRPOTrainer's, on the same model."""
    from benchmarks import online_step, side_by_side

    shape, model, repeats = _peers_shape(args)
    turns = online_step.take_turns("grpo", *shape, repeats, **model)
    ours, theirs = turns.times["ours"], turns.times["trl"]
    found = {"shape": shape, **side_by_side.ratio(ours, theirs), "seconds": turns.times}
    return found | {"phases": turns.phases}


def _peers_shape(args: Args) -> tuple[tuple[int, int], dict[str, int], int]:
    """(prompt and response tokens, layers and width, repeats)."""
    if args.tiny:
        return (16, 4), {"layers": 2, "width": 64}, 1
    return (256, 48), {"layers": 16, "width": 1024}, 3


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────


class Failed(Exception):
    """A process ended badly, or not in time."""


def start(args: Args, words: list[str], enough: Callable[[], bool], until: float) -> str:
    """Runs `python WORDS` to its end, or until `enough`; what it printed, stdout before stderr."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, *args.through, *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, text=True)
        while process.poll() is None and not enough() and time.monotonic() < until:
            time.sleep(0.05)
        ended = process.poll() is not None
        process.kill()
        process.wait()
        for file in (out, err):
            file.seek(0)
        printed, errors = out.read(), err.read()
    if not ended and not enough():
        raise Failed(f"took too long; {printed[-500:]} {errors[-500:]}")
    if ended and process.returncode:
        raise Failed(f"exit code {process.returncode}: {printed[-500:]} {errors[-1500:]}")
    return printed


def never() -> bool:
    """Of a process that is to end by itself."""
    return False


def inner(args: Args, name: str, folder: Path, until: float) -> dict:
    """One of the functions above, in a process of its own."""
    words = ["-m", "benchmarks.gpu", "--inner", name, "--folder", str(folder)]
    printed = start(args, [*words, *["--tiny"] * args.tiny], never, until)
    return json.loads(printed.splitlines()[-1])


def read(folder: Path) -> list[dict]:
    """The whole lines of a run's log."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ── Runs of the scripts ───────────────────────────────────────────────────────────────────────────


class Runs:
    """The scripts' parts, which share a folder of checkpoints and what is known of the device."""

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder = args, folder
        self.card = {"device": "unknown"}

    def device(self, until: float) -> dict:
        """Asks first, for the rates that the others are measured by."""
        self.card |= inner(self.args, "device", self.folder, until)
        return self.card

    def rates(self) -> tuple[float, float] | None:
        """Operations and bytes per second: a known card's, or else as they were measured."""
        for name, (_, rate) in memory.CARDS.items():
            if name in self.card["device"]:
                return memory.FLOPS, rate
        if "tflops" in self.card:
            return self.card["tflops"] * 1e12, self.card["gb_per_s"] * 1e9
        return None

    def default(self, name: str, until: float) -> dict:
        """A script's default for 4 steps, to its end; `resume` goes on from the second."""
        folder, words = self.folder / f"{name} default", self.default_words(name)
        start(self.args, [*words, "--steps", "4", "--run-dir", str(folder)], never, until)
        return self.medians(folder)

    def default_words(self, name: str) -> list[str]:
        """Without --steps, so that a run can go on."""
        words = [f"{name}.py", "--eval-prompts", "64", "--save-every", "2"]
        if self.args.tiny:
            words += "--prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 8".split()
        return words

    def medians(self, folder: Path) -> dict:
        """Of the steps but the first; of some, that is, of which a script may lack one."""
        lines = read(folder)
        found = {}
        for name in (
            "time/sample_s time/score_s time/update_s tokens_per_s length/mean length/eos_rate "
            "kl/sampling_gap memory/peak_gib"
        ).split():
            values = [line[name] for line in lines if line["step"] > 1 and name in line]
            if values:
                found[name] = statistics.median(values)
        return found | {"steps": lines[-1]["step"], "eval/kl": lines[0]["eval/kl"]}

    def shaped(self, script: str, shape: str, kind: str, recorded: bool, until: float) -> dict:
        """A script on random weights of a large shape; its decoding steps may be `recorded`."""
        began = time.monotonic()
        model, batch = (TINY_SHAPES if self.args.tiny else SHAPES)[shape]
        checkpoints, setup = self.folder / shape, SETUPS[kind]
        if not (checkpoints / "prompts.jsonl").exists():
            inner(self.args, "make", checkpoints, until)
        made = time.monotonic()
        folder = self.folder / f"{script} {shape} {kind}{' recorded' * recorded}"
        words = [f"{script}.py", "--policy", str(checkpoints / "policy")]
        words += ["--reward-model", str(checkpoints / "reward")]
        words += ["--dataset", str(checkpoints / "prompts.jsonl"), "--lr", "1e-6"]
        words += ["--prompts-per-step", str(batch.prompts)]
        words += ["--samples-per-prompt", str(batch.samples)]
        words += ["--max-response-tokens", str(batch.response_tokens)]
        words += ["--micro-batch", str(batch.micro_batch), "--eval-prompts", str(batch.prompts)]
        words += ["--steps", str(STEPS + 1), "--eval-every", "99", "--save-every", "99"]
        words += ["--run-dir", str(folder), "--dtype", kind.split()[0]]
        words += ["--lora-rank", str(setup.rank)] if setup.rank else []
        words += ["--checkpointing"] * setup.checkpointing
        words += ["--cuda-graph"] * recorded

        def enough() -> bool:
            return any(line["step"] == STEPS for line in read(folder))

        # Killed, as a checkpoint and a final/ of such a model take longer than the steps.
        start(self.args, words, enough, until)
        found = self.medians(folder)
        found |= {"made_s": made - began, "run_s": time.monotonic() - made, **vars(batch)}
        return found | (self.shares(found, model, batch, setup) if script == "brain" else {})

    def shares(
        self, found: dict, model: memory.Llama, batch: memory.Batch, setup: memory.Setup
    ) -> dict:
        """What a step of brain.py is of what the card could do."""
        sample_s, tokens = found["time/sample_s"], batch.response_tokens
        shares = {
            "sample_ms_per_token": 1000 * sample_s / tokens,
            "sample_tokens_per_s": batch.prompts * batch.samples * tokens / sample_s,
        }
        if self.card["device"] != "cpu":  # where the peak is that of the whole process
            shares["peak_gib"] = found["memory/peak_gib"]
            shares["formula_gib"] = memory.most(model, batch, setup) / 2**30
        rates = self.rates()
        if rates:
            read_s = tokens * limit.bytes_read(model, batch, 2) / rates[1]
            passes = 3 + (1 if setup.rank else 2)
            computed_s = passes * limit.operations(model, batch) / rates[0]
            shares["share_of_bandwidth"] = read_s / sample_s
            shares["update_mfu"] = computed_s / found["time/update_s"]
        return shares

    def resume(self, until: float) -> dict:
        """The default of brain.py, stopped after two steps and continued, against the whole run."""
        from safetensors.torch import load_file

        whole, folder = self.folder / "brain default", self.folder / "resumed"
        if not whole.exists():
            self.default("brain", until)
        words = [*self.default_words("brain"), "--steps", "2", "--run-dir", str(folder)]
        start(self.args, words, never, until)
        words = ["brain.py", "--resume", str(folder), "--steps", "4"]
        start(self.args, words, never, until)
        ours, theirs = (load_file(x / "final" / "model.safetensors") for x in (folder, whole))
        gaps = [(ours[name] - theirs[name]).abs().max().item() for name in theirs]
        losses = [[line["loss"] for line in read(x) if line["step"]] for x in (folder, whole)]
        return {"equal": max(gaps) == 0, "largest_gap": max(gaps), "losses": losses}


def parts(args: Args, runs: Runs) -> list[Part]:
    """All parts, those that count most first."""
    found = [Part("check", 120, partial(inner, args, "check", runs.folder))]
    found += [Part(f"{name} default", 60, partial(runs.default, name)) for name in NAMES]
    for shape in SHAPES:
        for kind in SETUPS:
            for name in NAMES:
                usual = name == "brain" and (shape, kind) in BY_DEFAULT
                run = partial(runs.shaped, name, shape, kind, False)
                found.append(Part(f"{name} {shape} {kind}", 240, run, usual))
                usual = usual and (shape, kind) == ("1B", "mixed") and torch.cuda.is_available()
                run = partial(runs.shaped, name, shape, kind, True)
                found.append(Part(f"{name} recorded {shape} {kind}", 240, run, usual))
    found.append(Part("resume", 60, runs.resume))
    if find_spec("trl"):
        for name, inside in (("TRL DPO", "trl_dpo"), ("TRL GRPO", "trl_grpo")):
            found.append(Part(name, 90, partial(inner, args, inside, runs.folder)))
    if not args.only:
        return [part for part in found if part.by_default]
    return [part for part in found if any(word in part.name for word in args.only)]


INNER = {f.__name__: f for f in (device, make, check, trl_dpo, trl_grpo)}


def main(args: Args) -> None:
    """Runs the parts in turn; the exit code is 1 if one failed."""
    if args.inner:
        print(json.dumps(INNER[args.inner](args)))
        return
    patience = 5 if args.tiny else 1  # where small shapes are run, others may be at work
    end, failed = time.monotonic() + patience * args.seconds, False
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args, Path(folder))
        for part in [Part("device", 60, runs.device), *parts(args, runs)]:
            began = time.monotonic()
            try:
                if began > end:
                    raise Failed(f"not begun: --seconds {args.seconds} are over")
                found = part.run(min(end, began + patience * part.limit))
            except Exception as error:  # one part must not cost the others
                found, failed = {"failed": f"{type(error).__name__}: {error}"}, True
            seconds = time.monotonic() - began
            line = {"part": part.name, "tiny": args.tiny, "part_s": seconds, **found}
            add("gpu", line | {"device": runs.card["device"]}, args.results)
    raise SystemExit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args))
