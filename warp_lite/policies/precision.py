"""What is computed in float32 in any case, and what may be bfloat16.

Weights, gradients, Adam's moments and the anchor are float32 at least. A bfloat16 has 8 bits: an
update of less than one part in 512 of a weight would be rounded away, and so would nearly every
step of an anchor at μ = 0.01. Only the products with the transformer's matrices may be taken in
bfloat16, from float32 weights. The vocabulary head and what follows it are float32 again: the
logits of trained models reach 100, where the bfloat16 numbers lie half a nat apart.

float16 is not offered. Its least number is so large that small gradients vanish unless the loss
is scaled, by a factor that has to be found while training; that is not worth having before it
was measured on a GPU without bfloat16, such as a T4. There the products are float32.
"""

from __future__ import annotations

import copy

import torch

BF16_FROM = (8, 0)  # compute capability; `torch.cuda.is_bf16_supported` counts emulation in software


def compute_dtype(precision: str, device: str | torch.device) -> torch.dtype | None:
    """The dtype of the transformer's matrix products on a device; None for that of the weights.

    Raises ValueError for "bf16" on a CUDA device that lacks it.
    """
    device = torch.device(device)
    if precision == "fp32":
        return None
    if precision == "auto" and device.type != "cuda":
        return None
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < BF16_FROM:
        if precision == "auto":
            return None
        raise ValueError(f"precision='bf16' needs a GPU of compute capability {_dots(BF16_FROM)}, and "
                         f"{torch.cuda.get_device_name(device)} has {_dots(capability)}; take 'auto' or 'fp32'")
    return torch.bfloat16


def _dots(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def full_precision(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself if its weights are float32 or wider, else a copy in float32."""
    if all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).float()
