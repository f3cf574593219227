"""The running example: trained once, found again, measured closely; and what the notebooks' figures share."""

import dataclasses
import weakref

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from warp_lite import ParetoExplorer, WarpConfig, liti
from warp_lite.evaluation.statistics import t_interval
from warp_lite.experiment import run_experiment
from warp_lite.notebooks import figures, plans, running_example
from warp_lite.notebooks.start import Lab
from warp_lite.training.iteration import CLOSE_UP_TO, MeasuredSteps
from warp_lite.training.run import Run
from warp_lite.viewing import labels


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A function that makes the example of a plan of a few steps, in a folder of this module."""
    keep = tmp_path_factory.mktemp("keep")
    lab = Lab("02_slerp", "tiny-gpt2", True, 3, "", False, world, None, keep, "units")
    row = {"steps": 3, "seeds": 2, "runs": 2, "lr": 3e-3, "traced": 1, "eval_every": 2, "limit": 64}

    def make(monkeypatch, **changes):
        monkeypatch.setitem(plans.PLANS, "running_example", {name: (value,) * 4 for name, value in row.items()})
        return running_example.running_example(dataclasses.replace(lab, **changes))

    return make


def test_it_is_the_warp_of_its_settings(small, world, monkeypatch):
    example = small(monkeypatch)
    assert example.seeds == (3, 4) and len(example.results) == 2
    again = run_experiment(world, {"it": example.config}, example.seeds, progress=False).results["it"]
    for result, expected in zip(example.results, again):
        for name, tensor in expected.iterations[1].merged.items():
            assert (result.iterations[1].merged[name] == tensor).all()


def test_a_second_time_nothing_is_trained_or_measured_and_retrain_trains_it_again(small, monkeypatch):
    first = small(monkeypatch)
    rows, paths = first.sweep(lambda result, eta: result.weights(eta, 1), (0, 1)), first.paths
    trained = []

    def counting(policy, tokenizer, prompts, runs, on_step):
        trained.extend(runs)
        return train_batched(policy, tokenizer, prompts, runs, on_step)

    from warp_lite.experiment import train_batched
    monkeypatch.setattr("warp_lite.experiment.train_batched", counting)
    second = small(monkeypatch)
    assert len(second.results) == 2 and not trained
    with monkeypatch.context() as no_measuring:
        no_measuring.setattr("warp_lite.result.WarpResult.measure", lambda *a, **k: pytest.fail("it measured"))
        assert second.sweep(lambda result, eta: result.weights(eta, 1), (0, 1)) == rows
        assert second.paths == paths
    assert len(small(monkeypatch, retrain=True).results) == 2 and len(trained) == 8
    assert small(monkeypatch, seed=4).folder != second.folder


def test_the_explorers_grid_is_measured_once_and_is_what_an_explorer_measures(small, monkeypatch):
    example = small(monkeypatch)
    fresh = ParetoExplorer(example.typical, fast=True, limit=example.limit, progress=False)
    kept = ParetoExplorer(example.typical, grid=example.grid)
    assert kept.table() == fresh.table() and kept.grid["limit"] == fresh.grid["limit"]
    monkeypatch.setattr(running_example, "build_grid", lambda *a, **k: pytest.fail("it measured"))
    assert ParetoExplorer(example.typical, grid=small(monkeypatch).grid).numbers_html() == fresh.numbers_html()


def test_other_weights_are_measured_anew(small, monkeypatch):
    example = small(monkeypatch)
    one, other = (liti(example.sft, example.results[0].iterations[0].merged, eta) for eta in (0.5, 1))
    assert example.measure([one]) != example.measure([other])
    assert example.measure([one, other])[1] == example.measure([other])[0]
    assert example.measure([one], texts=True)[0].perplexity > 1 and example.measure([one])[0].perplexity is None


def test_no_more_weights_are_held_than_are_measured_together(small, monkeypatch):
    example, alive = small(monkeypatch), []
    merged = example.results[0].iterations[0].merged

    def made(etas):
        for eta in etas:
            state = liti(example.sft, merged, eta)
            alive.append(weakref.ref(next(iter(state.values()))))
            assert sum(ref() is not None for ref in alive) <= 2  # the one that is made, and the one before it
            yield state
            del state

    whole = example.measure([liti(example.sft, merged, eta) for eta in (0.2, 0.4, 0.6, 0.8)])
    monkeypatch.setattr("warp_lite.result.WEIGHTS_AT_ONCE", 1)
    for _ in range(2):  # measured, and read
        found = example.measure(made((0.2, 0.4, 0.6, 0.8)))
        assert [metrics.kl for metrics in found] == pytest.approx([metrics.kl for metrics in whole], abs=1e-6)
    assert [metrics.reward for metrics in example.results[0].measure(made((0.2, 0.8)), samples=2)] == pytest.approx(
        [whole[0].reward, whole[3].reward], abs=1e-5)


def test_only_traced_runs_have_a_path_and_it_begins_where_the_run_began(small, monkeypatch):
    example = small(monkeypatch)
    assert {(row["seed"], row["iteration"], row["run"]) for row in example.paths} == {
        (seed, i, 1) for seed in example.seeds for i in (1, 2)}
    for row in example.paths:
        if row["step"] == 0:
            init = example.results[example.seeds.index(row["seed"])].iterations[row["iteration"] - 1].init
            (measured,) = example.measure([init])  # alone; how it rounds is decided by how many are measured at once
            assert (row["kl"], row["reward"]) == pytest.approx((measured.kl, measured.reward), abs=1e-6)


def test_a_run_that_another_setting_has_in_common_is_trained_once(small, monkeypatch):
    example = small(monkeypatch)
    assert len(example.results) == 2
    monkeypatch.setattr("warp_lite.experiment.train_batched", lambda *a, **k: pytest.fail("it trained"))
    one = example.train({"one": example.one_run()})
    for single, result in zip(one.results["one"], example.results):
        for name, tensor in result.iterations[0].policies[0].items():
            assert (single.iterations[0].policies[0][name] == tensor).all()


def measured(kls, every=20, traced=1, iteration=1, number=1):
    """The steps that are measured of a run whose KL after step s is kls[s - 1]."""
    config = WarpConfig(steps=len(kls), eval_every=every)
    turns = MeasuredSteps(Run(config, iteration, number, {}, {}, None), traced)
    steps = []
    for step, kl in enumerate(kls, 1):
        if turns.is_due(step):
            steps.append(step)
            turns.note(step, kl)
    return steps


def test_where_kl_grows_fast_every_step_is_measured_until_it_lies_beyond_the_edge():
    kls = [0.5 * step for step in range(1, 41)]
    edge = next(step for step, kl in enumerate(kls, 1) if kl > CLOSE_UP_TO)
    assert measured(kls) == [*range(1, edge + 1), 20, 40]


def test_where_kl_grows_slowly_the_next_point_follows_before_it_has_grown_by_a_fifth_of_a_nat():
    assert measured([1.0] * 20) == [1, 2, *range(6, 21, 4), 20]
    assert measured([0.09 * step for step in range(1, 21)]) == [1, 2, *range(4, 21, 2)]
    assert measured([0.0625 * step for step in range(1, 21)]) == [1, 2, *range(5, 21, 3)]


def test_runs_that_are_not_traced_are_not_measured_and_without_tracing_all_are_as_their_settings_say():
    assert measured([1.0] * 20, number=2) == []
    assert measured([1.0] * 45, traced=None, number=2) == [20, 40, 45]
    assert measured([1.0] * 20, every=0) == []


# --- figures ---


def test_no_label_is_struck_through():
    rng = np.random.default_rng(0)
    for _ in range(6):
        figure, axes = plt.subplots(figsize=(5, 3.5))
        ends = {}
        for n in range(4):
            x, y = np.sort(rng.random((3, 8)) * 4, axis=1), rng.random((3, 8)) * 0.3 + np.linspace(0, 1 + 0.05 * n, 8)
            kl, reward = figures.draw_curve(axes, x, y, f"C{n}")
            ends[f"the curve of setting {n}"] = (kl[-1], reward[-1], f"C{n}")
        figures.draw_limit(axes, [{"kl": x, "reward": x**0.5, "reward_se": 0.01} for x in np.linspace(0, 3, 9)])
        axes.axvline(2)
        figures.label_ends(axes, ends)
        assert labels.struck_labels(figure) == []
        plt.close(figure)


def test_a_label_that_is_struck_is_seen():
    figure, axes = plt.subplots()
    figures.label_end(axes, [0.5], [0.5], "struck", "C0")
    axes.plot([0, 1], [0.5, 0.5])
    assert labels.struck_labels(figure) == ["struck"]
    figures.label_ends(axes)
    assert labels.struck_labels(figure) == []
    axes.annotate("over it", (0.5, 0.5), xytext=axes.texts[0].xyann, textcoords="offset points", va="center")
    assert labels.struck_labels(figure) == ["struck"]
    plt.close(figure)


def test_a_label_that_a_mark_or_anothers_thin_line_strikes_is_seen_and_moved():
    figure, axes = plt.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    low = figures.label_end(axes, [0.5], [0.5], "lower", "C0", shift=(0, 20))
    high = figures.label_end(axes, [0.5], [0.5], "higher", "C1", shift=(0, 60))
    assert labels.struck_labels(figure) == []
    high.arrow_patch.set_alpha(0.6)
    assert labels.struck_labels(figure) == ["lower"]
    figures.label_ends(axes)
    assert labels.struck_labels(figure) == []
    axes.set_title("a long title, on several\nlines, of which the last is a long one too", loc="left")
    low.xyann = (-180, 150)
    assert labels.struck_labels(figure) == ["lower"]
    figures.label_ends(axes)
    assert labels.struck_labels(figure) == []
    axes.plot(0.5, 0.5, "o", ms=300)
    assert set(labels.struck_labels(figure)) == {"lower", "higher"}
    low.remove()
    plt.close(figure)


def test_words_follow_from_the_verdict():
    def words(values):
        return figures.outcome(t_interval(values), "above", "A is higher", "A is lower", "cannot be told", "nats")

    assert words([1.0, 1.1, 0.9]).startswith("A is higher\n(1.00 [0.75, 1.25] nats")
    assert words([-1.0, -1.1, -0.9]).startswith("A is lower\n(-1.0")
    assert words([-1.0, 1.1, 0.9]).startswith("cannot be told")
    assert words([1.0]).endswith("1 seed)") and words([1.0]).startswith("cannot be told")


@pytest.mark.parametrize("lit", ["EMA", "SLERP", "LITI", "WARP"])
def test_the_diagram_lights_its_stage(lit):
    figure = figures.stages(lit)
    shown = {text.get_text(): text.get_alpha() for text in figure.axes[0].texts if text.get_text() in figures.STAGES}
    assert {stage for stage, alpha in shown.items() if alpha == 1} == ({lit} if lit != "WARP" else set(figures.STAGES))
    with pytest.raises(ValueError, match="not 'PPO'"):
        figures.stages("PPO")
    plt.close(figure)
