"""Settings of the notebooks by the size of the policy, and what a real model is said to cost."""

import matplotlib
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from warp_lite import WarpConfig
from warp_lite.evaluation.front import MIN_ESS
from warp_lite.notebooks import plans
from warp_lite.notebooks.__main__ import paths
from warp_lite.notebooks.start import begin, checked_parameters
from warp_lite.worlds import HUB, REAL, TINY


def on_paper(config):
    """A model of those shapes that takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def gpt2():
    return on_paper(GPT2Config())


@pytest.fixture(scope="module")
def gemma():
    return on_paper(Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048))


def test_every_plan_has_a_value_for_each_size_and_a_notebook():
    stems = {path.stem for path in paths()}
    assert plans.PLANS.keys() <= {*stems, "running_example"}
    assert all(len(row) == 4 for plan in plans.PLANS.values() for row in plan.values())


def test_the_size_of_the_policy_chooses_the_settings(gpt2_policy, gpt2, gemma):
    assert plans.size_of(gpt2) == 124_439_808 and plans.size_of(gemma) == 268_098_176  # as published
    steps = [plans.plan("running_example", model).steps for model in (gpt2_policy, gpt2, gemma)]
    assert steps == [100, 60, 40]
    assert plans.plan("running_example", gpt2_policy, fast=True).steps == 20
    fast = plans.plan("running_example", gpt2, fast=True)
    assert fast.lr == 1e-5 and fast.limit == 128 and fast.steps == 20  # the smaller of both, at its own rate


def test_no_plan_draws_the_limit_from_so_few_samples_that_it_has_no_point(gpt2_policy, gpt2, gemma, smollm2):
    """Twice the effective sample size at which the limit ends: KL 0 has all samples."""
    worlds = ["", *plans.OF_WORLD]
    for model in (gpt2_policy, gpt2, gemma, smollm2):
        for fast in (True, False):
            assert all(plans.plan("running_example", model, fast, world).limit >= 2 * MIN_ESS for world in worlds)


@pytest.fixture(scope="module")
def smollm2():
    return on_paper(LlamaConfig(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))


def test_smollm2_has_settings_of_its_own_for_a_cpu(smollm2, gpt2):
    assert plans.size_of(smollm2) == 134_515_008  # as published
    own, of_its_size = (plans.plan("running_example", smollm2, world=world) for world in ("smollm2", ""))
    assert (own.steps, own.lr) == (24, 2e-5) and of_its_size == plans.plan("running_example", gpt2)
    assert own.traced == of_its_size.traced  # what it has none of comes from its size
    assert plans.plan("running_example", smollm2, fast=True, world="smollm2").steps == 20
    for world, of_notebooks in plans.OF_WORLD.items():
        assert world in (*TINY, *HUB, REAL)
        for notebook, settings in of_notebooks.items():
            assert settings.keys() <= plans.PLANS[notebook].keys()
    assert max(plans.plan("02_slerp", smollm2, world="smollm2").counts) <= own.runs


def test_on_a_cpu_the_minutes_are_those_that_smollm2_took(monkeypatch, smollm2, capsys):
    monkeypatch.setattr(type(smollm2), "device", torch.device("cpu"))
    config = WarpConfig(steps=30, batch_size=4, max_new_tokens=16)
    plans.announce(smollm2, config, 8, 480)
    seconds = 0.34 * (8 * 30 * (5 + 1.6 * 4) + 480)
    assert capsys.readouterr().out.startswith(
        f"estimate for one core, by what SmolLM2 took: about {round(seconds / 60)} min; ")


def test_a_real_model_is_announced_and_a_tiny_one_is_not(gpt2_policy, gpt2, gemma, capsys):
    config = WarpConfig(steps=60, batch_size=8)
    plans.announce(gpt2_policy, config, 10, 10_000)
    assert capsys.readouterr().out == ""
    plans.announce(gpt2, config, 10, 10_000)
    out = capsys.readouterr().out
    assert out.startswith("estimate for a T4, not measured: about ") and "GiB" in out and "10 GB of disk" in out
    assert plans.step_seconds(gemma, config) > plans.step_seconds(gpt2, config) > 0
    # no step is faster than reading the weights once a token at the full bandwidth of the data sheet
    assert plans.step_seconds(gpt2, config) > config.max_new_tokens * 4 * plans.size_of(gpt2) / 320e9


def test_runs_of_real_models_are_kept_where_out_says_or_for_the_time_being(gpt2_policy, gpt2, tmp_path):
    assert plans.kept_runs(str(tmp_path), gpt2_policy) is None
    assert plans.kept_runs(str(tmp_path), gpt2) == tmp_path / "runs"
    assert plans.kept_runs("", gpt2).parent.is_dir()


@pytest.mark.parametrize("fast, taken", [(True, True), (False, False), ("false", False), ("true", True), ("False", 0)])
def test_fast_may_be_a_word_as_a_shell_writes_it(fast, taken):
    assert checked_parameters("tiny-gpt2", fast, 0, "cpu", "") == (taken, False)
    assert checked_parameters("tiny-gpt2", False, 0, "cpu", "", fast) == (False, taken)


@pytest.mark.parametrize("changed, words", [
    ({"model": 3}, "MODEL must be the name of a world, or a folder, not 3"), ({"model": ""}, "MODEL must be"),
    ({"fast": "no"}, "FAST must be True or False, not 'no'"), ({"fast": 1}, "FAST must be"),
    ({"fast": None}, "FAST must be"), ({"seed": "abc"}, "SEED must be a whole number, 0 or more, not 'abc'"),
    ({"seed": True}, "SEED must be"), ({"seed": -1}, "SEED must be"), ({"seed": 0.5}, "SEED must be"),
    ({"device": 0}, "DEVICE must be a text"), ({"device": ""}, "DEVICE must be"), ({"out": None}, "OUT must be"),
    ({"out": 1}, "OUT must be the name of a folder"), ({"retrain": 1}, "RETRAIN must be True or False, not 1")])
def test_a_parameter_of_another_type_is_named_in_one_line_before_a_world_is_loaded(changed, words, monkeypatch):
    monkeypatch.setattr("warp_lite.notebooks.start.load_world", lambda *a, **k: pytest.fail("it loaded a world"))
    sound = {"name": "00_kl_and_reward", "model": "tiny-gpt2", "fast": True, "seed": 0, "device": "cpu", "out": ""}
    with pytest.raises(ValueError, match=f"the parameter {words}") as caught:
        begin(**{**sound, **changed})
    assert "\n" not in str(caught.value)


def test_a_notebook_begins_with_its_world_named_in_a_line(world, monkeypatch, capsys):
    monkeypatch.setenv("WARP_LITE_MODEL", "tiny-gpt2")
    monkeypatch.setenv("WARP_LITE_FAST", "1")
    with matplotlib.rc_context():  # a notebook's style is for the notebook's life
        lab = begin("00_kl_and_reward", "absent", "false", 0, "cpu", "")
    assert (lab.model, lab.fast, lab.retrain, lab.world.facts) == ("tiny-gpt2", True, False, world.facts)
    assert lab.plan == plans.plan("00_kl_and_reward", lab.world.policy, fast=True) and lab.keep is None
    assert lab.kinds == ["reward", "gold"] and lab.reward_label("gold") == f"gold reward ({world.reward.unit})"
    assert capsys.readouterr().out == ("tiny-gpt2: 107,712 parameters, 320 prompts to train on and 64 held out; "
                                       "fast mode on cpu\n")


def test_a_tiny_model_stands_in_where_the_real_one_is_not_within_reach_and_that_is_wanted(world, monkeypatch, capsys):
    def missing(*arguments):
        raise ValueError("the world smollm2 lacks its package; make real-model")

    monkeypatch.setattr("warp_lite.worlds.english.english_world", missing)
    name = "07_a_real_language_model"
    with pytest.raises(ValueError, match="lacks its package"):
        begin(name, "smollm2", False, 0, "cpu", "")
    with pytest.raises(ValueError, match="there is no world 'nonsense'"):
        begin(name, "nonsense", False, 0, "cpu", "", stand_in=True)
    with matplotlib.rc_context():
        lab = begin(name, "smollm2", False, 0, "cpu", "", stand_in=True)
    assert lab.fast and lab.plan == plans.plan(name, lab.world.policy, fast=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("lacks its package; make real-model") and "takes the place of smollm2" in said[0]
    assert said[1].startswith("smollm2 (a tiny model in its place): 107,712 parameters")
