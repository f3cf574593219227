"""Policies: weights, and what computes logits from them; they sample completions and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..averaging.state_dicts import Weights, parameters, stack
from .ends import end_ids
from .forward import Forward, make_forward
from .prompts import Prompts, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS, BLOCK = 4096, 256  # of a vocabulary up to which one running sum is as fast; tokens of a block of a larger one
DROP_AT, DROP_FROM = 0.75, 64  # completions that ended are dropped from this share on, in batches of at least so many


@dataclass
class Rollout:
    """Completions of E policies: `ids` and `mask` (E, B, T), mask 1 up to and including the token that ends it.

    `logprobs` (E, B, T) are those of the sampled tokens under the policy that sampled
    them, in nats, 0 where the mask is 0. `ends` are the ids that end a completion.
    """

    prompts: Prompts
    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    ends: tuple[int, ...] = ()

    def select(self, members: list[int]) -> Rollout:
        """The completions of some of the policies, by their places in E."""
        B, index = self.ids.shape[1], torch.tensor(members)
        rows = [e * B + b for e in members for b in range(B)]
        texts, given = ([values[i] for i in rows] for values in (self.prompts.texts, self.prompts.given))
        columns = {name: [values[i] for i in rows] for name, values in self.prompts.columns.items()}
        prompts = Prompts(texts, self.prompts.ids[index], self.prompts.mask[index], columns, given)
        return Rollout(prompts, self.ids[index], self.mask[index], self.logprobs[index], self.ends)

    def split(self, size: int) -> list[Rollout]:
        """The same in parts of at most `size` completions a policy; 0: in one."""
        B = self.ids.shape[1]
        if not size or size >= B:
            return [self]
        return [Rollout(self.prompts.rows(b, b + size), *(part[:, b:b + size] for part in (
            self.ids, self.mask, self.logprobs)), self.ends) for b in range(0, B, size)]


class Policies:
    """E policies of one architecture: a forward, and their weights (E, …) by name.

    The forward's preparation of the weights is done once and is seen nowhere else; it takes part in a gradient
    if the policies are made where gradients are taken.
    """

    def __init__(self, forward: Forward, weights: Weights):
        self.forward, self.weights = forward, weights
        self.prepared = forward.prepare(weights)

    @classmethod
    def of(cls, model: PreTrainedModel, states: Sequence[Weights] | None = None) -> Policies:
        """Policies of a causal LM's architecture with the weights of `states`, or its own, on its device."""
        return cls(make_forward(model), stack([parameters(model)] if states is None else states, model.device))

    def __len__(self) -> int:
        return len(self._like)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self._like.device

    @property
    def vocabulary(self) -> int:
        """How many tokens the logits are of: often more, and sometimes fewer, than the tokenizer has."""
        return self.forward.model.get_input_embeddings().num_embeddings

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The ids that end a completion (see `ends.end_ids`)."""
        return end_ids(self.forward.model, tokenizer)

    @property
    def _like(self) -> Tensor:
        return next(iter(self.weights.values()))

    def logits(self, ids: Tensor, mask: Tensor | None = None, keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V) of the tokens that follow ids (E, B, Q), from position `keep` on.

        `mask` (E, B, Q) is 1 for tokens and 0 for padding; without one there is no padding.
        """
        return self.forward(self.prepared, ids, mask, keep=keep)

    def hidden(self, ids: Tensor, mask: Tensor | None = None, keep: int = 0) -> Tensor:
        """The last hidden states (E, B, Q − keep, C) of ids (E, B, Q), from position `keep` on, as the forward's `head`
        takes them."""
        return self.forward.hidden(self.prepared, ids, mask, keep=keep)

    @torch.no_grad()
    def sample(self, prompts: Prompts, uniforms: Tensor, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0,
               at_once: int = 0) -> Rollout:
        """Sample one completion a prompt from softmax(logits / temperature), nothing truncated.

        `prompts` (E, B, P). `uniforms` (E, B, T) in [0, 1) decide every token by inversion of the
        cumulative distribution, so a completion depends on its own policy, prompt and numbers and not
        on the batch around it. Stops early once every completion has ended (see `ends.end_ids`). `at_once`
        completions of a policy are sampled together; 0: all of them.
        Raises ValueError where nothing ends a completion.
        """
        E, B, P = prompts.ids.shape
        if at_once and at_once < B:
            return join_rollouts(prompts, pad_id(tokenizer), [
                self.sample(prompts.rows(b, b + at_once), uniforms[:, b:b + at_once], tokenizer, temperature)
                for b in range(0, B, at_once)])
        T, pad, like, ends = uniforms.shape[-1], pad_id(tokenizer), self._like, self.ends(tokenizer)
        last = torch.tensor(ends, device=prompts.ids.device)
        mask = None
        if (prompts.mask == 0).any():
            mask = torch.cat([prompts.mask, prompts.mask.new_ones(E, B, T)], -1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        below_one = 1 - torch.finfo(dtype).eps / 2  # a float64 may round to 1, which is past the last token's mass
        u = uniforms.to(dtype).clamp(max=below_one).movedim(-1, 0).unsqueeze(-1).contiguous()  # (T, E, B, 1)
        cache = self.forward.new_cache(E, B, P + T - 1, like)
        ids = prompts.ids.new_full((T, E, B, 1), pad)
        chosen = u.new_ones(T, E, B, 1)
        tokens, alive = prompts.ids, torch.ones(E, B, 1, dtype=torch.bool, device=ids.device)
        rows = None  # the place in the batch of each that is still sampled, (E, rows, 1); None: all of them
        for t in range(T):
            seen = None if mask is None else mask[..., :P + t]
            logits = self.forward(self.prepared, tokens, seen, cache, keep=tokens.shape[-1] - 1)[:, :, 0]
            p = softmax(logits, temperature)                                                 # (E, rows, V)
            tokens = inverted(p, u[t])                                                       # (E, rows, 1)
            if rows is None:
                ids[t], chosen[t] = tokens, p.gather(-1, tokens)
            else:
                ids[t].scatter_(1, rows, tokens)
                chosen[t].scatter_(1, rows, p.gather(-1, tokens))
            alive &= ~torch.isin(tokens, last)
            unfinished = int(alive.sum(1).max())  # of the policy that has most
            if unfinished == 0:
                break
            if E * alive.shape[1] >= DROP_FROM and unfinished <= DROP_AT * alive.shape[1]:
                kept = alive.byte().argsort(dim=1, descending=True, stable=True)[:, :unfinished]  # (E, rows, 1)
                alive, tokens = alive.gather(1, kept), tokens.gather(1, kept)
                rows = kept if rows is None else rows.gather(1, kept)
                u = u.gather(2, kept.expand(T, -1, -1, -1))
                mask = None if mask is None else mask.gather(1, kept.expand(-1, -1, P + T))
                cache = self.forward.cache_of(cache, kept[..., 0])
        ids, chosen = (part[:t + 1, ..., 0].permute(1, 2, 0).contiguous() for part in (ids, chosen.log_()))  # (E, B, T)
        ended = torch.isin(ids, last)
        after = ended.cumsum(-1) - ended.long() > 0  # what a completion was given after its end is forgotten
        return Rollout(prompts, ids.masked_fill(after, pad), (~after).long(), chosen.masked_fill(after, 0), ends)

    def completion_logits(self, rollout: Rollout) -> Tensor:
        """The logits (E, B, T, V) from which each completion token was chosen, in one forward."""
        ids, mask = completion_input(rollout)
        return self.logits(ids, mask, keep=rollout.prompts.ids.shape[-1] - 1)

    def logprobs(self, rollout: Rollout, temperature: float = 1.0, chunk: int = 0) -> Tensor:
        """Log-probability (E, B, T) of each completion token in nats, 0 after its end; differentiable.

        With a `chunk` the logits of so many tokens of a policy exist at once, and are computed again for the
        gradient: the same numbers in less memory.
        """
        if not chunk:
            logits = self.completion_logits(rollout)
            return chosen_logprobs(logits, rollout.ids, temperature) * rollout.mask
        ids, mask = completion_input(rollout)
        hidden = self.hidden(ids, mask, keep=rollout.prompts.ids.shape[-1] - 1)                     # (E, B, T, C)

        def of_chunk(x, ids):
            return chosen_logprobs(self.forward.head(self.prepared, x), ids, temperature)

        logp = [checkpoint(of_chunk, x, ids, use_reentrant=False, preserve_rng_state=False) for x, ids in zip(
            hidden.flatten(1, 2).split(chunk, 1), rollout.ids.flatten(1, 2).split(chunk, 1))]       # (E, chunk) each
        return torch.cat(logp, 1).view(rollout.ids.shape) * rollout.mask


def inverted(p: Tensor, u: Tensor) -> Tensor:
    """The token (…, 1) at which the running sum of probabilities p (…, V) passes the share u (…, 1), in [0, 1), of
    their total: one that has a probability.

    Of many words the sums of blocks come first, and then the running sum of one block alone.
    """
    V = p.shape[-1]
    if V <= WORDS:
        cdf = p.cumsum(-1)
        return torch.searchsorted(cdf, u * cdf[..., -1:], right=True).clamp_(max=V - 1)
    blocks = F.pad(p, (0, -V % BLOCK)).unflatten(-1, (-1, BLOCK))                            # (…, V / BLOCK, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    point = u * ends[..., -1:]
    block = torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[-1] - 1)
    point -= torch.where(block > 0, ends.gather(-1, (block - 1).clamp_(min=0)), 0)
    cdf = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, BLOCK))[..., 0, :].cumsum(-1)
    last = cdf[..., -1:]  # rounded otherwise than the sum of the block
    inside = torch.searchsorted(cdf, torch.minimum(point, torch.nextafter(last, 0 * last)), right=True)
    return (block * BLOCK + inside).clamp_(max=V - 1)  # NaN, which is told of where its loss is


