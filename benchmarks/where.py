"""Where a benchmark ran, and the file that its numbers go to."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def about() -> dict[str, str | int]:
    """Machine, versions and commit: what stands beside every number."""
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git.stdout.strip(),
    }


def add(name: str, line: dict, results: Path = RESULTS) -> None:
    """Prints a line, and where it came from, and adds it to `<name>.jsonl` in `results`."""
    text = json.dumps(line | about())
    print(text, flush=True)
    with open(results / f"{name}.jsonl", "a") as file:
        file.write(text + "\n")
