"""LoRA: policies of Algorithm 1 that train as adapters, θ^m = θ_init + ΔW_m with ΔW_m = B_m A_m.

What WARP averages are weights, so anchors, merges and interpolations are of ΔW and never of A and B: a mean
of products is not the product of means. Nothing here is approximate until a rank is asked for.

- The adapters of an iteration start at ΔW = 0 on its dense θ_init, and share its memory.
- The anchor is the moving average of W + ΔW. It has no low rank, so a run keeps a copy of the matrices it adapts.
- The merge of M adapters of rank r is an adapter of rank M·r. The norms and angles that SLERP needs come from
  products of r × r; no dense matrix is formed.
- θ_slerp and the next θ_init are dense weights, as everywhere else, so a front is drawn as of any other run.
- An adapter of a chosen rank is the best of that rank (truncated SVD), and how much is lost is told.

    from warp_lite import run_warp
    from warp_lite.scale.lora import LoraSettings, front_adapter, save_adapter

    result = run_warp(model, tokenizer, reward, prompts, config, out="runs/lora", lora=LoraSettings(rank=8))
    adapter, error = front_adapter("runs/lora", eta=0.5, rank=8)     # error: the share of ΔW's norm that rank 8 loses
    save_adapter(adapter, "half", base="runs/lora/sft")              # a PEFT folder
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints import appearing_whole, carry_over, free_folder, open_checkpoint
from ..ensemble import Ensemble
from ..files import load_tensors, read_json
from ..liti import check_eta
from ..policies import Prompts, Weights, load_weights
from ..randomness import ADAPTERS, generator
from ..reinforce import OnStep, Run, RunState, train_batched
from ..runs import read_config
from ..slerp import slerp_coefficients
from ..weights import check_weights, widen

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules


def library(name: str, extra: str):
    """An optional library, or an ImportError of one line that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}, which is not installed: pip install 'warp-lite[{extra}]'") from error


@dataclass(frozen=True)
class LoraSettings:
    """How policies are adapted: PEFT's LoRA of rank `rank`, ΔW = alpha/rank · BA (alpha/√rank with `rslora`).

    `target_modules`: PEFT's, "all-linear" or names with commas between them.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    target_modules: str = "all-linear"

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be 1 or more, not {self.rank!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be above 0, not {self.alpha!r}")

    @property
    def scaling(self) -> float:
        """The factor of BA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """ΔW of some of a policy's matrices, each as B·A with the scaling in B.

    `factors`: B (out, r) and A (r, in) by the name of the weight they change. `transposed`: those weights
    that are stored (in, out), as GPT-2's are, and change by (BA)ᵀ.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    transposed: frozenset[str] = frozenset()

    def delta(self, name: str) -> Tensor:
        """The dense ΔW of one weight, in the weight's own layout."""
        B, A = self.factors[name]
        return (B @ A).T if name in self.transposed else B @ A

    @property
    def rank(self) -> int:
        """The largest rank among its matrices."""
        return max(B.shape[1] for B, _ in self.factors.values())


# --- arithmetic: of ΔW, on its factors ---


def combine_adapters(adapters: Sequence[Adapter],
                     coefficients: Sequence[float] | Mapping[str, Sequence[float]]) -> Adapter:
    """Σ c_m ΔW_m, exactly: the factors stacked, rank Σ r_m. A mapping gives each weight its own coefficients.

    Raises ValueError for adapters of different weights or shapes.
    """
    check_same_weights(adapters)
    factors = {}
    for name in adapters[0].factors:
        c = coefficients[name] if isinstance(coefficients, Mapping) else coefficients
        pairs = [adapter.factors[name] for adapter in adapters]
        factors[name] = (torch.cat([x * widen(B) for x, (B, _) in zip(c, pairs)], 1),        # (out, Σ r)
                         torch.cat([widen(A) for _, A in pairs], 0))                         # (Σ r, in)
    return Adapter(factors, adapters[0].transposed)


def merge_adapters(adapters: Sequence[Adapter], weights: Sequence[float] | None = None,
                   method: str = "slerp") -> Adapter:
    """Stage 2 on adapters of one init: SLERP (or LERP) of ΔW, each weight with its own angle, exactly.

    The same as `slerp(init, dense policies)`, by Gram matrices of the factors; the rank is the sum of
    the ranks. Raises ValueError for fewer than two adapters and for those that do not fit together.
    """
    if method not in ("slerp", "lerp"):
        raise ValueError(f"method is {method!r}; it must be 'slerp' or 'lerp'")
    if len(adapters) < 2:
        raise ValueError(f"{len(adapters)} adapter to merge; pass at least two")
    weights = check_weights(weights, len(adapters))
    check_same_weights(adapters)
    if method == "lerp":
        return combine_adapters(adapters, weights)
    return combine_adapters(adapters, {name: slerp_coefficients(adapter_gram(adapters, name), weights)
                                       for name in adapters[0].factors})


