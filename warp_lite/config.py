"""Every setting of Algorithm 1, of its ablations and of adapters, and the presets of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType

from .averaging.coefficients import MERGES

ANCHORS = ("ema", "sft", "none")
PRECISIONS = ("auto", "fp32", "bf16")
READ = {int: int, float: float, str: str, bool: lambda text: {"true": True, "false": False}[text.lower()],
        NoneType: lambda text: {"none": None}[text.lower()]}


@dataclass(frozen=True)
class WarpConfig:
    """The settings of one run of WARP (Algorithm 1), checked when they are made.

    `iterations` is I, `runs` is M, `steps` is T: the RL steps of one run. `batch_size`
    prompts are sampled at each step, one completion each. `beta` weighs the KL to the
    anchor, in reward units per nat. `mu` is the rate of the anchor's moving average and
    `eta` the rate at which the next iteration's init moves from the present one to the merge.

    Ablations: `anchor="sft"` keeps the anchor at the SFT policy, `"none"` drops the KL
    (as does `beta=0`); `merge="lerp"` averages linearly, `"none"` takes the policy of a
    single run (`runs=1`); `eta=1` starts the next iteration from the merge itself.

    The loss is divided by `max_new_tokens`, which only matters to where `max_grad_norm`
    begins to clip. `eval_every` is how many steps lie between two points of a trajectory (0: none), and
    `save_every` between two saves of a run in its folder; 0, the default, saves as often as takes a
    hundredth of the time.

    Memory and precision; none of these changes what is computed, beyond rounding:

    - `precision`: of the transformer's matrix products while training. Weights, gradients,
      Adam's moments, the anchor, the vocabulary head and the loss are float32 in any case.
      `"bf16"` takes those products in bfloat16; `"auto"` does so on a CUDA device of compute
      capability 8.0 or more and is `"fp32"` elsewhere.
    - `micro_batch`: how many completions of a run go through the loss at once; the gradients
      add up to that of the batch. 0: all of them.
    - `sample_batch`: how many completions of a run are sampled at once. 0: all of them.
    - `logit_chunk`: at how many tokens of a run the logits are held at once while the loss is
      taken; they are computed a second time for the gradient. 0: at all of them.
    - `checkpointing`: keep the input of each layer only, and compute the layer a second time
      for the gradient.
    - `offload`: keep the optimiser's state and the anchor on the CPU while the policy trains
      on another device.

    Raises ValueError or TypeError on a value that cannot be used.
    """

    iterations: int = 2
    runs: int = 4
    steps: int = 160
    batch_size: int = 8
    lr: float = 5e-4
    beta: float = 0.3
    mu: float = 0.01
    eta: float = 0.4
    anchor: str = "ema"
    merge: str = "slerp"
    max_new_tokens: int = 24
    temperature: float = 1.0
    seed: int = 0
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    eval_every: int = 20
    save_every: int = 0
    # Not in the repr, which names what is computed and by which results are found again.
    precision: str = dataclasses.field(default="auto", repr=False)
    micro_batch: int = dataclasses.field(default=0, repr=False)
    sample_batch: int = dataclasses.field(default=0, repr=False)
    logit_chunk: int = dataclasses.field(default=0, repr=False)
    checkpointing: bool = dataclasses.field(default=False, repr=False)
    offload: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self):
        for name, kinds in kinds_of(type(self)).items():
            value = getattr(self, name)
            if not is_of(value, kinds):
                number = "number of type " if {int, float} & set(kinds) else ""
                raise TypeError(f"{name} must be a {number}{names_of(kinds)}, not {value!r}")
            if float in kinds and value is not None and not abs(value) <= sys.float_info.max:  # NaN, or a huge int
                raise ValueError(f"{name} must be finite, not {value!r}"[:120])
        for name in ("iterations", "runs", "steps", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("warmup_steps", "seed", "beta", "eval_every", "save_every", "micro_batch", "sample_batch",
                     "logit_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("lr", "temperature", "max_grad_norm", "adam_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("mu", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name, words in (("anchor", ANCHORS), ("merge", (*MERGES, "none")), ("precision", PRECISIONS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {getattr(self, name)!r}")
        if self.merge == "none" and self.runs != 1:
            raise ValueError(f"merge='none' merges nothing and needs runs=1, not {self.runs}")
        if self.batch_size < 2:
            raise ValueError("batch_size must be 2 or more: the leave-one-out baseline needs another sample")

    def replace(self, **changes: object) -> WarpConfig:
        """A copy with some settings changed.

        Raises ValueError for an unknown name, with the nearest, and ValueError or TypeError for a value that cannot be
        used.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0)
                raise ValueError(f"there is no setting {name!r}; the nearest is {near[0]!r}")
        return dataclasses.replace(self, **changes)

    def with_text(self, assignments: list[str]) -> WarpConfig:
        """A copy changed by texts of the form NAME=VALUE, as the command line's --set gives them.

        Raises ValueError for a text of another form, an unknown name and a value that cannot be used.
        """
        changes, kinds = {}, kinds_of(type(self))
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set wants NAME=VALUE, not {text!r}")
            if name not in kinds:
                self.replace(**{name: value})  # raises, naming the nearest
            for kind in sorted(kinds[name], key=lambda kind: kind is str):  # any text is a str: it comes last
                try:
                    changes[name] = READ[kind](value)
                    break
                except (ValueError, KeyError):
                    pass
            else:
                wanted = "true or false" if kinds[name] == (bool,) else f"of type {names_of(kinds[name])}"
                raise ValueError(f"{name} must be {wanted}, not {value!r}")
        return self.replace(**changes)


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


