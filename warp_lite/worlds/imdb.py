"""Film reviews with real models from the hub: GPT-2 or Gemma 3, a sentiment classifier, the IMDB reviews.

The policy continues the first tokens of a review, and the reward is the classifier's logit for a
positive one. GPT-2 comes fine-tuned on the reviews; Gemma is fine-tuned here, briefly, and cached.
Nothing here knows the truth, so there is no gold reward.

Every repository may be a folder instead: by $WARP_LITE_HUB (see `hub.local`), or in the settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..averaging.state_dicts import parameters
from ..policies.hub import local, reach
from ..policies.loading import load_policy, save_policy
from ..policies.prompts import opening_ids, pad_right
from ..policies.randomness import WORLD, generator
from ..rewards.loading import load_reward
from ..storage.files import beside, first_line
from ..storage.provenance import cache_folder, json_hash, writable_cache
from ..storage.tensors import weights_hash
from ..task import World


@dataclass(frozen=True)
class ImdbSettings:
    """Where policy, classifier and reviews come from, and how a policy is fine-tuned on the reviews.

    `data` is a data set with a column `text`, as `datasets.load_dataset` reads it: a repository or a
    folder. `sft_steps` 0 takes the policy as it is.
    """

    policy: str = "lvwerra/gpt2-imdb"
    reward: str = "lvwerra/distilbert-imdb"
    data: str = "stanfordnlp/imdb"
    train_prompts: int = 1024
    eval_prompts: int = 64
    prompt_tokens: int = 8
    sft_steps: int = 0
    sft_batch: int = 8
    sft_tokens: int = 64
    sft_lr: float = 2e-5
    seed: int = 0


IMDB = {"gpt2-imdb": ImdbSettings(), "gemma-imdb": ImdbSettings(policy="google/gemma-3-270m", sft_steps=300)}


def imdb_world(settings: ImdbSettings, progress: bool = True, device: str | torch.device = "cpu") -> World:
    """The world with those settings. Raises ValueError in one line for what cannot be had."""
    reward = load_reward(settings.reward, device)
    model, tokenizer = load_policy(settings.policy, device=device)
    wanted = settings.train_prompts + settings.eval_prompts
    texts = read_reviews(settings.data, 2 * wanted + settings.sft_steps * settings.sft_batch, settings.seed)
    prompts, unused = openings(tokenizer, texts, wanted, settings.prompt_tokens)
    held_out = prompts[:settings.eval_prompts * len(prompts) // wanted]
    folder = None
    if settings.sft_steps:
        model, folder = fine_tuned(model, tokenizer, unused, settings, progress)
    world = World.of(model, tokenizer, reward, prompts[len(held_out):], held_out)
    world.folder = folder
    return world


def read_reviews(name: str, count: int, seed: int = 0) -> list[str]:
    """That many texts of a data set, or all where there are fewer, in an order of their own, without line breaks.

    The data set is sorted by sentiment, so it is read whole. Raises ValueError in one line.
    """
    try:
        from datasets import DownloadConfig, disable_progress_bars, load_dataset
    except ImportError as error:
        raise ValueError("the reviews are read by `datasets`, which is not installed: "
                         "pip install 'warp-lite[hub]'") from error
    name = local(name)
    try:
        options = reach(name, "dataset")
        disable_progress_bars()
        rows = load_dataset(name, split="train", download_config=DownloadConfig(max_retries=1, **options))
    except Exception as error:  # the library, the hub and the readers of files raise classes of their own
        raise ValueError(f"cannot load the reviews from {name!r}: {first_line(error)}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"the reviews in {name!r} have no column 'text'; it has {', '.join(rows.column_names)}")
    order = generator(seed, 0, WORLD).permutation(len(rows))[:count]
    return [" ".join(text.replace("<br />", " ").split()) for text in rows.select(order)["text"]]


def openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int,
             tokens: int) -> tuple[list[str], list[str]]:
    """The first `tokens` tokens of `count` texts, as texts, each once, and the texts that were not used.

    A text that is shorter, or whose beginning reads otherwise when it stands alone, is passed over.
    Raises ValueError for fewer than ten.
    """
    beginnings: dict[str, None] = {}
    unread = iter(texts)
    for text in unread:
        ids = tokenizer(text[:40 * tokens], add_special_tokens=False)["input_ids"]
        opening = tokenizer.decode(ids[:tokens])
        if len(ids) > tokens and tokenizer(opening, add_special_tokens=False)["input_ids"] == ids[:tokens]:
            beginnings[opening] = None
        if len(beginnings) == count:
            break
    if len(beginnings) < 10:
        raise ValueError(f"only {len(beginnings)} of {len(texts)} reviews have an opening of {tokens} tokens; "
                         "ten are needed: give more or longer reviews")
    return list(beginnings), list(unread) or list(texts)


def fine_tuned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: ImdbSettings,
               progress: bool = True) -> tuple[PreTrainedModel, Path]:
    """The policy after a short SFT on the texts, and its folder: from the cache, or trained and written there.

    Raises ValueError where the cache cannot be written.
    """
    names = [field.name for field in dataclasses.fields(settings) if field.name.startswith("sft_")]
    key = [{name: getattr(settings, name) for name in names}, settings.seed, list(texts),
           weights_hash(parameters(model))]
    folder = cache_folder() / f"imdb-{json_hash(key)[:12]}"
    if not is_tuned(folder):
        writable_cache()
        with torch.random.fork_rng():  # dropout, where the architecture has any
            torch.manual_seed(settings.seed)
            train_on_texts(model, tokenizer, texts, settings, progress)
        with beside(folder, stays=is_tuned) as made:  # the same may be trained meanwhile by another process
            save_policy(model, tokenizer, made / "sft")
    return load_policy(folder / "sft", device=model.device)[0], folder


def is_tuned(folder: Path) -> bool:
    """Whether a folder holds a fine-tuned policy that is whole."""
    return (folder / "sft" / "config.json").is_file()


def train_on_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str],
                   settings: ImdbSettings, progress: bool = True) -> list[float]:
    """Next-token cross-entropy on the first `sft_tokens` tokens of texts, in place; the loss of each step, in nats a
    token.

    A text that is shorter ends with EOS. The texts are taken in turn, from the start again where they run out.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
    longest = min(settings.sft_tokens, getattr(model.config, "max_position_embeddings", settings.sft_tokens))
    losses = []
    steps = tqdm(range(settings.sft_steps), desc="SFT policy", unit="step", disable=None if progress else True,
                 leave=False)
    for step in steps:
        batch = [texts[(step * settings.sft_batch + i) % len(texts)] for i in range(settings.sft_batch)]
        rows = [[*ids, tokenizer.eos_token_id][:longest] for ids in opening_ids(tokenizer, batch)]
        ids, mask = (part.to(model.device) for part in pad_right(rows, tokenizer.eos_token_id))
        logits = model(ids[:, :-1], use_cache=False).logits
        real = mask[:, 1:].bool()
        loss = F.cross_entropy(logits[real].float(), ids[:, 1:][real])
        for group in optimizer.param_groups:
            group["lr"] = settings.sft_lr * min(1, (step + 1) / 20) * (1 - step / settings.sft_steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        steps.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
    model.eval()
    return losses
