"""Random numbers belong to a run and a step."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from warp_lite.policies.randomness import (
    EVALUATION,
    PROMPT_ORDER,
    TOKENS,
    WORLD,
    generator,
    prompt_indices,
    token_uniforms,
)


@pytest.mark.parametrize("batch, prompts", [(4, 12), (5, 12), (8, 3), (7, 7), (1, 2)])
def test_every_prompt_is_seen_once_an_epoch(batch, prompts):
    """Also where batches and epochs do not end together, and where one batch holds several epochs."""
    steps = 3 * prompts
    seen = np.concatenate([prompt_indices((0, 1, 1), step, batch, prompts) for step in range(steps)])
    for epoch in range(len(seen) // prompts):
        assert sorted(seen[epoch * prompts:(epoch + 1) * prompts]) == list(range(prompts))


def test_every_epoch_has_an_order_of_its_own():
    epochs = {tuple(prompt_indices((0, 1, 1), step, 50, 50)) for step in range(20)}
    assert len(epochs) == 20


RUNS = [(seed, iteration, run) for seed in range(3) for iteration in (1, 2) for run in (1, 2, 3, 4)]


def test_two_runs_see_the_prompts_in_different_orders():
    """With one order for all, the M policies are nearly identical and averaging them gains nothing."""
    assert len({tuple(prompt_indices(key, 0, 30, 30)) for key in RUNS}) == len(RUNS)


def test_two_runs_draw_different_tokens_even_on_the_same_prompts():
    numbers = torch.stack([token_uniforms(key, 0, 4, 6) for key in RUNS])
    assert len(numbers.unique()) == numbers.numel()


def test_no_two_uses_share_a_stream():
    keys = [(*key, use) for key in itertools.product(range(3), range(3), range(3), range(5))
            for use in (PROMPT_ORDER, TOKENS, EVALUATION, WORLD)]
    first = {generator(*key).random() for key in keys}
    assert len(first) == len(keys)


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before():
    """So an interrupted run goes on as if it had not been, without a saved generator."""
    alone = token_uniforms((3, 2, 1), 17, 4, 6), prompt_indices((3, 2, 1), 17, 4, 9)
    torch.manual_seed(123)
    np.random.seed(123)
    for step in reversed(range(20)):
        again = token_uniforms((3, 2, 1), step, 4, 6), prompt_indices((3, 2, 1), step, 4, 9)
        if step == 17:
            assert torch.equal(alone[0], again[0]) and (alone[1] == again[1]).all()
    state = torch.get_rng_state()
    token_uniforms((3, 2, 1), 17, 4, 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_numbers_of_a_run_are_uniform_and_differ_between_steps():
    numbers = torch.stack([token_uniforms((0, 1, 1), step, 16, 24) for step in range(50)])
    assert numbers.dtype == torch.float64 and (numbers >= 0).all() and (numbers < 1).all()
    assert len(numbers.unique()) == numbers.numel()
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
