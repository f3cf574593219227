"""Merge safetensors checkpoints on disk, tensor by tensor, without ever holding a model in memory.

The arithmetic is that of `slerp.py` and `liti.py`; here are only files. The result takes its headers
from init, byte for byte, so it is sharded as init is and every tensor has the same place in it. It is
written beside its destination and renamed when it is complete and on disk.
"""

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_lite.files import check_vouched, sync_path
from warp_lite.liti import check_eta, interpolate
from warp_lite.slerp import CHUNK, combine, gram, slerp_coefficients, undisputed
from warp_lite.weights import check_equal_buffers, check_finite, check_no_overflow, check_weights

WORKERS = 2  # tensors merged side by side, while another is read or written
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Carried over from init: configuration and tokenizer. No weights, and nothing that could be executed.
CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
NOT_CARRIED = ("trainer_state.json", "adapter_config.json")


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did; the bytes are those of tensors."""

    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: `start` counts from the beginning of the file, `size` is in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder's files, each with its raw header, and its tensors in the order of the files."""

    folder: Path
    headers: dict[str, bytes]
    tensors: dict[str, _Stored]


def merge_checkpoints(init: str | Path, policies: Sequence[str | Path], out: str | Path,
                      method: str = "slerp", eta: float = 1.0, weights: Sequence[float] | None = None,
                      progress: bool = True) -> MergeSummary:
    """Merge the policies' folders with SLERP or LERP and move `eta` of the way from init to the result.

    Folders are Hugging Face folders with `model.safetensors`, or shards and their index; config and
    tokenizer come from `init`. A policy may also be a single safetensors file. `out` must be absent
    or empty, and appears only when it is complete.
    Float16 and bfloat16 are computed in float32 and rounded once, at the end. What a run folder's DONE
    vouches for is checked first.
    Raises ValueError, before any work, for folders that do not fit together, that are damaged or altered, or
    that hold pickled weights only, and for wrong arguments; later, for NaN weights. `out` is then untouched.
    A merge that is killed leaves at most `.NAME.….partial` beside `out`, which can be deleted.
    """
    begin = time.perf_counter()
    if method not in ("slerp", "lerp"):
        raise ValueError(f"method is {method!r}; it must be 'slerp' or 'lerp'")
    if isinstance(policies, (str, Path)):
        raise TypeError(f"policies is the single path {str(policies)!r}; pass a list of at least two")
    if len(policies) < 2:
        raise ValueError(f"{len(policies)} policy to merge; pass at least two folders")
    eta, weights = check_eta(eta), check_weights(weights, len(policies))
    out = free_folder(out)
    inputs = (init, *policies)
    init, *policies = [open_checkpoint(Path(folder)) for folder in inputs]
    for policy in policies:
        _check_fits(init, policy)
    for path in dict.fromkeys(map(Path, inputs)):
        check_vouched(path, "train it again, or move it away from there to merge it as your own")
    total = sum(stored.size for stored in init.tensors.values())
    with appearing_whole(out) as partial, ExitStack() as stack, _one_thread():
        advance = stack.enter_context(_progress_bar(total, progress))
        readers = [stack.enter_context(_Reader([init, *policies])) for _ in range(WORKERS)]
        outputs = {file: stack.enter_context(open(partial / file, "xb", buffering=0)) for file in init.headers}
        for file, header in init.headers.items():
            _write(outputs[file], memoryview(header), 0)
        writing = Lock()

        def merge_one(name: str) -> None:
            reader, stored = readers.pop(), init.tensors[name]
            try:
                place = stored.start  # the same as in init's file, whose header this is
                for chunk in _merge_tensor(reader, name, method, weights, eta):
                    with writing:
                        _write(outputs[stored.file], _bytes_of(chunk), place)
                    place += chunk.nbytes
                    advance(chunk.nbytes)
            finally:
                readers.append(reader)

        _in_threads(merge_one, sorted(init.tensors, key=lambda name: -init.tensors[name].size))
        bytes_read = sum(reader.bytes_read for reader in readers)
        for file in init.headers:
            sync_path(partial / file)
        carry_over(init, partial)
    return MergeSummary(len(init.tensors), bytes_read, total, time.perf_counter() - begin)


