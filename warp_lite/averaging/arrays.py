"""The arithmetic of merging.py and liti.py on flat arrays of NumPy, in the dtypes of safetensors: without torch, whose
import takes longer than a merge of small models does.

To the same bytes: torch adds c·δ to a float32 with one rounding (a fused multiply-add). So does this: in float64 the
product is exact, and the sum is rounded to float32. Its first rounding, to float64, changes the second in one case of
some hundred million, by one unit in the last place. Float64 itself is rounded twice here, which is within one unit.
tests/test_arrays.py holds this file to torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK = 2**16  # elements at a time: what is computed on stays in the processor's cache
# A dtype's name in torch, and what its elements are read as: bfloat16, which NumPy has not, as their bits
DTYPES = {"F64": ("float64", np.float64), "F32": ("float32", np.float32), "F16": ("float16", np.float16),
          "BF16": ("bfloat16", np.uint16), "I64": ("int64", np.int64), "I32": ("int32", np.int32),
          "I16": ("int16", np.int16), "I8": ("int8", np.int8), "U8": ("uint8", np.uint8), "BOOL": ("bool", np.uint8)}
FLOATING = ("F64", "F32", "F16", "BF16")


def widen_array(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the precision it is computed in: float64 as it is, all that is narrower as float32. `dtype` is that
    of safetensors. Not a copy where it is that wide."""
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if dtype == "F64" else array.astype(np.float32, copy=False)


def narrow_array(array: np.ndarray, dtype: str) -> np.ndarray:
    """What `widen_array` made wide, finite, in its dtype of safetensors again: rounded to the nearest, to even
    between two; infinite where it is too large."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return array.astype(DTYPES[dtype][1], copy=False)


def all_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity."""
    return bool(np.isfinite(array).all())


def inner_products(base: np.ndarray, thetas: Sequence[np.ndarray]) -> np.ndarray:
    """The inner products δ_i · δ_j of the task vectors of M wide arrays (N,): (M, M), summed in float64."""
    deltas = [(theta - base).astype(np.float64, copy=False) for theta in thetas]
    products = np.empty((len(thetas), len(thetas)))
    for i, first in enumerate(deltas):
        for j, second in enumerate(deltas[:i + 1]):
            products[i, j] = products[j, i] = np.einsum("n,n", first, second)  # not BLAS, which starts threads
    return products


def merge_arrays(base: np.ndarray, thetas: Sequence[np.ndarray], coefficients: Sequence[float], equal: bool,
                 around_first: bool = False) -> np.ndarray:
    """`merging.merge_tensors` of wide arrays (N,): base + Σ c_m (θ_m − base). What it is sure of is an input itself."""
    for theta, coefficient in zip(thetas, coefficients):
        if coefficient == 1 and sum(map(abs, coefficients)) == 1:
            return theta
    if equal and abs(sum(coefficients) - 1) < 1e-9:
        return thetas[0]
    if around_first:
        base, thetas, coefficients = thetas[0], thetas[1:], coefficients[1:]
    result = base
    for theta, coefficient in zip(thetas, coefficients):
        result = _add(result, theta - base, coefficient)
    return result


def interpolate_arrays(base: np.ndarray, theta: np.ndarray, eta: float) -> np.ndarray:
    """`liti.interpolate` of wide arrays (N,): (1 − η)·base + η·theta, from the nearer end."""
    eta = base.dtype.type(eta)
    if abs(eta) < 0.5:
        return _add(base, theta - base, eta)
    return _add(theta, theta - base, eta - base.dtype.type(1))


def _add(array: np.ndarray, delta: np.ndarray, coefficient: float) -> np.ndarray:
    """array + coefficient · delta in their precision, rounded once where that is float32; in new memory."""
    wide = delta.astype(np.float64)
    wide *= array.dtype.type(coefficient)
    wide += array
    return wide.astype(array.dtype, copy=False)
