"""The site: `python -m sphinx -W docs docs/_build`."""

import html
import os
import re
import textwrap
from pathlib import PurePath
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.search.en import SearchEnglish

import grokfast_jax

project = "grokfast_jax"
author = "The grokfast_jax authors"
project_copyright = author
PITCH = "Tested Grokfast for JAX, and the controls that show when it helps."
CARD = "pictures/lr_wd_map_two_rates.png"  # of links to the site
release = version = grokfast_jax.__version__

extensions = [
    "myst_nb",
    "notfound.extension",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # a name in single backquotes is code, and a link where it is documented
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "/")
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_static_path = ["static", CARD]
html_theme = "furo"
html_title = f"{project} {version}"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_typehints = "none"  # the docstrings say more
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"
notfound_urls_prefix = urlsplit(html_baseurl).path
notfound_context = {
    "title": "Page not found",
    "body": f'<h1>Page not found</h1><p>Search, or begin at the <a href="{notfound_urls_prefix}">first page</a>.</p>',
}


class Search(SearchEnglish):
    """The search for English words, which finds α and λ by their names too."""

    def split(self, text):
        """The words of a text."""
        return super().split(text.replace("α", " α alpha ").replace("λ", " λ lambda "))


def keep_numbers_on_a_line(app, doctree):
    """Mark numbers in tables, for instance "8 of 8", for the stylesheet."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) <= 18 and re.search(r"\d", cell.astext()):
            cell["classes"].append("number")


def describe(app, page, template, context, doctree):
    """Add what a search engine or a link to the page shows: its first paragraph and a picture."""
    if doctree is None:  # the search, the index, a page of source code
        return
    texts = (node.astext() for node in doctree.findall(nodes.paragraph) if isinstance(node.parent, nodes.section))
    summary = textwrap.shorten(next((text for text in texts if len(text) > 50), PITCH), 200, placeholder=" …")
    for name, content in ("description", summary), ("image", f"{html_baseurl}_static/{PurePath(CARD).name}"):
        context["metatags"] += f'<meta name="{name}" property="og:{name}" content="{html.escape(content)}">\n'


def setup(app):
    """Register these with Sphinx."""
    app.add_search_language(Search)
    app.connect("doctree-read", keep_numbers_on_a_line)
    app.connect("html-page-context", describe)
