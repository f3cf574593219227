"""Merge methods by name. A method is one function, and serves merges in memory, on disk, of adapters and in pictures.

It takes the inner products of the policies' task vectors, (M, M) in float64, and the policies' weights, and returns
the c_m of θ_init + Σ c_m δ_m, one for each policy; it is called for every tensor apart. A new method is a function and
its entry in `MERGES`. Those here need no torch, as a merge on disk does without it (arrays.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MergeMethod = Callable[["Tensor", Sequence[float]], Sequence[float]]


def mean_coefficients(products: Tensor | np.ndarray | None, weights: Sequence[float]) -> list[float]:
    """LERP: the weights (M,) themselves, whatever the angles. `products` (M, M) are not looked at. Source: figures 3c
    and 8."""
    return list(weights)


def slerp_coefficients(products: Tensor | np.ndarray, weights: Sequence[float]) -> list[float]:
    """The c_m with slerp = θ_init + Σ c_m δ_m, from the task vectors' inner products (M, M).

    All the geometry of the iteration happens here: norms and angles of every intermediate merge
    follow from the inner products, so the tensors themselves are combined only once. Source: equation 26.
    """
    products = products.tolist()
    coefficients = [1.0] + [0.0] * (len(weights) - 1)         # the merge of the first k, so far k = 1
    total = weights[0]
    for k in range(1, len(weights)):
        total += weights[k]
        fraction = weights[k] / total if total else 0.0       # 1/k if uniform
        dot = sum(c * row[k] for c, row in zip(coefficients, products))
        square = sum(a * b * products[i][j] for i, a in enumerate(coefficients)
                     for j, b in enumerate(coefficients))
        size = sum(abs(c) * math.sqrt(products[i][i]) for i, c in enumerate(coefficients))
        # Opposite task vectors cancel to rounding noise, which must count as zero, not as a direction.
        norm = math.sqrt(square) if square > (1e-7 * size) ** 2 else 0.0
        keep, add = _slerp_pair(norm, math.sqrt(products[k][k]), dot, fraction)
        coefficients = [keep * c for c in coefficients]
        coefficients[k] = add
    return coefficients


def _slerp_pair(norm_1: float, norm_2: float, dot: float, lam: float) -> tuple[float, float]:
    """The factors of two vectors on the arc between them, a fraction `lam` of the way to the second."""
    norms = norm_1 * norm_2
    cosine = max(-1.0, min(1.0, dot / norms)) if norms > 0 else 0.0  # a zero vector: as if orthogonal
    omega = math.acos(cosine)
    if math.sin(omega) < 1e-6:  # the limit at Ω = 0 (they differ by Ω²/6); the arc at 180° is undefined
        return 1 - lam, lam
    return math.sin((1 - lam) * omega) / math.sin(omega), math.sin(lam * omega) / math.sin(omega)


MERGES: dict[str, MergeMethod] = {"slerp": slerp_coefficients, "lerp": mean_coefficients}
OWN = frozenset(MERGES.values())  # those that take the inner products as an array of NumPy too


def merge_method(name: str) -> MergeMethod:
    """The method of that name. Raises ValueError that lists the names there are."""
    if name not in MERGES:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(MERGES)}")
    return MERGES[name]


def needs_products(method: MergeMethod) -> bool:
    """Whether a method looks at the inner products; a mean is spared the pass over the tensors that they cost."""
    return method is not mean_coefficients


def coefficients_of(method: MergeMethod, products: Tensor | np.ndarray | None,
                    weights: Sequence[float]) -> list[float]:
    """What a method makes of `products` (M, M) and `weights` (M,), checked. A method of another's is handed a Tensor,
    also where the products are an array.

    Raises ValueError where it raises anything, and where it does not return one finite number for each policy.
    """
    name = getattr(method, "__name__", method)
    if products is not None and method not in OWN:
        import torch  # only here: a merge on disk by the methods above does without

        products = torch.as_tensor(products)
    try:
        returned = method(products, list(weights))  # a copy: every tensor is merged with the same weights
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"the merge method {name!r} failed with {why}") from error
    try:
        coefficients = None if isinstance(returned, (Mapping, Set)) else [
            float(c.detach() if hasattr(c, "detach") else c) for c in returned]
    except (TypeError, ValueError):
        coefficients = None
    if coefficients is None or len(coefficients) != len(weights) or not all(
            abs(c) < float("inf") for c in coefficients):  # nor nan
        shown = returned if coefficients is None else coefficients
        raise ValueError(f"the merge method {name!r} returned {' '.join(str(shown).split())[:120]} for {len(weights)} "
                         "policies; it must return a finite number for each")
    return coefficients
