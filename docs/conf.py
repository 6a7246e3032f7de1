"""How Sphinx builds this site: without a network, and with the tutorials executed."""

import os

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import sparseffn_jax

_logger = logging.getLogger(__name__)

project = "sparseffn_jax"
author = "The authors of sparseffn_jax"
version = release = sparseffn_jax.__version__
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = f"sparseffn_jax {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Tutorials run in full at every build, in a folder of their own, and one that raises fails it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
# Progress bars and the logs of other libraries go there; what a tutorial shows it prints.
nb_output_stderr = "remove"
nb_merge_streams = True

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# One list of a class's fields instead of an entry for each.
napoleon_custom_sections = [("Attributes", "params_style")]
maximum_signature_line_length = 88


def _inline_math(self, node):
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(self, node):
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _check_reference(app, env):
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for name in sparseffn_jax.__all__:
        if name != "__version__" and f"sparseffn_jax.{name}" not in documented:
            _logger.warning("sparseffn_jax.%s is public, but the reference lacks it", name)


def setup(app):
    """Adds what Sphinx lacks: formulas without a script from the network, and a check."""
    # Browsers show MathML by themselves.
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("env-check-consistency", _check_reference)


html_math_renderer = "mathml"
