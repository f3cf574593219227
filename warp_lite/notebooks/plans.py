"""How large the notebooks' experiments are, by the size of the policy, and what they should cost.

The tiny policies' settings were chosen by measurement. Those of real models are meant to keep a notebook
under a quarter of an hour on a T4. No T4 was at hand, so minutes are computed from its data sheet and called
estimates wherever they are printed. SmolLM2, which needs no GPU, has settings of its own for a CPU, and minutes by the
time that its steps and measurements took there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel

from ..config import WarpConfig
from ..policies.shape import shape_of
from ..training.memory import training_memory

SMALL, MEDIUM = 5_000_000, 200_000_000  # parameters: below, a tiny policy; then GPT-2's size; above, Gemma's
# name of a setting: for a tiny policy, the same in fast mode, for GPT-2's size, for Gemma's
PLANS = {
    "running_example": {
        "steps": (100, 20, 60, 40), "seeds": (6, 2, 1, 1), "runs": (8, 4, 4, 3), "lr": (1e-3, 1e-3, 1e-5, 1e-5),
        "traced": (2, 1, 1, 1), "eval_every": (20, 10, 20, 20), "limit": (1024, 128, 256, 128)},
    "00_kl_and_reward": {"completions": (512, 256, 128, 64)},
    "01_ema_anchor": {
        "betas": ((0.1, 0.3, 1.0), *3 * ((0.1, 0.3),)), "mus": ((0.003, 0.1), *3 * ((0.1,),)),
        "short": (40, 20, 30, 20)},
    "02_slerp": {
        "counts": ((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (1, 2, 3)),
        "lams": ((0, 0.15, 0.3, 0.5, 0.7, 0.85, 1), *3 * ((0, 0.5, 1),)),
        "etas": ((0, 0.25, 0.5, 0.75, 1), *3 * ((0, 0.5, 1),)),
        "reach": ((0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2), *3 * ((0, 0.5, 1, 2),)), "every": (4, 12, 12, 3)},
    "03_liti": {
        "etas": ((0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2), *3 * ((0, 0.5, 1, 2),)),
        "close_etas": ((0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1), *3 * ((0, 0.25, 0.5, 0.75, 1),)),
        "inner_etas": ((0, 0.2, 0.4, 0.6, 0.8, 1), *3 * ((0, 0.5, 1),)),
        "dial_etas": ((0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), *3 * ((0, 0.5, 1),))},
    "04_warp": {
        "small_steps": (40, 20, 20, 20), "grid": (9, 5, 4, 3),
        "etas": ((0, 0.15, 0.3, 0.45, 0.6, 0.8, 1), (0, 0.25, 0.5, 0.75, 1), (0, 0.5, 1), (0, 0.5, 1))},
    "06_gpt2_and_gemma_on_a_gpu": {
        "steps": (160, 40, 150, 100), "batch": (8, 8, 16, 16), "lr": (7e-4, 7e-4, 1e-5, 1e-5), "short": (8, 4, 4, 4),
        "iterations": (2, 2, 2, 1),
        "etas": (*2 * ((0, 0.25, 0.5, 0.75, 1),), *2 * ((0, 0.2, 0.4, 0.6, 0.8, 1),)), "lora_steps": (80, 40, 60, 40),
        "lora_lr": (3e-3, 3e-3, 1e-4, 1e-4),
        "samples": (512, 256, 256, 256), "limit": (512, 128, 128, 128)},
    "07_a_real_language_model": {
        "steps": (40, 10, 10, 10), "lr": (1e-3, 1e-3, 2e-5, 2e-5), "held_out": (32, 8, 16, 16),
        "etas": ((0, 0.25, 0.5, 0.75, 1), *3 * ((0, 0.5, 1),))},
}
# What a world has of its own in place of the column of its policy's size: a CPU is to carry smollm2.
OF_WORLD = {
    "smollm2": {
        "running_example": {"steps": 24, "runs": 3, "lr": 2e-5, "eval_every": 12, "limit": 64},
        "00_kl_and_reward": {"completions": 32},
        "01_ema_anchor": {"short": 12},
        "02_slerp": {"counts": (1, 2, 3), "every": 3},
        "04_warp": {"small_steps": 10, "grid": 3, "etas": (0, 0.5, 1)}},
}
# Seconds of one core for a completion that is sampled and measured, a parameter and token of prompt and completion:
# 0.34 of SmolLM2's, with 16 new tokens after 16, beside other work. A step of a batch B took as long as 5 + 1.6 B.
CORE = 0.34 / (134_515_008 * 32)
# A T4 by its data sheet, and the shares of it that code such as this usually reaches
T4 = {"bytes": 0.5 * 320e9, "operations": 0.4 * 8.1e12, "layer": 3e-4}  # a second; the last: seconds of launches


def size_of(model: nn.Module) -> int:
    """The number of parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def plan(notebook: str, model: PreTrainedModel, fast: bool = False, world: str = "") -> SimpleNamespace:
    """The settings of a notebook's experiments for a policy of this size, and what the world of that name has of its
    own.

    In fast mode a real model takes the smaller of the two. Raises KeyError for a notebook without a plan.
    """
    size = size_of(model)
    column = 2 + (size >= MEDIUM) if size >= SMALL else int(fast)
    values = {name: row[column] for name, row in PLANS[notebook].items()} | OF_WORLD.get(world, {}).get(notebook, {})
    if fast and column > 1:
        for name in ("steps", "seeds", "limit", "completions"):
            if name in values:
                values[name] = min(values[name], PLANS[notebook][name][1])
    return SimpleNamespace(**values)


