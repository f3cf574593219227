"""What a run folder says of itself, config.json and prompts.json, and whether a folder may be used for a run.

Nothing here waits for torch: a folder that cannot be used is refused at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..config import WarpConfig
from .files import LOCK, PARTS, read_json
from .provenance import json_hash

HASHES = {"policy": "of another policy", "prompts.sha256": "on other prompts"}  # settings whose values say nothing


def check_out(path: str | Path, resume: bool = False, settings: dict | None = None) -> bool:
    """Whether a folder holds a run to go on with. Writes nothing.

    Raises ValueError if it is in use for something else, and, where `settings` are given, if it
    holds a run of other settings; the error names the first that differs.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; --out wants a folder")
    if not path.is_dir() or all(entry.name == LOCK or entry.match(PARTS) for entry in path.iterdir()):
        return False
    settings_before = read_config(path, "is not empty and not a run folder; choose another")["settings"]
    before = with_defaults(_flat(settings_before))
    if not resume:
        raise ValueError(f"{path} holds a run already; continue it with --resume or choose another folder")
    wanted = before if settings is None else with_defaults(_flat(settings))
    for name in sorted({*before, *wanted}):
        if before.get(name) != wanted.get(name):
            what = HASHES.get(name) or f"with {name} = {before.get(name)!r}, not {wanted.get(name)!r}"
            raise ValueError(f"{path} holds a run {what}; resume with the same settings or choose another folder")
    return True


def read_config(path: str | Path, otherwise: str = "is not a run folder") -> dict:
    """A run folder's config.json: {"settings": …, "provenance": …}.

    Raises ValueError that says `otherwise` if there is none, or it is another program's, and one if it does not say how
    many threads the run has.
    """
    config = Path(path) / "config.json"
    if config.is_file():
        content = read_json(config)
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            facts = content.get("provenance")
            if not isinstance(facts, dict) or type(facts.get("threads")) is not int or facts["threads"] < 1:
                raise ValueError(f"{config} does not say how many threads the run has; take it from a copy")
            return content
    raise ValueError(f"{path} {otherwise}")


def with_defaults(settings: dict) -> dict:
    """Flat settings, those of a config that a folder does not have, being older, at their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(WarpConfig)}
    return {**defaults, **settings}


def _flat(settings: dict) -> dict:
    """{"config": {"lr": 1}, "reward": "r"} → {"lr": 1, "reward": "r"}: names as the user knows them."""
    flat = {}
    for name, value in settings.items():
        if not isinstance(value, dict) or not value:
            flat[name] = value
            continue
        start = "" if name == "config" else f"{name}."
        flat |= {f"{start}{key}": inner for key, inner in value.items()}
    return flat


def kept_prompts(path: str | Path | None, resume: bool = True) -> dict:
    """The prompts of a run folder that is to be resumed: {"train": …, "eval": …, "eval_columns": …}; empty where there
    are none yet, or none that config.json vouches for."""
    file = None if path is None or not resume else Path(path) / "prompts.json"
    if file is None or not file.is_file():
        return {}
    prompts, vouched_for = read_json(file), read_config(path)["settings"].get("prompts")
    if not isinstance(prompts, dict) or not isinstance(vouched_for, dict):
        return {}
    hashed = json_hash([prompts.get(part) for part in ("train", "eval", "eval_columns")])
    return prompts if hashed == vouched_for.get("sha256") else {}
