"""What a reward is given: the policy's words, copies it may change, parts of messages; and what it may return: a
coroutine, None."""

import asyncio
import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, pipeline

from warp_lite import ClassifierReward, WarpConfig, load_result, run_warp, save_policy
from warp_lite.policies.messages import content_text, render
from warp_lite.policies.prompts import encode_prompts, pad_right
from warp_lite.policies.sampling import Rollout
from warp_lite.rewards.calling import SeveralRewards, call_reward, mean_reward, rollout_rewards
from warp_lite.training.reinforce import advantages

TEMPLATE = ("{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")
PARTS_TEMPLATE = TEMPLATE.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
CONFIG = WarpConfig(iterations=1, runs=2, steps=3, batch_size=4, max_new_tokens=4, eval_every=0)


def byte_tokenizer(template=None):
    """Byte-level, as GPT-2's: the spaces of a text are tokens of it, and nothing else puts any there."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<turn>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                        unk_token="<unk>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_tokenizer():
    """Words that carry the space before them, which decoding takes from the first word of a text."""
    words = ["▁I", "▁love", "▁it", "able", "▁unbeliev", "."]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False), vocabulary


def rollout_of(tokenizer, prompts, completions, columns=None):
    """A rollout of one policy that wrote these completions, each ended by EOS."""
    encoded = encode_prompts(tokenizer, prompts)
    encoded.columns = columns or {}
    ids, mask = pad_right([[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in completions], 0)
    return Rollout(encoded.batch(np.arange(len(prompts))[None]), ids[None], mask[None], torch.zeros(ids[None].shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random classifier with the byte-level tokenizer."""
    torch.manual_seed(0)
    tokenizer, path = byte_tokenizer(), tmp_path_factory.mktemp("classifier") / "c"
    save_policy(LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, num_labels=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval(), tokenizer, path)
    return path


# --- the policy's words ---------------------------------------------------------------------

PAIRS = [("I love", " it"), ("The film is unbeliev", "able"), ("3.", "14"), ("It was great", ", really."),
         ("他说", "你好"), ("f(", "x)"), ("love\u2019", "s"), ("a ", "b"), ("a\n", "\tb"), ("done", "")]


def test_prompt_and_completion_are_read_as_the_policys_tokens_write_them(folder):
    """By a classifier, a pipeline and any function that names `whole_texts`; no space is put in."""
    tokenizer, seen = byte_tokenizer(), []
    prompts, completions = map(list, zip(*PAIRS))
    rollout = rollout_of(tokenizer, prompts, completions)

    def watching(completions, whole_texts):
        seen.append(whole_texts)
        return [0.0] * len(completions)

    rollout_rewards([watching], rollout, tokenizer)
    assert seen == [[prompt + completion for prompt, completion in PAIRS]]
    classifier = ClassifierReward(folder)
    expected = torch.tensor([[classifier([""], [text])[0] for text in seen[0]]], dtype=torch.float64)
    judge = pipeline("text-classification", str(folder))
    for reward in (classifier, judge, mean_reward([classifier, judge])):
        torch.testing.assert_close(rollout_rewards([reward], rollout, tokenizer), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor([classifier(prompts, completions)]).double(), expected, rtol=0, atol=1e-5)
    apart = torch.tensor([classifier([""] * len(PAIRS), [f"{p} {c}" for p, c in PAIRS])]).double()
    assert (apart - expected)[:, :2].abs().min() > 1e-3  # a space would have shown


def test_a_sentencepiece_policys_spaces_are_kept_and_none_is_put_within_a_word():
    tokenizer, vocabulary = sentencepiece_tokenizer()
    rows = [["▁I", "▁love", "▁it"], ["▁I", "▁unbeliev", "able"]]
    ids = torch.tensor([[vocabulary[word] for word in row] for row in rows])
    encoded = encode_prompts(byte_tokenizer(), ["x", "x"]).batch(np.arange(2)[None])  # ids are put in below
    encoded.ids, encoded.mask = ids[None, :, :2], torch.ones(1, 2, 2, dtype=torch.long)
    rollout = Rollout(encoded, ids[None, :, 2:], torch.ones(1, 2, 1, dtype=torch.long), torch.zeros(1, 2, 1))
    seen = []
    rollout_rewards([lambda completions, whole_texts: seen.extend(whole_texts) or [0.0, 0.0]], rollout, tokenizer)
    assert seen == ["I love it", "I unbelievable"]


