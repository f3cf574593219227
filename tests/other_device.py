"""A device that is not the CPU, where there is no GPU: tensors that compute on the CPU and say that they are elsewhere.

As on a GPU, an operation on tensors of both places raises, unless it copies between them, one of them is a
single number, or a CPU tensor indexes the other. The name of the device is `meta`, which torch lets be used
without hardware.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}


class Elsewhere(torch.Tensor):
    """A tensor on the other device; `inner` is what it is made of."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=ELSEWHERE)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        """Numbers are handed over from any device."""
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo):
        with torch.no_grad():
            return self.clone().requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Check where the tensors are, compute on the CPU, and say where the result is."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    if any(tensor.device == ELSEWHERE and not isinstance(tensor, Elsewhere) for tensor in tensors):
        raise RuntimeError(f"{function} was given a tensor that torch made on {ELSEWHERE} itself, without numbers")
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
    indexing = function in (aten.index.Tensor, aten.index_put_.default) and isinstance(args[0], Elsewhere)
    if there and here and function not in COPIES and not indexing:
        raise RuntimeError(f"{function} was given tensors on two devices: {[tuple(t.shape) for t in here]} on the CPU, "
                           f"{[tuple(t.shape) for t in there]} elsewhere")
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    to = bool(there) if device is None else torch.device(device) == ELSEWHERE
    if function is aten.copy_.default:
        to = isinstance(args[0], Elsewhere)
    wrapped = {id(tensor.inner): tensor for tensor in there}
    results = function(*tree_map_only(Elsewhere, lambda t: t.inner, args),
                       **tree_map_only(Elsewhere, lambda t: t.inner, kwargs))

    def put(result):
        if not isinstance(result, torch.Tensor) or not to:
            return result
        return wrapped.get(id(result)) if id(result) in wrapped else Elsewhere(result)

    return tree_map(put, results)


class Watch(TorchDispatchMode):
    """Has factories of tensors on the other device make them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


@contextmanager
def other_device():
    """The device, while it exists."""
    make, fused = torch.tensor, lambda: ["cpu", ELSEWHERE.type]
    with (Watch(), patch("torch.tensor", lambda *args, device=None, **options: make(*args, **options).to(device)),
          patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None),
          patch("torch.optim.optimizer._get_fused_kernels_supported_devices", fused)):
        yield ELSEWHERE  # torch.tensor makes tensors without numbers on this device, and fused Adam does not know it
