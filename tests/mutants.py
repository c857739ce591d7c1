"""Small faults, put into the code one at a time: each must make a test fail.

    python tests/mutants.py [WORD ...]    # only mutants whose file or text contains all words

A mutant is (file, old text, new text, tests, words): the tests, narrowed by the words as in
`pytest -k`, must notice. The old text must occur exactly once, so that the list cannot rot unseen.
Prints `killed N of N`; exit code 1 if one survives.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

_caches = tempfile.TemporaryDirectory(prefix="caches-")
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
               "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": _caches.name}

import datasets  # noqa: E402, F401 - what follows is imported once, for all mutants
import matplotlib.pyplot  # noqa: E402, F401
import pytest  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.gpt2.modeling_gpt2  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
CORE, SCRIPTS, PERFORMANCE = (f"tests/test_{name}.py" for name in ("core", "scripts", "performance"))
BRAIN, GDC, DPO, WIND, BOND = (f"tests/test_method_{name}.py"
                               for name in ("brain", "gdc", "dpo", "wind", "bond"))
RANKS = "tests/test_distributed.py"
BAD, FAULTS, FUZZ, SECURITY = (f"tests/test_{name}.py"
                               for name in ("bad_input", "faults", "fuzz", "security"))
RESUME = "tests/test_siblings.py::test_every_variant_runs_resumes_and_splits[{}]"
MUTANTS = [
    # brain.py
    ("brain.py", "ref_logprobs + rewards / beta", "ref_logprobs - rewards / beta", BRAIN, "eq1"),
    ("brain.py", "rewards / beta -", "rewards * beta -", BRAIN, "eq1"),
    ("brain.py", "beta - proposal_logprobs, dim=1)", "beta, dim=1)", BRAIN, "eq1"),
    ("brain.py", "proposal_logprobs, dim=1)  # (1)", "proposal_logprobs, dim=0)  # (1)", BRAIN, "eq1"),
    ("brain.py", "b = logprobs - proposal_logprobs", "b = logprobs", BRAIN, "eq"),
    ("brain.py", "log_softmax(b, dim=1)", "log_softmax(b, dim=0)", BRAIN, "eq"),
    ("brain.py", "- alpha * log_beta).sum(1)", "+ alpha * log_beta).sum(1)", BRAIN, "eq"),
    ("brain.py", "- alpha * log_beta).sum(1)", "- alpha * log_beta).mean(1)", BRAIN, "eq"),
    ("brain.py", "torch.xlogy(alpha, alpha)", "0 * alpha", BRAIN, "eq"),
    ("brain.py", "return -((alpha - raw)", "return ((alpha - raw)", BRAIN, "eq4"),
    ("brain.py", "b.exp().detach() / b.shape[1]", "b.exp().detach()", BRAIN, "eq4"),
    ("brain.py", "b.exp().detach()", "b.exp()", BRAIN, "eq4"),
    ("brain.py", 'if estimator == "no-self-norm" else', 'if estimator == "no-baseline" else', BRAIN,
     "eq4"),
    ("brain.py", "(loss.sum() / len(prompts))", "loss.mean()", BRAIN, "first"),
    ("brain.py", "args.lr * min(1.0, warm)", "args.lr", BRAIN, "first"),
    ("brain.py", '"optimizer": optimizer, "proposal"', '"proposal"', RESUME.format("brain"), ""),
    ("brain.py", ', "proposal": proposal}', "}", "tests/test_resume.py", "random_step"),
    ("brain.py", "(1 / alpha.square().sum(1))", "(1 / alpha.sum(1))", BRAIN, "step_1"),
    # gdc.py
    ("gdc.py", "ref_logprobs + rewards / beta - p", "ref_logprobs - rewards / beta - p", GDC, "eq1"),
    ("gdc.py", "return ref_logprobs + rewards / beta - proposal_logprobs",
     "return ref_logprobs + rewards / beta", GDC, "eq1"),
    ("gdc.py", " - math.log(log_w.shape[1])", "", GDC, "eq3"),
    ("gdc.py", "(logprobs.detach() - proposal_logprobs)", "(logprobs - proposal_logprobs)", GDC, "eq2"),
    ("gdc.py", "weights - (logprobs.detach()", "weights + (logprobs.detach()", GDC, "eq2"),
    ("gdc.py", "-(advantage * logprobs).mean(1)", "-(advantage * logprobs).sum(1)", GDC, "eq1"),
    ("gdc.py", "-(advantage * logprobs).mean(1)", "(advantage * logprobs).mean(1)", GDC, "eq1"),
    ("gdc.py", "- log_z.mean(-1)  # (4)", "+ log_z.mean(-1)  # (4)", GDC, "eq4"),
    ("gdc.py", "(log_target - logprobs)", "(log_target + logprobs)", GDC, "eq4"),
    ("gdc.py", "if closer := bool(kl[1] < kl[0]):", "closer = bool(kl[1] < kl[0])\n            if not closer:", GDC,
     "replaced"),
    ("gdc.py", "lerp_(mean, 1 / step)", "lerp_(mean, 0.5)", GDC, "running_normalizer"),
    ("gdc.py", '"sft": ref}', '"sft": policy}', GDC, "fixed_proposal"),
    ("gdc.py", '''"proposal": proposal,
                     "running": running})''', '"proposal": proposal})',
     RESUME.format("gdc-sft-running-none"), ""),
    # dpo.py
    ("dpo.py", "ratios[:, 0] - ratios[:, 1]", "ratios[:, 1] - ratios[:, 0]", DPO, "eq1"),
    ("dpo.py", ".where(~tied, 0.0)", "", DPO, "ties"),
    ("dpo.py", "-F.logsigmoid(", "F.logsigmoid(", DPO, "eq1"),
    ("dpo.py", "args.beta * delta)  # (1)", "delta)  # (1)", DPO, "eq1"),
    ("dpo.py", "F.relu(1 - args.beta * delta)", "F.relu(1 + args.beta * delta)", DPO, "eq2"),
    ("dpo.py", "- args.reference_weight", "+ args.reference_weight", DPO, "eq3"),
    ("dpo.py", 'logprobs if args.loss == "slic" else logprobs - ref_logprobs', "logprobs", DPO, "eq1"),
    ("dpo.py", "rewards.argmax(1), rewards.argmin(1)", "rewards.argmin(1), rewards.argmax(1)", DPO,
     "best_and_worst"),
    ("dpo.py", "prompt.chosen, prompt.rejected]", "prompt.rejected, prompt.chosen]", DPO, "pairs_of"),
    ("dpo.py", "rewards.amax(1) == rewards.amin(1)", "rewards.amax(1) != rewards.amin(1)", DPO,
     "first_loss and sampled"),
    ("dpo.py", "[[prompt.reference] for", "[[prompt.rejected] for", DPO, "slic_trains"),
    # wind.py
    ("wind.py", 'wins / n if risk == "square"', '(wins - 0.5) / (n - 1) if risk == "square"', WIND,
     "pairing"),
    ("wind.py", "(wins - 0.5) / (n - 1)  # (2)", "wins / n  # (2)", WIND, "eq2"),
    ("wind.py", "0.5 * (mine == theirs)", "1.0 * (mine == theirs)", WIND, "eq2"),
    ("wind.py", "mine > theirs", "mine < theirs", WIND, "eq2"),
    ("wind.py", "return args.beta * (logprobs - ref_logprobs) + log_step",
     "return args.beta * (logprobs - ref_logprobs) - log_step", WIND, "eq1"),
    ("wind.py", "log_step / args.eta", "log_step * args.eta", WIND, "eq1"),
    ("wind.py", ".square().mean(1)  # (3)", ".square().sum(1)  # (3)", WIND, "eq3"),
    ("wind.py", "(residual - residual.mean(1, keepdim=True))", "residual", WIND, "eq3"),
    ("wind.py", "(1 - win_rate) * smooth_log(1 - s)", "(1 + win_rate) * smooth_log(1 - s)", WIND, "eq4"),
    ("wind.py", "(smooth_log(2 * s) - odds) - odds)", "(smooth_log(2 * s) - odds) + odds)", WIND, "eq5"),
    ("wind.py", "s = psi + 0.5 - others", "s = psi + 0.5", WIND, "eq4"),
    ("wind.py", "+ z - z.square() / 2", "+ z + z.square() / 2", WIND, "smooth_log"),
    ("wind.py", "if step % args.refresh_every == 0:", "if False:", WIND, "renewed"),
    # bond.py
    ("bond.py", "anchor_rewards[:, None, :] <= rewards", "anchor_rewards[:, None, :] < rewards", BOND,
     "eq5"),
    ("bond.py", ".clamp(min=0.5 / below.shape[2])", "", BOND, "eq5"),
    ("bond.py", "rewards < anchor_rewards.amin", "rewards <= anchor_rewards.amin", BOND, "eq6"),
    ("bond.py", "anchor_rewards.amin(1", "anchor_rewards.amax(1", BOND, "eq6"),
    ("bond.py", "return -math.log(16)", "return math.log(16)", BOND, "eq6"),
    ("bond.py", "(count * mean - returns)", "count * mean", BOND, "eq4"),
    ("bond.py", "returns.numel() * run.world", "returns.numel()", BOND, "eq4"),
    ("bond.py", "forward = -anchors", "forward = anchors", BOND, "eq3"),
    ("bond.py", "backward = -(ours", "backward = (ours", BOND, "eq4"),
    ("bond.py", "+ args.gamma * hold", "- args.gamma * hold", BOND, "gamma_holds"),
    ("bond.py", "(1 - args.jeffreys) * forward + args.jeffreys * backward",
     "args.jeffreys * forward + (1 - args.jeffreys) * backward", BOND, "eq2"),
    ("bond.py", "weight.lerp_(new, args.eta)", "weight.lerp_(new, 1 - args.eta)", BOND, "eq8"),
    ("bond.py", "args.best_of].argmax(1)", "args.best_of].argmin(1)", BOND, "j_bond_reaches and 0.0"),
    ("bond.py", "(args.best_of - 1) * log_quantile", "args.best_of * log_quantile", BOND,
     "test_bond_reaches and 1.0"),
    ("bond.py", "advantages(run, quality - log_ratio)", "advantages(run, quality + log_ratio)", BOND,
     "j_bond_reaches and 1.0"),
    ("bond.py", "round(1 / args.eta)", "round(2 / args.eta)", BOND, "copy_renews"),
    ("bond.py", ', "anchor": anchor}', "}", RESUME.format("bond"), ""),
    # common.py
    ("common.py", "prompt_mask.sum(1, keepdim=True) + offset", "prompt_mask.shape[1] + 0 * "
     "prompt_mask.sum(1, keepdim=True) + offset", CORE, "bug02 and gpt2"),
    ("common.py", "(segment == 0)[:, None] | (segment[:, asking, None] == segment[:, None])",
     "(segment >= 0)[:, None]", CORE, "bug01 and llama"),
    ("common.py", "& own & valid[:, None]", "& own", CORE, "bug05"),
    ("common.py", "(behind >= 0) &", "(behind >= -1) &", CORE, "bug01 and llama"),
    ("common.py", "(behind >= 0) &", "", CORE, "bug01 and llama"),
    ("common.py", "behind < config.sliding_window", "behind <= config.sliding_window", CORE,
     "bug01 and mistral"),
    ("common.py", '{"full_attention": mask, "sliding_attention": near}',
     '{"full_attention": mask, "sliding_attention": mask}', CORE, "bug01 and gemma2"),
    ("common.py", "torch.tanh(states / cap) * cap if cap else states", "states", CORE,
     "bug01 and gemma2"),
    ("common.py", "logits if temperature == 1 else logits / temperature", "logits", CORE,
     "bug01 and llama"),
    ("common.py", "states[before[..., :-1][mask]]", "states[before[..., 1:][mask]]", CORE,
     "bug01 and llama"),
    ("common.py", "len(targets) * vocabulary > MOST_LOGITS", "False", CORE, "kept_or"),
    ("common.py", "max(FEWEST_ROWS, CHUNK // vocabulary)", "CHUNK", CORE, "kept_or"),
    ("common.py", "F.pad(mask[..., 1:], (0, 1)))", "mask)", PERFORMANCE, "no_slot"),
    ("common.py", "entropy = -torch.linalg", "entropy = torch.linalg", CORE, "bug01 and llama"),
    ("common.py", "lengths.cumsum(1) - lengths", "lengths.cumsum(1)", CORE, "bug01 and llama"),
    ("common.py", "offset[:-1].expand_as", "offset[1:].expand_as", CORE, "bug01 and llama"),
    ("common.py", "n / width * slots", "n * slots", PERFORMANCE, "cheapest"),
    ("common.py", "return self.keys[:, :, : new.stop]", "return self.keys", PERFORMANCE, "growing"),
    ("common.py", "_head(model, states) / temperature, dim=-1)", "_head(model, states), dim=-1)", CORE,
     "bug07 or bug08"),
    ("common.py", "cumulative = token_logprobs.exp()", "cumulative = (-token_logprobs).exp()", CORE,
     "bug07"),
    ("common.py", "u * cumulative[..., -1:], right=True", "u * cumulative[..., -1:]", PERFORMANCE,
     "a_draw_is"),
    ("common.py", " * (1 - 2**-52)", "", PERFORMANCE, "a_draw_is"),
    ("common.py", "part[1][:, -longest:]", "part[1]", PERFORMANCE, "a_part_of_a_batch"),
    ("common.py", "x.numel() > FEW_ROWS * self.in_features", "False", PERFORMANCE, "turned"),
    ("common.py", "out if self.bias is None else out + self.bias", "out", PERFORMANCE, "turned"),
    ("common.py", "self.in_features).T).T.contiguous()", "self.in_features).T)", PERFORMANCE, "turned"),
    ("common.py", "        turn_products(model)", "        pass", PERFORMANCE, "cpu_products"),
    ("common.py", "module.weight.numel() >= LARGE", "module.weight.numel() > 0", PERFORMANCE, "cpu_products"),
    ("common.py", "now & ~torch.isin(token, end)", "now & (token != end[0])", CORE, "bug04"),
    ("common.py", "row.shape[1] + t * width", "row.shape[1]", CORE, "bug08 and llama"),
    ("common.py", "view_as(now).where(now, 0.0)", "view_as(now)", CORE, "bug08"),
    ("common.py", "cache.batch_select_indices(stay)", "pass", PERFORMANCE, "rows_that_have_ended"),
    ("common.py", "generator=generator)\n        u = u[left]",
     "generator=generator)\n        u = u[: len(left)]", PERFORMANCE, "rows_that_have_ended"),
    ("common.py", "len(stay) <= (1 - MOST_ENDED) * len(left)", "False", PERFORMANCE, "rows_that_have_ended"),
    ("common.py", "batch.response_mask.sum(2, keepdim=True))[..., 0]]",
     "batch.response_mask.sum(2, keepdim=True) - 1)[..., 0]]", CORE, "bug12 and llama"),
    ("prompts.py", 'tokenizer(text, add_special_tokens=False)["input_ids"]\n    tokens',
     'tokenizer(text)["input_ids"]\n    tokens', SCRIPTS, "bug16"),
    ("common.py", "* judge.add_end", "", CORE, "bug13"),
    ("common.py", "closing * bool(end)", "closing", CORE, "bug13"),
    ("common.py", "if not judge.same_tokens:", "if False:", CORE, "bug13"),
    ("common.py", "return rewards.gather(1, (", "return rewards + 0 * rewards.gather(1, (",
     "tests/test_siblings.py", "equal_responses"),
    ("common.py", "model.to(run.device).eval()", "model.to(run.device).train()", CORE, "bug09"),
    ("prompts.py", "[rank::world]\n\ndef seed_of", "[rank:]\n\ndef seed_of", SCRIPTS, "bug22"),
    ("prompts.py", 'seed_of(args.seed, "order", lap)', 'seed_of(args.seed, "order")', SCRIPTS, "bug22"),
    ("prompts.py", "elif len(tokens) > args.max_prompt_tokens:", "elif False:", SCRIPTS, "dropped"),
    ("common.py", "use_safetensors=True", "use_safetensors=None", SCRIPTS, "pickle"),
    ("common.py", "+ 0.5 * (values", "+ 0.0 * (values", SCRIPTS, "ties"),
    ("prompts.py", "chosen if completion is None else completion, chosen", "completion, chosen", SCRIPTS,
     "every_format"),
    # runlog.py
    ("runlog.py", "weights = torch.softmax((logprobs - proposal_logprobs)",
     "weights = torch.softmax(0 * (logprobs - proposal_logprobs)", BRAIN, "kl_estimates"),
    ("runlog.py", "(ratio.exp() - 1 - ratio)", "(ratio.exp() - 1 + ratio)", BRAIN, "kl_estimates"),
    ("runlog.py", '["step"] > done', '["step"] > done + 1', SCRIPTS, "bug29"),
    ("runlog.py", "weights_only=True", "weights_only=False", SCRIPTS, "pickle_inside"),
    # several processes
    ("runlog.py", "dist.all_reduce(tensor := tensor.clone())", "tensor = tensor * 2", RANKS, ""),
    ("shards.py", "for module in (*blocks_of(model), model):", "for module in (model,):", RANKS, "every_block"),
    ("shards.py", "full.data = full.new_empty(0)", "pass", RANKS, "gathers_once"),
    ("runlog.py", "dist.all_gather_object(parts := [None] * self.world, samples)",
     "parts = [samples]", RANKS, "samples_are_all"),
    ("runlog.py", 'open(os.devnull, "w")', "sys.stdout", RANKS, "killed_rank"),
    ("common.py", '@through("whole")\n', "", RANKS, ""),
    ("common.py", '@through("blockwise")\ndef logprobs', "def logprobs", RANKS, ""),
    ("common.py", "[run.rank : equal : run.world]", "[run.rank :: run.world][:count]", RANKS, ""),
    ("common.py", "[:count].double()", ".double()", RANKS, "gradients_losses"),
    ("brain.py", "tokens = run.average(lengths.sum().float())", "tokens = lengths.sum().float()",
     RANKS, "gradients_losses"),
    ("gdc.py", "run.average(raw.clamp(max=MOST).mean())", "raw.clamp(max=MOST).mean()", RANKS,
     "gradients_losses"),
    ("runlog.py", "self._logs() if self.rank == 0 else ()", "()", SCRIPTS, "bug29"),
    ("runlog.py", "require(not archive.testzip()", "require(True", BAD, "damaged_checkpoint and bit"),
    ("runlog.py", 'saved.get("format") == FORMAT', "True", BAD, "damaged_checkpoint and older"),
    ("runlog.py", "require(not links", "require(True", FAULTS, "links"),
    ("runlog.py", "self.average(torch.tensor(float(self.interrupted), device=self.device))",
     "self.interrupted", FAULTS, "all_processes"),
    ("runlog.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN", FAULTS, "holds_its_folder"),
    ("runlog.py", "self.rank or args.resume or", "args.resume or", RANKS, "slow_rank"),
    ("runlog.py", "min(1.25, n) and not self.warned", "min(1.25, n)", FAULTS, "said_once"),
    ("runlog.py", "TIME_OUT_REMOTE_CODE = 0", "TIME_OUT_REMOTE_CODE = 9", SECURITY, "own_code"),
    ("brain.py", "common.require(grad_norm.isfinite(),", "common.require(True,", FAULTS,
     "changes_no_weight"),
    ("common.py", "if logprobs.requires_grad:", "if False:", FAULTS, "names_the_prompt"),
    # prompts.py
    ("prompts.py", "object_pairs_hook=_object", "object_pairs_hook=dict", FUZZ, "line_is_named"),
    ("prompts.py", "json.dumps(row, ensure_ascii=False).encode()", "pass", FUZZ, "line_is_named"),
    ("prompts.py", 'split(b"\\n"), 1)', 'split(b"\\n"), 0)', FUZZ, "line_is_named"),
    ("prompts.py", 'x.endswith(".jsonl")', "False", FUZZ, "line_is_named"),
]


def become(folder: str, words: list[str]) -> None:
    """`python -m pytest WORDS` in `folder`, in this process, up to its exit code."""
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path[0] = folder  # in place of this file's own folder
    code = 99
    try:
        code = pytest.main(["-x", "-p", "no:cacheprovider", *words])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Trial:
    """A mutant in a copy of the code, and its tests in a process forked from this one."""

    def __init__(self, mutant: tuple[str, str, str, str, str]):
        file, old, new, tests, words = mutant
        self.folder = tempfile.TemporaryDirectory()
        source = (ROOT / file).read_text()
        self.pid, self.wrong = 0, ""
        if source.count(old) != 1:
            self.wrong = f"the old text occurs {source.count(old)} times"
            return
        for name in ("tests", "docs", "prepare", "analyze", "benchmarks"):
            shutil.copytree(ROOT / name, Path(self.folder.name, name))
        for name in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
            shutil.copy(name, self.folder.name)
        Path(self.folder.name, file).write_text(source.replace(old, new))
        self.pid = os.fork()
        if self.pid == 0:
            become(self.folder.name, [tests, *["-k", words] * bool(words)])

    def end(self, code: int) -> None:
        """Notes what is wrong with the exit code: all but 1 (0: no test failed; else: none ran)."""
        if code != 1:
            output = Path(self.folder.name, "output").read_text()
            self.wrong = f"pytest ended with {code}: {output[-200:]}"


def main() -> None:
    """Tries all mutants, two at a time."""
    wanted = [m for m in MUTANTS if all(word in m[0] + m[1] for word in sys.argv[1:])]
    trials, running = [], {}
    while running or len(trials) < len(wanted):
        if len(running) < 2 and len(trials) < len(wanted):
            trials.append(Trial(wanted[len(trials)]))
            if trials[-1].pid:
                running[trials[-1].pid] = trials[-1]
        else:
            pid, status = os.wait()
            running[pid].end(os.waitstatus_to_exitcode(status))
            running.pop(pid).folder.cleanup()
    for (file, old, new, *_), trial in zip(wanted, trials, strict=True):
        if trial.wrong:
            print(f"SURVIVED ({trial.wrong}) {file}: {old!r} -> {new!r}")
    killed = sum(not trial.wrong for trial in trials)
    print(f"killed {killed} of {len(wanted)}")
    raise SystemExit(killed < len(wanted))


if __name__ == "__main__":
    main()
