"""How the runs of an iteration train: as one program, one after the other, or elsewhere."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..config import LoraSettings, WarpConfig
from ..task import Task
from .batched import train_batched
from .run import OnStep, Run, RunState
from .run_folder import RunFolder
from .serial import train_serial

TOGETHER = sys.maxsize  # `at_once` of a trainer that takes all runs of an iteration into one program


@runtime_checkable
class Trainer(Protocol):
    """What takes the runs of an iteration through stage 1.

    `name` is noted in the run folder. `at_once` is how many runs train as one program. `adapter` is how many numbers
    the factors of a run's adapter have, and the matrices that it changes; None where whole policies train.
    """

    name: str
    at_once: int
    adapter: tuple[int, int] | None

    def start(self, task: Task, config: WarpConfig, out: str | Path | None) -> str | Path | None:
        """Make ready for a task; returns the run folder to use. Raises ValueError for what cannot be trained so."""

    def ahead(self, runs: Sequence[Run], folder: RunFolder, progress: bool, stop: Callable[[], bool] | None,
              on_failure: str) -> None:
        """Leave runs finished in the folder before they are taken up from there: for what trains elsewhere."""

    def train(self, runs: Sequence[Run], on_step: OnStep | None = None) -> list[RunState]:
        """Train runs from where they start or stand to their last step; `at_once` of them at most. Raises RunFailed."""

    def keep(self, folder: RunFolder, run: Run, state: RunState) -> None:
        """Write what a finished run leaves beside its policy and anchor."""

    def one_by_one(self) -> Trainer:
        """A trainer of the same task that takes the runs one after the other."""

    def close(self) -> None:
        """Let go of what `start` took: processes, temporary folders."""


class LocalTrainer:
    """What trainers of this process share: nothing to do elsewhere, nothing to keep beside the policy."""

    name, at_once, adapter = "serial", 1, None

    def start(self, task: Task, config: WarpConfig, out: str | Path | None) -> str | Path | None:
        """Take a task. Returns the run folder `out` as it is."""
        self.task = task
        return out

    def ahead(self, runs: Sequence[Run], folder: RunFolder, progress: bool, stop: Callable[[], bool] | None,
              on_failure: str) -> None:
        """Leaves nothing in the folder ahead of `train`: the runs train here."""

    def keep(self, folder: RunFolder, run: Run, state: RunState) -> None:
        """Writes nothing beside policy and anchor."""

    def one_by_one(self) -> Trainer:
        """The serial trainer of the same task, for runs that do not fit together."""
        trainer = SerialTrainer()
        trainer.task = self.task
        return trainer

    def close(self) -> None:
        """Lets go of nothing: `start` took nothing that outlives it."""


class SerialTrainer(LocalTrainer):
    """The runs one after the other, by the library's module and optimiser: the readable reference."""

    def train(self, runs: Sequence[Run], on_step: OnStep | None = None) -> list[RunState]:
        """Train runs; raises RunFailed, naming run, step and prompt."""
        return train_serial(self.task.policy, self.task.tokenizer, self.task.prompts, runs, on_step)


class BatchedTrainer(LocalTrainer):
    """The runs as one program, or as several of fewer runs."""

    name, at_once = "batched", TOGETHER

    def of(self, count: int) -> BatchedTrainer:
        """The trainer of the same task that takes so many runs into one program."""
        trainer = copy.copy(self)
        trainer.at_once = count
        return trainer

    def train(self, runs: Sequence[Run], on_step: OnStep | None = None) -> list[RunState]:
        """Train runs; raises RunFailed, naming run, step and prompt."""
        return train_batched(self.task.policy, self.task.tokenizer, self.task.prompts, runs, on_step)


# Where the trainer of a name is; looked up when it is asked for, as it may need an optional library.
EXECUTORS = {"batched": "warp_lite.training.executors:BatchedTrainer",
             "serial": "warp_lite.training.executors:SerialTrainer",
             "ray": "warp_lite.scale.ray:RayExecutor"}


def trainer_for(executor: str | Trainer) -> Trainer:
    """A trainer by its name in `EXECUTORS`, or the trainer itself.

    Raises ValueError for another name and where an optional library is missing, TypeError for what is no trainer.
    """
    if isinstance(executor, str):
        if executor not in EXECUTORS:
            raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, not {executor!r}")
        return named(EXECUTORS[executor])()
    if isinstance(executor, type):
        raise TypeError(f"executor is the class {executor.__name__}; pass one of its objects: {executor.__name__}()")
    if not isinstance(executor, Trainer):
        raise TypeError(f"executor is {type(executor).__name__}; pass one of {', '.join(EXECUTORS)}, or a Trainer")
    return executor


def adapter_trainer(lora: LoraSettings, trainer: Trainer) -> Trainer:
    """The trainer of adapters; one after the other where `trainer` does so.

    Raises ValueError where the runs would train in other processes or by a trainer of the user's, ImportError without
    PEFT.
    """
    if trainer.name == "ray":
        raise ValueError("adapters (lora) train in this process alone; leave out executor='ray', or lora")
    if type(trainer) not in (SerialTrainer, BatchedTrainer):
        raise ValueError("adapters (lora) train by a trainer of their own, so that the executor, a "
                         f"{type(trainer).__name__}, would never be asked; leave out executor, or lora")
    return named("warp_lite.scale.lora:AdapterTrainer")(lora, trainer.name, trainer.at_once)


def named(place: str) -> Callable:
    """What is at a place, "module:name", imported now: it stands above this module, or needs an optional library."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def as_begun(trainer: Trainer, folder: RunFolder | None) -> Trainer:
    """The trainer that takes as many runs into a program as those of a folder began with, one after the other where
    they began so: others would have no step in common to go on from, and would round otherwise."""
    if folder is not None and trainer.name == "batched" and folder.executor in ("serial", "ray"):
        print(f"warp-lite: the runs in {folder.path} began one after the other and go on so", file=sys.stderr)
        return trainer.one_by_one()
    if folder is not None and type(trainer) is BatchedTrainer:
        return trainer.of(folder.at_once or TOGETHER)
    return trainer
