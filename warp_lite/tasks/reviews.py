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
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from ..forward import make_forward
from ..policies import Prompts, encode_prompts, load_policy, parameters, sample, save_policy, stack
from ..randomness import WORLD, generator
from ..rewards import BradleyTerry, pad_right, train_bradley_terry

# The grammar: each state has words and the states that may follow, so the pairs of neighbouring
# words that it can produce are known exactly. A "+" or "-" at the end of a state is its sentiment.
WORDS = {
    "determiner": "this that the another",
    "kind": "new old long short french german quiet loud",
    "noun": "film movie comedy drama thriller sequel remake cartoon western musical documentary series",
    "was": "was",
    "adverb": "very really quite rather so",
    "adjective+": "great wonderful brilliant moving funny beautiful charming superb",
    "adjective-": "terrible awful boring dull weak silly horrible bland",
    "link": "and because .",
    "turn": "but",
    "the": "the",
    "aspect": "acting plot music ending script cast dialogue pacing",
    "i": "i",
    "verb+": "loved enjoyed admired",
    "verb-": "hated disliked regretted",
    "it": "it",
    "with": "with",
    "trait+": "great wonderful brilliant moving funny beautiful charming superb",
    "trait-": "terrible awful boring dull weak silly horrible bland",
    "stop": ".",
    "end": "<eos>",
}
FOLLOWS = {
    "determiner": "kind", "kind": "noun", "noun": "was",
    "was": "adverb adjective", "adverb": "adjective", "adjective": "link turn with stop",
    "link": "the i", "turn": "the i", "the": "aspect", "aspect": "was link turn with stop",
    "i": "verb", "verb": "the it", "it": "link turn with stop",
    "with": "trait", "trait": "aspect", "stop": "end",
}
# What nouns and kinds of film do to the odds of a good review (in logits): prompts matter.
NOUN_LOGIT = {"sequel": -0.8, "remake": -0.8, "musical": 0.5, "documentary": 0.5, "western": -0.4, "drama": 0.3}
KIND_LOGIT = {"long": -0.5, "loud": -0.4, "quiet": 0.4, "short": 0.3}
EMPHASIS = {"very": 1.5, "really": 1.5, "so": 1.3, "quite": 1.0, "rather": 0.7}
HEDGES = {"quite": 0.5, "rather": 0.5, "very": -0.5, "really": -0.5, "so": -0.5}
TASTES = ("sentiment", "detail")  # what the gold reward pays for
PROMPT_LENGTH = 5  # <bos> determiner kind noun was
MAX_COMPLETION = 24


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


@dataclass
class World:
    """A task ready to run: policy, tokenizer, rewards, prompts.

    `reward` is what RL sees and `gold` the truth, both in standard deviations of SFT
    samples. `train_prompts` and `eval_prompts` have no prompt in common. `texts` are
    held-out reviews, for perplexity. `folder` is where the artefacts are cached.
    """

    model: object
    tokenizer: object
    reward: BradleyTerry
    gold: GoldReward
    train_prompts: list[str]
    eval_prompts: list[str]
    texts: list[str]
    folder: Path | None
    facts: dict

    def to(self, device) -> World:
        """The same world with its policy and reward model on a device."""
        self.model.to(device)
        self.reward.to(device)
        return self


def reviews_world(architecture: str = "gpt2", seed: int = 0, progress: bool = True, **settings) -> World:
    """The tiny world with those settings, from the cache or trained now (half a minute on 2 cores)."""
    settings = ReviewsSettings(architecture=architecture, seed=seed, **settings)
    folder = cache_folder() / f"reviews-{settings_hash(settings)}"
    if not (folder / "world.json").is_file():
        build(settings, folder, progress)
    model, tokenizer = load_policy(folder / "sft")
    facts = json.loads((folder / "world.json").read_text())
    train, held_out = split_prompts(settings)
    texts = reviews(generator(settings.seed, 2, WORLD), 512)
    gold = GoldReward(tokenizer, facts["gold_mean"], facts["gold_std"], settings.taste)
    reward = BradleyTerry.load(folder / "reward")
    return World(model, tokenizer, reward, gold, train, held_out, texts, folder, facts)


