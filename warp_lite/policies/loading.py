"""Policies from folders and the hub, and back: safetensors only, no remote code, errors of one line."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from ..storage.files import first_line
from .ends import end_ids
from .gguf import as_folder, is_gguf
from .hub import HUB_NAME, local, reach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_policy(name_or_folder: str | Path, dtype: torch.dtype | str = torch.float32,
                device: str | torch.device = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer from the hub, a folder or a GGUF file: no pickle, no remote code.

    A GGUF file is converted once, into a folder of the cache (see `gguf.as_folder`).
    The model is in `dtype`, "auto" for that of its file, on `device`, and in the mode that evaluates.
    Raises ValueError, naming the folder, when it is missing, cannot be read or lacks weights, and when a
    name of the hub cannot be had (see `hub.reach`).
    """
    folder = local(str(name_or_folder))
    if is_gguf(Path(folder)):
        with one_line("a policy", folder):
            folder = str(as_folder(Path(folder), save_policy))
    with reading("a policy", folder) as options:
        tokenizer = load_tokenizer(folder, **options)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")  # the library makes up one without words
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        reads_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # and text alone as a causal LM does
        auto = AutoModelForCausalLM
        if reads_pictures and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = AutoModelForImageTextToText
        model = from_pretrained(auto, folder, dtype=dtype, **options)
        end_ids(model, tokenizer)
    return model.to(device).eval(), tokenizer


def check_whole(model: torch.nn.Module, what: str = "policy") -> None:
    """Raise ValueError for a model with PEFT's layers: its weights are a base's and adapters', under PEFT's names."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(f"the {what} is a PEFT model; to train adapters, pass its base and lora=LoraSettings(…) "
                         "(--lora-rank), else pass model.merge_and_unload()")


def pick_device(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU where there is none.

    Raises ValueError for a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"the device {str(name)!r} cannot be used: {first_line(error)}; "
                         "'auto' takes the first GPU, or the CPU where there is none") from error


@contextmanager
def reading(what: str, folder: str) -> Iterator[dict]:
    """Read a folder of the library's quietly; whatever is raised becomes a ValueError of one line that names it.

    Gives the options to load it with. A name of the hub is asked for first, so that nothing waits in vain.
    """
    with one_line(what, folder):
        path = Path(folder)
        if path.is_file():
            raise ValueError("it is a file, neither a folder nor in GGUF")
        if not path.exists() and not HUB_NAME.fullmatch(folder):
            raise ValueError("there is no such folder")
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError("the folder has no config.json")
        yield reach(folder)


@contextmanager
def one_line(what: str, folder: str) -> Iterator[None]:
    """Keep the library quiet; whatever it raises becomes a ValueError of one line that names what was read."""
    try:
        with quiet():
            yield
    except Exception as error:  # the library, its config checks, safetensors and tokenizers raise classes of their own
        hint = "; is a file truncated?" if "safetensor" in repr(type(error)).lower() else ""
        raise ValueError(f"cannot load {what} from {folder!r}: {first_line(error)}{hint}") from error


PROBE = "It isn't  the film\u2019s plot I'd seen in 2024:\n\n\tna\u00efve, 12345 E\u0301T\u00c9! f(x):\n    return"


def load_tokenizer(folder: str, **options: object) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, which splits text as its own tokenizer.json says.

    The library rebuilds the tokenizers of some architectures by rules of its own whatever the file
    says (a Llama tokenizer in a Qwen 2 folder, say), and the policy would read other tokens than it was
    trained on. Where that is so the file is followed, and a line on stderr says so.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    if type(tokenizer) is PreTrainedTokenizerFast:  # which reads the file and adds nothing
        return tokenizer
    if cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options) is None:
        return tokenizer
    as_saved = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
    library, saved = (t(PROBE, add_special_tokens=False)["input_ids"] for t in (tokenizer, as_saved))
    if library == saved:
        return tokenizer
    print(f"warp-lite: the library would read the tokenizer in {folder} as a {type(tokenizer).__name__}, which splits "
          "text otherwise than its tokenizer.json; the file is followed (elsewhere: PreTrainedTokenizerFast)",
          file=sys.stderr)
    return as_saved


def from_pretrained(auto: type, folder: str, **options: object) -> PreTrainedModel:
    """The library's loading, safetensors only, refusing a file that lacks weights: it would make them up.

    `auto` is a class of the library's such as AutoModelForCausalLM. Raises ValueError for weights that are missing or
    of other shapes, and whatever the library raises.
    """
    model, info = auto.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True,
        output_loading_info=True, **options)
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"its tensor {name!r} has shape {tuple(found)} where its config asks for {tuple(wanted)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its file lacks weights that its config asks for ({len(missing)}, {missing[0]!r} first)")
    return model


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a Hugging Face folder: safetensors weights, config, generation config, tokenizer. Raises what the library
    does."""
    folder, generation = Path(folder), getattr(model, "generation_config", None)
    with quiet():
        if generation is not None:
            model.generation_config = GenerationConfig()  # the library refuses to write some that it has read
        try:
            model.save_pretrained(folder)
        finally:
            if generation is not None:
                model.generation_config = generation
        if generation is not None:
            plain = copy.copy(generation)
            for name, value in vars(generation).items():
                if hasattr(value, "tolist"):  # ids in an array or tensor, which JSON cannot hold
                    setattr(plain, name, value.tolist())
            plain.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(folder)


class quiet:
    """Silence the library's progress bars and warnings while a folder is read or written."""

    def __enter__(self):
        from transformers.utils import logging as hf

        self.bars = hf.is_progress_bar_enabled()
        hf.disable_progress_bar()
        self.logger = logging.getLogger("transformers")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc):
        from transformers.utils import logging as hf

        self.logger.setLevel(self.level)
        if self.bars:
            hf.enable_progress_bar()
