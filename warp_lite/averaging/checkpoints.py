"""Merge safetensors checkpoints on disk, tensor by tensor, without ever holding a model in memory.

The arithmetic is that of `slerp.py` and `liti.py`, on arrays (`arrays.py`); here are only files, and no torch. The
result takes its headers from init, byte for byte, so it is sharded as init is and every tensor has the same place in
it. It is written beside its destination and renamed when it is complete and on disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from ..storage.files import check_vouched, sync_path
from ..storage.model_folders import (
    Checkpoint,
    appearing_whole,
    carry_over,
    free_folder,
    is_made_anew,
    open_checkpoint,
    stored_names,
)
from .arrays import (
    CHUNK,
    DTYPES,
    FLOATING,
    all_finite,
    inner_products,
    interpolate_arrays,
    merge_arrays,
    narrow_array,
    widen_array,
)
from .checks import buffer_differs, check_eta, check_weights, not_finite, overflows
from .coefficients import MergeMethod, coefficients_of, merge_method, needs_products

WORKERS = 2  # tensors merged side by side, while another is read or written


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did; the bytes are those of tensors."""

    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


def merge_checkpoints(init: str | Path, policies: Sequence[str | Path], out: str | Path,
                      method: str = "slerp", eta: float = 1.0, weights: Sequence[float] | None = None,
                      progress: bool = True) -> MergeSummary:
    """Merge the policies' folders with SLERP or LERP and move `eta` of the way from init to the result.

    A single policy is its own merge, and is moved `eta` of the way from init.
    Folders are Hugging Face folders with `model.safetensors`, or shards and their index; config and
    tokenizer come from `init`. A policy may also be a single safetensors file. `out` must be absent
    or empty, and appears only when it is complete.
    Tensors are matched as the library matches them: with or without the base model's name before theirs, and where
    one file has copies of tied weights, or masks that the library makes anew, which another leaves out.
    Float16 and bfloat16 are computed in float32 and rounded once, at the end. The result is that of a merge in memory,
    within one unit in the last place (see arrays.py). What a run folder's DONE
    vouches for is checked first.
    Raises ValueError, before any work, for folders that do not fit together, that are damaged or altered, or
    that hold pickled weights only, and for wrong arguments, TypeError for one path in the place of a list;
    later, ValueError for NaN weights. `out` is then untouched. Source: Algorithm 1, stages 2 and 3.
    A merge that is killed leaves at most `.NAME.….part` beside `out`, which can be deleted.
    """
    begin = time.perf_counter()
    function = merge_method(method)
    if isinstance(policies, (str, Path)):
        raise TypeError(f"policies is the single path {str(policies)!r}; pass a list of them")
    if not policies:
        raise ValueError("there is no policy to merge; pass a folder, or several")
    eta, weights = check_eta(eta), check_weights(weights, len(policies))
    out = free_folder(out)
    inputs = (init, *policies)
    init, *policies = [open_checkpoint(Path(folder)) for folder in inputs]
    policies = [_fitted(init, policy) for policy in policies]
    for path in dict.fromkeys(map(Path, inputs)):
        check_vouched(path, "train it again, or move it away from there to merge it as your own")
    total = sum(stored.size for stored in init.tensors.values())
    with appearing_whole(out) as partial, ExitStack() as stack:
        advance = stack.enter_context(_progress_bar(total, progress))
        readers = [stack.enter_context(_Reader([init, *policies])) for _ in range(WORKERS)]
        outputs = {file: stack.enter_context(open(partial / file, "xb", buffering=0)) for file in init.headers}
        for file, header in init.headers.items():
            _write(outputs[file], memoryview(header), 0)
        writing = Lock()
        np.empty(2**23, np.uint8)  # glibc keeps what is freed, up to this size, once it has freed as much: no new pages

        def merge_one(name: str) -> None:
            reader, stored = readers.pop(), init.tensors[name]
            try:
                place = stored.start  # the same as in init's file, whose header this is
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error, not a warning
                    for chunk in _merge_tensor(reader, name, function, weights, eta):
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


def _merge_tensor(reader: _Reader, name: str, method: MergeMethod, weights: list[float],
                  eta: float) -> Iterator[np.ndarray]:
    """The merged tensor as consecutive flat chunks in its own dtype."""
    if any(name not in checkpoint.tensors for checkpoint in reader.checkpoints):  # a mask that not all have
        yield from (base for base, *_ in reader.chunks(name))
        return
    labels = [str(checkpoint.folder) for checkpoint in reader.checkpoints]
    dtype = reader.checkpoints[0].tensors[name].dtype
    in_torch = f"torch.{DTYPES[dtype][0]}"
    if dtype not in FLOATING:
        for base, *thetas in reader.chunks(name):
            for label, theta in zip(labels[1:], thetas):
                if not np.array_equal(theta, base):
                    raise buffer_differs(label, name, in_torch)
            yield base
        return
    M = len(weights)
    products, equal = np.zeros((M, M)), True
    twice = needs_products(method) and M > 1
    if twice:
        for chunk in reader.chunks(name):
            base, *thetas = wide = [widen_array(part, dtype) for part in chunk]
            of_chunk = inner_products(base, thetas)
            if not all_finite(of_chunk):  # as all are that have a NaN or an infinity in them, and few others
                _check_finite(name, labels, wide)
            products += of_chunk
            equal = equal and _all_equal(thetas)
    coefficients = coefficients_of(method, products, weights) if M > 1 else weights
    for chunk in reader.chunks(name):
        base, *thetas = wide = [widen_array(part, dtype) for part in chunk]
        if not twice:
            _check_finite(name, labels, wide)
            equal = _all_equal(thetas)
        merged = merge_arrays(base, thetas, coefficients, equal, around_first=not twice)
        result = narrow_array(interpolate_arrays(base, merged, eta) if eta != 1 else merged, dtype)
        if not all_finite(widen_array(result, dtype)):
            raise overflows(name, in_torch)
        yield result


