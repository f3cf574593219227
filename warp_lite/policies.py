"""Policies: load, save, encode prompts, sample completions, score them.

Everything carries a leading axis E, the number of policies. Weights are mappings from the
names of `model.named_parameters()` to tensors (E, …); `forward.py` turns them into logits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from .files import first_line
from .hub import HUB_NAME, local, reach

Weights = Mapping[str, Tensor]

DROP_AT, DROP_FROM = 0.75, 64  # completions that ended are dropped from this share on, in batches of at least so many


@dataclass
class Prompts:
    """Encoded prompts: `ids` and `mask` (…, B, P), left-padded, mask 1 for tokens.

    `texts` and the further `columns` of a data set stand beside them in row-major order, and so does
    what was `given`: the texts, or the conversations that a chat template made texts of.
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor
    columns: dict[str, list] = field(default_factory=dict)
    given: list[str] | list[list[dict]] | None = None

    def __post_init__(self):
        if self.given is None:
            self.given = self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, index: np.ndarray) -> Prompts:
        """Rows `index` (E, B) as one batch, trimmed to its longest prompt; `texts` in row-major order."""
        rows = torch.from_numpy(index)
        mask = self.mask[rows]
        width = int(mask.sum(-1).max())
        columns = {name: [values[i] for i in index.ravel()] for name, values in self.columns.items()}
        texts, given = ([values[i] for i in index.ravel()] for values in (self.texts, self.given))
        return Prompts(texts, self.ids[rows][..., -width:], mask[..., -width:], columns, given)

    def rows(self, start: int, end: int) -> Prompts:
        """Prompts start … end − 1 of each of E policies."""
        B = self.ids.shape[1]
        chosen = [e * B + b for e in range(len(self.ids)) for b in range(start, min(end, B))]
        columns = {name: [values[i] for i in chosen] for name, values in self.columns.items()}
        texts, given = ([values[i] for i in chosen] for values in (self.texts, self.given))
        return Prompts(texts, self.ids[:, start:end], self.mask[:, start:end], columns, given)

    def repeat(self, policies: int) -> Prompts:
        """The same prompts for each of E policies."""
        columns = {name: values * policies for name, values in self.columns.items()}
        ids, mask = (part.expand(policies, -1, -1) for part in (self.ids, self.mask))
        return Prompts(self.texts * policies, ids, mask, columns, self.given * policies)

    def to(self, device) -> Prompts:
        """The same prompts on a device."""
        return Prompts(self.texts, self.ids.to(device), self.mask.to(device), self.columns, self.given)


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
        B, index = self.ids.shape[1], torch.tensor(members)
        rows = [e * B + b for e in members for b in range(B)]
        texts, given = ([values[i] for i in rows] for values in (self.prompts.texts, self.prompts.given))
        columns = {name: [values[i] for i in rows] for name, values in self.prompts.columns.items()}
        prompts = Prompts(texts, self.prompts.ids[index], self.prompts.mask[index], columns, given)
        return Rollout(prompts, self.ids[index], self.mask[index], self.logprobs[index])

    def split(self, size: int) -> list[Rollout]:
        """The same in parts of at most `size` completions a policy; 0: in one."""
        B = self.ids.shape[1]
        if not size or size >= B:
            return [self]
        return [Rollout(self.prompts.rows(b, b + size), *(part[:, b:b + size] for part in (
            self.ids, self.mask, self.logprobs))) for b in range(0, B, size)]


