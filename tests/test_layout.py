"""What models read of a prompt and an answer: templates, tokenizers, reward models of all kinds."""

from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from models import make_model, save, with_large_weights, word_tokenizer, write_jsonl
from tokenizers import decoders, models, normalizers

import brain
import common
from plumbing import check
from plumbing.data import Layout, decode_behind, encode_behind

USER = {"role": "user", "content": "film"}
WORDS = ["user", "assistant", "<think>", "</think>", "film", "good", "bad", "so", "very", "was"]
# As Qwen3's: a finished answer stands behind an empty thought, a prompt does not ask for one.
QWEN3 = (
    "{% for m in messages %}{{ '<turn> ' + m['role'] + ' ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think> </think> ' }}{% endif %}"
    "{{ m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think> </think> ' }}"
    "{% endif %}{% endif %}"
)
NO_SYSTEM = (  # as Gemma's
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + QWEN3
)


def chat_tokenizer(template: str = QWEN3, words=WORDS, **special):
    """Words, with <turn> and <end> as tokens of their own, beside an end of text that no turn has."""
    tokenizer = word_tokenizer(words, chat_template=template, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    return tokenizer


def judge_of(tokenizer, policy_tokenizer, ends, same_tokens=False, **more) -> common.RewardModel:
    """A reward model that reads with `tokenizer` what a policy with the end tokens `ends` writes."""
    model = make_model("llama", len(tokenizer), labels=1, seed=1)
    layout, cpu = Layout(tokenizer, **more), torch.device("cpu")
    return common.RewardModel(
        policy_tokenizer, ends, cpu, model=model, layout=layout, same_tokens=same_tokens
    )


def judge_by(function, tokenizer=None, ends=(1,), **more) -> common.RewardModel:
    """A reward model that is a Python function."""
    cpu = torch.device("cpu")
    return common.RewardModel(
        tokenizer or word_tokenizer(), list(ends), cpu, function=function, **more
    )


def len_in_words(prompts: list[str], responses: list[str]) -> list[int]:
    """Rewards of long responses."""
    return [len(response.split()) for response in responses]


def read_by(judge, prompt: common.Prompt, response: list[int]) -> str:
    """What a reward model reads, as text."""
    batch = common._as_read_by(judge, common.Batch([prompt], [[response]]))
    return judge.layout.tokenizer.decode(batch.prompts[0].tokens + batch.responses[0][0])


def prompt_of(layout: Layout, source) -> common.Prompt:
    text = layout.before(source)
    return common.Prompt(text, layout.encode(source, text), source=source)


# ── templates ──
@pytest.mark.parametrize("same_tokens", [True, False])
@pytest.mark.parametrize("source", ["film", [USER]], ids=["text", "messages"])
def test_c1_both_models_read_what_their_template_writes(same_tokens, source):
    """The reward model what stands around a finished answer, the policy what asks for one."""
    tokenizer = chat_tokenizer()
    other = tokenizer if same_tokens else chat_tokenizer(words=[*WORDS, "more"])
    prompt = prompt_of(Layout(tokenizer), source)
    assert tokenizer.decode(prompt.tokens) == "<turn> user film <end> <turn> assistant"
    good, end = tokenizer.convert_tokens_to_ids(["good", "<end>"])
    judge = judge_of(other, tokenizer, [end], same_tokens)
    whole = other.apply_chat_template(
        [USER, {"role": "assistant", "content": "good"}], tokenize=False
    )
    assert "<think> </think> good" in whole  # else this would show nothing
    assert read_by(judge, prompt, [good, end]) == other.decode(other(whole)["input_ids"])
    cut = whole.partition(" <end> \n")[0].rpartition(" <end>")[0]
    assert read_by(judge, prompt, [good]) == cut


def test_c2_data_responses_end_as_sampled_ones_do():
    """With the turn's end, where text is read as a turn; else with the end of the text."""
    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert Layout(tokenizer).end_token() == end != tokenizer.eos_token_id
    assert Layout(tokenizer, raw=True).end_token() == tokenizer.eos_token_id
    assert Layout(word_tokenizer()).end_token() == word_tokenizer().eos_token_id
    # A template that closes a turn with an ordinary word has no token for it.
    plain = chat_tokenizer(QWEN3.replace("<end>", "so"))
    assert Layout(plain).end_token() == plain.eos_token_id


def test_c2_a_run_closes_data_responses_by_the_turns_end(tmp_path):
    tokenizer = chat_tokenizer()
    name = save(tmp_path / "sft", make_model("llama", len(tokenizer)), tokenizer)
    args = brain.Args(policy=name, max_prompt_tokens=8, max_response_tokens=8)
    run = SimpleNamespace(args=args, device=torch.device("cpu"))
    policy = common.load_policy(run, tokenizer)
    end, good = tokenizer.convert_tokens_to_ids(["<end>", "good"])
    assert policy.end_tokens == [end, tokenizer.eos_token_id]
    prompt = prompt_of(Layout(tokenizer), "film")
    batch = common.encode_responses(tokenizer, policy, [prompt], [["good"]], 9)
    assert batch.responses == [[[good, end]]]


@pytest.mark.parametrize("raw", [True, False])
def test_c5_text_meets_a_chat_model_as_a_users_turn_unless_raw(raw):
    tokenizer = chat_tokenizer()
    text, tokens = Layout(tokenizer, raw).before("film"), "<turn> user film <end> <turn> assistant"
    assert text.strip() == ("film" if raw else tokens)
    assert Layout(tokenizer, raw).before([USER]).strip() == tokens  # messages are no text


def test_c5_each_model_by_its_own_template():
    """A policy without a template and a chat-trained reward model, and the other way round."""
    plain, chat = word_tokenizer(WORDS), chat_tokenizer()
    good, eos = plain.convert_tokens_to_ids(["good", "<eos>"])
    prompt = prompt_of(Layout(plain), "film")
    whole = "<turn> user film <end> <turn> assistant <think> </think> good <end>"
    assert read_by(judge_of(chat, plain, [eos]), prompt, [good, eos]) == whole
    assert read_by(judge_of(chat, plain, [eos], raw=True), prompt, [good, eos]) == "film good <eos>"
    end = chat.convert_tokens_to_ids("<end>")
    prompt = prompt_of(Layout(chat), "film")
    assert read_by(judge_of(plain, chat, [end]), prompt, [good, end]) == "film good <eos>"


def test_c5_hh_transcripts_become_their_turns():
    text = "\n\nHuman: film\n\nAssistant: so so\n\nHuman: very\n\nAssistant:"
    roles = [(t["role"], t["content"]) for t in Layout(chat_tokenizer()).turns(text)]
    assert roles == [("user", "film"), ("assistant", "so so"), ("user", "very")]
    other = "\n\nHuman: film"  # not a transcript that an answer continues
    assert Layout(chat_tokenizer()).turns(other) == [{"role": "user", "content": other}]


def test_c10_the_template_takes_arguments(capsys):
    layout = Layout(chat_tokenizer(), arguments='{"enable_thinking": false}')
    assert layout.before("film").strip().endswith("<turn> assistant <think> </think>")
    assert not Layout(chat_tokenizer()).before("film").strip().endswith("</think>")
    with pytest.raises(SystemExit):
        Layout(chat_tokenizer(), arguments="{enable")
    assert "--chat-template-kwargs {enable" in capsys.readouterr().err


def test_c6_rows_that_a_model_refuses_are_dropped_at_load(tmp_path, capsys):
    """By either template; or too long for the reward model, which has another tokenizer."""
    system = [{"role": "system", "content": "good"}, USER]
    rows = [{"prompt": [USER], "completion": "good"}] * 3 + [{"prompt": system, "completion": "so"}]
    rows += [{"prompt": [{"role": "user", "content": "film " * 20}], "completion": "good"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:1])
    policy = chat_tokenizer()
    other = chat_tokenizer(NO_SYSTEM)
    name = save(
        tmp_path / "rm",
        make_model("gpt2", len(other), labels=1, n_positions=20),
        other,
    )
    args = brain.Args(dataset=str(tmp_path), reward_model=name, max_prompt_tokens=99)
    args.max_response_tokens = 8
    train, _ = common.load_prompts(args, policy)
    said = capsys.readouterr().out
    assert len(train) == 3
    assert "dropped 1 that a chat template refuses (no system role)" in said
    assert "dropped 1 that leave --reward-model's context no room for a response" in said


# ── tokens ──
def sentencepiece_tokenizer():
    """It writes a space before every text, as those of Llama 2, Mistral 7B and Phi-3."""
    pieces = ["<pad>", "<eos>", "<unk>", "▁", "▁the", "▁film", "▁sat", "sat", "▁so", "so", ":"]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    write, space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")], decoders.Strip(" ", 1)
    backend.normalizer = normalizers.Sequence(write)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), space])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def test_c9_tokens_of_an_answer_are_those_behind_its_prompt():
    tokenizer = sentencepiece_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(tokenizer(" sat", add_special_tokens=False)["input_ids"]) == ["▁", "▁sat"]
    (spaced, joined) = encode_behind(tokenizer, "the film", [" sat", ":"])
    assert (tokens(spaced), tokens(joined)) == (["▁sat"], [":"])