def _check_finite(name: str, labels: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    """Raise ValueError that names the first of the inputs that has NaN or infinity, by its label."""
    for label, array in zip(labels, arrays):
        if not all_finite(array):
            raise not_finite(label, name)


def _all_equal(arrays: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(array, arrays[0]) for array in arrays[1:])


class _Reader:
    """Reads the same tensor from several checkpoints, chunk by chunk, into buffers that it reuses.

    Plain reads and not a memory map: a map counts as resident memory, and a file that is cut short while
    it is mapped kills the process.
    """

    def __init__(self, checkpoints: list[Checkpoint]):
        self.checkpoints = checkpoints
        self.bytes_read = 0
        self._buffers = [np.empty(CHUNK, np.float64) for _ in checkpoints]

    def __enter__(self) -> _Reader:
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(open(path, "rb", buffering=0))
                           for checkpoint in self.checkpoints
                           for path in {checkpoint.folder / file for file in checkpoint.headers}}
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def chunks(self, name: str) -> Iterator[list[np.ndarray]]:
        """[init's chunk, the policies' chunks], flat; valid until the next is asked for."""
        checkpoints = [checkpoint for checkpoint in self.checkpoints if name in checkpoint.tensors]
        stored = [checkpoint.tensors[name] for checkpoint in checkpoints]
        dtype = np.dtype(DTYPES[stored[0].dtype][1])
        step = CHUNK * dtype.itemsize
        for offset in range(0, stored[0].size, step):
            size = min(step, stored[0].size - offset)
            parts = [buffer.view(np.uint8)[:size].view(dtype) for buffer in self._buffers[:len(stored)]]
            for checkpoint, at, part in zip(checkpoints, stored, parts):
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


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.view(np.uint8))


def _write(output: BinaryIO, view: memoryview, place: int) -> None:
    while len(view):
        output.seek(place)
        count = output.write(view)
        view, place = view[count:], place + count


def _fitted(init: Checkpoint, policy: Checkpoint) -> Checkpoint:
    """The policy with its tensors under the names of init's; ValueError where they do not fit.

    A mask that the policy has not, or has otherwise, is left out.
    """
    hint = "were both saved from the same architecture?"
    names, tensors = stored_names(init.tensors, policy.tensors), {}
    for name, stored in init.tensors.items():
        made_anew = is_made_anew(name, stored)
        if name not in names:
            copied = None if made_anew else _equal_copy(init, name, names)
            if copied is not None:
                tensors[name] = policy.tensors[names[copied]]
            elif not made_anew:
                raise ValueError(f"{policy.folder} has no tensor {name!r} that {init.folder} has; {hint}")
            continue
        other = policy.tensors[names[name]]
        if made_anew and (other.shape, other.dtype) != (stored.shape, stored.dtype):
            continue
        if other.shape != stored.shape:
            raise ValueError(f"{policy.folder} has {name!r} in shape {other.shape}, "
                             f"{init.folder} in {stored.shape}; {hint}")
        if other.dtype != stored.dtype:
            wanted = DTYPES[stored.dtype][0]
            raise ValueError(f"{policy.folder} has {name!r} in {other.dtype}, {init.folder} in {stored.dtype}; convert "
                             f"one of them first: from_pretrained(…, dtype={wanted!r}) and save_pretrained")
        tensors[name] = other
    used = set(names.values())
    for name, stored in policy.tensors.items():
        if name not in used and not is_made_anew(name, stored) and _equal_copy(policy, name, used) is None:
            raise ValueError(f"{policy.folder} has a tensor {name!r} that {init.folder} has not; {hint}")
    return Checkpoint(policy.folder, policy.headers, tensors)


def _equal_copy(checkpoint: Checkpoint, name: str, among: Collection[str]) -> str | None:
    """The tensor whose values another has too, byte by byte: tied weights that a file has twice."""
    like = checkpoint.tensors[name]
    for other in among:
        stored = checkpoint.tensors[other]
        if (stored.shape, stored.dtype) == (like.shape, like.dtype) and stored.size:
            pair = [Checkpoint(checkpoint.folder, {at.file: checkpoint.headers[at.file]}, {name: at})
                    for at in (like, stored)]
            with _Reader(pair) as reader:
                if all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in reader.chunks(name)):
                    return other
    return None


@contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar by so many bytes; no bar where stderr is not a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm import tqdm  # only here: it would cost every merge its import
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", file=sys.stderr) as bar:
        yield bar.update
