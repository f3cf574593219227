"""Many settings and seeds in one program give what single runs give."""

import pytest
import torch

from warp_lite.averaging.liti import liti
from warp_lite.config import WarpConfig
from warp_lite.experiment import policies_that_fit, run_experiment
from warp_lite.launch import run_warp
from warp_lite.storage.files import read_json
from warp_lite.task import Task
from warp_lite.training.batched import train_batched
from warp_lite.training.memory import training_memory

PROMPTS = ["this film was", "that plot was", "this plot is", "but that film is"]
CONFIG = WarpConfig(iterations=2, runs=2, steps=3, batch_size=2, max_new_tokens=6, eval_every=2)


def length_reward(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def word_reward(prompts, completions, **kwargs):
    return [float(text.count("e")) for text in completions]


@pytest.fixture
def policy(gpt2_policy, tokenizer):
    return gpt2_policy, tokenizer


def experiment(policy, configs, seeds, **options):
    return run_experiment(task_of(policy), configs, seeds, progress=False, **options)


def task_of(policy, reward=length_reward):
    return Task.of(*policy, reward, PROMPTS, PROMPTS[:2], max_new_tokens=CONFIG.max_new_tokens)


def test_every_setting_and_seed_equals_a_run_of_its_own(policy):
    configs = {"slow": CONFIG.replace(lr=1e-3), "lerp": CONFIG.replace(lr=2e-3, merge="lerp", beta=0.1),
               "short": CONFIG.replace(steps=2, iterations=1)}
    together = experiment(policy, configs, (3, 4))
    for name, config in configs.items():
        for seed, result in zip((3, 4), together.results[name]):
            alone = run_warp(*policy, length_reward, PROMPTS, config.replace(seed=seed), eval_prompts=PROMPTS[:2],
                             progress=False)
            assert len(result.iterations) == config.iterations
            for ours, theirs in zip(result.iterations, alone.iterations):
                for tensor, other in zip(ours.merged.values(), theirs.merged.values()):
                    torch.testing.assert_close(tensor, other, rtol=0, atol=1e-9)
                for tensor, other in zip(ours.next_init.values(), theirs.next_init.values()):
                    torch.testing.assert_close(tensor, other, rtol=0, atol=1e-9)


def test_fronts_have_a_row_for_every_setting_seed_iteration_and_eta(policy):
    together = experiment(policy, {"a": CONFIG, "b": CONFIG.replace(lr=1e-3)}, (0, 1))
    rows = together.front_rows(etas=(0, 0.5, 1), samples=1)
    places = {(row["config"], row["seed"], row["iteration"], row["eta"]) for row in rows}
    assert len(rows) == len(places) == 2 * 2 * 2 * 3
    assert all(abs(row["kl"]) < 1e-6 for row in rows if row["eta"] == 0)
    assert all(row["kl"] > 0 for row in rows if row["eta"] == 1)


def test_trajectories_are_measured_when_their_turn_comes(policy):
    rows = experiment(policy, {"a": CONFIG}, (0,)).trajectory_rows()
    assert [(row["iteration"], row["run"], row["step"]) for row in rows] == [
        (i, m, step) for i in (1, 2) for m in (1, 2) for step in (2, 3)]


def test_a_setting_can_have_rewards_of_its_own(policy):
    configs = {"length": CONFIG, "mixed": CONFIG}
    together = experiment(policy, configs, (0,), rewards={"mixed": [length_reward, word_reward]})
    length, mixed = (together.results[name][0].iterations[0].policies for name in configs)
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(length, mixed)]
    assert same == [True, False]
    with pytest.raises(ValueError, match="1 rewards for the 2 runs of 'mixed'"):
        experiment(policy, configs, (0,), rewards={"mixed": [length_reward]})


def test_a_run_that_settings_share_trains_once_and_each_gets_all_of_it(policy):
    scored = []

    def counting(prompts, completions, completion_ids, **kwargs):
        scored.append(len(completions))
        return length_reward(prompts, completions, completion_ids)

    config = CONFIG.replace(iterations=1, lr=1e-3)
    configs = {"four": config.replace(runs=4), "two": config, "lerp": config.replace(merge="lerp", eta=0.1)}
    kept = []
    together = run_experiment(task_of(policy, counting), configs, (0,), progress=False,
                              checkpoints=lambda *place: kept.append(place))
    measured = 4 * 2 * 2  # runs, times measured, prompts
    assert sum(scored) == 4 * config.steps * config.batch_size + measured
    alone = experiment(policy, {"lerp": configs["lerp"]}, (0,))
    ours, theirs = (some.results["lerp"][0].weights() for some in (together, alone))
    for tensor, other in zip(ours.values(), theirs.values()):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-9)
    assert [len(together.results[name][0].trajectories) for name in configs] == [8, 4, 4]
    assert len(kept) == 16 and {place[:2] for place in kept} == {(name, 0) for name in configs}
    last = next(weights for name, _, _, run, step, weights in kept if (name, run, step) == ("two", 2, 3))
    for name, tensor in together.results["two"][0].iterations[0].policies[1].items():
        assert torch.equal(tensor, last[name])


