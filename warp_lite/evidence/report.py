"""The evidence put together: from kept units to claims.json, with its table and figures beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control

from ..config import WarpConfig
from ..evaluation.front import reward_at_kl
from ..evaluation.statistics import VERDICTS, t_interval
from ..storage.files import whole, write_bytes, write_json
from .bands import write_bands
from .bench import TUNING_SEEDS, WORLDS, draw_of
from .claims import METHODS, Claim, decide, lines_needed, lines_of, verdicts_of_halves
from .drawing import claim_figure, limit_figure
from .effects import Rows, share
from .law import tested_law
from .noise import PREDICTORS, correlations
from .runner import provenances, run_units, units_of
from .settings import EQUAL, KL_MAX
from .tuned import tuned
from .tuning import PARTS, chosen_settings
from .wording import made_by, table

Evidence = Mapping[tuple[str, str], Rows]  # by world and study


def run_claims(out: Path, claims: Sequence[Claim], worlds: Sequence[str], seeds: Sequence[int],
               workers: int | None = None, whole: bool = True, progress: bool = True) -> str:
    """Decide claims in worlds (all, if none is named) and write the report; returns its table.

    `whole` adds the tables that need every study; without it, only the lines that the claims compare are measured.
    Raises ValueError for an unknown world.
    """
    worlds = pick_worlds(worlds)
    lines = None if whole else lines_needed(claims, worlds)
    evidence = gather(studies_of(claims, whole), worlds, seeds, out, workers, progress, lines)
    found = report(claims, evidence, worlds, seeds, whole)
    files = f"{out / 'claims.json'}, {'bands.json, ' if whole else ''}claims.md and figures/"
    return f"{write_report(found, claims, evidence, out)}\nwritten: {files}"


def run_tuning(out: Path, worlds: Sequence[str], workers: int | None = None, progress: bool = True) -> str:
    """Choose the settings of every purpose on the tuning seeds; writes tuned.json and returns what was chosen."""
    worlds = pick_worlds(worlds)
    units = units_of([f"tuning of {part}" for part in PARTS], worlds, TUNING_SEEDS)
    rows: dict[str, list[dict]] = {world: [] for world in worlds}
    kept = run_units(units, out, workers, progress)
    for unit in kept:
        rows[unit["world"]] += unit["rows"]
    chosen = {world: chosen_settings(some) for world, some in rows.items()}
    write_json(out / "tuned.json", {"worlds": chosen, "provenance": provenances(kept)})
    lines = [f"{world:10} {purpose:24} {some['chosen']}" for world, found in chosen.items()
             for purpose, some in found.items()]
    return "\n".join([*lines, f"written: {out / 'tuned.json'}; the claims read warp_lite/evidence/tuned.json"])


def run_noise_map(out: Path, worlds: Sequence[str], seeds: Sequence[int], workers: int | None = None,
                  progress: bool = True) -> str:
    """The noise map with its correlations; writes noise.json and returns a summary."""
    worlds = pick_worlds(worlds)
    units = units_of(["noise"], worlds, seeds)
    rows: dict[str, list[dict]] = {world: [] for world in worlds}
    kept = run_units(units, out, workers, progress)
    for unit in kept:
        rows[unit["world"]] += [{**row, "draw": unit["draw"]} for row in unit["rows"]]
    found = {world: {"correlations": correlations(some, [row["draw"] for row in some]), "cells": cells(some)}
             for world, some in rows.items()}
    laws = [tested_law(rows, world) for world in worlds]
    write_json(out / "noise.json", {"worlds": found, "laws": laws, "seeds": list(seeds),
                                    "provenance": provenances(kept)})
    lines = [f"{world:10} gain against {name:18} {c['correlation']:+.2f} [{c['ci_low']:+.2f}, {c['ci_high']:+.2f}]"
             for world, some in found.items() for name, c in some["correlations"].items()]
    lines += [f"law fitted in {law['fitted_in']}: c {law['c']['value']:.2f}, α {law['alpha']['value']:.2f}; {name}: "
              + ", ".join(f"{measure.replace('_', ' ')} {v['value']:.2f} [{v['ci_low']:.2f}, {v['ci_high']:.2f}]"
                          for measure, v in tests.items())
              for law in laws for name, tests in law["tests"].items()]
    return "\n".join([*lines, f"written: {out / 'noise.json'}"])


def cells(rows: Sequence[dict]) -> list[dict]:
    """Each cell of the noise map: the mean gain with its interval, and the medians of what may explain it."""
    found = []
    for batch, lr in sorted({(row["batch"], row["lr"]) for row in rows}):
        some = [row for row in rows if (row["batch"], row["lr"]) == (batch, lr)]
        found.append({"batch": batch, "lr": lr, "gain": interval_of({row["seed"]: row["gain"] for row in some}),
                      "reach": min(row["reach"] for row in some), "steps": some[0]["steps"],
                      **{f"mean {name}": float(np.mean([row[name] for row in some]))
                         for name in ("reach", "short angle")},  # as the law takes them
                      **{name: float(np.median([row[name] for row in some])) for name in PREDICTORS}})
    return found


def pick_worlds(names: Sequence[str]) -> list[str]:
    """The worlds of those names, or all. Raises ValueError for another."""
    for name in names:
        if name not in WORLDS:
            raise ValueError(f"there is no world {name!r}; there are {', '.join(WORLDS)}")
    return list(names) or list(WORLDS)


def gather(studies: Sequence[str], worlds: Sequence[str], seeds: Sequence[int], folder: Path,
           workers: int | None = None, progress: bool = True,
           lines: Mapping[tuple[str, str], tuple[str, ...] | None] | None = None) -> Evidence:
    """The rows of every study in every world, run where they are missing; the limits of the draws with them.

    `lines` are those asked for, by world and study: all, where it has None or nothing.
    """
    names = [*dict.fromkeys(["limit", *studies])] if {"equal", "best"} & set(studies) else list(studies)
    units = units_of(names, worlds, seeds, lines)
    kept: dict[tuple[str, str], list[dict]] = {}
    for unit, found in zip(units, run_units(units, folder, workers, progress)):
        kept.setdefault((unit.world, unit.study), []).append(found)
    evidence: dict[tuple[str, str], Rows] = {}
    for world in worlds:
        bounds = [{some["draw"]: [row for row in some["rows"] if row["line"] == line]
                   for some in kept.get((world, "limit"), [])} for line in ("limit", "best of n")]
        for study in studies:
            rows = [row for some in kept[world, study] for row in some["rows"]]
            evidence[world, study] = Rows(world, rows, *bounds)
            evidence[world, study].cpu_seconds = sum(some["cpu_seconds"] for some in kept[world, study])
            evidence[world, study].kept = kept[world, study] + kept.get((world, "limit"), [])
    return evidence


def studies_of(claims: Sequence[Claim], whole: bool) -> list[str]:
    """The studies that claims need, and with `whole` those of the tables."""
    return list(dict.fromkeys([c.study for c in claims] + ([study for study, _ in METHODS.values()] if whole else [])))


def report(claims: Sequence[Claim], evidence: Evidence, worlds: Sequence[str], seeds: Sequence[int],
           whole: bool) -> dict:
    """What claims.json holds: every verdict, by what seeds, and with `whole` the tables. A claim whose study
    `evidence` lacks in a world has no verdict there."""
    found = {
        "claims": [{**decide(claim, evidence[world, claim.study]), "commits": commits(evidence[world, claim.study])}
                   for claim in claims for world in worlds if (world, claim.study) in evidence],
        "seeds": list(seeds), "tuning_seeds": list(TUNING_SEEDS),
        "draws": sorted({draw_of(seed) for seed in seeds}), "tuning_draws": sorted({draw_of(s) for s in TUNING_SEEDS}),
        "worlds": {world: WORLDS[world] for world in worlds}, "level": 0.95,
        "provenance": provenances([unit for rows in evidence.values() for unit in rows.kept]),
        "cpu_minutes": {f"{world}, {study}": round(rows.cpu_seconds / 60, 1)
                        for (world, study), rows in evidence.items()}}
    by_name = {claim.name: claim for claim in claims}
    for entry in found["claims"]:
        entry["halves"] = verdicts_of_halves(by_name[entry["name"]], entry["world"],
                                             {int(seed): value for seed, value in entry["values"].items()})
    found["stability"] = stability(found["claims"])
    found["chance"] = chance(found["claims"])
    if whole:
        found["limit_share"] = limit_shares(evidence, worlds)
        found["equal_compute"] = equal_compute(evidence, worlds)
        found["curves"] = curves(claims, evidence, worlds)
        found["limits"] = {world: mean_limit(evidence[world, "equal"]) for world in worlds}
    return found


def commits(rows: Rows) -> list[str | None]:
    """The commits that made the rows of a study and the limits they are held against; None where it is not known."""
    return list(dict.fromkeys(made_by["commit"] for made_by in provenances(rows.kept)))


def stability(verdicts: Sequence[dict]) -> dict[str, int]:
    """How many verdicts are `same` on the two halves of the draws, `moved` to another, or `turned`: holds on one half
    and fails on the other. Those that moved have those that turned among them."""
    pairs = [tuple(v["halves"]) for v in verdicts]
    return {"same": sum(a == b for a, b in pairs), "moved": sum(a != b for a, b in pairs),
            "turned": sum({a, b} == {"holds", "fails"} for a, b in pairs)}


def chance(verdicts: Sequence[dict]) -> dict:
    """How many verdicts there are of each kind, and how many of the clear ones may be luck.

    `expected_clear_by_chance`: how many of those that a t test decides would be clear if nothing had any effect.
    `kept_by_benjamini_hochberg`: how many of these that hold or fail stay so where at most 5 % of such verdicts are to
    be false (Benjamini and Hochberg 1995, over the claims with a p-value, in both worlds);
    `kept_by_benjamini_yekutieli` the same whatever depends on what (2001).
    """
    counts = {name: sum(v["verdict"] == name for v in verdicts) for name in VERDICTS}
    tested = [v for v in verdicts if v.get("p_value") is not None]
    clear = [v["verdict"] in ("holds", "fails") for v in tested]

    def kept(method: str) -> int:
        adjusted = false_discovery_control([v["p_value"] for v in tested], method=method) if tested else []
        return sum(is_clear and bool(p <= 0.05) for is_clear, p in zip(clear, adjusted))

    return {**counts, "verdicts": len(verdicts), "expected_clear_by_chance": round(0.05 * len(tested), 1),
            "clear_and_tested": sum(clear), "kept_by_benjamini_hochberg": kept("bh"),
            "kept_by_benjamini_yekutieli": kept("by")}


def limit_shares(evidence: Evidence, worlds: Sequence[str]) -> list[dict]:
    """The share of the limit's area that each method's front attains, KL from 0 to 4 nats."""
    found = []
    for world in worlds:
        for name, (study, line) in METHODS.items():
            rows = evidence[world, study]
            values = share(line)(rows).values
            found.append({"world": world, "method": name, **interval_of(values)})
    return found


def equal_compute(evidence: Evidence, worlds: Sequence[str]) -> list[dict]:
    """A row a method at equal samples: settings, reward and gold at some KL, and what it costs."""
    found = []
    for world in worlds:
        rows = evidence[world, "equal"]
        for name in EQUAL:
            config = tuned(world, name)
            levels = {}
            for kl in (1.0, 2.0, 3.0):
                for kind in [kind for kind in ("reward", "gold", "perplexity") if kind in rows.by_line[name][0]]:
                    values = {seed: float(np.mean([reward_at_kl(f, kl, kind) for f in rows.fronts(name, seed)]))
                              for seed in rows.seeds}
                    if all(map(math.isfinite, values.values())):
                        levels[f"{kind} at {kl:g}"] = interval_of(values)
            found.append({
                "world": world, "method": name, "lr": config.lr, "beta": config.beta,
                "share": interval_of(share(name)(rows).values), **levels,
                "sequential_steps": config.iterations * config.steps,
                "completions": config.iterations * config.runs * config.steps * config.batch_size,
                "exchanges": exchanges(config)})
    return found


def exchanges(config: WarpConfig) -> int:
    """How often four workers must exchange a model's worth of numbers: once a merge where each has a run of
    its own, once a step where they share the batch of one run, never where there is one worker's batch."""
    if config.runs > 1:
        return config.iterations
    return config.steps if config.batch_size > 4 else 0


