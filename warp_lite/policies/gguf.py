"""Policies in GGUF, the one-file format of llama.cpp, mostly quantised: converted once into an ordinary folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..storage.files import beside, sha256
from ..storage.provenance import writable_cache

MAGIC = b"GGUF"  # the first four bytes of every such file


def is_gguf(path: Path) -> bool:
    """Whether a path is a file in GGUF, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def as_folder(path: Path, save: Callable) -> Path:
    """The folder in the cache with the policy of a GGUF file in float32, converted when it is first asked for.

    `save(model, tokenizer, folder)` writes it. It is named by the file's SHA-256, so a file that changed is converted
    again. Quantised weights are those that the file stands for, to the bit. Raises ValueError where the package
    `gguf` is missing or the cache cannot be written, and what the library and the package raise for a file that is cut
    short or of an unknown architecture.
    """
    if find_spec("gguf") is None:
        raise ValueError("reading GGUF needs the package gguf: pip install gguf")
    folder = writable_cache() / f"gguf-{sha256(path)[:16]}"
    if not is_converted(folder):
        with beside(folder, stays=is_converted) as made:
            convert(path, made, save)
    return folder


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a policy that was converted whole: the file that is written last is there."""
    return (folder / "tokenizer.json").is_file()


def convert(path: Path, folder: Path, save: Callable) -> None:
    """Write the policy of a GGUF file as a folder of the library's. Raises what the library and `gguf` raise."""
    with tqdm(total=3, desc=f"converting {path.name}, once", disable=None) as bar:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        bar.update()
        quantised = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False)
        bar.update()
        # the library does not save what it has read from GGUF, so the weights move into a model of its config alone
        config = copy.deepcopy(quantised.config)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = quantised.generation_config
        save(model, tokenizer, folder)
        bar.update()
