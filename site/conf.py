"""Sphinx's settings: MyST-NB, which executes nothing, a book theme, and what extension.py adds."""

import importlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # extension.py

from warp_lite.notebooks.__main__ import address
from warp_lite.storage.provenance import PACKAGE

project = "warp_lite"
author = "the authors of warp_lite"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "extension"]
exclude_patterns = [".doctrees"]
html_theme = "sphinx_book_theme"
html_title = "WARP, averaged and drawn"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css", "colours.css"]
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_sourcelink = False
html_context = {"default_mode": "light"}
html_theme_options = {
    "article_header_end": [], "article_header_start": ["toggle-primary-sidebar.html"],
    "secondary_sidebar_items": ["page-toc"], "pygments_light_style": "default",
    "use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2,
    "footer_content_items": [], "navbar_persistent": [],
    "extra_footer": "Apache-2.0. The paper is by Ramé et al. (2024); this is not theirs.",
}
html_math_renderer = "mathml"

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no kernel, no widgets, nothing from another host
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where the repository has what is described; None for what is not of a line of its own, such as a field."""
    described = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        described = getattr(described, part, None)
    described = inspect.unwrap(getattr(described, "fget", None) or described) if described is not None else None
    if not (inspect.isclass(described) or inspect.isroutine(described)):
        return None
    try:
        path, line = inspect.getsourcefile(described), inspect.getsourcelines(described)[1]
    except (OSError, TypeError):
        return None
    if not path.startswith(str(PACKAGE)):
        return None
    return f"{address()}/blob/main/{Path(path).relative_to(PACKAGE.parent).as_posix()}#L{line}"
