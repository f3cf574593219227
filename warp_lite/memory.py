"""How much memory training takes, estimated before it starts, and how much there is."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that `policies` policies take while they train together, beside the program itself.

    `weights`: weights, gradients (twice: as computed and as kept), Adam's two moments and the anchor,
    and the copies in which weights, anchor and moments are handed on at the end of a run.
    `activations`: what one step keeps for its backward pass. `logits`: the vocabulary's share of it.
    """

    policies: int
    weights: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.logits

    def __str__(self) -> str:
        total, weights, activations, logits = (
            part / 2**30 for part in (self.total, self.weights, self.activations, self.logits))
        return (f"about {total:.2f} GiB for {self.policies} policies at once: weights and optimiser {weights:.2f}, "
                f"activations {activations:.2f}, logits {logits:.2f}")


def training_memory(model, policies: int, batch: int, prompt_tokens: int, new_tokens: int) -> MemoryEstimate:
    """Estimate the memory of training `policies` copies of a causal LM at once.

    batch: completions a policy and step. It counts what a
    pre-norm transformer keeps a layer and token: 20 times the width, and its attention weights.
    """
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    size = next(model.parameters()).element_size()
    length = prompt_tokens + new_tokens
    tokens = policies * batch * length
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    a_token_and_layer = 12 * width + 2 * inner + 2 * heads * length
    return MemoryEstimate(policies, 10 * policies * parameters * size, tokens * layers * a_token_and_layer * size,
                          3 * policies * batch * new_tokens * config.vocab_size * 4)


def free_memory(device="cpu") -> int:
    """Bytes that are free on a device now."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
