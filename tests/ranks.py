"""What tests/test_distributed.py runs in two processes at once, and for comparison in one.

    torchrun --standalone --nproc-per-node 2 tests/ranks.py FOLDER [CHECK ...]

Each process writes FOLDER/<rank>.pt: for each check below, or each that is named, what it saw.
"""

import copy
import gc
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from models import make_world  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import bond  # noqa: E402
import brain  # noqa: E402
import common  # noqa: E402
import dpo  # noqa: E402
import gdc  # noqa: E402
import ppo  # noqa: E402
import wind  # noqa: E402
from plumbing import models as loading  # noqa: E402
from prepare import reward, sft  # noqa: E402

SCRIPTS = {script.__name__: script for script in (brain, gdc, dpo, wind, bond, ppo)}
RUNS = {  # of four steps, by name: (script, folder of the world, flags)
    "brain": ("brain", "llama", {"refresh_every": 2}),
    "gdc": ("gdc", "llama", {"test_every": 2}),
    "gdc running": ("gdc", "llama", {"normalizer": "running", "proposal": "policy"}),
    "dpo": ("dpo", "llama", {"pairs": "dataset"}),
    "slic": ("dpo", "llama", {"loss": "slic", "checkpointing": True}),
    "wind": ("wind", "llama", {"refresh_every": 2}),
    "bond": ("bond", "llama", {"updates_per_sample": 2, "gamma": 0.5}),
    "bond copy": ("bond", "llama", {"anchor": "copy", "eta": 0.5}),
    "brain gpt2": ("brain", "gpt2", {"micro_batch": 1, "refresh_every": 1}),
    "bond gpt_neox": ("bond", "gpt_neox", {}),
    "brain lora": ("brain", "llama", {"refresh_every": 2, "lora_rank": 4, "checkpointing": True}),
    "bond lora": ("bond", "gpt2", {"lora_rank": 4}),
    "ppo": ("ppo", "llama", {"updates_per_sample": 2}),
    "ppo rloo": ("ppo", "llama", {"advantage": "rloo", "updates_per_sample": 2}),
    "ppo lora": ("ppo", "gpt2", {"lora_rank": 4, "micro_batch": 1}),
}
WORLDS = ["llama", "gpt_neox", "gpt2"]  # gpt2 has tied embeddings
RESUMED = ["brain", "brain gpt2", "gdc running", "bond", "brain lora", "ppo", "ppo lora"]


def make_worlds(folder: Path) -> None:
    """Checkpoints of three architectures, and one data set of pairs, in `folder`."""
    for name in WORLDS:
        make_world(folder / name, name)
        for path in (folder / name / "data").iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [row | {"chosen": " good film", "rejected": " bad"} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def args_of(folder: Path, name: str, run: Path, **more):
    """(script, its flags) of the run `name`; five held-out prompts are no even share of two."""
    script, world, own = RUNS[name]
    at, flags = folder / world, {"eval_prompts": 5, "prompts_per_step": 4, "lr": 1e-4} | own | more
    shared = {
        "policy": str(at / "sft"),
        "reward_model": str(at / "rm"),
        "dataset": str(at / "data"),
        "steps": 4,
        "samples_per_prompt": 4,
        "max_prompt_tokens": 16,
        "warmup_steps": 2,
        "max_response_tokens": 6,
        "eval_every": 2,
        "save_every": 2,
        "run_dir": str(run),
    }
    return SCRIPTS[script], SCRIPTS[script].Args(**shared | flags)


@contextmanager
def patched(target, name: str, new):
    """target.name is `new` for a while."""
    old = getattr(target, name)
    setattr(target, name, new)
    try:
        yield
    finally:
        setattr(target, name, old)


def from_a_table(seen: list):
    """A `common.sample` whose responses depend on the prompt alone: on no model, seed or rank."""

    def sample(model, prompts, n, max_tokens, temperature, seed):
        if n > 1:
            seen.append([prompt.text for prompt in prompts])
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt.tokens) * 100 + n)
            draw = torch.randint(4, 19, (n, max_tokens), generator=generator).tolist()
            lengths = torch.randint(1, max_tokens + 1, (n,), generator=generator).tolist()
            rows.append(
                [
                    [*row[: length - 1], 1] if length < max_tokens else row
                    for row, length in zip(draw, lengths)
                ]
            )
        return common.Batch(prompts, rows)

    return sample


