"""One RL run of Algorithm 1: REINFORCE with a leave-one-out baseline and a KL to the anchor.

    y ~ π_θ(·|x)
    r_β(y) = r(x, y) − β · log[π_θ(y|x) / π_anchor(y|x)]
    θ ← Adam(θ, (r_β − baseline) · ∇ log π_θ(y|x))
    θ_anchor ← (1 − μ) θ_anchor + μ θ

Here are the equations and the parts of a step. The loop over steps stands twice: `train_serial` (serial.py) is the
readable reference, the library's module, optimiser and clipping, one run after the other; `train_batched`
(batched.py) trains all runs as one program. Both use the same random numbers and give the same policies
(tests/test_executors.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..averaging.state_dicts import Weights
from ..config import WarpConfig
from ..policies.forward import Forward, make_forward
from ..policies.precision import compute_dtype
from ..policies.prompts import Prompts
from ..policies.randomness import prompt_indices, token_uniforms
from ..policies.sampling import Policies, Rollout
from ..rewards.calling import NotFinite, rollout_rewards
from .run import Run, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def advantages(rewards: Tensor, scored: Tensor | None = None) -> Tensor:
    """Each reward less the mean of the others in its batch, (…, B) → (…, B). Needs B ≥ 2.

    Completions that are not `scored` (…, B) are in no mean and have the advantage 0, as TRL's; so has one that is
    scored alone, which has nothing to be compared with. A batch without any reward has no gradient.
    Source: the leave-one-out baseline of Kool et al. 2019 and Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    if scored is None or bool(scored.all()):
        B = rewards.shape[-1]
        return (rewards - rewards.mean(-1, keepdim=True)) * (B / (B - 1))
    count = scored.sum(-1, keepdim=True).to(rewards)
    others = (count - 1).clamp(min=1)
    return ((rewards - scored_mean(rewards, scored).unsqueeze(-1)) * (count / others)).masked_fill(~scored, 0)


def scored_mean(values: Tensor, scored: Tensor) -> Tensor:
    """The mean over those that are scored, (…, B) → (…)."""
    if bool(scored.all()):
        return values.mean(-1)
    return values.masked_fill(~scored, 0).sum(-1) / scored.sum(-1)


def regularised_rewards(rewards: Tensor, logp: Tensor, anchor_logp: Tensor, beta: float | Tensor) -> Tensor:
    """r_β = r − β · (log π − log π_anchor), per sequence, detached. All (…, B); beta a number or (…, 1).

    In reward units, the logarithms in nats. Source: Algorithm 1, stage 1.
    """
    return rewards - beta * (logp - anchor_logp).detach().to(rewards)


def reinforce_loss(logp: Tensor, advantage: Tensor, length: int) -> Tensor:
    """−mean over the batch of advantage · log π(y|x), divided by `length`; (…, B) → (…).

    Source: Algorithm 1, stage 1.
    """
    return -(advantage.detach().to(logp) * logp).mean(-1) / length


@torch.no_grad()
def score(forward: Forward, weights: Weights, rollout: Rollout, config: WarpConfig) -> Tensor:
    """log π of each completion, (E, B), in nats, without a gradient."""
    policies = Policies(forward, weights)
    return torch.cat([policies.logprobs(part, config.temperature, config.logit_chunk).sum(-1)
                      for part in rollout.split(config.micro_batch)], -1)


def differentiate(forward: Forward, weights: Weights, rollout: Rollout, rewards: Tensor, anchor_logp: Tensor | None,
                  beta: float | Tensor, config: WarpConfig,
                  backward: Callable[[Tensor, bool], None]) -> tuple[Tensor, Tensor, Tensor]:
    """Hand the loss of a step, summed over policies, to `backward(loss, add)`, in parts of `micro_batch` completions.

    Returns log π and r_β, (E, B), and the loss, (E,), detached. The reward of each completion is weighed
    against all others, so where there are several parts, log π is first taken of all without a gradient.
    Without `anchor_logp` there is no KL. A completion without a reward (NaN, for None) has no gradient, and as r_β
    the mean of the others.
    """
    parts = rollout.split(config.micro_batch)
    B, total, start = rewards.shape[-1], 0, 0
    logp = score(forward, weights, rollout, config) if len(parts) > 1 else None
    scored = ~rewards.isnan()
    for part in parts:
        rows = slice(start, start + part.ids.shape[1])
        part_logp = Policies(forward, weights).logprobs(part, config.temperature, config.logit_chunk).sum(-1)
        if start == 0:
            logp = part_logp.detach() if logp is None else logp
            r_beta = regularised_rewards(rewards, logp, logp if anchor_logp is None else anchor_logp, beta)
            advantage = advantages(r_beta, scored)
            r_beta = torch.where(scored, r_beta, scored_mean(r_beta, scored).unsqueeze(-1))
        loss = reinforce_loss(part_logp, advantage[..., rows], config.max_new_tokens)    # (E,)
        if len(parts) > 1:
            loss = loss * (part_logp.shape[-1] / B)
        backward(loss.sum(), start > 0)
        total, start = total + loss.detach(), rows.stop
    return logp, r_beta, total


