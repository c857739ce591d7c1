"""Judges: who says which of two responses to a prompt is better.

A judge by score (a reward model, a Python function, the tiny world's gold score) gives each
response a number, and the higher one wins; equal ones tie.

A judge by verdict (a language model) reads both responses and names A or B. Language models prefer
one of the two places, so each pair is shown in both orders: the response wins or loses where both
verdicts agree on that, and ties where they do not, or where one of them names neither. Reported
beside the win rate, over all verdicts:

    position bias   2 · (share that names the first) − 1: 0 = none, 1 = always A, −1 = always B
    unparsable      share of answers that name neither A nor B

How the order is swapped follows no paper: most evaluations show one order, drawn at random.
"""

import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import common
from plumbing.data import Layout, encode_behind
from plumbing.models import Model, load_tokenizer
from plumbing.report import read_lines
from plumbing.run import explained, require
from prepare.tiny import gold_score

QUESTION = """Two responses to the same prompt follow. {criterion}

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}

"""
BY_TOKEN = 'Answer with one line, which is "Verdict: A" or "Verdict: B".'
BY_TEXT = (
    "Compare the two responses in one sentence. "
    'Then write a last line, which is "Verdict: A" or "Verdict: B".'
)
VERDICT = re.compile(r"\W*(?i:verdict)?\W*(?i:response)?\W*\b([AB])\W*")  # a whole line
LEAST = 0.1  # probability of A and B together below which a model answers something else
AT_ONCE = 8  # questions to an address, and rows of a local model


# ── By score ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class ScoreJudge:
    """The higher score wins."""

    name: str
    reward_model: common.RewardModel

    def compare(self, batch: common.Batch, references: common.Batch) -> tuple[list[float], dict]:
        """(wins [P], facts) of one response per prompt against its reference: 1, ½ or 0 each."""
        ours = common.score(self.reward_model, batch)[:, 0].tolist()
        theirs = common.score(self.reward_model, references)[:, 0].tolist()
        wins = [float(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs)]
        return wins, {"score": ours, "reference_score": theirs}


def score_judge(name: str, flags, device: torch.device, tokenizer, policy: Model) -> ScoreJudge:
    """The judge that --judge names: `reward`, that of the runs; a reward model's folder;
    FILE.py:FUNCTION; or `tiny`. What the runs take off for a cut response, only `reward` does."""
    if name == "tiny":
        reward_model = common.RewardModel(tokenizer, policy.end_tokens, device)
        reward_model.function = gold_scores
        return ScoreJudge(name, reward_model)
    other = {} if name == "reward" else {"reward_model": name, "missing_eos_penalty": 0.0}
    run = SimpleNamespace(args=SimpleNamespace(**vars(flags) | other), device=device)
    return ScoreJudge(name, common.load_reward_model(run, policy, tokenizer))


def gold_scores(prompts: list[str], responses: list[str]) -> list[float]:
    """The tiny world's gold scores."""
    with explained("--judge tiny: it knows the prompts of assets/tiny only"):
        return [gold_score(*pair) for pair in zip(prompts, responses)]


# ── By verdict ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Question:
    """A prompt and two responses, in the order in which a judge reads them."""

    prompt: str
    first: str
    second: str

    def text(self, criterion: str, ending: str) -> str:
        """What the judge reads."""
        parts = {"prompt": self.prompt, "first": self.first, "second": self.second}
        parts = {name: part.strip() for name, part in parts.items()}
        return QUESTION.format(criterion=criterion, **parts) + ending


def verdict_of(answer: str) -> str | None:
    """A or B, from the last line of an answer; None where it is no verdict."""
    lines = answer.strip().splitlines()
    found = VERDICT.fullmatch(lines[-1].strip()) if lines else None
    return found.group(1) if found else None


def in_both_orders(
    judge, prompts: list[str], responses: list[str], references: list[str]
) -> tuple[list[float], dict]:
    """(wins [P], facts) of responses against references, by judge.ask(questions) → answers.

    Ends the process if no answer is a verdict.
    """
    triples = list(zip(prompts, responses, references))
    straight = [Question(prompt, ours, theirs) for prompt, ours, theirs in triples]
    swapped = [Question(prompt, theirs, ours) for prompt, ours, theirs in triples]
    answers = judge.ask(straight + swapped)
    verdicts = [verdict_of(answer) for answer in answers]
    named = [verdict for verdict in verdicts if verdict]
    require(
        named,
        f"--judge {judge.name}: none of its {len(answers)} answers is a verdict, A or B; the first "
        f"is {answers[0][:200]!r}",
    )
    pairs = list(zip(verdicts, verdicts[len(triples) :]))
    wins = [{("A", "B"): 1.0, ("B", "A"): 0.0}.get(pair, 0.5) for pair in pairs]
    return wins, {
        "position_bias": 2 * named.count("A") / len(named) - 1,
        "agreement": sum(win != 0.5 for win in wins) / len(wins),
        "unparsable": 1 - len(named) / len(answers),
    }


