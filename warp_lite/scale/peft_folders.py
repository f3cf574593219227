"""Adapters as PEFT folders."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..averaging.checks import check_eta
from ..averaging.state_dicts import widen
from ..storage.files import read_json
from ..storage.model_folders import (
    INDEX,
    SINGLE,
    Checkpoint,
    appearing_whole,
    carry_over,
    free_folder,
    open_checkpoint,
    stored_names,
)
from ..storage.provenance import json_hash
from ..storage.run_config import read_config
from ..storage.tensors import load_tensors, weights_hash
from .adapters import Adapter, adapted, combine_adapters, factors_merged, fold, merge_adapters, relative_error, truncate

if TYPE_CHECKING:
    from ..result import WarpResult

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules
BASE = "base.json"  # where save_adapter notes the hash of the matrices that an adapter changes
# Fields of a LoraConfig that are heeded here, or that say how the factors came to be and not what is added.
HEEDED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
          "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
          "use_rslora", "init_lora_weights", "eva_config", "layers_to_transform", "layers_pattern", "rank_pattern",
          "alpha_pattern", "megatron_core")
STARTS_AT_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: W is left as it is


def library(name: str, extra: str) -> ModuleType:
    """An optional library. Raises ImportError of one line that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}, which is not installed: pip install 'warp-lite[{extra}]'") from error


def load_adapter(folder: str | Path) -> Adapter:
    """An adapter from a PEFT folder, its scaling (alpha/r, rsLoRA, patterns) taken into B.

    Raises ValueError for a folder that holds no LoRA, and for what is no sum W + BA of this W: whatever a setting of
    PEFT's that is not known here adds to it or puts in its place (DoRA, biases, activated LoRA, whole modules trained
    beside it, …), and initialisations that change the base model (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
    """
    folder = Path(folder)
    pattern_key = library("peft.utils.other", "lora").get_pattern_key
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; is it a folder that PEFT saved?")
    config = read_json(folder / CONFIG)
    check_plain(folder, config)
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


def check_plain(folder: Path, config: Mapping) -> None:
    """Raises ValueError, naming field and value, unless a PEFT config is that of a sum W + BA."""
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DORA" if config.get("use_dora") else config.get("peft_type")
        raise ValueError(f"{folder} holds an adapter of type {kind}; only LoRA, W + BA, can be merged")
    start = config.get("init_lora_weights", True)
    if start not in STARTS_AT_BASE:
        raise ValueError(f"{folder} was trained from init_lora_weights={start!r}, which changes the base model too; "
                         "convert it to plain LoRA when you save it (PEFT's path_initial_model_for_weight_conversion)")
    if isinstance(config.get("lora_alpha"), bool) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{folder} has lora_alpha = {config.get('lora_alpha')!r}, which is no number; save it again")
    usual = library("peft", "lora").LoraConfig().to_dict()
    for name, value in config.items():
        is_set = (value or usual.get(name)) and value != usual.get(name)
        if name not in HEEDED and is_set:
            raise ValueError(f"{folder} was trained with {name} = {str(value)[:60]}, which is more than a sum W + BA, "
                             "or not known to be one; only plain LoRA can be merged")


