"""What is measured of a policy: KL, rewards, length, diversity, and what it forgot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..averaging.state_dicts import Weights, check_same_tensors, parameters, stack
from ..policies.forward import make_forward
from ..policies.loading import check_whole
from ..policies.prompts import Prompts, encode_prompts, encode_texts, room_for_prompts
from ..policies.randomness import EVALUATION, generator
from ..policies.sampling import Policies, Rollout, log_softmax
from ..rewards.calling import rollout_rewards

ROWS_AT_ONCE = 1024  # sequences in one forward: more no longer helps
LOGITS_AT_ONCE = 2**28  # bytes of logits: with a vocabulary of 50,000 words they would fill the memory before


@dataclass(frozen=True)
class PolicyMetrics:
    """Measurements of one policy, each mean with its standard error over prompts.

    `kl` is to the reference, in nats per sequence, `reward` and `gold` in the reward's units,
    `length` in tokens, the one that ends it included. `distinct` is the share of distinct pairs of tokens among
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


def evaluate(policy, reference, reward, prompts, tokenizer, *, gold=None, texts=None, samples=1,
             max_new_tokens=24, temperature=1.0, seed=0) -> PolicyMetrics:
    """Measure one policy against a reference policy, both causal LMs, on prompts.

    `samples` completions a prompt. Raises ValueError on prompts that are empty or too long, on
    policies of different architectures, and where a reward is not finite.
    """
    for what, model in (("policy", policy), ("reference", reference)):
        check_whole(model, what)
    encoded = encode_prompts(tokenizer, prompts, room_for_prompts(policy, max_new_tokens)).to(policy.device)
    check_same_tensors(parameters(reference), {"policy": parameters(policy)})
    return evaluate_many(policy, stack([parameters(policy)]), parameters(reference), reward, encoded, tokenizer,
                         gold=gold, texts=texts, samples=samples, max_new_tokens=max_new_tokens,
                         temperature=temperature, seed=seed)[0]


@torch.no_grad()
def evaluate_many(model, weights: Weights, reference: Weights, reward, prompts: Prompts, tokenizer, *, gold=None,
                  texts=None, samples=1, max_new_tokens=24, temperature=1.0, seed=0) -> list[PolicyMetrics]:
    """Measure E policies, `weights` (E, …), of one architecture on the same prompts and random numbers.

    The KL is the Rao–Blackwellised estimator of KL(policy ‖ reference): completions are
    sampled from the policy and the exact KL over the vocabulary is summed at every position
    up to the one that ends it. Policy and reference are taken at one temperature.
    Weights may lie on another device than the model: they are moved to it, a few policies at a time.
    """
    forward = make_forward(model)
    E = len(next(iter(weights.values())))
    uniforms = evaluation_uniforms(seed, len(prompts), samples, max_new_tokens, prompts.ids.device)   # (N·k, T)
    repeated = np.repeat(np.arange(len(prompts)), samples)
    fixed = Policies(forward, {name: tensor.unsqueeze(0).to(model.device) for name, tensor in reference.items()})
    together, results = policies_at_once(len(repeated)), []
    for e in range(0, E, together):
        some = {name: tensor[e:e + together].to(model.device) for name, tensor in weights.items()}
        results += _evaluate_some(Policies(forward, some), fixed, reward, prompts, tokenizer, gold, texts, repeated,
                                  uniforms, samples, temperature)
    return results


