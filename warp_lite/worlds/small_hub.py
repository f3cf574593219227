"""A hub in a folder: small repositories of the structure of the real ones, for where there is no network or GPU.

The policies are those of the tiny world, the classifier is a DistilBERT trained in seconds to tell good
reviews from bad ones, and the reviews come from the tiny world's grammar. With $WARP_LITE_HUB set to the
folder, everything that names a repository of the hub finds these in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..policies.loading import save_policy
from ..policies.randomness import WORLD, generator
from ..storage.files import beside
from ..storage.provenance import writable_cache
from .grammar import WORDS, make_tokenizer, review
from .imdb import IMDB
from .reviews import reviews_world

ARCHITECTURES = {"gpt2-imdb": "gpt2", "gemma-imdb": "gemma3"}
REVIEWS = 3000


def make_small_hub(folder: str | Path, worlds: Sequence[str] = ("gpt2-imdb",), progress: bool = True) -> Path:
    """Write the repositories that these worlds of the hub name into a folder; what is there already stays. Returns it.

    Raises KeyError for another world, OSError where the folder cannot be written.
    """
    folder = Path(folder)
    rng = generator(0, 6, WORLD)
    texts = [review(rng) for _ in range(REVIEWS)]
    for name in worlds:
        settings = IMDB[name]
        if not (folder / settings.policy).is_dir():
            world = reviews_world(ARCHITECTURES[name], progress=progress)
            with beside(folder / settings.policy, stays=Path.is_dir) as made:
                save_policy(world.policy, world.tokenizer, made)
        if not (folder / settings.reward).is_dir():
            with beside(folder / settings.reward, stays=Path.is_dir) as made:
                save_policy(*sentiment_classifier(texts), made)
        if not (folder / settings.data).is_dir():
            rows = [{"text": text, "label": sentiment_of(text)} for text in texts]
            rows.sort(key=lambda row: row["label"])
            with beside(folder / settings.data, stays=Path.is_dir) as made:
                made.mkdir()
                (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def use_small_hub(world: str, progress: bool = True) -> None:
    """From here on the repositories of a world are small ones, made once and kept in the cache; not where
    $WARP_LITE_HUB names others already."""
    if "WARP_LITE_HUB" not in os.environ:
        os.environ["WARP_LITE_HUB"] = str(make_small_hub(writable_cache() / "small-hub", [world], progress))


def sentiment_of(text: str) -> int:
    """1 for a review with more good words than bad ones, else 0."""
    signs = {word: 1 if state[-1] == "+" else -1 for state, words in WORDS.items() if state[-1] in "+-"
             for word in words.split()}
    return int(sum(signs.get(word, 0) for word in text.split()) > 0)


def sentiment_classifier(texts: Sequence[str], steps: int = 60,
                         batch: int = 64) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A DistilBERT of 20,000 parameters that tells good reviews from bad ones, with a tokenizer of its own."""
    words = make_tokenizer()
    words.backend_tokenizer.post_processor = None  # the classifier's texts begin with no <bos>
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token="<pad>",
                                        unk_token="<unk>", model_max_length=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DistilBertForSequenceClassification(DistilBertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, pad_token_id=tokenizer.pad_token_id,
            id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        chosen = [texts[(step * batch + i) % len(texts)] for i in range(batch)]
        inputs = tokenizer(chosen, padding=True, padding_side="right", return_tensors="pt")
        loss = F.cross_entropy(model(**inputs).logits, torch.tensor([sentiment_of(text) for text in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer
