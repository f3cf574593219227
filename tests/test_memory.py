"""The memory estimate against the peak of a training process, and what it advises."""

import json
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from short_run import short_run
from transformers import GPT2Config, GPT2LMHeadModel

from warp_lite import WarpConfig, warp
from warp_lite.memory import free_memory, settings_that_fit, training_memory

MEASURE = """
import json, resource, sys
from transformers import GPT2Config, GPT2LMHeadModel
from warp_lite.config import WarpConfig
from warp_lite.memory import training_memory
from warp_lite.policies import encode_prompts, parameters
from warp_lite.reinforce import Run, train_batched, train_serial
from warp_lite.tasks.reviews import make_tokenizer

words, width, layers, batch, new_tokens, policies = map(int, sys.argv[1].split())
settings = json.loads(sys.argv[2])
together = settings.pop("executor", "batched") == "batched"
tokenizer = make_tokenizer()
model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=96, vocab_size=words,
                                   bos_token_id=1, eos_token_id=2, pad_token_id=0))
prompts = encode_prompts(tokenizer, ["this old film was", "that new drama was", "the long film was"])
init = {name: tensor.clone() for name, tensor in parameters(model).items()}
config = WarpConfig(steps=2, batch_size=batch, max_new_tokens=new_tokens, **settings)
reward = lambda prompts, completions, completion_ids: [float(len(set(ids))) for ids in completion_ids]
runs = [Run(config, 1, m + 1, init, init, reward) for m in range(policies)]
scale = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
(train_batched if together else train_serial)(model, tokenizer, prompts, runs[:policies if together else 1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
estimate = training_memory(model, policies if together else 1, batch, prompts.ids.shape[1], new_tokens, config, together)
print(peak - before, estimate.total)
print(estimate, file=sys.stderr)
"""


@lru_cache
def measured_and_estimated(shape: str, **settings) -> tuple[int, int]:
    """Bytes that the training of policies of a shape takes in a process of its own."""
    # A shell in between: the peak of a process counts what its parent had when it forked, and pytest has much.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, shape, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(shape, settings, *(round(int(x) / 2**20) for x in done.stdout.split()), done.stderr)
    return tuple(map(int, done.stdout.split()))
