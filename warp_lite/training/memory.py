"""How much memory training takes, estimated before it starts, and how much there is."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from ..averaging.state_dicts import bytes_of
from ..config import WarpConfig
from ..policies.gpt2_forward import GPT2Forward
from ..policies.precision import compute_dtype
from ..policies.shape import shape_of
from ..task import Task
from .executors import TOGETHER, BatchedTrainer, Trainer
from .reinforce import check_trains, forward_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY_SHARE = 0.8  # of the free memory, that a run may take by its estimate
WEIGHTS_AT_ONCE = 2**29  # bytes of weights that are stacked to be measured together, or on a CPU to be trained
WORTH_SAYING = 2**30  # bytes from which on the estimate is printed though it fits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that `policies` policies take on their device while they train together, beside the model itself.

    There all the time: `weights`, `optimiser` (Adam's two moments) and `anchor`; `gradients`, as they are kept
    and as they are computed. One after the other: `activations` and `logits`, which a step keeps for its
    backward pass; `sampling`, the keys and values of the tokens so far and the logits of the next; `copies`,
    in which policy, anchor and moments are handed on at the end of a run.
    """

    policies: int
    weights: int
    gradients: int
    optimiser: int
    anchor: int
    activations: int
    logits: int
    sampling: int
    copies: int

    @property
    def total(self) -> int:
        """What there is all the time and the largest of what comes and goes."""
        stays = self.weights + self.gradients + self.optimiser + self.anchor
        return stays + max(self.activations + self.logits, self.sampling, self.copies)

    def __str__(self) -> str:
        parts = {name: value for name, value in dataclasses.asdict(self).items() if name != "policies"}
        largest = [f"{name} {parts[name] / 2**30:.2f}" for name in sorted(parts, key=parts.get, reverse=True)
                   if parts[name] > 0.05 * self.total]
        many = "1 policy" if self.policies == 1 else f"{self.policies} policies at once"
        return f"about {self.total / 2**30:.2f} GiB for {many}: {', '.join(largest)}"


def training_memory(model: PreTrainedModel, policies: int, batch: int, prompt_tokens: int, new_tokens: int,
                    settings: WarpConfig | None = None, together: bool = True,
                    adapter: tuple[int, int] | None = None) -> MemoryEstimate:
    """Estimate the memory of training `policies` copies of a causal LM at once.

    batch: completions a policy and step. settings: those of precision and memory count. together: as one
    program; else the model itself is trained, and its weights are there already. adapter: how many numbers
    the factors of a policy's adapter have, and the matrices that it changes, where adapters are trained. It
    counts what a pre-norm transformer keeps a layer and token: 20 times the width (40 where its GELU is written
    out), and its attention weights.
    """
    settings, config = settings or WarpConfig(), model.config.get_text_config()
    device = torch.device(model.device)
    narrow = compute_dtype(settings.precision, device) is not None
    numbers = policies * sum(p.numel() for p in model.parameters())
    if adapter is None:
        trained = averaged = policies * sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        trained, averaged = policies * adapter[0], policies * sum(adapter)
    size = max(4, next(model.parameters()).element_size())
    away = settings.offload and device.type != "cpu"
    shape = shape_of(model)
    width, layers, heads, inner, words = shape.width, shape.layers, shape.heads, shape.inner, shape.vocabulary
    length = prompt_tokens + new_tokens
    rows = policies * min(batch, settings.micro_batch or batch)
    stacked = together or adapter is not None  # what is trained lies beside the model, in one tensor
    fast = together and adapter is None and GPT2Forward.supports(model)
    # the library writes this activation out, and each of its parts stays for the backward pass
    parts = 7 if not fast and getattr(config, "activation_function", None) in ("gelu_new", "gelu_fast") else 2
    a_token_and_layer = (12 * width + parts * inner + 2 * heads * length) * (0.75 if narrow else 1)
    if adapter is not None:
        a_token_and_layer += 4 * width + 2 * inner  # what an adapter adds to its layer's output
    # with checkpoints about three layers' worth is alive at the peak, as measured: one computed a second time, its
    # gradients, and what the allocator has not yet given back
    kept = layers * a_token_and_layer
    if settings.checkpointing:
        kept = min(kept, layers * width + 3 * a_token_and_layer)
    positions, head = rows * new_tokens, 0
    if settings.logit_chunk and policies * settings.logit_chunk < positions:
        positions, head = policies * settings.logit_chunk, policies * words * width  # its gradient, in two parts
    drawn = policies * min(batch, settings.sample_batch or batch)
    cache = 2 * layers * shape.kv_heads * shape.head_size * length * (2 if narrow else size)
    return MemoryEstimate(
        policies,
        weights=trained * size * stacked + 2 * (numbers - policies * words * width) * narrow,
        gradients=trained * size * (2 if stacked and not away else 1),
        optimiser=0 if away else 2 * trained * size,
        anchor=0 if away and adapter is None else averaged * size,
        activations=int(rows * length * kept * size),
        logits=3 * positions * words * size + head * size,
        sampling=drawn * (cache + 4 * words * size) + trained * size * away,
        copies=2 * (numbers + trained) * size if device.type == "cpu" else 0)


