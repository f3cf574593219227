"""The explorer as one HTML page (page.html) with its data and plotly.js inside: no kernel, no network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ...storage.files import write_bytes
from ..plots import COLOURS, KL_LABEL, iteration_colour
from .grid import View, changed_words, shown_kl
from .picture import ROOT_LABEL, reward_label


def write_page(grid: dict, view: View, path: str | Path) -> None:
    """Write the page; plotly.js goes into it whole (some 5 MB).

    Raises ModuleNotFoundError without the extra `html`, CannotWrite where the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the page needs plotly; install it with: pip install 'warp-lite[html]'") from None
    data = json.dumps(page_data(grid, view), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_bytes(Path(path), page.replace("/*PLOTLY*/", get_plotlyjs()).replace("/*DATA*/", data).encode())


def page_data(grid: dict, view: View) -> dict:
    """What the page's script reads: the grid with changed words marked, the view, names and colours.

    Only what it draws; numbers that are not finite become null.
    """
    names = ["eta", "kl", "reward", "gold", "length"]
    shown = [*names, *(f"{name}_se" for name in names)]
    lines = []
    for line in grid["lines"]:
        first = line["points"][0]["completions"]
        lines.append({**line, "points": [
            {**_numbers(p, shown), "completions": [changed_words(a, b) for a, b in zip(first, p["completions"])]}
            for p in line["points"]]})
    runs: dict[str, list] = {}
    start = [_numbers(grid["lines"][0]["points"][0], names[1:4])]  # where the runs of the first iteration begin
    for row in grid["trajectories"]:
        run = runs.setdefault(f"{row['iteration']}-{row['run']}", start[:] if row["iteration"] == 1 else [])
        run.append(_numbers(row, names[1:4]))
    rewards = ["reward", *(["gold"] if grid["gold"] else [])]
    return {
        "lines": lines, "view": dataclasses.asdict(view), "trajectories": list(runs.values()),
        "limit": [_numbers(p, names[1:4]) for p in grid["limit"]],
        **{name: grid[name] for name in ("etas", "lambdas", "iterations", "runs", "unit", "prompts", "samples")},
        "reach": [shown_kl(grid, limit) for limit in (False, True)],
        "rewards": {name: reward_label(grid, name) for name in rewards}, "axis": [KL_LABEL, ROOT_LABEL],
        "colours": {**COLOURS, **{f"iteration {i}": iteration_colour(i) for i in grid["iterations"]}}}


def _numbers(row: dict, names: list[str]) -> dict:
    """Those of the names that a row has, as JSON can hold them."""
    return {name: row[name] if row[name] == row[name] and abs(row[name]) != float("inf") else None
            for name in names if row.get(name) is not None}