def test_a_function_with_keywords_alone_is_given_what_trl_gives_and_no_whole_texts():
    tokenizer = byte_tokenizer()
    rollout = rollout_of(tokenizer, ["a", "b"], ["c", "d"], {"prompts": [1, 2], "reward": [3, 4], "self": [5, 6]})

    def plain(prompts, completions, **kwargs):
        assert prompts == ["a", "b"] and kwargs.keys() == {"completion_ids", "reward", "self"}
        return [0.0, 1.0]

    for reward in (plain, mean_reward([plain, lambda p, c: [0.0, 1.0]])):
        assert rollout_rewards([reward], rollout, tokenizer).tolist() == [[0.0, 1.0]]


# --- copies ---------------------------------------------------------------------------------


def changing(prompts, completions, keys, completion_ids, **kwargs):
    """A reward that empties all that it is given."""
    values = []
    for prompt, completion, key, ids in zip(prompts, completions, keys, completion_ids):
        assert len(prompt) == 1 and prompt[0]["content"].startswith("q") and len(key["a"]) == 3 and ids
        prompt[0]["content"] = "changed"
        prompt += completion
        key["a"].pop()
        ids.clear()
        values.append(float(len(prompt[-1]["content"])))
    prompts.clear()
    return values


def test_a_reward_may_change_what_it_is_given(policy_of, tmp_path):
    """At every step, in training, when it is tried and when it is measured; the caller's list stays as it was, and
    the folder is what its own hash says."""
    from datasets import Dataset

    tokenizer = byte_tokenizer(TEMPLATE)
    conversations = [[{"role": "user", "content": f"q{i}"}] for i in range(6)]
    before = copy.deepcopy(conversations)
    model = policy_of("llama", dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=64)
    data = Dataset.from_dict({"prompt": conversations, "keys": [{"a": list("abc")} for _ in conversations]})
    for prompts in (data, Columns(prompt=conversations, keys=[{"a": list("abc")} for _ in conversations])):
        out = tmp_path / type(prompts).__name__
        result = run_warp(model, tokenizer, changing, prompts, CONFIG, out=out, progress=False)
        assert result.front([1.0], samples=1) == load_result(out, changing).front([1.0], samples=1)
    assert conversations == before
    several = mean_reward([changing, lambda *a, **k: changing(*a, **k)])
    rollout = rollout_of(tokenizer, conversations, ["x"] * 6, {"keys": [{"a": list("abc")} for _ in range(6)]})
    assert rollout_rewards([several], rollout, tokenizer).tolist() == [[1.0] * 6]


class Columns(dict):
    """A data set whose rows are the caller's own objects."""

    column_names = ("prompt", "keys")


