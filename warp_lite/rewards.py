"""Rewards: how they are called, the Bradley–Terry model of the tiny world, classifiers from disk or the hub.

A reward is any callable `reward(prompts, completions, **kwargs) -> list[float]`, the
signature that TRL uses; where the prompts are conversations, so are the completions. A
text-classification pipeline of the library will do too. One that has a method
`from_ids(prompts, ids, mask)` is given the token ids instead, and nothing is decoded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from .gpt2 import GPT2Forward, positions
from .hub import local
from .policies import (
    Prompts,
    Rollout,
    completion_ids,
    encode_prompts,
    first_line,
    from_pretrained,
    is_conversation,
    load_tokenizer,
    pad_id,
    reading,
    save_policy,
)


def rollout_rewards(rewards: Sequence, rollout: Rollout, tokenizer) -> Tensor:
    """The reward (E, B) of each completion, float64; no gradient passes through it.

    `rewards` holds the reward of each of the E policies; one that several share is called once.
    Raises ValueError when a function returns the wrong number of values. Values that are
    not finite are returned as they are: the caller knows the run and the step.
    """
    E, B, _ = rollout.ids.shape
    if all(reward is rewards[0] for reward in rewards):
        return _one_reward(rewards[0], rollout, tokenizer)
    result = torch.empty(E, B, dtype=torch.float64)
    for reward in {id(reward): reward for reward in rewards}.values():
        members = [e for e in range(E) if rewards[e] is reward]
        result[members] = _one_reward(reward, rollout.select(members), tokenizer).cpu()
    return result.to(rollout.ids.device)


def _one_reward(reward, rollout: Rollout, tokenizer) -> Tensor:
    E, B, _ = rollout.ids.shape
    if hasattr(reward, "from_ids"):
        if not _same_tokens(getattr(reward, "tokenizer", tokenizer), tokenizer):
            raise ValueError(f"the {type(reward).__name__} reads token ids, but those of another tokenizer than the "
                             "policy's; take a reward model of the policy's tokenizer, or one that reads texts")
        values = reward.from_ids(rollout.prompts, rollout.ids, rollout.mask)
        return values.detach().to(rollout.ids.device).double().view(E, B)
    ids = completion_ids(rollout.ids, rollout.mask)
    given = rollout.prompts.given
    completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if is_conversation(given[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    values = call_reward(reward, given, completions, **{**rollout.prompts.columns, "completion_ids": ids})
    try:
        values = values.detach().tolist() if isinstance(values, Tensor) else values
        values = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"the reward function returned {str(values)[:60]!r}, not a list of numbers") from None
    if len(values) != E * B:
        raise ValueError(f"the reward function returned {len(values)} values for {E * B} completions")
    return torch.tensor(values, dtype=torch.float64).to(rollout.ids.device).view(E, B)


@lru_cache(maxsize=8)
def _same_tokens(first, second) -> bool:
    return first is second or first.get_vocab() == second.get_vocab()


def call_reward(reward, prompts: list[str], completions: list[str], **kwargs):
    """Call a reward function with those arguments that it takes.

    By keyword, as TRL does, if it names `completions` or `completion_ids` or takes nothing but
    keywords; else prompts and completions are its first two arguments, whatever it calls them.
    """
    pipelines = sys.modules.get("transformers.pipelines")
    if pipelines and isinstance(reward, pipelines.Pipeline):
        reward = PipelineReward(reward)
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return reward(prompts, completions)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if places and not named & {"completions", "completion_ids"}:
        rest = {name: value for name, value in accepted(reward, **kwargs).items() if name not in places[:2]}
        return reward(prompts, completions, **rest)
    return reward(**accepted(reward, prompts=prompts, completions=completions, **kwargs))


def accepted(reward, **kwargs) -> dict:
    """Those keyword arguments that the function takes."""
    parameters = inspect.signature(reward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in {p.name for p in parameters}}


class BradleyTerry:
    """A reward model: a trunk, the mean of its hidden states, a linear head; standardised.

    The reward is in standard deviations of the rewards of SFT samples, around their mean.
    """

    unit = "standard deviations of SFT samples"

    def __init__(self, trunk, tokenizer):
        self.trunk, self.tokenizer = trunk, tokenizer
        trunk.config.pad_token_id = None  # the library would warn of padding, which is never looked at
        self.head = nn.Parameter(torch.zeros(trunk.config.hidden_size))
        self.mean, self.std = 0.0, 1.0

    def scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Standardised rewards (N,) of sequences ids (N, S), mask 1 for tokens; differentiable."""
        options = {}
        if bool((mask[:, 0] == 0).any()):  # causal: padding on the right is never looked at
            options = {"attention_mask": mask, "position_ids": positions(mask)}
        hidden = self.trunk(ids, use_cache=False, **options).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return (pooled @ self.head - self.mean) / self.std

    @torch.no_grad()
    def from_ids(self, prompts: Prompts, ids: Tensor, mask: Tensor, chunk: int = 128) -> Tensor:
        """Rewards of completions ids (…, T) of prompts (…, P), on the reward model's device."""
        full = torch.cat([prompts.ids, ids], -1).flatten(0, -2).to(self.head.device)
        full_mask = torch.cat([prompts.mask, mask], -1).flatten(0, -2).to(self.head.device)
        score = self._fast_scores if GPT2Forward.supports(self.trunk) else self.scores
        ends = prompts.ids.shape[-1] + mask.flatten(0, -2).sum(-1).to(self.head.device)
        ends, order = ends.sort(descending=True, stable=True)
        values = full.new_empty(len(full), dtype=self.head.dtype)
        for some, end in zip(order.split(chunk), ends[::chunk].tolist()):  # those of like length together
            values[some] = score(full[some, :end], full_mask[some, :end])
        return values.view(ids.shape[:-1])

    def _fast_scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`scores` by the hand-written forward, whose hidden states lack the final norm."""
        forward = GPT2Forward(self.trunk)
        weights = {name: tensor.detach().unsqueeze(0) for name, tensor in self.trunk.named_parameters()}
        seen = mask.unsqueeze(0) if bool((mask[:, 0] == 0).any()) else None
        hidden = self.trunk.ln_f(forward.hidden(forward.prepare(weights), ids.unsqueeze(0), seen)[0])  # (N, S, C)
        weight = mask.to(hidden.dtype)
        pooled = torch.bmm(weight.unsqueeze(1), hidden)[:, 0] / weight.sum(1, keepdim=True)  # (N, C)
        return (pooled @ self.head - self.mean) / self.std

    def __call__(self, prompts: list[str], completions: list[str], completion_ids=None, **kwargs) -> list[float]:
        """Rewards of texts; the ids of the completions are used where they are given."""
        if completion_ids is None:
            eos = self.tokenizer.eos_token
            texts = [f"{text} {eos}" for text in completions]
            completion_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids, mask = pad_right(completion_ids, pad_id(self.tokenizer))
        return self.from_ids(encode_prompts(self.tokenizer, prompts), ids, mask).tolist()

    def to(self, device) -> BradleyTerry:
        """The same reward model on a device."""
        self.trunk.to(device)
        self.head = nn.Parameter(self.head.detach().to(device), self.head.requires_grad)
        return self

    def save(self, folder) -> None:
        """A Hugging Face folder of the trunk, with the head and the standardisation beside it."""
        save_policy(self.trunk, self.tokenizer, folder)
        scale = torch.tensor([self.mean, self.std], dtype=torch.float64)
        save_file({"head": self.head.detach(), "mean_std": scale}, Path(folder) / "reward_head.safetensors")

    @classmethod
    def load(cls, folder, device="cpu") -> BradleyTerry:
        """What `save` wrote. Raises ValueError in one line when it cannot be read."""
        with reading("a reward model", str(folder)):
            trunk = from_pretrained(AutoModel, str(folder), dtype=torch.float32)
            model = cls(trunk.to(device).eval().requires_grad_(False), load_tokenizer(str(folder)))
            head = load_file(Path(folder) / "reward_head.safetensors")
        model.head = head["head"].to(device)
        model.mean, model.std = head["mean_std"].tolist()
        return model


def train_bradley_terry(model: BradleyTerry, chosen, rejected, *, epochs=2, batch=64, lr=1e-3, seed=0,
                        progress=None) -> None:
    """Fit P(chosen over rejected) = σ(r_chosen − r_rejected) by maximum likelihood.

    `chosen` and `rejected` are pairs (ids, mask) of N sequences each.
    """
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(chosen[0]) / batch)
    optimizer = torch.optim.AdamW([*model.trunk.parameters(), model.head], lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 10) * (1 - t / steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(chosen[0]), generator=order).split(batch):
            ids = torch.cat([chosen[0][rows], rejected[0][rows]])
            mask = torch.cat([chosen[1][rows], rejected[1][rows]])
            better, worse = model.scores(ids, mask).chunk(2)
            loss = -F.logsigmoid(better - worse).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress.update()
    model.trunk.requires_grad_(False)
    model.head.requires_grad_(False)


class ClassifierReward:
    """A sequence classifier's logit, or log-probability, of one label, as a reward of texts.

    The classifier keeps its own tokenizer: prompt and completion are joined as text, and what is too long
    for it is cut at the beginning, since the completion is at the end. `label` is a name or an index.
    """

    def __init__(self, name_or_folder, label: int | str = -1, log_probability: bool = False, device="cpu",
                 batch: int = 64):
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
        self.log_probability, self.batch = log_probability, batch
        self.tokenizer.truncation_side = "left"
        self.longest = longest_input(self.model, self.tokenizer)
        self.unit = f"{'log-probability' if log_probability else 'logit'} of {self.model.config.id2label[self.label]}"

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, **kwargs) -> list[float]:
        """Rewards of the joined texts, in logits or nats."""
        texts, framed = joined_texts(prompts, completions, self.tokenizer)
        values = []
        for i in range(0, len(texts), self.batch):
            # On the right, whatever the tokenizer prefers: on the left it would shift the positions.
            batch = self.tokenizer(
                texts[i:i + self.batch], padding=True, padding_side="right", truncation=self.longest is not None,
                max_length=self.longest, add_special_tokens=not framed, return_tensors="pt")
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

    def __init__(self, pipeline, label: int | str = -1, log_probability: bool = False):
        if pipeline.task != "text-classification":
            raise ValueError(f"a pipeline for {pipeline.task!r} gives no reward; pass one for 'text-classification'")
        config = pipeline.model.config
        self.pipeline, self.log_probability = pipeline, log_probability and config.num_labels > 1
        self.name = config.id2label[find_label(config.id2label, label, "the pipeline")]
        self.unit = f"{'log-probability' if log_probability else 'logit'} of {self.name}"

    def __call__(self, prompts: list, completions: list, **kwargs) -> list[float]:
        """Rewards of the joined texts, in logits or nats."""
        tokenizer = self.pipeline.tokenizer
        longest = longest_input(self.pipeline.model, tokenizer)
        texts, framed = joined_texts(prompts, completions, tokenizer)
        options = {"add_special_tokens": not framed}
        options |= {"truncation": True, "max_length": longest} if longest else {}
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
    """The index of a classifier's label, given by its index, from the end where negative, or its name."""
    if isinstance(label, str):
        found = [i for i, name in names.items() if name.lower() == label.lower()]
        if found:
            return found[0]
    elif -len(names) <= label < len(names):
        return label % len(names)
    raise ValueError(f"{where} has {len(names)} labels ({', '.join(names.values())}) and no label {label!r}")


