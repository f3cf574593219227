"""The notebooks' sliders: they redraw when moved, and what goes wrong is seen."""

import json
from pathlib import Path

import ipywidgets as w
import matplotlib

matplotlib.use("Agg")

import pytest
from matplotlib import pyplot as plt

from warp_lite.notebooks.figures import sliders


def draw(height):
    print(f"<b>height {height}</b>")
    if height > 2:
        raise ValueError("too high")
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.bar([0], [height])
    axes.set_ylim(0, 3)
    return figure


def test_moving_a_slider_redraws_picture_and_text_and_leaves_no_figure_open():
    slider = w.FloatSlider(1, min=0, max=3)
    _, picture, text = sliders(draw, height=slider).children
    first = bytes(picture.value)
    assert first.startswith(b"\x89PNG") and "height 1.0" in text.value
    slider.value = 2
    assert bytes(picture.value) != first and "height 2.0" in text.value
    assert "<b>" not in text.value  # printed text is text, not markup
    assert plt.get_fignums() == []


def test_an_error_while_drawing_is_shown_and_raised():
    slider = w.FloatSlider(1, min=0, max=3)
    *_, text = sliders(draw, height=slider).children
    with pytest.raises(ValueError, match="too high"):
        slider.value = 3
    assert "ValueError: too high" in text.value


def test_no_notebook_uses_an_output_widget():
    # an executor and its kernel can wait for each other for ever over one
    for path in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            assert cell["cell_type"] != "code" or not any(
                word in source for word in ("interact(", "interactive(", "widgets.Output", "w.Output")), path.name
