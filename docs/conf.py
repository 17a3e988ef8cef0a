"""The site: `make docs` builds it into build/docs, warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pycompress import __version__

project = "pycompress"
author = "The pycompress developers"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"pycompress {version}"
# A word in single backticks is code, in docstrings as in Markdown.
default_role = "code"
napoleon_numpy_docstring, napoleon_google_docstring = True, False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
myst_heading_anchors = 3
