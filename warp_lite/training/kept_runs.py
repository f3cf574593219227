"""Finished runs in a folder, each under a hash of all that it depends on, so that none is trained twice."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CellType, CodeType

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..averaging.state_dicts import Weights
from ..policies.prompts import Prompts
from ..rewards.calling import RewardFunc, reward_name
from ..storage.files import read_json, write_json
from ..storage.provenance import json_hash, package_versions, provenance
from ..storage.tensors import load_tensors, save_tensors, weights_hash
from .run import Run

NOT_OF_A_RUN = {"iterations": 1, "runs": 1, "eta": 0.0, "merge": "none", "save_every": 1}  # what no single run sees


class KeptRuns:
    """The runs of an experiment in a folder, which is made if absent: weights, measurements, what made them.

    `code` is the hash of the code that trains and measures them (see `storage.provenance.source_hash`). A run is
    found again by that, the versions of packages, the prompts, the samples a measurement and whether it is `traced`
    (see `MeasuredSteps`), its settings, its reward and the weights that it starts from. Weights and reward models are
    hashed once each, however many runs share them.
    """

    def __init__(self, folder: str | Path, policy: nn.Module, prompts: Prompts, held_out: Prompts, samples: int,
                 code: str, traced: int | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = [name for name, _ in policy.named_parameters()]
        self.about = [code, package_versions(), json_hash([prompts.given, held_out.given, samples])]
        self.traced = traced
        self.made_by = provenance()  # now: the commit may be another when a run ends
        self.hashes: dict[int, tuple[str, object]] = {}  # by id, with what was hashed: while it is held, its id is its

    def path(self, run: Run) -> Path:
        """Where a run's weights are, or will be."""
        settings = dataclasses.asdict(run.config.replace(**NOT_OF_A_RUN))
        weights = [self._hash_of(weights, weights_hash) for weights in (run.init, run.sft)]
        reward = self._hash_of(run.reward, reward_key)
        trace = [] if self.traced is None else [run.number <= self.traced]  # whether it is measured, and closely
        key = json_hash([*self.about, settings, run.iteration, run.number, reward, weights, *trace])
        return self.folder / f"run-{key[:16]}.safetensors"

    def _hash_of(self, thing, hash_function: Callable[[object], str]) -> str:
        if id(thing) not in self.hashes:
            self.hashes[id(thing)] = (hash_function(thing), thing)
        return self.hashes[id(thing)][0]

    def load(self, run: Run, jobs: Sequence) -> tuple[Weights, Weights] | None:
        """The policy and anchor of a run that has ended, its measurements given to the jobs; None if it is not kept.

        Raises ValueError where the file cannot be read.
        """
        path = self.path(run)
        if not path.is_file():
            return None
        tensors = load_tensors(path, "cpu", "remove it to train that run again")
        for job in jobs:
            job.result.trajectories += read_json(path.with_suffix(".json"))["trajectory"]
        return tuple({name: tensors[f"{part}.{name}"] for name in self.names} for part in ("policy", "anchor"))

    def save(self, run: Run, jobs: Sequence, policy: Weights, anchor: Weights) -> None:
        """Keep a run that has ended; the weights come last, since they say that it is whole."""
        rows = [row for row in jobs[0].result.trajectories
                if (row["iteration"], row["run"]) == (run.iteration, run.number)]
        write_json(self.path(run).with_suffix(".json"), {"trajectory": rows, "provenance": self.made_by})
        parts = {"policy": policy, "anchor": anchor}
        save_tensors({f"{part}.{name}": w for part, weights in parts.items() for name, w in weights.items()},
                     self.path(run))


def reward_key(reward: RewardFunc) -> str:
    """A hash of a reward: its name, its code, and all that it holds that can be seen (see `described`).

    Of what a function calls or reads from elsewhere nothing is seen: after a change there, take another folder.
    """
    return json_hash([reward_name(reward), described(reward)])


def described(value: object, above: tuple[int, ...] = ()) -> object:
    """What a value is, as JSON can hold it, so that values that act otherwise are told apart.

    Plain data, arrays, tensors and the weights of models by their contents; functions by their code, defaults and what
    they close over; partial functions, methods and other callable objects by what they hold, all the way down. Of
    anything else, tokenizers among them, the name of its class alone. `above` are the ids of what it is in.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in above:
        return "itself"

    def inner(*values: object) -> list:
        return [described(one, (*above, id(value))) for one in values]

    name = type(value).__qualname__
    if isinstance(value, Tensor):
        return weights_hash({name: value})
    if isinstance(value, np.ndarray):
        return [name, str(value.dtype), *inner(value.tolist())]
    if isinstance(value, Mapping):
        return [name, *(inner(*pair) for pair in value.items())]
    if isinstance(value, (list, tuple)):
        return [name, *inner(*value)]
    if isinstance(value, (set, frozenset)):
        return [name, *sorted(map(json_hash, inner(*value)))]
    if isinstance(value, CodeType):  # of lambdas in one line the source is the same
        return [value.co_code.hex(), *value.co_names, *inner(*value.co_consts)]
    if isinstance(value, partial):
        return [name, *inner(value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [name, *inner(value.__func__, value.__self__)]
    if inspect.isfunction(value):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__qualname__, source_of(value), *inner(
            value.__code__, value.__defaults__, value.__kwdefaults__, held, vars(value))]
    if isinstance(value, type) or inspect.isroutine(value):
        return [value.__qualname__, source_of(value)]
    acts = callable(value) or hasattr(value, "from_ids")
    if not acts or isinstance(value, PreTrainedTokenizerBase):  # which notes its own warnings
        return name
    own = {slot: getattr(value, slot) for slot in slots_of(type(value)) if hasattr(value, slot)}
    own |= vars(value) if hasattr(value, "__dict__") else {}
    if isinstance(value, nn.Module):
        plain = {key: held for key, held in own.items() if isinstance(held, (bool, int, float, str))}
        own = {**plain, "training": None, "weights": weights_hash(dict(value.named_parameters()))}
    return [name, source_of(type(value)), *inner(own)]


def slots_of(kind: type) -> list[str]:
    """The names of the slots that objects of a class have in place of a dict."""
    slots = [vars(above).get("__slots__", ()) for above in kind.__mro__]
    names = [name for one in slots for name in ([one] if isinstance(one, str) else one)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def source_of(code: object) -> str | None:
    """The source of a function or class; None where it was not kept."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # a builtin, or typed where it was not kept
        return None
