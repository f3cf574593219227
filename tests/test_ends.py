"""A completion ends at any id that the model or its tokenizer calls EOS, wherever it is sampled, scored or read."""

import json

import numpy as np
import pytest
import torch
from tiny import make_policy, make_tokenizer, naive_completion
from transformers import GPT2Config, GPT2LMHeadModel

from warp_lite import WarpConfig, evaluate, load_policy, load_result, merge_checkpoints, run_warp, save_policy
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.evaluation.limit import optimal_front, reference_rewards
from warp_lite.evaluation.metrics import perplexity
from warp_lite.policies import Policies, completion_ids, completions_text, encode_prompts, encode_texts, end_ids
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.randomness import token_uniforms
from warp_lite.task import Task
from warp_lite.training.executors import EXECUTORS
from warp_lite.worlds.grammar import GoldReward
from warp_lite.worlds.grammar import make_tokenizer as review_tokenizer

PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull ."]
LENGTH, EOS, DOT, GREAT = 10, 2, 17, 10  # the last two are words of the tokenizer's, not special tokens
CONFIG = WarpConfig(iterations=1, runs=2, steps=3, batch_size=4, max_new_tokens=LENGTH, eval_every=0)


def in_generation_config(model, tokenizer):
    model.generation_config.eos_token_id = [EOS, DOT, GREAT]


def as_numbers(model, tokenizer):
    model.generation_config.eos_token_id, model.config.eos_token_id = DOT, GREAT


def without_the_tokenizer(model, tokenizer):
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = [GREAT, EOS, DOT]


def in_config(model, tokenizer):
    model.config.eos_token_id, model.generation_config.eos_token_id = [DOT, GREAT, EOS], None


WAYS = [in_generation_config, as_numbers, without_the_tokenizer, in_config]


def chat_policy(way=in_generation_config, architecture="gpt2", **settings):
    """A policy whose turns end at <eos>, "." and "great", and its tokenizer."""
    tokenizer = make_tokenizer()
    model = make_policy(architecture, len(tokenizer), **settings)
    way(model, tokenizer)
    return model, tokenizer