def test_a_reward_of_ids_may_change_them(tokenizer):
    class Zeroing:
        """Overwrites all its tensors."""

        def from_ids(self, prompts, ids, mask):
            values = (ids * mask).sum(-1).float()
            for tensor in (prompts.ids, prompts.mask, ids, mask):
                tensor.zero_()
            return values

    rollout = rollout_of(tokenizer, ["this film", "that"], ["was great", "is"])
    kept = copy.deepcopy(rollout)
    first, second = (rollout_rewards([Zeroing()], rollout, tokenizer) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(rollout.ids, kept.ids) and torch.equal(rollout.mask, kept.mask)
    assert torch.equal(rollout.prompts.ids, kept.prompts.ids) and torch.equal(rollout.prompts.mask, kept.prompts.mask)


# --- coroutines -----------------------------------------------------------------------------


def test_a_reward_may_be_async_also_where_a_loop_is_running(rollout_pair):
    """As in a notebook; all calls are in one loop, since a client is bound to the first it was used in."""
    rollout, tokenizer = rollout_pair
    loops = set()

    async def reward(prompts, completions, **kwargs):
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    class Judge:
        """A reward with a state."""

        async def __call__(self, completions):
            return await reward(None, completions)

    async def within_a_loop():
        return rollout_rewards([reward], rollout, tokenizer).tolist()

    expected = [[1.0, 2.0, 3.0]]
    assert asyncio.run(within_a_loop()) == expected
    for other in (reward, Judge(), mean_reward([reward, Judge()])):
        assert rollout_rewards([other], rollout, tokenizer).tolist() == expected
    assert len(loops) == 1


def test_what_an_async_reward_raises_is_raised(rollout_pair):
    rollout, tokenizer = rollout_pair

    async def failing(prompts, completions):
        raise RuntimeError("no such server")

    with pytest.raises(RuntimeError, match="no such server"):
        rollout_rewards([failing], rollout, tokenizer)


@pytest.fixture
def rollout_pair(tokenizer):
    made = byte_tokenizer()
    return rollout_of(made, ["x", "y", "z"], ["a", "ab", "abc"]), made


def test_series_of_numbers_are_taken_and_tables_are_not(rollout_pair):
    pandas = pytest.importorskip("pandas")
    rollout, tokenizer = rollout_pair
    series = rollout_rewards([lambda p, c: pandas.Series([1, 2, 3], index=[9, 8, 7])], rollout, tokenizer)
    assert series.tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="DataFrame.*not a list of numbers"):
        rollout_rewards([lambda p, c: pandas.DataFrame({"a": [1, 2, 3]})], rollout, tokenizer)


# --- None -----------------------------------------------------------------------------------


def test_advantages_without_some_rewards_are_those_of_the_others_alone():
    rewards = torch.randn(3, 6, dtype=torch.float64)
    scored = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool()
    found = advantages(rewards.masked_fill(~scored, math.nan), scored)
    for e, row in enumerate(scored):
        expected = advantages(rewards[e, row]) if row.sum() > 1 else torch.zeros(1)
        torch.testing.assert_close(found[e, row], expected.double(), rtol=1e-14, atol=1e-14)
        assert not found[e, ~row].any()
    assert torch.equal(advantages(rewards, torch.ones(3, 6).bool()), advantages(rewards))


def some_none(prompts, completions, **kwargs):
    """Scores texts of an even length only."""
    return [None if len(text) % 2 else float(len(text)) for text in completions]


def some_zero(prompts, completions, **kwargs):
    """The same with 0 in the place of None."""
    return [value or 0.0 for value in some_none(prompts, completions)]


def never(prompts, completions, **kwargs):
    return [None for _ in completions]


def test_both_executors_train_the_same_where_some_rewards_are_none(policy_of, tokenizer, tmp_path):
    """And do it otherwise than if None were a 0; the folder can be read and measured."""
    policy, prompts = policy_of("llama"), ["this film", "that plot", "i loved", "the", "it was"] * 2
    config = CONFIG.replace(batch_size=6, lr=1e-2, beta=0.1)
    results = {}
    for executor in ("batched", "serial"):
        out = tmp_path / executor
        results[executor] = run_warp(policy, tokenizer, some_none, prompts, config, out=out, executor=executor,
                                     eval_prompts=["this film"], progress=False)
        front = load_result(out, some_none).front([0.0, 1.0], samples=32)
        assert all(point["reward"] >= 0 and point["reward_se"] is None for point in front)  # of one prompt
    zeros = run_warp(policy, tokenizer, some_zero, prompts, config, eval_prompts=["this film"], progress=False)
    one, two, other = (list(r.iterations[0].merged.values()) for r in (*results.values(), zeros))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert max((a - c).abs().max().item() for a, c in zip(one, other)) > 1e-4


