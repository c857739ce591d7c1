"""Runs a script, unchanged, on a CUDA device that is pretended on the CPU, and counts what it does.

    python tests/pretend_gpu.py brain.py --steps 2 --run-dir /tmp/run
    python tests/pretend_gpu.py --counts FILE -m benchmarks.gpu --tiny

Needs g++ and a CPU build of torch. `pretend_gpu.cpp`, which says how it is done, is compiled once, in
about half a minute, into a folder of caches. Without --counts a table goes to stderr at the end.

It finds: tensors of two devices in one operator, by torch's own rules; generators of the wrong
device; `.numpy()` of a CUDA tensor; masks of a wrong type in attention; what breaks in the branches
that only a GPU takes. It counts by phase: kernels and the bytes they touch, casts and copies of
weights, what the host waits for and in which line, shapes that attention has not met before, and
the peak of the tensors' memory.

It cannot find: errors inside CUDA's kernels; numbers that differ on a GPU; races; a full memory;
speed. bfloat16 in particular: a CPU's product gives a row the same numbers in any batch, a GPU's
does not, so that a gap of 0 between two ways of feeding a model is no evidence. Random numbers are
the CPU generator's: with --dtype float32 a run is bit-equal to one on the CPU that makes the choices
of a GPU (tests/test_gpu.py lists them). A device error where `common` catches all errors, in the
check at load, shows as "no shared rows" and not as a traceback. Which attention kernel is taken
follows torch's source as read, for an H100. A few operators launch more kernels than the one that
is counted.

A phase is the names of functions that were entered, outermost first. In `sample` a pass of the
model is "prompt" if its cache is new, or else "token", and goes on until the next pass; "block" is
one of the model's layers. A CUDA graph is `replay.Graph`: what it computes is counted as "replay",
in the phase in which it was launched.
"""

import collections
import ctypes
import hashlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from functools import wraps
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
WAITS = {1: "to host", 2: "to device", 3: "for a value", 4: "synchronize"}
PLAN = "cuDNN plan"  # built by the host: no kernel
FUNCTIONS = (
    "load_policy load_reward_model score_references frozen_copy evaluate sample score logprobs"
).split()  # of `common` that have a phase
METHODS = "open save log close".split()  # of `Run` that have one


# ── The shim ──────────────────────────────────────────────────────────────────────────────────────


def problem() -> str:
    """Why this machine cannot pretend, or nothing."""
    return "" if shutil.which("g++") else "no g++"


