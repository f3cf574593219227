"""Stage 3 of WARP: linear interpolation towards the initialisation (LITI).

    θ_η = (1 − η) · θ_init + η · θ

trades KL against reward with one number and no training. From the init of an iteration, with one η, it
makes the next init; swept over η from the SFT policy, it draws the front; η > 1 extrapolates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_eta
from .state_dicts import Weights, map_tensors, widen


def liti(init: Weights, theta: Weights, eta: float) -> dict[str, Tensor]:
    """(1 − η)·init + η·theta: `init` at η = 0 and `theta` at η = 1, both exactly; beyond, it extrapolates.

    Raises ValueError for an η that is negative or not finite, tensors that do not match, NaN weights, and
    a result that overflows its dtype. Source: Algorithm 1, last lines; figure 10 for η > 1.
    """
    eta = check_eta(eta)
    return map_tensors(lambda base, thetas: interpolate(base, thetas[0], eta), init, {"theta": theta})


def interpolate(base: Tensor, theta: Tensor, eta: float) -> Tensor:
    """(1 − η)·base + η·theta of one tensor in float32 (float64 for float64), in new memory."""
    # torch.lerp starts from the nearer end, so that both ends come out exact to the bit.
    return torch.lerp(widen(base), widen(theta), eta)
