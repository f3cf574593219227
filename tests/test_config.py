"""Settings are checked when they are made."""

import dataclasses
import math

import pytest

from warp_lite import PRESETS, WarpConfig, preset
from warp_lite.worlds import HUB, REAL, TINY

FIELDS = {field.name: field.type for field in dataclasses.fields(WarpConfig)}


def test_the_defaults_and_every_preset_are_valid_and_frozen():
    config = WarpConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    for name in PRESETS:
        assert preset(name) is PRESETS[name]
        assert dataclasses.replace(preset(name).config) == preset(name).config
        assert preset(name).world in (*TINY, REAL, *HUB) and preset(name).about
    with pytest.raises(ValueError, match="no preset 'tin'; there are tiny, "):
        preset("tin")


REFUSED = [
    *((name, value, "1 or more") for name in ("iterations", "runs", "steps", "max_new_tokens")
      for value in (0, -1)),
    *((name, -1, "0 or more") for name in ("warmup_steps", "seed", "beta", "eval_every", "save_every", "micro_batch",
                                           "sample_batch", "logit_chunk")),
    *((name, value, "above 0") for name in ("lr", "temperature", "max_grad_norm", "adam_eps") for value in (0, -0.1)),
    *((name, value, "between 0 and 1") for name in ("mu", "eta") for value in (-0.01, 1.01)),
    *((name, value, r"lie in \[0, 1\)") for name in ("adam_beta1", "adam_beta2") for value in (-0.01, 1)),
    *((name, value, "finite") for name, kind in FIELDS.items() if kind == "float"
      for value in (math.nan, math.inf, -math.inf)),
    ("batch_size", 0, "1 or more"), ("batch_size", 1, "leave-one-out"),
    ("anchor", "EMA", "one of ema, sft, none"), ("merge", "mean", "one of slerp, lerp, none"),
    ("merge", "none", "runs=1"), ("precision", "fp16", "one of auto, fp32, bf16"),
]


@pytest.mark.parametrize("name, value, words", REFUSED, ids=lambda value: str(value))
def test_a_value_that_cannot_be_used_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=f"{name}.*{words}" if name != "merge" else words) as caught:
        WarpConfig(**{name: value})
    assert name in str(caught.value) and str(value) in str(caught.value) or name == "batch_size"


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_name(name):
    wrong = {"int": [1.5, "1", None, True, 2.0], "float": ["1", None, True, [0.1]], "str": [1, None, True],
             "bool": [1, 0, "true", None, 1.0]}
    for value in wrong[FIELDS[name]]:
        with pytest.raises(TypeError, match=name):
            WarpConfig(**{name: value})


def test_a_whole_number_that_no_float_holds_is_refused():
    with pytest.raises(ValueError, match="lr must be finite, not 1000"):
        WarpConfig(lr=10**400)


def test_the_ends_of_every_interval_are_accepted():
    WarpConfig(mu=0, eta=0, beta=0, warmup_steps=0, eval_every=0, seed=0, adam_beta1=0, adam_beta2=0.0)
    WarpConfig(mu=1, eta=1.0, runs=1, merge="none", steps=1, iterations=1, batch_size=2, max_new_tokens=1)
    assert WarpConfig(lr=1).lr == 1  # a whole number is a number


def test_replace_names_the_nearest_setting():
    assert WarpConfig().replace(lr=0.1, runs=3) == WarpConfig(lr=0.1, runs=3)
    with pytest.raises(ValueError, match="no setting 'step'; the nearest is 'steps'"):
        WarpConfig().replace(step=3)
    with pytest.raises(ValueError, match="lr must be above 0"):
        WarpConfig().replace(lr=-1.0)


def test_settings_are_read_from_text_by_the_type_of_their_field():
    config = WarpConfig().with_text(["lr=1e-4", "runs=3", "anchor=sft", "eta=1", "merge=lerp"])
    assert config == WarpConfig(lr=1e-4, runs=3, anchor="sft", eta=1.0, merge="lerp")
    assert isinstance(config.eta, float) and isinstance(config.runs, int)
    assert WarpConfig().with_text(["lr=1", "lr=2"]).lr == 2.0
    saving = WarpConfig().with_text(["micro_batch=4", "offload=true", "checkpointing=False", "precision=bf16"])
    assert saving == WarpConfig(micro_batch=4, offload=True, checkpointing=False, precision="bf16")
    assert WarpConfig().with_text([]) == WarpConfig()


@pytest.mark.parametrize("text, words", [
    ("lr", "NAME=VALUE, not 'lr'"), ("lr=fast", "lr must be of type float, not 'fast'"),
    ("runs=2.5", "runs must be of type int, not '2.5'"), ("runs=", "runs must be of type int, not ''"),
    ("rnus=2", "no setting 'rnus'; the nearest is 'runs'"), ("lr=nan", "lr must be finite"),
    ("anchor=", "anchor must be one of"),
    ("offload=1", "offload must be true or false, not '1'"), ("checkpointing=", "must be true or false, not ''"),
    ("anchor=a=b", "anchor must be one of .*'a=b'"), ("=3", "no setting ''"),
])
def test_text_that_cannot_be_used_is_refused_in_one_line(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        WarpConfig().with_text([text])
    assert "\n" not in str(caught.value)