def kept_runs(out: str, model: PreTrainedModel) -> Path | None:
    """Where the runs of a real model are kept: in `out`, or for the time being if it is empty; None for a tiny one.

    An experiment goes on from there after a disconnect if `out` outlives it, and reads weights from there.
    """
    if size_of(model) < SMALL:
        return None
    return Path(out or tempfile.mkdtemp(prefix="warp-lite-")) / "runs"


def step_seconds(model: PreTrainedModel, config: WarpConfig, prompt_tokens: int = 16) -> float:
    """Seconds of one step of one run on a T4: an estimate by its bandwidth, its arithmetic and the launches of kernels.
    """
    size, layers = size_of(model), shape_of(model).layers
    batch, tokens = config.batch_size, config.max_new_tokens
    one_token = max(4 * size / T4["bytes"], 2 * size * batch / T4["operations"], layers * T4["layer"])
    passes = 8 * size * batch * (prompt_tokens + tokens) / T4["operations"]  # the anchor's, ours, and backward
    return tokens * one_token + passes + 10 * 4 * size / T4["bytes"]


def completion_seconds(model: PreTrainedModel, config: WarpConfig, prompt_tokens: int = 16) -> float:
    """Seconds of one completion that is sampled and measured, in large batches, on a T4: an estimate by its arithmetic.
    """
    return 6 * size_of(model) * (prompt_tokens + config.max_new_tokens) / T4["operations"]


def announce(model: PreTrainedModel, config: WarpConfig, runs: int = 0, completions: int = 0,
             prompt_tokens: int = 16) -> None:
    """Print what the next cell should cost for a real model: minutes on a T4, or of one core where the policy stands on
    a CPU, memory and disk. A tiny one says nothing.

    runs: that are trained; completions: that are sampled to measure.
    """
    if size_of(model) < SMALL:
        return
    if model.device.type == "cpu":
        each = CORE * size_of(model) * (prompt_tokens + config.max_new_tokens)
        seconds = (runs * config.steps * (5 + 1.6 * config.batch_size) + completions) * each
        words = [f"estimate for one core, by what SmolLM2 took: about {max(1, round(seconds / 60))} min"]
    else:
        seconds = runs * config.steps * step_seconds(model, config, prompt_tokens)
        seconds += completions * completion_seconds(model, config, prompt_tokens)
        words = [f"estimate for a T4, not measured: about {max(1, round(seconds / 60))} min"]
    if runs:
        memory = training_memory(model, 1, config.batch_size, prompt_tokens, config.max_new_tokens)
        words += [f"{memory}", f"{runs * 2 * 4 * size_of(model) / 1e9:.0f} GB of disk for the runs"]
    print("; ".join(words), flush=True)
