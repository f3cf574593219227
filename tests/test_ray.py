"""The Ray executor: the bytes that the serial executor writes, also when a worker is killed or told to stop."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from short_run import CONFIG, PROMPTS, files, score, short_run
from tiny import make_policy, make_tokenizer

from warp_lite import run_warp
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main
from warp_lite.policies.loading import save_policy
from warp_lite.policies.prompts import encode_prompts
from warp_lite.scale.ray import Job, RayExecutor, last_row, train_run
from warp_lite.storage.files import read_lines
from warp_lite.storage.tensors import weights_hash
from warp_lite.task import Task

ray = pytest.importorskip("ray")
# Of a Ray that did not start in time and was begun again.
pytestmark = pytest.mark.filterwarnings("ignore:.*Popen.__del__:pytest.PytestUnraisableExceptionWarning")
LONG = {"iterations": 1, "steps": 12, "save_every": 2, "eval_every": 0}


class Watched:
    """`score`; it notes the process of every call. In a worker it may be slow, die, or fail after another began."""

    def __init__(self, log, seconds=0.0, dies=False, fails_after=None):
        self.log, self.seconds, self.dies, self.fails_after, self.driver = log, seconds, dies, fails_after, os.getpid()
        log.touch()

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if os.getpid() != self.driver:
            time.sleep(self.seconds)
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fails_after and len(self.calls()) == 3:
                wait_for(self.fails_after.calls)
                return [np.nan] * len(prompts)
        return score(prompts, completions, completion_ids)

    def calls(self):
        """The process of every call in a worker."""
        return [pid for pid in map(int, self.log.read_text().split()) if pid != self.driver]


def wait_for(condition, seconds=120):
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def steps(folder, run):
    """How many steps a run of iteration 1 has written down."""
    return (last_row(folder / f"iteration-1/run-{run}/metrics.jsonl") or {"step": 0})["step"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    """A policy whose attention is not the one that a folder is loaded with."""
    policy = make_policy("gpt2", len(tokenizer), dtype=torch.float32)
    policy.set_attn_implementation("eager")
    return policy


@pytest.fixture(scope="module")
def started(policy, tokenizer):
    """A Ray of this machine, started as the executor starts it; every run below finds and uses it."""
    executor = RayExecutor("local")
    executor.start(task_of(policy, tokenizer), CONFIG, None)
    yield executor
    executor.close()
    assert not ray.is_initialized()


def task_of(policy, tokenizer, reward=score):
    return Task.of(policy, tokenizer, reward, PROMPTS, PROMPTS[:2], max_new_tokens=CONFIG.max_new_tokens)


# --- the same bytes -------------------------------------------------------------------------


@pytest.mark.slow  # with the start of Ray
def test_ray_and_serial_write_the_same_run_folder(started, policy, tokenizer, tmp_path):
    for executor in ("serial", "ray"):
        short_run(policy, tokenizer, out=tmp_path / executor, executor=executor, gold=score)
    serial, remote = files(tmp_path / "serial"), files(tmp_path / "ray")
    assert remote == serial and "iteration-2/run-2/trajectory.jsonl" in serial
    provenance = json.loads((tmp_path / "ray" / "config.json").read_text())["provenance"]
    assert provenance["threads"] == 1


@pytest.mark.slow
def test_without_a_folder_a_temporary_one_is_used(started, policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reward = Watched(tmp_path / "log")
    result = short_run(policy, tokenizer, reward, executor="ray", iterations=1, eval_every=0)
    assert [p.name for p in tmp_path.iterdir()] == ["log"] and len(result.iterations[0].policies) == 2
    assert len(reward.calls()) == 2 * CONFIG.steps


@pytest.mark.slow
def test_driver_and_workers_are_pinned_to_the_threads_of_a_run(started, policy, tokenizer, tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr("warp_lite.scale.ray.pinned_threads", lambda n: pinned.append(n) or contextlib.nullcontext())
    executor = RayExecutor(cpus=2)
    executor.start(task_of(policy, tokenizer), CONFIG, tmp_path)
    executor.close()
    short_run(policy, tokenizer, out=tmp_path / "run", executor="serial", iterations=1, eval_every=0)
    (tmp_path / "run/iteration-1/run-1/DONE").unlink()
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace('"threads": 1', '"threads": 3'))
    train_run(str(tmp_path / "run"), 1, 1, weights_hash(parameters(policy)),
              job(tokenizer, ray.cloudpickle.dumps((score, None))))
    assert pinned == [2, 3]


# --- the command line -----------------------------------------------------------------------

REWARD = """
def score(prompts, completions, completion_ids):
    return [len(set(c.split())) - 0.5 * len(ids) for c, ids in zip(completions, completion_ids)]
