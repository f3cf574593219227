"""The pictures of the notebook on LITI: what was measured is handed in, and drawn.

Rows are those of a sweep or of trajectories (see `RunningExample`); rewards have the unit of `label`, KL is in nats per
sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..evaluation.statistics import Interval, t_interval
from ..viewing.plots import COLOURS, KL_LABEL
from .figures import at_kl, draw_curve, draw_limit, draw_sweep, interval_band, label_end, label_ends, number, outcome

LINES = {"single runs": COLOURS["single"], "their merge": COLOURS["slerp"]}
ON_THE_FRONT = 0.05  # a point whose reward differs by no more lies on a front
PATH = "#404040"  # the path of a run while it trains
TOY_REWARDS = np.array([0.0, 1.0, 2.0, 3.0])
TOY_START = np.array([0.45, 0.30, 0.20, 0.05])  # the SFT policy's probabilities of four completions
TOY_END = np.array([0.02, 0.08, 0.30, 0.60])  # the trained policy's


def toy_dial(eta: float) -> tuple[np.ndarray, float, float]:
    """Four completions with scores (logits) a share eta of the way from the SFT policy to the trained one.

    Probabilities (4,), the KL to the start in nats, the expected reward.
    """
    scores = np.exp((1 - eta) * np.log(TOY_START) + eta * np.log(TOY_END))
    p = scores / scores.sum()
    return p, float((p * np.log(p / TOY_START)).sum()), float(p @ TOY_REWARDS)


def draw_toy(eta: float = 0.5) -> Figure:
    """The toy at one η: its probabilities, its KL and its reward, each on the curve over all η."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 3.7), layout="constrained")
    turns = np.linspace(0, 2, 81)
    kl, reward = np.array([toy_dial(turn)[1:] for turn in turns]).T
    p, kl_now, reward_now = toy_dial(eta)
    kl_end, reward_start, reward_end = toy_dial(1)[1], toy_dial(0)[2], toy_dial(1)[2]
    left.bar(TOY_REWARDS, p, width=0.6, color=COLOURS["liti"], alpha=0.8)
    left.set(xlabel="reward of the completion", ylabel="probability", xticks=TOY_REWARDS, ylim=(0, 1))
    left.set_title(f"η = {eta:.2f}")
    middle.plot([0, 2], [0, 2 * kl_end], ":", color="0.4")
    label_end(middle, [2], [2 * kl_end], "η · KL(1)", "0.3")
    for axes, values, now, name in ((middle, kl, kl_now, "KL to the start (nats)"),
                                    (right, reward, reward_now, "expected reward")):
        axes.plot(turns, values, color=COLOURS["liti"])
        axes.plot(eta, now, "o", ms=9, color=COLOURS["liti"])
        axes.set(xlabel="η", ylabel=name, xlim=(0, 2.4))
    middle.set_title(f"KL is {kl_now / kl_end:.0%} of KL at η = 1")
    right.set_title(f"Reward gained: {(reward_now - reward_start) / (reward_end - reward_start):.0%} of that at η = 1")
    return figure


def over_the_chord(rows: Sequence[dict], name: str) -> Interval:
    """A number at η = ½ less the mean of its values at 0 and 1, with its interval over seeds."""
    return t_interval(number(rows, name, 0.5) - (number(rows, name, 0) + number(rows, name, 1)) / 2)


def draw_dial(curves: Mapping[str, Sequence[dict]], etas: Sequence[float], label: str) -> Figure:
    """KL and reward against η, of single runs and of their merge; KL to η = 1, and beyond on a logarithmic axis."""
    figure, (near, far, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    at = np.array(etas)
    for words, rows in curves.items():
        for axes, name, shown in ((near, "kl", at <= 1), (far, "kl", at > 0), (right, "reward", at >= 0)):
            draw_sweep(axes, at[shown], number(rows, name)[:, shown], LINES[words], words)
    merge = curves["their merge"]
    near.plot([0, 1], [0, number(merge, "kl", 1).mean()], ":", color=LINES["their merge"])
    for axes in (far, right):
        axes.axvline(1, color="k", lw=0.7, ls=":")
    near.set(xlabel="η (dotted: the merge's chord)", ylabel=KL_LABEL, xlim=(0, 1.35))
    far.set(xlabel="η (beyond 1: extrapolation)", ylabel=f"{KL_LABEL}, logarithmic", yscale="log", xlim=(0, 2.7))
    far.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="η (beyond 1: extrapolation)", ylabel=label.replace(" (", "\n(", 1), xlim=(0, 2.7))
    near.set_title(outcome(over_the_chord(merge, "kl"), "below", "Merge: KL at η = ½ lies under its chord",
                           "Merge: KL at η = ½ lies over its chord", "Merge: where KL at η = ½ lies is unclear",
                           "nats"))
    more = t_interval(number(merge, "kl", 2) - 2 * number(merge, "kl", 1))
    far.set_title(outcome(more, "above", "Merge: from η = 1 to 2 KL more than doubles",
                          "Merge: from η = 1 to 2 KL does not double", "Merge: whether KL doubles to η = 2 is unclear",
                          "nats beyond"))
    right.set_title(outcome(over_the_chord(merge, "reward"), "above", "Merge: reward at η = ½ lies over its chord",
                            "Merge: reward at η = ½ lies under its chord",
                            "Merge: where reward at η = ½ lies is unclear"))
    for axes in (near, far, right):
        label_ends(axes)
    return figure


