"""The numbers behind the site's scenes, from one seeded WARP in the tiny world: site/scenes.json.

A scene moves a point over what was measured here; nothing of it is typed by hand. What closed forms give (the moving
anchor, the arc) is not here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..averaging.liti import liti
from ..averaging.slerp import task_vector
from ..averaging.state_dicts import Weights
from ..config import WarpConfig, preset
from ..evaluation.limit import limit_rewards
from ..evaluation.metrics import sample_completions
from ..evidence import real_units
from ..launch import run_warp
from ..result import WarpResult
from ..storage.files import read_json, write_bytes
from ..storage.provenance import pinned_threads, provenance
from ..task import Task
from ..viewing.explorer.grid import build_grid, changed_words, measure_points
from ..worlds import load_world

PRESET = "tiny-noisy"
PROMPTS = 3  # whose completions a scene shows
ETAS = tuple(round(0.1 * n, 1) for n in range(16))  # of the dial, past the merge
TILT_PROMPTS, TILT_SAMPLES, BARS = 16, 256, 8
ACROSS, UP, ROOM = 11, 9, 0.25  # points of the reward map, and how far it goes past the outermost policy
NUMBERS = ("kl", "kl_se", "reward", "reward_se", "gold", "gold_se", "length")


def write_scenes(path: Path, progress: bool = True) -> None:
    """Train and measure, and write the file; the same bytes wherever float32 arithmetic is the same, but for the
    provenance. Raises CannotWrite."""
    settings = preset(PRESET)
    with pinned_threads(1):
        world = load_world(settings.world, progress=progress)
        result = run_warp(world, config=settings.config, progress=progress)
        grid = build_grid(result, prompts=PROMPTS, progress=progress)
        parts = {"tilt": tilt_samples(world), "plane": plane(result), "dial": dial(result),
                 "fronts": {"tiny": front(grid, about(settings.config, f"the preset {PRESET}"))},
                 "unit": world.reward.unit, "preset": PRESET, "config": dataclasses.asdict(settings.config),
                 "provenance": provenance()}
    write_bytes(path, as_lines(parts).encode())


def write_front(result: WarpResult, name: str, folder: Path, progress: bool = True) -> None:
    """Measure a result for the explorer's scene, into folder/NAME.json. Raises CannotWrite."""
    grid = build_grid(result, prompts=PROMPTS, progress=progress)
    write_bytes(folder / f"{name}.json", as_lines(front(grid, about(result.config, name))).encode())


def write_real_front(kept: Path, folder: Path) -> None:
    """What `warp-lite claims --world smollm2` measured of WARP with its first seed, for the explorer's scene, into
    folder/smollm2.json; the completions are sampled now, by the policies that are kept beside the units.

    Raises ValueError where `kept` has no smollm2.json, or was made by other code; CannotWrite.
    """
    found, world = read_json(kept / "smollm2.json"), real_units.real_world().first(PROMPTS)
    (seed, *_), etas, lines = found["seeds"], (0.0, *real_units.FRONT_ETAS), []
    for iteration, name in ((1, "slerp-4"), (2, "WARP, 2")):
        merged = real_units.merge_and_next(seed, "WARP", iteration, kept)[0]
        texts = sample_completions(world, [liti(world.sft, merged, eta) for eta in etas])
        measured = {row["eta"]: row for row in found["rows"] if (row["line"], row["seed"]) == (name, seed)}
        lines.append({"iteration": iteration, "runs": real_units.WARP.runs, "lam": None, "points": [
            {**measured[eta], "completions": [" ".join(text.split()) for text in said]}
            for eta, said in zip(etas, texts)]})
    grid = {"etas": etas, "lambdas": [], "lines": lines, "iterations": [1, 2], "runs": [real_units.WARP.runs],
            "unit": world.reward.unit, "prompts": world.eval_prompts.texts, "limit": found["limit"],
            "samples": lines[0]["points"][-1]["samples"]}
    config = real_units.WARP.replace(seed=seed)
    write_bytes(folder / "smollm2.json", as_lines(front(grid, about(config, "SmolLM2"))).encode())


def about(config: WarpConfig, name: str) -> str:
    """What was run, as a sentence."""
    return (f"One WARP of {name}, seed {config.seed}: {config.iterations} iterations of {config.runs} "
            f"runs of {config.steps} steps, {config.batch_size} completions a step.")


def as_lines(parts: Mapping[str, object]) -> str:
    """JSON with a line a part: tens of thousands of numbers, each on a line of its own, would be no easier to read."""
    lines = [f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}"
             for name, part in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def tilt_samples(world: Task) -> dict:
    """Rewards and gold rewards (prompts, samples) of the SFT policy's completions, and a few completions of one prompt
    with theirs."""
    few = world.first(TILT_PROMPTS)
    rewards, gold = limit_rewards(few, TILT_SAMPLES)
    prompt = few.eval_prompts.texts[0]
    texts = sample_completions(world.measured_on([prompt] * BARS), [world.sft])[0]
    judged = [judge([prompt] * BARS, texts) for judge in (world.judge, world.gold)]
    return {"prompt": prompt, "completions": [{"text": text, "reward": trimmed(r), "gold": trimmed(g)}
                                              for text, r, g in zip(texts, *judged)],
            "rewards": matrix(rewards, 2), "gold": matrix(gold, 2)}


