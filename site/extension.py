"""What the site adds to Sphinx: scenes, formulas as MathML, and findings read from the committed evidence."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from warp_lite import _HOME_OF
from warp_lite import __all__ as public
from warp_lite.evaluation.statistics import VERDICTS
from warp_lite.evidence import load
from warp_lite.evidence.wording import lies_as_predicted, summary
from warp_lite.viewing.plots import COLOURS, ITERATION_COLOURS


class Scene(SphinxDirective):
    """`{scene} NAME`: a live picture, of NAME.js; `:front:` names the numbers that the explorer shows."""

    required_arguments = 1
    option_spec = {"front": str}

    def run(self) -> list[nodes.Node]:
        name, front = self.arguments[0], self.options.get("front", "tiny")
        self.env.metadata[self.env.docname].setdefault("scenes", set()).add(name)
        text = (f'<div class="scene" data-scene="{name}" data-front="{front}">'
                "<noscript>This picture moves with JavaScript only.</noscript></div>")
        return [nodes.raw("", text, format="html")]


class Claims(SphinxDirective):
    """`{claims} NAME …`: a table of what the evidence says of those claims, by world; of all, with filters, for none.
    `:of: decisive` takes them from other evidence than `claims`."""

    optional_arguments = 100
    option_spec = {"of": str}

    def run(self) -> list[nodes.Node]:
        of = self.options.get("of", "claims")
        claims = load(of)["claims"]
        if not self.arguments:
            self.env.metadata[self.env.docname].setdefault("scenes", set()).add("evidence")
            return [nodes.raw("", whole_table(claims, of), format="html")]
        return [nodes.raw("", short_table(claims, self.arguments), format="html")]


class Counted(SphinxDirective):
    """`{counted}`: how many verdicts there are of each kind, how sure they are, by what they were reached, and how many
    effects lie where they were predicted. `:of: decisive` counts other evidence than `claims`."""

    option_spec = {"of": str}

    def run(self) -> list[nodes.Node]:
        evidence = load(self.options.get("of", "claims"))
        text = (f"{summary(evidence)} They come from {len(evidence['seeds'])} seeds on {len(evidence['draws'])} draws "
                f"of SFT policy and reward model in each of {len(evidence['worlds'])} tiny worlds. Brackets are "
                f"{100 * evidence['level']:.0f} % intervals, Student's t on the means of draws.")
        if predicted := [claim for claim in evidence["claims"] if "prediction" in claim]:
            text = (f"{sum(map(lies_as_predicted, predicted))} of {len(predicted)} effects lie where they were "
                    f"predicted. {text}")
        return [nodes.paragraph("", text)]


class PublicNames(SphinxDirective):
    """`{public-names}`: what `import warp_lite` offers, each with a link to where it is described."""

    def run(self) -> list[nodes.Node]:
        lines = ["| name | defined in |", "|---|---|"]
        lines += [f"| {{py:obj}}`{name} <warp_lite.{_HOME_OF[name]}.{name}>` | "
                  f"{{py:mod}}`warp_lite.{_HOME_OF[name]}` |" for name in public]
        return self.parse_text_to_nodes("\n".join(lines))


def numbers(source: str | Path) -> dict:
    """What the scenes read: the committed numbers, and the fronts of other worlds beside them."""
    made = json.loads((Path(source) / "scenes.json").read_text(encoding="utf-8"))
    fronts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(source).glob("fronts/*.json")}
    return {**made, "fronts": {**made["fronts"], **fronts}}


def worded(claim: dict) -> str:
    """A claim's effect with its interval, what it is held against, and what was predicted, as HTML."""
    rule = {"above": f"above {claim['null']:g}", "below": f"below {claim['null']:g}",
            "within": f"within {claim['margin']:g} of {claim['null']:g}"}[claim["rule"]]
    if "prediction" in claim:
        low, high = (f"{end:+.2f}".replace("-", "−") for end in claim["prediction"])
        there = "it lies there" if lies_as_predicted(claim) else "it does not lie there"
        rule += f"; predicted: {low} to {high}, {there}"
    return f"<td class='effect'>{interval(claim)} <small>{html.escape(claim['unit'])}; claimed: {rule}</small></td>"


def named(claim: dict) -> str:
    """A verdict in its colour, as HTML."""
    return f"<b data-verdict='{claim['verdict']}'>{claim['verdict']}</b>"


def interval(claim: dict) -> str:
    """Effect and interval, as HTML that breaks between them only."""
    effect, low, high = (f"{claim[name]:+.2f}".replace("-", "−") for name in ("effect", "ci_low", "ci_high"))
    return f"<span class='number'>{effect}</span> <span class='number'>[{low}, {high}]</span>"


