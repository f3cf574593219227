"""The limit of every method, against cases whose optimum is known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from enumeration import completions
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_policy, make_tokenizer

from warp_lite import WarpConfig, best_of_n_front, optimal_front, reward_at_kl, run_warp
from warp_lite.evaluation.front import MIN_ESS
from warp_lite.evaluation.limit import BETAS, reference_rewards


def tilted(p, r, beta):
    """(KL, reward) of π* ∝ p · exp(r/β) by definition."""
    p, r = np.asarray(p, float), np.asarray(r, float)
    q = p * np.exp((r - r.max()) / beta)
    q /= q.sum()
    inside = q > 0
    return float((q[inside] * np.log(q[inside] / p[inside])).sum()), float(q @ r)


# --- the optimum ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3, 0.1])
def test_the_limit_of_a_known_distribution_is_its_exact_tilt(beta):
    """Samples in the very proportions of p = (1/2, 1/4, 1/8, 1/8) make the estimate exact."""
    p, r = [0.5, 0.25, 0.125, 0.125], [0.0, 1.0, 2.0, -1.0]
    rewards = torch.tensor([[0.0] * 4 + [1.0] * 2 + [2.0] + [-1.0]])
    (point,) = optimal_front(rewards=rewards, betas=[beta], min_ess=0)
    assert (point["kl"], point["reward"]) == pytest.approx(tilted(p, r, beta), rel=1e-12)


def test_prompts_are_tilted_one_by_one_and_averaged_at_one_beta():
    both = torch.tensor([[0.0, 1.0, 1.0, 3.0], [5.0, 5.0, 5.0, 9.0]])
    (point,) = optimal_front(rewards=both, betas=[0.7], min_ess=0)
    each = [optimal_front(rewards=row[None], betas=[0.7], min_ess=0)[0] for row in both]
    for name in ("kl", "reward", "ess"):
        values = [e[name] for e in each]
        assert point[name] == pytest.approx(np.mean(values))
        if name != "ess":
            assert point[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))


@pytest.mark.parametrize("beta", [4.0, 2.0, 1.0, 0.7])
def test_the_limit_of_gaussian_rewards_has_kl_of_one_over_twice_beta_squared_and_reward_one_over_beta(beta):
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    (point,) = optimal_front(rewards=quantiles[None], betas=[beta])
    assert point["kl"] == pytest.approx(1 / (2 * beta**2), rel=3e-3)
    assert point["reward"] == pytest.approx(1 / beta, rel=3e-3)


def test_the_limit_of_a_policy_is_the_exact_tilt_of_all_its_completions():
    tokenizer = make_tokenizer("this film was great".split())
    policy = make_policy("gpt2", len(tokenizer), seed=1)
    great, prompts, betas = tokenizer.convert_tokens_to_ids("great"), ["this film was", "great"], [3.0, 1.0, 0.4]

    def reward(prompts, completions, completion_ids):
        return [ids.count(great) - 0.3 * len(ids) for ids in completion_ids]

    exact = []
    for prompt in prompts:
        every = completions(policy, tokenizer, prompt, 3)
        r = reward(None, None, [list(ids) for ids in every])
        exact.append([tilted(np.exp(list(every.values())), r, beta) for beta in betas])
    found = optimal_front(policy, reward, prompts, betas, 6000, tokenizer=tokenizer, max_new_tokens=3)
    assert [p["beta"] for p in found] == betas
    for point, (kl, best) in zip(found, np.mean(exact, 0)):
        assert point["kl"] == pytest.approx(kl, rel=0.05) and point["reward"] == pytest.approx(best, abs=0.03)
    hot = optimal_front(policy, reward, prompts, betas, 2000, tokenizer=tokenizer, max_new_tokens=3, temperature=3.0)
    assert abs(hot[0]["reward"] - found[0]["reward"]) > 0.1, "the temperature must be that of the samples"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=3, max_size=6), st.data())
def test_no_distribution_lies_above_the_limit(counts, data):
    """Any q over the same completions has at most the limit's reward at its KL."""
    r = data.draw(st.lists(st.floats(-2, 2), min_size=len(counts), max_size=len(counts)))
    q = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=len(counts), max_size=len(counts))))
    p, q = np.array(counts) / sum(counts), q / q.sum()
    rewards = torch.tensor([np.repeat(r, counts).tolist()], dtype=torch.float64)
    curve = optimal_front(rewards=rewards, betas=np.geomspace(200, 0.005, 150), min_ess=0)
    bound = reward_at_kl(curve, float((q * np.log(q / p)).sum()))
    assert math.isnan(bound) or q @ r <= bound + 1e-3


