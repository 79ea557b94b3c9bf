"""The configuration of the documentation, which `make docs` builds into `site/`."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from docs import tables  # noqa: E402  # the path is set first

project = "latentrt"
author = "the latentrt authors"
copyright = author  # noqa: A001  # Sphinx's name
release = version = installed_version("latentrt")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docs.click_pages",
]
exclude_patterns = ["generated/*", "notebooks/exported-sample", "README.md"]
html_theme = "furo"
html_title = f"latentrt {release}"
html_copy_source = False
smartquotes = False  # which would make one dash of two, as in `--steps`
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# Links out of `docs/`, which pages that are included from the repository's root have.
myst_url_schemes = ["http", "https", "mailto"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

# `LATENTRT_DOCS_NOTEBOOKS=off` builds the pages alone; the tests run the notebooks by themselves.
nb_execution_mode = "off" if os.environ.get("LATENTRT_DOCS_NOTEBOOKS") == "off" else "cache"
nb_execution_cache_path = str(FOLDER / "generated" / "executed")
nb_execution_timeout = 1200  # for an export on a busy machine
nb_execution_raise_on_error = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Options", "params_style")]  # of `Pipeline.__call__`
nitpicky = True
# Names of other packages, whose documentation is not linked as a build uses no network, and names that are not public.
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|np|PIL|collections|pathlib|os|typing|datetime|abc|types|inspect|io)\..*"),
    ("py:.*", r"latentrt\.(?!Pipeline$|Request$|Result$).*"),
    ("py:.*", r"[a-z_]+|([A-Z][A-Za-z]+\.?)+"),
]
suppress_warnings = ["myst.xref_missing_external"]

tables.write(FOLDER / "generated")

# Notebooks run without progress bars, of which a page would show every step, and without reports of their kernels,
# such as that they listen on TCP.
os.environ["TQDM_DISABLE"] = "1"
os.environ["IPYTHONDIR"] = str(FOLDER / "generated" / "ipython")
profile = FOLDER / "generated" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.json").write_text('{"IPKernelApp": {"log_level": "ERROR"}}\n')
logging.getLogger("traitlets").setLevel(logging.WARNING)
