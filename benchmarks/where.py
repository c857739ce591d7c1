"""Where a benchmark ran: what stands beside every number."""

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def about() -> dict[str, str | int]:
    """Machine, versions and commit."""
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": git.stdout.strip()}
