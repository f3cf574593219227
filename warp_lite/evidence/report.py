"""The evidence as JSON and a Markdown table, with its figures beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control

from ..config import WarpConfig
from ..evaluation.front import reward_at_kl
from ..evaluation.statistics import VERDICTS, Interval, t_interval
from ..storage.files import whole, write_bytes, write_json
from .bands import write_bands
from .bench import TUNING_SEEDS, WORLDS, draw_of
from .claims import HEADLINES, METHODS, Claim, decide, lines_needed, lines_of, verdicts_of_halves
from .drawing import claim_figure, limit_figure
from .effects import Rows, share
from .law import tested_law
from .noise import PREDICTORS, correlations
from .runner import provenances, run_units, units_of
from .settings import EQUAL, KL_MAX
from .tuned import tuned
from .tuning import PARTS, chosen_settings, grids

Evidence = Mapping[tuple[str, str], Rows]  # by world and study
MORE_DRAWS = (32, 64)  # for which the report says what they would bring


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


def at_an_edge(found: dict) -> list[str]:
    """What was chosen at the edge of what was tried, as "world, purpose: setting": a better one may lie outside.

    `found` is what tuned.json holds.
    """
    edges = []
    for world, purposes in found["worlds"].items():
        for purpose, chosen in purposes.items():
            for name in ("lr", "beta"):
                tried = sorted({getattr(config, name) for config in grids()[purpose].values()})
                if len(tried) > 1 and chosen["config"][name] in (tried[0], tried[-1]):
                    edges.append(f"{world}, {purpose}: {name} = {chosen['config'][name]:g}")
    return edges


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


def made_by(found: dict) -> list[str]:
    """What made the rows of a report, a line each: versions, commit, and the studies where there are several.

    `found` is what claims.json, tuned.json or noise.json holds; those that were written before rows had a
    provenance of their own say when they were put together.
    """
    sources = found["provenance"] if isinstance(found["provenance"], list) else [found["provenance"]]
    lines = []
    for source in sources:
        versions = ", ".join(f"{name} {source['packages'][name]}" for name in ("torch", "transformers", "warp-lite"))
        lines.append(f"{versions} at commit {str(source['commit'])[:10]}")
        if len(sources) > 1:
            lines[-1] += f": {'; '.join(source['studies'])}"
    return lines


def stability(verdicts: Sequence[dict]) -> dict[str, int]:
    """How many verdicts are `same` on the two halves of the draws, `moved` to another, or `turned`: holds on one half
    and fails on the other. Those that moved have those that turned among them."""
    pairs = [tuple(v["halves"]) for v in verdicts]
    return {"same": sum(a == b for a, b in pairs), "moved": sum(a != b for a, b in pairs),
            "turned": sum({a, b} == {"holds", "fails"} for a, b in pairs)}


def chance(verdicts: Sequence[dict]) -> dict:
    """How many verdicts there are of each kind, and how many of the clear ones may be luck.

    `expected_clear_by_chance`: how many would be clear if nothing had any effect. `kept_by_benjamini_hochberg`: how
    many of those that hold or fail by a t test stay so where at most 5 % of such verdicts are to be false
    (Benjamini and Hochberg 1995, over the claims with a p-value, in both worlds).
    """
    counts = {name: sum(v["verdict"] == name for v in verdicts) for name in VERDICTS}
    tested = [v for v in verdicts if v.get("p_value") is not None]
    kept = 0
    if tested:
        adjusted = false_discovery_control([v["p_value"] for v in tested])
        kept = sum(v["verdict"] in ("holds", "fails") and bool(p <= 0.05) for v, p in zip(tested, adjusted))
    return {**counts, "verdicts": len(verdicts), "expected_clear_by_chance": round(0.05 * len(verdicts), 1),
            "clear_and_tested": sum(v["verdict"] in ("holds", "fails") for v in tested),
            "kept_by_benjamini_hochberg": kept}


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
                for kind in ("reward", "gold", "perplexity"):
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
    starts = {draw_of(seed): rows.fronts("WARP", seed)[0][0]["reward"] for seed in rows.seeds}
    reach = min(KL_MAX, *(limit[-1]["kl"] for limit in rows.limits.values()))
    grid = np.linspace(0, reach, 41)
    curves_ = [np.interp(grid, [0.0, *(p["kl"] for p in limit)], [starts[draw], *(p["reward"] for p in limit)])
               for draw, limit in rows.limits.items()]
    return [{"kl": round(float(kl), 4), "reward": round(float(reward), 5)}
            for kl, reward in zip(grid, np.mean(curves_, 0))]


def interval_of(values: Mapping[int, float]) -> dict:
    """Mean and interval of a number a seed, each draw counting as one."""
    seeds = sorted(values)
    interval = t_interval([values[seed] for seed in seeds], [draw_of(seed) for seed in seeds])
    return {"mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high, "seeds": interval.count}


# --- the table ---


def table(found: dict) -> str:
    """The verdicts as Markdown, a column a world."""
    worlds = list(found["worlds"])
    by_name: dict[str, dict[str, dict]] = {}
    for claim in found["claims"]:
        by_name.setdefault(claim["name"], {})[claim["world"]] = claim
    lines = [f"| claim | paper | {' | '.join(worlds)} |", "|---|---|" + "---|" * len(worlds)]
    for some in by_name.values():
        claim = next(iter(some.values()))
        cells = [cell(some[world]) if world in some else "–" for world in worlds]
        lines.append(f"| {claim['statement']} | {claim['paper_figure']} | {' | '.join(cells)} |")
    note = (f"{len(found['seeds'])} seeds on {len(found['draws'])} draws of SFT policy and reward model a world; "
            f"settings were chosen on {len(found['tuning_seeds'])} other seeds and {len(found['tuning_draws'])} other "
            f"draws. Brackets are 95 % intervals, Student's t on the means of draws. {summary(found)}")
    return "\n".join(lines) + f"\n\n{note}\n"


def summary(found: dict) -> str:
    """How many verdicts are of each kind, how far they can be trusted, and what more draws would bring, in four
    sentences."""
    counts, halves = found["chance"], found["stability"]
    return (f"Of {counts['verdicts']} verdicts {counts['holds']} hold, {counts['fails']} fail, "
            f"{counts['no difference']} say that there is no difference worth having, and {counts['unclear']} are "
            f"unclear. If nothing had any effect about {counts['expected_clear_by_chance']:g} would be clear by "
            f"chance; where at most one in twenty of the clear ones is to be false (Benjamini and Hochberg), "
            f"{counts['kept_by_benjamini_hochberg']} of {counts['clear_and_tested']} stay clear. Decided on each half "
            f"of the draws alone, {halves['same']} verdicts are the same on both, {halves['moved']} differ, and "
            f"{halves['turned'] or 'none'} of these turn round, from holds to fails. Were effects and their spread "
            "between draws to stay as they are, "
            + " and ".join(f"{draws} draws would leave {100 * unclear_with(found, draws):.0f} % unclear"
                           for draws in MORE_DRAWS) + ".")


def unclear_with(found: dict, draws: int) -> float:
    """The share of the verdicts that would be unclear with so many draws, a seed each, if every effect and its spread
    between draws stayed as they are."""
    unclear = 0
    for claim in found["claims"]:
        if claim["effect"] is None or claim["draws"] < 2:  # no spread to go by
            unclear += claim["verdict"] == "unclear"
            continue
        interval = Interval(claim["effect"], claim["ci_low"], claim["ci_high"], claim["seeds"], claim["draws"])
        rule = (claim[name] for name in ("rule", "null", "margin", "worth"))
        unclear += interval.with_groups(draws).verdict(*rule) == "unclear"
    return unclear / len(found["claims"])


def lies_as_predicted(claim: dict) -> bool:
    """Whether a claim's effect was measured and lies where it was predicted, the ends included."""
    low, high = claim["prediction"]
    return claim["effect"] is not None and low <= claim["effect"] <= high


