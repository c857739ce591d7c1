"""Win rates, KL and lengths of finished runs, against the data set's completions.

    python -m analyze.evaluate RUN [RUN ...] [--best-of 16] [--judge reward tiny llm:FOLDER http://…]

Samples final/ of each run and the SFT model they began from on the held-out prompts, one response
per prompt: at the runs' --temperature, and greedily. --best-of N adds the SFT model's best of N
samples by the runs' reward model. Intervals hold 95 %, by a bootstrap over the prompts: they know
nothing of other seeds, and have no width where all prompts agree.

    win rate            mean of w: 1 for a win, ½ for a tie, 0 for a loss
    length-controlled   σ(a), where a and b fit  w ~ σ(a + b · tanh(d / sd(d)))             (1)
    KL                  mean of log π − log p of the samples, from the SFT model p; of the best of N
                        it is at most log N − (N − 1)/N

d is how many tokens a response is longer than the completion, so (1) is the win rate at equal
length if w depends on the length in that form. It is AlpacaEval's length-controlled win rate
(Dubois et al., 2404.04475) without its term for the prompt's difficulty, and with a penalty that is
just large enough to keep a and b finite.

Writes into --out: eval.json, table.md, picture.png, samples.md, and outputs.json, whose rows are
AlpacaEval's; its `generator` says which model wrote one. They are written again behind each judge,
so that a judge that fails leaves the results of those before it.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

import common
from analyze.intervals import interval, kl_bound, length_controlled, mean
from analyze.judges import AddressJudge, ScoreJudge, in_both_orders, local_judge, score_judge
from analyze.win_rates import Answers, as_table, draw, text_of, write_samples
from benchmarks import where
from plumbing.models import Model
from plumbing.run import explained, require, seed_of

GREEDY = 1e-30  # as a temperature: every gap between float32 logits becomes more than 1e20 nats
SAME = (  # what runs that are compared must share
    "dataset policy reward_model reward_eos missing_eos_penalty template chat_template_kwargs "
    "max_prompt_tokens max_response_tokens temperature"
).split()


@dataclass
class Args:
    """Win rates, KL and lengths of finished runs."""

    runs: tyro.conf.Positional[list[str]]
    """run folders, of the same data set and models"""
    judge: tuple[str, ...] = ("reward",)
    """reward: the runs' own reward model; a reward model's folder; FILE.py:FUNCTION; tiny: the gold
    score; llm:FOLDER: a causal model; http://HOST/v1: an address that speaks OpenAI's protocol"""
    judge_model: str = ""
    """name of the model at the address"""
    judge_key: str = ""
    """environment variable that holds the key for the address; empty = no key is sent"""
    criterion: str = "Which one is better: more helpful, more accurate, and no longer than need be?"
    """what a language model is asked"""
    best_of: int = 0
    """also the best of so many samples of the SFT model; 0 = no"""
    prompts: int = 0
    """held-out prompts; 0 = as many as all runs held out"""
    seed: int = 1
    """of sampling and of the bootstrap"""
    out: str = ""
    """folder to write; empty = eval/ in the first run folder"""


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


def read_about(folder: str) -> tuple[str, SimpleNamespace]:
    """(the script, its flags) of a run."""
    path = Path(folder, "args.json")
    require(path.exists(), f"{folder}: it has no args.json, so it is no run folder")
    with explained(f"{folder}: args.json is damaged"):
        about = json.loads(path.read_text())
        return Path(about["script"]).stem, SimpleNamespace(**about["args"])


def shared_flags(folders: list[str]) -> SimpleNamespace:
    """The flags of runs that can be compared, for sampling from plain weights."""
    require(folders, "name a run folder")
    flags = [read_about(folder)[1] for folder in folders]
    for folder, other in zip(folders, flags):
        for name in SAME:
            ours, theirs = getattr(flags[0], name), getattr(other, name)
            flag = f"--{name.replace('_', '-')}"
            say = f"{folder}: its {flag} is {theirs}, that of {folders[0]} is {ours}"
            require(ours == theirs, f"{say}; such runs cannot be compared")
    shared = SimpleNamespace(**vars(flags[0]))
    shared.eval_prompts = min(other.eval_prompts for other in flags)
    shared.steps, shared.lora_rank, shared.checkpointing, shared.dtype = 1, 0, False, "mixed"
    shared.cuda_graph = False
    return shared