def plane(result: WarpResult) -> dict:
    """The weights of all policies seen in the plane through θ_sft, the last merge, and the direction in which the
    policies differ most beside it; with the reward measured on a map of that plane.

    Coordinates are distances between whole weight vectors; what lies outside the plane is projected into it.
    """
    last = result.iterations[-1]
    x = flat(task_vector(last.merged, result.sft))
    x /= x.norm()
    policies = [[flat(task_vector(policy, result.sft)) for policy in i.policies] for i in result.iterations]
    beside = torch.stack([delta - (delta @ x) * x for run in policies for delta in run])       # (policies, weights)
    y = torch.linalg.svd(beside, full_matrices=False).Vh[0]

    def place(delta: Tensor) -> list[float]:
        return [trimmed(delta @ x), trimmed(delta @ y)]

    iterations = [{"init": place(flat(task_vector(i.init, result.sft))), "runs": [place(delta) for delta in deltas],
                   "merged": place(flat(task_vector(i.merged, result.sft)))}
                  for i, deltas in zip(result.iterations, policies)]
    places = [p for i in iterations for p in (i["init"], i["merged"], *i["runs"])]
    # as far as the dial turns, too
    across = steps([p[0] for p in places] + [ETAS[-1] * iterations[-1]["merged"][0]], ACROSS)
    up = steps([p[1] for p in places], UP)
    states = [moved(result.sft, a * x + b * y) for b in up for a in across]
    rewards = [metrics.reward for metrics in result.measure(states, texts=False)]
    return {"iterations": iterations, "across": across, "up": up,
            "rewards": matrix(torch.tensor(rewards).view(UP, ACROSS), 3)}


def steps(values: Sequence[float], count: int) -> list[float]:
    """`count` even steps over the values and some room on either side."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) / 2
    return [trimmed(v) for v in torch.linspace(low - room, high + room, count, dtype=torch.float64)]


def flat(weights: Weights) -> Tensor:
    """All tensors as one vector, in float64, by name."""
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def moved(weights: Weights, delta: Tensor) -> Weights:
    """Weights plus a flat vector of `flat`'s order, in the weights' dtypes."""
    parts = delta.split([weights[name].numel() for name in sorted(weights)])
    return {name: (weights[name].double() + part.view_as(weights[name])).to(weights[name].dtype)
            for name, part in zip(sorted(weights), parts)}


def dial(result: WarpResult) -> list[dict]:
    """The last iteration's front from the SFT policy, past the merge, with completions: a point an η."""
    shown = result.task.first(PROMPTS).eval_prompts
    samples = math.ceil(512 / len(result.task.eval_prompts))
    return points(measure_points(result, [result.weights(eta) for eta in ETAS], ETAS, shown, samples))


def front(grid: dict, about: str) -> dict:
    """What the explorer's scene draws of a grid of `build_grid`, an explorer's too, of a real model as of a tiny one;
    `about` says in a sentence what was run."""
    lines = [{**line, "points": points(line["points"])} for line in grid["lines"]]
    return {"about": about, "lines": lines, "limit": [rounded(point, ("kl", "reward")) for point in grid["limit"]],
            **{name: grid[name] for name in ("etas", "lambdas", "iterations", "runs", "unit", "prompts", "samples")}}


def points(measured: Sequence[dict]) -> list[dict]:
    """Points with their numbers rounded, and each completion as its text and a mask of the words that differ from the
    first point's: "1" for one that does."""
    first = measured[0]["completions"]
    return [{"eta": point["eta"], **rounded(point, NUMBERS), "completions": [marked(old, new) for old, new
                                                                            in zip(first, point["completions"])]}
            for point in measured]


def marked(before: str, after: str) -> list[str]:
    """A completion's words, and which of them changed."""
    words = changed_words(before, after)
    return [" ".join(word for word, _ in words), "".join(str(int(new)) for _, new in words)]


def rounded(row: dict, names: Sequence[str]) -> dict:
    """Those of the names that a row has as finite numbers, rounded."""
    return {name: trimmed(row[name]) for name in names if row.get(name) is not None and math.isfinite(row[name])}


def trimmed(value: float | Tensor, digits: int = 3) -> float:
    """A number as a scene needs it."""
    return round(float(value), digits)


def matrix(values: Tensor, digits: int) -> list[list[float]]:
    """A matrix as lists of short numbers."""
    return [[trimmed(value, digits) for value in row] for row in values.tolist()]
