"""The five scripts side by side: one frame, few differences, the same behaviour around the method."""

import ast
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make_world
from safetensors.torch import load_file

import bond
import brain
import common
import dpo
import gdc
import prompts
import runlog
import shards
import wind
from analyze.differences import differing_lines

ROOT = Path(brain.__file__).parent
SCRIPTS = [brain, gdc, dpo, wind, bond]
NAMES = [script.__name__ for script in SCRIPTS]
VARIANTS = [
    (brain, {}),
    (brain, {"estimator": "no-self-norm"}),
    (brain, {"estimator": "no-baseline"}),
    (brain, {"refresh_every": 0}),
    (gdc, {"test_every": 2}),
    (gdc, {"proposal": "policy"}),
    (gdc, {"proposal": "sft", "normalizer": "running", "baseline": "none"}),
    (dpo, {}),
    (dpo, {"loss": "hinge"}),
    (dpo, {"loss": "slic"}),
    (dpo, {"pairs": "dataset"}),
    (wind, {"refresh_every": 2}),
    (wind, {"risk": "kl"}),
    (wind, {"risk": "nce"}),
    (bond, {}),
    (bond, {"gamma": 1.0, "updates_per_sample": 2}),
    (bond, {"anchor": "copy", "eta": 0.5, "anchor_samples": 3, "best_of": 3}),
    (bond, {"anchor": "fixed", "anchor_samples": 4, "best_of": 3}),
]
IDS = ["-".join([script.__name__, *map(str, more.values())]) for script, more in VARIANTS]
OWN_SECTIONS = ("models of the method", "sample", "targets", "renew", "log of the method")


def code_of(script) -> str:
    """Its source without the docstring."""
    return Path(script.__file__).read_text().split('"""', 2)[2]


def shared_parts(script) -> dict[str, str]:
    """What must be the same in all scripts, by name."""
    code = code_of(script)
    fields, rest = re.split(r"\n    # [A-Za-z]+\n", code[code.index("@dataclass") :], maxsplit=1)
    main = rest[rest.index("def main(") :]
    parts = re.split(r"\n *# ── (.+?) ──\n", main)
    sections = {"fields": fields, "head of main": parts[0]} | dict(zip(parts[1::2], parts[2::2]))
    start, end = (sections["sample"].index(x) for x in ("prompts =", "started = run.clock()"))
    own = [name for name in OWN_SECTIONS if name in sections]
    shared = {name: text for name, text in sections.items() if name not in own}
    shared["start of sample"] = sections["sample"][start:end]
    update = re.sub(
        r"\n +loss = .*?(?=\n +common\.require_finite\(loss)", "", sections["update"], flags=re.S
    )
    shared["update"] = re.sub(r"\n +with torch.no_grad\(\):.*?# \(8\)\n", "\n", update, flags=re.S)
    return {name: text.rstrip() for name, text in shared.items()}


# ── the frame ──
@pytest.mark.parametrize("script", SCRIPTS[1:], ids=NAMES[1:])
def test_shared_sections_are_byte_identical(script):
    """All but the docstring, imports, the method's fields and functions, its sections, its loss."""
    ours, theirs = shared_parts(brain), shared_parts(script)
    assert list(ours) == [name for name in theirs if name in ours] == list(theirs)
    for name in ours:
        assert theirs[name] == ours[name], name
    assert {"set up", "start", "score", "update", "log", "evaluate", "save", "finish"} <= set(ours)


def test_budgets():
    """A script ≤ 330 lines, any two ≤ 110 differing lines, common.py ≤ 500, nesting ≤ 4."""
    assert len(Path(common.__file__).read_text().splitlines()) <= 500
    assert len(dataclasses.fields(brain.Args)) <= 26
    for path in (x.__file__ for x in (common, prompts, runlog, shards)):
        source = Path(path).read_text()
        assert all(len(line) <= 100 for line in source.splitlines())
        assert "trust_remote_code" not in source
    for script in SCRIPTS:
        source = Path(script.__file__).read_text()
        assert len(source.splitlines()) <= 330, script
        assert all(len(line) <= 100 for line in source.splitlines()), script
        assert "trust_remote_code" not in source
    for first, second in itertools.combinations(SCRIPTS, 2):
        assert differing_lines(first.__name__, second.__name__) <= 110, (first, second)