def encode_prompts(tokenizer, prompts, room: int | None = None) -> Prompts:
    """Tokenise and left-pad prompts: a sequence of str, or a data set with a `prompt` column.

    A prompt may be a conversation as in TRL, a list of {"role", "content"}; the tokenizer's chat
    template turns it into text. `room` is the number of tokens that prompt and completion may take
    together, less the completion. Raises ValueError for no prompts, one that is empty or no sound
    text, or one that leaves no room for a completion, and for conversations without a template.
    """
    names = getattr(prompts, "column_names", None)
    if names is not None and "prompt" not in names:
        raise ValueError(f"the data set of prompts has no column 'prompt'; it has {', '.join(names)}")
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of str, not one str: {prompts[:60]!r}")
    columns = {name: list(prompts[name]) for name in names or () if name != "prompt"}
    given = list(prompts["prompt"] if names else prompts)
    if not given:
        raise ValueError("there are no prompts; give at least one")
    if is_conversation(given[0]):
        texts = conversation_texts(tokenizer, given)
    else:
        texts = given
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {i} is {type(text).__name__}, not str: {str(text)[:60]!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"prompt {i} has half a character (a surrogate) in it, which no tokenizer reads: "
                             f"{text[:60]!r}")
    written = {} if texts is given else {"add_special_tokens": False}  # a conversation's template has written them
    rows = tokenizer(texts, **written)["input_ids"]
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
    return Prompts(texts, ids, mask, columns, given)


def is_conversation(prompt) -> bool:
    """Whether a prompt is a list of messages and not a text."""
    return isinstance(prompt, list)


