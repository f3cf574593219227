"""Names at the ends of lines, placed where no curve, bar or other name strikes them through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

LABEL = "label of a line's end"  # the gid of such a label
FAINT = 0.3  # lines of that alpha, or less, may pass under a label
CLEAR = 1.8  # points between a label and what is drawn, a little more than its white rim
NEAR = 13  # points: a label that is further from its point has a thin line to it


def label_end(axes: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, text: str, colour: str,
              shift: tuple[float, float] = (5, 0)) -> Annotation:
    """A label right of the last point of a line x, y (points,), in its colour, moved by `shift` points.

    `label_ends`, called when all is drawn, moves it to where nothing strikes it through. Returns the label.
    """
    return axes.annotate(text, (x[-1], y[-1]), textcoords="offset points", xytext=shift, color=colour, va="center",
                         fontsize=9, path_effects=[withStroke(linewidth=3, foreground="white")], zorder=10, gid=LABEL,
                         arrowprops={"arrowstyle": "-", "lw": 0.7, "color": colour, "alpha": 0.0, "shrinkA": 0,
                                     "shrinkB": 3})


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]] | None = None) -> None:
    """Labels at the ends (x, y, colour) of several lines, and those that `label_end` has put there, moved to where no
    curve, bar or other label strikes them; call it when all is drawn.

    A label that had to go further away has a thin line to its point. Where there is no room the axes grow to the right,
    and where bars reach all the way there, upward.
    """
    for name, (x, y, colour) in (ends or {}).items():
        label_end(axes, [x], [y], name, colour)
    labels = [text for text in axes.texts if text.get_gid() == LABEL]
    for tried in range(12):
        axes.figure.draw_without_rendering()
        others = [Text.get_window_extent(text) for text in _texts(axes) if text not in labels]
        if axes.get_legend() is not None:
            others.append(axes.get_legend().get_window_extent())
        if place(axes, labels, strokes(axes), others):
            break
        upward = tried >= 4 and tried % 2 == 0
        (low, high), scale = (axes.get_ylim(), axes.get_yscale()) if upward else (axes.get_xlim(), axes.get_xscale())
        more = high + 0.1 * (high - low) if scale == "linear" else high * (high / low) ** 0.1
        axes.set_ylim(low, more) if upward else axes.set_xlim(low, more)


def place(axes: Axes, labels: Sequence[Annotation], segments: np.ndarray, boxes: Sequence[Bbox] = ()) -> bool:
    """Move labels of `label_end` to near places where no segment (N, 2, 2), box or other label strikes them, nor
    another's thin line; all in pixels. Returns whether there was a place for each.

    They take their places from the lowest up, or from the highest down if that keeps them nearer to their points.
    """
    tried = []
    for downward in (False, True):
        ordered = sorted(labels, key=lambda label: label.xy[1], reverse=downward)
        distance = 0.0
        for n, label in enumerate(ordered):
            lines = [_leader(other) for other in ordered[:n] if _has_leader(other)]
            waiting = [Text.get_window_extent(other) for other in ordered[n + 1:]]
            placed = [*boxes, *(Text.get_window_extent(other) for other in ordered[:n])]
            distance += _place(axes, label, np.concatenate([segments, *lines]), placed, waiting)
        tried.append((distance, [(label.xyann, label.get_ha(), label.arrow_patch.get_alpha()) for label in labels]))
    distance, places = min(tried, key=lambda pair: pair[0])
    for label, (where, side, alpha) in zip(labels, places):
        label.xyann = where
        label.set(ha=side)
        label.arrow_patch.set_alpha(alpha)
    return math.isfinite(distance)


def struck_labels(figure: Figure) -> list[str]:
    """The labels of lines' ends that a curve, a bar, another's thin line or another text goes through, for a test of a
    figure."""
    figure.draw_without_rendering()
    struck = []
    for axes in figure.axes:
        segments, labels = strokes(axes), [text for text in axes.texts if text.get_gid() == LABEL]
        for label in labels:
            box = Text.get_window_extent(label)
            others = [Text.get_window_extent(text) for text in _texts(axes) if text is not label]
            lines = [_leader(other) for other in labels if other is not label and _has_leader(other)]
            if _crossed(np.concatenate([segments, *lines]), box) or any(box.overlaps(other) for other in others):
                struck.append(label.get_text())
    return struck


def _texts(axes: Axes) -> list[Text]:
    """All that is written in axes or is their title."""
    return [child for child in axes.get_children() if isinstance(child, Text) and child.get_text()]


def _leader(label: Annotation) -> np.ndarray:
    """The thin line from the middle of a label to its point, (1, 2, 2), in pixels."""
    box = Text.get_window_extent(label)
    return np.array([[[(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2], label.axes.transData.transform(label.xy)]])


def _has_leader(label: Annotation) -> bool:
    return bool(label.arrow_patch.get_alpha())


def _place(axes: Axes, label: Annotation, segments: np.ndarray, placed: Sequence[Bbox],
           waiting: Sequence[Bbox]) -> float:
    """Move a label to the nearest place that is free. Returns its distance in points, infinite where there is none.

    Its thin line may not go through what is `placed`; those `waiting` for a place of their own will keep clear of it.
    """
    scale = axes.figure.dpi / 72
    anchor = axes.transData.transform(label.xy)
    size = Text.get_window_extent(label)
    page = axes.get_window_extent()
    for radius in (6, 9, 13, 18, 24, 32, 42, 54, 68, 84, 102, 124, 150):
        for degrees in (0, 25, -25, 50, -50, 75, -75, 90, -90, 110, -110, 140, -140, 180):
            x, y = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
            across = 0.5 * (1 - math.cos(math.radians(degrees)))  # the share of the label left of its point
            left, middle = anchor[0] + scale * x - across * size.width, anchor[1] + scale * y
            box = Bbox.from_bounds(left, middle - size.height / 2, size.width, size.height)
            line = np.array([[[left + size.width / 2, middle], anchor]])
            if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 + 12 * scale):
                continue
            if _crossed(segments, box.padded(CLEAR * scale)) or any(box.padded(1.0).overlaps(other)
                                                          for other in (*placed, *waiting)):
                continue
            if radius > NEAR and any(_crossed(line, other) for other in placed):
                continue
            label.set(ha="left")
            label.xyann = ((left - anchor[0]) / scale, y)
            label.arrow_patch.set_alpha(0.6 if radius > NEAR else 0.0)
            return radius
    return math.inf


def strokes(axes: Axes) -> np.ndarray:
    """The lines, marks, bars and outlines of axes that would strike a label, (N, 2, 2), in pixels; faint lines do not.
    """
    pieces = [line_strokes(axes.lines)]
    for collection in axes.collections:
        if isinstance(collection, LineCollection) and (collection.get_alpha() or 1) > FAINT:
            for points in map(collection.get_transform().transform, collection.get_segments()):
                pieces.append(np.stack([points[:-1], points[1:]], 1))
    for patch in axes.patches:
        points = patch.get_transform().transform_path(patch.get_path()).vertices
        pieces.append(np.stack([points[:-1], points[1:]], 1))
    segments = np.concatenate(pieces)
    return segments[np.isfinite(segments).all((1, 2))]


def line_strokes(lines: Sequence[Line2D]) -> np.ndarray:
    """The segments of lines, and a cross for each of their marks, (N, 2, 2), in pixels; faint lines have none."""
    pieces = [np.empty((0, 2, 2))]
    for line in lines:
        if (line.get_alpha() or 1) <= FAINT:
            continue
        points = line.get_transform().transform(line.get_xydata())
        if line.get_linestyle() != "None" and len(points) > 1:
            pieces.append(np.stack([points[:-1], points[1:]], 1))
        if line.get_marker() not in ("None", "none", "", " ", None):
            half = line.get_markersize() / 2 * line.figure.dpi / 72
            for arm in ((half, 0), (0, half)):
                pieces.append(np.stack([points - arm, points + arm], 1))
    segments = np.concatenate(pieces)
    return segments[np.isfinite(segments).all((1, 2))]


def _crossed(segments: np.ndarray, box: Bbox) -> bool:
    """Whether one of the segments (N, 2, 2) runs through a box (Liang and Barsky's clipping)."""
    start, step = segments[:, 0], segments[:, 1] - segments[:, 0]                        # (N, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        edges = np.stack([(np.array([box.x0, box.y0]) - start) / step, (np.array([box.x1, box.y1]) - start) / step])
    inside = (start >= [box.x0, box.y0]) & (start <= [box.x1, box.y1])
    still = step == 0
    first = np.where(still, np.where(inside, -np.inf, np.inf), edges.min(0)).max(1)
    last = np.where(still, np.where(inside, np.inf, -np.inf), edges.max(0)).min(1)
    return bool((np.maximum(first, 0) <= np.minimum(last, 1)).any())
