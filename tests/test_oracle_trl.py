"""DPO and RLOO against an outside oracle: TRL's trainers on the same model, data, coefficient."""

import copy

import datasets
import pytest
import torch
from models import make_model, save, word_tokenizer

import common
import dpo
import ppo

trl = pytest.importorskip("trl", reason="TRL comes with requirements-dev.txt")
ROWS = [
    ("a good film", " loved", " hated it"),
    ("the plot", " was very good", " bad"),
    ("so", " i loved the film", " it"),
    ("the actor was", " good and good", " very bad and it"),
]


def move(model, seed: int) -> None:
    """Adds the same noise to the weights of every copy of a model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_loss_and_gradients_are_those_of_trl(tmp_path, architecture, name):
    """Same loss and same gradient of every weight to 1e-5, with padding and a moved policy."""
    tokenizer, beta = word_tokenizer(), 0.3
    ref = make_model(architecture, len(tokenizer))
    policy = copy.deepcopy(ref)
    move(policy, seed=1)

    prompts, chosen, rejected = zip(*ROWS)
    data = datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(ROWS),
        beta=beta,
        loss_type=[name],
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    trainer = trl.DPOTrainer(
        copy.deepcopy(policy.module),
        ref_model=copy.deepcopy(ref.module),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    items = [common.Prompt(text, tokenizer(text)["input_ids"]) for text in prompts]
    ours = common.encode_responses(tokenizer, policy, items, list(zip(chosen, rejected)), 999)
    ref_logprobs = common.logprobs(ref, ours, 1.0)
    logprobs, _ = common.logprobs_and_entropy(policy, ours, 1.0)
    loss = dpo.dpo_loss(
        logprobs,
        ref_logprobs,
        torch.zeros(len(ROWS), dtype=torch.bool),
        dpo.Args(loss=name, beta=beta),
    ).mean()
    loss.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    expected = dict(trainer.model.named_parameters())
    assert sum(weight.grad is not None for weight in policy.parameters()) > 5
    for key, weight in policy.module.named_parameters():
        torch.testing.assert_close(weight.grad, expected[key].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rloo_is_that_of_trl(tmp_path, architecture):
    """On the samples that RLOOTrainer drew: its advantages, and, with a policy that has moved since,
    its loss and the gradient of every weight, all to 1e-5. Some ratios are clipped, some are not."""
    tokenizer, beta, n = word_tokenizer(padding_side="left"), 0.3, 4
    folder = save(tmp_path / "ref", make_model(architecture, len(tokenizer)), tokenizer)
    ref = make_model(architecture, len(tokenizer))
    policy = copy.deepcopy(ref)
    prompts = [text for text, *_ in ROWS]
    if architecture == "gpt2":
        # TRL pads prompts on the left and names no positions, so GPT-2 would count the padding.
        prompts = [f"{text} the film was".split()[:3] for text in prompts]
        prompts = [" ".join(words) for words in prompts]

    def reward(completions, **_):
        return [len(text) / 10 for text in completions]

    config = trl.RLOOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(prompts) * n,
        num_generations=n,
        max_completion_length=6,
        beta=beta,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    trainer = trl.RLOOTrainer(
        folder,  # the name, by which it loads its reference as well
        reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    for moved in (trainer.model, policy.module):
        move(moved, seed=1)
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(n)]
    theirs = trainer._generate_and_score_completions(rows)
    pairs = zip(theirs["completion_ids"], theirs["completion_mask"])
    responses = [ids[mask.bool()].tolist() for ids, mask in pairs]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)

    items = [common.Prompt(text, tokenizer(text)["input_ids"]) for text in prompts]
    groups = [responses[start : start + n] for start in range(0, len(rows), n)]
    batch = common.Batch(items, groups)
    rewards = torch.tensor(reward(texts)).view(-1, n)
    old, start = (common.token_logprobs(model, batch, 1.0) for model in (policy, ref))
    paid = ppo.token_rewards(rewards, old, start, batch.mask(), beta)
    advantage = ppo.leave_one_out(paid.sum(2))
    torch.testing.assert_close(advantage.flatten(), theirs["advantages"], atol=1e-5, rtol=1e-5)

    for moved in (trainer.model, policy.module):
        move(moved, seed=2)
    loss = trainer._compute_loss(trainer.model, theirs)
    loss.backward()
    ours, _ = common.token_logprobs_and_entropy(policy, batch, 1.0)
    ratio = (ours - old).sum(2).exp()
    assert 0 < ((ratio - 1).abs() > 0.2).float().mean() < 1
    mine = ppo.policy_loss(ours, old, advantage[:, :, None], ppo.Args(advantage="rloo"))
    mine = (mine / n).mean()
    mine.backward()
    assert abs(mine.item() - loss.item()) < 1e-5 < abs(loss.item())
    expected = dict(trainer.model.named_parameters())
    assert sum(weight.grad is not None for weight in policy.parameters()) > 5
    for key, weight in policy.module.named_parameters():
        torch.testing.assert_close(weight.grad, expected[key].grad, atol=1e-5, rtol=1e-4)
