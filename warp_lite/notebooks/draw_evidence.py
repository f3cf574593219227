"""The pictures and sentences of the notebook on the evidence, from what claims.json, bands.json and noise.json hold.

`claims` are the verdicts by name and world. Rewards are in standard deviations of SFT samples, KL in nats per sequence.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evidence import drawing, law, wording
from ..evidence.bench import draw_of
from ..evidence.claims import decide_values, pick
from ..viewing.plots import COLOURS, KL_LABEL, column

Claims = Mapping[tuple[str, str], Mapping]
REWARD = "reward (standard deviations of SFT samples)"
AXES = {"reward": REWARD, "gold": "gold reward (standard deviations)", "perplexity": "perplexity of held-out texts",
        "length": "length (tokens)", "kl": KL_LABEL}
WIDTH = 72  # characters of a claim on a line
SURE = ("holds", "fails")  # verdicts that are clear


def by_name(evidence: Mapping) -> Claims:
    """The verdicts of a report by name and world."""
    return {(claim["name"], claim["world"]): claim for claim in evidence["claims"]}


def worlds_of(claims: Claims, name: str) -> list[str]:
    """The worlds in which a claim has a verdict."""
    return [world for other, world in claims if other == name]


def sentence(claims: Claims, name: str) -> str:
    """A claim and what became of it in each world, as Markdown."""
    worlds = worlds_of(claims, name)
    verdicts = "; ".join(f"{world}: {wording.short(claims[name, world])}" for world in worlds)
    return f"{claims[name, worlds[0]]['statement']} – {verdicts}."


def sentences(claims: Claims, names: Sequence[str]) -> str:
    """A list of `sentence`s, one a line."""
    return "\n".join(f"- {sentence(claims, name)}" for name in names)


def first_measured(evidence: Mapping, world: str) -> str:
    """From where on the trajectories of the study of merging are known in a world, and not a straight line."""
    first = next(point for point in curve(evidence, world, "merging", "trajectory") if point["step"] > 0)
    return f"{world}: at step {first['step']:g}, {first['kl']:.1f} nats"


def since_four_draws(claims: Claims, four: Mapping) -> str:
    """What became of the verdicts that four draws gave, as Markdown: how many moved, which turned, and why."""
    before = {(old["name"], old["world"]): old for old in four["claims"] if (old["name"], old["world"]) in claims}
    pairs = {key: (old["by_percentile_bootstrap"], old["by_t"], claims[key]["verdict"]) for key, old in before.items()}

    def counted(index: int) -> str:
        first = [key for key, verdicts in pairs.items() if verdicts[index] in SURE]
        turned = [key for key in first if pairs[key][2] in SURE and pairs[key][2] != pairs[key][index]]
        lost = [key for key in first if pairs[key][2] not in SURE]
        kept = len(first) - len(turned) - len(lost)
        names = "; ".join(f"{claims[key]['statement']} ({key[1]})" for key in turned)
        return (f"{len(first)} verdicts were clear. Now {kept} of them say the same, {len(lost)} are no longer clear "
                f"and {len(turned) or 'none'} turned round{': ' + names if names else ''}.")

    unclear = [sum(verdicts[index] == "unclear" for verdicts in pairs.values()) for index in (1, 2)]
    draws = max(claim["draws"] for claim in claims.values())
    return (f"The same {len(pairs)} claims were once decided on {four['draws']} draws with {four['seeds']} seeds.\n\n"
            f"- With the percentile bootstrap that was in use: {counted(0)}\n"
            f"- With Student's t on the means of the same {four['draws']} draws: {counted(1)}\n"
            f"- Unclear on {four['draws']} draws by t: {unclear[0]}; on {draws} draws: {unclear[1]}.")


def on_fresh_draws(claims: Claims, looked_at: int) -> str:
    """What the draws that were added once the first `looked_at` seeds had been looked at say of the verdicts that were
    clear on those, both decided at the levels that all of them reach, in sentences: how many they repeat, how many they
    leave open, which they turn round."""
    found: dict[str, list[str]] = {"same": [], "open": [], "turned": []}
    expected, fresh = 0, 0
    for (name, world), entry in claims.items():
        (claim,), values = pick([name]), {int(seed): value for seed, value in entry["values"].items()}
        old, new = (decide_values(claim, world, {seed: value for seed, value in values.items()
                                                 if (seed < looked_at) == early}) for early in (True, False))
        fresh = max(fresh, new["draws"])
        if old["verdict"] in SURE:
            now = new["verdict"]
            kind = "same" if now == old["verdict"] else "turned" if now in SURE else "open"
            found[kind].append(f"{entry['statement']} ({world}, {old['verdict']})")
            expected += wording.verdict_with(old, new["draws"]) == old["verdict"]
    if fresh < 2:
        return f"No draws were added to the first {looked_at} that could decide by themselves."
    clear, turned = sum(map(len, found.values())), found["turned"]
    return (f"The first {looked_at} draws had been looked at when {fresh} more were added. Decided again at the levels "
            f"that all {looked_at + fresh} reach, {clear} verdicts are clear on the {looked_at}; the {fresh} alone "
            f"repeat {len(found['same'])} of them, leave {len(found['open'])} open and turn {len(turned) or 'none'} "
            f"round{': ' + '; '.join(turned) if turned else ''}. Were effects and spreads as the {looked_at} found "
            f"them, {expected} would be clear on {fresh}.")


def of_one_unit(claims: Claims, unit: str) -> list[str]:
    """The names of the claims that are differences in this unit with the null 0 and say "above", in their order."""
    return list(dict.fromkeys(name for (name, _), claim in claims.items() if claim["unit"] == unit
                              and claim["rule"] == "above" and claim["null"] == 0 and not name.startswith("no-kl")))


def draw_effects(claims: Claims, names: Sequence[str], label: str = f"difference in {REWARD}") -> Figure:
    """The effect of each claim with its interval, a column a world, coloured by verdict."""
    worlds = list(dict.fromkeys(world for name in names for world in worlds_of(claims, name)))
    figure, panels = plt.subplots(1, len(worlds), figsize=(12, 0.42 * len(names) + 1.7), layout="constrained",
                                  sharey=True, squeeze=False)
    for axes, world in zip(panels[0], worlds):
        for y, name in enumerate(reversed(names)):
            if (name, world) in claims and claims[name, world]["effect"] is not None:
                _draw_interval(axes, y, claims[name, world])
        axes.axvline(0, color="black", lw=0.8)
        axes.set(yticks=range(len(names)), yticklabels=[_broken(claims, name) for name in reversed(names)],
                 title=f"world: {world}", ylim=(-0.6, len(names) - 0.4))
        axes.tick_params(axis="y", labelsize=8)
    for verdict, colour in drawing.VERDICT_COLOURS.items():
        panels[0][-1].plot([], [], "o-", color=colour, ms=4, label=verdict)
    draws = max(claims[name, world]["draws"] for name in names for world in worlds if (name, world) in claims)
    figure.supxlabel(f"{label}; dots: means of {draws} draws, bars: their 95 % intervals", fontsize=9)
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8)
    return figure


def _draw_interval(axes: Axes, y: float, claim: Mapping) -> None:
    colour = drawing.VERDICT_COLOURS[claim["verdict"]]
    if claim["ci_low"] is not None:
        axes.plot([claim["ci_low"], claim["ci_high"]], [y, y], color=colour, lw=2.2)
    axes.plot(claim["effect"], y, "o", color=colour, ms=5)


def draw_outcome(axes: Axes, claim: Mapping) -> None:
    """One claim on an axis of its own: a band where its effect was predicted, the effect measured with its interval,
    and a line at the null and at each end of a margin."""
    colour, (low, high) = drawing.VERDICT_COLOURS[claim["verdict"]], claim["prediction"]
    axes.axvspan(low, high, ymin=0.15, ymax=0.85, color=COLOURS["lerp"], alpha=0.35, lw=2)
    nulls = {claim["null"] - claim["margin"], claim["null"] + claim["margin"]}
    ends = [low, high, *nulls, *(claim[name] for name in ("effect", "ci_low", "ci_high") if claim[name] is not None)]
    if claim["ci_low"] is not None:
        axes.plot([claim["ci_low"], claim["ci_high"]], [0, 0], color=colour, lw=2.2)
    if claim["effect"] is not None:
        axes.plot(claim["effect"], 0, "o", color=colour, ms=6)
    for at in nulls:
        axes.axvline(at, color="black", lw=0.9)
    room = 0.06 * (max(ends) - min(ends))
    axes.set(yticks=[], ylim=(-1, 1), xlim=(min(ends) - room, max(ends) + room))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=7, pad=1, length=2)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def draw_decisive(claims: Claims) -> Figure:
    """Where merging ought to win: each claim with what was predicted and measured, a column a world."""
    names, worlds = list(dict.fromkeys(name for name, _ in claims)), list(dict.fromkeys(world for _, world in claims))
    figure, panels = plt.subplots(len(names), len(worlds), figsize=(12, 0.66 * len(names) + 1), squeeze=False)
    for row, name in zip(panels, names):
        for axes, world in zip(row, worlds):
            draw_outcome(axes, claims[name, world])
        claim = claims[name, worlds[0]]
        words = textwrap.fill(f"{claim['statement']} ({claim['unit']})", WIDTH)
        row[0].text(-0.03, 0.5, words, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
    for axes, world in zip(panels[0], worlds):
        axes.set_title(f"world: {world}", fontsize=10)
    draws = max(claim["draws"] for claim in claims.values())
    figure.suptitle(f"Means of {draws} draws and their 95 % intervals", x=0.01, ha="left", fontsize=10)
    axes.plot([], [], color=COLOURS["lerp"], alpha=0.35, lw=8, label="predicted")
    for verdict in dict.fromkeys(claim["verdict"] for claim in claims.values()):
        axes.plot([], [], "o-", color=drawing.VERDICT_COLOURS[verdict], ms=5, label=f"measured: {verdict}")
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=5, fontsize=8)
    figure.subplots_adjust(left=0.44, right=0.985, top=1 - 0.75 / figure.get_figheight(), bottom=0.03, hspace=1.2)
    return figure


def decisive_sentences(claims: Claims) -> str:
    """What became of the predictions, as Markdown: a line a world with how many came true, and what is clear."""
    lines = []
    for world in dict.fromkeys(world for _, world in claims):
        some = [claim for (_, other), claim in claims.items() if other == world]
        measured, draws = sum(claim["effect"] is not None for claim in some), max(claim["draws"] for claim in some)
        inside = sum(map(wording.lies_as_predicted, some))
        lines.append(f"- **{world}**, {draws} draws: {inside} of {measured} effects lie where they were predicted.")
        for verdict in ("holds", "fails", "no difference"):
            clear = [claim["statement"] + wording.at_level(claim) for claim in some if claim["verdict"] == verdict]
            lines.append(f"    - {verdict}: {'; '.join(clear) or 'none'}.")
        lines.append(f"    - unclear: {sum(claim['verdict'] == 'unclear' for claim in some)} of {len(some)}.")
    return "\n".join(lines)


def _broken(claims: Claims, name: str) -> str:
    words, lines = claims[name, worlds_of(claims, name)[0]]["statement"].split(), [""]
    for word in words:
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < WIDTH else [*lines, word]
    return "\n".join(lines)


def draw_claim(claims: Claims, name: str) -> Figure:
    """The effects of single seeds of one claim, by draw, with the interval that decides, in each world."""
    worlds = worlds_of(claims, name)
    figure, panels = plt.subplots(1, len(worlds), figsize=(4.4 * len(worlds), 3.8), squeeze=False)
    for axes, world in zip(panels[0], worlds):
        drawing.draw_effect(axes, claims[name, world])
        axes.set_title(f"{world}: {claims[name, world]['verdict']}")
    figure.suptitle(_broken(claims, name), fontsize=10)
    words = "dots: single seeds, a column a draw; diamond and bar: the draws' mean and its 95 % interval"
    figure.text(0.5, 0.01, words, ha="center", fontsize=8)
    figure.subplots_adjust(top=0.78, bottom=0.22, wspace=0.45)
    return figure


def curve(evidence: Mapping, world: str, study: str, line: object) -> list[dict]:
    """The points of a line of a study, of its mean curve (claims.json) or with bands (bands.json). Raises StopIteration
    where there is none."""
    return next(c["points"] for c in evidence["curves"] if (c["world"], c["study"], c["line"]) == (world, study, line))


def draw_curves(evidence: Mapping, bands: Mapping, claims: Claims, lines: Mapping[str, tuple[str, object, str]],
                name: str, what: str = "reward", ylim: tuple[float, float] | None = None) -> Figure:
    """The curves of `lines`, by label: (study, line, colour), with their bands, and one claim's verdict in the title,
    in each world. `evidence` and `bands` are what claims.json and bands.json hold.

    Where the claim compares at one level, a bar shows the interval of the difference, drawn from the second line's
    curve upward: it ends where the first line is.
    """
    worlds = worlds_of(claims, name)
    figure, panels = plt.subplots(1, len(worlds), figsize=(5.8 * len(worlds), 4.7), layout="constrained", squeeze=False)
    for axes, world in zip(panels[0], worlds):
        curves = {label: curve(bands, world, study, line) for label, (study, line, _) in lines.items()}
        x = "kl" if "kl" in next(iter(curves.values()))[0] else "reward"
        for (label, points), (_, _, colour) in zip(curves.items(), lines.values()):
            at, (mean, half) = column(points, x), np.array([point[what] for point in points]).T
            axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
            axes.plot(at, mean, color=colour, label=label)
        if (what, x) == ("reward", "kl"):
            axes.plot(*(column(evidence["limits"][world], key) for key in ("kl", "reward")), "k--", lw=1, label="limit")
        _draw_difference(axes, claims[name, world], curves, what, x)
        axes.set(xlabel="proxy " + REWARD if x == "reward" else AXES[x], ylabel=AXES[what], ylim=ylim)
        axes.set_title(f"{world}: {claims[name, world]['verdict']}\n{_difference(claims[name, world])}", fontsize=10)
        axes.legend(loc="best", fontsize=8)
    figure.suptitle(claims[name, worlds[0]]["statement"], x=0.01, ha="left", fontsize=11)
    where = "KL" if x == "kl" else "proxy reward"
    figure.supxlabel(f"lines: means of {len(bands['draws'])} draws at one {where}; bands: their 95 % intervals "
                     "(Student's t); a line ends where the first seed's ends", fontsize=8)
    return figure


def _difference(claim: Mapping) -> str:
    text = f"{wording.short(claim).replace('**' + claim['verdict'] + '**', '').strip()} {claim['unit']}"
    return f"difference {text}{wording.at_level(claim)}\n{claim['seeds']} seeds on {claim['draws']} draws"


def _draw_difference(axes: Axes, claim: Mapping, curves: Mapping[str, Sequence[Mapping]], what: str, x: str) -> None:
    """At the claim's level: the second curve plus the interval of the difference."""
    if claim.get("level") is None or claim["ci_low"] is None or len(curves) < 2:
        return
    points = list(curves.values())[1]
    base = np.interp(claim["level"], column(points, x), [point[what][0] for point in points])
    colour = drawing.VERDICT_COLOURS[claim["verdict"]]
    axes.plot([claim["level"]] * 2, [base + claim["ci_low"], base + claim["ci_high"]], color=colour, lw=3, alpha=0.8,
              label="interval of the difference")


