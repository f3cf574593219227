"""A reward by its name, as the command line gives it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from ..policies.hub import local
from ..storage.files import first_line
from .bradley_terry import BradleyTerry
from .calling import RewardFunc
from .classifiers import ClassifierReward


def load_reward(spec: str, device: str | torch.device = "cpu", label: int | str | None = None,
                log_probability: bool = False, special_tokens: bool = True) -> RewardFunc:
    """A reward from the command line: `module:function`, a folder, or a classifier's name on the hub.

    `label`, a name or an index, and `log_probability` choose what of a classifier is the reward, `special_tokens`
    whether its tokenizer frames the texts.
    Raises ValueError in one line when it cannot be found, or there is nothing to choose.
    """
    folder = Path(local(spec))
    is_function = ":" in spec and not folder.exists()
    is_bradley_terry = (folder / "reward_head.safetensors").is_file()
    is_classifier = not (is_function or is_bradley_terry)
    if not is_classifier and (label is not None or log_probability):
        raise ValueError(f"the reward {spec!r} is no classifier: it has no label or log-probability to choose")
    if is_bradley_terry:
        return BradleyTerry.load(folder, device)
    if is_function:
        module, _, name = spec.partition(":")
        sys.path.insert(0, "")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # the module is the user's and may raise anything
            raise ValueError(f"cannot find the reward {spec!r}: {first_line(error)}") from error
        finally:
            sys.path.remove("")
        if not callable(function):
            raise ValueError(f"the reward {spec!r} is {type(function).__name__}, not a function")
        return function
    return ClassifierReward(spec, -1 if label is None else label, log_probability, device,
                            special_tokens=special_tokens)
