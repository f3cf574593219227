"""The limit of every method: the best reward at each KL, estimated from samples of the reference alone.

For any β the best policy is π*(y|x) ∝ π_ref(y|x) · exp(r(x, y) / β). Its reward and KL follow
from samples of π_ref by importance weighting, and no policy lies above that curve. Best-of-n
stands beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..averaging.state_dicts import parameters
from ..config import WarpConfig, check_count, check_sampling
from ..policies.randomness import EVALUATION, generator
from ..policies.sampling import Policies
from ..rewards.bradley_terry import BradleyTerry
from ..rewards.calling import RewardFunc, rollout_rewards
from ..rewards.classifiers import ClassifierReward
from ..storage.files import CannotWrite
from ..storage.provenance import cache_folder, json_hash, package_versions, source_hash
from ..storage.tensors import load_tensors, save_tensors, weights_hash
from ..task import Task, check_rewards, check_task_alone, prompts_for
from .front import MIN_ESS
from .metrics import rows_at_once

BETAS = tuple(np.geomspace(20, 0.1, 28).round(4).tolist())  # in standard deviations of the reward
LIMIT_PROMPTS = 64
LIMIT_SAMPLES = 1024  # completions a prompt
# Of a policy with so many parameters or more, so many samples: the limit must not cost more than the runs.
LARGE, LIMIT_SAMPLES_LARGE = 5_000_000, 128


@torch.no_grad()
def reference_rewards(task: Task, samples: int, *, seed: int = 0,
                      progress: tqdm | None = None) -> tuple[Tensor, Tensor | None]:
    """Rewards, and gold rewards where the task has any, (prompts, samples), float64, of completions of θ_sft.

    `samples` completions of each held-out prompt of the task, of its length and at its temperature. A completion whose
    reward is None has NaN. Raises ValueError for less than one sample.
    """
    check_count("samples", samples)
    prompts, judges = task.eval_prompts, [task.judge]
    if task.gold is not None:
        judges.append(task.gold)
    policies = Policies.of(task.policy, [task.sft])
    rows = np.repeat(np.arange(len(prompts)), samples)
    values: list[list[Tensor]] = [[] for _ in judges]
    at_once = rows_at_once(1, policies.vocabulary)
    for i, start in enumerate(range(0, len(rows), at_once)):
        batch = rows[start:start + at_once]
        uniforms = generator(seed, i, 1, EVALUATION).random((1, len(batch), task.max_new_tokens))
        uniforms = torch.from_numpy(uniforms).to(prompts.ids.device)
        rollout = policies.sample(prompts.batch(batch[None]), uniforms, task.tokenizer, task.temperature)
        for judge, of_judge in zip(judges, values):
            of_judge.append(rollout_rewards([judge], rollout, task.tokenizer)[0].cpu())
        if progress is not None:
            progress.update(len(batch))
    rewards, *gold = [torch.cat(of_judge).view(len(prompts), samples) for of_judge in values]
    return rewards, gold[0] if gold else None


def optimal_front(reference: Task | PreTrainedModel | None = None, reward: RewardFunc | None = None,
                  prompts: Sequence | None = None, betas: Sequence[float] | None = None, samples: int = 1024, *,
                  tokenizer: PreTrainedTokenizerBase | None = None, rewards: Tensor | None = None,
                  gold: Tensor | None = None, min_ess: float = MIN_ESS,
                  max_new_tokens: int = WarpConfig.max_new_tokens, temperature: float = WarpConfig.temperature,
                  seed: int = 0) -> list[dict]:
    """The limit: points with `beta`, `kl` (nats per sequence), `reward` and `ess`, by falling β.

    Per prompt w_i ∝ exp(r_i / β), R̂ = Σ w_i r_i and KL̂ = R̂/β − log mean exp(r/β), averaged
    over prompts. `ess` is the mean effective sample size; the curve ends where it falls under
    `min_ess`, past which it cannot be trusted. `kl_se` and `reward_se` are standard errors over
    prompts, None for a single one. `rewards` (prompts, samples) are used where they are given, else those of
    completions sampled from `reference`: a causal LM, with `reward`, `prompts`, `tokenizer` and the completions'
    length and temperature, or a Task, which has all of them. `gold` (prompts, samples) gives the gold reward of the
    same optimum. `betas` default to 20 … 0.1 standard deviations of the rewards.
    Completions without a reward (NaN, for None) are in no mean: the policies are those that write them as often as
    the reference does, whose KL is that among the others times the others' share. A prompt without any reward is
    left out.
    Raises ValueError for a β that is not above 0, for rewards that are infinite and where there is none.
    """
    for beta in () if betas is None else betas:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"every beta must be above 0 and finite, not {beta}")
    if rewards is None:
        rewards = sampled_rewards(reference, reward, prompts, samples, tokenizer, max_new_tokens, temperature, seed)
    rewards = _checked_samples(rewards)
    if gold is not None:
        gold = _checked_samples(gold)
        if gold.shape != rewards.shape:
            raise ValueError(f"gold is {tuple(gold.shape)} and rewards {tuple(rewards.shape)}; "
                             "give both of the same samples")
    judged = ~rewards.isnan().all(1)
    rewards, gold = rewards[judged], None if gold is None else gold[judged]
    scored = ~rewards.isnan()
    filled, counts = rewards.masked_fill(~scored, 0), scored.sum(1)                      # …, (prompts,)
    log_counts = torch.tensor([math.log(count) for count in counts.tolist()], dtype=torch.float64)
    if betas is None:
        betas = [beta * (rewards[scored].std().item() or 1.0) for beta in BETAS]
    points = []
    for beta in sorted(betas, reverse=True):
        scaled = (rewards / beta).masked_fill(~scored, -math.inf)
        log_z = scaled.logsumexp(1) - log_counts                                       # (prompts,)
        w = scaled.softmax(1)
        best = (w * filled).sum(1)
        kl = (best / beta - log_z) * (counts.double() / rewards.shape[1])
        ess = (1 / w.square().sum(1)).mean().item()
        if ess < min_ess:
            break
        point = {"beta": float(beta), "kl": kl.mean().item(), "kl_se": _se(kl), "reward": best.mean().item(),
                 "reward_se": _se(best), "ess": ess}
        if gold is not None:
            point["gold"] = _weighted_mean(w, gold).mean().item()
        points.append(point)
    return points


def best_of_n_front(reference: Task | PreTrainedModel | None = None, reward: RewardFunc | None = None,
                    prompts: Sequence | None = None, ns: Sequence[int] | None = None, samples: int = 1024, *,
                    tokenizer: PreTrainedTokenizerBase | None = None, rewards: Tensor | None = None,
                    max_new_tokens: int = WarpConfig.max_new_tokens, temperature: float = WarpConfig.temperature,
                    seed: int = 0) -> list[dict]:
    """Best-of-n: points with `n`, `kl_bound` = log n − (n−1)/n in nats, and `reward`, with `reward_se`.

    The samples are those of `optimal_front`, by the same arguments.

    The KL is an upper bound (it is reached where no two completions are alike). The expected
    maximum of n of the N samples of a prompt is exact: the i-th smallest is the maximum with
    probability C(i−1, n−1) / C(N, n). `ns` default to 1, 2, 4, … 128, as far as there are samples.
    Completions without a reward (NaN) are not among the N and n; the KL is as that of `optimal_front`.
    Raises ValueError for n outside 1..N, TypeError where there is nothing to take samples of.
    """
    if rewards is None:
        rewards = sampled_rewards(reference, reward, prompts, samples, tokenizer, max_new_tokens, temperature, seed)
    rewards = _checked_samples(rewards)
    rewards = rewards[~rewards.isnan().all(1)]
    counts = (~rewards.isnan()).sum(1)
    N, share = int(counts.min()), (counts.double() / rewards.shape[1]).mean().item()
    ordered = rewards.sort(1).values  # those without a reward at the end
    points = []
    for n in [2**k for k in range(8) if 2**k <= N] if ns is None else ns:
        if not 1 <= n <= N:
            raise ValueError(f"best-of-n needs n between 1 and the {N} samples a prompt, not {n}")
        best = rewards.new_empty(len(rewards))
        for count in counts.unique().tolist():
            best[counts == count] = ordered[counts == count, n - 1:count] @ _chances(n, count)
        points.append({"n": int(n), "kl_bound": (math.log(n) - (n - 1) / n) * share, "reward": best.mean().item(),
                       "reward_se": _se(best)})
    return points


def _chances(n: int, N: int) -> Tensor:
    """The probability that the i-th smallest of N is the maximum of n of them, for i = n … N."""
    log_choose = [math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) for i in range(n, N + 1)]
    log_total = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)
    return torch.tensor([math.exp(c - log_total) for c in log_choose], dtype=torch.float64)


def _weighted_mean(w: Tensor, values: Tensor) -> Tensor:
    """Σ w v of each prompt, over those of its samples, and those prompts, that have a value."""
    missing = values.isnan()
    if not missing.any():
        return (w * values).sum(1)
    total = w.masked_fill(missing, 0).sum(1)
    return ((w * values.masked_fill(missing, 0)).sum(1) / total)[total > 0]


def sampled_rewards(reference: Task | PreTrainedModel | None, reward: RewardFunc | None, prompts: Sequence | None,
                    samples: int, tokenizer: PreTrainedTokenizerBase | None, max_new_tokens: int, temperature: float,
                    seed: int) -> Tensor:
    """Rewards (prompts, samples) of a Task, or of a reference policy on prompts.

    Raises TypeError where one of what is needed is missing, or stands beside a Task that has its own; ValueError for
    prompts, samples, length or temperature that cannot be used.
    """
    if isinstance(reference, Task):
        check_task_alone({
            "reward": reward is not None, "prompts": prompts is not None, "tokenizer": tokenizer is not None,
            "max_new_tokens": max_new_tokens not in (WarpConfig.max_new_tokens, reference.max_new_tokens),
            "temperature": temperature not in (WarpConfig.temperature, reference.temperature)})
    else:
        needed = {"reference": reference, "tokenizer": tokenizer, "prompts": prompts, "reward": reward}
        if missing := [name for name, value in needed.items() if value is None]:
            raise TypeError(f"the limit needs samples: give `rewards` of them, or {', '.join(missing)} to draw them")
        check_sampling(max_new_tokens, temperature)
        check_rewards(reward)
        encoded = prompts_for(reference, tokenizer, prompts, max_new_tokens)
        reference = Task(reference, tokenizer, reward, encoded, encoded, None, None, max_new_tokens, temperature,
                         sft=parameters(reference))
    return reference_rewards(reference, samples, seed=seed)[0]


def _checked_samples(rewards) -> Tensor:
    """Rewards as (prompts, samples), float64, NaN for None. Raises ValueError for what is infinite, or none at all."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if rewards.dim() != 2 or not rewards.numel():
        raise ValueError(f"rewards must be (prompts, samples), not {tuple(rewards.shape)}")
    if rewards.isinf().any():
        prompt, number = rewards.isinf().nonzero()[0].tolist()
        raise ValueError(f"the reward of sample {number} of prompt {prompt} is not finite")
    if rewards.isnan().all():
        raise ValueError("the reward is None for every sample; return a number for some of them")
    return rewards