def test_c9_text_of_an_answer_keeps_the_space_behind_its_prompt():
    tokenizer = sentencepiece_tokenizer()
    prompt = tokenizer("the film")["input_ids"]
    sat, colon = tokenizer.convert_tokens_to_ids(["▁sat", ":"])
    assert tokenizer.decode([sat]) == "sat"  # the space is lost where it stands alone
    assert decode_behind(tokenizer, prompt, [[sat], [colon, sat], []]) == [" sat", ": sat", ""]


def test_where_the_prompts_last_word_melts_into_the_answer_it_is_encoded_alone():
    tokenizer = word_tokenizer(["film", "films", "s"])
    (ids,) = encode_behind(tokenizer, "film", ["s"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["s"]


def test_c5_a_chat_answer_strips_the_space_behind_plain_prompts(tmp_path):
    """As HH's answers have it: " good" is due behind "Assistant:", not behind a turn's begin."""
    text = "\n\nHuman: film\n\nAssistant:"
    row = {"chosen": f"{text} good", "rejected": f"{text} bad"}
    write_jsonl(tmp_path / "train.jsonl", [row] * 4)
    args = brain.Args(dataset=str(tmp_path), reward_model="builtins:len", max_prompt_tokens=99)
    for tokenizer, expected in ((chat_tokenizer(), "good"), (word_tokenizer(WORDS), " good")):
        (prompt, *_), _ = common.load_prompts(args, tokenizer)
        assert prompt.chosen == expected
    # What a plain policy samples reaches a chat-trained reward model without it as well.
    plain = sentencepiece_tokenizer()
    chat = sentencepiece_tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m['content'] + ':' }}{% endfor %}"
    sat, eos = plain.convert_tokens_to_ids(["▁sat", "<eos>"])
    judge = judge_of(chat, plain, [eos])
    batch = common.Batch([prompt_of(Layout(plain), "film")], [[[sat, eos]]])
    (group,) = common._as_read_by(judge, batch).responses
    assert chat.convert_ids_to_tokens(group[0]) == ["sat", ":"]


