"""DPO against an outside oracle: TRL's DPOTrainer on the same model, pairs and coefficient."""

import copy

import datasets
import pytest
import torch
from models import make_model, word_tokenizer

import common
import dpo

trl = pytest.importorskip("trl", reason="TRL comes with requirements-dev.txt")
ROWS = [
    ("a good film", " loved", " hated it"),
    ("the plot", " was very good", " bad"),
    ("so", " i loved the film", " it"),
    ("the actor was", " good and good", " very bad and it"),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_loss_and_gradients_are_those_of_trl(tmp_path, architecture, name):
    """Same loss and same gradient of every weight to 1e-5, with padding and a moved policy."""
    tokenizer, beta = word_tokenizer(), 0.3
    ref = make_model(architecture, len(tokenizer))
    policy = copy.deepcopy(ref)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn_like(weight))

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
