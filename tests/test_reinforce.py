"""The estimator against the exact gradient of E[r] − β·KL(π ‖ anchor), on a policy whose completions can be listed."""

import itertools

import pytest
import torch
from tiny import make_policy, make_tokenizer

from warp_lite import WarpConfig
from warp_lite.averaging.state_dicts import parameters, stack
from warp_lite.policies.forward import make_forward
from warp_lite.policies.module_forward import ModuleForward
from warp_lite.policies.prompts import encode_prompts
from warp_lite.policies.sampling import Policies, Rollout
from warp_lite.training.batched import train_batched
from warp_lite.training.reinforce import advantages, regularised_rewards, reinforce_loss, warmup
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial

TOKENIZER = make_tokenizer(["film"])  # five tokens
EOS, LENGTH, BETA = TOKENIZER.eos_token_id, 3, 0.7
PROMPTS = ["film", "film film film"]  # ragged, so that the shorter one is padded
COMPLETIONS = [(*first, EOS) for n in range(LENGTH) for first in itertools.product({0, 1, 3, 4}, repeat=n)]
COMPLETIONS += list(itertools.product({0, 1, 3, 4}, repeat=LENGTH))  # those that never end
REWARDS = {completion: value for completion, value in zip(
    COMPLETIONS, torch.randn(len(COMPLETIONS), generator=torch.Generator().manual_seed(0)).tolist())}
EXECUTORS = [train_serial, train_batched]


@pytest.fixture(scope="module")
def policy():
    return make_policy("gpt2", len(TOKENIZER), initializer_range=0.5)


@pytest.fixture(scope="module")
def anchor():
    return make_policy("gpt2", len(TOKENIZER), seed=1, initializer_range=0.5)


def every_completion():
    """A rollout of each completion of each prompt, (1, prompts · completions)."""
    encoded = encode_prompts(TOKENIZER, [prompt for prompt in PROMPTS for _ in COMPLETIONS]).repeat(1)
    ids = torch.full((1, len(encoded), LENGTH), TOKENIZER.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(COMPLETIONS * len(PROMPTS)):
        ids[0, row, :len(completion)] = torch.tensor(completion)
        mask[0, row, :len(completion)] = 1
    return Rollout(encoded, ids, mask, torch.zeros(1, len(encoded), LENGTH))


def library_logprobs(model, temperature):
    """log π(y|x) of each completion of each prompt by the library's module, each prompt alone; differentiable."""
    values = []
    for prompt in PROMPTS:
        start = TOKENIZER(prompt)["input_ids"]
        rows = [[*start, *completion, *[0] * (LENGTH - len(completion))] for completion in COMPLETIONS]
        logp = (model(torch.tensor(rows)).logits[:, len(start) - 1:-1] / temperature).log_softmax(-1)
        for row, completion in zip(logp, COMPLETIONS):
            values.append(sum(row[t, token] for t, token in enumerate(completion)))
    return torch.stack(values)


def exact_gradient(policy, anchor, temperature, beta=BETA):
    """∇ of the mean over prompts of Σ_y π(y) [r(y) − β log(π(y) / π_anchor(y))], flat, by autograd."""
    policy.zero_grad()
    logp = library_logprobs(policy, temperature)
    with torch.no_grad():
        anchor_logp = library_logprobs(anchor, temperature)
    rewards = torch.tensor(list(REWARDS.values()) * len(PROMPTS), dtype=torch.float64)
    objective = (logp.exp() * (rewards - beta * (logp - anchor_logp))).sum() / len(PROMPTS)
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(policy.parameters()))])


