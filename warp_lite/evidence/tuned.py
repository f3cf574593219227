"""The settings that were chosen for each purpose (tuning.py), and which of them a study says it uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from ..config import WarpConfig
from ..storage.files import read_json

TUNED = Path(__file__).parent / "tuned.json"
Study = TypeVar("Study", bound=Callable)


@lru_cache(maxsize=1)
def _tuned() -> dict:
    if not TUNED.is_file():
        raise ValueError(f"{TUNED} is missing; make it with `warp-lite claims --tune --out DIR`")
    return read_json(TUNED)


def tuned_configs(world: str) -> dict[str, dict]:
    """The settings that were chosen for a world, by purpose, without their scores."""
    return {purpose: found["config"] for purpose, found in _tuned()["worlds"].get(world, {}).items()}


def tuned(world: str, purpose: str) -> WarpConfig:
    """The setting that was chosen for a purpose. Raises ValueError where none was."""
    found = tuned_configs(world)
    if purpose not in found:
        raise ValueError(f"no setting was chosen for {purpose!r} in the world {world!r}; run `warp-lite claims --tune`")
    return WarpConfig(**found[purpose])


def asks(*purposes: str) -> Callable[[Study], Study]:
    """Marks a study with the purposes whose settings it uses: its rows depend on these and on no others."""
    def mark(study: Study) -> Study:
        study.asks = purposes
        return study

    return mark


def asked_by(study: Callable) -> tuple[str, ...]:
    """The purposes that a study was marked with."""
    return getattr(study, "asks", ())
