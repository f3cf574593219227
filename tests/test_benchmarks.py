"""The benchmark's own step is the library's: it must go on running when the library changes."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from warp_lite.policies import encode_prompts
from warp_lite.rewards.bradley_terry import BradleyTerry

BENCH = Path(__file__).parent / "benchmarks" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_step_that_is_timed_trains_every_policy_and_moves_its_anchor(bench, policy_of, tokenizer):
    model = policy_of("gpt2", dtype=torch.float32, n_positions=40)
    reward = BradleyTerry(GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2,
                                               bos_token_id=1, eos_token_id=2)), tokenizer)
    reward.head = torch.randn_like(reward.head)
    world = SimpleNamespace(
        policy=model, tokenizer=tokenizer, prompts=encode_prompts(tokenizer, ["this film was", "that plot was"]),
        reward=reward)
    step = bench.PolicyStep(world, model, policies=2, batch=4)
    before = step.ensemble.flat.clone()
    for _ in range(2):
        step()
    assert step.steps == 2 and (step.ensemble.flat - before).norm(dim=1).min() > 0
    assert 0 < (step.anchor.flat - before).norm() < (step.ensemble.flat - before).norm()
    parts = step.parts(1)
    assert step.steps == 4 and [part["part"] for part in parts] == list(step.operations()) == list(step.bytes_moved())
    assert all(part["seconds"] > 0 and part["by_bytes"] > 0 for part in parts)
    assert sum(part["by_operations"] > 0 for part in parts) == 4  # an update has no matrix products
    operations = step.operations()
    assert operations["rewards"] < operations["sampling"] / 2  # one layer, and no head, where the policy has two


def test_the_parts_of_a_step_are_held_against_the_least_that_they_take(bench):
    parts = [{"part": "sampling", "seconds": 0.03, "by_operations": 0.01, "by_bytes": 0.02},
             {"part": "update", "seconds": 0.01, "by_operations": 0.0, "by_bytes": 0.01}]
    text = bench.table({"steps": {"provenance": {"commit": "aaa"}, "rows": [
        bench.row("a step", 1.0, 3.0, None), {"name": "a step of 2 policies", "parts": parts}]}})
    assert "Where a step of 2 policies goes, 40 ms." in text and text.count("| a step") == 1
    assert "| sampling | 30 | 75% | 10 | 20 | 1.5 |" in text and "| update | 10 | 25% | 0 | 10 | 1.0 |" in text


def test_the_table_says_what_was_missed_and_which_commit_measured_what(bench):
    faster = bench.row("a step", 1.0, 3.0, 2.0)
    slower = {"name": "a run", "value": 1.5, "unit": "×", "target": 1.05, "at_most": True, "met": False}
    text = bench.table({"merge": {"provenance": {"commit": "bbb"}, "rows": [slower]},
                        "steps": {"provenance": {"commit": "aaa"}, "rows": [faster]},
                        "growth": {"provenance": {"commit": "aaa"}, "growth": {}}})
    assert text.splitlines()[2:] == [
        "| a step | 3.00 × faster | 2 met | 1000.0 ms against 3000.0 ms |",
        "| a run | 1.50 × | at most 1.05 **missed** |  |", "",
        "Measured at commit aaa: steps, growth.", "Measured at commit bbb: merge."]


def test_growth_is_drawn_for_one_policy_and_one_eta(bench):
    measured = {key: [(1, 0.2), (2, 0.3), (4, 0.6)] for key in ("E", "batch", "length", "M", "bytes", "etas")}
    panels = bench.draw_growth(measured).axes
    drawn = [[round(y, 6) for y in axes.lines[0].get_ydata()] for axes in panels]
    of_each, of_four, whole = [200.0, 150.0, 150.0], [50.0, 75.0, 150.0], [0.2, 0.3, 0.6]
    assert drawn == [of_each, of_four, of_four, whole, whole, of_each]
