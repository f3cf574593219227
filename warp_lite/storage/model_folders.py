"""Hugging Face folders as files: headers, tensors, what is carried over."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..averaging.arrays import DTYPES, FLOATING
from .files import beside, sync_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Carried over from init: configuration and tokenizer. No weights, and nothing that could be executed.
CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
NOT_CARRIED = ("trainer_state.json", "adapter_config.json")
TEMPLATES = "additional_chat_templates"  # a folder, whose .jinja files are the tokenizer's
# Causal masks and tables of angles, which old files of the hub have and the library makes anew.
MADE_ANEW = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: `start` counts from the beginning of the file, `size` is in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder's files, each with its raw header, and its tensors in the order of the files."""

    folder: Path
    headers: dict[str, bytes]
    tensors: dict[str, _Stored]


def open_checkpoint(folder: Path) -> Checkpoint:
    """A folder's safetensors files, or a single such file, with their headers read and no tensor.

    Raises ValueError that says what is wrong where there are none: no folder, pickled weights only, an adapter, or an
    index, header or file that is damaged.
    """
    if folder.suffix == ".safetensors" and folder.is_file():
        header, tensors = _read_header(folder)
        return Checkpoint(folder.parent, {folder.name: header}, tensors)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the path of a saved model")
    if (folder / SINGLE).is_file():
        files, weight_map = [SINGLE], None
    elif (folder / INDEX).is_file():
        weight_map = _read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} holds a LoRA adapter, whose factors cannot be merged one by one; "
                         "fold it into its model first (PEFT's merge_and_unload)")
    elif any(pickled := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]):
        raise ValueError(f"{folder} has pickled weights only ({pickled[0]}), which can run code when "
                         "loaded; save the model as safetensors")
    else:
        raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}; is it a saved model?")

    headers, tensors = {}, {}
    for file in files:
        headers[file], stored = _read_header(folder / file)
        if weight_map is not None:
            promised = {name for name, where in weight_map.items() if where == file}
            for name in sorted(promised ^ stored.keys()):
                raise ValueError(f"{folder / INDEX} and {file} disagree about tensor {name!r}; "
                                 "save the model again")
        tensors.update(stored)
    return Checkpoint(folder, headers, tensors)


def stored_names(wanted: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Each wanted name with the stored one of the same tensor, as the library matches them: the name itself, or the
    name with the base model's put before it or taken away ("transformer.", in files of the hub and saved ones).

    A name that has no counterpart is left out.
    """
    best = {name: name for name in wanted if name in stored}
    for prefix in sorted({name.partition(".")[0] for name in (*wanted, *stored)}):
        for rename in (lambda name, start=f"{prefix}.": start + name,
                       lambda name, start=f"{prefix}.": name.removeprefix(start)):
            matched = {name: name if name in stored else rename(name) for name in wanted}
            matched = {name: other for name, other in matched.items()
                       if other in stored and (other == name or other not in wanted)}
            best = matched if len(matched) > len(best) else best
    return best


def is_made_anew(name: str, tensor: _Stored) -> bool:
    """Whether a tensor is a causal mask or a table of angles, by its name and its shape."""
    if not MADE_ANEW.search(name):
        return False
    if name.endswith("inv_freq"):
        return len(tensor.shape) == 1
    is_mask = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)
    return is_mask or tensor.shape == ()


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors index; save the model again") from None
    for file in files:
        # The names become files of the result: none may lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} names the file {file!r}; only .safetensors files beside it can be read")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path.parent} has no {file}, which its index names; download it again")
    return weight_map


def _read_header(path: Path) -> tuple[bytes, dict[str, _Stored]]:
    """The raw header, length field included, and the tensors in the order in which they are stored."""
    try:
        with safe_open(path, framework="np"):  # checks everything, the length of the file too
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "copy or save it again") from None
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    tensors = {}
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path} has tensor {name!r} in {entry['dtype']}, which cannot be averaged; "
                             f"convert it to one of {', '.join(FLOATING)}")
        start, end = entry["data_offsets"]
        tensors[name] = _Stored(path.name, entry["dtype"], tuple(entry["shape"]),
                                8 + len(header) + start, end - start)
    return length + header, tensors


def free_folder(out: str | Path) -> Path:
    """The real path of a folder that is absent or empty. Raises ValueError for any other."""
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it")
    return out


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, renamed to `out` at the end, removed on any error, Ctrl-C too.

    `out` is absent or an empty folder. Raises ValueError where it is neither any more at the end.
    """
    with beside(out, stays=lambda out: not free_folder(out)) as partial:
        partial.mkdir()
        yield partial
        sync_path(partial)
    sync_path(out.parent)


def carry_over(init: Checkpoint, partial: Path) -> None:
    """Copy config, generation config, tokenizer and index; last, so that a partial folder has no config."""
    for path in sorted(init.folder.iterdir()):
        is_index = path.name.endswith(".index.json")
        wanted = path.suffix in CARRIED and path.name not in NOT_CARRIED and not is_index
        if path.name == INDEX:
            wanted = SINGLE not in init.headers
        if path.name.startswith("."):  # another program's
            continue
        if path.is_dir() and path.name == TEMPLATES:
            (partial / TEMPLATES).mkdir()
            for template in sorted(path.glob("[!.]*.jinja")):
                (partial / TEMPLATES / template.name).write_bytes(template.read_bytes())
                sync_path(partial / TEMPLATES / template.name)
            sync_path(partial / TEMPLATES)
        if path.is_file() and wanted:
            (partial / path.name).write_bytes(path.read_bytes())
            sync_path(partial / path.name)
