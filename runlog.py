"""A run: its flags, errors, processes and shards, folder, log, checkpoint and clock."""

import contextlib
import copy
import fcntl
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import dynamic_module_utils

from shards import around, blocks_of, shares, spread, through

ROOT = Path(__file__).resolve().parent
SHARED = ("common.py", "prompts.py", "runlog.py", "shards.py")
POSITIVE = ("prompts_per_step", "samples_per_prompt", "max_prompt_tokens", "max_response_tokens",
            "temperature", "steps", "updates_per_sample", "lr", "max_grad_norm", "eval_every",
            "eval_prompts", "save_every")  # flags that must be; all other numbers may be 0
FORMAT = 1  # of checkpoints: raised when what they hold changes
LOCKS = {}  # open files by inode, each locked as long as it is open
HEADLINE = ("reward/mean", "kl/ref", "eval/reward", "eval/kl", "eval/win_rate")
PANELS = {"reward": ("reward/mean", "eval/reward"), "KL from the start model, nats": ("kl/ref",
          "eval/kl"), "win rate": ("eval/win_rate",), "tokens a response": ("length/mean",
          "eval/length"), "entropy, nats a token": ("entropy/token",), "loss": ("loss",)}
transformers.logging.set_verbosity_error()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # a checkpoint's own code: never run, nor asked about
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nothing leaves the machine

def require(condition: bool, message: str) -> None:
    """Ends the process with one line on stderr and exit code 2 unless `condition` holds."""
    if not condition:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # torchrun ends this process when rank 0 has said the same and left
        print("error: " + " ".join(message.split()), file=sys.stderr)
        raise SystemExit(2)

def load(flag: str, name: str, loader, **options):
    """`loader` on a path (from here or this file's folder) or hub name; a failure is one line."""
    paths = [path for path in (Path(name).expanduser(), ROOT / name) if path.exists()]
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix == ".jsonl"
    require(paths or not local, f"{flag} {name}: no such file or folder")
    try:
        return loader(str(paths[0]) if paths else name, **options)
    except Exception as error:  # the libraries do not document what a bad file makes them raise
        require(False, f"{flag} {name}: {str(error)[:400] or type(error).__name__}")

def say_lost(usual, kind, error, trace) -> None:
    """Says in a line that another process is gone; a traceback would show where this one waited."""
    if issubclass(kind, dist.DistError) or "gloo" in str(error):  # gloo's errors have no type
        print(f"error: rank {os.environ['RANK']} lost another process; torchrun says below how it "
              "ended; go on from the last checkpoint with --resume and the run folder "
              f"({str(error)[:200]})", file=sys.stderr)
    else:
        usual(kind, error, trace)

def _excepthook(failure, usual=threading.excepthook):
    """TensorBoard writes in a thread; what fails there, log() meets and says in one line."""
    if not issubclass(failure.exc_type, OSError):
        usual(failure)

threading.excepthook = _excepthook

def parse_args(args_class, argv: list[str] | None = None):
    """The flags. `--resume RUN_FOLDER` brings back those of its args.json; none may differ."""
    args, script = tyro.cli(args_class, args=argv), sys.modules[args_class.__module__].__file__

    def read(path: str):
        about = json.loads(Path(path).read_text())
        require(about["script"] == Path(script).name, f"--resume {args.resume}: a run of "
                f"{about['script']}")
        return args_class(**about["args"] | {"resume": args.resume})

    if not args.resume:
        return args
    saved = load("--resume", str(Path(args.resume, "args.json").absolute()), read)
    args = tyro.cli(args_class, args=argv, default=saved)
    changed = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
               if value != getattr(saved, name)]
    require(not changed, f"{' '.join(changed)}: {args.resume} has another value; leave it out")
    return args

