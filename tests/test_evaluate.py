"""The verdicts of finished runs: judges, intervals, length control, the best of N, pictures."""

import itertools
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from models import make_model, save, word_tokenizer, write_jsonl
from scipy.optimize import minimize

import brain
import common
from analyze import evaluate, gradient_variance, judges, plot
from analyze.intervals import best_of_mean, interval, length_controlled, mean
from analyze.judges import AddressJudge, Question, in_both_orders, verdict_of
from analyze.win_rates import as_table
from plumbing import report
from plumbing.report import COLOURS, read_lines
from prepare import tiny

CPU = torch.device("cpu")


class Scripted:
    """A judge whose answer is a function of the question."""

    name = "scripted"

    def __init__(self, rule):
        self.rule = rule

    def ask(self, questions: list[Question]) -> list[str]:
        return [self.rule(question) for question in questions]


def longer(question: Question) -> str:
    return f"Verdict: {'A' if len(question.first) > len(question.second) else 'B'}"


def compare(rule, ours=("long", "a", "longer"), theirs=("no", "bb", "x")) -> tuple[list, dict]:
    return in_both_orders(Scripted(rule), ["p"] * len(ours), list(ours), list(theirs))


# ── verdicts ──
@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("A", "A"),
        ("**B**", "B"),
        ("Both are short.\nVerdict: A", "A"),
        ("A is better at first.\n\n**Verdict:** B.\n", "B"),
        ("verdict: Response B", "B"),
        ("Verdict: A or B", None),
        ("Verdict: AB", None),
        ("Verdict: C", None),
        ("Verdict: A\nbut B is fine too", None),
        ("a", None),
        ("", None),
        ("neither: A and B have a probability of 0.01 together", None),
    ],
)
def test_a_verdict_is_the_whole_last_line(answer, verdict):
    assert verdict_of(answer) == verdict


@pytest.mark.parametrize("letter, bias", [("A", 1), ("B", -1)])
def test_a_judge_that_sees_the_order_alone_gives_half_and_says_so(letter, bias):
    """The issue's biased judge: always A."""
    wins, facts = compare(lambda question: f"Verdict: {letter}")
    assert wins == [0.5] * 3
    assert facts == {"position_bias": bias, "agreement": 0, "unparsable": 0}


def test_a_perfect_judge_has_no_bias():
    wins, facts = compare(longer)
    assert wins == [1, 0, 1]
    assert facts == {"position_bias": 0, "agreement": 1, "unparsable": 0}


def test_a_pair_ties_where_one_of_its_verdicts_is_none():
    """The prompt's answers differ: a third of them is nonsense, all of it in one order."""
    wins, facts = compare(lambda x: "who knows?" if x.first == "long" else longer(x))
    assert wins == [0.5, 0, 1]
    assert facts["unparsable"] == pytest.approx(1 / 6)
    assert facts["agreement"] == pytest.approx(2 / 3)
    assert facts["position_bias"] == pytest.approx(2 * 2 / 5 - 1)  # A, A of 5 verdicts


def test_a_judge_that_answers_nonsense_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        compare(lambda question: "As a judge,\nI refuse.")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "none of its 6 answers is a verdict" in said
    assert "As a judge" in said


# ── scores ──
def test_equal_scores_tie():
    tokenizer = word_tokenizer()
    reward_model = common.RewardModel(
        tokenizer, [1], CPU, function=lambda p, r: [len(x) for x in r]
    )
    prompts = [common.Prompt("the", [4])] * 3
    batch = common.Batch(prompts, [[[4, 1]], [[4, 4, 1]], [[4, 1]]])
    references = common.Batch(prompts, [[[5, 1]], [[4, 1]], [[4, 1]]])  # a; the; the
    wins, facts = judges.ScoreJudge("f", reward_model).compare(batch, references)
    assert wins == [1, 1, 0.5]
    assert facts["score"][2] == facts["reference_score"][2] > facts["reference_score"][0]


