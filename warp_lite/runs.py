"""The run folder: what is in it, how it is written whole, and how a run goes on from it.

    config.json  prompts.json  sft/  iteration-1/{run-1/…, merged/, next-init/}  front.json  front.png

A file or folder appears under its name only when it is complete (written beside and renamed).
A run that is finished has a DONE file with the hashes of what it vouches for; one that is not has a
state of the last saved step, and `saved.json` of its iteration says which step all runs have.
Weights are safetensors, everything else JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .policies import Weights, first_line
from .reinforce import RunState

PARTS = ("policy", "anchor", "exp_avg", "exp_avg_sq")


class RunFolder:
    """A run folder opened for writing: new, or the unfinished or finished one of the same settings."""

    def __init__(self, path, settings: dict, resume: bool = False):
        """`settings` is what must be equal for a run to go on. Raises ValueError, the folder untouched,
        if it is in use for something else."""
        self.path = Path(path)
        config = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; --out wants a folder")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not config.is_file():
                raise ValueError(f"{self.path} is not empty and not a run folder; choose another")
            if not resume:
                raise ValueError(f"{self.path} holds a run already; continue it with --resume or choose another folder")
            before = read_json(config)["settings"]
            changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            if changed:
                name = changed[0]
                raise ValueError(f"{self.path} holds a run with {name}={before.get(name)!r}, not "
                                 f"{settings.get(name)!r}; resume with the same settings or choose another folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(config, {"settings": settings, "provenance": provenance()})

    def iteration(self, i: int) -> Path:
        """The folder of iteration i (from 1)."""
        return self.path / f"iteration-{i}"

    def run(self, i: int, m: int) -> Path:
        """The folder of run m of iteration i (both from 1), made if absent."""
        folder = self.iteration(i) / f"run-{m}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_folder(self, target: Path, write: Callable[[Path], None]) -> None:
        """Let `write` fill a temporary folder and put it in the place of `target`, unless that is there."""
        if target.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            write(made)
            made.chmod(0o755)
            made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    # --- runs that are not finished ---

    def save_states(self, i: int, numbers: Sequence[int], states: Sequence[RunState]) -> None:
        """Save the runs of iteration i at their common step; what was saved before goes once this stands."""
        step = states[0].step
        for m, state in zip(numbers, states):
            tensors = {f"{part}.{name}": tensor.contiguous() for part in PARTS
                       for name, tensor in getattr(state, part).items()}
            _save_tensors(tensors, self.run(i, m) / f"state-{step}.safetensors")
        write_json(self.iteration(i) / f"saved-{'-'.join(map(str, numbers))}.json", {"step": step})
        for m in numbers:
            self._drop_states(i, m, keep=step)

    def load_state(self, i: int, m: int) -> RunState | None:
        """Run m of iteration i at the last step that was saved; None if it never was."""
        for saved in sorted(self.iteration(i).glob("saved-*.json")):
            if str(m) in saved.stem.split("-")[1:]:
                step = read_json(saved)["step"]
                path = self.run(i, m) / f"state-{step}.safetensors"
                if not path.is_file():
                    return None
                tensors = load_tensors(path)
                parts = {part: {name.removeprefix(part + "."): tensor for name, tensor in tensors.items()
                                if name.startswith(part + ".")} for part in PARTS}
                return RunState(step, **parts)
        return None

    def _drop_states(self, i: int, m: int, keep: int | None = None) -> None:
        for path in self.run(i, m).glob("state-*.safetensors"):
            if path.stem != f"state-{keep}":
                path.unlink()

    # --- logs: lines of JSON with a "step" ---

    def append(self, i: int, m: int, name: str, rows: list[dict]) -> None:
        """Append rows to a log of run m of iteration i."""
        with (self.run(i, m) / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def cut_logs(self, i: int, m: int, step: int) -> None:
        """Forget what the logs say of steps after `step`, which are taken anew."""
        for path in self.run(i, m).glob("*.jsonl"):
            rows = [row for row in read_lines(path) if row["step"] <= step]
            _replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    # --- runs that are finished ---

    def finish_run(self, i: int, m: int, state: RunState) -> None:
        """Write the policy and its anchor, and DONE with their hashes; the state goes."""
        folder = self.run(i, m)
        for part in ("policy", "anchor"):
            _save_tensors({n: t.contiguous() for n, t in getattr(state, part).items()}, folder / f"{part}.safetensors")
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith(("policy", "anchor", "metrics", "trajectory")))
        write_json(folder / "DONE", {"step": state.step, "sha256": {name: sha256(folder / name) for name in names}})
        self._drop_states(i, m)

    def finished_run(self, i: int, m: int) -> tuple[Weights, Weights] | None:
        """Policy and anchor of a finished run, checked against DONE; None if it is not finished."""
        folder = self.path / f"iteration-{i}" / f"run-{m}"
        if not (folder / "DONE").is_file():
            return None
        for name, expected in read_json(folder / "DONE")["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is not what DONE vouches for; "
                                 f"remove {folder} to train that run again")
        return load_tensors(folder / "policy.safetensors"), load_tensors(folder / "anchor.safetensors")


def provenance() -> dict:
    """What made a result: package versions, commit, host facts."""
    packages = {}
    for name in ("warp-lite", "torch", "transformers", "numpy", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    commit = None
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"packages": packages, "commit": commit, "python": sys.version.split()[0], "platform": sys.platform,
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}


def write_json(path: Path, value) -> None:
    """Write JSON so that the file is there whole or not at all. NaN has no place in it."""
    _replace(Path(path), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read JSON; ValueError names a file that is not."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error


def read_lines(path: Path) -> list[dict]:
    """The rows of a log; a last line that was cut off by a crash is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError names one that is truncated or missing."""
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; is it truncated?") from error


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    made = path.with_name(f".{path.name}.part")
    save_file(tensors, made)
    made.rename(path)


def _replace(path: Path, data: bytes) -> None:
    made = path.with_name(f".{path.name}.part")
    made.write_bytes(data)
    made.replace(path)