def _in_threads(function: Callable[[str], None], names: Sequence[str]) -> None:
    """Call the function for every name, a few at a time; what one raises stops the others."""
    with ThreadPoolExecutor(WORKERS) as pool:
        calls = [pool.submit(function, name) for name in names]
        try:
            for call in calls:
                call.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute each tensor in one thread: tensors are merged side by side, and on a busy machine
    torch's own threads, which wait for each other by spinning, made a merge forty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merge_tensor(reader: "_Reader", name: str, method: str, weights: list[float],
                  eta: float) -> Iterator[Tensor]:
    """The merged tensor as consecutive flat chunks in its own dtype."""
    coefficients = None
    if method == "slerp" and DTYPES[reader.checkpoints[0].tensors[name].dtype].is_floating_point:
        products, equal = 0.0, True
        for base, *thetas in reader.chunks(name):
            products = products + gram(base, thetas)                          # (M, M), float64
            equal = equal and all(torch.equal(theta, thetas[0]) for theta in thetas[1:])
        if not equal:  # else `undisputed` below takes every chunk
            coefficients = slerp_coefficients(products, weights)
    for base, *thetas in reader.chunks(name):
        policies = {str(checkpoint.folder): theta
                    for checkpoint, theta in zip(reader.checkpoints[1:], thetas)}
        if not base.is_floating_point():
            check_equal_buffers(name, base, policies)
            yield base
            continue
        check_finite(name, {str(reader.checkpoints[0].folder): base, **policies})
        if coefficients is not None and 1.0 not in weights:
            merged = combine(base, thetas, coefficients)
        else:
            merged = undisputed(thetas, weights)
            if merged is None:
                merged = combine(thetas[0], thetas[1:], weights[1:])
        result = (interpolate(base, merged, eta) if eta != 1 else merged).to(base.dtype)
        check_no_overflow(name, result)
        yield result


class _Reader:
    """Reads the same tensor from several checkpoints, chunk by chunk, into buffers that it reuses.

    Plain reads and not a memory map: a map counts as resident memory, and a file that is cut short while
    it is mapped kills the process.
    """

    def __init__(self, checkpoints: list[Checkpoint]):
        self.checkpoints = checkpoints
        self.bytes_read = 0
        self._buffers = [torch.empty(CHUNK, dtype=torch.float64) for _ in checkpoints]

    def __enter__(self) -> "_Reader":
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(open(path, "rb", buffering=0))
                           for checkpoint in self.checkpoints
                           for path in {checkpoint.folder / file for file in checkpoint.headers}}
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def chunks(self, name: str) -> Iterator[list[Tensor]]:
        """[init's chunk, the policies' chunks], flat; valid until the next is asked for."""
        stored = [checkpoint.tensors[name] for checkpoint in self.checkpoints]
        dtype = DTYPES[stored[0].dtype]
        step = CHUNK * dtype.itemsize
        for offset in range(0, stored[0].size, step):
            size = min(step, stored[0].size - offset)
            parts = [buffer.view(torch.uint8)[:size].view(dtype) for buffer in self._buffers]
            for checkpoint, at, part in zip(self.checkpoints, stored, parts):
                self._read(checkpoint.folder / at.file, at.start + offset, _bytes_of(part))
            yield parts

    def _read(self, path: Path, start: int, view: memoryview) -> None:
        file = self._files[path]
        file.seek(start)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{path} ended early; was it written to during the merge?")
            self.bytes_read += count
            view = view[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


def _write(output: BinaryIO, view: memoryview, place: int) -> None:
    while len(view):
        output.seek(place)
        count = output.write(view)
        view, place = view[count:], place + count


# Reading and checking folders


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the folder's safetensors files and read their headers, or say what is wrong with them."""
    if folder.suffix == ".safetensors" and folder.is_file():
        header, tensors = _read_header(folder)
        return Checkpoint(folder.parent, {folder.name: header}, tensors)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the path of a saved model")
    if (folder / SINGLE).is_file():
        files, weight_map = [SINGLE], None
    elif (folder / INDEX).is_file():
        weight_map = _read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} holds a LoRA adapter, whose factors cannot be merged one by one; "
                         "fold it into its model first (PEFT's merge_and_unload)")
    elif any(pickled := [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]):
        raise ValueError(f"{folder} has pickled weights only ({pickled[0]}), which can run code when "
                         "loaded; save the model as safetensors")
    else:
        raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}; is it a saved model?")

    headers, tensors = {}, {}
    for file in files:
        headers[file], found = _read_header(folder / file)
        if weight_map is not None:
            promised = {name for name, where in weight_map.items() if where == file}
            for name in sorted(promised ^ found.keys()):
                raise ValueError(f"{folder / INDEX} and {file} disagree about tensor {name!r}; "
                                 "save the model again")
        tensors.update(found)
    return Checkpoint(folder, headers, tensors)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors index; save the model again") from None
    for file in files:
        # The names become files of the result: none may lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} names the file {file!r}; only .safetensors files beside it can be read")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path.parent} has no {file}, which its index names; download it again")
    return weight_map


