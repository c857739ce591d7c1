"""Kills, full disks, damaged files and bad numbers: what each script makes of them.

    python -m benchmarks.faults [--scripts brain gdc dpo wind bond ppo] [--kills 32]
                                [--faults kills disk files processes clock numbers data]

Every fault hits the real main() of a script, on small flags, in a forked process. A run that was
hit is continued with --resume and must end as the unbroken run did: the same metrics.jsonl without
gap or repetition, the same samples.jsonl, the same bits in final/ and checkpoint/. Adds one line
per fault to benchmarks/results/faults.jsonl; `survived` is false where anything differs, `problems`
says what. Exit code 1 if anything was lost.

`world.py` runs, resumes and compares; each other module here is one kind of fault, a generator of
outcomes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forked import SCRIPTS, Process, command_line, forget_caches  # first

import tyro  # isort: skip

from benchmarks import hostile  # isort: skip
from benchmarks.faults.disk import disk, small_disk  # isort: skip
from benchmarks.faults.files import files  # isort: skip
from benchmarks.faults.kills import kills  # isort: skip
from benchmarks.faults.numbers import numbers  # isort: skip
from benchmarks.faults.processes import clock, processes  # isort: skip
from benchmarks.faults.world import Outcome, World  # isort: skip
from benchmarks.where import ROOT, about  # isort: skip


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """which scripts"""
    kills: int = 32
    """kills per script"""
    faults: tuple[str, ...] = ("kills", "disk", "files", "processes", "clock", "numbers", "data")
    """which faults"""
    flips: int = 20
    """checkpoints with one flipped bit, per script"""
    inputs: int = 5000
    """hostile data files"""
    seed: int = 1
    """of the instants and of the bits"""
    results: Path = ROOT / "benchmarks" / "results" / "faults.jsonl"
    """file the lines are added to"""


def data(world: World, inputs: int) -> Iterator[Outcome]:
    """Hostile data files, all in one forked process: reading them is the same in all scripts."""
    found = world.folder / "hostile.json"
    reading = Process(world.script, {}, lambda: (hostile.main(found, inputs), os._exit(0)))
    code, error = reading.end()
    counts = json.loads(found.read_text()) if found.exists() else {}
    problems = counts.pop("problems", [f"ended with {code}: {error[-600:]}"])
    yield Outcome("hostile data files", problems, counts)


def campaign(args: Args, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """All outcomes, as they come."""
    if "disk" in args.faults:
        small = small_disk(folder / "small")
    for script in args.scripts:
        world = World(script, folder / script, args.seed)
        groups = {
            "kills": lambda w: kills(w, args.kills),
            "disk": lambda w: disk(w, small),
            "files": lambda w: files(w, args.flips),
            "processes": processes,
            "clock": clock,
            "numbers": numbers,
            "data": lambda w: data(w, args.inputs) if w.script == args.scripts[0] else (),
        }
        for name in args.faults:
            for outcome in groups[name](world):
                yield script, outcome


def main(args: Args) -> None:
    """Runs the campaign and says what was lost."""
    if "disk" in args.faults and not os.environ.get("OWN_MOUNTS"):  # mounts of our own
        command = [
            "unshare",
            "--mount",
            *["--map-root-user"] * bool(os.getuid()),
            sys.executable,
            "-m",
            "benchmarks.faults",
            *sys.argv[1:],
        ]
        raise SystemExit(subprocess.run(command, env=os.environ | {"OWN_MOUNTS": "1"}).returncode)
    where, total, lost = {"command": command_line("benchmarks.faults")} | about(), 0, 0
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o777)
        for script, outcome in campaign(args, folder):
            line = {
                "script": script,
                "fault": outcome.fault,
                "survived": not outcome.problems,
                "problems": outcome.problems,
                "seen": {
                    key: value.replace(name, "…") if isinstance(value, str) else value
                    for key, value in outcome.seen.items()
                },
            }
            with open(args.results, "a") as file:
                file.write(json.dumps(line | where, ensure_ascii=False) + "\n")
            total, lost = total + 1, lost + bool(outcome.problems)
            mark = "ok  " if not outcome.problems else "LOST"
            print(mark, script, outcome.fault, outcome.seen, *outcome.problems, flush=True)
    forget_caches()
    print(f"survived {total - lost} of {total}")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