# ── intervals ──
def test_the_bootstrap_holds_what_it_says():
    """Of 400 Bernoulli samples of 200, about 95 % of the intervals hold the true rate."""
    rng, rate = numpy.random.default_rng(0), 0.7
    holds = []
    for seed in range(400):
        found = interval(mean, (rng.random(200) < rate).astype(float), seed=seed)
        assert found["low"] <= found["value"] <= found["high"]
        holds.append(found["low"] <= rate <= found["high"])
    assert 0.92 <= numpy.mean(holds) <= 0.975  # 0.95 ± 2.5 standard errors


def synthetic(count: int, a: float, b: float, seed: int = 0):
    """Wins that depend on the length as (1) says, of responses that are mostly longer."""
    rng = numpy.random.default_rng(seed)
    gaps = rng.normal(6, 8, count)
    p = 1 / (1 + numpy.exp(-(a + b * numpy.tanh(gaps / gaps.std()))))
    return (rng.random(count) < p).astype(float), gaps


def test_eq1_length_control_finds_the_win_rate_at_equal_length():
    """With a known effect of the length, which the plain win rate has in it."""
    wins, gaps = synthetic(40_000, a=-0.4, b=1.5)
    truth = 1 / (1 + math.exp(0.4))  # 0.401
    assert wins.mean() > truth + 0.1
    assert length_controlled(wins, gaps) == pytest.approx(truth, abs=0.012)


def test_eq1_length_control_is_the_maximum_of_the_likelihood():
    """As another optimizer finds it, with ties, for a batch of two data sets at once."""
    parts = [synthetic(300, 0.3, -1, seed) for seed in (1, 2)]
    wins, gaps = (numpy.stack([part[i] for part in parts]) for i in (0, 1))
    wins[:, :50] = 0.5

    def loss(weights, w, d):
        z = weights[0] + weights[1] * numpy.tanh(d / d.std())
        return (numpy.logaddexp(0, z) - w * z).sum() + 5e-4 * (weights**2).sum()

    best = [minimize(loss, [0, 0], args=pair, tol=1e-12).x[0] for pair in zip(wins, gaps)]
    expected = 1 / (1 + numpy.exp(-numpy.array(best)))
    assert numpy.allclose(length_controlled(wins, gaps), expected, atol=1e-5)


def test_eq1_at_equal_lengths_or_without_losses():
    """No length to control: the win rate. Nothing lost: finite, near 1."""
    wins = numpy.array([1, 0, 0.5, 1])
    assert length_controlled(wins, numpy.full(4, 3.0)) == pytest.approx(0.625, abs=1e-3)
    gaps = numpy.arange(256.0)
    assert 0.99 < length_controlled(numpy.ones(256), gaps) <= 1
    apart = length_controlled((gaps > 100).astype(float), gaps)  # a length decides everything
    assert numpy.isfinite(apart) and apart < 0.1


# ── the best of N ──
def test_the_best_of_n_is_that_of_all_subsets():
    rng = numpy.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in (1, 2, 4, 6):
        chosen = list(itertools.combinations(range(6), n))
        bests = [
            [values[p, max(subset, key=lambda i: rewards[p, i])] for subset in chosen]
            for p in range(3)
        ]
        assert best_of_mean(rewards, values, n) == pytest.approx(numpy.mean(bests))


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_best_of_n_beats_one_more_sample_n_of_n_plus_1_times(n):
    """For any continuous reward."""
    rewards = numpy.random.default_rng(n).normal(size=(2_000, 17))
    ours, theirs = rewards[:, :16], rewards[:, 16:]
    rate = best_of_mean(ours, (ours > theirs).astype(float), n)
    assert rate == pytest.approx(n / (n + 1), abs=0.02)


# ── a local model as judge ──
def judge_words() -> list[str]:
    """All words of the judge's question."""
    question = Question("film", "good plot", "bad plot").text("Which is better?", judges.BY_TOKEN)
    return list(dict.fromkeys([*f"{question} Verdict:".split(), "A", "B"]))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A random causal model as judge, by the way of --judge llm:FOLDER."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = word_tokenizer(judge_words())
    save(folder, make_model("llama", len(tokenizer), seed=3), tokenizer)
    return judges.local_judge(f"llm:{folder}", SimpleNamespace(), CPU, "Which is better?")


