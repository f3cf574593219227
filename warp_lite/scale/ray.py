"""The M runs of an iteration as Ray tasks, with the merge as the barrier.

Driver and workers share the run folder, on storage that all of them see. A worker reads θ_sft and θ_init
there, trains its run as the serial executor does and leaves policy, anchor, metrics and DONE; the driver
takes them up and merges. No policy passes through Ray. The run of a lost worker goes on from its last
save on another.

What does pass through Ray are the prompts and the reward functions of the one who started the run, as Ray sends any
task: from this process to its workers, by Ray's cloudpickle. Nothing pickled is written to the folder or read from it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..averaging.state_dicts import copy_weights, freeze, frozen_names, parameters
from ..config import WarpConfig
from ..policies.loading import load_policy
from ..policies.prompts import Prompts
from ..rewards.calling import reward_name
from ..rewards.loading import load_reward
from ..storage.files import first_line
from ..storage.provenance import pinned_threads
from ..storage.run_config import read_config
from ..storage.tensors import weights_hash
from ..task import Task
from ..training.executors import SerialTrainer
from ..training.iteration import Stage1
from ..training.run import Run
from ..training.run_folder import RunFolder

POLL = 0.25  # seconds between two looks at what the workers have done


@dataclass(frozen=True)
class Job:
    """What every run of a `run_warp` needs beside the run folder; put into Ray's store once."""

    prompts: Prompts
    eval_prompts: Prompts
    rewards: bytes  # (reward, gold reward), pickled by Ray's cloudpickle; the reward may be the text that names it
    attention: str
    device: str
    path: list[str]  # where the driver finds its modules
    frozen: Sequence[str] = ()  # the weights that do not train, which a folder does not tell