@pytest.mark.parametrize("same_tokens", [True, False])
def test_c12_special_tokens_inside_a_response_reach_each_reward_model(same_tokens):
    tokenizer = chat_tokenizer()
    other = tokenizer if same_tokens else chat_tokenizer(words=[*WORDS, "more"])
    good, turn, end = tokenizer.convert_tokens_to_ids(["good", "<turn>", "<end>"])
    judge = judge_of(other, tokenizer, [end], same_tokens)
    read = read_by(judge, prompt_of(Layout(tokenizer), "film"), [good, turn, good, end])
    assert read.endswith("good <turn> good <end>")


# ── kinds of reward models ──
SMALL = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "pad_token_id": 0,
}
ENCODERS = ["bert", "roberta", "deberta-v2", "distilbert", "modernbert"]


def encoder_tokenizer():
    """Words; a pair of texts stands as <cls> one <sep> two <sep>."""
    tokenizer = word_tokenizer(["film", "good", "bad", "very", "so", "was"])
    tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<cls>", "<sep>")]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B <sep>", special_tokens=ids
    )
    tokenizer.model_max_length = 60
    return tokenizer


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_scores_a_pair_of_texts_by_its_own_head(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    torch.manual_seed(3)
    module = transformers.AutoModelForSequenceClassification.from_config(config)
    module = with_large_weights(module, std=0.3)
    tokenizer, own = encoder_tokenizer(), word_tokenizer(["film", "good", "bad", "very", "so"])
    args = brain.Args(reward_model=save(tmp_path / "rm", module, tokenizer))
    run = SimpleNamespace(args=args, device=torch.device("cpu"))
    policy = make_model("llama", len(own))
    judge = common.load_reward_model(run, policy, own)
    texts = [["good", "so very bad"], ["very", "film"]]
    sources = ["film", "so so film"]
    prompts = [prompt_of(Layout(own), source) for source in sources]
    batch = common.encode_responses(own, policy, prompts, texts, 9)
    rewards = common.score(judge, batch)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        # as written behind the prompt: the response's text begins with its space
        pair = tokenizer(sources[i], texts[i][j], return_tensors="pt")
        with torch.no_grad():
            alone = module(**pair).logits.item()
        assert rewards[i, j].item() == pytest.approx(alone, abs=1e-4)
    assert rewards.std() > 1e-3


def test_a_classifier_that_scores_a_batch_unlike_single_texts_is_refused(capsys):
    """As one that reads the padding of the shorter text."""

    def longest(texts):
        (group,) = texts
        return torch.full((1, len(group)), float(max(map(len, group))))

    check.require_single_texts("--reward-model", "x", lambda texts: torch.ones(1, len(texts[0])))
    with pytest.raises(SystemExit):
        check.require_single_texts("--reward-model", "x", longest)
    error = capsys.readouterr().err
    assert error.startswith("error: --reward-model x: scores a batch unlike single texts, off by")


def test_a_function_gives_the_rewards(tmp_path):
    """A file's function of the data set's prompts and of texts; the loop trains by it."""
    (tmp_path / "judge.py").write_text(
        "def count(prompts, responses):\n"
        "    assert all(isinstance(prompt, str) for prompt in prompts)\n"
        "    return [float(response.split().count('good')) for response in responses]\n\n\n"
        "def same(prompts, responses, references):\n"
        "    return [float(one.strip() == two) for one, two in zip(responses, references)]\n\n\n"
        "def weighed(prompts, responses, weight=3.0):\n"
        "    return [weight * len(response.split()) for response in responses]\n"
    )
    own = word_tokenizer(WORDS)
    good, bad, eos = own.convert_tokens_to_ids(["good", "bad", "<eos>"])
    prompt = common.Prompt("film", own("film")["input_ids"], reference="good")
    batch = common.Batch([prompt], [[[good, good, eos], [bad, eos], [good, eos]]])
    policy, cpu = make_model("llama", len(own)), torch.device("cpu")
    for name, expected in (("count", [2, 0, 1]), ("same", [0, 0, 1]), ("weighed", [6, 3, 3])):
        args = brain.Args(reward_model=f"{tmp_path}/judge.py:{name}")
        judge = common.load_reward_model(SimpleNamespace(args=args, device=cpu), policy, own)
        assert common.score(judge, batch).tolist() == [expected]
    args = brain.Args(reward_model="models:count_bad")
    models_module = __import__("models")
    models_module.count_bad = lambda prompts, responses: [r.count("bad") for r in responses]
    judge = common.load_reward_model(SimpleNamespace(args=args, device=cpu), policy, own)
    assert common.score(judge, batch).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nowhere.py:reward", "No such file"),
        ("math:nothing", "no attribute 'nothing'"),
        ("no_module_here:f", "No module named"),
    ],
)
def test_a_function_that_is_not_there(name, reason, capsys):
    args = brain.Args(reward_model=name)
    run = SimpleNamespace(args=args, device=torch.device("cpu"))
    with pytest.raises(SystemExit):
        common.load_reward_model(run, make_model("llama"), word_tokenizer())
    error = capsys.readouterr().err
    assert error.startswith(f"error: --reward-model {name}") and reason in error


