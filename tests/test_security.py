"""What SECURITY.md promises: no code from files, no network, no path from data, pinned versions."""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import WORDS, argv, model, refusal, save, word_tokenizer, word_world, write_jsonl

import brain

ROOT = Path(brain.__file__).parent
RUN = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]  # what a run executes
SOURCES = [*RUN, *ROOT.glob("prepare/*.py"), *ROOT.glob("analyze/*.py")]
CODE = """
import pathlib
pathlib.Path({witness!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def world(tmp_path):
    return word_world(tmp_path / "world") | {"--run-dir": str(tmp_path / "run")}


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_loads_a_pickle_or_runs_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
            assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {x.arg: ast.unparse(x.value) for x in node.keywords}
            assert name not in ("eval", "exec", "os.system", "__import__")
            assert "shell" not in options
            assert options.get("trust_remote_code", "False") == "False"
            assert name != "torch.load" or options["weights_only"] == "True"


def test_remote_code_and_pickled_weights_are_refused_wherever_a_checkpoint_is_read():
    """Left out, transformers would ask at a terminal; and it would take a pickle for weights."""
    calls = [
        (ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords})
        for path in RUN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) == 3  # a tokenizer, a configuration, a model
    for name, options in calls:
        assert options["trust_remote_code"] == "False"
        without_weights = name.startswith(("AutoTokenizer.", "AutoConfig."))
        assert without_weights or options["use_safetensors"] == "True"


def test_a_data_sets_own_code_is_not_run(world, tmp_path, capsys):
    """As `datasets` did once: a script named like its folder."""
    witness, folder = tmp_path / "witness", tmp_path / "own"
    write_jsonl(folder / "train.jsonl", [{"prompt": "the film"}] * 4)
    (folder / "own.py").write_text(CODE.format(witness=str(witness)))
    assert f"--dataset {folder}" in refusal(world | {"--dataset": str(folder)}, capsys)
    assert not witness.exists()


@pytest.mark.parametrize("flag", ["--policy", "--reward-model"])
def test_a_checkpoints_own_code_is_not_run_whatever_the_user_answers(
    world, tmp_path, monkeypatch, capsys, flag
):
    """transformers would ask at a terminal, and a yes would run it."""
    witness, folder, asked = tmp_path / "witness", tmp_path / "own", []
    save(folder, model("llama", word_tokenizer()), word_tokenizer())
    (folder / "own.py").write_text(CODE.format(witness=str(witness)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.Own",
            "AutoModelForSequenceClassification": "own.Own",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    assert f"{flag} {folder}" in refusal(world | {flag: str(folder)}, capsys)
    assert not asked and not witness.exists()


WATCHED = """
import os, runpy, sys
def hook(event, args):
    if event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__"):
        print("NETWORK", event, args, file=sys.stderr, flush=True)
        os._exit(77)
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(1, b"\\nWRITES %b\\n" % os.path.abspath(os.fsencode(args[0])))  # threads write as well
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_uses_no_network_and_writes_into_its_folder_alone(world, tmp_path):
    """Although nothing says that it is offline, and although the data asks for other paths."""
    hostile = ["../../escape", "/tmp/escape", "a/../../b", "~/.bashrc", "file:///etc/passwd"]
    rows = [{"prompt": f"{text} {word}", "completion": text} for text in hostile for word in WORDS]
    flags = world | {"--dataset": write_jsonl(tmp_path / "world" / "data.jsonl", rows)}
    (tmp_path / "caches").mkdir()
    caches = {
        name: str(tmp_path / "caches")
        for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "MPLCONFIGDIR", "TMPDIR")
    }
    env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | caches
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROOT / "brain.py"), *argv(flags)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-2000:]
    written = {Path(line[7:]) for line in done.stdout.splitlines() if line.startswith("WRITES ")}
    assert len(written) > 10
    allowed = [tmp_path / "run", tmp_path / "caches", Path("/dev")]
    outside = [
        path
        for path in written
        if "__pycache__" not in path.parts
        and not any(
            path.is_relative_to(folder) or str(path).startswith(f"{folder}.") for folder in allowed
        )
    ]
    assert not outside
    assert {path.name for path in tmp_path.iterdir()} == {"world", "run", "caches"}


@pytest.mark.slow
def test_the_hook_sees_a_connection(tmp_path):
    """Else the test above would show nothing."""
    script = tmp_path / "talks.py"
    script.write_text("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\n")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(script)], capture_output=True, text=True
    )
    assert done.returncode == 77 and "NETWORK" in done.stderr


def test_every_dependency_is_pinned_and_its_reason_given():
    """The table of SECURITY.md has the versions of requirements.txt, and all of them."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert all(re.fullmatch(r"[\d.]+", version) for version in pins.values())
    table = dict(
        re.findall(r"^\| `(\S+)` \| (\S+) \| .{10,} \|$", (ROOT / "SECURITY.md").read_text(), re.M)
    )
    assert table == pins