def cache_folder() -> Path:
    """Where trained artefacts are kept: $WARP_LITE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("WARP_LITE_CACHE") or platformdirs.user_cache_dir("warp-lite"))


def settings_hash(settings) -> str:
    """A short name for settings; the same for the same values."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- the grammar -----------------------------------------------------------------------------


def review(rng: np.random.Generator) -> str:
    """One review: an opening and one to three clauses, with a sentiment that persists."""
    pick = {state: words.split() for state, words in WORDS.items()}

    def word(state):
        return pick[state][rng.integers(len(pick[state]))]

    kind, noun = word("kind"), word("noun")
    logit = -0.3 + NOUN_LOGIT.get(noun, 0) + KIND_LOGIT.get(kind, 0)
    good = rng.random() < 1 / (1 + np.exp(-logit))

    def sign():
        return "+" if good == (rng.random() < 0.85) else "-"

    def judgement():
        return ["was", *([word("adverb")] if rng.random() < 0.4 else []), word("adjective" + sign())]

    text = [word("determiner"), kind, noun, *judgement()]
    for _ in range(rng.integers(1, 4)):
        form = rng.random()
        if form < 0.2:
            text += ["with", word("trait" + sign()), word("aspect")]
            continue
        turn = rng.random() < 0.15
        text.append("but" if turn else word("link"))
        if turn:
            good = not good
        if form < 0.6:
            text += ["the", word("aspect"), *judgement()]
        elif form < 0.8:
            text += ["i", word("verb" + sign()), "the", word("aspect")]
        else:
            text += ["i", word("verb" + sign()), "it"]
    return " ".join([*text, "."])


def reviews(rng: np.random.Generator, count: int) -> list[str]:
    """That many reviews."""
    return [review(rng) for _ in range(count)]


def prompt_texts() -> list[str]:
    """Every opening that the grammar can produce: 4 × 8 × 12 = 384."""
    parts = [WORDS[state].split() for state in ("determiner", "kind", "noun")]
    return [f"{d} {k} {n} was" for d in parts[0] for k in parts[1] for n in parts[2]]


