"""The benchmark's own step is the library's: it must go on running when the library changes."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

from warp_lite.policies import encode_prompts

BENCH = Path(__file__).parent / "benchmarks" / "bench.py"


def test_the_step_that_is_timed_trains_every_policy_and_moves_its_anchor(policy_of, tokenizer):
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model = policy_of("gpt2", dtype=torch.float32, n_positions=40)
    world = SimpleNamespace(
        policy=model, tokenizer=tokenizer, prompts=encode_prompts(tokenizer, ["this film was", "that plot was"]),
        reward=lambda prompts, completions, completion_ids: [float(len(set(ids))) for ids in completion_ids])
    step = bench.PolicyStep(world, model, policies=2, batch=4)
    before = step.ensemble.flat.clone()
    for _ in range(2):
        step()
    assert step.steps == 2 and (step.ensemble.flat - before).norm(dim=1).min() > 0
    assert 0 < (step.anchor.flat - before).norm() < (step.ensemble.flat - before).norm()
    assert step.operations() > 0
