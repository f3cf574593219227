"""Files that are there whole or not at all, DONE files that vouch for others by hash, and a folder's lock.

Nothing here knows of tensors (see tensors.py), or waits for torch: what is written is made in a folder
`.NAME.….part` beside its place, and renamed. Nothing else in the package writes beside and renames.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK, PARTS = ".lock", ".*.part"


class CannotWrite(OSError):
    """A disk that is full, a folder that is read-only: one line with the way out."""


@contextmanager
def beside(path: Path, stays: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """A place to write a file or folder to, in a folder of its own beside `path`, made with those above it; it takes
    the place of `path` at the end, and on any error it is removed and `path` stays as it was.

    A folder of its own, since who writes may make further files there: safetensors has a temporary one.
    Where `path` is a folder by then that is not empty, `stays` is asked with it: if it says True, what another process
    has put there stays, and what was written here is removed; it may raise. Raises OSError of its own alone, and lets
    through what is raised while it is written.
    """
    place = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    made = place / path.name
    try:
        place.mkdir(parents=True)
        yield made
        try:
            made.replace(path)
        except OSError:
            if not (made.exists() and path.is_dir()):
                raise
            if not stays(path):
                shutil.rmtree(path)
                made.replace(path)
    finally:
        remove(place)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or folder to, which takes the place of `path` at the end, whole or not at all (see
    `beside`). Whatever goes wrong is a CannotWrite."""
    with writing(path), beside(path) as made:
        yield made


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong while `path` is written is a CannotWrite that names it."""
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by a class of its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CannotWrite(f"cannot write {path}: {reason}; what was there before is kept: make room, or make it "
                          "writable, and run it again, a run with --resume") from error


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there and that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass


def sync(files: Iterable[Path]) -> None:
    """Wait until files and their folders are on disk: before what they replace is removed, as a machine that
    loses power may have the removal and not the files. Raises CannotWrite."""
    files = list(files)
    for path in [*files, *{path.parent for path in files}]:
        with writing(path):
            sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until one file or folder is on disk; on Windows, which cannot, nothing. Raises OSError."""
    if os.name == "nt":  # folders cannot be opened there, nor files synced that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if absent, for this process alone; the system lets go of it when the process ends.

    Raises ValueError if another process holds it, CannotWrite if it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"{folder} is in use by another process; wait until it has ended, or choose "
                             "another folder") from None
    try:
        yield
    finally:
        lock.release()


def is_taken(folder: Path) -> bool:
    """Whether another process holds a folder now. Makes nothing."""
    if not (Path(folder) / LOCK).is_file():
        return False
    try:
        with FileLock(Path(folder) / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it cannot even be opened: what is to be written will say so
        return False


# --- JSON ---


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is there whole or not at all.

    Raises CannotWrite, ValueError for NaN and infinity, and TypeError for what JSON cannot hold.
    """
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises CannotWrite."""
    with whole(Path(path)) as made:
        made.write_bytes(data)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError that names a file that is missing or holds none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error


def read_lines(path: Path) -> list[dict]:
    """The rows of a log, JSON objects with a "step"; from the first that is none, cut off by a crash, they are
    dropped. ValueError names a file that cannot be read."""
    rows = []
    try:
        for line in Path(path).read_bytes().splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    except (ValueError, RecursionError):
        pass
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return rows


# --- what is vouched for ---


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vouch(folder: Path, files: Sequence[Path], name: str = "DONE", **facts: object) -> None:
    """Write DONE (or another name) with `facts` and the hashes of files of a folder, by their paths in it. Raises
    CannotWrite."""
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}
    write_json(folder / name, {**facts, "sha256": hashes})


def vouched(folder: Path, parts: Sequence[str], way_out: str, name: str = "DONE") -> dict | None:
    """What DONE (or another name) says, if it is there and every file it vouches for is as it was.

    `parts` are the files and subfolders that will be read: it must vouch for them, a subfolder's files each.
    Raises ValueError, naming the file and the way out, where one is missing, altered or not vouched for, and
    where DONE is none or names a file outside its folder.
    """
    done = folder / name
    if not done.is_file():
        return None
    content, hashes = _hashes(done, way_out)
    _check(folder, name, hashes, way_out)
    for part in parts:
        path = folder / part
        there = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")] if path.is_dir() else [path]
        for file in there:
            if file.relative_to(folder).as_posix() not in hashes and file != done:
                raise ValueError(f"{file} is not what {name} vouches for; {way_out}")
    return content


def check_vouched(path: Path, way_out: str) -> None:
    """Check a file, or the files of a folder, against the DONE (or FAILED) beside or in it, if that vouches for them.

    Raises ValueError that names the file and the way out where one is missing or altered, and where DONE is none.
    A path that nothing vouches for is left to who gave it.
    """
    path = Path(path).absolute()  # "." has no name
    for folder, part in ((path, ""), (path.parent, path.name)):
        for name in ("DONE", "FAILED"):
            if (folder / name).is_file():
                hashes = _hashes(folder / name, way_out)[1]
                _check(folder, name, {file: expected for file, expected in hashes.items()
                                      if part in ("", file) or file.startswith(f"{part}/")}, way_out)


def _hashes(done: Path, way_out: str) -> tuple[dict, dict[str, str]]:
    """What a DONE file says, and the hashes in it."""
    content = read_json(done)
    hashes = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(hashes, dict):
        raise ValueError(f"{done} holds no hashes; {way_out}")
    return content, hashes


def _check(folder: Path, name: str, hashes: Mapping[str, str], way_out: str) -> None:
    """Whether the files of a folder have these hashes."""
    for file, expected in hashes.items():
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / name} names {file!r}, which is outside its folder; {way_out}")
        if not path.is_file() or sha256(path) != expected:
            raise ValueError(f"{path} is not what {name} vouches for; {way_out}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
