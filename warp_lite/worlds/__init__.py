"""The worlds that policies are trained in, by name: the same notebooks and commands run on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..rewards.calling import RewardFunc
    from ..task import World

TINY = {"tiny-gpt2": "gpt2", "tiny-gemma": "gemma3"}
HUB = ("gpt2-imdb", "gemma-imdb")
REAL = "smollm2"


def load_world(name: str, progress: bool = True, device: str | torch.device = "cpu", small: bool = False) -> World:
    """The world of that name: "tiny-gpt2", "tiny-gemma", "smollm2", "gpt2-imdb", "gemma-imdb", or a folder that holds
    one.

    A folder has `policy/` (a causal LM with its tokenizer), `reward/` (a reward model or a sequence
    classifier) and `prompts.jsonl` (a "prompt" in each line; as many as `hold_out` says are held out, or what
    `eval_prompts.jsonl` has). It has no gold reward and no held-out texts.
    Policy and reward model stand on `device`; "auto" is the first GPU, or the CPU where there is none.
    With `small`, small repositories made here stand in the place of the hub's (see `small_hub`), and the tiny GPT-2's
    world in that of smollm2.
    Raises ValueError that names what is missing.
    """
    from ..policies.loading import load_policy, pick_device
    from ..storage.prompt_sources import read_prompts
    from ..task import World
    from .reviews import reviews_world

    device = pick_device(device)
    if name in TINY or (name == REAL and small):
        return reviews_world(TINY.get(name, "gpt2"), progress=progress).to(device)
    if name == REAL:
        from .english import english_world

        return english_world(progress, device)
    if name in HUB:
        from .imdb import IMDB, imdb_world

        if small:
            from .small_hub import use_small_hub

            use_small_hub(name, progress)
        return imdb_world(IMDB[name], progress, device)
    folder = Path(name)
    if not folder.is_dir():
        names = ", ".join([*TINY, REAL, *HUB])
        raise ValueError(f"there is no world {name!r}: it is neither one of {names} nor a folder")
    missing = [part for part in ("policy", "reward", "prompts.jsonl") if not (folder / part).exists()]
    if missing:
        raise ValueError(f"the world in {folder} lacks {', '.join(missing)}")
    from ..rewards.loading import load_reward

    model, tokenizer = load_policy(folder / "policy", device=device)
    prompts = read_prompts(folder / "prompts.jsonl")
    held_out = folder / "eval_prompts.jsonl"
    held_out = read_prompts(held_out) if held_out.is_file() else None
    reward = load_reward(str(folder / "reward"), device)
    world = World.of(model, tokenizer, reward, prompts, held_out)
    world.folder = folder
    return world


def load_rewards(name: str,
                 device: str | torch.device = "cpu") -> tuple[RewardFunc, RewardFunc | None, Sequence[str] | None]:
    """Reward, gold reward (None where there is none) and held-out texts of a world, without a hub's policy.

    Raises ValueError that names what is missing.
    """
    if name in HUB:
        from ..rewards.loading import load_reward
        from .imdb import IMDB

        return load_reward(IMDB[name].reward, device), None, None
    world = load_world(name, device=device)
    return world.reward, world.gold, world.texts
