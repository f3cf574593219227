"""The readable reference of an RL run: the library's module, optimiser and clipping, one run after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..averaging.ema import EMAAnchor
from ..averaging.state_dicts import load_weights
from ..policies.precision import full_precision
from ..policies.prompts import Prompts
from ..policies.sampling import Policies
from .reinforce import (
    check_step,
    checked_rewards,
    differentiate,
    draw,
    forward_for,
    score,
    step_metrics,
    warmup,
)
from .run import OnStep, Run, RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_serial(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, runs: Sequence[Run],
                 on_step: OnStep | None = None) -> list[RunState]:
    """Train the runs one after the other with the library's module, Adam and clipping.

    Weights that are frozen, `requires_grad=False`, stay as a run's start has them, and so do the anchor's.
    Returns the state of each run at its last step. Raises RunFailed, naming run, step and prompt, when a reward, a
    loss or a gradient is not finite. Source: Algorithm 1, stage 1.
    """
    return [_train_one(model, tokenizer, prompts, run, on_step) for run in runs]


def _train_one(model, tokenizer, prompts: Prompts, run: Run, on_step: OnStep | None) -> RunState:
    """A run from where it starts or stands to its last step. `trained` are the module's weights that train, `updated`
    what the optimiser steps: the same, or with `offload` copies on the CPU."""
    config, start, model = run.config, run.start(), full_precision(model)
    load_weights(model, start.policy)
    forward = forward_for(model, "serial", config)
    theta = dict(model.named_parameters())
    policy = {name: parameter.unsqueeze(0) for name, parameter in theta.items()}         # (1, …)
    updated = trained = {name: parameter for name, parameter in theta.items() if parameter.requires_grad}
    if config.offload and model.device.type != "cpu":
        updated = {name: torch.nn.Parameter(start.policy[name].to("cpu", copy=True)) for name in trained}
    device = next(iter(updated.values())).device
    anchor = EMAAnchor({name: start.anchor[name].to(device) for name in trained}, run.mu)
    optimizer = torch.optim.Adam(updated.values(), lr=config.lr, eps=config.adam_eps,
                                 betas=(config.adam_beta1, config.adam_beta2))
    for name, parameter in updated.items():
        if start.step:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(start.step)), "exp_avg": start.exp_avg[name].to(device, copy=True),
                "exp_avg_sq": start.exp_avg_sq[name].to(device, copy=True)}

    def copies(tensors, otherwise):
        """Of what trains the present tensors, of what is frozen those that were there before, copied."""
        present = {**otherwise, **dict(zip(trained, tensors))}
        return {name: present[name].detach().to("cpu", copy=True) for name in theta}

    def state(step):
        moments = [optimizer.state[parameter] for parameter in updated.values()]
        return RunState(step, copies(updated.values(), start.policy), copies(anchor.average.values(), start.anchor),
                        copies((m["exp_avg"] for m in moments), start.exp_avg),
                        copies((m["exp_avg_sq"] for m in moments), start.exp_avg_sq))

    for step in range(start.step, config.steps):
        batch, uniforms = draw([run], step, prompts)
        with torch.no_grad():
            rollout = Policies(forward, policy).sample(batch, uniforms, tokenizer, config.temperature,
                                                       config.sample_batch)
        anchor_weights = {name: tensor.to(model.device).unsqueeze(0)
                          for name, tensor in {**start.anchor, **anchor.average}.items()}
        anchor_logp = score(forward, anchor_weights, rollout, config)                    # (1, B)
        del anchor_weights
        rewards = checked_rewards([run], step, rollout, tokenizer)                       # (1, B)
        optimizer.zero_grad()
        logp, r_beta, loss = differentiate(forward, policy, rollout, rewards, anchor_logp, run.beta, config,
                                           lambda loss, add: loss.backward())
        for parameter in trained.values():  # what no token passed through (an expert, an image encoder) has 0
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        check_step([run], step, rollout, r_beta, loss, norm.view(1))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup(config, step)
        if updated is not trained:
            for name, parameter in trained.items():
                updated[name].grad, parameter.grad = parameter.grad.to(device), None
        optimizer.step()
        if updated is not trained:
            load_weights(model, {**theta, **updated})
        anchor.update({name: parameter.detach() for name, parameter in updated.items()})
        if on_step is not None:
            metrics = step_metrics([run], step, rollout, rewards, r_beta, logp, anchor_logp, loss, norm.view(1))
            on_step([run], step + 1, lambda step=step: [state(step + 1)], metrics)
    return state(config.steps)