def join_rollouts(prompts: Prompts, fill: int, parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of parts of the prompts as one, as long as the longest; the inverse of `Rollout.split`."""
    T = max(part.ids.shape[-1] for part in parts)
    ids, mask, logp = (
        torch.cat([F.pad(tensor, (0, T - tensor.shape[-1]), value=value) for tensor in tensors], 1)
        for value, tensors in ((fill, [p.ids for p in parts]), (0, [p.mask for p in parts]),
                               (0.0, [p.logprobs for p in parts])))
    return Rollout(prompts, ids, mask, logp, parts[0].ends)


def completion_input(rollout: Rollout) -> tuple[Tensor, Tensor | None]:
    """Ids and mask (E, B, P + T − 1) of prompts and completions, in which position P − 1 + t chooses token t."""
    prompts = rollout.prompts
    ids = torch.cat([prompts.ids, rollout.ids[..., :-1]], -1)
    mask = None
    if (prompts.mask == 0).any():
        # what follows the end is never looked at by what is scored, so it may count as tokens
        mask = torch.cat([prompts.mask, torch.ones_like(rollout.ids[..., :-1])], -1)
    return ids, mask


def chosen_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (…) of the tokens ids (…) at logits (…, V), in nats."""
    return log_softmax(logits, temperature).gather(-1, ids.unsqueeze(-1))[..., 0]


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (…, V) of logits (…, V) at a temperature, in nats, in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (…, V) of logits (…, V) at a temperature, in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return (logits if temperature == 1 else logits / temperature).softmax(-1)


def completions_text(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """Completions as texts, in row-major order, without special tokens and without the token that ended them."""
    return tokenizer.batch_decode(without_end(rollout), skip_special_tokens=True)


def without_end(rollout: Rollout) -> list[list[int]]:
    """Completions as lists of ids without the one that ended them, in row-major order."""
    rows = completion_ids(rollout.ids, rollout.mask)
    return [row[:-1] if row and row[-1] in rollout.ends else row for row in rows]


def completion_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Completions (…, T) as lists of ids, with the one that ends each and nothing after it, in row-major order."""
    rows, lengths = ids.reshape(-1, ids.shape[-1]).tolist(), mask.reshape(-1, ids.shape[-1]).sum(-1).tolist()
    return [row[:length] for row, length in zip(rows, lengths)]