def against_the_bound(words: str, rows: Sequence[dict], eta: float) -> str:
    """What became of the paper's bound at one η, KL(η) ≤ η · KL(1), for the curve of that name, in words by its
    verdict, with the nats to spare."""
    spare = t_interval(eta * number(rows, "kl", 1) - number(rows, "kl", eta))
    return outcome(spare, "above", f"{words}: KL({eta:g}) is less than {eta:g} · KL(1)",
                   f"{words}: KL({eta:g}) is more than {eta:g} · KL(1)",
                   f"{words}: KL({eta:g}) against {eta:g} · KL(1) is unclear", "nats to spare", apart=" ")


def draw_against_path(fronts: Sequence[dict], paths: Sequence[dict], limit: Sequence[dict], kl: float,
                      label: str) -> Figure:
    """LITI fronts of single runs against the paths of the same runs while they trained, up to a KL that all reach."""
    figure, axes = plt.subplots(figsize=(8.6, 5), layout="constrained")
    for seed, run in sorted({(row["seed"], row["run"]) for row in paths}):
        path = [row for row in paths if (row["seed"], row["run"]) == (seed, run)]
        axes.plot([row["kl"] for row in path], [row["reward"] for row in path], color=COLOURS["single"], lw=0.5,
                  alpha=0.3)
    axes.plot([], [], color=COLOURS["single"], lw=0.8, label="every path, to its end")
    axes.legend(loc="upper left")
    grid = np.linspace(0.05, 1, 25) * kl
    for rows, colour, words in ((fronts, COLOURS["liti"], "LITI of the runs"),
                                (paths, PATH, "their paths, first crossing")):
        draw_sweep(axes, grid, np.array([at_kl(rows, at) for at in grid]).T, colour, words)
    draw_limit(axes, [point for point in limit if point["kl"] <= 1.3 * kl])
    axes.set(xlabel=KL_LABEL, ylabel=label, xlim=(0, 1.35 * kl))
    gap = t_interval(at_kl(fronts, kl / 2) - at_kl(paths, kl / 2))
    axes.set_title(outcome(gap, "above", f"LITI lies above where the same runs first get to {kl / 2:.2g} nats",
                           f"LITI lies below where the same runs first get to {kl / 2:.2g} nats",
                           f"LITI and where the same runs first get to {kl / 2:.2g} nats cannot be told apart"))
    label_ends(axes)
    return figure


def draw_gains(levels: Sequence[float], gains: Mapping[str, np.ndarray], colours: Sequence[str], label: str) -> Figure:
    """Differences in reward at several KL, in nats: of each name (seeds, levels), with their intervals over seeds."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    width = 0.08 * (levels[1] - levels[0])
    for n, ((words, values), colour) in enumerate(zip(gains.items(), colours)):
        mean, low, high = interval_band(values)
        axes.errorbar(np.array(levels) + width * (n - (len(gains) - 1) / 2), mean, [mean - low, high - mean], fmt="o",
                      capsize=3, color=colour, label=words)
    axes.axhline(0, color="k", lw=0.8)
    axes.set(xlabel=KL_LABEL, ylabel="difference in " + label.replace(" (", "\n(", 1))
    axes.set_xticks(levels, [f"{kl:.2g}" for kl in levels])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * len(gains) * (high - low))
    axes.legend(loc="upper left")
    axes.set_title(f"What LITI and merging add at one KL\n({len(values)} seeds, bars are 95 % intervals)")
    return figure


def draw_second(second: Mapping[str, Sequence[dict]], limit: Sequence[dict], label: str) -> Figure:
    """The fronts of the second iteration's merge toward the SFT policy ("sft") and toward its own init ("init")."""
    figure, axes = plt.subplots(figsize=(7.8, 4.6), layout="constrained")
    for toward, colour, marker, words in (("sft", COLOURS["liti"], "o", "toward the SFT policy"),
                                          ("init", COLOURS["init"], "s", "toward the init of iteration 2")):
        x, y = draw_curve(axes, number(second[toward], "kl"), number(second[toward], "reward"), colour, marker=marker)
        axes.plot([], [], color=colour, marker=marker, ms=4, label=words)
        label_end(axes, [x[0]], [y[0]], "η = 0", colour)
    label_end(axes, [x[-1]], [y[-1]], "η = 1", "k")
    draw_limit(axes, [point for point in limit if point["kl"] <= x[-1]])
    axes.legend(loc="lower right")
    axes.set(xlabel=KL_LABEL, ylabel=label)
    axes.set_title(outcome(of_second(second), "within", "Halfway in KL the two fronts are alike, within 0.1",
                           "Halfway in KL the two fronts differ by more than 0.1",
                           "Halfway in KL it is unclear whether the two fronts are alike, within 0.1", margin=0.1))
    label_ends(axes)
    return figure


