"""warp_lite: Weight Averaged Rewarded Policies (arXiv 2406.16768), reproduced to be read and run.

Everything public is imported from here, on first use: whatever needs no torch does not wait for it.

Importing it sets GOMP_SPINCOUNT=3000 in the environment of this process and its children, where torch is not
imported yet and none of OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME is set: a thread of torch's OpenMP (libgomp,
in its wheels for Linux) that waits for another looks 3,000 times whether it is done, and then sleeps. By default it
looks 300,000 times: beside other work it takes the time of a core that the other needs. Not to look at all costs a
free machine twice the time, as the operations of a tiny policy are shorter than to wake a thread.
"""

import os
import sys
from importlib import import_module

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"

_HOMES = {
    "config": ("WarpConfig", "PRESETS", "preset"),
    "averaging.ema": ("EMAAnchor",),
    "averaging.slerp": ("task_vector", "lerp", "slerp", "angles"),
    "averaging.liti": ("liti",),
    "averaging.checkpoints": ("merge_checkpoints",),
    "launch": ("run_warp",),
    "task": ("Task",),
    "averaging.coefficients": ("MERGES",),
    "result": ("WarpResult",),
    "reopen": ("load_result",),
    "policies.loading": ("load_policy", "save_policy"),
    "rewards.bradley_terry": ("BradleyTerry",),
    "rewards.classifiers": ("ClassifierReward",),
    "rewards.loading": ("load_reward",),
    "training.run": ("Run",),
    "training.serial": ("train_serial",),
    "training.batched": ("train_batched",),
    "worlds.reviews": ("reviews_world",),
    "evaluation.metrics": ("evaluate", "PolicyMetrics"),
    "evaluation.front": ("hypervolume", "reward_at_kl"),
    "evaluation.limit": ("optimal_front", "best_of_n_front"),
    "viewing.explorer.widget": ("ParetoExplorer",),
    "storage.provenance": ("__version__",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF.keys() - {"__version__"})  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'warp_lite' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_HOME_OF])
