"""Where a completion ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's EOS, and every one of the model's own.

    Chat models end their turns by ids that `generation_config.eos_token_id`, a number or a list, names beside
    the tokenizer's EOS (Gemma's <end_of_turn>, Llama 3's <|eot_id|>), as the library's `generate` ends them. An id
    without an embedding is never sampled and is left out: GPT-2's config says 50256 for any vocabulary.
    Raises ValueError where there is none, and for an `eos_token_id` that is neither an id nor several.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        ids += several_ids(getattr(config, "eos_token_id", None))
    size = model.get_input_embeddings().num_embeddings
    ids = tuple(dict.fromkeys(token for token in ids if 0 <= token < size))
    if not ids:
        raise ValueError("neither the policy nor its tokenizer has an EOS token, so completions could not end; set "
                         "generation_config.eos_token_id of the policy, or eos_token of the tokenizer")
    return ids


def several_ids(eos: object) -> list[int]:
    """What a config has as `eos_token_id` as a list: None, an id, or several in a list, array or tensor. Raises
    ValueError for anything else."""
    plain = eos.tolist() if hasattr(eos, "tolist") else eos
    ids = list(plain) if isinstance(plain, (list, tuple)) else [plain]
    if ids == [None]:
        return []
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id of the policy is {eos!r}; it must be an id or a list of ids")
    return ids
