"""How every notebook begins: its parameters checked, its world loaded and named in one line."""

from __future__ import annotations

import os

import matplotlib.pyplot as plt

from ..task import World
from ..viewing import plots
from ..worlds import load_world
from .plans import size_of

TEXTS = {"true": True, "false": False}  # as a shell writes them: papermill hands those on as text


def begin(model: str, fast: bool, seed: int, device: str, out: str) -> tuple[str, bool, World]:
    """MODEL and FAST as they are to be taken, and the world, which is named in a printed line; figures get the house's
    style from here on.

    $WARP_LITE_MODEL stands in the place of `model`, and $WARP_LITE_FAST=1 makes everything small. Raises ValueError,
    naming the parameter, for a value of another type, and what `load_world` raises.
    """
    fast = checked_parameters(model, fast, seed, device, out) or os.environ.get("WARP_LITE_FAST") == "1"
    model = os.environ.get("WARP_LITE_MODEL") or model
    plt.rcParams.update(plots.STYLE)
    world = load_world(model, device=device, small=fast)
    print(f"{model}: {size_of(world.policy):,} parameters, {len(world.prompts)} prompts to train on and "
          f"{len(world.eval_prompts)} held out; {'fast' if fast else 'full'} mode on {world.policy.device}")
    if world.gold is None:
        print("This world has no gold reward: the figures leave it out.")
    return model, fast, world


def checked_parameters(model: str, fast: bool, seed: int, device: str, out: str) -> bool:
    """FAST as True or False, "true" and "false" understood. Raises ValueError that names a parameter of another type.
    """
    if isinstance(fast, str):
        fast = TEXTS.get(fast.lower(), fast)
    checks = (("MODEL", model, isinstance(model, str) and model != "", "the name of a world, or a folder"),
              ("FAST", fast, isinstance(fast, bool), "True or False"),
              ("SEED", seed, type(seed) is int and seed >= 0, "a whole number, 0 or more"),
              ("DEVICE", device, isinstance(device, str) and device != "", "a text such as 'cpu' or 'auto'"),
              ("OUT", out, isinstance(out, str), "the name of a folder, or '' to keep nothing"))
    for name, value, sound, wanted in checks:
        if not sound:
            raise ValueError(f"the parameter {name} must be {wanted}, not {value!r}")
    return fast
