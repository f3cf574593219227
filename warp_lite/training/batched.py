"""E policies as one program: one flat tensor (E, P), a view for each weight, one fused optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..averaging.state_dicts import Weights, copy_weights, frozen_names
from ..policies.precision import full_precision
from ..policies.prompts import Prompts
from ..policies.sampling import Policies
from .reinforce import check_step, checked_rewards, differentiate, draw, forward_for, score, step_metrics, warmup
from .run import OnStep, Run, RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Settings that runs of one batch must share.
SHARED = ("steps", "batch_size", "max_new_tokens", "temperature", "warmup_steps", "adam_beta1", "adam_beta2",
          "adam_eps", "precision", "micro_batch", "sample_batch", "logit_chunk", "checkpointing", "offload")


class Ensemble:
    """E policies of one architecture that train together, each with its own settings.

    `flat` (E, P) holds all weights that train, a row a policy, and `grads` (E, P) their gradients.
    `trained` are views of it by name, (E, …); so clipping, the optimiser and the anchor each take one
    pass over one tensor. `weights` are those and the `frozen` ones, which stay. With `offload` flat and
    grads and the optimiser stay on the CPU, and `trained` are views of a copy, `live`, on the device that trains.
    """

    def __init__(self, states: Sequence[Weights], lrs: Sequence[float], betas: tuple[float, float], eps: float,
                 max_norm: Sequence[float], device: str | torch.device = "cpu", offload: bool = False,
                 frozen: Sequence[str] = ()):
        self.frozen = {name: stack_or_share([state[name] for state in states], device) for name in frozen}
        states = [{name: tensor for name, tensor in state.items() if name not in self.frozen} for state in states]
        self.flat = self.flatten(states, "cpu" if offload else device)
        self.live = self.flat.to(device, copy=True) if offload else self.flat
        self.grads = torch.empty_like(self.flat)
        self.shapes = {name: tensor.shape for name, tensor in states[0].items()}
        self.trained = {name: view.detach().requires_grad_() for name, view in self.views(self.live).items()}
        self.weights = {**self.trained, **self.frozen}
        self.max_norm = torch.tensor(max_norm, dtype=self.flat.dtype).to(self.flat.device)
        self.lrs, groups, start = list(lrs), [], 0
        for end in range(1, len(lrs) + 1):  # a group of the optimiser for each stretch of rows with one rate
            if end == len(lrs) or lrs[end] != lrs[start]:
                rows = self.flat[start:end].detach().requires_grad_()
                rows.grad = self.grads[start:end]
                groups.append({"params": [rows], "lr": lrs[start], "base_lr": lrs[start]})
                start = end
        self.optimizer = torch.optim.Adam(groups, betas=betas, eps=eps, fused=True)

    @staticmethod
    def flatten(states: Sequence[Weights], device: str | torch.device = "cpu") -> Tensor:
        """State dicts as the rows of one tensor (E, P), copied to a device."""
        return torch.stack([
            torch.cat([tensor.detach().reshape(-1).to(device) for tensor in state.values()]) for state in states])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat tensor (E, P) as weights by name, (E, …), without a copy."""
        result, start = {}, 0
        for name, shape in self.shapes.items():
            size = shape.numel()
            result[name] = flat[:, start:start + size].view(len(flat), *shape)
            start += size
        return result

    def backward(self, loss: Tensor, add: bool = False) -> None:
        """Differentiate the sum of the policies' losses; with `add`, on top of what was differentiated before."""
        gradients = torch.autograd.grad(loss, list(self.trained.values()), materialize_grads=True)  # 0 where unused
        grads = list(self.views(self.grads).values())
        if add:
            torch._foreach_add_(grads, [gradient.to(self.grads.device) for gradient in gradients])
        else:
            torch._foreach_copy_(grads, list(gradients))

    def step(self, lr_factor: float, check: Callable[[Tensor], None] = lambda norms: None) -> Tensor:
        """Clip each policy's gradient and update.

        Returns the norms before clipping, (E,). `check` sees them first; if it raises, nothing is updated.
        """
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        check(norms)
        self.grads *= (self.max_norm / (norms + 1e-6)).clamp(max=1).unsqueeze(1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.optimizer.step()
        if self.live is not self.flat:
            self.live.copy_(self.flat)
        return norms

    def state(self, e: int, flat: Tensor) -> dict[str, Tensor]:
        """Row e of a flat tensor as a state dict of copies on the CPU."""
        return {name: view[e].to("cpu", copy=True) for name, view in self.views(flat).items()}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's first and second moments, (E, P) each, to be read; zeros before the first step."""
        names = ("exp_avg", "exp_avg_sq")
        states = [self.optimizer.state.get(group["params"][0]) for group in self.optimizer.param_groups]
        if not states[0]:
            return torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        if len(states) == 1:  # no copy
            return tuple(states[0][name] for name in names)
        return tuple(torch.cat([state[name] for state in states]) for name in names)

    def restore(self, moments: tuple[Sequence[Weights], Sequence[Weights]], step: int) -> None:
        """Put back Adam's moments, given as one state dict a policy, after `step` steps."""
        first, second = (self.flatten([{name: state[name] for name in self.shapes} for state in moment],
                                      self.flat.device) for moment in moments)
        start = 0
        for group in self.optimizer.param_groups:
            rows = group["params"][0]
            end = start + len(rows)
            self.optimizer.state[rows] = {
                "step": torch.tensor(float(step)).to(rows.device),
                "exp_avg": first[start:end].clone(), "exp_avg_sq": second[start:end].clone()}
            start = end


def stack_or_share(tensors: Sequence[Tensor], device: str | torch.device) -> Tensor:
    """The same weight of E policies as (E, …): one tensor seen E times where they share it, else a copy of all."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].detach().to(device).expand(len(tensors), *tensors[0].shape)
    return torch.stack([tensor.detach().to(device) for tensor in tensors])


class FlatAnchor:
    """θ_ema of E runs: rows of one tensor, as the ensemble's policies are, and what is frozen as it was."""

    def __init__(self, ensemble: Ensemble, states: Sequence[Weights], rates: Sequence[float]):
        self.ensemble = ensemble
        self.frozen = {name: stack_or_share([state[name] for state in states], ensemble.live.device)
                       for name in ensemble.frozen}
        states = [{name: state[name] for name in ensemble.shapes} for state in states]
        self.flat = Ensemble.flatten(states, ensemble.flat.device)                       # (E, P)
        self.mu = torch.tensor(rates, dtype=self.flat.dtype).unsqueeze(1).to(self.flat.device)   # (E, 1)

    @property
    def weights(self) -> Weights:
        """The anchors' weights (E, …) by name, to score with."""
        return {**self.ensemble.views(self.flat.to(self.ensemble.live.device)), **self.frozen}

    def update(self) -> None:
        """θ_ema ← (1 − μ) θ_ema + μ θ."""
        self.flat.lerp_(self.ensemble.flat, self.mu)

    def state(self, e: int) -> Weights:
        """The anchor of run e, a state dict of copies on the CPU."""
        return {**self.ensemble.state(e, self.flat), **copy_weights({n: t[e] for n, t in self.frozen.items()})}


def train_batched(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, runs: Sequence[Run],
                  on_step: OnStep | None = None, anchor_of: Callable = FlatAnchor) -> list[RunState]:
    """Train all runs as one program. They share the settings named in `SHARED`; lr, β, μ, anchor,
    clipping, seed, reward and init may differ. What is frozen stays.
    `anchor_of` makes the runs' moving average where it is not one of what is trained (scale/lora.py).
    Returns the state of each run at its last step. Raises ValueError for runs that do not share these settings or
    the step they start at; RunFailed, naming run, step and prompt, when a reward, loss or gradient is not finite.
    Source: Algorithm 1, stage 1.
    """
    config, model = runs[0].config, full_precision(model)
    for name in SHARED:
        values = {getattr(run.config, name) for run in runs}
        if len(values) > 1:
            raise ValueError(f"runs of one batch must share {name}, not {sorted(values)}")
    starts = [run.start() for run in runs]
    if len({start.step for start in starts}) > 1:
        raise ValueError(f"runs of one batch must start at one step, not {[start.step for start in starts]}")
    forward = forward_for(model, "batched", config)
    frozen = [name for name in frozen_names(model) if name in starts[0].policy]  # an adapter's base is no part of it
    ensemble = Ensemble(
        [start.policy for start in starts], [run.config.lr for run in runs],
        (config.adam_beta1, config.adam_beta2), config.adam_eps, [run.config.max_grad_norm for run in runs],
        model.device, config.offload and model.device.type != "cpu", frozen)
    if starts[0].step:
        ensemble.restore(([s.exp_avg for s in starts], [s.exp_avg_sq for s in starts]), starts[0].step)
    anchor = anchor_of(ensemble, [start.anchor for start in starts], [run.mu for run in runs])
    beta = torch.tensor([run.beta for run in runs], dtype=torch.float64).unsqueeze(1).to(model.device)   # (E, 1)
    anchored = any(run.beta > 0 for run in runs)
    first_step = starts[0].step
    names = list(starts[0].policy)
    del starts  # the moments of a fresh start are zeros that need not stay

    def with_frozen(state, of_frozen):
        """A state of what trains, and beside it `of_frozen(tensor)` of what does not, in the order of the policy."""
        return {name: state[name] if name in state else of_frozen(ensemble.frozen[name]) for name in names}

    def states(step):
        def zeros(tensor):
            return torch.zeros(tensor.shape[1:], dtype=tensor.dtype)

        def state(e, first, second):
            policy = with_frozen(ensemble.state(e, ensemble.flat), lambda tensor: tensor[e].to("cpu", copy=True))
            exp_avg, exp_avg_sq = (with_frozen(ensemble.state(e, moment), zeros) for moment in (first, second))
            return RunState(step, policy, anchor.state(e), exp_avg, exp_avg_sq)

        moments = ensemble.moments()
        return [state(e, *moments) for e in range(len(runs))]

    for step in range(first_step, config.steps):
        batch, uniforms = draw(runs, step, prompts)
        with torch.no_grad():
            rollout = Policies(forward, ensemble.weights).sample(batch, uniforms, tokenizer, config.temperature,
                                                                 config.sample_batch)
        anchor_logp = None
        if anchored:
            anchor_logp = score(forward, anchor.weights, rollout, config)                # (E, B)
        rewards = checked_rewards(runs, step, rollout, tokenizer)                        # (E, B)
        logp, r_beta, loss = differentiate(forward, ensemble.weights, rollout, rewards, anchor_logp, beta, config,
                                           ensemble.backward)
        norms = ensemble.step(warmup(config, step), partial(check_step, runs, step, rollout, r_beta, loss))
        anchor.update()
        if on_step is not None:
            anchor_logp = logp if anchor_logp is None else anchor_logp
            metrics = step_metrics(runs, step, rollout, rewards, r_beta, logp, anchor_logp, loss, norms)
            on_step(runs, step + 1, lambda step=step: states(step + 1), metrics)
    return states(config.steps)
