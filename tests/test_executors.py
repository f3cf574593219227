"""Both executors against a loop written out by hand, and against each other."""

import copy
import math

import pytest
import torch
from tiny import ARCHITECTURES, naive_completion

from warp_lite import WarpConfig
from warp_lite.averaging.state_dicts import parameters
from warp_lite.policies.prompts import encode_prompts
from warp_lite.policies.randomness import prompt_indices, token_uniforms
from warp_lite.training.batched import train_batched
from warp_lite.training.run import Run, RunFailed
from warp_lite.training.serial import train_serial

EXECUTORS = [train_serial, train_batched]
PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull .", "the"]  # ragged
CONFIG = WarpConfig(steps=20, batch_size=4, lr=1e-2, beta=0.3, mu=0.1, warmup_steps=5, max_new_tokens=6)
KINDS = ("policy", "anchor", "exp_avg", "exp_avg_sq")


def likes_film(prompts, completions, completion_ids, **kwargs):
    """How often a review says "film", with something for its length and its prompt."""
    return [text.split().count("film") + 0.1 * len(ids) + 0.01 * len(prompt)
            for prompt, text, ids in zip(prompts, completions, completion_ids)]


def likes_plot(completions, **kwargs):
    return [float(text.split().count("plot")) for text in completions]


def make_runs(model, sft=None, config=CONFIG, **of_each):
    """Runs that start at a model; `of_each` holds lists with a setting for each."""
    count = max([len(values) for values in of_each.values()] or [2])
    runs = []
    for m in range(count):
        own = {name: values[m] for name, values in of_each.items()}
        reward = own.pop("reward", likes_film)
        runs.append(Run(config.replace(**own), 1, m + 1, parameters(model), parameters(sft or model), reward))
    return runs


def mixed_runs(model, sft, steps=20):
    """Six runs that differ in everything that runs of one batch may differ in."""
    return make_runs(
        model, sft, CONFIG.replace(steps=steps),
        lr=[1e-2, 1e-2, 3e-3, 3e-3, 1e-2, 2e-2], beta=[0.3, 0.3, 1.0, 0.3, 0.0, 0.1],
        mu=[0.1, 0.01, 0.3, 0.1, 0.1, 1.0], anchor=["ema", "sft", "none", "sft", "ema", "ema"],
        seed=[0, 1, 2, 3, 4, 0], max_grad_norm=[1.0, 0.05, 1.0, 10.0, 1e9, 0.5], reward=[likes_film, likes_plot] * 3)


def train(executor, model, tokenizer, runs, prompts=PROMPTS, on_step=None):
    """The states of the runs, on a copy of the model."""
    return executor(copy.deepcopy(model), tokenizer, encode_prompts(tokenizer, prompts), runs, on_step)


def assert_states_equal(first, second, tolerance):
    for one, other in zip(first, second, strict=True):
        assert one.step == other.step
        for kind in KINDS:
            a, b = getattr(one, kind), getattr(other, kind)
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance, msg=f"{kind}: {name}")


