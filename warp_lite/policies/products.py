"""Products with large matrices on a CPU, by oneDNN, which torch has beside its BLAS.

Where few rows meet a large matrix, as one token of each completion does, BLAS lays the matrix out anew at each
product; oneDNN multiplies by one that was laid out once. SmolLM2-135M, 16 rows: 0.6 of the time of `linear`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORTH = 8  # products with a matrix from which on packing it pays
SMALLEST = 2**16  # numbers of a matrix; what is around the product costs more than BLAS loses on smaller ones
APART = 8  # times that size, where there are several policies, each of which is a product by itself


def served(x: Tensor, matrices: Tensor) -> bool:
    """Whether oneDNN multiplies x (E, N, C) by such matrices (E, D, C) here: float32 on a CPU, and large ones."""
    policies = len(x)
    return (matrices.numel() >= SMALLEST * (1 if policies == 1 else APART * policies)  # first, as it is asked often
            and x.dtype == matrices.dtype == torch.float32 and x.device.type == "cpu" and available())


def multiply_each(x: Tensor, matrices: list[Tensor], packs: Packs | None = None, name: str = "") -> list[Tensor]:
    """x (E, N, C) times the transpose of each of these matrices (E, D, C), policy by policy: (E, N, D) each.

    Differentiable without `packs`, which keeps them under the name."""
    def each(tensor):
        return tensor.unbind(0) if len(tensor) > 1 else (tensor.squeeze(0),)  # whose gradient is no copy

    results = []
    for e, (own, *parts) in enumerate(zip(each(x), *map(each, matrices))):
        results.append([multiply(own, part) for part in parts] if packs is None else
                       packs.multiply(f"{name}.{e}", own, parts))
    return [torch.stack(some) if len(some) > 1 else some[0].unsqueeze(0) for some in zip(*results)]


@cache
def available() -> bool:
    """Whether this build of torch has oneDNN's products, which it calls itself where it compiles, and they are
    right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, matrix = torch.arange(24.0).view(4, 6) / 24, torch.arange(30.0).view(5, 6) / 30
    try:
        found = _multiply(x, matrix), _multiply(x, pack(matrix, len(x)))
    except (AttributeError, RuntimeError):  # no such operators, or none for these numbers
        return False
    return all(torch.allclose(y, x @ matrix.t(), atol=1e-6) for y in found)


class Packs:
    """Matrices by name, each packed at its first product, where enough products are to come for that to pay: in the
    cache of `batch` sequences of `length` tokens."""

    def __init__(self, batch: int, length: int):
        self.batch, self.length, self.packed, self.wanted = batch, length, {}, False

    def expect(self, start: int, tokens: int) -> None:
        """Say that `tokens` of each sequence come now, behind `start`: the room that is left says whether it pays."""
        self.wanted = bool(self.packed) or self.length - start - tokens >= WORTH

    def multiply(self, name: str, x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
        """x (N, C) times the transpose of each matrix (D, C): (N, D) each; without a gradient.

        Where it pays they are packed as one, under the name of the first, for a token of each sequence at a time."""
        if not self.wanted:
            return [multiply(x, matrix) for matrix in matrices]
        if name not in self.packed:
            self.packed[name] = pack(matrices[0] if len(matrices) == 1 else torch.cat(matrices), self.batch)
        y = _multiply(x, self.packed[name])
        return [y] if len(matrices) == 1 else list(y.split([len(matrix) for matrix in matrices], -1))


def pack(matrix: Tensor, rows: int) -> Tensor:
    """A matrix (D, C) as oneDNN wants it for products with so many rows; for its products alone."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), rows)


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, C) times the transpose of a matrix (D, C), (N, D), by oneDNN; differentiable."""
    if torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad):
        return _Product.apply(x, matrix)
    return _multiply(x, matrix)


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


class _Product(torch.autograd.Function):
    """x·Wᵀ, whose gradients G·W and Gᵀ·x are such products, too."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor) -> Tensor:
        """(N, C), (D, C) → (N, D)."""
        ctx.save_for_backward(x, matrix)
        return _multiply(x, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(N, D) → (N, C), (D, C)."""
        x, matrix = ctx.saved_tensors
        of_x, of_matrix = ctx.needs_input_grad
        return (_multiply(grad, matrix.t()) if of_x else None,
                _multiply(grad.t(), x.t()) if of_matrix else None)
