"""warp_lite: Weight Averaged Rewarded Policies (arXiv 2406.16768), reproduced to be read and run.

Everything public is imported from here, on first use: arithmetic on weights needs no transformers.
"""

from importlib import import_module

_HOMES = {
    "config": ("WarpConfig", "PRESETS", "preset"),
    "ema": ("EMAAnchor",),
    "slerp": ("task_vector", "lerp", "slerp", "angles"),
    "liti": ("liti",),
    "warp": ("run_warp",),
    "result": ("WarpResult", "load_result"),
    "reinforce": ("Run", "train_serial", "train_batched"),
    "policies": ("load_policy", "save_policy"),
    "rewards": ("BradleyTerry", "ClassifierReward", "load_reward"),
    "tasks.reviews": ("reviews_world",),
    "evaluation.metrics": ("evaluate", "PolicyMetrics"),
    "evaluation.front": ("hypervolume", "reward_at_kl"),
    "evaluation.limit": ("optimal_front", "best_of_n_front"),
    "checkpoints": ("merge_checkpoints",),
    "explorer": ("ParetoExplorer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

# A name that is also its module's (slerp, liti, ema …) must be bound now, or a later import of the
# module would put the module in its place.
from .liti import liti  # noqa: E402, F401
from .slerp import slerp  # noqa: E402, F401

__all__ = sorted(_HOME_OF)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'warp_lite' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_HOME_OF])
