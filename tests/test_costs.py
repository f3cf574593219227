"""Costs on paper against what is measured: files on disk, optimiser states, memory of a process, steps taken."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from short_run import CONFIG, short_run, stop_after
from transformers import GPT2Config, GPT2LMHeadModel

from warp_lite.policies.loading import save_policy
from warp_lite.scale.costs import ITERATIONS, PAPER_POLICIES, RUNS, amount, costs, main, on_paper, tables
from warp_lite.scale.lora import LoraSettings
from warp_lite.storage.files import read_lines

TINY = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=40, vocab_size=18, bos_token_id=1, eos_token_id=2,
                  pad_token_id=0)


@pytest.fixture(scope="module")
def policy(policy_of):
    return policy_of("gpt2", dtype=torch.float32, n_embd=64)


def weight_bytes(folder):
    """Bytes of all safetensors files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_a_run_folder_has_the_bytes_and_steps_that_were_foretold(policy, tokenizer, tmp_path):
    short_run(policy, tokenizer, out=tmp_path / "run", executor="serial")
    foretold = costs(on_paper(TINY), CONFIG)
    assert weight_bytes(tmp_path / "run") == pytest.approx(foretold.disk, rel=0.02)  # each file has a header
    logs = [read_lines(path) for path in (tmp_path / "run").rglob("metrics.jsonl")]
    assert sum(map(len, logs)) == foretold.total_steps == 2 * foretold.sequential_steps
    assert foretold.samples == foretold.total_steps * CONFIG.batch_size


def test_the_state_of_a_run_has_the_bytes_that_were_foretold(policy, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "run", stop=stop_after(2))
    states = list((tmp_path / "run").rglob("state-*.safetensors"))
    foretold = costs(policy, CONFIG).state
    assert len(states) == CONFIG.runs and [p.stat().st_size for p in states] == pytest.approx([foretold] * 2, rel=0.03)


def test_a_run_of_adapters_has_the_bytes_that_were_foretold(policy, tokenizer, tmp_path):
    foretold = costs(policy, CONFIG, lora_rank=2)
    with pytest.raises(KeyboardInterrupt):
        short_run(policy, tokenizer, out=tmp_path / "run", stop=stop_after(2), lora=LoraSettings(rank=2))
    states = list((tmp_path / "run").rglob("state-*.safetensors"))
    assert [path.stat().st_size for path in states] == pytest.approx([foretold.state] * CONFIG.runs, rel=0.03)
    short_run(policy, tokenizer, out=tmp_path / "run", resume=True, lora=LoraSettings(rank=2))
    assert weight_bytes(tmp_path / "run") == pytest.approx(foretold.disk, rel=0.02)
    assert weight_bytes(tmp_path / "run/iteration-1/run-1") == pytest.approx(foretold.files, rel=0.02)


@pytest.mark.slow
def test_a_gpt2_of_124m_has_the_files_and_the_optimiser_state_that_were_foretold(tokenizer, tmp_path):
    model = GPT2LMHeadModel(GPT2Config())
    foretold = costs(on_paper("124M"), CONFIG)
    save_policy(model, tokenizer, tmp_path)
    assert weight_bytes(tmp_path) == pytest.approx(foretold.policy, rel=1e-3)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == foretold.parameters
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * foretold.policy and foretold.state == 2 * foretold.policy + moments


