"""Sequence classifiers as rewards: a folder, a name of the hub, or a pipeline of the library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..policies.hub import local
from ..policies.loading import from_pretrained, load_tokenizer, reading
from ..policies.messages import content_text, render
from ..policies.prompts import is_conversation, without_bos

if TYPE_CHECKING:
    from transformers import Pipeline


class ClassifierReward:
    """A sequence classifier's logit, or log-probability, of one label, as a reward of texts.

    The classifier keeps its own tokenizer and reads each prompt with its completion as one text, in the policy's
    words; what is too long for it is cut at the beginning, since the completion is at the end. `label` is a name
    or an index. `special_tokens=False` leaves out those with which its tokenizer frames a text, as TRL does.
    Raises ValueError in one line where it cannot be read, and for a label that it has not.
    """

    def __init__(self, name_or_folder: str | Path, label: int | str = -1, log_probability: bool = False,
                 device: str | torch.device = "cpu", batch: int = 64, special_tokens: bool = True):
        folder = local(str(name_or_folder))
        with reading("a reward model", folder) as options:
            self.tokenizer = load_tokenizer(folder, **options)
            self.model = from_pretrained(AutoModelForSequenceClassification, folder, **options)
            if self.tokenizer.pad_token is None:  # as GPT-2's: any token will do, it is masked
                self.tokenizer.pad_token = self.tokenizer.eos_token
            if self.model.config.pad_token_id is None:
                self.model.config.pad_token_id = self.tokenizer.pad_token_id
            self.size = self.model.get_input_embeddings().num_embeddings
            check_vocabulary(self.tokenizer, self.size)
        self.model.to(device).eval().requires_grad_(False)
        self.label = find_label(self.model.config.id2label, label, f"the reward model in {folder!r}")
        self.log_probability, self.batch, self.special_tokens = log_probability, batch, special_tokens
        self.tokenizer.truncation_side = "left"
        self.longest = longest_input(self.model, self.tokenizer)
        self.unit = f"{'log-probability' if log_probability else 'logit'} of {self.model.config.id2label[self.label]}"

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, whole_texts: list[str] | None = None,
                 **kwargs: object) -> list[float]:
        """Rewards of prompts with their completions, in logits or nats; `whole_texts` are those decoded together.

        Without them texts are joined as they stand: a space that belongs between them must be in one of the two.
        Raises ValueError for a token that the classifier has no embedding for.
        """
        texts, framed = joined_texts(prompts, completions, self.tokenizer, whole_texts)
        values = []
        for i in range(0, len(texts), self.batch):
            # On the right, whatever the tokenizer prefers: on the left it would shift the positions.
            batch = self.tokenizer(
                texts[i:i + self.batch], padding=True, padding_side="right", truncation=self.longest is not None,
                max_length=self.longest, add_special_tokens=self.special_tokens and not framed, return_tensors="pt")
            if batch["input_ids"].max() >= self.size:
                raise ValueError(f"a completion has a token beyond the {self.size} embeddings of the reward model: "
                                 f"{texts[i + int((batch['input_ids'] >= self.size).any(1).nonzero()[0])][-60:]!r}")
            logits = self.model(**batch.to(self.model.device)).logits.float()
            if self.log_probability and logits.shape[-1] > 1:
                logits = logits.log_softmax(-1)
            values += logits[:, self.label].tolist()
        return values


class PipelineReward:
    """A text-classification pipeline of the library as a reward: the logit, or log-probability, of one label.

    The pipeline keeps its model, tokenizer, device and batch size. `label` is a name or an index.
    Raises ValueError for a pipeline of another task.
    """

    def __init__(self, pipeline: Pipeline, label: int | str = -1, log_probability: bool = False):
        if pipeline.task != "text-classification":
            raise ValueError(f"a pipeline for {pipeline.task!r} gives no reward; pass one for 'text-classification'")
        config = pipeline.model.config
        self.pipeline, self.log_probability = pipeline, log_probability and config.num_labels > 1
        self.name = config.id2label[find_label(config.id2label, label, "the pipeline")]
        self.unit = f"{'log-probability' if log_probability else 'logit'} of {self.name}"

    def __call__(self, prompts: list, completions: list, whole_texts: list[str] | None = None,
                 **kwargs: object) -> list[float]:
        """Rewards of prompts with their completions, in logits or nats, joined as those of ClassifierReward are."""
        tokenizer = self.pipeline.tokenizer
        longest = longest_input(self.pipeline.model, tokenizer)
        texts, framed = joined_texts(prompts, completions, tokenizer, whole_texts)
        options = {"add_special_tokens": not framed}
        if longest:
            options |= {"truncation": True, "max_length": longest}
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
        try:
            scores = self.pipeline(texts, top_k=None, function_to_apply="none", **options)
        finally:
            tokenizer.truncation_side = side
        values = []
        for row in scores:
            logits = {entry["label"]: entry["score"] for entry in row}
            total = torch.tensor(list(logits.values())).logsumexp(0).item() if self.log_probability else 0.0
            values.append(logits[self.name] - total)
        return values


def find_label(names: dict[int, str], label: int | str, where: str) -> int:
    """The index of a classifier's label, given by its index, from the end where negative, or its name, in any case.

    Raises ValueError that lists the labels, where there is none such.
    """
    if isinstance(label, str):
        matches = [i for i, name in names.items() if name.lower() == label.lower()]
        if matches:
            return matches[0]
    elif -len(names) <= label < len(names):
        return label % len(names)
    raise ValueError(f"{where} has {len(names)} labels ({', '.join(names.values())}) and no label {label!r}")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a classifier takes, by its tokenizer or its positions; None where neither sets a limit."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []  # the library's "no limit"
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
        offset = next((t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None), 0)
        limits.append(positions - offset)  # RoBERTa's positions begin after that of its padding
    return min(limits, default=None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Raises ValueError if texts, or what frames and pads them, have ids that a model of `size` embeddings lacks."""
    roles = ("pad", "bos", "eos", "cls", "sep", "unk")
    framing = {getattr(tokenizer, f"{role}_token_id") for role in roles} - {None}
    added = set(tokenizer.get_added_vocab().values())  # some have no place in a text
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size and (i in framing or i not in added)}
    if beyond:
        i = min(beyond)
        raise ValueError(f"its tokenizer's token {beyond[i]!r} has the id {i}, and the model has {size} embeddings; "
                         "are both of one checkpoint?")


def joined_texts(prompts: list, completions: list, tokenizer: PreTrainedTokenizerBase,
                 whole_texts: list[str] | None = None) -> tuple[list[str], bool]:
    """Each prompt with its completion as one text, and whether those have their special tokens in them.

    `whole_texts` are what the policy's tokenizer makes of the tokens of both together. Without them the two are
    put side by side with nothing between, as the tokens of byte-level and SentencePiece tokenizers mean it.
    Conversations are joined by the tokenizer's chat template, which writes them, or else line by line.
    Raises ValueError for a message that has more than text in it.
    """
    if not is_conversation(prompts[0]):
        if whole_texts is None:
            whole_texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        return without_bos(tokenizer, whole_texts), False
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
    if tokenizer.chat_template is not None:
        return [render(tokenizer, messages) for messages in whole], True
    return ["\n".join(filter(None, map(content_text, messages))) for messages in whole], False