def naive_ends(model, tokenizer, prompts, uniforms, ends=(EOS, DOT, GREAT)):
    """The oracle: completions (N lists of ids) that know of no end, cut behind the first of `ends`."""
    rows = [naive_completion(model, tokenizer(text)["input_ids"], u, None, 1.0)[0]
            for text, u in zip(prompts, uniforms)]
    first = [min([row.index(end) for end in ends if end in row], default=len(row)) for row in rows]
    return [row[:n + 1] for row, n in zip(rows, first)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("serial", [True, False], ids=["module", "batched"])
def test_sampling_ends_at_any_eos_id(way, serial):
    model, tokenizer = chat_policy(way)
    texts = PROMPTS * 4
    uniforms = token_uniforms((0,), 0, len(texts), LENGTH)
    policies = Policies(ModuleForward(model), stack([parameters(model)])) if serial else Policies.of(model)
    rollout = policies.sample(encode_prompts(tokenizer, texts).repeat(1), uniforms.unsqueeze(0), tokenizer)
    completions = completion_ids(rollout.ids, rollout.mask)
    assert completions == naive_ends(model, tokenizer, texts, uniforms)
    assert {row[-1] for row in completions} >= {EOS, DOT, GREAT}
    torch.testing.assert_close(policies.logprobs(rollout), rollout.logprobs, atol=1e-9, rtol=1e-9)
    assert (rollout.logprobs[rollout.mask == 0] == 0).all()


def test_the_text_of_a_completion_leaves_out_what_ended_it_and_nothing_else():
    model, tokenizer = chat_policy()
    uniforms = token_uniforms((1,), 0, 16, LENGTH).unsqueeze(0)
    rollout = Policies.of(model).sample(encode_prompts(tokenizer, PROMPTS * 4).repeat(1), uniforms, tokenizer)
    for part in (rollout, *rollout.split(5), rollout.select([0])):
        for text, row in zip(completions_text(tokenizer, part), completion_ids(part.ids, part.mask)):
            body = row[:-1] if row[-1] in (EOS, DOT, GREAT) else row
            assert text == tokenizer.decode(body, skip_special_tokens=True)
            assert not {".", "great"} & set(text.split())


def test_rewards_metrics_and_the_limit_see_what_ends_at_any_eos_id():
    model, tokenizer = chat_policy(dtype=torch.float32)
    seen = []

    def reward(prompts, completions, completion_ids):
        seen.extend(zip(completions, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    found = evaluate(model, model, reward, PROMPTS, tokenizer, samples=16, max_new_tokens=LENGTH)
    assert found.length == found.reward == sum(len(ids) for _, ids in seen) / len(seen) < LENGTH
    reference_rewards(Task.of(model, tokenizer, reward, PROMPTS, PROMPTS, max_new_tokens=LENGTH), 16)
    assert len(seen) == 2 * 16 * len(PROMPTS)
    for text, ids in seen:
        assert not {EOS, DOT, GREAT} & set(ids[:-1])
        assert not {".", "great"} & set(text.split())


def length_reward(prompts, completions, completion_ids):
    """Tokens of a completion, in which nothing may follow an end."""
    assert all(not {EOS, DOT, GREAT} & set(ids[:-1]) for ids in completion_ids)
    return [float(len(ids)) for ids in completion_ids]


def test_runs_end_at_any_eos_id_alike_in_both_executors():
    batched, serial = (run_warp(*chat_policy(), length_reward, PROMPTS, CONFIG, executor=executor, progress=False)
                       for executor in ("batched", "serial"))
    for name, tensor in batched.iterations[0].merged.items():
        torch.testing.assert_close(serial.iterations[0].merged[name], tensor, atol=1e-8, rtol=1e-8)


def test_every_saved_policy_of_a_run_ends_where_the_first_did(tmp_path):
    out = tmp_path / "out"
    model, tokenizer = chat_policy(dtype=torch.float32)
    result = run_warp(model, tokenizer, length_reward, PROMPTS, CONFIG, out, progress=False)
    result.save_policy(tmp_path / "point", 0.5)
    merge_checkpoints(out / "sft", [out / "iteration-1" / "merged"] * 2, tmp_path / "on-disk", "lerp")
    for folder in (out / "sft", out / "iteration-1" / "merged", out / "iteration-1" / "next-init",
                   tmp_path / "point", tmp_path / "on-disk"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [EOS, DOT, GREAT]
        assert set(end_ids(*load_policy(folder))) == {EOS, DOT, GREAT}
    assert load_result(out, length_reward).front([1.0], samples=8) == result.front([1.0], samples=8)


def test_runs_of_trl_end_at_any_eos_id(tmp_path):
    trl = pytest.importorskip("trl")
    from warp_lite.scale.trl import run_warp_trl

    seen, (model, tokenizer) = [], chat_policy(in_config, dtype=torch.float32)
    args = trl.RLOOConfig(per_device_train_batch_size=8, num_generations=4, max_completion_length=LENGTH, use_cpu=True,
                          bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True)

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    run_warp_trl(model, reward, [prompt for prompt in PROMPTS * 4], CONFIG.replace(runs=1, steps=2), args,
                 out=tmp_path / "out", tokenizer=tokenizer, eval_prompts=PROMPTS)
    assert len(seen) == 16 and not any({EOS, DOT, GREAT} & set(ids[:-1]) for ids in seen)
    assert {ids[-1] for ids in seen} & {DOT, GREAT}


def test_an_eos_id_that_no_embedding_stands_for_does_no_harm():
    """GPT-2's config says 50256 whatever the vocabulary is."""
    tokenizer = make_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=40))
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 50256
    assert end_ids(model, tokenizer) == (EOS,)
    result = run_warp(model, tokenizer, lambda prompts, completions: [float(len(c)) for c in completions], PROMPTS,
                      CONFIG, progress=False)
    assert len(result.iterations) == 1


def no_eos():
    """A policy and a tokenizer that have no EOS id anywhere."""
    model, tokenizer = chat_policy(dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    return model, tokenizer


@pytest.mark.parametrize("executor", [name for name in EXECUTORS if name != "ray"])
def test_without_an_eos_id_anywhere_a_run_is_refused_in_one_line(executor, tmp_path):
    model, tokenizer = no_eos()
    tokenizer.pad_token = None
    tries = [lambda: run_warp(model, tokenizer, len, PROMPTS, CONFIG, tmp_path / "out", executor=executor),
             lambda: evaluate(model, model, len, PROMPTS, tokenizer),
             lambda: optimal_front(model, len, PROMPTS, samples=2, tokenizer=tokenizer)]
    for attempt in tries:
        with pytest.raises(ValueError, match="neither the policy nor its tokenizer has an EOS token.*; set") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizers_eos_loads_if_the_model_has_one(tmp_path):
    model, tokenizer = no_eos()
    save_policy(model, tokenizer, tmp_path / "none")
    model.generation_config.eos_token_id = DOT
    save_policy(model, tokenizer, tmp_path / "one")
    assert end_ids(*load_policy(tmp_path / "one")) == (DOT,)
    with pytest.raises(ValueError, match="none.*has an EOS token"):
        load_policy(tmp_path / "none")


def test_texts_end_with_the_tokenizers_eos_or_else_with_the_models():
    model, tokenizer = chat_policy()
    before = perplexity(Policies.of(model), tokenizer, ["this film was dull"])
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = [DOT]
    model.config.eos_token_id = None
    found = perplexity(Policies.of(model), tokenizer, ["this film was dull"])
    ids, mask = encode_texts(tokenizer, ["this film was dull ."], end=EOS)
    assert mask.all() and ids[0, -2:].tolist() == [DOT, EOS]
    with torch.no_grad():
        loss = model(ids[:, :-1], labels=ids[:, :-1]).loss
    assert found == pytest.approx([loss.exp().item()], rel=2e-6) and found != before


def test_the_gold_reward_knows_a_review_that_ended_at_any_of_its_ends():
    tokenizer = review_tokenizer()
    prompts = encode_prompts(tokenizer, ["this new film was"] * 3)
    rows = tokenizer(["great . <eos>", "great <unk> <pad>", "great . <pad>"], add_special_tokens=False)["input_ids"]
    ids, mask = torch.tensor(rows), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    by_eos = GoldReward(tokenizer).from_ids(prompts, ids, mask)
    by_both = GoldReward(tokenizer, ends=(tokenizer.eos_token_id, tokenizer.unk_token_id)).from_ids(prompts, ids, mask)
    assert (by_both - by_eos).tolist() == [0, 1, 0]


def test_a_generation_config_that_the_library_refuses_to_write_is_saved_as_it_is(tmp_path):
    """Sampling settings beside do_sample=False, as some checkpoints have them."""
    model, tokenizer = chat_policy(dtype=torch.float32)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    before = model.generation_config.to_dict()
    save_policy(model, tokenizer, tmp_path / "policy")
    assert model.generation_config.to_dict() == before
    loaded = load_policy(tmp_path / "policy")[0].generation_config
    assert (loaded.temperature, loaded.do_sample, loaded.eos_token_id) == (0.6, False, [EOS, DOT, GREAT])


@pytest.mark.parametrize("eos", [DOT, [DOT], (DOT,), [DOT, DOT], [-1, DOT], torch.tensor(DOT), torch.tensor([DOT]),
                                 np.int64(DOT), np.array([DOT])], ids=repr)
def test_ids_of_any_kind_end_completions_and_are_saved(eos, tmp_path):
    model, tokenizer = chat_policy(lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", eos))
    assert end_ids(model, tokenizer) == (EOS, DOT) and all(type(token) is int for token in end_ids(model, tokenizer))
    result = run_warp(model, tokenizer, lambda prompts, completions: [float(len(c)) for c in completions], PROMPTS,
                      CONFIG.replace(steps=1), tmp_path / "run", progress=False)
    assert end_ids(result.policy(), tokenizer) == (EOS, DOT)
    assert end_ids(*load_policy(tmp_path / "run" / "iteration-1" / "merged")) == (EOS, DOT)
    assert model.generation_config.eos_token_id is eos


@pytest.mark.parametrize("eos", ["2", 2.0, True, [[2]], [2, None]], ids=repr)
def test_what_is_no_id_is_refused_before_anything_is_written(eos, tmp_path):
    model, tokenizer = chat_policy(lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", eos))
    with pytest.raises(ValueError, match="eos_token_id of the policy is .*; it must be an id or a list of ids"):
        run_warp(model, tokenizer, length_reward, PROMPTS, CONFIG, tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_negative_id_ends_nothing():
    def no_end(model, tokenizer):
        tokenizer.eos_token = None
        model.config.eos_token_id = model.generation_config.eos_token_id = -1

    with pytest.raises(ValueError, match="neither the policy nor its tokenizer has an EOS token"):
        end_ids(*chat_policy(no_end))