def build() -> Path:
    """The compiled shim; it is made if there is none of this source and this torch."""
    from filelock import FileLock

    # Found without importing torch, which must be loaded after the shim.
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    parts = [SOURCE.read_text(), (torch / "version.py").read_text()]
    key = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches, "pretend_gpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        folder = Path(tempfile.gettempdir(), "pretend_gpu")
        folder.mkdir(exist_ok=True)
    shim = folder / f"{key}.so"
    with FileLock(folder / f"{key}.lock"):
        if not shim.exists():
            command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", SOURCE]
            command += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
            command += [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
            new = shim.with_suffix(".new")
            subprocess.run([*command, "-o", new], check=True)
            os.replace(new, shim)
    return shim


class Device:
    """The pretended device: it must be made before torch is imported."""

    def __init__(self):
        assert "torch" not in sys.modules, "torch asks for CUDA's hooks once, as it is loaded"
        self.shim = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
        self.shim.pretend_counts.restype = ctypes.c_char_p
        self.shim.pretend_memory.restype = self.shim.pretend_peak.restype = ctypes.c_int64
        self.shim.pretend_weight.argtypes = [ctypes.c_void_p]
        self.stack, self.phases = ["start"], ["start"]
        self.entered, self.waits = collections.Counter(), collections.Counter()
        self.home = ""  # the folder of the script, whose lines are named
        self.noted = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)(self._note_wait)
        import torchgen
        import yaml

        listing = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
        entries = yaml.load(listing.read_text(), yaml.CSafeLoader)
        self.shim.pretend_start(self.noted, _unchecked(entries), _beside_composite(entries))
        self._pretend_python()

    def _note_wait(self, kind: int, op: bytes) -> None:
        self.waits[self.phase, self._line(), WAITS[kind], op.decode()] += 1

    def _line(self) -> str:
        """file:line of the innermost frame in the script's folder, else of the innermost one."""
        frame, first = sys._getframe(), ""
        while frame:
            path = Path(frame.f_code.co_filename)
            line = f"{path.name}:{frame.f_lineno}"
            if path.parent == Path(self.home):
                return line
            if path != Path(__file__):
                first = first or line
            frame = frame.f_back
        return first or "autograd"

    # ── phases ──

    @property
    def phase(self) -> str:
        """The phase that the process is in."""
        return " > ".join(self.stack[1:]) or "start"

    def _tell(self) -> None:
        if self.phase not in self.phases:
            self.phases.append(self.phase)
        self.shim.pretend_phase(self.phases.index(self.phase))

    def enter(self, name: str) -> None:
        """Begins a phase within the one that is open."""
        self.stack.append(name)
        self.entered[self.phase] += 1
        self._tell()

    def leave(self, depth: int) -> None:
        """Ends all phases but the outermost `depth`."""
        del self.stack[depth:]
        self._tell()

    def named(self, name: str, function):
        """The function as a phase of this name."""

        @wraps(function)
        def run(*args, **options):
            depth = len(self.stack)
            self.enter(name)
            try:
                return function(*args, **options)
            finally:
                self.leave(depth)

        return run

    def watch(self) -> None:
        """Gives phases to what the training scripts call."""
        import torch
        from transformers.modeling_layers import GradientCheckpointingLayer
        from transformers.modeling_utils import PreTrainedModel

        import common

        for name in FUNCTIONS:
            setattr(common, name, self.named(name, getattr(common, name)))
        for name in METHODS:
            setattr(common.Run, name, self.named(name, getattr(common.Run, name)))
        plain = common.token_logprobs_and_entropy
        forward = self.named("forward", plain)
        common.token_logprobs_and_entropy = lambda *x: (
            forward if torch.is_grad_enabled() else plain
        )(*x)
        torch.Tensor.backward = self.named("backward", torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_ = self.named("clip", torch.nn.utils.clip_grad_norm_)
        torch.optim.AdamW.step = self.named("AdamW", torch.optim.AdamW.step)
        PreTrainedModel.__call__ = self._passes(PreTrainedModel.__call__)
        layer = GradientCheckpointingLayer.__call__
        GradientCheckpointingLayer.__call__ = self.named("block", layer)

    def _passes(self, call):
        """A model's call; in `sample` each call of the whole model begins a pass."""
        inside, seen = [], []

        @wraps(call)
        def run(model, *args, **options):
            if inside:  # the body of a model with a head
                return call(model, *args, **options)
            for weight in model.parameters():
                self.shim.pretend_weight(weight.untyped_storage().data_ptr())
            if self.stack[-1] in ("sample", "prompt", "token"):
                cache = options.get("past_key_values")
                kind = "token" if any(cache is other for other in seen) else "prompt"
                seen[:] = [cache]  # kept alive, so that no other takes its place
                self.leave(len(self.stack) - (self.stack[-1] != "sample"))
                self.enter(kind)
            inside.append(model)
            try:
                return call(model, *args, **options)
            finally:
                inside.pop()

        return run

    # ── what torch's Python side asks ──

    def _pretend_python(self) -> None:
        """A CPU build's torch.cuda answers as a CUDA build's would."""
        import torch

        cuda, gpu = torch.cuda, torch.device("cuda:0")
        generator = torch.Generator(gpu)
        plain_clone = torch.storage._StorageBase.clone

        def clone(storage):  # a storage's own constructor knows no CUDA in a CPU build
            if not storage.is_cuda:
                return plain_clone(storage)
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=gpu)
            return copy.untyped_storage().copy_(storage)

        def synchronize(device=None):
            self._note_wait(4, b"synchronize")

        torch.UntypedStorage.clone = clone
        answers = {
            "_initialized": True,
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "_exchange_device": lambda device: 0,
            "_maybe_exchange_device": lambda device: 0,
            "synchronize": synchronize,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *args, **options: True,
            "memory_allocated": lambda device=None: self.shim.pretend_memory(),
            "max_memory_allocated": lambda device=None: self.shim.pretend_peak(),
            "reset_peak_memory_stats": lambda device=None: self.shim.pretend_forget_peak(),
            "empty_cache": lambda: None,
            "manual_seed": generator.manual_seed,
            "manual_seed_all": generator.manual_seed,
            "get_rng_state": lambda device=None: generator.get_state(),
            "set_rng_state": lambda state, device=None: generator.set_state(state),
        }
        for name, answer in answers.items():
            setattr(cuda, name, answer)
        sys.path.append(str(SOURCE.parent))
        import replay

        replay.Graph.replay = self.named("replay", replay.Graph.replay)
        cuda.CUDAGraph, cuda.graph = replay.Graph, replay.capture

    # ── the report ──

    def counts(self) -> dict:
        """What was counted: by phase how often it was entered, its kernels, the bytes that they
        touched, and [calls, bytes] of each operator; the waits; the peak of memory in bytes."""
        phases = {}
        for line in self.shim.pretend_counts().decode().splitlines():
            number, op, calls, size = line.split("\t")
            name = self.phases[int(number)]
            entry = phases.setdefault(
                name, {"entered": self.entered[name], "kernels": 0, "bytes": 0, "ops": {}}
            )
            entry["kernels"] += int(calls) * (op != PLAN)
            entry["bytes"] += int(size)
            entry["ops"][op] = [int(calls), int(size)]
        waits = sorted([*key, count] for key, count in self.waits.items())
        return {"phases": phases, "waits": waits, "peak": self.shim.pretend_peak()}


