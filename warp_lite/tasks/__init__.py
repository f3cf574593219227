"""The worlds that policies are trained in, by name: the same notebooks and commands run on each."""

from __future__ import annotations

import json
from pathlib import Path

TINY = {"tiny-gpt2": "gpt2", "tiny-gemma": "gemma3"}


def load_world(name: str, progress: bool = True):
    """The world of that name: "tiny-gpt2", "tiny-gemma", or a folder that holds one.

    A folder has `policy/` (a causal LM with its tokenizer), `reward/` (a reward model or a sequence
    classifier) and `prompts.jsonl` (a "prompt" in each line; a fifth is held out, or what
    `eval_prompts.jsonl` has). It has no gold reward and no held-out texts.
    Raises ValueError that names what is missing.
    """
    from .reviews import World, reviews_world

    if name in TINY:
        return reviews_world(TINY[name], progress=progress)
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"there is no world {name!r}: it is neither one of {', '.join(TINY)} nor a folder")
    missing = [part for part in ("policy", "reward", "prompts.jsonl") if not (folder / part).exists()]
    if missing:
        raise ValueError(f"the world in {folder} lacks {', '.join(missing)}")
    from ..policies import load_policy
    from ..rewards import load_reward

    model, tokenizer = load_policy(folder / "policy")
    prompts = _read(folder / "prompts.jsonl")
    if (folder / "eval_prompts.jsonl").is_file():
        held_out = _read(folder / "eval_prompts.jsonl")
    else:
        held_out, prompts = prompts[::5], [p for i, p in enumerate(prompts) if i % 5]
    return World(model, tokenizer, load_reward(str(folder / "reward")), None, prompts, held_out, None, folder, {})


def _read(path: Path) -> list[str]:
    try:
        return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} wants a JSON object with a \"prompt\" in each line") from error
