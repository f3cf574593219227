"""What is measured of a policy: KL, rewards, length, diversity, and what it forgot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..averaging.state_dicts import Weights, check_same_tensors, parameters, stack
from ..config import WarpConfig, check_count, check_sampling
from ..policies.forward import make_forward
from ..policies.loading import check_whole
from ..policies.prompts import Prompts, encode_texts
from ..policies.randomness import EVALUATION, generator
from ..policies.sampling import Policies, Rollout, completions_text, log_softmax
from ..rewards.calling import RewardFunc, rollout_rewards
from ..task import Task, check_rewards, prompts_for

ROWS_AT_ONCE = 1024  # sequences in one forward: more no longer helps
LOGITS_AT_ONCE = 2**28  # bytes of logits: with a vocabulary of 50,000 words they would fill the memory before


@dataclass(frozen=True)
class PolicyMetrics:
    """Measurements of one policy, each mean with its standard error over prompts.

    `kl` is to the reference, in nats per sequence, `reward` and `gold` in the reward's units,
    `length` in tokens, the one that ends it included. A completion whose reward is None is left out of the reward's
    mean, and a prompt that has only such. `distinct` is the share of distinct pairs of tokens among
    all pairs of all completions, `repeated` the share of pairs that occurred before in the same
    completion. `perplexity` is that of held-out texts, per token. None where not measured; nan
    where there is nothing to take it from (the standard error of one prompt).
    """

    kl: float
    kl_se: float
    reward: float
    reward_se: float
    length: float
    length_se: float
    distinct: float
    repeated: float
    samples: int
    gold: float | None = None
    gold_se: float | None = None
    perplexity: float | None = None

    def as_dict(self) -> dict:
        """Plain numbers for JSON: those not measured left out, those that do not exist (nan) None."""
        return {name: value if math.isfinite(value) else None
                for name, value in dataclasses.asdict(self).items() if value is not None}


def evaluate(policy: PreTrainedModel, reference: PreTrainedModel, reward: RewardFunc, prompts: Sequence,
             tokenizer: PreTrainedTokenizerBase, *, gold: RewardFunc | None = None,
             texts: Sequence[str] | None = None, samples: int = 1,
             max_new_tokens: int = WarpConfig.max_new_tokens, temperature: float = WarpConfig.temperature,
             seed: int = 0) -> PolicyMetrics:
    """Measure one policy against a reference policy, both causal LMs, on prompts.

    `samples` completions a prompt. Raises ValueError or TypeError on prompts, samples, length or temperature that
    cannot be used, a reward that cannot be called, policies of different architectures, and where a reward is not
    finite.
    """
    check_sampling(max_new_tokens, temperature)
    check_rewards(reward, gold)
    for what, model in (("policy", policy), ("reference", reference)):
        check_whole(model, what)
    encoded = prompts_for(policy, tokenizer, prompts, max_new_tokens)
    check_same_tensors(parameters(reference), {"policy": parameters(policy)})
    task = Task(policy, tokenizer, reward, encoded, encoded, gold, texts, max_new_tokens, temperature,
                sft=parameters(reference))
    return evaluate_many(task, stack([parameters(policy)]), samples=samples, seed=seed)[0]


@torch.no_grad()
def evaluate_many(task: Task, weights: Weights, *, samples: int = 1, seed: int | None = None,
                  texts: bool = True) -> list[PolicyMetrics]:
    """Measure E policies, `weights` (E, …), of a task's architecture on its held-out prompts, all with the same random
    numbers, the task's own (`eval_seed`) unless `seed` says others, `samples` completions a prompt; with the perplexity
    of its held-out texts unless `texts` is False.

    The KL is the Rao–Blackwellised estimator of KL(policy ‖ reference): completions are
    sampled from the policy and the exact KL over the vocabulary is summed at every position
    up to the one that ends it. Policy and reference are taken at one temperature.
    Weights may lie on another device than the policy: they are moved to it, a few policies at a time.
    Raises ValueError where a reward is not finite, and for less than one sample.
    """
    check_count("samples", samples)
    forward, prompts, device = make_forward(task.policy), task.eval_prompts, task.policy.device
    E = len(next(iter(weights.values())))
    uniforms = evaluation_uniforms(task.eval_seed if seed is None else seed, len(prompts), samples,
                                   task.max_new_tokens, prompts.ids.device)                               # (N·k, T)
    reference = Policies(forward, {name: tensor.unsqueeze(0).to(device) for name, tensor in task.sft.items()})
    at_once, results = policies_at_once(len(prompts) * samples), []
    for e in range(0, E, at_once):
        moved = {name: tensor[e:e + at_once].to(device) for name, tensor in weights.items()}
        results += _evaluate_together(task, Policies(forward, moved), reference, uniforms, samples, texts)
    return results


def policies_at_once(rows: int) -> int:
    """How many policies are measured together, each on that many completions."""
    return max(1, ROWS_AT_ONCE // rows)


def rows_at_once(policies: int, vocabulary: int) -> int:
    """How many completions of each policy are sampled together: a token's logits are held four times."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (16 * vocabulary)) // policies)


