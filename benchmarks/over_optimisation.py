"""What happens to the gold score when the reward model is optimised too hard.

    python -m benchmarks.over_optimisation

Runs `wind.py` without its KL term and for longer, and writes what the reward model and the gold
score say at each evaluation to benchmarks/results/over_optimisation.jsonl.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from prepare import gold

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "over_optimisation.jsonl"
COMMAND = "wind.py --beta 0 --lr 1e-3 --steps 400 --eval-every 40 --seed 1".split()


def main() -> None:
    """Runs, judges, writes."""
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        subprocess.run([sys.executable, *COMMAND, "--run-dir", run], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        judged = {row[0]: row for row in gold.main(gold.Args(str(run)))}
    about = {"command": "python " + " ".join(COMMAND), "commit": git.stdout.strip(),
             "device": "cpu", "torch": torch.__version__, "transformers": transformers.__version__}
    with open(RESULTS, "w") as file:
        for line in lines:
            if "eval/reward" in line:
                _, gold_win_rate, gold_score, _ = judged[line["step"]]
                file.write(json.dumps({
                    "step": line["step"], "win_rate": line["eval/win_rate"], "kl": line["eval/kl"],
                    "gold_win_rate": gold_win_rate, "gold_score": gold_score} | about) + "\n")


if __name__ == "__main__":
    main()