def short_table(claims: list[dict], names: list[str]) -> str:
    """Chosen claims: a row each, a column a world. Raises ValueError for a claim that there is not."""
    worlds = list(dict.fromkeys(claim["world"] for claim in claims))
    rows = []
    for name in names:
        of_world = {claim["world"]: claim for claim in claims if claim["name"] == name}
        if not of_world:
            raise ValueError(f"the evidence has no claim {name!r}")
        cells = "".join(
            f"<td>{named(of_world[world])} {interval(of_world[world])}</td>"
            if world in of_world else "<td></td>" for world in worlds)
        rows.append(f"<tr><td>{html.escape(next(iter(of_world.values()))['statement'])}</td>{cells}</tr>")
    head = "".join(f"<th>{world}</th>" for world in worlds)
    return (f"<div class='wide'><table><thead><tr><th>claim</th>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def whole_table(claims: list[dict], of: str) -> str:
    """Every verdict of the evidence of that name, with the two filters that evidence.js listens to."""
    def choice(name: str, values: list[str]) -> str:
        options = "".join(f"<option>{value}</option>" for value in values)
        return f"<label>{name} <select data-filter='{name}'><option value=''>all</option>{options}</select></label>"

    worlds = list(dict.fromkeys(claim["world"] for claim in claims))
    more = {"seeds": "seeds", "figure": "paper_figure"} if of == "claims" else {"seeds": "seeds"}
    rows = [f"<tr data-world='{claim['world']}' data-verdict='{claim['verdict']}'>"
            f"<td>{named(claim)}</td><td>{claim['world']}</td>"
            f"<td class='claim'>{html.escape(claim['statement'])}</td>{worded(claim)}"
            + "".join(f"<td class='wide-only'>{html.escape(str(claim[key]))}</td>" for key in more.values()) + "</tr>"
            for claim in claims]
    names = ("verdict", "world", "claim", "effect, its interval, and where it must lie", *more)
    filters = f"{choice('world', worlds)} {choice('verdict', list(VERDICTS))}"
    return (f"<div class='evidence' data-evidence='{of}'><p class='filters'>{filters} "
            f"<span data-count aria-live='polite'></span></p><div class='wide'><table><thead><tr>"
            f"{''.join(f'<th>{name}</th>' for name in names)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            "</div></div>")


def write_numbers(app: Sphinx) -> None:
    """The colours of the figures and the scenes' numbers, as a script: a page that is opened as a file reads it too."""
    data = {"colours": COLOURS, "iterations": ITERATION_COLOURS, **numbers(app.srcdir)}
    for name in ("config", "provenance", "preset"):
        data.pop(name, None)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    verdicts = "".join(f"b[data-verdict='{verdict}'] {{ color: {COLOURS[verdict]}; }}\n" for verdict in VERDICTS)
    (Path(app.srcdir) / "_static" / "colours.css").write_text(verdicts, encoding="utf-8")
    (Path(app.srcdir) / "_static" / "numbers.js").write_text(f"window.WARP = {text};\n", encoding="utf-8")


def add_scripts(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """A page loads the scripts of its own scenes."""
    names = app.env.metadata.get(page, {}).get("scenes", ())
    for name in (*(("numbers", "scene") if set(names) - {"evidence"} else ()), *sorted(names)):
        app.add_js_file(f"{name}.js", loading_method="defer")


def mathml(translator, node: nodes.Element) -> None:
    """A formula as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f"<div class='formula'>{text}</div>" if block else text)
    raise nodes.SkipNode


def plain_docstring(app: Sphinx, what: str, name: str, of: object, options: dict, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: what RST would take for markup means itself, and paragraphs
    that are indented as a whole are shown as they stand. Each parameter begins a paragraph."""
    made: list[str] = []
    for paragraph in re.split(r"\n\n|\n(?=\w+(?:, \w+)*: )", "\n".join(lines).strip()):
        rows = paragraph.split("\n")
        if all(row.startswith("  ") for row in rows):
            made += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            parts = re.split(r"(`[^`]*`)", " ".join(row.strip() for row in rows))
            made += ["".join(f"`{part}`" if part[:1] == "`" else re.sub(r"([\\*|_])", r"\\\1", part)
                             for part in parts if part), ""]
    lines[:] = made


def short_names(app: Sphinx, what: str, name: str, of: object, options: dict, signature: str | None,
                returns: str | None) -> tuple[str | None, str | None]:
    """Signatures without the modules of types: where a default has no source, autodoc leaves them in."""
    return tuple(re.sub(r"~(?:\w+\.)+", "", text) if text else text for text in (signature, returns))


def setup(app: Sphinx) -> dict:
    """Sphinx calls this."""
    for name, directive in (("scene", Scene), ("claims", Claims), ("counted", Counted),
                            ("public-names", PublicNames)):
        app.add_directive(name, directive)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("builder-inited", write_numbers)
    app.connect("html-page-context", add_scripts)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-process-signature", short_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
