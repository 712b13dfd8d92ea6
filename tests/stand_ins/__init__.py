"""What the examples of the documentation take for granted: `model`, `tokenizer`, `direction`, `plan`, ..., tiny and made on first use.

One namespace for the pages of docs/ and for the examples of docstrings. The model has as many blocks and heads as the embedded one, so that
its sites and heads can be named, and common words are one token.
"""

import stand_ins.methods
import stand_ins.models  # noqa: F401  (fills the namespace)
from stand_ins.files import FILES
from stand_ins.namespace import StandIns, keep_registries

__all__ = ["FILES", "StandIns", "keep_registries"]
