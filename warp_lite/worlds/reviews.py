"""The tiny world: film reviews from a small grammar, an SFT policy, a reward model, and the truth.

Nothing is downloaded: the reviews come from a probabilistic grammar and a seed, the policy is a
real GPT-2 or Gemma 3 of some 100k parameters, and the reward model is trained on noisy
preferences between its samples. The gold reward is known by construction, so that
over-optimisation of the reward model can be seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..policies.ends import end_ids
from ..policies.loading import load_policy, save_policy
from ..policies.prompts import Prompts, encode_prompts, pad_right
from ..policies.randomness import WORLD, generator
from ..policies.sampling import Policies
from ..rewards.bradley_terry import BradleyTerry, train_bradley_terry
from ..storage.files import beside, read_json, write_json
from ..storage.provenance import cache_folder, writable_cache
from ..task import World
from .grammar import MAX_COMPLETION, TASTES, GoldReward, make_tokenizer, prompt_texts, reviews


@dataclass(frozen=True)
class ReviewsSettings:
    """What the artefacts of the tiny world depend on; their hash names the cached folder.

    `taste` is what the gold reward pays for. `reward_seed` gives another reward model, of other
    samples and other noise in the preferences, to the same SFT policy.
    """

    architecture: str = "gpt2"
    seed: int = 0
    width: int = 64
    layers: int = 2
    heads: int = 4
    sft_steps: int = 300
    sft_batch: int = 128
    sft_lr: float = 3e-3
    pairs: int = 4000
    reward_epochs: int = 2
    reward_lr: float = 1e-3
    label_noise: float = 1.0
    eval_prompts: int = 64
    taste: str = "sentiment"
    reward_seed: int = 0
    version: int = 1

    def __post_init__(self):
        if self.architecture not in ("gpt2", "gemma3"):
            raise ValueError(f"architecture must be gpt2 or gemma3, not {self.architecture!r}")
        if self.taste not in TASTES:
            raise ValueError(f"taste must be one of {', '.join(TASTES)}, not {self.taste!r}")


def reviews_world(architecture: str = "gpt2", seed: int = 0, progress: bool = True,
                  **settings: str | int | float) -> World:
    """The tiny world with those settings, by the names of `ReviewsSettings`: from the cache, or trained now (half a
    minute on 2 cores).

    Raises TypeError for a setting that there is none of, ValueError for a value that is none of its own, and where the
    cache cannot be written.
    """
    settings = ReviewsSettings(architecture=architecture, seed=seed, **settings)
    folder = cache_folder() / f"reviews-{settings_hash(settings)}"
    if not is_built(folder):
        writable_cache()
        build(settings, folder, progress)
    model, tokenizer = load_policy(folder / "sft")
    facts = json.loads((folder / "world.json").read_text())
    train, held_out = split_prompts(settings)
    texts = reviews(generator(settings.seed, 2, WORLD), 512)
    gold = GoldReward(tokenizer, facts["gold_mean"], facts["gold_std"], settings.taste, end_ids(model, tokenizer))
    reward = BradleyTerry.load(folder / "reward")
    world = World.of(model, tokenizer, reward, train, held_out, gold=gold, texts=texts, max_new_tokens=MAX_COMPLETION)
    world.folder, world.facts, world.eval_seed = folder, facts, seed  # else worlds would share the noise of measuring
    return world


def settings_hash(settings: ReviewsSettings) -> str:
    """A short name for a dataclass of settings, 12 hexadecimal digits; the same for the same values."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_prompts(settings: ReviewsSettings) -> tuple[list[str], list[str]]:
    """Training and held-out prompts, disjoint, in an order by the seed."""
    texts = prompt_texts()
    order = generator(settings.seed, 0, WORLD).permutation(len(texts))
    held_out = settings.eval_prompts
    return [texts[i] for i in order[held_out:]], [texts[i] for i in order[:held_out]]


# --- training the artefacts ------------------------------------------------------------------


def make_model(settings: ReviewsSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A policy of the tiny world's size and architecture, with random weights by the seed."""
    torch.manual_seed(settings.seed)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if settings.architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(
            n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads, n_positions=48,
            activation_function="gelu_pytorch_tanh", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **ids))
    return Gemma3ForCausalLM(Gemma3TextConfig(
        hidden_size=settings.width, num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        num_key_value_heads=1, head_dim=settings.width // settings.heads, intermediate_size=3 * settings.width,
        query_pre_attn_scalar=settings.width // settings.heads, sliding_window=32, max_position_embeddings=48, **ids))


def sft_policy(settings: ReviewsSettings, tokenizer: PreTrainedTokenizerBase, folder: Path,
               progress: tqdm | None = None) -> tuple[PreTrainedModel, float]:
    """The SFT policy of those settings and its loss in nats a token: from `folder`, where another world with the same
    language has trained it, or trained now and kept there. `progress` advances by the steps of its training."""
    if (folder / "sft.json").is_file():
        if progress is not None:
            progress.update(settings.sft_steps)
    else:
        model = make_model(settings, tokenizer)
        model.config.pad_token_id = None  # while it trains: the library would warn of padding on the right
        loss = train_sft(model, tokenizer, settings, progress)
        model.config.pad_token_id = tokenizer.pad_token_id
        with beside(folder, stays=lambda there: (there / "sft.json").is_file()) as made:
            save_policy(model, tokenizer, made)
            write_json(made / "sft.json", {"loss": loss})
    return load_policy(folder)[0], read_json(folder / "sft.json")["loss"]


def sft_hash(settings: ReviewsSettings) -> str:
    """The hash of those settings that the SFT policy depends on: the others at their defaults."""
    of_reward = ("pairs", "reward_epochs", "reward_lr", "label_noise", "eval_prompts", "taste", "reward_seed")
    defaults = {field.name: field.default for field in dataclasses.fields(settings) if field.name in of_reward}
    return settings_hash(dataclasses.replace(settings, **defaults))


def train_sft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ReviewsSettings,
              progress: tqdm | None = None) -> float:
    """Next-token cross-entropy on fresh reviews, in place; returns the mean loss of the last 20 steps in nats a token.

    `progress` advances by one at every step.
    """
    rng = generator(settings.seed, 1, WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.sft_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / 20) * max(0.02, 1 - t / settings.sft_steps))
    losses = []
    for _ in range(settings.sft_steps):
        texts = [f"{text} <eos>" for text in reviews(rng, settings.sft_batch)]
        ids, mask = pad_right(tokenizer(texts)["input_ids"], tokenizer.pad_token_id)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:].bool()], ids[:, 1:][mask[:, 1:].bool()])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress.update()
    model.eval()
    return float(np.mean(losses[-20:]))


