"""Sphinx: Markdown pages, numpydoc, the pydata theme."""

import vqrs

project = "vqrs"
author = "The vqrs authors"
release = vqrs.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
numpydoc_show_class_members = False
autodoc_mock_imports = ["torch"]
autodoc_typehints = "none"
html_theme = "pydata_sphinx_theme"
html_title = "vqrs"
