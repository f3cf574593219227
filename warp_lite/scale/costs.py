"""What a scheme of iterations costs in memory, disk, traffic and steps, before anything is run.

    python -m warp_lite.costs                      tables for 124M to 70B parameters, M = 2 … 8, I = 1 … 5
    python -m warp_lite.costs --policy FOLDER      for the architecture in a folder
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ..config import WarpConfig
from ..training.memory import training_memory

# Architectures whose shapes stand for a size: GPT-2, Gemma 2B and 7B, Llama 3 70B.
PAPER_POLICIES: dict[str, Callable] = {
    "124M": GPT2Config,
    "2B": lambda: GemmaConfig(hidden_size=2048, num_hidden_layers=18, intermediate_size=16384, num_attention_heads=8,
                              num_key_value_heads=1),
    "7B": GemmaConfig,
    "70B": lambda: LlamaConfig(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672,
                               num_attention_heads=64, num_key_value_heads=8, vocab_size=128256),
}
PAPER_CONFIG = WarpConfig(steps=9000, batch_size=128, max_new_tokens=128)  # T and batch are the paper's
RANK = 16
RUNS, ITERATIONS = range(2, 9), range(1, 6)


@dataclass(frozen=True)
class Costs:
    """What a scheme costs. Bytes, steps and samples are whole numbers; a sample is one completion.

    parameters, trained: weights of a policy, and those that the optimiser moves (all, or the adapters).
    policy, adapter, state, files: bytes of a whole policy; of what a run trains; of the state that a run saves
    (policy, anchor, Adam's two moments, and the factors of adapters); of a finished run (policy, anchor, adapter).
    run_memory: bytes that one run takes in its process while it trains. Whole policies: θ, its gradient, Adam's
    moments, the anchor, θ_sft, θ_init and the copies that are saved. Adapters: gradient, moments and their copies
    of the factors alone, but the anchor is of whole matrices, and whole policies are handed on. Then activations
    and logits of `at_once` sequences (`memory.training_memory`).
    driver_memory: bytes that `run_warp` holds at the end: θ_sft, the model, and of every iteration the policies,
    their anchors, the merge and the next init. `merge_checkpoints` merges on disk and needs next to none.
    disk, disk_peak: bytes of the weights in a finished run folder, and the most while it is written, when every run
    of the last iteration has two states, the new and the old.
    traffic: bytes that workers and driver read and write on shared storage (executor "ray"; adapters as if it took
    them), saves of states left out; saved: those. all_reduce: what M workers that shared every gradient would
    send, for comparison.
    sequential_steps: I·T, what one waits for with a worker a run. total_steps: I·M·T. samples: I·M·T·B.
    """

    parameters: int
    trained: int
    policy: int
    adapter: int
    state: int
    files: int
    run_memory: int
    driver_memory: int
    disk: int
    disk_peak: int
    traffic: int
    saved: int
    all_reduce: int
    sequential_steps: int
    total_steps: int
    samples: int


def costs(model: PreTrainedModel, config: WarpConfig, *, lora_rank: int | None = None, prompt_tokens: int = 32,
          at_once: int | None = None, weight_bytes: int | None = None) -> Costs:
    """What `run_warp` with this config costs for a causal LM, whose weights may lie on the meta device (`on_paper`).

    lora_rank: train low-rank adapters of that rank on every linear layer but the head, merged into whole
    policies. prompt_tokens: of the longest prompt. at_once: sequences in memory at once (default: the batch).
    weight_bytes: of a number, 4 in float32 (default: as the model has it). Raises ValueError for a rank below 1.
    """
    N, M, T = config.iterations, config.runs, config.steps
    parameters = sum(p.numel() for p in model.parameters())
    size = weight_bytes or next(model.parameters()).element_size()
    policy, wider = parameters * size, max(4 - size, 0)  # a moving average is kept in float32 at least
    if lora_rank is None:
        trained, factors = parameters, None
        state, files, weights = 4 * policy, 2 * policy, 11 * policy + wider * parameters
    else:
        trained, changed = factors = adapter_numbers(model, lora_rank)
        state, files = 2 * policy + 3 * trained * size, 2 * policy + trained * size
        weights = 4 * policy + (2 * size + wider) * changed + 10 * trained * size
    one_iteration, adapter = M * files + 2 * policy, trained * size
    batch = training_memory(model, 1, at_once or config.batch_size, prompt_tokens, config.max_new_tokens,
                            adapter=factors)
    activations = batch.activations * size // next(model.parameters()).element_size() + batch.logits
    disk = policy + N * one_iteration
    down = N * M * 2 * policy - M * policy  # θ_sft and θ_init by every run; in the first iteration they are one
    return Costs(
        parameters=parameters, trained=trained, policy=policy, adapter=adapter, state=state, files=files,
        run_memory=weights + activations, driver_memory=2 * policy + N * (2 * M + 2) * policy,
        disk=disk, disk_peak=max(disk, policy + (N - 1) * one_iteration + 2 * M * state),
        traffic=policy + down + N * (2 * M * files + 2 * policy),
        saved=N * M * state * math.ceil(T / (config.save_every or T)),
        all_reduce=2 * (M - 1) * adapter * N * T,
        sequential_steps=N * T, total_steps=N * M * T, samples=N * M * T * config.batch_size)


def adapter_numbers(model: PreTrainedModel, rank: int) -> tuple[int, int]:
    """How many numbers an adapter of this rank on every linear layer but the head has, rank · (inputs + outputs) for
    each, and the matrices that it changes.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be 1 or more, not {rank}")
    head = model.get_output_embeddings()
    matrices = [module.weight for module in model.modules()
                if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    return sum(rank * sum(matrix.shape) for matrix in matrices), sum(matrix.numel() for matrix in matrices)


def on_paper(architecture: str | PreTrainedConfig) -> PreTrainedModel:
    """A causal LM without memory for its weights, by a size of `PAPER_POLICIES` or a config of the library's.

    Raises KeyError for a size that is not there.
    """
    if isinstance(architecture, str):
        architecture = PAPER_POLICIES[architecture]()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)


def tables(policies: dict[str, PreTrainedModel], config: WarpConfig, lora_rank: int = RANK,
           **options: int | None) -> str:
    """Markdown: what a run takes, what a scheme of M runs and I iterations leaves and moves, and its steps.

    `policies` are models by the name that the tables give them; `options` are those of `costs`.
    """
    variants = [(f"{name}{f', LoRA of rank {rank}' if rank else ''}", model, rank)
                for name, model in policies.items() for rank in (None, lora_rank)]
    parts = ["## A run", markdown_table(
        ["policy", "parameters", "trained", "memory of a run", "its saved state", "its files"],
        [[name, f"{c.parameters:,}", f"{c.trained:,}", amount(c.run_memory), amount(c.state), amount(c.files)]
         for name, model, rank in variants for c in [costs(model, config, lora_rank=rank, **options)]])]
    for title, of in (
            ("Disk of a finished run folder, and at most on the way", lambda c: (c.disk, c.disk_peak)),
            ("Traffic on shared storage, and of sharing every gradient instead", lambda c: (c.traffic, c.all_reduce)),
            ("Memory of the process that merges", lambda c: (c.driver_memory,))):
        parts += [f"## {title}", markdown_table(
            ["policy", "M", *(f"I = {i}" for i in ITERATIONS)],
            [[name, str(m), *(" / ".join(map(amount, of(costs(
                model, config.replace(runs=m, iterations=i), lora_rank=rank, **options)))) for i in ITERATIONS)]
             for name, model, rank in variants for m in RUNS])]
    model = next(iter(policies.values()))
    parts += ["## Steps one after the other, steps in all, samples", markdown_table(
        ["M", *(f"I = {i}" for i in ITERATIONS)],
        [[str(m), *(f"{c.sequential_steps:,} / {c.total_steps:,} / {c.samples:,}" for i in ITERATIONS
                    for c in [costs(model, config.replace(runs=m, iterations=i), **options)])] for m in RUNS])]
    return "\n\n".join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of a head and rows of cells."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def amount(count: int) -> str:
    """Bytes as people say them, in powers of 1000: 498 MB, 1.4 TB."""
    power = 0 if count < 1 else min(5, int(math.log10(count)) // 3)
    number = count / 1000**power
    return f"{number:.{0 if number >= 10 or power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables for the command's arguments, or the process's. Raises SystemExit of one line for what cannot be
    used."""
    parser = argparse.ArgumentParser(prog="python -m warp_lite.costs", description="What WARP costs, on paper.")
    parser.add_argument("--policy", metavar="NAME_OR_DIR", help="an architecture of your own (default: four sizes)")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="change a setting")
    parser.add_argument("--lora-rank", type=int, default=RANK, metavar="R")
    parser.add_argument("--weight-bytes", type=int, default=4, metavar="N", help="of a number: 4 in float32")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="sequences in memory at once")
    given = parser.parse_args(argv)
    try:
        config = PAPER_CONFIG.with_text(given.set)
        names = [given.policy] if given.policy else PAPER_POLICIES
        policies = {name: on_paper(AutoConfig.from_pretrained(name, trust_remote_code=False) if given.policy else name)
                    for name in names}
        text = tables(policies, config, given.lora_rank, prompt_tokens=given.prompt_tokens, at_once=given.at_once,
                      weight_bytes=given.weight_bytes)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"warp-lite: {str(error).splitlines()[0]}")
    print(f"T = {config.steps} steps of {config.batch_size} completions a run; {given.weight_bytes} bytes a number; "
          f"{given.at_once} sequences of {given.prompt_tokens} + {config.max_new_tokens} tokens in memory at once.\n"
          "M runs an iteration, I iterations. Bytes in powers of 1000; saves of states are not in the traffic.\n")
    print(text)


if __name__ == "__main__":
    main()
