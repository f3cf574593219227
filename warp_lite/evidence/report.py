"""The evidence as JSON, a Markdown table and a figure a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.statistics import hierarchical_bootstrap
from ..files import write_json
from ..plots import COLOURS, KL_LABEL, style
from ..runs import provenance
from .bench import DRAWS, TUNING_SEEDS, WORLDS, draw_of
from .claims import METHODS, Claim, Rows, decide, level_of, named, share
from .noise import PREDICTORS, correlations
from .runner import run_units, units_of
from .settings import EQUAL, KL_MAX
from .tuning import PARTS, chosen_settings, tuned

Evidence = Mapping[tuple[str, str], Rows]  # by world and study
VERDICT_COLOURS = {"holds": COLOURS["liti"], "fails": COLOURS["sft"], "unclear": COLOURS["single"]}
LINE_COLOURS = (COLOURS["slerp"], COLOURS["lerp"])


def run_claims(out: Path, claims: Sequence[Claim], worlds: Sequence[str], seeds: Sequence[int],
               workers: int | None = None, whole: bool = True, progress: bool = True) -> str:
    """Decide claims in worlds (all, if none is named) and write the report; returns its table.

    `whole` adds the tables that need every study. Raises ValueError for an unknown world.
    """
    worlds = pick_worlds(worlds)
    evidence = gather(studies_of(claims, whole), worlds, seeds, out, workers, progress)
    found = report(claims, evidence, worlds, seeds, whole)
    return f"{write_report(found, claims, evidence, out)}\nwritten: {out / 'claims.json'}, claims.md and figures/"


def run_tuning(out: Path, worlds: Sequence[str], workers: int | None = None, progress: bool = True) -> str:
    """Choose the settings of every purpose on the tuning seeds; writes tuned.json and returns what was chosen."""
    worlds = pick_worlds(worlds)
    units = units_of([f"tuning of {part}" for part in PARTS], worlds, TUNING_SEEDS)
    rows: dict[str, list[dict]] = {world: [] for world in worlds}
    for unit, found in zip(units, run_units(units, out, workers, progress)):
        rows[unit.world] += found["rows"]
    chosen = {world: chosen_settings(some) for world, some in rows.items()}
    write_json(out / "tuned.json", {"worlds": chosen, "provenance": provenance()})
    lines = [f"{world:10} {purpose:24} {some['chosen']}" for world, found in chosen.items()
             for purpose, some in found.items()]
    return "\n".join([*lines, f"written: {out / 'tuned.json'}; the claims read warp_lite/evidence/tuned.json"])


def run_noise_map(out: Path, worlds: Sequence[str], seeds: Sequence[int], workers: int | None = None,
                  progress: bool = True) -> str:
    """The noise map with its correlations; writes noise.json and returns a summary."""
    worlds = pick_worlds(worlds)
    units = units_of(["noise"], worlds, seeds)
    rows: dict[str, list[dict]] = {world: [] for world in worlds}
    for unit, some in zip(units, run_units(units, out, workers, progress)):
        rows[unit.world] += [{**row, "draw": unit.draw} for row in some["rows"]]
    found = {world: {"correlations": correlations(some, [row["draw"] for row in some]), "cells": cells(some)}
             for world, some in rows.items()}
    write_json(out / "noise.json", {"worlds": found, "seeds": list(seeds), "provenance": provenance()})
    lines = [f"{world:10} gain against {name:18} {c['correlation']:+.2f} [{c['ci_low']:+.2f}, {c['ci_high']:+.2f}]"
             for world, some in found.items() for name, c in some["correlations"].items()]
    return "\n".join([*lines, f"written: {out / 'noise.json'}"])


def cells(rows: Sequence[dict]) -> list[dict]:
    """Each cell of the noise map: the mean gain with its interval, and the medians of what may explain it."""
    found = []
    for batch, lr in sorted({(row["batch"], row["lr"]) for row in rows}):
        some = [row for row in rows if (row["batch"], row["lr"]) == (batch, lr)]
        found.append({"batch": batch, "lr": lr, "gain": interval_of({row["seed"]: row["gain"] for row in some}),
                      "reach": min(row["reach"] for row in some),
                      **{name: float(np.median([row[name] for row in some])) for name in PREDICTORS}})
    return found


def pick_worlds(names: Sequence[str]) -> list[str]:
    """The worlds of those names, or all. Raises ValueError for another."""
    for name in names:
        if name not in WORLDS:
            raise ValueError(f"there is no world {name!r}; there are {', '.join(WORLDS)}")
    return list(names) or list(WORLDS)


def gather(studies: Sequence[str], worlds: Sequence[str], seeds: Sequence[int], folder: Path,
           workers: int | None = None, progress: bool = True) -> Evidence:
    """The rows of every study in every world, run where they are missing; the limits of the draws with them."""
    names = [*dict.fromkeys(["limit", *studies])] if {"equal", "best"} & set(studies) else list(studies)
    units = units_of(names, worlds, seeds)
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
    return evidence


def studies_of(claims: Sequence[Claim], whole: bool) -> list[str]:
    """The studies that claims need, and with `whole` those of the tables."""
    return list(dict.fromkeys([c.study for c in claims] + ([study for study, _ in METHODS.values()] if whole else [])))


def report(claims: Sequence[Claim], evidence: Evidence, worlds: Sequence[str], seeds: Sequence[int],
           whole: bool) -> dict:
    """What claims.json holds: every verdict, by what seeds, and with `whole` the tables. A claim whose study
    `evidence` lacks in a world has no verdict there."""
    found = {
        "claims": [decide(claim, evidence[world, claim.study]) for claim in claims for world in worlds
                   if (world, claim.study) in evidence],
        "seeds": list(seeds), "tuning_seeds": list(TUNING_SEEDS),
        "draws": sorted({draw_of(seed) for seed in seeds}), "tuning_draws": sorted({draw_of(s) for s in TUNING_SEEDS}),
        "worlds": {world: WORLDS[world] for world in worlds}, "level": 0.95, "provenance": provenance(),
        "cpu_minutes": {f"{world}, {study}": round(rows.cpu_seconds / 60, 1)
                        for (world, study), rows in evidence.items()}}
    found["chance"] = chance(found["claims"])
    if whole:
        found["limit_share"] = limit_shares(evidence, worlds)
        found["equal_compute"] = equal_compute(evidence, worlds)
        found["curves"] = curves(claims, evidence, worlds)
        found["limits"] = {world: mean_limit(evidence[world, "equal"]) for world in worlds}
    return found


def chance(verdicts: Sequence[dict]) -> dict:
    """How many verdicts there are, and how many would be clear by chance if nothing had any effect."""
    counts = {name: sum(v["verdict"] == name for v in verdicts) for name in VERDICT_COLOURS}
    return {**counts, "verdicts": len(verdicts), "expected_clear_by_chance": round(0.05 * len(verdicts), 1)}


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
                    values = {seed: float(np.mean([level_of(f, kl, kind) for f in rows.fronts(name, seed)]))
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


def exchanges(config) -> int:
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
    return [{"world": world, "study": study, "line": line, "points": mean_curve(evidence[world, study], line)}
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
    """Mean and hierarchical interval of a number a seed."""
    seeds = sorted(values)
    interval = hierarchical_bootstrap([values[seed] for seed in seeds], [draw_of(seed) for seed in seeds])
    return {"mean": interval.mean, "ci_low": interval.low, "ci_high": interval.high, "seeds": interval.count}


def lines_of(claim: Claim, rows: Rows) -> list:
    """The lines that a claim's figure draws."""
    return [named(line, rows) for line in claim.lines if line is not None]


