"""The evidence in words: the tables of verdicts, and the sentences that are computed from them."""

from __future__ import annotations

from ..evaluation.statistics import Interval
from .claims import HEADLINES
from .tuning import grids

AT_PROXY = ("weak", "quality")  # the studies whose claims compare at one proxy reward, and not at one KL
MORE_DRAWS = (32, 64)  # for which the summary says what they would bring


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
            f"{counts['kept_by_benjamini_hochberg']} of {counts['clear_and_tested']} stay clear, and "
            f"{counts['kept_by_benjamini_yekutieli']} whatever depends on what (Benjamini and Yekutieli). Decided on "
            f"each half of the draws alone, {halves['same']} verdicts are the same on both, {halves['moved']} differ, "
            f"and {halves['turned'] or 'none'} of these turn round, from holds to fails. Were effects and their spread "
            "between draws to stay as they are, "
            + " and ".join(f"{draws} draws would leave {100 * unclear_with(found, draws):.0f} % unclear"
                           for draws in MORE_DRAWS) + ".")


def unclear_with(found: dict, draws: int) -> float:
    """The share of the verdicts that would be unclear with so many draws, a seed each, if every effect and its spread
    between draws stayed as they are."""
    return sum(verdict_with(claim, draws) == "unclear" for claim in found["claims"]) / len(found["claims"])


def verdict_with(claim: dict, draws: int) -> str:
    """The verdict that a claim would have with so many draws, a seed each, if its effect and the spread between draws
    stayed as they are; its own where there is no spread to go by."""
    if claim["effect"] is None or claim["draws"] < 2:
        return claim["verdict"]
    interval = Interval(claim["effect"], claim["ci_low"], claim["ci_high"], claim["seeds"], claim["draws"])
    return interval.with_groups(draws).verdict(*(claim[name] for name in ("rule", "null", "margin", "worth")))


def headlines(found: dict) -> str:
    """The claims that the README shows, as Markdown: the verdict and the effect with its interval."""
    worlds = list(found["worlds"])
    lines = [f"| claim | {' | '.join(worlds)} |", "|---|" + "---|" * len(worlds)]
    for name in HEADLINES:
        some = {claim["world"]: claim for claim in found["claims"] if claim["name"] == name}
        cells = [short(some[world]) + at_level(some[world]) if world in some else "–" for world in worlds]
        lines.append(f"| {next(iter(some.values()))['statement']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        text += f",{at_level(claim)} ({claim['reached'][format(claim['level'], 'g')]} reach it)"
    return text


def at_level(claim: dict) -> str:
    """The level that a claim compares at, with a space before it, or nothing where it has none."""
    if claim.get("level") is None:
        return ""
    return f" at {claim['level']:g} {'proxy reward' if claim['study'] in AT_PROXY else 'nats'}"


def other_side(claim: dict) -> dict[str, float]:
    """The mean effects of a comparison at the levels that all seeds reach and at which they lie on the other side of
    the null than at the level that decides, by more than is worth having: by level."""
    if claim.get("level") is None:
        return {}
    side = claim["effect"] > claim["null"]
    return {level: mean for level, mean in claim["effect_at"].items()
            if claim["reached"][level] == claim["seeds"] and (mean > claim["null"]) != side
            and abs(mean - claim["null"]) > claim["worth"]}


def short(claim: dict) -> str:
    """A verdict with its effect and interval alone."""
    if claim["effect"] is None:
        return f"**{claim['verdict']}**"
    digits = 1 if claim["unit"] == "degrees" else 2
    low, high = (bound(claim[end], digits) for end in ("ci_low", "ci_high"))
    return f"**{claim['verdict']}** {claim['effect']:+.{digits}f} [{low}, {high}]"


def bound(value: float | None, digits: int = 2) -> str:
    """An end of an interval, which one draw alone has not."""
    return "–" if value is None else f"{value:+.{digits}f}"


def lies_as_predicted(claim: dict) -> bool:
    """Whether a claim's effect was measured and lies where it was predicted, the ends included."""
    low, high = claim["prediction"]
    return claim["effect"] is not None and low <= claim["effect"] <= high


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