@pytest.mark.parametrize("command", ["analyze.differences", "analyze.default_runs"])
def test_the_tables_of_the_readme_are_up_to_date(command):
    """The command that the README names prints the README's table."""
    done = subprocess.run(
        [sys.executable, "-m", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_data_flows_one_way(script):
    """A method imports common and runlog, never a method; these two import no method."""

    def imported(path):
        nodes = ast.walk(ast.parse(Path(path).read_text()))
        return {
            name
            for node in nodes
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }

    for path in (script.__file__, common.__file__, runlog.__file__):
        assert not imported(path) & (set(NAMES)) and "prepare" not in imported(path)


@pytest.mark.parametrize("path", ["common.py", "runlog.py"])
def test_what_is_shared_names_no_method(path):
    """No method, no β, no advantage; the embedded default is unknown as well."""
    source = (ROOT / path).read_text()
    assert not re.search(
        r"\b(brain|gdc|dpg|dpo|slic|wind|bond|beta|advantage|tiny)\b", source, re.I
    )


# ── flags ──
OWN_FLAGS = {
    "brain": ["beta", "estimator", "refresh_every"],
    "gdc": ["beta", "baseline", "normalizer", "proposal", "test_every"],
    "dpo": ["beta", "loss", "pairs", "margin", "reference_weight"],
    "wind": ["beta", "eta", "risk", "refresh_every"],
    "bond": ["anchor", "best_of", "anchor_samples", "jeffreys", "eta", "gamma"],
}
SHARED_FLAGS = """policy reward_model reward_eos dataset prompts_per_step samples_per_prompt
    max_prompt_tokens max_response_tokens temperature steps updates_per_sample micro_batch lr
    warmup_steps max_grad_norm dtype seed eval_every eval_prompts save_every run_dir resume
    track""".split()


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_set_of_flags_is_frozen_and_each_is_read(script):
    """A new flag needs a decision. A flag is an attribute that the code reads."""
    names = [field.name for field in dataclasses.fields(script.Args)]
    (body,) = [
        node.body
        for node in ast.parse(Path(script.__file__).read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(names) == len(
        [node for node in body if isinstance(node, ast.Expr)]
    )  # each has a text
    assert names == SHARED_FLAGS + OWN_FLAGS[script.__name__]
    sources = "".join(Path(x.__file__).read_text() for x in (script, common, prompts, runlog))
    for name in names:
        assert f"args.{name}" in sources, name


def test_same_flag_same_type():
    """--beta, --eta and --refresh-every have one type wherever they occur."""
    types = {}
    for script in SCRIPTS:
        for field in dataclasses.fields(script.Args):
            if field.name in ("beta", "eta", "refresh_every") or field.name in SHARED_FLAGS:
                assert types.setdefault(field.name, str(field.type)) == str(field.type)
    assert brain.Args().beta == gdc.Args().beta == dpo.Args().beta  # τ of the same target


def test_help_screens_differ_in_the_methods_flags_only():
    """Each fits a screen and a half at 100 columns, and has a text for each flag."""
    screens = {}
    for script in SCRIPTS:
        done = subprocess.run(
            [sys.executable, f"{script.__name__}.py", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"COLUMNS": "100", "PATH": ""},
        )
        assert len(done.stdout.splitlines()) <= 75, script
        flags = re.split(r"\n│ (?=--)", done.stdout)[1:]
        screens[script.__name__] = {
            text.split()[0].strip(","): re.sub(r"[│\s]+", " ", text) for text in flags
        }
    for name, texts in screens.items():
        assert all(len(text.split()) > 3 for text in texts.values())
        for flag in SHARED_FLAGS[:-1]:
            flag = "--" + flag.replace("_", "-")
            assert texts[flag] == screens["brain"][flag], (name, flag)


# ── equations ──
EQUATIONS = {"brain": 4, "gdc": 4, "dpo": 3, "wind": 5, "bond": 8}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_equation_tags_agree(script):
    """A number in the docstring stands at a line of code, and in the name of a test."""
    docstring, code = Path(script.__file__).read_text().split('"""', 2)[1:]
    numbered = set(re.findall(r"\((\d)\)$", docstring, re.M))
    tagged = set(re.findall(r"# \((\d)\)$", code, re.M))
    tests = (ROOT / "tests" / f"test_method_{script.__name__}.py").read_text()
    tested = set(re.findall(r"_eq(\d)", tests))
    assert tagged <= numbered == tested == set("12345678"[: EQUATIONS[script.__name__]])
    laws = {"bond": {"1", "2"}}.get(script.__name__, set())  # what a loss aims at, not computes
    assert numbered - tagged == laws


# ── behaviour ──
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a short run on random checkpoints; the data set holds pairs as well."""
    folder = tmp_path_factory.mktemp("siblings")
    args = make_world(folder)
    for split in ("train", "test"):
        path = folder / "data" / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"chosen": " good film", "rejected": " bad"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return vars(args)


def run(script, world, folder, **more):
    """Trains; the metrics but for times and memory, and the final weights."""
    script.main(
        script.Args(
            **(
                {name: value for name, value in world.items() if name in SHARED_FLAGS}
                | {"run_dir": str(folder)}
                | more
            )
        )
    )
    return read(folder)


def read(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "tokens_per", "memory/"))
        }
        for line in lines
    ]
    return lines, load_file(folder / "final" / "model.safetensors")


def documented() -> set[str]:
    """The keys of docs/metrics.md."""
    rows = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    return {row.split("`")[1] for row in rows if row.startswith("| `")}


def test_nothing_is_documented_that_no_script_logs(world, tmp_path):
    """The keys of the five scripts together are those of docs/metrics.md, no more and no less."""
    more = {gdc: {"test_every": 2}}
    keys = [
        set().union(*run(script, world, tmp_path / script.__name__, **more.get(script, {}))[0])
        for script in SCRIPTS
    ]
    left_out = {"time/sample_s", "time/score_s", "time/update_s", "tokens_per_s", "memory/peak_gib"}
    assert set().union(*keys) | left_out == documented()


@pytest.mark.parametrize("script, more", VARIANTS, ids=IDS)
def test_every_variant_runs_resumes_and_splits(world, tmp_path, script, more):
    """A run of 4 steps = 2 steps, stopped and resumed, bit for bit; = micro-batches of one prompt, but
    for rounding. Its metrics are documented."""
    lines, weights = run(script, world, tmp_path / "whole", **more)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    assert set().union(*lines) <= documented()

    stop, save = tmp_path / "stopped", runlog.Run.save

    def save_and_stop(self, step):
        save(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(script, world, stop, **more)
    script.main(runlog.parse_args(script.Args, ["--resume", str(stop)]))
    again, same = read(stop)
    assert again == lines
    assert all(torch.equal(weights[name], same[name]) for name in weights)

    split, near = run(script, world, tmp_path / "split", micro_batch=1, **more)
    for whole, parts in zip(lines, split, strict=True):
        assert whole.keys() == parts.keys()
        assert parts == pytest.approx(whole, rel=2e-3, abs=2e-4)
    for name in weights:
        torch.testing.assert_close(near[name], weights[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (gdc, {"beta": 0.0}, "--beta 0.0"),
        (gdc, {"test_every": 0}, "--test-every 0"),
        (gdc, {"samples_per_prompt": 1}, "--samples-per-prompt 1"),
        (dpo, {"beta": 0.0}, "--beta 0.0"),
        (dpo, {"samples_per_prompt": 1}, "--samples-per-prompt 1"),
        (wind, {"eta": 0.0}, "--eta 0.0"),
        (wind, {"refresh_every": 0}, "--refresh-every 0"),
        (wind, {"samples_per_prompt": 1}, "--samples-per-prompt 1"),
        (wind, {"beta": -1.0}, "--beta -1"),
        (wind, {"samples_per_prompt": 3, "risk": "kl"}, "--risk kl"),
        (bond, {"dtype": "bfloat16"}, "--dtype bfloat16"),
        (bond, {"jeffreys": 1.5}, "--jeffreys 1.5"),
        (bond, {"eta": 2.0}, "--eta 2.0"),
        (bond, {"best_of": 1}, "--best-of 1"),
        (bond, {"best_of": 3}, "--best-of 3"),
        (bond, {"anchor_samples": 3}, "--anchor ema"),
        (bond, {"anchor": "copy", "eta": 0.0}, "--eta"),
    ],
)
def test_flags_that_do_not_fit_the_method(world, tmp_path, capsys, script, flags, message):
    """One line, exit code 2, before anything is loaded, no run folder."""
    with pytest.raises(SystemExit) as stop:
        run(script, world | {"policy": "/no/such/folder"}, tmp_path / "run", **flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert message in error and not (tmp_path / "run").exists()


def test_equal_responses_have_equal_rewards(world):
    """Whatever their slots, to the last bit: or ties would be decided by rounding."""
    args = brain.Args(**{name: value for name, value in world.items() if name in SHARED_FLAGS})
    flags = runlog.Run(dataclasses.replace(args, run_dir=""), brain.__file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    policy = common.load_policy(flags, tokenizer)
    judge = common.load_reward_model(flags, policy, tokenizer)
    prompts = common.load_prompts(args, tokenizer)[0][:3]
    ids = [[[5, 6, 1], [7, 1], [5, 6, 1], [5, 6], [7, 1], [5, 6, 1]]] * 3
    batch = common.make_batch(prompts, [p.tokens for p in prompts], ids, policy.device)
    rewards = common.score(judge, batch)
    assert torch.equal(rewards[:, 0], rewards[:, 2]) and torch.equal(rewards[:, 0], rewards[:, 5])
    assert torch.equal(rewards[:, 1], rewards[:, 4]) and (rewards[:, 0] != rewards[:, 3]).all()
    alone = torch.cat(
        [
            common.score(
                judge,
                common.make_batch(
                    prompts,
                    [p.tokens for p in prompts],
                    [[group[i]] for group in ids],
                    policy.device,
                ),
            )
            for i in range(6)
        ],
        1,
    )
    torch.testing.assert_close(rewards, alone, atol=1e-5, rtol=1e-5)


def test_bug19_metrics_are_masked(world, tmp_path, monkeypatch):
    """On responses of unlike lengths, by hand: length, share that ended, entropy, KL of step 2."""
    seen, drawn = [], common.sample

    def sample(model, prompts, n, *more):
        batch, logprobs = drawn(model, prompts, n, *more)
        if n > 1:  # not an evaluation
            seen.append((batch, logprobs))
        return batch, logprobs

    monkeypatch.setattr(common, "sample", sample)
    lines, _ = run(
        gdc, world, tmp_path / "run", steps=2, proposal="policy", lr=0.05, warmup_steps=0
    )
    tokenizer = common.load_tokenizer("--policy", world["policy"])
    flags = runlog.Run(
        brain.Args(policy=world["policy"], max_prompt_tokens=16, max_response_tokens=6),
        brain.__file__,
    )
    ref = common.load_policy(flags, tokenizer)
    for line, (batch, _) in zip(lines[1:], seen, strict=True):
        rows = [
            tokens[mask].tolist()
            for tokens, mask in zip(
                batch.response_tokens.flatten(0, 1), batch.response_mask.flatten(0, 1)
            )
        ]
        assert len({len(row) for row in rows}) > 1
        assert line["length/mean"] == pytest.approx(sum(map(len, rows)) / len(rows))
        assert line["length/eos_rate"] == pytest.approx(
            sum(row[-1] == 1 for row in rows) / len(rows)
        )
    batch, logprobs = seen[1]
    ref_sum, count = 0.0, 0
    for prompt, group, masks in zip(batch.prompts, batch.response_tokens, batch.response_mask):
        for tokens, mask in zip(group, masks):
            ids = prompt.tokens + tokens[mask].tolist()
            with torch.no_grad():
                steps = ref(torch.tensor([ids])).logits[0].log_softmax(-1)
            ref_sum += sum(steps[i - 1, ids[i]].item() for i in range(len(prompt.tokens), len(ids)))
            count += 1
    assert lines[2]["kl/ref"] == pytest.approx((logprobs.sum().item() - ref_sum) / count, abs=2e-3)
    assert lines[2]["kl/ref"] > 0.01
