"""What weight arithmetic refuses, and in what words.

Nothing here imports torch: a merge on disk does without it (arrays.py), and says the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGEST = (2 - 2**-23) * 2.0**127  # of float32, which weights are moved by


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weight (M,) of each policy as floats: uniform if None, else non-negative and summing to 1 (within 1e-6).

    Raises ValueError for other weights, and for another number of them than `count`.
    """
    if weights is None:
        return [1 / count] * count
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"weights has {len(values)} numbers for {count} policies; pass one for each")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"weights is {values}; each must be finite and not negative")
    if abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"weights {values} sum to {sum(values):.6g}; divide them by their sum")
    return values


def check_eta(eta: float) -> float:
    """η as a float. Raises ValueError where it is negative, not finite or beyond float32."""
    if not 0 <= eta <= LARGEST:  # nor nan
        raise ValueError(f"eta is {eta}; it must be finite and not negative "
                         "(0 gives init, 1 gives theta, more extrapolates)")
    return float(eta)


def not_finite(label: str, name: str) -> ValueError:
    """The error for an input, named by its label, whose tensor `name` has NaN or infinity."""
    return ValueError(f"{label}[{name!r}] has NaN or infinite weights; did the run that made it diverge?")


def overflows(name: str, dtype: object) -> ValueError:
    """The error for a result, made of finite inputs, that is not finite in its dtype, "torch.float16"."""
    return ValueError(f"the result for {name!r} overflows {dtype}; use a smaller eta or a wider dtype")


def buffer_differs(label: str, name: str, dtype: object) -> ValueError:
    """The error for an input whose integer or boolean tensor `name` is not init's."""
    return ValueError(f"{label}[{name!r}] is a {dtype} buffer that differs from init's and cannot be averaged; make "
                      "them equal or drop it")
