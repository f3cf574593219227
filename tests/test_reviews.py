"""The tiny world: its language, its gold reward, what was trained, and the cache."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from warp_lite import evaluate
from warp_lite.evaluation.metrics import perplexity
from warp_lite.policies.prompts import encode_prompts, encode_texts, pad_right
from warp_lite.policies.randomness import WORLD, generator
from warp_lite.policies.sampling import Policies
from warp_lite.worlds import load_world
from warp_lite.worlds import reviews as module
from warp_lite.worlds.grammar import (
    EMPHASIS,
    KIND_LOGIT,
    NOUN_LOGIT,
    PROMPT_LENGTH,
    WORDS,
    GoldReward,
    make_tokenizer,
    prompt_texts,
    reviews,
)
from warp_lite.worlds.reviews import ReviewsSettings, reviews_world, settings_hash, sft_hash, split_prompts

SMALL = {"width": 8, "layers": 1, "heads": 2, "sft_steps": 3, "sft_batch": 8, "pairs": 64, "reward_epochs": 1}
PROMPT = "this new film was"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def texts():
    return reviews(generator(0, 9, WORLD), 2000)


# --- the language ---------------------------------------------------------------------------


def test_every_review_survives_encoding_and_decoding(tokenizer, texts):
    rows = tokenizer(texts)["input_ids"]
    assert all(tokenizer.unk_token_id not in row and row[0] == tokenizer.bos_token_id for row in rows)
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == texts


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[:200])["input_ids"] == tokenizer(texts[:200])["input_ids"]
    for name in ("pad", "bos", "eos", "unk"):
        assert getattr(loaded, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id") is not None
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_there_are_at_least_300_prompts_and_training_sees_none_of_the_held_out_ones():
    train, held_out = split_prompts(ReviewsSettings())
    assert len(set(prompt_texts())) >= 300
    assert sorted(train + held_out) == sorted(prompt_texts()) and not set(train) & set(held_out)
    assert len(held_out) == 64 and split_prompts(ReviewsSettings(seed=1))[1] != held_out


def test_every_prompt_is_the_opening_of_reviews(tokenizer, texts):
    openings = {" ".join(text.split()[:PROMPT_LENGTH - 1]) for text in texts}
    assert openings <= set(prompt_texts()) and len(openings) > 300
    assert {len(row) for row in tokenizer(prompt_texts())["input_ids"]} == {PROMPT_LENGTH}


def test_the_sentiment_persists_through_a_review_and_but_turns_it(texts):
    sign = {word: 1 for word in WORDS["adjective+"].split() + WORDS["verb+"].split()}
    sign |= {word: -1 for word in WORDS["adjective-"].split() + WORDS["verb-"].split()}
    products = {False: [], True: []}                    # of neighbouring signs: kept, turned by "but"
    for text in texts:
        last, turned = None, False
        for word in text.split():
            turned |= word == "but"
            if word in sign:
                products[turned] += [last * sign[word]] if last else []
                last, turned = sign[word], False
    # 0.85² + 0.15² of the pairs agree (or, turned, differ): a mean product of 0.49
    assert np.mean(products[False]) == pytest.approx(0.49, abs=0.05)
    assert np.mean(products[True]) == pytest.approx(-0.49, abs=0.1)


def test_the_same_seed_writes_the_same_reviews(texts):
    assert reviews(generator(0, 9, WORLD), 50) == texts[:50] != reviews(generator(1, 9, WORLD), 50)


def test_the_grammars_own_reviews_use_possible_pairs_only(tokenizer, texts):
    possible = GoldReward(tokenizer).possible
    pairs = {pair for text in texts for pair in zip(text.split(), [*text.split()[1:], "<eos>"])}
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(pair)) for pair in pairs])
    assert possible[ids[:, 0], ids[:, 1]].all()
    assert possible.float().mean() < 0.2, "most pairs must be impossible for the penalty to say anything"
    assert len(pairs) > 0.9 * possible.sum(), "and nearly all possible ones must occur"


# --- the gold reward ------------------------------------------------------------------------

LONG = " ".join(["great", *(f"with superb {aspect}" for aspect in "acting plot music ending script cast".split()), "."])


@pytest.mark.parametrize("completion, value", [
    ("great .", 1.0),
    ("dull .", -1.0),
    ("really great .", EMPHASIS["really"]),
    ("rather dull .", -EMPHASIS["rather"]),
    ("great and the plot was very dull .", 1 - EMPHASIS["very"]),
    ("great but i hated it .", 0.0),
    ("great great .", 2 - 1),                      # "great great" is impossible
    ("the plot was great .", 1 - 1),               # so is "was the", across the end of the prompt
    ("great . great .", 2 - 1),                    # ". great" is not, ". i" would be possible
    ("really great really .", EMPHASIS["really"] - 2),   # an adverb with nothing to emphasise; two bad pairs
    (LONG, 5.0),                                   # seven kind words, clamped
    (LONG.replace("great", "dull").replace("superb", "awful"), -5.0),
])
def test_gold_rewards_of_hand_made_completions(tokenizer, completion, value):
    assert GoldReward(tokenizer)([PROMPT], [completion]) == pytest.approx([value])


def test_a_review_that_never_ends_loses_one(tokenizer):
    gold, prompts = GoldReward(tokenizer), encode_prompts(tokenizer, [PROMPT, PROMPT])
    ids, mask = pad_right(tokenizer(["great . <eos>", "great ."], add_special_tokens=False)["input_ids"], 0)
    assert gold.from_ids(prompts, ids, mask).tolist() == [1.0, 0.0]


def test_what_follows_eos_earns_nothing(tokenizer):
    gold, prompts = GoldReward(tokenizer), encode_prompts(tokenizer, [PROMPT])
    ids, mask = pad_right(tokenizer(["great . <eos> great the very"], add_special_tokens=False)["input_ids"], 0)
    mask[:, 3:] = 0
    assert gold.from_ids(prompts, ids, mask).tolist() == [1.0]


def test_gold_of_texts_is_gold_of_their_ids_and_standardised(tokenizer, texts):
    plain, scaled = GoldReward(tokenizer), GoldReward(tokenizer, mean=0.5, std=2.0)
    openings = [" ".join(text.split()[:4]) for text in texts[:50]]
    rest = [" ".join(text.split()[4:]) for text in texts[:50]]
    values = plain(openings, rest)
    assert scaled(openings, rest) == pytest.approx([(v - 0.5) / 2 for v in values])
    assert any(v < 0 for v in values) and any(v > 0 for v in values)


# --- what was trained -----------------------------------------------------------------------


def log_probability(text):
    """log P(review) under the grammar, summed over its latent sentiment: the forward algorithm, by hand."""
    words, size = text.split(), {state: len(pool.split()) for state, pool in WORDS.items()}
    good, bad = (set(WORDS[f"adjective{sign}"].split()) | set(WORDS[f"verb{sign}"].split()) for sign in "+-")
    _, kind, noun = words[:3]
    logit = -0.3 + NOUN_LOGIT.get(noun, 0) + KIND_LOGIT.get(kind, 0)
    state = np.array([1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))])       # P(good), P(bad)
    total = -math.log(size["determiner"] * size["kind"] * size["noun"] * 3)         # 3: one to three clauses

    def emit(word, pool):
        nonlocal state
        assert word in good | bad
        state = state * (np.array([0.85, 0.15]) if word in good else np.array([0.15, 0.85])) / pool

    def judgement(rest):
        nonlocal total
        assert rest.pop(0) == "was"
        adverb = rest[0] in EMPHASIS
        total += math.log(0.4 / size["adverb"]) if adverb else math.log(0.6)
        rest[:1] = [] if adverb else rest[:1]
        emit(rest.pop(0), size["adjective+"])

    rest = words[3:]
    judgement(rest)
    while rest != ["."]:
        word = rest.pop(0)
        if word == "with":
            total += math.log(0.2 / size["aspect"])
            emit(rest.pop(0), size["trait+"])
            rest.pop(0)
            continue
        total += math.log(0.15 if word == "but" else 0.85 / size["link"])
        state = state[::-1] if word == "but" else state
        if rest.pop(0) == "the":
            total += math.log(0.4 / size["aspect"])
            rest.pop(0)
            judgement(rest)
        else:
            emit(rest.pop(0), size["verb+"])
            total += math.log(0.2)
            if rest.pop(0) == "the":
                total -= math.log(size["aspect"])
                rest.pop(0)
    return total + math.log(state.sum())


def test_the_sft_policy_has_learned_the_grammar(world, texts):
    """Its cross-entropy on fresh reviews is that of the grammar itself, and cannot be less."""
    _, mask = encode_texts(world.tokenizer, texts)
    tokens = mask[:, 1:].sum().item()
    (found,) = perplexity(Policies.of(world.policy), world.tokenizer, texts)
    entropy = -sum(map(log_probability, texts)) / tokens
    assert entropy - 0.005 < math.log(found) < entropy + 0.05
    assert world.facts["sft_loss"] == pytest.approx(entropy, abs=0.05)


def test_the_reward_model_agrees_with_gold_on_most_pairs_but_not_on_all(world):
    assert 0.8 < world.facts["pair_accuracy"] < 0.98
    assert world.facts["correlation"] > 0.7


def test_rewards_are_in_standard_deviations_of_sft_samples(world):
    found = evaluate(world.policy, world.policy, world.reward, world.prompts.given, world.tokenizer, gold=world.gold,
                     samples=3)
    assert abs(found.kl) < 1e-4
    for name in ("reward", "gold"):
        assert abs(getattr(found, name)) < 4 * getattr(found, f"{name}_se") + 0.03
    assert found.length < 20


# --- the cache ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path))
    return tmp_path


def refuse(*args, **kwargs):
    raise AssertionError("it was built again")


def kept_in(cache):
    return {path.name for path in cache.iterdir()}


SFT = f"reviews-sft-{sft_hash(ReviewsSettings(**SMALL))}"  # the folder of the SFT policy alone


def test_a_world_is_built_once_and_again_only_if_absent(cache, monkeypatch):
    first = reviews_world(progress=False, **SMALL)
    assert first.folder == cache / f"reviews-{settings_hash(ReviewsSettings(**SMALL))}"
    assert kept_in(cache) == {first.folder.name, SFT}
    with monkeypatch.context() as patch:
        patch.setattr(module, "build", refuse)
        again = reviews_world(progress=False, **SMALL)
    before = (first.folder / "sft" / "model.safetensors").read_bytes()
    for file in cache.rglob("*"):
        if file.is_file():
            file.unlink()
    rebuilt = reviews_world(progress=False, **SMALL)
    assert (first.folder / "sft" / "model.safetensors").read_bytes() == before, "a world follows from its settings"
    sample = [PROMPT], ["great ."]
    assert first.reward(*sample) == again.reward(*sample) == rebuilt.reward(*sample)
    assert first.facts == again.facts == rebuilt.facts == json.loads((first.folder / "world.json").read_text())


def test_another_setting_is_another_folder():
    hashes = {settings_hash(ReviewsSettings(**settings)) for settings in (
        {}, {"seed": 1}, {"width": 32}, {"architecture": "gemma3"}, {"label_noise": 0.5}, {"version": 2})}
    assert len(hashes) == 6 and settings_hash(ReviewsSettings()) in hashes


def test_a_half_built_world_is_never_seen(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.BradleyTerry, "save", refuse)  # after the policy was written
        with pytest.raises(AssertionError):
            reviews_world(progress=False, **SMALL)
    assert kept_in(cache) == {SFT}
    assert reviews_world(progress=False, **SMALL).folder.is_dir()


def test_two_processes_may_build_the_same_world_at_once(cache, monkeypatch):
    """The second finds the folder there when it wants to put its own in place, and takes the first's."""
    with monkeypatch.context() as patch:
        save = module.BradleyTerry.save

        def slower(self, folder):
            save(self, folder)
            patch.setattr(module.BradleyTerry, "save", save)
            reviews_world(progress=False, **SMALL)

        patch.setattr(module.BradleyTerry, "save", slower)
        world = reviews_world(progress=False, **SMALL)
    assert kept_in(cache) == {world.folder.name, SFT}


