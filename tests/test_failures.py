"""A run whose reward, loss or gradient is not finite: stopped at its last good step, named, left out if asked for."""

import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from short_run import CONFIG, PROMPTS, assert_same_weights, differ, files, score, short_run, stop_after

from warp_lite import liti, load_result, slerp, train_batched
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main
from warp_lite.policies.loading import save_policy
from warp_lite.policies.prompts import encode_prompts
from warp_lite.task import hold_out
from warp_lite.training.run import Run, RunFailed
from warp_lite.training.run_folder import RunFolder

SETTINGS = {"runs": 3, "iterations": 1, "eval_every": 0, "save_every": 3}


@pytest.fixture(scope="module")
def poison(policy_of, tokenizer):
    """(prompt, completion ids) that run 2 samples at its third step, and no other run at any step."""
    seen = []

    def watched(prompts, completions, completion_ids):
        seen.append(list(zip(prompts, map(tuple, completion_ids))))
        return score(prompts, completions, completion_ids)

    short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, watched, **SETTINGS)
    everything = [pair for step in seen for pair in step]
    return next(pair for pair in seen[2][CONFIG.batch_size:2 * CONFIG.batch_size] if everything.count(pair) == 1)


def poisoned_by(poison, value):
    """`score`, but for that completion."""
    def reward(prompts, completions, completion_ids):
        values = score(prompts, completions, completion_ids)
        return [value if (prompt, tuple(ids)) == poison else own
                for prompt, ids, own in zip(prompts, completion_ids, values)]
    return reward


@pytest.fixture
def poisoned(poison):
    """A reward that is no number at one completion of run 2, at its third step."""
    return poisoned_by(poison, math.nan)


@pytest.fixture
def policy(policy_of):
    return policy_of("gpt2", dtype=torch.float32)


def states_of(policy, tokenizer, numbers, steps):
    """The runs of these numbers by `train_batched`, with nothing that fails; states by the number of steps."""
    prompts, _ = hold_out(encode_prompts(tokenizer, PROMPTS))
    start, kept = {name: tensor.clone() for name, tensor in parameters(policy).items()}, {}
    runs = [Run(CONFIG.replace(**SETTINGS), 1, m, start, start, score) for m in numbers]
    train_batched(policy, tokenizer, prompts, runs,
                  lambda runs, step, states, metrics: kept.update({step: states()} if step in steps else {}))
    return kept


@pytest.mark.parametrize("executor, value", [("batched", math.nan), ("serial", math.nan), ("batched", 1e308)])
def test_the_others_are_merged_without_it_and_are_what_they_would_have_been(
        policy_of, tokenizer, poison, executor, value):
    """A reward that is no number, and one that no gradient can hold.

    In float64 to rounding: a batch may be as wide as its longest completion, so its rounding is of the batch."""
    found = short_run(policy_of("gpt2"), tokenizer, poisoned_by(poison, value), executor=executor,
                      on_failure="continue", **SETTINGS)
    (iteration,) = found.iterations
    alone = states_of(policy_of("gpt2"), tokenizer, [1, 3], [4])[4]
    together = states_of(policy_of("gpt2"), tokenizer, [1, 2, 3], [2, 4])
    assert iteration.runs == [1, 3] and len(iteration.policies) == 2
    for policy, anchor, without, beside in zip(iteration.policies, iteration.anchors, alone, together[4][::2]):
        for other in (without, beside):
            assert_same_weights(policy, other.policy, 1e-9)
            assert_same_weights(anchor, other.anchor, 1e-9)
    assert_same_weights(iteration.merged, slerp(iteration.init, iteration.policies))
    assert_same_weights(iteration.next_init, liti(iteration.init, iteration.merged, CONFIG.eta))
    (failure,) = iteration.failures
    assert (failure.run, failure.step) == (2, 2) and "iteration 1, run 2, step 3, " in failure.reason
    assert_same_weights(failure.policy, together[2][1].policy, 1e-9)  # the last good state
    assert_same_weights(failure.anchor, together[2][1].anchor, 1e-9)
    assert differ(failure.policy, together[4][1].policy)


def test_the_bytes_of_the_others_are_those_without_it_where_the_batches_are_as_wide(policy, tokenizer, poison):
    """float32, in completions of one token: nothing of a failed run is in the others."""
    short = {**SETTINGS, "max_new_tokens": 1}

    def fails(prompts, completions, completion_ids, calls=iter(range(10**6))):  # noqa: B008
        return [math.nan if next(calls) == 7 else len(c) for c in completions]  # the second of its third step

    def likes(prompts, completions):
        return [float(len(c)) for c in completions]

    found = short_run(policy, tokenizer, [likes, fails, likes], on_failure="continue", **short).iterations[0]
    prompts, _ = hold_out(encode_prompts(tokenizer, PROMPTS))
    start = {name: tensor.clone() for name, tensor in parameters(policy).items()}
    config = CONFIG.replace(**short)
    alone = train_batched(policy, tokenizer, prompts, [Run(config, 1, m, start, start, likes) for m in (1, 3)])
    assert found.runs == [1, 3] and found.failures[0].step == 2
    for weights, state in zip(found.policies, alone):
        assert all(torch.equal(weights[name], state.policy[name]) for name in weights)


