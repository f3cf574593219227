"""The front of a finished run: measured, compared with the limit, written as JSON, a picture and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.limit import best_of_n_front, limit_rewards, optimal_front
from ..result import ETAS, EVALUATION_SAMPLES, WarpResult
from ..storage.files import locked, read_json, whole, write_json
from ..storage.provenance import json_hash, package_versions, pinned_threads, source_hash
from ..storage.run_config import read_config
from ..storage.tensors import weights_hash
from .plots import draw_front

OWN_UNIT = "reward units"  # of a reward function that names none


def complete_front(result: WarpResult, folder: Path, etas: Sequence[float] = ETAS, again: bool = True) -> dict:
    """Measure the front, write front.json and front.png into the run folder, print it and four completions.

    With again=False what front.json has is only drawn again, if it was measured from these weights
    at these η. Returns what front.json holds.
    """
    folder = Path(folder)
    threads = read_config(folder)["provenance"]["threads"]
    with locked(folder), pinned_threads(threads):
        key = fingerprint(result, etas)
        front = None if again else measured_before(folder / "front.json", key)
        if front is None:
            front = measure_front(result, etas)
            front["fingerprint"] = json_hash([key, front])
            write_json(folder / "front.json", front)
        completions = completions_table(result)
        figure = draw_front(front["points"], front["limit"], front["trajectories"], front["best_of_n"], front["unit"])
        with whole(folder / "front.png") as made:
            figure.savefig(made, format="png", dpi=150)
    print(f"{front_table(front)}\n\n{completions}\n\n{left_out(result)}"
          f"written: {folder / 'front.json'}, {folder / 'front.png'}")
    return front


def left_out(result: WarpResult) -> str:
    """A line that says which runs failed and are in no merge; empty if none did."""
    failed = [f"run {failure.run} of iteration {i} after step {failure.step} ({failure.reason})"
              for i, iteration in enumerate(result.iterations, 1) for failure in iteration.failures]
    return f"left out of the merges: {'; '.join(failed)}\n" if failed else ""


def measure_front(result: WarpResult, etas: Sequence[float] = ETAS) -> dict:
    """Points, limit, best-of-n and trajectories, as front.json holds them."""
    points = result.front(etas)
    rewards, gold = limit_rewards(result.task)
    return {
        "points": points,
        "limit": optimal_front(rewards=rewards, gold=gold),
        "best_of_n": best_of_n_front(rewards=rewards),
        "trajectories": result.trajectories,
        "unit": getattr(result.task.judge, "unit", OWN_UNIT),
        "samples_per_point": points[0]["samples"],
        "limit_samples_per_prompt": rewards.shape[1],
        "prompts": len(result.task.eval_prompts),
    }


def fingerprint(result: WarpResult, etas: Sequence[float]) -> str:
    """A hash of what a front depends on: the weights, where and how they are measured, the code that does it, and
    the versions of packages."""
    weights = [weights_hash(w) for w in [result.sft, *(iteration.merged for iteration in result.iterations)]]
    config = result.config
    code = source_hash("warp_lite.result", "warp_lite.evaluation.limit")  # what measure_front calls
    return json_hash([code, package_versions(), weights, list(etas), result.task.eval_prompts.given, EVALUATION_SAMPLES,
                      config.max_new_tokens, config.temperature])


def measured_before(path: Path, key: str) -> dict | None:
    """front.json, if it is there, was measured of this and is as it was written."""
    if not path.is_file():
        return None
    try:
        front = read_json(path)
        content = {name: value for name, value in front.items() if name != "fingerprint"}
        return front if front.get("fingerprint") == json_hash([key, content]) else None
    except (ValueError, AttributeError):  # damaged: measured again
        return None


def front_table(front: dict) -> str:
    """The front as a table, a line a point."""
    points = front["points"]
    columns = {"iteration": ("iteration",), "η": ("eta",), "KL (nats)": ("kl", "kl_se"),
               "reward": ("reward", "reward_se"), "gold reward": ("gold", "gold_se"), "length": ("length",),
               "distinct": ("distinct",), "perplexity": ("perplexity",)}
    columns = {title: names for title, names in columns.items() if names[0] in points[0]}
    rows = [[" ± ".join(_number(p[name]) for name in names) for names in columns.values()] for p in points]
    unit = "" if front["unit"] == OWN_UNIT else f"; rewards in {front['unit']}"
    note = (f"{front['samples_per_point']} completions a point on {front['prompts']} held-out prompts; "
            f"± is the standard error over prompts{unit}")
    return f"{_aligned([list(columns), *rows])}\n{note}"


def completions_table(result: WarpResult, count: int = 4, etas: Sequence[float] = (0.0, 0.5, 1.0)) -> str:
    """Completions of a few held-out prompts along the last front, with the same random numbers at every η."""
    task = result.task.first(count)
    prompts = task.eval_prompts
    texts = {eta: result.completions(prompts, eta) for eta in etas}
    lines = []
    for n, prompt in enumerate(task.eval_prompts.texts):
        lines.append(prompt)
        lines += [f"  η={eta:<4g} {' '.join(texts[eta][n].split())}" for eta in etas]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
