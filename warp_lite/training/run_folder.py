"""The run folder: what is in it, and how a run goes on from it.

    config.json  prompts.json  sft/  iteration-1/{run-1/…, merged/, next-init/, DONE}  front.json  front.png

A file or folder appears under its name only when it is complete (storage/files.py). A run or iteration that is
finished has a DONE file with the hashes of what it vouches for, a run that was left out has FAILED in its
place, and a run that is not finished has the state of the last saved step.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..averaging.state_dicts import Weights, load_weights
from ..config import LoraSettings, WarpConfig
from ..policies.loading import save_policy
from ..rewards.calling import reward_name
from ..storage.files import (
    PARTS,
    read_json,
    read_lines,
    remove,
    sync,
    vouch,
    vouched,
    whole,
    write_bytes,
    write_json,
    writing,
)
from ..storage.provenance import json_hash, provenance
from ..storage.run_config import check_out, read_config
from ..storage.tensors import load_tensors, save_tensors, weights_hash
from ..task import Task
from .run import RunState

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # policies that are widened while they train
STATE = ("policy", "anchor", "exp_avg", "exp_avg_sq", "trained")
COPY = "take it from a copy, or run again"  # the way out where nothing makes a file anew
MERGED = ("merged", "next-init")


class RunFolder:
    """A run folder opened for writing: new, or the unfinished or finished one of the same settings."""

    def __init__(self, path: str | Path, settings: dict, like: Weights, resume: bool = False,
                 executor: str | None = None, at_once: int | None = None):
        """`settings` is what must be equal for a run to go on; weights are read to the device of `like`
        and in its order; `executor` is noted, and `at_once`, how many runs share a program. Raises ValueError, the
        folder untouched, as `check_out` does."""
        self.path, self.like = Path(path), like
        if not check_out(path, resume, settings):
            made_by = {**provenance(), "executor": executor, "at_once": at_once}
            write_json(self.path / "config.json", {"settings": settings, "provenance": made_by})
        facts = read_config(path)["provenance"]
        self.threads, self.executor, self.at_once = facts["threads"], facts.get("executor"), facts.get("at_once")

    def tidy(self) -> None:
        """Remove what a process that was killed left behind: what is half-written, and the states of runs
        that are finished. Only for who holds the folder."""
        for path in self.path.rglob(PARTS):
            remove(path)
        for path in self.path.glob("iteration-*/run-*/state-*.safetensors"):
            if any((path.parent / name).is_file() for name in ("DONE", "FAILED")):
                remove(path)

    def iteration(self, i: int) -> Path:
        """The path of the folder of iteration i (from 1)."""
        return self.path / f"iteration-{i}"

    def run(self, i: int, m: int) -> Path:
        """The folder of run m of iteration i (both from 1)."""
        return self.iteration(i) / f"run-{m}"

    def write_start(self, prompts: dict, write_sft: Callable[[Path], None]) -> None:
        """θ_sft and the prompts. Raises ValueError where others stand there already."""
        sft = self.path / "sft"
        if sft.is_dir():
            vouched(sft, ["."], COPY)
        else:
            with whole(sft) as made:
                made.mkdir()
                write_sft(made)
                vouch(made, [path for path in made.iterdir() if path.is_file()])
        path = self.path / "prompts.json"
        if not path.is_file():
            write_json(path, prompts)
        elif read_json(path) != json.loads(json.dumps(prompts)):
            raise ValueError(f"{path} is not what config.json vouches for; {COPY}")

    # --- runs that are not finished ---

    def save_states(self, i: int, numbers: Sequence[int], states: Sequence[RunState]) -> None:
        """Save runs of iteration i that train together. What was saved before goes once all of these
        stand, so there is always a step that all of them have."""
        written = []
        for m, state in zip(numbers, states):
            tensors = {f"{part}.{name}": tensor for part in STATE for name, tensor in getattr(state, part).items()}
            written.append(self.run(i, m) / f"state-{state.step}.safetensors")
            save_tensors(tensors, written[-1])
            written += self.run(i, m).glob("*.jsonl")  # what they say up to this step is not measured again
        sync(written)
        for m, state in zip(numbers, states):
            self._drop_states(i, m, keep=state.step)

    def load_states(self, i: int, numbers: Sequence[int]) -> list[RunState | None]:
        """Runs of iteration i at the last step that all of them have saved; None for each if there is none."""
        steps = []  # of each run, those that it has saved
        for m in numbers:
            names = [path.stem.removeprefix("state-") for path in self.run(i, m).glob("state-*.safetensors")]
            steps.append({int(name) for name in names if name.isdecimal()})
        common = set.intersection(*steps) if steps else set()
        return [self._load_state(i, m, max(common)) if common else None for m in numbers]

    def _load_state(self, i: int, m: int, step: int) -> RunState:
        path = self.run(i, m) / f"state-{step}.safetensors"
        parts = self._read(path, [f"{part}." for part in STATE], "remove it to train that run again from its start")
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
        """Append rows to a log of run m of iteration i. Raises CannotWrite."""
        path = self.run(i, m) / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def cut_logs(self, i: int, m: int, step: int, measured: Sequence[int] = ()) -> None:
        """Forget what the logs say of steps after `step`, which are taken anew.

        Raises ValueError where they lack a step before: metrics.jsonl has every one, trajectory.jsonl those
        that are `measured`.
        """
        for name, wanted in (("metrics.jsonl", range(1, step + 1)),
                             ("trajectory.jsonl", [s for s in measured if s <= step])):
            path = self.run(i, m) / name
            rows = [row for row in read_lines(path) if row["step"] <= step] if path.is_file() else []
            if [row["step"] for row in rows] != list(wanted):
                raise ValueError(f"{path} was altered: it has {len(rows)} of the {len(wanted)} rows up to step {step}, "
                                 f"which is saved; remove {path.parent} to train that run again")
            if path.is_file():
                write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def trajectory(self, i: int, m: int) -> list[dict]:
        """What was measured of run m of iteration i while it trained."""
        path = self.run(i, m) / "trajectory.jsonl"
        return read_lines(path) if path.is_file() else []

    # --- what is finished ---

    def finish_run(self, i: int, m: int, state: RunState, failure: str | None = None) -> None:
        """Write the policy and its anchor, and DONE with their hashes; the state goes.

        With the reason of a `failure` the run is left out, and FAILED stands in the place of DONE.
        """
        folder = self.run(i, m)
        for part in ("policy", "anchor"):
            save_tensors(getattr(state, part), folder / f"{part}.safetensors")
        names = ("policy.safetensors", "anchor.safetensors", "metrics.jsonl", "trajectory.jsonl")
        files = [*(folder / name for name in names), *(folder / "adapter").glob("*")]
        files = [path for path in files if path.is_file()]
        done, why = ("DONE", {}) if failure is None else ("FAILED", {"reason": failure})
        vouch(folder, files, done, step=state.step, **why)
        sync([*files, folder / done])
        self._drop_states(i, m)

    def finished_run(self, i: int, m: int) -> tuple[Weights, Weights] | None:
        """Policy and anchor of a finished run, checked against DONE; None if it is not finished."""
        return self._weights(i, m) if self._vouched_run(i, m, "DONE") else None

    def failed_run(self, i: int, m: int) -> tuple[int, str, Weights, Weights] | None:
        """Last good step, reason, policy and anchor of a run that was left out, checked against FAILED; or None.

        Raises ValueError where FAILED, or what it vouches for, was altered.
        """
        failed = self._vouched_run(i, m, "FAILED")
        if failed is None:
            return None
        if type(failed.get("step")) is not int or not isinstance(failed.get("reason"), str):
            raise ValueError(f"{self.run(i, m) / 'FAILED'} does not say at which step and why; "
                             f"remove {self.run(i, m)} to train that run again")
        return failed["step"], failed["reason"], *self._weights(i, m)

    def _vouched_run(self, i: int, m: int, name: str) -> dict | None:
        folder = self.run(i, m)
        way_out = f"remove {folder} to train that run again"
        return vouched(folder, ("policy.safetensors", "anchor.safetensors"), way_out, name)

    def _weights(self, i: int, m: int) -> list[Weights]:
        folder = self.run(i, m)
        return [self._read(folder / f"{part}.safetensors", [""], f"remove {folder} to train that run again")[0]
                for part in ("policy", "anchor")]

    def finish_iteration(self, i: int, write: dict[str, Callable[[Path], None]]) -> None:
        """Write the folders `merged` and `next-init`, each by its function, and DONE with their hashes.

        If DONE is there the folders are checked instead; without it they are written anew, since nothing
        vouches for what may stand there.
        """
        folder = self.iteration(i)
        if self.finished_iteration(i):
            return
        for name, function in write.items():
            with whole(folder / name) as made:
                made.mkdir()
                function(made)
        vouch(folder, [path for name in MERGED for path in (folder / name).iterdir()])

    def finished_iteration(self, i: int) -> bool:
        """Whether iteration i is finished; its files are checked against DONE."""
        folder = self.iteration(i)
        way_out = f"remove {folder / 'DONE'} and merge again with --resume"
        return vouched(folder, MERGED, way_out) is not None


class SaveClock:
    """When to save: every so many steps, or, if `every` is 0, as often as takes a hundredth of the time.

    Until a save has been timed it is taken to write `size` bytes at 200 MB a second.
    """

    def __init__(self, every: int, size: int, now: Callable[[], float] = time.perf_counter):
        self.every, self.now = every, now
        self.cost, self.last = size / 200e6, now()

    def due(self, step: int) -> bool:
        """Whether it is time to save, after `step` steps."""
        if self.every:
            return step % self.every == 0
        return self.now() - self.last >= 100 * self.cost

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the save that is made inside, in seconds: how often the next are due follows from it."""
        begin = self.now()
        yield
        self.last = self.now()
        self.cost = self.last - begin


