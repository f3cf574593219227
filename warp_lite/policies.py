"""Policies: load, save, encode prompts, sample completions, score them.

Everything carries a leading axis E, the number of policies. Weights are mappings from the
names of `model.named_parameters()` to tensors (E, …); `forward.py` turns them into logits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .files import first_line

Weights = Mapping[str, Tensor]


@dataclass
class Prompts:
    """Encoded prompts: `ids` and `mask` (…, B, P), left-padded, mask 1 for tokens.

    `texts` and the further `columns` of a data set stand beside them in row-major order.
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor
    columns: dict[str, list] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, index: np.ndarray) -> Prompts:
        """Rows `index` (E, B) as one batch, trimmed to its longest prompt; `texts` in row-major order."""
        rows = torch.from_numpy(index)
        mask = self.mask[rows]
        width = int(mask.sum(-1).max())
        columns = {name: [values[i] for i in index.ravel()] for name, values in self.columns.items()}
        texts = [self.texts[i] for i in index.ravel()]
        return Prompts(texts, self.ids[rows][..., -width:], mask[..., -width:], columns)

    def repeat(self, policies: int) -> Prompts:
        """The same prompts for each of E policies."""
        columns = {name: values * policies for name, values in self.columns.items()}
        ids, mask = (part.expand(policies, -1, -1) for part in (self.ids, self.mask))
        return Prompts(self.texts * policies, ids, mask, columns)

    def to(self, device) -> Prompts:
        """The same prompts on a device."""
        return Prompts(self.texts, self.ids.to(device), self.mask.to(device), self.columns)


@dataclass
class Rollout:
    """Completions of E policies: `ids` and `mask` (E, B, T), mask 1 up to and including EOS.

    `logprobs` (E, B, T) are those of the sampled tokens under the policy that sampled
    them, in nats, 0 where the mask is 0.
    """

    prompts: Prompts
    ids: Tensor
    mask: Tensor
    logprobs: Tensor

    def select(self, members: list[int]) -> Rollout:
        """The completions of some of the policies."""
        B = self.ids.shape[1]
        rows = [e * B + b for e in members for b in range(B)]
        prompts = Prompts([self.prompts.texts[i] for i in rows], self.prompts.ids[members], self.prompts.mask[members],
                          {name: [values[i] for i in rows] for name, values in self.prompts.columns.items()})
        return Rollout(prompts, self.ids[members], self.mask[members], self.logprobs[members])


def encode_prompts(tokenizer, prompts, room: int | None = None) -> Prompts:
    """Tokenise and left-pad prompts: a sequence of str, or a data set with a `prompt` column.

    `room` is the number of tokens that prompt and completion may take together, less the
    completion. Raises ValueError for no prompts, one that is empty, or one that leaves no
    room for a completion.
    """
    names = getattr(prompts, "column_names", None)
    if names is not None and "prompt" not in names:
        raise ValueError(f"the data set of prompts has no column 'prompt'; it has {', '.join(names)}")
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of str, not one str: {prompts[:60]!r}")
    columns = {name: list(prompts[name]) for name in names or () if name != "prompt"}
    texts = list(prompts["prompt"] if names else prompts)
    if not texts:
        raise ValueError("there are no prompts; give at least one")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {i} is {type(text).__name__}, not str: {str(text)[:60]!r}")
    rows = tokenizer(texts)["input_ids"]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty after tokenisation: {texts[i]!r}")
        if room is not None and len(row) > room:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens and leaves no room for a completion (at most {room} fit): "
                f"{texts[i][:60]!r}; shorten it or lower max_new_tokens")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id(tokenizer), dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row):] = torch.tensor(row)
        mask[i, width - len(row):] = 1
    return Prompts(texts, ids, mask, columns)


def pad_id(tokenizer) -> int:
    """The id that fills a batch: the pad token, or EOS where there is none (both are masked by position)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def sample(forward, weights, prompts: Prompts, uniforms: Tensor, tokenizer, temperature: float = 1.0) -> Rollout:
    """Sample one completion a prompt from softmax(logits / temperature), nothing truncated.

    `weights` are prepared by `forward.prepare`. `prompts` (E, B, P). `uniforms` (E, B, T)
    in [0, 1) decide every token by inversion of the cumulative distribution, so a
    completion depends on its own policy, prompt and numbers and not on the batch around
    it. Ends early once every completion has emitted EOS.
    """
    E, B, P = prompts.ids.shape
    T, eos, like = uniforms.shape[-1], tokenizer.eos_token_id, _any_tensor(weights)
    mask = None
    if (prompts.mask == 0).any():
        mask = torch.cat([prompts.mask, prompts.mask.new_ones(E, B, T)], -1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    below_one = 1 - torch.finfo(dtype).eps / 2  # a float64 may round to 1, which is past the last token's mass
    u = uniforms.to(dtype).clamp(max=below_one).permute(2, 0, 1).unsqueeze(-1)           # (T, E, B, 1)
    cache = forward.new_cache(E, B, P + T - 1, like)
    alive = torch.ones(E, B, 1, dtype=torch.bool, device=prompts.ids.device)
    tokens, drawn, chosen = prompts.ids, [], []
    for t in range(T):
        seen = None if mask is None else mask[..., :P + t]
        logits = forward(weights, tokens, seen, cache, keep=tokens.shape[-1] - 1)[:, :, 0]
        logp = log_softmax(logits, temperature)                                          # (E, B, V)
        cdf = logp.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, u[t] * cdf[..., -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
        drawn.append(tokens)                                                             # (E, B, 1) each
        chosen.append(logp.gather(-1, tokens))
        alive &= tokens != eos
        if not alive.any():
            break
    ids = torch.cat(drawn, -1)                                                           # (E, B, T)
    ends = ids == eos
    after = ends.cumsum(-1) - ends.long() > 0  # what a completion was given after its EOS is forgotten
    return Rollout(prompts, ids.masked_fill(after, pad_id(tokenizer)), (~after).long(),
                   torch.cat(chosen, -1).masked_fill(after, 0))


def completion_logits(forward, weights, rollout: Rollout) -> Tensor:
    """The logits (E, B, T, V) from which each completion token was chosen, in one forward."""
    prompts, P = rollout.prompts, rollout.prompts.ids.shape[-1]
    ids = torch.cat([prompts.ids, rollout.ids[..., :-1]], -1)
    mask = None
    if (prompts.mask == 0).any():
        # what follows EOS is never looked at by what is scored, so it may count as tokens
        mask = torch.cat([prompts.mask, torch.ones_like(rollout.ids[..., :-1])], -1)
    return forward(weights, ids, mask, keep=P - 1)


def logprobs(forward, weights, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probability (E, B, T) of each completion token in nats, 0 after EOS; differentiable."""
    logp = log_softmax(completion_logits(forward, weights, rollout), temperature)
    return logp.gather(-1, rollout.ids.unsqueeze(-1))[..., 0] * rollout.mask


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature, in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _any_tensor(weights) -> Tensor:
    return next(tensor for tensor in weights.values() if isinstance(tensor, Tensor))


