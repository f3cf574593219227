"""Studies as units, one a world and draw: run by processes of one thread each, kept, and not run again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..storage.files import read_json, write_json
from ..storage.provenance import json_hash, package_versions, provenance, source_hash
from . import settings
from .bench import Bench, draw_of
from .tuned import asked_by, tuned_configs
from .tuning import PARTS, tuning


@dataclass(frozen=True)
class Unit:
    """A study on one draw of a world, with those of the seeds that belong to it."""

    study: str
    world: str
    draw: int
    seeds: tuple[int, ...]
    lines: tuple[str, ...] | None = None  # those that are asked for, sorted; None: all

    def file(self, folder: Path) -> Path:
        """Where its rows are kept; the name has the hash of all that they depend on."""
        name = self.study.replace(" ", "-")
        return folder / "units" / f"{name}-{self.world}-{self.draw}-{self.fingerprint()[:12]}.json"

    def fingerprint(self) -> str:
        """A hash of all that its rows depend on: the code of the study's module and of all that this imports, the
        versions of packages, the settings, those of the chosen ones that it uses, the world and the seeds."""
        study = studies()[self.study]
        shared = {name: repr(value) for name, value in vars(settings).items() if name.isupper()}
        chosen = {purpose: tuned_configs(self.world).get(purpose) for purpose in asked_by(study)}
        seeds = [] if self.study == "limit" else list(self.seeds)
        lines = [] if self.lines is None else [list(self.lines)]
        return json_hash([self.study, code_of(study), package_versions(), shared, chosen, self.world, self.draw, seeds,
                          *lines])


def studies() -> dict[str, Callable[[Bench], list[dict]]]:
    """Every study by name: those of the claims, the noise map and the tunings."""
    from .decisive import DECISIVE
    from .noise import noise
    from .studies import STUDIES
    from .waiting import waiting

    tunings = {f"tuning of {part}": partial(tuning, part=part) for part in PARTS}
    return STUDIES | DECISIVE | {"noise": noise, "waiting": waiting} | tunings


def code_of(study: Callable) -> str:
    """The hash of the code that a study's rows depend on (see `source_hash`)."""
    return source_hash(getattr(study, "func", study).__module__)


def units_of(names: Sequence[str], worlds: Sequence[str], seeds: Sequence[int],
             lines: Mapping[tuple[str, str], tuple[str, ...] | None] | None = None) -> list[Unit]:
    """A unit for every study, world and draw that has seeds; `lines` are those asked for, by world and study.

    Draw by draw, so that what was stopped has every study of the first draws.
    """
    by_draw: dict[int, list[int]] = {}
    for seed in seeds:
        by_draw.setdefault(draw_of(seed), []).append(seed)
    return [Unit(name, world, draw, tuple(of_draw), (lines or {}).get((world, name)))
            for draw, of_draw in by_draw.items() for world in worlds for name in names]


def run_unit(unit: Unit, folder: Path) -> Path:
    """Run one unit on one thread and write its rows, with what made them: commit, code, versions."""
    torch.set_num_threads(1)
    started = time.process_time()
    study = studies()[unit.study]
    # before it runs: the code may be edited, or another commit checked out, in the meantime
    path, made_by = unit.file(folder), {**provenance(), "code": code_of(study)[:12]}
    bench = Bench.of(unit.world, unit.draw, unit.seeds)
    bench.asks = asked_by(study)
    if unit.lines is not None:
        bench.lines = frozenset(unit.lines)
    rows = study(bench)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"study": unit.study, "world": unit.world, "draw": unit.draw, "seeds": list(unit.seeds),
                      "cpu_seconds": round(time.process_time() - started, 1), "provenance": made_by, "rows": rows})
    return path


def run_units(units: Sequence[Unit], folder: Path, workers: int | None = None, progress: bool = True) -> list[dict]:
    """What each unit holds, in order; those that are not in the folder are run first, `workers` at a time.

    Ctrl-C keeps those that are finished. A file that is damaged is run again. A unit with all lines serves for one with
    some.
    """
    folder = Path(folder)
    found = {unit: _read(replace(unit, lines=None).file(folder)) or _read(unit.file(folder)) for unit in units}
    missing = [unit for unit in units if found[unit] is None]
    with tqdm(total=len(units), initial=len(units) - len(missing), unit="study", desc="evidence",
              disable=None if progress else True) as bar:
        if len(missing) == 1 or workers == 1:
            for unit in missing:
                bar.set_postfix_str(f"{unit.study}, {unit.world}, draw {unit.draw}")
                found[unit] = read_json(run_unit(unit, folder))
                bar.update()
        elif missing:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers or os.cpu_count(), spawn, initializer=_ignore_interrupts) as pool:
                waiting = {pool.submit(run_unit, unit, folder): unit for unit in missing}
                try:
                    for future in as_completed(waiting):
                        unit = waiting[future]
                        found[unit] = read_json(future.result())
                        bar.set_postfix_str(f"{unit.study}, {unit.world}, draw {unit.draw}")
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [found[unit] for unit in units]


def provenances(kept: Sequence[dict]) -> list[dict]:
    """What made the rows of units, each once, with the worlds and studies it made as `studies`.

    `kept` is what the units' files hold.
    """
    distinct: dict[str, dict] = {}
    for unit in kept:
        entry = distinct.setdefault(json_hash(unit["provenance"]), {**unit["provenance"], "studies": []})
        name = f"{unit['world']}, {unit['study']}"
        if name not in entry["studies"]:
            entry["studies"].append(name)
    return list(distinct.values())


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the one that waits for the others answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError:
        return None
