"""The Bradley–Terry reward model of the tiny world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..policies.attention import positions
from ..policies.gpt2_forward import GPT2Forward
from ..policies.loading import from_pretrained, load_tokenizer, reading, save_policy
from ..policies.prompts import Prompts, encode_prompts, ended_ids, pad_id, pad_right
from ..policies.sampling import Policies


class BradleyTerry:
    """A reward model: a trunk, the mean of its hidden states, a linear head; standardised.

    The reward is in standard deviations of the rewards of SFT samples, around their mean.
    Source: Bradley and Terry 1952; as a reward model, Christiano et al. 2017 (arXiv 1706.03741).
    """

    unit = "standard deviations of SFT samples"

    def __init__(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
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
        for rows, end in zip(order.split(chunk), ends[::chunk].tolist()):  # those of like length together
            values[rows] = score(full[rows, :end], full_mask[rows, :end])
        return values.view(ids.shape[:-1])

    def _fast_scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`scores` by the hand-written forward, whose hidden states lack the final norm."""
        weights = {name: tensor.detach().unsqueeze(0) for name, tensor in self.trunk.named_parameters()}
        seen = mask.unsqueeze(0) if bool((mask[:, 0] == 0).any()) else None
        policies = Policies(GPT2Forward(self.trunk), weights)
        hidden = self.trunk.ln_f(policies.hidden(ids.unsqueeze(0), seen)[0])                 # (N, S, C)
        weight = mask.to(hidden.dtype)
        pooled = torch.bmm(weight.unsqueeze(1), hidden)[:, 0] / weight.sum(1, keepdim=True)  # (N, C)
        return (pooled @ self.head - self.mean) / self.std

    def __call__(self, prompts: list[str], completions: list[str],
                 completion_ids: Sequence[Sequence[int]] | None = None, **kwargs: object) -> list[float]:
        """Rewards of texts, one each; the ids of the completions are used where they are given.

        Else every text counts as ended, and is tokenised by itself.
        """
        if completion_ids is None:
            completion_ids = ended_ids(self.tokenizer, completions)
        ids, mask = pad_right(completion_ids, pad_id(self.tokenizer))
        return self.from_ids(encode_prompts(self.tokenizer, prompts), ids, mask).tolist()

    def to(self, device: str | torch.device) -> BradleyTerry:
        """The same object with trunk and head on a device."""
        self.trunk.to(device)
        self.head = nn.Parameter(self.head.detach().to(device), self.head.requires_grad)
        return self

    def save(self, folder: str | Path) -> None:
        """A Hugging Face folder of the trunk, with the head and the standardisation beside it."""
        save_policy(self.trunk, self.tokenizer, folder)
        scale = torch.tensor([self.mean, self.std], dtype=torch.float64)
        save_file({"head": self.head.detach(), "mean_std": scale}, Path(folder) / "reward_head.safetensors")

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> BradleyTerry:
        """What `save` wrote, on a device, without gradients. Raises ValueError in one line when it cannot be read."""
        with reading("a reward model", str(folder)):
            trunk = from_pretrained(AutoModel, str(folder), dtype=torch.float32)
            model = cls(trunk.to(device).eval().requires_grad_(False), load_tokenizer(str(folder)))
            head = load_file(Path(folder) / "reward_head.safetensors")
        model.head = head["head"].to(device)
        model.mean, model.std = head["mean_std"].tolist()
        return model


def train_bradley_terry(model: BradleyTerry, chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor], *,
                        epochs: int = 2, batch: int = 64, lr: float = 1e-3, seed: int = 0,
                        progress: tqdm | None = None) -> None:
    """Fit P(chosen over rejected) = σ(r_chosen − r_rejected) by maximum likelihood, in place; then it is frozen.

    `chosen` and `rejected` are pairs (ids, mask), (N, S) each. `progress` advances by one at every step.
    Source: Christiano et al. 2017, section 2.2.3.
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
