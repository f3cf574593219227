"""What the user froze stays, whatever trains the rest; what is no whole policy, or has nothing to train, is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_policy

from warp_lite import WarpConfig, evaluate, load_result, run_warp
from warp_lite.averaging.state_dicts import freeze, frozen_names, parameters
from warp_lite.experiment import run_experiment
from warp_lite.policies import encode_prompts
from warp_lite.task import Task
from warp_lite.training.batched import train_batched
from warp_lite.training.memory import training_memory
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial

PROMPTS = ["this film", "that plot was great and i loved it but", "i", "this film was dull ."]
CONFIG = WarpConfig(iterations=2, runs=2, steps=3, batch_size=4, max_new_tokens=6, eval_every=0, lr=1e-2, mu=0.3,
                    max_grad_norm=0.05)
EXECUTORS = ["batched", "serial"]


def score(prompts, completions):
    return [float(completion.count("t")) for completion in completions]


def half_frozen(architecture, vocabulary, dtype=torch.float64):
    """A policy whose embeddings and first layer are frozen, and the names of those weights."""
    model = make_policy(architecture, vocabulary, dtype)
    frozen = [name for name, _ in model.named_parameters() if ".0." in name or "wte" in name or "embed" in name]
    return freeze(model, frozen), frozen


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("anchor", ["ema", "sft"])
def test_what_is_frozen_stays_and_the_executors_agree(architecture, anchor, tokenizer):
    results = []
    for executor in EXECUTORS:
        model, frozen = half_frozen(architecture, len(tokenizer))
        result = run_warp(model, tokenizer, score, PROMPTS, CONFIG.replace(anchor=anchor), executor=executor,
                          progress=False)
        assert frozen_names(model) == frozen
        for iteration in result.iterations:
            states = [iteration.merged, iteration.next_init, *iteration.policies, *iteration.anchors]
            assert all(torch.equal(state[name], result.sft[name]) for state in states for name in frozen)
            moved = [name for name in result.sft if not torch.equal(iteration.merged[name], result.sft[name])]
            assert moved and not set(moved) & set(frozen)
        results.append(result)
    for batched, serial in zip(results[0].iterations, results[1].iterations):
        for one, other in zip([*batched.policies, *batched.anchors, batched.merged],
                              [*serial.policies, *serial.anchors, serial.merged]):
            assert one.keys() == other.keys() == results[0].sft.keys()
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("train", [train_batched, train_serial])
def test_the_norm_that_is_clipped_is_that_of_what_trains(train, tokenizer):
    """The oracle: the gradient of a policy of which nothing is frozen, without the frozen part."""
    gradients, norms = {}, []
    for freezes in (False, True):
        model, frozen = half_frozen("gpt2", len(tokenizer))
        if not freezes:
            model.requires_grad_(True)
        state = parameters(model)
        run = Run(CONFIG.replace(steps=1, max_grad_norm=1e9), 1, 1, state, state, score)
        (end,) = train(model, tokenizer, encode_prompts(tokenizer, PROMPTS), [run],
                       lambda runs, step, states, metrics: norms.append(metrics[0]["gradient_norm"]))
        gradients[freezes] = {name: moment / (1 - CONFIG.adam_beta1) for name, moment in end.exp_avg.items()}
    free = torch.cat([tensor.flatten() for name, tensor in gradients[False].items() if name not in frozen])
    assert norms[1] == pytest.approx(free.norm().item(), rel=1e-9) and norms[1] < 0.99 * norms[0]
    assert all(not gradients[True][name].any() for name in frozen)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_folder_holds_all_weights_and_an_interrupted_run_goes_on(executor, tokenizer, tmp_path):
    whole, _ = half_frozen("gpt2", len(tokenizer), torch.float32)
    expected = run_warp(whole, tokenizer, score, PROMPTS, CONFIG, tmp_path / "whole", executor=executor, progress=False)
    asked = iter([False, False, True])
    model, frozen = half_frozen("gpt2", len(tokenizer), torch.float32)
    options = {"out": tmp_path / "out", "executor": executor, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run_warp(model, tokenizer, score, PROMPTS, CONFIG, **options, stop=lambda: next(asked))
    result = run_warp(model, tokenizer, score, PROMPTS, CONFIG, **options, resume=True)
    again = load_result(tmp_path / "out", score)
    for some in (result, again):
        for iteration, same in zip(some.iterations, expected.iterations):
            assert all(torch.equal(tensor, same.merged[name]) for name, tensor in iteration.merged.items())
    saved = load_file(tmp_path / "out" / "iteration-1" / "run-1" / "policy.safetensors")
    assert saved.keys() == result.sft.keys() and all(torch.equal(saved[name], result.sft[name]) for name in frozen)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_policy_of_which_all_is_frozen_is_refused_before_anything_is_written(executor, tokenizer, tmp_path):
    model = make_policy("gpt2", len(tokenizer)).requires_grad_(False)
    with pytest.raises(ValueError, match="^every weight of the policy is frozen .*requires_grad_") as caught:
        run_warp(model, tokenizer, score, PROMPTS, CONFIG, tmp_path / "out", executor=executor, progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_is_frozen_takes_no_gradient_and_no_moments(tokenizer):
    whole, half = make_policy("gpt2", len(tokenizer)), half_frozen("gpt2", len(tokenizer))[0]
    share = sum(p.numel() for p in half.parameters() if p.requires_grad) / sum(p.numel() for p in whole.parameters())
    one, other = (training_memory(model, 2, 4, 8, 8) for model in (whole, half))
    for part in ("optimiser", "gradients", "anchor"):
        assert getattr(other, part) == pytest.approx(share * getattr(one, part))


def test_runs_of_trl_leave_what_is_frozen(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from warp_lite.scale.trl import run_warp_trl

    model, frozen = half_frozen("gpt2", len(tokenizer), torch.float32)
    args = trl.RLOOConfig(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, use_cpu=True,
                          bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True, learning_rate=1e-2)
    out = run_warp_trl(model, lambda prompts, completions, **kwargs: score(prompts, completions), PROMPTS * 2,
                       CONFIG.replace(runs=1, iterations=1), args, out=tmp_path / "out", tokenizer=tokenizer,
                       eval_prompts=PROMPTS)
    result = load_result(out, score)
    moved = {name for name, tensor in result.iterations[0].merged.items() if not torch.equal(tensor, result.sft[name])}
    assert moved and not moved & set(frozen)


@pytest.mark.slow
def test_workers_of_ray_leave_what_is_frozen(tokenizer, tmp_path):
    pytest.importorskip("ray")
    model, frozen = half_frozen("gpt2", len(tokenizer), torch.float32)
    merged = [run_warp(model, tokenizer, score, PROMPTS, CONFIG.replace(iterations=1), tmp_path / executor,
                       executor=executor, progress=False).iterations[0].merged for executor in ("ray", "serial")]
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


# --- PEFT models ---


def with_adapter(vocabulary):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_policy("llama", vocabulary, torch.float32), peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_adapter_of_the_library(vocabulary):
    peft, model = pytest.importorskip("peft"), make_policy("llama", vocabulary, torch.float32)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("make", [with_adapter, with_adapter_of_the_library])
def test_a_peft_model_is_refused_in_one_line_that_names_the_ways_out(make, tokenizer, tmp_path):
    model, plain = make(len(tokenizer)), make_policy("llama", len(tokenizer), torch.float32)
    out = tmp_path / "out"
    tries = [lambda: run_warp(model, tokenizer, score, PROMPTS, CONFIG, out, progress=False),
             lambda: run_experiment(Task.of(model, tokenizer, score, PROMPTS), {"": CONFIG}, [0], out=out),
             lambda: evaluate(model, plain, score, PROMPTS, tokenizer),
             lambda: evaluate(plain, model, score, PROMPTS, tokenizer)]
    for attempt in tries:
        with pytest.raises(ValueError, match=r"is a PEFT model.*lora=.*--lora-rank.*merge_and_unload\(\)") as caught:
            attempt()
        assert "\n" not in str(caught.value) and not out.exists()


def test_a_peft_model_that_was_merged_is_a_policy_as_any_other(tokenizer):
    model = with_adapter(len(tokenizer)).merge_and_unload().requires_grad_()
    result = run_warp(model, tokenizer, score, PROMPTS, CONFIG.replace(iterations=1, steps=1), progress=False)
    assert json.dumps(result.front([1.0], samples=2)[0]["kl"])