def find_finals(folders: list[str]) -> dict[str, Path]:
    """final/ of each run, by its name."""
    for folder in folders:
        require(Path(folder, "final").exists(), f"{folder}: it has no final/, so it is unfinished")
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(Path(folder)) for folder in folders]
    require(len(set(names)) == len(names), f"{' '.join(folders)}: a run folder is named twice")
    return {name: Path(folder, "final") for name, folder in zip(names, folders)}


def read_prompts(most: int, flags: SimpleNamespace, tokenizer) -> list[common.Prompt]:
    """The held-out prompts, at most `most` if not 0, each with a completion to compare with."""
    require(
        0 <= most <= flags.eval_prompts,
        f"--prompts {most}: a run has held out {flags.eval_prompts}, and may have trained "
        "on others",
    )
    flags.eval_prompts = most or flags.eval_prompts
    _, prompts = common.load_prompts(flags, tokenizer)
    for prompt in prompts:
        missing = f"the prompt {prompt.text[:80]!r} has no completion to be compared with"
        require(prompt.reference is not None, f"--dataset {flags.dataset}: {missing}")
    return prompts


def read_start(most: int, flags: SimpleNamespace) -> tuple:
    """(device, tokenizer, the SFT model that runs began from, what the data set answers to the
    held-out prompts, at most `most` if not 0, as a batch of one response each)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = common.load_tokenizer("--policy", flags.policy)
    prompts = read_prompts(most, flags, tokenizer)
    start = common.load_policy(SimpleNamespace(args=flags, device=device), tokenizer)
    texts, longest = [[prompt.reference] for prompt in prompts], flags.max_response_tokens
    references = common.encode_responses(tokenizer, start, prompts, texts, longest)
    return device, tokenizer, start, references


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────


def join(parts: list[common.Batch]) -> common.Batch:
    """One batch of all their prompts."""
    prompts = [prompt for part in parts for prompt in part.prompts]
    return common.Batch(prompts, [group for part in parts for group in part.responses])


def sample(policy: Model, flags, prompts: list, n: int, temperature: float, seed: int):
    """n responses per prompt; with n = 1 and the seed of a run, those of its own evaluations."""
    parts = []
    for rows in common.micro_batches(len(prompts), max(1, 4 * flags.prompts_per_step // n)):
        seed_here = seed_of(seed, "evaluate", 0, rows.start)
        most = flags.max_response_tokens
        parts.append(common.sample(policy, prompts[rows], n, most, temperature, seed_here))
    return join(parts)


def answers_of(name: str, policy: Model, start: Model, flags, prompts, seed: int) -> list[Answers]:
    """A model's samples, with the KL from the SFT model, and its greedy responses."""
    size = flags.micro_batch or 4 * flags.prompts_per_step
    batch = sample(policy, flags, prompts, 1, flags.temperature, seed)
    kl = common.logprobs(policy, batch, flags.temperature, size)
    kl = (kl - common.logprobs(start, batch, flags.temperature, size))[:, 0].tolist()
    greedy = sample(policy, flags, prompts, 1, GREEDY, seed)
    decoding = f"temperature {flags.temperature:g}"
    return [
        Answers(name, decoding, batch, ended(batch, policy), kl),
        Answers(name, "greedy", greedy, ended(greedy, policy)),
    ]


def best_of(n: int, start: Model, reward_model, flags, prompts, seed: int) -> Answers:
    """The SFT model's best of n samples by the reward model."""
    batch = sample(start, flags, prompts, n, flags.temperature, seed)
    rewards = common.score(reward_model, batch, flags.micro_batch or flags.prompts_per_step)
    batch = batch.choose(rewards.argmax(1, keepdim=True).cpu())
    return Answers("SFT", f"best of {n}", batch, ended(batch, start), kl_bound=kl_bound(n))