def test_a_function_that_gives_too_few_rewards(capsys):
    judge = judge_by(lambda prompts, responses: [0.0])
    with pytest.raises(SystemExit):
        common.score(judge, common.Batch([common.Prompt("the", [5])], [[[6, 1], [7, 1]]]))
    assert "gave 1 rewards for 2 responses" in capsys.readouterr().err


def test_d1_a_response_that_was_cut_costs_the_penalty():
    judge = judge_by(lambda prompts, responses: [1.0] * len(responses), missing_eos_penalty=0.25)
    batch = common.Batch([common.Prompt("the", [5])], [[[6, 1], [7]]])
    assert common.score(judge, batch).tolist() == [[1.0, 0.75]]


# ── what a run says and measures ──
def test_d1_references_are_cut_as_samples_are():
    """Whole completions beside cut samples would make a policy that learns to be short look good."""
    own = word_tokenizer(WORDS)
    policy = make_model("llama", len(own))
    judge = judge_by(len_in_words, own, policy.end_tokens)
    prompts = [common.Prompt("film", own("film")["input_ids"], "good " * k) for k in (2, 9)]
    run = SimpleNamespace(args=brain.Args(max_response_tokens=4))
    scored = common.score_references(run, policy, judge, prompts)
    assert [prompt.reference_reward for prompt in scored] == [2, 4]


