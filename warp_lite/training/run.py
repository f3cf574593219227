"""One RL run: its settings, its key, where it starts, where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..averaging.state_dicts import Weights, widen
from ..config import WarpConfig


@dataclass
class RunState:
    """A run after `step` steps: what is needed to go on, each a state dict of one policy, on the CPU.

    `trained` is what the optimiser moves where that is not the policy itself (LoRA's factors);
    the moments are those of what is trained.
    """

    step: int
    policy: Weights
    anchor: Weights
    exp_avg: Weights
    exp_avg_sq: Weights
    trained: Weights = field(default_factory=dict)

    @classmethod
    def finished(cls, step: int, policy: Weights, anchor: Weights) -> RunState:
        """A run that has ended: nothing of the optimiser is left to go on with."""
        return cls(step, policy, anchor, {}, {})


@dataclass
class Run:
    """One RL run: its settings, its key (seed, iteration, run), where it starts and what it is anchored to.

    `state` is where an interrupted run goes on from. The anchor of `anchor="ema"` starts at `init`.
    """

    config: WarpConfig
    iteration: int
    number: int
    init: Weights
    sft: Weights
    reward: Callable
    state: RunState | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """What seeds its random numbers: (seed, iteration, run)."""
        return (self.config.seed, self.iteration, self.number)

    def start(self) -> RunState:
        """The state to begin from, in float32 at least: in fewer bits, small updates would be lost."""
        if self.state is not None:
            return self.state
        init, sft = ({name: widen(tensor) for name, tensor in state.items()} for state in (self.init, self.sft))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in init.items()}
        return RunState(0, init, sft if self.config.anchor == "sft" else init, zeros, zeros)

    @property
    def beta(self) -> float:
        """The weight of the KL: 0 without an anchor."""
        return 0.0 if self.config.anchor == "none" else self.config.beta

    @property
    def mu(self) -> float:
        """The rate of the anchor: 0 for one that stays."""
        return 0.0 if self.config.anchor == "sft" else self.config.mu


class RunFailed(ValueError):
    """The reward, loss or gradient of runs that train together is not finite.

    `reasons` says by a run's place among them what it is, at which step and for which prompt. The policies
    of all are as the step before left them.
    """

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return next(iter(self.reasons.values()))


# on_step(runs, step, states, metrics): called after each step with the runs that took it, the
# number of steps taken, a function that gives their present RunStates, and their metrics.
OnStep = Callable[[Sequence[Run], int, Callable[[], list[RunState]], list[dict]], None]


@dataclass
class Failure:
    """A run that was left out of its iteration's merge: its number, its last good step, policy and anchor, and why."""

    run: int
    step: int
    reason: str
    policy: Weights
    anchor: Weights