"""


@pytest.mark.slow
def test_the_command_line_runs_on_ray_with_a_reward_of_ones_own_module(started, policy, tokenizer, tmp_path, capsys,
                                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 32)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 64)
    save_policy(policy, tokenizer, "policy")
    (tmp_path / "ray_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["run", "--policy", "policy", "--reward", "ray_reward:score", "--prompts", "prompts.txt",
                 "--set=iterations=1", "--set=runs=2", "--set=steps=3", "--set=batch_size=3", "--set=max_new_tokens=5"]
    assert main([*arguments, "--executor", "ray", "--ray-cpus", "1", "--out", "ray"]) == 0
    assert main([*arguments, "--executor", "serial", "--out", "serial"]) == 0
    assert capsys.readouterr().err == "" and files("ray") == files("serial")


# --- workers that are lost, told to stop, or fail -------------------------------------------


@pytest.mark.slow
def test_stopped_runs_are_saved_and_another_executor_finishes_them(started, policy, tokenizer, tmp_path):
    reward, out = Watched(tmp_path / "log", seconds=0.1), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=r"saved: run \d at step \d+.* of iteration 1 in .*run"):
        short_run(policy, tokenizer, reward, out=out, executor="ray", stop=lambda: steps(out, 2) >= 3, **LONG)
    (saved,) = (out / "iteration-1/run-2").glob("state-*.safetensors")
    assert saved.stem == f"state-{steps(out, 2)}" and 3 <= steps(out, 2) < 12 and not list(out.rglob(".stop"))
    short_run(policy, tokenizer, reward, out=out, resume=True, executor="serial", **LONG)
    short_run(policy, tokenizer, reward, out=tmp_path / "serial", executor="serial", **LONG)
    assert files(out) == files(tmp_path / "serial")


@pytest.mark.slow
def test_what_a_run_raises_is_raised_as_it_was_and_the_others_are_saved(started, policy, tokenizer, tmp_path):
    rewards = [Watched(tmp_path / "log-1", seconds=0.2)]
    rewards.append(Watched(tmp_path / "log-2", fails_after=rewards[0]))
    with pytest.raises(ValueError, match="^the reward is nan in iteration 1, run 2, step 3, for a completion of"):
        short_run(policy, tokenizer, rewards, out=tmp_path / "run", executor="ray", **LONG)
    assert 1 <= steps(tmp_path / "run", 1) < 12
    (state,) = (tmp_path / "run/iteration-1/run-1").glob("state-*.safetensors")
    assert state.stem == f"state-{steps(tmp_path / 'run', 1)}"


@pytest.mark.slow
def test_a_run_that_fails_is_left_out_where_that_was_asked_for(started, policy, tokenizer, tmp_path):
    rewards = [Watched(tmp_path / "log-1")]
    rewards.append(Watched(tmp_path / "log-2", fails_after=rewards[0]))
    result = run_warp(policy, tokenizer, rewards, PROMPTS, CONFIG.replace(**LONG), tmp_path / "run", executor="ray",
                      on_failure="continue", progress=False)
    (iteration,) = result.iterations
    assert len(iteration.policies) == 1 and [(f.run, f.step) for f in iteration.failures] == [(2, 2)]


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_goes_on_from_its_last_save_on_another(started, policy, tokenizer, tmp_path):
    rewards = [Watched(tmp_path / "log-1"), Watched(tmp_path / "log-2", seconds=0.1)]
    out, killed = tmp_path / "ray", []

    def kill():
        wait_for(lambda: steps(out, 2) >= 5)
        killed.append(rewards[1].calls()[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    short_run(policy, tokenizer, rewards, out=out, executor="ray", **LONG)
    killer.join()
    pids = rewards[1].calls()
    assert len(set(pids)) == 2 and pids[0] == killed[0]
    assert pids.count(pids[-1]) <= 12 - 4, "it went on from step 4 at least"
    short_run(policy, tokenizer, rewards, out=tmp_path / "serial", executor="serial", **LONG)
    assert files(out) == files(tmp_path / "serial")


@pytest.mark.slow
def test_a_run_whose_workers_are_all_lost_is_named(started, policy, tokenizer, tmp_path):
    rewards = [score, Watched(tmp_path / "log", dies=True)]
    with pytest.raises(ChildProcessError, match="worker of run 2 of iteration 1 was lost and 0 retries were too .*"
                                                "in .*iteration-1/run-2; continue with --resume"):
        short_run(policy, tokenizer, rewards, out=tmp_path / "run", executor=RayExecutor(retries=0), **LONG)
    assert not list(tmp_path.rglob(".stop"))


# --- what cannot be used --------------------------------------------------------------------


def test_options_of_ray_want_its_executor(capsys):
    for option in ("--ray-address=auto", "--ray-cpus=2", "--ray-gpus=1"):
        assert main(["run", "--preset", "tiny", "--out", "x", option]) == 2
        assert capsys.readouterr().err == f"warp-lite: {option.partition('=')[0]} is for --executor ray\n"


def test_without_ray_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "--preset", "tiny", "--executor", "ray", "--out", "x"]) == 2
    assert capsys.readouterr().err == (
        "warp-lite: executor 'ray' needs Ray; install it with: pip install 'warp-lite[ray]'\n")


@pytest.mark.parametrize("settings, message", [
    ({"cpus": 0}, "1 or more, not 0"), ({"cpus": 1.5}, "whole number of CPUs"), ({"gpus": -1}, "GPUs .*not -1"),
    ({"gpus": 1.5}, "a fraction of one, not 1.5"), ({"retries": -1}, "retries must be 0 or more")])
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**settings)


@pytest.fixture
def apart(monkeypatch):
    """As if this process had joined no Ray."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_cluster_that_does_not_answer_is_named_in_time(policy, tokenizer, tmp_path, apart, monkeypatch):
    before = time.monotonic()
    for address, environment in (("127.0.0.1:1", ""), ("ray://127.0.0.1:1", ""), ("auto", "127.0.0.1:1")):
        monkeypatch.setenv("RAY_ADDRESS", environment)
        with pytest.raises(ConnectionError, match=f"cannot reach a Ray cluster at '{address}': .*is it running"):
            short_run(policy, tokenizer, out=tmp_path / "run", executor=RayExecutor(address, timeout=2))
    assert time.monotonic() - before < 10 and not (tmp_path / "run").exists()


