"""What made a result: the code's hash, package versions, commit, threads; and where trained artefacts are kept."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import platformdirs

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parents[1]  # the folder warp_lite/
LIBRARIES = ("warp-lite", "torch", "transformers", "numpy", "tokenizers", "safetensors")  # what numbers depend on


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


def package_versions() -> dict[str, str | None]:
    """The version of each package of `LIBRARIES`; None for one that is not installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def provenance() -> dict:
    """What made a result: package versions, commit, host facts."""
    import torch

    commit = None
    root = PACKAGE.parent
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"packages": package_versions(), "commit": commit, "python": sys.version.split()[0],
            "platform": sys.platform, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}


def json_hash(value: object) -> str:
    """The SHA-256 of what JSON can hold, by sorted keys, in hexadecimal. Raises TypeError where it cannot hold it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def source_hash(*modules: str, package: Path = PACKAGE) -> str:
    """A hash of the code that a result of these modules depends on: theirs, and that of every module of `package`
    which they import, directly or not, inside functions too.

    Comments, docstrings and blank lines do not count. `modules` are dotted names; one from outside the package
    must have been imported. What a file holds when it is first asked for counts for the life of the process, as it
    does for what was imported. Raises ValueError for a module that is not there.
    """
    return json_hash({name: _code(path) for name, path in modules_used(*modules, package=package).items()})


def modules_used(*modules: str, package: Path = PACKAGE) -> dict[str, Path]:
    """The files of `modules` and of all of `package` that they import, directly or not, by dotted name.

    A folder's `__init__` counts where something is imported from it. Raises ValueError for a module that is not there,
    or whose code cannot be read.
    """
    files: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        path = _module_file(name, package)
        if path is None and name in sys.modules:
            path = Path(inspect.getsourcefile(sys.modules[name]) or "")
        if path is None or not path.is_file():
            raise ValueError(f"there is no module {name!r} whose code can be read; name one of {package.name}")
        files[name] = path
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [other for other in _imports(path, inside) if _module_file(other, package) is not None]
    return dict(sorted(files.items()))


def _module_file(name: str, package: Path) -> Path | None:
    """The file of a module of the package; None for any other."""
    first, *parts = name.split(".")
    if first != package.name:
        return None
    place = package.joinpath(*parts)
    files = [place.with_suffix(".py")] if parts else []
    return next((path for path in [*files, place / "__init__.py"] if path.is_file()), None)


@cache
def _imports(path: Path, inside: str) -> list[str]:
    """The dotted names that a file of the package `inside` imports; of `from a import b` both a and a.b, since b may
    be a module."""
    names = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[:len(inside.split(".")) + 1 - node.level] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            names += [home, *(f"{home}.{alias.name}" for alias in node.names)]
    return names


@cache
def _code(path: Path) -> str:
    """A hash of a file's code alone: of its syntax tree without docstrings."""
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


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
