"""The run folder: what is in it, how it is written whole, and how a run goes on from it.

    config.json  prompts.json  sft/  iteration-1/{run-1/…, merged/, next-init/, DONE}  front.json  front.png

A file or folder appears under its name only when it is complete (written beside and renamed).
A run or iteration that is finished has a DONE file with the hashes of what it vouches for; a run
that is not has the state of the last saved step. Weights are safetensors, everything else JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .policies import Weights, first_line
from .reinforce import RunState

PARTS = ("policy", "anchor", "exp_avg", "exp_avg_sq", "trained")
HASHES = {"policy": "of another policy", "prompts.sha256": "on other prompts"}  # settings whose values say nothing


def check_out(path, resume: bool = False, settings: dict | None = None) -> bool:
    """Whether a folder holds a run to go on with. Writes nothing.

    Raises ValueError if it is in use for something else, and, where `settings` are given, if it
    holds a run of other settings; the error names the first that differs.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; --out wants a folder")
    if not path.is_dir() or not any(entry.name != ".config.json.part" for entry in path.iterdir()):
        return False
    before = _flat(read_config(path, "is not empty and not a run folder; choose another")["settings"])
    if not resume:
        raise ValueError(f"{path} holds a run already; continue it with --resume or choose another folder")
    wanted = before if settings is None else _flat(settings)
    for name in sorted({*before, *wanted}):
        if before.get(name) != wanted.get(name):
            what = HASHES.get(name) or f"with {name} = {before.get(name)!r}, not {wanted.get(name)!r}"
            raise ValueError(f"{path} holds a run {what}; resume with the same settings or choose another folder")
    return True


def read_config(path, otherwise: str = "is not a run folder") -> dict:
    """A run folder's config.json; ValueError if there is none, or it is another program's."""
    config = Path(path) / "config.json"
    if config.is_file():
        content = read_json(config)
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            return content
    raise ValueError(f"{path} {otherwise}")


def _flat(settings: dict) -> dict:
    """{"config": {"lr": 1}, "reward": "r"} → {"lr": 1, "reward": "r"}: names as the user knows them."""
    flat = {}
    for name, value in settings.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {key if name == "config" else f"{name}.{key}": v for key, v in inner} or {name: value}
    return flat


