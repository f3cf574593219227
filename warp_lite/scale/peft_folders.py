"""Adapters as PEFT folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..averaging.liti import check_eta
from ..averaging.state_dicts import widen
from ..storage.files import read_json
from ..storage.model_folders import appearing_whole, carry_over, free_folder, open_checkpoint
from ..storage.run_config import read_config
from ..storage.tensors import load_tensors
from .adapters import Adapter, changed, combine_adapters, factors_merged, fold, merge_adapters, relative_error, truncate

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules


def library(name: str, extra: str):
    """An optional library, or an ImportError of one line that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}, which is not installed: pip install 'warp-lite[{extra}]'") from error


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