def mean_curve(rows: Rows, line, seeds: Sequence[int] | None = None) -> list[dict]:
    """The mean over seeds and runs of every number at each η, or step."""
    fronts = [front for seed in seeds or rows.seeds for front in rows.fronts(line, seed)]
    place = "step" if "step" in fronts[0][0] else "eta"
    numbers = ("kl", "reward", "gold", "length", "distinct", "perplexity")
    found = []
    for at in sorted({row[place] for front in fronts for row in front}):
        some = [row for front in fronts for row in front if row[place] == at]
        found.append({place: at, **{name: round(float(np.mean([row[name] for row in some])), 5)
                                    for name in numbers if name in some[0]}})
    return found


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
    counts = found["chance"]
    note = (f"{len(found['seeds'])} seeds on {len(found['draws'])} draws of SFT policy and reward model a world; "
            f"settings were chosen on {len(found['tuning_seeds'])} other seeds and {len(found['tuning_draws'])} other "
            f"draws. Brackets are 95 % hierarchical bootstrap intervals. Of {counts['verdicts']} verdicts "
            f"{counts['holds']} hold, {counts['fails']} fail and {counts['unclear']} are unclear; if nothing had any "
            f"effect about {counts['expected_clear_by_chance']:g} would be clear by chance, half of them as holding.")
    return "\n".join(lines) + f"\n\n{note}\n"