def test_serial_runs_beside_it_keep_their_bytes(policy, tokenizer, poisoned):
    found = short_run(policy, tokenizer, poisoned, executor="serial", on_failure="continue", **SETTINGS).iterations[0]
    whole = short_run(policy, tokenizer, executor="serial", **SETTINGS).iterations[0]
    for one, other in zip(found.policies, whole.policies[::2]):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_stop_names_step_and_prompt_saves_the_last_good_step_and_continue_goes_on_from_there(
        policy, tokenizer, poisoned, poison, tmp_path, executor):
    message = f"in iteration 1, run 2, step 3, .* prompt {re.escape(repr(poison[0]))}.*; step 2 is saved in .*stopped"
    with pytest.raises(RunFailed, match=message) as caught:
        short_run(policy, tokenizer, poisoned, out=tmp_path / "stopped", executor=executor, **SETTINGS)
    assert "\n" not in str(caught.value) and "on-failure=continue" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as between processes
    assert (tmp_path / "stopped/iteration-1/run-2/state-2.safetensors").is_file()
    with pytest.raises(RunFailed, match=message):  # it is what it was
        short_run(policy, tokenizer, poisoned, out=tmp_path / "stopped", resume=True, executor=executor, **SETTINGS)
    for name, resume in (("stopped", True), ("whole", False)):
        short_run(policy, tokenizer, poisoned, out=tmp_path / name, resume=resume, executor=executor,
                  on_failure="continue", **SETTINGS)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_the_folder_records_it_and_a_resumed_run_comes_to_the_same(policy, tokenizer, poisoned, tmp_path, monkeypatch):
    options = {**SETTINGS, "iterations": 2, "on_failure": "continue"}
    whole = short_run(policy, tokenizer, poisoned, out=tmp_path / "whole", **options)
    folder = tmp_path / "whole/iteration-1/run-2"
    failed = json.loads((folder / "FAILED").read_text())
    assert failed["step"] == 2 and "run 2, step 3" in failed["reason"] and "policy.safetensors" in failed["sha256"]
    assert not (folder / "DONE").exists() and not list(folder.glob("state-*"))
    before = files(tmp_path / "whole")
    for calls in (1, 3, 5):  # before it failed, after, and in the next iteration
        with pytest.raises(KeyboardInterrupt):
            short_run(policy, tokenizer, poisoned, out=tmp_path / f"at-{calls}", stop=stop_after(calls), **options)
        short_run(policy, tokenizer, poisoned, out=tmp_path / f"at-{calls}", resume=True, **options)
        assert files(tmp_path / f"at-{calls}") == before
    finish = RunFolder.finish_run

    def killed(self, i, m, state, failure=None):
        if failure is not None:
            raise KeyboardInterrupt
        finish(self, i, m, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish_run", killed)
        short_run(policy, tokenizer, poisoned, out=tmp_path / "killed", **options)
    short_run(policy, tokenizer, poisoned, out=tmp_path / "killed", resume=True, **options)
    assert files(tmp_path / "killed") == before

    again = short_run(policy, tokenizer, poisoned, out=tmp_path / "whole", resume=True, **options)
    loaded = load_result(tmp_path / "whole", score)
    loaded.save(tmp_path / "saved")
    for found in (again, loaded, load_result(tmp_path / "saved", score)):
        assert [it.runs for it in found.iterations] == [it.runs for it in whole.iterations]
        ours, theirs = found.iterations[0].failures[0], whole.iterations[0].failures[0]
        assert (ours.run, ours.step, ours.reason) == (theirs.run, theirs.step, theirs.reason)
        assert_same_weights(ours.policy, theirs.policy)
        assert_same_weights(found.weights(), whole.weights())
    # where an iteration is merged already nobody is asked again; in one that is not, it is
    short_run(policy, tokenizer, poisoned, out=tmp_path / "whole", resume=True, **{**options, "on_failure": "stop"})
    (tmp_path / "whole/iteration-1/DONE").unlink()
    with pytest.raises(ValueError, match="run 2 of iteration 1 in .*whole was left out .*--on-failure=continue, or"):
        short_run(policy, tokenizer, poisoned, out=tmp_path / "whole", resume=True, **{**options, "on_failure": "stop"})


@pytest.mark.parametrize("name", ["policy.safetensors", "metrics.jsonl", "FAILED"])
def test_what_a_failed_run_left_is_vouched_for_too(policy, tokenizer, poisoned, tmp_path, name):
    short_run(policy, tokenizer, poisoned, out=tmp_path / "run", on_failure="continue", **SETTINGS)
    path = tmp_path / "run/iteration-1/run-2" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"run-2/{name}"):
        load_result(tmp_path / "run", score)


