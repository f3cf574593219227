"""Rewards: how they are called, the Bradley–Terry model, classifiers with tokenizers of their own."""

import functools
import math
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import make_policy, make_tokenizer
from transformers import (
    AutoModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from warp_lite import BradleyTerry, ClassifierReward, load_reward, save_policy
from warp_lite.policies.prompts import Prompts, encode_prompts, pad_right
from warp_lite.policies.sampling import Rollout, completion_ids
from warp_lite.rewards.bradley_terry import train_bradley_terry
from warp_lite.rewards.calling import NotFinite, reward_name, rollout_rewards

PROMPTS = ["this film", "that plot was great", "i loved it"]


@pytest.fixture
def rollout(tokenizer):
    """Two policies with three ragged prompts each, completions that end early, late and never."""
    encoded = encode_prompts(tokenizer, PROMPTS)
    columns = {"target": [3, 1, 2], "source": list("abc")}
    prompts = Prompts(encoded.texts, encoded.ids, encoded.mask, columns).batch(np.array([[0, 1, 2], [2, 1, 0]]))
    ids = torch.tensor([[[6, 7, 2, 0], [2, 0, 0, 0], [8, 6, 7, 9]], [[9, 2, 0, 0], [8, 8, 8, 2], [4, 2, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]])
    return Rollout(prompts, ids, mask, torch.zeros(2, 3, 4))


TEXTS = ["film plot", "", "was film plot is", "is", "was was was", "this"]
LENGTHS = [3, 1, 4, 2, 4, 2]


# --- how a reward is called ------------------------------------------------------------------


def test_a_function_of_trls_signature_is_called_unchanged(rollout, tokenizer):
    """Also one of those in TRL's documentation that take completions, or their ids, and nothing else."""
    calls = []

    def full(prompts, completions, completion_ids, target, **kwargs):
        calls.append((prompts, completions, completion_ids, target, kwargs))
        return [float(len(ids)) for ids in completion_ids]

    assert rollout_rewards([full, full], rollout, tokenizer).flatten().tolist() == LENGTHS
    [(prompts, completions, ids, target, rest)] = calls  # once for both policies
    assert prompts == [PROMPTS[i] for i in (0, 1, 2, 2, 1, 0)] and completions == TEXTS
    assert ids == completion_ids(rollout.ids, rollout.mask) and target == [3, 1, 2, 2, 1, 3]
    assert rest == {"source": list("abccba")}


@pytest.mark.parametrize("reward", [
    lambda prompts, completions: [float(len(text)) for text in completions],
    lambda prompts, completions, **kwargs: [float(len(text)) for text in completions],
    lambda completions, **kwargs: [float(len(text)) for text in completions],
    lambda completions: [float(len(text)) for text in completions],
    lambda completions, prompts: [float(len(text)) for text in completions],
    lambda p, c: [float(len(text)) for text in c],
    lambda p, c, /: [float(len(text)) for text in c],
    lambda p, c, target, *, source: [float(len(text)) + 0 * t for text, t in zip(c, target)],
    lambda *args: [float(len(text)) for text in args[1]],
    lambda **kwargs: [float(len(text)) for text in kwargs["completions"]],
    functools.partial(lambda scale, prompts, completions: [scale * len(text) for text in completions], 1.0),
], ids=lambda f: "")
def test_a_function_is_given_what_it_takes_and_nothing_else(reward, rollout, tokenizer):
    expected = [[len(text) for text in TEXTS[:3]], [len(text) for text in TEXTS[3:]]]
    assert rollout_rewards([reward, reward], rollout, tokenizer).tolist() == expected


def test_a_function_of_ids_alone_and_a_callable_object_are_called_too(rollout, tokenizer):
    class Longest:
        """A reward with a state."""

        def __call__(self, prompts, completions, **kwargs):
            return [len(ids) for ids in kwargs["completion_ids"]]

    for reward in (lambda completion_ids, **kwargs: [len(ids) for ids in completion_ids], Longest()):
        assert rollout_rewards([reward] * 2, rollout, tokenizer).flatten().tolist() == LENGTHS


@pytest.mark.parametrize("values", [
    lambda n: list(range(n)), lambda n: tuple(range(n)), lambda n: np.arange(n), lambda n: np.arange(n, dtype="f4"),
    lambda n: torch.arange(n), lambda n: torch.arange(n).float().requires_grad_(), lambda n: (i for i in range(n)),
    lambda n: [torch.tensor(float(i)) for i in range(n)], lambda n: [np.float32(i) for i in range(n)],
    lambda n: dict(enumerate(range(n))).values(), lambda n: [Decimal(i) for i in range(n)],
    lambda n: [Fraction(2 * i, 2) for i in range(n)], lambda n: [np.float16(i) for i in range(n)],
    lambda n: torch.arange(n).bfloat16(), lambda n: [i if i != 1 else True for i in range(n)],
], ids=["list", "tuple", "ints", "floats", "tensor", "tensor with gradient", "generator", "list of tensors",
        "list of numpy numbers", "values of a dict", "decimals", "fractions", "halves", "bfloat16", "a bool"])
def test_rewards_may_come_as_any_sequence_of_numbers(values, rollout, tokenizer):
    rewards = rollout_rewards([lambda prompts, completions: values(len(completions))] * 2, rollout, tokenizer)
    assert rewards.dtype == torch.float64 and not rewards.requires_grad
    assert rewards.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("returned, words", [
    ([1.0] * 5, "returned 5 values for 6 completions"), ([], "returned 0 values for 6"), (None, "None"),
    (1.0, "1.0.*not a list of numbers"), ([[1.0]] * 6, "not a list of numbers"), (["good"] * 6, "good"),
    (torch.ones(6, 2), "not a list of numbers"), (np.ones((6, 1)), "not a list of numbers"),
    (dict.fromkeys(range(6), 1.0), "dict.*not a list of numbers"), (set(range(6)), "set.*not a list of numbers"),
    (frozenset(range(6)), "not a list of numbers"), ("123456", "str.*not a list of numbers"),
    (b"123456", "bytes.*not a list of numbers"), (["1.0"] * 6, "not a list of numbers"),
    (np.ones(6, dtype=complex), "not a list of numbers"), (np.ones(6, dtype="complex64"), "not a list of numbers"),
    ([torch.ones(1)] * 6, "not a list of numbers"), ([10**400] * 6, "not a list of numbers"), ([1j] * 6, "not a list"),
], ids=str)
def test_anything_else_is_refused_in_one_line(returned, words, rollout, tokenizer):
    with pytest.raises(ValueError, match=words) as caught:
        rollout_rewards([lambda prompts, completions: returned] * 2, rollout, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_told_with_its_place(bad, rollout, tokenizer):
    with pytest.raises(NotFinite, match=f"the reward is {bad} for a completion of the prompt 'that plot was great'"):
        rollout_rewards([lambda prompts, completions: [0, 1, 2, 3, bad, 5]] * 2, rollout, tokenizer)
    other = lambda prompts, completions: [0.0] * len(completions)  # noqa: E731
    with pytest.raises(NotFinite) as caught:
        rollout_rewards([other, lambda prompts, completions: [bad, bad, 1.0]], rollout, tokenizer)
    assert str(caught.value.places) == str({1: (0, bad)})


def test_none_in_the_place_of_a_reward_leaves_the_completion_without_one(rollout, tokenizer):
    rewards = rollout_rewards([lambda prompts, completions: [0, 1, 2, 3, None, 5]] * 2, rollout, tokenizer)
    assert rewards.isnan().tolist() == [[False] * 3, [False, True, False]]


def test_each_run_is_rewarded_by_its_own_function(tokenizer, rollout):
    """Runs of one function share a call; rows, prompts and columns stay together."""
    calls = {"length": [], "target": []}

    def length(prompts, completions, completion_ids, **kwargs):
        calls["length"].append(prompts)
        return [len(ids) for ids in completion_ids]

    def target(prompts, completions, target):
        calls["target"].append(prompts)
        return target

    four = Rollout(
        Prompts(rollout.prompts.texts * 2, rollout.prompts.ids.repeat(2, 1, 1), rollout.prompts.mask.repeat(2, 1, 1),
                {name: values * 2 for name, values in rollout.prompts.columns.items()}),
        rollout.ids.repeat(2, 1, 1), rollout.mask.repeat(2, 1, 1), rollout.logprobs.repeat(2, 1, 1))
    rewards = rollout_rewards([length, target, target, length], four, tokenizer)
    assert rewards.tolist() == [LENGTHS[:3], [2, 1, 3], [3, 1, 2], LENGTHS[3:]]
    assert len(calls["length"]) == len(calls["target"]) == 1
    assert calls["target"][0] == [PROMPTS[i] for i in (2, 1, 0, 0, 1, 2)]


def test_a_reward_of_ids_is_given_ids_and_no_gradient_passes(rollout, tokenizer):
    class FromIds:
        """Has a parameter, as a reward model does."""

        scale = torch.tensor(2.0, requires_grad=True)

        def from_ids(self, prompts, ids, mask):
            assert prompts.ids.shape[:-1] == ids.shape[:-1] == (2, 3)
            return self.scale * (ids * mask).sum(-1)

    one = FromIds()
    rewards = rollout_rewards([one, one], rollout, tokenizer)
    assert rewards.tolist() == (2.0 * (rollout.ids * rollout.mask).sum(-1)).tolist()
    assert not rewards.requires_grad and rewards.dtype == torch.float64


def test_ids_of_one_tokenizer_are_not_shown_to_a_reward_model_of_another(rollout, tokenizer):
    model = bradley_terry(make_tokenizer("this film was great i loved it that plot".split()))
    with pytest.raises(ValueError, match="BradleyTerry reads token ids.*another tokenizer"):
        rollout_rewards([model, model], rollout, tokenizer)
    same = bradley_terry(make_tokenizer())  # another object, the same words
    assert torch.isfinite(rollout_rewards([same, same], rollout, tokenizer)).all()


# --- the Bradley–Terry model -----------------------------------------------------------------


def bradley_terry(tokenizer, architecture="gpt2", dtype=torch.float64):
    """A reward model with a random trunk and head."""
    policy = make_policy(architecture, len(tokenizer), dtype)
    model = BradleyTerry(policy.base_model.requires_grad_(False), tokenizer)
    model.head = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.mean, model.std = 0.3, 1.7
    return model


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama"])
def test_the_reward_is_the_standardised_head_of_the_mean_hidden_state_and_ignores_padding(
        architecture, rollout, tokenizer):
    """Each sequence alone, unpadded, through the library's trunk."""
    model = bradley_terry(tokenizer, architecture)
    rewards = rollout_rewards([model, model], rollout, tokenizer)
    completions = completion_ids(rollout.ids, rollout.mask)
    for text, completion, value in zip(rollout.prompts.texts, completions, rewards.flatten()):
        ids = torch.tensor([tokenizer(text)["input_ids"] + completion])
        hidden = model.trunk(ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close((hidden.mean(0) @ model.head - 0.3) / 1.7, value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_the_scores_that_are_trained_are_the_rewards_that_are_given(architecture, rollout, tokenizer):
    model = bradley_terry(tokenizer, architecture)
    prompts = rollout.prompts
    ids, mask = torch.cat([prompts.ids, rollout.ids], -1)[0], torch.cat([prompts.mask, rollout.mask], -1)[0]
    given = model.from_ids(prompts, rollout.ids, rollout.mask)
    torch.testing.assert_close(model.scores(ids, mask), given[0], atol=1e-6, rtol=1e-6)
    for chunk in (1, 2, 4):
        again = model.from_ids(prompts, rollout.ids, rollout.mask, chunk=chunk)
        torch.testing.assert_close(again, given, atol=1e-6, rtol=1e-6)


def test_rewards_of_texts_are_those_of_their_ids(rollout, tokenizer):
    """Of completions that ended; of others the ids tell that they did not."""
    model = bradley_terry(tokenizer)
    rewards = model.from_ids(rollout.prompts, rollout.ids, rollout.mask).flatten()
    ids = completion_ids(rollout.ids, rollout.mask)
    from_texts = torch.tensor(model(rollout.prompts.texts, TEXTS), dtype=torch.float64)
    with_ids = torch.tensor(model(rollout.prompts.texts, TEXTS, completion_ids=ids), dtype=torch.float64)
    torch.testing.assert_close(with_ids, rewards, atol=1e-9, rtol=1e-9)
    ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in ids])
    torch.testing.assert_close(from_texts[ended], rewards[ended], atol=1e-9, rtol=1e-9)
    assert not ended.all() and (from_texts[~ended] - rewards[~ended]).abs().min() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_a_reward_model_is_read_as_it_was_written(architecture, rollout, tokenizer, tmp_path):
    model = bradley_terry(tokenizer, architecture, torch.float32)
    model.save(tmp_path / "reward")
    for again in (BradleyTerry.load(tmp_path / "reward"), load_reward(str(tmp_path / "reward"))):
        assert all(torch.equal(again.trunk.state_dict()[name], tensor)
                   for name, tensor in model.trunk.state_dict().items())
        assert torch.equal(again.head, model.head)
        assert again(PROMPTS, TEXTS[:3]) == pytest.approx(model(PROMPTS, TEXTS[:3]), abs=1e-5)
        assert (again.mean, again.std) == (model.mean, model.std)
        assert not any(parameter.requires_grad for parameter in again.trunk.parameters())
    assert {path.suffix for path in (tmp_path / "reward").iterdir()} == {".json", ".safetensors"}  # nothing pickled


def test_training_raises_the_chosen_above_the_rejected(tokenizer):
    """Chosen are those that say "great"; the model learns to tell, and only from what it was shown."""
    model = BradleyTerry(AutoModel.from_config(make_policy("gpt2", len(tokenizer), initializer_range=0.05).config),
                         tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, 18, (2, 128, 6), generator=generator)
    ids[0, torch.arange(128), torch.randint(6, (128,), generator=generator)] = tokenizer.get_vocab()["great"]
    mask = torch.ones(128, 6, dtype=torch.long)
    before = (model.scores(ids[0], mask) > model.scores(ids[1], mask)).float().mean()
    train_bradley_terry(model, (ids[0], mask), (ids[1], mask), epochs=8, batch=32, lr=1e-2)
    after = (model.scores(ids[0], mask) > model.scores(ids[1], mask)).float().mean()
    assert before < 0.9 and after > 0.95
    assert not model.head.requires_grad and not any(p.requires_grad for p in model.trunk.parameters())


# --- classifiers with tokenizers of their own ------------------------------------------------

OTHER_WORDS = "great film this plot was dull that loved i it".split()  # other ids than the policy's


def classifier_folder(kind, folder, pad="<pad>", labels=2):
    """A random classifier on disk, its tokenizer unlike the policy's."""
    tokenizer = make_tokenizer(OTHER_WORDS, bos=False)
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "distilbert":
        model = DistilBertForSequenceClassification(DistilBertConfig(
            vocab_size=len(tokenizer), dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40,
            num_labels=labels, initializer_range=0.5, **special))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=labels,
            initializer_range=0.5, **special))
    save_policy(model.eval(), tokenizer, folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_classifiers_reward_is_the_librarys_logit_of_each_text_alone(kind, pad, tmp_path, rollout, tokenizer):
    """Read by its own tokenizer, with no special tokens of the policy's, whatever stands beside it in the batch."""
    model, own = classifier_folder(kind, tmp_path / "c", pad)
    assert own("this film")["input_ids"] != tokenizer("this film")["input_ids"][1:]
    expected = torch.stack([model(torch.tensor([own(f"{p} {c}")["input_ids"]])).logits[0]
                            for p, c in zip(rollout.prompts.texts, TEXTS)])
    for options, column in (({}, expected[:, -1]), ({"label": 0}, expected[:, 0]), ({"label": -1}, expected[:, 1]),
                            ({"log_probability": True}, expected.log_softmax(-1)[:, 1])):
        for batch in (64, 2):
            reward = ClassifierReward(tmp_path / "c", batch=batch, **options)
            values = rollout_rewards([reward, reward], rollout, tokenizer)
            torch.testing.assert_close(values.flatten(), column.double(), atol=1e-5, rtol=1e-5)


def test_a_reward_model_with_one_output_gives_it_as_it_is(tmp_path):
    model, own = classifier_folder("gpt2", tmp_path / "c", labels=1)
    reward = load_reward(str(tmp_path / "c"))
    expected = model(torch.tensor([own("this film was great")["input_ids"]])).logits.item()
    assert reward(["this film"], [" was great"]) == [pytest.approx(expected, abs=1e-5)]
    plain = ClassifierReward(tmp_path / "c", log_probability=True)  # a softmax over one is no use
    assert plain(["this film"], [" was great"]) == [pytest.approx(expected, abs=1e-5)]


def test_a_causal_lm_is_not_taken_for_a_classifier(tmp_path, tokenizer):
    """The library would give it a random head."""
    save_policy(make_policy("gpt2", len(tokenizer), torch.float32), tokenizer, tmp_path / "lm")
    with pytest.raises(ValueError, match="cannot load a reward model from .*lacks weights.*score.weight"):
        ClassifierReward(tmp_path / "lm")


def test_a_label_that_the_classifier_has_not_is_refused(tmp_path):
    classifier_folder("gpt2", tmp_path / "c", labels=2)
    for label in (2, -3, "POSITIVE"):
        with pytest.raises(ValueError, match=rf"has 2 labels \(LABEL_0, LABEL_1\) and no label {label!r}"):
            ClassifierReward(tmp_path / "c", label=label)


# --- rewards by name -------------------------------------------------------------------------


def test_a_reward_is_found_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "number = 3\ndef length(prompts, completions):\n    return [len(text) for text in completions]\n")
    (tmp_path / "broken_rewards.py").write_text("def length(:\n")
    (tmp_path / "raising_rewards.py").write_text("raise RuntimeError('no such\\nluck')\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_reward("my_rewards:length")([""], ["abc"]) == [3]
    for spec, words in (("my_rewards:width", "'my_rewards:width'.*no attribute 'width'"),
                        ("my_rewards:number", "int, not a function"),
                        ("your_rewards:length", "No module named 'your_rewards'"), (":length", "':length'"),
                        ("my_rewards:", "'my_rewards:'"), ("broken_rewards:length", "broken_rewards"),
                        ("raising_rewards:length", "no such$"), ("./missing", "there is no such folder"),
                        (str(tmp_path), "no config.json")):
        with pytest.raises(ValueError, match=words) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)
    assert sys.path == path


@pytest.mark.parametrize("broken", ["model.safetensors", "reward_head.safetensors", "config.json"])
def test_a_truncated_reward_model_is_named_in_one_line(broken, tmp_path, tokenizer):
    bradley_terry(tokenizer, dtype=torch.float32).save(tmp_path / "reward")
    file = tmp_path / "reward" / broken
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot load a reward model from") as caught:
        load_reward(str(tmp_path / "reward"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_folder_calls_rewards_by_their_names(tokenizer):
    def length(prompts, completions):
        return [0.0]

    assert "length" in reward_name(length)
    assert reward_name(bradley_terry(tokenizer)) == "BradleyTerry"
    assert reward_name([length, length]).count("length") == 2


def test_lists_of_ids_are_padded_on_the_right():
    ids, mask = pad_right([[5, 6, 2], [2], []], 9)
    assert ids.tolist() == [[5, 6, 2], [2, 9, 9], [9, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