def test_the_outer_step_can_be_another_and_runs_may_start_apart(policy):
    config = CONFIG.replace(lr=1e-3, eta=0.5)

    def plain(result, run):
        return liti(result.iterations[-1].init, result.iterations[-1].merged, 0.5)

    def apart(result, run):
        return liti(result.iterations[-1].init, result.iterations[-1].merged, (0.2, 0.6)[run - 1])

    found = experiment(policy, {"own": config, "plain": config, "apart": config}, (0,),
                       starts={"plain": plain, "apart": apart}).results
    own, plain_, apart_ = (found[name][0] for name in ("own", "plain", "apart"))
    for name, tensor in own.weights().items():
        torch.testing.assert_close(tensor, plain_.weights()[name], rtol=0, atol=1e-9)
    middle = liti(own.sft, own.iterations[0].merged, 0.4)  # the mean of 0.2 and 0.6
    for name, tensor in apart_.iterations[1].init.items():
        torch.testing.assert_close(tensor, middle[name], rtol=0, atol=1e-6)
        assert torch.equal(tensor, apart_.iterations[0].next_init[name])


def test_an_experiment_needs_settings_and_seeds(policy):
    for configs, seeds in (({}, (0,)), ({"a": CONFIG}, ())):
        with pytest.raises(ValueError, match="at least one setting and one seed"):
            experiment(policy, configs, seeds)


def test_runs_that_do_not_fit_in_memory_together_train_one_after_the_other(policy, monkeypatch, capsys):
    config = CONFIG.replace(iterations=1)
    together = run_warp(*policy, length_reward, PROMPTS, config, eval_prompts=PROMPTS[:2], progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("warp_lite.training.memory.free_memory", lambda device: 1000)
    apart = run_warp(*policy, length_reward, PROMPTS, config, eval_prompts=PROMPTS[:2], progress=False)
    assert "they train one after the other" in capsys.readouterr().err
    for tensor, other in zip(together.weights(1.0).values(), apart.weights(1.0).values()):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-9)


def test_runs_are_kept_in_a_folder_and_a_second_call_trains_only_what_is_missing(policy, tmp_path, monkeypatch):
    configs = {"a": CONFIG, "b": CONFIG.replace(lr=1e-3)}
    whole = experiment(policy, configs, (0, 1))
    first = experiment(policy, configs, (0, 1), out=tmp_path)
    files = sorted(tmp_path.glob("run-*.safetensors"))
    assert len(files) == 2 * 2 * 2 * 2 and len(list(tmp_path.iterdir())) == 2 * len(files)
    trained = []

    def counted(model, tokenizer, prompts, runs, on_step):
        trained.extend(runs)
        return train_batched(model, tokenizer, prompts, runs, on_step)

    monkeypatch.setattr("warp_lite.experiment.train_batched", counted)
    monkeypatch.setattr("warp_lite.experiment.policies_that_fit", lambda *a: 1)
    again = experiment(policy, configs, (0, 1), out=tmp_path)
    assert not trained
    of_last = [file for file in files if read_json(file.with_suffix(".json"))["trajectory"][0]["iteration"] == 2]
    of_last[0].unlink()  # on the others none depends: one that trains alone rounds otherwise
    part = experiment(policy, configs, (0, 1), out=tmp_path)
    assert len(trained) == 1
    for other, tolerance in ((first, 0), (again, 0), (part, 1e-9)):
        for ours, theirs in zip(other.trajectory_rows(), whole.trajectory_rows(), strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance)
        for name in configs:
            for ours, theirs in zip(other.results[name], whole.results[name]):
                for one, two in zip(ours.iterations, theirs.iterations):
                    for a, b in zip([one.merged, *one.policies, *one.anchors],
                                    [two.merged, *two.policies, *two.anchors]):
                        for tensor in b:
                            torch.testing.assert_close(a[tensor], b[tensor], rtol=0, atol=tolerance)
    trained.clear()
    experiment(policy, {"a": CONFIG.replace(iterations=1, seed=9)}, (0,), out=tmp_path)  # what no single run sees
    assert not trained
    experiment(policy, {"a": CONFIG.replace(beta=0.2)}, (0,), out=tmp_path)
    assert len(trained) == 4
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run-.*safetensors.*remove it to train that run again"):
        experiment(policy, configs, (0, 1), out=tmp_path)


def test_no_more_runs_train_together_than_fit_in_memory(policy, monkeypatch):
    task = task_of(policy)
    one = training_memory(task.policy, 1, CONFIG.batch_size, task.prompts.ids.shape[-1], CONFIG.max_new_tokens).total
    for free, count in ((0, 1), (3.1 * one, 2), (10**15, 128)):
        monkeypatch.setattr("warp_lite.experiment.free_memory", lambda device, free=free: free)
        assert policies_that_fit(task, CONFIG) == count
    size = sum(tensor.nbytes for tensor in task.sft.values())
    for at_once, count in ((5 * size, 5), (size - 1, 1)):  # what large policies would gain together is memory alone
        monkeypatch.setattr("warp_lite.training.memory.WEIGHTS_AT_ONCE", at_once)
        assert policies_that_fit(task, CONFIG) == count
