"""TRL as stage 1: the anchor in closed form, restarts and merges to the bit, and the same front as ours."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from short_run import CONFIG, PROMPTS, assert_same_weights, differ, files, score
from transformers import TrainerCallback

from warp_lite import WarpConfig, liti, load_result, slerp
from warp_lite.averaging.state_dicts import parameters
from warp_lite.cli import main
from warp_lite.experiment import run_experiment
from warp_lite.policies.loading import load_policy, save_policy
from warp_lite.training import reinforce

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from warp_lite.scale.trl import agree, place_by_mask, run_warp_trl  # noqa: E402


class Recorder(TrainerCallback):
    """What each run began with and where it stood after each step, and the arguments that TRL was given."""

    def __init__(self):
        self.starts, self.paths, self.args, self.models = [], [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.starts.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.paths.append([])
        self.args.append(args)
        self.models.append(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.paths[-1].append({name: p.detach().clone() for name, p in model.named_parameters()})


def config(**changes):
    return CONFIG.replace(**{"batch_size": 4, "steps": 3, **changes})


@pytest.fixture(scope="module")
def policy(policy_of):
    return policy_of("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(policy, tokenizer, tmp_path_factory):
    """A finished run with what it was seen to do, shared: not to be changed."""
    recorder, seen = Recorder(), []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.append(list(prompts))
        return score(prompts, completions, completion_ids)

    out = tmp_path_factory.mktemp("trl") / "run"
    args = agree(config(), None)[1]
    args.num_generations = 2
    folder = run_warp_trl(policy, reward, PROMPTS, config(), args, out=out, tokenizer=tokenizer, callbacks=[recorder])
    return folder, load_result(folder, score), recorder, seen


# --- exact ----------------------------------------------------------------------------------


def test_the_anchor_is_the_moving_average_of_the_policies_in_closed_form(finished):
    """θ_ema after k steps = (1 − μ)^k θ_init + Σ_j μ (1 − μ)^(k−j) θ_j, with the θ_j as TRL trained them."""
    _, result, recorder, _ = finished
    mu, runs = CONFIG.mu, [(i, m) for i in range(2) for m in range(2)]
    for (i, m), start, path in zip(runs, recorder.starts, recorder.paths, strict=True):
        k = len(path)
        assert k == 3
        closed = {name: (1 - mu) ** k * tensor.double() + sum(
            mu * (1 - mu) ** (k - j) * theta[name].double() for j, theta in enumerate(path, 1))
            for name, tensor in start.items()}
        anchor = {name: tensor.double() for name, tensor in result.iterations[i].anchors[m].items()}
        assert_same_weights(anchor, closed, 1e-6)
        assert differ(anchor, {name: tensor.double() for name, tensor in start.items()})
        assert_same_weights(result.iterations[i].policies[m], path[-1])


def test_every_run_restarts_from_its_iterations_init(finished):
    _, result, recorder, _ = finished
    for n, start in enumerate(recorder.starts):
        assert_same_weights(start, result.iterations[n // 2].init)
    assert differ(result.iterations[1].init, result.sft)


def test_merges_and_next_inits_are_ours_to_the_bit(finished):
    _, result, _, _ = finished
    for iteration in result.iterations:
        assert_same_weights(iteration.merged, slerp(iteration.init, iteration.policies))
        assert_same_weights(iteration.next_init, liti(iteration.init, iteration.merged, CONFIG.eta))
        assert differ(*iteration.policies)


def test_the_folders_next_init_is_what_the_next_iteration_starts_from(finished):
    folder, result, _, _ = finished
    for i in (1, 2):
        saved = parameters(load_policy(folder / f"iteration-{i}" / "next-init")[0])
        assert_same_weights(saved, result.iterations[i - 1].next_init)


def test_every_run_sees_its_own_order_of_the_training_prompts(finished):
    _, result, recorder, seen = finished
    runs = [sum(seen[n:n + 3], []) for n in range(0, 12, 3)]
    assert len(seen) == 12 and len({tuple(run) for run in runs}) == 4
    assert not {prompt for run in runs for prompt in run} & set(result.task.eval_prompts.given)
    assert len({args.seed for args in recorder.args}) == 4


def test_warps_settings_are_set_and_the_users_are_kept(finished):
    _, _, recorder, _ = finished
    for args in recorder.args:
        assert (args.max_steps, args.beta, args.sync_ref_model, args.ref_model_mixup_alpha) == (3, 0.1, True, 0.1)
        assert args.ref_model_sync_steps == 1 and args.disable_dropout and args.save_strategy == "no"
        assert args.num_generations == 2 and args.per_device_train_batch_size == 4


def test_the_folder_is_a_run_folder(finished):
    folder, result, _, _ = finished
    names = files(folder)
    for name in ("config.json", "prompts.json", "sft/model.safetensors", "iteration-1/run-1/DONE", "iteration-2/DONE",
                 "iteration-1/run-2/policy.safetensors", "iteration-2/merged/tokenizer.json"):
        assert name in names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl")) or "checkpoint" in n or "part" in n]
    rows = [json.loads(line) for line in (folder / "iteration-1/run-1/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][:3] == [1, 2, 3] and rows[0]["kl_to_anchor"] == pytest.approx(0, abs=1e-5)
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["trl"]["num_generations"] == 2 and settings["config"]["batch_size"] == 4
    points = result.front(etas=(0, 1))
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6) and points[1]["kl"] > 0


def test_the_front_command_finds_a_reward_that_can_be_imported(policy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = run_warp_trl(policy, score, PROMPTS, config(iterations=1, steps=1), out=tmp_path / "run",
                          tokenizer=tokenizer)
    assert main(["front", str(folder), "--etas", "0,1"]) == 0
    assert json.loads((folder / "front.json").read_text())["points"][1]["eta"] == 1


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["sft", "none"])
def test_anchors_that_stay_and_no_anchor(policy, tokenizer, tmp_path, anchor):
    recorder = Recorder()
    folder = run_warp_trl(policy, score, PROMPTS, config(anchor=anchor, runs=1, steps=2), out=tmp_path / "run",
                          tokenizer=tokenizer, callbacks=[recorder])
    result = load_result(folder, score)
    for iteration in result.iterations:
        for state in iteration.anchors:
            assert_same_weights(state, result.sft if anchor == "sft" else iteration.init)
    assert differ(result.iterations[1].init, result.sft)
    assert {args.beta for args in recorder.args} == {0.1 if anchor == "sft" else 0.0}
    assert not any(args.sync_ref_model for args in recorder.args)
    for iteration in result.iterations:  # a single run is taken as it is
        assert_same_weights(iteration.merged, iteration.policies[0])
    assert differ(result.iterations[1].policies[0], result.iterations[1].init)


def test_what_both_configs_have_is_taken_from_trls(policy):
    args = trl.RLOOConfig(
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], learning_rate=3e-4, temperature=0.9,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_completion_length=7,
        adam_beta2=0.99, adam_epsilon=7e-8, max_grad_norm=3.5, warmup_steps=0.5)
    agreed, same = agree(config(steps=10, mu=0.2, eta=0.4), args)
    assert same is args
    assert (agreed.lr, agreed.temperature, agreed.batch_size, agreed.max_new_tokens) == (3e-4, 0.9, 8, 7)
    assert (agreed.adam_beta2, agreed.warmup_steps, agreed.max_grad_norm) == (0.99, 5, 0.5)
    assert agreed.adam_eps == pytest.approx(1e-8)
    assert (agreed.steps, agreed.mu, agreed.eta, agreed.beta, agreed.runs) == (10, 0.2, 0.4, 0.1, 2)
    # and the other way round it is the same map
    back = agree(agreed, agree(agreed, None)[1])[0]
    assert back == agreed.replace(adam_eps=back.adam_eps) and back.adam_eps == pytest.approx(agreed.adam_eps)


@pytest.mark.parametrize("front, back", [("<bos>", "<eos>"), ("<bos>", None), (None, None)])
def test_trl_reads_prompts_with_one_bos_and_no_eos_that_the_tokenizer_appends(
        policy, tmp_path, monkeypatch, front, back):
    from tiny import make_tokenizer
    from tokenizers import processors

    tokenizer, seen = make_tokenizer(bos=False), []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (front, "$A", back))), special_tokens=[("<bos>", 1), ("<eos>", 2)])
    generate = trl.RLOOTrainer._generate_single_turn

    def spy(self, prompt_ids, *args):
        seen.extend(map(tuple, prompt_ids))
        return generate(self, prompt_ids, *args)

    monkeypatch.setattr(trl.RLOOTrainer, "_generate_single_turn", spy)
    rendered = [f"<bos> {prompt}" for prompt in PROMPTS]  # as a chat template would
    run_warp_trl(policy, lambda prompts, completions, **kwargs: [float(len(c)) for c in completions], rendered,
                 config(iterations=1, steps=1), out=tmp_path / "run", tokenizer=tokenizer)
    plain = {(1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS}
    assert seen and {*seen} <= plain



def test_padding_does_not_move_what_trl_scores(policy_of, tokenizer, finished):
    """TRL passes no positions, and GPT-2 counts its own from the left edge, padding included."""
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    model = policy_of("gpt2")
    with torch.no_grad():
        expected = model(ids[:, 2:]).logits
        assert (model(input_ids=ids, attention_mask=mask).logits[:, 2:] - expected).abs().max() > 0.1
        place_by_mask(model)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[:, 2:], expected)
        other = policy_of("llama")
        expected = other(ids[:, 2:]).logits
        place_by_mask(other)
        assert not other._forward_pre_hooks  # its rotations are computed in float32
        torch.testing.assert_close(other(input_ids=ids, attention_mask=mask).logits[:, 2:], expected,
                                   rtol=1e-5, atol=1e-5)
    assert all(model._forward_pre_hooks for model in finished[2].models)


# --- going on, and refusing -----------------------------------------------------------------


def test_finished_runs_are_kept_and_the_rest_is_run_again(finished, policy, tokenizer, tmp_path):
    folder, _, _, _ = finished
    args = agree(config(), None)[1]
    args.num_generations = 2
    calls = []

    def reward(prompts, completions, completion_ids, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # in the second step of the first run of iteration 2
            raise KeyboardInterrupt
        return score(prompts, completions, completion_ids)

    options = {"out": tmp_path / "run", "tokenizer": tokenizer}
    with pytest.raises(KeyboardInterrupt):
        run_warp_trl(policy, reward, PROMPTS, config(), args, **options)
    with pytest.raises(ValueError, match="holds a run already"):
        run_warp_trl(policy, reward, PROMPTS, config(), args, **options)
    with pytest.raises(ValueError, match="with trl.num_generations = 2, not 4"):
        run_warp_trl(policy, reward, PROMPTS, config(), None, resume=True, **options)
    run_warp_trl(policy, reward, PROMPTS, config(), args, resume=True, **options)
    assert len(calls) == 8 + 6  # two runs of three steps: the finished ones were not run again
    found, expected = files(tmp_path / "run"), files(folder)
    for name in found:
        if name.endswith(".safetensors"):
            assert found[name] == expected[name], name


def test_what_cannot_be_used_is_refused_in_one_line_and_nothing_is_written(policy_of, policy, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(policy_of("llama", dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM"))
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
               "max_completion_length": 5, "num_generations": 2, "per_device_train_batch_size": 4}
    chat = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "a film"}]] * 4})
    cases = [
        (adapted, PROMPTS, {}, "PEFT model, whose reference TRL cannot move"),
        (policy_of("gpt2", dtype=torch.bfloat16), PROMPTS, {}, "lost in rounding"),
        (policy, PROMPTS, {"model_init_kwargs": {"dtype": "bfloat16"}}, "lost in rounding"),
        (policy, PROMPTS, {"shuffle_dataset": False}, "see its prompts in one order"),
        (policy, PROMPTS, {"resume_from_checkpoint": "x"}, "lack the moving reference"),
        (policy, chat, {}, "the prompts are conversations"),
        (policy, PROMPTS, {"per_device_train_batch_size": 40}, "a batch takes 20 prompts and there are 9"),
    ]
    for model, prompts, changes, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            run_warp_trl(model, score, prompts, config(), trl.RLOOConfig(**{**options, **changes}),
                         out=tmp_path / "run", tokenizer=tokenizer)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="pass its tokenizer too"):
        run_warp_trl(policy, score, PROMPTS, config(), out=tmp_path / "run")
    with pytest.raises(TypeError, match="pass a trl.RLOOConfig"):
        run_warp_trl(policy, score, PROMPTS, config(), {}, out=tmp_path / "run", tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


# --- processes, and the front ---------------------------------------------------------------


@pytest.mark.all
def test_two_processes_train_and_the_first_merges(policy, tokenizer, tmp_path):
    """Two processes on the CPU: half a batch each, one anchor, one run folder."""
    save_policy(policy, tokenizer, tmp_path / "policy")
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(f"""
        import torch
        from trl import RLOOConfig
        from short_run import CONFIG, PROMPTS, score
        from warp_lite.scale.trl import run_warp_trl
        torch.set_num_threads(1)
        args = RLOOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], num_generations=2,
                          per_device_train_batch_size=2, max_completion_length=5, learning_rate=1e-2)
        run_warp_trl({str(tmp_path / "policy")!r}, score, PROMPTS, CONFIG.replace(steps=2, runs=2, iterations=1), args,
                     out={str(tmp_path / "run")!r})
    """))
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              str(script)]
    here = Path(__file__).resolve().parent
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=600, env={
        **os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = load_result(tmp_path / "run", score)
    assert result.config.batch_size == 4
    for iteration in result.iterations:
        assert_same_weights(iteration.merged, slerp(iteration.init, iteration.policies))
        assert differ(iteration.anchors[0], iteration.init)


# An anchor that covers six times its own memory in a run: one that stays still ends at less than half of the KL.
SETTINGS = WarpConfig(iterations=1, runs=2, steps=30, batch_size=32, lr=7e-4, beta=0.3, mu=0.2, warmup_steps=0,
                      eval_every=0)
ETAS = (0.5, 1.0)


def fronts(results):
    """KL and reward at each η of every result, (results, 2 · η)."""
    metrics = results[0].measure([result.weights(x) for result in results for x in ETAS], samples=4)
    return np.array([[m.kl, m.reward] for m in metrics]).reshape(len(results), 2 * len(ETAS))


def by_trl(world, settings, generations, seeds, folder):
    """The fronts of TRL's runs with so many completions a prompt."""
    results = []
    for seed in range(seeds):
        args = agree(settings, None)[1]
        args.num_generations = generations
        made = run_warp_trl(world.policy, world.reward, world.prompts.given, settings.replace(seed=seed), args,
                            out=folder / str(seed), tokenizer=world.tokenizer, eval_prompts=world.eval_prompts.given)
        results.append(load_result(made, world.reward))
    return fronts(results)


