"""The grammar of the tiny world's film reviews, its tokenizer, and the gold reward known by construction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..policies.prompts import Prompts, encode_prompts, ended_ids, pad_right

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
    """So many reviews, from the generator's next numbers."""
    return [review(rng) for _ in range(count)]


def prompt_texts() -> list[str]:
    """Every opening that the grammar can produce: 4 × 8 × 12 = 384."""
    parts = [WORDS[state].split() for state in ("determiner", "kind", "noun")]
    return [f"{d} {k} {n} was" for d in parts[0] for k in parts[1] for n in parts[2]]


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


class GoldReward:
    """The truth: a taste, less one for each impossible pair of words, less one for a review that
    never ends; standardised by `mean` and `std` of SFT samples.

    The taste "sentiment" pays for the sentiment of the words, clamped to ±5; an adverb scales the
    adjective that follows it. "detail" pays one for each aspect of the film that is named, takes one
    back where it is named again, and pays for adverbs that hedge and against those that shout.
    A review ends at one of the ids `ends`, the tokenizer's EOS if they are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mean: float = 0.0, std: float = 1.0,
                 taste: str = "sentiment", ends: tuple[int, ...] | None = None):
        self.tokenizer, self.mean, self.std, self.taste = tokenizer, mean, std, taste
        self.ends = torch.tensor((tokenizer.eos_token_id,) if ends is None else ends)
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
        endless = (torch.isin(ids, self.ends) & mask.bool()).sum(-1) == 0
        return (paid - broken - endless.float() - self.mean) / self.std

    def __call__(self, prompts: list[str], completions: list[str],
                 completion_ids: Sequence[Sequence[int]] | None = None, **kwargs: object) -> list[float]:
        """Gold rewards of texts, one each; without `completion_ids` every text counts as ended."""
        if completion_ids is None:
            completion_ids = ended_ids(self.tokenizer, completions)
        ids, mask = pad_right(completion_ids, self.tokenizer.pad_token_id)
        return self.from_ids(encode_prompts(self.tokenizer, prompts), ids, mask).tolist()