def _evaluate_together(task: Task, policies: Policies, reference: Policies, uniforms: Tensor, samples: int,
                       texts: bool) -> list[PolicyMetrics]:
    """Measure E policies whose weights are on the device at once."""
    E = len(policies)
    values, ids, masks = _measure_completions(task, policies, reference, uniforms, samples)
    means = {}  # of each prompt: for each policy (prompts,), without those that have no reward
    for name, of_completions in values.items():
        of_prompts = prompt_means(of_completions, samples)
        means[name] = [scored_only(row, name) for row in of_prompts] if name in ("reward", "gold") else of_prompts
    perplexities = [None] * E
    if texts and task.texts is not None:
        perplexities = perplexity(policies, task.tokenizer, task.texts)
    return [PolicyMetrics(
        **{name: rows[e].mean().item() for name, rows in means.items()},
        **{f"{name}_se": standard_error(rows[e]) for name, rows in means.items()},
        distinct=distinct_pairs(ids[e], masks[e]), repeated=repeated_pairs(ids[e], masks[e]),
        samples=ids.shape[1], perplexity=perplexities[e]) for e in range(E)]


def _measure_completions(task: Task, policies: Policies, reference: Policies, uniforms: Tensor,
                         samples: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sample `samples` completions of each held-out prompt: their KL, reward, gold reward where there is one and
    length, (E, N) each by name, and their ids and mask, (E, N, T). N = prompts · samples."""
    prompts, tokenizer, temperature = task.eval_prompts, task.tokenizer, task.temperature
    E, vocabulary = len(policies), policies.vocabulary
    prompt_of = np.repeat(np.arange(len(prompts)), samples)                              # (N,)
    sampled_at_once = rows_at_once(E, vocabulary)
    values: dict[str, list[Tensor]] = {"kl": [], "reward": [], "gold": [], "length": []}
    ids, masks = [], []
    for start in range(0, len(prompt_of), sampled_at_once):
        chosen = slice(start, start + sampled_at_once)
        rollout = policies.sample(prompts.batch(np.tile(prompt_of[chosen], (E, 1))), uniforms[chosen].expand(E, -1, -1),
                                  tokenizer, temperature)
        scored_at_once = max(1, LOGITS_AT_ONCE // (4 * vocabulary * E * rollout.ids.shape[-1]))
        values["kl"] += [sequence_kl(policies, reference, part, temperature) for part in rollout.split(scored_at_once)]
        values["reward"].append(rollout_rewards([task.judge] * E, rollout, tokenizer))
        if task.gold is not None:
            values["gold"].append(rollout_rewards([task.gold] * E, rollout, tokenizer))
        values["length"].append(rollout.mask.sum(-1).double())
        missing = uniforms.shape[-1] - rollout.ids.shape[-1]
        ids.append(pad(rollout.ids, (0, missing)))
        masks.append(pad(rollout.mask, (0, missing)))
    return ({name: torch.cat(pieces, 1) for name, pieces in values.items() if pieces},
            torch.cat(ids, 1), torch.cat(masks, 1))


@torch.no_grad()
def sample_completions(task: Task, states: Sequence[Weights], seed: int | None = None) -> list[list[str]]:
    """One completion of each held-out prompt of a task by each of the policies, as texts: a list a policy.

    All with the same random numbers, the task's own unless `seed` says others.
    """
    prompts = task.eval_prompts
    uniforms = evaluation_uniforms(task.eval_seed if seed is None else seed, len(prompts), 1, task.max_new_tokens,
                                   task.policy.device)
    rollout = Policies.of(task.policy, states).sample(
        prompts.repeat(len(states)), uniforms.expand(len(states), -1, -1), task.tokenizer, task.temperature)
    texts = completions_text(task.tokenizer, rollout)
    return [texts[start:start + len(prompts)] for start in range(0, len(texts), len(prompts))]


def evaluation_uniforms(seed: int, prompts: int, samples: int, length: int,
                        device: str | torch.device = "cpu") -> Tensor:
    """Random numbers (prompts · samples, length) for evaluation: the same for every policy, which
    makes their differences more exact than each of them."""
    return torch.from_numpy(generator(seed, EVALUATION).random((prompts * samples, length))).to(device)


def sequence_kl(policies: Policies, reference: Policies, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Rao–Blackwellised KL(policy ‖ reference) of each completion, (E, B), nats, float64, to one reference.

    The exact KL over the vocabulary is summed over the positions of a sampled completion, both at one temperature.
    """
    E, B, T = rollout.ids.shape
    p = log_softmax(policies.completion_logits(rollout), temperature)                    # (E, B, T, V)
    prompts = rollout.prompts
    flat = Rollout(
        Prompts(prompts.texts, prompts.ids.reshape(1, E * B, -1), prompts.mask.reshape(1, E * B, -1)),
        rollout.ids.reshape(1, E * B, T), rollout.mask.reshape(1, E * B, T), rollout.logprobs)
    q = log_softmax(reference.completion_logits(flat), temperature).view_as(p)
    kl = (p.exp() * (p - q)).sum(-1).double()                                            # (E, B, T)
    return (kl * rollout.mask).sum(-1)


def perplexity(policies: Policies, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[float]:
    """Perplexity per token, the EOS that ends each included, of texts under each policy."""
    E = len(policies)
    ids, mask = (part.to(policies.device) for part in encode_texts(
        tokenizer, texts, end=policies.ends(tokenizer)[0]))
    total = torch.zeros(E, dtype=torch.float64, device=ids.device)
    rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (4 * policies.vocabulary * ids.shape[1])) // E)
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    for places, end in zip(order.split(rows), lengths[::rows].tolist()):  # texts of like length together
        tokens, real = ids[places, :end], mask[places, :end]
        logits = policies.logits(tokens[:, :-1].expand(E, -1, -1))
        logp = log_softmax(logits, 1.0).gather(-1, tokens[:, 1:].expand(E, -1, -1).unsqueeze(-1))[..., 0]
        total += (logp.double() * real[:, 1:]).sum((1, 2))
    return torch.exp(-total / mask[:, 1:].sum()).tolist()


def prompt_means(values: Tensor, samples: int) -> Tensor:
    """(E, prompts · samples) → (E, prompts): samples of one prompt are not independent.

    NaN, a completion without a reward, is left out; a prompt that has nothing else is NaN.
    """
    values = values.double().view(len(values), -1, samples)
    return values.nanmean(-1) if bool(values.isnan().any()) else values.mean(-1)


def scored_only(values: Tensor, what: str) -> Tensor:
    """The prompts' values (N,) of a reward without those that have none (NaN). Raises ValueError where no prompt has
    one."""
    scored = values[~values.isnan()]
    if not len(scored):
        raise ValueError(f"the {what} is None for every completion; return a number for some of them")
    return scored


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (N,), one a prompt; nan for one prompt."""
    return (values.std(unbiased=True) / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def pairs_of(ids: Tensor, mask: Tensor) -> list[list[tuple[int, int]]]:
    """The neighbouring pairs of tokens of each completion, ids and mask (N, T)."""
    lengths = mask.sum(-1).tolist()
    return [list(zip(row[:n], row[1:n])) for row, n in zip(ids.tolist(), lengths)]


def distinct_pairs(ids: Tensor, mask: Tensor) -> float:
    """Distinct pairs of neighbouring tokens of ids (N, T) over all such pairs, 0 to 1 (distinct-2); nan if there are
    none."""
    pairs = [pair for row in pairs_of(ids, mask) for pair in row]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def repeated_pairs(ids: Tensor, mask: Tensor) -> float:
    """Share of pairs of ids (N, T) that occurred before in the same completion, 0 to 1; nan if there are none."""
    rows = pairs_of(ids, mask)
    total = sum(map(len, rows))
    return sum(len(row) - len(set(row)) for row in rows) / total if total else math.nan