def forward_for(model: PreTrainedModel, executor: str, config: WarpConfig) -> Forward:
    """The forward that an executor trains with. Raises ValueError for settings that it cannot do with, and for a
    policy none of whose weights train."""
    check_trains(model)
    dtype = compute_dtype(config.precision, model.device)
    return make_forward(model, executor, dtype, config.checkpointing, config.logit_chunk > 0)


def check_trains(model: PreTrainedModel) -> None:
    """Raise ValueError if all weights of a model are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every weight of the policy is frozen (requires_grad=False), so nothing would train; call "
                         "requires_grad_() on those that should")


def draw(runs: Sequence[Run], step: int, prompts: Prompts) -> tuple[Prompts, Tensor]:
    """The prompts (E, B, P) and the random numbers (E, B, T) of a step, each run from its own stream."""
    config = runs[0].config
    index = np.stack([prompt_indices(run.key, step, config.batch_size, len(prompts)) for run in runs])
    uniforms = [token_uniforms(run.key, step, config.batch_size, config.max_new_tokens) for run in runs]
    return prompts.batch(index), torch.stack(uniforms).to(prompts.ids.device)


def checked_rewards(runs: Sequence[Run], step: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Rewards (E, B) in float64, every one finite, or NaN where a function returned None; runs may have rewards of
    their own. Raises RunFailed for one that is not finite."""
    try:
        return rollout_rewards([run.reward for run in runs], rollout, tokenizer)
    except NotFinite as error:
        raise RunFailed({e: f"the reward is {value} {where(runs[e], step, rollout, e, b)}; rewards must be finite"
                         for e, (b, value) in error.places.items()}) from None


def check_step(runs: Sequence[Run], step: int, rollout: Rollout, r_beta: Tensor, loss: Tensor, norms: Tensor) -> None:
    """Stop before a loss (E,) or a gradient's norm (E,) that is not finite gets into a policy. Raises RunFailed.

    The prompt that is named is that of the first r_β (E, B) that is not finite, or else of the farthest
    from the mean.
    """
    loss, norms = loss.detach().cpu(), norms.cpu()  # with offload they are on two devices
    finite = torch.isfinite(loss) & torch.isfinite(norms)
    if not finite.all():
        reasons = {}
        for e in (~finite).nonzero()[:, 0].tolist():
            run, distance = runs[e], (r_beta[e] - r_beta[e].mean()).abs()
            distance[~torch.isfinite(r_beta[e])] = torch.inf
            b = int(distance.nan_to_num(0).argmax())
            what = "gradient is not finite" if torch.isfinite(loss[e]) else f"loss is {loss[e].item()}"
            reasons[e] = (f"the {what} {where(run, step, rollout, e, b)}; lower lr (now {run.config.lr:g}) or raise "
                          f"beta (now {run.config.beta:g})")
        raise RunFailed(reasons)


def where(run: Run, step: int, rollout: Rollout, e: int, b: int) -> str:
    """Iteration, run, step and prompt, for the message of a failure."""
    prompt = rollout.prompts.texts[e * rollout.ids.shape[1] + b]
    return (f"in iteration {run.iteration}, run {run.number}, step {step + 1}, for a completion of the prompt "
            f"{prompt[:80]!r}")


def warmup(config: WarpConfig, step: int) -> float:
    """The factor of the learning rate: linear over the first `warmup_steps` steps."""
    return min(1.0, (step + 1) / max(1, config.warmup_steps))


def step_metrics(runs: Sequence[Run], step: int, rollout: Rollout, rewards: Tensor, r_beta: Tensor, logp: Tensor,
                 anchor_logp: Tensor, loss: Tensor, norms: Tensor) -> list[dict]:
    """What `metrics.jsonl` says of a step, a dict a run. KL in nats per sequence, to the anchor; rewards are those of
    the completions that were scored, None where there are none."""
    scored = ~rewards.isnan()
    spread = rewards.std(-1)
    if not scored.all():
        spread = torch.stack([row[has_one].std() if has_one.sum() > 1 else row.new_tensor(math.nan)
                              for row, has_one in zip(rewards, scored)])
    columns = {
        "reward": scored_mean(rewards, scored), "reward_std": spread, "regularised_reward": scored_mean(r_beta, scored),
        "kl_to_anchor": (logp - anchor_logp).mean(-1), "length": rollout.mask.sum(-1).double().mean(-1),
        "entropy": -rollout.logprobs.sum(-1).mean(-1), "loss": loss, "gradient_norm": norms}
    values = {name: column.detach().tolist() for name, column in columns.items()}
    return [{"step": step + 1, "lr": run.config.lr * warmup(run.config, step),
             **{name: column[e] if math.isfinite(column[e]) else None for name, column in values.items()}}
            for e, run in enumerate(runs)]