def _se(values: Tensor) -> float | None:
    """The standard error of the mean of values (N,), as JSON has it: None for a single one."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def limit_rewards(task: Task, samples: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Rewards, and gold rewards where there are any, (prompts, samples) of the SFT policy on held-out prompts.

    They cost more than a front, so those of a reward model are kept in the cache, by the hash of
    all that they depend on. A reward function has no hash and is asked again.
    """
    if samples is None:
        size = sum(tensor.numel() for tensor in task.sft.values())
        samples = LIMIT_SAMPLES if size < LARGE else LIMIT_SAMPLES_LARGE
    task = task.first(LIMIT_PROMPTS)
    judge, path = task.judge, None
    if isinstance(judge, (BradleyTerry, ClassifierReward)):
        key = json_hash([task.eval_prompts.texts, samples, task.max_new_tokens, task.temperature,
                         task.gold is not None, weights_hash(task.sft), reward_hash(judge), source_hash(__name__),
                         package_versions()])
        path = cache_folder() / f"limit-{key[:12]}.safetensors"
    if path is not None and path.is_file():
        try:
            kept = load_tensors(path, "cpu", "")
            return kept["reward"], kept.get("gold")
        except (ValueError, KeyError):  # damaged: sampled again
            path.unlink()
    with tqdm(total=len(task.eval_prompts) * samples, desc="limit", unit="sample", disable=None, leave=False) as bar:
        rewards, gold = reference_rewards(task, samples, progress=bar)
    if path is not None:
        try:
            save_tensors({"reward": rewards} if gold is None else {"reward": rewards, "gold": gold}, path)
        except CannotWrite as error:
            print(f"warp-lite: the limit's samples are drawn again next time: {error}", file=sys.stderr)
    return rewards, gold


def reward_hash(reward: BradleyTerry | ClassifierReward) -> str:
    """A hash of a reward model: its weights, its plain settings and how it reads."""
    settings = {name: value for name, value in vars(reward).items() if isinstance(value, (bool, int, float, str))}
    if isinstance(reward, BradleyTerry):
        weights = {**parameters(reward.trunk), "head": reward.head}
    else:
        weights = parameters(reward.model)
        settings["reads"] = "prompt and completion decoded together"
    return json_hash([type(reward).__name__, settings, weights_hash(weights)])
