"""The limit of every method: the best reward at each KL, estimated from samples of the reference alone.

For any β the best policy is π*(y|x) ∝ π_ref(y|x) · exp(r(x, y) / β). Its reward and KL follow
from samples of π_ref by importance weighting, and no policy lies above that curve. Best-of-n
stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..averaging.state_dicts import parameters
from ..policies.prompts import Prompts, encode_prompts, room_for_prompts
from ..policies.randomness import EVALUATION, generator
from ..policies.sampling import Policies
from ..result import WarpResult
from ..rewards.bradley_terry import BradleyTerry
from ..rewards.calling import rollout_rewards
from ..rewards.classifiers import ClassifierReward
from ..storage.files import load_tensors, save_tensors, weights_hash
from ..storage.provenance import cache_folder, json_hash
from .front import MIN_ESS
from .metrics import rows_at_once

BETAS = tuple(np.geomspace(20, 0.1, 28).round(4).tolist())  # in standard deviations of the reward
LIMIT_PROMPTS = 64
LIMIT_SAMPLES = 1024  # completions a prompt
LARGE, LIMIT_SAMPLES_LARGE = 5_000_000, 128  # a larger policy: the limit must not cost more than the runs


@torch.no_grad()
def reference_rewards(reference, tokenizer, rewards: Sequence, prompts, samples: int, *, max_new_tokens=24,
                      temperature=1.0, seed=0, progress=None) -> list[Tensor]:
    """Each reward's values (prompts, samples), float64, of `samples` completions of the reference a prompt.

    `prompts` are as `run_warp` takes them, or encoded. Raises TypeError where one of these is missing.
    """
    missing = [name for name, value in (("reference", reference), ("tokenizer", tokenizer), ("prompts", prompts))
               if value is None] + ["reward"] * (None in rewards)
    if missing:
        raise TypeError(f"the limit needs samples: give `rewards` of them, or {', '.join(missing)} to draw them")
    encoded = prompts
    if not isinstance(prompts, Prompts):
        encoded = encode_prompts(tokenizer, prompts, room_for_prompts(reference, max_new_tokens)).to(reference.device)
    policies = Policies.of(reference)
    rows = np.repeat(np.arange(len(encoded)), samples)
    values: list[list[Tensor]] = [[] for _ in rewards]
    together = rows_at_once(1, policies.vocabulary)
    for i, start in enumerate(range(0, len(rows), together)):
        some = rows[start:start + together]
        uniforms = generator(seed, i, 1, EVALUATION).random((1, len(some), max_new_tokens))
        batch = encoded.batch(some[None])
        uniforms = torch.from_numpy(uniforms).to(encoded.ids.device)
        rollout = policies.sample(batch, uniforms, tokenizer, temperature)
        for reward, into in zip(rewards, values):
            into.append(rollout_rewards([reward], rollout, tokenizer)[0].cpu())
        if progress is not None:
            progress.update(len(some))
    return [torch.cat(v).view(len(encoded), samples) for v in values]


def optimal_front(reference=None, reward=None, prompts=None, betas: Sequence[float] | None = None,
                  samples: int = 1024, *, tokenizer=None, rewards: Tensor | None = None, gold: Tensor | None = None,
                  min_ess: float = MIN_ESS, **sampling) -> list[dict]:
    """The limit: points with `beta`, `kl` (nats per sequence), `reward` and `ess`, by falling β.

    Per prompt w_i ∝ exp(r_i / β), R̂ = Σ w_i r_i and KL̂ = R̂/β − log mean exp(r/β), averaged
    over prompts. `ess` is the mean effective sample size; the curve ends where it falls under
    `min_ess`, past which it cannot be trusted. `kl_se` and `reward_se` are standard errors over
    prompts, None for a single one. `rewards` (prompts, samples) are used where they are given, else
    sampled from `reference`; `gold` likewise gives the gold reward of the same optimum. `betas`
    default to 20 … 0.1 standard deviations of the rewards.
    Raises ValueError for a β that is not above 0 and for rewards that are not finite.
    """
    for beta in () if betas is None else betas:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"every beta must be above 0 and finite, not {beta}")
    rewards = _rewards(reference, reward, prompts, samples, tokenizer, rewards, sampling)
    if betas is None:
        betas = [beta * (rewards.std().item() or 1.0) for beta in BETAS]
    if gold is not None:
        gold = _checked(gold)
        if gold.shape != rewards.shape:
            raise ValueError(f"gold is {tuple(gold.shape)} and rewards {tuple(rewards.shape)}; "
                             "give both of the same samples")
    points = []
    for beta in sorted(betas, reverse=True):
        scaled = rewards / beta
        log_z = scaled.logsumexp(1) - math.log(rewards.shape[1])                         # (prompts,)
        w = scaled.softmax(1)
        best = (w * rewards).sum(1)
        kl = best / beta - log_z
        ess = (1 / w.square().sum(1)).mean().item()
        if ess < min_ess:
            break
        point = {"beta": float(beta), "kl": kl.mean().item(), "kl_se": _se(kl), "reward": best.mean().item(),
                 "reward_se": _se(best), "ess": ess}
        if gold is not None:
            point["gold"] = (w * gold).sum(1).mean().item()
        points.append(point)
    return points


def best_of_n_front(reference=None, reward=None, prompts=None, ns: Sequence[int] | None = None, samples: int = 1024, *,
                    tokenizer=None, rewards: Tensor | None = None, **sampling) -> list[dict]:
    """Best-of-n: points with `n`, `kl_bound` = log n − (n−1)/n, and `reward`, with `reward_se`.

    The KL is an upper bound (it is reached where no two completions are alike). The expected
    maximum of n of the N samples of a prompt is exact: the i-th smallest is the maximum with
    probability C(i−1, n−1) / C(N, n). `ns` default to 1, 2, 4, … 128, as far as there are samples.
    Raises ValueError for n outside 1..N.
    """
    rewards = _rewards(reference, reward, prompts, samples, tokenizer, rewards, sampling)
    N = rewards.shape[1]
    ordered = rewards.sort(1).values
    points = []
    for n in [2**k for k in range(8) if 2**k <= N] if ns is None else ns:
        if not 1 <= n <= N:
            raise ValueError(f"best-of-n needs n between 1 and the {N} samples a prompt, not {n}")
        log_choose = [math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) for i in range(n, N + 1)]
        log_total = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)
        chance = torch.tensor([math.exp(c - log_total) for c in log_choose], dtype=torch.float64)
        best = ordered[:, n - 1:] @ chance
        points.append({"n": int(n), "kl_bound": math.log(n) - (n - 1) / n, "reward": best.mean().item(),
                       "reward_se": _se(best)})
    return points


def _rewards(reference, reward, prompts, samples, tokenizer, rewards, sampling) -> Tensor:
    if rewards is None:
        (rewards,) = reference_rewards(reference, tokenizer, [reward], prompts, samples, **sampling)
    return _checked(rewards)


def _checked(rewards) -> Tensor:
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if rewards.dim() != 2 or not rewards.numel():
        raise ValueError(f"rewards must be (prompts, samples), not {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        prompt, sample_ = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise ValueError(f"the reward of sample {sample_} of prompt {prompt} is not finite")
    return rewards


def _se(values: Tensor) -> float | None:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def limit_rewards(result: WarpResult, samples: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Rewards, and gold rewards where there are any, (prompts, samples) of the SFT policy on held-out prompts.

    They cost more than a front, so those of a reward model are kept in the cache, by the hash of
    all that they depend on. A reward function has no hash and is asked again.
    """
    if samples is None:
        size = sum(tensor.numel() for tensor in result.sft.values())
        samples = LIMIT_SAMPLES if size < LARGE else LIMIT_SAMPLES_LARGE
    prompts = result.held_out.batch(np.arange(min(LIMIT_PROMPTS, len(result.eval_prompts))))
    config, judge, gold = result.config, result.judge, result.gold
    path = None
    if isinstance(judge, (BradleyTerry, ClassifierReward)):
        key = json_hash([prompts.texts, samples, config.max_new_tokens, config.temperature, gold is not None,
                         weights_hash(result.sft), reward_hash(judge)])
        path = cache_folder() / f"limit-{key[:12]}.safetensors"
    if path is not None and path.is_file():
        try:
            kept = load_tensors(path, "cpu", "")
            return kept["reward"], kept.get("gold")
        except (ValueError, KeyError):  # damaged: sampled again
            path.unlink()
    wanted = [judge] if gold is None else [judge, gold]
    with tqdm(total=len(prompts) * samples, desc="limit", unit="sample", disable=None, leave=False) as bar:
        values = reference_rewards(result.model, result.tokenizer, wanted, prompts, samples, progress=bar,
                                   temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    kept = dict(zip(("reward", "gold"), values))
    if path is not None:
        save_tensors(kept, path)
    return kept["reward"], kept.get("gold")


def reward_hash(reward: BradleyTerry | ClassifierReward) -> str:
    """A hash of a reward model: its weights and its plain settings."""
    settings = {name: value for name, value in vars(reward).items() if isinstance(value, (bool, int, float, str))}
    if isinstance(reward, BradleyTerry):
        weights = {**parameters(reward.trunk), "head": reward.head}
    else:
        weights = parameters(reward.model)
    return json_hash([type(reward).__name__, settings, weights_hash(weights)])
