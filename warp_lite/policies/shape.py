"""The sizes of a causal LM, whatever its config calls them and wherever it keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Sizes by which memory and time are estimated, in numbers: `inner` is the feed-forward's width, `vocabulary` that
    of the logits. A model without attention has 0 `heads`."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int


def shape_of(model: PreTrainedModel) -> Shape:
    """The sizes of a causal LM, of the text's part where it reads pictures, too; the largest where layers differ."""
    config = model.config.get_text_config()
    width = _size(config, "hidden_size") or model.get_input_embeddings().embedding_dim
    heads = _size(config, "num_attention_heads")
    return Shape(
        width=width, layers=_size(config, "num_hidden_layers") or 1, heads=heads,
        kv_heads=_size(config, "num_key_value_heads") or heads,
        head_size=_size(config, "head_dim") or width // max(1, heads),
        inner=_size(config, "intermediate_size") or 4 * width,
        vocabulary=_size(config, "vocab_size") or model.get_input_embeddings().num_embeddings)


def _size(config, name: str) -> int:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # configs whose layers differ ask to be read layer by layer
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max([number for number in (value if isinstance(value, (list, tuple)) else [value]) if number], default=0)
