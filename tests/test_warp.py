"""Algorithm 1: recomputed by hand, each of its settings, what it leaves, and how a run goes on."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from short_run import (
    CONFIG,
    PROMPTS,
    assert_same_weights,
    differ,
    files,
    other_score,
    score,
    short_run,
    stop_after,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_lite import evaluate, lerp, liti, load_result, run_warp, slerp, train_batched
from warp_lite.averaging.state_dicts import bytes_of, parameters
from warp_lite.evaluation.limit import limit_rewards
from warp_lite.policies.prompts import encode_prompts
from warp_lite.task import hold_out
from warp_lite.training import memory
from warp_lite.training.executors import BatchedTrainer
from warp_lite.training.run import Run
from warp_lite.training.run_folder import RunFolder
from warp_lite.viewing.front_report import complete_front


@pytest.fixture
def policy(policy_of):
    return policy_of("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def result(policy_of, tokenizer):
    """A finished run, shared: not to be changed."""
    return short_run(policy_of("gpt2", dtype=torch.float32), tokenizer)


# --- Algorithm 1 ----------------------------------------------------------------------------


def test_two_iterations_recomputed_step_by_step_are_run_warp(result, policy, tokenizer):
    prompts, _ = hold_out(encode_prompts(tokenizer, PROMPTS))
    theta_sft = theta_init = {name: tensor.clone() for name, tensor in parameters(policy).items()}
    for i, iteration in enumerate(result.iterations, 1):
        runs = [Run(CONFIG, i, m, theta_init, theta_sft, score) for m in (1, 2)]
        states = train_batched(policy, tokenizer, prompts, runs)
        theta_slerp = slerp(theta_init, [state.policy for state in states])
        assert_same_weights(iteration.init, theta_init)
        for m, state in enumerate(states):
            assert_same_weights(iteration.policies[m], state.policy)
            assert_same_weights(iteration.anchors[m], state.anchor)
        assert_same_weights(iteration.merged, theta_slerp)
        theta_init = {n: (1 - CONFIG.eta) * theta_init[n] + CONFIG.eta * theta_slerp[n] for n in theta_init}
        assert_same_weights(iteration.next_init, theta_init, 1e-6)
        theta_init = iteration.next_init
    assert i == 2 and differ(result.iterations[1].init, theta_sft)


def test_the_next_init_moves_toward_the_merge_from_this_iterations_init_and_the_front_from_sft(result):
    """Both can be told apart in the second iteration only, and a reversed coefficient only at η ≠ ½."""
    first, second = result.iterations
    assert CONFIG.eta == 0.3
    for iteration in result.iterations:
        assert_same_weights(iteration.next_init, liti(iteration.init, iteration.merged, 0.3))
        assert differ(iteration.next_init, liti(iteration.init, iteration.merged, 0.7))
    assert_same_weights(second.init, first.next_init)
    assert_same_weights(result.weights(0.3), liti(result.sft, second.merged, 0.3))
    assert_same_weights(result.weights(0.3, toward="init"), liti(second.init, second.merged, 0.3))
    assert differ(result.weights(0.3), result.weights(0.3, toward="init"))
    assert differ(second.next_init, liti(result.sft, second.merged, 0.3))
    assert_same_weights(result.weights(0.3, 1), result.weights(0.3, 1, toward="init"))


def test_the_front_runs_from_the_sft_policy_to_the_merge(result):
    assert_same_weights(result.weights(0.0), result.sft)
    assert_same_weights(result.weights(1.0), result.iterations[-1].merged)
    assert_same_weights(result.weights(1.0, 1), result.iterations[0].merged)
    points = result.front(etas=(0, 0.5, 1))
    assert [(p["iteration"], p["eta"]) for p in points] == [(i, e) for i in (1, 2) for e in (0, 0.5, 1)]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6) and points[2]["kl"] > 100 * abs(points[0]["kl"])


def test_the_policies_are_merged_and_not_their_moving_averages(result):
    for iteration in result.iterations:
        assert differ(iteration.merged, slerp(iteration.init, iteration.anchors))


def test_every_run_sees_its_own_order_of_the_training_prompts_and_none_held_out(policy, tokenizer):
    seen = [[], []]

    def watch(m):
        def reward(prompts, completions):
            seen[m] += prompts
            return [float(len(c)) for c in completions]
        return reward

    result = short_run(policy, tokenizer, [watch(0), watch(1)], iterations=1, steps=8, eval_every=0)
    assert seen[0] != seen[1]
    for prompts in seen:
        assert len(prompts) == 8 * CONFIG.batch_size and set(prompts) == set(result.task.prompts.given)
        assert not set(prompts) & set(result.task.eval_prompts.given)
    assert sorted({*result.task.prompts.given, *result.task.eval_prompts.given}) == sorted(PROMPTS)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_serial_and_batched_agree_in_float64(policy_of, tokenizer, architecture):
    results = [short_run(policy_of(architecture), tokenizer, executor=executor) for executor in ("batched", "serial")]
    for batched, serial in zip(*(r.iterations for r in results)):
        assert_same_weights(batched.merged, serial.merged, 1e-9)
        for a, b in zip(batched.policies + batched.anchors, serial.policies + serial.anchors):
            assert_same_weights(a, b, 1e-9)
    assert differ(results[0].iterations[-1].merged, results[0].sft)


# --- its settings ---------------------------------------------------------------------------


def test_anchor_sft_stays_at_the_sft_policy_in_every_iteration(policy, tokenizer, result):
    found = short_run(policy, tokenizer, anchor="sft")
    for iteration in found.iterations:
        for anchor in iteration.anchors:
            assert_same_weights(anchor, found.sft)
    assert differ(found.iterations[0].merged, result.iterations[0].merged)


def test_anchor_none_is_a_beta_of_zero(policy, tokenizer, result):
    none, zero = short_run(policy, tokenizer, anchor="none"), short_run(policy, tokenizer, beta=0.0)
    assert_same_weights(none.weights(), zero.weights())
    assert differ(none.weights(), result.weights())


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_mu_of_zero_leaves_the_anchor_at_the_init_and_of_one_makes_it_the_policy(policy, tokenizer, mu):
    for iteration in short_run(policy, tokenizer, mu=mu).iterations:
        for anchor, trained in zip(iteration.anchors, iteration.policies):
            assert_same_weights(anchor, trained if mu else iteration.init)


def test_merge_lerp_is_the_mean_and_another_merge_than_slerp(policy, tokenizer, result):
    found = short_run(policy, tokenizer, merge="lerp")
    assert_same_weights(found.iterations[0].policies[1], result.iterations[0].policies[1])
    for iteration in found.iterations:
        assert_same_weights(iteration.merged, lerp(iteration.init, iteration.policies))
    assert differ(found.iterations[0].merged, result.iterations[0].merged)


@pytest.mark.parametrize("merge", ["slerp", "lerp", "none"])
def test_a_single_run_is_taken_as_it_is(policy, tokenizer, result, merge):
    for iteration in short_run(policy, tokenizer, runs=1, merge=merge).iterations:
        assert len(iteration.policies) == 1
        assert_same_weights(iteration.merged, iteration.policies[0])


def test_a_run_does_not_depend_on_how_many_there_are(policy_of, tokenizer):
    alone, two = (short_run(policy_of("gpt2"), tokenizer, runs=runs, iterations=1) for runs in (1, 2))
    assert_same_weights(alone.iterations[0].policies[0], two.iterations[0].policies[0], 1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eta_of_one_starts_from_the_merge_and_of_zero_from_the_same_init(policy, tokenizer, eta):
    found = short_run(policy, tokenizer, eta=eta)
    assert_same_weights(found.iterations[1].init, found.iterations[0].merged if eta else found.sft)


def test_runs_may_have_rewards_of_their_own_and_are_judged_by_the_mean(policy, tokenizer, result):
    found = short_run(policy, tokenizer, [score, other_score])
    assert_same_weights(found.iterations[0].policies[0], result.iterations[0].policies[0], 1e-5)
    assert differ(found.iterations[0].policies[1], result.iterations[0].policies[1])

    def mean(prompts, completions, completion_ids):
        both = score(prompts, completions, completion_ids), other_score(prompts, completions)
        return np.mean(both, axis=0).tolist()

    (point,) = found.front(etas=(1.0,), iterations=[2], samples=2)
    held_out = found.task.eval_prompts.given
    expected = evaluate(found.policy(), policy, mean, held_out, tokenizer, samples=2, max_new_tokens=5)
    assert point["reward"] == pytest.approx(expected.reward)


def test_a_data_set_brings_its_columns_to_the_reward_in_training_and_evaluation(policy, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    answers = [f"{i} {prompt}" for i, prompt in enumerate(PROMPTS)]
    right = dict(zip(PROMPTS, answers))
    calls = []

    def reward(prompts, completions, answer):
        assert answer == [right[p] for p in prompts]
        calls.append(len(prompts))
        return [float(a[0]) for a in answer]

    prompts = datasets.Dataset.from_dict({"prompt": PROMPTS, "answer": answers})
    result = short_run(policy, tokenizer, reward, prompts, tmp_path / "run")
    assert result.front(etas=(0.5,)) and calls
    assert load_result(tmp_path / "run", reward).front(etas=(0.5,)) == result.front(etas=(0.5,))


def test_trajectories_are_measured_every_so_many_steps_and_at_the_end(policy, tokenizer):
    found = short_run(policy, tokenizer, steps=5, eval_every=2)
    assert [(r["iteration"], r["run"], r["step"]) for r in found.trajectories] == [
        (i, m, s) for i in (1, 2) for m in (1, 2) for s in (2, 4, 5)]
    assert all(r["kl"] > 0 and "reward_se" in r for r in found.trajectories)
    assert short_run(policy, tokenizer, eval_every=0).trajectories == []


def test_gold_is_measured_and_changes_no_weight(policy, tokenizer, result):
    found = short_run(policy, tokenizer, gold=other_score)
    assert_same_weights(found.weights(), result.weights())
    assert "gold" in found.trajectories[0] and "gold" in found.front(etas=(1.0,))[0]


# --- what it leaves -------------------------------------------------------------------------


def test_the_callers_model_comes_back_as_it_was(policy, tokenizer):
    policy.train()
    before = {name: tensor.clone() for name, tensor in parameters(policy).items()}
    for executor in ("batched", "serial"):
        short_run(policy, tokenizer, executor=executor)
        assert_same_weights(parameters(policy), before)
        assert policy.training and all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_the_callers_model_comes_back_as_it_was_when_a_run_fails(policy, tokenizer, executor, error):
    before = {name: tensor.clone() for name, tensor in parameters(policy).items()}
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == 6:
            raise error("enough")
        return [float(len(c)) for c in completions]

    with pytest.raises(error):
        short_run(policy, tokenizer, reward, executor=executor, eval_every=0, steps=20)
    assert_same_weights(parameters(policy), before)


def test_a_policy_of_the_front_is_a_model_of_its_own(result, policy, tokenizer):
    half = result.policy(0.5)
    assert type(half) is type(policy)
    assert_same_weights(parameters(half), result.weights(0.5))
    with torch.no_grad():
        next(half.parameters()).zero_()
    assert_same_weights(parameters(policy), result.sft)


def test_completions_follow_eta_and_not_chance(result):
    prompts = PROMPTS[:3]
    assert result.completions(prompts, 0.0) == result.completions(prompts, 0.0, iteration=1)
    assert result.completions(prompts, 1.0, seed=1) != result.completions(prompts, 1.0, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_result_loads_as_it_was(policy_of, tokenizer, tmp_path, dtype):
    result = short_run(policy_of("gpt2", dtype=dtype), tokenizer, steps=2, eval_every=1)
    result.save(tmp_path / "saved")
    loaded = load_result(tmp_path / "saved", score)
    assert loaded.config == result.config and loaded.trajectories == result.trajectories
    for part in ("prompts", "eval_prompts"):
        assert getattr(loaded.task, part).given == getattr(result.task, part).given
    for a, b in zip(result.iterations, loaded.iterations):
        for name in ("init", "merged", "next_init"):
            first, second = getattr(a, name), getattr(b, name)
            assert {n: t.dtype for n, t in first.items()} == {n: t.dtype for n, t in second.items()}
            assert all(torch.equal(first[n], second[n]) for n in first)
        for first, second in zip(a.policies + a.anchors, b.policies + b.anchors):
            assert all(torch.equal(first[n], second[n]) for n in first)
    if dtype != torch.bfloat16:
        assert loaded.front(etas=(0.5,)) == result.front(etas=(0.5,))
    with pytest.raises(ValueError, match="holds a run already"):
        result.save(tmp_path / "saved")


def test_a_loaded_result_does_not_guess_its_reward(result, tmp_path):
    result.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not say where the reward is; pass it"):
        load_result(tmp_path / "saved")


@pytest.mark.slow
def test_every_folder_loads_in_a_process_without_this_package(result, tmp_path):
    result.save(tmp_path / "saved")
    result.save_policy(tmp_path / "half", 0.5)
    names = ["saved/sft", *(f"saved/iteration-{i}/{n}" for i in (1, 2) for n in ("merged", "next-init")), "half"]
    expected = [result.sft, *(w for it in result.iterations for w in (it.merged, it.next_init)), result.weights(0.5)]
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["this film was"], return_tensors="pt")
    print(model(**ids).logits.double().sum().item())
assert "warp_lite" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *(str(tmp_path / name) for name in names)],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ids = result.task.tokenizer(["this film was"], return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for line, weights in zip(done.stdout.split(), expected, strict=True):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
            assert float(line) == pytest.approx(model(**ids).logits.double().sum().item(), rel=1e-5)


# --- the folder, and going on ---------------------------------------------------------------


def test_the_folder_has_what_its_description_says(policy, tokenizer, tmp_path):
    short_run(policy, tokenizer, out=tmp_path / "run")
    found = files(tmp_path / "run")
    for name in ("config.json", "prompts.json", "sft/model.safetensors", "sft/tokenizer.json",
                 "iteration-1/run-2/policy.safetensors", "iteration-1/run-2/anchor.safetensors",
                 "iteration-1/run-2/metrics.jsonl", "iteration-1/run-2/trajectory.jsonl", "iteration-1/run-2/DONE",
                 "iteration-1/merged/model.safetensors", "iteration-1/merged/tokenizer.json",
                 "iteration-2/next-init/config.json", "iteration-2/DONE"):
        assert name in found, name
    assert not [name for name in found if "state-" in name or ".part" in name or name.endswith((".bin", ".pkl", ".pt"))]
    rows = [json.loads(line) for line in found["iteration-2/run-1/metrics.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and {"reward", "kl_to_anchor", "lr"} <= rows[0].keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["config"]["seed"] == 0
    assert {"packages", "commit", "threads", "python"} <= config["provenance"].keys()
    AutoTokenizer.from_pretrained(tmp_path / "run" / "iteration-1" / "merged")


@pytest.fixture(scope="module")
def uninterrupted(policy_of, tokenizer, tmp_path_factory):
    """The bytes of every file of a run, by executor."""
    found = {}
    for executor in ("batched", "serial"):
        folder = tmp_path_factory.mktemp("whole") / executor
        short_run(policy_of("gpt2", dtype=torch.float32), tokenizer, out=folder, executor=executor)
        found[executor] = files(folder)
    return found


@pytest.mark.parametrize("executor, calls", [("batched", 1), ("batched", 3), ("batched", 4), ("batched", 5),
                                             ("batched", 8), ("serial", 2), ("serial", 6), ("serial", 11)])
def test_a_run_that_was_stopped_and_resumed_has_the_bytes_of_one_that_was_not(
        policy, tokenizer, tmp_path, uninterrupted, executor, calls):
    with pytest.raises(KeyboardInterrupt, match="step [1-4] of iteration [12] is saved in"):
        short_run(policy, tokenizer, out=tmp_path / "run", executor=executor, stop=stop_after(calls))
    assert files(tmp_path / "run") != uninterrupted[executor]
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, executor=executor)
    assert files(tmp_path / "run") == uninterrupted[executor]


def test_a_run_may_be_stopped_at_every_step_and_still_ends_with_the_same_bytes(
        policy, tokenizer, tmp_path, uninterrupted):
    stops = 0
    while True:
        try:
            short_run(policy, tokenizer, out=tmp_path / "run", resume=True, stop=stop_after(1))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == CONFIG.iterations * CONFIG.steps and files(tmp_path / "run") == uninterrupted["batched"]


def test_no_more_large_policies_share_a_program_than_are_worth_it(policy_of, tokenizer, tmp_path, monkeypatch):
    """On a CPU; and a run that was stopped in any of its programs goes on to the same bytes."""
    policy = policy_of("gpt2")  # in float64, as Adam makes steps of what a zero gradient is rounded to
    together, programs = short_run(policy, tokenizer, runs=5), []
    monkeypatch.setattr(memory, "WEIGHTS_AT_ONCE", 2 * bytes_of(parameters(policy)))
    train = BatchedTrainer.train
    monkeypatch.setattr(BatchedTrainer, "train", lambda self, runs, on_step: (
        programs.append([run.number for run in runs]), train(self, runs, on_step))[1])
    short_run(policy, tokenizer, out=tmp_path / "whole", runs=5)
    assert programs == 2 * [[1, 2], [3, 4], [5]]
    apart = load_result(tmp_path / "whole", reward=score)
    for one, other in zip(together.iterations, apart.iterations):
        for name, tensor in one.merged.items():
            torch.testing.assert_close(other.merged[name], tensor, atol=1e-7, rtol=1e-6)
    for calls in (2, 6, 9):  # in each of the first iteration's programs
        with pytest.raises(KeyboardInterrupt):
            short_run(policy, tokenizer, out=tmp_path / str(calls), runs=5, stop=stop_after(calls))
        short_run(policy, tokenizer, out=tmp_path / str(calls), runs=5, resume=True)
        assert files(tmp_path / str(calls)) == files(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "moved", runs=5, stop=stop_after(6))
    monkeypatch.setattr(memory, "WEIGHTS_AT_ONCE", 1)  # as on another machine, where not even one is
    short_run(policy, tokenizer, out=tmp_path / "moved", runs=5, resume=True)
    assert files(tmp_path / "moved") == files(tmp_path / "whole")
    del programs[:]
    short_run(policy, tokenizer, iterations=1)
    assert programs == [[1], [2]]


@pytest.mark.parametrize("calls", [2, 12, 20])
def test_a_run_that_crashed_goes_on_from_the_last_saved_step(
        policy, tokenizer, tmp_path, uninterrupted, monkeypatch, calls):
    """Killed in the midst of writing its folder: at the n-th log, state, policy or merge."""
    count = iter(range(10**6))

    def fragile(method):
        def wrapped(self, *args, **kwargs):
            if next(count) == calls:
                raise OSError("the disk is gone")
            return method(self, *args, **kwargs)
        return wrapped

    with monkeypatch.context() as patch:
        for name in ("append", "save_states", "finish_run", "write_start", "finish_iteration"):
            patch.setattr(RunFolder, name, fragile(getattr(RunFolder, name)))
        with pytest.raises(OSError, match="the disk is gone"):
            short_run(policy, tokenizer, out=tmp_path / "run")
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted["batched"]


def test_a_crash_between_two_runs_being_finished_keeps_the_bytes(
        policy, tokenizer, tmp_path, uninterrupted, monkeypatch):
    finish = RunFolder.finish_run

    def only_the_first(self, i, m, state):
        if m == 2:
            raise OSError("the disk is gone")
        finish(self, i, m, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_run", only_the_first)
        with pytest.raises(OSError):
            short_run(policy, tokenizer, out=tmp_path / "run")
    done = [(tmp_path / f"run/iteration-1/run-{m}/DONE").is_file() for m in (1, 2)]
    assert done == [True, False]
    # Run 2 goes on from its end: from an earlier step it would train alone, and might round otherwise.
    assert [path.name for path in (tmp_path / "run/iteration-1/run-2").glob("state-*")] == ["state-4.safetensors"]
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted["batched"]


def test_a_finished_folder_is_taken_up_without_training(policy, tokenizer, tmp_path, uninterrupted, monkeypatch):
    first = short_run(policy, tokenizer, out=tmp_path / "run")

    def refuse(*args):
        raise AssertionError("it trained again")

    monkeypatch.setattr("warp_lite.training.executors.train_batched", refuse)
    again = short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    assert_same_weights(again.weights(0.3), first.weights(0.3))
    assert again.trajectories == first.trajectories
    assert files(tmp_path / "run") == uninterrupted["batched"]


def test_resume_starts_a_run_where_there_is_none(policy, tokenizer, tmp_path, uninterrupted):
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted["batched"]


def test_without_a_folder_a_stop_stops_too(policy, tokenizer):
    with pytest.raises(KeyboardInterrupt, match="step 2 of iteration 1 was the last"):
        short_run(policy, tokenizer, stop=stop_after(2))


@pytest.fixture
def small_limit(monkeypatch):
    """A limit of few samples."""
    monkeypatch.setattr("warp_lite.evaluation.limit.LIMIT_SAMPLES", 64)


def test_the_same_seed_gives_the_same_front_json_and_another_seed_another(
        policy, tokenizer, tmp_path, small_limit, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = short_run(policy, tokenizer, out=tmp_path / name, seed=seed)
        complete_front(result, tmp_path / name, etas=(0.0, 0.5, 1.0))
    a, b, c = ((tmp_path / name / "front.json").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "front.png").read_bytes() == (tmp_path / "b" / "front.png").read_bytes()
    front = json.loads(a)
    assert {"points", "limit", "trajectories"} <= front.keys()
    assert {"iteration", "eta", "kl", "kl_se", "reward", "reward_se"} <= front["points"][0].keys()
    assert {"beta", "kl", "reward", "ess"} <= front["limit"][0].keys()


def test_a_front_is_drawn_again_without_being_measured_again(
        policy, tokenizer, tmp_path, small_limit, monkeypatch, capsys):
    result = short_run(policy, tokenizer, out=tmp_path / "run")
    complete_front(result, tmp_path / "run")
    before, printed = (tmp_path / "run" / "front.json").read_bytes(), capsys.readouterr().out
    (tmp_path / "run" / "front.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(type(result), "front", lambda *args: pytest.fail("it was measured again"))
        complete_front(result, tmp_path / "run", again=False)
    assert (tmp_path / "run" / "front.png").is_file() and capsys.readouterr().out == printed
    assert (tmp_path / "run" / "front.json").read_bytes() == before
    complete_front(result, tmp_path / "run", etas=(0.0, 1.0), again=False)
    assert (tmp_path / "run" / "front.json").read_bytes() != before, "other points must be measured"


def test_the_limits_samples_are_kept_for_a_reward_model_and_drawn_again_for_a_function(
        world, tmp_path, small_limit, monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path))
    result = run_warp(world.policy, world.tokenizer, world.reward, world.prompts.given, CONFIG.replace(steps=1),
                      eval_prompts=world.eval_prompts.given[:3], gold=world.gold, progress=False)
    first = limit_rewards(result.task)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("warp_lite.evaluation.limit.reference_rewards",
                      lambda *args, **kwargs: pytest.fail("it was sampled again"))
        assert all(torch.equal(a, b) for a, b in zip(limit_rewards(result.task), first))
    path.write_bytes(b"damaged")
    assert torch.equal(limit_rewards(result.task)[1], first[1])
    others = [dataclasses.replace(result.task, gold=None), dataclasses.replace(result.task, reward=score),
              result.task.measured_on(world.eval_prompts.given[3:5])]
    for task in others:
        other = limit_rewards(task)[0]
        assert not torch.equal(other, first[0]) or task.gold is None
    assert len(list(tmp_path.iterdir())) == 3, "one more without gold, one more on other prompts, none for a function"


def test_where_the_cache_cannot_be_written_the_limit_is_drawn_all_the_same(
        world, tmp_path, small_limit, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "file" / "cache"))
    result = run_warp(world.policy, world.tokenizer, world.reward, world.prompts.given, CONFIG.replace(steps=1),
                      eval_prompts=world.eval_prompts.given[:3], progress=False)
    rewards, _ = limit_rewards(result.task)
    assert len(rewards) == 3 and rewards.isfinite().all()
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warp-lite")]
    assert "drawn again next time" in line and "limit-" in line


# --- bad input: refused before anything is written ------------------------------------------


def nan_at(call):
    """A reward that is NaN at the third completion of its n-th call."""
    calls = iter(range(1, 10**6))

    def reward(prompts, completions):
        values = [1.0] * len(prompts)
        values[2] = float("nan") if next(calls) == call else 1.0
        return values
    return reward


BAD_INPUT = {
    "a reward with the wrong number of values": (
        {"reward": lambda prompts, completions: [1.0]}, ValueError, "returned 1 values for 3 completions"),
    "a reward that is no list": ({"reward": lambda prompts, completions: 1.0}, ValueError, "not a list of numbers"),
    "a reward that fails": (
        {"reward": lambda prompts, completions: [{}["x"]]}, ValueError, "failed on a first trial with KeyError"),
    "a reward that is not finite": (
        {"reward": nan_at(1)}, ValueError, "the reward is nan in iteration 1, run 1, step 1, .* of the prompt '"),
    "a reward that is no function": ({"reward": "length"}, TypeError, "a reward is str, not a function"),
    "rewards for other runs": ({"reward": [score] * 3}, ValueError, "3 rewards for 2 runs"),
    "no prompts": ({"prompts": []}, ValueError, "no prompts"),
    "one prompt": ({"prompts": ["this film"] * 9}, ValueError, "only one distinct prompt"),
    "no held-out prompts": ({"eval_prompts": []}, ValueError, "no prompts"),
    "a prompt too long": ({"prompts": [*PROMPTS, "this " * 36]}, ValueError, "prompt 12 has 37 tokens.*at most 35 fit"),
    "a held-out prompt too long": ({"eval_prompts": ["this " * 36]}, ValueError, "prompt 0 has 37 tokens"),
    "a prompt that is no text": ({"prompts": ["this", 7]}, TypeError, "prompt 1 is int"),
    "an unknown executor": ({"executor": "parallel"}, ValueError, "executor must be one of .*, not 'parallel'"),
}


def test_a_column_that_json_cannot_hold_is_refused_with_a_folder_only(policy, tokenizer, tmp_path):
    class Table(dict):
        column_names = ["prompt", "image"]

    prompts = Table(prompt=PROMPTS, image=[object()] * len(PROMPTS))
    with pytest.raises(ValueError, match="a column 'image' that a run folder cannot hold: .*object.*; keep text"):
        short_run(policy, tokenizer, prompts=prompts, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    short_run(policy, tokenizer, prompts=prompts, steps=1)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), np.float32("nan"), {"a": [float("nan")]}, {1: "a"},
                                   {1: "a", "b": 2}, {"a"}, b"a", len], ids=str)
def test_a_column_that_would_come_back_otherwise_is_refused_before_anything_is_written(
        policy, tokenizer, tmp_path, value):
    rows = [{"prompt": prompt, "note": value} for prompt in PROMPTS]
    with pytest.raises(ValueError, match="a column 'note' that a run folder cannot hold: it has .*; keep text, finite"):
        short_run(policy, tokenizer, prompts=rows, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, True, 10**30, 0.1, "\u2028\ud800", [1, [None]], {"a": {"b": [0.5, None]}}, {},
                                   np.int64(3), np.arange(2)], ids=repr)
def test_a_column_comes_back_as_the_reward_had_it(policy, tokenizer, tmp_path, value):
    had = []

    def noting(prompts, completions, note):
        had.extend(note)
        return [0.0] * len(completions)

    rows = [{"prompt": prompt, "note": value} for prompt in PROMPTS]
    short_run(policy, tokenizer, reward=noting, prompts=rows, out=tmp_path / "run", iterations=1, steps=1)
    again = load_result(tmp_path / "run", noting).task.eval_prompts.columns["note"]
    assert [*had, *again] == [again[0]] * len([*had, *again]) and type(had[0]) is type(again[0])


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_is_written(policy, tokenizer, tmp_path, case):
    settings, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        short_run(policy, tokenizer, out=tmp_path / "run", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_with_nan_weights_is_refused_by_name(policy, tokenizer, tmp_path):
    with torch.no_grad():
        policy.transformer.h[1].mlp.c_fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights in 'transformer.h.1.mlp.c_fc.bias'"):
        short_run(policy, tokenizer, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_is_nan_later_is_named_by_run_step_and_prompt(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="nan in iteration 1, run 2, step 3, for a completion of the prompt 'th"):
        short_run(policy, tokenizer, [score, nan_at(3)], eval_every=0)


@pytest.mark.parametrize("arguments, error, message", [
    ({"policy": 7}, TypeError, "policy is int"), ({"tokenizer": None}, TypeError, "needs tokenizer"),
    ({"reward": None, "prompts": None}, TypeError, "needs reward and prompts"),
    ({"config": {"steps": 3}}, TypeError, "config is dict; pass a WarpConfig"),
    ({"policy": "no/such/folder"}, ValueError, "cannot load a policy from 'no/such/folder'")])
def test_arguments_that_are_none_of_algorithm_1_are_refused(policy, tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        run_warp(**{"policy": policy, "tokenizer": tokenizer, "reward": score, "prompts": PROMPTS, **arguments})


@pytest.mark.parametrize("call, message", [
    (lambda r: r.weights(toward="home"), "toward must be 'sft' or 'init'"),
    (lambda r: r.weights(iteration=3), "1 to 2"), (lambda r: r.weights(iteration=0), "1 to 2"),
    (lambda r: r.weights(-0.1), "eta is -0.1"),
    (lambda r: r.front(etas=()), "at least one eta"), (lambda r: r.front(prompts=[]), "no prompts")])
def test_points_that_are_not_on_a_front_are_refused(result, call, message):
    with pytest.raises(ValueError, match=message):
        call(result)
