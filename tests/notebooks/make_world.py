"""A folder that holds a small world: the tiny policy, a random classifier as its reward, forty prompts.

No gold reward and no held-out texts: what every notebook must do without.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from warp_lite.policies.loading import quiet


def make_world(tiny, folder: Path) -> Path:
    """Write such a world into `folder`, from the tiny world `tiny` of `reviews_world`."""
    shutil.copytree(tiny.folder / "sft", folder / "policy")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        torch.manual_seed(0)
        classifier = DistilBertForSequenceClassification(DistilBertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2,
            num_labels=2, dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id))
        classifier.save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
    lines = [json.dumps({"prompt": prompt}) for prompt in tiny.prompts.given[:40]]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
