"""A run: its flags, its processes, its folder, its log, its checkpoint.

The scripts call it at every step; nothing here knows what a method computes. Models live in
`models.py`, what a run shows at its end in `report.py`.
"""

import importlib
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
POSITIVE = (
    "prompts_per_step samples_per_prompt max_response_tokens temperature steps "
    "updates_per_sample minibatches lr max_grad_norm eval_every eval_prompts save_every"
).split()  # numbers that must be more than 0; all others may be 0
FORMAT = 4  # of checkpoints: raised when what they hold changes
HEADLINE = "reward/mean kl/ref eval/loss eval/accuracy eval/reward eval/kl eval/win_rate".split()


# ── Mistakes in flags, files and data ─────────────────────────────────────────────────────────────


def require(condition: bool, message: str) -> None:
    """Ends the process with one line on stderr and exit code 2 unless `condition` holds."""
    if condition:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # torchrun ends this process when rank 0 has said the same and left
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def explained(what: str):
    """Turns an error of a library into one line that begins with `what`, the flag at fault.

    Libraries do not document what a bad file makes them raise, so it catches everything, but for
    a full GPU, which is the fault of no file.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Libraries have words of their own for a full disk or a bad file; the reason is behind.
        cause = error.__cause__ or error
        cause = error.__context__ if isinstance(error.__context__, OSError) else cause
        require(False, f"{what}: {str(cause)[:400] or type(cause).__name__}")


@contextmanager
def found(flag: str, name: str):
    """The path of a file or folder, from here or from the scripts' folder, or else a hub name.

    What goes wrong with it inside the `with` becomes one line that names the flag.
    """
    with explained(f"{flag} {name}"):
        yield _path(flag, name)


def _path(flag: str, name: str) -> str:
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return str(path)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    is_file = name.endswith((".json", ".jsonl", ".parquet"))
    require(not is_path and not is_file, f"{flag} {name}: no such file or folder")
    return name


# ── Flags ─────────────────────────────────────────────────────────────────────────────────────────


def parse_args(args_class, argv: list[str] | None = None):
    """The flags. `--resume RUN_FOLDER` brings back those of its args.json; none may differ but
    --steps, which may grow."""
    import tyro

    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        tyro.cli(_grouped(args_class), args=["--help"], config=[tyro.conf.OmitArgPrefixes])
    args = tyro.cli(args_class, args=words)
    if not args.resume:
        named = {word.split("=")[0].replace("_", "-") for word in words}
        needed = ["--reward-model"] * bool(args.reward_model)  # which prepare/ has not
        needed += ["--dataset", "--lr"]
        missing = [flag for flag in needed if flag not in named]
        require(
            args.policy == args_class.policy or not missing,
            f"--policy {args.policy}: name {', '.join(missing)} as well, whose defaults are made "
            "for the embedded policy",
        )
        return args
    script = Path(sys.modules[args_class.__module__].__file__).name
    path = Path(args.resume, "args.json")
    require(path.exists(), f"--resume {args.resume}: it has no args.json, so it is no run folder")
    with explained(f"--resume {args.resume}: {path} is damaged"):
        about = json.loads(path.read_text())
        require(about["script"] == script, f"--resume {args.resume}: a run of {about['script']}")
        saved = args_class(**about["args"] | {"resume": args.resume})
    args = tyro.cli(args_class, args=words, default=saved)
    changed = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if value != getattr(saved, name) and not (name == "steps" and value > saved.steps)
    ]
    require(not changed, f"{' '.join(changed)}: {args.resume} has another value; leave it out")
    return args


def _grouped(args_class):
    """The flags as tyro shows them in groups, one dataclass within another for each comment line
    between them, as `# data`."""
    groups = {}
    for line in inspect.getsource(args_class).splitlines():
        if re.fullmatch(r"    # \w+", line):
            names = groups.setdefault(line.strip("# "), [])
        elif re.match(r"    \w+: ", line):
            names.append(line.split(":")[0].strip())
    parts = []
    for group, names in groups.items():
        # tyro finds the texts of the fields in the class that they are inherited from.
        others = [other for other in fields(args_class) if other.name not in names]
        hidden = {other.name: field(init=False, default=other.default) for other in others}
        types = {other.name: other.type for other in others}
        part = dataclass(type(group, (args_class,), hidden | {"__annotations__": types}))
        part.__doc__ = ""
        parts.append((group, part, field(default_factory=part)))
    return make_dataclass("Args", parts)


def check_numbers(args) -> None:
    """Ends the process if a number is negative or infinite, or 0 where it must be more."""
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            good = value > 0 or value == 0 and name not in POSITIVE
            bound = "more than" if name in POSITIVE else "at least"
            flag = f"--{name.replace('_', '-')} {value}"
            require(good and value < math.inf, f"{flag}: must be {bound} 0")


def seed_of(*parts) -> int:
    """A seed from whatever distinguishes these draws from all others, as seed, step and rank."""
    return random.Random(repr(parts)).getrandbits(63)


# ── The run ───────────────────────────────────────────────────────────────────────────────────────


class Run:
    """One run of a script: its flags, process, device, folder, log and checkpoint."""

    def __init__(self, args, script: str):
        check_numbers(args)
        self.args, self.script, self.begun = args, Path(script), time.perf_counter()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        require(
            args.prompts_per_step % (self.world * args.minibatches) == 0,
            f"--prompts-per-step {args.prompts_per_step}: cannot be split evenly over "
            f"{self.world} processes and --minibatches {args.minibatches}",
        )
        require(
            args.dtype != "bfloat16" or args.lora_rank,
            "--dtype bfloat16: its rounding would lose small steps of the weights; take mixed, or "
            "with it --lora-rank 16, which trains float32 adapters and no other weight",
        )
        if args.lora_rank:
            with explained(f"--lora-rank {args.lora_rank}: pip install peft"):
                importlib.import_module("peft")
        if args.track != "none":
            with explained(f"--track {args.track}: pip install {args.track}"):
                self.tracker = importlib.import_module(args.track)
        name = f"{self.script.stem}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or args.run_dir or Path("runs", name))
        # Rank 0 alone asks: a slower rank would take the folder of rank 0 for another run's.
        require(
            self.rank > 0 or args.resume or not self.folder.exists(),
            f"--run-dir {self.folder}: exists; continue it with --resume {self.folder}, or name "
            "another",
        )
        self._join_processes()

    def _join_processes(self) -> None:
        """Takes this process's device and, under torchrun, meets the others."""
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            # It plans anew for each shape of the inputs, and a sampled token has one of its own.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.joined = self.world > 1 and not dist.is_initialized()
        require(
            not self.args.cuda_graph or self.device.type == "cuda" and self.world == 1,
            "--cuda-graph: needs a GPU, and a single process; leave it out",
        )
        if self.joined:  # ranks wait for the longest sampling, and for rank 0 to write a checkpoint
            dist.init_process_group(timeout=timedelta(hours=1))
        usual = sys.excepthook if self.joined else sys.__excepthook__  # torch's names the rank
        sys.excepthook = partial(_say_known, usual)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # one voice; errors, on stderr, are heard from all

    def open(self, models: torch.nn.ModuleDict, optimizer) -> int:
        """Makes the run folder or, with --resume, restores it. Returns the number of steps done.

        `models` by name, and the optimizer of their weights, are what a checkpoint holds.
        """
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.models, self.optimizer = models, optimizer
        self.interrupted = False
        if self.rank == 0 and not self.args.resume:
            self._make_folder()
        if self.rank == 0:
            self._lock()
        done = self._restore() if self.args.resume else 0
        if self.rank == 0 and self.args.resume:
            self._grow()
        if self.rank == 0:
            with self._writing("the log"):
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=done + 1)
            if self.args.track != "none":
                config = asdict(self.args)
                self.tracker.init(project="alignment", name=self.folder.name, config=config)
        silent = self.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.args.steps, initial=done, disable=silent)
        self._listen()
        threading.excepthook = partial(_say_thread, threading.__excepthook__)
        return done

    def _make_folder(self) -> None:
        from plumbing.report import about

        # The folder appears as a whole, or not at all.
        new = self.folder.with_name(f"{self.folder.name}.{os.getpid()}")
        with explained(f"--run-dir {self.folder}"):
            try:
                new.mkdir(parents=True)
                (new / "args.json").write_text(json.dumps(about(self), indent=2))
                shutil.copy(self.script, new)
                shutil.copy(ROOT / "common.py", new)
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / "plumbing", new / "plumbing", ignore=skip)
                new.rename(self.folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def _grow(self) -> None:
        """Notes that --steps is more than before; final/, of fewer steps, makes room."""
        path = self.folder / "args.json"
        about = json.loads(path.read_text())
        before, now = about["args"]["steps"], self.args.steps
        if before == now:
            return
        with self._writing("args.json"):
            shutil.rmtree(self.folder / "final", ignore_errors=True)
            about["args"]["steps"] = now
            _replace(path, json.dumps(about, indent=2))
        print(f"{self.folder}: goes on to step {now}, no longer {before}")

    def _lock(self) -> None:
        """Lets no other process run this folder until this one ends."""
        from filelock import FileLock, Timeout

        # A singleton: a run that failed in this same process must not lock its successor out.
        self.lock = FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
        with self._writing(".lock"):
            try:
                self.lock.acquire()
            except Timeout:
                require(False, f"--resume {self.folder}: another process runs it; wait, or stop it")

    def _listen(self) -> None:
        """The first Ctrl-C or SIGTERM ends the run after the step, a second one at once."""

        def interrupt(number, _):
            self.interrupted = True
            signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)

    def _writing(self, what: str):
        """A full disk or a missing right ends the run with one line; what was saved is kept."""
        how = f"continue with --resume {self.folder} when that is mended"
        return explained(f"--run-dir {self.folder}: cannot write {what}; {how}")

    # ── checkpoint ──

    def _identity(self) -> dict:
        where = {"resume": "", "run_dir": "", "steps": 0}  # these may change
        return {"script": self.script.name} | asdict(self.args) | where

    def _frozen(self) -> set[str]:
        """The names of the weights that training cannot change: those below adapters."""
        weights = self.models["policy"].state_dict(keep_vars=True)
        is_weight = torch.nn.Parameter
        return {n for n, w in weights.items() if isinstance(w, is_weight) and not w.requires_grad}

    def save(self, step: int) -> None:
        """Writes the checkpoint beside the old one, then in its place: a kill leaves one whole."""
        from torch.distributed.checkpoint import state_dict

        whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = {"format": FORMAT, "step": step, "run": self._identity()}
        frozen = self._frozen()
        for name, model in self.models.items():
            saved[name] = whole_weights(model, self.rank, frozen)
        saved["optimizer"] = state_dict.get_optimizer_state_dict(
            self.models, self.optimizer, options=whole
        )
        path = self.folder / "checkpoint" / "state.pt"
        new = path.with_suffix(".new")
        if self.rank == 0:
            with self._writing("the checkpoint"):
                path.parent.mkdir(exist_ok=True)
                try:
                    with open(new, "wb") as file:
                        torch.save(saved, file)
                        os.fsync(file.fileno())  # or a power cut could leave a renamed empty file
                    os.replace(new, path)
                finally:
                    new.unlink(missing_ok=True)
        # Who ended before the file is whole would have torchrun kill the process that writes it.
        self.average(torch.zeros(())).item()

    def _restore(self) -> int:
        """Loads the checkpoint, if there is one; returns the number of steps done."""
        from torch.distributed.checkpoint import state_dict

        path = self.folder / "checkpoint" / "state.pt"
        if not path.exists():  # the run ended before its first checkpoint, and starts anew
            self._trim_logs(-1)
            return 0
        saved = read_checkpoint(f"--resume {self.folder}: {path}", path, mmap=self.world > 1)
        same = saved["run"] == self._identity()
        require(same, f"--resume {self.folder}: {path} is of another script or of other flags")
        whole = state_dict.StateDictOptions(full_state_dict=True)
        with explained(f"--resume {self.folder}: {path} does not fit the models"):
            frozen = self._frozen()
            for name, model in self.models.items():
                missing = model.state_dict().keys() - saved[name].keys() - frozen
                if missing:
                    raise ValueError(f"{name} lacks {sorted(missing)[0]}")
                state_dict.set_model_state_dict(model, saved[name], options=whole)
            whole.strict = False  # a weight that no pass uses has no moments
            state_dict.set_optimizer_state_dict(
                self.models, self.optimizer, saved["optimizer"], options=whole
            )
        self._trim_logs(saved["step"])
        return saved["step"]

    def _trim_logs(self, done: int) -> None:
        """Drops what was logged after step `done`: it will be logged again."""
        if self.rank:
            return
        for log in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if not log.exists():
                continue
            with (
                explained(f"--resume {self.folder}: {log} is damaged"),
                open(log, encoding="utf-8") as lines,
            ):
                # A line without an end was being written when the run was killed.
                lines = [line for line in lines if line.endswith("\n")]
                lines = [line for line in lines if json.loads(line)["step"] <= done]
            with self._writing("the log"):
                _replace(log, "".join(lines))

    # ── what the scripts call in each step ──

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.world == 1:
            return tensor
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor)
        return tensor / self.world

    def clock(self) -> float:
        """Seconds, read after the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_memory(self) -> float:
        """GiB at the most so far: of the GPU's tensors, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def log(self, step: int, metrics: dict, samples: list[dict] = ()) -> None:
        """Adds means over processes to metrics.jsonl and TensorBoard, samples to samples.jsonl."""
        if self.world > 1:
            from torch.distributed.tensor import DTensor

            for name, value in metrics.items():  # the norm of a sharded gradient
                metrics[name] = value.full_tensor() if isinstance(value, DTensor) else value
            # The samples stand in the order of the prompts, which are dealt out in turn.
            dist.all_gather_object(parts := [None] * self.world, samples)
            samples = [sample for turn in zip_longest(*parts) for sample in turn if sample]
        values = torch.tensor([float(value) for value in metrics.values()], dtype=torch.float64)
        values = self.average(values).tolist()
        if self.rank == 0:
            metrics = dict(zip(metrics, values))
            with self._writing("the log"):
                self._append("samples.jsonl", samples)
                self._append("metrics.jsonl", [{"step": step} | metrics])
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, step)
            if self.args.track != "none":
                self.tracker.log(metrics, step=step)
            self._show(step, metrics)

    def _append(self, name: str, lines: list[dict]) -> None:
        # Half of a surrogate pair, which JSON can spell, is not text that UTF-8 can.
        with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _show(self, step: int, metrics: dict) -> None:
        """The progress bar at each step, a line at each evaluation."""
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in HEADLINE if name in metrics)
        self.bar.set_postfix_str(shown)
        self.bar.update(step - self.bar.n)
        if any(name.startswith("eval/") for name in metrics):
            self.bar.write(f"step {step:4}  {shown}")

    # ── the end ──

    def stopping(self) -> bool:
        """Whether a signal asked for the end, the same answer in all processes."""
        return bool(self.average(torch.tensor(float(self.interrupted))))

    def stop(self, step: int) -> None:
        """Ends an interrupted run."""
        self._leave()
        place = self.script.parent.resolve()
        script = self.script.name if place == ROOT else f"-m {place.name}.{self.script.stem}"
        said = (
            f"stopped after step {step}; for the model: python -m analyze.export {self.folder}; to "
            f"continue: python {script} --resume {self.folder}"
        )
        raise SystemExit(1 if self.rank else said)

    def close(self, policy, tokenizer) -> None:
        """Writes final/, which loads with from_pretrained, and the report."""
        from plumbing import models, report

        weights = whole_weights(policy.module, self.rank)
        if self.rank == 0:
            self.bar.close()
            final, new = self.folder / "final", self.folder / "final.new"
            with self._writing("final/"):
                self.board.close()
                if not final.exists():  # else the run was killed after it was complete
                    shutil.rmtree(new, ignore_errors=True)
                    models.write_model(policy, weights, tokenizer, new)
                    new.rename(final)
                report.plot(self.folder)
            report.show_samples(self.folder)
            print(
                f"{self.folder}: metrics.jsonl, samples.jsonl, plots/training.png and final/ after "
                f"{time.perf_counter() - self.begun:.0f} s"
            )
        self._leave()

    def _leave(self) -> None:
        """Only where all processes end: after an error, to wait for others would be to hang."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.rank == 0:
            self.lock.release()
        if self.joined:
            dist.destroy_process_group()


def whole_weights(module, rank: int = 0, left_out=frozenset()) -> dict[str, Tensor]:
    """The weights and buffers by name, whole, on the CPU of rank 0; the other ranks get none.

    A tied weight is one tensor with several names.
    """
    from torch.distributed.tensor import DTensor

    weights, done = {}, {}
    for name, weight in module.state_dict(keep_vars=True).items():
        if name in left_out:
            continue
        if id(weight) not in done:
            whole = weight.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            done[id(weight)] = None if rank else whole.cpu()
        weights[name] = done[id(weight)]
    return {} if rank else weights


def read_checkpoint(what: str, path: Path, mmap: bool) -> dict:
    """The content of a checkpoint, whole and of this version's format, or one line of `what`."""
    import zipfile

    with explained(f"{what} is cut short or damaged"):
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if archive.testzip():
                raise ValueError("the checksum of a part is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    require(
        saved.get("format") == FORMAT,
        f"{what} is of format {saved.get('format')}, this version reads {FORMAT}; the sources that "
        "wrote it lie in the folder",
    )
    return saved


def _replace(path: Path, text: str) -> None:
    """Writes a file beside the old one, then in its place: a kill leaves one of them whole."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _say_thread(usual, failure) -> None:
    """TensorBoard writes in a thread; what fails there, `Run.log` meets and says in one line."""
    if not issubclass(failure.exc_type, OSError):
        usual(failure)


def _say_known(usual, kind, error, trace) -> None:
    """Says in a line that memory is full, or another process gone; a traceback would only show
    where that was met."""
    if issubclass(kind, torch.OutOfMemoryError):
        said = (
            "the GPU's memory is full: take a smaller --micro-batch (0 is all of "
            "--prompts-per-step at once), --checkpointing or --lora-rank 16"
        )
    elif issubclass(kind, dist.DistError) or "gloo" in str(error):  # gloo's errors have no type
        said = (
            f"rank {os.environ.get('RANK', 0)} lost another process; torchrun says below how it "
            "ended; go on from the last checkpoint with --resume and the run folder"
        )
    else:
        return usual(kind, error, trace)
    print(f"error: {said} ({' '.join(str(error).split())[:200]})", file=sys.stderr)
