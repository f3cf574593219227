"""A real language model from its package: loaded, trained for two steps, merged, measured, and opened again.

It takes some 100 seconds of one core and 8.6 GB of memory.
"""

import subprocess
import sys

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from warp_lite import WarpConfig, run_warp
from warp_lite.worlds import english

pytest.importorskip("gguf", reason="needs gguf: make real-model")
pytest.importorskip("vaderSentiment", reason="needs vaderSentiment: make real-model")
FILE = english.gguf_file()
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(FILE is None, reason=f"needs the package {english.PACKAGE_NAME}: make real-model"),
              pytest.mark.skipif(psutil.virtual_memory().available < 9e9, reason="needs 9 GB of free memory")]

SMALL = {"eval_prompts": 4, "max_new_tokens": 5, "samples": 24, "pairs": 16, "judged": 16, "texts": 4, "layers": 1,
         "reward_epochs": 1}
IDS = torch.tensor([[504, 7704, 436, 260]])  # "The movie was the"
PROGRAM = """
import sys, torch
from warp_lite import load_policy
policy, tokenizer = load_policy(sys.argv[1])
assert tokenizer("The movie was")["input_ids"] == [504, 7704, 436]
with torch.no_grad():
    print(policy(torch.tensor([[504, 7704, 436, 260]])).logits[0, -1, :8].tolist())
"""


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_two_steps_of_two_runs_merge_into_a_front_and_a_folder_that_another_process_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_LITE_CACHE", str(tmp_path / "cache"))
    world = english.english_world(progress=False, **SMALL)
    assert 0 <= world.facts["pair_accuracy"] <= 1 and len(world.texts) == 4
    assert world.reward.from_ids(world.prompts.batch(torch.arange(2).numpy()), IDS.expand(2, -1),
                                 torch.ones(2, 4, dtype=torch.long)).shape == (2,)
    own = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    torch.testing.assert_close(logits(world.policy), logits(own.eval()), rtol=0, atol=0)
    del own

    config = WarpConfig(iterations=1, runs=2, steps=2, batch_size=2, lr=2e-5, beta=0.1, max_new_tokens=5, eval_every=0,
                        warmup_steps=0)
    result = run_warp(world, config=config, executor="serial")
    first, last = result.sft, result.iterations[0].merged
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    points = [point for eta in (0, 0.5, 1) for point in result.front((eta,), samples=1)]  # one in memory at a time
    assert [point["eta"] for point in points] == [0, 0.5, 1] and abs(points[0]["kl"]) < 1e-6 < points[2]["kl"]
    assert all({"reward", "gold", "perplexity", "distinct"} <= point.keys() for point in points)

    folder = tmp_path / "merged"
    result.save_policy(folder)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = logits(result.policy(1.0))[0, -1, :8]
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), expected, rtol=1e-5, atol=1e-5)