@lru_cache
def kinds_of(config: type[WarpConfig]) -> dict[str, tuple[type, ...]]:
    """The types that each field of a config may hold, by its annotation: `int | None` gives (int, NoneType)."""
    hints = typing.get_type_hints(config)
    return {field.name: typing.get_args(hints[field.name]) or (hints[field.name],)
            for field in dataclasses.fields(config)}


def check_count(name: str, value: object) -> None:
    """Raises ValueError, naming it, for a number of things that is no whole number of 1 or more."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")


def check_sampling(max_new_tokens: object, temperature: object) -> None:
    """Raises ValueError or TypeError, naming it, for a length or temperature of completions that no config takes."""
    WarpConfig(max_new_tokens=max_new_tokens, temperature=temperature)


def is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types; an int is a float, and a bool is no int."""
    if isinstance(value, bool):
        return bool in kinds
    is_whole_float = float in kinds and isinstance(value, int)
    return is_whole_float or isinstance(value, kinds)


def names_of(kinds: tuple[type, ...]) -> str:
    """The names of types in one text: "int or None"."""
    return " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)


@dataclass(frozen=True)
class Preset:
    """A world, by the name that `load_world` takes, the settings to run it with, and where."""

    world: str
    config: WarpConfig
    about: str
    device: str = "cpu"


# The tiny worlds' settings were measured; those of the worlds from the hub follow the paper's and are not tuned.
IMDB = WarpConfig(runs=2, steps=200, batch_size=16, lr=1e-5, beta=0.1, eta=0.5, warmup_steps=20, eval_every=50)
PRESETS = {
    "tiny": Preset("tiny-gpt2", WarpConfig(), "film reviews, a GPT-2 of 110k parameters; every effect is visible"),
    "tiny-gemma": Preset("tiny-gemma", WarpConfig(), "the same reviews, a Gemma 3 of the same size"),
    "tiny-noisy": Preset(
        "tiny-gpt2",
        WarpConfig(steps=100, batch_size=4, lr=1e-3, eta=0.3),
        "batches of 4, so that gradient noise rules and merging gains most",
    ),
    "smollm2": Preset(
        "smollm2",
        WarpConfig(steps=30, batch_size=4, lr=2e-5, beta=0.1, mu=0.02, eta=0.4, max_new_tokens=16, warmup_steps=4,
                   eval_every=15),
        "openings of film reviews in plain English, SmolLM2 (135M) by `make real-model`; an hour of two cores",
    ),
    "gpt2-imdb": Preset("gpt2-imdb", IMDB, "GPT-2 (124M) on film reviews, from the hub; for a GPU", "auto"),
    "gemma-imdb": Preset("gemma-imdb", IMDB, "Gemma 3 (270M) on the same, after a short SFT; for a GPU", "auto"),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError that lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
