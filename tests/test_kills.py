"""Nothing is lost: whatever a process that was killed left behind, and on a full disk, a run goes on from it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_run import PROMPTS, files, score, short_run

from warp_lite import WarpConfig, run_warp
from warp_lite.cli import main
from warp_lite.policies.loading import load_policy, save_policy
from warp_lite.storage.files import locked
from warp_lite.training.run_folder import SaveClock

BRIEF = {"steps": 2, "save_every": 1, "eval_every": 1}
KILLS = int(os.environ.get("WARP_LITE_KILLS", "4"))  # how many runs are killed: 4, or what a careful person asks for
REWARD = "from short_run import score\n"


class Writes:
    """Every moment at which this process is about to write, make, rename or remove something in `folder`."""

    def __init__(self):
        self.folder = self.seen = None
        sys.addaudithook(self._hook)

    def watch(self, folder, seen):
        """Call `seen(event, path)` at each from now on; `seen=None` ends it."""
        self.folder, self.seen = str(folder), seen

    def _hook(self, event, arguments):
        if self.seen is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if not path.startswith(self.folder):
            return
        if event == "open":
            mode, flags = arguments[1] or "", arguments[2] or 0
            if not (set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        seen, self.seen = self.seen, None
        try:
            seen(event, path)
        finally:
            self.seen = seen


WRITES = Writes()  # an audit hook stays for as long as the process


@pytest.fixture(scope="module")
def task(policy_of, tokenizer, tmp_path_factory):
    """A folder with a policy, a reward module and prompts."""
    folder = tmp_path_factory.mktemp("kills")
    save_policy(policy_of("gpt2", dtype=torch.float32), tokenizer, folder / "policy")
    (folder / "kills_reward.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A process that is killed loses nothing that it has written, synced or not; a busy disk makes each sync long."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def own(*more):
    """`warp-lite run` on the task: two iterations of two runs of two steps."""
    settings = ("iterations=2", "runs=2", "steps=2", "batch_size=3", "lr=1e-2", "max_new_tokens=5", "eval_every=1",
                "save_every=1")
    return ["run", "--policy", "policy", "--reward", "kills_reward:score", "--prompts", "prompts.txt",
            *(f"--set={setting}" for setting in settings), *more]


# --- killed ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills.py forks")
def test_runs_killed_at_random_moments_resume_to_identical_bytes(task, tmp_path):
    """Four of them; WARP_LITE_KILLS=40 kills forty. Every file is compared: policies, logs, front.json, front.png."""
    shutil.copytree(task, tmp_path, dirs_exist_ok=True)
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, "-W", "ignore", tests / "kills.py", tmp_path, str(KILLS), "0"], text=True,
                          capture_output=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["identical"] == found["runs"] == KILLS and found["differing"] == {}
    assert found["kills"] >= KILLS / 2, "too few of them were killed before their end"


def kind(moment):
    """A moment without its numbers: the same write of another run or iteration is of the same kind."""
    return re.sub(r"\d+", "#", moment)


@pytest.mark.slow
def test_a_run_killed_before_any_write_resumes_to_identical_bytes(here, capsys):
    """The folder is copied before each write, make, rename and removal: what SIGKILL would leave there. The last
    copy of each kind (with WARP_LITE_KILLS=40 every copy) is resumed: until the front is measured by `run_warp`,
    later by the command line."""
    out, snapshots = here / "out", []

    def copy(event, path):
        now = files(out) if out.is_dir() else {}
        if not snapshots or now != snapshots[-1][1]:
            place = here / f"at-{len(snapshots)}"
            shutil.copytree(out, place) if out.is_dir() else place.mkdir()
            snapshots.append((place, now, f"{event} {path.removeprefix(str(out))}"))

    WRITES.watch(out, copy)
    try:
        assert main(own("--out", str(out))) == 0
    finally:
        WRITES.watch(None, None)
    whole = files(out)
    kinds = {kind(moment): n for n, (_, _, moment) in enumerate(snapshots)}
    assert len(kinds) > 20 and len(snapshots) > 60, kinds
    policy, tokenizer = load_policy("policy")
    config = WarpConfig(**json.loads((out / "config.json").read_text())["settings"]["config"])
    source = {"policy": "policy", "reward": "kills_reward:score"}
    for n in sorted(kinds.values()) if KILLS < 40 else range(len(snapshots)):
        place, _, moment = snapshots[n]
        if (place / "iteration-2" / "DONE").is_file():
            assert main(own("--resume", "--out", str(place))) == 0, moment
            assert files(place) == whole, moment
        else:
            run_warp(policy, tokenizer, score, PROMPTS, config, place, resume=True, source=source, progress=False)
            assert files(place) == {name: data for name, data in whole.items() if "front" not in name}, moment
    capsys.readouterr()
    print(f"{len(snapshots)} copies of {len(kinds)} kinds: {sorted(kinds)}")


def test_what_was_being_written_when_it_was_killed_is_not_read_and_goes(policy_of, tokenizer, tmp_path):
    policy = policy_of("gpt2", dtype=torch.float32)
    short_run(policy, tokenizer, out=tmp_path / "run", **BRIEF)
    whole = files(tmp_path / "run")
    for name in (".config.json.77.part", "iteration-2/run-1/.state-1.safetensors.77.part"):
        (tmp_path / "run" / name).write_bytes(b"torn")
    (tmp_path / "run/iteration-1/run-1/.policy.safetensors.77.part").mkdir()
    (tmp_path / "run/iteration-1/run-1/.policy.safetensors.77.part/.tmpxSA8ES").write_bytes(b"torn")
    (tmp_path / "run/iteration-1/.merged.77.part").mkdir()
    (tmp_path / "run/iteration-1/.merged.77.part/model.safetensors").write_bytes(b"torn")
    shutil.copy(tmp_path / "run/iteration-1/run-1/policy.safetensors",
                tmp_path / "run/iteration-1/run-1/state-1.safetensors")  # one that a finished run had yet to remove
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, **BRIEF)
    assert files(tmp_path / "run") == whole


def test_a_merge_that_nothing_vouches_for_is_written_anew(policy_of, tokenizer, tmp_path):
    """Killed after merged/ and before DONE; meanwhile the disk lost its end."""
    policy = policy_of("gpt2", dtype=torch.float32)
    short_run(policy, tokenizer, out=tmp_path / "run", **BRIEF)
    whole, weights = files(tmp_path / "run"), tmp_path / "run/iteration-1/merged/model.safetensors"
    (tmp_path / "run/iteration-1/DONE").unlink()
    weights.write_bytes(weights.read_bytes()[:-100])
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, **BRIEF)
    assert files(tmp_path / "run") == whole


# --- a disk that is full, read-only or in use -----------------------------------------------


@pytest.mark.parametrize("code, start", [(errno.ENOSPC, 0), (errno.ENOSPC, 20), (errno.ENOSPC, 47),
                                         (errno.ENOSPC, 80), (errno.EROFS, 0), (errno.EROFS, 60)])
def test_a_disk_that_fails_from_some_write_on_is_one_line_and_the_run_goes_on_later(here, capsys, start, code):
    """Full, or read-only, from the n-th write of a run on: exit code 2, and what is there stays whole."""
    count, out = iter(range(10**6)), here / "out"

    def fail(event, path):
        if next(count) >= start and event not in ("os.remove", "os.rmdir"):
            raise OSError(code, os.strerror(code))

    WRITES.watch(out, fail)
    try:
        exit_code = main(own("--out", str(out)))
    finally:
        WRITES.watch(None, None)
    said, err = capsys.readouterr()
    assert exit_code == 2 and said == "" and len(err.splitlines()) == 1, err
    assert f"cannot write {out}" in err and os.strerror(code) in err and "--resume" in err
    if out.is_dir():
        left = [path.name for path in out.rglob(".*.part")]
        assert not left, left
    policy, tokenizer = load_policy("policy")
    for name, resume in ((out, True), (here / "whole", False)):
        run_warp(policy, tokenizer, score, PROMPTS, WarpConfig(iterations=2, runs=2, batch_size=3, lr=1e-2,
                 max_new_tokens=5, steps=2, eval_every=1, save_every=1), name, resume, progress=False,
                 source={"policy": "policy", "reward": "kills_reward:score"})
    assert files(out) == files(here / "whole")


def test_a_disk_that_fills_within_a_file_leaves_the_saved_step(policy_of, tokenizer, tmp_path):
    resource = pytest.importorskip("resource")
    policy, before = policy_of("gpt2", dtype=torch.float32), resource.getrlimit(resource.RLIMIT_FSIZE)
    short_run(policy, tokenizer, out=tmp_path / "whole", **BRIEF)
    size = (tmp_path / "whole/iteration-1/run-1/policy.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, before[1]))  # a policy fits, a state does not
    try:
        with pytest.raises(OSError, match="cannot write .*run-1/state-1.safetensors: .*(File too large|os error 27)"):
            short_run(policy, tokenizer, out=tmp_path / "run", **BRIEF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob(".*.part"))
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, **BRIEF)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_folder_in_use_is_refused_untouched_and_a_lock_left_behind_is_not_in_use(
        here, capsys, policy_of, tokenizer):
    short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=here / "other", **BRIEF)
    before = files(here / "other")
    with locked(here / "out"):
        (here / "out" / "config.json").write_text('{"settings": {}, "provenance": {"threads": 1}}')
        for arguments in (own("--resume", "--out", "out"), ["front", "out"]):
            assert main(arguments) == 2
        assert "out is in use by another process; wait until it has ended" in capsys.readouterr().err
        assert sorted(p.name for p in (here / "out").iterdir()) == [".lock", "config.json"]
        with pytest.raises(ValueError, match="out is in use by another process"), locked(here / "out"):
            pass
    with locked(here / "other"), pytest.raises(ValueError, match="other is in use by another process"):
        short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=here / "other", resume=True, **BRIEF)
    assert files(here / "other") == before
    shutil.rmtree(here / "out")
    (here / "out").mkdir()
    (here / "out" / ".lock").write_text("")  # of a process that was killed
    assert main(own("--out", "out")) == 0


# --- how often it is saved ------------------------------------------------------------------


def test_saving_takes_a_hundredth_of_the_time_unless_told_how_often():
    time = [0.0]
    for cost, size in ((0.01, 4e6), (5.0, 2e9)):
        clock, saves, begin = SaveClock(0, size, lambda: time[0]), [], time[0]
        for step in range(1, 200001):
            time[0] += 0.1
            if clock.due(step):
                with clock.timed():
                    time[0] += cost
                saves.append(time[0] - begin)
        assert saves[0] >= 100 * size / 200e6, "the first waits for what it may cost"
        assert 0.008 < len(saves) * cost / (time[0] - begin) < 0.0105
    assert [step for step in range(1, 10) if SaveClock(3, 0).due(step)] == [3, 6, 9]


def test_a_state_that_was_altered_is_refused(tmp_path, policy_of, tokenizer):
    """Not cut off, which its own format tells, but with one bit turned."""
    policy, steps = policy_of("gpt2", dtype=torch.float32), iter(range(10))
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "run", stop=lambda: next(steps) == 1)
    (path,) = (tmp_path / "run/iteration-1/run-2").glob("state-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="run-2/state-2.safetensors was altered: .*; remove it to train that run"):
        short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    path.unlink()
    log = tmp_path / "run/iteration-1/run-1/metrics.jsonl"
    before = log.read_text()
    log.write_text(before.replace('{"step": 2', '{"step'))
    shutil.copy(tmp_path / "run/iteration-1/run-1/state-2.safetensors", path)
    with pytest.raises(ValueError, match="run-1/metrics.jsonl was altered: it has 1 of the 2 rows up to step 2, "):
        short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
