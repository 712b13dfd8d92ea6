"""What the examples of the documentation take for granted: `model`, `tokenizer`, `direction`, `plan`, ..., tiny and made on first use.

One namespace for the examples of docstrings and, with stand-ins of their own, for the pages of docs/. The model has as many blocks and, in
docstrings, heads as the embedded one, so that its sites and heads can be named, and common words are one token.
"""

import stand_ins.methods
import stand_ins.models
import stand_ins.pages  # noqa: F401  (fills the namespace)
from stand_ins.files import FILES
from stand_ins.namespace import PAGE_MAKERS, StandIns, keep_registries

__all__ = ["FILES", "PAGE_MAKERS", "StandIns", "keep_registries"]
