"""The arithmetic of adapters: of ΔW = BA, on its factors, never of A and B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..averaging.checks import check_eta, check_weights
from ..averaging.coefficients import coefficients_of, merge_method
from ..averaging.state_dicts import Weights, widen


@dataclass(frozen=True)
class Adapter:
    """ΔW of some of a policy's matrices, each as B·A with the scaling in B.

    `factors`: B (out, r) and A (r, in) by the name of the weight they change. `transposed`: those weights
    that are stored (in, out), as GPT-2's are, and change by (BA)ᵀ.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    transposed: frozenset[str] = frozenset()

    def delta(self, name: str) -> Tensor:
        """The dense ΔW of one weight, in the weight's own layout."""
        B, A = self.factors[name]
        return (B @ A).T if name in self.transposed else B @ A

    @property
    def rank(self) -> int:
        """The largest rank r among its matrices."""
        return max(B.shape[1] for B, _ in self.factors.values())


def combine_adapters(adapters: Sequence[Adapter],
                     coefficients: Sequence[float] | Mapping[str, Sequence[float]]) -> Adapter:
    """Σ c_m ΔW_m, exactly: the factors stacked, rank Σ r_m. A mapping gives each weight its own coefficients.

    Raises ValueError for adapters of different weights or shapes.
    """
    check_same_weights(adapters)
    factors = {}
    for name in adapters[0].factors:
        c = coefficients[name] if isinstance(coefficients, Mapping) else coefficients
        pairs = [adapter.factors[name] for adapter in adapters]
        factors[name] = (torch.cat([x * widen(B) for x, (B, _) in zip(c, pairs)], 1),        # (out, Σ r)
                         torch.cat([widen(A) for _, A in pairs], 0))                         # (Σ r, in)
    return Adapter(factors, adapters[0].transposed)


def merge_adapters(adapters: Sequence[Adapter], weights: Sequence[float] | None = None,
                   method: str = "slerp") -> Adapter:
    """Stage 2 on adapters of one init, exactly: ΔW merged by a method of `averaging.coefficients.MERGES`, each weight
    with its own angle.

    The same as `merge(init, dense policies, method)`, by Gram matrices of the factors; the rank is the sum of
    the ranks. Raises ValueError for fewer than two adapters, those that do not fit together and an unknown method.
    Source: Algorithm 1, stage 2; equation 26.
    """
    function = merge_method(method)
    if len(adapters) < 2:
        raise ValueError(f"{len(adapters)} adapter to merge; pass at least two")
    weights = check_weights(weights, len(adapters))
    check_same_weights(adapters)
    return combine_adapters(adapters, {name: coefficients_of(function, adapter_gram(adapters, name), weights)
                                       for name in adapters[0].factors})


def adapter_gram(adapters: Sequence[Adapter], name: str) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ of one weight, (M, M) in float64: the sum over (B_iᵀB_j) ∘ (A_iA_jᵀ)."""
    pairs = [tuple(factor.double() for factor in adapter.factors[name]) for adapter in adapters]
    return torch.stack([torch.stack([((Bi.T @ Bj) * (Ai @ Aj.T)).sum() for Bj, Aj in pairs])
                        for Bi, Ai in pairs]).cpu()


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of a rank, and ‖what is lost‖ / ‖ΔW‖ over all its matrices together (Frobenius).

    By QR of the factors and an SVD of r × r. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be 1 or more, not {rank}")
    factors, lost, total = {}, 0.0, 0.0
    for name, (B, A) in adapter.factors.items():
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)                                               # (R, R), (R,), (R, R)
        root = S[:rank].sqrt()
        factors[name] = ((Qb @ U[:, :rank] * root).to(B.dtype), (root[:, None] * (Vh[:rank] @ Qa.T)).to(A.dtype))
        lost, total = lost + S[rank:].square().sum().item(), total + S.square().sum().item()
    return Adapter(factors, adapter.transposed), math.sqrt(lost / total) if total else 0.0


def fold(init: Weights, adapter: Adapter, eta: float = 1.0) -> dict[str, Tensor]:
    """Dense weights W + η·ΔW; those without an adapter are init's own tensors.

    Raises ValueError where the adapter does not fit.
    """
    eta, result = check_eta(eta), dict(init)
    for name in adapter.factors:
        result[name] = adapted(init, adapter, name, eta)
    return result


def adapted(init: Weights, adapter: Adapter, name: str, eta: float) -> Tensor:
    """One weight after its adapter, W + η·ΔW, in W's shape and dtype. Raises ValueError where they do not fit."""
    if name not in init:
        raise ValueError(f"the adapter changes {name!r}, which init has not; was it trained on another policy?")
    base, delta = widen(init[name]), adapter.delta(name)
    if delta.shape != base.shape:
        raise ValueError(f"the adapter changes {name!r} by a matrix {tuple(delta.shape)}, init's is "
                         f"{tuple(base.shape)}; was it trained on another policy?")
    return (base + eta * delta.to(base)).to(init[name].dtype)


def factors_merged(adapters: Sequence[Adapter]) -> Adapter:
    """The mistake to look at: the mean of the Bs times the mean of the As. Its ΔW is (1/M²) Σ_ij B_i A_j, of which
    only the M terms with i = j were ever trained. For notebooks and tests; merge with `merge_adapters`.

    Raises ValueError for adapters of different weights or shapes.
    """
    check_same_weights(adapters)
    mean = {name: tuple(torch.stack(parts).mean(0) for parts in zip(*(a.factors[name] for a in adapters)))
            for name in adapters[0].factors}
    return Adapter(mean, adapters[0].transposed)


def relative_error(adapter: Adapter, exact: Adapter) -> float:
    """‖ΔW − ΔW_exact‖ / ‖ΔW_exact‖ over all matrices together; 0 where both are 0."""
    difference = combine_adapters([adapter, exact], [1.0, -1.0])
    lost, total = (sum(adapter_gram([one], name).item() for name in exact.factors) for one in (difference, exact))
    return math.sqrt(max(lost, 0.0) / total) if total else 0.0


def check_same_weights(adapters: Sequence[Adapter]) -> None:
    """Raises ValueError unless all adapt the same weights in the same shapes; it names the first that differs."""
    first = adapters[0]
    for number, adapter in enumerate(adapters[1:], 1):
        for name in sorted(first.factors.keys() ^ adapter.factors.keys()):
            raise ValueError(f"only one of adapters[0] and adapters[{number}] changes {name!r}; were they trained "
                             "with the same target modules?")
        for name in first.factors:
            shapes = [(len(one.factors[name][0]), one.factors[name][1].shape[1], name in one.transposed)
                      for one in (first, adapter)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapters[0] and adapters[{number}] change {name!r} in different shapes; were they "
                                 "trained on the same policy?")
