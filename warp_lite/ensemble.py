"""E policies as one program: one flat tensor (E, P), a view for each weight, one fused optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .policies import Weights


class Ensemble:
    """E policies of one architecture that train together, each with its own settings.

    `flat` (E, P) holds all weights, a row a policy, and `grads` (E, P) their gradients.
    `weights` are views of it by name, (E, …); so clipping, the optimiser and the anchor
    each take one pass over one tensor. With `offload` those two and the optimiser stay on the
    CPU, and `weights` are views of a copy, `live`, on the device that trains.
    """

    def __init__(self, states: Sequence[Weights], lrs: Sequence[float], betas, eps: float, max_norm: Sequence[float],
                 device="cpu", offload: bool = False):
        self.flat = self.flatten(states, "cpu" if offload else device)
        self.live = self.flat.to(device, copy=True) if offload else self.flat
        self.grads = torch.empty_like(self.flat)
        self.shapes = {name: tensor.shape for name, tensor in states[0].items()}
        self.weights = {name: view.detach().requires_grad_() for name, view in self.views(self.live).items()}
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
    def flatten(states: Sequence[Weights], device="cpu") -> Tensor:
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
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        into = list(self.views(self.grads).values())
        if add:
            torch._foreach_add_(into, [gradient.to(self.grads.device) for gradient in gradients])
        else:
            torch._foreach_copy_(into, list(gradients))

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
        first, second = (self.flatten(moment, self.flat.device) for moment in moments)
        start = 0
        for group in self.optimizer.param_groups:
            rows = group["params"][0]
            end = start + len(rows)
            self.optimizer.state[rows] = {
                "step": torch.tensor(float(step)).to(rows.device),
                "exp_avg": first[start:end].clone(), "exp_avg_sq": second[start:end].clone()}
            start = end