def curves(claims: Sequence[Claim], evidence: Evidence, worlds: Sequence[str]) -> list[dict]:
    """The mean curves of the lines that claims compare and of the methods held against the limit."""
    wanted = {}
    for world in worlds:
        pairs = [(claim.study, line) for claim in claims if (world, claim.study) in evidence
                 for line in lines_of(claim, evidence[world, claim.study])]
        wanted |= {(world, study, str(line)): line for study, line in [*pairs, *METHODS.values()]}
    return [{"world": world, "study": study, "line": line, "points": evidence[world, study].mean_curve(line)}
            for (world, study, _), line in wanted.items()]


def mean_limit(rows: Rows) -> list[dict]:
    """The mean over draws of the limit, at KLs from 0 to 4 nats that every draw's limit reaches."""
    reach = min(KL_MAX, *(limit[-1]["kl"] for limit in rows.limits.values()))
    grid = np.linspace(0, reach, 41)
    curves_ = [np.interp(grid, *zip(*((p["kl"], p["reward"]) for p in limit))) for limit in rows.limits.values()]
    return [{"kl": round(float(kl), 4), "reward": round(float(reward), 5)}
            for kl, reward in zip(grid, np.mean(curves_, 0))]


def interval_of(values: Mapping[int, float]) -> dict:
    """Mean and interval of a number a seed, each draw counting as one."""
    seeds = sorted(values)
    interval = t_interval([values[seed] for seed in seeds], [draw_of(seed) for seed in seeds])
    return {"mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high, "seeds": interval.count}


def write_report(found: dict, claims: Sequence[Claim], evidence: Evidence, folder: Path) -> str:
    """claims.json, claims.md and figures/ in a folder, and bands.json where `found` has curves; returns the table, with
    what made its rows."""
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_json(folder / "claims.json", found)
    text = table(found) + "".join(f"\nMade by {line}\n" for line in made_by(found))
    write_bytes(folder / "claims.md", text.encode())
    figures = {claim.name: claim_figure(claim, found["claims"], evidence) for claim in claims}
    if "limits" in found:
        figures["limit"] = limit_figure(found)
        write_bands(found, evidence, folder / "bands.json")
    for name, figure in figures.items():
        with whole(folder / "figures" / f"{name}.png") as made:
            figure.savefig(made, format="png", dpi=110)
    return text
