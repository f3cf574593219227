"""A finished run folder as a WarpResult."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .averaging.liti import liti
from .averaging.state_dicts import copy_weights, parameters
from .config import WarpConfig
from .policies.loading import load_policy
from .policies.prompts import encode_prompts, room_for_prompts
from .result import Iteration, WarpResult
from .rewards.calling import RewardFunc, trained_reward
from .rewards.loading import load_reward
from .storage.files import first_line, read_json, vouched
from .storage.run_config import read_config
from .task import Task
from .training.run import Failure
from .training.run_folder import COPY, NARROW, RunFolder, run_settings


def load_result(path: str | Path, reward: RewardFunc | Sequence[RewardFunc] | None = None,
                gold: RewardFunc | None = None, texts: Sequence[str] | None = None,
                device: str | torch.device = "cpu") -> WarpResult:
    """A finished run folder as a WarpResult. `reward` is found by config.json where it says how.

    Of a run by TRL it is TRL's: a function, or the list of functions, summed with the weights in config.json.
    Weights, policy and reward model stand on `device`.

    Raises ValueError for a folder that is not one, is not finished, or was altered.
    """
    path = Path(path)
    settings = read_config(path)["settings"]
    try:
        config = WarpConfig(**settings["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} holds no settings that can be read: {first_line(error)}") from None
    vouched(path / "sft", ["."], COPY)
    model, tokenizer = load_policy(path / "sft", dtype="auto", device=device)
    sft = copy_weights(parameters(model))
    folder = RunFolder(path, settings, sft, resume=True)
    for i in range(1, config.iterations + 1):
        missing = [m for m in range(1, config.runs + 1)
                   if not any((folder.run(i, m) / name).is_file() for name in ("DONE", "FAILED"))]
        if missing or not folder.finished_iteration(i):
            which = f"run {missing[0]} of iteration {i}" if missing else f"the merge of iteration {i}"
            raise ValueError(f"{path} is not finished: {which} is missing; continue it with `warp-lite run --resume`")
    if reward is None:
        reward, gold, texts = find_reward(settings.get("source"), path, device, "trl" in settings)
    if "trl" in settings:
        reward = trained_reward(reward, settings["trl"])
    prompts = read_json(path / "prompts.json")
    if not isinstance(prompts, dict) or not {"train", "eval", "eval_columns"} <= prompts.keys():
        raise ValueError(f"{path / 'prompts.json'} is not what config.json vouches for; {COPY}")
    room = room_for_prompts(model, config.max_new_tokens)
    encoded, held_out = (encode_prompts(tokenizer, rows, room).to(model.device) for rows in (
        prompts["train"], {"prompt": prompts["eval"], **prompts["eval_columns"]}))
    task = Task(model, tokenizer, reward, encoded, held_out, gold, texts, config.max_new_tokens, config.temperature,
                settings.get("source"), NARROW.get(settings.get("dtype")), sft)
    result, written = WarpResult(task, config), run_settings(task, config)
    for name, part in (("policy", "sft"), ("prompts", "prompts.json")):
        if written[name] != settings.get(name):
            raise ValueError(f"{path / part} is not what config.json vouches for; {COPY}")
    theta_init = result.sft
    for i in range(1, config.iterations + 1):
        finished, failures = [], []
        for m in range(1, config.runs + 1):
            failed = folder.failed_run(i, m)
            if failed is None:
                finished.append(folder.finished_run(i, m))
            else:
                failures.append(Failure(m, *failed))
            result.trajectories += folder.trajectory(i, m)
        if not finished:
            raise ValueError(f"every run of iteration {i} in {path} failed, so there is no merge; run it again")
        merged = parameters(load_policy(folder.iteration(i) / "merged", dtype="auto", device=device)[0])
        next_init = liti(theta_init, merged, config.eta)
        result.iterations.append(Iteration(theta_init, *map(list, zip(*finished)), merged, next_init, failures))
        theta_init = next_init
    return result


def find_reward(source: object, folder: Path, device: str | torch.device = "cpu",
                trl: bool = False) -> tuple[RewardFunc | list[RewardFunc], RewardFunc | None, Sequence[str] | None]:
    """Reward, gold reward and held-out texts from what a run folder's config.json says of their source.

    `trl`: of a run by TRL, which may have a list of rewards.
    Raises ValueError where it says nothing, and where it names code that cannot be a reward of the user's own: a
    function of the standard library, or a module that would be found in the folder itself.
    """
    source = source if isinstance(source, dict) else {}
    if "world" in source:
        from .worlds import load_rewards
        return load_rewards(source["world"], device)
    specs = source.get("reward")
    several = trl and isinstance(specs, list)
    if not all(isinstance(spec, str) for spec in (specs if several else [specs])):
        raise ValueError("config.json does not say where the reward is; pass it: load_result(path, reward=…)")
    for spec in specs if several else [specs]:
        if ":" in spec and not Path(spec).exists():
            inside = Path.cwd().resolve().is_relative_to(folder.resolve())  # modules are found where we are
            if inside or spec.partition(":")[0].partition(".")[0] in sys.stdlib_module_names:
                raise ValueError(f"{folder / 'config.json'} names the code {spec!r} as the reward, which is not run "
                                 "for it; if it is yours, pass it: load_result(path, reward=…)")
    options = source.get("reward_options", {}) | ({"special_tokens": False} if trl else {})
    rewards = [load_reward(spec, device, **options) for spec in (specs if several else [specs])]
    return rewards if several else rewards[0], None, None