def policies_at_once(rows: int) -> int:
    """How many policies are measured together, each on that many completions."""
    return max(1, ROWS_AT_ONCE // rows)


def rows_at_once(policies: int, vocabulary: int) -> int:
    """How many completions of each policy are sampled together: a token's logits are held four times."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (16 * vocabulary)) // policies)


def _evaluate_some(policies: Policies, fixed: Policies, reward, prompts, tokenizer, gold, texts, repeated, uniforms,
                   samples, temperature) -> list[PolicyMetrics]:
    E, vocabulary = len(policies), policies.vocabulary
    together = rows_at_once(E, vocabulary)
    parts: dict[str, list[Tensor]] = {"kl": [], "reward": [], "gold": [], "length": []}
    ids, masks = [], []
    for start in range(0, len(repeated), together):
        rows = repeated[start:start + together]
        batch = prompts.batch(np.tile(rows, (E, 1)))
        u = uniforms[start:start + together].expand(E, -1, -1)
        rollout = policies.sample(batch, u, tokenizer, temperature)
        scored = max(1, LOGITS_AT_ONCE // (4 * vocabulary * E * rollout.ids.shape[-1]))
        parts["kl"] += [sequence_kl(policies, fixed, part, temperature) for part in rollout.split(scored)]
        parts["reward"].append(finite_rewards(reward, rollout, tokenizer))
        if gold is not None:
            parts["gold"].append(finite_rewards(gold, rollout, tokenizer))
        parts["length"].append(rollout.mask.sum(-1).double())
        width = uniforms.shape[-1] - rollout.ids.shape[-1]
        ids.append(torch.nn.functional.pad(rollout.ids, (0, width)))
        masks.append(torch.nn.functional.pad(rollout.mask, (0, width)))
    means = {name: prompt_means(torch.cat(values, 1), samples) for name, values in parts.items() if values}
    ids, masks = torch.cat(ids, 1), torch.cat(masks, 1)
    perplexities = [None] * E
    if texts is not None:
        perplexities = perplexity(policies, tokenizer, texts)
    return [PolicyMetrics(
        **{name: value[e].mean().item() for name, value in means.items()},
        **{f"{name}_se": standard_error(value[e]) for name, value in means.items()},
        distinct=distinct_pairs(ids[e], masks[e]), repeated=repeated_pairs(ids[e], masks[e]),
        samples=ids.shape[1], perplexity=perplexities[e]) for e in range(E)]


def evaluation_uniforms(seed: int, prompts: int, samples: int, length: int, device="cpu") -> Tensor:
    """Random numbers (prompts · samples, length) for evaluation: the same for every policy, which
    makes their differences more exact than each of them."""
    return torch.from_numpy(generator(seed, EVALUATION).random((prompts * samples, length))).to(device)


def sequence_kl(policies: Policies, reference: Policies, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Rao–Blackwellised KL(policy ‖ reference) of each completion, (E, B), nats, float64, to one reference."""
    E, B, T = rollout.ids.shape
    p = log_softmax(policies.completion_logits(rollout), temperature)                    # (E, B, T, V)
    prompts = rollout.prompts
    flat = Rollout(
        Prompts(prompts.texts, prompts.ids.reshape(1, E * B, -1), prompts.mask.reshape(1, E * B, -1)),
        rollout.ids.reshape(1, E * B, T), rollout.mask.reshape(1, E * B, T), rollout.logprobs)
    q = log_softmax(reference.completion_logits(flat), temperature).view_as(p)
    kl = (p.exp() * (p - q)).sum(-1).double()                                            # (E, B, T)
    return (kl * rollout.mask).sum(-1)


def finite_rewards(reward, rollout: Rollout, tokenizer) -> Tensor:
    """The reward (E, B) of each completion; ValueError names the prompt where it is not finite."""
    values = rollout_rewards([reward] * len(rollout.ids), rollout, tokenizer)
    bad = (~torch.isfinite(values)).flatten().nonzero()
    if len(bad):
        i = bad[0].item()
        raise ValueError(f"the reward is {values.flatten()[i].item()} for a completion of the prompt "
                         f"{rollout.prompts.texts[i][:80]!r}; rewards must be finite")
    return values


def perplexity(policies: Policies, tokenizer, texts: Sequence[str]) -> list[float]:
    """Perplexity per token, the EOS that ends each included, of texts under each policy."""
    E = len(policies)
    ids, mask = (part.to(policies.device) for part in encode_texts(
        tokenizer, texts, end=policies.ends(tokenizer)[0]))
    total = torch.zeros(E, dtype=torch.float64, device=ids.device)
    rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (4 * policies.vocabulary * ids.shape[1])) // E)
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    for some, end in zip(order.split(rows), lengths[::rows].tolist()):  # texts of like length together
        some, real = ids[some, :end], mask[some, :end]
        logits = policies.logits(some[:, :-1].expand(E, -1, -1))
        logp = log_softmax(logits, 1.0).gather(-1, some[:, 1:].expand(E, -1, -1).unsqueeze(-1))[..., 0]
        total += (logp.double() * real[:, 1:]).sum((1, 2))
    return torch.exp(-total / mask[:, 1:].sum()).tolist()


def prompt_means(values: Tensor, samples: int) -> Tensor:
    """(E, prompts · samples) → (E, prompts): samples of one prompt are not independent."""
    return values.double().view(len(values), -1, samples).mean(-1)


def standard_error(values: Tensor) -> float:
    """Standard error of a mean over prompts; nan for one prompt."""
    return (values.std(unbiased=True) / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def pairs_of(ids: Tensor, mask: Tensor) -> list[list[tuple[int, int]]]:
    """The neighbouring pairs of tokens of each completion."""
    lengths = mask.sum(-1).tolist()
    return [list(zip(row[:n], row[1:n])) for row, n in zip(ids.tolist(), lengths)]


def distinct_pairs(ids: Tensor, mask: Tensor) -> float:
    """Distinct pairs of neighbouring tokens over all such pairs (distinct-2); nan if there are none."""
    pairs = [pair for row in pairs_of(ids, mask) for pair in row]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def repeated_pairs(ids: Tensor, mask: Tensor) -> float:
    """Share of pairs that occurred before in the same completion; nan if there are none."""
    rows = pairs_of(ids, mask)
    total = sum(map(len, rows))
    return sum(len(row) - len(set(row)) for row in rows) / total if total else math.nan