def split_prompts(settings: ReviewsSettings) -> tuple[list[str], list[str]]:
    """Training and held-out prompts, disjoint."""
    texts = prompt_texts()
    order = generator(settings.seed, 0, WORLD).permutation(len(texts))
    held_out = settings.eval_prompts
    return [texts[i] for i in order[held_out:]], [texts[i] for i in order[:held_out]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; every text begins with <bos>."""
    words = sorted({word for words in WORDS.values() for word in words.split()} - {"<eos>"})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False)


# --- the gold reward -------------------------------------------------------------------------


class GoldReward:
    """The truth: a taste, less one for each impossible pair of words, less one for a review that
    never ends; standardised by `mean` and `std` of SFT samples.

    The taste "sentiment" pays for the sentiment of the words, clamped to ±5; an adverb scales the
    adjective that follows it. "detail" pays one for each aspect of the film that is named, takes one
    back where it is named again, and pays for adverbs that hedge and against those that shout.
    """

    def __init__(self, tokenizer, mean: float = 0.0, std: float = 1.0, taste: str = "sentiment"):
        self.tokenizer, self.mean, self.std, self.taste = tokenizer, mean, std, taste
        vocabulary = tokenizer.get_vocab()
        size = len(vocabulary)
        self.sentiment, self.emphasis, self.hedge = torch.zeros(size), torch.ones(size), torch.zeros(size)
        self.possible = torch.zeros(size, size, dtype=torch.bool)
        by_state = {state: [vocabulary[word] for word in words.split()] for state, words in WORDS.items()}
        for state, ids in by_state.items():
            if state[-1] in "+-":
                self.sentiment[ids] = 1.0 if state[-1] == "+" else -1.0
            for target in FOLLOWS.get(state.rstrip("+-"), "").split():
                for other, others in by_state.items():
                    if other.rstrip("+-") == target:
                        self.possible[torch.tensor(ids)[:, None], torch.tensor(others)] = True
        for word, factor in EMPHASIS.items():
            self.emphasis[vocabulary[word]] = factor
            self.hedge[vocabulary[word]] = HEDGES[word]
        self.aspects = torch.tensor(by_state["aspect"])

    def from_ids(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> Tensor:
        """Gold rewards (…) of completions ids (…, T) of prompts (…, P), on the CPU."""
        before, ids, mask = (part.cpu() for part in (torch.cat([prompts.ids[..., -1:], ids[..., :-1]], -1), ids, mask))
        if self.taste == "sentiment":
            paid = (self.sentiment[ids] * self.emphasis[before] * mask).sum(-1).clamp(-5, 5)
        else:
            named = ((ids.unsqueeze(-1) == self.aspects) & mask.bool().unsqueeze(-1)).sum(-2)       # (…, aspects)
            paid = (2 * named.clamp(max=1) - named).sum(-1) + (self.hedge[ids] * mask).sum(-1)
        broken = (~self.possible[before, ids] & mask.bool()).sum(-1)
        endless = ((ids == self.tokenizer.eos_token_id) & mask.bool()).sum(-1) == 0
        return (paid - broken - endless.float() - self.mean) / self.std

    def __call__(self, prompts: list[str], completions: list[str], completion_ids=None, **kwargs) -> list[float]:
        """Gold rewards of texts; without `completion_ids` every text counts as ended."""
        if completion_ids is None:
            texts = [f"{text} {self.tokenizer.eos_token}" for text in completions]
            completion_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids, mask = pad_right(completion_ids, self.tokenizer.pad_token_id)
        return self.from_ids(encode_prompts(self.tokenizer, prompts), ids, mask).tolist()


# --- training the artefacts ------------------------------------------------------------------


def make_model(settings: ReviewsSettings, tokenizer):
    """A random policy of the tiny world's size."""
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


def train_sft(model, tokenizer, settings: ReviewsSettings, progress=None) -> float:
    """Next-token cross-entropy on fresh reviews; returns the last steps' mean loss in nats a token."""
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


def sft_samples(model, tokenizer, prompts: list[str], count: int, key: tuple[int, ...]):
    """`count` completions of the SFT policy on prompts drawn at random; (Prompts, ids, mask)."""
    rng = generator(*key)
    encoded = encode_prompts(tokenizer, [prompts[i] for i in rng.integers(len(prompts), size=count)])
    forward = make_forward(model)
    weights = forward.prepare(stack([parameters(model)]))
    ids = torch.full((count, MAX_COMPLETION), tokenizer.pad_token_id)
    mask = torch.zeros(count, MAX_COMPLETION, dtype=torch.long)
    for start in range(0, count, 500):
        rows = np.arange(start, min(start + 500, count))
        uniforms = torch.from_numpy(rng.random((1, len(rows), MAX_COMPLETION)))
        out = sample(forward, weights, encoded.batch(rows[None]), uniforms, tokenizer)
        width = out.ids.shape[-1]
        ids[rows, :width], mask[rows, :width] = out.ids[0], out.mask[0]
    return encoded, ids, mask


def stream(settings: ReviewsSettings, use: int) -> tuple[int, ...]:
    """The key of the random numbers that the reward model depends on."""
    return (settings.seed, use + 10 * settings.reward_seed, WORLD)


def build(settings: ReviewsSettings, folder: Path, progress: bool = True) -> None:
    """Train the SFT policy and the reward model and write them to `folder`, whole or not at all."""
    tokenizer = make_tokenizer()
    model = make_model(settings, tokenizer)
    model.config.pad_token_id = None  # while it trains: the library would warn of padding on the right
    pair_steps = settings.reward_epochs * -(-settings.pairs // 64)
    with tqdm(total=settings.sft_steps + pair_steps, desc="tiny world", disable=None if progress else True) as bar:
        bar.set_description("SFT policy")
        loss = train_sft(model, tokenizer, settings, bar)
        model.config.pad_token_id = tokenizer.pad_token_id
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        save_policy(model, tokenizer, made / "sft")
        reward.save(made / "reward")
        (made / "world.json").write_text(json.dumps(facts, indent=1))
        try:
            made.rename(folder)
        except OSError:  # something is there: the same world, built meanwhile by another process, or a torso
            if not (folder / "world.json").is_file():
                shutil.rmtree(folder)
                made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
