"""A finished run folder as a WarpResult."""

from __future__ import annotations

import sys
from pathlib import Path

from .averaging.liti import liti
from .averaging.state_dicts import copy_weights, parameters
from .config import WarpConfig
from .policies.loading import load_policy
from .result import NARROW, Iteration, WarpResult, run_settings
from .rewards.loading import load_reward
from .storage.files import first_line, read_json, vouched
from .storage.run_config import read_config
from .training.run import Failure
from .training.run_folder import COPY, RunFolder


def load_result(path, reward=None, gold=None, texts=None, device="cpu") -> WarpResult:
    """A finished run folder as a WarpResult. `reward` is found by config.json where it says how.

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
        reward, gold, texts = find_reward(settings.get("source"), path, device)
    prompts = read_json(path / "prompts.json")
    if not isinstance(prompts, dict) or not {"train", "eval", "eval_columns"} <= prompts.keys():
        raise ValueError(f"{path / 'prompts.json'} is not what config.json vouches for; {COPY}")
    result = WarpResult(
        config, model, tokenizer, reward, prompts["eval"], sft, gold=gold, texts=texts,
        train_prompts=prompts["train"], eval_columns=prompts["eval_columns"], source=settings.get("source"),
        dtype=NARROW.get(settings.get("dtype")))
    found = run_settings(result)
    for name, part in (("policy", "sft"), ("prompts", "prompts.json")):
        if found[name] != settings.get(name):
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


def find_reward(source, folder: Path, device="cpu"):
    """Reward, gold reward and held-out texts from what a run folder's config.json says of their source.

    Raises ValueError where it says nothing, and where it names code that cannot be a reward of the user's own: a
    function of the standard library, or a module that would be found in the folder itself.
    """
    source = source if isinstance(source, dict) else {}
    if "world" in source:
        from .worlds import load_rewards
        return load_rewards(source["world"], device)
    spec = source.get("reward")
    if not isinstance(spec, str):
        raise ValueError("config.json does not say where the reward is; pass it: load_result(path, reward=…)")
    if ":" in spec and not Path(spec).exists():
        inside = Path.cwd().resolve().is_relative_to(folder.resolve())  # modules are found where we are
        if inside or spec.partition(":")[0].partition(".")[0] in sys.stdlib_module_names:
            raise ValueError(f"{folder / 'config.json'} names the code {spec!r} as the reward, which is not run for "
                             "it; if it is yours, pass it: load_result(path, reward=…)")
    return load_reward(spec, device, **source.get("reward_options", {})), None, None
