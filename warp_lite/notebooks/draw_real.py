"""The pictures and sentences of the notebook on a real language model, from what smollm2.json holds (`real_report`).

Thin lines are single seeds, each the mean over its runs; thick ones the mean of the seeds at each η, or step. Rewards
are in standard deviations of SFT samples, KL in nats per sequence.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evidence import real
from ..evidence.drawing import VERDICT_COLOURS
from ..evidence.effects import Rows
from ..evidence.real_units import SFT_BETAS_REAL, SHOWN_ETAS, WARP
from ..evidence.wording import cell
from ..viewing.explorer.grid import changed_words
from ..viewing.explorer.widget import NEW_WORD
from ..viewing.plots import COLOURS, KL_LABEL, column, iteration_colour
from .draw_evidence import AXES, REWARD, draw_outcome
from .figures import draw_limit, shades

# Of each line: its name in the figures, and its colour.
LINES = {"run": ("one run", COLOURS["single"]), "slerp-4": ("WARP, iteration 1: four merged", iteration_colour(1)),
         "WARP, 2": ("WARP, iteration 2", iteration_colour(2)),
         "batch of 16, 2": ("one run, batches of 16, two iterations", COLOURS["batch"]),
         "lerp-4": ("LERP of four, η to 1.8", COLOURS["lerp"]),
         "trajectory": ("a run's trajectory", COLOURS["ema"])}
FRONTS = ("run", "slerp-4", "WARP, 2", "batch of 16, 2")
IN_TEXT = {"length": "length (tokens; dotted: where they are cut)", "distinct": "distinct pairs of tokens (share)",
           "perplexity": "perplexity of the SFT policy's samples"}
SHORT_WORDS = 62  # characters of a claim on a line


def rows_of(found: Mapping) -> Rows:
    """The fronts and trajectories of the report, by line and seed."""
    return Rows(found["world"], found["rows"])


def draw_line(axes: Axes, rows: Rows, line: str | dict, what: str = "reward", x: str = "kl", name: str = "",
              colour: str = "") -> None:
    """One line of the report's: every seed thin, the mean of them thick. `name` and `colour` stand in the place of
    those of `LINES`."""
    usual = LINES.get(line if isinstance(line, str) else line["line"], (line, COLOURS["single"]))
    style = {"color": colour or usual[1]}
    for seed in rows.seeds:
        points = rows.mean_curve(line, [seed])
        axes.plot(column(points, x), column(points, what), lw=0.7, alpha=0.5, **style)
    points = rows.mean_curve(line)
    axes.plot(column(points, x), column(points, what), marker="o", ms=3, label=name or usual[0], **style)


def draw_real_fronts(found: Mapping, lines: Sequence[str] = FRONTS) -> Figure:
    """Fronts of KL against reward, with best-of-n, and the limit as far as it is known."""
    rows = rows_of(found)
    figure, axes = plt.subplots(figsize=(8.4, 5), layout="constrained")
    for line in lines:
        draw_line(axes, rows, line)
    draw_limit(axes, found["limit"])
    best = found["best_of_n"]
    axes.plot(column(best, "kl"), column(best, "reward"), "x", color=COLOURS["best_of_n"], ms=6, mew=1.5,
              label=f"best of n, n = 1, 2, 4 … {best[-1]['n']} (its KL is an upper bound)")
    axes.set(xlabel=KL_LABEL, ylabel=REWARD,
             title=f"Fronts of {len(rows.seeds)} seeds (thin) and their mean (thick)")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_predictions(found: Mapping) -> Figure:
    """Each claim on an axis of its own: the interval that the tiny worlds predict, and what was measured, with its
    interval."""
    claims = [claim for claim in found["claims"] if claim["effect"] is not None]
    figure, panels = plt.subplots(len(claims), 1, figsize=(10.5, 0.62 * len(claims) + 1), squeeze=False)
    for axes, claim in zip(panels[:, 0], claims):
        draw_outcome(axes, claim)
        words = textwrap.fill(f"{claim['statement']} ({claim['unit']})", SHORT_WORDS)
        axes.text(-0.02, 0.5, words, transform=axes.transAxes, ha="right", va="center", fontsize=8)
    axes.plot([], [], color=COLOURS["lerp"], alpha=0.35, lw=8, label="predicted by the tiny worlds")
    for verdict in dict.fromkeys(claim["verdict"] for claim in claims):
        axes.plot([], [], "o-", color=VERDICT_COLOURS[verdict], ms=5, label=f"measured: {verdict}")
    figure.suptitle(real.came_true(found)[0], x=0.01, ha="left", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=5, fontsize=8,
                  bbox_to_anchor=(1, 1 - 0.36 / figure.get_figheight()))
    figure.subplots_adjust(left=0.42, right=0.985, top=1 - 0.85 / figure.get_figheight(), bottom=0.03, hspace=1.1)
    return figure


def draw_trajectories(found: Mapping) -> Figure:
    """Left, what anchors make of a run on its way; right, a run's trajectory and the fronts of LITI beside it."""
    rows = rows_of(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.4), layout="constrained", sharey=True)
    draw_line(left, rows, "trajectory", name="EMA anchor, β = 0.1")
    for beta, shade in zip(SFT_BETAS_REAL, shades(COLOURS["sft"], len(SFT_BETAS_REAL))):
        draw_line(left, rows, f"SFT, β = {beta:g}", name=f"SFT anchor, β = {beta:g}", colour=shade)
    draw_line(right, rows, "trajectory")
    draw_line(right, rows, real.ONE, name="LITI of that run")
    draw_line(right, rows, "slerp-4", name="LITI of four merged")
    left.set(xlabel=KL_LABEL, ylabel=REWARD, title="Runs on their way, by anchor")
    right.set(xlabel=KL_LABEL, title="A run on its way, and fronts of LITI")
    for axes in (left, right):
        axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_gold(found: Mapping, lines: Sequence[str] = FRONTS) -> Figure:
    """The gold reward against the proxy along fronts, and against KL: where the curves bend down, more of the proxy
    buys no more of the truth."""
    rows = rows_of(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.4), layout="constrained", sharey=True)
    for line in lines:
        draw_line(left, rows, line, "gold", "reward")
        draw_line(right, rows, line, "gold")
    left.set(xlabel="proxy " + REWARD, ylabel=AXES["gold"], title="Gold reward by proxy reward")
    right.set(xlabel=KL_LABEL, title="Gold reward by KL")
    left.legend(loc="best", fontsize=8)
    return figure