def sft_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], count: int,
                key: tuple[int, ...]) -> tuple[Prompts, Tensor, Tensor]:
    """`count` completions of the SFT policy on prompts drawn at random: (Prompts, ids, mask), both (count, T).

    `key` seeds prompts and tokens.
    """
    rng = generator(*key)
    encoded = encode_prompts(tokenizer, [prompts[i] for i in rng.integers(len(prompts), size=count)])
    policies = Policies.of(model)
    ids = torch.full((count, MAX_COMPLETION), tokenizer.pad_token_id)
    mask = torch.zeros(count, MAX_COMPLETION, dtype=torch.long)
    for start in range(0, count, 500):
        rows = np.arange(start, min(start + 500, count))
        uniforms = torch.from_numpy(rng.random((1, len(rows), MAX_COMPLETION)))
        out = policies.sample(encoded.batch(rows[None]), uniforms, tokenizer)
        width = out.ids.shape[-1]
        ids[rows, :width], mask[rows, :width] = out.ids[0], out.mask[0]
    return encoded, ids, mask


def stream(settings: ReviewsSettings, use: int) -> tuple[int, ...]:
    """The key of the random numbers that the reward model depends on."""
    return (settings.seed, use + 10 * settings.reward_seed, WORLD)


def build(settings: ReviewsSettings, folder: Path, progress: bool = True) -> None:
    """Train the SFT policy and the reward model and write them to `folder`, whole or not at all.

    The SFT policy is kept beside it for the worlds that differ in their reward alone: two tastes share one.
    Raises CannotWrite or OSError where that cannot be written.
    """
    tokenizer = make_tokenizer()
    pair_steps = settings.reward_epochs * -(-settings.pairs // 64)
    with tqdm(total=settings.sft_steps + pair_steps, desc="tiny world", disable=None if progress else True) as bar:
        bar.set_description("SFT policy")
        model, loss = sft_policy(settings, tokenizer, folder.parent / f"reviews-sft-{sft_hash(settings)}", bar)
        bar.set_description("reward model")
        train_prompts, _ = split_prompts(settings)
        prompts, ids, mask = sft_samples(model, tokenizer, train_prompts, 2 * settings.pairs, stream(settings, 3))
        gold = GoldReward(tokenizer, taste=settings.taste).from_ids(prompts, ids, mask)
        full, full_mask = torch.cat([prompts.ids, ids], -1), torch.cat([prompts.mask, mask], -1)
        trunk = AutoModel.from_config(model.config)
        trunk.load_state_dict(model.base_model.state_dict())
        reward = BradleyTerry(trunk, tokenizer)
        rng = generator(*stream(settings, 4))
        half = settings.pairs
        better = (gold[:half] - gold[half:]).numpy() + rng.logistic(scale=settings.label_noise, size=half) > 0
        first, second = np.arange(half), np.arange(half, 2 * half)
        chosen, rejected = np.where(better, first, second), np.where(better, second, first)
        train_bradley_terry(
            reward, (full[chosen], full_mask[chosen]), (full[rejected], full_mask[rejected]),
            epochs=settings.reward_epochs, lr=settings.reward_lr, seed=settings.seed, progress=bar)
    prompts, ids, mask = sft_samples(model, tokenizer, train_prompts, 4000, (settings.seed, 5, WORLD))
    gold = GoldReward(tokenizer, taste=settings.taste).from_ids(prompts, ids, mask)
    proxy = reward.from_ids(prompts, ids, mask)
    reward.mean, reward.std = proxy.mean().item(), proxy.std().item()
    gold_gap, proxy_gap = gold[:2000] - gold[2000:], proxy[:2000] - proxy[2000:]
    decided = gold_gap != 0
    facts = {
        "settings": dataclasses.asdict(settings), "sft_loss": loss, "gold_mean": gold.mean().item(),
        "gold_std": gold.std().item(),
        "pair_accuracy": ((gold_gap > 0) == (proxy_gap > 0))[decided].float().mean().item(),
        "correlation": torch.corrcoef(torch.stack([gold, proxy]))[0, 1].item(),
    }
    with beside(folder, stays=is_built) as made:  # the same world may be built meanwhile by another process
        save_policy(model, tokenizer, made / "sft")
        reward.save(made / "reward")
        write_json(made / "world.json", facts)


def is_built(folder: Path) -> bool:
    """Whether a folder holds a tiny world that is whole."""
    return (folder / "world.json").is_file()
