"""Finished runs in a folder, each under a hash of all that it depends on, so that none is trained twice."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..averaging.state_dicts import Weights
from ..policies.prompts import Prompts
from ..rewards.calling import RewardFunc, reward_name
from ..rewards.classifiers import ClassifierReward
from ..storage.files import read_json, write_json
from ..storage.provenance import json_hash, package_versions, provenance
from ..storage.tensors import load_tensors, save_tensors, weights_hash
from .run import Run

NOT_OF_A_RUN = {"iterations": 1, "runs": 1, "eta": 0.0, "merge": "none", "save_every": 1}  # what no single run sees


class KeptRuns:
    """The runs of an experiment in a folder, which is made if absent: weights, measurements, what made them.

    `code` is the hash of the code that trains and measures them (see `storage.provenance.source_hash`). A run is
    found again by that, the versions of packages, the prompts, the samples a measurement, its settings, its reward
    and the weights that it starts from. Weights and reward models are hashed once each, however many runs share them.
    """

    def __init__(self, folder: str | Path, policy: nn.Module, prompts: Prompts, held_out: Prompts, samples: int,
                 code: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = [name for name, _ in policy.named_parameters()]
        self.about = [code, package_versions(), json_hash([prompts.given, held_out.given, samples])]
        self.made_by = provenance()  # now: the commit may be another when a run ends
        self.hashes: dict[int, tuple[str, object]] = {}  # by id, with what was hashed: while it is held, its id is its

    def path(self, run: Run) -> Path:
        """Where a run's weights are, or will be."""
        settings = dataclasses.asdict(run.config.replace(**NOT_OF_A_RUN))
        weights = [self._hash_of(weights, weights_hash) for weights in (run.init, run.sft)]
        reward = self._hash_of(run.reward, reward_key)
        key = json_hash([*self.about, settings, run.iteration, run.number, reward, weights])
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
    """A hash of a reward: its name, its own source, its plain settings, and the weights of models that it holds.

    Of what a function calls or reads from elsewhere nothing is seen: after a change there, take another folder.
    """
    written = reward if inspect.isroutine(reward) else type(reward)
    try:
        source = inspect.getsource(written)
    except (OSError, TypeError):  # a builtin, or typed where it was not kept
        source = None
    held = getattr(reward, "__dict__", {})
    plain = {name: value for name, value in held.items() if isinstance(value, (bool, int, float, str))}
    models = {name: weights_hash(dict(value.named_parameters()))
              for name, value in held.items() if isinstance(value, nn.Module)}
    tensors = {name: weights_hash({name: value}) for name, value in held.items() if isinstance(value, Tensor)}
    inner = {name: reward_key(value) for name, value in held.items()
             if hasattr(value, "from_ids") or isinstance(value, ClassifierReward)}
    return json_hash([reward_name(reward), source, plain, models, tensors, inner])
