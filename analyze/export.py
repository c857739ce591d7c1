"""Make a model of a run's checkpoint, at any time: while it goes on, or after it was stopped.

    python -m analyze.export RUN_FOLDER

Writes RUN_FOLDER/step-K, which loads with from_pretrained, of the checkpoint of step K. Adapters
are merged, and lie beside the weights in adapter/, as in final/.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

import common
from plumbing.models import load_tokenizer, write_model
from plumbing.run import explained, read_checkpoint, require, whole_weights
from prepare.parts import with_score


@dataclass
class Args:
    """Make a model of a run's checkpoint."""

    run: tyro.conf.Positional[str]  # a run folder


def main(args: Args) -> Path:
    """Writes the model; returns its folder."""
    run = Path(args.run)
    about, path = run / "args.json", run / "checkpoint" / "state.pt"
    require(about.exists(), f"{run}: it has no args.json, so it is no run folder")
    require(path.exists(), f"{run}: it has no checkpoint yet")
    about = json.loads(about.read_text())
    not_in_prepare = {"temperature": 1.0, "chat_template_kwargs": "{}"}  # where they are no flags
    flags = SimpleNamespace(**not_in_prepare | about["args"] | {"cuda_graph": False})
    saved = read_checkpoint(str(path), path, mmap=True)
    folder = run / f"step-{saved['step']}"
    require(not folder.exists(), f"{folder} exists already")

    tokenizer = load_tokenizer("--policy", flags.policy)
    policy = common.load_policy(SimpleNamespace(args=flags, device=torch.device("cpu")), tokenizer)
    if about["script"] == "reward.py":
        policy = with_score(policy)
    with explained(f"{path} does not fit {flags.policy}"):
        policy.load_state_dict(policy.state_dict() | saved["policy"])
    with explained(f"{folder}: cannot write"):
        new = folder.with_suffix(".new")
        write_model(policy, whole_weights(policy.module), tokenizer, new)
        new.rename(folder)
    print(f"{folder}: loads with from_pretrained")
    return folder


if __name__ == "__main__":
    main(tyro.cli(Args))
