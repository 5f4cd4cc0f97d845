"""Sphinx settings. The pages under mechanisms/ are written from the registry at every build."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mechanism_pages

import attnkit

project = "attnkit"
author = "The attnkit developers"
copyright = "2026, The attnkit developers"
version = release = attnkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