# --- the effective sample size --------------------------------------------------------------


def test_the_effective_sample_size_is_that_of_the_weights():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    (flat,) = optimal_front(rewards=torch.zeros(1, 7), betas=[1.0], min_ess=0)
    (one,) = optimal_front(rewards=rewards, betas=[1.0], min_ess=0)
    assert (flat["ess"], flat["kl"]) == pytest.approx((7.0, 0.0))
    w = np.exp([0, 0, 0, 1])
    assert one["ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum())


def test_the_curve_ends_where_the_effective_sample_size_falls_under_thirty():
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 500)))
    shown, everything = optimal_front(rewards=rewards), optimal_front(rewards=rewards, min_ess=0)
    assert 0 < len(shown) < len(everything) == len(BETAS)
    assert everything[:len(shown)] == shown
    assert shown[-1]["ess"] >= MIN_ESS == 30 > everything[len(shown)]["ess"]
    betas, kls, best = zip(*[(p["beta"], p["kl"], p["reward"]) for p in everything])
    assert list(betas) == sorted(betas, reverse=True) and list(kls) == sorted(kls) and list(best) == sorted(best)


def test_the_default_betas_follow_the_scale_of_the_rewards():
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 300)))
    small, large = optimal_front(rewards=rewards), optimal_front(rewards=1000 * rewards + 7)
    assert [p["kl"] for p in small] == pytest.approx([p["kl"] for p in large])
    assert [1000 * p["reward"] + 7 for p in small] == pytest.approx([p["reward"] for p in large])


def test_gold_is_that_of_the_proxys_optimum():
    rewards, gold = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, -5.0]])
    (point,) = optimal_front(rewards=rewards, gold=gold, betas=[0.5], min_ess=0)
    w = math.exp(2) / (1 + math.exp(2))
    assert point["gold"] == pytest.approx(3 * (1 - w) - 5 * w)


# --- best of n ------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_maximum_over_all_subsets():
    rewards = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 7)))
    for point in best_of_n_front(rewards=rewards, ns=range(1, 8)):
        subsets = [np.mean([max(s) for s in itertools.combinations(row, point["n"])]) for row in rewards.tolist()]
        assert point["reward"] == pytest.approx(np.mean(subsets), rel=1e-12)
        assert point["reward_se"] == pytest.approx(np.std(subsets, ddof=1) / math.sqrt(3))


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_the_kl_of_best_of_n_is_at_most_its_bound_and_near_it_where_no_completions_are_alike(n):
    (point,) = best_of_n_front(rewards=torch.arange(40.0)[None], ns=[n])
    assert point["kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n)
    for size, tight in ((3, False), (20_000, True)):  # uniform over `size` completions, all rewards distinct
        cdf = np.arange(size + 1) / size
        q = np.diff(cdf**n)
        q = q[q > 0]
        kl = float((q * np.log(q * size)).sum())
        assert kl <= point["kl_bound"] + 1e-9
        assert not tight or kl == pytest.approx(point["kl_bound"], abs=1e-3)


def test_best_of_n_lies_under_the_limit():
    rewards = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[None]
    limit = optimal_front(rewards=rewards)
    compared = [(p["reward"], reward_at_kl(limit, p["kl_bound"])) for p in best_of_n_front(rewards=rewards)]
    compared = [(got, bound) for got, bound in compared if not math.isnan(bound)]
    assert len(compared) >= 5 and all(got <= bound + 1e-6 for got, bound in compared)


def test_n_defaults_to_powers_of_two_as_far_as_there_are_samples():
    assert [p["n"] for p in best_of_n_front(rewards=torch.rand(2, 9))] == [1, 2, 4, 8]


# --- a trained run --------------------------------------------------------------------------


@pytest.mark.slow
def test_no_front_of_a_trained_run_lies_above_the_limit(world):
    config, prompts = WarpConfig(iterations=1, runs=2, steps=60, lr=1e-3, eval_every=0), world.eval_prompts.given[:32]
    result = run_warp(world.policy, world.tokenizer, world.reward, world.prompts.given, config,
                      eval_prompts=prompts, progress=False)
    rewards, _ = reference_rewards(world.measured_on(prompts), 256)
    limit = optimal_front(rewards=rewards)

    def excess(point, kl):
        bound = reward_at_kl(limit, kl)
        nearest = min(limit, key=lambda p: abs(p["kl"] - kl))
        slope = nearest["beta"]  # dR/dKL along the limit is β
        error = math.hypot(point["reward_se"], nearest["reward_se"], slope * point["kl_se"] * kl / point["kl"])
        return (point["reward"] - bound) / error

    etas = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 1.0)
    points = [p for p in result.front(etas, samples=8) if p["kl"] <= limit[-1]["kl"]]
    assert len(points) >= 4 and points[-1]["reward"] > 0.5
    assert all(excess(p, p["kl"]) < 3 for p in points)
    assert any(excess(p, p["kl"] / 8) > 3 for p in points), "a KL that is far too small would be noticed"


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, -1.0, math.inf, math.nan])
def test_a_beta_that_is_not_above_zero_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be above 0 and finite, not"):
        optimal_front(rewards=torch.rand(2, 4), betas=[1.0, beta])


