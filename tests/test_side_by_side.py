"""docs/side_by_side.html is what analyze.side_by_side makes of the scripts as they are."""

import html
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from analyze import side_by_side
from analyze.differences import NAMES, differing_lines

MEND = "docs/side_by_side.html is not up to date: run `python -m analyze.side_by_side` and commit"
PAIRS = list(itertools.combinations(NAMES, 2))


class Elements(HTMLParser):
    """The elements of a page, and what its <script> elements hold."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.found, self.scripts, self.inside = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", "code") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + text


@pytest.fixture(scope="module")
def text():
    return side_by_side.PAGE.read_text()


@pytest.fixture(scope="module")
def elements(text):
    return Elements(text)


@pytest.fixture(scope="module")
def facts():
    return json.loads(json.dumps(side_by_side.facts()))  # numbers of lines become text, as there


def test_the_page_is_fresh(text):
    assert text == side_by_side.page(), MEND


def test_the_lines_of_all_scripts_are_in_it(elements, facts):
    """Put together as the page does it: the own lines of a script, the others from the first."""
    first = elements.scripts[NAMES[0]].split("\n")
    for name in NAMES:
        own = iter(elements.scripts[name].split("\n"))
        lines = [None] * facts["scripts"][name]["lines"]
        if name != NAMES[0]:
            for begin, other, count in facts["pairs"][f"{NAMES[0]} {name}"]["same"]:
                lines[other : other + count] = first[begin : begin + count]
        lines = [next(own) if line is None else line for line in lines]
        assert next(own, None) is None
        plain = [html.unescape(re.sub(r"<[^>]*>", "", line)) for line in lines]
        assert plain == side_by_side.source(name), name
        assert any("<i class=k>" in line for line in lines)


@pytest.mark.parametrize("first, second", PAIRS)
def test_every_pair_is_aligned(facts, first, second):
    """Lines called the same are the same; the others, behind the docstring, are as many as said."""
    pair = facts["pairs"][f"{first} {second}"]
    lines, others = side_by_side.source(first), side_by_side.source(second)
    end, count, place, place_other = side_by_side.docstring_end(first), 0, 0, 0
    for begin, other, run in [*pair["same"], [len(lines), len(others), 0]]:
        assert begin >= place and other >= place_other
        assert lines[begin : begin + run] == others[other : other + run]
        if begin > end:
            count += max(begin - place, other - place_other)
        place, place_other = begin + run, other + run
    assert count == pair["differing"] == differing_lines(first, second) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_number_at_a_line_of_code_has_its_equation(facts, name):
    script = facts["scripts"][name]
    numbers = re.findall(r"# \((\d)\)$", "\n".join(side_by_side.source(name)), re.M)
    assert list(script["tags"].values()) == numbers and numbers
    assert set(numbers) <= set(script["equations"])
    for number, (line, text) in script["equations"].items():
        assert side_by_side.source(name)[line].endswith(f"({number})")
        assert "=" in text or len(text) > 20


def test_an_equation_of_two_lines_is_whole(facts):
    assert facts["scripts"]["brain"]["equations"]["3"][1].startswith("L   = KL(α̂ ‖ β̂)")
    step = facts["scripts"]["wind"]["equations"]["1"][1]
    assert step.startswith("π_{t+1} ∝") and "\nψ_θ(y)" in step


def test_parts_are_anchors(facts):
    for name in NAMES:
        titles = [title for _, title in facts["scripts"][name]["sections"]]
        assert titles[:5] == ["docstring", "imports", "flags", "functions", "main"]
        assert {"sample", "score", "targets", "update", "log", "finish"} <= set(titles)
        places = [place for place, _ in facts["scripts"][name]["sections"]]
        assert places == sorted(places) and len(set(titles)) == len(titles)


def test_nothing_comes_from_the_network(text, elements):
    """No element and no style loads anything; the page is one file that stays small."""
    assert all(not {"src", "href", "srcset"} & set(found) for _, found in elements.found)
    assert {tag for tag, _ in elements.found}.isdisjoint({"link", "img", "iframe", "object"})
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    assert len(text.encode()) < 150_000


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_text_can_be_read(text, mode):
    """A contrast of 4.5 (WCAG AA) on every ground that it stands on."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", text)
    colours = {name: luminance((light, dark)[mode]) for name, light, dark in pairs}
    for ground in ("ground", "panel", "left", "right"):
        for ink in (*"ckbfms", "text", "quiet", "link"):
            low, high = sorted((colours[ground], colours[ink]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, ink)