@pytest.mark.parametrize("executor", ["batched", "serial"])
def test_a_batch_without_any_reward_has_no_gradient_and_is_told_once(executor, policy_of, tokenizer, capsys, tmp_path):
    """As in TRL; where there is nothing else, the first trial and the front refuse it in a line that says None."""
    model, prompts = policy_of("llama"), ["this", "that", "the"]
    result = run_warp(model, tokenizer, never, prompts, CONFIG, executor=executor, progress=False)
    assert all(torch.equal(tensor, result.sft[name]) for name, tensor in result.iterations[0].merged.items())
    lines = [line for line in capsys.readouterr().err.splitlines() if "every reward is None" in line]
    assert [line[:73] for line in lines] == [
        f"warp-lite: every reward is None in iteration 1, run {m}, step 1: such a batch"[:73] for m in (1, 2)]
    with pytest.raises(ValueError, match="^the reward is None for every completion; return a number for some of them$"):
        result.front([1.0], samples=1)
    with pytest.raises(ValueError, match="the reward never is None for every completion of a first trial"):
        run_warp(model, tokenizer, never, prompts, CONFIG, executor=executor, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_first_trial_counts_its_batches_where_progress_is_shown(policy_of, tokenizer, monkeypatch, tmp_path):
    """Before anything is written, so that one sees at once that a large policy is at work."""
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append((options["desc"], options["total"], options["disable"], (tmp_path / "run").exists()))

    monkeypatch.setattr("warp_lite.training.iteration.tqdm", Bar)
    run_warp(policy_of("llama"), tokenizer, lambda prompts, completions: [0.0] * len(prompts), ["this", "that", "the"],
             CONFIG, out=tmp_path / "run")
    assert bars[0] == ("trying the reward", 2 * CONFIG.runs, None, False)
    assert bars[1][0] == "iteration 1" and bars[1][3]


def test_several_rewards_are_summed_and_averaged_over_those_that_scored():
    one, two = (lambda prompts, completions: [1.0, None, None]), (lambda prompts, completions: [3.0, 4.0, None])
    texts = ["a", "b", "c"]
    assert call_reward(SeveralRewards([one, two]), texts, texts) == [2.0, 4.0, None]
    assert call_reward(SeveralRewards([one, two], [1.0, -0.5]), texts, texts) == [-0.5, -2.0, None]
    with pytest.raises(ValueError, match="there are 1 reward_weights for 2 rewards"):
        SeveralRewards([one, two], [1.0])


# --- messages in parts ----------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, PARTS_TEMPLATE, TEMPLATE.replace("m['content']", "m['content'] | trim"),
                                      TEMPLATE.replace("{{ m['content'] }}", "{{ 'x' + m['content'] }}")])
def test_text_parts_are_read_by_templates_for_texts_and_for_parts(template):
    tokenizer = byte_tokenizer(template)
    parts = [{"role": "user", "content": [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]}]
    text = render(tokenizer, parts, add_generation_prompt=True)
    plain = [{"role": "user", "content": "one, two"}]
    if template is not PARTS_TEMPLATE:
        assert text == render(tokenizer, plain, add_generation_prompt=True)
    assert text.replace("x", "") == "<bos><turn>user\none, two<turn>\n<turn>assistant\n"


def test_messages_in_parts_are_rewarded_by_a_classifier_and_images_are_refused(folder, policy_of):
    tokenizer = byte_tokenizer(TEMPLATE)
    model = policy_of("llama", dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=64)
    conversations = [[{"role": "user", "content": [{"type": "text", "text": f"q{i}"}]}] for i in range(6)]
    classifier = ClassifierReward(folder)
    run_warp(model, tokenizer, classifier, conversations, CONFIG, progress=False)
    plain = [[{"role": "user", "content": f"q{i}"}] for i in range(6)]
    answers = [[{"role": "assistant", "content": "yes"}]] * 6
    assert classifier(conversations, answers) == classifier(plain, answers)
    assert content_text({"role": "assistant", "content": None}) == ""  # a call of tools
    image = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]]
    for read in (lambda: encode_prompts(tokenizer, image), lambda: classifier(image, answers[:1])):
        with pytest.raises(ValueError, match="message of role 'user' has a part of type 'image': only texts") as caught:
            read()
        assert "\n" not in str(caught.value)