MEASURE = """
import resource, sys
from transformers import GPT2Config, GPT2LMHeadModel
from warp_lite.config import WarpConfig
from warp_lite.scale.costs import costs
from warp_lite.policies.prompts import encode_prompts
from warp_lite.averaging.state_dicts import parameters
from warp_lite.training.run import Run
from warp_lite.training.serial import train_serial
from warp_lite.averaging.state_dicts import copy_weights
from warp_lite.scale.lora import AdapterTrainer, LoraSettings
from warp_lite.task import Task
from warp_lite.worlds.grammar import make_tokenizer

scale, rank = 1 if sys.platform == "darwin" else 1024, int(sys.argv[1]) or None
def adapters(model, rank, prompts, sft):
    trainer = AdapterTrainer(LoraSettings(rank=rank))
    trainer.start(Task(model, tokenizer, None, prompts, prompts, sft=sft), WarpConfig(), None)
    return trainer


tokenizer = make_tokenizer()
tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))
adapters(tiny, 1, encode_prompts(tokenizer, ["this"]), {})  # imports PEFT
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
model = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=6, n_head=4, n_positions=96, vocab_size=5000,
                                   bos_token_id=1, eos_token_id=2, pad_token_id=0))
prompts = encode_prompts(tokenizer, ["this old film was", "that new drama was", "the long film was"])
sft, init = copy_weights(parameters(model)), copy_weights(parameters(model))
config = WarpConfig(steps=1, batch_size=2, max_new_tokens=4)
reward = lambda prompts, completions, completion_ids: [float(len(set(ids))) for ids in completion_ids]
runs = [Run(config, 2, 1, init, sft, reward)]
if rank:
    adapters(model, rank, prompts, sft).train(runs)
else:
    train_serial(model, tokenizer, prompts, runs)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(peak - before, costs(model, config, prompt_tokens=prompts.ids.shape[1], lora_rank=rank).run_memory)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module there")
@pytest.mark.parametrize("rank", [0, 8], ids=["whole", "adapters"])
def test_a_run_takes_the_memory_that_was_foretold(rank):
    # A shell in between: the peak of a process counts what its parent had when it forked, and pytest has much.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, estimate = map(int, done.stdout.split())
    assert 0.67 < estimate / measured < 1.5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_adapters_have_the_parameters_that_peft_gives_them(policy_of, architecture):
    model = policy_of(architecture)
    foretold = costs(model, CONFIG, lora_rank=3)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2"))
    assert foretold.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert foretold.adapter == 8 * foretold.trained and foretold.parameters > foretold.trained


def test_the_sizes_on_paper_are_the_published_ones_and_take_no_memory():
    published = {"124M": 124_439_808, "2B": 2_506_172_416, "7B": 8_537_680_896, "70B": 70_553_706_496}
    for name in PAPER_POLICIES:
        model = on_paper(name)
        assert costs(model, CONFIG).parameters == published[name]
        assert all(parameter.is_meta for parameter in model.parameters())


def test_merging_moves_less_than_sharing_gradients_by_the_steps_between_merges(policy):
    brief, long = (costs(policy, CONFIG.replace(steps=steps)) for steps in (1, 1000))
    assert brief.traffic == long.traffic and long.all_reduce == 1000 * brief.all_reduce > 100 * long.traffic
    adapters = costs(policy, CONFIG, lora_rank=1)
    assert adapters.state < long.state and adapters.run_memory < long.run_memory and adapters.driver_memory > 0
    half = costs(policy, CONFIG, weight_bytes=2)
    assert 2 * half.disk == long.disk and half.run_memory > long.run_memory / 2  # its anchor stays in float32


def test_a_rank_that_is_none_is_refused(policy):
    with pytest.raises(ValueError, match="rank of an adapter must be 1 or more, not 0"):
        costs(policy, CONFIG, lora_rank=0)


def test_the_tables_have_every_scheme_and_bytes_are_readable(policy):
    text = tables({"mine": policy}, CONFIG, lora_rank=2)
    for name in ("mine", "mine, LoRA of rank 2"):
        assert text.count(f"| {name} | ") == 1 + 3 * len(RUNS)
    assert text.count("| policy | M | ") == 3 and text.count(f"I = {ITERATIONS[-1]} |") == 4
    counts = (0, 999, 1000, 12_345_678, 1_400_000_000_000, 3 * 10**15, 10**19)
    assert [amount(n) for n in counts] == ["0 B", "999 B", "1.0 kB", "12 MB", "1.4 TB", "3.0 PB", "10000 PB"]


def test_the_command_prints_tables_for_a_folder(policy, tokenizer, tmp_path, capsys):
    save_policy(policy, tokenizer, tmp_path)
    main(["--policy", str(tmp_path), "--set", "steps=7"])
    out = capsys.readouterr().out
    assert out.startswith("T = 7 steps") and f"| {tmp_path} | {costs(policy, CONFIG).parameters:,} |" in out
    with pytest.raises(SystemExit, match="^warp-lite: rank|^warp-lite: the rank"):
        main(["--policy", str(tmp_path), "--lora-rank", "0"])