def matrices_hash(checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """The hash of some matrices of a checkpoint, widened to what they are computed in; None where it lacks one."""
    where = stored_names(names, checkpoint.tensors)
    if len(where) < len(names):
        return None
    hashes = []
    for name in sorted(names):
        with safe_open(checkpoint.folder / checkpoint.tensors[where[name]].file, framework="pt") as file:
            hashes.append(weights_hash({name: widen(file.get_tensor(where[name]))}))
    return json_hash(hashes)


def is_model_folder(path: str | Path | None) -> bool:
    """Whether a path is a folder with weights as safetensors."""
    return path is not None and any((Path(path) / name).is_file() for name in (SINGLE, INDEX))


def check_base(folder: str | Path, adapter: Adapter, init: str | Path, checkpoint: Checkpoint) -> None:
    """Raise ValueError for an adapter that was trained on other weights than init's; where that cannot be known, a
    line on stderr says so.

    It is known where `save_adapter` noted their hash, and where the base that PEFT noted is a folder that is there.
    """
    folder, noted = Path(folder), None
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if (folder / BASE).is_file():
        noted = read_json(folder / BASE).get("sha256")
    if noted is None and is_model_folder(base):
        if os.path.realpath(base) == os.path.realpath(init):
            return
        noted = matrices_hash(open_checkpoint(Path(base)), adapter.factors)
    if noted is None:
        if str(base) != str(init):
            print(f"warp-lite: whether {folder} was trained on {init} cannot be known here: it names "
                  f"{base or 'no base'}", file=sys.stderr)
    elif noted != matrices_hash(checkpoint, adapter.factors):
        raise ValueError(f"{folder} was trained on other weights than those of {init}: its base is "
                         f"{base or 'not named'}; give that as init, or adapters of this one")


def save_adapter(adapter: Adapter, folder: str | Path, base: str | Path | None = None) -> None:
    """Write a PEFT folder, which `PeftModel.from_pretrained(model, folder)` loads. `base`: the name or folder of the
    policy that it changes, noted in it; of a folder also the hash of the matrices that are changed, by which a merge
    onto other weights is refused. Raises ValueError for a folder that is not empty."""
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
    noted = matrices_hash(open_checkpoint(Path(base)), adapter.factors) if is_model_folder(base) else None
    with appearing_whole(free_folder(folder)) as made:
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
        config.save_pretrained(made)
        if noted is not None:
            (made / BASE).write_text(json.dumps({"sha256": noted}))


def merge_adapter_folders(init: str | Path, policies: Sequence[str | Path], out: str | Path, method: str = "slerp",
                          eta: float = 1.0, rank: int | None = None) -> float:
    """Merge PEFT folders that were trained on the policy `init`, and move η of the way to the merge.

    A single one is its own merge. Adapters of other weights than init's are refused (see `check_base`).
    `out` becomes a Hugging Face folder, init's files with ΔW added, one file of weights at a time; with
    `rank` a PEFT folder of that rank. Returns the relative error of ΔW: 0 without a rank.
    Raises ValueError for folders that hold no plain LoRA, adapters that do not fit init or each other, and an `out`
    that is not empty.
    """
    eta, checkpoint = check_eta(eta), open_checkpoint(Path(init))
    adapters = [load_adapter(folder) for folder in policies]
    where = stored_names(adapters[0].factors, checkpoint.tensors)
    for name in sorted(adapters[0].factors.keys() - where.keys()):
        raise ValueError(f"the adapters change {name!r}, which {init} has not; were they trained on it?")
    for folder, adapter in zip(policies, adapters):
        check_base(folder, adapter, init, checkpoint)
    merged = adapters[0] if len(adapters) == 1 else merge_adapters(adapters, method=method)
    merged = combine_adapters([merged], [eta])
    if rank is not None:
        merged, error = truncate(merged, rank)
        save_adapter(merged, out, base=init)
        return error
    merged = Adapter({where[name]: pair for name, pair in merged.factors.items()},
                     frozenset(where[name] for name in merged.transposed))
    with appearing_whole(free_folder(out)) as made:
        for file in checkpoint.headers:
            tensors = load_tensors(checkpoint.folder / file, "cpu", "copy or save it again", ours=False)
            tensors |= {name: adapted(tensors, merged, name, 1.0) for name in tensors.keys() & merged.factors.keys()}
            save_file(tensors, made / file, metadata={"format": "pt"})
        carry_over(checkpoint, made)
    return 0.0


def front_adapter(run_folder: str | Path, eta: float = 1.0, iteration: int = -1,
                  rank: int | None = None) -> tuple[Adapter, float]:
    """A point of a LoRA run's front as one adapter on its SFT policy, and its relative error.

    Exact (error 0) at rank M·r times the iteration; with `rank` the nearest of that rank. Runs that failed are in it
    as little as they are in the merges.
    Raises ValueError for a folder that is no run of adapters, and an iteration or η that there is none of.
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
        runs = [folder / f"iteration-{i}" / f"run-{m}" for m in range(1, config["runs"] + 1)]
        adapters = [load_adapter(run / "adapter") for run in runs if not (run / "FAILED").is_file()]
        merges.append(adapters[0] if len(adapters) == 1 else merge_adapters(adapters, method=config["merge"]))
    check_eta(eta)
    whole = combine_adapters(merges, [eta * config["eta"]] * (last - 1) + [eta])
    return (whole, 0.0) if rank is None else truncate(whole, rank)


def compare_merges(result: WarpResult, adapters: Sequence[Adapter], rank: int,
                   etas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> list[dict]:
    """Three ways to merge the adapters of a first iteration, measured on a WarpResult's held-out prompts.

    ΔW merged; that at a rank; and the factors merged separately, which is the mistake. A dict each: `name`,
    `error` (relative, of ΔW at η = 1) and `points` (η · ΔW on the SFT policy), which `plots.draw_merges` draws.
    Raises ValueError for fewer than two adapters, and for those that do not fit the policy.
    """
    exact = merge_adapters(adapters)
    small, _ = truncate(exact, rank)
    ways = {"ΔW merged": exact, f"ΔW merged, rank {rank}": small, "A and B merged separately": factors_merged(adapters)}
    metrics = result.measure([fold(result.sft, way, eta) for way in ways.values() for eta in etas])
    points = [{"eta": eta, **m.as_dict()} for m, eta in zip(metrics, [*etas] * len(ways))]
    return [{"name": name, "error": relative_error(way, exact), "points": points[n * len(etas):(n + 1) * len(etas)]}
            for n, (name, way) in enumerate(ways.items())]