def test_a_local_judge_names_the_likelier_letter(local, monkeypatch):
    """As the model's own next-token distribution has them, behind `Verdict:`."""
    monkeypatch.setattr(judges, "LEAST", 0.0)
    texts = ["good plot", "bad plot", "film", "bad film plot", "good"]
    questions = [Question("film", *pair) for pair in itertools.permutations(texts, 2)]
    a, b = local.tokenizer.convert_tokens_to_ids(["A", "B"])
    head, seen = local.model.module.lm_head.weight.data, set()
    for _ in range(2):
        expected = []
        for question in questions:
            text = question.text("Which is better?", judges.BY_TOKEN) + " Verdict:"
            ids = local.tokenizer(text, return_tensors="pt")["input_ids"]
            logits = local.model.module(ids).logits[0, -1]
            expected.append("A" if logits[a] > logits[b] else "B")
        assert local.ask(questions) == expected
        seen |= set(expected)
        head[[a, b]] = head[[b, a]]  # then each answer is the other one; the second time, back
    assert seen == {"A", "B"}


def test_a_local_judge_that_would_say_something_else_has_no_verdict(local, monkeypatch):
    monkeypatch.setattr(judges, "LEAST", 1.0)
    (answer,) = local.ask([Question("film", "good", "bad")])
    assert answer.startswith("neither") and verdict_of(answer) is None


def test_a_question_longer_than_the_local_judges_context_has_no_verdict(local):
    """The others are answered all the same."""
    long = Question("film", "good " * 300, "bad")
    answers = local.ask([Question("film", "good", "bad"), long, Question("film", "bad", "good")])
    assert answers[1] == "longer than the judge's context"
    assert answers[::2] == local.ask(
        [Question("film", *x) for x in (("good", "bad"), ("bad", "good"))]
    )


def test_a_judge_without_tokens_for_the_letters_is_refused(tmp_path, capsys):
    tokenizer = word_tokenizer()
    save(tmp_path / "llm", make_model("llama", len(tokenizer)), tokenizer)
    judge = judges.local_judge(f"llm:{tmp_path / 'llm'}", SimpleNamespace(), CPU, "?")
    with pytest.raises(SystemExit):
        judge.ask([Question("film", "good", "bad")])
    assert "has no token each for A and B" in capsys.readouterr().err


