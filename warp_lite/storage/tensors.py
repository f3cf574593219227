"""Files of tensors: safetensors, written whole, with a hash of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import first_line, whole


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all, and its folder if absent. It carries the hash of its tensors.

    Raises CannotWrite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(Path(path)) as made:
        save_file(tensors, made, metadata={"sha256": weights_hash(dict(sorted(tensors.items())))})


def load_tensors(path: Path, device: str | torch.device, way_out: str, ours: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on a device.

    One of `ours`, written by `save_tensors`, must have the tensors whose hash it carries; another's has no hash.
    Raises ValueError that names a file that is missing, cut off or altered, and the way out.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; is it truncated? {way_out}") from error
    if ours and weights_hash(dict(sorted(tensors.items()))) != expected:
        raise ValueError(f"{path} was altered: its tensors have not the hash that it carries; {way_out}")
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and values in their order, in hexadecimal; the same on any device."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
