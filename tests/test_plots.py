"""The picture of a front: what is drawn, where it ends, what it says."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from warp_lite.viewing.plots import COLOURS, ITERATION_COLOURS, column, draw_front, front_finding, known, style


def points(iterations=2, gold=False):
    rows = []
    for i in range(1, iterations + 1):
        for eta in (0.0, 0.5, 1.0):
            row = {"iteration": i, "eta": eta, "kl": 3 * eta, "kl_se": 0.05, "reward": (1 + 0.1 * i) * eta,
                   "reward_se": 0.02}
            rows.append(row | ({"gold": 0.8 * eta, "gold_se": 0.03} if gold else {}))
    return rows


def trajectories(iterations=2):
    return [{"iteration": i, "run": m, "step": s, "kl": 0.4 * i + 0.5 * s, "reward": 0.2 * s + 0.02 * m,
             "gold": 0.1 * s} for i in range(1, iterations + 1) for m in (1, 2) for s in (1, 2, 3)]


LIMIT = [{"beta": b, "kl": k, "kl_se": 0.01, "reward": r, "reward_se": 0.01, "ess": e, "gold": 0.5 * r}
         for b, k, r, e in ((3, 0.1, 0.4, 900), (1, 0.9, 1.1, 300),
                            (0.5, 2.2, 1.7, 31), (0.3, 4, 2.4, 29), (0.2, 9, 3, 9))]
BEST_OF_N = [{"n": 1, "kl_bound": 0.0, "reward": 0.0}, {"n": 4, "kl_bound": 0.64, "reward": 0.9},
             {"n": 128, "kl_bound": 30.0, "reward": 90.0}]


def lines(figure, colour):
    return [np.stack(line.get_data(), 1) for line in figure.axes[0].get_lines()
            if line.get_color() == colour and len(line.get_xdata()) > 1]


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def notes(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_single_runs_start_at_the_sft_policy_in_the_first_iteration_only():
    found = lines(draw_front(points(), LIMIT, trajectories()), COLOURS["single"])
    assert len(found) == 4
    first, later = found[:2], found[2:]
    for line in first:
        assert line[0].tolist() == [0.0, 0.0] and len(line) == 4
    for line in later:
        assert line[0, 0] == pytest.approx(0.4 * 2 + 0.5) and len(line) == 3


def test_the_limit_is_drawn_as_far_as_it_is_known_and_its_end_is_marked():
    assert [p["ess"] for p in known(LIMIT[::-1])] == [900, 300, 31]
    figure = draw_front(points(), LIMIT)
    (limit,) = lines(figure, COLOURS["limit"])
    assert limit[-1].tolist() == [2.2, 1.7]
    (note,) = [t for t in figure.axes[0].texts if "not known" in t.get_text()]
    assert note.get_text() == "limit not known\npast here" and note.xy == (2.2, 1.7)
    assert "limit (upper bound for every method)" in labels(figure)


def test_without_a_known_limit_nothing_is_said_of_one():
    for limit in ((), LIMIT[-2:]):
        figure = draw_front(points(), limit, trajectories())
        text = [*labels(figure), *notes(figure), figure.axes[0].get_title(loc="left")]
        assert not any("limit" in t for t in text)


def test_in_gold_the_proxys_optimum_is_no_bound():
    figure = draw_front(points(gold=True), LIMIT, trajectories(), BEST_OF_N, reward="gold")
    text = labels(figure) + notes(figure) + [figure.axes[0].get_title(loc="left")]
    assert not any("bound" in t or "limit" in t for t in text)
    assert "where the proxy's optimum lies" in text and "gold reward" in figure.axes[0].get_ylabel()
    (optimum,) = lines(figure, COLOURS["limit"])
    assert optimum[-1].tolist() == [2.2, 0.85]


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_title_fits_the_figure(iterations):
    figure = draw_front(points(iterations), LIMIT, trajectories(iterations), BEST_OF_N)
    figure.canvas.draw()
    (title,) = [t for t in [figure.axes[0]._left_title] if t.get_text()]
    box, page = title.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1
    assert len(title.get_text().splitlines()) <= 3


def test_the_title_says_what_was_measured_at_a_kl_that_every_front_reaches():
    text = front_finding(points(), known(LIMIT), trajectories()).replace("\u00a0", " ")
    assert text == ("Reward at a KL of 2 nats – iteration 1: 0.73 ± 0.02, iteration 2: 0.80 ± 0.02, "
                    "single runs: 0.51 ± 0.01 (2 that cross), the limit: 1.61")


def test_a_front_too_short_for_a_comparison_claims_none():
    short = [p | {"kl": 0.1 * p["kl"]} for p in points()]
    assert front_finding(short) == "Reward and KL along the fronts"


def test_a_title_may_be_given():
    assert draw_front(points(), title="A title of my own").axes[0].get_title(loc="left") == "A title of my own"


def test_all_of_the_fronts_and_of_the_limit_are_in_the_picture_and_outliers_do_not_shrink_it():
    runs = [{"iteration": 1, "run": 1, "step": 1, "kl": 400.0, "reward": -900.0, "gold": 0.0}]
    axes = draw_front(points(), LIMIT, runs, BEST_OF_N).axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left == 0 and 3 <= right < 5 and low <= 0 and 1.7 <= high < 3


def test_numbers_that_are_missing_leave_gaps():
    rows = [p | {"kl_se": None, "reward_se": None} for p in points(1)]
    figure = draw_front(rows, [p | {"reward_se": None} for p in LIMIT], reward="reward")
    assert "±" not in figure.axes[0].get_title(loc="left")
    assert np.isnan(column(rows, "kl_se")).all() and np.isnan(column(rows, "gold")).all()


def test_methods_that_share_the_picture_of_a_front_have_colours_of_their_own():
    used = [*ITERATION_COLOURS, COLOURS["single"], COLOURS["limit"], COLOURS["best_of_n"]]
    assert len(used) == len(set(used)) == 8
    nearest = min(np.abs(np.subtract(to_rgb(a), to_rgb(b))).sum() for a in used for b in used if a != b)
    assert nearest > 0.3


# From linear RGB to what those see who lack the first, second or third kind of cones (Machado and others, 2009).
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]])}
TOGETHER = [("mistake", "slerp", "lerp"), ("mistake", "liti"), ("mistake", "ema"), ("mistake", "limit"),
            ("init", "liti", "limit"), ("iteration 2", "init", "mixed", "limit")]


def as_seen(colour, vision):
    """A colour in CIELAB, (3,), as that vision has it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ np.clip(VISIONS[vision] @ linear, 0, 1) / (0.9505, 1, 1.089)
    f = [np.cbrt(value) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("names", TOGETHER)
@pytest.mark.parametrize("vision", VISIONS)
def test_what_stands_in_one_picture_can_be_told_apart_by_the_colour_blind(names, vision):
    colours = {**COLOURS, "iteration 2": ITERATION_COLOURS[1]}
    seen = [as_seen(colours[name], vision) for name in names]
    assert min(np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]) > 15  # 2.3 can just be told


def test_no_two_meanings_have_one_colour():
    assert len({*COLOURS.values(), *ITERATION_COLOURS}) == len(COLOURS) + len(ITERATION_COLOURS)


def test_the_style_is_left_as_it_was_found():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_front(points())
    with style():
        pass
    assert dict(matplotlib.rcParams) == before