class RayExecutor(SerialTrainer):
    """`run_warp(…, executor=RayExecutor(…))`: what executor="ray" stands for, with settings.

    address: "local" starts Ray on this machine and ends it afterwards; "auto" or "HOST:PORT" joins a cluster
    (default: $RAY_ADDRESS, else "local"). If this process has joined a Ray already, that one is used.
    cpus, gpus: what a run is given; `gpus` may be a fraction, `cpus` is also the number of threads of a new
    run folder. retries: how many times the run of a lost worker is begun again. timeout: seconds within
    which the cluster must answer.

    Raises ValueError without Ray and for settings that cannot be used. `run_warp` then raises ValueError
    when the workers cannot see the run folder or cannot be sent the rewards, ConnectionError when the
    cluster cannot be reached and ChildProcessError when a run's workers are lost more than `retries` times.
    """

    name = "ray"

    def __init__(self, address: str | None = None, cpus: int = 1, gpus: float = 0, retries: int = 3,
                 timeout: float = 10):
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("executor 'ray' needs Ray; install it with: pip install 'warp-lite[ray]'") from None
        if isinstance(cpus, bool) or not isinstance(cpus, int) or cpus < 1:
            raise ValueError(f"a run needs a whole number of CPUs, 1 or more, not {cpus!r}")
        is_share = 0 <= gpus <= 1
        if not is_share and not (1 < gpus < float("inf") and gpus == int(gpus)):
            raise ValueError(f"a run takes a whole number of GPUs or a fraction of one, not {gpus!r}")
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, not {retries!r}")
        self.ray, self.cpus, self.gpus, self.retries, self.timeout = ray, cpus, gpus, retries, timeout
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.cleanup = ExitStack()

    def start(self, task: Task, config: WarpConfig, out: str | Path | None) -> Path:
        """Join Ray, give it what every run needs, and pin this process to the threads of a run. Returns the
        folder to share: `out`, or without one a temporary folder, where Ray has no other machine."""
        ray, joined = self.ray, self.ray.is_initialized()
        super().start(task, config, out)
        job = self._job(task)
        if out is None and self.address != "local" and not joined:
            raise ValueError(f"the Ray cluster at {self.address!r} may have several machines; give `out` (--out), "
                             "a folder on storage that all of them share")
        if not joined:
            self._join()
            self.cleanup.callback(ray.shutdown)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if out is None and len(machines) > 1:
            raise ValueError(f"Ray has {len(machines)} machines; give `out`, a folder on storage that they share")
        if not any(m.get("CPU", 0) >= self.cpus and m.get("GPU", 0) >= self.gpus for m in machines):
            lacking = f"a run wants {self.cpus} CPUs and {self.gpus:g} GPUs, and no machine of Ray's has them"
            if self.address == "local":
                raise ValueError(f"{lacking}; ask for fewer")
            print(f"warp-lite: {lacking}; the runs wait for one that has", file=sys.stderr)
        self.job = ray.put(job)
        self.cleanup.enter_context(pinned_threads(self.cpus))
        if out is None:
            out = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="warp-lite-"))) / "run"
        return Path(out).resolve()

    def _join(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning at every start
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address == "local":
            for last in (False, True):  # Ray gives itself 30 s to start, too few on a machine that is busy
                try:
                    self.ray.init("local", include_dashboard=False, **options)
                    return
                except Exception as error:  # it raises plain Exceptions
                    if last:
                        raise ConnectionError(f"Ray did not start on this machine: {first_line(error)}") from error
        try:
            known = os.environ.get("RAY_ADDRESS", "") if self.address == "auto" else self.address
            if place := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", known):
                socket.create_connection((place[1], int(place[2])), self.timeout).close()  # Ray itself waits minutes
            self.ray.init(self.address, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"cannot reach a Ray cluster at {self.address!r}: {first_line(error)}; "
                                  "is it running, and is this one of its machines?") from error

    def close(self) -> None:
        """Leave Ray, end it if it was started here, and remove the temporary folder."""
        self.cleanup.close()

    def ahead(self, runs: Sequence[Run], folder: RunFolder, progress: bool, stop: Callable[[], bool] | None,
              on_failure: str) -> None:
        """Leave the runs of an iteration finished in the folder, by tasks of Ray; they are taken up from there.

        A run that fails, and `stop`, end the others too, each saved after the step it is at. Raises what the
        first run that failed raised, and KeyboardInterrupt when it was told to stop.
        """
        ray, i = self.ray, runs[0].iteration
        left = [run for run in runs if not is_over(folder, run)]
        if not left:
            return
        flag = stop_flag(folder, i)
        flag.unlink(missing_ok=True)
        remote = ray.remote(train_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, scheduling_strategy="SPREAD")
        start = weights_hash(left[0].init)
        waiting = {remote.remote(str(folder.path), i, run.number, start, self.job, on_failure): run
                   for run in left}
        failure, stopped = None, False
        try:
            with tqdm(total=len(left) * left[0].config.steps, desc=f"iteration {i}", unit="step", leave=False,
                      disable=None if progress else True) as bar:
                while waiting:
                    ready, _ = ray.wait(list(waiting), timeout=POLL)
                    for task in ready:
                        run = waiting.pop(task)
                        try:
                            stopped |= not ray.get(task)
                        except ray.exceptions.RayError as error:
                            failure = failure or self._reason(error, run, folder)
                    show(bar, [last_row(folder.run(i, run.number) / "metrics.jsonl") for run in left])
                    if waiting and (failure or stop is not None and stop()):
                        flag.parent.mkdir(parents=True, exist_ok=True)
                        flag.touch()
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
            flag.unlink(missing_ok=True)
        if failure is not None:
            raise failure
        if stopped:
            raise KeyboardInterrupt(f"{saved_steps(folder, i, left)} of iteration {i} in {folder.path}")

    def _job(self, task: Task) -> Job:
        """What the workers get. A reward that config.json says how to load is loaded by them."""
        reward = (task.source or {}).get("reward") or task.reward
        if isinstance(reward, str) and Path(reward).exists():
            reward = str(Path(reward).resolve())
        try:
            rewards = self.ray.cloudpickle.dumps((reward, task.gold))
        except Exception as error:  # whatever the reward's own __reduce__ raises
            raise ValueError(f"the reward {reward_name(task.reward)} cannot be sent to Ray's workers: "
                             f"{first_line(error)}; make it a function of a module, without open files, locks or "
                             "sessions") from error
        return Job(task.prompts.to("cpu"), task.eval_prompts.to("cpu"), rewards,
                   task.policy.config._attn_implementation, "cuda" if self.gpus else "cpu",
                   [os.path.abspath(entry) for entry in (*sys.path, "")], frozen_names(task.policy))

    def _reason(self, error, run: Run, folder: RunFolder) -> Exception:
        """What a worker raised, or that there is none left."""
        if isinstance(error, self.ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
            return error.cause
        where = folder.run(run.iteration, run.number)
        return ChildProcessError(
            f"the worker of run {run.number} of iteration {run.iteration} was lost and {self.retries} retries were "
            f"too ({first_line(error)}); what it saved is in {where}; continue with --resume")


# --- in a worker ---


def train_run(path: str, i: int, m: int, start: str, job: Job, on_failure: str = "stop") -> bool:
    """Run m of iteration i, gone on with from what the folder has of it; False if it was told to stop.

    start: the hash of θ_init. Raises ValueError where the folder cannot be seen or holds other weights,
    and what `train_serial` raises.
    """
    host = socket.gethostname()
    settings = read_config(path, f"cannot be seen from {host}; a run folder of several machines must lie on storage "
                                 "that all of them share")["settings"]
    config, root = WarpConfig(**settings["config"]), Path(path)
    model, tokenizer = load_policy(root / "sft", dtype="auto", device=job.device)
    if model.config._attn_implementation != job.attention:
        model.set_attn_implementation(job.attention)
    freeze(model, job.frozen)
    sft = init = copy_weights(parameters(model))
    if i > 1:
        init = parameters(load_policy(root / f"iteration-{i - 1}" / "next-init", dtype="auto", device=job.device)[0])
    if weights_hash(sft) != settings["policy"] or weights_hash(init) != start:
        raise ValueError(f"what {host} reads in {path} are not the weights that were written there; is the folder on "
                         "storage that all machines share, and are their package versions the same?")
    reward, gold = rewards_of_job(job)
    folder = RunFolder(path, settings, sft, resume=True)
    flag = stop_flag(folder, i)
    if flag.exists():
        return False
    task = Task(model, tokenizer, reward, job.prompts.to(job.device), job.eval_prompts.to(job.device), gold,
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, sft=sft)
    run, trainer = Run(config, i, m, init, sft, task.rewards(config.runs)[m - 1]), SerialTrainer()
    trainer.start(task, config, path)
    with pinned_threads(folder.threads):
        try:
            Stage1(task, config, trainer, folder, False, flag.exists, on_failure).train([run])
        except KeyboardInterrupt:
            return False
        except ValueError:
            if not is_over(folder, run):  # else it failed and is left out, which the driver counts
                raise
    return True


def is_over(folder: RunFolder, run: Run) -> bool:
    """Whether a run is finished or was left out."""
    return any((folder.run(run.iteration, run.number) / name).is_file() for name in ("DONE", "FAILED"))


def rewards_of_job(job: Job) -> tuple[Callable | Sequence[Callable], Callable | None]:
    """Reward and gold reward; modules are looked for where the driver found them, too.

    Raises ValueError where they cannot be loaded on this machine.
    """
    from ray import cloudpickle

    sys.path += [entry for entry in job.path if entry not in sys.path and os.path.isdir(entry)]
    try:
        reward, gold = cloudpickle.loads(job.rewards)
        return load_reward(reward, device=job.device) if isinstance(reward, str) else reward, gold
    except Exception as error:  # the reward is the user's and may raise anything
        raise ValueError(f"the worker on {socket.gethostname()} cannot load the reward: {first_line(error)}; install "
                         "there what it imports, or put it on storage that all machines share") from error


def stop_flag(folder: RunFolder, i: int) -> Path:
    """The file whose presence asks the workers of iteration i to save and stop."""
    return folder.iteration(i) / ".stop"


# --- how far they are, by what they write ---


def last_row(path: Path) -> dict | None:
    """The last whole row of a log; None if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:  # being written, or cut off in front
            continue
    return None


def show(bar: tqdm, rows: Sequence[dict | None]) -> None:
    """Set the bar to the steps that were taken and to the mean of the last rewards."""
    rows = [row for row in rows if row]
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    if rewards:
        bar.set_postfix_str(f"reward {sum(rewards) / len(rewards):.2f}", refresh=False)
    bar.update(sum(row["step"] for row in rows) - bar.n)


def saved_steps(folder: RunFolder, i: int, runs: Sequence[Run]) -> str:
    """ "run 1 is saved at step 5, run 2 at step 7"; a run without a state has not begun or is finished."""
    steps = {run.number: max([int(path.stem.removeprefix("state-"))
                              for path in folder.run(i, run.number).glob("state-*.safetensors")], default=0)
             for run in runs if not is_over(folder, run)}
    return "saved: " + ", ".join(f"run {m} at step {step}" for m, step in steps.items())