@contextmanager
def in_float64():
    """Models that are loaded, and what is computed with them, are in float64 for a while.

    A loss that holds exp of a sum of log-probs amplifies rounding, and how much of it there is
    depends on the processor's kernels. In float64 what is left is far below any tolerance here.
    """
    load_module = loading._load_module
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patched(loading, "_load_module", lambda *inputs: load_module(*inputs).double()),
            patched(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Collectives(TorchDispatchMode):
    """Counts what is said between processes, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self.counts[str(function)] = self.counts.get(str(function), 0) + 1
        return function(*args, **kwargs or {})


def size(tensors) -> int:
    """Bytes on this process."""
    return sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in tensors)


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = [(x.to_local() if isinstance(x, DTensor) else x).untyped_storage() for x in tensors]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def whole(tensor):
    """A tensor, gathered if it is sharded; a copy."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(script, args, before_step=lambda count: None, precision=in_float64) -> dict:
    """A run on responses from a table: what went into it, each update's gradients, what is sharded."""
    seen, gradients, sharded = [], [], {}
    clip, opened, table = torch.nn.utils.clip_grad_norm_, common.Run.open, from_a_table(seen)

    def record(parameters, norm):
        parameters = list(parameters)
        gradients.append([whole(p.grad) for p in parameters if p.requires_grad])
        return clip(parameters, norm)

    def open_(self, models, optimizer):
        sharded.update(
            {
                name: all(isinstance(p, DTensor) for p in part.parameters())
                for name, part in models.items()
                if [*part.parameters()]
            }
        )
        return opened(self, models, optimizer)

    def sample(*inputs):
        before_step(len(seen))
        return table(*inputs)

    with (
        patched(torch.nn.utils, "clip_grad_norm_", record),
        patched(common, "sample", sample),
        patched(common.Run, "open", open_),
        patched(common, "choose_rows", lambda *_: None),
        precision(),
    ):
        result = script.main(args)
    return {"prompts": seen, "gradients": gradients, "result": result, "sharded": sharded}


def stop_after(step: int, script, args) -> None:
    """A run that is broken off once the checkpoint of `step` is written."""
    save = common.Run.save

    def save_and_stop(self, at):
        save(self, at)
        if at == step:
            if self.rank == 0:
                self.lock.release()  # as the end of the process would
            raise KeyboardInterrupt

    with patched(common.Run, "save", save_and_stop):
        try:
            train(script, args)
        except KeyboardInterrupt:
            pass


def resume(script, run: Path) -> None:
    train(script, common.parse_args(script.Args, ["--resume", str(run)]))


# ── the checks: all take the folder of the worlds and the rank ──
def check_runs(folder: Path, rank: int) -> dict:
    """Every run; the run folder that rank 1 would write has another name."""
    return {name: train(*args_of(folder, name, folder / f"two {name} {rank}")) for name in RUNS}


def check_prepare(folder: Path, rank: int) -> dict:
    """A run of each script of prepare/, where the flags for it lie in the folder."""
    flags, seen = folder / "flags.json", {}
    for script in (sft, reward) if flags.exists() else ():
        name = Path(script.__file__).stem
        args = script.Args(**json.loads(flags.read_text()))
        args.run_dir = str(folder / f"two {name} {rank}")
        seen[name] = train(script, args)
    return seen


def check_one_held_out_prompt(folder: Path, rank: int):
    run = folder / f"two held-out {rank}"
    return train(*args_of(folder, "brain", run, eval_prompts=1, steps=1))["result"]


def load(folder: Path, world: str):
    """A policy, a reward model and a frozen copy, as a script makes them."""
    args = brain.Args(
        policy=str(folder / world / "sft"),
        reward_model=str(folder / world / "rm"),
        max_prompt_tokens=16,
    )
    run = common.Run(args, brain.__file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    policy = common.load_policy(run, tokenizer)
    judge = common.load_reward_model(run, policy, tokenizer)
    ref = common.frozen_copy(policy)
    return common.shard(policy), judge.model, ref


def check_shards(folder: Path, rank: int) -> dict:
    """By architecture and model: (its groups, its blocks, its bytes here, its bytes in all)."""

    def describe(model):
        own = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
        groups = [x for x in model.modules() if isinstance(x, FSDPModule)]
        return (
            len(groups),
            model.config.num_hidden_layers,
            own,
            sum(p.numel() * p.element_size() for p in model.parameters()),
        )

    return {world: [describe(model) for model in load(folder, world)] for world in WORLDS}


PROMPTS = [common.Prompt(str(row), row) for row in ([5, 6, 7, 8], [9, 10], [11, 12, 13])]


@in_float64()
def check_sampling(folder: Path, rank: int) -> dict:
    """The sharded policy, after an update, against its own weights in a plain model: tokens, their
    log-probs, and the collectives of 3 and of 30 tokens."""
    seen = {}
    for world in WORLDS:
        copied = []

        def shard(model, copied=copied):
            copied.append(copy.deepcopy(model))
            return loading.shard(model)

        with patched(common, "shard", shard):
            policy, _, ref = load(folder, world)
        plain = copied[-1]
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, fused=True)
        mine = common.sample(policy, PROMPTS[rank:], 4, 8, 1.0, 7)
        common.logprobs_and_entropy(policy, mine, 1.0)[0].sum().backward()
        optimizer.step()
        with torch.no_grad():
            for weight, new in zip(plain.parameters(), policy.parameters()):
                weight.copy_(whole(new))
        counts, kept = {}, []
        for model, name in ((policy, "policy"), (ref, "ref")):
            for tokens in (3, 30):
                before = alive()
                with Collectives() as seen_here:
                    batch = common.sample(model, PROMPTS[rank:], 4, tokens, 1.0, 3)
                counts[name, tokens] = seen_here.counts
                kept.append(alive() - before)
            if name == "policy":
                theirs = common.sample(plain, PROMPTS[rank:], 4, 30, 1.0, 3)
                tokens = batch.responses == theirs.responses
                drawn = (batch.sampled_logprobs - theirs.sampled_logprobs).abs().max().item()
                gap = (
                    common.logprobs(model, batch, 1.0) - common.logprobs(plain, batch, 1.0)
                ).abs()
                seen[world] = {
                    "tokens": tokens,
                    "drawn": drawn,
                    "logprobs": gap.max().item(),
                    "counts": counts,
                }
        seen[world]["freed"] = all(isinstance(p, DTensor) for p in policy.parameters())
        seen[world]["kept"] = kept
    return seen


def check_early_end(folder: Path, rank: int) -> list[int]:
    """Tokens drawn and time of the last: any token ends a response of rank 1, none one of rank 0."""
    policy = load(folder, "llama")[0]
    policy.end_tokens = list(range(24)) if rank else [99]
    batch = common.sample(policy, PROMPTS, 4, 60, 1.0, 3)
    common.logprobs(policy, batch, 1.0)  # a collective after it: the ranks meet again
    return [*batch.lengths().shape, int(batch.lengths().max())]


@in_float64()
def check_plain_rows(folder: Path, rank: int) -> list:
    """Log-probs and gradients of a policy that cannot share rows, and of one that does."""
    seen = []
    for shared in (True, False):
        policy = load(folder, "gpt2")[0]
        policy.shared_rows, policy.own_head = shared, not shared
        batch = from_a_table([])(policy, PROMPTS, 3, 6, 1.0, 0)
        logprobs = common.logprobs_and_entropy(policy, batch, 1.0)[0]
        logprobs.sum().backward()
        seen.append([logprobs.detach(), *(whole(p.grad) for p in policy.parameters())])
    return seen


@in_float64()
def check_many_chunks(folder: Path, rank: int) -> list:
    """The same with the vocabulary head in one chunk, and in chunks that are computed again."""
    seen = []
    for most in (2**25, 0):
        policy = load(folder, "llama")[0]
        with patched(common, "MOST_LOGITS", most), patched(common, "CHUNK", most):
            batch = from_a_table([])(policy, PROMPTS[rank:] * 40, 3, 6, 1.0, 0)
            logprobs = common.logprobs_and_entropy(policy, batch, 1.0)[0]
            logprobs.mean().backward()
        seen.append([logprobs.detach(), *(whole(p.grad) for p in policy.parameters())])
    return seen


def check_bfloat16(folder: Path, rank: int) -> list:
    """(type, whether trained) of weights, gradients and moments of --dtype bfloat16 with adapters,
    and rewards of a model whose last layer alone is float32, as on a GPU."""
    args = brain.Args(
        policy=str(folder / "llama" / "sft"),
        dtype="bfloat16",
        lora_rank=4,
        max_prompt_tokens=16,
        reward_model=str(folder / "llama" / "rm"),
    )
    run = common.Run(args, brain.__file__)
    policy = common.load_policy(run, common.load_tokenizer("--policy", args.policy))
    common.shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, fused=True)
    batch = from_a_table([])(policy, PROMPTS, 3, 6, 1.0, 0)
    common.logprobs_and_entropy(policy, batch, 1.0)[0].sum().backward()
    kinds = {(str(p.dtype), p.grad is not None) for p in policy.parameters()}
    optimizer.step()
    moments = [x for s in optimizer.state.values() for n, x in s.items() if n != "step"]
    kinds |= {(str(x.dtype), True) for x in moments}
    loaded = loading._load_module(
        "--reward-model",
        args.reward_model,
        transformers.AutoModelForSequenceClassification,
        torch.bfloat16,
        run.device,
    )
    loaded.requires_grad_(False).score.float()
    model = loading.Model(loaded)
    alone = common._rewards(model, batch)
    with torch.no_grad():
        return kinds, alone, common.shard(model)(common._rewards, batch)