def conversation_texts(tokenizer, conversations: Sequence[list[dict]]) -> list[str]:
    """Conversations as the texts that the chat template makes of them, up to where the assistant begins.

    Raises TypeError for a message that is none, ValueError where there is no template or it fails.
    """
    if tokenizer.chat_template is None:
        raise ValueError("prompt 0 is a conversation, but the policy's tokenizer has no chat template; "
                         "set tokenizer.chat_template, or give prompts as text")
    texts = []
    for i, messages in enumerate(conversations):
        if not is_conversation(messages) or not messages or not all(
                isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise TypeError(f"prompt {i} is no list of messages with a \"role\" and a \"content\", as prompt 0 is: "
                            f"{str(messages)[:60]!r}")
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses prompt {i}: {first_line(error)}") from error
    return texts


def check_ids(model, tokenizer, prompts: Prompts) -> None:
    """Raise ValueError if a prompt, or what pads and ends, has an id that the model has no embedding for."""
    size = model.get_input_embeddings().num_embeddings
    way_out = "are tokenizer and model of one checkpoint? else model.resize_token_embeddings(len(tokenizer))"
    for what, token in (("EOS", tokenizer.eos_token_id), ("padding", pad_id(tokenizer))):
        if token >= size:
            raise ValueError(f"the tokenizer's {what} token {tokenizer.convert_ids_to_tokens(token)!r} has the id "
                             f"{token}, and the policy has {size} embeddings; {way_out}")
    beyond = (prompts.ids >= size).nonzero()
    if len(beyond):
        i, token = beyond[0][-2].item(), prompts.ids[tuple(beyond[0])].item()
        raise ValueError(f"prompt {i} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, "
                         f"and the policy has {size} embeddings; {way_out}")


def pad_id(tokenizer) -> int:
    """The id that fills a batch: the pad token, or EOS where there is none (both are masked by position)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@torch.no_grad()
def sample(forward, weights, prompts: Prompts, uniforms: Tensor, tokenizer, temperature: float = 1.0,
           at_once: int = 0) -> Rollout:
    """Sample one completion a prompt from softmax(logits / temperature), nothing truncated.

    `weights` are prepared by `forward.prepare`. `prompts` (E, B, P). `uniforms` (E, B, T)
    in [0, 1) decide every token by inversion of the cumulative distribution, so a
    completion depends on its own policy, prompt and numbers and not on the batch around
    it. Ends early once every completion has emitted EOS. `at_once` completions of a policy are
    sampled together; 0: all of them.
    """
    E, B, P = prompts.ids.shape
    if at_once and at_once < B:
        return join_rollouts(prompts, pad_id(tokenizer), [
            sample(forward, weights, prompts.rows(b, b + at_once), uniforms[:, b:b + at_once], tokenizer, temperature)
            for b in range(0, B, at_once)])
    T, eos, pad, like = uniforms.shape[-1], tokenizer.eos_token_id, pad_id(tokenizer), _any_tensor(weights)
    mask = None
    if (prompts.mask == 0).any():
        mask = torch.cat([prompts.mask, prompts.mask.new_ones(E, B, T)], -1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    below_one = 1 - torch.finfo(dtype).eps / 2  # a float64 may round to 1, which is past the last token's mass
    u = uniforms.to(dtype).clamp(max=below_one)
    cache = forward.new_cache(E, B, P + T - 1, like)
    ids = prompts.ids.new_full((E, B, T), pad)
    chosen = torch.zeros(E, B, T, dtype=dtype, device=ids.device)
    tokens, alive = prompts.ids, torch.ones(E, B, dtype=torch.bool, device=ids.device)
    rows = torch.arange(B, device=ids.device).expand(E, B)  # the place in the batch of each that is still sampled
    for t in range(T):
        seen = None if mask is None else mask[..., :P + t]
        logits = forward(weights, tokens, seen, cache, keep=tokens.shape[-1] - 1)[:, :, 0]
        logp = log_softmax(logits, temperature)                                          # (E, rows, V)
        cdf = logp.exp().cumsum(-1)
        point = u[..., t].gather(1, rows).unsqueeze(-1) * cdf[..., -1:]
        tokens = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[-1] - 1)  # (E, rows, 1)
        ids[..., t].scatter_(1, rows, tokens[..., 0])
        chosen[..., t].scatter_(1, rows, logp.gather(-1, tokens)[..., 0])
        alive &= tokens[..., 0] != eos
        left = int(alive.sum(1).max())
        if left == 0:
            break
        if E * alive.shape[1] >= DROP_FROM and left <= DROP_AT * alive.shape[1]:
            kept = alive.byte().argsort(dim=1, descending=True, stable=True)[:, :left]
            alive, rows, tokens = alive.gather(1, kept), rows.gather(1, kept), tokens.gather(1, kept.unsqueeze(-1))
            mask = None if mask is None else mask.gather(1, kept.unsqueeze(-1).expand(-1, -1, P + T))
            cache = forward.cache_of(cache, kept)
    ids, chosen = ids[..., :t + 1], chosen[..., :t + 1]                                  # (E, B, T)
    ends = ids == eos
    after = ends.cumsum(-1) - ends.long() > 0  # what a completion was given after its EOS is forgotten
    return Rollout(prompts, ids.masked_fill(after, pad), (~after).long(), chosen.masked_fill(after, 0))


def join_rollouts(prompts: Prompts, fill: int, parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of parts of the prompts as one, as long as the longest; the inverse of `Rollout.split`."""
    T = max(part.ids.shape[-1] for part in parts)
    ids, mask, logp = (
        torch.cat([F.pad(tensor, (0, T - tensor.shape[-1]), value=value) for tensor in tensors], 1)
        for value, tensors in ((fill, [p.ids for p in parts]), (0, [p.mask for p in parts]),
                               (0.0, [p.logprobs for p in parts])))
    return Rollout(prompts, ids, mask, logp)


def completion_input(rollout: Rollout) -> tuple[Tensor, Tensor | None]:
    """Ids and mask (E, B, P + T − 1) of prompts and completions, in which position P − 1 + t chooses token t."""
    prompts = rollout.prompts
    ids = torch.cat([prompts.ids, rollout.ids[..., :-1]], -1)
    mask = None
    if (prompts.mask == 0).any():
        # what follows EOS is never looked at by what is scored, so it may count as tokens
        mask = torch.cat([prompts.mask, torch.ones_like(rollout.ids[..., :-1])], -1)
    return ids, mask


def completion_logits(forward, weights, rollout: Rollout) -> Tensor:
    """The logits (E, B, T, V) from which each completion token was chosen, in one forward."""
    ids, mask = completion_input(rollout)
    return forward(weights, ids, mask, keep=rollout.prompts.ids.shape[-1] - 1)


def logprobs(forward, weights, rollout: Rollout, temperature: float = 1.0, chunk: int = 0) -> Tensor:
    """Log-probability (E, B, T) of each completion token in nats, 0 after EOS; differentiable.

    With a `chunk` the logits of so many tokens of a policy exist at once, and are computed again for the
    gradient: the same numbers in less memory.
    """
    if not chunk:
        logits = completion_logits(forward, weights, rollout)
        return chosen_logprobs(logits, rollout.ids, temperature) * rollout.mask
    ids, mask = completion_input(rollout)
    hidden = forward.hidden(weights, ids, mask)[:, :, rollout.prompts.ids.shape[-1] - 1:]           # (E, B, T, C)

    def of_chunk(x, ids):
        return chosen_logprobs(forward.head(weights, x), ids, temperature)

    logp = [checkpoint(of_chunk, x, ids, use_reentrant=False, preserve_rng_state=False) for x, ids in zip(
        hidden.flatten(1, 2).split(chunk, 1), rollout.ids.flatten(1, 2).split(chunk, 1))]           # (E, chunk) each
    return torch.cat(logp, 1).view(rollout.ids.shape) * rollout.mask


def chosen_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (…) of the tokens ids (…) at logits (…, V), in nats."""
    return log_softmax(logits, temperature).gather(-1, ids.unsqueeze(-1))[..., 0]


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature, in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _any_tensor(weights) -> Tensor:
    return next(tensor for tensor in weights.values() if isinstance(tensor, Tensor))


def parameters(model) -> dict[str, Tensor]:
    """The weights of a module by name, detached, tied ones once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def stack(states: Sequence[Weights], device=None) -> dict[str, Tensor]:
    """E state dicts as one with a leading axis E, on a device if one is named."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


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

    Raises ValueError, naming the folder, when it is missing, cannot be read or lacks weights, and when a
    name of the hub cannot be had (see `hub.reach`).
    """
    folder = local(str(name_or_folder))
    with reading("a policy", folder) as options:
        tokenizer = load_tokenizer(folder, **options)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")  # the library makes up one without words
        model = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder!r} has no EOS token; completions could not end")
    return model.to(device).eval(), tokenizer


