"""Real sizes on a GPU, with random weights: GPT-2 of 124M and Gemma 3 of 270M, two runs of 20 steps.

Skipped without CUDA. With `pytest -s` it prints tokens a second, peak memory and the share of time in sampling.
"""

import time

import pytest
import torch
from tiny import make_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from warp_lite import WarpConfig
from warp_lite.averaging.state_dicts import parameters
from warp_lite.policies.prompts import encode_prompts
from warp_lite.training import reinforce
from warp_lite.training.batched import train_batched
from warp_lite.training.memory import training_memory
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**IDS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
        max_position_embeddings=32768, **IDS)),
}
PARAMETERS = {"gpt2": 124_439_808, "gemma3": 268_098_176}
PROMPTS = ["this film was", "that plot is great and i loved it but", "i loved that", "the film"]
CONFIG = WarpConfig(runs=2, steps=20, batch_size=16, max_new_tokens=48, lr=1e-5)


def many_words(prompts, completions, completion_ids):
    return [float(len(set(ids))) for ids in completion_ids]


def train(executor, model, config):
    """(states, metrics by step, seconds, seconds of sampling, peak bytes beside the model)."""
    tokenizer, rows, sampling, plain = make_tokenizer(), [], [0.0], reinforce.sample

    def timed(*args, **options):
        torch.cuda.synchronize()
        start = time.perf_counter()
        rollout = plain(*args, **options)
        torch.cuda.synchronize()
        sampling[0] += time.perf_counter() - start
        return rollout

    prompts = encode_prompts(tokenizer, PROMPTS).to("cuda")
    init = {name: tensor.cpu().clone() for name, tensor in parameters(model).items()}
    runs = [Run(config, 1, m, init, init, many_words) for m in (1, 2)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reinforce.sample = timed
    try:
        start = time.perf_counter()
        states = executor(model, tokenizer, prompts, runs, lambda runs, step, states, metrics: rows.append(metrics))
        seconds = time.perf_counter() - start
    finally:
        reinforce.sample = plain
    return states, rows, seconds, sampling[0], torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("executor", [train_batched, train_serial])
@pytest.mark.parametrize("savings", [{}, {"micro_batch": 4, "logit_chunk": 256, "offload": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_two_runs_of_twenty_steps(name, savings, executor):
    model = MODELS[name]().to("cuda")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    config = CONFIG.replace(**savings)
    states, rows, seconds, sampling, peak = train(executor, model, config)
    together = executor is train_batched
    tokens = sum(row["length"] * config.batch_size for metrics in rows for row in metrics)
    estimate = training_memory(model, 2 if together else 1, config.batch_size, 11, config.max_new_tokens, config,
                               together)
    print(f"\n{torch.cuda.get_device_name()}: {name}, {executor.__name__}, {savings}: {tokens / seconds:.0f} tokens/s, "
          f"peak {peak / 2**30:.2f} GiB ({estimate}), {sampling / seconds:.0%} of the time in sampling")
    for state in states:
        for part in (state.policy, state.anchor):
            assert all(tensor.device.type == "cpu" and torch.isfinite(tensor).all() for tensor in part.values())
        assert any((state.policy[n] != states[0].policy[n]).any() for n in state.policy) or state is states[0]
    assert 0.5 < estimate.total / peak < 2


def test_offloaded_state_gives_the_same_policies_within_rounding():
    torch.manual_seed(0)
    model = MODELS["gpt2"]().to("cuda")
    config = CONFIG.replace(steps=3, precision="fp32")
    torch.manual_seed(0)
    first = train(train_batched, model, config)[0]
    other = train(train_batched, model, config.replace(offload=True))[0]
    for one, two in zip(first, other):
        for name in one.policy:
            torch.testing.assert_close(one.policy[name], two.policy[name], atol=3 * config.lr, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_follows_float32_where_the_device_has_it(name):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16 on this device")
    rows = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        config = CONFIG.replace(steps=1, precision=precision)
        rows[precision] = train(train_batched, MODELS[name]().to("cuda"), config)[1]
    for wide, narrow in zip(rows["fp32"][0], rows["bf16"][0]):
        assert narrow["entropy"] == pytest.approx(wide["entropy"], rel=0.02)
