"""Prompts and texts as token ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..storage.files import first_line
from ..storage.prompt_sources import prompt_columns
from .attention import position_limit
from .ends import end_ids
from .messages import render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], room: int | None = None,
                 end: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts and the one `end` of each (default: the tokenizer's EOS) as ids (N, S), padded on the right, and their
    mask.

    Raises ValueError for no texts and for one of more than `room` tokens.
    """
    if not len(texts):
        raise ValueError("there are no texts to measure the perplexity of; give at least one, or None")
    end = tokenizer.eos_token_id if end is None else end
    rows = [row if row[-1:] == [end] else [*row, end] for row in opening_ids(tokenizer, list(texts))]
    for i, row in enumerate(rows):
        if room is not None and len(row) > room:
            raise ValueError(f"text {i} has {len(row)} tokens, EOS included, of which {room} fit: "
                             f"{texts[i][:60]!r}; shorten it")
    return pad_right(rows, 0)


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
        """Prompts start … end − 1 of each of E policies, from ids (E, B, P)."""
        B = self.ids.shape[1]
        chosen = [e * B + b for e in range(len(self.ids)) for b in range(start, min(end, B))]
        columns = {name: [values[i] for i in chosen] for name, values in self.columns.items()}
        texts, given = ([values[i] for i in chosen] for values in (self.texts, self.given))
        return Prompts(texts, self.ids[:, start:end], self.mask[:, start:end], columns, given)

    def repeat(self, policies: int) -> Prompts:
        """The same prompts, ids (B, P), for each of E policies, (E, B, P)."""
        columns = {name: values * policies for name, values in self.columns.items()}
        ids, mask = (part.expand(policies, -1, -1) for part in (self.ids, self.mask))
        return Prompts(self.texts * policies, ids, mask, columns, self.given * policies)

    def to(self, device: str | torch.device) -> Prompts:
        """The same prompts, ids and mask on a device."""
        return Prompts(self.texts, self.ids.to(device), self.mask.to(device), self.columns, self.given)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: object, room: int | None = None) -> Prompts:
    """Tokenise and left-pad prompts (see `prompt_columns` for what may hold them).

    A prompt may be a conversation as in TRL, a list of {"role", "content"}; the tokenizer's chat
    template turns it into text. `room` is the number of tokens that prompt and completion may take
    together, less the completion. Raises ValueError for no prompts, one that is empty or no sound
    text, or one that leaves no room for a completion, and for conversations without a template;
    TypeError for a prompt that is neither text nor conversation.
    """
    given, columns = prompt_columns(prompts)
    if not given:
        raise ValueError("there are no prompts; give at least one")
    if is_conversation(given[0]):
        texts = conversation_texts(tokenizer, given, columns)
    else:
        texts = given
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {i} is {type(text).__name__}, not str: {str(text)[:60]!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"prompt {i} has half a character (a surrogate) in it, which no tokenizer reads: "
                             f"{text[:60]!r}")
    if texts is given:
        rows = opening_ids(tokenizer, texts)
    else:  # a conversation's template has written the special tokens
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
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


def opening_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of texts that something follows: with the one BOS of a tokenizer that adds it, and without EOS.

    A text that begins with BOS, as one that a chat template rendered, gets no second. An EOS that the tokenizer
    appends to all that it reads is left out; one that is written in the text stays.
    """
    adds_bos, adds_eos = added_tokens(tokenizer)
    rows = tokenizer(texts)["input_ids"]
    if adds_bos:
        rows = [row[1:] if row[1:2] == [tokenizer.bos_token_id] else row for row in rows]
    return [row[:-1] for row in rows] if adds_eos else rows


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a tokenizer puts BOS in front of what it reads, and EOS behind it."""
    with_them, without = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and with_them[:1] == [bos] != without[:1]
    adds_eos = eos is not None and with_them[-1:] == [eos] != without[-1:]
    return adds_bos, adds_eos