def draw_shares(evidence: Mapping, methods: Sequence[str]) -> Figure:
    """The share of the limit's area that each method's front attains, with its interval, in each world."""
    worlds = list(evidence["worlds"])
    figure, panels = plt.subplots(1, len(worlds), figsize=(5.8 * len(worlds), 3.6), layout="constrained", squeeze=False)
    for axes, world in zip(panels[0], worlds):
        rows = sorted((row for row in evidence["limit_share"] if row["world"] == world and row["method"] in methods),
                      key=lambda row: row["mean"])
        for y, row in enumerate(rows):
            colour = COLOURS["slerp"] if row["method"] == "WARP" else COLOURS["single"]
            axes.barh(y, row["mean"], color=colour, alpha=0.8)
            axes.plot([row["ci_low"], row["ci_high"]], [y, y], color="black", lw=1.2)
        axes.set(yticks=range(len(rows)), yticklabels=[row["method"] for row in rows], xlim=(0, 1.05),
                 xlabel="share of the limit's area, 0 to 4 nats",
                 title=f"{world}: means of {len(evidence['draws'])} draws, bars: 95 % intervals")
        axes.grid(axis="y", visible=False)
    return figure


def interval_words(row: Mapping | None, digits: int = 2) -> str:
    """A mean with its interval, a dash where there is none."""
    return "–" if not row else f"{row['mean']:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def equal_table(evidence: Mapping) -> str:
    """The table of methods at equal completions, as Markdown."""
    columns = ("world", "method", "lr", "β", "share of the limit", "reward at 2 nats", "gold at 2 nats",
               "steps in sequence", "completions", "exchanges")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in evidence["equal_compute"]:
        cells = (row["world"], row["method"], f"{row['lr']:g}", f"{row['beta']:g}",
                 *map(interval_words, (row["share"], row.get("reward at 2"), row.get("gold at 2"))),
                 str(row["sequential_steps"]), str(row["completions"]), str(row["exchanges"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def how_chosen(chosen: Mapping) -> str:
    """On how many draws the settings were chosen, and which lie at an edge of what was tried; `chosen` is what
    tuned.json holds."""
    draws: dict[int, list[str]] = {}
    for world, purposes in chosen["worlds"].items():
        for purpose, setting in purposes.items():
            draws.setdefault(len(setting["draws"]), []).append(f"{world}, {purpose}")
    few = [f"on {count}: {'; '.join(names)}" for count, names in sorted(draws.items()) if count < max(draws)]
    edges = wording.at_an_edge(chosen)
    return (f"Settings were chosen on {max(draws)} draws that no verdict uses" + "".join(f", some {one}" for one in few)
            + f". At an edge of what was tried, where a better one may lie outside: {'; '.join(edges) or 'none'}.")


def on_tuning_draws(chosen: Mapping, purposes: Sequence[str]) -> str:
    """The area up to 4 nats that each purpose's chosen setting has in the mean of the tuning draws, the highest first,
    as Markdown, a line a world; `chosen` is what tuned.json holds. All are too high: the best of what was tried."""
    lines = []
    for world, found in chosen["worlds"].items():
        scores = {purpose: found[purpose]["scores"][found[purpose]["chosen"]] for purpose in purposes}
        lines.append(f"- {world}: " + ", ".join(f"{purpose} {scores[purpose]:.2f}"
                                                for purpose in sorted(scores, key=scores.get, reverse=True)))
    return "\n".join(lines)


def folded(title: str, table: str) -> str:
    """A table that opens on a click, as Markdown."""
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def _draws(noise: Mapping) -> int:
    return len({draw_of(seed) for seed in noise["seeds"]})


PREDICTORS = {"angle": "angle between task vectors (degrees)", "noise over signal": "gradient noise scale / batch size"}


def draw_noise_map(noise: Mapping) -> Figure:
    """Where merging four gains: a map over batch size and learning rate, and the gain against what may explain it."""
    worlds = noise["worlds"]
    figure, panels = plt.subplots(len(worlds), 3, figsize=(12, 3.6 * len(worlds)), layout="constrained", squeeze=False)
    figure.supxlabel(f"gains: differences in {REWARD}, means of {_draws(noise)} draws; bars and brackets: their 95 % "
                     "intervals", fontsize=8)
    for row, (world, of_world) in zip(panels, worlds.items()):
        _draw_map(row[0], world, of_world["cells"])
        for axes, (name, words) in zip(row[1:], PREDICTORS.items()):
            _draw_predictor(axes, of_world, name, words)
        row[1].legend(fontsize=7, loc="upper left")
    return figure


def _draw_map(axes: Axes, world: str, cells: Sequence[Mapping]) -> None:
    batches, rates = sorted({cell["batch"] for cell in cells}), sorted({cell["lr"] for cell in cells})
    gain_of = {(cell["batch"], cell["lr"]): cell["gain"]["mean"] for cell in cells}
    gains = np.array([[gain_of[batch, lr] for lr in rates] for batch in batches])
    most = abs(gains).max()
    axes.imshow(gains, cmap="PuOr", vmin=-most, vmax=most, origin="lower", aspect="auto")
    for (i, j), gain in np.ndenumerate(gains):
        axes.annotate(f"{gain:+.2f}", (j, i), ha="center", va="center", fontsize=9,
                      color="white" if abs(gain) > 0.6 * most else "black")
    axes.set(xticks=range(len(rates)), xticklabels=[f"{lr:g}" for lr in rates], yticks=range(len(batches)),
             yticklabels=batches, xlabel="learning rate", ylabel="batch size", title=f"{world}: gain of merging four")
    axes.grid(visible=False)


def _draw_predictor(axes: Axes, of_world: Mapping, name: str, words: str) -> None:
    cells, fit = of_world["cells"], of_world["correlations"][name]
    batches = sorted({cell["batch"] for cell in cells})
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(batches)))
    for batch, shade in zip(batches, shades):
        for n, cell in enumerate(cell for cell in cells if cell["batch"] == batch):
            axes.plot([cell[name]] * 2, [cell["gain"]["ci_low"], cell["gain"]["ci_high"]], color=shade, lw=0.8)
            axes.plot(cell[name], cell["gain"]["mean"], "o", ms=4, color=shade,
                      label=f"batch {batch}" if n == 0 else None)
    axes.set(xlabel=words, ylabel="gain of merging four")
    axes.set_title(f"rank correlation {fit['correlation']:+.2f} [{fit['ci_low']:+.2f}, {fit['ci_high']:+.2f}]")
    axes.axhline(0, color="black", lw=0.8)
    if name == "noise over signal":
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")


def draw_law(noise: Mapping) -> Figure:
    """The gain that the law says against the gain measured, in each world: fitted cells, and those that test it."""
    laws = noise["laws"]
    figure, panels = plt.subplots(1, len(laws), figsize=(5.4 * len(laws), 4.2), layout="constrained", squeeze=False)
    for axes, of_law in zip(panels[0], laws):
        fitted = law.Law(of_law["c"]["value"], of_law["alpha"]["value"])
        for world, of_world in noise["worlds"].items():
            for half in (True, False):
                cells = [cell for cell in of_world["cells"] if law.fitting_cells(cell) == half]
                said = fitted.mean_gain([{**cell, **{name: cell[f"mean {name}"] for name in ("reach", "short angle")}}
                                         for cell in cells])
                is_fit = half and world == of_law["fitted_in"]
                colour = COLOURS["slerp" if world == of_law["fitted_in"] else "single"]
                axes.vlines(said, *([cell["gain"][end] for cell in cells] for end in ("ci_low", "ci_high")), lw=0.6,
                            color=colour, alpha=0.5)
                axes.scatter(said, [cell["gain"]["mean"] for cell in cells], s=28, zorder=3, edgecolors=colour,
                             facecolors="none" if is_fit else colour,
                             label=None if half and not is_fit else f"{world}, {'fitted' if is_fit else 'tested'}")
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="black", lw=0.8, ls=":", label="as the law says")
        low, high = axes.get_ylim()
        axes.set(xlabel="gain that the law says", ylabel="gain measured", title=f"fitted in {of_law['fitted_in']}",
                 ylim=(low, high + 0.2 * (high - low)))  # room for the names above the bars
        axes.legend(fontsize=8, loc="upper left", ncols=2)
    figure.supxlabel(f"gains in {REWARD}; dots: means of {_draws(noise)} draws, bars: their 95 % intervals", fontsize=8)
    return figure