# --- what a run is, as its folder has it ---


def run_settings(task: Task, config: WarpConfig, lora: LoraSettings | None = None) -> dict:
    """What must be equal for a run to go on: the config, the policy, the rewards, the prompts.

    Raises ValueError for columns of a data set that JSON cannot hold.
    """
    prompts, held_out = task.prompts, task.eval_prompts
    for name, values in {"prompt": [*prompts.given, *held_out.given], **held_out.columns}.items():
        for value in values:
            if not survives_json(value):
                raise ValueError(f"the prompts have a column {name!r} that a run folder cannot hold: it has "
                                 f"{' '.join(str(value).split())[:60]} ({type(value).__name__}); keep text, finite "
                                 "numbers, None, lists and dicts with text as keys, or leave out `out`")
    hashed = json_hash([prompts.given, held_out.given, held_out.columns])
    narrow = next((name for name, dtype in NARROW.items() if dtype == task.dtype), None)
    return {"config": dataclasses.asdict(config), "policy": weights_hash(task.sft),
            "lora": None if lora is None else dataclasses.asdict(lora),
            "reward": reward_name(task.reward), "source": task.source, **({"dtype": narrow} if narrow else {}),
            "prompts": {"train": len(prompts), "eval": len(held_out), "sha256": hashed}}


def survives_json(value: object) -> bool:
    """Whether a value is the same after it was written as JSON and read again, but for tuples, which become lists."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and survives_json(inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(survives_json, value))
    return value is None or isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value)


def write_start(folder: RunFolder, task: Task) -> None:
    """θ_sft and the prompts. Raises ValueError where others stand there."""
    prompts = {"train": task.prompts.given, "eval": task.eval_prompts.given, "eval_columns": task.eval_prompts.columns}
    folder.write_start(prompts, lambda path: save_policy(task.policy, task.tokenizer, path))


def write_iteration(folder: RunFolder, task: Task, i: int, merged: Weights, next_init: Weights) -> None:
    """The merge of iteration i and the init of the next, each a Hugging Face folder."""
    def model_of(weights: Weights) -> Callable[[Path], None]:
        return lambda path: save_policy(load_weights(copy.deepcopy(task.policy), weights), task.tokenizer, path)

    folder.finish_iteration(i, {"merged": model_of(merged), "next-init": model_of(next_init)})
