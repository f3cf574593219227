"""The front of a finished run: measured, compared with the limit, written as JSON, a picture and a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .evaluation.limit import best_of_n_front, optimal_front, reference_rewards
from .plots import draw_front
from .runs import write_json
from .tasks.reviews import cache_folder
from .warp import ETAS, WarpResult

LIMIT_PROMPTS, LIMIT_SAMPLES = 64, 1024


def complete_front(result: WarpResult, folder: Path, etas: Sequence[float] = ETAS) -> dict:
    """Measure the front, write front.json and front.png into the run folder, print it and four completions.

    Returns what front.json holds.
    """
    points = result.front(etas)
    rewards, gold = limit_rewards(result, folder)
    front = {
        "points": points,
        "limit": optimal_front(rewards=rewards, gold=gold),
        "best_of_n": best_of_n_front(rewards=rewards),
        "trajectories": result.trajectories,
        "unit": getattr(result.judge, "unit", "reward units"),
        "samples_per_point": points[0]["samples"],
        "limit_samples_per_prompt": rewards.shape[1],
        "prompts": len(result.eval_prompts),
    }
    write_json(folder / "front.json", front)
    figure = draw_front(points, front["limit"], result.trajectories, front["best_of_n"], front["unit"])
    made = folder / ".front.png.part"
    figure.savefig(made, format="png", dpi=150)
    made.replace(folder / "front.png")
    print(front_table(front))
    print()
    print(completions_table(result))
    print(f"\nwritten: {folder / 'front.json'}, {folder / 'front.png'}")
    return front


def limit_rewards(result: WarpResult, folder: Path, samples: int = LIMIT_SAMPLES) -> tuple[Tensor, Tensor | None]:
    """Rewards, and gold rewards where there are any, (prompts, samples) of the SFT policy on held-out prompts.

    They cost more than a front, so they are kept: in the cache, by the hash of the policy that
    was sampled, the prompts and the settings; for a reward without weights, in the run folder.
    """
    prompts, config = result.eval_prompts[:LIMIT_PROMPTS], result.config
    key = hashlib.sha256(json.dumps([prompts, samples, config.max_new_tokens, config.temperature]).encode())
    for tensor in result.sft.values():
        key.update(tensor.detach().float().cpu().numpy().tobytes())
    trained = getattr(result.judge, "head", None)
    if trained is not None:
        key.update(trained.detach().cpu().numpy().tobytes())
    home = cache_folder() if trained is not None else folder
    path = home / f"limit-{key.hexdigest()[:12]}.safetensors"
    if path.is_file():
        kept = load_file(path)
        return kept["reward"], kept.get("gold")
    wanted = [result.judge, *([result.gold] if result.gold is not None else [])]
    with tqdm(total=len(prompts) * samples, desc="limit", unit="sample", disable=None, leave=False) as bar:
        values = reference_rewards(result.model, result.tokenizer, wanted, prompts, samples, temperature=config.temperature,
                                   max_new_tokens=config.max_new_tokens, progress=bar)
    kept = dict(zip(("reward", "gold"), values))
    made = path.with_name(f".{path.name}.part")
    save_file(kept, made)
    made.rename(path)
    return kept["reward"], kept.get("gold")


def front_table(front: dict) -> str:
    """The front as a table, a line a point."""
    points = front["points"]
    columns = [("iteration", "{iteration:d}"), ("η", "{eta:.2f}"), ("KL (nats)", "{kl:.2f} ± {kl_se:.2f}"),
               ("reward", "{reward:.2f} ± {reward_se:.2f}")]
    if "gold" in points[0]:
        columns.append(("gold reward", "{gold:.2f} ± {gold_se:.2f}"))
    columns += [("length", "{length:.1f}"), ("distinct", "{distinct:.2f}")]
    if "perplexity" in points[0]:
        columns.append(("perplexity", "{perplexity:.2f}"))
    rows = [[title for title, _ in columns], *([form.format(**p) for _, form in columns] for p in points)]
    note = (f"{front['samples_per_point']} completions a point on {front['prompts']} held-out prompts; ± is the standard "
            f"error over prompts; rewards in {front['unit']}")
    return f"{_aligned(rows)}\n{note}"


def completions_table(result: WarpResult, count: int = 4, etas: Sequence[float] = (0.0, 0.5, 1.0)) -> str:
    """Completions of a few held-out prompts along the last front, with the same random numbers at every η."""
    prompts = result.eval_prompts[:count]
    texts = {eta: result.completions(prompts, eta) for eta in etas}
    lines = []
    for n, prompt in enumerate(prompts):
        lines.append(prompt)
        lines += [f"  η={eta:<4g} {' '.join(texts[eta][n].split())}" for eta in etas]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
