"""The memory estimate against the peak of a training process, and what it advises."""

import json
import subprocess
import sys
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from short_run import CONFIG, PROMPTS, score, short_run
from transformers import GPT2Config, GPT2LMHeadModel

from warp_lite import WarpConfig, run_warp
from warp_lite.training import memory
from warp_lite.training.memory import free_memory, settings_that_fit, training_memory

MEASURE = """
import json, resource, sys
from transformers import GPT2Config, GPT2LMHeadModel
from warp_lite.config import WarpConfig
from warp_lite.training.memory import training_memory
from warp_lite.policies.prompts import encode_prompts
from warp_lite.averaging.state_dicts import parameters
from warp_lite.training.run import Run
from warp_lite.training.batched import train_batched
from warp_lite.training.serial import train_serial
from warp_lite.scale.lora import AdapterTrainer, LoraSettings
from warp_lite.task import Task
from warp_lite.worlds.grammar import make_tokenizer

words, width, layers, batch, new_tokens, policies = map(int, sys.argv[1].split())
settings = json.loads(sys.argv[2])
together, rank = settings.pop("executor", "batched") == "batched", settings.pop("rank", 0)
tokenizer = make_tokenizer()
model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=96, vocab_size=words,
                                   bos_token_id=1, eos_token_id=2, pad_token_id=0))
prompts = encode_prompts(tokenizer, ["this old film was", "that new drama was", "the long film was"])
init = {name: tensor.clone() for name, tensor in parameters(model).items()}
config = WarpConfig(steps=1, batch_size=batch, max_new_tokens=new_tokens, **settings)
reward = lambda prompts, completions, completion_ids: [float(len(set(ids))) for ids in completion_ids]
runs = [Run(config, 1, m + 1, init, init, reward) for m in range(policies)]
scale = 1 if sys.platform == "darwin" else 1024
if rank:
    trainer = AdapterTrainer(LoraSettings(rank=rank))
    trainer.start(Task(model, tokenizer, reward, prompts, prompts, sft=init), config, None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
if rank:
    trainer.train(runs)
else:
    (train_batched if together else train_serial)(model, tokenizer, prompts, runs[:policies if together else 1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
estimate = training_memory(
    model, policies if together else 1, batch, prompts.ids.shape[1], new_tokens, config, together,
    trainer.adapter if rank else None)
print(peak - before, estimate.total)
"""


@lru_cache
def measured_and_estimated(shape: str, **settings) -> tuple[int, int]:
    """Bytes that the training of policies of a shape takes in a process of its own."""
    # A shell in between: the peak of a process counts what its parent had when it forked, and pytest has much.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, shape, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