def of_second(second: Mapping[str, Sequence[dict]]) -> Interval:
    """The reward of the front toward the SFT policy less that toward the init, at the KL halfway between init and
    merge of each seed, far from the end that the two share."""
    kl = (number(second["init"], "kl", 0) + number(second["init"], "kl", 1)) / 2
    return t_interval(at_kl(second["sft"], kl) - at_kl(second["init"], kl))


FORGETTING = {"perplexity": ("perplexity of held-out texts", "below", "the merge has forgotten less",
                             "the merge has forgotten more"),
              "gold": ("gold reward (standard deviations)", "above", "the merge has more gold reward",
                       "the merge has less gold reward"),
              "length": ("length (tokens)", "above", "the merge writes more", "the merge writes less")}


def draw_forgetting(fronts: Mapping[str, Sequence[dict]], names: Sequence[str], kl: float) -> Figure:
    """Numbers of `FORGETTING` against KL up to one that all reach, of single runs and of their merge."""
    figure, panels = plt.subplots(1, len(names), figsize=(6.3 * len(names), 4.4), layout="constrained", squeeze=False)
    grid = np.linspace(0.05, 1, 25) * kl
    for axes, name in zip(panels[0], names):
        words, rule, better, worse = FORGETTING[name]
        for who, rows in fronts.items():
            draw_sweep(axes, grid, np.array([at_kl(rows, at, name) for at in grid]).T, LINES[who], who)
        axes.set(xlabel=KL_LABEL, ylabel=words, xlim=(0, 1.3 * kl))
        gap = t_interval(at_kl(fronts["their merge"], kl, name) - at_kl(fronts["single runs"], kl, name))
        axes.set_title(outcome(gap, rule, f"At {kl:.2g} nats {better}", f"At {kl:.2g} nats {worse}",
                               f"At {kl:.2g} nats the two cannot be told apart"))
        label_ends(axes)
    return figure


def draw_point(front: Sequence[dict], eta: float, label: str) -> Figure:
    """One seed's front and its point at the η that is nearest; bars are standard errors over prompts."""
    figure, axes = plt.subplots(figsize=(6.8, 4.3), layout="constrained")
    axes.plot([p["kl"] for p in front], [p["reward"] for p in front], color=COLOURS["liti"], marker="o", ms=3)
    point = min(front, key=lambda p: abs(p["eta"] - eta))
    axes.errorbar(point["kl"], point["reward"], point["reward_se"], point["kl_se"], fmt="o", ms=9,
                  color=COLOURS["liti"])
    axes.set(xlabel=KL_LABEL, ylabel=label)
    axes.set_title(f"η = {point['eta']:.2f}: KL {point['kl']:.2f} ± {point['kl_se']:.2f} nats, "
                   f"reward {point['reward']:.2f} ± {point['reward_se']:.2f}")
    return figure


def draw_mistakes(broken: Sequence[dict], ways: Sequence[str], front: Sequence[dict], label: str) -> Figure:
    """Where mistakes of LITI land, `value` in `broken` being the place in `ways`, beside the pale front of the right
    call; ways that begin with "right" have the front's colour."""
    figure, axes = plt.subplots(figsize=(8.6, 4.8), layout="constrained")
    axes.plot(number(front, "kl").mean(0), number(front, "reward").mean(0), color=COLOURS["liti"], alpha=0.3)
    for n, words in enumerate(ways):
        x, y = number(broken, "kl", n).mean(), number(broken, "reward", n).mean()
        colour = COLOURS["liti"] if words.startswith("right") else COLOURS["mistake"]
        axes.plot(x, y, "o" if words.startswith("right") else "X", ms=8 - n, color=colour, zorder=5 + n)
        label_end(axes, [x], [y], words, colour)
    axes.set(xlabel=KL_LABEL, ylabel=label)
    axes.set_title("Where mistakes land beside the curve of the right call\n"
                   f"(means over {len(number(broken, 'kl'))} seeds)")
    label_ends(axes)
    return figure


def off_the_front(broken: Sequence[dict], way: int, front: Sequence[dict]) -> Interval:
    """The reward of one way, by its place, less that of the right call's front at its KL, seed by seed."""
    return t_interval(number(broken, "reward", way) - at_kl(front, number(broken, "kl", way)))


def beside_the_front(words: str, gap: Interval) -> str:
    """Whether a mistake lies on the front of the right call, above or below it, in words by the verdict of `gap`."""
    if gap.verdict("within", margin=ON_THE_FRONT) == "holds":
        return outcome(gap, "within", f"{words}: on the curve of the right call, within {ON_THE_FRONT:g}", "", "",
                       margin=ON_THE_FRONT, apart=" ")
    return outcome(gap, "below", f"{words}: below the curve of the right call", f"{words}: above it",
                   f"{words}: whether it lies on the curve of the right call is unclear", apart=" ")
