"""What holds for all weight arithmetic: precision, ties, buffers, aliasing, errors."""

import math

import pytest
import torch

from warp_lite.averaging.liti import liti
from warp_lite.averaging.slerp import angles, lerp, slerp, task_vector

OPERATIONS = {
    "slerp": slerp,
    "lerp": lerp,
    "liti": lambda init, policies: liti(init, policies[1], 0.3),
    "task_vector": lambda init, policies: task_vector(policies[1], init),
}
LABELS = {"slerp": r"policies\[1\]", "lerp": r"policies\[1\]", "liti": "theta", "task_vector": "theta"}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def random_model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in (("h.0.attn.weight", (5, 7)), ("h.0.attn.bias", (7,)), ("scale", ()))}


def models(dtype=torch.float32):
    return random_model(0, dtype), [random_model(1, dtype), random_model(2, dtype)]


@each_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_keeps_dtypes_and_is_computed_in_at_least_float32(name, dtype):
    init, policies = models(dtype)
    result = OPERATIONS[name](init, policies)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = OPERATIONS[name]({k: t.to(wide) for k, t in init.items()},
                                [{k: t.to(wide) for k, t in policy.items()} for policy in policies])
    for key in init:
        assert result[key].dtype == dtype and result[key].shape == init[key].shape
        assert torch.equal(result[key], expected[key].to(dtype))


@each_operation
def test_inputs_are_unchanged_and_results_share_no_memory_with_them(name):
    init, policies = models()
    policies[0]["scale"] = policies[1]["scale"] = init["scale"]  # a tensor that did not move
    states = [init, *policies]
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
    for tensor in OPERATIONS[name](init, policies).values():
        tensor.fill_(7)
    for state, old in zip(states, before):
        assert all(torch.equal(state[key], old[key]) for key in old)


@each_operation
def test_parameters_that_require_gradients_give_plain_tensors(name):
    init, policies = models()
    init, *policies = [{key: torch.nn.Parameter(tensor) for key, tensor in state.items()}
                       for state in (init, *policies)]
    for tensor in OPERATIONS[name](init, policies).values():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad


@each_operation
def test_tensors_tied_in_init_are_tied_in_the_result(name):
    init, policies = models()
    for state in (init, *policies):
        state["lm_head"] = state["h.0.attn.weight"]
    result = OPERATIONS[name](init, policies)
    assert result["lm_head"].data_ptr() == result["h.0.attn.weight"].data_ptr()
    assert result["scale"].data_ptr() != result["h.0.attn.bias"].data_ptr()
    policies[1]["lm_head"] = policies[1]["lm_head"] + 1
    with pytest.raises(ValueError, match=f"{LABELS[name]} has different values for 'h.0.attn.weight' and 'lm"):
        OPERATIONS[name](init, policies)


@each_operation
def test_views_of_one_storage_that_are_not_the_same_view_are_not_tied(name):
    init, policies = models()
    for state in (init, *policies):
        both = torch.randn(2, 7)
        state["first"], state["second"] = both[0], both[1]
    result = OPERATIONS[name](init, policies)
    alone = OPERATIONS[name]({"second": init["second"]}, [{"second": p["second"]} for p in policies])
    assert torch.equal(result["second"], alone["second"])


@each_operation
@pytest.mark.parametrize("buffer", [torch.tensor([3, 4]), torch.tensor([True, False])])
def test_integer_and_boolean_buffers_are_carried_over_and_must_be_equal(name, buffer):
    init, policies = models()
    for state in (init, *policies):
        state["buffer"] = buffer.clone()
    result = OPERATIONS[name](init, policies)["buffer"]
    assert torch.equal(result, torch.zeros_like(buffer) if name == "task_vector" else buffer)
    policies[1]["buffer"] = torch.zeros_like(buffer)
    with pytest.raises(ValueError, match=rf"{LABELS[name]}\['buffer'\] is a .* buffer that differs from init's"):
        OPERATIONS[name](init, policies)


@each_operation
def test_empty_tensors_and_empty_state_dicts_pass_through(name):
    empty = {"none": torch.zeros(0, 3)}
    assert OPERATIONS[name](empty, [empty, empty])["none"].shape == (0, 3)
    assert OPERATIONS[name]({}, [{}, {}]) == {}


@each_operation
def test_tensors_in_any_memory_layout_give_the_same_result(name):
    init, policies = models()
    result = OPERATIONS[name](init, policies)["h.0.attn.weight"]
    turned = [{**state, "h.0.attn.weight": state["h.0.attn.weight"].T.contiguous().T}
              for state in (init, *policies)]
    torch.testing.assert_close(OPERATIONS[name](turned[0], turned[1:])["h.0.attn.weight"], result)


def replace(key, tensor):
    return lambda state: {**state, key: tensor}


@each_operation
@pytest.mark.parametrize("spoil, words", [
    (lambda state: {k: t for k, t in state.items() if k != "scale"}, " has no tensor 'scale' that init has; were"),
    (replace("extra", torch.zeros(1)), " has a tensor 'extra' that init has not; were both"),
    (replace("scale", torch.zeros(2)), r"\['scale'\] has shape \(2,\), init's has \(\); were both"),
    (replace("scale", torch.tensor(0.0).half()), r"\['scale'\] is torch.float16, init's is torch.float32; conv"),
    (replace("scale", torch.tensor(math.nan)), r"\['scale'\] has NaN or infinite weights"),
    (replace("h.0.attn.bias", torch.tensor([1.0] * 6 + [math.inf])), r"\['h.0.attn.bias'\] has NaN or infinite"),
])
def test_state_dicts_that_do_not_fit_are_refused_with_the_name_and_the_way_out(name, spoil, words):
    init, policies = models()
    with pytest.raises(ValueError, match=f"^{LABELS[name]}{words}") as error:
        OPERATIONS[name](init, [policies[0], spoil(policies[1])])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [slerp, lerp])
def test_nan_weights_are_found_even_where_their_policy_has_no_weight(method):
    init, (one, two) = models()
    two["scale"] = torch.tensor(math.nan)
    with pytest.raises(ValueError, match=r"policies\[1\]\['scale'\]"):
        method(init, [one, two], (1, 0))
    with pytest.raises(ValueError, match=r"init\['scale'\]"):
        method({**init, "scale": two["scale"]}, [one, one])
    with pytest.raises(ValueError, match=r"policies\[1\]\['scale'\]"):
        angles(init, [one, two])


@each_operation
def test_models_and_other_things_are_refused_as_state_dicts(name):
    init, policies = models()
    with pytest.raises(TypeError, match="init is a Linear, not a state dict; pass model.state_dict()"):
        OPERATIONS[name](torch.nn.Linear(1, 1), policies)
    with pytest.raises(TypeError, match=rf"{LABELS[name]}\['scale'\] is a float, not a tensor"):
        OPERATIONS[name](init, [policies[0], {**policies[1], "scale": 1.0}])


@pytest.mark.parametrize("method", [slerp, lerp])
def test_merging_takes_two_policies_and_their_weights(method):
    init, policies = models()
    with pytest.raises(ValueError, match="policies has 1 of the at least 2"):
        method(init, policies[:1])
    with pytest.raises(TypeError, match="policies is a single model"):
        method(init, policies[0])
    for weights, words in (((1.0,), "1 numbers for 2 policies"), ((0.4, 0.4), "sum to 0.8"),
                           ((1.5, -0.5), "not negative"), ((math.nan, 1.0), "finite")):
        with pytest.raises(ValueError, match=words):
            method(init, policies, weights)
    method(init, policies, (0.5, 0.5 + 9e-7))
