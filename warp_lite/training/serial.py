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

    Returns the state of each run at its last step. Raises RunFailed, naming run, step and prompt, when a reward, a
    loss or a gradient is not finite. Source: Algorithm 1, stage 1.
    """
    return [_train_one(model, tokenizer, prompts, run, on_step) for run in runs]


def _train_one(model, tokenizer, prompts: Prompts, run: Run, on_step: OnStep | None) -> RunState:
    config, start, model = run.config, run.start(), full_precision(model)
    load_weights(model, start.policy)
    forward = forward_for(model, "serial", config)
    theta = dict(model.named_parameters())
    policy = {name: parameter.unsqueeze(0) for name, parameter in theta.items()}         # (1, …)
    kept = theta  # what the optimiser updates: with `offload` a copy on the CPU
    if config.offload and model.device.type != "cpu":
        kept = {name: torch.nn.Parameter(tensor.to("cpu", copy=True)) for name, tensor in start.policy.items()}
    where = next(iter(kept.values())).device
    anchor = EMAAnchor({name: tensor.to(where) for name, tensor in start.anchor.items()}, run.mu)
    optimizer = torch.optim.Adam(kept.values(), lr=config.lr, eps=config.adam_eps,
                                 betas=(config.adam_beta1, config.adam_beta2))
    for name, parameter in kept.items():
        if start.step:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(start.step)), "exp_avg": start.exp_avg[name].to(where, copy=True),
                "exp_avg_sq": start.exp_avg_sq[name].to(where, copy=True)}

    def copies(tensors):
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in zip(theta, tensors)}

    def state(step):
        moments = [optimizer.state[parameter] for parameter in kept.values()]
        return RunState(step, copies(kept.values()), copies(anchor.average.values()),
                        copies(m["exp_avg"] for m in moments), copies(m["exp_avg_sq"] for m in moments))

    for step in range(start.step, config.steps):
        batch, uniforms = draw([run], step, prompts)
        with torch.no_grad():
            rollout = Policies(forward, policy).sample(batch, uniforms, tokenizer, config.temperature,
                                                       config.sample_batch)
        frozen = {name: tensor.to(model.device).unsqueeze(0) for name, tensor in anchor.average.items()}
        anchor_logp = score(forward, frozen, rollout, config)                            # (1, B)
        del frozen
        rewards = checked_rewards([run], step, rollout, tokenizer)                       # (1, B)
        optimizer.zero_grad()
        logp, r_beta, loss = differentiate(forward, policy, rollout, rewards, anchor_logp, run.beta, config,
                                           lambda loss, add: loss.backward())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        check_step([run], step, rollout, r_beta, loss, norm.view(1))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup(config, step)
        if kept is not theta:
            for name, parameter in theta.items():
                kept[name].grad, parameter.grad = parameter.grad.to(where), None
        optimizer.step()
        if kept is not theta:
            load_weights(model, kept)
        anchor.update({name: parameter.detach() for name, parameter in kept.items()})
        if on_step is not None:
            metrics = step_metrics([run], step, rollout, rewards, r_beta, logp, anchor_logp, loss, norm.view(1))
            on_step([run], step + 1, lambda step=step: [state(step + 1)], metrics)
    return state(config.steps)