def parameters(model) -> dict[str, Tensor]:
    """The weights of a module by name, detached, tied ones once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def stack(states: Sequence[Weights]) -> dict[str, Tensor]:
    """E state dicts as one with a leading axis E."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(weights: Weights) -> list[dict[str, Tensor]]:
    """The inverse of `stack`; copies."""
    E = len(next(iter(weights.values())))
    return [{name: tensor[e].detach().clone() for name, tensor in weights.items()} for e in range(E)]


@torch.no_grad()
def load_weights(model, state: Weights):
    """Write a state dict into a module, in place, and return the module."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])
    return model


def completions_text(tokenizer, ids: Tensor, mask: Tensor) -> list[str]:
    """Completions (…, T) as texts without special tokens, in row-major order."""
    return tokenizer.batch_decode(completion_ids(ids, mask), skip_special_tokens=True)


def completion_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Completions (…, T) as lists of ids, EOS included and nothing after it, in row-major order."""
    rows, lengths = ids.reshape(-1, ids.shape[-1]).tolist(), mask.reshape(-1, ids.shape[-1]).sum(-1).tolist()
    return [row[:length] for row, length in zip(rows, lengths)]


def load_policy(name_or_folder, dtype=torch.float32, device="cpu"):
    """A causal LM and its tokenizer from the hub or a folder: safetensors only, no remote code.

    Raises ValueError, naming the folder, when it is missing, cannot be read or lacks weights.
    """
    folder = str(name_or_folder)
    with reading("a policy", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")  # the library makes up one without words
        model = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder!r} has no EOS token; completions could not end")
    return model.to(device).eval(), tokenizer


@contextmanager
def reading(what: str, folder: str):
    """Read a folder of the library's quietly; whatever is raised becomes a ValueError of one line that names it."""
    hub_name = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
    try:
        path = Path(folder)
        if path.is_file():
            raise ValueError("it is a file, not a folder")
        if not path.exists() and not hub_name.fullmatch(folder):
            raise ValueError("there is no such folder")
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError("the folder has no config.json")
        with quiet():
            yield
    except Exception as error:  # the library, its config checks, safetensors and tokenizers raise classes of their own
        hint = "; is a file truncated?" if "safetensor" in repr(type(error)).lower() else ""
        if not Path(folder).exists() and hub_name.fullmatch(folder):
            hint = "; nor is there a folder of that name"
        raise ValueError(f"cannot load {what} from {folder!r}: {first_line(error)}{hint}") from error


def from_pretrained(auto, folder: str, **options):
    """The library's loading, safetensors only, refusing a file that lacks weights: it would make them up."""
    model, info = auto.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True,
        output_loading_info=True, **options)
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"its tensor {name!r} has shape {tuple(found)} where its config asks for {tuple(wanted)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its file lacks weights that its config asks for ({len(missing)}, {missing[0]!r} first)")
    return model


def save_policy(model, tokenizer, folder) -> None:
    """A Hugging Face folder: safetensors weights, config, tokenizer."""
    with quiet():
        model.save_pretrained(Path(folder))
        tokenizer.save_pretrained(Path(folder))


def room_for_prompts(model, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have; None where the architecture sets no limit.

    Raises ValueError where not even one fits.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max_new_tokens >= limit:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but the policy has {limit} positions for prompt and "
                         "completion together; lower it")
    return None if limit is None else limit - max_new_tokens


class quiet:
    """Silence the library's progress bars and warnings while a folder is read or written."""

    def __enter__(self):
        from transformers.utils import logging as hf

        self.bars = hf.is_progress_bar_enabled()
        hf.disable_progress_bar()
        self.logger = logging.getLogger("transformers")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc):
        from transformers.utils import logging as hf

        self.logger.setLevel(self.level)
        if self.bars:
            hf.enable_progress_bar()