def without_bos(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """Texts as a tokenizer that adds BOS wants them: without one of their own in front."""
    return [text.removeprefix(tokenizer.bos_token) for text in texts] if added_tokens(tokenizer)[0] else texts


def reading_prompts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that reads prompts as `opening_ids` does, for a library that calls it with nothing but texts.

    It is a copy; where nothing is read otherwise, the tokenizer itself.
    """
    if not any(added_tokens(tokenizer)):
        return tokenizer

    class PromptTokenizer(type(tokenizer)):
        def __call__(self, text=None, **options):
            if isinstance(text, list) and not options:
                return {"input_ids": opening_ids(tokenizer, text)}
            return super().__call__(text, **options)

    reader = copy.copy(tokenizer)
    reader.__class__ = PromptTokenizer
    return reader


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is a list of messages and not a text."""
    return isinstance(prompt, list)


def conversation_texts(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]],
                       columns: Mapping[str, list] | None = None) -> list[str]:
    """Conversations as the texts that the chat template makes of them, up to where the assistant begins.

    As TRL's `apply_chat_template`: where the last message is the assistant's it is what the completion goes on with,
    and the `columns` "tools" and "chat_template_kwargs" are the template's.
    Raises TypeError for a message that is none, ValueError where there is no template or it fails.
    """
    if tokenizer.chat_template is None:
        raise ValueError("prompt 0 is a conversation, but the policy's tokenizer has no chat template; "
                         "set tokenizer.chat_template, or give prompts as text")
    nothing = [None] * len(conversations)
    tools, options = ((columns or {}).get(name, nothing) for name in ("tools", "chat_template_kwargs"))
    texts = []
    for i, messages in enumerate(conversations):
        if not is_conversation(messages) or not messages or not all(
                isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise TypeError(f"prompt {i} is no list of messages with a \"role\" and a \"content\": "
                            f"{str(messages)[:60]!r}")
        begun = messages[-1]["role"] == "assistant"
        try:
            texts.append(render(
                tokenizer, messages, add_generation_prompt=not begun, continue_final_message=begun,
                tools=(json.loads(tools[i]) if isinstance(tools[i], str) else tools[i]) or None, **(options[i] or {})))
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses prompt {i}: {first_line(error)}") from error
    return texts


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """Raise ValueError if a prompt, or what pads and ends, has an id that the model has no embedding for, and where
    nothing ends a completion."""
    size = model.get_input_embeddings().num_embeddings
    way_out = "are tokenizer and model of one checkpoint? else model.resize_token_embeddings(len(tokenizer))"
    for what, token in (("EOS", tokenizer.eos_token_id), ("padding", pad_id(tokenizer))):
        if token is not None and token >= size:
            raise ValueError(f"the tokenizer's {what} token {tokenizer.convert_ids_to_tokens(token)!r} has the id "
                             f"{token}, and the policy has {size} embeddings; {way_out}")
    end_ids(model, tokenizer)
    beyond = (prompts.ids >= size).nonzero()
    if len(beyond):
        i, token = beyond[0][-2].item(), prompts.ids[tuple(beyond[0])].item()
        raise ValueError(f"prompt {i} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, "
                         f"and the policy has {size} embeddings; {way_out}")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch: the pad token, or EOS, or 0 where there is none (all are masked by position)."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def room_for_prompts(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have; None where the architecture sets no limit.

    Raises ValueError where not even one fits.
    """
    limit = position_limit(model)
    if limit is not None and max_new_tokens >= limit:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but the policy has {limit} positions for prompt and "
                         "completion together; lower it")
    return None if limit is None else limit - max_new_tokens


def ended_ids(tokenizer: PreTrainedTokenizerBase, completions: Sequence[str]) -> list[list[int]]:
    """Completions as ids, each with the EOS that ends it."""
    return [[*row, tokenizer.eos_token_id] for row in
            tokenizer(list(completions), add_special_tokens=False)["input_ids"]]


def pad_right(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Lists of ids as a tensor (N, S), filled up with `fill`, and its mask (N, S), 1 for tokens."""
    width = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, :len(row)] = 1
    return ids, mask
