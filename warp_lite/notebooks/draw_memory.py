"""The pictures of the notebook on real models: memory, precision, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..viewing.plots import COLOURS
from .figures import label_end, label_ends

SHARES = ("weights", "gradient", "Adam", "anchor", "logits")
SHARE_COLOURS = ("#33708F", "#7FB2C9", "#C9B27F", COLOURS["ema"], "#B05E7C")


def draw_memory(parts: Mapping[str, np.ndarray], limit: float, limit_name: str, at_once: Sequence[int]) -> Figure:
    """The memory of training so many runs at once: `parts` are the `SHARES` (5,) of one run by model, all in GiB."""
    rows = [(name, M) for name in parts for M in at_once]
    figure, axes = plt.subplots(figsize=(8.6, 3.8), layout="constrained")
    for y, (name, M) in enumerate(rows):
        starts = np.cumsum([0.0, *M * parts[name]])
        for start, size, words, colour in zip(starts, M * parts[name], SHARES, SHARE_COLOURS):
            axes.barh(y, size, left=start, color=colour, label=words if y == 0 else None)
    axes.axvline(limit, color="k", ls="--", lw=1)
    axes.text(limit, -0.75, f" {limit_name}", va="center", fontsize=9)
    axes.set(yticks=range(len(rows)), yticklabels=[f"{name}, {M} at once" for name, M in rows], xlabel="GiB",
             ylim=(len(rows) - 0.4, -1.1))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=5, columnspacing=1.2)
    fit = sum((M * parts[name]).sum() < limit for name, M in rows)
    axes.set_title(f"{fit} of {len(rows)} fit with float32 and nothing saved, before activations")
    return figure


def draw_precision(theta: Sequence[float], paths: Mapping[str, Sequence[float]], moving: Mapping[str, float]) -> Figure:
    """A weight that drifts with its anchors by precision ("float32" and "bfloat16"), and the share of a policy's
    weights whose anchor moves in a step, by precision."""
    colours = {"float32": COLOURS["ema"], "bfloat16": COLOURS["mistake"]}
    steps = np.arange(len(theta))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", width_ratios=(2, 1))
    left.plot(steps, theta, color=COLOURS["single"])
    label_end(left, steps, theta, "policy", COLOURS["single"])
    for name, path in paths.items():
        left.plot(steps, path, color=colours[name])
        label_end(left, steps, path, f"anchor, {name}", colours[name])
    left.set(xlabel="step", ylabel="weight", xlim=(0, 1.4 * len(theta)))
    full, half = paths["float32"][-1], paths["bfloat16"][-1]
    left.set_title(f"In 16 bits the anchor misses {abs(half - full) / (full - theta[0]):.0%} of its way")
    right.bar(list(moving), [100 * share for share in moving.values()], color=[colours[name] for name in moving])
    right.set(ylabel="weights whose anchor moves (%)", ylim=(0, 105))
    right.grid(axis="x", visible=False)
    right.set_title("One step of our policy's anchor")
    label_ends(left)
    return figure


def draw_adapters(ranks: Sequence[int], lost: Sequence[float], wrong: float) -> Figure:
    """What cutting an exact merge to a rank loses, and the error of merged factors, all in % of ΔW's length."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    axes.plot(ranks, lost, marker="o", color=COLOURS["slerp"])
    axes.axhline(wrong, color=COLOURS["mistake"], ls="--")
    axes.set(xlabel="rank of the merged adapter", ylabel="error of ΔW (% of its length)",
             ylim=(-4, max(110, 1.2 * wrong)))
    label_end(axes, ranks[:3], lost[:3], "ΔW merged, then cut to a rank", COLOURS["slerp"])
    label_end(axes, [ranks[-1] * 0.6], [wrong], "factors merged", COLOURS["mistake"])
    at_8 = lost[list(ranks).index(8)]
    axes.set_title(f"Merged factors are wrong by {wrong:.0f} %; the exact merge cut to rank 8 loses {at_8:.0f} %")
    label_ends(axes)
    return figure