def pick_device(name) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU where there is none.

    Raises ValueError for a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"the device {str(name)!r} cannot be used: {first_line(error)}; "
                         "'auto' takes the first GPU, or the CPU where there is none") from error


@contextmanager
def reading(what: str, folder: str):
    """Read a folder of the library's quietly; whatever is raised becomes a ValueError of one line that names it.

    Gives the options to load it with. A name of the hub is asked for first, so that nothing waits in vain.
    """
    try:
        path = Path(folder)
        if path.is_file():
            raise ValueError("it is a file, not a folder")
        if not path.exists() and not HUB_NAME.fullmatch(folder):
            raise ValueError("there is no such folder")
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError("the folder has no config.json")
        options = reach(folder)
        with quiet():
            yield options
    except Exception as error:  # the library, its config checks, safetensors and tokenizers raise classes of their own
        hint = "; is a file truncated?" if "safetensor" in repr(type(error)).lower() else ""
        raise ValueError(f"cannot load {what} from {folder!r}: {first_line(error)}{hint}") from error


PROBE = "It isn't  the film\u2019s plot I'd seen in 2024:\n\n\tna\u00efve, 12345 E\u0301T\u00c9! f(x):\n    return"


def load_tokenizer(folder: str, **options):
    """The tokenizer of a folder, which splits text as its own tokenizer.json says.

    The library rebuilds the tokenizers of some architectures by rules of its own whatever the file
    says (a Llama tokenizer in a Qwen 2 folder, say), and the policy would read other tokens than it was
    trained on. Where that is so the file is followed, and a line on stderr says so.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    if type(tokenizer) is PreTrainedTokenizerFast:  # which reads the file and adds nothing
        return tokenizer
    if cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options) is None:
        return tokenizer
    as_saved = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
    library, saved = (t(PROBE, add_special_tokens=False)["input_ids"] for t in (tokenizer, as_saved))
    if library == saved:
        return tokenizer
    print(f"warp-lite: the library would read the tokenizer in {folder} as a {type(tokenizer).__name__}, which splits "
          "text otherwise than its tokenizer.json; the file is followed (elsewhere: PreTrainedTokenizerFast)",
          file=sys.stderr)
    return as_saved


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