def law_sentences(noise: Mapping) -> str:
    """What the law is and how well it says what it was not fitted on, as Markdown: a line a test."""
    lines = []
    for of_law in noise["laws"]:
        words = f"Fitted in {of_law['fitted_in']}: c = {_value(of_law['c'])}, α = {_value(of_law['alpha'])}."
        for name, test in of_law["tests"].items():
            rank, squared = test["rank_correlation"], test["r_squared"]
            where = "On the other half of its cells" if name == "other half" else f"In {name}"
            which = _known(rank, "it says which gain more", "it says the wrong way round which gain more",
                           "it is unclear whether it says which gain more")
            how_much = _known(squared, "and how much", "but not how much", "and unclear whether it says how much")
            words += f" {where} {which}, {how_much} (rank correlation {_value(rank)}, R² {_value(squared)})."
        lines.append(f"- {words}")
    return "\n".join([*lines, "\nBrackets: 95 % of bootstraps over draws, which with so few draws hold the truth less "
                      "often than that (`coverage.json`): a clear word here is less sure than a verdict."])


def _known(interval: Mapping, above: str, below: str, else_: str) -> str:
    """Words by the side of zero that an interval lies on."""
    return above if interval["ci_low"] > 0 else below if interval["ci_high"] < 0 else else_


