"""docs/results.md and docs/frontier.png, from the raw lines of `analyze.compare` and its siblings.

    python -m analyze.results_page             # draws the picture and writes the page
    python -m analyze.results_page --readme    # fills the README's blocks as well

Works on the runs that there are, and says how many of how many. The blocks of the README are
`frontier` and `results`, between markers as `analyze.readme` has them.
"""

import statistics
from dataclasses import dataclass

import tyro

from analyze.claims import Claim, Evidence, claims
from analyze.compare import (
    RESULTS,
    WORLDS,
    by_label,
    defaults_table,
    matched_table,
    path_of,
    points,
    shown,
)
from analyze.readme import filled
from analyze.sweep import read_results
from analyze.tables import one_line, table
from plumbing.report import COLOURS, panels
from plumbing.run import ROOT, require

SCRIPTS = ("brain", "gdc", "dpo", "wind", "bond", "ppo")  # in the order of their colours
MARKS = "os^Dv"  # of the variants of one script
LINES = ("-", "--", ":", "-.", (0, (1, 3)))
SEEDS = {"tiny": (1, 2, 3, 4, 5), "real": (1, 2)}
TITLES = {
    "win_rate": "win rate by the reward model",
    "judge_win_rate": "win rate by the gold score",
}


@dataclass
class Args:
    readme: bool = False
    """fill the blocks of README.md too"""


# ── Picture ───────────────────────────────────────────────────────────────────────────────────────