def scored(policy, anchor, forward, temperature):
    """(leaves, log π, log π_anchor, rewards) of every completion, through the package; each (1, N)."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in stack([parameters(policy)]).items()}
    forward, rollout = forward(policy), every_completion()
    logp = Policies(forward, leaves).logprobs(rollout, temperature).sum(-1)
    anchor_logp = Policies(forward, stack([parameters(anchor)])).logprobs(rollout, temperature).sum(-1)
    rewards = torch.tensor([list(REWARDS.values()) * len(PROMPTS)], dtype=torch.float64)
    return leaves, logp, anchor_logp, rewards


def flat_gradient(loss, leaves):
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(leaves.values()))])


# --- the estimator ---------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [ModuleForward, make_forward])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_probabilities_of_all_completions_sum_to_one(forward, temperature, policy):
    """Each action once, EOS among them, nothing after it: anything else would not sum to one."""
    weights, rollout = stack([parameters(policy)]), every_completion()
    logp = Policies(forward(policy), weights).logprobs(rollout, temperature).sum(-1)
    torch.testing.assert_close(logp.view(2, -1).exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(logp[0], library_logprobs(policy, temperature), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("forward", [ModuleForward, make_forward])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_a_baseline_the_mean_estimate_is_the_exact_gradient(forward, temperature, policy, anchor):
    """Σ_y π(y) · ∇[loss of y alone] = −∇(E[r] − β KL) / length."""
    leaves, logp, anchor_logp, rewards = scored(policy, anchor, forward, temperature)
    r_beta = regularised_rewards(rewards, logp, anchor_logp, BETA)
    losses = reinforce_loss(logp.unsqueeze(-1), r_beta.unsqueeze(-1), LENGTH)           # (1, N): batches of one
    estimate = flat_gradient((logp.detach().exp() * losses).sum() / len(PROMPTS), leaves)
    exact = exact_gradient(policy, anchor, temperature)
    torch.testing.assert_close(estimate, -exact / LENGTH, atol=1e-10, rtol=1e-10)
    for beta in (2 * BETA, 0):  # a KL weighed twice, or not at all, would show
        assert (exact_gradient(policy, anchor, temperature, beta) - exact).norm() > 0.1 * exact.norm()


def test_the_leave_one_out_baseline_adds_no_bias(policy, anchor):
    """Over all pairs of completions, each with its probability. A mean that includes the sample would halve it."""
    leaves, logp, anchor_logp, rewards = scored(policy, anchor, make_forward, 1.0)
    r_beta = regularised_rewards(rewards, logp, anchor_logp, BETA)[0]
    pairs = torch.cartesian_prod(torch.arange(len(r_beta)), torch.arange(len(r_beta)))   # (N², 2), prompts mixed
    weight = (logp[0][pairs].detach().sum(-1)).exp() / len(PROMPTS) ** 2
    losses = reinforce_loss(logp[0][pairs], advantages(r_beta[pairs]), LENGTH)           # (N²,)
    estimate = flat_gradient((weight * losses).sum(), leaves)
    torch.testing.assert_close(estimate, -exact_gradient(policy, anchor, 1.0) / LENGTH, atol=1e-10, rtol=1e-10)


def test_advantages_are_the_reward_less_the_mean_of_the_others():
    for batch in (2, 3, 8):
        rewards = torch.randn(4, batch, dtype=torch.float64)
        for e, b in itertools.product(range(4), range(batch)):
            others = [rewards[e, other] for other in range(batch) if other != b]
            expected = rewards[e, b] - sum(others) / len(others)
            torch.testing.assert_close(advantages(rewards)[e, b], expected, atol=1e-12, rtol=1e-12)
    assert advantages(torch.full((2, 5), 3.0)).abs().max() == 0


def test_the_loss_is_the_batch_mean_of_advantage_times_logprob_divided_by_the_length():
    logp, advantage = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for length in (1, 24):
        for e in range(3):
            expected = -sum(advantage[e, b] * logp[e, b] for b in range(5)) / 5 / length
            torch.testing.assert_close(reinforce_loss(logp, advantage, length)[e], expected, atol=1e-12, rtol=1e-12)


def test_no_gradient_passes_through_the_reward_the_kl_or_the_baseline():
    logp = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    anchor_logp, rewards = torch.randn(2, 4, requires_grad=True).double(), torch.randn(2, 4).double()
    r_beta = regularised_rewards(rewards, logp, anchor_logp, BETA)
    assert not r_beta.requires_grad
    torch.testing.assert_close(r_beta, rewards - BETA * (logp - anchor_logp).detach())
    attached = advantages(rewards - BETA * (logp - anchor_logp))  # had it not been detached
    gradient, = torch.autograd.grad(reinforce_loss(logp, attached, 1).sum(), logp)
    torch.testing.assert_close(gradient, -attached.detach() / 4)


def test_beta_of_each_run_weighs_its_own_kl():
    logp, anchor_logp, rewards = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4).double()
    betas = torch.tensor([[0.0], [0.1], [2.0]])
    together = regularised_rewards(rewards, logp, anchor_logp, betas)
    for e, beta in enumerate([0.0, 0.1, 2.0]):
        torch.testing.assert_close(together[e], regularised_rewards(rewards[e], logp[e], anchor_logp[e], beta))
    assert torch.equal(together[0], rewards[0])


# --- the gradient that the executors take ----------------------------------------------------


def reward(completion_ids, **kwargs):
    return [REWARDS[tuple(ids)] for ids in completion_ids]


def first_gradient(train, policy, anchor, config, seeds, reward=reward):
    """What the first step of runs that start at `policy`, anchored to `anchor`, takes as its gradient, (E, P).

    Adam's first moment after one step from zero is (1 − β₁) times the gradient.
    """
    init, fixed = parameters(policy), parameters(anchor)
    init = {name: tensor.clone() for name, tensor in init.items()}
    runs = [Run(config.replace(seed=seed), 1, 1, init, fixed, reward) for seed in seeds]
    states = train(make_policy("gpt2", len(TOKENIZER)), TOKENIZER, encode_prompts(TOKENIZER, PROMPTS), runs)
    rows = [torch.cat([state.exp_avg[name].flatten() for name in init]) for state in states]
    return torch.stack(rows) / (1 - config.adam_beta1)


CONFIG = WarpConfig(steps=1, batch_size=64, beta=BETA, anchor="sft", max_new_tokens=LENGTH, max_grad_norm=1e9)


@pytest.mark.parametrize("train", EXECUTORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_gradient_of_many_batches_is_the_exact_one_within_its_error(train, temperature, policy, anchor):
    """Real sampling, real prompts, the baseline and all, along the exact gradient and random directions."""
    count = 60 if train is train_batched else 25
    gradients = -LENGTH * first_gradient(
        train, policy, anchor, CONFIG.replace(temperature=temperature), range(count))
    exact = exact_gradient(policy, anchor, temperature)
    random = torch.randn(len(exact), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.cat([exact[:, None], random], 1)
    directions = directions / directions.norm(dim=0)
    projected, wanted = gradients @ directions, exact @ directions
    error = projected.std(0) / count ** 0.5
    assert ((projected.mean(0) - wanted).abs() < 4 * error).all()
    assert error[0] < 0.1 * wanted[0]  # so a wrong factor of a half, or a wrong sign, would be found out


@pytest.mark.parametrize("train", EXECUTORS)
def test_the_gradient_of_a_batch_is_that_of_the_formula_on_the_completions_it_sampled(train, policy, anchor):
    """Everything again by the library's module, one completion at a time."""
    seen = []

    def recorded(prompts, completions, completion_ids):
        seen.extend(zip(prompts, map(tuple, completion_ids)))
        return reward(completion_ids)

    config = CONFIG.replace(batch_size=6, temperature=0.7)
    gradient = first_gradient(train, policy, anchor, config, [3], recorded)[0]
    place = {pair: i for i, pair in enumerate(itertools.product(PROMPTS, COMPLETIONS))}
    rows = torch.tensor([place[pair] for pair in seen])
    logp = library_logprobs(policy, 0.7)[rows]
    anchor_logp = library_logprobs(anchor, 0.7)[rows].detach()
    r_beta = torch.tensor([REWARDS[ids] for _, ids in seen], dtype=torch.float64) - BETA * (logp.detach() - anchor_logp)
    loss = 0
    for b in range(6):
        others = torch.cat([r_beta[:b], r_beta[b + 1:]]).mean()
        loss = loss - (r_beta[b] - others) * logp[b] / 6 / LENGTH
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("train", EXECUTORS)
def test_a_gradient_above_the_limit_is_scaled_to_it_and_one_below_is_left(train, policy, anchor):
    free = first_gradient(train, policy, anchor, CONFIG, [0])[0]
    for limit in (0.5 * free.norm().item(), 2 * free.norm().item()):
        clipped = first_gradient(train, policy, anchor, CONFIG.replace(max_grad_norm=limit), [0])[0]
        expected = free * min(1.0, limit / (free.norm().item() + 1e-6))
        torch.testing.assert_close(clipped, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("train", EXECUTORS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_policy_and_anchor_are_taken_at_one_temperature(train, temperature, policy):
    """Anchored to itself a policy has no KL, at any temperature; with one of the two untempered it would."""
    seen = []
    run = Run(CONFIG.replace(temperature=temperature, anchor="ema"), 1, 1, parameters(policy), {}, reward)
    train(make_policy("gpt2", len(TOKENIZER)), TOKENIZER, encode_prompts(TOKENIZER, PROMPTS), [run],
          lambda runs, step, states, metrics: seen.extend(metrics))
    assert abs(seen[0]["kl_to_anchor"]) < 1e-9
    assert seen[0]["regularised_reward"] == pytest.approx(seen[0]["reward"], abs=1e-9)


@pytest.mark.parametrize("train", EXECUTORS)
@pytest.mark.parametrize("settings", [{"anchor": "none"}, {"beta": 0.0}, {"beta": 0.0, "anchor": "ema"}], ids=str)
def test_without_an_anchor_or_a_beta_there_is_no_kl_in_the_gradient(train, settings, policy, anchor):
    gradient = first_gradient(train, policy, anchor, CONFIG.replace(**settings), [0])
    other = first_gradient(train, policy, policy, CONFIG.replace(anchor="sft"), [0])  # a KL to itself: none either
    torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-9)
    assert (gradient - first_gradient(train, policy, anchor, CONFIG, [0])).norm() > 0.01 * gradient.norm()


def test_the_learning_rate_warms_up_linearly_and_then_stays():
    config = WarpConfig(warmup_steps=4)
    assert [warmup(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(config.replace(warmup_steps=0), 0) == warmup(config.replace(warmup_steps=1), 0) == 1.0