def test_c5_a_run_prints_what_both_models_read(capsys):
    tokenizer = chat_tokenizer()
    policy = make_model("llama", len(tokenizer))
    policy.end_tokens = [tokenizer.convert_tokens_to_ids("<end>")]
    prompt = prompt_of(Layout(tokenizer), "film")
    judge = judge_of(tokenizer, tokenizer, policy.end_tokens, same_tokens=True)
    run = SimpleNamespace(args=brain.Args())
    common.score_references(run, policy, judge, [common.replace(prompt, reference="good")])
    policy_line, judge_line = capsys.readouterr().out.splitlines()
    assert policy_line == "--policy reads '<turn> user film <end> <turn> assistant good <end>'"
    assert judge_line == (
        "--reward-model reads '<turn> user film <end> <turn> assistant <think> </think> good <end>'"
    )


def test_b3_the_gap_between_log_probs_as_drawn_and_recomputed():
    """Rounding for a sound sampler, nats for a broken one; for all samples of a batch."""
    model = make_model("llama")
    prompts = [common.Prompt("", [5, 6, 7]), common.Prompt("", [8])]
    batch = common.sample(model, prompts, 3, 6, 1.0, seed=0)
    logprobs = common.logprobs(model, batch, 1.0)
    assert common.sampling_gap(batch, logprobs)["kl/sampling_gap"] < 1e-4
    both = batch.beside(batch)
    shift = torch.tensor([[0.0, 3.0, -3.0] * 2, [0.0] * 6])
    gap = common.sampling_gap(both, torch.cat([logprobs, logprobs], 1) + shift)
    assert gap["kl/sampling_gap"].item() == pytest.approx(1, abs=1e-4)
    assert common.sampling_gap(common.Batch(prompts, batch.responses), logprobs) == {}


def test_e2_the_advice_leaves_half_of_the_samples(capsys):
    """The τ it names is used: 1 / Σ weight² of exp(r / τ) is then half of N."""
    rewards = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 3
    common.say_effective_samples(rewards, "--beta", 0.1)
    said = capsys.readouterr().out
    spread, now, then, left = (
        float(said.split(word)[1].split()[0].rstrip(":"))
        for word in ("reward/std ", "leaves ", "samples, --beta ", "leave ")
    )
    assert spread == pytest.approx(rewards.std(1, correction=0).mean().item(), rel=0.01)
    for temperature, expected in ((0.1, now), (then, left)):
        weights = torch.softmax(rewards / temperature, 1)
        ours = (1 / weights.square().sum(1)).mean().item()
        assert ours == pytest.approx(expected, abs=0.15)
    assert left == pytest.approx(4, abs=0.1) and now < 1.5
    common.say_effective_samples(torch.ones(2, 4), "--beta", 0.1)
    assert capsys.readouterr().out.startswith("reward/std 0: all samples of a prompt have the same")


@pytest.mark.parametrize("missing", ["reward-model", "dataset", "lr"])
def test_e1_a_policy_of_ones_own_needs_its_reward_model_data_and_step_size(missing, capsys):
    flags = {"policy": "mine", "reward-model": "rm", "dataset": "data", "lr": "1e-6"}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    assert common.parse_args(brain.Args, words).lr == 1e-6
    with pytest.raises(SystemExit):
        common.parse_args(brain.Args, [word for word in words if missing not in word])
    error = capsys.readouterr().err
    assert error.startswith(f"error: --policy mine: name --{missing} as well")
    assert common.parse_args(brain.Args, ["--steps", "3"]).steps == 3  # the toy keeps its defaults


def test_d1_the_win_rate_of_ended_samples_leaves_out_the_others():
    """Some of 40 samples end within 12 tokens and some do not; a reward is the response's length."""
    own = word_tokenizer(WORDS)
    policy = make_model("llama", len(own))
    judge = judge_by(len_in_words, own, policy.end_tokens)
    tokens = own("film")["input_ids"]
    prompts = [common.Prompt("film", tokens, "good", reference_reward=5.0)] * 40
    args = brain.Args(max_response_tokens=12)
    run = SimpleNamespace(args=args, rank=0, world=1, average=lambda x: x)
    metrics, samples = common.evaluate(run, 1, policy, policy, judge, prompts)
    ended = [sample["reward"] for sample in samples if sample["ended"]]
    assert 5 < len(ended) < 35
    wins = [(reward > 5) + 0.5 * (reward == 5) for reward in ended]
    assert metrics["eval/win_rate_ended"] == pytest.approx(sum(wins) / len(wins))
    assert metrics["eval/win_rate_ended"] != metrics["eval/win_rate"]
