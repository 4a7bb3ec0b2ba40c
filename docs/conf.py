"""How Sphinx builds the documentation; run by ``./run-tests --docs``."""

project = "qubes_itests"
copyright = "the authors of qubes_itests"  # noqa: A001 - the name that Sphinx wants

extensions = ["myst_parser", "sphinx.ext.autodoc"]
# The source is the whole repository, so that links between all pages are checked.
include_patterns = ["*.md", "docs/**", "storage/*.md", "tests/benchmarks/*.md"]
root_doc = "docs/index"
myst_heading_anchors = 3
suppress_warnings = [
    "ref.python",  # two modules have a class of that name, and either is linked to
    "misc.highlighting_failure",  # `policy` is a language of ours
]
# What a package re-exports is documented where it is defined.
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,
}
# What docstrings have between single backquotes is a name of Python, where it is one.
default_role = "py:obj"
