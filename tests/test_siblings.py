"""The six scripts side by side: one frame, few differences, the same behaviour around the method."""

import ast
import dataclasses
import io
import itertools
import json
import re
import tokenize
from pathlib import Path

import pytest
import torch
import transformers
from models import make_world
from safetensors.torch import load_file

import bond
import brain
import common
import dpo
import gdc
import ppo
import wind
from analyze import differences
from analyze.differences import differing_lines

ROOT = Path(brain.__file__).parent
SCRIPTS = [brain, gdc, dpo, wind, bond, ppo]
NAMES = [script.__name__ for script in SCRIPTS]
VARIANTS = [  # the first of each script runs in plain `pytest`, the others in `pytest -m slow`
    (brain, {}),
    (gdc, {"test_every": 2}),
    (dpo, {"loss": "slic"}),
    (wind, {"refresh_every": 2}),
    (bond, {}),
    (ppo, {}),
]
MORE_VARIANTS = [
    (brain, {"estimator": "no-self-norm"}),
    (brain, {"estimator": "no-baseline"}),
    (brain, {"estimator": "arg-max", "refresh_every": 0}),
    (brain, {"refresh_every": 0}),
    (gdc, {"proposal": "policy"}),
    (gdc, {"proposal": "sft", "normalizer": "running", "baseline": "none"}),
    (dpo, {}),
    (dpo, {"loss": "hinge"}),
    (dpo, {"pairs": "dataset"}),
    (dpo, {"pairs": "policy"}),
    (wind, {"risk": "kl"}),
    (wind, {"risk": "nce"}),
    (wind, {"preference": "bradley-terry"}),
    (bond, {"gamma": 1.0, "updates_per_sample": 2}),
    (bond, {"anchor": "copy", "eta": 0.5, "anchor_samples": 3, "best_of": 3}),
    (bond, {"anchor": "fixed", "anchor_samples": 4, "best_of": 3}),
    (ppo, {"updates_per_sample": 2, "gae_lambda": 0.5}),
    (ppo, {"advantage": "rloo", "updates_per_sample": 2}),
]


def ids(variants) -> list[str]:
    return ["-".join([script.__name__, *map(str, more.values())]) for script, more in variants]


PLUMBING = sorted(ROOT.glob("plumbing/*.py"))
SHARED_FILES = [ROOT / "common.py", *PLUMBING]
PRODUCT = [*SHARED_FILES, *(ROOT / f"{name}.py" for name in NAMES)]
BUDGETS = {  # CONTRIBUTING.md and docs/shared_code.md quote these
    "lines of a script": 340,
    "lines of ppo.py": 345,
    "lines of a docstring": 35,
    "differing lines": 110,
    "differing lines of ppo.py": 120,
    "code lines of common.py": 617,
    "code lines of plumbing/": 1167,
    "tokens per line": 12,
    "lines of a function": 60,
}
TITLES = {brain: "BRAIn", gdc: "GDC", dpo: "DPO", wind: "WIND", bond: "BOND", ppo: "PPO"}
SHARED_SECTIONS = ("set up", "start", "score", "log", "evaluate", "save", "finish")
NO_TOKENS = {getattr(tokenize, x) for x in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()}


def code_of(script) -> str:
    """Its source without the docstring."""
    return Path(script.__file__).read_text().split('"""', 2)[2]


def shared_parts(script) -> dict[str, str]:
    """What must be the same in all scripts, by name."""
    before, main = code_of(script).split("\ndef main(")
    fields = before.split("class Args:\n")[1].split(f"    # {TITLES[script]}\n")[0]
    head, *parts = re.split(r" *# ── (.+) ──\n", main)
    sections = dict(zip(parts[::2], parts[1::2]))
    shared = {name: sections[name] for name in SHARED_SECTIONS}
    shared["fields"], shared["head of main"] = fields, head
    shared["start of sample"] = sections["sample"].split("started = ")[0]
    before_loss, behind = sections["update"].split("part_loss = ")
    behind = behind[behind.index("common.require_finite(") :]
    shared["update, before the loss"] = before_loss
    shared["update, behind the loss"] = behind.split('    if args.anchor == "ema":')[0]
    return {name: text.rstrip() for name, text in shared.items()}