def adapter_gram(adapters: Sequence[Adapter], name: str) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ of one weight, (M, M) in float64: the sum over (B_iᵀB_j) ∘ (A_iA_jᵀ)."""
    pairs = [tuple(factor.double() for factor in adapter.factors[name]) for adapter in adapters]
    return torch.stack([torch.stack([((Bi.T @ Bj) * (Ai @ Aj.T)).sum() for Bj, Aj in pairs])
                        for Bi, Ai in pairs]).cpu()


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of a rank, and ‖what is lost‖ / ‖ΔW‖ over all its matrices together (Frobenius).

    By QR of the factors and an SVD of r × r. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be 1 or more, not {rank}")
    factors, lost, total = {}, 0.0, 0.0
    for name, (B, A) in adapter.factors.items():
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)                                               # (R, R), (R,), (R, R)
        root = S[:rank].sqrt()
        factors[name] = ((Qb @ U[:, :rank] * root).to(B.dtype), (root[:, None] * (Vh[:rank] @ Qa.T)).to(A.dtype))
        lost, total = lost + S[rank:].square().sum().item(), total + S.square().sum().item()
    return Adapter(factors, adapter.transposed), math.sqrt(lost / total) if total else 0.0


def fold(init: Weights, adapter: Adapter, eta: float = 1.0) -> dict[str, Tensor]:
    """Dense weights W + η·ΔW; those without an adapter are init's own tensors.

    Raises ValueError where the adapter does not fit.
    """
    eta, result = check_eta(eta), dict(init)
    for name in adapter.factors:
        result[name] = changed(init, adapter, name, eta)
    return result


def changed(init: Weights, adapter: Adapter, name: str, eta: float) -> Tensor:
    """One weight after its adapter."""
    if name not in init:
        raise ValueError(f"the adapter changes {name!r}, which init has not; was it trained on another policy?")
    base, delta = widen(init[name]), adapter.delta(name)
    if delta.shape != base.shape:
        raise ValueError(f"the adapter changes {name!r} by a matrix {tuple(delta.shape)}, init's is "
                         f"{tuple(base.shape)}; was it trained on another policy?")
    return (base + eta * delta.to(base)).to(init[name].dtype)


def factors_merged(adapters: Sequence[Adapter]) -> Adapter:
    """The mistake to look at: the mean of the Bs times the mean of the As. Its ΔW is (1/M²) Σ_ij B_i A_j, of which
    only the M terms with i = j were ever trained. For notebooks and tests; merge with `merge_adapters`."""
    check_same_weights(adapters)
    mean = {name: tuple(torch.stack(parts).mean(0) for parts in zip(*(a.factors[name] for a in adapters)))
            for name in adapters[0].factors}
    return Adapter(mean, adapters[0].transposed)


def relative_error(adapter: Adapter, exact: Adapter) -> float:
    """‖ΔW − ΔW_exact‖ / ‖ΔW_exact‖ over all matrices together; 0 where both are 0."""
    difference = combine_adapters([adapter, exact], [1.0, -1.0])
    lost, total = (sum(adapter_gram([one], name).item() for name in exact.factors) for one in (difference, exact))
    return math.sqrt(max(lost, 0.0) / total) if total else 0.0


def check_same_weights(adapters: Sequence[Adapter]) -> None:
    """Raise unless all adapt the same weights."""
    first = adapters[0]
    for number, adapter in enumerate(adapters[1:], 1):
        for name in sorted(first.factors.keys() ^ adapter.factors.keys()):
            raise ValueError(f"only one of adapters[0] and adapters[{number}] changes {name!r}; were they trained "
                             "with the same target modules?")
        for name in first.factors:
            shapes = [(len(one.factors[name][0]), one.factors[name][1].shape[1], name in one.transposed)
                      for one in (first, adapter)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapters[0] and adapters[{number}] change {name!r} in different shapes; were they "
                                 "trained on the same policy?")


# --- PEFT folders ---


def load_adapter(folder) -> Adapter:
    """An adapter from a PEFT folder, its scaling (alpha/r, rsLoRA, patterns) taken into B.

    Raises ValueError for a folder that holds no LoRA, and for what is no sum W + BA: DoRA, biases, whole
    modules trained beside it, and initialisations that change the base model (PiSSA, OLoRA, CorDA, LoftQ).
    """
    folder = Path(folder)
    pattern_key = library("peft.utils.other", "lora").get_pattern_key
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; is it a folder that PEFT saved?")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DORA" if config.get("use_dora") else config.get("peft_type")
        raise ValueError(f"{folder} holds an adapter of type {kind}; only LoRA, W + BA, can be merged")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(f"{folder} was trained from init_lora_weights={start!r}, which changes the base model too; "
                         "convert it to plain LoRA when you save it (PEFT's path_initial_model_for_weight_conversion)")
    tensors = load_tensors(folder / TENSORS, "cpu", "copy or save the adapter again", ours=False)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(PREFIX).rpartition(".lora_")
        if not module or factor not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ValueError(f"{folder / TENSORS} has a tensor {key!r}, which is no factor of a LoRA matrix; "
                             "only adapters of linear layers, without biases or saved modules, can be merged")
        pairs.setdefault(module, {})[factor[0]] = tensor
    factors = {}
    for module, pair in sorted(pairs.items()):
        if len(pair) < 2:
            raise ValueError(f"{folder / TENSORS} has only one factor of {module!r}; copy or save the adapter again")
        patterns = config.get("alpha_pattern") or {}
        alpha, r = patterns.get(pattern_key(patterns, module), config["lora_alpha"]), len(pair["A"])
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        factors[f"{module}.weight"] = (widen(pair["B"]) * scaling, widen(pair["A"]))
    if not factors:
        raise ValueError(f"{folder / TENSORS} is empty; copy or save the adapter again")
    return Adapter(factors, frozenset(factors) if config.get("fan_in_fan_out") else frozenset())


def save_adapter(adapter: Adapter, folder, base=None) -> None:
    """Write a PEFT folder, which `PeftModel.from_pretrained(model, folder)` loads. `base`: the name or folder of the
    policy that it changes, noted in it. Raises ValueError for a folder that is not empty."""
    LoraConfig = library("peft", "lora").LoraConfig
    mixed = adapter.transposed and adapter.transposed != adapter.factors.keys()
    if mixed:
        raise ValueError("an adapter of both Conv1D and Linear layers has no PEFT folder; fold it into its policy")
    rank, tensors = adapter.rank, {}
    for name, (B, A) in adapter.factors.items():
        module, short = name.removesuffix(".weight"), rank - B.shape[1]  # zeros make up one rank for all
        tensors[f"{PREFIX}{module}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, short)).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = nn.functional.pad(B, (0, short)).contiguous()
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=[n.removesuffix(".weight") for n in adapter.factors],
        fan_in_fan_out=bool(adapter.transposed), task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=None if base is None else str(base))
    with appearing_whole(free_folder(folder)) as made:
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
        config.save_pretrained(made)


def merge_adapter_folders(init, policies: Sequence, out, method: str = "slerp", eta: float = 1.0,
                          rank: int | None = None) -> float:
    """Merge PEFT folders that were trained on the policy `init`, and move η of the way to the merge.

    `out` becomes a Hugging Face folder, init's files with ΔW added, one file of weights at a time; with
    `rank` a PEFT folder of that rank. Returns the relative error of ΔW: 0 without a rank.
    Raises ValueError as the functions that it is made of.
    """
    eta = check_eta(eta)
    merged = merge_adapters([load_adapter(folder) for folder in policies], method=method)
    merged = combine_adapters([merged], [eta])
    if rank is not None:
        merged, error = truncate(merged, rank)
        save_adapter(merged, out, base=init)
        return error
    checkpoint = open_checkpoint(Path(init))
    for name in sorted(merged.factors.keys() - checkpoint.tensors.keys()):
        raise ValueError(f"the adapters change {name!r}, which {init} has not; were they trained on it?")
    with appearing_whole(free_folder(out)) as made:
        for file in checkpoint.headers:
            tensors = load_tensors(checkpoint.folder / file, "cpu", "copy or save it again", ours=False)
            tensors |= {name: changed(tensors, merged, name, 1.0) for name in tensors.keys() & merged.factors.keys()}
            save_file(tensors, made / file, metadata={"format": "pt"})
        carry_over(checkpoint, made)
    return 0.0


def front_adapter(run_folder, eta: float = 1.0, iteration: int = -1,
                  rank: int | None = None) -> tuple[Adapter, float]:
    """A point of a LoRA run's front as one adapter on its SFT policy, and its relative error.

    Exact (error 0) at rank M·r times the iteration; with `rank` the nearest of that rank.
    """
    folder, settings = Path(run_folder), read_config(run_folder)["settings"]
    if not settings.get("lora"):
        raise ValueError(f"{folder} is not a run of adapters; its policies are whole models")
    config = settings["config"]
    last = config["iterations"] if iteration == -1 else iteration
    if not 1 <= last <= config["iterations"]:
        raise ValueError(f"no iteration {iteration}; there are 1 to {config['iterations']}, and -1, the last")
    merges = []
    for i in range(1, last + 1):
        adapters = [load_adapter(folder / f"iteration-{i}" / f"run-{m}" / "adapter")
                    for m in range(1, config["runs"] + 1)]
        merges.append(adapters[0] if len(adapters) == 1 else merge_adapters(adapters, method=config["merge"]))
    check_eta(eta)
    whole = combine_adapters(merges, [eta * config["eta"]] * (last - 1) + [eta])
    return (whole, 0.0) if rank is None else truncate(whole, rank)


def compare_merges(result, adapters: Sequence[Adapter], rank: int,
                   etas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> list[dict]:
    """Three ways to merge the adapters of a first iteration, measured on a WarpResult's held-out prompts.

    ΔW merged; that at a rank; and the factors merged separately, which is the mistake. A dict each: `name`,
    `error` (relative, of ΔW at η = 1) and `points` (η · ΔW on the SFT policy), which `plots.draw_merges` draws.
    """
    exact = merge_adapters(adapters)
    small, _ = truncate(exact, rank)
    ways = {"ΔW merged": exact, f"ΔW merged, rank {rank}": small, "A and B merged separately": factors_merged(adapters)}
    metrics = result.measure([fold(result.sft, way, eta) for way in ways.values() for eta in etas])
    points = [{"eta": eta, **m.as_dict()} for m, eta in zip(metrics, [*etas] * len(ways))]
    return [{"name": name, "error": relative_error(way, exact), "points": points[n * len(etas):(n + 1) * len(etas)]}
            for n, (name, way) in enumerate(ways.items())]


# --- stage 1 on adapters ---


class AdapterTrainer:
    """Stage 1 with adapters in place of weights: M runs train their factors over one base model.

    PEFT's layers stand around the same memory as the policy's weights, which therefore must hold θ_init
    while runs train. What comes out are dense policies and anchors, so that all that follows is as ever.
    """

    def __init__(self, policy, settings: LoraSettings):
        """Raises ValueError for a policy in 16 bits, into which a small ΔW cannot be folded."""
        peft = library("peft", "lora")
        dtype = next(policy.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the policy is {dtype}, and a small ΔW added to such weights is rounded away; "
                             "load it in float32 to train adapters")
        self.settings, self.policy = settings, policy
        targets = settings.target_modules
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in policy.parameters()}
        transposed = any(isinstance(module, Conv1D) for module in policy.modules())
        self.model = peft.get_peft_model(copy.deepcopy(policy, shared), peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.rslora, lora_dropout=0.0,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            fan_in_fan_out=transposed, task_type="CAUSAL_LM")).eval()
        layers = {name: layer for name, layer in self.model.named_modules() if hasattr(layer, "lora_A")}
        for name, layer in layers.items():
            if not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
                raise ValueError(f"target_modules takes in {name.removeprefix(PREFIX)!r}, which is no linear layer; "
                                 "name linear layers only")
        modules = {name: f"{name.removeprefix(PREFIX)}.weight" for name in layers}
        self.names = {weight: tuple(f"{name}.lora_{factor}.default.weight" for factor in "BA")
                      for name, weight in modules.items()}
        self.bases = {weight: f"{name}.base_layer.weight" for name, weight in modules.items()}
        self.transposed = frozenset(modules[name] for name, layer in layers.items()
                                    if isinstance(layer.get_base_layer(), Conv1D))
        self.shapes = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def size(self) -> tuple[int, int]:
        """How many numbers the factors of one run have, and the matrices that they change."""
        return (sum(shape.numel() for shape in self.shapes.values()),
                sum(self.policy.get_parameter(name).numel() for name in self.names))

    def train(self, tokenizer, prompts: Prompts, runs: Sequence[Run], on_step: OnStep | None = None) -> list[RunState]:
        """Train runs of one θ_init together, as `train_batched` does; states have dense policies and anchors, and
        the factors as `trained`."""
        init = runs[0].init
        load_weights(self.policy, init)
        starts = [dataclasses.replace(run, state=self.start(run)) for run in runs]

        def dense(states: list[RunState]) -> list[RunState]:
            return [RunState(state.step, fold(init, self.adapter(state.policy)),
                             {name: state.anchor.get(name, base.clone()).to(base) for name, base in init.items()},
                             state.exp_avg, state.exp_avg_sq, trained=state.policy) for state in states]

        def watch(_, step, states: Callable[[], list[RunState]], metrics) -> None:
            on_step(runs, step, lambda: dense(states()), metrics)

        return dense(train_batched(self.model, tokenizer, prompts, starts, watch if on_step else None,
                                   anchor_of=partial(WeightAnchor, self)))

    def start(self, run: Run) -> RunState:
        """Where a run begins or goes on: factors, and the adapted matrices of its anchor."""
        state = run.start()
        anchor = {name: state.anchor[name] for name in self.names}
        if run.state is None:
            factors = self.first_factors(run)
            zeros = {name: torch.zeros_like(tensor) for name, tensor in factors.items()}
            return RunState(0, factors, anchor, zeros, zeros)
        factors, *moments = ({name: part[name] for name in self.shapes}
                             for part in (state.trained, state.exp_avg, state.exp_avg_sq))
        return RunState(state.step, factors, anchor, *moments)

    def first_factors(self, run: Run) -> dict[str, Tensor]:
        """B = 0, so that ΔW = 0, and A uniform within 1/√in as PEFT's, from the run's own random numbers."""
        draw, like = generator(*run.key, ADAPTERS), next(iter(run.init.values()))
        return {name: like.new_zeros(shape) if ".lora_B." in name else
                torch.from_numpy(draw.uniform(-1, 1, tuple(shape)) / math.sqrt(shape[1])).to(like)
                for name, shape in self.shapes.items()}

    def save(self, folder, run: Run, state: RunState) -> None:
        """Write the adapter of a finished run beside its policy: a PEFT folder on the iteration's init."""
        base = folder.path / "sft" if run.iteration == 1 else folder.iteration(run.iteration - 1) / "next-init"
        target = folder.run(run.iteration, run.number) / "adapter"
        if not target.is_dir():
            save_adapter(self.adapter(state.trained), target, base)

    def adapter(self, factors: Weights) -> Adapter:
        """The adapter of a run's factors, under the names of the weights that it changes."""
        return Adapter({weight: (self.settings.scaling * factors[B], factors[A])
                        for weight, (B, A) in self.names.items()}, self.transposed)


