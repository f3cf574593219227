"""Stage 2 of WARP: merge the policies of M runs by spherical interpolation of their task vectors.

Each policy is θ^m = θ_init + δ_m. LERP averages the policies; nearly orthogonal task vectors of norm
l then average to a shorter one (l/√M). SLERP walks the arc between them and keeps the norm:

    slerp(θ_init, θ¹, θ², λ) = θ_init + sin((1−λ)Ω)/sin Ω · δ_1 + sin(λΩ)/sin Ω · δ_2,

with Ω the angle between δ_1 and δ_2, one for each tensor ("layer by layer"). The two factors, and those of more
policies, are `slerp_coefficients` of coefficients.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_weights
from .coefficients import slerp_coefficients
from .state_dicts import Weights, check_finite, check_same_tensors, label_policies, map_tensors, widen

CHUNK = 2**16  # elements at a time in `gram`: its float64 copies stay in the processor's cache


def task_vector(theta: Weights, init: Weights) -> dict[str, Tensor]:
    """What a run learned: δ = θ − θ_init, for each tensor.

    Shapes and dtypes are those of `init`; integer buffers, which must be equal, give zeros.
    Raises ValueError if the two do not have the same tensors, or have NaN weights.
    Source: the δ of equation 26.
    """
    return map_tensors(lambda base, thetas: widen(thetas[0]) - widen(base), init, {"theta": theta},
                       buffer=torch.zeros_like)


def lerp(init: Weights, policies: Sequence[Weights],
         weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of the policies (uniform by default), the baseline of stage 2.

    Raises ValueError for fewer than two policies, weights that do not sum to 1, tensors that do not
    match `init`, and NaN weights. Source: the LERP of figures 3c and 8.
    """
    labelled = label_policies(policies)
    weights = check_weights(weights, len(labelled))

    def merge(base: Tensor, thetas: list[Tensor]) -> Tensor:
        done = undisputed(thetas, weights)
        return combine(thetas[0], thetas[1:], weights[1:]) if done is None else done

    return map_tensors(merge, init, labelled)


def slerp(init: Weights, policies: Sequence[Weights],
          weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Spherical interpolation of the policies' task vectors, each tensor with its own angle Ω.

    Two policies: `weights=(1 − λ, λ)`, by default λ = ½. More: merged one after the other, the k-th
    with λ = 1/k (or w_k / (w_1 + … + w_k)); λ = 1/M at every step would favour the first policy. The
    order still matters a little: iterated SLERP is not associative.
    At the edges nothing is NaN: equal task vectors stay as they are; Ω → 0 and Ω = 180° are LERP
    (opposite vectors at λ = ½ cancel to θ_init); if one is zero the other's factor is sin(tπ/2) with
    t its weight; if all are zero the result is θ_init; λ = 0 and 1 give the policy exactly.
    Raises ValueError for fewer than two policies, weights that do not sum to 1, tensors that do not
    match `init`, and NaN weights. Source: Algorithm 1 and equation 26 of the paper.
    """
    labelled = label_policies(policies)
    weights = check_weights(weights, len(labelled))

    def merge(base: Tensor, thetas: list[Tensor]) -> Tensor:
        done = undisputed(thetas, weights)
        if done is None:
            return combine(base, thetas, slerp_coefficients(gram(base, thetas), weights))
        return done

    return map_tensors(merge, init, labelled)


def angles(init: Weights, policies: Sequence[Weights]) -> dict[str, Tensor]:
    """The angle Ω between each two task vectors, in degrees: (M, M) in float64 for each float tensor.

    Near 90° for task vectors, near 0° for whole weights (pass zeros as `init`). A tensor that did not
    move has no direction: 90° to one that did, 0° to another that did not.
    Raises ValueError for no policy, tensors that do not match `init`, and NaN weights. Source: figure 11 of the paper.
    """
    labelled = label_policies(policies, at_least=1)
    check_same_tensors(init, labelled)
    result = {}
    for name, base in init.items():
        if base.is_floating_point():
            thetas = [policy[name] for policy in labelled.values()]
            check_finite(name, {"init": base, **dict(zip(labelled, thetas))})
            products = gram(base, thetas)                                            # (M, M)
            result[name] = torch.rad2deg(_omegas(products))                          # (M, M)
    return result


def gram(init: Tensor, thetas: Sequence[Tensor]) -> Tensor:
    """The inner products δ_i · δ_j of one tensor's task vectors: (M, M), float64, on the CPU.

    Summed in float64: in float32 the arc cosine loses every angle below a fiftieth of a degree.
    """
    total = torch.zeros(len(thetas), len(thetas), dtype=torch.float64, device=init.device)
    chunks = [tensor.detach().reshape(-1).split(CHUNK) for tensor in (init, *thetas)]
    for base, *parts in zip(*chunks):
        deltas = [(widen(part) - widen(base)).double() for part in parts]         # M of (chunk,)
        total += torch.stack([a.dot(b) for a in deltas for b in deltas]).view_as(total)   # (M, M)
    return total.cpu()


def _omegas(products: Tensor) -> Tensor:
    """Angles in radians from inner products, both (M, M)."""
    norms = products.diagonal().sqrt()                                          # (M,)
    scale = norms[:, None] * norms[None, :]                                     # (M, M)
    cosines = torch.where(scale > 0, products / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)
    still = norms == 0
    equal = torch.eye(len(norms), dtype=torch.bool) | (still[:, None] & still[None, :])
    return torch.where(equal, 0.0, torch.acos(cosines))


def undisputed(thetas: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
    """The merged tensor, exact to the bit, where one policy has all the weight or all are equal."""
    for theta, weight in zip(thetas, weights):
        if weight == 1:
            return theta.detach().clone()
    if all(torch.equal(theta, thetas[0]) for theta in thetas[1:]):
        return thetas[0].detach().clone()
    return None


def combine(base: Tensor, thetas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """base + Σ c_m (θ_m − base) in float32 (float64 for float64), in new memory."""
    result = widen(base).clone()
    for theta, coefficient in zip(thetas, coefficients):
        result.add_(widen(theta) - widen(base), alpha=coefficient)
    return result
