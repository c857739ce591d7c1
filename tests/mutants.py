"""Small faults, put into the code one at a time: each must make a test fail.

    python tests/mutants.py [WORD ...]    # only mutants whose file or text contains all words
    python tests/mutants.py --part 2/4    # the second, sixth, tenth ... only

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
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_CACHE": _caches.name,
}

import datasets  # noqa: E402, F401 - what follows is imported once, for all mutants
import matplotlib.pyplot  # noqa: E402, F401
import pytest  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.gpt2.modeling_gpt2  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 10  # of the slowest mutants


def path_of(name: str) -> str:
    """The file of tests with this name."""
    return f"tests/test_{name}.py"


CORE, PERFORMANCE, PROPERTIES = path_of("core"), path_of("performance"), path_of("properties")
ARCHITECTURES, SCRIPTS, SIBLINGS = path_of("architectures"), path_of("scripts"), path_of("siblings")
BRAIN, GDC, DPO = path_of("method_brain"), path_of("method_gdc"), path_of("method_dpo")
WIND, BOND, PPO = path_of("method_wind"), path_of("method_bond"), path_of("method_ppo")
BAD, FAULTS, DATA, RESUMED, RANKS = (
    path_of("bad_input"),
    path_of("faults"),
    path_of("data"),
    path_of("resume"),
    path_of("distributed"),
)
GPU, MEMORY, GRAPH = path_of("gpu"), path_of("memory"), path_of("cuda_graph")
REAL, LAYOUT, TRAINING = path_of("real"), path_of("layout"), path_of("training")
BFLOAT16 = path_of("bfloat16")
PREPARE = path_of("prepare")
RECIPES = path_of("recipes")
EVALUATE = path_of("evaluate")
FRONT = path_of("front")
ABLATION = path_of("ablation")
DOCS = path_of("docs")
COMPARE = path_of("compare")
VIEW, COMPARISON = path_of("side_by_side"), path_of("comparison")
CHECKS = {  # of tests/ranks.py, by words: two processes that ran all of them would take a minute
    "every_block": "check_shards",
    "same_bits": "check_mixed",
    "final_is and gpt2": "check_runs",
    "gathers_once": "check_sampling",
    "gradients_losses": "check_runs",
    "gradients_losses and ppo": "check_runs",
    "no_pass_uses": "check_unused_weight",
    "only_rank_0": "check_runs check_log",
    "proposal_and_anchor": "check_runs",
    "samples_are_all": "check_log",
}
MUTANTS = [
    # brain.py
    ("brain.py", "update % args.minibatches * size", "0", TRAINING, "minibatches and variant0"),
    (
        "gdc.py",
        "size, args.micro_batch, first)",
        "size, args.micro_batch)",
        TRAINING,
        "minibatches",
    ),
    (
        "wind.py",
        "(part_loss.sum() / size)",
        "part_loss.mean()",
        TRAINING,
        "minibatches and variant3",
    ),
    ("bond.py", "if first == 0:", "if update == 0:", TRAINING, "minibatches and variant4"),
    (
        "ppo.py",
        "len(prompts) // args.minibatches",
        "len(prompts)",
        TRAINING,
        "minibatches and variant5",
    ),
    (
        "common.py",
        "updates_per_sample * args.minibatches",
        "updates_per_sample",
        TRAINING,
        "falls_over",
    ),
    ("plumbing/run.py", "(self.world * args.minibatches)", "self.world", BAD, "uneven"),
    ("brain.py", "ref_logprobs + rewards / beta", "ref_logprobs - rewards / beta", BRAIN, "eq1"),
    ("brain.py", "rewards / beta - proposal_logprobs", "rewards / beta", BRAIN, "eq1"),
    ("brain.py", "log_weights, dim=1)  # (1)", "log_weights, dim=0)  # (1)", BRAIN, "eq1"),
    ("brain.py", "log_weights.argmax(1)", "log_weights.argmin(1)", BRAIN, "arg_max"),
    (
        "brain.py",
        'if estimator in ("brain", "arg-max"):',
        'if estimator == "brain":',
        BRAIN,
        "arg_max_are_dpo",
    ),
    ("brain.py", "args.beta, args.estimator", "args.beta", BRAIN, "first_rung"),
    ("brain.py", "log_ratio = logprobs - proposal_logprobs", "log_ratio = logprobs", BRAIN, "eq"),
    ("brain.py", 'reduction="none").sum(1)', 'reduction="none").mean(1)', BRAIN, "eq"),
    (
        "brain.py",
        "F.kl_div(log_policy_weights, target_weights",
        "F.kl_div(target_weights.log(), log_policy_weights.exp()",
        BRAIN,
        "eq",
    ),
    (
        "brain.py",
        "return -((target_weights - baseline)",
        "return ((target_weights - baseline)",
        BRAIN,
        "eq4",
    ),
    (
        "brain.py",
        "log_ratio.exp().detach() / log_ratio.shape[1]",
        "log_ratio.exp().detach()",
        BRAIN,
        "eq4",
    ),
    ("brain.py", "log_ratio.exp().detach()", "log_ratio.exp()", BRAIN, "eq4"),
    (
        "brain.py",
        'if estimator == "no-self-norm" else',
        'if estimator == "no-baseline" else',
        BRAIN,
        "eq4",
    ),
    ("brain.py", "(part_loss.sum() / size)", "part_loss.mean()", BRAIN, "first"),
    ("brain.py", ', "proposal": proposal}', "}", RESUMED, "random_step"),
    (
        "brain.py",
        "1 / target_weights.square().sum(1)",
        "1 / target_weights.sum(1)",
        BRAIN,
        "step_1",
    ),
    ("brain.py", "grad_norm.isfinite(),", "True,", FAULTS, "changes_no_weight"),
    (
        "brain.py",
        "tokens = run.average(lengths.sum()).item()",
        "tokens = lengths.sum().item()",
        RANKS,
        "gradients_losses",
    ),
    # gdc.py
    (
        "gdc.py",
        "return ref_logprobs + rewards / beta",
        "return ref_logprobs - rewards / beta",
        GDC,
        "eq1",
    ),
    ("gdc.py", "rewards / beta - proposal_logprobs", "rewards / beta", GDC, "eq1"),
    ("gdc.py", "- math.log(log_w.shape[1])", "", GDC, "eq3"),
    ("gdc.py", "advantage = weights - (", "advantage = weights + (", GDC, "eq2"),
    (
        "gdc.py",
        "(logprobs.detach() - proposal_logprobs)",
        "(logprobs - proposal_logprobs)",
        GDC,
        "eq2",
    ),
    ("gdc.py", "return -(advantage * logprobs)", "return (advantage * logprobs)", GDC, "eq1"),
    ("gdc.py", "- log_z.mean(-1)  # (4)", "+ log_z.mean(-1)  # (4)", GDC, "eq4"),
    (
        "gdc.py",
        "            if kl_new < kl_old:",
        "            if kl_new > kl_old:",
        GDC,
        "replaced",
    ),
    (
        "gdc.py",
        "lerp_(mean_weight, 1 / step)",
        "lerp_(mean_weight, 0.5)",
        GDC,
        "running_normalizer",
    ),
    (
        "gdc.py",
        'if args.proposal == "policy" else ref',
        'if args.proposal == "sft" else ref',
        GDC,
        "fixed_proposal",
    ),
    (
        "gdc.py",
        "common.pick(train_prompts, step + 1,",
        "common.pick(train_prompts, step,",
        GDC,
        "come_next",
    ),
    (
        "gdc.py",
        'common.require_finite(raw_weights, "the weight", batch, "take a larger --beta")',
        "pass",
        GDC,
        "overflow",
    ),
    ("gdc.py", ', "running": running}', "}", SIBLINGS, "variant and gdc-sft-running"),
    (
        "gdc.py",
        "run.average(raw_weights.clamp(max=MOST).mean())",
        "raw_weights.clamp(max=MOST).mean()",
        RANKS,
        "gradients_losses",
    ),
    # dpo.py
    ("dpo.py", "ratios[:, 0] - ratios[:, 1]", "ratios[:, 1] - ratios[:, 0]", DPO, "eq1"),
    ("dpo.py", ".where(~tied, 0.0)", "", DPO, "ties"),
    ("dpo.py", "-F.logsigmoid(", "F.logsigmoid(", DPO, "eq1"),
    ("dpo.py", "args.beta * delta)  # (1)", "delta)  # (1)", DPO, "eq1"),
    ("dpo.py", "F.relu(1 - args.beta * delta)", "F.relu(1 + args.beta * delta)", DPO, "eq2"),
    ("dpo.py", "- args.reference_weight", "+ args.reference_weight", DPO, "eq3"),
    (
        "dpo.py",
        'logprobs if args.loss == "slic" else logprobs - ref_logprobs',
        "logprobs",
        DPO,
        "eq1",
    ),
    (
        "dpo.py",
        "rewards.argmax(1), rewards.argmin(1)",
        "rewards.argmin(1), rewards.argmax(1)",
        DPO,
        "best_and_worst",
    ),
    (
        "dpo.py",
        "        texts = [[prompt.chosen, prompt.rejected]",
        "        texts = [[prompt.rejected, prompt.chosen]",
        DPO,
        "pairs_of",
    ),
    (
        "dpo.py",
        "rewards.amax(1) == rewards.amin(1)",
        "rewards.amax(1) != rewards.amin(1)",
        DPO,
        "first_loss and sampled",
    ),
    ("dpo.py", 'policy if args.pairs == "policy" else ref', "ref", DPO, "who_draws"),
    ("dpo.py", 'if args.pairs == "policy":', "if False:", DPO, "kl_of_pairs"),
    ("dpo.py", "[[prompt.reference] for", "[[prompt.rejected] for", DPO, "slic_trains"),
    # wind.py
    (
        "wind.py",
        'wins / n if risk == "square"',
        '(wins - 0.5) / (n - 1) if risk == "square"',
        WIND,
        "pairing",
    ),
    ("wind.py", "(wins - 0.5) / (n - 1)  # (2)", "wins / n  # (2)", WIND, "eq2"),
    ("wind.py", "(gap.sign() + 1) / 2", "(gap > 0).to(gap)", WIND, "eq2"),
    ("wind.py", "gap.sigmoid() if", "(gap / 2).sigmoid() if", WIND, "eq2"),
    ("wind.py", "gap.sigmoid() if", "(-gap).sigmoid() if", WIND, "eq3_pairing"),
    ("wind.py", "args.risk, args.preference)", "args.risk)", WIND, "reaches and square"),
    (
        "wind.py",
        "(logprobs - ref_logprobs) + log_step",
        "(logprobs - ref_logprobs) - log_step",
        WIND,
        "eq1",
    ),
    ("wind.py", "log_step / args.eta", "log_step * args.eta", WIND, "eq1"),
    ("wind.py", ".square().mean(1)  # (3)", ".square().sum(1)  # (3)", WIND, "eq3"),
    ("wind.py", "(residual - residual.mean(1, keepdim=True))", "residual", WIND, "eq3"),
    (
        "wind.py",
        "(1 - win_rate) * smooth_log(1 - s)",
        "(1 + win_rate) * smooth_log(1 - s)",
        WIND,
        "eq4",
    ),
    (
        "wind.py",
        "(smooth_log(2 * s) - odds) - odds)",
        "(smooth_log(2 * s) - odds) + odds)",
        WIND,
        "eq5",
    ),
    ("wind.py", "s = psi + 0.5 - others", "s = psi + 0.5", WIND, "eq4"),
    ("wind.py", "+ z - z.square() / 2", "+ z + z.square() / 2", WIND, "smooth_log"),
    ("wind.py", "if step % args.refresh_every == 0:", "if False:", WIND, "renewed"),
    # bond.py
    ("bond.py", "(theirs <= mine)", "(theirs < mine)", BOND, "eq5"),
    ("bond.py", "(theirs < mine)", "(theirs <= mine)", BOND, "eq5"),
    (
        "bond.py",
        "(theirs <= mine).float().mean(2).clamp(min=least)",
        "(theirs <= mine).float().mean(2)",
        BOND,
        "eq5",
    ),
    (
        "bond.py",
        "(theirs < mine).float().mean(2).clamp(min=least)",
        "(theirs < mine).float().mean(2)",
        BOND,
        "eq5",
    ),
    ("bond.py", "(below / upto) ** i", "(below / upto) ** (i + 1)", BOND, "eq5"),
    ("bond.py", " + ties.log()  # (1)", "", BOND, "one_place and 0.5"),
    ("bond.py", "rewards < anchor_rewards.amin", "rewards <= anchor_rewards.amin", BOND, "eq6"),
    ("bond.py", "(count * mean - returns)", "count * mean", BOND, "eq4"),
    ("bond.py", "forward = -anchors", "forward = anchors", BOND, "eq3"),
    ("bond.py", "backward = -(ours", "backward = (ours", BOND, "eq4"),
    ("bond.py", "+ args.gamma * hold", "- args.gamma * hold", BOND, "gamma_holds"),
    (
        "bond.py",
        "(1 - args.jeffreys) * forward + args.jeffreys * backward",
        "args.jeffreys * forward + (1 - args.jeffreys) * backward",
        BOND,
        "eq2",
    ),
    ("bond.py", "weight.lerp_(new, args.eta)", "weight.lerp_(new, 1 - args.eta)", BOND, "eq8"),
    (
        "bond.py",
        "args.best_of].argmax(1)",
        "args.best_of].argmin(1)",
        BOND,
        "j_bond_reaches and 0.0",
    ),
    (
        "bond.py",
        "updates % round(1 / args.eta)",
        "step % round(1 / args.eta)",
        BOND,
        "copy_renews",
    ),
    (
        "bond.py",
        "rewards[:, n:], args.best_of)",
        "rewards[:, n:], args.best_of + 1)",
        BOND,
        "test_bond_reaches and 1.0",
    ),
    (
        "bond.py",
        "advantages(run, quality - log_ratio)",
        "advantages(run, quality + log_ratio)",
        BOND,
        "j_bond_reaches and 1.0",
    ),
    ("bond.py", ', "anchor": anchor}', "}", SIBLINGS, "a_variant and bond"),
    # ppo.py
    ("ppo.py", "kl_term = -beta * (", "kl_term = beta * (", PPO, "eq1"),
    ("ppo.py", "(logprobs - ref_logprobs)", "logprobs", PPO, "eq1"),
    (
        "ppo.py",
        "last = mask.sum(2, keepdim=True) - 1",
        "last = 0 * mask.sum(2, keepdim=True) + mask.shape[2] - 1",
        PPO,
        "eq1_the",
    ),
    ("ppo.py", "scatter_add(2, last, rewards", "scatter(2, last, rewards", PPO, "eq1"),
    ("ppo.py", "F.pad(values[:, :, 1:], (0, 1)) - values", "values - values", PPO, "eq2"),
    ("ppo.py", "(0, 1)) - values", "(0, 1)) + values", PPO, "eq2"),
    ("ppo.py", "in reversed(range(", "in (range(", PPO, "eq2"),
    ("ppo.py", "+= gae_lambda * advantage", "+= advantage", PPO, "eq2"),
    ("ppo.py", "* (advantage - mean)", "* advantage", PPO, "variance_1"),
    (
        "ppo.py",
        "sums = torch.stack([mask.sum(), exact.sum(), exact.square().sum()])",
        "sums = torch.stack([mask[0].sum(), exact[0].sum(), exact[0].square().sum()])",
        PPO,
        "variance_1",
    ),
    ("ppo.py", "[mask.sum(), exact", "[torch.tensor(mask.numel()), exact", PPO, "variance_1"),
    ("ppo.py", "return mask * (advantage", "return (advantage", PPO, "variance_1"),
    ("ppo.py", "mean**2 + 1e-8", "mean**2", PPO, "variance_1"),
    (
        "ppo.py",
        "= run.average(sums).tolist()",
        "= sums.tolist()",
        PPO,
        "all_processes",
    ),
    ("ppo.py", "(returns.shape[1] - 1)", "returns.shape[1]", PPO, "eq5"),
    ("ppo.py", "keepdim=True) - returns) /", "keepdim=True)) /", PPO, "eq5"),
    ("ppo.py", "return returns - others", "return others - returns", PPO, "eq5"),
    ("ppo.py", "return -torch.min(ratio", "return -torch.max(ratio", PPO, "eq3_clips"),
    ("ppo.py", "return -torch.min(ratio", "return torch.min(ratio", PPO, "eq3_where"),
    ("ppo.py", "near * advantage)", "ratio * advantage)", PPO, "eq3_clips"),
    ("ppo.py", "log_ratio = log_ratio.sum(2, keepdim=True)", "pass", PPO, "one_action"),
    ("ppo.py", "errors = torch.max(", "errors = torch.min(", PPO, "eq4"),
    (
        "ppo.py",
        "errors = torch.max((values - returns).square(), (near - returns).square())",
        "errors = (values - returns).square()",
        PPO,
        "eq4",
    ),
    ("ppo.py", 'models["value"] = value', "pass", PPO, "reaches and gae"),
    ("ppo.py", "returns = advantage + old_values", "returns = advantage", PPO, "ones_own"),
    ("ppo.py", "advantage = whitened(run, advantage, mask)", "pass", PPO, "gradient_of_a_step"),
    (
        "ppo.py",
        "run.average(mask.sum()) / len(prompts)",
        "mask.sum() / len(prompts)",
        RANKS,
        "gradients_losses and ppo",
    ),
    ("ppo.py", "part_loss /= actions", "part_loss /= n", PPO, "gradient_of_a_step"),
    # common.py: rows
    (
        "common.py",
        "(own | (segment == 0)[:, None])",
        "(own | (segment >= 0)[:, None])",
        CORE,
        "bug01 and llama",
    ),
    ("common.py", "<= place) &", "<= place + 1) &", CORE, "bug01 and llama"),
    ("common.py", "> place - model.window", ">= place - model.window", CORE, "bug01 and mistral"),
    ("common.py", "// 8) * 8", "// 1)", BFLOAT16, "begins_at"),
    (
        "common.py",
        '"sliding_attention": windowed}',
        '"sliding_attention": additive(visible)}',
        CORE,
        "bug01 and gemma2",
    ),
    (
        "common.py",
        "torch.tanh(logits / model.logit_cap) * model.logit_cap",
        "logits",
        CORE,
        "bug01 and gemma2",
    ),
    ("common.py", "logits = logits * model.logit_scale", "pass", ARCHITECTURES, "granite"),
    (
        "common.py",
        "range(length, length + len(response))",
        "range(length + 1, length + 1 + len(response))",
        PROPERTIES,
        "rows_hold",
    ),
    (
        "common.py",
        "before[1].extend(slots[:-1])",
        "before[1].extend(slots[1:])",
        CORE,
        "bug01 and llama",
    ),
    ("common.py", "segment=_pad(segment, -1,", "segment=_pad(segment, 0,", CORE, "bug05"),
    (
        "common.py",
        "or width * response <= most",
        "or width * response < most",
        PERFORMANCE,
        "rule_says",
    ),
    # common.py: log-probs
    ("common.py", "        logits = logits / temperature", "        pass", CORE, "bug01 and llama"),
    ("common.py", "entropy = -torch.linalg", "entropy = torch.linalg", CORE, "bug01 and llama"),
    ("common.py", "len(targets) * vocabulary > MOST_LOGITS", "False", CORE, "kept_or"),
    ("common.py", "logprobs, self.longest)", "logprobs)", PPO, "stand_as"),
    ("common.py", "torch.arange(self.longest) <", "torch.arange(self.longest) >=", PPO, "stand_as"),
    ("common.py", "states[rows.before].float()", "states[rows.before].float() * 2", PPO, "a_value"),
    # common.py: sampling
    (
        "common.py",
        "F.log_softmax(logits / temperature, dim=-1)",
        "F.log_softmax(logits, dim=-1)",
        CORE,
        "bug07 or bug08",
    ),
    ("common.py", "u, right=True)", "u)", PERFORMANCE, "a_draw_is"),
    ("common.py", " * (1 - 2**-52)", "", PERFORMANCE, "a_draw_is"),
    (
        "common.py",
        "torch.isin(rows.drawn[max(0, t - 8) : t], ends)",
        "(rows.drawn[max(0, t - 8) : t] == ends[0])",
        PERFORMANCE,
        "ended_leave",
    ),
    ("common.py", "rows.logprobs.where(up_to_first, 0)", "rows.logprobs", CORE, "bug08"),
    ("common.py", 'if device.type == "cpu" or t % 8 == 0:', "if True:", GPU, "short_run"),
    ("common.py", "rows.first + rows.t * width", "rows.first + width", CORE, "bug08 and llama"),
    (
        "common.py",
        "rows.mask[..., :filled]",
        "rows.mask[..., :width]",
        CORE,
        "bug08 and llama",
    ),
    (
        "common.py",
        "if not rows.model.window:",
        "if True:",
        CORE,
        "bug08",
    ),
    (
        "common.py",
        "which[stay].gather(1, kept)",
        "which[stay][:, :width]",
        PERFORMANCE,
        "ended_leave",
    ),
    ("common.py", "cache)[:, -1:]", "cache)", CORE, "last_token_only"),
    ("common.py", "u[:, rows]", "u[:, : len(prompts[rows])]", CORE, "at_once"),
    (
        "common.py",
        "micro_batches(len(prompts), model.most_prompts)",
        "[slice(None)]",
        CORE,
        "at_once",
    ),
    ("common.py", "DRAWN * run.args.micro_batch", "run.args.micro_batch", BFLOAT16, "micro_batch"),
    ("common.py", "batch, run.args.micro_batch)", "batch)", BFLOAT16, "micro_batch"),
    ("common.py", "if model.own_head and", "if False and", ARCHITECTURES, "falcon_h1"),
    ("plumbing/check.py", "(False, False), (False, True)", "(False, True)", ARCHITECTURES, "bloom"),
    (
        "common.py",
        'CHUNK if model.device.type == "cpu" else GPU_CHUNK',
        "CHUNK",
        BFLOAT16,
        "longer_chunks",
    ),
    ("common.py", "+ kept[:, None]", "+ kept[:1, None]", PERFORMANCE, "ended_leave"),
    (
        "common.py",
        "rows.position[stay].gather(1, slots)",
        "rows.position[stay][:, : slots.shape[1]]",
        PERFORMANCE,
        "ended_leave",
    ),
    ("common.py", "+ (rows.t - 1) * width", "+ rows.t * width", GRAPH, "draws_the_same"),
    (
        "common.py",
        "torch.tensor([rows.t], device=rows.u.device)",
        "rows.t",
        GRAPH,
        "draws_the_same",
    ),
    ("plumbing/check.py", "policy.cuda_graph = True", "pass", GRAPH, "is_refused"),
    ("plumbing/cache.py", "        self.graph.replay()", "        pass", GRAPH, "draws_the_same"),
    ("plumbing/run.py", "not self.args.cuda_graph or", "True or", GRAPH, "without_a_gpu"),
    ("plumbing/data.py", "self.limit > 0,", "True,", BAD, "no_room"),
    (
        "plumbing/cache.py",
        "return self.keys[:, :, :end]",
        "return self.keys",
        PERFORMANCE,
        "growing",
    ),
    ("plumbing/cache.py", "keys.to(values.dtype), values", "keys, values", BFLOAT16, "moves"),
    ("plumbing/cache.py", "key.shape[1], -1, size)", "-1, key.shape[1], size)", CORE, "bug08"),
    ("plumbing/cache.py", "    if groups == 1 or", "    if True or", BFLOAT16, "moves_weights"),
    ("common.py", "position[:, asking].repeat(1, groups)", "position[:, asking]", CORE, "bug08"),
    # a GPU's copies in bfloat16
    ("plumbing/models.py", "{} if exact or not model.mixed", "{} if True", BFLOAT16, "copies_hold"),
    ("plumbing/models.py", "{} if exact or not", "{} if not", BFLOAT16, "copies_hold"),
    (
        "plumbing/models.py",
        "weights.keys() - left_out}",
        "weights.keys()}",
        BFLOAT16,
        "copies_hold",
    ),
    ("plumbing/models.py", "head.weight = _in_bfloat16(head.weight)", "pass", BFLOAT16, "copies_h"),
    (
        "plumbing/models.py",
        "if cast and id(head.weight) not",
        "if id(head.weight)",
        BFLOAT16,
        "copy",
    ),
    (
        "plumbing/models.py",
        "        with model.autocast():\n",
        "        if True:\n",
        BFLOAT16,
        "moves",
    ),
    ("plumbing/models.py", "weight.requires_grad_(True)", "pass", BFLOAT16, "moves_weights"),
    ("plumbing/models.py", "weight.requires_grad_(False)\n", "pass\n", BFLOAT16, "copies_hold"),
    ("bond.py", 'frozen_copy(policy, args.anchor == "ema")', "frozen_copy(policy)", BOND, "exact"),
    ("plumbing/run.py", "enable_cudnn_sdp(False)", "enable_cudnn_sdp(True)", BFLOAT16, "no_plans"),
    (
        "plumbing/run.py",
        "except torch.OutOfMemoryError:",
        "except MemoryError:",
        BFLOAT16,
        "nothing_",
    ),
    # common.py: rewards, loading, evaluation
    (
        "common.py",
        "last[1].append(slots[-1])",
        "last[1].append(slots[-2])",
        CORE,
        "bug12 and llama",
    ),
    ("common.py", "ids + closing if end else ids", "ids + closing", CORE, "bug13"),
    ("common.py", "if reward_model.same_tokens and", "if", CORE, "bug13"),
    ("common.py", "same_tokens and text == prompt.text:", "same_tokens:", LAYOUT, "c1_both"),
    ("common.py", "[text.lstrip() for text in texts]", "texts", LAYOUT, "strips"),
    ("common.py", "[ids[:room] for ids in group]", "group", CORE, "cut_where"),
    ("common.py", "[row[:most] for row in closed]", "closed", DPO, "c7"),
    (
        "common.py",
        "min(max_tokens, policy.context - len(prompt.tokens))",
        "max_tokens",
        DPO,
        "c7",
    ),
    (
        "common.py",
        "rewards = rewards.gather(1, torch.tensor(first, device=rewards.device))",
        "pass",
        SIBLINGS,
        "equal_responses",
    ),
    ("common.py", "reward_model.missing_eos_penalty * was_cut", "0", LAYOUT, "d1_a_response"),
    ("common.py", "was_cut = ~batch.ended", "was_cut = batch.ended", LAYOUT, "d1_a_response"),
    ("common.py", "padding=True,", "padding=True, padding_side='left',", LAYOUT, "encoder"),
    ("common.py", "len(needed) > 2:", "len(needed) > 3:", LAYOUT, "function_gives"),
    (
        "common.py",
        "max_tokens=run.args.max_response_tokens)",
        "max_tokens=99)",
        LAYOUT,
        "d1_ref",
    ),
    (
        "common.py",
        'means.pop("won_squared") - means["win_rate"] ** 2',
        "0.0",
        PROPERTIES,
        "evaluation",
    ),
    ("common.py", 'won_and_ended / means["eos_rate"]', "won_and_ended", LAYOUT, "of_ended_samples"),
    ("common.py", "batch.sampled_logprobs - proposal_logprobs", "proposal_logprobs", LAYOUT, "b3"),
    ("common.py", "(left[1:] < n / 2)", "(left[1:] < n / 3)", LAYOUT, "e2"),
    ("common.py", 'f"{message}; {advice}" if advice else message', "message", BRAIN, "overflow"),
    (
        "common.py",
        'require_finite(rewards, "the reward", batch)',
        "pass",
        BAD,
        "reward_that_is_nan",
    ),
    (
        "plumbing/check.py",
        "        if gap <= allowed:",
        "        if True:",
        CORE,
        "ignores_a_4d_mask",
    ),
    ("plumbing/check.py", "MISTAKE = 1 / 3", "MISTAKE = 9.0", BFLOAT16, "finds_a_wrong_mask"),
    ("plumbing/check.py", "MISTAKE = 1 / 3", "MISTAKE = 1 / 300", BFLOAT16, "passes_another"),
    ("plumbing/check.py", "tokens[:1] + tokens[2:]", "tokens", BFLOAT16, "passes_another"),
    (
        "plumbing/check.py",
        "except torch.OutOfMemoryError:",
        "except MemoryError:",
        BFLOAT16,
        "nothing_about",
    ),
    ("plumbing/check.py", "enabled=rough", "enabled=False", BFLOAT16, "last_layer_alone"),
    (
        "common.py",
        "(reward > theirs) + 0.5 * (reward == theirs)",
        "float(reward > theirs)",
        SCRIPTS,
        "ties",
    ),
    ("common.py", "parts[:count]", "parts", RANKS, "gradients_losses"),
    (
        "common.py",
        "weights = torch.softmax((logprobs - proposal_logprobs)",
        "weights = torch.softmax(0 * (logprobs - proposal_logprobs)",
        BRAIN,
        "kl_estimates",
    ),
    ("common.py", "(ratio.exp() - 1 - ratio)", "(ratio.exp() - 1 + ratio)", BRAIN, "kl_estimates"),
    ("common.py", 'choose_rows("--value-model", name, value, _tried)', "pass", PPO, "ones_own"),
    # plumbing
    ("plumbing/models.py", "torch.nn.init.zeros_(module.score.weight)", "pass", PPO, "ones_own"),
    ("plumbing/models.py", "require(same, f", "require(True, f", PPO, "does_not_fit"),
    (
        "common.py",
        "if parameter.default is parameter.empty]",
        "]",
        LAYOUT,
        "gives_the_rewards",
    ),
    ("prepare/reward.py", "    pad_apart(tokenizer, model)", "    pass", PREPARE, "own_pooling"),
    ("plumbing/check.py", "require(gap < 1e-3, f", "require(True, f", LAYOUT, "unlike_single"),
    ("plumbing/models.py", "model.shared_rows = policy.shared_rows", "pass", PPO, "plain_rows"),
    (
        "plumbing/models.py",
        'info["missing_keys"] - ({"score.weight"} if new_head else set())',
        'info["missing_keys"] - {"score.weight"}',
        BAD,
        "cannot_be_used and score",
    ),
    ("plumbing/models.py", "module.to(device).eval()", "module.to(device).train()", CORE, "bug09"),
    (
        "plumbing/models.py",
        "if x.numel() > FEW_ROWS * inputs:",
        "if False:",
        PERFORMANCE,
        "cpu_products",
    ),
    (
        "plumbing/models.py",
        "out if self.bias is None else out + self.bias",
        "out",
        PERFORMANCE,
        "turned",
    ),
    ("plumbing/models.py", "use_safetensors=True", "use_safetensors=None", SCRIPTS, "pickle"),
    (
        "plumbing/models.py",
        "for module in (*blocks, model):",
        "for module in (model,):",
        RANKS,
        "every_block",
    ),
    (
        "plumbing/models.py",
        "part.set_reshard_after_forward(False, recurse=False)",
        "pass",
        RANKS,
        "gathers_once",
    ),
    (
        "plumbing/models.py",
        "part.set_reshard_after_forward(True, recurse=False)",
        "pass",
        RANKS,
        "gathers_once",
    ),
    ("plumbing/models.py", "part.reshard()", "pass", RANKS, "gathers_once"),
    (
        "plumbing/models.py",
        "    return shard(copied)",
        "    return copied",
        RANKS,
        "proposal_and_anchor",
    ),
    ("plumbing/data.py", "return picked[rank::world]", "return picked[rank:]", DATA, "bug22"),
    (
        "plumbing/data.py",
        'seed_of(args.seed, "order", epoch)',
        'seed_of(args.seed, "order")',
        DATA,
        "every_lap",
    ),
    ("plumbing/data.py", "if len(tokens) > self.limit:", "if False:", DATA, "dropped"),
    ("plumbing/data.py", "if length > self.reward_limit:", "if False:", LAYOUT, "c6"),
    (
        "plumbing/data.py",
        "except TemplateError as error:",
        "except OSError as error:",
        LAYOUT,
        "c6",
    ),
    ("plumbing/data.py", "_in_random_order(len(held_out), 0)", "range(len(held_out))", DATA, "d2"),
    ("plumbing/data.py", "len(held_out), 0)", "len(held_out), args.seed)", DATA, "d2"),
    (
        "plumbing/data.py",
        "for number in order if number not in held)",
        "for number in order)",
        DATA,
        "d2",
    ),
    ("plumbing/data.py", 'train.replace("train", "test")', "test[0]", DATA, "c8_a_split"),
    ("plumbing/data.py", "rows.remove_columns(hidden).rename", "rows.rename", DATA, "c8_a_split"),
    ("plumbing/data.py", "if has_template and not self.raw", "if has_template", LAYOUT, "c5_text"),
    (
        "plumbing/data.py",
        "first[0] in self.tokenizer.get_added",
        "first or self.tokenizer.get_added",
        LAYOUT,
        "c2_data",
    ),
    ("plumbing/data.py", "before = tokens[-1:]", "before = []", LAYOUT, "c9_text"),
    (
        "plumbing/data.py",
        "both[size:] if both[:size] == start else alone",
        "alone",
        LAYOUT,
        "c9_tokens",
    ),
    (
        "plumbing/data.py",
        "both[size:] if both[:size] == start else alone",
        "both[size:]",
        LAYOUT,
        "melts",
    ),
    (
        "plumbing/data.py",
        "[answer and answer.strip() for answer in answers]",
        "answers",
        LAYOUT,
        "strips",
    ),
    (
        "plumbing/run.py",
        "args.policy == args_class.policy or not missing",
        "True",
        LAYOUT,
        "e1_a_policy",
    ),
    (
        "dpo.py",
        "for p, (chosen, rejected) in zip(prompts, pairs.responses) if chosen != rejected]",
        "for p in prompts]",
        DPO,
        "c7",
    ),
    (
        "plumbing/data.py",
        "chosen if completion is None else completion, chosen",
        "completion, chosen",
        DATA,
        "format",
    ),
    (
        "plumbing/data.py",
        "return bare  # a template",
        "pass  # a template",
        DATA,
        "bug16",
    ),
    ("plumbing/run.py", '["step"] <= done', '["step"] <= done + 1', RESUMED, "between_log"),
    ("plumbing/run.py", "weights_only=True", "weights_only=False", SCRIPTS, "pickle_inside"),
    ("plumbing/run.py", "if archive.testzip():", "if False:", BAD, "damaged_checkpoint and bit"),
    (
        "plumbing/run.py",
        'saved.get("format") == FORMAT',
        "True",
        BAD,
        "damaged_checkpoint and older",
    ),
    (
        "plumbing/run.py",
        "self.average(torch.tensor(float(self.interrupted)))",
        "self.interrupted",
        FAULTS,
        "all_processes",
    ),
    ("plumbing/run.py", "self.lock.acquire()", "pass", FAULTS, "holds_its_folder"),
    ("plumbing/run.py", "self.rank > 0 or args.resume or", "args.resume or", RANKS, "slow_rank"),
    (
        "plumbing/run.py",
        "dist.all_gather_object(parts := [None] * self.world, samples)",
        "parts = [samples]",
        RANKS,
        "samples_are_all",
    ),
    ("plumbing/run.py", 'open(os.devnull, "w")', "sys.stdout", RANKS, "only_rank_0"),
    ("plumbing/run.py", "return tensor / self.world", "return tensor", RANKS, "samples_are_all"),
    ("plumbing/run.py", "whole.strict = False", "pass", RANKS, "no_pass_uses"),
    ("plumbing/run.py", "if id(weight) not in done:", "if True:", RANKS, "final_is and gpt2"),
    # what people train with
    (
        "common.py",
        "args.lr * min(1.0, update / warmup)",
        "args.lr * max(1.0, update / warmup)",
        TRAINING,
        "warms_up",
    ),
    ("common.py", "(behind - update) / max", "(behind - 1 - update) / max", TRAINING, "warms_up"),
    ("common.py", "1 - math.cos(math.pi", "1 + math.cos(math.pi", TRAINING, "warms_up"),
    (
        "plumbing/models.py",
        "if alone and not p.requires_grad}",
        "if False}",
        TRAINING,
        "copies_share",
    ),
    ("plumbing/models.py", "weight.data = weight.float()", "pass", TRAINING, "base_in_bfloat16"),
    (
        "plumbing/models.py",
        'torch.manual_seed(seed_of(args.seed, "adapters"))',
        "pass",
        TRAINING,
        "seed_only",
    ),
    ("plumbing/models.py", "2 * ((b @ a).T if", "1 * ((b @ a).T if", TRAINING, "merged and llama"),
    ("plumbing/models.py", "(b @ a).T if turned", "(b @ a) if turned", TRAINING, "merged and gpt2"),
    (
        "plumbing/models.py",
        "bits + torch.randint(",
        "bits + 0 * torch.randint(",
        TRAINING,
        "small_moves",
    ),
    (
        "plumbing/models.py",
        "checkpoint_wrapper(block, preserve_rng_state=False)",
        "block",
        TRAINING,
        "recomputed_gradients and llama",
    ),
    (
        "plumbing/models.py",
        "model.stored_dtype = config.dtype or torch.float32",
        "pass",
        TRAINING,
        "final_has_the_type",
    ),
    (
        "plumbing/models.py",
        "module.config.dtype = model.stored_dtype",
        "pass",
        TRAINING,
        "final_has_the_type",
    ),
    (
        "plumbing/models.py",
        "if id(weight) not in cast:",
        "if True:",
        TRAINING,
        "final_has_the_type",
    ),
    ("plumbing/run.py", "and value > saved.steps", "", TRAINING, "goes_on_after_a_stop"),
    (
        "plumbing/run.py",
        'shutil.rmtree(self.folder / "final", ignore_errors=True)',
        "pass",
        TRAINING,
        "steps_may_grow and brain",
    ),
    (
        "plumbing/run.py",
        '"run_dir": "", "steps": 0}',
        '"run_dir": ""}',
        TRAINING,
        "may_grow and brain",
    ),
    (
        "plumbing/run.py",
        "whole_weights(model, self.rank, frozen)",
        "whole_weights(model, self.rank)",
        TRAINING,
        "run_with_adapters and variant0",
    ),
    ("plumbing/run.py", "if missing:", "if False:", TRAINING, "lacks_a_weight"),
    (
        "plumbing/run.py",
        'args.dtype != "bfloat16" or args.lora_rank,',
        "True,",
        TRAINING,
        "pure_bfloat16 and brain",
    ),
    (
        "plumbing/data.py",
        "picked, orders = [], {0: prompts}",
        "picked, orders = [], {}",
        TRAINING,
        "steps_may_grow and brain",
    ),
    (
        "analyze/export.py",
        'policy.state_dict() | saved["policy"]',
        "policy.state_dict()",
        TRAINING,
        "export_makes",
    ),
    # what a GPU holds, and what it is asked
    ("analyze/memory.py", "if batch.passes > 1:", "if False:", MEMORY, "adds and gradients"),
    ("analyze/memory.py", "if batch.passes > 1:", "if True:", MEMORY, "adds and gradients"),
    ("analyze/memory.py", "max(5 * 4 * here, backward)", "3 * 4 * here", MEMORY, "adds and few"),
    ("analyze/memory.py", "4 * (logits - here) * kept", "0", MEMORY, "adds and many"),
    ("analyze/memory.py", "setup.frozen * matrices", "setup.weight * matrices", MEMORY, "frozen"),
    ("analyze/memory.py", "setup.weight * rest", "setup.frozen * rest", MEMORY, "frozen"),
    ("analyze/memory.py", "(1 - FREE) * size", "(1 + FREE) * size", MEMORY, "tables"),
    (
        "prepare/sft.py",
        "return -logprobs / tokens",
        "return logprobs / tokens",
        PREPARE,
        "sft_loss",
    ),
    ("prepare/sft.py", "lr = common.step_size(args, step)", "lr = args.lr", PREPARE, "cosine"),
    ("prepare/sft.py", "torch.cat(parts)[:count]", "torch.cat(parts)", PREPARE, "two_processes"),
    (
        "prepare/sft.py",
        "tokens = run.average(lengths.sum()).item()",
        "tokens = lengths.sum().item()",
        PREPARE,
        "two_processes",
    ),
    ("prepare/reward.py", "F.logsigmoid(chosen", "F.logsigmoid(-chosen", PREPARE, "eq2"),
    ("prepare/reward.py", "(chosen + rejected) ** 2", "(chosen - rejected) ** 2", PREPARE, "eq2"),
    ("prepare/reward.py", "torch.sigmoid(rewards", "torch.sigmoid(-rewards", PREPARE, "eq2"),
    ("prepare/reward.py", "0.5 + 0.5 * torch.sign", "torch.sign", PREPARE, "eq2"),
    ("prepare/reward.py", "part_rewards, args.center)", "part_rewards)", PREPARE, "centred"),
    (
        "prepare/reward.py",
        "read = common._as_read_by(reward_model, batch[rows])",
        "read = batch[rows]",
        PREPARE,
        "formats",
    ),
    (
        "prepare/reward.py",
        "(part_loss.sum() / len(prompts)).backward()",
        "part_loss.mean().backward()",
        PREPARE,
        "splits and reward",
    ),
    (
        "prepare/reward.py",
        "rewards = run.world * run.average(rewards)",
        "rewards = run.average(rewards)",
        PREPARE,
        "two_processes",
    ),
    ("prepare/parts.py", "pool = sorted(pool, key=size)", "pool = list(pool)", PREPARE, "epoch"),
    ("prepare/parts.py", "[place - first]", "[0]", PREPARE, "epoch"),
    ("prepare/parts.py", "if epoch:  # they", "if False:  # they", PREPARE, "epoch"),
    ("prepare/parts.py", "draw.sample(starts, len(starts))", "starts", PREPARE, "epoch"),
    ("prepare/parts.py", "-(-len(prompts) // run", "(len(prompts) // run", PREPARE, "shares"),
    ("prepare/parts.py", "if prompt.chosen != prompt.rejected", "", PREPARE, "without_what"),
    ("prepare/parts.py", "init.zeros_(score", "init.ones_(score", PREPARE, "fresh_score"),
    ("prepare/parts.py", "module.peft_config = lm.peft_config", "pass", PREPARE, "final_scores"),
    ("prepare/parts.py", "(preferred, 1 - preferred)", "(preferred, preferred)", PREPARE, "calib"),
    ("prepare/parts.py", " + 0.5 * (preferred == 0.5)", "", PREPARE, "calib"),
    (
        "common.py",
        "model.own_head and not model.scores_tokens",
        "model.own_head",
        PREPARE,
        "fresh",
    ),
    ("plumbing/data.py", "if args.reward_model and not", "if not", PREPARE, "cosine"),
    ("plumbing/run.py", "* bool(args.reward_model)", "", PREPARE, "test_flags"),
    ("plumbing/run.py", "if place == ROOT else", "if True else", PREPARE, "how_to_go_on"),
    ("plumbing/run.py", 'any(name.startswith("eval/") for', "any(False for", PREPARE, "cosine"),
    ("plumbing/report.py", "if any(key in line for line in lines)]", "]", PREPARE, "picture"),
    ("plumbing/report.py", "visible=bool(keys)", "visible=not keys", PREPARE, "picture"),
    ("analyze/export.py", 'about["script"] == "reward.py"', "False", PREPARE, "export and reward"),
    ("prepare/real.py", "    if count:", "    if False:", PREPARE, "real_policy"),
    ("prepare/real.py", "require(found == sha256,", "require(True,", REAL, "another_file"),
    ("prepare/real.py", '["gemma"] * args.accept_gemma_terms', '["gemma"]', REAL, "gemma_only"),
    ("prepare/real.py", '.with_name(folder.name + ".new")', "", REAL, "whole_or_not"),
    ("prepare/texts.py", "if review.prompt not in seen", "", REAL, "splits"),
    ("prepare/texts.py", "prompts_of(reviews[TRAINED:], ", "prompts_of(reviews, ", REAL, "splits"),
    (
        "plumbing/models.py",
        "s(module.base_model, args)",
        "s(module, args)",
        TRAINING,
        "value_below",
    ),
    ("analyze/hours.py", "(forward + 2.5) * pairs", "(forward + 2) * pairs", RECIPES, "operations"),
    ("analyze/hours.py", "batch.prompts * (blocks", "(blocks", RECIPES, "operations"),
    ("analyze/hours.py", "setup.rank else 2", "setup.rank else 1", RECIPES, "operations"),
    ("prepare/texts.py", "lambda review: -rev", "lambda review: rev", PREPARE, "tell_apart"),
    ("prepare/texts.py", ">= LEAST_GAP", "> 0", PREPARE, "tell_apart"),
    ("prepare/texts.py", "(reviews[HELD_OUT:TRAINED],", "(reviews,", PREPARE, "chain_reads"),
    ("prepare/texts.py", "and not told", "", PREPARE, "descriptions"),
    ("prepare/texts.py", "opening not in openings and", "", PREPARE, "descriptions"),
    ("prepare/real.py", "y.mean() - x.mean(0) @ weight", "y.mean()", REAL, "ridge"),
    ("prepare/real.py", "ratings[:, None] - ratings > 1", "ratings[:, None] > ratings", REAL, ""),
    # analyze/: judges, intervals, evaluations, pictures, the variance of a gradient
    (
        "analyze/judges.py",
        "found = VERDICT.fullmatch(",
        "found = VERDICT.search(",
        EVALUATE,
        "last_line",
    ),
    ("analyze/judges.py", "lines[-1].strip()", "lines[0].strip()", EVALUATE, "last_line"),
    (
        "analyze/judges.py",
        "[Question(prompt, theirs, ours)",
        "[Question(prompt, ours, theirs)",
        EVALUATE,
        "order or perfect",
    ),
    ("analyze/judges.py", '("B", "A"): 0.0', '("B", "A"): 1.0', EVALUATE, "perfect"),
    (
        "analyze/judges.py",
        '2 * named.count("A") / len(named) - 1',
        'named.count("A") / len(named)',
        EVALUATE,
        "order_alone or perfect",
    ),
    (
        "analyze/judges.py",
        "1 - len(named) / len(answers)",
        "1 - len(named) / len(pairs)",
        EVALUATE,
        "pair_ties",
    ),
    ("analyze/judges.py", "        named,\n", "        True,\n", EVALUATE, "nonsense_ends"),
    (
        "analyze/judges.py",
        "float(a > b) + 0.5 * (a == b)",
        "float(a >= b)",
        EVALUATE,
        "equal_scores",
    ),
    (
        "analyze/judges.py",
        '"A" if a > b else "B"',
        '"B" if a > b else "A"',
        EVALUATE,
        "likelier_letter",
    ),
    ("analyze/judges.py", "if a + b < LEAST:", "if False:", EVALUATE, "something_else"),
    (
        "analyze/judges.py",
        "if len(prompt.tokens) < self.model.context",
        "if True",
        EVALUATE,
        "longer_than",
    ),
    ("analyze/judges.py", 'x["model"] == self.model', "True", EVALUATE, "asked_once"),
    ("analyze/judges.py", "code < 500 and code != 429", "False", EVALUATE, "busy"),
    ("analyze/judges.py", "        if self.key:\n", "        if True:\n", EVALUATE, "asked_once"),
    ("analyze/intervals.py", "[0.025, 0.975]", "[0.1, 0.9]", EVALUATE, "bootstrap"),
    (
        "analyze/intervals.py",
        "size=(RESAMPLES, count)",
        "size=(RESAMPLES, count // 2)",
        EVALUATE,
        "bootstrap",
    ),
    (
        "analyze/intervals.py",
        "weights = weights + numpy",
        "weights = weights - numpy",
        EVALUATE,
        "eq1",
    ),
    (
        "analyze/intervals.py",
        "x = numpy.tanh(gaps / ",
        "x = numpy.tanh(-0 * gaps / ",
        EVALUATE,
        "eq1",
    ),
    ("analyze/intervals.py", "spread, numpy.inf)", "spread, 1)", EVALUATE, "eq1"),
    ("analyze/intervals.py", "math.comb(i, n - 1)", "math.comb(i, n)", EVALUATE, "subsets"),
    (
        "analyze/intervals.py",
        "take_along_axis(values, rewards.argsort(1), 1)",
        "take_along_axis(values, values.argsort(1), 1)",
        EVALUATE,
        "subsets",
    ),
    ("analyze/evaluate.py", "GREEDY = 1e-30", "GREEDY = 0.3", EVALUATE, "greedy_takes"),
    (
        "analyze/evaluate.py",
        "rewards.argmax(1, keepdim=True)",
        "rewards.argmin(1, keepdim=True)",
        EVALUATE,
        "best_of_n_has",
    ),
    (
        "analyze/evaluate.py",
        "(kl - common.logprobs(start,",
        "(kl - common.logprobs(policy,",
        EVALUATE,
        "own_evaluation",
    ),
    ("analyze/evaluate.py", "require(ours == theirs,", "require(True,", EVALUATE, "bad_input"),
    ("analyze/evaluate.py", "prompt.reference is not None", "True", EVALUATE, "missing"),
    (
        "analyze/intervals.py",
        "math.log(n) - (n - 1) / n",
        "math.log(n)",
        EVALUATE,
        "own_evaluation",
    ),
    (
        "analyze/plot.py",
        "if all(step in other for other in values)",
        "if step in values[0]",
        EVALUATE,
        "seeds_are",
    ),
    (
        "analyze/judges.py",
        '"reward_model": name, "missing_eos_penalty": 0.0',
        '"reward_model": name',
        EVALUATE,
        "folder_a_function",
    ),
    ("analyze/plot.py", 'OF_A_RUN = ("seed", ', "OF_A_RUN = (", EVALUATE, "seeds_are"),
    ("analyze/intervals.py", "math.log(n) - (n - 1) / n", "math.log(n)", EVALUATE, "begins_at"),
    (
        "analyze/plot.py",
        "best_of_mean(ours, won, n)",
        "best_of_mean(won, ours, n)",
        EVALUATE,
        "begins_at",
    ),
    (
        "analyze/gradient_variance.py",
        "return -theta.grad",
        "return theta.grad",
        EVALUATE,
        "within_5",
    ),
    (
        "analyze/gradient_variance.py",
        "(1 + (1 + mu) ** 2) - 1\n",
        "(1 + (1 + mu) ** 2)\n",
        EVALUATE,
        "closed",
    ),
    (
        "analyze/gradient_variance.py",
        "2 * math.exp(mu**2 - mu)",
        "math.exp(mu**2 - mu)",
        EVALUATE,
        "closed",
    ),
    (
        "analyze/gradient_variance.py",
        "log_density(samples, 0.0)",
        "log_density(samples, 0.1)",
        EVALUATE,
        "target",
    ),
    ("plumbing/report.py", "with rc_context(STYLE):", "with rc_context({}):", EVALUATE, "colour"),
    # analyze/compare.py, analyze/claims.py
    (
        "analyze/compare.py",
        "share * (after[key] - before[key])",
        "share * after[key]",
        COMPARE,
        "first_reaches",
    ),
    (
        "analyze/claims.py",
        "if a is not None and b is not None",
        "if a is not None or b",
        COMPARE,
        "one_seed",
    ),
    ("analyze/claims.py", '["low"] > least', '["value"] > least', COMPARE, "above_0"),
    (
        "analyze/intervals.py",
        "STUDENT[len(values) - 2]",
        "STUDENT[len(values) - 1]",
        COMPARE,
        "student",
    ),
    # analyze/sweep.py
    (
        "analyze/sweep.py",
        "if run.command not in known]",
        "if run.label not in known]",
        COMPARE,
        "goes_on",
    ),
    ("analyze/sweep.py", "per_prompt += flags.anchor_samples", "pass", COMPARE, "are_counted"),
    ("analyze/sweep.py", "os.killpg(self.process.pid", "os.kill(self.process.pid", COMPARE, "ctrl"),
    # analyze/side_by_side.py
    (
        "analyze/differences.py",
        "max(end - begin, other_end",
        "(end - begin + other_end",
        VIEW,
        "pair",
    ),
    # analyze/targets.py, and relations between the methods
    ("analyze/targets.py", "ref + rewards / beta", "ref - rewards / beta", COMPARISON, "those"),
    (
        "analyze/targets.py",
        "0.5 * (rewards[:, None] ==",
        "0.4 * (rewards[:, None] ==",
        COMPARISON,
        "those",
    ),
    (
        "analyze/targets.py",
        "REWARDS[rejected] - REWARDS[chosen]",
        "REWARDS[chosen] - REWARDS[rejected]",
        COMPARISON,
        "world",
    ),
    (
        "wind.py",
        "return args.beta * (logprobs - ref_logprobs)",
        "return -args.beta * (logprobs - ref_logprobs)",
        COMPARISON,
        "ipo",
    ),
    (
        "gdc.py",
        "advantage = weights - (logprobs.detach()",
        "advantage = weights + (logprobs.detach()",
        COMPARISON,
        "on_policy",
    ),
    (
        "bond.py",
        "backward = -(ours * advantage)",
        "backward = (ours * advantage)",
        COMPARISON,
        "rloo_of",
    ),
    (
        "bond.py",
        "forward = -anchors.gather",
        "forward = anchors.gather",
        COMPARISON,
        "bond_with_b_0",
    ),
    ("analyze/side_by_side.py", "begin + ends[0], other + ends[1]", "begin, other", VIEW, "pair"),
    ("analyze/side_by_side.py", "[*before, numbered[1]", "[numbered[1]", VIEW, "two_lines"),
    # analyze/ranges.py and pages.py
    (
        "analyze/ranges.py",
        "if i * steps < TENTHS * step",
        "if i * steps <= TENTHS * step",
        DOCS,
        "by_hand",
    ),
    (
        "analyze/ranges.py",
        "if step > steps // TENTHS",
        "if step >= steps // TENTHS",
        DOCS,
        "by_hand",
    ),
    ("analyze/pages.py", '["tenths"][-3:]', '["tenths"][:3]', DOCS, "generated"),
    # analyze/ablation.py and wind_cost.py
    (
        "analyze/ablation.py",
        "upto = logprobs.exp().cumsum(-1)",
        "upto = logprobs.exp().cumsum(-1).roll(1, -1)",
        ABLATION,
        "are_drawn",
    ),
    (
        "analyze/ablation.py",
        "if setting.refresh and step",
        "if not setting.refresh and step",
        ABLATION,
        "notes or renewed",
    ),
    (
        "analyze/ablation.py",
        "posterior_weights(none, scores, none, 1.0).reshape",
        "posterior_weights(none, 0 * scores, none, 1.0).reshape",
        ABLATION,
        "notes",
    ),
    ("analyze/wind_cost.py", "- p / 2  # an arm", "- p  # an arm", ABLATION, "win_rates or rate"),
    (
        "analyze/wind_cost.py",
        "other.lerp_(logits, args.eta)",
        "other.lerp_(logits, 0)",
        ABLATION,
        "bandit",
    ),
    (
        "analyze/wind_cost.py",
        "elif step % args.refresh_every == 0:",
        "elif False:",
        ABLATION,
        "bandit",
    ),
    ("analyze/readme.py", "{rest.split(end)[1]}", "{rest}", FRONT, "markers"),
    (
        "analyze/readme.py",
        "f\"{line['ratio']:.1f}\"",
        "f\"{line['ratio']:.2f}\"",
        FRONT,
        "generated",
    ),
    (
        "analyze/shared_code.py",
        "for part in parts if isinstance(part, ast.Name)} - bound",
        "for part in parts if isinstance(part, ast.Name)}",
        FRONT,
        "generated or calls",
    ),
    (
        "analyze/shared_code.py",
        'else [f"`{script}.py`" for script in by]',
        "else []",
        FRONT,
        "calls",
    ),
    (
        "analyze/gradient_pool.py",
        "(m[0] - first) @ (m[1]",
        "(m[0] - first) @ (m[0]",
        ABLATION,
        "pool",
    ),
    (
        "analyze/gradient_pool.py",
        "squares.mean() - mean",
        "squares.mean() + mean",
        ABLATION,
        "pool",
    ),
    (
        "analyze/gradient_pool.py",
        "(gdc.log_weights(ref, rewards, drawn, beta) - log_z)",
        "gdc.log_weights(ref, rewards, drawn, beta)",
        ABLATION,
        "pool",
    ),
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
        code = pytest.main(["-x", "-m", "", "-n", "0", "-p", "no:cacheprovider", *words])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Trial:
    """A mutant in a copy of the code, and its tests in a process forked from this one."""

    def __init__(self, mutant: tuple[str, str, str, str, str]):
        self.mutant = file, old, new, tests, words = mutant
        self.folder = tempfile.TemporaryDirectory()
        source = (ROOT / file).read_text()
        self.wrong, self.seconds = "", 0.0
        for name in ("plumbing", "tests", "docs", "prepare", "analyze", "benchmarks"):
            shutil.copytree(ROOT / name, Path(self.folder.name, name))
        Path(self.folder.name, "assets").symlink_to(ROOT / "assets")
        for name in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
            shutil.copy(name, self.folder.name)
        Path(self.folder.name, file).write_text(source.replace(old, new))
        self.pid = os.fork()
        if self.pid == 0:
            os.environ["RANKS_CHECKS"] = CHECKS.get(words, "")
            become(self.folder.name, [tests, *["-k", words] * bool(words)])

    def end(self, code: int, seconds: float) -> None:
        """Notes what is wrong with the exit code: all but 1 (0: no test failed; else: none ran)."""
        self.seconds = seconds
        if code != 1:
            output = Path(self.folder.name, "output").read_text()
            self.wrong = f"pytest ended with {code}: {output[-200:]}"


def main() -> None:
    """Tries mutants, two at a time, once the old text of all is known to stand in its file."""
    for file, old, *_ in MUTANTS:
        count = (ROOT / file).read_text().count(old)
        if count != 1:
            raise SystemExit(f"{file}: {old!r} occurs {count} times")
    words, part, parts = sys.argv[1:], 1, 1
    if words[:1] == ["--part"]:
        part, parts = map(int, words[1].split("/"))
        words = words[2:]
    wanted = [m for m in MUTANTS if all(word in m[0] + m[1] for word in words)][part - 1 :: parts]
    trials, running = [], {}
    while running or len(trials) < len(wanted):
        if len(running) < 2 and len(trials) < len(wanted):
            trials.append(Trial(wanted[len(trials)]))
            running[trials[-1].pid] = trials[-1]
        else:
            pid, status, used = os.wait3(0)
            running[pid].end(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime)
            running.pop(pid).folder.cleanup()
    for (file, old, new, *_), trial in zip(wanted, trials, strict=True):
        if trial.wrong:
            print(f"SURVIVED ({trial.wrong}) {file}: {old!r} -> {new!r}")
    killed = sum(not trial.wrong for trial in trials)
    print(f"killed {killed} of {len(wanted)}; the slowest, in CPU seconds:")
    for trial in sorted(trials, key=lambda trial: -trial.seconds)[:SHOWN]:
        print(f"{trial.seconds:6.1f} s  {trial.mutant[0]}: {trial.mutant[1]!r}")
    raise SystemExit(killed < len(wanted))


if __name__ == "__main__":
    main()
