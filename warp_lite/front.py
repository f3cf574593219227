"""The front of a finished run: measured, compared with the limit, written as JSON, a picture and a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__
from .evaluation.limit import best_of_n_front, optimal_front, reference_rewards
from .files import load_tensors, locked, read_json, save_tensors, weights_hash, whole, write_json
from .plots import draw_front
from .policies import parameters
from .result import ETAS, EVALUATION_SAMPLES, WarpResult
from .rewards import BradleyTerry, ClassifierReward
from .runs import json_hash, pinned_threads, read_config
from .tasks.reviews import cache_folder

OWN_UNIT = "reward units"  # of a reward function that names none
LIMIT_PROMPTS = 64
LIMIT_SAMPLES = 1024  # completions a prompt
LARGE, LIMIT_SAMPLES_LARGE = 5_000_000, 128  # a larger policy: the limit must not cost more than the runs


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
    rewards, gold = limit_rewards(result)
    return {
        "points": points,
        "limit": optimal_front(rewards=rewards, gold=gold),
        "best_of_n": best_of_n_front(rewards=rewards),
        "trajectories": result.trajectories,
        "unit": getattr(result.judge, "unit", OWN_UNIT),
        "samples_per_point": points[0]["samples"],
        "limit_samples_per_prompt": rewards.shape[1],
        "prompts": len(result.eval_prompts),
    }


def fingerprint(result: WarpResult, etas: Sequence[float]) -> str:
    """What a front depends on: the weights, where and how they are measured, and this package's version."""
    weights = [weights_hash(w) for w in [result.sft, *(iteration.merged for iteration in result.iterations)]]
    config = result.config
    return json_hash([__version__, weights, list(etas), result.eval_prompts, EVALUATION_SAMPLES,
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


def limit_rewards(result: WarpResult, samples: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Rewards, and gold rewards where there are any, (prompts, samples) of the SFT policy on held-out prompts.

    They cost more than a front, so those of a reward model are kept in the cache, by the hash of
    all that they depend on. A reward function has no hash and is asked again.
    """
    if samples is None:
        size = sum(tensor.numel() for tensor in result.sft.values())
        samples = LIMIT_SAMPLES if size < LARGE else LIMIT_SAMPLES_LARGE
    prompts = result.held_out.batch(np.arange(min(LIMIT_PROMPTS, len(result.eval_prompts))))
    config, judge, gold = result.config, result.judge, result.gold
    path = None
    if isinstance(judge, (BradleyTerry, ClassifierReward)):
        key = json_hash([prompts.texts, samples, config.max_new_tokens, config.temperature, gold is not None,
                         weights_hash(result.sft), reward_hash(judge)])
        path = cache_folder() / f"limit-{key[:12]}.safetensors"
    if path is not None and path.is_file():
        try:
            kept = load_tensors(path, "cpu", "")
            return kept["reward"], kept.get("gold")
        except (ValueError, KeyError):  # damaged: sampled again
            path.unlink()
    wanted = [judge] if gold is None else [judge, gold]
    with tqdm(total=len(prompts) * samples, desc="limit", unit="sample", disable=None, leave=False) as bar:
        values = reference_rewards(result.model, result.tokenizer, wanted, prompts, samples, progress=bar,
                                   temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    kept = dict(zip(("reward", "gold"), values))
    if path is not None:
        save_tensors(kept, path)
    return kept["reward"], kept.get("gold")


def reward_hash(reward: BradleyTerry | ClassifierReward) -> str:
    """A hash of a reward model: its weights and its plain settings."""
    settings = {name: value for name, value in vars(reward).items() if isinstance(value, (bool, int, float, str))}
    if isinstance(reward, BradleyTerry):
        weights = {**parameters(reward.trunk), "head": reward.head}
    else:
        weights = parameters(reward.model)
    return json_hash([type(reward).__name__, settings, weights_hash(weights)])


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
    prompts = result.eval_prompts[:count]
    texts = {eta: result.completions(prompts, eta) for eta in etas}
    lines = []
    for n, prompt in enumerate(result.held_out.texts[:count]):
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
