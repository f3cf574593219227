"""LoRA: policies of Algorithm 1 that train as adapters, θ^m = θ_init + ΔW_m with ΔW_m = B_m A_m.

What WARP averages are weights, so anchors, merges and interpolations are of ΔW and never of A and B: a mean
of products is not the product of means. Nothing here is approximate until a rank is asked for.

- The adapters of an iteration start at ΔW = 0 on its dense θ_init, and share its memory.
- The anchor is the moving average of W + ΔW. It has no low rank, so a run keeps a copy of the matrices it adapts.
- The merge of M adapters of rank r is an adapter of rank M·r. The norms and angles that SLERP needs come from
  products of r × r; no dense matrix is formed.
- θ_slerp and the next θ_init are dense weights, as everywhere else, so a front is drawn as of any other run.
- An adapter of a chosen rank is the best of that rank (truncated SVD), and how much is lost is told.

    from warp_lite import run_warp
    from warp_lite.scale.lora import LoraSettings, front_adapter, save_adapter

    result = run_warp(model, tokenizer, reward, prompts, config, out="runs/lora", lora=LoraSettings(rank=8))
    adapter, error = front_adapter("runs/lora", eta=0.5, rank=8)     # error: the share of ΔW's norm that rank 8 loses
    save_adapter(adapter, "half", base="runs/lora/sft")              # a PEFT folder
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..averaging.state_dicts import Weights, load_weights
from ..config import WarpConfig
from ..policies.randomness import ADAPTERS, generator
from ..task import Task
from ..training.batched import Ensemble, train_batched
from ..training.executors import TOGETHER, LocalTrainer
from ..training.run import OnStep, Run, RunState
from ..training.run_folder import RunFolder
from .adapters import Adapter, combine_adapters, factors_merged, fold, merge_adapters, relative_error, truncate
from .peft_folders import (
    PREFIX,
    compare_merges,
    front_adapter,
    library,
    load_adapter,
    merge_adapter_folders,
    save_adapter,
)

__all__ = ["Adapter", "AdapterTrainer", "LoraSettings", "combine_adapters", "compare_merges", "factors_merged", "fold",
           "front_adapter", "load_adapter", "merge_adapter_folders", "merge_adapters", "relative_error", "save_adapter",
           "truncate"]


@dataclass(frozen=True)
class LoraSettings:
    """How policies are adapted: PEFT's LoRA of rank `rank`, ΔW = alpha/rank · BA (alpha/√rank with `rslora`).

    `target_modules`: PEFT's, "all-linear" or names with commas between them.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    target_modules: str = "all-linear"

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be 1 or more, not {self.rank!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be above 0, not {self.alpha!r}")

    @property
    def scaling(self) -> float:
        """What BA is multiplied by: alpha/rank, or alpha/√rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# --- stage 1 on adapters ---


class AdapterTrainer(LocalTrainer):
    """Stage 1 with adapters in place of weights: M runs train their factors over one base model.

    PEFT's layers stand around the same memory as the policy's weights, which therefore must hold θ_init
    while runs train. What comes out are dense policies and anchors, so that all that follows is as ever.
    """

    def __init__(self, settings: LoraSettings, name: str = "batched", at_once: int = TOGETHER):
        """`name` and `at_once` are those of a trainer: whether the runs train together or one after the other."""
        self.settings, self.name, self.at_once = settings, name, at_once

    def start(self, task: Task, config: WarpConfig, out: str | Path | None) -> str | Path | None:
        """Put adapters around the task's policy. Returns `out`.

        Raises ValueError for a policy in 16 bits, into which a small ΔW cannot be folded, and for target modules that
        are not linear; ImportError without PEFT.
        """
        super().start(task, config, out)
        peft, settings, policy = library("peft", "lora"), self.settings, task.policy
        dtype = task.dtype or next(policy.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the policy is {dtype}, and a small ΔW added to such weights is rounded away; "
                             "load it in float32 to train adapters")
        self.policy, targets = policy, settings.target_modules
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in policy.parameters()}
        transposed = any(isinstance(module, Conv1D) for module in policy.modules())
        self.model = peft.get_peft_model(copy.deepcopy(policy, shared), peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.rslora, lora_dropout=0.0,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            fan_in_fan_out=transposed, task_type="CAUSAL_LM")).eval()
        layers = {name: layer for name, layer in self.model.named_modules() if hasattr(layer, "lora_A")}
        for name, layer in layers.items():
            if not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
                raise ValueError(f"target_modules takes in {name.removeprefix(PREFIX)!r}, which is no linear layer; "
                                 "name linear layers only")
        modules = {name: f"{name.removeprefix(PREFIX)}.weight" for name in layers}
        self.names = {weight: tuple(f"{name}.lora_{factor}.default.weight" for factor in "BA")
                      for name, weight in modules.items()}
        self.bases = {weight: f"{name}.base_layer.weight" for name, weight in modules.items()}
        self.transposed = frozenset(modules[name] for name, layer in layers.items()
                                    if isinstance(layer.get_base_layer(), Conv1D))
        self.shapes = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}

        return out

    @property
    def adapter(self) -> tuple[int, int]:
        """How many numbers the factors of one run have, and the matrices that they change."""
        return (sum(shape.numel() for shape in self.shapes.values()),
                sum(self.policy.get_parameter(name).numel() for name in self.names))

    def one_by_one(self) -> AdapterTrainer:
        """The same adapters, one run after the other."""
        trainer = copy.copy(self)
        trainer.name, trainer.at_once = "serial", 1
        return trainer

    def train(self, runs: Sequence[Run], on_step: OnStep | None = None) -> list[RunState]:
        """Train runs of one θ_init together, as `train_batched` does; states have dense policies and anchors, and
        the factors as `trained`."""
        init = runs[0].init
        load_weights(self.policy, init)
        starts = [dataclasses.replace(run, state=self.begin(run)) for run in runs]

        def dense(states: list[RunState]) -> list[RunState]:
            return [RunState(state.step, fold(init, self.adapter_of(state.policy)),
                             {name: state.anchor.get(name, base.clone()).to(base) for name, base in init.items()},
                             state.exp_avg, state.exp_avg_sq, trained=state.policy) for state in states]

        def watch(_, step, states: Callable[[], list[RunState]], metrics) -> None:
            on_step(runs, step, lambda: dense(states()), metrics)

        return dense(train_batched(self.model, self.task.tokenizer, self.task.prompts, starts,
                                   watch if on_step else None, anchor_of=partial(WeightAnchor, self)))

    def begin(self, run: Run) -> RunState:
        """Where a run begins or goes on: factors, and the adapted matrices of its anchor."""
        state = run.start()
        anchor = {name: state.anchor[name] for name in self.names}
        if run.state is None:
            factors = self.first_factors(run)
            zeros = {name: torch.zeros_like(tensor) for name, tensor in factors.items()}
            return RunState(0, factors, anchor, zeros, zeros)
        factors, *moments = ({name: part[name] for name in self.shapes}
                             for part in (state.trained, state.exp_avg, state.exp_avg_sq))
        return RunState(state.step, factors, anchor, *moments)

    def first_factors(self, run: Run) -> dict[str, Tensor]:
        """B = 0, so that ΔW = 0, and A uniform within 1/√in as PEFT's, from the run's own random numbers."""
        draw, like = generator(*run.key, ADAPTERS), next(iter(run.init.values()))
        return {name: like.new_zeros(shape) if ".lora_B." in name else
                torch.from_numpy(draw.uniform(-1, 1, tuple(shape)) / math.sqrt(shape[1])).to(like)
                for name, shape in self.shapes.items()}

    def keep(self, folder: RunFolder, run: Run, state: RunState) -> None:
        """Write the adapter of a finished run beside its policy: a PEFT folder on the iteration's init."""
        base = folder.path / "sft" if run.iteration == 1 else folder.iteration(run.iteration - 1) / "next-init"
        target = folder.run(run.iteration, run.number) / "adapter"
        if not target.is_dir():
            save_adapter(self.adapter_of(state.trained), target, base)

    def adapter_of(self, factors: Weights) -> Adapter:
        """The adapter of a run's factors, under the names of the weights that it changes."""
        return Adapter({weight: (self.settings.scaling * factors[B], factors[A])
                        for weight, (B, A) in self.names.items()}, self.transposed)


class WeightAnchor:
    """θ_ema of E runs of adapters: the moving average of the matrices W + ΔW themselves.

    The average of factors would be a smaller anchor and another one: B̄Ā is not the average of BA.
    """

    def __init__(self, trainer: AdapterTrainer, ensemble: Ensemble, states: Sequence[Weights], rates: Sequence[float]):
        self.trainer, self.ensemble = trainer, ensemble
        device = trainer.policy.device
        self.average = {name: torch.stack([state[name] for state in states]).to(device) for name in trainer.names}
        self.mu = next(iter(self.average.values())).new_tensor(rates).view(-1, 1, 1)
        self.no_factors = {name: torch.zeros(len(states), *shape, device=device, dtype=self.mu.dtype)
                           for name, shape in trainer.shapes.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights (E, …) to score with: the averages in the place of the base's matrices, and ΔW = 0."""
        return {**self.no_factors, **{self.trainer.bases[name]: average for name, average in self.average.items()}}

    @torch.no_grad()
    def update(self) -> None:
        """θ_ema ← (1 − μ) θ_ema + μ (W + ΔW)."""
        for name, (B, A) in self.trainer.names.items():
            delta = self.trainer.settings.scaling * self.ensemble.weights[B] @ self.ensemble.weights[A]  # (E, out, in)
            base = self.trainer.policy.get_parameter(name)
            self.average[name].lerp_(base + (delta.mT if name in self.trainer.transposed else delta), self.mu)

    def state(self, e: int) -> dict[str, Tensor]:
        """The adapted matrices of run e's anchor, copied."""
        return {name: average[e].clone() for name, average in self.average.items()}
