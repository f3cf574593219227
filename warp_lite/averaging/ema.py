"""Stage 1 of WARP: an exponential moving average of the policy as the anchor of its own KL.

    θ_ema ← (1 − μ) · θ_ema + μ · θ        after every step

The anchor follows the policy slowly, so the KL to it is a leash that loosens with training. It restarts
from θ_init with every run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .state_dicts import Weights, check_same_tensors, is_finite, storage_key, widen


class EMAAnchor:
    """The moving average θ_ema of a policy's weights; it starts at `params` and never shares their memory.

    params: state dict or `dict(model.named_parameters())`. mu: the rate in [0, 1]; 0 never moves, 1 is
    the policy itself. `average` holds the live tensors, float32 or wider, under the names of `params`:
    read it to score or to save without a copy, and expect it to change with every update.
    Raises ValueError for μ outside [0, 1] and for NaN weights in `params`.
    Source: Algorithm 1, stage 1; figure 15 for μ.
    """

    def __init__(self, params: Weights, mu: float):
        if not (math.isfinite(mu) and 0 <= mu <= 1):
            raise ValueError(f"mu is {mu}; it must lie between 0 (never moves) and 1 (is the policy)")
        check_same_tensors(params, {})
        self.mu = float(mu)
        self.average: dict[str, Tensor] = {}
        self._dtypes = {name: tensor.dtype for name, tensor in params.items()}
        first_name: dict[tuple, str] = {}
        for name, tensor in params.items():
            tied_to = first_name.setdefault(storage_key(name, tensor), name)
            if tied_to != name:
                self.average[name] = self.average[tied_to]
            elif not tensor.is_floating_point():
                self.average[name] = tensor.detach().clone()
            elif not is_finite(tensor):
                raise ValueError(f"params[{name!r}] has NaN or infinite weights; start from a sound policy")
            else:
                # float32 even for bfloat16: at μ = 0.01 a step is far below the 8 bits of a bfloat16
                # average and would be rounded away, so that the anchor would never move.
                self.average[name] = widen(tensor).clone()
        firsts = list(first_name.values())  # tied tensors are updated once
        self._moving = [name for name in firsts if self.average[name].is_floating_point()]
        self._buffers = [name for name in firsts if not self.average[name].is_floating_point()]
        self._targets = [self.average[name] for name in self._moving]
        self._layout = [(self.average[name].shape, self._dtypes[name]) for name in self._moving]

    @torch.no_grad()
    def update(self, params: Weights) -> None:
        """θ_ema ← (1 − μ) θ_ema + μ θ, in place; call it after every optimiser step.

        Raises ValueError if `params` no longer has the tensors that the anchor was made from, and TypeError for
        what is no tensor. Their values are not looked at: this runs at every step.
        """
        if params.keys() != self.average.keys():
            name = sorted(params.keys() ^ self.average.keys())[0]
            raise ValueError(f"params and the anchor differ in tensor {name!r}; "
                             "update with the policy that the anchor was made from")
        for name, source in params.items():
            if not isinstance(source, Tensor):
                raise TypeError(f"params[{name!r}] is a {type(source).__name__}, not a tensor; keep only the weights "
                                "in it")
        sources = [params[name] for name in self._moving]
        if [(source.shape, source.dtype) for source in sources] != self._layout:
            for name, source, layout in zip(self._moving, sources, self._layout):
                if (source.shape, source.dtype) != layout:
                    raise ValueError(
                        f"params[{name!r}] is {source.dtype} {tuple(source.shape)}, the anchor's is "
                        f"{layout[1]} {tuple(layout[0])}; update with the policy it was made from")
        for name in self._buffers:
            if not torch.equal(params[name], self.average[name]):
                raise ValueError(f"params[{name!r}] is an integer buffer that changed and cannot be "
                                 "averaged; pass dict(model.named_parameters())")
        if self._targets:
            wide = [source if source.dtype == target.dtype else source.to(target.dtype)
                    for source, target in zip(sources, self._targets)]
            torch._foreach_lerp_(self._targets, wide, self.mu)  # one call: half the time of a Python loop

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of θ_ema in the dtypes of the policy, tied where the policy was."""
        copies: dict[int, Tensor] = {}
        for name, tensor in self.average.items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(self._dtypes[name], copy=True)
        return {name: copies[id(tensor)] for name, tensor in self.average.items()}
