"""Stage 1: the moving-average anchor."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warp_lite.averaging.ema import EMAAnchor


def trajectory(steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(steps + 1, 3, 4, generator=generator, dtype=torch.float64).cumsum(0).to(dtype)
    return [{"w": point, "b": point[0]} for point in walk]


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_the_anchor_is_the_closed_form_of_its_recursion(mu):
    """θ_ema after t steps = (1−μ)^t θ_0 + μ Σ_s (1−μ)^(t−s) θ_s."""
    points = trajectory(50)
    anchor = EMAAnchor(points[0], mu)
    for point in points[1:]:
        anchor.update(point)
    for name in ("w", "b"):
        expected = (1 - mu) ** 50 * points[0][name]
        for step in range(1, 51):
            expected = expected + mu * (1 - mu) ** (50 - step) * points[step][name]
        torch.testing.assert_close(anchor.state_dict()[name], expected, atol=1e-12, rtol=1e-12)


def test_the_anchor_mixes_as_trl_mixes_its_reference_model():
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    pytest.importorskip("accelerate").Accelerator(cpu=True)  # the callback reads its state
    policy, reference = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    reference.load_state_dict(policy.state_dict())
    anchor = EMAAnchor(policy.state_dict(), 0.01)
    callback = callbacks.SyncRefModelCallback(ref_model=reference, accelerator=None)
    arguments = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.01)
    for step in range(1, 51):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        callback.on_step_end(arguments, SimpleNamespace(global_step=step), None, model=policy)
        anchor.update(dict(policy.named_parameters()))
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(anchor.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_anchor_moves_with_updates_and_only_with_updates():
    """The defects of an anchor that never moves, and of one that is the policy itself."""
    policy = torch.nn.Linear(3, 2)
    anchor = EMAAnchor(dict(policy.named_parameters()), mu=0.5)
    start = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    with torch.no_grad():
        policy.weight += 1  # in place, as an optimiser steps
    assert torch.equal(anchor.state_dict()["weight"], start["weight"])
    anchor.update(dict(policy.named_parameters()))
    torch.testing.assert_close(anchor.state_dict()["weight"], start["weight"] + 0.5)
    with torch.no_grad():
        policy.weight += 1
    torch.testing.assert_close(anchor.state_dict()["weight"], start["weight"] + 0.5)
    assert policy.weight.requires_grad and not anchor.average["weight"].requires_grad


def test_at_mu_one_the_anchor_equals_the_policy_and_still_shares_no_memory_with_it():
    points = trajectory(2, torch.float32)
    anchor = EMAAnchor(points[0], 1.0)
    anchor.update(points[1])
    assert torch.equal(anchor.average["w"], points[1]["w"])
    points[1]["w"].zero_()
    assert not torch.equal(anchor.average["w"], points[1]["w"])


def test_state_dict_is_a_copy_that_later_updates_leave_alone():
    points = trajectory(1)
    anchor = EMAAnchor(points[0], 0.5)
    first = anchor.state_dict()
    anchor.update(points[1])
    assert torch.equal(first["w"], points[0]["w"])
    first["w"].zero_()
    assert not torch.equal(anchor.state_dict()["w"], first["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_increments_too_small_for_the_policys_dtype_are_not_lost(dtype):
    start, policy = {"w": torch.full((5,), 1.0, dtype=dtype)}, {"w": torch.full((5,), 1.02, dtype=dtype)}
    anchor = EMAAnchor(start, 0.01)
    naive = start["w"].clone()
    for _ in range(100):
        anchor.update(policy)
        naive.lerp_(policy["w"], 0.01)
    gap = policy["w"].double() - 1
    torch.testing.assert_close(anchor.average["w"].double(), 1 + gap * (1 - 0.99 ** 100), atol=1e-5, rtol=0)
    assert torch.equal(naive, start["w"])  # an average in the policy's own dtype never leaves
    assert anchor.average["w"].dtype == torch.float32
    assert anchor.state_dict()["w"].dtype == dtype and not torch.equal(anchor.state_dict()["w"], start["w"])


def test_tied_tensors_stay_tied_and_are_updated_once():
    weight = torch.zeros(4)
    anchor = EMAAnchor({"wte": weight, "lm_head": weight}, 0.5)
    new = torch.ones(4)
    anchor.update({"wte": new, "lm_head": new})
    state = anchor.state_dict()
    assert state["wte"].tolist() == [0.5] * 4
    assert state["wte"].data_ptr() == state["lm_head"].data_ptr()


def test_integer_buffers_are_carried_and_must_not_change():
    anchor = EMAAnchor({"w": torch.zeros(2), "mask": torch.tensor([True, False])}, 0.5)
    anchor.update({"w": torch.ones(2), "mask": torch.tensor([True, False])})
    assert anchor.state_dict()["mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match="'mask'.*buffer"):
        anchor.update({"w": torch.ones(2), "mask": torch.tensor([True, True])})


@pytest.mark.parametrize("mu", [-0.01, 1.01, math.nan, math.inf])
def test_mu_outside_zero_to_one_is_refused(mu):
    with pytest.raises(ValueError, match=rf"mu is {mu}"):
        EMAAnchor({"w": torch.zeros(2)}, mu)


def test_a_policy_that_does_not_fit_the_anchor_is_refused():
    anchor = EMAAnchor({"w": torch.zeros(2)}, 0.5)
    for params, words in (({}, "'w'"), ({"w": torch.zeros(2), "v": torch.zeros(2)}, "'v'"),
                          ({"w": torch.zeros(3)}, r"\(3,\)"), ({"w": torch.zeros(2).double()}, "float64")):
        with pytest.raises(ValueError, match=words):
            anchor.update(params)
    with pytest.raises(ValueError, match="'w'.*NaN"):
        EMAAnchor({"w": torch.tensor([math.nan])}, 0.5)


points = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)


@settings(deadline=None, max_examples=100)
@given(st.lists(points, min_size=2, max_size=8), st.floats(0, 1))
def test_the_anchor_stays_among_the_points_it_has_seen(path, mu):
    states = [{"w": torch.tensor(point, dtype=torch.float64)} for point in path]
    anchor = EMAAnchor(states[0], mu)
    for state in states[1:]:
        before = state["w"].clone()
        anchor.update(state)
        assert torch.equal(state["w"], before)
    seen, average = torch.stack([state["w"] for state in states]), anchor.state_dict()["w"]
    assert torch.isfinite(average).all()
    assert (average >= seen.amin(0) - 1e-6).all() and (average <= seen.amax(0) + 1e-6).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(points, min_size=2, max_size=8), st.floats(0, 1))
def test_the_anchor_is_the_sum_of_its_policies_with_weights_that_fall_geometrically(path, mu):
    states = [torch.tensor(point, dtype=torch.float64) for point in path]
    anchor = EMAAnchor({"w": states[0]}, mu)
    for state in states[1:]:
        anchor.update({"w": state})
    n = len(states) - 1
    expected = (1 - mu) ** n * states[0] + sum(mu * (1 - mu) ** (n - k) * states[k] for k in range(1, n + 1))
    torch.testing.assert_close(anchor.state_dict()["w"], expected, atol=1e-7, rtol=1e-9)