def settings_that_fit(model: PreTrainedModel, policies: int, batch: int, prompt_tokens: int, new_tokens: int,
                      settings: WarpConfig, limit: float, together: bool = True,
                      adapter: tuple[int, int] | None = None) -> tuple[list[str], MemoryEstimate]:
    """The settings, as NAME=VALUE, by which training would fit into `limit` bytes, and what it would then take.

    The cheaper in time come first, and one that saves less than a twentieth is left out. Where all of them are
    not enough, the estimate is still above the limit.
    """
    def estimate():
        return training_memory(model, policies, batch, prompt_tokens, new_tokens, settings, together, adapter)

    present, changes = estimate(), {}
    halves = [max(1, batch // 2**k) for k in range(1, batch.bit_length())]
    offload = [True] if torch.device(model.device).type != "cpu" else []
    for name, values in (("logit_chunk", [256]), ("micro_batch", halves), ("sample_batch", halves),
                         ("checkpointing", [True]), ("offload", offload)):
        for value in values:
            if present.total <= limit:
                break
            before, settings = settings, settings.replace(**{name: value})
            if (found := estimate()).total < 0.95 * present.total:
                present, changes[name] = found, value
            else:
                settings = before
    return [f"{name}={str(value).lower()}" for name, value in changes.items()], present


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that are free on a device now; on a GPU with what torch holds without using it."""
    device = torch.device(device)
    if device.type == "cuda":  # and what torch holds without using it
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device)
    return psutil.virtual_memory().available


def worth_together(task: Task) -> int:
    """How many policies of a task are worth training as one program, one at least.

    On a CPU a step of a large policy is products of large matrices, which take as long for two policies one after the
    other as together.
    """
    on_cpu = torch.device(task.policy.device).type == "cpu"
    return max(1, WEIGHTS_AT_ONCE // bytes_of(task.sft)) if on_cpu else TOGETHER


def fitting_trainer(trainer: Trainer, task: Task, config: WarpConfig, progress: bool = True) -> Trainer:
    """How an iteration's runs train: one after the other if together they would not fit in memory, or cannot be
    checkpointed; else no more together than are worth it. Says what does not fit, and what to set where not even one
    does, on stderr in one line.

    Raises ValueError for settings that the policy cannot be trained with, and for one that is frozen.
    """
    policy, adapter = task.policy, trainer.adapter
    if adapter is None:
        check_trains(policy)
    if trainer.at_once > 1 and config.checkpointing:
        try:
            forward_for(policy, "batched", config)
        except ValueError as error:
            print(f"warp-lite: {str(error).partition(';')[0]}; they train one after the other", file=sys.stderr)
            trainer = trainer.one_by_one()
    together = trainer.at_once > 1  # as programs beside the model, be they of one run each
    if type(trainer) is BatchedTrainer:
        trainer = trainer.of(min(config.runs, worth_together(task)))
    if config.checkpointing or config.logit_chunk:
        forward_for(policy, "batched" if together else "serial", config)
    shape = config.batch_size, task.prompts.ids.shape[-1], config.max_new_tokens, config
    free = free_memory(policy.device)
    there, line, apart = f"{free / 2**30:.2f} GiB are free", "", ""
    count = max(1, min(config.runs, trainer.at_once))
    finished = 2 * bytes_of(task.sft) * (config.runs - count) * (policy.device.type == "cpu")  # and wait
    if finished > WORTH_SAYING:
        there += f", of which finished runs will take {finished / 2**30:.2f}"
    needed = training_memory(policy, count, *shape, together, adapter)
    if together and needed.total > MEMORY_SHARE * free - finished:
        what = ("together the runs" if count == config.runs else
                f"{count} runs together" if count > 1 else "beside the model a run")
        line = f"warp-lite: {what} would take {needed}, and {there}; they train one after the other"
        apart = "" if count == 1 else "the runs do not fit together and they train one after the other; even "
        trainer, needed = trainer.one_by_one(), training_memory(policy, 1, *shape, False, adapter)
    if trainer.at_once == 1 and needed.total > MEMORY_SHARE * free:
        changes, then = settings_that_fit(policy, 1, *shape, MEMORY_SHARE * free, False, adapter)
        advice = f"set {' '.join(changes)}: {then}" if changes else "take a smaller policy or batch"
        line = f"warp-lite: {apart}a run would take {needed}, and {there}; {advice}"
    if not line and progress and needed.total > WORTH_SAYING:
        line = f"warp-lite: training takes {needed}; {there}"
    if line:
        print(line, file=sys.stderr)
    return trainer