def ended(batch: common.Batch, policy: Model) -> float:
    """The share of the responses that ended."""
    return batch.ended(policy.end_tokens).float().mean().item()


# ── Judging ───────────────────────────────────────────────────────────────────────────────────────


def make_judge(name: str, args: Args, flags, out: Path, device, tokenizer, start: Model):
    """The judge of a name."""
    if name.startswith("llm:"):
        return local_judge(name, flags, device, args.criterion)
    if name.startswith(("http://", "https://")):
        require(args.judge_model, f"--judge {name}: name its model with --judge-model")
        key = os.environ.get(args.judge_key, "")
        missing = f"--judge-key {args.judge_key}: no such environment variable"
        require(key or not args.judge_key, missing)
        return AddressJudge(name, args.judge_model, key, args.criterion, out / "verdicts.jsonl")
    return score_judge(name, flags, device, tokenizer, start)


def judged(judge, answers: Answers, references: common.Batch, reader, seed: int) -> dict:
    """A row of eval.json: the answers of one model, as one judge sees them."""
    if isinstance(judge, ScoreJudge):
        wins, facts = judge.compare(answers.batch, references)
    else:
        sources = [text_of(prompt.source) for prompt in references.prompts]
        wins, facts = in_both_orders(judge, sources, reader(answers.batch), reader(references))
    lengths = answers.batch.lengths()[:, 0]
    gaps = lengths - references.lengths()[:, 0]
    row = {"model": answers.model, "decoding": answers.decoding, "judge": judge.name}
    row["win_rate"] = interval(mean, wins, seed=seed)
    row["length_controlled"] = interval(length_controlled, wins, gaps.tolist(), seed=seed)
    row["length"] = interval(mean, lengths.tolist(), seed=seed)
    row["ended"] = answers.ended
    if answers.kl is not None:
        row["kl"] = interval(mean, answers.kl, seed=seed)
    if answers.kl_bound is not None:
        row["kl_bound"] = answers.kl_bound
    for key, value in facts.items():
        row[key] = interval(mean, value, seed=seed) if isinstance(value, list) else value
    return row | {"wins": wins}


def main(args: Args) -> list[dict]:
    """Samples, judges, writes; returns the rows of eval.json."""
    flags = shared_flags(args.runs)
    finals = find_finals(args.runs)
    require(args.best_of != 1 and args.best_of >= 0, f"--best-of {args.best_of}: must be 2 or more")
    out = Path(args.out or Path(args.runs[0], "eval"))
    device, tokenizer, start, references = read_start(args.prompts, flags)
    prompts = references.prompts
    with explained(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    judges = [
        make_judge(name, args, flags, out, device, tokenizer, start)
        for name in dict.fromkeys(args.judge)
    ]

    everyone = answers_of("SFT", start, start, flags, prompts, args.seed)
    if args.best_of:
        reward_model = score_judge("reward", flags, device, tokenizer, start).reward_model
        everyone.append(best_of(args.best_of, start, reward_model, flags, prompts, args.seed))
    for name, folder in finals.items():
        own = SimpleNamespace(**vars(flags) | {"policy": str(folder)})
        policy = common.load_policy(SimpleNamespace(args=own, device=device), tokenizer)
        everyone += answers_of(name, policy, start, flags, prompts, args.seed)

    nobody = common.RewardModel(tokenizer, start.end_tokens, device)  # knows how to read a batch

    def reader(batch: common.Batch) -> list[str]:
        return [text for (text,) in common._texts(nobody, batch)]

    write_samples(out, everyone, references, reader, flags.dataset)
    rows = []
    about = {"command": sys.argv, "args": asdict(args), "dataset": flags.dataset}
    about |= {"prompts": len(prompts), "device": str(device)} | where.about()
    for judge in judges:
        rows += [judged(judge, answers, references, reader, args.seed) for answers in everyone]
        (out / "eval.json").write_text(json.dumps(about | {"results": rows}, indent=1))
        (out / "table.md").write_text(as_table(rows) + "\n", encoding="utf-8")
        draw(rows, out / "picture.png")
    print(as_table(rows))
    print(f"{out}: eval.json, table.md, picture.png, samples.md, outputs.json")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
