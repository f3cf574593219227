"""Stage 2 by the name of its method: any of `MERGES` (coefficients.py), on state dicts in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_weights
from .coefficients import coefficients_of, merge_method, needs_products
from .slerp import combine, gram
from .state_dicts import Weights, label_policies, map_tensors


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
    is the merge. For their names it equals `slerp` and `lerp`, which are written out on their own, to be read; tests
    hold the two equal. Raises ValueError for a name that is not in `MERGES`, weights that do not sum to 1, tensors
    that do not match `init`, and NaN weights.
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