def draw_in_text(found: Mapping, lines: Sequence[str] = ("slerp-4", "WARP, 2", "batch of 16, 2")) -> Figure:
    """What becomes of the text along fronts: length, diversity, and what the SFT policy's own samples cost the policy.
    """
    rows = rows_of(found)
    figure, panels = plt.subplots(1, len(IN_TEXT), figsize=(12.4, 3.8), layout="constrained")
    for axes, (what, words) in zip(panels, IN_TEXT.items()):
        for line in lines:
            draw_line(axes, rows, line, what)
        axes.set(xlabel=KL_LABEL, ylabel=words)
    panels[0].axhline(WARP.max_new_tokens, color="black", ls=":", lw=1)
    panels[0].legend(loc="best", fontsize=8)
    return figure


# --- texts ----------------------------------------------------------------------------------------


def written(found: Mapping, seed: int, iteration: int, eta: float, prompt: str) -> Mapping:
    """The completion of a prompt that is nearest to an η, with its rewards. Raises ValueError where there is none."""
    rows = [row for row in found["completions"] if (row["seed"], row["iteration"], row["prompt"]) ==
            (seed, iteration, prompt)]
    if not rows:
        raise ValueError(f"there is no completion of {prompt!r} with seed {seed}, iteration {iteration}; "
                         f"`shown_prompts` has the prompts")
    return min(rows, key=lambda row: abs(row["eta"] - eta))


def shown_prompts(found: Mapping) -> list[str]:
    """The prompts whose completions were kept, in their order."""
    return list(dict.fromkeys(row["prompt"] for row in found["completions"]))