HEADLINES = ("ema-anchor", "no-kl-gold", "4-runs-against-1", "liti-trajectory", "average-two", "slerp-lerp-reward",
             "slerp-lerp-front", "angle", "iteration-2-reach", "iteration-2-front", "length", "diversity",
             "ablation-liti", "beta-for-liti", "equal-one-long-run", "equal-batch-of-16")


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


# --- the figures ---


def claim_figure(claim: Claim, verdicts: Sequence[dict], evidence: Evidence) -> Figure:
    """For each world the curves that are compared, each draw's mean thin and the mean of all thick, and the
    effect of every seed with the interval that decides."""
    verdicts = [v for v in verdicts if v["name"] == claim.name]
    curved = bool(claim.lines) and claim.study != "weak" or claim.study == "weak"
    with style():
        figure = Figure(figsize=(5.4 * len(verdicts) if curved else 3.6 * len(verdicts), 3.6), layout="constrained")
        figure.suptitle(claim.statement, x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(1, len(verdicts) * (2 if curved else 1), squeeze=False,
                                 width_ratios=(2.2, 1) * len(verdicts) if curved else None)[0]
        for n, found in enumerate(verdicts):
            rows = evidence[found["world"], claim.study]
            if curved:
                draw_lines(panels[2 * n], claim, rows, found)
            draw_effect(panels[2 * n + 1 if curved else n], found)
    return figure


def draw_lines(axes, claim: Claim, rows: Rows, found: dict) -> None:
    """The curves that a claim compares."""
    proxy = claim.study == "weak"
    what = "gold" if proxy or claim.unit == "gold reward" else "perplexity" if claim.unit == "per token" else {
        "tokens": "length", "share of pairs": "distinct"}.get(claim.unit, "reward")
    x = "reward" if proxy else "kl"
    for line, colour in zip(lines_of(claim, rows), LINE_COLOURS):
        for draw in sorted({draw_of(seed) for seed in rows.seeds}):
            some = mean_curve(rows, line, [seed for seed in rows.seeds if draw_of(seed) == draw])
            axes.plot([p[x] for p in some], [p[what] for p in some], color=colour, lw=0.7, alpha=0.45)
        whole = mean_curve(rows, line)
        axes.plot([p[x] for p in whole], [p[what] for p in whole], color=colour, marker="o", ms=3, label=label(line))
    if found.get("level") is not None:
        axes.axvline(found["level"], color="black", lw=0.8, ls=":")
    if proxy:
        axes.set(xlim=(-0.2, 2), ylim=(-4, 1.5))
    elif claim.study == "anchors":
        axes.set_xlim(0, 12)
    axes.set(xlabel="proxy reward" if proxy else KL_LABEL, ylabel={"gold": "gold reward"}.get(what, what),
             title=f"{found['world']}")
    axes.legend(loc="best")


def label(line) -> str:
    """A line's name for a legend."""
    if isinstance(line, str):
        return line
    return line["line"] + "".join(f", {name} {value:g}" for name, value in line.items() if name != "line")


def draw_effect(axes, found: dict) -> None:
    """The effect of each seed by draw, the mean and its interval, the null and the margin."""
    colour = VERDICT_COLOURS[found["verdict"]]
    values = {int(seed): value for seed, value in found["values"].items()}
    for n, draw in enumerate(sorted({draw_of(seed) for seed in values})):
        some = [value for seed, value in sorted(values.items()) if draw_of(seed) == draw]
        axes.plot(np.full(len(some), n), some, "o", color=colour, alpha=0.4, ms=4, mew=0)
    if found["effect"] is not None:
        x = DRAWS + 0.3
        if found["ci_low"] is not None:
            axes.plot([x, x], [found["ci_low"], found["ci_high"]], color=colour, lw=2.5)
        axes.plot([x], [found["effect"]], "D", color=colour, ms=6)
    axes.axhline(found["null"], color="black", lw=0.8)
    if found["margin"]:
        axes.axhspan(found["null"] - found["margin"], found["null"] + found["margin"], color="black", alpha=0.07, lw=0)
    axes.set(xticks=[], xlabel=f"{found['draws']} draws and all\n({found['seeds']} seeds)", ylabel=found["unit"])
    axes.set_title(found["verdict"], color=colour)


SHOWN = {"best WARP": COLOURS["slerp"], "WARP": COLOURS["liti"], "batch of 16": COLOURS["sft"],
         "one long run": COLOURS["single"]}  # the methods whose fronts stand beside the limit


def limit_figure(found: dict) -> Figure:
    """For each world the fronts of some methods under the limit, and the share of its area of every method."""
    worlds = list(found["worlds"])
    with style():
        figure = Figure(figsize=(11, 3.9 * len(worlds)), layout="constrained")
        panels = figure.subplots(len(worlds), 2, squeeze=False, width_ratios=(1.25, 1))
        for (left, right), world in zip(panels, worlds):
            limit = found["limits"][world]
            left.plot([p["kl"] for p in limit], [p["reward"] for p in limit], color="black", ls="--", lw=1.4)
            left.annotate("limit", (limit[-1]["kl"], limit[-1]["reward"]), (4, 0), textcoords="offset points")
            for name, colour in SHOWN.items():
                (line,) = [c["points"] for c in found["curves"] if (c["world"], c["line"]) == (world, name)
                           and c["study"] == METHODS[name][0]]
                left.plot([p["kl"] for p in line], [p["reward"] for p in line], color=colour, marker="o", ms=3,
                          label=name)
            left.set(xlim=(0, 4.4), ylim=(None, limit[-1]["reward"] + 0.15), xlabel=KL_LABEL,
                     ylabel="reward (standard deviations of SFT samples)", title=world)
            left.legend(loc="lower right")
            shares = sorted((s for s in found["limit_share"] if s["world"] == world), key=lambda s: s["mean"])
            for y, some in enumerate(shares):
                colour = SHOWN.get(some["method"], COLOURS["single"])
                right.barh(y, some["mean"], color=colour, alpha=0.85 if some["method"] in SHOWN else 0.4)
                right.plot([some["ci_low"], some["ci_high"]], [y, y], color="black", lw=1.2)
                right.annotate(f"{some['mean']:.0%}", (0.01, y), va="center", color="white", fontsize=9)
            right.set(yticks=range(len(shares)), yticklabels=[some["method"] for some in shares], xlim=(0, 1),
                      xlabel="share of the limit's area above SFT, 0 to 4 nats")
            right.set_title(f"{shares[0]['seeds']} seeds; bars: 95 % intervals")
            right.grid(axis="y", visible=False)
    return figure


def write_report(found: dict, claims: Sequence[Claim], evidence: Evidence, folder: Path) -> str:
    """claims.json, claims.md and figures/ in a folder; returns the table."""
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_json(folder / "claims.json", found)
    text = table(found)
    made = folder / ".claims.md.part"
    made.write_text(text, encoding="utf-8")
    made.replace(folder / "claims.md")
    figures = {claim.name: claim_figure(claim, found["claims"], evidence) for claim in claims}
    if "limits" in found:
        figures["limit"] = limit_figure(found)
    for name, figure in figures.items():
        part = folder / "figures" / f".{name}.part"
        figure.savefig(part, format="png", dpi=110)
        part.replace(folder / "figures" / f"{name}.png")
    return text
