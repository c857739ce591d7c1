"""Writes the parts of README.md that are counted or measured, between their markers.

    python -m analyze.readme

A part stands between the comments `<!-- NAME -->` and `<!-- /NAME -->`: the table of the methods,
of the differences, of the default runs, and of the comparison with others. Run it after a change of
a script or of a raw file in benchmarks/results/.
"""

import contextlib
import io
import re

from analyze import differences
from analyze.tables import ROOT, read, table

# The idea in at most ten words, the target, the papers, the state of the implementation.
METHODS = {
    "brain": (
        "BRAIn",
        "match the posterior's weights of samples, with a self-normalised baseline",
        "the posterior p·exp(r/τ)/Z",
        ["2402.02479"],
        "exact; the paper could be read in part only",
    ),
    "gdc": (
        "DPG, GDC, GDC++",
        "policy gradient with importance weights towards an energy-based target",
        "the same posterior",
        ["2012.11635", "2206.00761"],
        "exact",
    ),
    "dpo": (
        "DPO, SLiC",
        "classify the preferred response by its log-ratio to the reference",
        "the same posterior, if labels are Bradley-Terry",
        ["2305.18290", "2305.10425"],
        "exact; loss and gradient equal TRL's",
    ),
    "wind": (
        "WIND",
        "regress log-ratios on win rates against the last policy",
        "equilibrium of a game for the higher reward, with a KL term",
        ["2410.20727"],
        "exact; equations derived from the abstract, the paper's body could not be read",
    ),
    "bond": (
        "BOND, J-BOND",
        "distil the best of N samples into the policy",
        "the distribution of the best of N samples",
        ["2407.14622"],
        "exact; one sign differs from the preprint",
    ),
    "ppo": (
        "PPO-RLHF, RLOO",
        "clipped policy gradients on the reward minus a KL penalty",
        "the same posterior as `brain.py`",
        ["1707.06347", "2402.14740"],
        "exact; RLOO's loss and gradient equal TRL's",
    ),
}
PEERS = [  # row, raw file, what chooses its lines, the other's name in the file
    ("`dpo.py` and TRL's DPOTrainer, 4 pairs", "dpo_step", {}),
    ("`brain.py` and TRL's GRPOTrainer, N = 8", "online_step", {"peer": "grpo"}),
    ("`ppo.py --advantage rloo` and TRL's RLOOTrainer, N = 8", "online_step", {"peer": "rloo"}),
    ("`brain.py` and TRL's OnlineDPOTrainer, N = 2", "online_step", {"peer": "online_dpo"}),
    ("`gdc.py` and naver/disco's tuner, N = 8", "gdc_step", {}),
]
TRL = "1.16.0"  # the version that was read and measured; a test compares names with the package
DPO_LOSSES, DPO_TRAINER_LINES = 15, 1730
FEATURES = [  # what, here, in TRL
    (
        "methods",
        "BRAIn, GDC, DPO, SLiC, WIND, BOND, PPO, RLOO",
        "`SFTTrainer`, `RewardTrainer`, `DPOTrainer` with {losses} values of `loss_type`, "
        "`KTOTrainer`, `GRPOTrainer`, `RLOOTrainer`, `DistillationTrainer`; more in "
        "`trl.experimental`. None of BRAIn, GDC, WIND, BOND, and no PPO with a value",
    ),
    (
        "what one opens to read DPO",
        "`dpo.py` ({dpo} lines) and `common.py` ({common})",
        "`dpo_trainer.py` ({trainer}), and the Trainer of transformers below it",
    ),
    ("start model, reward model", "`prepare/sft.py`, `prepare/reward.py`", "trainers for both"),
    ("a prompt is read", "once", "once per response"),
    (
        "sampling",
        "by torch, on shared rows",
        "by transformers, or by vLLM (`use_vllm`)",
    ),
    ("adapters", "`--lora-rank`", "`peft_config`, also on quantised weights"),
    (
        "several GPUs",
        "FSDP2 by `torchrun`; tests have two processes on a CPU",
        "by accelerate: FSDP (`fsdp2.yaml`), DeepSpeed ZeRO (`zero3.yaml`)",
    ),
    (
        "images, and tools in a dialogue",
        "no",
        "yes (`DataCollatorForVisionPreference`, `tools`)",
    ),
    (
        "resume",
        "bit for bit on a CPU, after a kill at any moment",
        "by the Trainer of transformers; not compared",
    ),
    (
        "equal loss and gradient, to 1e-5",
        "DPO's sigmoid and hinge loss and RLOO: `tests/test_oracle_trl.py`",
        "",
    ),
]
SHAPES = [(256, 48), (512, 53), (64, 256), (128, 128), (64, 512)]


def claims(name: str) -> str:
    """How many claims of the papers were reproduced, by the last column of the method's page."""
    text = (ROOT / "docs" / f"{name}.md").read_text().split("\n## Results\n")[1]
    found = re.findall(r"\| (reproduced|partly|not) \|$", text.split("\n## ")[0], re.M)
    parts = [f"{found.count(word)} {word}" for word in ("reproduced", "partly", "not")]
    kept = ", ".join(part for part in parts if not part.startswith("0"))
    return f"[{len(found)} claims](docs/{name}.md#results): {kept}"


def methods() -> str:
    """The six files, with the lines that each has."""
    rows = []
    for name, (title, idea, target, papers, status) in METHODS.items():
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        file = f"[`{name}.py`]({name}.py)<br>{title}"
        rows.append([file, lines, idea, target, links, f"{status}. {claims(name)}"])
    return table(["file", "lines", "idea", "target", "paper", "status"], rows)


def ratios() -> str:
    """How many times as long a step of the others takes, by prompt and response tokens."""
    rows = []
    for row, name, chosen in PEERS:
        lines = read(name, *chosen, "prompt", "response")
        found = {
            (line["prompt"], line["response"]): f"{line['ratio']:.1f}"
            for line in lines
            if all(line[key] == value for key, value in chosen.items())
        }
        rows.append([row, *(found.get(shape, "") for shape in SHAPES)])
    return table(["", *map(str, SHAPES)], rows)


def features() -> str:
    """What is here and what is in TRL."""
    counts = {
        name: f"{len((ROOT / f'{name}.py').read_text().splitlines()):,}"
        for name in ("dpo", "common")
    }
    counts |= {"losses": DPO_LOSSES, "trainer": f"{DPO_TRAINER_LINES:,}"}
    rows = [[cell.format(**counts) for cell in row] for row in FEATURES]
    return table(["", "here", f"TRL {TRL}"], rows)


def printed(main) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main()
    return output.getvalue().strip()


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with each part between its two markers; a page without them is an error."""
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{begin} and {end} must each occur once")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def page() -> str:
    """README.md as it should be."""
    parts = {
        "methods": methods(),
        "differences": printed(differences.main),
        "ratios": ratios(),
        "features": features(),
    }
    return filled((ROOT / "README.md").read_text(), parts)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(page())
