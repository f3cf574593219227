"""Conversations as text: messages whose content is a text, or parts as multimodal data sets have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def content_text(message: dict) -> str:
    """The text of a message: its content, that of its text parts joined, or nothing where the content is None.

    Raises ValueError for a part that is no text.
    """
    content = message["content"]
    if not isinstance(content, list):
        return "" if content is None else content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"a message of role {message.get('role')!r} has a part of type {kind!r}: only texts, "
                             '{"type": "text", "text": …}, can be read')
    return "".join(part["text"] for part in content)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], **options: object) -> str:
    """A conversation as the tokenizer's chat template writes it; `options` are those of `apply_chat_template`.

    Where a content has parts, the template is given them, and if it is one for texts, which fails on parts or
    writes them as a list of Python's, their texts joined. Raises ValueError for parts that are no text, and
    whatever the template raises.
    """
    texts = [content_text(message) for message in messages]
    if not any(isinstance(message["content"], list) for message in messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    parts = [part["text"].strip() for message in messages if isinstance(message["content"], list)
             for part in message["content"]]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if all(part in whole for part in parts) and "'type': 'text'" not in whole and '"type": "text"' not in whole:
            return whole
    except Exception:  # templates raise what they like
        pass
    plain = [{**message, "content": text} if isinstance(message["content"], list) else message
             for message, text in zip(messages, texts)]
    return tokenizer.apply_chat_template(plain, tokenize=False, **options)