class WeightCasts(TorchDispatchMode):
    """Counts casts of matrices from float32 to bfloat16; states of a few tokens are smaller."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.__name__.startswith("_to_copy"):
            kinds = args[0].dtype, out.dtype
            self.count += kinds == (torch.float32, torch.bfloat16) and out.numel() > 32 * 12
        return out


def check_mixed(folder: Path, rank: int) -> dict:
    """Of a policy that computes in bfloat16 and was updated, a renewed copy and an exact one:
    log-probs as drawn and as recomputed, and casts of weights in drawing 3 and 9 tokens."""
    seen = {}
    for world in ("llama", "gpt2"):
        with patched(common, "shard", lambda model: model):
            plain = load(folder, world)[0]
        plain.mixed, plain.end_tokens = True, [99]
        copies = [loading.frozen_copy(plain), loading.frozen_copy(plain, exact=True)]
        loading.shard(plain)
        optimizer = torch.optim.AdamW(plain.parameters(), 1e-2, fused=True)
        batch = from_a_table([])(plain, PROMPTS, 3, 6, 1.0, 0)
        common.logprobs_and_entropy(plain, batch, 1.0)[0].sum().backward()
        optimizer.step()
        found = []
        for model in (plain, *copies):
            model.load_state_dict(plain.state_dict())
            counts = []
            for tokens in (3, 9):
                with WeightCasts() as casts:
                    drawn = common.sample(model, PROMPTS, 4, tokens, 1.0, 3)
                counts.append(casts.count)
            found.append((drawn.sampled_logprobs, common.logprobs(model, drawn, 1.0), counts))
        seen[world] = found
    return seen


def check_resume(folder: Path, rank: int) -> None:
    """Runs that are broken off and resumed: from two processes on two, from one on two."""
    for name in RESUMED:
        stop_after(2, *args_of(folder, name, folder / f"two broken {name}"))
        dist.barrier()
        if rank == 0:
            shutil.copytree(folder / f"two broken {name}", folder / f"two to one {name}")
        dist.barrier()
        for kind in ("two broken", "one to two"):
            resume(SCRIPTS[RUNS[name][0]], folder / f"{kind} {name}")


def check_unused_weight(folder: Path, rank: int) -> list:
    """(steps done, whole weights, moments) of a policy with a weight that no pass uses, as the vision
    tower of some causal LMs: after an update, and restored from its checkpoint."""
    seen, run_dir = [], str(folder / "two unused")
    for resume_from in ("", run_dir):
        sft = str(folder / "llama" / "sft")
        args = brain.Args(policy=sft, run_dir=run_dir, resume=resume_from, max_prompt_tokens=16)
        run = common.Run(args, brain.__file__)
        policy = common.load_policy(run, common.load_tokenizer("--policy", sft))
        policy.module.unused = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW(common.shard(policy).parameters(), 1e-2, fused=True)
        done = run.open(torch.nn.ModuleDict({"policy": policy}), optimizer)
        if not resume_from:
            batch = from_a_table([])(policy, PROMPTS, 3, 6, 1.0, 0)
            common.logprobs_and_entropy(policy, batch, 1.0)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.save(1)
        used = [p for p in policy.parameters() if len(p) != 3]
        moments = [whole(x) for p in used for x in optimizer.state[p].values()]
        seen.append((done, [whole(p) for p in policy.parameters()], moments))
    return seen


def check_ctrl_c(folder: Path, rank: int):
    """Rank 1 alone hears of it, in step 2; how the process ends."""

    def press(count: int) -> None:
        if rank == 1 and count == 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        flags = args_of(folder, "dpo", folder / "two ctrl-c", pairs="sampled")
        train(*flags, before_step=press, precision=nullcontext)
    except SystemExit as stop:
        return stop.code


def check_memory(folder: Path, rank: int) -> dict:
    """Bytes here of what analyze/memory.py counts, after an update; `passing`: the most that was
    gathered at once as a block ended its forward pass."""
    policy, _, ref = load(folder, "llama")
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, fused=True)
    passing = []

    def gathered(*_):
        passing.append(size(p for p in policy.parameters() if not isinstance(p, DTensor)))

    for block in policy.module.model.layers:
        block.mlp.register_forward_hook(gathered)
    batch = from_a_table([])(policy, PROMPTS, 3, 6, 1.0, 0)
    common.logprobs_and_entropy(policy, batch, 1.0)[0].sum().backward()
    optimizer.step()
    sampling = []
    policy.module.model.norm.register_forward_hook(
        lambda *_: sampling.append(size(policy.parameters()))
    )
    common.sample(policy, PROMPTS, 3, 6, 1.0, 0)
    moments = [x for s in optimizer.state.values() for n, x in s.items() if n != "step"]
    return {
        "weights": size(policy.parameters()),
        "moments": size(moments),
        "gradients": size(p.grad for p in policy.parameters()),
        "reference": size(ref.parameters()),
        "passing": max(passing),
        "gathered copy": max(sampling),
    }


def check_log(folder: Path, rank: int) -> None:
    """Metrics that differ by rank, and samples of uneven shares."""
    args = brain.Args(run_dir=str(folder / "two log"))
    run = common.Run(args, brain.__file__)
    weight = torch.nn.Linear(1, 1)
    run.open({"policy": weight}, torch.optim.AdamW(weight.parameters()))
    print(f"rank {rank} speaks")
    run.log(
        0,
        {"x": 1.0 + rank, "y": torch.tensor(4.0 * rank)},
        [{"prompt": i} for i in range(rank, 5, 2)],
    )


def main(folder: Path, wanted: list[str]) -> None:
    """Runs the wanted checks, or all of them if none is named."""
    torch.set_num_threads(int(os.environ["TEST_THREADS"]))
    dist.init_process_group(timeout=timedelta(seconds=60))  # a deadlock ends in an error
    rank, seen = dist.get_rank(), {}
    for name, check in list(globals().items()):
        if name.startswith("check_") and (not wanted or name in wanted):
            seen[name] = check(folder, rank)
            print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