def docstring_lines(path: Path) -> set[int]:
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(path: Path) -> list[int]:
    """The numbers of the lines that hold code: no blank lines, comments or docstrings."""
    docstrings = docstring_lines(path)
    lines = enumerate(path.read_text().splitlines(), 1)
    code = [number for number, line in lines if line.strip() and line.strip()[0] != "#"]
    return [number for number in code if number not in docstrings]


def tokens_per_line(path: Path) -> float:
    """Python's tokens per line of code."""
    docstrings = docstring_lines(path)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    at = [token.start[0] for token in tokens if token.type not in NO_TOKENS]
    at = [line for line in at if line not in docstrings]
    return len(at) / max(1, len(set(at)))


# ── the frame ──
@pytest.mark.parametrize("script", SCRIPTS[1:], ids=NAMES[1:])
def test_shared_sections_are_byte_identical(script):
    """All but the docstring, imports, the method's fields and functions, its sections, its loss."""
    ours, theirs = shared_parts(brain), shared_parts(script)
    for name in ours:
        assert ours[name] and theirs[name] == ours[name], name


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_sections_are_known_and_in_order(script):
    """What is not shared is the method's, and says so."""
    names = re.findall(r" *# ── (.+) ──\n", code_of(script).split("\ndef main(")[1])
    own = "models of the method, sample, targets, update, renew, log of the method".split(", ")
    order = [*SHARED_SECTIONS[:1], own[0], "start", "sample", "score", *own[2:5], "log", own[5]]
    order += ["evaluate", "save", "finish"]
    assert names == [name for name in order if name in names]
    assert set(names) >= {*SHARED_SECTIONS, *own} - {"renew"}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_budget_of_a_script(script):
    """ppo.py has a second loss and a value."""
    source = Path(script.__file__).read_text()
    most = BUDGETS["lines of ppo.py" if script is ppo else "lines of a script"]
    assert len(source.splitlines()) <= most
    assert ast.parse(source).body[0].end_lineno <= BUDGETS["lines of a docstring"]


@pytest.mark.parametrize("first, second", itertools.combinations(NAMES, 2))
def test_budget_of_differences(first, second):
    """ppo.py may differ in more lines: it has a second loss."""
    of_ppo = " of ppo.py" if "ppo" in (first, second) else ""
    assert differing_lines(first, second) <= BUDGETS[f"differing lines{of_ppo}"]


@pytest.mark.parametrize("name, paths", [("common.py", SHARED_FILES[:1]), ("plumbing/", PLUMBING)])
def test_budget_of_what_is_shared(name, paths):
    """Lines of code, of common.py and of plumbing/ in all; comments and docstrings are free."""
    assert sum(len(code_lines(path)) for path in paths) <= BUDGETS[f"code lines of {name}"]