def distance(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- against a loop by hand ------------------------------------------------------------------


def by_hand(model, sft, tokenizer, run):
    """One RL run, written again: a deep copy for the anchor, one completion at a time, one Adam for all steps."""
    config, key = run.config, (run.config.seed, run.iteration, run.number)
    model = copy.deepcopy(model)
    anchor = copy.deepcopy(sft if config.anchor == "sft" else model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, eps=config.adam_eps,
                                 betas=(config.adam_beta1, config.adam_beta2))

    def logp_of(network, ids, completion):
        logits = network(torch.tensor([ids + completion[:-1]])).logits[0, len(ids) - 1:]
        logp = (logits / config.temperature).log_softmax(-1)
        return sum(logp[t, token] for t, token in enumerate(completion))

    for step in range(config.steps):
        texts = [PROMPTS[i] for i in prompt_indices(key, step, config.batch_size, len(PROMPTS))]
        uniforms = token_uniforms(key, step, config.batch_size, config.max_new_tokens)
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        completions = [naive_completion(model, ids, u, tokenizer.eos_token_id, config.temperature)[0]
                       for ids, u in zip(prompts, uniforms)]
        words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        rewards = run.reward(prompts=texts, completions=words, completion_ids=completions)
        logps = [logp_of(model, ids, completion) for ids, completion in zip(prompts, completions)]
        beta = 0 if config.anchor == "none" else config.beta
        with torch.no_grad():
            r_beta = [r - beta * (logp.item() - logp_of(anchor, ids, completion).item())
                      for r, logp, ids, completion in zip(rewards, logps, prompts, completions)]
        loss = 0
        for b, logp in enumerate(logps):
            baseline = (sum(r_beta) - r_beta[b]) / (config.batch_size - 1)
            loss = loss - (r_beta[b] - baseline) * logp / config.batch_size / config.max_new_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / config.warmup_steps)
        optimizer.step()
        with torch.no_grad():
            for fixed, moved in zip(anchor.parameters(), model.parameters()):
                if config.anchor != "sft":
                    fixed += config.mu * (moved - fixed)
    return model, anchor, optimizer


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_is_the_loop_of_the_paper_written_out_by_hand(executor, policy_of, tokenizer):
    """A new optimiser at each step, an untempered anchor, greedy decoding, a wrong baseline: none would agree."""
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    runs = make_runs(model, sft, CONFIG.replace(steps=7, temperature=0.8), anchor=["ema", "sft", "none"],
                     max_grad_norm=[1.0, 0.05, 1e9], reward=[likes_film, likes_plot, likes_film])
    for run, state in zip(runs, train(executor, model, tokenizer, runs)):
        policy, anchor, optimizer = by_hand(model, sft, tokenizer, run)
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(state.policy[name], parameter.detach(), atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(state.exp_avg[name], optimizer.state[parameter]["exp_avg"], atol=1e-9, rtol=1e-9)
        for name, parameter in anchor.named_parameters():
            torch.testing.assert_close(state.anchor[name], parameter.detach(), atol=1e-9, rtol=1e-9)


# --- against each other ----------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [True, False])
def test_batched_runs_are_serial_runs_after_twenty_steps(ragged, policy_of, tokenizer):
    """Policies, anchors and Adam's moments, with mixed settings, in float64."""
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    runs, prompts = mixed_runs(model, sft), PROMPTS if ragged else ["this film was", "that plot is", "this it was"]
    serial = train(train_serial, model, tokenizer, runs, prompts)
    batched = train(train_batched, model, tokenizer, runs, prompts)
    assert_states_equal(serial, batched, 1e-9)
    assert min(distance(state.policy, parameters(model)) for state in serial) > 0.01  # they have gone somewhere


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_batched_runs_are_serial_runs_on_other_architectures(architecture, policy_of, tokenizer):
    """To the precision of float32, in which the library computes the norms of these, always."""
    model, sft = policy_of(architecture), policy_of(architecture, seed=1)
    config = CONFIG.replace(steps=5, lr=1e-3, adam_eps=1e-4)
    runs = make_runs(model, sft, config, beta=[0.3, 0.1], anchor=["ema", "sft"])
    serial = train(train_serial, model, tokenizer, runs)
    assert_states_equal(serial, train(train_batched, model, tokenizer, runs), 1e-5)
    assert min(distance(state.policy, parameters(model)) for state in serial) > 1e-3


def test_a_run_is_the_same_whatever_runs_are_trained_beside_it(policy_of, tokenizer):
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    runs = mixed_runs(model, sft)
    together = train(train_batched, model, tokenizer, runs)
    for chosen in ([3], [5, 0], [4, 2, 1]):
        some = train(train_batched, model, tokenizer, [runs[m] for m in chosen])
        assert_states_equal(some, [together[m] for m in chosen], 1e-9)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_seed_gives_byte_equal_policies_twice(executor, policy_of, tokenizer):
    model = policy_of("gpt2", dtype=torch.float32)
    first = train(executor, model, tokenizer, mixed_runs(model, model, 8))
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator has no part in it
        again = train(executor, model, tokenizer, mixed_runs(model, model, 8))
        assert_states_equal(first, again, 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_runs_of_one_seed_see_different_prompts_and_make_different_policies(executor, policy_of, tokenizer):
    """M runs on one order of prompts would be nearly identical; so would M greedy ones."""
    model = policy_of("gpt2")
    seen = [[], []]

    def watched(m):
        def reward(prompts, completions, **kwargs):
            seen[m].extend(zip(prompts, completions))
            return [float(len(text)) for text in completions]
        return reward

    states = train(executor, model, tokenizer, make_runs(model, reward=[watched(0), watched(1)]))
    for part in (0, 1):  # prompts, completions
        assert [pair[part] for pair in seen[0]] != [pair[part] for pair in seen[1]]
    assert distance(states[0].policy, states[1].policy) > 0.01
    of_iteration_2 = make_runs(model)[:1]
    of_iteration_2[0].iteration = 2
    again = train(executor, model, tokenizer, of_iteration_2)[0]
    first = train(executor, model, tokenizer, make_runs(model)[:1])[0]
    assert distance(first.policy, again.policy) > 0.01


# --- resuming --------------------------------------------------------------------------------


def states_at(step, into):
    """An `on_step` that keeps the states after that many steps."""
    def on_step(runs, taken, states, metrics):
        if taken == step:
            into.extend(states())
    return on_step


@pytest.mark.parametrize("goes_on", EXECUTORS)
@pytest.mark.parametrize("begins", EXECUTORS)
def test_a_run_taken_up_in_the_middle_ends_where_an_uninterrupted_one_does(begins, goes_on, policy_of, tokenizer):
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    kept = []
    whole = train(begins, model, tokenizer, mixed_runs(model, sft, 10), on_step=states_at(5, kept))
    runs = mixed_runs(model, sft, 10)
    for run, state in zip(runs, kept):
        run.state = state
    seen = []
    resumed = train(goes_on, model, tokenizer, runs, on_step=lambda runs, step, states, metrics: seen.append(step))
    assert_states_equal(resumed, whole, 1e-9)
    assert sorted(set(seen)) == list(range(6, 11))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_taken_up_by_the_same_executor_is_byte_equal_in_float32(executor, policy_of, tokenizer):
    model = policy_of("gpt2", dtype=torch.float32)
    kept = []
    whole = train(executor, model, tokenizer, mixed_runs(model, model, 10), on_step=states_at(5, kept))
    runs = mixed_runs(model, model, 10)
    for run, state in zip(runs, kept):
        run.state = state
    assert_states_equal(whole, train(executor, model, tokenizer, runs), 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_states_of_a_step_are_copies_and_the_inputs_stay_as_they_were(executor, policy_of, tokenizer):
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    runs = mixed_runs(model, sft, 10)
    before = [copy.deepcopy((run.init, run.sft)) for run in runs]
    kept, frozen = [], []

    def on_step(members, step, states, metrics):
        if step == 3:
            kept.extend(states())
            frozen.extend(copy.deepcopy(kept[-len(members):]))

    train(executor, model, tokenizer, runs, on_step=on_step)
    assert_states_equal(kept, frozen, 0)
    for run, (init, fixed) in zip(runs, before):
        assert distance(run.init, init) == distance(run.sft, fixed) == 0


# --- the anchor ------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_ema_anchor_is_the_average_of_the_policies_of_all_steps(executor, policy_of, tokenizer):
    """θ_ema after t steps = (1−μ)^t θ_0 + μ Σ_s (1−μ)^(t−s) θ_s; it starts at the init and it moves."""
    model = policy_of("gpt2")
    runs = make_runs(model, policy_of("gpt2", seed=1), mu=[0.1, 0.5, 0.0, 1.0])
    path = {run.number: [] for run in runs}

    def on_step(members, step, states, metrics):
        for run, state in zip(members, states()):
            path[run.number].append(state)

    final = train(executor, model, tokenizer, runs, on_step=on_step)
    for run, state in zip(runs, final):
        mu, points = run.config.mu, [parameters(model), *(past.policy for past in path[run.number])]
        for t in (1, 7, 20):
            for name in run.init:
                expected = (1 - mu) ** t * points[0][name]
                for s in range(1, t + 1):
                    expected = expected + mu * (1 - mu) ** (t - s) * points[s][name]
                torch.testing.assert_close(path[run.number][t - 1].anchor[name], expected, atol=1e-10, rtol=1e-10)
        assert (distance(state.anchor, run.init) > 1e-3) == (mu > 0)
        assert (distance(state.anchor, state.policy) > 1e-3) == (mu < 1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_sft_anchor_never_moves(executor, policy_of, tokenizer):
    model, sft = policy_of("gpt2"), policy_of("gpt2", seed=1)
    for state in train(executor, model, tokenizer, make_runs(model, sft, mu=[0.1, 1.0], anchor=["sft", "sft"])):
        assert distance(state.anchor, parameters(sft)) == 0 and distance(state.policy, parameters(model)) > 0.01


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_kl_is_to_the_moving_anchor(executor, policy_of, tokenizer):
    """At μ = 1 the anchor is the policy itself and there is no KL; at μ = 0 it grows from step to step."""
    model, rows = policy_of("gpt2"), {1: [], 2: [], 3: []}

    def on_step(members, step, states, metrics):
        for run, row in zip(members, metrics):
            rows[run.number].append(row["kl_to_anchor"])

    train(executor, model, tokenizer, make_runs(model, mu=[1.0, 0.3, 0.0], beta=[1e-6] * 3), on_step=on_step)
    late = {number: sum(values[10:]) / 10 for number, values in rows.items()}
    assert max(map(abs, rows[1])) < 1e-9
    assert 0.01 < late[2] < 0.7 * late[3]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_strong_kl_keeps_the_policy_near_its_anchor(executor, policy_of, tokenizer):
    model = policy_of("gpt2")
    ends = {}

    def on_step(members, step, states, metrics):
        for run, row in zip(members, metrics):
            ends.setdefault(run.config.beta, []).append(row["kl_to_anchor"])

    train(executor, model, tokenizer, make_runs(model, beta=[0.0, 5.0], anchor=["sft"] * 2), on_step=on_step)
    assert sum(ends[5.0][10:]) < 0.3 * sum(ends[0.0][10:])


# --- what a step reports and refuses ---------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_metrics_of_a_step_are_those_of_its_completions(executor, policy_of, tokenizer):
    model, sft, calls, rows = policy_of("gpt2"), policy_of("gpt2", seed=1), [], []

    def watched(prompts, completions, completion_ids):
        calls.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    [run] = make_runs(model, sft, anchor=["sft"], reward=[watched])
    train(executor, model, tokenizer, [run], on_step=lambda runs, step, states, metrics: rows.extend(metrics))
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row, completions in zip(rows, calls):
        lengths = torch.tensor([len(ids) for ids in completions]).double()
        assert row["reward"] == row["length"] == pytest.approx(lengths.mean().item())
        assert row["reward_std"] == pytest.approx(lengths.std().item())
        assert row["regularised_reward"] == pytest.approx(row["reward"] - CONFIG.beta * row["kl_to_anchor"])
        assert row["lr"] == pytest.approx(CONFIG.lr * min(1, row["step"] / CONFIG.warmup_steps))
        assert 0 < row["entropy"] < CONFIG.max_new_tokens * math.log(len(tokenizer)) * 2
        assert row["gradient_norm"] > 0 and all(isinstance(value, (int, float)) for value in row.values())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("bad, word", [(math.nan, "nan"), (math.inf, "inf")])
def test_a_reward_that_is_not_finite_names_iteration_run_step_and_prompt(executor, bad, word, policy_of, tokenizer):
    def reward(prompts, completions, count=[0]):  # noqa: B006
        count[0] += 1
        return [bad if count[0] == 3 and b == 2 else 0.0 for b in range(len(prompts))]

    model = policy_of("gpt2")
    runs = make_runs(model, reward=[likes_film, reward])
    culprit = PROMPTS[prompt_indices((0, 1, 2), 2, CONFIG.batch_size, len(PROMPTS))[2]]
    with pytest.raises(ValueError, match=f"reward is {word} in iteration 1, run 2, step 3, .*{culprit}") as caught:
        train(executor, model, tokenizer, runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gradient_that_is_not_finite_names_run_and_step_before_it_gets_into_an_average(
        executor, policy_of, tokenizer):
    def explodes(prompts, completions, count=[0]):  # noqa: B006
        count[0] += 1
        return [(1e308 if b == 2 else -1e308 * (b == 3)) if count[0] == 4 else 0.0 for b in range(len(prompts))]

    model = policy_of("gpt2")
    kept = []
    culprit = PROMPTS[prompt_indices((0, 1, 2), 3, CONFIG.batch_size, len(PROMPTS))[2]]
    with pytest.raises(RunFailed, match=f"(gradient|loss) is .* in iteration 1, run 2, step 4, .*{culprit}'; lower lr"):
        train(executor, model, tokenizer, make_runs(model, reward=[likes_film, explodes]),
              on_step=lambda runs, step, states, metrics: kept.extend(states()))
    for state in kept:
        assert all(torch.isfinite(tensor).all() for tensor in (*state.policy.values(), *state.anchor.values()))


@pytest.mark.parametrize("name, values", [
    ("steps", [20, 10]), ("batch_size", [4, 2]), ("max_new_tokens", [6, 3]), ("temperature", [1.0, 0.5]),
    ("warmup_steps", [5, 0]), ("adam_beta1", [0.9, 0.5])])
def test_runs_that_cannot_be_one_batch_are_refused_by_name(name, values, policy_of, tokenizer):
    model = policy_of("gpt2")
    with pytest.raises(ValueError, match=f"must share {name}"):
        train(train_batched, model, tokenizer, make_runs(model, **{name: values}))


def test_runs_at_different_steps_are_refused_as_one_batch(policy_of, tokenizer):
    model, kept = policy_of("gpt2"), []
    train(train_batched, model, tokenizer, make_runs(model), on_step=states_at(9, kept))
    runs = make_runs(model)
    runs[0].state = kept[0]
    with pytest.raises(ValueError, match=r"start at one step, not \[9, 0\]"):
        train(train_batched, model, tokenizer, runs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_dropout_in_the_users_config_does_not_matter(executor, architecture, policy_of, tokenizer):
    """GPT-2's own default is 0.1; live, the policy that is scored would not be the one that sampled."""
    names = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if architecture == "gpt2" else ("attention_dropout",)
    config = CONFIG.replace(steps=5)
    plain, dropping = policy_of(architecture), policy_of(architecture, **dict.fromkeys(names, 0.5)).train()
    assert_states_equal(train(executor, plain, tokenizer, make_runs(plain, config=config)),
                        train(executor, dropping, tokenizer, make_runs(plain, config=config)), 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rewards_go_up(executor, policy_of, tokenizer):
    """Sixty steps toward a word, from a random policy."""
    model, rows = policy_of("gpt2"), []
    config = CONFIG.replace(steps=60, batch_size=16, beta=0.05)
    train(executor, model, tokenizer, make_runs(model, config=config)[:1],
          on_step=lambda runs, step, states, metrics: rows.append(metrics[0]["reward"]))
    assert sum(rows[-10:]) / 10 > sum(rows[:10]) / 10 + 1
