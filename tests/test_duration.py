"""What is said of the time that training will take."""

import re
from itertools import count

import pytest
from short_run import CONFIG, PROMPTS, score, short_run

from warp_lite import WarpConfig, launch, run_warp
from warp_lite.training import duration
from warp_lite.training.duration import Duration, expected_duration, forwards, spoken


def test_a_step_is_sampling_and_forwards_of_all_runs_over_their_number(world, monkeypatch):
    ticks = count()
    monkeypatch.setattr(duration.time, "perf_counter", lambda: float(next(ticks)))  # sampling 1 s, scoring 1 s
    config = WarpConfig(iterations=2, runs=3, steps=10, batch_size=4, eval_every=0)
    alone, together = expected_duration(world, config, "serial"), expected_duration(world, config, "batched", at_once=8)
    assert (alone.steps, alone.step_seconds, alone.seconds) == (60, 5.0, 300.0)
    assert (together.steps, together.step_seconds) == (60, pytest.approx(5 / 3))
    measured = expected_duration(world, config.replace(eval_every=5), "batched", at_once=3)
    completions = len(world.eval_prompts) * -(-duration.TRAJECTORY_SAMPLES // len(world.eval_prompts))
    assert measured.measured_seconds == 2 * 3 * 2 * (1 + 2) * completions / min(duration.SOME, completions)
    assert measured.seconds == pytest.approx(100 + measured.measured_seconds)


def test_what_is_computed_again_counts_and_an_anchor_that_is_not_asked_does_not():
    config = WarpConfig(beta=0.1, batch_size=8)
    assert [forwards(config), forwards(config.replace(beta=0.0)), forwards(config.replace(checkpointing=True)),
            forwards(config.replace(micro_batch=4)), forwards(config.replace(micro_batch=8))] == [4, 3, 5, 5, 4]


def test_a_time_is_said_as_a_person_says_it():
    assert [spoken(s) for s in (9, 119, 120, 7199, 7200, 36000, 90000)] == [
        "9 seconds", "119 seconds", "2 minutes", "120 minutes", "2.0 hours", "10 hours", "25 hours"]
    assert str(Duration(200, 0.5, 0)) == "about 100 seconds by a first trial: 200 policy steps of 0.5 s"
    assert "200 policy steps of 123 s" in str(Duration(200, 123.4, 0))
    assert str(Duration(200, 3, 300)).endswith("200 policy steps of 3 s and 5 minutes to measure them")


@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_long_training_is_announced_before_anything_is_written(gpt2_policy, tokenizer, executor, monkeypatch, tmp_path,
                                                               capsys):
    monkeypatch.setattr(launch, "WORTH_SAYING", 0.0)
    short_run(gpt2_policy, tokenizer, out=tmp_path / "quiet", executor=executor)
    assert "training takes" not in capsys.readouterr().err

    def refuse(path):
        raise ValueError(f"{path.exists()}")

    monkeypatch.setattr(launch, "locked", refuse)
    with pytest.raises(ValueError, match="False"):
        run_warp(gpt2_policy, tokenizer, score, PROMPTS, CONFIG, tmp_path / "run", executor=executor)
    steps = CONFIG.iterations * CONFIG.runs * CONFIG.steps
    assert re.search(rf"warp-lite: training takes about \d+ seconds by a first trial: {steps} policy steps of ",
                     capsys.readouterr().err)


def test_short_training_is_not(gpt2_policy, tokenizer, tmp_path, capsys):
    run_warp(gpt2_policy, tokenizer, score, PROMPTS, CONFIG.replace(iterations=1), tmp_path / "run")
    assert "training takes" not in capsys.readouterr().err