def by_level(claims: Claims) -> str:
    """The claims whose mean effect has the other sign at another level that all seeds reach, by more than is worth
    having, as Markdown."""
    lines = [f"- {claim['statement']} ({world}): {wording.short(claim)}{wording.at_level(claim)}; "
             + ", ".join(f"{mean:+.2f} at {level}" for level, mean in wording.other_side(claim).items())
             for (_, world), claim in claims.items() if wording.other_side(claim)]
    return "\n".join(lines) or "None."


def _value(interval: Mapping) -> str:
    return f"{interval['value']:.2f} [{interval['ci_low']:.2f}, {interval['ci_high']:.2f}]"


def opposite_shares(claims: Claims) -> np.ndarray:
    """For each clear verdict the share of single seeds whose own effect has the other sign, sorted."""
    shares = []
    for claim in claims.values():
        if claim["verdict"] in ("holds", "fails") and claim["rule"] in ("above", "below"):
            values = np.array(list(claim["values"].values())) - claim["null"]
            shares.append(np.mean(np.sign(values) != np.sign(claim["effect"] - claim["null"])))
    return np.sort(shares)


def draw_single_seeds(shares: np.ndarray, seeds: int) -> Figure:
    """How often one seed would say the opposite of a clear verdict; `seeds` is how many each verdict has."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    axes.step(np.arange(1, len(shares) + 1), 100 * shares, where="mid", color=COLOURS["single"])
    axes.set(xlabel="clear verdicts, sorted", ylabel="single seeds that\nsay the opposite (%)")
    axes.set_title(f"In {np.mean(shares > 0):.0%} of {len(shares)} clear verdicts\n"
                   f"at least one of {seeds} seeds says the opposite")
    return figure


