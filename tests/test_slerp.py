"""Stage 2: SLERP of task vectors, LERP, angles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warp_lite.averaging.slerp import angles, lerp, slerp, slerp_coefficients, task_vector


def random_state(seed, shapes=None, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"h.0.attn.weight": (8, 24), "h.0.attn.bias": (24,), "wte.weight": (50, 8)}
    return {name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for name, shape in shapes.items()}


def near(init, seed, scale=0.1):
    return {name: init[name] + delta for name, delta in
            random_state(seed, {n: t.shape for n, t in init.items()}, scale, init[next(iter(init))].dtype).items()}


def policies_near(init, count, scale=0.1):
    return [near(init, 100 + index, scale) for index in range(count)]


def single(*values, dtype=torch.float64):
    return {"w": torch.tensor(values, dtype=dtype)}


def norms(theta, init):
    return {name: delta.double().norm().item() for name, delta in task_vector(theta, init).items()}


# Against another implementation


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.8])
def test_slerp_of_two_policies_is_mergekits_nuslerp_with_a_base(lam):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    init = random_state(0)
    one, two = policies_near(init, 2)
    with torch.no_grad():
        expected = mergekit.merge_state_dicts(
            {"base": init, "one": one, "two": two}, "nuslerp", base="base",
            parameters={"weight": {"one": 1 - lam, "two": lam}, "nuslerp_flatten": True})
    merged = slerp(init, [one, two], weights=(1 - lam, lam))
    for name in init:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["equal", "opposite", "first zero", "second zero", "both zero", "close"])
@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_slerp_agrees_with_mergekit_at_the_edges(case, lam):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    v, zero = torch.tensor([3.0, -4.0, 0.0, 12.0]), torch.zeros(4)
    one, two = {"equal": (v, v), "opposite": (v, -v), "first zero": (zero, v), "second zero": (v, zero),
                "both zero": (zero, zero), "close": (v, v + torch.tensor([1e-3, 0, 0, 0]))}[case]
    init = {"w": torch.zeros(4)}
    with torch.no_grad():
        expected = mergekit.merge_state_dicts(
            {"base": init, "one": {"w": one}, "two": {"w": two}}, "nuslerp", base="base",
            parameters={"weight": {"one": 1 - lam, "two": lam}})
    merged = slerp(init, [{"w": one}, {"w": two}], weights=(1 - lam, lam))
    torch.testing.assert_close(merged["w"], expected["w"], atol=1e-5, rtol=0)


# Closed forms


def test_slerp_by_hand_at_a_right_angle():
    merged = slerp(single(1.0, 1.0), [single(2.0, 1.0), single(1.0, 2.0)], weights=(2 / 3, 1 / 3))
    torch.testing.assert_close(merged["w"], 1 + torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)],
                                                             dtype=torch.float64))


def right_angle_coefficients(count):
    """Iterated SLERP of orthogonal vectors of one norm: the k-th joins at Ω = 90° with λ = 1/k."""
    coefficients = [1.0]
    for k in range(2, count + 1):
        keep, add = math.sin((1 - 1 / k) * math.pi / 2), math.sin(math.pi / 2 / k)
        coefficients = [keep * c for c in coefficients] + [add]
    return coefficients


@pytest.mark.parametrize("count, rounded", [(3, [.612, .612, .5]), (4, [.566, .566, .462, .383])])
def test_iterated_slerp_of_orthogonal_task_vectors_has_the_coefficients_of_the_paper(count, rounded):
    expected = right_angle_coefficients(count)
    assert expected == pytest.approx(rounded, abs=5e-4)
    init = {"w": torch.full((count,), 0.5, dtype=torch.float64)}
    merged = slerp(init, [{"w": init["w"] + row} for row in torch.eye(count, dtype=torch.float64)])
    assert task_vector(merged, init)["w"].tolist() == pytest.approx(expected, abs=1e-12)


def reference_slerp(init, policies, weights):
    """Pairwise, as equation 26 is written: slerp(slerp of the first k − 1, θ^k, λ_k)."""
    merged, total = policies[0], weights[0]
    for theta, weight in zip(policies[1:], weights[1:]):
        total += weight
        lam = weight / total
        step = {}
        for name, base in init.items():
            a, b = merged[name] - base, theta[name] - base
            omega = torch.acos((a * b).sum() / (a.norm() * b.norm()))
            step[name] = base + (torch.sin((1 - lam) * omega) * a + torch.sin(lam * omega) * b) / torch.sin(omega)
        merged = step
    return merged


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, 0.5, 0.3], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
def test_slerp_of_many_policies_is_the_pairwise_merge_of_equation_26(weights):
    init = random_state(0, dtype=torch.float64)
    policies = policies_near(init, len(weights))
    merged, expected = slerp(init, policies, weights), reference_slerp(init, policies, weights)
    for name in init:
        torch.testing.assert_close(merged[name], expected[name], atol=1e-12, rtol=0)
    uniform = [1 / len(weights)] * len(weights)
    torch.testing.assert_close(slerp(init, policies), slerp(init, policies, uniform))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_slerp_keeps_the_norm_of_equal_norm_task_vectors_and_lerp_shrinks_it(count):
    init = {"w": torch.randn(count + 3, dtype=torch.float64)}
    basis = torch.linalg.qr(torch.randn(count + 3, count, dtype=torch.float64)).Q.T
    policies = [{"w": init["w"] + 2 * row} for row in basis]
    assert norms(slerp(init, policies), init)["w"] == pytest.approx(2)
    assert norms(lerp(init, policies), init)["w"] == pytest.approx(2 / math.sqrt(count))


def test_the_first_two_of_three_policies_count_alike():
    """The defect of λ = 1/M at every step, where step k needs 1/k: it would favour the first policy."""
    first, second, _ = slerp_coefficients(torch.eye(3, dtype=torch.float64), [1 / 3] * 3)
    assert first == pytest.approx(second)
    assert math.sin(math.pi / 3) != pytest.approx(math.sin(math.pi / 6))  # what λ = 1/3 at step 2 gives


def test_at_one_half_slerp_is_lerp_with_its_update_rescaled_by_the_cosine_of_half_the_angle():
    init = {"w": torch.zeros(2, dtype=torch.float64)}
    for degrees in (1, 30, 90, 150, 179):
        omega = math.radians(degrees)
        policies = [single(1.0, 0.0), single(math.cos(omega), math.sin(omega))]
        expected = lerp(init, policies)["w"] / math.cos(omega / 2)
        torch.testing.assert_close(slerp(init, policies)["w"], expected, atol=1e-12, rtol=0)


# Each tensor its own angle, of task vectors


def test_the_angle_is_that_of_each_tensor_not_one_for_the_model():
    init = {"a": torch.zeros(2), "b": torch.zeros(2)}
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    two = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0])}
    merged = slerp(init, [one, two])
    assert merged["a"].norm() == pytest.approx(1)
    assert merged["b"].tolist() == [1.0, 0.0]  # with the global Ω of 60° it would be 1/cos 30° = 1.155
    degrees = angles(init, [one, two])
    assert degrees["a"][0, 1] == pytest.approx(90) and degrees["b"][0, 1] == pytest.approx(0)


def test_slerp_of_whole_weights_is_another_model_and_close_to_lerp():
    init = random_state(0)
    policies = policies_near(init, 2, scale=0.05)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in init.items()}
    merged, whole, mean = slerp(init, policies), slerp(zeros, policies), lerp(init, policies)
    for name in init:
        to_mean = (whole[name] - mean[name]).norm()
        assert (merged[name] - whole[name]).norm() > 5 * to_mean
        assert angles(zeros, policies)[name][0, 1] < 10 < 60 < angles(init, policies)[name][0, 1]


def test_slerp_adds_task_vectors_to_the_init_and_not_policies():
    init = single(10.0, 10.0)
    merged = slerp(init, [single(11.0, 10.0), single(10.0, 11.0)])
    torch.testing.assert_close(merged["w"], init["w"] + math.sqrt(0.5))


# Edges


@pytest.mark.parametrize("method", [slerp, lerp])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lambda_zero_and_one_give_the_policies_to_the_bit(method, dtype):
    init = random_state(0, dtype=dtype)
    one, two, three = policies_near(init, 3)
    for weights, expected in (((1, 0), one), ((0, 1), two)):
        merged = method(init, [one, two], weights)
        assert all(torch.equal(merged[name], expected[name]) for name in init)
    merged = method(init, [one, two, three], (0, 1, 0))
    assert all(torch.equal(merged[name], two[name]) for name in init)


@pytest.mark.parametrize("method", [slerp, lerp])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_task_vectors_and_unmoved_tensors_stay_exactly_as_they_are(method, count):
    init = random_state(0)
    theta = near(init, 1)
    merged = method(init, [{**theta, "wte.weight": init["wte.weight"]}] * count)
    assert torch.equal(merged["wte.weight"], init["wte.weight"])
    assert torch.equal(merged["h.0.attn.weight"], theta["h.0.attn.weight"])


@pytest.mark.parametrize("method", [slerp, lerp])
def test_a_policy_that_moved_one_weight_leaves_the_others_exact(method):
    init = random_state(0)
    moved = {name: tensor.clone() for name, tensor in init.items()}
    moved["wte.weight"][0, 0] += 1
    merged = method(init, [moved, init, init])
    assert torch.equal(merged["wte.weight"][1:], init["wte.weight"][1:])


@pytest.mark.parametrize("exponent", range(-12, 0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_the_angle_goes_to_zero_slerp_goes_smoothly_to_lerp(exponent, dtype):
    omega = 10.0 ** exponent
    init = single(0.0, 0.0, dtype=dtype)
    policies = [single(1.0, 0.0, dtype=dtype), single(math.cos(omega), math.sin(omega), dtype=dtype)]
    gap = (slerp(init, policies, (0.3, 0.7))["w"] - lerp(init, policies, (0.3, 0.7))["w"]).norm().item()
    assert gap <= omega ** 2 / 6 + torch.finfo(dtype).eps


def test_opposite_task_vectors_are_merged_linearly_and_cancel_at_one_half():
    init, delta = single(1.0, 2.0, 3.0), torch.tensor([3.0, -4.0, 7.0], dtype=torch.float64)
    policies = [{"w": init["w"] + delta}, {"w": init["w"] - delta}]
    assert torch.equal(slerp(init, policies)["w"], init["w"])
    torch.testing.assert_close(slerp(init, policies, (0.75, 0.25))["w"], init["w"] + delta / 2)


def test_cancelled_task_vectors_count_as_zero_for_the_next_one_not_as_a_random_direction():
    generator = torch.Generator().manual_seed(0)
    init = {"w": torch.randn(1000, generator=generator)}
    delta, third = (torch.randn(1000, generator=generator) for _ in range(2))
    merged = slerp(init, [{"w": init["w"] + delta}, {"w": init["w"] - delta}, {"w": init["w"] + third}])
    torch.testing.assert_close(merged["w"], init["w"] + math.sin(math.pi / 6) * third, atol=2e-5, rtol=0)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_beside_a_zero_task_vector_the_other_is_scaled_by_a_quarter_turns_sine(t):
    init, theta = single(1.0, 1.0), single(1.0, 3.0)
    torch.testing.assert_close(slerp(init, [init, theta], (1 - t, t))["w"],
                               single(1.0, 1 + 2 * math.sin(t * math.pi / 2))["w"])
    torch.testing.assert_close(slerp(init, [theta, init], (t, 1 - t))["w"],
                               single(1.0, 1 + 2 * math.sin(t * math.pi / 2))["w"])


def test_tiny_and_huge_task_vectors_have_the_same_angle():
    for scale in (1e-30, 1e-10, 1.0, 1e30):
        init = {"w": torch.zeros(2)}
        policies = [{"w": scale * torch.tensor([1.0, 0.0])}, {"w": scale * torch.tensor([1.0, 1.0])}]
        assert angles(init, policies)["w"][0, 1].item() == pytest.approx(45, abs=1e-5)
        norm = math.sqrt(5) * math.sin(math.pi / 8) / math.sin(math.pi / 4)  # |(2, 1)| · sin 22.5° / sin 45°
        assert slerp(init, policies)["w"].double().norm().item() / scale == pytest.approx(norm, rel=1e-6)


# Angles


def test_angles_are_in_degrees_symmetric_and_zero_on_the_diagonal():
    init = single(1.0, 1.0)
    degrees = angles(init, [single(2.0, 1.0), single(1.0, 3.0), single(2.0, 2.0), single(0.0, 1.0)])["w"]
    expected = [[0, 90, 45, 180], [90, 0, 45, 90], [45, 45, 0, 135], [180, 90, 135, 0]]
    torch.testing.assert_close(degrees, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("expected", [1e-5, 1e-3, 0.1, 179.999])
def test_small_angles_are_accurate_in_float32(expected):
    """The arc cosine of a float32 cosine sees nothing below 0.02°."""
    omega = math.radians(expected)
    init = {"w": torch.zeros(2 ** 19)}
    one, two = torch.zeros(2 ** 19), torch.zeros(2 ** 19)
    one[0], two[0], two[-1] = 1.0, math.cos(omega), math.sin(omega)
    degrees = angles(init, [{"w": one}, {"w": two}])["w"][0, 1].item()
    assert degrees == pytest.approx(expected, abs=1e-5)


def test_a_tensor_that_did_not_move_has_angles_and_no_nan():
    init, theta = single(1.0, 1.0), single(2.0, 1.0)
    degrees = angles(init, [init, theta, init])["w"]
    assert degrees.tolist() == [[0, 90, 0], [90, 0, 90], [0, 90, 0]]


def test_angles_of_one_policy_and_of_integer_buffers():
    init = {"w": torch.ones(2), "steps": torch.tensor(3)}
    assert angles(init, [init]).keys() == {"w"}
    assert angles(init, [init])["w"].tolist() == [[0.0]]


# Properties


values = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def merges(draw):
    size, count = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    vectors = st.lists(values, min_size=size, max_size=size)
    init = torch.tensor(draw(vectors), dtype=torch.float64)
    policies = [torch.tensor(draw(vectors), dtype=torch.float64) for _ in range(count)]
    raw = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count).filter(lambda w: sum(w) > 0.1))
    return {"w": init}, [{"w": theta} for theta in policies], [w / sum(raw) for w in raw]


@settings(deadline=None, max_examples=150)
@given(merges())
def test_slerp_is_finite_and_up_to_a_right_angle_no_longer_than_the_longest(case):
    init, policies, weights = case
    before = [theta["w"].clone() for theta in (init, *policies)]
    merged = slerp(init, policies, weights)
    assert torch.isfinite(merged["w"]).all()
    assert all(torch.equal(theta["w"], old) for theta, old in zip((init, *policies), before))
    if len(policies) == 2 and angles(init, policies)["w"].max() <= 90:
        longest = max(norms(theta, init)["w"] for theta in policies)
        assert norms(merged, init)["w"] <= longest * (1 + 1e-9) + 1e-9


@settings(deadline=None, max_examples=100)
@given(merges())
def test_slerp_keeps_equal_norms_whatever_the_angles(case):
    init, policies, weights = case
    deltas = [theta["w"] - init["w"] for theta in policies]
    if any(delta.norm() < 1e-3 for delta in deltas):
        return
    policies = [{"w": init["w"] + delta / delta.norm()} for delta in deltas]
    if angles(init, policies)["w"].max() > 100:  # near 180° the arc is undefined and merged linearly
        return
    assert norms(slerp(init, policies, weights), init)["w"] == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(merges(), st.randoms())
def test_lerp_lies_between_the_policies_in_any_order(case, random):
    init, policies, weights = case
    merged = lerp(init, policies, weights)["w"]
    stack = torch.stack([theta["w"] for theta in policies])
    assert (merged >= stack.amin(0) - 1e-9).all() and (merged <= stack.amax(0) + 1e-9).all()
    order = random.sample(range(len(policies)), len(policies))
    shuffled = lerp(init, [policies[i] for i in order], [weights[i] for i in order])["w"]
    torch.testing.assert_close(shuffled, merged, atol=1e-9, rtol=1e-9)
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * stack).sum(0) / sum(weights)
    torch.testing.assert_close(merged, expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=100)
@given(merges(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_slerp_of_two_has_no_first_policy_and_no_unit(case, scale):
    init, policies, weights = case
    policies, total = policies[:2], sum(weights[:2])
    if total == 0:
        return
    weights = [w / total for w in weights[:2]]
    merged = slerp(init, policies, weights)["w"]
    swapped = slerp(init, policies[::-1], weights[::-1])["w"]
    torch.testing.assert_close(swapped, merged, atol=1e-7, rtol=1e-7)
    larger = [{"w": scale * theta["w"]} for theta in (init, *policies)]
    scaled = slerp(larger[0], larger[1:], weights)["w"]
    torch.testing.assert_close(scaled, scale * merged, atol=1e-7 * scale, rtol=1e-7)


def test_lerp_is_the_uniform_mean_by_default():
    merged = lerp(single(0.0), [single(1.0), single(2.0), single(6.0)])
    assert merged["w"].item() == pytest.approx(3)
