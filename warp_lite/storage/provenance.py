"""What made a result: package versions, commit, threads; and where trained artefacts are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import platformdirs

__version__ = "0.1.0"


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """That many threads in torch: sums may round otherwise with another number of them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def provenance() -> dict:
    """What made a result: package versions, commit, host facts."""
    import torch

    packages = {}
    for name in ("warp-lite", "torch", "transformers", "numpy", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    commit = None
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"packages": packages, "commit": commit, "python": sys.version.split()[0], "platform": sys.platform,
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}


def json_hash(value) -> str:
    """A hash of what JSON can hold. Raises TypeError where it cannot."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder() -> Path:
    """Where trained artefacts are kept: $WARP_LITE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("WARP_LITE_CACHE") or platformdirs.user_cache_dir("warp-lite"))


def writable_cache() -> Path:
    """`cache_folder`, made where it is missing. Raises ValueError where it cannot be written: asked before anything is
    trained for it."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"the cache folder {folder} cannot be written ({error.strerror}); set WARP_LITE_CACHE to one "
                         "that can") from error
    return folder