class Run:
    """One run: its flags, process, device, folder, log and checkpoint."""

    def __init__(self, args, script: str):
        for name, value in vars(args).items():
            good = not isinstance(value, int | float) or 0 <= value < math.inf
            require(good and (value or name not in POSITIVE), f"--{name.replace('_', '-')} "
                    f"{value}: must be {'more than' if name in POSITIVE else 'at least'} 0")
        self.args, self.script, self.begun = args, Path(script), time.perf_counter()
        self.rank, self.world, local = (int(os.environ.get(name, default)) for name, default in
                                        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        require(args.prompts_per_step % self.world == 0, f"--prompts-per-step "
                f"{args.prompts_per_step}: cannot be split over {self.world} processes")
        self.joined = self.world > 1 and not dist.is_initialized()
        if self.joined:  # ranks wait for the longest sampling, and for rank 0 to write a checkpoint
            dist.init_process_group(timeout=timedelta(hours=1))
            sys.excepthook = partial(say_lost, sys.excepthook)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # one voice; errors, on stderr, are heard from all
        self.device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.mesh = init_device_mesh(self.device.type, (self.world,)) if self.world > 1 else None
        require(args.track == "none" or importlib.util.find_spec(args.track),
                f"--track {args.track}: not installed; pip install {args.track}")
        name = f"{self.script.stem}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or args.run_dir or Path("runs", name))
        # Rank 0 alone asks: to a slower one its folder would seem to be another run's.
        require(self.rank or args.resume or not self.folder.exists(), "--run-dir "
                f"{self.folder}: exists; continue it with --resume {self.folder}, or name another")

    def shard(self, model):
        """The model, spread over the processes if there are several."""
        if self.world == 1:
            return model
        require(blocks_of(model), f"a {type(model).__name__} has no list of blocks: run it on one "
                "process")
        return spread(model, self.mesh)

    def frozen_copy(self, model):
        """A copy of a model that is not trained, spread like it."""
        if self.world == 1:
            return copy.deepcopy(model).requires_grad_(False)
        own = model.whole(lambda plain: around(plain, [p.data for p in plain.parameters()]))
        return self.shard(own.requires_grad_(False))

    def open(self, state: dict) -> int:
        """Makes the run folder; with --resume, restores `state` (models and optimizer by name) from
        its checkpoint. Returns the number of steps done."""
        self.state, self.interrupted, self.warned, args = state, False, False, self.args
        done = self._restore() if args.resume else 0
        if self.rank == 0:
            if not args.resume:
                self._make_folder()
            with self._writing("the log"):
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=done + 1)
            self.tracker = args.track != "none" and importlib.import_module(args.track)
            if self.tracker:
                self.tracker.init(project="alignment", name=self.folder.name, config=asdict(args))
        silent = self.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=args.steps, initial=done, disable=silent)

        def interrupt(number, _):  # the first ends the run after this step, a second one at once
            self.interrupted = True
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        return done

    def _make_folder(self) -> None:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True)
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        versions = {x.__name__: x.__version__ for x in (torch, transformers, datasets)}
        about = {"script": self.script.name, "command": sys.argv, "args": asdict(self.args),
                 "commit": git.stdout.decode().strip(), "device": gpu, "versions": versions}
        new = self.folder.with_name(f"{self.folder.name}.{os.getpid()}")
        try:
            new.mkdir(parents=True)
            (new / "args.json").write_text(json.dumps(about, indent=2))
            for source in (self.script, *map(ROOT.joinpath, SHARED)):
                shutil.copy(source, new)
            self._lock(new)
            new.rename(self.folder)  # it is there as a whole, or not at all
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            require(False, f"--run-dir {self.folder}: {error.strerror}; name another")

    def _lock(self, folder: Path) -> None:
        """Lets no other process run this folder, until this one ends."""
        file = open(folder / "args.json", "a")
        self.locked = os.fstat(file.fileno())[1:3]
        LOCKS.pop(self.locked, None)  # of a run that failed in this same process
        LOCKS[self.locked] = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, f"--resume {self.folder}: another process runs it; wait, or stop it")
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {self.folder} cannot be locked ({error.strerror}): do not run it "
                  "twice", file=sys.stderr)

    def _identity(self) -> dict:
        return {"script": self.script.name} | asdict(self.args) | {"resume": "", "run_dir": ""}

    def _restore(self) -> int:
        path, done = self.folder / "checkpoint" / "state.pt", -1
        links = [str(link) for link in self.folder.rglob("*") if link.is_symlink()]
        require(not links, f"--resume {self.folder}: {' '.join(links)}: a link, through which the "
                "run would write elsewhere; put the file itself in its place")
        with self._writing("args.json"):
            if self.rank == 0:
                self._lock(self.folder)
        if path.exists():  # else the run ended before its first checkpoint, and starts anew
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                    require(not archive.testzip(), f"--resume {self.folder}: {path} is damaged: "
                            "the checksum of a part is wrong")
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=self.world > 1)
                require(saved.get("format") == FORMAT, f"--resume {self.folder}: {path} is of "
                        f"format {saved.get('format')}, this version reads {FORMAT}; the sources "
                        "that wrote it lie in the folder")
                require(saved["run"] == self._identity(), f"--resume {self.folder}: its checkpoint "
                        "is of another script or of other flags")
                for name, part in self.state.items():
                    part.load_state_dict(shares(saved[name], part))
                done = saved["step"]
            except Exception as error:  # a damaged file fails in as many ways as it has bytes
                require(False, f"--resume {self.folder}: {path} is cut short or damaged "
                        f"({type(error).__name__})")
        for log in self._logs() if self.rank == 0 else ():
            self._cut(log, done)
        return max(done, 0)

    def _logs(self) -> list[Path]:
        paths = (self.folder / "metrics.jsonl", self.folder / "samples.jsonl")
        return [path for path in paths if path.exists()]

    def _cut(self, log: Path, done: int) -> None:
        """Drops what was logged after step `done`, in place: a kill meanwhile loses no line."""
        with self._writing("the log"), open(log, "r+b") as file:
            kept = 0
            for line in file:
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > done:
                        break
                except (ValueError, TypeError, KeyError):
                    require(False, f"--resume {self.folder}: {log} is damaged at byte {kept}")
                kept += len(line)
            file.truncate(kept)

    @contextlib.contextmanager
    def _writing(self, what: str, half: Path | None = None):
        """A full disk or a missing right ends the run with one line; all that was saved is kept, a
        file that was written by half is not."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            with contextlib.suppress(OSError, AttributeError):
                half.unlink()
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            require(False, f"--run-dir {self.folder}: cannot write {what}: "
                    f"{getattr(cause, 'strerror', None) or cause}; mend that, then continue with "
                    f"--resume {self.folder}")

    def _whole(self, state):
        """A state dict with whole tensors, on the CPU of rank 0, in place of shards."""
        if isinstance(state, dict):
            return {name: self._whole(part) for name, part in state.items()}
        if isinstance(state, DTensor):
            whole = state.full_tensor()  # all processes take part, and hold one tensor at a time
            return None if self.rank else whole.cpu()
        return state

    def save(self, step: int) -> None:
        """Writes the checkpoint beside the old one, then in its place: a kill leaves one whole."""
        path = self.folder / "checkpoint" / "state.pt"
        new = path.with_suffix(".new")
        parts = {name: self._whole(part.state_dict()) for name, part in self.state.items()}
        if self.rank == 0:
            with self._writing("the checkpoint", new):
                path.parent.mkdir(exist_ok=True)
                with open(new, "wb") as file:
                    about = {"format": FORMAT, "step": step, "run": self._identity()}
                    torch.save(about | parts, file)
                sync(new, *self._logs())  # no checkpoint without the log of its steps
                os.replace(new, path)
                sync(path.parent)
        # Who ended before the file is whole would have torchrun kill the process that writes it.
        self.average(torch.zeros((), device=self.device)).item()

    def stopping(self) -> bool:
        """Whether a signal asked for the end, the same answer in all processes."""
        return bool(self.average(torch.tensor(float(self.interrupted), device=self.device)))

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor := tensor.clone())
        return tensor / self.world

    def log(self, step: int, metrics: dict, samples: list[dict] = ()) -> None:
        """Adds means over processes to metrics.jsonl and TensorBoard, samples to samples.jsonl."""
        values = [x.full_tensor() if isinstance(x, DTensor) else x for x in metrics.values()]
        values = torch.tensor([*map(float, values)], dtype=torch.float64)
        values = self.average(values.to(self.device)).tolist()
        if self.world > 1:
            dist.all_gather_object(parts := [None] * self.world, samples)
            samples = [x for row in zip_longest(*parts) for x in row if x]  # as the prompts are
        if self.rank:
            return
        metrics = dict(zip(metrics, values))
        with self._writing("the log"):
            for name, lines in (("samples", samples), ("metrics", [{"step": step} | metrics])):
                with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(metrics, step=step)
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in HEADLINE if name in metrics)
        self.bar.set_postfix_str(shown)
        self.bar.update(step - self.bar.n)
        share, n = metrics.get("weights/ess", 1.0), self.args.samples_per_prompt
        if share * n < min(1.25, n) and not self.warned:
            self.warned = True
            tqdm.write(f"warning: weights/ess is {share:.3f} at step {step}: of {n} samples one "
                       "takes nearly all the weight; the target's KL weight may be too small")
        if "eval/reward" in metrics:
            tqdm.write(f"step {step:4}  {shown}")

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

    def stop(self, step: int) -> None:
        """Ends an interrupted run."""
        self._leave()
        raise SystemExit(1 if self.rank else f"stopped after step {step}; continue with: python "
                         f"{self.script.name} --resume {self.folder}")

    def close(self, policy, tokenizer) -> None:
        """Writes final/ and the plot; shows samples of the first and the last evaluation."""
        through("whole")(self._write_final)(policy, tokenizer)
        self._leave()

    def _leave(self) -> None:
        """Only where all processes end: after an error, to wait for others would be to hang."""
        if self.joined:
            dist.destroy_process_group()

    def _write_final(self, policy, tokenizer) -> None:
        if self.rank == 0:
            self.bar.close()
            new, final = self.folder / "final.new", self.folder / "final"
            with self._writing("final/"):
                self.board.close()
                if not final.exists():  # else the run was killed after it was complete
                    shutil.rmtree(new, ignore_errors=True)
                    policy.save_pretrained(new)
                    tokenizer.save_pretrained(new)
                    sync(*new.iterdir())
                    new.rename(final)
                plot(self.folder)
            LOCKS.pop(self.locked)
            for number, usual in ((signal.SIGINT, signal.default_int_handler),
                                  (signal.SIGTERM, signal.SIG_DFL)):
                signal.signal(number, usual)
            show_samples(self.folder)
            print(f"{self.folder}: metrics.jsonl, samples.jsonl, plots/training.png and final/ "
                  f"after {time.perf_counter() - self.begun:.0f} s")

def sync(*paths: Path) -> None:
    """Returns when files and folders are on the disk, so that a power cut does not lose them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, proposal_logprobs: Tensor) -> dict:
    """kl/ref (k1) and kl/k3, nats a response: the policy's KL from the reference on samples of the
    proposal, [P, N] each, which self-normalised importance weights turn into the policy's own."""
    weights = torch.softmax((logprobs - proposal_logprobs).double(), dim=1)
    ratio = (ref_logprobs - logprobs).double()
    return {"kl/ref": (weights * -ratio).sum(1).mean(),
            "kl/k3": (weights * (ratio.exp() - 1 - ratio)).sum(1).mean()}

def show_samples(folder: Path, count: int = 3) -> None:
    """Prints what the policy answered to the first held-out prompts, before and after."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    before, after = ([x for x in lines if x["step"] == lines[end]["step"]] for end in (0, -1))
    for first, last in list(zip(before, after))[:count]:
        for label, line, key in (("prompt", first, "prompt"), ("before", first, "response"),
                                 ("after", last, "response")):
            label += "" if key == "prompt" else f" {line['reward']:+.2f}"
            print(textwrap.fill(f"{label:14}{line[key]}", 100, subsequent_indent=" " * 14))
        print()

def plot(folder: Path) -> None:
    """Draws plots/training.png from metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS.items()):
        for key in keys:
            steps = [line["step"] for line in lines if key in line]
            values = [line[key] for line in lines if key in line]
            axis.plot(steps, values, "o-" if key.startswith("eval") else "-", label=key, ms=4)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / "training.png", dpi=100)
    pyplot.close(figure)
