"""A step side by side: gdc.py's against that of naver/disco's CDPGTuner, where it is installed.

    TQDM_DISABLE=1 python -m benchmarks.gdc_step [--repeats 5]

A step samples 8 responses for each of 2 prompts from a proposal apart from the policy, scores them
with a reward model, reads their log-probs from start model and proposal and takes one update of the
policy. Same model, prompts, lengths and precision, one process, in turns. disco reads the same
reward model as a scorer that takes all rows at once. It is off-line, and its test of the proposal,
which ends in an error in version 1.1.1, never comes; nor does ours. Its constructor switches on
autograd's anomaly detection for the whole process: the ratio is that with the detection off again,
and the fields shipped_* have it on. disco's Adam is not the fused one, and no gradient is clipped.
Peak memory is that of a fresh process for each side, without imports. Adds a line per shape to
benchmarks/results/gdc_step.jsonl.
"""

import statistics
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers
import tyro
from torch import Tensor

import common
import gdc
from benchmarks import side_by_side
from benchmarks.online_step import BETA, PROMPTS
from benchmarks.side_by_side import as_text, make_module, make_policy, make_prompts, make_tokenizer
from benchmarks.where import add

N = 8
LR = 1e-6


@dataclass
class Args:
    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(256, 48), (512, 53), (64, 256)])
    """(prompt, response) lengths in tokens"""
    repeats: int = 5
    """turns of each side, after two that do not count"""
    memory_of: str = ""
    """print the peak memory of one side (ours, disco or shipped) on the first shape, in MiB, and
    end"""


def our_step(prompt: int, response: int, lengths: list[int]):
    """A function that takes one step of gdc.py's, notes its lengths and returns the policy."""
    policy = make_policy()
    ref, proposal = common.frozen_copy(policy), common.frozen_copy(policy)
    reward_model = side_by_side.make_reward_model(make_tokenizer())
    optimizer = torch.optim.AdamW(policy.parameters(), LR, weight_decay=0.0, fused=True)
    prompts = make_prompts(prompt, PROMPTS)
    seeds = iter(range(10**6))

    def step() -> torch.nn.Module:
        batch = common.sample(proposal, prompts, N, response, 1.0, next(seeds))
        rewards = common.score(reward_model, batch)
        ref_logprobs = common.logprobs(ref, batch, 1.0)
        proposal_logprobs = common.logprobs(proposal, batch, 1.0)
        log_w = gdc.log_weights(ref_logprobs, rewards, proposal_logprobs, BETA)
        weights = (log_w - gdc.log_mean_weight(log_w)).exp()
        logprobs, _ = common.logprobs_and_entropy(policy, batch, 1.0)
        gdc.gdc_loss(logprobs, proposal_logprobs, weights, "gdc++").mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lengths.extend(batch.lengths().flatten().tolist())
        return policy

    return step


@dataclass
class Reward:
    """The reward model as disco's scorers are: log exp(r / β) [P, N] of all rows at once."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase

    @torch.no_grad()
    def log_score_batch(self, samples: list[list], contexts: list[str]) -> Tensor:
        """Log-scores of samples [P][N], whose rows are padded on the right, after P prompts."""
        prompts = self.tokenizer(contexts, return_tensors="pt", padding=True)["input_ids"]
        responses = torch.stack([sample.token_ids for group in samples for sample in group])
        rows = torch.cat([prompts.repeat_interleave(len(samples[0]), 0), responses], 1)
        mask = (rows != self.tokenizer.pad_token_id).long()
        scores = self.model(rows, attention_mask=mask, use_cache=False).logits
        return scores.view(len(contexts), -1) / BETA


def disco_step(prompt: int, response: int, lengths: list[int], detect_anomaly: bool = False):
    """A function that takes one step of disco's, notes its lengths and returns the policy."""
    from disco.distributions import LMDistribution
    from disco.tuners import CDPGTuner
    from disco.tuners.losses import KLLoss

    tokenizer = make_tokenizer()

    def distribution(freeze: bool) -> LMDistribution:
        return LMDistribution(make_module(), tokenizer, length=response, freeze=freeze)

    start, proposal, policy = distribution(True), distribution(True), distribution(False)
    judge = make_module(transformers.LlamaForSequenceClassification).requires_grad_(False)
    prompts = make_prompts(prompt, PROMPTS)
    texts = [as_text(item) for item in prompts]
    tokens = [item.tokens for item in prompts]
    assert tokenizer(texts)["input_ids"] == tokens, "disco would read other prompts"
    tuner = CDPGTuner(
        policy,
        start * Reward(judge, tokenizer),
        proposal,
        texts,
        loss=KLLoss(),
        n_gradient_steps=1,
        n_contexts_per_step=PROMPTS,
        n_samples_per_context=N,
        sampling_size=N,
        scoring_size=PROMPTS * N,
        learning_rate=LR,
        warmup_steps=0,
        proposal_update_interval=10**9,
    )
    torch.autograd.set_detect_anomaly(False)

    def note(name: str, value: float) -> None:
        if name == "sample_length_without_padding":
            lengths.append(value)

    tuner.metric_updated.enroll(note)

    def step() -> torch.nn.Module:
        with torch.autograd.set_detect_anomaly(detect_anomaly):
            tuner.tune()
        return policy.model

    return step


def main(args: Args) -> None:
    """Measures all shapes."""
    try:  # all sides start from the same imports
        import disco.tuners  # noqa: F401
    except ImportError as error:
        common.require(
            False, f"no naver/disco ({error}): pip install git+https://github.com/naver/disco"
        )
    makers = {
        "ours": our_step,
        "disco": disco_step,
        "shipped": partial(disco_step, detect_anomaly=True),
    }
    if args.memory_of:
        print(side_by_side.peak_memory(partial(makers[args.memory_of], *args.shapes[0], [])))
        return
    for shape in args.shapes:
        lengths = {name: [] for name in makers}
        sides = {name: make(*shape, lengths[name]) for name, make in makers.items()}
        for name, step in sides.items():
            pairs = zip(step().parameters(), make_module().parameters())
            assert all((a != b).any() for a, b in pairs), f"{name}: weights without a gradient"
        times = side_by_side.take_turns(sides, args.repeats)
        memory = {
            name: side_by_side.memory_of("benchmarks.gdc_step", name, shape) for name in sides
        }
        line = side_by_side.summary(times, memory, "disco")
        as_disco = [x | {"disco": x["shipped"]} for x in (times, memory)]
        shipped = side_by_side.summary(*as_disco, "disco")
        for key in ("ratio", "ratio_least", "ratio_most", "disco_s", "disco_peak_mib"):
            line[f"shipped_{key}"] = shipped[key]
        for name, side in (("our", "ours"), ("disco", "disco"), ("shipped_disco", "shipped")):
            line[f"{name}_samples_per_s"] = round(PROMPTS * N / statistics.median(times[side]), 2)
            line[f"{name}_length"] = round(statistics.mean(lengths[side]), 2)
        setting = {"prompt": shape[0], "response": shape[1], "prompts": PROMPTS, "samples": N}
        add("gdc_step", setting | line)


if __name__ == "__main__":
    main(tyro.cli(Args))
