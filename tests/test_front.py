"""The area under a front and the reward at a KL, against closed forms and moocore."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warp_lite import hypervolume, reward_at_kl
from warp_lite.evaluation.front import GRID, best_within_kl, first_crossing, points_array, running_maximum

STEP = 1 / (GRID - 1)  # of the grid, in units of kl_max: a jump is off by at most half of it times its height

# --- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("points, reference, area", [
    ([(0, 0), (2, 2)], (2, 0), 2.0),                            # a triangle
    ([(0, 0), (2, 2)], (1, 0), 0.5),                            # kl_max inside the front
    ([(0, 0), (2, 2)], (5, 0), 2 + 3 * 2),                      # past the last point: held flat
    ([(0, 0), (2, 2)], (2, -1), 2 + 2),                         # a lower reference adds a rectangle
    ([(0, 0), (2, 2)], (2, 1), 0.5),                            # a higher one cuts the front
    ([(0, 0), (2, 2)], (2, 7), 0.0),                            # above everything: nothing is left
    ([(0, 0), (1, 1), (2, 0)], (2, 0), 0.5 + 1),                # the running maximum does not fall
    ([(0, 0), (1, 1), (2, 0), (3, 2)], (3, 0), 0.5 + 1.5 + 0.75),  # … and rises again where the front passes it
    ([(1, 3)], (4, 0), 3 * 3),                                  # a step: nothing before the first point
    ([(1, 3), (2, 3)], (1, 0), 0.0),                            # a front that begins at kl_max
    ([(0, 1), (0, 2), (1, 2)], (1, 0), 2.0),                    # of two points at one KL the better counts
])
def test_hypervolume_of_simple_fronts_is_their_area(points, reference, area):
    jump = max(r for _, r in points) - reference[1]
    assert hypervolume(points, reference) == pytest.approx(area, abs=reference[0] * STEP * max(jump, 1) + 1e-9)


def test_order_and_form_of_the_points_do_not_matter():
    points = [(0.0, 0.0), (0.7, 1.0), (2.0, 1.5)]
    dicts = [{"kl": kl, "reward": reward, "eta": 0.3} for kl, reward in points]
    expected = hypervolume(points, (3, -1))
    assert hypervolume(points[::-1], (3, -1)) == hypervolume(dicts, (3, -1)) == expected


def test_a_peak_between_two_points_of_the_grid_counts():
    grid = np.linspace(0, 1, 11)
    assert running_maximum([(0, 0), (0.549, 0), (0.55, 9), (0.551, 0), (1, 0)], grid)[-1] == 9


def test_the_staircase_of_moocore_converges_to_the_area_from_below():
    moocore = pytest.importorskip("moocore")
    kl_max, reward_min = 4.0, -0.5

    def front(count):
        kl = np.linspace(0.2, 3.0, count)
        return np.stack([kl, np.log1p(3 * kl)], 1)

    def staircase(count):
        return moocore.hypervolume(front(count), ref=[kl_max, reward_min], maximise=[False, True])

    ours = hypervolume(front(20001), (kl_max, reward_min))
    gaps = [ours - staircase(count) for count in (20, 200, 2000, 20000)]
    assert all(gap > 0 for gap in gaps[:3])
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] and abs(gaps[3]) < 2e-3


# --- properties -----------------------------------------------------------------------------

number = st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3))
kl = st.floats(0, 5).map(lambda x: round(x, 3))
fronts = st.lists(st.tuples(kl, number), min_size=1, max_size=8, unique_by=lambda p: p[0])


@settings(max_examples=60, deadline=None)
@given(fronts, st.floats(0.1, 6), number)
def test_hypervolume_is_bounded_by_its_rectangle(points, kl_max, reward_min):
    area = hypervolume(points, (kl_max, reward_min))
    inside = [r for k, r in points if k <= kl_max]
    height = max(0, max((r for _, r in points), default=0) - reward_min)
    assert 0 <= area <= kl_max * height + 1e-9
    if not inside:
        assert area == 0


@settings(max_examples=60, deadline=None)
@given(fronts, kl, st.floats(0, 3), st.floats(0.1, 6), number)
def test_a_point_on_or_above_the_front_never_lowers_the_hypervolume(points, at, above, kl_max, reward_min):
    ordered = points_array(points)
    on_it = np.interp(at, ordered[:, 0], ordered[:, 1])
    before, after = (hypervolume(p, (kl_max, reward_min)) for p in (points, [*points, (at, on_it + above)]))
    # On a grid a kink may be cut by a little: one step of KL times the steepest slope is a generous bound.
    assert after >= before - 1e-6 * (1 + abs(before))


@settings(max_examples=60, deadline=None)
@given(fronts, st.data(), st.floats(0, 3))
def test_a_better_reward_never_lowers_the_hypervolume(points, data, more):
    i = data.draw(st.integers(0, len(points) - 1))
    better = [(k, r + more * (j == i)) for j, (k, r) in enumerate(points)]
    assert hypervolume(better, (4, -5)) >= hypervolume(points, (4, -5)) - 1e-9


# --- the reward at a KL ---------------------------------------------------------------------


def test_reward_at_kl_is_linear_between_points_and_exact_at_them():
    points = [(0.0, 1.0), (1.0, 2.0), (3.0, 1.0)]
    assert [reward_at_kl(points, k) for k in (0, 0.5, 1, 2, 3)] == [1, 1.5, 2, 1.5, 1]


def path(*points):
    """A trajectory of those (step, kl, reward); a gold reward of minus the reward."""
    return [{"step": step, "kl": kl, "reward": reward, "gold": -reward} for step, kl, reward in points]


UP_AND_BACK = path((20, 3.0, 9.0), (0, 0.0, 0.0), (10, 2.0, 2.0), (30, 1.0, 5.0))


def test_a_trajectory_counts_where_it_first_crosses_a_kl_in_the_order_of_its_steps():
    assert reward_at_kl(UP_AND_BACK, 1.0) == 1.0  # on the way up, and not the 5 of its end
    assert [reward_at_kl(UP_AND_BACK, k) for k in (0.0, 2.0, 2.5, 3.0)] == [0.0, 2.0, 5.5, 9.0]
    assert reward_at_kl(UP_AND_BACK, 1.0, "gold") == -1.0
    assert math.isnan(reward_at_kl(UP_AND_BACK, 3.5))
    assert math.isnan(reward_at_kl(path((0, 2.0, 1.0), (1, 0.5, 2.0)), 1.0))  # it begins above and only falls


def test_the_best_within_a_kl_counts_what_a_trajectory_comes_back_to_and_never_more_than_it_has():
    assert [best_within_kl(UP_AND_BACK, k) for k in (0.0, 0.5, 1.0, 2.0, 2.5, 3.0)] == [0.0, 2.5, 5.0, 5.0, 5.5, 9.0]
    assert math.isnan(best_within_kl(UP_AND_BACK, 3.5)) and math.isnan(best_within_kl([(1.0, 2.0)], 0.5))
    assert best_within_kl([(0, 0), (1, 4), (2, 3)], 2) == 4  # within, and not at


def test_the_points_of_a_front_count_in_the_order_of_kl_whatever_their_order():
    front = [{key: value for key, value in point.items() if key != "step"} for point in UP_AND_BACK]
    assert reward_at_kl(front, 1.0) == 5.0 == reward_at_kl(front[::-1], 1.0)
    assert reward_at_kl([(1, 2), (0, 0), (1, 4)], 1) == 4.0  # the better of two at one KL


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(kl, number), min_size=1, max_size=8, unique_by=lambda p: p[0]), kl)
def test_a_curve_whose_kl_only_rises_has_one_reward_at_a_kl_as_front_and_as_trajectory(points, at):
    rising = sorted(points)
    by_steps = path(*((step, *point) for step, point in enumerate(rising)))
    ours, theirs = reward_at_kl(points, at), reward_at_kl(by_steps, at)
    expected = np.interp(at, *np.array(rising).T, left=math.nan, right=math.nan)
    assert ours == pytest.approx(expected, nan_ok=True) and theirs == pytest.approx(ours, nan_ok=True)


def test_the_first_crossing_is_the_first_of_several_and_of_any_two_numbers():
    assert first_crossing([0, 2, 0, 2], [0, 10, 20, 30], 1) == 5
    assert first_crossing([1], [7], 1) == 7 and math.isnan(first_crossing([1], [7], 2))


@pytest.mark.parametrize("outside", [-0.1, 0.49, 3.01, math.nan])
def test_reward_at_kl_outside_the_points_is_nan_and_never_an_extrapolation(outside):
    assert math.isnan(reward_at_kl([(0.5, 1.0), (3.0, 1.0)], outside))


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("points, message", [
    ([], "no points"), ([(0, 1), (1, math.nan)], "point 1 of the front is not finite"),
    ([(math.inf, 0)], "point 0"), ([(1, 2, 3)], "pairs")])
def test_fronts_that_are_none_are_refused(points, message):
    for measure in (lambda: hypervolume(points, (1, 0)), lambda: reward_at_kl(points, 1)):
        with pytest.raises(ValueError, match=message):
            measure()


@pytest.mark.parametrize("reference", [(0, 0), (-1, 0), (math.nan, 0), (1, math.inf)])
def test_a_reference_that_bounds_nothing_is_refused(reference):
    with pytest.raises(ValueError, match="kl_max > 0"):
        hypervolume([(0, 0), (1, 1)], reference)
