"""Stage 3: interpolation towards the initialisation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warp_lite.averaging.liti import liti
from warp_lite.averaging.slerp import slerp, task_vector

INIT = {"w": torch.tensor([1.0, -2.0, 4.0]), "b": torch.tensor([[0.5]])}
THETA = {"w": torch.tensor([2.0, -2.0, 0.0]), "b": torch.tensor([[1.5]])}


def test_liti_at_three_tenths_stays_closer_to_the_init():
    """η = ½ would not show a reversed coefficient; 0.3 does."""
    result = liti(INIT, THETA, 0.3)
    torch.testing.assert_close(result["w"], torch.tensor([1.3, -2.0, 2.8]))
    assert not torch.allclose(result["w"], liti(THETA, INIT, 0.3)["w"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_liti_is_exact_to_the_bit_at_both_ends(dtype):
    generator = torch.Generator().manual_seed(0)
    init, theta = ({"w": (10.0 ** e * torch.randn(999, generator=generator)).to(dtype)} for e in (0, -3))
    assert torch.equal(liti(init, theta, 0)["w"], init["w"])
    assert torch.equal(liti(init, theta, 1)["w"], theta["w"])
    assert torch.equal(liti(init, init, 0.3)["w"], init["w"])


def test_liti_past_one_extrapolates():
    torch.testing.assert_close(liti(INIT, THETA, 2)["w"], torch.tensor([3.0, -2.0, -4.0]))


def test_slerp_then_liti_is_the_task_vector_of_slerp_scaled():
    policies = [THETA, {"w": torch.tensor([0.0, 1.0, 4.0]), "b": torch.tensor([[0.0]])}]
    merged = slerp(INIT, policies)
    shortened = task_vector(liti(INIT, merged, 0.3), INIT)
    for name, delta in task_vector(merged, INIT).items():
        torch.testing.assert_close(shortened[name], 0.3 * delta)


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
def test_liti_refuses_an_eta_that_is_negative_or_not_finite(eta):
    with pytest.raises(ValueError, match=rf"eta is {eta}"):
        liti(INIT, THETA, eta)


def test_liti_names_a_result_that_overflows_its_dtype():
    small, large = ({"w": torch.tensor([x], dtype=torch.float16)} for x in (-60000.0, 60000.0))
    with pytest.raises(ValueError, match="'w' overflows torch.float16; use a smaller eta"):
        liti(small, large, 1.5)


pairs = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=150)
@given(pairs, st.floats(0, 3))
def test_liti_is_on_the_line_finite_and_leaves_its_inputs(pairs, eta):
    init, theta = ({"w": torch.tensor(column, dtype=torch.float64)} for column in zip(*pairs))
    before = init["w"].clone(), theta["w"].clone()
    result = liti(init, theta, eta)["w"]
    torch.testing.assert_close(result, (1 - eta) * init["w"] + eta * theta["w"], atol=1e-8, rtol=1e-9)
    assert torch.isfinite(result).all()
    assert torch.equal(init["w"], before[0]) and torch.equal(theta["w"], before[1])
    if eta <= 1:
        assert (result >= torch.minimum(*before) - 1e-9).all()
        assert (result <= torch.maximum(*before) + 1e-9).all()
