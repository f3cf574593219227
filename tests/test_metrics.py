"""KL, rewards, diversity and perplexity of a policy, against enumeration, the library and hand-made cases."""

import math

import numpy as np
import pytest
import torch
from enumeration import completions, exact_kl
from tiny import make_policy, make_tokenizer

from warp_lite import evaluate
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.evaluation import metrics as metrics_module
from warp_lite.evaluation.metrics import (
    PolicyMetrics,
    distinct_pairs,
    evaluate_many,
    evaluation_uniforms,
    perplexity,
    prompt_means,
    repeated_pairs,
    sequence_kl,
    standard_error,
)
from warp_lite.policies.prompts import encode_prompts, encode_texts
from warp_lite.policies.sampling import Policies, Rollout
from warp_lite.task import Task

PROMPTS = ["this film was", "that plot was", "i loved", "this"]


def length_reward(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def small():
    """A tokenizer of 8 tokens and two policies, so that completions of 3 tokens can be enumerated."""
    tokenizer = make_tokenizer("this film was great".split())
    return tokenizer, *(make_policy("gpt2", len(tokenizer), seed=seed) for seed in (1, 2))


def draw(model, tokenizer, prompts, samples, length, temperature=1.0, seed=0):
    """Rollouts of every prompt `samples` times, and the policy they came from."""
    policies = Policies.of(model)
    encoded = encode_prompts(tokenizer, prompts).batch(np.repeat(np.arange(len(prompts)), samples)[None])
    uniforms = evaluation_uniforms(seed, len(prompts), samples, length).unsqueeze(0)
    return policies, policies.sample(encoded, uniforms, tokenizer, temperature)


def estimate(p, q, tokenizer, prompt, samples, length=3, temperature=1.0):
    """The estimator's KL of every sample of one prompt, and the log-ratio's."""
    policies, rollout = draw(p, tokenizer, [prompt], samples, length, temperature)
    reference = Policies.of(q)
    ratio = (rollout.logprobs - reference.logprobs(rollout, temperature)).sum(-1)
    return sequence_kl(policies, reference, rollout, temperature)[0], ratio[0]


# --- KL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_kl_of_a_policy_to_itself_is_zero(architecture, tokenizer, policy_of):
    policy = policy_of(architecture, dtype=torch.float32)
    found = evaluate(policy, policy, length_reward, PROMPTS, tokenizer, samples=8, max_new_tokens=6)
    assert abs(found.kl) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("prompt", ["this film was", "great"])
def test_kl_agrees_with_enumeration_within_three_standard_errors(small, prompt, temperature):
    tokenizer, p, q = small
    exact, swapped = (exact_kl(*(completions(m, tokenizer, prompt, 3, temperature) for m in pair))
                      for pair in ((p, q), (q, p)))
    kl, _ = estimate(p, q, tokenizer, prompt, 3000, temperature=temperature)
    error = standard_error(kl)
    assert abs(kl.mean() - exact) < 3 * error
    assert abs(exact - swapped) > 6 * error, "KL(p ‖ q) and KL(q ‖ p) must differ for this to say anything"


def test_temperature_changes_the_kl(small):
    tokenizer, p, q = small
    hot, cold = (estimate(p, q, tokenizer, "this film was", 500, temperature=t)[0] for t in (1.5, 0.6))
    assert cold.mean() > hot.mean() + 3 * standard_error(cold)


def test_kl_varies_less_than_the_log_ratio_which_has_the_same_mean(small):
    tokenizer, p, q = small
    kl, ratio = estimate(p, q, tokenizer, "this film was", 3000)
    assert abs(kl.mean() - ratio.mean()) < 3 * standard_error(kl - ratio)
    assert kl.var() < 0.5 * ratio.var()


def test_padding_is_never_counted(tokenizer, policy_of):
    p, q = policy_of("gpt2", seed=1), policy_of("gpt2", seed=2)
    policies, together = draw(p, tokenizer, PROMPTS, 1, 6)
    assert (together.prompts.mask == 0).any(), "the prompts must differ in length"
    reference = Policies.of(q)
    padded = sequence_kl(policies, reference, together)[0]
    for i in range(len(PROMPTS)):
        width = int(together.prompts.mask[0, i].sum())
        prompt = encode_prompts(tokenizer, [PROMPTS[i]]).repeat(1)
        assert prompt.ids.shape[-1] == width
        alone = Rollout(prompt, together.ids[:, i:i + 1], together.mask[:, i:i + 1], together.logprobs[:, i:i + 1])
        kl = sequence_kl(policies, reference, alone)[0, 0]
        torch.testing.assert_close(kl, padded[i], rtol=1e-9, atol=1e-9)


def test_tokens_after_eos_are_never_counted_but_eos_is(tokenizer, policy_of):
    p, q = policy_of("gpt2", seed=1), policy_of("gpt2", seed=2)
    policies, rollout = draw(p, tokenizer, PROMPTS, 64, 8)
    reference = Policies.of(q)
    kl = sequence_kl(policies, reference, rollout)
    assert (rollout.mask[..., -1] == 0).any() and (rollout.mask[..., -1] == 1).any()
    noise = torch.where(rollout.mask.bool(), rollout.ids, torch.randint_like(rollout.ids, len(tokenizer)))
    torch.testing.assert_close(sequence_kl(policies, reference, Rollout(
        rollout.prompts, noise, rollout.mask, rollout.logprobs)), kl, rtol=1e-9, atol=1e-9)
    ended = rollout.mask.sum(-1) < rollout.mask.shape[-1]
    last = (rollout.mask.cumsum(-1) == rollout.mask.sum(-1, keepdim=True)) & rollout.mask.bool()
    assert (rollout.ids[last.view_as(rollout.ids)].view_as(ended)[ended] == tokenizer.eos_token_id).all()
    without_eos = sequence_kl(policies, reference, Rollout(
        rollout.prompts, rollout.ids, rollout.mask * ~last, rollout.logprobs))
    assert (kl - without_eos > 0).all()


def test_a_tokenizer_whose_padding_is_eos_counts_eos():
    for tokenizer in (make_tokenizer(), make_tokenizer(pad="<eos>")):
        p, q = (make_policy("gpt2", len(tokenizer), seed=s, eos_token_id=tokenizer.eos_token_id) for s in (1, 2))
        with torch.no_grad():  # a policy that nearly always ends at once, with the same odds at each token
            for model, strength in ((p, 8.0), (q, 3.0)):
                model.transformer.ln_f.weight.zero_()
                direction = model.transformer.wte.weight[tokenizer.eos_token_id].clone()
                model.transformer.ln_f.bias.copy_(strength * direction / direction.norm() ** 2)
                model.transformer.wte.weight[:] = 0
                model.transformer.wte.weight[tokenizer.eos_token_id] = direction
        found = evaluate(p, q, length_reward, ["this film was great", "this"], tokenizer, max_new_tokens=5)
        size = len(tokenizer)
        a, b = (torch.tensor([s] + [0.0] * (size - 1), dtype=torch.float64).log_softmax(0) for s in (8.0, 3.0))
        assert found.length == pytest.approx(1, abs=0.1)
        assert found.kl / found.length == pytest.approx((a.exp() * (a - b)).sum().item(), rel=1e-6)


# --- standard errors ------------------------------------------------------------------------


def test_standard_errors_are_over_prompts_and_right_for_clustered_samples():
    rng = np.random.default_rng(0)
    prompts, samples, replicates = 20, 10, 3000
    values = rng.normal(size=(replicates, prompts, 1)) + 0.5 * rng.normal(size=(replicates, prompts, samples))
    means = prompt_means(torch.from_numpy(values).view(replicates, -1), samples)
    reported = np.mean([standard_error(row) for row in means])
    actual = values.mean((1, 2)).std()
    assert reported == pytest.approx(actual, rel=0.05)
    naive = values.reshape(replicates, -1).std(1).mean() / math.sqrt(prompts * samples)
    assert naive < 0.5 * actual, "treating samples of one prompt as independent must be visibly wrong here"


def test_a_reward_of_the_prompt_alone_has_the_same_error_however_often_it_is_sampled(tokenizer, gpt2_policy):
    values = {prompt: float(i) for i, prompt in enumerate(PROMPTS)}

    def reward(prompts, completions):
        return [values[p] for p in prompts]

    for samples in (1, 7):
        metrics = evaluate(gpt2_policy, gpt2_policy, reward, PROMPTS, tokenizer, samples=samples, max_new_tokens=3)
        assert metrics.reward == 1.5
        assert metrics.reward_se == pytest.approx(np.std(list(values.values()), ddof=1) / 2)


def test_one_prompt_has_no_standard_error_and_json_says_null(tokenizer, gpt2_policy):
    found = evaluate(gpt2_policy, gpt2_policy, length_reward, PROMPTS[:1], tokenizer, samples=3, max_new_tokens=3)
    assert math.isnan(found.reward_se)
    assert found.as_dict()["reward_se"] is None and "gold" not in found.as_dict()


# --- diversity ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, distinct, repeated", [
    ([[5, 6, 7, 8]], 1.0, 0.0),
    ([[5, 6, 5, 6]], 2 / 3, 1 / 3),                      # (5,6) (6,5) (5,6)
    ([[5, 5, 5, 5]], 1 / 3, 2 / 3),
    ([[5, 6, 7], [5, 6, 7]], 0.5, 0.0),                  # the same completion twice repeats nothing within itself
    ([[5, 6, 7], [5, 5, 5, 5]], 3 / 5, 2 / 5),
    ([[5, 6], [7]], 1.0, 0.0),                           # a single token has no pair
])
def test_distinct_and_repeated_pairs_of_hand_made_completions(rows, distinct, repeated):
    ids, mask = torch.zeros(len(rows), 6, dtype=torch.long), torch.zeros(len(rows), 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
    assert distinct_pairs(ids, mask) == pytest.approx(distinct)
    assert repeated_pairs(ids, mask) == pytest.approx(repeated)


def test_completions_of_one_token_have_no_pairs():
    ids = mask = torch.ones(3, 1, dtype=torch.long)
    assert math.isnan(distinct_pairs(ids, mask)) and math.isnan(repeated_pairs(ids, mask))


# --- perplexity -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexity_is_exp_of_the_librarys_loss(architecture, tokenizer, policy_of):
    policy, texts = policy_of(architecture), ["this film was great .", "i loved it", "dull"]
    ids, mask = encode_texts(tokenizer, texts)
    assert (ids[mask.bool()] == tokenizer.eos_token_id).sum() == len(texts)
    with torch.no_grad():
        loss = policy(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    found = perplexity(Policies.of(policy), tokenizer, texts)
    assert found == pytest.approx([math.exp(loss)], rel=2e-6)  # the library takes its loss in float32


def test_texts_that_do_not_fit_are_named(tokenizer):
    with pytest.raises(ValueError, match="text 1 has 8 tokens, EOS included, of which 5 fit"):
        encode_texts(tokenizer, ["this film", "this film was great and dull"], room=5)
    with pytest.raises(ValueError, match="no texts"):
        encode_texts(tokenizer, [])


# --- many policies at once ------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [1024, 8, 3])
def test_many_policies_at_once_measure_as_one_by_one(tokenizer, policy_of, monkeypatch, rows_at_once):
    monkeypatch.setattr(metrics_module, "ROWS_AT_ONCE", rows_at_once)
    policies = [policy_of("gpt2", seed=seed) for seed in (1, 2, 3)]
    settings = {"gold": length_reward, "texts": ["this film was great ."], "max_new_tokens": 5}
    task = Task.of(policies[0], tokenizer, length_reward, PROMPTS, PROMPTS, **settings)
    many = evaluate_many(task, stack([parameters(p) for p in policies]), samples=2)
    assert len({m.kl for m in many}) == 3
    monkeypatch.undo()
    for policy, found in zip(policies, many):
        alone = evaluate(policy, policies[0], length_reward, PROMPTS, tokenizer, samples=2, **settings)
        assert found.as_dict() == pytest.approx(alone.as_dict(), rel=1e-9, abs=1e-12)


def test_reward_length_and_gold_are_what_the_completions_say(tokenizer, policy_of):
    policy = policy_of("gpt2", seed=1)
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(i % 3) for i in range(len(prompts))]

    found = evaluate(policy, policy, reward, PROMPTS, tokenizer, gold=length_reward, samples=3, max_new_tokens=5)
    lengths = [len(ids) for ids in seen]
    assert found.samples == 12 and found.reward == 1.0
    assert found.length == found.gold == pytest.approx(np.mean(lengths))
    assert all(tokenizer.eos_token_id not in ids[:-1] for ids in seen)
    assert isinstance(found, PolicyMetrics)


# --- bad input ------------------------------------------------------------------------------


def test_a_task_is_measured_by_random_numbers_of_its_own_unless_others_are_named(tokenizer, gpt2_policy):
    def task(seed):
        prompts = encode_prompts(tokenizer, ["the film", "i"])
        return Task(gpt2_policy, tokenizer, lambda prompts, completions: [float(len(c)) for c in completions], prompts,
                    prompts, max_new_tokens=6, eval_seed=seed)

    weights = stack([parameters(gpt2_policy)])
    one, other = (metrics_module.evaluate_many(task(seed), weights, samples=8)[0].as_dict() for seed in (0, 5))
    assert one["reward"] != other["reward"]
    assert metrics_module.evaluate_many(task(0), weights, samples=8, seed=5)[0].as_dict() == other
    states = [parameters(gpt2_policy)]
    texts = metrics_module.sample_completions(task(5), states)
    assert texts == metrics_module.sample_completions(task(0), states, seed=5)
    assert texts != metrics_module.sample_completions(task(0), states)


def test_a_reward_that_is_not_finite_is_refused_and_its_prompt_named(tokenizer, gpt2_policy):
    def reward(prompts, completions):
        return [math.nan if p == "i loved" else 0.0 for p in prompts]

    with pytest.raises(ValueError, match="the reward is nan for a completion of the prompt 'i loved'"):
        evaluate(gpt2_policy, gpt2_policy, reward, PROMPTS, tokenizer, max_new_tokens=3)


def test_policies_of_two_architectures_are_refused(tokenizer, gpt2_policy, llama_policy):
    with pytest.raises(ValueError, match="same architecture"):
        evaluate(llama_policy, gpt2_policy, length_reward, PROMPTS, tokenizer)
