"""Architectures beside the eight of tests/models.py: each is fed right, or refused in one line."""

import pytest
import torch
import transformers
from models import NARROW, SMALL, make_prompts, make_world, save, with_large_weights, word_tokenizer

import brain
import common
from plumbing.models import Model

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
FEW = {"num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
CASES = {  # name: (model type, configuration, whether it takes shared rows)
    "phi": ("phi", SMALL, True),
    "phi3": ("phi3", SMALL, True),
    "phi3, windowed": ("phi3", SMALL | {"sliding_window": 4}, True),
    "falcon, rotary": ("falcon", FALCON, True),
    "falcon, ALiBi": ("falcon", FALCON | {"alibi": True}, False),
    "stablelm": ("stablelm", SMALL | {"num_key_value_heads": 4}, True),
    "cohere": ("cohere", SMALL | {"logit_scale": 0.25}, True),
    "cohere2": ("cohere2", SMALL | {"sliding_window": 4, "logit_scale": 0.25}, True),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, False),
    "qwen2_moe": (
        "qwen2_moe",
        SMALL | EXPERTS | {"num_key_value_heads": 4, "shared_expert_intermediate_size": 16},
        True,
    ),
    "qwen3_moe": ("qwen3_moe", SMALL | NARROW | EXPERTS, True),
    "mixtral": ("mixtral", SMALL | FEW | {"num_local_experts": 4}, True),
    "mixtral, windowed": (
        "mixtral",
        SMALL | FEW | {"num_local_experts": 4, "sliding_window": 4},
        True,
    ),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}, True),
    "gpt_bigcode": ("gpt_bigcode", GPT, True),
    "olmo2": ("olmo2", SMALL, True),
    "granite": ("granite", SMALL | {"logits_scaling": 4.0}, True),
    "starcoder2": ("starcoder2", SMALL | FEW, True),
    "starcoder2, windowed": ("starcoder2", SMALL | FEW | {"sliding_window": 4}, True),
    "smollm3": ("smollm3", SMALL | FEW, True),
    "glm4": ("glm4", SMALL | NARROW, True),
    "gpt_oss": ("gpt_oss", SMALL | NARROW | {"num_local_experts": 4, "sliding_window": 4}, True),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}, True),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        False,
    ),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, True),
    # Layers with a state: it reads a row as one text, and the library keeps it from the padding.
    "lfm2": ("lfm2", SMALL | FEW | {"layer_types": ["conv", "full_attention"]}, False),
    "falcon_h1": (
        "falcon_h1",
        SMALL | FEW | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5} | STATES,
        False,
    ),
}
REFUSED = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "state_size": 16,
    },
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
RESPONSES = [[[4, 5, 6, 7, 8, 9, 1], [8, 1]], [[3, 1], [5, 5, 5, 6, 7, 9, 12]]]


def make(architecture: str, vocab_size: int = 24, **config) -> Model:
    """A Model with random weights that are large enough for attention to matter."""
    special = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = special | {"vocab_size": vocab_size} | config
    config = transformers.AutoConfig.for_model(architecture, **config)
    torch.manual_seed(0)
    return Model(with_large_weights(transformers.AutoModelForCausalLM.from_config(config)), [1])


@torch.no_grad()
def naive(model: Model, prompt: list[int], response: list[int]) -> float:
    """The log-prob of a response, one token at a time, each from a row of its own."""
    total = 0.0
    for place, token in enumerate(response):
        row = torch.tensor([prompt + response[:place]])
        logits = model.module(row, use_cache=False).logits[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_gives_the_numbers_of_a_naive_loop(name, capsys):
    """Log-probs of given responses, and of samples as they were drawn through the cache."""
    architecture, config, shared = CASES[name]
    model = make(architecture, **config)
    common.choose_rows("--policy", name, model, common._tried)
    assert model.shared_rows == shared and model.own_head == (name == "falcon_h1")
    assert ("no shared rows" in capsys.readouterr().out) == (not shared)
    prompts = make_prompts(*PROMPTS)
    drawn = common.sample(model, prompts, 3, 6, 1.0, seed=4)
    given = common.Batch(prompts, RESPONSES)
    for batch, ours in (
        (given, common.logprobs(model, given, 1.0)),
        (drawn, drawn.sampled_logprobs),
    ):
        truth = [
            [naive(model, prompt.tokens, response) for response in group]
            for prompt, group in zip(batch.prompts, batch.responses, strict=True)
        ]
        torch.testing.assert_close(ours, torch.tensor(truth), atol=1e-5, rtol=1e-5)


def test_a_configuration_may_not_know_a_pad_token():
    """As CodeGen's, which has no such name."""
    model = make("codegen", **CASES["codegen"][1])
    del model.config.pad_token_id
    common.choose_rows("--policy", "codegen", model, common._tried)
    assert model.shared_rows


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_whose_cache_or_padding_cannot_be_served_is_refused(architecture, tmp_path, capsys):
    """In one line and with exit code 2, before anything is written: its states run through the
    padding, and its cache is not of keys and values."""
    args, tokenizer = make_world(tmp_path), word_tokenizer()
    config = REFUSED[architecture]
    args.policy = save(tmp_path / "policy", make(architecture, len(tokenizer), **config), tokenizer)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        brain.main(args)
    (error,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert error.startswith(f"error: --policy {args.policy}: a Mamba")
    assert "does not give the numbers of single rows" in error
    assert not (tmp_path / "run").exists()