def test_a_cluster_wants_a_folder_to_share(policy, tokenizer, apart):
    with pytest.raises(ValueError, match="at '10.0.0.1:6379' may have several machines; give `out` .*share"):
        short_run(policy, tokenizer, executor=RayExecutor("10.0.0.1:6379"))


def test_a_reward_that_cannot_be_sent_is_named_before_anything_is_started(policy, tokenizer, tmp_path, apart):
    lock = threading.Lock()

    def locked(prompts, completions, **kwargs):
        with lock:
            return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="the reward .*locked cannot be sent to Ray's workers: .*lock"):
        short_run(policy, tokenizer, locked, out=tmp_path / "run", executor="ray")
    assert not (tmp_path / "run").exists()


def job(tokenizer, rewards):
    return Job(encode_prompts(tokenizer, PROMPTS), encode_prompts(tokenizer, PROMPTS[:2]), rewards, "sdpa", "cpu", [])


def test_a_worker_that_does_not_see_the_folder_says_so(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="gone cannot be seen from .*must lie on storage that all of them share"):
        train_run(str(tmp_path / "gone"), 1, 1, "", job(tokenizer, b""))
    assert not (tmp_path / "gone").exists()


def test_a_worker_trains_no_other_weights_than_the_drivers_and_says_which_reward_it_lacks(policy, tokenizer, tmp_path):
    short_run(policy, tokenizer, out=tmp_path / "run", executor="serial")
    shutil.rmtree(tmp_path / "run/iteration-1/run-1")
    path, start = str(tmp_path / "run"), weights_hash(parameters(policy))
    with pytest.raises(ValueError, match="are not the weights that were written there"):
        train_run(path, 1, 1, "another", job(tokenizer, b""))
    missing = ray.cloudpickle.dumps(("no_such_module:score", None))
    with pytest.raises(ValueError, match="cannot load the reward: cannot find the reward 'no_such_module:score'.*"):
        train_run(path, 1, 1, start, job(tokenizer, missing))
    assert train_run(path, 1, 1, start, job(tokenizer, ray.cloudpickle.dumps((score, None))))
    assert len(read_lines(tmp_path / "run/iteration-1/run-1/metrics.jsonl")) == CONFIG.steps


def no_number(prompts, completions, **kwargs):
    return [np.nan] * len(prompts)


def test_a_worker_leaves_out_a_run_that_fails_only_where_that_was_asked_for(policy, tokenizer, tmp_path):
    short_run(policy, tokenizer, out=tmp_path / "run", executor="serial", **LONG)
    shutil.rmtree(tmp_path / "run/iteration-1/run-2")
    task = job(tokenizer, ray.cloudpickle.dumps(([score, no_number], None)))
    arguments = str(tmp_path / "run"), 1, 2, weights_hash(parameters(policy)), task
    with pytest.raises(ValueError, match="the reward is nan in iteration 1, run 2, step 1"):
        train_run(*arguments)
    assert train_run(*arguments, on_failure="continue")
    assert (tmp_path / "run/iteration-1/run-2/FAILED").is_file()


def test_the_last_whole_row_of_a_log_is_read_while_it_is_written(tmp_path):
    log = tmp_path / "log.jsonl"
    assert last_row(log) is None
    log.write_text("".join(json.dumps({"step": n, "pad": "x" * 50}) + "\n" for n in range(200)) + '{"step": 2')
    assert last_row(log)["step"] == 199
    log.write_text('{"st')
    assert last_row(log) is None
