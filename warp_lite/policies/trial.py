"""Every forward is tried on a few tokens before it is used: plain, padded, and with a cache whose rows are dropped.

What is right is what the library's module says of each sequence alone. Caches differ between architectures, and
some modules take no heed of a cache or of padding that is passed in, without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..storage.files import first_line
from .attention import position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .forward import Forward

Verdict = TypeVar("Verdict")
LENGTHS, KEPT, PROMPT = (9, 6, 7), (2, 0), 5  # of three sequences; the two whose cache is kept, and from where on
_VERDICTS = WeakKeyDictionary()  # of each model: what was learned, by the name of what was tried


@dataclass
class Trial:
    """Sequences `ids` (E, 3, Q) with padding on the left, their `mask`, and the `expected` logits (E, 3, Q, V)."""

    ids: Tensor
    mask: Tensor
    expected: Tensor
    tolerance: float

    def agrees(self, logits: Tensor, start: int = 0, rows: tuple[int, ...] = (0, 1, 2)) -> bool:
        """Whether logits (E, rows, Q − start, V) from position `start` on are those expected, but for rounding."""
        real = at(self.mask, rows)[:, :, start:].bool()
        expected = at(self.expected, rows)[:, :, start:][real]
        return bool((logits[real] - expected).abs().max() <= self.tolerance * expected.abs().max())


    def of(self, policies: int) -> Trial:
        """The same for so many policies, which are alike."""
        ids, mask, expected = (tensor.expand(policies, *tensor.shape[1:])
                               for tensor in (self.ids, self.mask, self.expected))
        return Trial(ids, mask, expected, self.tolerance)


def at(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a tensor (E, B, …)."""
    return tensor.index_select(1, torch.tensor(rows, device=tensor.device))


@torch.no_grad()
def trial_of(model: PreTrainedModel) -> Trial:
    """The library's own logits of a few sequences, each alone.

    Raises ValueError for a model whose logits look at later tokens or whose weights change as it runs.
    """
    name, device = type(model.eval()).__name__, model.device
    size = model.get_input_embeddings().num_embeddings
    length = min(max(LENGTHS), position_limit(model) or max(LENGTHS))
    ids = (7 * torch.arange(1, 3 * length + 1, device=device) % size).view(1, 3, length)
    mask = torch.ones_like(ids)
    versions = [parameter._version for parameter in model.parameters()]
    rows = []
    try:
        for b, own in enumerate(LENGTHS):
            padding = max(0, length - own)
            rows.append(pad(own_logits(model, ids[:, b, padding:])[0], (0, 0, padding, 0)))
            mask[0, b, :padding] = 0
        half = own_logits(model, ids[:, 0, :length // 2])
    except Exception as error:  # whatever a module asks for that a causal LM needs not
        raise ValueError(f"a {name} cannot compute the logits of a few tokens: {first_line(error)}") from error
    if [parameter._version for parameter in model.parameters()] != versions:
        raise ValueError(f"a {name} changes its weights as it computes, so other weights cannot stand in for them; "
                         "switch that off in its config (RWKV: rescale_every=0), or take another policy")
    narrow = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    trial = Trial(ids, mask, torch.stack(rows).unsqueeze(0), 0.05 if narrow else 1e-3)
    first = Trial(ids[:, :1, :length // 2], mask[:, :1, :length // 2], half.unsqueeze(0), trial.tolerance)
    if torch.isfinite(trial.expected).all() and not first.agrees(trial.expected[:, :1, :length // 2], rows=(0,)):
        raise ValueError(f"a {name} is no causal LM: its logits look at later tokens; take one that is, or set "
                         "is_decoder=True in its config if it has that")
    return trial


def own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The library's logits (B, Q, V) of ids (B, Q) without padding."""
    options = {"use_cache": False}
    if "attention_mask" in inspect.signature(model.forward).parameters:  # else the library warns of padding
        options["attention_mask"] = torch.ones_like(ids)
    return model(ids, **options).logits


def left_in_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Where modules keep tensors that are neither weights nor buffers: the state of the last sequences."""
    return [(module, name) for module in model.modules() for name, value in vars(module).items()
            if isinstance(value, Tensor)]


def learned(model: PreTrainedModel, what: str, find: Callable[[], Verdict]) -> Verdict:
    """What `find()` says of a model, asked once in its life, under the name `what`. Raises what that raises."""
    verdicts = _VERDICTS.setdefault(model, {})
    if what not in verdicts:
        verdicts[what] = find()
    return verdicts[what]


def serves(forward: Forward, model: PreTrainedModel) -> bool:
    """Whether a forward computes what the module does, padded and cached, of one policy and of two.

    Raises ValueError for a model that is no causal LM.
    """
    def find():
        trial = trial_of(model)
        return all(padded(forward, some) and cached(forward, some) for some in (trial, trial.of(2)))

    return learned(model, type(forward).__name__, find)


@torch.no_grad()
def padded(forward: Forward, trial: Trial) -> bool:
    """Whether sequences have the logits with padding that they have alone."""
    try:
        return trial.agrees(forward(_prepared(forward, len(trial.ids)), trial.ids, trial.mask))
    except Exception:  # whatever a module does that the forward cannot take
        return False


@torch.no_grad()
def cached(forward: Forward, trial: Trial) -> bool:
    """Whether sequences have the logits token by token, with a cache some of whose rows are dropped."""
    ids, mask, pieces = trial.ids, trial.mask, []
    try:
        prepared = _prepared(forward, len(ids))
        cache = forward.new_cache(*ids.shape, next(forward.model.parameters()))
        forward(prepared, ids[..., :PROMPT], mask[..., :PROMPT], cache)
        cache = forward.cache_of(cache, torch.tensor([KEPT] * len(ids), device=ids.device))
        ids, mask = at(ids, KEPT), at(mask, KEPT)
        for t in range(PROMPT, ids.shape[-1]):
            pieces.append(forward(prepared, ids[..., t:t + 1], mask[..., :t + 1], cache))
        return trial.agrees(torch.cat(pieces, 2), PROMPT, KEPT)
    except Exception:  # as above
        return False


def _prepared(forward, policies):
    return forward.prepare({name: tensor.detach().expand(policies, *tensor.shape)
                            for name, tensor in forward.model.named_parameters()})
