"""ParetoExplorer: move along the fronts of a result and read what the policy there says.

The grid (grid.py) is measured when the explorer is made; a move reads it, redraws one figure
(picture.py) and rewrites two texts. `to_html` writes the same as a page of its own
(page.py). The widgets are those of ipywidgets, so it works wherever a notebook does.
"""

from __future__ import annotations

import dataclasses
import html
import traceback
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ...averaging.checks import check_eta
from ...averaging.liti import liti
from ...result import WarpResult
from .grid import View, build_grid, changed_words, line_at, measure_points, merged_weights, point_at
from .picture import Picture, draw_picture, reward_label

if TYPE_CHECKING:
    from ipywidgets import VBox

MEASURE = "Measure exactly this point"
CLOSE = "line-height:1.4"
NEW_WORD = "background:#cfe8ff;border-radius:3px;padding:0 2px;font-weight:600"


class ParetoExplorer:
    """Sliders for η, iteration, M and λ over a WarpResult; a notebook shows it as its value.

    `fast` measures a smaller grid. `prompts` is the number of held-out prompts whose completions are
    shown. `limit` takes points of `optimal_front`; it is estimated where none are given. `grid` is the
    data, plain dicts: another explorer's of the same result saves measuring it, and then the arguments before it
    do nothing. `view` is where the explorer stands. Raises ValueError for a result without iterations and for a view
    outside the grid.
    """

    def __init__(self, result: WarpResult, fast: bool = False, prompts: int = 4, limit: Sequence[dict] | None = None,
                 progress: bool = True, grid: dict | None = None):
        self.result = result
        self.grid = build_grid(result, fast, prompts, limit, progress) if grid is None else grid
        etas = self.grid["etas"]
        self.view = View(etas[len(etas) // 2], self.grid["iterations"][-1], self.grid["runs"][-1],
                         limit=bool(self.grid["limit"]))
        self.exact: dict[tuple, dict] = {}  # points measured live, by (iteration, runs, λ or None, η)
        self.picture = Picture(self.grid)

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards there are: "reward", and "gold" where the result has one."""
        return ["reward", *(["gold"] if self.grid["gold"] else [])]

    def point(self) -> dict:
        """The numbers and completions of the view: measured live where that was asked for, else read from the grid."""
        return self.exact.get(self._key()) or point_at(self.grid, self.view)

    def _key(self) -> tuple:
        view = self.view
        return (view.iteration, view.runs, view.lam if view.runs == 2 else None, view.eta)

    def move(self, **changes: float | int | str | bool) -> None:
        """Change the view, by the names of View's fields. Raises ValueError for a reward there is none of and outside
        the grid."""
        view = dataclasses.replace(self.view, **changes)
        if view.reward not in self.rewards:
            raise ValueError(f"reward must be one of {', '.join(self.rewards)}, not {view.reward!r}")
        point_at(self.grid, view)  # raises where there is nothing
        self.view = view

    def measure(self) -> dict:
        """Evaluate the exact point of the view now, keep it and return it."""
        view = self.view
        lam = view.lam if view.runs == 2 else None
        theta = liti(self.result.sft, merged_weights(self.result, view.iteration, view.runs, lam), check_eta(view.eta))
        task = self.result.task
        per_prompt, shown = self.grid["samples"] // len(task.eval_prompts), task.first(len(self.grid["prompts"]))
        (point,) = measure_points(self.result, [theta], [view.eta], shown.eval_prompts, per_prompt)
        self.exact[self._key()] = {**point, "live": True, "between": False, "completions_eta": view.eta}
        return self.exact[self._key()]

    def figure(self) -> Figure:
        """The picture of the view as a matplotlib figure, for a page without a kernel."""
        return draw_picture(self.grid, self.view, self.point())

    def png(self) -> bytes:
        """The picture of the view as a PNG, drawn upon the kept ground."""
        return self.picture.png(self.view, self.point())

    def table(self) -> str:
        """The view's front as a table, and completions along it, with words in [brackets] that differ from η = 0."""
        view, names = self.view, self.rewards
        points = line_at(self.grid, view)
        lines = [f"iteration {view.iteration}, {view.runs} of {self.grid['runs'][-1]} runs merged; rewards in "
                 f"{self.grid['unit']}; ± is the standard error over prompts, {self.grid['samples']} completions",
                 "   η    KL (nats)   " + "".join(f"{name:>14}" for name in names)]
        for p in points:
            numbers = "".join(f"{p[name]:8.2f} ± {p[name + '_se']:.2f}" for name in names)
            lines.append(f"{p['eta']:5.2f}  {p['kl']:6.2f} ± {p['kl_se']:.2f} {numbers}")
        for n, prompt in enumerate(self.grid["prompts"][:2]):
            lines.append(f"\n{prompt} …")
            for p in (points[0], points[len(points) // 2], points[-1]):
                words = changed_words(points[0]["completions"][n], p["completions"][n])
                lines.append(f"  η={p['eta']:<4g} " + " ".join(f"[{word}]" if new else word for word, new in words))
        return "\n".join(lines)

    def numbers_html(self) -> str:
        """The point's KL, rewards and length with their errors."""
        point = self.point()
        rewards = [(reward_label(self.grid, name), name, "") for name in self.rewards]
        cells = "".join(
            f"<tr><td>{name}</td><td style='text-align:right;padding:0 .6em;white-space:nowrap'><b>{point[key]:.2f}</b>"
            f" ± {point[key + '_se']:.2f}</td><td>{unit}</td></tr>" for name, key, unit in
            [("KL to the SFT policy", "kl", "nats"), *rewards, ("length", "length", "tokens")])
        note = (f"{self.origin()}; rewards in {html.escape(self.grid['unit'])}; ± is the standard error over prompts, "
                f"{self.grid['samples']} completions")
        return f"<div class='explorer-numbers' style='{CLOSE}'><table>{cells}</table><small>{note}</small></div>"

    def origin(self) -> str:
        """Where the numbers come from: measured live, measured for the grid, or between points of it."""
        if "live" in self.point():
            return "measured live at exactly this point"
        return "between measured points of the grid" if self.point()["between"] else "a measured point of the grid"

    def completions_html(self) -> str:
        """The completions at the point, words that changed against η = 0 marked."""
        point, start = self.point(), line_at(self.grid, self.view)[0]
        lines = []
        for prompt, before, after in zip(self.grid["prompts"], start["completions"], point["completions"]):
            words = [f"<mark style='{NEW_WORD}'>{html.escape(word)}</mark>" if new else html.escape(word)
                     for word, new in changed_words(before, after)]
            lines.append(f"<p style='margin:.3em 0'><span style='color:#666'>{html.escape(prompt)}</span> "
                         f"{' '.join(words)}</p>")
        note = "the same random numbers at every η; marked: changed against η = 0"
        return (f"<div class='explorer-completions' style='{CLOSE}'><b>Completions at η = {point['completions_eta']:g}"
                f"</b> <small>({note})</small>{''.join(lines)}</div>")

    def to_html(self, path: str | Path) -> None:
        """A page of its own whose sliders need no kernel and no network.

        Raises ModuleNotFoundError without the extra `html`, CannotWrite where the file cannot be written.
        """
        from .page import write_page

        write_page(self.grid, self.view, path)

    # --- the widgets -----------------------------------------------------------------------------

    @cached_property
    def controls(self) -> dict:
        """The widgets by name; `reward` only where there is a gold reward, `limit` only where there is a limit."""
        import ipywidgets as w

        view, grid = self.view, self.grid
        wide = {"style": {"description_width": "9em"}, "layout": w.Layout(width="98%")}
        plain = {"style": {"button_width": "auto"}}
        etas, iterations = grid["etas"], grid["iterations"]
        controls = {
            "eta": w.FloatSlider(view.eta, min=etas[0], max=etas[-1], step=0.01, description="η", **wide),
            "iteration": w.SelectionSlider(options=iterations, value=view.iteration, description="iteration", **wide),
            "runs": w.SelectionSlider(options=grid["runs"], value=view.runs, description="M, runs merged", **wide),
            "lam": w.FloatSlider(view.lam, min=0, max=1, step=0.05, description="λ (if M = 2)", **wide),
            "root": w.ToggleButtons(options=[("KL axis", False), ("√KL axis", True)], value=view.root, **plain),
            "trajectories": w.Checkbox(view.trajectories, description="single runs while they train", indent=False),
        }
        if grid["limit"]:
            controls["limit"] = w.Checkbox(view.limit, description="the limit", indent=False)
        if grid["gold"]:
            controls["reward"] = w.ToggleButtons(
                options=[("proxy reward", "reward"), ("gold reward", "gold")], value=view.reward, **plain)
        for name, control in controls.items():
            control.observe(lambda change, name=name: self._shown(self._moved, name, change["new"]), names="value")
        return controls

    @cached_property
    def outputs(self) -> dict:
        """What is shown: `picture`, `numbers`, `completions`, `message`; and the button `measure`."""
        import ipywidgets as w

        size = w.Layout(width="100%", max_width="720px", height="auto", object_fit="contain")
        outputs = {"picture": w.Image(format="png", layout=size),
                   "numbers": w.HTML(), "completions": w.HTML(), "message": w.HTML(),
                   "measure": w.Button(description=MEASURE, icon="crosshairs", layout=w.Layout(width="98%"))}
        outputs["measure"].on_click(lambda button: self._shown(self._measured))
        return outputs

    @cached_property
    def widget(self) -> VBox:
        """Sliders, picture, numbers and completions as one widget."""
        import ipywidgets as w

        controls, out = self.controls, self.outputs
        sliders = [controls[name] for name in ("eta", "iteration", "runs", "lam")]
        toggles = [controls[name] for name in ("reward", "root", "trajectories", "limit") if name in controls]
        self.picture.prepare(self.view)
        self._shown(self._update)
        left = w.VBox([*sliders, out["measure"], *toggles], layout=w.Layout(flex="0 0 320px"))
        right = w.VBox([out["picture"], out["numbers"]], layout=w.Layout(flex="1 1 420px", min_width="0"))
        row = w.Layout(display="flex", flex_flow="row wrap", align_items="flex-start")
        return w.VBox([w.Box([left, right], layout=row), out["message"], out["completions"]])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _moved(self, name: str, value) -> None:
        self.move(**{name: value})
        self._update()

    def _measured(self) -> None:
        button = self.outputs["measure"]
        button.disabled, button.description = True, "measuring …"
        try:
            self.measure()
        finally:
            button.disabled, button.description = False, MEASURE
        self._update()

    def _update(self) -> None:
        out = self.outputs
        self.controls["lam"].disabled = self.view.runs != 2
        out["picture"].value = self.png()
        out["numbers"].value, out["completions"].value = self.numbers_html(), self.completions_html()

    def _shown(self, action, *arguments) -> None:
        """Run a callback; what it raises, which a front end would swallow, is shown below the picture."""
        message = self.outputs["message"]
        try:
            action(*arguments)
        except Exception:
            message.value = f"<pre style='color:#b00020'>{html.escape(traceback.format_exc())}</pre>"
            raise
        message.value = ""
