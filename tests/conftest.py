"""One thread (or TEST_THREADS), no hub, caches in a folder of the test run: set before any library is imported."""

import os
import sys
import tempfile
from pathlib import Path

_caches = tempfile.TemporaryDirectory(prefix="caches-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.setdefault("TEST_THREADS", "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_CACHE": _caches.name,
    "HF_HUB_CACHE": _caches.name,
}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["TEST_THREADS"]))
