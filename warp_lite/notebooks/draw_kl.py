"""The pictures of the notebook on KL and reward; each takes what was measured and returns a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluation.front import MIN_ESS
from ..evaluation.limit import optimal_front
from ..viewing.plots import COLOURS, KL_LABEL, column
from . import figures

WORDS = 8  # of a distribution that are shown
NAMES = {"reward": "proxy", "gold": "gold"}


def next_words(q: Tensor, words: Sequence[str], powers: Sequence[float], prompt: str) -> Figure:
    """Probabilities of the likeliest next words, q (V,) by `words` (V,), and of policies that raise them to a power."""
    top = q.topk(WORDS).indices
    figure, panels = plt.subplots(1, len(powers), figsize=(9.5, 3.2), sharey=True, sharex=True, layout="constrained")
    for axes, power in zip(panels, powers):
        p = q**power / (q**power).sum()
        nats = (p * (p / q).log())[p > 0].sum()
        axes.barh(range(WORDS), p[top], color=COLOURS["single"], alpha=0.5 if power == 1 else 1)
        axes.set(yticks=range(WORDS), yticklabels=[words[i] for i in top.tolist()], xlabel="probability")
        axes.set_title(f"SFT policy: KL {nats:.2f} nats" if power == 1 else f"to the power {power}: KL {nats:.2f} nats")
    panels[0].invert_yaxis()
    figure.suptitle(f"The next word after “{prompt}”", ha="left", x=0.01)
    return figure


def tilter(rewards: Tensor, limit: Sequence[dict], unit: str) -> Callable[[float], Figure]:
    """A function that draws the best policy for a β, in standard deviations of the reward: the SFT policy's own
    completions with other weights, and where that policy lies on the limit. `rewards` (prompts, samples)."""
    scale = rewards.std().item()
    bins = np.linspace(rewards.min(), rewards.max(), 50)

    def draw(beta: float = 0.5) -> Figure:
        (point,) = optimal_front(rewards=rewards, betas=[beta * scale], min_ess=0)
        weights = (rewards / (beta * scale)).softmax(1) / len(rewards)
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
        for share, colour, label in ((np.full(rewards.shape, 1 / rewards.numel()), COLOURS["single"], "SFT policy"),
                                     (weights, COLOURS["limit"], "weights exp(r/β)")):
            left.hist(rewards.flatten(), bins, weights=share.flatten(), histtype="step", color=colour, lw=1.8,
                      label=label)
        left.set(xlabel=f"reward ({unit})", ylabel="share of the weight")
        left.legend(loc="upper left")
        figures.draw_limit(right, limit)
        right.plot(point["kl"], point["reward"], "o", color=COLOURS["limit"], ms=9)
        right.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(0, 1.4 * limit[-1]["kl"] if limit else None))
        left.set_title(f"β = {beta:.2f}: reward {point['reward']:.2f} for {point['kl']:.2f} nats")
        enough = "enough" if point["ess"] >= MIN_ESS else f"too few: under {MIN_ESS:g}"
        right.set_title(f"effective samples: {point['ess']:.0f} of {rewards.shape[1]}, {enough}")
        figures.label_ends(right)
        return figure

    return draw


def over_optimisation(rows_of: Mapping[str, Sequence[dict]], kinds: Sequence[str], steps: Sequence[int],
                      unit: str, titles: Sequence[str]) -> Figure:
    """Proxy and gold reward of settings by name while they train: a panel a setting, means over seeds with bands."""
    figure, panels = plt.subplots(1, len(rows_of), figsize=(9.8, 4.0), sharey=True, layout="constrained")
    for axes, rows, title in zip(panels, rows_of.values(), titles):
        ends = {}
        for kind in kinds:
            colour = COLOURS["gold" if kind == "gold" else "single"]
            mean = figures.draw_sweep(axes, steps, figures.over_steps(rows, kind, steps), colour)
            ends[NAMES[kind]] = (steps[-1], mean[-1], colour)
        axes.set(xlabel="RL step", xlim=(0, 1.2 * steps[-1]))
        axes.set_title(title)
        figures.label_ends(axes, ends)
    panels[0].set_ylabel(f"reward ({unit})")
    return figure


def spent(rows_of: Mapping[str, Sequence[dict]], colours: Mapping[str, str], limit: Sequence[dict],
          best_of_n: Sequence[dict], labels: Mapping[str, str], edge: float, titles: Mapping[str, str]) -> Figure:
    """Reward, and gold reward, against KL up to `edge` nats: settings by name as they train, the limit and best-of-n.

    `labels` has by kind of reward the name of its axis, `titles` its title.
    """
    figure, panels = plt.subplots(1, len(labels), figsize=(5.3 * len(labels), 4.4), layout="constrained", squeeze=False)
    for axes, kind in zip(panels[0], labels):
        ends = {name: figures.draw_path(axes, rows, colours[name], kind, edge) for name, rows in rows_of.items()}
        if kind == "reward":
            figures.draw_limit(axes, limit)
            axes.plot(column(best_of_n, "kl_bound"), column(best_of_n, "reward"), "x", ms=5,
                      color=COLOURS["best_of_n"], label="best-of-n (its KL is an upper bound)")
            axes.legend(loc="lower right")
        elif limit:
            x, y = column(limit, "kl"), column(limit, "gold")
            axes.plot(x, y, color=COLOURS["limit"], ls="--", lw=1.4)
            ends["optimum of the proxy"] = (x[-1], y[-1], COLOURS["limit"])
        axes.set(xlabel=KL_LABEL, xlim=(0, 1.4 * edge), ylabel=labels[kind])
        axes.set_title(titles[kind])
        figures.label_ends(axes, ends)
    return figure


def careless(limit: Sequence[dict], wrong: Sequence[dict], samples: int, few: int, unit: str) -> Figure:
    """The limit from enough samples, and drawn with no stop from a few."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    figures.draw_limit(axes, limit, f"{samples} samples, as far as they tell")
    x, y = column(wrong, "kl"), column(wrong, "reward")
    axes.plot(x, y, color=COLOURS["mistake"])
    axes.axvline(np.log(few), color=COLOURS["mistake"], lw=0.8, ls=":")
    axes.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(0, 1.7 * max(x.max(), column(limit, "kl").max())))
    at = min(column(limit, "kl").max(), x.max())
    lost = np.interp(at, x, y) - np.interp(at, column(limit, "kl"), column(limit, "reward"))
    axes.set_title(f"From {few} samples the limit is {lost:+.2f} off at {at:.1f} nats; "
                   f"dotted: log {few} = {np.log(few):.1f} nats")
    figures.label_ends(axes, {f"{few} samples, no stop": (x[-1], y[-1], COLOURS["mistake"])})
    return figure
