"""Merge methods by name. A method is one function, and serves merges in memory, on disk, of adapters and in pictures.

It takes the inner products of the policies' task vectors, (M, M) in float64, and the policies' weights, and returns
the c_m of θ_init + Σ c_m δ_m, one for each policy; it is called for every tensor apart. A new method is a function and
its entry in `MERGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor

from .slerp import combine, gram, slerp_coefficients
from .state_dicts import Weights, check_weights, label_policies, map_tensors

MergeMethod = Callable[[Tensor, Sequence[float]], Sequence[float]]


def mean_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """LERP: the weights (M,) themselves, whatever the angles. `products` (M, M) are not looked at. Source: figures 3c
    and 8."""
    return list(weights)


MERGES: dict[str, MergeMethod] = {"slerp": slerp_coefficients, "lerp": mean_coefficients}


def merge_method(name: str) -> MergeMethod:
    """The method of that name. Raises ValueError that lists the names there are."""
    if name not in MERGES:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(MERGES)}")
    return MERGES[name]


def needs_products(method: MergeMethod) -> bool:
    """Whether a method looks at the inner products; a mean is spared the pass over the tensors that they cost."""
    return method is not mean_coefficients


def coefficients_of(method: MergeMethod, products: Tensor | None, weights: Sequence[float]) -> list[float]:
    """What a method makes of `products` (M, M) and `weights` (M,), checked.

    Raises ValueError where it raises anything, and where it does not return one finite number for each policy.
    """
    name = getattr(method, "__name__", method)
    try:
        returned = method(products, list(weights))  # a copy: every tensor is merged with the same weights
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"the merge method {name!r} failed with {why}") from error
    try:
        coefficients = None if isinstance(returned, (Mapping, Set)) else [
            float(c.detach() if isinstance(c, Tensor) else c) for c in returned]
    except (TypeError, ValueError):
        coefficients = None
    if coefficients is None or len(coefficients) != len(weights) or not all(
            abs(c) < float("inf") for c in coefficients):  # nor nan
        shown = returned if coefficients is None else coefficients
        raise ValueError(f"the merge method {name!r} returned {' '.join(str(shown).split())[:120]} for {len(weights)} "
                         "policies; it must return a finite number for each")
    return coefficients


def merge_tensors(base: Tensor, thetas: Sequence[Tensor], coefficients: Sequence[float], equal: bool,
                  around_first: bool = False) -> Tensor:
    """base + Σ c_m (θ_m − base) of one tensor, in float32 (float64 for float64), in new memory.

    Exact to the bit where one policy has the coefficient 1 and the others 0, and where the policies are `equal` and
    the coefficients sum to 1. `around_first`: the base drops out of a mean, which is taken around the first policy,
    so that the base does not enter its rounding.
    """
    for theta, coefficient in zip(thetas, coefficients):
        if coefficient == 1 and sum(map(abs, coefficients)) == 1:
            return theta.detach().clone()
    if equal and abs(sum(coefficients) - 1) < 1e-9:
        return thetas[0].detach().clone()
    if around_first:
        return combine(thetas[0], thetas[1:], coefficients[1:])
    return combine(base, thetas, coefficients)


def merge(init: Weights, policies: Sequence[Weights], method: str = "slerp",
          weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Stage 2: the merge of an iteration's policies by the method of that name; a single one is taken as it is.

    Shapes and dtypes are those of `init`. `weights` (M,) are uniform by default; a policy that has all the weight
    is the merge. Equal to `slerp` and `lerp` for their names. Raises ValueError for a name that is not in `MERGES`,
    weights that do not sum to 1, tensors that do not match `init`, and NaN weights.
    Source: Algorithm 1, stage 2; equation 26 for SLERP.
    """
    if len(policies) == 1:
        return dict(policies[0])
    function = merge_method(method)
    labelled = label_policies(policies)
    weights = check_weights(weights, len(labelled))

    def of_tensor(base: Tensor, thetas: list[Tensor]) -> Tensor:
        products = gram(base, thetas) if needs_products(function) else None
        equal = all(torch.equal(theta, thetas[0]) for theta in thetas[1:])
        return merge_tensors(base, thetas, coefficients_of(function, products, weights), equal,
                             not needs_products(function))

    return map_tensors(of_tensor, init, labelled)