def completions_page(found: Mapping, seed: int, iteration: int, prompts: Sequence[str],
                     etas: Sequence[float] = SHOWN_ETAS) -> str:
    """Completions of the same random numbers at each η as HTML; marked: what differs from η = 0 (`changed_words`)."""
    parts = []
    for prompt in prompts:
        first = written(found, seed, iteration, 0.0, prompt)["completion"]
        parts.append(f"<p style='margin:.8em 0 .2em'><b>{html.escape(prompt)} …</b></p>")
        for eta in etas:
            row = written(found, seed, iteration, eta, prompt)
            words = " ".join(f"<mark style='{NEW_WORD}'>{html.escape(word)}</mark>" if new else html.escape(word)
                             for word, new in changed_words(first, row["completion"]))
            parts.append(f"<p style='margin:.1em 0'><small>η = {row['eta']:g}, proxy {row['reward']:+.2f}, gold "
                         f"{row['gold']:+.2f}</small> {words}</p>")
    return "<div style='line-height:1.4'>" + "".join(parts) + "</div>"


def draw_place(found: Mapping, iteration: int, eta: float, prompt: str, seed: int = 0) -> Figure:
    """A point of the mean front of an iteration of WARP; prints its numbers, and what the policy there writes."""
    rows = rows_of(found)
    line = "slerp-4" if iteration == 1 else f"WARP, {iteration}"
    points = rows.mean_curve(line)
    place = {name: float(np.interp(eta, column(points, "eta"), column(points, name)))
             for name in ("kl", "reward", "gold", "length")}
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    for other in ("slerp-4", "WARP, 2"):
        draw_line(axes, rows, other)
    draw_limit(axes, found["limit"])
    axes.plot(place["kl"], place["reward"], "o", ms=11, mfc="none", mew=2, color="black")
    axes.set(xlabel=KL_LABEL, ylabel=REWARD, title=f"iteration {iteration}, η = {eta:.2f}: {place['kl']:.2f} nats, "
                                                   f"reward {place['reward']:+.2f}")
    axes.legend(loc="lower right", fontsize=8)
    row = written(found, seed, iteration, eta, prompt)
    print(f"mean of {len(rows.seeds)} seeds: KL {place['kl']:.2f} nats, proxy {place['reward']:+.2f}, gold "
          f"{place['gold']:+.2f}, {place['length']:.1f} tokens")
    print(f"seed {seed} at η = {row['eta']:g}, proxy {row['reward']:+.2f}, gold {row['gold']:+.2f}:")
    print(f"{prompt} {row['completion'].strip()}")
    return figure


# --- sentences ------------------------------------------------------------------------------------


def said_of(found: Mapping, *names: str) -> str:
    """Claims and what the real model says of them, as a list in Markdown."""
    by_name = {claim["name"]: claim for claim in found["claims"]}
    return "\n".join(f"- {by_name[name]['statement']}: {cell(by_name[name])}." for name in names)


def starts(found: Mapping) -> str:
    """Where the fronts and the limit begin, in sentences: the same policy, measured on samples of different sizes."""
    row = next(row for row in found["rows"] if row["line"] == "slerp-4" and row["eta"] == 0)
    words = (f"At η = 0 all fronts are the SFT policy, with a reward of {row['reward']:+.2f} ± {row['reward_se']:.2f} "
             f"on {row['samples']} completions (standard error).")
    if not found["limit"]:
        return words + " The limit is not known at any KL: too few samples carry it."
    first, last = found["limit"][0], found["limit"][-1]
    return (f"{words} The limit begins at {first['reward']:+.2f} ± {first['reward_se']:.2f}, on many more, so that a "
            f"front may lie over it by the difference. It ends at {last['kl']:.1f} nats, where the completions that "
            f"would be its own are too few among those that were sampled; past that no limit is known here.")


def gold_on_the_way(found: Mapping, line: str = "WARP, 2") -> str:
    """At which point of a line's mean front the gold reward is highest, as a sentence."""
    points = rows_of(found).mean_curve(line)
    best, end = max(points, key=lambda point: point["gold"]), points[-1]
    words = (f"Along the mean front of {LINES[line][0]} the gold reward is highest at η = {best['eta']:g} "
             f"({best['gold']:+.2f} at {best['kl']:.1f} nats)")
    if best is end:
        return words + "."
    return (f"{words}, and {end['gold']:+.2f} at its end, where the proxy is {end['reward']:+.2f} after "
            f"{best['reward']:+.2f}.")