def by_us(world, settings, seeds):
    """The fronts of our own runs."""
    results = run_experiment(world, {"": settings}, range(seeds), progress=False).results
    return fronts(results[""])


def apart(first, second):
    """The differences of the means in standard errors, variances pooled over both."""
    degrees = len(first) + len(second) - 2
    pooled = (first.var(0, ddof=1) * (len(first) - 1) + second.var(0, ddof=1) * (len(second) - 1)) / degrees
    return (first.mean(0) - second.mean(0)) / np.sqrt(pooled * (1 / len(first) + 1 / len(second)))


def compared(theirs, ours):
    """The comparison in words."""
    names = [f"{what} at {x}" for x in ETAS for what in ("KL", "reward")]
    return "; ".join(f"{name}: TRL {a:.3f}, ours {b:.3f}, {t:+.1f} standard errors"
                     for name, a, b, t in zip(names, theirs.mean(0), ours.mean(0), apart(theirs, ours)))


@pytest.mark.slow
def test_trls_front_and_ours_agree_within_their_intervals(world, tmp_path):
    """KL and reward at η = ½ and 1, over seeds; the same comparison tells an anchor that never moves."""
    theirs, ours = by_trl(world, SETTINGS, 8, 5, tmp_path), by_us(world, SETTINGS, 18)
    assert (np.abs(apart(theirs, ours)) < 5).all(), compared(theirs, ours)
    still = by_us(world, SETTINGS.replace(anchor="sft"), 18)
    assert np.abs(apart(theirs, still)).max() > 5, "the comparison cannot tell a moving anchor from one that stays"