class RunFolder:
    """A run folder opened for writing: new, or the unfinished or finished one of the same settings."""

    def __init__(self, path, settings: dict, like: Weights, resume: bool = False):
        """`settings` is what must be equal for a run to go on; weights are read to the device of `like`
        and in its order. Raises ValueError, the folder untouched, as `check_out` does."""
        self.path, self.like = Path(path), like
        if not check_out(path, resume, settings):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", {"settings": settings, "provenance": provenance()})
        self.threads = read_config(path)["provenance"]["threads"]

    def iteration(self, i: int) -> Path:
        """The folder of iteration i (from 1)."""
        return self.path / f"iteration-{i}"

    def run(self, i: int, m: int) -> Path:
        """The folder of run m of iteration i (both from 1)."""
        return self.iteration(i) / f"run-{m}"

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
        """Save runs of iteration i that train together. What was saved before goes once all of these
        stand, so there is always a step that all of them have."""
        for m, state in zip(numbers, states):
            tensors = {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(state, part).items()}
            save_tensors(tensors, self.run(i, m) / f"state-{state.step}.safetensors")
        for m, state in zip(numbers, states):
            self._drop_states(i, m, keep=state.step)

    def load_states(self, i: int, numbers: Sequence[int]) -> list[RunState | None]:
        """Runs of iteration i at the last step that all of them have saved; None for each if there is none."""
        saved = [{int(path.stem.removeprefix("state-")) for path in self.run(i, m).glob("state-*.safetensors")}
                 for m in numbers]
        common = set.intersection(*saved) if saved else set()
        return [self._load_state(i, m, max(common)) if common else None for m in numbers]

    def _load_state(self, i: int, m: int, step: int) -> RunState:
        path = self.run(i, m) / f"state-{step}.safetensors"
        parts = self._read(path, [f"{part}." for part in PARTS], "remove it to train that run again from its start")
        return RunState(step, *parts)

    def _read(self, path: Path, prefixes: Sequence[str], way_out: str) -> list[Weights]:
        """The state dicts in one file, told apart by prefixes, in the order of `like`: a file has an order
        of its own, and a sum over tensors (the norm of a gradient) rounds by the order."""
        tensors = load_tensors(path, next(iter(self.like.values())).device, way_out)
        trained = [name.removeprefix("trained.") for name in sorted(tensors) if name.startswith("trained.")]
        names = dict.fromkeys(prefixes, list(self.like)) | {"trained.": trained}
        if trained:  # not the policy itself; and the moments are of what is trained
            names |= {"exp_avg.": trained, "exp_avg_sq.": trained}
        missing = [prefix + name for prefix in prefixes for name in names[prefix] if prefix + name not in tensors]
        if missing:
            raise ValueError(f"{path} lacks the tensor {missing[0]!r}; {way_out}")
        return [{name: tensors[prefix + name] for name in names[prefix]} for prefix in prefixes]

    def _drop_states(self, i: int, m: int, keep: int | None = None) -> None:
        for path in self.run(i, m).glob("state-*.safetensors"):
            if path.stem != f"state-{keep}":
                path.unlink()

    # --- logs: lines of JSON with a "step" ---

    def append(self, i: int, m: int, name: str, rows: list[dict]) -> None:
        """Append rows to a log of run m of iteration i."""
        folder = self.run(i, m)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def cut_logs(self, i: int, m: int, step: int) -> None:
        """Forget what the logs say of steps after `step`, which are taken anew."""
        for path in self.run(i, m).glob("*.jsonl"):
            rows = [row for row in read_lines(path) if row["step"] <= step]
            _replace(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def trajectory(self, i: int, m: int) -> list[dict]:
        """What was measured of run m of iteration i while it trained."""
        path = self.run(i, m) / "trajectory.jsonl"
        return read_lines(path) if path.is_file() else []

    # --- what is finished ---

    def finish_run(self, i: int, m: int, state: RunState) -> None:
        """Write the policy and its anchor, and DONE with their hashes; the state goes."""
        folder = self.run(i, m)
        for part in ("policy", "anchor"):
            save_tensors(getattr(state, part), folder / f"{part}.safetensors")
        names = ("policy.safetensors", "anchor.safetensors", "metrics.jsonl", "trajectory.jsonl")
        files = [*(folder / name for name in names), *(folder / "adapter").glob("*")]
        self._vouch(folder, [path for path in files if path.is_file()], step=state.step)
        self._drop_states(i, m)

    def finished_run(self, i: int, m: int) -> tuple[Weights, Weights] | None:
        """Policy and anchor of a finished run, checked against DONE; None if it is not finished."""
        folder = self.run(i, m)
        way_out = f"remove {folder} to train that run again"
        if not self._vouched(folder, way_out):
            return None
        return tuple(self._read(folder / f"{part}.safetensors", [""], way_out)[0] for part in ("policy", "anchor"))

    def finish_iteration(self, i: int) -> None:
        """Write DONE with the hashes of the merged policy and of the next init; if it is there, check it."""
        folder = self.iteration(i)
        if not self.finished_iteration(i):
            self._vouch(folder, [path for name in ("merged", "next-init") for path in (folder / name).iterdir()])

    def finished_iteration(self, i: int) -> bool:
        """Whether iteration i is finished; its files are checked against DONE."""
        folder = self.iteration(i)
        return self._vouched(folder, f"remove {folder / 'DONE'}, {folder / 'merged'} and {folder / 'next-init'}, "
                                     "and merge again with --resume")

    def _vouch(self, folder: Path, files: Sequence[Path], **facts) -> None:
        hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}
        write_json(folder / "DONE", {**facts, "sha256": hashes})

    def _vouched(self, folder: Path, way_out: str) -> bool:
        if not (folder / "DONE").is_file():
            return False
        for name, expected in read_json(folder / "DONE")["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is not what DONE vouches for; {way_out}")
        return True


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """That many threads in torch: sums may round otherwise with another number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"packages": packages, "commit": commit, "python": sys.version.split()[0], "platform": sys.platform,
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}


def weights_hash(weights: Weights) -> str:
    """A hash of names and values; the same for the same weights on any device."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_hash(value) -> str:
    """A hash of what JSON can hold. Raises TypeError where it cannot."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def save_tensors(tensors: Weights, path: Path) -> None:
    """Write a safetensors file whole or not at all, and its folder if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, made)
    made.replace(path)


def load_tensors(path: Path, device, way_out: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError names one that is truncated or missing, and the way out."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; is it truncated? {way_out}") from error


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, data: bytes) -> None:
    made = path.with_name(f".{path.name}.part")
    made.write_bytes(data)
    made.replace(path)