def mean_curve(runs: list[dict], key: str) -> list[tuple[float, float]]:
    """(KL, metric), means over the runs, at each step that all of them have."""
    curves = [{point["step"]: point for point in line["curve"]} for line in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return [
        tuple(statistics.mean(curve[step][name] for curve in curves) for name in ("kl", key))
        for step in steps
    ]


def frontier(lines: list[dict], best: list[dict]):
    """Both win rates against the KL: a line per method, a mark where its runs end."""
    figure, axes = panels(1, 2, (11, 5.6))
    groups, seen = by_label(lines, list(WORLDS["tiny"].arms)), dict.fromkeys(SCRIPTS, 0)
    for label, runs in groups.items():
        script, place = runs[0]["script"], seen[runs[0]["script"]]
        seen[script] += 1
        style = {"color": COLOURS[SCRIPTS.index(script)], "ls": LINES[place]}
        for axis, key in zip(axes, TITLES):
            x, y = zip(*mean_curve(runs, key))
            axis.plot(x, y, lw=1.4, **style)
            style_of_end = {"color": style["color"], "marker": MARKS[place], "ms": 7}
            axis.plot(x[-1], y[-1], **style_of_end)
        named = {"marker": MARKS[place], "label": f"{label} ({len(runs)})"}
        axes[0].plot([], [], lw=1.4, **style, **named)
    if best:
        for axis, key in zip(axes, TITLES):
            curve = best[0]["curve"]
            x, y = ([point[name] for point in curve] for name in ("kl", key))
            axis.plot(x, y, "k<-", ms=5, lw=1)
            for point in curve[1:]:
                at = {"xytext": (4, -12), "textcoords": "offset points", "fontsize": 8}
                axis.annotate(str(point["n"]), (point["kl"], point[key]), **at)
        axes[0].plot([], [], "k<-", ms=5, lw=1, label="best of N, KL at most log N − (N − 1)/N")
    for axis, title in zip(axes, TITLES.values()):
        axis.set(xlabel="KL from the SFT model, nats per response", title=title)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


# ── Page ──────────────────────────────────────────────────────────────────────────────────────────


def progress_of(name: str, lines: list[dict]) -> str:
    """How many of the planned runs there are."""
    count = len(WORLDS[name].arms) * len(SEEDS[name])
    return f"{len(lines)} of {count} runs"


def where_from(lines: list[dict]) -> str:
    """Commits, versions and machine of raw lines."""
    commits = sorted({line["commit"][:7] for line in lines})
    torch = sorted({line["versions"]["torch"] for line in lines})
    devices = sorted({line["device"] for line in lines})
    cores = sorted({f"{line['threads']} of {line['cores']} cores" for line in lines})
    words = [f"commit {', '.join(commits)}", f"torch {', '.join(torch)}", *devices, *cores]
    return "; ".join(words)


def claims_table(found: list[Claim]) -> str:
    """A row per claim."""
    rows = []
    for number, claim in enumerate(found, 1):
        numbers = "<br>".join(check.says + MARK[check.holds] for check in claim.checks)
        papers = f"<br>**Theirs.** {claim.papers}" if claim.papers else ""
        rows.append(
            [
                number,
                f"**{claim.source}.** {claim.text}{papers}",
                f"{claim.experiment}<br>{numbers}",
                f"**{claim.verdict}**",
                claim.why,
            ]
        )
    rows = [[one_line(str(cell)) for cell in row] for row in rows]
    return table(["", "claim", "our experiment and numbers", "verdict", "why"], rows)


MARK = {True: " ✓", False: " ✗", None: " (open)"}


def best_table(best: list[dict]) -> str:
    """The best of N, mean over the seeds."""
    head = ["N", "KL at most, nats", "win rate by the reward model", "by the judge"]
    rows = []
    for place, point in enumerate(best[0]["curve"]):
        cells = [
            shown([line["curve"][place][key] for line in best]) for key in TITLES if key in point
        ]
        rows.append([point["n"], f"{point['kl']:.2f}", *cells])
    return table(head, rows)


def results_block(lines: list[dict]) -> str:
    """The README's table: one row per method that has runs."""
    world, rows = WORLDS["tiny"], []
    budget = world.budgets[1]
    for label, runs in by_label(lines, list(world.arms)).items():
        ends, there = points(runs, None), points(runs, budget)
        cells = [shown([point[key] for point in ends]) for key in (*TITLES, "kl")]
        cells += [shown([point["judge_win_rate"] for point in there]), len(runs)]
        rows.append([f"`{runs[0]['script']}.py`", label, *cells])
    head = ["", "method", "win rate by the reward model", "by gold", "KL, nats"]
    text = table([*head, f"by gold at {budget:g} nats", "seeds"], rows)
    flags = "[docs/results.md](docs/results.md#the-embedded-problem)"
    return (
        f"{text}\n\nMeans ± half of the 95 % interval over the seeds, with the flags in {flags}, "
        "and else the scripts' defaults, by 128 held-out prompts; "
        f"{progress_of('tiny', lines)} so far. The claims of the papers, one by one, with what we "
        "find: [docs/results.md](docs/results.md)."
    )


FRONTIER = """![win rate against KL, all methods](docs/frontier.png)

How often a response beats the data set's completion, against how far the policy has moved from the
SFT model: by the reward model that it was trained on, and by the gold score, which no model has
seen. A line is the mean over a method's runs (how many: in brackets), and its mark is where they
end."""
BEST = """The black line is the best of N samples of the SFT model, drawn where the bound of its KL
is, log N − (N − 1)/N: the true one lies left of it or on it."""


def readme_parts() -> dict[str, str]:
    """The README's blocks by name."""
    evidence = Evidence()
    caption = f"{FRONTIER}\n{BEST}" if evidence.best else FRONTIER
    return {"frontier": caption, "results": results_block(evidence.tiny)}


def page() -> str:
    """The text of docs/results.md."""
    evidence = Evidence()
    lines, best = evidence.tiny, evidence.best
    real, best_real = read_results(path_of("real")), read_results(RESULTS / "best_of_real.jsonl")
    world = WORLDS["tiny"]
    parts = [
        "# Results",
        INTRO,
        "## The claims of the papers",
        CLAIMS,
        claims_table(claims(evidence)),
        "## The embedded problem",
        f"{progress_of('tiny', lines)} ({where_from(lines)}).",
        "![win rate against KL](frontier.png)",
        f"{FIGURE}\n{BEST}" if best else FIGURE,
        "**At the end of each run**, by the flags below and else the scripts' defaults; mean ± "
        "half of the 95 % interval over the seeds:",
        defaults_table(lines, list(world.arms)),
        "**Where a run first reaches a KL**, by a line between evaluations:",
        matched_table(lines, list(world.arms), best, world.budgets),
        "**The flags:**",
        table(
            ["", "command"],
            [
                [label, f"`{runs[0]['command'].rsplit(' --seed', 1)[0]}`"]
                for label, runs in by_label(lines, list(world.arms)).items()
            ],
        ),
    ]
    if best:
        parts += ["**Best of N** samples of the SFT model by the reward model:", best_table(best)]
    parts += ["## SmolLM2-135M on real text", f"{progress_of('real', real)} so far. {REAL}"]
    if real:
        world = WORLDS["real"]
        parts += [
            f"({where_from(real)})",
            defaults_table(real, list(world.arms)),
            "Where a run first reaches a KL:",
            matched_table(real, list(world.arms), best_real, world.budgets),
        ]
    if best_real:
        parts += ["Best of N:", best_table(best_real)]
    return "\n\n".join(parts) + "\n"


INTRO = """What the papers claim, what the implementations show. Made by `python -m
analyze.results_page` from the raw lines of `analyze/results/`, which `python -m analyze.compare`
writes (command, commit, seed, versions, device, metrics by step); the ablation and the variance of
gradients have scripts and pages of their own."""
CLAIMS = """Each claim of the two documents that this project began from (the BRAIn authors' blog,
and the abstract of WIND with that of BOND beside it) that is about results. A verdict follows from
the checks by the rule that `analyze/claims.py` states, and is computed: ✓ holds, ✗ does not.
Differences are between runs of the same seed, with 95 % intervals. The bodies of BRAIn and WIND
could not be read, so experiments are ours. The embedded model is tiny: a claim about billions of
parameters that fails here is not refuted, it is not reproduced in this setting. No correction is
made for the number of checks, and what was chosen after first runs stands in `analyze/claims.py`:
the KL at which methods are compared, and how often DPO is evaluated."""
FIGURE = """A line is the mean over a method's seeds (their number: in brackets), at every tenth
step of a run (of DPO: every fourth), with a mark at its end."""
REAL = """Made by `python -m analyze.compare --world real`, where movie reviews are to go on
positively ([the task](real.md)): policy and reward model are those of `python -m prepare.real`, a
run has 12 steps of 8 prompts × 8 samples, no flag is tuned, and the judge is an encoder with a
ridge regression on people's ratings. A win rate over 128 prompts has a standard error of 0.04, and
there are two seeds: they say that the scripts work on a real model, and hardly more."""


def main(args: Args) -> None:
    """Draws and writes."""
    evidence = Evidence()
    require(evidence.tiny, f"{path_of('tiny')}: no runs yet; python -m analyze.compare")
    figure = frontier(evidence.tiny, evidence.best)
    figure.savefig(ROOT / "docs" / "frontier.png", dpi=110)
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
    if args.readme:
        path = ROOT / "README.md"
        path.write_text(filled(path.read_text(encoding="utf-8"), readme_parts()), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
