"""How every notebook begins: its parameters checked, its world loaded and named in one line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt

from ..task import World
from ..viewing import plots
from ..worlds import HUB, REAL, load_world
from . import figures, plans

TEXTS = {"true": True, "false": False}  # as a shell writes them: papermill hands those on as text


@dataclass(frozen=True)
class Lab:
    """What a notebook works with: its parameters as they are to be taken, its world and its plan.

    `name` is the notebook's file name without its ending. `plan` are the settings of its experiments, None where it has
    none. `keep` is where the runs of a real model are kept and found again, None for a tiny one. `unit` is that of the
    reward.
    """

    name: str
    model: str
    fast: bool
    seed: int
    out: str
    retrain: bool
    world: World
    plan: SimpleNamespace | None
    keep: Path | None
    unit: str

    @property
    def kinds(self) -> list[str]:
        """The rewards there are: "reward", the proxy, and "gold" where the world has it."""
        return ["reward"] if self.world.gold is None else ["reward", "gold"]

    def reward_label(self, kind: str = "reward") -> str:
        """The name of an axis of rewards, with its unit; `kind` is one of `kinds`."""
        word = "" if self.world.gold is None else "gold " if kind == "gold" else "proxy "
        return f"{word}reward ({self.unit})"

    def save(self, **measured: object) -> None:
        """Write what the notebook measured into OUT, as its name with `.json`; nothing where OUT is empty. Raises
        CannotWrite."""
        if self.out:
            figures.keep(self.out, self.name, **measured)


def begin(name: str, model: str, fast: bool, seed: int, device: str, out: str, retrain: bool = False,
          stand_in: bool = False) -> Lab:
    """What the notebook of that name works with; the world is named in a printed line, and figures get the house's
    style from here on.

    $WARP_LITE_MODEL stands in the place of `model`, and $WARP_LITE_FAST=1 makes everything small. With `stand_in` a
    small model takes the place of a known one that is not within reach, and the first line printed says so. Raises
    ValueError, naming the parameter, for a value of another type, and what `load_world` raises.
    """
    fast, retrain = checked_parameters(model, fast, seed, device, out, retrain)
    fast = fast or os.environ.get("WARP_LITE_FAST") == "1"
    model = os.environ.get("WARP_LITE_MODEL") or model
    plt.rcParams.update(plots.STYLE)
    try:
        world = load_world(model, device=device, small=fast)
    except ValueError as error:
        if not stand_in or model not in (REAL, *HUB):
            raise
        print(f"A small model takes the place of {model}: {error}")
        fast, world = True, load_world(model, device=device, small=True)
    of_it = {REAL: "a tiny model"}.get(model, "a small model of its structure")
    in_its_place = f" ({of_it} in its place)" if fast and model in (REAL, *HUB) else ""
    print(f"{model}{in_its_place}: {plans.size_of(world.policy):,} parameters, {len(world.prompts)} prompts to train "
          f"on and {len(world.eval_prompts)} held out; {'fast' if fast else 'full'} mode on {world.policy.device}")
    if world.gold is None:
        print("This world has no gold reward: the figures leave it out.")
    of_world = "" if in_its_place else model
    plan = plans.plan(name, world.policy, fast, of_world) if name in plans.PLANS else None
    return Lab(name, model, fast, seed, out, retrain, world, plan, plans.kept_runs(out, world.policy),
               getattr(world.reward, "unit", "reward units"))


def checked_parameters(model: str, fast: bool, seed: int, device: str, out: str,
                       retrain: bool = False) -> tuple[bool, bool]:
    """FAST and RETRAIN as True or False, "true" and "false" understood. Raises ValueError that names a parameter of
    another type."""
    fast, retrain = (TEXTS.get(value.lower(), value) if isinstance(value, str) else value for value in (fast, retrain))
    checks = (("MODEL", model, isinstance(model, str) and model != "", "the name of a world, or a folder"),
              ("FAST", fast, isinstance(fast, bool), "True or False"),
              ("SEED", seed, type(seed) is int and seed >= 0, "a whole number, 0 or more"),
              ("DEVICE", device, isinstance(device, str) and device != "", "a text such as 'cpu' or 'auto'"),
              ("OUT", out, isinstance(out, str), "the name of a folder, or '' to keep nothing"),
              ("RETRAIN", retrain, isinstance(retrain, bool), "True or False"))
    for name, value, sound, wanted in checks:
        if not sound:
            raise ValueError(f"the parameter {name} must be {wanted}, not {value!r}")
    return fast, retrain
