"""Sphinx settings. Every build writes mechanisms/ from the registry and speed/ and needle/ from result lines."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import advise_page  # noqa: E402
import mechanism_pages  # noqa: E402
import needle_page  # noqa: E402
import speed_page  # noqa: E402

import attnkit  # noqa: E402

project = "attnkit"
author = "The attnkit developers"
project_copyright = "2026, The attnkit developers"
version = release = attnkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "mathml"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"
napoleon_use_rtype = False  # a result is named, and its description says its shape and dtype
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "advise/*.md", "needle/*.md", "speed/*.md"]
html_theme = "furo"
html_title = f"attnkit {attnkit.__version__}"

advise_page.write(HERE / "advise", HERE.parent / "benchmarks" / "results")
mechanism_pages.write(HERE / "mechanisms")
needle_page.write(HERE.parent / "benchmarks" / "results", HERE / "needle")
speed_page.write(HERE.parent / "benchmarks" / "results", HERE / "speed")