@dataclass
class LocalJudge:
    """A causal language model of a folder: the verdict is the likelier of two next tokens."""

    name: str
    tokenizer: object
    layout: Layout
    model: Model
    criterion: str

    def ask(self, questions: list[Question]) -> list[str]:
        """`A` or `B`, or what kept the model from a verdict, for each question."""
        answers = ["longer than the judge's context"] * len(questions)
        prompts = [self._prompt(question) for question in questions]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) < self.model.context]
        for start in range(0, len(fits), AT_ONCE):
            chosen = fits[start : start + AT_ONCE]
            some = [prompts[i] for i in chosen]
            letters = [self._letters(prompt.text) for prompt in some]
            batch = common.Batch(some, letters)
            for i, (a, b) in zip(chosen, common.logprobs(self.model, batch, 1.0).exp().tolist()):
                answers[i] = "A" if a > b else "B"
                if a + b < LEAST:
                    answers[i] = f"neither: A and B have a probability of {a + b:.4f} together"
        return answers

    def _prompt(self, question: Question) -> common.Prompt:
        asked = question.text(self.criterion, BY_TOKEN)
        text = self.layout.before(asked) if self.layout.turns(asked) else asked + "\n"
        text += "Verdict:"
        return common.Prompt(text, self.layout.encode(asked, text))

    def _letters(self, text: str) -> list[list[int]]:
        """The tokens of A and of B behind `text`, one each."""
        letters = encode_behind(self.tokenizer, text, [" A", " B"])
        require(
            letters[0] != letters[1] and len(letters[0]) == len(letters[1]) == 1,
            f"--judge {self.name}: its tokenizer has no token each for A and B",
        )
        return letters


def local_judge(name: str, flags, device: torch.device, criterion: str) -> LocalJudge:
    """The judge of `llm:FOLDER`; a text is laid out by its chat template, if it has one."""
    folder = name.removeprefix("llm:")
    require(Path(folder, "config.json").exists(), f"--judge {name}: no such folder of a model")
    tokenizer = load_tokenizer("--judge", folder)
    own = {"policy": folder, "template": "auto", "chat_template_kwargs": "{}", "lora_rank": 0}
    own |= {"max_prompt_tokens": 0, "max_response_tokens": 1, "temperature": 1.0}
    own |= {"dtype": "mixed", "checkpointing": False, "micro_batch": 0}
    own |= {"cuda_graph": False}
    run = SimpleNamespace(args=SimpleNamespace(**vars(flags) | own), device=device)
    return LocalJudge(
        name, tokenizer, Layout(tokenizer), common.load_policy(run, tokenizer), criterion
    )


@dataclass
class AddressJudge:
    """A model behind an address that speaks OpenAI's chat protocol.

    Answers are kept in the file `kept`: a question that was answered is not asked again. The key,
    if there is one, is sent as a bearer token and written nowhere.
    """

    name: str  # http://HOST/v1
    model: str
    key: str
    criterion: str
    kept: Path

    def ask(self, questions: list[Question]) -> list[str]:
        """The answers, as text; ends the process where the address gives none."""
        texts = [question.text(self.criterion, BY_TEXT) for question in questions]
        known = self._known()
        unknown = [text for text in dict.fromkeys(texts) if text not in known]
        about = {"judge": self.name, "model": self.model}
        problem = f"--judge {self.name}: no answer; what is finished is kept in {self.kept.parent}"
        with (
            explained(problem),
            open(self.kept, "a", encoding="utf-8", buffering=1) as file,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            try:
                for text, answer in zip(unknown, pool.map(self._answer, unknown)):
                    known[text] = answer
                    line = json.dumps(about | {"question": text, "answer": answer})
                    file.write(line + "\n")
            finally:
                pool.shutdown(cancel_futures=True)  # an address that fails once is left alone
        return [known[text] for text in texts]

    def _known(self) -> dict[str, str]:
        """What this judge has answered before, by question."""
        with explained(f"{self.kept} is damaged; remove it, or its last line"):
            lines = read_lines(self.kept) if self.kept.exists() else []
        ours = [x for x in lines if x["judge"] == self.name and x["model"] == self.model]
        return {line["question"]: line["answer"] for line in ours}

    def _answer(self, text: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 300,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.name.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for wait in (1, 4, None):  # seconds
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return _content(reply.read().decode())
            except OSError as error:
                # Of the codes of HTTP, those of a busy server pass, and those of a mistake do not.
                code = error.code if isinstance(error, urllib.error.HTTPError) else 503
                if wait is None or code < 500 and code != 429:
                    raise
            time.sleep(wait)


def _content(reply: str) -> str:
    """The text of a chat reply."""
    try:
        return json.loads(reply)["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"its reply is no chat completion: {reply[:100]!r}") from None
