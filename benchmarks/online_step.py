"""An online step side by side: ours against TRL's GRPOTrainer, OnlineDPOTrainer and RLOOTrainer.

    python -m benchmarks.online_step [--peer grpo] [--repeats 5]

A step samples N responses for each of 2 prompts, scores them with a reward model, reads their
log-probs from the reference and takes one update. N = 8: brain.py, which also reads those of its
proposal, against GRPOTrainer, and ppo.py --advantage rloo, which also reads those of its policy, as
its peer does, against RLOOTrainer. N = 2, which is all it has: brain.py against the experimental
OnlineDPOTrainer. All of these generate with transformers. Same model, prompts, lengths and
precision, one process: TRL runs in its own training loop, and a callback takes one of our steps
after each of TRL's. Peak memory is that of a fresh process for each side, without imports. Adds a
line per shape to benchmarks/results/online_step.jsonl.
"""

import os
import statistics
import tempfile
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import datasets
import torch
import transformers
import tyro

import brain
import common
import ppo
from benchmarks import side_by_side
from benchmarks.side_by_side import (
    DEVICE,
    as_text,
    clock,
    make_module,
    make_policy,
    make_prompts,
    make_tokenizer,
)
from benchmarks.where import add

PROMPTS, BETA = 2, 0.1
SAMPLES = {"grpo": 8, "online_dpo": 2, "rloo": 8}  # N by peer
PHASES = ("sample", "score", "log-probs", "update")
WATCHED = {  # methods of TRL's trainers, by the phase whose time they take
    "_calculate_rewards": "score",
    "_calculate_rewards_from_functions": "score",
    "_forward": "log-probs",
    "_get_per_token_logps_and_entropies": "log-probs",
}
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


@dataclass
class Args:
    shapes: list[tuple[int, int]] = field(default_factory=lambda: [(256, 48), (512, 53), (64, 256)])
    """(prompt, response) lengths in tokens"""
    peer: Literal["grpo", "online_dpo", "rloo"] = "grpo"
    """trainer of TRL's"""
    repeats: int = 5
    """turns of each side, after one that does not count"""
    memory_of: str = ""
    """print the peak memory of one side (ours or trl, and the peer's name) on the first shape, in
    MiB, and end"""


def brain_loss(batch, rewards, start, old, logprobs):
    """The loss of brain.py of log-probs of reference, proposal and policy, [P, N, T] each."""
    ref_logprobs, proposal_logprobs = start.sum(2), old.sum(2)
    target_weights = brain.posterior_weights(ref_logprobs, rewards, proposal_logprobs, BETA)
    return brain.brain_loss(logprobs.sum(2), proposal_logprobs, target_weights).mean()


def rloo_loss(batch, rewards, start, old, logprobs):
    """The loss of ppo.py --advantage rloo of the same."""
    paid = ppo.token_rewards(rewards, old, start, batch.mask(), BETA)
    advantage = ppo.leave_one_out(paid.sum(2))[:, :, None]
    loss = ppo.policy_loss(logprobs, old, advantage, ppo.Args(advantage="rloo"))
    return loss.mean() / rewards.shape[1]


def our_step(prompt: int, response: int, n: int, count: int = PROMPTS, peer: str = "grpo", **shape):
    """A function that takes one step of ours and returns the seconds of its phases."""
    policy = make_policy(**shape)
    ref = common.frozen_copy(policy)
    proposal = policy if peer == "rloo" else common.frozen_copy(policy)
    loss_of = rloo_loss if peer == "rloo" else brain_loss
    reward_model = side_by_side.make_reward_model(make_tokenizer(), **shape)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    prompts = make_prompts(prompt, count)
    seeds = iter(range(10**6))

    def step() -> dict[str, float]:
        times = [clock()]
        batch = common.sample(proposal, prompts, n, response, 1.0, next(seeds))
        times.append(clock())
        rewards = common.score(reward_model, batch)
        times.append(clock())
        start = common.token_logprobs(ref, batch, 1.0)
        old = common.token_logprobs(proposal, batch, 1.0)
        times.append(clock())
        logprobs, _ = common.token_logprobs_and_entropy(policy, batch, 1.0)
        loss_of(batch, rewards, start, old, logprobs).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        return {phase: end - begin for phase, begin, end in zip(PHASES, times, times[1:])}

    return step