def headlines(found: dict) -> str:
    """The claims that the README shows, as Markdown: the verdict and the effect with its interval."""
    worlds = list(found["worlds"])
    lines = [f"| claim | {' | '.join(worlds)} |", "|---|" + "---|" * len(worlds)]
    for name in HEADLINES:
        some = {claim["world"]: claim for claim in found["claims"] if claim["name"] == name}
        cells = [short(some[world]) if world in some else "–" for world in worlds]
        lines.append(f"| {next(iter(some.values()))['statement']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short(claim: dict) -> str:
    """A verdict with its effect and interval alone."""
    if claim["effect"] is None:
        return f"**{claim['verdict']}**"
    digits = 1 if claim["unit"] == "degrees" else 2
    low, high = (bound(claim[end], digits) for end in ("ci_low", "ci_high"))
    return f"**{claim['verdict']}** {claim['effect']:+.{digits}f} [{low}, {high}]"


def cell(claim: dict) -> str:
    """A verdict with its effect and, for a comparison at one level, that level and how many seeds reach it."""
    if claim["effect"] is None:
        return f"**{claim['verdict']}**, no level is reached by all seeds"
    text = (f"**{claim['verdict']}** {claim['effect']:+.2f} [{bound(claim['ci_low'])}, {bound(claim['ci_high'])}] "
            f"{claim['unit']}")
    if claim["null"] or claim["margin"]:
        wanted = {"above": f"> {claim['null']:g}", "below": f"< {claim['null']:g}",
                  "within": f"{claim['null']:g} ± {claim['margin']:g}"}[claim["rule"]]
        text += f", wanted {wanted}"
    if claim.get("level") is not None:
        what = "proxy reward" if claim["study"] == "weak" else "nats"
        text += f", at {claim['level']:g} {what} ({claim['reached'][format(claim['level'], 'g')]} reach it)"
    return text


def bound(value: float | None, digits: int = 2) -> str:
    """An end of an interval, which one draw alone has not."""
    return "–" if value is None else f"{value:+.{digits}f}"


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