# ── an address as judge ──
class Server:
    """An OpenAI-compatible address on this machine; `rule` gives (status, text) for a request."""

    def __init__(self, rule):
        self.requests = requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append({"path": self.path, "body": body, "headers": dict(self.headers)})
                status, text = rule(body["messages"][0]["content"], len(requests))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        serving = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def reply(text: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def prefers_good(question: str, _) -> tuple[int, str]:
    first = question.split("Response A:\n")[1].split("\n\nResponse B:")[0]
    return reply(f"One is good.\nVerdict: {'A' if 'good' in first else 'B'}")


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, and ends them; waits are recorded and left out."""
    servers, waits = [], []
    monkeypatch.setattr(judges.time, "sleep", waits.append)

    def start(rule) -> Server:
        servers.append(Server(rule))
        servers[-1].waits = waits
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge_at(server: Server, folder: Path, key: str = "") -> AddressJudge:
    return AddressJudge(server.address, "m-1", key, "Which?", folder / "verdicts.jsonl")


ASKED = (["p 1", "p 2", "p 3"], ["good", "bad", "good film"], ["bad", "good", "bad film"])


def test_an_address_judges_in_both_orders_and_is_asked_once(serve, tmp_path):
    """A second run reads the answers of the first; no key leaves unasked."""
    server = serve(prefers_good)
    for _ in range(2):
        wins, facts = in_both_orders(judge_at(server, tmp_path), *ASKED)
        assert wins == [1, 0, 1] and facts["position_bias"] == 0
        assert len(server.requests) == 6
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["body"]["model"] == "m-1"
    assert request["body"]["temperature"] == 0
    assert "Authorization" not in request["headers"]
    other = judge_at(server, tmp_path, key="sesame")
    other.model = "m-2"  # whose answers are its own
    in_both_orders(other, *ASKED)
    assert len(server.requests) == 12
    assert server.requests[-1]["headers"]["Authorization"] == "Bearer sesame"
    assert "sesame" not in (tmp_path / "verdicts.jsonl").read_text()


@pytest.mark.parametrize("status, asked", [(503, 3), (429, 3), (401, 1), (404, 1)])
def test_a_busy_address_is_asked_again_and_a_refusal_is_not(status, asked, serve, tmp_path, capsys):
    server = serve(lambda *_: (status, "no"))
    with pytest.raises(SystemExit) as end:
        judge_at(server, tmp_path).ask([Question("p", "good", "bad")])
    assert end.value.code == 2 and len(server.requests) == asked
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--judge {server.address}: no answer" in said and str(status) in said
    assert str(tmp_path) in said


def test_an_address_that_was_busy_once_answers(serve, tmp_path):
    server = serve(lambda text, count: (503, "") if count == 1 else prefers_good(text, count))
    assert verdict_of(*judge_at(server, tmp_path).ask([Question("p", "good", "bad")])) == "A"
    assert len(server.requests) == 2 and server.waits == [1]


@pytest.mark.parametrize("text", ["<html>", "{}", '{"choices": []}', "[1]"])
def test_a_reply_that_is_no_chat_ends_in_one_line(text, serve, tmp_path, capsys):
    server = serve(lambda *_: (200, text))
    with pytest.raises(SystemExit):
        judge_at(server, tmp_path).ask([Question("p", "good", "bad")])
    assert f"its reply is no chat completion: {text!r}" in capsys.readouterr().err


def test_answers_before_a_failure_are_kept(serve, tmp_path, monkeypatch, capsys):
    """Asked one at a time, the third fails: two are in the file, and are not asked again."""
    monkeypatch.setattr(judges, "AT_ONCE", 1)
    server = serve(lambda text, count: (401, "") if count == 3 else prefers_good(text, count))
    questions = [Question(f"p {i}", "good", "bad") for i in range(6)]
    with pytest.raises(SystemExit):
        judge_at(server, tmp_path).ask(questions)
    assert len(read_lines(tmp_path / "verdicts.jsonl")) == 2
    before = len(server.requests)
    assert len(judge_at(server, tmp_path).ask(questions)) == 6
    assert len(server.requests) == before + 4
    with open(tmp_path / "verdicts.jsonl", "a") as file:
        file.write('{"judge": "cut')
    with pytest.raises(SystemExit):
        judge_at(server, tmp_path).ask(questions)
    assert "verdicts.jsonl is damaged" in capsys.readouterr().err


# ── a run, from end to end ──
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of the embedded default on few prompts."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    brain.main(
        brain.Args(
            run_dir=str(folder),
            steps=2,
            lr=5e-3,
            warmup_steps=0,
            prompts_per_step=4,
            eval_prompts=24,
            eval_every=2,
            max_response_tokens=32,
        )
    )
    return folder


def args(*runs: Path, **more) -> evaluate.Args:
    return evaluate.Args(runs=[str(run) for run in runs], **more)


def by(rows: list[dict], **wanted) -> dict:
    """The one row that has these values."""
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


def test_a_run_is_seen_as_its_own_evaluation_saw_it(run, tmp_path, serve, capsys):
    """With the run's seed: the same samples, so the same numbers; the other judges beside them."""
    server = serve(lambda text, _: reply("Verdict: A"))
    out = tmp_path / "out"
    rows = evaluate.main(
        args(
            run,
            judge=("reward", "tiny", server.address),
            judge_model="m",
            best_of=4,
            out=str(out),
        )
    )
    printed = capsys.readouterr().out
    assert len(rows) == 3 * 5  # SFT at temperature 1, greedy, best of 4; the run twice
    metrics = read_lines(run / "metrics.jsonl")
    for model, line in (("SFT", metrics[0]), ("first", metrics[-1])):
        row = by(rows, model=model, decoding="temperature 1", judge="reward")
        assert row["win_rate"]["value"] == pytest.approx(line["eval/win_rate"], abs=1e-9)
        assert row["kl"]["value"] == pytest.approx(line["eval/kl"], abs=1e-4)
        assert row["score"]["value"] == pytest.approx(line["eval/reward"], abs=1e-4)
        assert row["length"]["value"] == pytest.approx(line["eval/length"])
        assert row["ended"] == pytest.approx(line["eval/eos_rate"])
    assert metrics[-1]["eval/kl"] > 0.01
    for row in rows:
        assert row["win_rate"]["low"] <= row["win_rate"]["value"] <= row["win_rate"]["high"]
        assert ("kl" in row) == (row["decoding"] == "temperature 1")
    biased = by(rows, model="first", decoding="greedy", judge=server.address)
    assert biased["win_rate"]["value"] == 0.5 and biased["position_bias"] == 1
    best = by(rows, decoding="best of 4", judge="reward")
    assert best["kl_bound"] == math.log(4) - 3 / 4
    plain = by(rows, model="SFT", decoding="temperature 1", judge="reward")
    assert best["score"]["value"] > plain["score"]["value"] + 0.3
    written = json.loads((out / "eval.json").read_text())
    assert written["results"] == rows and written["prompts"] == 24 and "commit" in written
    assert (out / "table.md").read_text().strip() in printed
    assert (out / "picture.png").stat().st_size > 10_000
    outputs = json.loads((out / "outputs.json").read_text())
    assert {tuple(row) for row in outputs} == {("dataset", "instruction", "output", "generator")}
    assert len(outputs) == 6 * 24
    samples = read_lines(run / "samples.jsonl")
    last = {(x["prompt"], x["response"]) for x in samples if x["step"] == 2}
    ours = {
        (x["instruction"], x["output"]) for x in outputs if x["generator"] == "first, temperature 1"
    }
    assert ours == last
    assert "| first, greedy |" in (out / "samples.md").read_text()


@pytest.fixture(scope="module")
def loaded(run) -> tuple:
    """(flags, tokenizer, prompts, SFT model, its judge by reward) of the run."""
    flags = evaluate.shared_flags([str(run)])
    tokenizer = common.load_tokenizer("--policy", flags.policy)
    prompts = evaluate.read_prompts(0, flags, tokenizer)
    start = common.load_policy(SimpleNamespace(args=flags, device=CPU), tokenizer)
    return (
        flags,
        tokenizer,
        prompts,
        start,
        judges.score_judge("reward", flags, CPU, tokenizer, start),
    )


def test_greedy_takes_the_likeliest_token_each_time(loaded):
    """As a loop over the model's own logits does."""
    flags, _, prompts, start, _ = loaded
    batch = evaluate.sample(start, flags, prompts[:6], 1, evaluate.GREEDY, seed=1)
    for prompt, (response,) in zip(batch.prompts, batch.responses):
        ids = []
        while len(ids) < flags.max_response_tokens and (not ids or ids[-1] not in start.end_tokens):
            row = torch.tensor([prompt.tokens + ids])
            ids.append(start.module(row).logits[0, -1].argmax().item())
        assert response == ids


def test_the_best_of_n_has_the_highest_reward_of_the_samples(loaded):
    flags, _, prompts, start, judge = loaded
    answers = evaluate.best_of(8, start, judge.reward_model, flags, prompts[:8], seed=1)
    samples = evaluate.sample(start, flags, prompts[:8], 8, 1.0, seed=1)
    best = common.score(judge.reward_model, samples).max(1).values
    assert torch.allclose(common.score(judge.reward_model, answers.batch)[:, 0], best)
    assert (common.score(judge.reward_model, samples)[:, 0] < best).float().mean() > 0.5


def test_a_judge_is_a_folder_a_function_or_the_gold_score(loaded, tmp_path):
    """The runs' penalty for a cut response is in `reward`, and in no other judge."""
    flags, tokenizer, prompts, start, own = loaded
    samples = evaluate.sample(start, flags, prompts[:8], 2, 1.0, seed=1)
    ours, theirs = (samples.choose(torch.full((8, 1), i)) for i in (0, 1))
    ours.responses[0] = [ours.responses[0][0][:-1]]  # the first is cut
    (tmp_path / "f.py").write_text(
        "def f(prompts, responses): return [len(x) for x in responses]\n"
    )
    flags = SimpleNamespace(**vars(flags) | {"missing_eos_penalty": 100.0})

    def facts(name: str) -> dict:
        judge = judges.score_judge(name, flags, CPU, tokenizer, start)
        return judge.compare(ours, theirs)[1]

    folder, penalised = facts(flags.reward_model)["score"], facts("reward")["score"]
    assert penalised[1:] == folder[1:]
    assert penalised[0] == pytest.approx(folder[0] - 100)
    texts = [tokenizer.decode(group[0], skip_special_tokens=True) for group in theirs.responses]
    lengths = facts(f"{tmp_path / 'f.py'}:f")["reference_score"]
    assert lengths == pytest.approx([len(text) for text in texts], abs=1)  # a space in front
    gold = [tiny.gold_score(p.source, text) for p, text in zip(prompts, texts)]
    assert facts("tiny")["reference_score"] == pytest.approx(gold)


def refusal(capsys, *runs, **more) -> str:
    """What a refused evaluation says, in one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate.main(args(*runs, **more))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def like(run: Path, folder: Path, **flags) -> Path:
    """A run folder with other flags."""
    about = json.loads((run / "args.json").read_text())
    about["args"] |= flags
    (folder / "final").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(about))
    return folder


def test_bad_input_ends_in_one_line(run, tmp_path, capsys):
    assert "so it is no run folder" in refusal(capsys, tmp_path)
    other = like(run, tmp_path / "other", dataset="elsewhere.jsonl")
    said = refusal(capsys, run, other)
    assert f"{other}: its --dataset is elsewhere.jsonl, that of {run} is assets/tiny/data" in said
    said = refusal(capsys, run, like(run, tmp_path / "longer", max_response_tokens=7))
    assert "its --max-response-tokens is 7" in said
    unfinished = like(run, tmp_path / "unfinished")
    (unfinished / "final").rmdir()
    assert f"{unfinished}: it has no final/" in refusal(capsys, unfinished)
    assert "named twice" in refusal(capsys, run, run)
    assert "--best-of 1: must be 2 or more" in refusal(capsys, run, best_of=1)
    assert "--prompts 25: a run has held out 24" in refusal(capsys, run, prompts=25)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "args.json").write_text("{")
    assert "args.json is damaged" in refusal(capsys, tmp_path / "cut")


def test_a_bad_judge_ends_in_one_line_before_anything_is_sampled(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(common, "sample", None)  # of use to the check at load, and then no more
    monkeypatch.setattr(common, "choose_rows", lambda *_: None)
    out = {"out": str(tmp_path / "out")}
    said = refusal(capsys, run, judge=("llm:nowhere",), **out)
    assert "--judge llm:nowhere: no such folder of a model" in said
    said = refusal(capsys, run, judge=("http://127.0.0.1:1/v1",), **out)
    assert "name its model with --judge-model" in said
    more = {"judge_model": "m", "judge_key": "NO_SUCH_KEY"} | out
    said = refusal(capsys, run, judge=("http://127.0.0.1:1/v1",), **more)
    assert "--judge-key NO_SUCH_KEY: no such environment variable" in said
    assert "nowhere.py:f" in refusal(capsys, run, judge=("nowhere.py:f",), **out)


def test_missing_completions_are_named(run, tmp_path, capsys):
    rows = [{"prompt": f"write a review of the {x}. points to cover: cake. review:"} for x in "ab"]
    data = write_jsonl(tmp_path / "data.jsonl", rows * 4)
    said = refusal(capsys, like(run, tmp_path / "bare", dataset=data))
    assert f"--dataset {data}: the prompt 'write a review" in said and "has no completion" in said


def test_an_unreachable_address_leaves_the_results_of_other_judges(run, tmp_path, serve, capsys):
    """And so does one that answers nonsense."""
    server = serve(lambda *_: reply("I would rather not say."))
    more = {"judge_model": "m", "prompts": 4, "out": str(tmp_path)}
    for address, problem in (
        ("http://127.0.0.1:1/v1", "Connection refused"),
        (server.address, "none of its 8 answers is a verdict"),
    ):
        assert problem in refusal(capsys, run, judge=("reward", address), **more)
        rows = json.loads((tmp_path / "eval.json").read_text())["results"]
        assert len(rows) == 4 and {row["judge"] for row in rows} == {"reward"}
        assert (tmp_path / "table.md").exists() and (tmp_path / "outputs.json").exists()


def test_the_table_has_columns_of_verdicts_where_a_judge_gives_some():
    row = {"model": "m", "decoding": "d", "judge": "j", "ended": 1.0}
    row |= {key: {"value": 0.5, "low": 0.25, "high": 0.75} for key in ("win_rate", "length")}
    row["length_controlled"] = {"value": 0.4, "low": 0.1, "high": 0.7}
    bare = as_table([row | {"kl_bound": 1.5}])
    assert "at most 1.50" in bare and "0.40 (0.10 to 0.70)" in bare and "bias" not in bare
    facts = {"position_bias": -0.2, "agreement": 0.9, "unparsable": 0.05}
    assert as_table([row | facts]).splitlines()[-1].endswith("| -0.20 | 0.90 | 0.05 |")


# ── pictures ──
def write_run(folder: Path, script: str, seed: int, values: list[float], **flags) -> Path:
    """The folder of a run with these win rates, a step each."""
    flags = vars(brain.Args(seed=seed)) | flags
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": f"{script}.py", "args": flags}))
    lines = [
        {"step": i, **{key: value * (i + 1) for key in plot.CURVES}}
        | {key: 0.1 * (i + 1) for key in plot.PHASES}
        for i, value in enumerate(values)
    ]
    write_jsonl(folder / "metrics.jsonl", lines)
    return folder


def test_seeds_are_a_group_and_labels_have_the_flags_that_differ(tmp_path):
    runs = [
        write_run(tmp_path / "1", "brain", 1, [0.2, 0.4, 0.6]),
        write_run(tmp_path / "2", "brain", 2, [0.4, 0.6]),
        write_run(tmp_path / "3", "brain", 1, [0.3], lr=1e-3),
        write_run(tmp_path / "4", "wind", 1, [0.3]),
    ]
    groups = plot.read_groups([str(run) for run in runs])
    assert list(groups) == ["brain --lr 0.0005", "brain --lr 0.001", "wind"]
    assert [len(group) for group in groups.values()] == [2, 1, 1]
    means, least, largest = plot.over_seeds(groups["brain --lr 0.0005"], "eval/win_rate")
    assert [line["step"] for line in means] == [0, 1]  # which both runs have
    assert [line["eval/win_rate"] for line in means] == pytest.approx([0.3, 1.0])
    assert least == pytest.approx([0.2, 0.8]) and largest == pytest.approx([0.4, 1.2])


def test_the_pictures_show_what_the_runs_say(tmp_path):
    runs = [write_run(tmp_path / str(s), "brain", s, [0.2 * s, 0.3 * s]) for s in (1, 2)]
    groups = plot.read_groups([str(run) for run in runs])
    first = plot.draw_curves(groups).axes[0]
    assert first.lines[0].get_ydata() == pytest.approx([0.3, 0.9])
    assert len(first.collections) == 1  # the band
    assert first.get_legend().get_texts()[0].get_text() == "brain (2 seeds)"
    best = [{"n": n, "kl_bound": n / 8, "eval/reward": n, "eval/win_rate": n} for n in (1, 2)]
    reward, win_rate = plot.draw_frontier(groups, best).axes
    for axis in (reward, win_rate):
        assert [len(line.get_xdata()) for line in axis.lines] == [2, 2, 2]
        assert axis.lines[0].get_xdata() == pytest.approx([0.2, 0.6])
        assert axis.lines[2].get_xdata() == pytest.approx([1 / 8, 1 / 4])
    assert "KL at most" in reward.get_legend().get_texts()[-1].get_text()
    bars = plot.draw_phases(groups).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([0.15] * 3)
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.15, 0.3])
    assert {line.get_color() for line in first.lines} <= set(COLOURS)


def test_the_curve_of_the_best_of_n_begins_at_the_samples_themselves(run, loaded):
    """Of one: their mean reward and win rate; of more: higher, at a larger bound of the KL."""
    flags, tokenizer, prompts, start, judge = loaded
    best = plot.best_of_curve(evaluate.shared_flags([str(run)]), 6)
    assert [point["n"] for point in best] == [1, 2, 4]
    assert [point["kl_bound"] for point in best] == [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4]
    samples = evaluate.sample(start, flags, prompts, 6, 1.0, seed=1)
    texts = [[prompt.reference] for prompt in prompts]
    references = common.encode_responses(tokenizer, start, prompts, texts, 32)
    ours = common.score(judge.reward_model, samples)
    theirs = common.score(judge.reward_model, references)
    wins = (ours > theirs) + 0.5 * (ours == theirs)
    assert best[0]["eval/reward"] == pytest.approx(ours.mean().item(), abs=1e-4)
    assert best[0]["eval/win_rate"] == pytest.approx(wins.mean().item(), abs=1e-3)
    for key in ("eval/reward", "eval/win_rate"):
        assert best[0][key] < best[1][key] < best[2][key]


def test_plot_writes_pictures_with_the_best_of_n(run, tmp_path, capsys):
    out = plot.main(plot.Args(runs=[str(run)], best_of=4, out=str(tmp_path / "new" / "plots")))
    names = {
        f"{name}.{kind}" for name in ("curves", "frontier", "phases") for kind in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == names
    with pytest.raises(SystemExit):
        plot.main(plot.Args(runs=[str(tmp_path)]))
    assert "so it is no run folder" in capsys.readouterr().err


def test_pictures_have_colours_that_the_colour_blind_tell_apart(run):
    """Those of plumbing.report, which draws a run's own picture with the same two functions."""
    _, (first, second) = report.panels(1, 2, (4, 2))
    for _ in range(2):
        report.curve(first, read_lines(run / "metrics.jsonl"), "reward/mean")
        report.curve(first, read_lines(run / "metrics.jsonl"), "eval/kl")
    assert [line.get_color() for line in first.lines] == COLOURS[:4]
    assert [line.get_marker() for line in first.lines] == ["None", "o"] * 2
    assert [list(line.get_xdata()) for line in first.lines[:2]] == [[1, 2], [0, 2]]
    assert not second.lines


# ── the variance of a gradient estimate ──
EXPECTED = {  # μ: DPG, GDC++, BRAIn, and BRAIn's mean; n = 8
    0.0: (0.125, 0.555, 0.173, -0.766),
    0.5: (0.397, 0.354, 0.192, -0.847),
    1.0: (1.574, 1.199, 0.174, -0.767),
}


@pytest.mark.parametrize("mu", EXPECTED)
def test_the_closed_forms_and_brains_shrunken_mean(mu):
    dpg, gdc_plus, variance, shrunken = EXPECTED[mu]
    assert gradient_variance.closed_form("DPG", mu) == pytest.approx(dpg, abs=6e-4)
    assert gradient_variance.closed_form("GDC++", mu) == pytest.approx(gdc_plus, abs=6e-4)
    line = by(gradient_variance.measure(mu, seed=1), arm="BRAIn")
    assert line["variance"] == pytest.approx(variance, rel=0.03)
    assert line["mean"] == pytest.approx(shrunken, abs=0.006)


@pytest.mark.parametrize("mu", [0.0, 0.25, 0.5, 0.75])
def test_monte_carlo_matches_the_closed_forms_within_5_percent(mu):
    lines = gradient_variance.measure(mu, seed=2)
    assert lines[0]["repetitions"] == 100_000 and lines[0]["samples"] == 8
    for arm in ("DPG", "GDC++"):
        line = by(lines, arm=arm)
        assert line["variance"] == pytest.approx(line["closed_form"], rel=0.05)
        assert line["mean"] == pytest.approx(-1, abs=0.015)


def test_at_the_target_brains_gradients_are_zero_and_its_ablations_are_not():
    lines = gradient_variance.measure(1.0, seed=3, theta=0.0)
    for arm in ("BRAIn", "GDC++"):
        assert by(lines, arm=arm)["variance"] < 1e-20 and abs(by(lines, arm=arm)["mean"]) < 1e-10
    for arm in ("BRAIn, no-baseline", "BRAIn, no-self-norm"):
        assert by(lines, arm=arm)["mean"] == pytest.approx(0.233, abs=0.01)


def test_the_page_of_gradient_variance_is_that_of_its_raw_lines():
    lines = read_lines(gradient_variance.RESULTS)
    assert {line["arm"] for line in lines} == set(gradient_variance.ARMS)
    page = gradient_variance.ROOT / "docs" / "gradient_variance.md"
    assert gradient_variance.page(lines).strip() == page.read_text().strip()