def longest_input(model, tokenizer) -> int | None:
    """How many tokens a classifier takes, by its tokenizer or its positions; None where neither sets a limit."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []  # the library's "no limit"
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
        offset = next((t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None), 0)
        limits.append(positions - offset)  # RoBERTa's positions begin after that of its padding
    return min(limits, default=None)


def check_vocabulary(tokenizer, size: int) -> None:
    """Raise ValueError if texts, or what frames and pads them, have ids that a model of `size` embeddings lacks."""
    roles = ("pad", "bos", "eos", "cls", "sep", "unk")
    framing = {getattr(tokenizer, f"{role}_token_id") for role in roles} - {None}
    added = set(tokenizer.get_added_vocab().values())  # some have no place in a text
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size and (i in framing or i not in added)}
    if beyond:
        i = min(beyond)
        raise ValueError(f"its tokenizer's token {beyond[i]!r} has the id {i}, and the model has {size} embeddings; "
                         "are both of one checkpoint?")


def joined_texts(prompts: list, completions: list, tokenizer) -> tuple[list[str], bool]:
    """Each prompt with its completion as one text, and whether those have their special tokens in them.

    Conversations are joined by the tokenizer's chat template, which writes them, or else line by line.
    """
    if not is_conversation(prompts[0]):
        return [join_text(prompt, completion) for prompt, completion in zip(prompts, completions)], False
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
    if tokenizer.chat_template is not None:
        return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in whole], True
    return ["\n".join(message["content"] for message in messages) for messages in whole], False


def join_text(prompt: str, completion: str) -> str:
    """Prompt and completion as one text, with a space between them where neither has one."""
    gap = "" if not prompt or not completion or prompt[-1].isspace() or completion[0].isspace() else " "
    return prompt + gap + completion


def pad_right(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Lists of ids as a tensor (N, S) and its mask."""
    width = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, :len(row)] = 1
    return ids, mask