@pytest.mark.all
@pytest.mark.parametrize("generations", [2, 8])
def test_in_small_batches_the_fronts_agree_where_the_baseline_is_that_of_the_same_prompt(
        world, tmp_path, monkeypatch, generations):
    """With batches of 8 TRL's policies go farther than ours, since its baseline is of fewer completions. Ours do
    too once they draw `generations` completions a prompt and compare those alone."""
    settings = SETTINGS.replace(batch_size=8, steps=60, mu=0.05)
    theirs, ours = by_trl(world, settings, generations, 4, tmp_path), by_us(world, settings, 8)
    draw, over_all = reinforce.prompt_indices, reinforce.advantages
    monkeypatch.setattr(reinforce, "prompt_indices", lambda key, step, batch, n: np.repeat(
        draw(key, step, batch // generations, n), generations))
    monkeypatch.setattr(reinforce, "advantages", lambda rewards, scored: over_all(
        rewards.unflatten(-1, (-1, generations)), scored.unflatten(-1, (-1, generations))).flatten(-2))
    grouped = by_us(world, settings, 8)
    print(f"eight prompts a batch: {compared(theirs, ours)}\nthe same groups: {compared(theirs, grouped)}")
    assert (np.abs(apart(theirs, grouped)) < 4).all(), compared(theirs, grouped)


# --- several rewards, None, and what a classifier reads ---------------------------------------


def length_score(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def ten(prompts, completions, **kwargs):
    return [10.0 for _ in completions]


def odd_score(prompts, completions, completion_ids, **kwargs):
    """Nothing for completions of an even number of tokens."""
    return [10.0 if len(ids) % 2 else None for ids in completion_ids]


async def async_score(prompts, completions, completion_ids, **kwargs):
    return length_score(prompts, completions, completion_ids)


def trained(policy, tokenizer, rewards, out, weights=None):
    """A folder of one iteration of one step by TRL, and the first rows of its runs' logs."""
    args = agree(config(), None)[1]
    args.reward_weights = weights
    folder = run_warp_trl(policy, rewards, PROMPTS, config(iterations=1, steps=1), args, out=out, tokenizer=tokenizer)
    logs = [folder / f"iteration-1/run-{m}/metrics.jsonl" for m in (1, 2)]
    return folder, [json.loads(log.read_text().splitlines()[0]) for log in logs]


def measured(folder, reward):
    """The SFT policy's reward on held-out prompts."""
    return load_result(folder, reward).front([0.0], samples=16)[0]["reward"]


@pytest.mark.parametrize("weights", [[1.0, -0.1], [0.5, 0.0], None], ids=str)
def test_the_front_is_of_the_weighted_sum_that_was_trained(policy, tokenizer, tmp_path, monkeypatch, weights):
    """Kept in config.json: given the functions again, or found by the command line; TRL's own log is the oracle."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder, rows = trained(policy, tokenizer, [length_score, ten], tmp_path / "run", weights)
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["trl"].get("reward_weights") == weights
    assert settings["source"] == {"reward": ["test_trl:length_score", "test_trl:ten"]}
    first, second = weights or (1.0, 1.0)
    for row in rows:
        assert row["reward"] == pytest.approx(first * row["rewards/length_score/mean"] + second * 10, abs=1e-4)
    expected = first * measured(folder, length_score) + second * 10  # one function alone is a measure of its own
    assert measured(folder, [length_score, ten]) == pytest.approx(expected)
    assert measured(folder, None) == pytest.approx(expected)
    with pytest.raises(ValueError, match="there are 2 reward_weights for 3 rewards"):
        load_result(folder, [ten] * 3) if weights else trained(policy, tokenizer, [ten] * 3, tmp_path / "x", [1.0, 1.0])
    assert not (tmp_path / "x").exists()


def test_one_reward_that_is_weighted_is_measured_so(policy, tokenizer, tmp_path):
    folder, rows = trained(policy, tokenizer, ten, tmp_path / "run", [0.25])
    assert rows[0]["reward"] == measured(folder, ten) == 2.5


def test_rewards_of_none_are_left_out_of_the_front_as_of_trls_log(policy, tokenizer, tmp_path):
    folder, rows = trained(policy, tokenizer, [odd_score, async_score], tmp_path / "run", [1.0, 0.0])
    assert all(row["rewards/odd_score/mean"] in (10.0, None) for row in rows)
    assert 0 < measured(folder, [odd_score, async_score]) < 10  # None counts as nothing where another reward scores
    folder, rows = trained(policy, tokenizer, odd_score, tmp_path / "alone")
    assert all(row["reward"] in (10.0, None) for row in rows) and measured(folder, odd_score) == 10


def test_a_reward_of_whole_texts_reads_in_trl_what_the_front_reads(policy, tokenizer, tmp_path):
    """The words of the tokens together; a text-classification model would be called so too."""
    seen = []

    def reward(prompts, completions, whole_texts, **kwargs):
        seen.extend(zip(prompts, completions, whole_texts))
        return [float(len(text)) for text in whole_texts]

    folder, rows = trained(policy, tokenizer, reward, tmp_path / "run")
    assert seen and all(whole == f"{prompt} {completion}".strip() for prompt, completion, whole in seen)
    in_trl = len(seen)
    load_result(folder, reward).front([0.0], samples=2)
    assert len(seen) > in_trl and all(whole == f"{p} {c}".strip() for p, c, whole in seen)