# vocabulary, width, layers, completions, new tokens, policies. Widths above 256: narrower ones are folded.
WEIGHTS, LOGITS, ACTIVATIONS = "5000 260 4 8 32 4", "50257 260 2 64 48 1", "500 260 6 96 72 1"
CASES = {
    "mostly weights": (WEIGHTS, {}), "mostly logits": (LOGITS, {}), "logits in chunks": (LOGITS, {"logit_chunk": 256}),
    "micro-batches, serial": (LOGITS, {"micro_batch": 4, "executor": "serial"}),
    "mostly activations": (ACTIVATIONS, {}), "checkpointing": (ACTIVATIONS, {"checkpointing": True}),
    "adapters, mostly weights": (WEIGHTS, {"rank": 4}), "adapters, mostly activations": (ACTIVATIONS, {"rank": 4}),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module there")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_the_measured_peak(case):
    shape, settings = CASES[case]
    measured, estimate = measured_and_estimated(shape, **settings)
    assert 0.6 < estimate / measured < 1.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module there")
@pytest.mark.parametrize("plain, saving", [
    ("mostly logits", "logits in chunks"), ("mostly activations", "checkpointing")])
def test_the_settings_save_the_memory_that_the_estimate_says(plain, saving):
    """A third of it at least. The rest, which differs from process to process, is what the allocator keeps of freed
    chunks, layers that wait for the collector of cycles, and weights handed on at the end."""
    before, after = (measured_and_estimated(CASES[case][0], **CASES[case][1]) for case in (plain, saving))
    assert before[0] - after[0] > (before[1] - after[1]) / 3 > 0.1 * before[0]


def gpt2_on(device="cpu", **shape):
    """GPT-2's vocabulary, without weights that take memory."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**{"n_layer": 2, **shape}))
    if device == "cpu":
        return SimpleNamespace(config=model.config, parameters=model.parameters, device=torch.device("cpu"))
    return model


def test_each_setting_lowers_its_part_of_the_estimate():
    model, shape = gpt2_on("another", n_layer=12), (2, 64, 32, 64)
    plain = training_memory(model, *shape)
    for settings, part in (({"micro_batch": 4}, "activations"), ({"checkpointing": True}, "activations"),
                           ({"logit_chunk": 128}, "logits"), ({"sample_batch": 8}, "sampling"),
                           ({"offload": True}, "optimiser"), ({"offload": True}, "anchor")):
        saved = training_memory(model, *shape, WarpConfig(**settings))
        assert getattr(saved, part) < 0.6 * getattr(plain, part), settings
        assert saved.total <= plain.total
    numbers = 50257 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert plain.optimiser == 2 * plain.anchor == 2 * plain.weights == 2 * 4 * 2 * numbers
    assert plain.logits == 3 * 2 * 64 * 64 * 50257 * 4
    here = training_memory(gpt2_on(n_layer=12), *shape, WarpConfig(offload=True))
    assert here.optimiser == plain.optimiser  # on the CPU there is nowhere else to keep it
    assert training_memory(gpt2_on(), *shape, together=False).weights == 0
    assert str(plain).startswith("about ") and "logits" in str(plain) and "\n" not in str(plain)


def test_the_advice_fits_and_takes_no_more_than_it_needs():
    for device in ("cpu", "another"):
        model, shape, config = gpt2_on(device), (1, 64, 32, 64), WarpConfig(batch_size=64)
        plain = training_memory(model, *shape, config)
        assert settings_that_fit(model, *shape, config, plain.total) == ([], plain)
        changes, then = settings_that_fit(model, *shape, config, plain.total / 2)
        assert then.total <= plain.total / 2 and changes
        assert training_memory(model, *shape, config.with_text(changes)) == then
        changes, then = settings_that_fit(model, *shape, config, 0)  # nothing fits: all that help, and what is left
        assert ("offload=true" in changes) == (device != "cpu") and 0 < then.total < plain.total


def test_a_run_that_does_not_fit_says_so_in_one_line_with_what_to_set(policy_of, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 200_000)
    short_run(policy_of("gpt2"), tokenizer, steps=1, iterations=1, batch_size=8)
    line, = capsys.readouterr().err.splitlines()
    assert "a run would take about 0.00 GiB for 1 policy: " in line and " are free; set " in line
    assert "micro_batch=" in line
    monkeypatch.setattr(memory, "WORTH_SAYING", 1000)
    monkeypatch.setattr(memory, "free_memory", free_memory)
    short_run(policy_of("gpt2"), tokenizer, steps=1, iterations=1)
    assert not capsys.readouterr().err  # not where progress is not shown
    run_warp(policy_of("gpt2"), tokenizer, score, PROMPTS, CONFIG.replace(steps=1, iterations=1))
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warp-lite: training takes about 0.00 GiB for 2 policies at once: ") and " are free" in line


def test_policies_that_cannot_be_checkpointed_together_train_one_after_the_other(policy_of, tokenizer, capsys):
    result = short_run(policy_of("llama"), tokenizer, steps=1, iterations=1, checkpointing=True)
    line, = capsys.readouterr().err.splitlines()
    assert "LlamaForCausalLM cannot be checkpointed while they train together; they train one after the other" in line
    assert len(result.iterations[0].policies) == 2


def test_free_memory_is_what_is_left_of_the_machine():
    assert 2**20 < free_memory() < 2**50