def make_trainer(peer: str, prompt: int, response: int, steps: int, **model):
    """TRL's trainer on the same models and as many prompts as `steps` need."""
    tokenizer, n = make_tokenizer(), SAMPLES[peer]
    texts = [as_text(item) for item in make_prompts(prompt, PROMPTS)] * steps
    folder = tempfile.mkdtemp()
    make_module(**model).save_pretrained(folder)  # by whose name some load their reference
    policy = transformers.LlamaForCausalLM.from_pretrained(folder)
    settings = dict(
        output_dir=folder,
        report_to=[],
        use_cpu=DEVICE.type == "cpu",
        bf16=DEVICE.type == "cuda",
        beta=BETA,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        max_grad_norm=1.0,
        max_steps=steps,
        save_strategy="no",
        logging_steps=10**6,
        temperature=1.0,
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    models = dict(
        model=policy,
        reward_funcs=[make_module(transformers.LlamaForSequenceClassification, **model)],
        reward_processing_classes=[tokenizer],
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
    )
    if peer != "online_dpo":
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
        make_config, make = kinds[peer]
        config = make_config(
            per_device_train_batch_size=PROMPTS * n,
            num_generations=n,
            steps_per_generation=1,
            max_completion_length=response,
            shuffle_dataset=False,
            **settings,
        )
        return make(**models, args=config)
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    config = OnlineDPOConfig(
        per_device_train_batch_size=PROMPTS,
        max_new_tokens=response,
        max_length=prompt + response,
        **settings,
    )
    return OnlineDPOTrainer(**models, ref_model=make_module(**model), args=config)


class Turns(transformers.TrainerCallback):
    """Times TRL's steps and their phases, and takes and times one of ours after each."""

    def __init__(self, step):
        self.step, self.times, self.phases = step, {"ours": [], "trl": []}, {"ours": [], "trl": []}

    def watch(self, trainer) -> None:
        """Adds up the seconds in TRL's generation, rewards and log-probs without gradient."""

        def timed(owner, name: str, phase: str) -> None:
            inner = getattr(owner, name)

            def outer(*args, **kwargs):
                begin = clock()
                result = inner(*args, **kwargs)
                if phase != "log-probs" or not torch.is_grad_enabled():
                    self.spent[phase] += clock() - begin
                return result

            setattr(owner, name, outer)

        timed(trainer.model, "generate", "sample")
        for name, phase in WATCHED.items():
            if hasattr(trainer, name):
                timed(trainer, name, phase)

    def on_step_begin(self, *args, **kwargs):
        """Starts the clock."""
        self.begin, self.spent = clock(), dict.fromkeys(PHASES, 0.0)

    def on_step_end(self, *args, **kwargs):
        """Stops it, and takes our turn."""
        end = clock()
        self.times["trl"].append(end - self.begin)
        self.spent["update"] = end - self.begin - sum(self.spent.values())
        self.phases["trl"].append(self.spent)
        self.phases["ours"].append(self.step())
        self.times["ours"].append(clock() - end)


def take_turns(peer: str, prompt: int, response: int, repeats: int, **model) -> Turns:
    """The times of both sides on one shape, after one turn that does not count."""
    turns = Turns(our_step(prompt, response, SAMPLES[peer], peer=peer, **model))
    trainer = make_trainer(peer, prompt, response, repeats + 1, **model)
    turns.watch(trainer)
    trainer.add_callback(turns)
    trainer.train()
    for counted in (*turns.times.values(), *turns.phases.values()):
        del counted[0]
    return turns


def make_side(side: str, peer: str, shape: tuple[int, int]):
    """A function that takes one step of one side, for its peak memory."""
    if side == "ours":
        return our_step(*shape, SAMPLES[peer], peer=peer)
    return make_trainer(peer, *shape, steps=1).train


def main(args: Args) -> None:
    """Measures all shapes."""
    import trl  # noqa: F401 - both sides start from the same imports

    if args.memory_of:
        side, peer = args.memory_of.split()
        print(side_by_side.peak_memory(partial(make_side, side, peer, args.shapes[0])))
        return
    n = SAMPLES[args.peer]
    for shape in args.shapes:
        turns = take_turns(args.peer, *shape, args.repeats)
        phases = {
            f"{name}_{phase}_s": round(statistics.median(x[phase] for x in steps), 3)
            for name, steps in turns.phases.items()
            for phase in PHASES
        }
        module = "benchmarks.online_step"
        memory = {
            name: side_by_side.memory_of(module, f"{name} {args.peer}", shape)
            for name in turns.times
        }
        line = {"peer": args.peer, "prompt": shape[0], "response": shape[1]}
        line |= {"prompts": PROMPTS, "samples": n}
        add("online_step", line | side_by_side.summary(turns.times, memory, "trl") | phases)


if __name__ == "__main__":
    main(tyro.cli(Args))