def _unchecked(entries: list[dict]) -> bytes:
    """Operators for which a CUDA build does not make sure that all tensors are on one device."""
    names = [_name(e) for e in entries if e.get("device_check") == "NoCheck"]
    return "\n".join(names).encode()


def _beside_composite(entries: list[dict]) -> bytes:
    """Operators with a CUDA kernel, their own or a structured delegate's, and a composite one."""

    def dispatches(entry: dict, key: str) -> bool:
        keys = ",".join(entry.get("dispatch") or ()).split(",")
        return key in (one.strip() for one in keys)

    kernels = {_name(e) for e in entries if dispatches(e, "CUDA")}
    composite = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
    names = [
        _name(e)
        for e in entries
        if {_name(e), e.get("structured_delegate")} & kernels
        and any(dispatches(e, key) for key in composite)
    ]
    return "\n".join(names).encode()


def _name(entry: dict) -> str:
    return entry["func"].split("(")[0]


def run(words: list[str], counts: Path, root: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """(how it ended, what was counted) of `python WORDS` on the pretended device, in a process of
    its own, by the sources in `root`. The counts lie in the file of that name, too."""
    tool = root / "tests" / Path(__file__).name
    command = [sys.executable, tool, "--counts", counts, *words]
    done = subprocess.run(
        list(map(str, command)), cwd=root, capture_output=True, text=True, timeout=600
    )
    return done, json.loads(counts.read_text()) if counts.exists() else {}


def show(counts: dict) -> None:
    """Prints a table of the phases, and the waits by line, to stderr."""
    head = f"{'phase':36}{'entered':>8}{'kernels':>9}{'each':>8}{'MB':>9}{'plans':>7}{'waits':>7}"
    print("", head, sep="\n", file=sys.stderr)
    waits = collections.Counter()
    for phase, *_, count in counts["waits"]:
        waits[phase] += count
    for phase, entry in counts["phases"].items():
        each = entry["kernels"] / max(1, entry["entered"])
        plans = entry["ops"].get(PLAN, [0])[0]
        print(
            f"{phase:36}{entry['entered']:8}{entry['kernels']:9}{each:8.1f}"
            f"{entry['bytes'] / 2**20:9.0f}{plans:7}{waits[phase]:7}",
            file=sys.stderr,
        )
    for phase, line, kind, op, count in counts["waits"]:
        print(f"{phase:36}{line:24}{kind:14}{op:28}{count:6}", file=sys.stderr)


def main() -> None:
    """Runs the script that the command line names."""
    words, path = sys.argv[1:], ""
    if words[:1] == ["--counts"]:
        path, words = words[1], words[2:]
    if not words:
        raise SystemExit(__doc__)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    home = Path.cwd() if is_module else Path(words[0]).resolve().parent
    sys.path[0] = str(home)
    device, code = Device(), 0
    device.home = str(home)
    device.watch()
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if end.__context__ is not None and code:
            print("pretend_gpu: the script ended over this error:", file=sys.stderr)
            traceback.print_exception(end.__context__)
    except BaseException:
        traceback.print_exc()
        code = 1
    if path:
        Path(path).write_text(json.dumps(device.counts(), indent=1))
    else:
        show(device.counts())
    sys.stdout.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