class WeightAnchor:
    """θ_ema of E runs of adapters: the moving average of the matrices W + ΔW themselves.

    The average of factors would be a smaller anchor and another one: B̄Ā is not the average of BA.
    """

    def __init__(self, trainer: AdapterTrainer, ensemble: Ensemble, states: Sequence[Weights], rates: Sequence[float]):
        self.trainer, self.ensemble = trainer, ensemble
        device = trainer.policy.device
        self.average = {name: torch.stack([state[name] for state in states]).to(device) for name in trainer.names}
        self.mu = next(iter(self.average.values())).new_tensor(rates).view(-1, 1, 1)
        self.no_factors = {name: torch.zeros(len(states), *shape, device=device, dtype=self.mu.dtype)
                           for name, shape in trainer.shapes.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights (E, …) to score with: the averages in the place of the base's matrices, and ΔW = 0."""
        return {**self.no_factors, **{self.trainer.bases[name]: average for name, average in self.average.items()}}

    @torch.no_grad()
    def update(self) -> None:
        """θ_ema ← (1 − μ) θ_ema + μ (W + ΔW)."""
        for name, (B, A) in self.trainer.names.items():
            delta = self.trainer.settings.scaling * self.ensemble.weights[B] @ self.ensemble.weights[A]  # (E, out, in)
            base = self.trainer.policy.get_parameter(name)
            self.average[name].lerp_(base + (delta.mT if name in self.trainer.transposed else delta), self.mu)

    def state(self, e: int) -> dict[str, Tensor]:
        """The adapted matrices of run e's anchor, copied."""
        return {name: average[e].clone() for name, average in self.average.items()}
