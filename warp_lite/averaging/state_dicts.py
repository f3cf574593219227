"""What all weight arithmetic shares: checks, precision, and one walk over state dicts.

A state dict is a mapping from names to tensors. The rules are the same for every operation:
float64 stays float64, anything narrower is computed in float32 and stored back in its own dtype;
tensors that share storage in `init` share it in the result; integer and boolean buffers are carried
over; inputs are never modified, and results never share memory with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .checks import buffer_differs, not_finite, overflows

Weights = Mapping[str, Tensor]  # a state dict, or the parameters of one: tensors by name
Module = TypeVar("Module", bound=nn.Module)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the precision it is computed in (itself, not a copy, if it is that wide)."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def map_tensors(
    function: Callable[[Tensor, list[Tensor]], Tensor],
    init: Weights,
    others: Mapping[str, Weights],
    buffer: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, Tensor]:
    """Apply `function(init tensor, the others' tensors)` to every tensor, keeping dtypes and ties.

    `others` maps a label for error messages ("policies[1]") to a state dict; `buffer` makes the
    result for an integer or boolean tensor, which must be equal everywhere.
    Raises ValueError if the state dicts do not fit together, hold NaN or infinite weights, or if a result overflows
    its dtype; TypeError for what is no state dict.
    """
    check_same_tensors(init, others)
    result: dict[str, Tensor] = {}
    first_name: dict[tuple, str] = {}
    with torch.no_grad():
        for name, tensor in init.items():
            tied_to = first_name.setdefault(storage_key(name, tensor), name)
            if tied_to != name:
                _check_still_tied(tied_to, name, others)
                result[name] = result[tied_to]
                continue
            tensors = [other[name] for other in others.values()]
            if tensor.is_floating_point():
                check_finite(name, {"init": tensor, **dict(zip(others, tensors))})
                result[name] = function(tensor, tensors).to(tensor.dtype)
                check_no_overflow(name, result[name])
            else:
                check_equal_buffers(name, tensor, dict(zip(others, tensors)))
                result[name] = buffer(tensor)
    return result


def storage_key(name: str, tensor: Tensor) -> tuple:
    """Equal for two names exactly if they are the same view of the same memory (tied weights)."""
    storage = tensor.untyped_storage().data_ptr()
    if storage == 0:  # an empty tensor: nothing to share
        return (name,)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def label_policies(policies: Sequence[Weights], at_least: int = 2) -> dict[str, Weights]:
    """{"policies[0]": …, …}, the names by which errors speak of the policies.

    Raises TypeError for a single model in the place of a list, ValueError for fewer than `at_least`.
    """
    if isinstance(policies, (Mapping, torch.nn.Module)):
        raise TypeError("policies is a single model; pass a list of state dicts, one for each policy")
    policies = list(policies)
    if len(policies) < at_least:
        raise ValueError(f"policies has {len(policies)} of the at least {at_least} state dicts needed; "
                         "pass one for each run")
    return {f"policies[{index}]": policy for index, policy in enumerate(policies)}


def check_same_tensors(init: Weights, others: Mapping[str, Weights]) -> None:
    """Whether all state dicts have the same names, shapes, dtypes and devices as `init`.

    Raises ValueError that names the first difference; TypeError for what is no state dict or no real tensor.
    """
    for label, state in {"init": init, **others}.items():
        if not isinstance(state, Mapping):
            raise TypeError(f"{label} is a {type(state).__name__}, not a state dict; "
                            "pass model.state_dict()")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}[{name!r}] is a {type(tensor).__name__}, not a tensor; "
                                "keep only the weights in it")
            if tensor.is_complex():
                raise TypeError(f"{label}[{name!r}] is {tensor.dtype}; only real weights can be merged")
    for label, state in others.items():
        hint = "were both saved from the same architecture?"
        for name, tensor in init.items():
            if name not in state:
                raise ValueError(f"{label} has no tensor {name!r} that init has; {hint}")
            other = state[name]
            if other.shape != tensor.shape:
                raise ValueError(f"{label}[{name!r}] has shape {tuple(other.shape)}, "
                                 f"init's has {tuple(tensor.shape)}; {hint}")
            if other.dtype != tensor.dtype:
                raise ValueError(f"{label}[{name!r}] is {other.dtype}, init's is {tensor.dtype}; "
                                 "convert one of them first")
            if other.device != tensor.device:
                raise ValueError(f"{label}[{name!r}] is on {other.device}, init's is on "
                                 f"{tensor.device}; move them to one device first")
        for name in state:
            if name not in init:
                raise ValueError(f"{label} has a tensor {name!r} that init has not; {hint}")


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, in one pass without a temporary (aminmax propagates NaN)."""
    return tensor.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(tensor.detach()))


def check_finite(name: str, inputs: Mapping[str, Tensor]) -> None:
    """Raises ValueError if one of the inputs for tensor `name` is NaN or infinite; it says which, by its label."""
    for label, tensor in inputs.items():
        if not is_finite(tensor):
            raise not_finite(label, name)


def check_no_overflow(name: str, result: Tensor) -> None:
    """Raises ValueError if the result for tensor `name`, made of finite inputs, is not finite."""
    if not is_finite(result):
        raise overflows(name, result.dtype)


def check_equal_buffers(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> None:
    """Raises ValueError if one of the others' tensors `name`, which cannot be averaged, differs from init's."""
    for label, other in others.items():
        if not torch.equal(other, tensor):
            raise buffer_differs(label, name, tensor.dtype)


def _check_still_tied(first: str, second: str, others: Mapping[str, Weights]) -> None:
    for label, state in others.items():
        if state[first] is not state[second] and not torch.equal(state[first], state[second]):
            raise ValueError(f"{label} has different values for {first!r} and {second!r}, which init "
                             "ties; tie them, or clone one of them in init")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by name, detached, tied ones once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def frozen_names(model: torch.nn.Module) -> list[str]:
    """The weights of a module that do not train, `requires_grad=False`, by name."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def freeze(model: torch.nn.Module, names: Sequence[str]) -> torch.nn.Module:
    """Have the weights of those names not train, in place, and return the module."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def stack(states: Sequence[Weights], device: str | torch.device | None = None) -> dict[str, Tensor]:
    """E state dicts as one, each tensor (…) as (E, …), on a device if one is named. Raises KeyError where one lacks a
    name."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def unstack(weights: Weights) -> list[dict[str, Tensor]]:
    """Tensors (E, …) as E state dicts of tensors (…): copies, detached. `stack` undoes it."""
    E = len(next(iter(weights.values())))
    return [{name: tensor[e].detach().clone() for name, tensor in weights.items()} for e in range(E)]


@torch.no_grad()
def load_weights(model: Module, state: Weights) -> Module:
    """Write weights into a module, in place, and return the module. Raises KeyError where one is missing."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])
    return model


def bytes_of(weights: Weights) -> int:
    """How many bytes weights take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def copy_weights(weights: Weights) -> Weights:
    """The same weights in memory of their own, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