def load_reward(spec: str, device="cpu", label: int | str | None = None, log_probability: bool = False):
    """A reward from the command line: `module:function`, a folder, or a classifier's name on the hub.

    `label`, a name or an index, and `log_probability` choose what of a classifier is the reward.
    Raises ValueError in one line when it cannot be found, or there is nothing to choose.
    """
    folder = Path(local(spec))
    is_function = ":" in spec and not folder.exists()
    is_bradley_terry = (folder / "reward_head.safetensors").is_file()
    if (is_function or is_bradley_terry) and (label is not None or log_probability):
        raise ValueError(f"the reward {spec!r} is no classifier: it has no label or log-probability to choose")
    if is_bradley_terry:
        return BradleyTerry.load(folder, device)
    if is_function:
        module, _, name = spec.partition(":")
        sys.path.insert(0, "")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # the module is the user's and may raise anything
            raise ValueError(f"cannot find the reward {spec!r}: {first_line(error)}") from error
        finally:
            sys.path.remove("")
        if not callable(function):
            raise ValueError(f"the reward {spec!r} is {type(function).__name__}, not a function")
        return function
    return ClassifierReward(spec, -1 if label is None else label, log_probability, device)


def reward_name(reward) -> str:
    """How a run folder calls a reward."""
    if isinstance(reward, (list, tuple)):
        return json.dumps([reward_name(r) for r in reward])
    return getattr(reward, "__qualname__", type(reward).__qualname__)