@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_when_all_runs_fail_there_is_nothing_to_merge(policy, tokenizer, tmp_path, executor):
    calls = []

    def reward(prompts, completions):
        calls.append(1)  # six in the trial of three runs, then one a step
        return [math.nan if len(calls) > 12 else float(len(c)) for c in completions]

    options = {**SETTINGS, "steps": 20, "out": tmp_path / "run", "on_failure": "continue", "executor": executor}
    for resume in (False, True):  # one after the other, the second and the third fail at their first step
        with pytest.raises(ValueError, match="all 3 runs of iteration 1 failed, the first because the reward is nan in "
                                             "iteration 1, run 1, step .*; to train them again, remove .*iteration-1"):
            short_run(policy, tokenizer, reward, resume=resume, **options)
    assert len(list(tmp_path.rglob("FAILED"))) == 3 and not list(tmp_path.rglob("merged"))


def test_a_run_that_fails_when_it_is_measured_is_left_out_too(policy, tokenizer, tmp_path, monkeypatch):
    from warp_lite.training import iteration

    points = iteration.trajectory_points

    def fragile(result, members, step, states):
        if step == 2 and any((run.iteration, run.number) == (1, 2) for run in members):
            raise ValueError("the reward is nan for a completion of the prompt 'this'")
        return points(result, members, step, states)

    options = {**SETTINGS, "eval_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(iteration, "trajectory_points", fragile)
        with pytest.raises(ValueError, match="^the reward is nan for a completion of the prompt 'this'$"):
            short_run(policy, tokenizer, out=tmp_path / "stopped", **options)
        found = short_run(policy, tokenizer, out=tmp_path / "run", on_failure="continue", **options)
        with pytest.raises(KeyboardInterrupt):
            short_run(policy, tokenizer, out=tmp_path / "again", on_failure="continue", stop=stop_after(2), **options)
        short_run(policy, tokenizer, out=tmp_path / "again", on_failure="continue", resume=True, **options)
    assert found.iterations[0].runs == [1, 3] and found.iterations[0].failures[0].step == 2
    assert "when run 2 of iteration 1 was measured after step 2" in found.iterations[0].failures[0].reason
    assert [(row["run"], row["step"]) for row in found.trajectories] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    assert files(tmp_path / "again") == files(tmp_path / "run")


def test_a_word_that_says_neither_stop_nor_continue_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="on_failure must be 'stop' or 'continue', not 'ignore'"):
        short_run(policy, tokenizer, out=tmp_path / "run", on_failure="ignore")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_in_one_line_what_was_left_out(policy, tokenizer, poison, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warp_lite.result.EVALUATION_SAMPLES", 32)
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 64)
    save_policy(policy, tokenizer, "policy")
    (tmp_path / "poisoned_reward.py").write_text(f"""
from short_run import score as good

def score(prompts, completions, completion_ids, **kwargs):
    values = good(prompts, completions, completion_ids)
    return [float("nan") if (p, tuple(i)) == {poison!r} else v for p, i, v in zip(prompts, completion_ids, values)]
""")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {name: getattr(CONFIG.replace(**SETTINGS), name) for name in (
        "runs", "iterations", "steps", "batch_size", "lr", "beta", "mu", "eta", "max_new_tokens", "eval_every")}
    arguments = ["run", "--policy", "policy", "--reward", "poisoned_reward:score", "--prompts", "prompts.txt",
                 "--out", "out", *(f"--set={name}={value}" for name, value in settings.items())]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "run 2, step 3" in err and "step 2 is saved in out" in err
    assert main([*arguments, "--resume", "--on-failure=continue"]) == 0
    out = capsys.readouterr().out
    assert main(["front", "out"]) == 0 and capsys.readouterr().out == out
    (line,) = [line for line in out.splitlines() if line.startswith("left out")]
    assert re.fullmatch(r"left out of the merges: run 2 of iteration 1 after step 2 \(the reward is nan in .*\)", line)


def test_a_failure_names_the_prompt_that_is_farthest_from_the_mean_or_the_first_that_is_no_number():
    from types import SimpleNamespace

    from warp_lite.training.reinforce import check_step

    texts = [f"prompt {i}" for i in range(6)]
    rollout = SimpleNamespace(prompts=SimpleNamespace(texts=texts), ids=torch.zeros(2, 3, 1))
    runs = [SimpleNamespace(iteration=1, number=m, config=CONFIG) for m in (1, 2)]
    good, nan = torch.ones(2), torch.tensor([1.0, np.nan])
    check_step(runs, 4, rollout, torch.ones(2, 3), good, good)
    for r_beta, culprit in (([0.0, 9.0, 1.0], "prompt 4"), ([9.0, 0.0, np.nan], "prompt 5"),
                            ([np.inf, 0.0, -np.inf], "prompt 3")):
        with pytest.raises(RunFailed, match=f"the gradient is not finite in iteration 1, run 2, step 5, .*{culprit}"):
            check_step(runs, 4, rollout, torch.tensor([[9.0, 0.0, 0.0], r_beta]), good, nan)
    with pytest.raises(RunFailed, match="the loss is nan in iteration 1, run 2, step 5"):
        check_step(runs, 4, rollout, torch.ones(2, 3), nan, good)