@pytest.mark.parametrize("n", [0, -1, 5])
def test_n_out_of_range_is_refused(n):
    with pytest.raises(ValueError, match=f"n between 1 and the 4 samples a prompt, not {n}"):
        best_of_n_front(rewards=torch.rand(2, 4), ns=[n])


@pytest.mark.parametrize("front", [optimal_front, best_of_n_front])
def test_rewards_that_cannot_be_used_are_refused(front):
    bad = torch.rand(3, 4)
    bad[1, 2] = math.inf
    with pytest.raises(ValueError, match="sample 2 of prompt 1 is not finite"):
        front(rewards=bad)
    with pytest.raises(ValueError, match="the reward is None for every sample"):
        front(rewards=torch.full((3, 4), math.nan))
    with pytest.raises(ValueError, match=r"\(prompts, samples\)"):
        front(rewards=torch.rand(4))
    with pytest.raises(TypeError, match="give `rewards`.*or reference, tokenizer, prompts, reward"):
        front()


def test_gold_of_other_samples_is_refused():
    with pytest.raises(ValueError, match="gold is .2, 3. and rewards .2, 4."):
        optimal_front(rewards=torch.rand(2, 4), gold=torch.rand(2, 3))


# --- completions without a reward -----------------------------------------------------------


@pytest.mark.parametrize("beta", [2.0, 0.5])
def test_the_limit_keeps_completions_without_a_reward_as_the_reference_has_them(beta):
    """The oracle is a distribution: mass 3/8 without a reward stays, the rest is tilted among itself."""
    p, r = np.array([0.5, 0.125]), [0.0, 2.0]
    rewards = torch.tensor([[0.0] * 4 + [2.0] + [math.nan] * 3, [math.nan] * 8])
    (point,) = optimal_front(rewards=rewards, betas=[beta], min_ess=0)
    kl, reward = tilted(p / p.sum(), r, beta)
    assert (point["kl"], point["reward"]) == pytest.approx((kl * p.sum(), reward), rel=1e-12)
    assert point["kl_se"] is None  # one of the two prompts has no reward at all
    gold = torch.tensor([[1.0] * 4 + [math.nan] + [0.0] * 3, [0.0] * 8])
    assert optimal_front(rewards=rewards, gold=gold, betas=[beta], min_ess=0)[0]["gold"] == pytest.approx(1.0)


def test_best_of_n_is_of_completions_with_a_reward():
    rewards = torch.tensor([[3.0, math.nan, 1.0, 2.0], [0.0, 4.0, 8.0, 9.0]])
    for n in (1, 2, 3):
        (point,) = best_of_n_front(rewards=rewards, ns=[n])
        each = [np.mean([max(draw) for draw in itertools.combinations(row, n)]) for row in ([1, 2, 3], [0, 4, 8, 9])]
        assert point["reward"] == pytest.approx(np.mean(each))
        assert point["kl_bound"] == pytest.approx((math.log(n) - (n - 1) / n) * 7 / 8)
    with pytest.raises(ValueError, match="between 1 and the 3 samples"):
        best_of_n_front(rewards=rewards, ns=[4])
