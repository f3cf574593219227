"""The memory estimate against the peak of a training process."""

import subprocess
import sys

import pytest

from warp_lite.memory import free_memory

MEASURE = """
import resource, sys
from transformers import GPT2Config, GPT2LMHeadModel
from warp_lite.config import WarpConfig
from warp_lite.memory import training_memory
from warp_lite.policies import encode_prompts, parameters
from warp_lite.reinforce import Run, train_batched
from warp_lite.tasks.reviews import make_tokenizer

width, layers, batch, new_tokens, policies = map(int, sys.argv[1:])
tokenizer = make_tokenizer()
model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=96, vocab_size=5000,
                                   bos_token_id=1, eos_token_id=2, pad_token_id=0))
prompts = encode_prompts(tokenizer, ["this old film was", "that new drama was", "the long film was"])
init = parameters(model)
config = WarpConfig(steps=2, batch_size=batch, max_new_tokens=new_tokens)
reward = lambda prompts, completions, completion_ids: [float(len(set(ids))) for ids in completion_ids]
runs = [Run(config, 1, m + 1, init, init, reward) for m in range(policies)]
scale = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
train_batched(model, tokenizer, prompts, runs)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(peak - before, training_memory(model, policies, batch, prompts.ids.shape[1], new_tokens).total)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module there")
@pytest.mark.parametrize("shape", ["256 4 8 32 4", "128 2 64 24 4"], ids=["mostly weights", "mostly logits"])
def test_the_estimate_is_within_a_third_of_the_measured_peak(shape):
    # A shell in between: the peak of a process counts what its parent had when it forked, and pytest has much.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, *shape.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, estimate = map(int, done.stdout.split())
    assert 0.67 < estimate / measured < 1.5


def test_free_memory_is_what_is_left_of_the_machine():
    assert 2**20 < free_memory() < 2**50
