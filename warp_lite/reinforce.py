"""One RL run of Algorithm 1: REINFORCE with a leave-one-out baseline and a KL to the anchor.

    y ~ π_θ(·|x)
    r_β(y) = r(x, y) − β · log[π_θ(y|x) / π_anchor(y|x)]
    θ ← Adam(θ, (r_β − baseline) · ∇ log π_θ(y|x))
    θ_anchor ← (1 − μ) θ_anchor + μ θ

`train_serial` is the readable reference: the library's module, optimiser and clipping, one
run after the other. `train_batched` trains all runs as one program. Both use the same
random numbers and give the same policies (tests/test_executors.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .config import WarpConfig
from .ema import EMAAnchor
from .ensemble import Ensemble
from .forward import make_forward
from .policies import Prompts, Rollout, Weights, load_weights, logprobs, sample
from .precision import compute_dtype, full_precision
from .randomness import prompt_indices, token_uniforms
from .rewards import rollout_rewards
from .weights import widen

# Settings that runs of one batch must share.
SHARED = ("steps", "batch_size", "max_new_tokens", "temperature", "warmup_steps", "adam_beta1", "adam_beta2",
          "adam_eps", "precision", "micro_batch", "sample_batch", "logit_chunk", "checkpointing", "offload")


@dataclass
class RunState:
    """A run after `step` steps: what is needed to go on, each a state dict of one policy, on the CPU.

    `trained` is what the optimiser moves where that is not the policy itself (LoRA's factors);
    the moments are those of what is trained.
    """

    step: int
    policy: Weights
    anchor: Weights
    exp_avg: Weights
    exp_avg_sq: Weights
    trained: Weights = field(default_factory=dict)


@dataclass
class Run:
    """One RL run: its settings, its key (seed, iteration, run), where it starts and what it is anchored to.

    `state` is where an interrupted run goes on from. The anchor of `anchor="ema"` starts at `init`.
    """

    config: WarpConfig
    iteration: int
    number: int
    init: Weights
    sft: Weights
    reward: Callable
    state: RunState | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """What its random numbers are seeded by."""
        return (self.config.seed, self.iteration, self.number)

    def start(self) -> RunState:
        """The state to begin from, in float32 at least: in fewer bits, small updates would be lost."""
        if self.state is not None:
            return self.state
        init, sft = ({name: widen(tensor) for name, tensor in state.items()} for state in (self.init, self.sft))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in init.items()}
        return RunState(0, init, sft if self.config.anchor == "sft" else init, zeros, zeros)

    @property
    def beta(self) -> float:
        """The weight of the KL: 0 without an anchor."""
        return 0.0 if self.config.anchor == "none" else self.config.beta

    @property
    def mu(self) -> float:
        """The rate of the anchor: 0 for one that stays."""
        return 0.0 if self.config.anchor == "sft" else self.config.mu


class RunFailed(ValueError):
    """The reward, loss or gradient of runs that train together is not finite.

    `reasons` says by a run's place among them what it is, at which step and for which prompt. The policies
    of all are as the step before left them.
    """

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return next(iter(self.reasons.values()))


# on_step(runs, step, states, metrics): called after each step with the runs that took it, the
# number of steps taken, a function that gives their present RunStates, and their metrics.
OnStep = Callable[[Sequence[Run], int, Callable[[], list[RunState]], list[dict]], None]


def advantages(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the others in its batch, (…, B) → (…, B). Needs B ≥ 2."""
    B = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (B / (B - 1))


def regularised_rewards(rewards: Tensor, logp: Tensor, anchor_logp: Tensor, beta) -> Tensor:
    """r_β = r − β · (log π − log π_anchor), per sequence, detached. All (…, B); beta a number or (…, 1)."""
    return rewards - beta * (logp - anchor_logp).detach().to(rewards)


def reinforce_loss(logp: Tensor, advantage: Tensor, length: int) -> Tensor:
    """−mean over the batch of advantage · log π(y|x), divided by `length`; (…, B) → (…)."""
    return -(advantage.detach().to(logp) * logp).mean(-1) / length


def train_serial(model, tokenizer, prompts: Prompts, runs: Sequence[Run],
                 on_step: OnStep | None = None) -> list[RunState]:
    """Train the runs one after the other with the library's module, Adam and clipping.

    Raises RunFailed, naming run, step and prompt, when a reward, a loss or a gradient is not finite.
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
            rollout = sample(forward, forward.prepare(policy), batch, uniforms, tokenizer, config.temperature,
                             config.sample_batch)
        frozen = {name: tensor.to(model.device).unsqueeze(0) for name, tensor in anchor.average.items()}
        anchor_logp = score(forward, frozen, rollout, config)                            # (1, B)
        del frozen
        rewards = checked_rewards([run], step, rollout, tokenizer)                       # (1, B)
        optimizer.zero_grad()
        logp, r_beta, loss = differentiate(forward, policy, rollout, rewards, anchor_logp, run.beta, config,
                                           lambda loss, add: loss.backward())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        check_finite([run], step, rollout, r_beta, loss, norm.view(1))
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


class FlatAnchor:
    """θ_ema of E runs: rows of one tensor, as the ensemble's policies are."""

    def __init__(self, ensemble: Ensemble, states: Sequence[Weights], rates: Sequence[float]):
        self.ensemble = ensemble
        self.flat = Ensemble.flatten(states, ensemble.flat.device)                       # (E, P)
        self.mu = torch.tensor(rates, dtype=self.flat.dtype).unsqueeze(1).to(self.flat.device)   # (E, 1)

    @property
    def weights(self) -> Weights:
        """The weights (E, …) to score with."""
        return self.ensemble.views(self.flat.to(self.ensemble.live.device))

    def update(self) -> None:
        """θ_ema ← (1 − μ) θ_ema + μ θ."""
        self.flat.lerp_(self.ensemble.flat, self.mu)

    def state(self, e: int) -> Weights:
        """The anchor of run e, copied."""
        return self.ensemble.state(e, self.flat)


def train_batched(model, tokenizer, prompts: Prompts, runs: Sequence[Run], on_step: OnStep | None = None,
                  anchor_of: Callable = FlatAnchor) -> list[RunState]:
    """Train all runs as one program. They share the settings named in `SHARED`; lr, β, μ, anchor,
    clipping, seed, reward and init may differ. Errors as `train_serial`.
    `anchor_of` makes the runs' moving average where it is not one of what is trained (scale/lora.py).
    """
    config, model = runs[0].config, full_precision(model)
    for name in SHARED:
        values = {getattr(run.config, name) for run in runs}
        if len(values) > 1:
            raise ValueError(f"runs of one batch must share {name}, not {sorted(values)}")
    starts = [run.start() for run in runs]
    if len({start.step for start in starts}) > 1:
        raise ValueError(f"runs of one batch must start at one step, not {[start.step for start in starts]}")
    forward = forward_for(model, "batched", config)
    ensemble = Ensemble(
        [start.policy for start in starts], [run.config.lr for run in runs],
        (config.adam_beta1, config.adam_beta2), config.adam_eps, [run.config.max_grad_norm for run in runs],
        model.device, config.offload and model.device.type != "cpu")
    if starts[0].step:
        ensemble.restore(([s.exp_avg for s in starts], [s.exp_avg_sq for s in starts]), starts[0].step)
    anchor = anchor_of(ensemble, [start.anchor for start in starts], [run.mu for run in runs])
    beta = torch.tensor([run.beta for run in runs], dtype=torch.float64).unsqueeze(1).to(model.device)   # (E, 1)
    anchored = any(run.beta > 0 for run in runs)
    first_step = starts[0].step
    del starts  # the moments of a fresh start are zeros that need not stay

    def states(step):
        first, second = ensemble.moments()
        return [RunState(step, ensemble.state(e, ensemble.flat), anchor.state(e), ensemble.state(e, first),
                         ensemble.state(e, second)) for e in range(len(runs))]

    for step in range(first_step, config.steps):
        batch, uniforms = draw(runs, step, prompts)
        with torch.no_grad():
            rollout = sample(forward, forward.prepare(ensemble.weights), batch, uniforms, tokenizer, config.temperature,
                             config.sample_batch)
        anchor_logp = None
        if anchored:
            anchor_logp = score(forward, anchor.weights, rollout, config)   # (E, B)
        rewards = checked_rewards(runs, step, rollout, tokenizer)                        # (E, B)
        logp, r_beta, loss = differentiate(forward, ensemble.weights, rollout, rewards, anchor_logp, beta, config,
                                           ensemble.backward)
        norms = ensemble.step(warmup(config, step), partial(check_finite, runs, step, rollout, r_beta, loss))
        anchor.update()
        if on_step is not None:
            anchor_logp = logp if anchor_logp is None else anchor_logp
            metrics = step_metrics(runs, step, rollout, rewards, r_beta, logp, anchor_logp, loss, norms)
            on_step(runs, step + 1, lambda step=step: states(step + 1), metrics)
    return states(config.steps)


@torch.no_grad()
def score(forward, weights, rollout: Rollout, config: WarpConfig) -> Tensor:
    """log π of each completion, (E, B), without a gradient."""
    prepared = forward.prepare(weights)
    return torch.cat([logprobs(forward, prepared, part, config.temperature, config.logit_chunk).sum(-1)
                      for part in rollout.split(config.micro_batch)], -1)


def differentiate(forward, weights, rollout: Rollout, rewards: Tensor, anchor_logp: Tensor | None, beta,
                  config: WarpConfig, backward: Callable[[Tensor, bool], None]) -> tuple[Tensor, Tensor, Tensor]:
    """Hand the loss of a step, summed over policies, to `backward(loss, add)`, in parts of `micro_batch` completions.

    Returns log π and r_β, (E, B), and the loss, (E,), detached. The reward of each completion is weighed
    against all others, so where there are several parts, log π is first taken of all without a gradient.
    Without `anchor_logp` there is no KL.
    """
    parts = rollout.split(config.micro_batch)
    B, total, start = rewards.shape[-1], 0, 0
    logp = score(forward, weights, rollout, config) if len(parts) > 1 else None
    for part in parts:
        rows = slice(start, start + part.ids.shape[1])
        some = logprobs(forward, forward.prepare(weights), part, config.temperature, config.logit_chunk).sum(-1)
        if start == 0:
            logp = some.detach() if logp is None else logp
            r_beta = regularised_rewards(rewards, logp, logp if anchor_logp is None else anchor_logp, beta)
            advantage = advantages(r_beta)
        loss = reinforce_loss(some, advantage[..., rows], config.max_new_tokens)         # (E,)
        if len(parts) > 1:
            loss = loss * (some.shape[-1] / B)
        backward(loss.sum(), start > 0)
        total, start = total + loss.detach(), rows.stop
    return logp, r_beta, total


def forward_for(model, executor: str, config: WarpConfig):
    """The forward that an executor trains with. Raises ValueError for settings that it cannot do with."""
    dtype = compute_dtype(config.precision, model.device)
    return make_forward(model, executor, dtype, config.checkpointing, config.logit_chunk > 0)


def draw(runs: Sequence[Run], step: int, prompts: Prompts) -> tuple[Prompts, Tensor]:
    """The prompts (E, B, P) and the random numbers (E, B, T) of a step, each run from its own stream."""
    config = runs[0].config
    index = np.stack([prompt_indices(run.key, step, config.batch_size, len(prompts)) for run in runs])
    uniforms = [token_uniforms(run.key, step, config.batch_size, config.max_new_tokens) for run in runs]
    return prompts.batch(index), torch.stack(uniforms).to(prompts.ids.device)


def checked_rewards(runs: Sequence[Run], step: int, rollout: Rollout, tokenizer) -> Tensor:
    """Rewards (E, B) in float64, every one finite; runs may have rewards of their own."""
    rewards = rollout_rewards([run.reward for run in runs], rollout, tokenizer)
    finite = torch.isfinite(rewards)
    if not finite.all():
        bad = {e: int((~row).nonzero()[0]) for e, row in enumerate(finite) if not row.all()}
        raise RunFailed({e: f"the reward is {rewards[e, b].item()} {where(runs[e], step, rollout, e, b)}; rewards "
                            "must be finite" for e, b in bad.items()})
    return rewards


def check_finite(runs: Sequence[Run], step: int, rollout: Rollout, r_beta: Tensor, loss: Tensor, norms: Tensor) -> None:
    """Stop before a loss (E,) or a gradient's norm (E,) that is not finite gets into a policy. Raises RunFailed.

    The prompt that is named is that of the first r_β (E, B) that is not finite, or else of the farthest
    from the mean.
    """
    loss, norms = loss.detach().cpu(), norms.cpu()  # with offload they are on two devices
    finite = torch.isfinite(loss) & torch.isfinite(norms)
    if not finite.all():
        reasons = {}
        for e in (~finite).nonzero()[:, 0].tolist():
            run, away = runs[e], (r_beta[e] - r_beta[e].mean()).abs()
            away[~torch.isfinite(r_beta[e])] = torch.inf
            b = int(away.nan_to_num(0).argmax())
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


def step_metrics(runs, step, rollout, rewards, r_beta, logp, anchor_logp, loss, norms) -> list[dict]:
    """What `metrics.jsonl` says of a step, a dict a run. KL in nats per sequence, to the anchor."""
    columns = {
        "reward": rewards.mean(-1), "reward_std": rewards.std(-1), "regularised_reward": r_beta.mean(-1),
        "kl_to_anchor": (logp - anchor_logp).mean(-1), "length": rollout.mask.sum(-1).double().mean(-1),
        "entropy": -rollout.logprobs.sum(-1).mean(-1), "loss": loss, "gradient_norm": norms}
    values = {name: column.detach().tolist() for name, column in columns.items()}
    return [{"step": step + 1, "lr": run.config.lr * warmup(run.config, step),
             **{name: column[e] if math.isfinite(column[e]) else None for name, column in values.items()}}
            for e, run in enumerate(runs)]