@pytest.mark.parametrize("path", PRODUCT, ids=[str(path.relative_to(ROOT)) for path in PRODUCT])
def test_lines_are_not_dense(path):
    """At most 100 characters; tokens per line on average; no names unpacked from a generator.

    No function of common.py and plumbing/ is longer than a screen.
    """
    source = path.read_text()
    assert max(map(len, source.splitlines())) <= 100
    assert tokens_per_line(path) <= BUDGETS["tokens per line"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert not isinstance(node.value, ast.GeneratorExp), ast.unparse(node)
        if isinstance(node, ast.FunctionDef) and path in SHARED_FILES:
            assert node.end_lineno - node.lineno < BUDGETS["lines of a function"], node.name


def test_the_table_of_the_readme_is_up_to_date(capsys):
    """The command that the README names prints the README's table."""
    differences.main()
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text()


def imported(path: Path) -> set[str]:
    """The first names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", PRODUCT, ids=[str(path.relative_to(ROOT)) for path in PRODUCT])
def test_imports_go_one_way(path):
    """A script imports common, common imports plumbing, and none the other way or a script."""
    allowed = {"plumbing"} if path.name == "common.py" or path in PLUMBING else {"common"}
    project = {*NAMES, "common", "plumbing", "prepare", "analyze", "benchmarks"}
    assert imported(path) & project <= allowed


@pytest.mark.parametrize("path", SHARED_FILES, ids=[path.name for path in SHARED_FILES])
def test_what_is_shared_names_no_method(path):
    """No method, no β, no advantage; the embedded default is unknown as well."""
    methods = r"\b(brain|gdc|dpg|dpo|slic|wind|bond|ppo|rloo|beta|advantage|tiny)\b"
    assert not re.search(methods, path.read_text(), re.I)


# ── flags ──
OWN_FLAGS = {
    "brain": ["beta", "estimator", "refresh_every"],
    "gdc": ["beta", "baseline", "normalizer", "proposal", "test_every"],
    "dpo": ["beta", "loss", "pairs", "max_pair_tokens", "margin", "reference_weight"],
    "wind": ["beta", "eta", "preference", "risk", "refresh_every"],
    "bond": ["anchor", "best_of", "anchor_samples", "jeffreys", "eta", "gamma"],
    "ppo": ["beta", "advantage", "value_model", "gae_lambda", "clip", "value_weight"],
}
SHARED_FLAGS = """policy reward_model reward_eos missing_eos_penalty dataset template
    chat_template_kwargs prompts_per_step samples_per_prompt
    max_prompt_tokens max_response_tokens temperature cuda_graph steps updates_per_sample
    minibatches micro_batch lr
    warmup_steps lr_schedule weight_decay max_grad_norm dtype lora_rank checkpointing seed
    eval_every eval_prompts save_every run_dir resume
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
    sources = "".join(path.read_text() for path in (Path(script.__file__), *SHARED_FILES))
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
    assert ppo.Args().beta == brain.Args().beta  # β of the same target


def test_help_screens_differ_in_the_methods_flags_only(monkeypatch, capsys):
    """Each fits two screens at 100 columns, is grouped, and has a text for each flag."""
    screens = {}
    monkeypatch.setenv("COLUMNS", "100")
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            common.parse_args(script.Args, ["--help"])
        screen = capsys.readouterr().out
        assert len(screen.splitlines()) <= 100, script
        groups = re.findall(r"^\W*(\w+) options\W*$", screen, re.M)
        assert groups == ["data", "sampling", "optimisation", "run", TITLES[script]]
        texts = re.split(r"\n. (?=--)", screen)[1:]
        screens[script.__name__] = {
            text.split()[0].strip(","): re.sub(r"[│\s]+", " ", text)
            for text in texts  # box or none
        }
    for name, texts in screens.items():
        assert all(len(text.split()) > 3 for text in texts.values())
        for flag in SHARED_FLAGS[:-1]:
            flag = "--" + flag.replace("_", "-")
            assert texts[flag] == screens["brain"][flag], (name, flag)


# ── equations ──
EQUATIONS = {"brain": 4, "gdc": 4, "dpo": 3, "wind": 5, "bond": 8, "ppo": 5}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_equation_tags_agree(script):
    """A number in the docstring stands at a line of code, and in the name of a test."""
    docstring, code = Path(script.__file__).read_text().split('"""', 2)[1:]
    numbered = set(re.findall(r"\((\d)\)$", docstring, re.M))
    tagged = set(re.findall(r"# \((\d)\)$", code, re.M))
    tests = (ROOT / "tests" / f"test_method_{script.__name__}.py").read_text()
    tested = set(re.findall(r"_eq(\d)", tests))
    assert tagged <= numbered == tested == set("12345678"[: EQUATIONS[script.__name__]])
    laws = {"bond": {"2"}}.get(script.__name__, set())  # what a loss aims at, not computes
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
    """The keys of the six scripts together are those of docs/metrics.md, no more and no less."""
    more = {gdc: {"test_every": 2}}
    keys = [
        set().union(*run(script, world, tmp_path / script.__name__, **more.get(script, {}))[0])
        for script in SCRIPTS
    ]
    left_out = {"time/sample_s", "time/score_s", "time/update_s", "tokens_per_s", "memory/peak_gib"}
    assert set().union(*keys) | left_out == documented()


@pytest.mark.parametrize("script, more", VARIANTS, ids=ids(VARIANTS))
def test_a_variant_runs_resumes_and_splits(world, tmp_path, script, more):
    check_variant(world, tmp_path, script, more)


@pytest.mark.slow
@pytest.mark.parametrize("script, more", MORE_VARIANTS, ids=ids(MORE_VARIANTS))
def test_every_variant_runs_resumes_and_splits(world, tmp_path, script, more):
    check_variant(world, tmp_path, script, more)


def check_variant(world, tmp_path, script, more):
    """A run of 4 steps = 2 steps, stopped and resumed, bit for bit; = micro-batches of one prompt,
    but for rounding. Its metrics are documented."""
    lines, weights = run(script, world, tmp_path / "whole", **more)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    assert set().union(*lines) <= documented()

    stop, save = tmp_path / "stopped", common.Run.save

    def save_and_stop(self, step):
        save(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(script, world, stop, **more)
    script.main(common.parse_args(script.Args, ["--resume", str(stop)]))
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
        (ppo, {"gae_lambda": 1.5}, "--gae-lambda 1.5"),
        (ppo, {"clip": 0.0}, "--clip 0.0"),
        (ppo, {"advantage": "rloo", "samples_per_prompt": 1}, "--samples-per-prompt 1"),
        (ppo, {"advantage": "rloo", "value_model": "rm"}, "--value-model rm"),
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
    flags = common.Run(dataclasses.replace(args, run_dir=""), brain.__file__)
    tokenizer = common.load_tokenizer("--policy", args.policy)
    policy = common.load_policy(flags, tokenizer)
    reward_model = common.load_reward_model(flags, policy, tokenizer)
    prompts = common.load_prompts(args, tokenizer)[0][:3]
    group = [[5, 6, 1], [7, 1], [5, 6, 1], [5, 6], [7, 1], [5, 6, 1]]
    batch = common.Batch(prompts, [group] * 3)
    rewards = common.score(reward_model, batch)
    assert torch.equal(rewards[:, 0], rewards[:, 2]) and torch.equal(rewards[:, 0], rewards[:, 5])
    assert torch.equal(rewards[:, 1], rewards[:, 4]) and (rewards[:, 0] != rewards[:, 3]).all()
    parts = [common.Batch(prompts, [[response]] * 3) for response in group]
    alone = torch.cat([common.score(reward_model, part) for part in parts], 1)
    torch.testing.assert_close(rewards, alone, atol=1e-5, rtol=1e-5)


def test_bug19_metrics_are_masked(world, tmp_path, monkeypatch):
    """On responses of unlike lengths, by hand: length, share that ended, entropy, KL of step 2."""
    seen, drawn = [], common.sample

    def sample(model, prompts, n, *more, **named):
        batch = drawn(model, prompts, n, *more, **named)
        if n > 1:  # not an evaluation
            seen.append(batch)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(common, "sample", sample)
        more = {"steps": 2, "proposal": "policy", "lr": 0.05, "warmup_steps": 0}
        lines, _ = run(gdc, world, tmp_path / "run", **more)
    # Those of the steps, not the few of the check at load.
    seen = [batch for batch in seen if len(batch.prompts) == world["prompts_per_step"]]
    for line, batch in zip(lines[1:], seen, strict=True):
        rows = [response for group in batch.responses for response in group]
        assert len({len(row) for row in rows}) > 1
        ended = [row[-1] == 1 for row in rows]
        assert line["length/mean"] == pytest.approx(sum(map(len, rows)) / len(rows))
        assert line["length/eos_rate"] == pytest.approx(sum(ended) / len(rows))
    ref = transformers.AutoModelForCausalLM.from_pretrained(world["policy"])
    batch = seen[1]
    ref_sum, count = 0.0, 0
    for prompt, group in zip(batch.prompts, batch.responses):
        for response in group:
            ids = prompt.tokens + response
            with torch.no_grad():
                steps = ref(torch.tensor([ids])).logits[0].log_softmax(-1)
            ref_sum += sum(steps[i - 1, ids[i]].item() for i in range(len(prompt.tokens), len(ids)))
            count += 1
    logprobs = batch.sampled_logprobs.sum().item()
    assert lines[2]["kl/ref"] == pytest.approx((logprobs - ref_sum) / count, abs=2e-3)
    assert lines[2]["kl/ref"] > 0.01