def _read_header(path: Path) -> tuple[bytes, dict[str, _Stored]]:
    """The raw header, length field included, and the tensors in the order in which they are stored."""
    try:
        with safe_open(path, framework="pt"):  # checks everything, the length of the file too
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); "
                         "copy or save it again") from None
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    tensors = {}
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path} has tensor {name!r} in {entry['dtype']}, which cannot be averaged; "
                             f"convert it to one of {', '.join(list(DTYPES)[:4])}")
        start, end = entry["data_offsets"]
        tensors[name] = _Stored(path.name, entry["dtype"], tuple(entry["shape"]),
                                8 + len(header) + start, end - start)
    return length + header, tensors


def _check_fits(init: Checkpoint, policy: Checkpoint) -> None:
    hint = "were both saved from the same architecture?"
    for name, stored in init.tensors.items():
        if name not in policy.tensors:
            raise ValueError(f"{policy.folder} has no tensor {name!r} that {init.folder} has; {hint}")
        other = policy.tensors[name]
        if other.shape != stored.shape:
            raise ValueError(f"{policy.folder} has {name!r} in shape {other.shape}, "
                             f"{init.folder} in {stored.shape}; {hint}")
        if other.dtype != stored.dtype:
            raise ValueError(f"{policy.folder} has {name!r} in {other.dtype}, "
                             f"{init.folder} in {stored.dtype}; convert one of them first")
    for name in policy.tensors:
        if name not in init.tensors:
            raise ValueError(f"{policy.folder} has a tensor {name!r} that {init.folder} has not; {hint}")


# Writing the result


def free_folder(out: str | Path) -> Path:
    """The real path of a folder that is absent or empty; ValueError for any other."""
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it")
    return out


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write to, renamed to `out` at the end, removed on any error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        yield partial
        sync_path(partial)
        if out.exists():
            out.rmdir()  # it was empty; if it no longer is, this fails and so does the merge
        partial.rename(out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_path(out.parent)


def carry_over(init: Checkpoint, partial: Path) -> None:
    """Copy config, generation config, tokenizer and index; last, so that a partial folder has no config."""
    for path in sorted(init.folder.iterdir()):
        is_index = path.name.endswith(".index.json")
        wanted = path.suffix in CARRIED and path.name not in NOT_CARRIED and not is_index
        if path.is_file() and (wanted or path.name == INDEX and SINGLE not in init.headers):
            (partial / path.name).write_bytes(path.read_bytes())
            sync_path(partial / path.name)


@contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar by so many bytes; no bar where stderr is not a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm import tqdm  # only here: it would cost every merge its import
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", file=sys.stderr) as bar:
        yield bar.update