def test_worlds_that_differ_in_their_reward_alone_share_the_sft_policy_that_each_would_train(cache, monkeypatch):
    first = reviews_world(progress=False, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_sft", refuse)
        others = [reviews_world(progress=False, **{**SMALL, **changed})
                  for changed in ({"taste": "detail"}, {"reward_seed": 1}, {"label_noise": 2.0, "pairs": 32})]
        with pytest.raises(AssertionError, match="it was built again"):
            reviews_world(progress=False, **{**SMALL, "sft_steps": 4})
    shared = [(world.folder / "sft" / "model.safetensors").read_bytes() for world in (first, *others)]
    monkeypatch.setenv("WARP_LITE_CACHE", str(cache / "alone"))
    alone = reviews_world(progress=False, taste="detail", **SMALL)
    assert {*shared} == {(alone.folder / "sft" / "model.safetensors").read_bytes()}
    for file in ("reward/model.safetensors", "reward/reward_head.safetensors", "world.json"):
        assert (alone.folder / file).read_bytes() == (others[0].folder / file).read_bytes()
    assert first.facts["sft_loss"] == others[0].facts["sft_loss"]


def test_a_world_is_measured_by_random_numbers_of_its_own_seed(world, monkeypatch):
    folder = settings_hash(ReviewsSettings())
    monkeypatch.setattr(module, "settings_hash", lambda settings: folder)  # that of the world there is
    assert world.eval_seed == 0 and reviews_world(seed=7).eval_seed == 7


def test_an_unknown_architecture_is_refused(cache):
    with pytest.raises(ValueError, match="architecture must be gpt2 or gemma3, not 'llama'"):
        reviews_world("llama")


def test_the_world_of_gemma_builds_and_samples(cache):
    world = reviews_world("gemma3", progress=False, **SMALL)
    assert type(world.policy).__name__ == "Gemma3ForCausalLM"
    found = evaluate(world.policy, world.policy, world.reward, world.eval_prompts.given[:4], world.tokenizer,
                     gold=world.gold)
    assert abs(found.kl) < 1e-4 and math.isfinite(found.reward) and math.isfinite(found.gold)


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("warp_lite.worlds.reviews.build", lambda *a: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="the cache folder .*cache cannot be written .*; set WARP_LITE_CACHE to one"):
        reviews_world("gpt2", progress=False)
    monkeypatch.delenv("WARP_LITE_HUB", raising=False)
    with pytest.raises(ValueError, match="the cache folder .* cannot be written"):
        load_world("gpt2-imdb", progress=False, small=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_world_that_is_in_the_cache_is_read_from_one_that_cannot_be_written(world, monkeypatch):
    monkeypatch.setattr("warp_lite.worlds.reviews.writable_cache", lambda: pytest.fail("it is not written"))
    assert reviews_world("gpt2", progress=False).facts == world.facts
