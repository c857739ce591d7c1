"""Rows, log-probs, sampling and rewards of common.py against the plainest way to compute them."""

import itertools

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    bpe_tokenizer,
    encode_prompt,
    make_model,
    make_prompts,
    word_tokenizer,
)
from scipy import stats

import common
from plumbing import models as loading
from plumbing.data import Layout
from plumbing.models import Model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 1, 15, 16]]  # the last holds the end token
RESPONSES = [
    [[4, 5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13]],
    [[1], [5, 5, 5, 1], [6, 7, 1]],
    [[20, 21, 22, 23, 4], [19, 1], [18, 17, 1]],
]


def ragged_batch():
    """Three prompts of 7, 2 and 4 tokens with three responses of 1 to 5 tokens each."""
    return common.Batch(make_prompts(*PROMPTS), RESPONSES)


@torch.no_grad()
def naive(model, prompt, response, temperature=1.0):
    """(log-prob, entropy) sums, one token at a time, each from a row of its own."""
    total = entropy = 0.0
    for t, token in enumerate(response):
        logits = model.module(torch.tensor([prompt + response[:t]])).logits[0, -1].double()
        logprobs = (logits / temperature).log_softmax(-1)
        total += logprobs[token].item()
        entropy -= (logprobs.exp() * logprobs).sum().item()
    return total, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bug01_bug02_rows_equal_a_naive_loop(architecture, temperature):
    """Shift, left padding, position ids, masks and windows: shared rows = plain rows = naive loop."""
    model, batch = make_model(architecture), ragged_batch()
    truth = torch.tensor(
        [
            [naive(model, p, r, temperature) for r in group]
            for p, group in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    for model.shared_rows in (True, False):
        logprobs, entropy = common.logprobs_and_entropy(model, batch, temperature)
        torch.testing.assert_close(logprobs.detach(), truth[..., 0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(common.logprobs(model, batch, temperature), logprobs.detach())
        torch.testing.assert_close(entropy, truth[..., 1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_the_models_own_loss(architecture):
    """The sum over response tokens is minus the model's own cross-entropy times their number."""
    model = make_model(architecture)
    ours = common.logprobs(model, ragged_batch(), 1.0)
    row = torch.tensor([PROMPTS[0] + RESPONSES[0][0]])
    labels = row.clone()
    labels[:, : len(PROMPTS[0])] = -100
    with torch.no_grad():
        loss = model.module(row, labels=labels).loss
    assert ours[0, 0].item() == pytest.approx(-5 * loss.item(), abs=1e-4)


def test_bug05_what_fills_the_padding_changes_nothing(monkeypatch):
    """Neither behind shorter rows nor before shorter prompts, whatever tokens fill it."""
    model, pad = make_model("gpt2"), common._pad
    expected = common.logprobs(model, ragged_batch(), 1.0)
    drawn = common.sample(model, make_prompts(*PROMPTS), 4, 6, 1.0, seed=3)

    def filled(rows, fill, device, left=False):
        wider = [[*row] for row in rows]
        longest = max(wider, key=len)
        longest.extend([] if left else [fill] * 3)
        padded = pad(wider, fill, device, left)
        mask = pad([[0] * len(row) for row in rows] + [[0] * len(longest)], -1, device, left)
        return padded.masked_fill(mask[:-1] < 0, 17) if fill == 0 else padded

    monkeypatch.setattr(common, "_pad", filled)
    torch.testing.assert_close(
        common.logprobs(model, ragged_batch(), 1.0), expected, atol=1e-5, rtol=0
    )
    again = common.sample(model, make_prompts(*PROMPTS), 4, 6, 1.0, seed=3)
    assert again.responses == drawn.responses
    torch.testing.assert_close(again.sampled_logprobs, drawn.sampled_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("end", [1, 0])
def test_bug03_probabilities_of_all_responses_sum_to_1(architecture, end):
    """The end token counts once, also when it is token 0, the filler: sum over all responses = 1."""
    model, vocabulary = make_model(architecture, vocab_size=4), range(4)
    ended = [
        list(r) + [end]
        for t in range(3)
        for r in itertools.product(vocabulary, repeat=t)
        if end not in r
    ]
    cut = [list(r) for r in itertools.product(vocabulary, repeat=3) if end not in r]
    batch = common.Batch(make_prompts([2, 3, 2]), [ended + cut])
    total = common.logprobs(model, batch, 1.0).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_head_in_chunks_changes_neither_values_nor_gradients(monkeypatch):
    """The vocabulary head at once, in chunks, and in chunks that the backward pass computes again."""
    batch = common.Batch(make_prompts(*PROMPTS) * 30, RESPONSES * 30)
    results = []
    for chunk, most in ((2**22, 2**25), (0, 2**25), (0, 0)):
        monkeypatch.setattr(common, "CHUNK", chunk)
        monkeypatch.setattr(common, "MOST_LOGITS", most)
        model = make_model("gemma2")
        logprobs, _ = common.logprobs_and_entropy(model, batch, 0.9)
        logprobs.mean().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for whole, *chunked in zip(*results, strict=True):
        for value in chunked:
            torch.testing.assert_close(value, whole, atol=1e-4, rtol=1e-4)


def test_logits_are_kept_or_computed_again(monkeypatch):
    """How often the head runs: once per chunk, and once more in the backward pass above MOST_LOGITS."""
    model, calls, head = make_model("llama"), [], common._logits
    batch = common.Batch(make_prompts(*PROMPTS) * 10, RESPONSES * 10)
    tokens = int(batch.lengths().sum())
    assert tokens > 256
    monkeypatch.setattr(common, "_logits", lambda *x: calls.append(len(x[1])) or head(*x))
    for chunk, most, expected in (
        (24 * tokens, 24 * tokens, [tokens]),
        (24 * tokens, 24 * tokens - 1, [tokens] * 2),
        (24 * (tokens - 1), 24 * tokens, [tokens - 1, 1]),
        (24 * (tokens - 1), 0, [tokens - 1, 1] * 2),
        (0, 24 * tokens, [256, tokens - 256]),
    ):
        monkeypatch.setattr(common, "CHUNK", chunk)
        monkeypatch.setattr(common, "MOST_LOGITS", most)
        calls.clear()
        common.logprobs_and_entropy(model, batch, 1.0)[0].sum().backward()
        assert sorted(calls) == sorted(expected)


def test_bug20_micro_batches_add_up_to_the_gradient_of_the_whole():
    """Three prompts at once and one by one give the same gradient."""
    gradients = []
    for size in (0, 1, 2):
        model, batch = make_model("llama"), ragged_batch()
        for rows in common.micro_batches(3, size):
            logprobs, _ = common.logprobs_and_entropy(model, batch[rows], 1.0)
            (logprobs.square().sum() / 3).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-3, rtol=1e-4)


def test_bug11_bfloat16_stays_near_float32():
    """A log-prob in pure bfloat16, summed in fp32, is off by its weights' rounding only."""
    model, batch = make_model("llama"), ragged_batch()
    exact = common.logprobs(model, batch, 1.0)
    rough = common.logprobs(model.to(torch.bfloat16), batch, 1.0)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.6, rtol=0.03)


# ── sampling ──
def test_bug07_sampled_frequencies_are_those_of_the_softmax():
    """Chi-square over all 13 responses, 40,000 draws, odd generation defaults in the checkpoint.
    Falsely alarmed for one seed in 10,000."""
    model = make_model("llama", vocab_size=4)
    model.module.generation_config.update(
        temperature=0.6, top_p=0.8, top_k=2, repetition_penalty=1.5
    )
    prompt, temperature = [2, 3], 1.3
    drawn = []
    for seed in range(3, 11):
        batch = common.sample(model, make_prompts(prompt), 40_000 // 8, 2, temperature, seed)
        drawn += batch.responses[0]
    responses = [[1]] + [[a, b] for a in (0, 2, 3) for b in range(4)]
    expected = [naive(model, prompt, r, temperature)[0] for r in responses]
    expected = torch.tensor(expected, dtype=torch.float64).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-6)
    counts = [drawn.count(response) for response in responses]
    assert sum(counts) == len(drawn)
    assert stats.chisquare(counts, (expected * len(drawn)).tolist()).pvalue > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bug08_logprobs_as_drawn_equal_those_recomputed(architecture):
    """The importance ratio is 1 on-policy at a temperature other than 1; plain rows draw the same."""
    model, drawn = make_model(architecture), []
    for model.shared_rows in (True, False):
        batch = common.sample(model, make_prompts(*PROMPTS), 8, 6, 0.8, seed=5)
        torch.testing.assert_close(
            batch.sampled_logprobs, common.logprobs(model, batch, 0.8), atol=1e-4, rtol=1e-5
        )
        drawn.append(batch.responses)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
def test_bug02_a_padded_batch_samples_as_prompts_one_by_one(architecture):
    """At a temperature near 0 each prompt's response is its own, whatever stands beside it."""
    model = make_model(architecture)
    together = common.sample(model, make_prompts(*PROMPTS), 2, 6, 1e-4, seed=0)
    for i, prompt in enumerate(PROMPTS):
        alone = common.sample(model, make_prompts(prompt), 2, 6, 1e-4, seed=1)
        assert together.responses[i] == alone.responses[0]


def test_bug04_bug06_responses_stop_at_every_end_token_and_at_no_prompt():
    """Two end tokens both end; an end token in the prompt does not; others never stop early."""
    model = make_model("llama")
    model.end_tokens = [1, 7]
    batch = common.sample(model, make_prompts([5, 1, 7, 6]), 64, 8, 1.5, seed=0)
    ended, stops = batch.ended(model.end_tokens), set()
    for response, end in zip(batch.responses[0], ended[0], strict=True):
        assert not {1, 7} & set(response[:-1])
        assert bool(end) == (response[-1] in (1, 7))
        assert end or len(response) == 8
        stops.add(response[-1])
    assert {1, 7} < stops
    own = common.logprobs(model, batch, 1.5)
    torch.testing.assert_close(batch.sampled_logprobs, own, atol=1e-4, rtol=1e-5)
    again = common.sample(model, make_prompts([5, 1, 7, 6]), 64, 8, 1.5, seed=0)
    other = common.sample(model, make_prompts([5, 1, 7, 6]), 64, 8, 1.5, seed=1)
    assert again.responses == batch.responses != other.responses


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_how_many_prompts_are_sampled_for_at_once_changes_nothing(
    architecture, shared, monkeypatch
):
    """The same draws as all at once, in passes of at most so many; rows may be of other widths."""
    model, drawn, inner = make_model(architecture), [], common._sample
    model.end_tokens, model.shared_rows = [1, 2, 3], shared
    prompts, passes = make_prompts(*PROMPTS, [3] * 40), []
    monkeypatch.setattr(
        common, "_sample", lambda m, part, *x: passes.append(len(part)) or inner(m, part, *x)
    )
    for model.most_prompts, expected in ((0, [4]), (3, [3, 1]), (1, [1] * 4)):
        passes.clear()
        drawn.append(common.sample(model, prompts, 4, 16, 1.0, seed=2))
        assert passes == expected
    for other in drawn[1:]:
        assert other.responses == drawn[0].responses and other.prompts == prompts
        torch.testing.assert_close(
            other.sampled_logprobs, drawn[0].sampled_logprobs, atol=2e-5, rtol=2e-4
        )


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_gives_the_logits_of_its_last_token_only(shared, monkeypatch):
    """And each token its own; log-probs the logits of response tokens: on both kinds of rows."""
    model, seen = make_model("llama"), []
    model.shared_rows, head = shared, model.module.get_output_embeddings()
    head.register_forward_hook(lambda part, inputs, out: seen.append(out[..., 0].numel()))
    common.sample(model, make_prompts(*PROMPTS), 2, 2, 1.0, seed=0)
    rows = 3 if shared else 6
    assert seen == [rows, 6]
    common.logprobs(model, ragged_batch(), 1.0)
    assert seen[2:] == [sum(len(ids) for group in RESPONSES for ids in group)]


# ── rewards ──
def make_reward(architecture, tokenizer, policy_tokenizer, add_end=True, **more):
    """A RewardModel on random weights."""
    ends = [policy_tokenizer.eos_token_id, 4]
    model = make_model(
        architecture, len(tokenizer), labels=1, seed=1, eos_token_id=tokenizer.eos_token_id, **more
    )
    same = tokenizer is policy_tokenizer
    cpu, layout = torch.device("cpu"), Layout(tokenizer)
    return common.RewardModel(policy_tokenizer, ends, cpu, None, model, layout, add_end, same)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3", "opt", "mistral"])
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_bug12_bug15_reward_is_read_at_the_last_attended_token(architecture, pad_is_end):
    """Shared rows, batches and padding change no reward, also where the pad token is the end."""
    tokenizer = word_tokenizer()
    reward = make_reward(architecture, tokenizer, tokenizer, pad_token_id=1 if pad_is_end else 0)
    reward.policy_ends, model = [1], reward.model
    prompts = make_prompts(*[[t % 19 for t in p] for p in PROMPTS])
    batch = common.Batch(prompts, [[[t % 19 for t in r] for r in group] for group in RESPONSES])
    scores = common.score(reward, batch)
    for i, prompt in enumerate(batch.prompts):
        for j, response in enumerate(RESPONSES[i]):
            row = torch.tensor([prompt.tokens + [t % 19 for t in response]])
            with torch.no_grad():
                states = model.module.base_model(row).last_hidden_state
                expected = model.module.score(states[0, -1]).item()
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(common.score(reward, batch, 1), scores, atol=1e-4, rtol=0)
    model.shared_rows = False
    torch.testing.assert_close(common.score(reward, batch), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("add_end", [True, False])
def test_bug13_bug14_bug17_the_reward_model_reads_its_own_tokens(add_end):
    """Text, not ids, goes to another tokenizer: tok(prompt) + tok(response) + its own end token,
    which replaces each of the policy's and is missing where the response was cut."""
    policy_tokenizer = word_tokenizer()
    tokenizer = bpe_tokenizer("the film was good and bad , i loved it so much . " * 20)
    reward = make_reward("llama", tokenizer, policy_tokenizer, add_end)
    ids = policy_tokenizer.convert_tokens_to_ids
    texts = [["good film", "bad"], ["it was good", "very"]]
    responses = [[ids(t.split()) for t in group] for group in texts]
    responses[0][0].append(1)
    responses[1][0].append(4)  # "the", here the policy's second end token
    prompts = [
        common.Prompt(text, policy_tokenizer(text)["input_ids"]) for text in ("i loved the", "so")
    ]
    read = common._as_read_by(reward, common.Batch(prompts, responses))
    for i, j in itertools.product(range(2), range(2)):
        closing = [tokenizer.eos_token_id] if add_end and j == 0 else []
        own = tokenizer(" " + texts[i][j])["input_ids"] + closing
        assert read.responses[i][j] == own
        assert read.prompts[i].tokens == tokenizer(prompts[i].text)["input_ids"]


def test_bug16_a_chat_goes_through_each_tokenizers_own_template_with_one_start_token():
    """The reward model's template opens and closes the turns; the start token stands there once."""
    template = (
        "{{ '<bos> ' }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <end> ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    words = ["user", "assistant", "<end>", "good", "film"]
    tokenizer = word_tokenizer(words, bos=True, chat_template=template)
    other = word_tokenizer([*words, "!"], bos=True, chat_template=template.replace("<end>", "!"))
    messages = [{"role": "user", "content": "film"}]
    text, tokens = encode_prompt(tokenizer, messages)
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens) == "<bos> user film <end> assistant"
    reward = make_reward("llama", other, tokenizer)
    prompt = common.Prompt(text, tokens, source=messages)
    good = tokenizer.convert_tokens_to_ids("good")
    read = common._as_read_by(reward, common.Batch([prompt], [[[good, 1]]]))
    assert other.decode(read.prompts[0].tokens) == "<bos> user film ! assistant"
    assert other.decode(read.responses[0][0]) == "good !"


def test_a_response_is_cut_where_the_reward_models_context_ends():
    """Prompts that leave no room are dropped at load; another tokenizer may need more tokens."""
    tokenizer = word_tokenizer()
    reward = make_reward("gpt2", tokenizer, tokenizer, n_positions=4)
    rewards = common.score(reward, common.Batch(make_prompts([5, 6, 7]), [[[8, 6, 7], [8]]]))
    torch.testing.assert_close(rewards[0, 0], rewards[0, 1])


# ── the choice of rows ──
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_architectures_take_shared_rows(architecture, capsys):
    """As policy, and as reward model where transformers has a classifier."""
    model = make_model(architecture)
    common.choose_rows("--policy", "x", model, common._tried)
    assert model.shared_rows and not capsys.readouterr().out
    try:
        classifier = make_model(architecture, labels=1)
    except ValueError:
        pytest.skip("transformers has no classifier of this architecture")
    common.choose_rows("--reward-model", "x", classifier, common._tried)
    assert classifier.shared_rows


def test_a_model_that_ignores_a_4d_mask_falls_back_to_plain_rows(capsys):
    """It says so in one line, and its log-probs are then right."""
    model = make_model("llama")
    forward = model.module.model.forward

    def deaf(attention_mask=None, **inputs):
        return forward(
            attention_mask=None
            if attention_mask is None or attention_mask.dim() == 4
            else attention_mask,
            **inputs,
        )

    model.module.model.forward = deaf
    common.choose_rows("--policy", "x", model, common._tried)
    assert not model.shared_rows
    assert capsys.readouterr().out.startswith("--policy x: no shared rows (off by")
    expected = naive(make_model("llama"), PROMPTS[0], RESPONSES[0][0])[0]
    assert common.logprobs(model, ragged_batch(), 1.0)[0, 0].item() == pytest.approx(
        expected, abs=1e-4
    )


def test_a_model_that_fits_neither_kind_of_row_is_an_error(capsys):
    """One that ignores position ids and masks cannot be padded at all."""
    model = make_model("gpt2")
    forward = model.module.transformer.forward
    model.module.transformer.forward = lambda input_ids, **_: forward(input_ids)
    with pytest.raises(SystemExit) as stop:
        common.choose_rows("--policy", "x", model, common._tried)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "does not give the numbers of single rows" in error


def test_bug09_models_are_loaded_without_dropout(tmp_path):
    """A checkpoint with dropout gives the same log-probs twice."""
    make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).module.save_pretrained(
        tmp_path
    )
    module = loading._load_module(
        "--policy",
        str(tmp_path),
        transformers.AutoModelForCausalLM,
        torch.float32,
        torch.device("cpu"),
    )
    model = Model(module, [1])
    assert torch.equal(
        common.logprobs(model, ragged_batch(), 1.0), common.logprobs(model, ragged_batch(), 1.0)
    )
