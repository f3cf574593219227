"""The evidence: what the paper's claims come to in the tiny worlds, with error bars, and how it was found.

`load` reads the committed results; `warp-lite claims` makes them anew.
"""

from __future__ import annotations

from pathlib import Path

from ..storage.files import read_json


def load(name: str = "claims") -> dict:
    """The committed results: "claims" (verdicts and tables), "bands" (their curves with intervals), "tuned" (chosen
    settings), "noise" (the noise map and the law), "decisive" (where merging would win), "coverage" (of intervals, by
    simulation), "four_draws" (the verdicts that fewer draws gave), "predictions" (what the tiny worlds say of the real
    model, written before it was asked), "smollm2" (what it said).

    Raises ValueError for a name that has none.
    """
    path = Path(__file__).parent / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise ValueError(f"there is no evidence {name!r}; there is {there or 'none'}")
    return read_json(path)
