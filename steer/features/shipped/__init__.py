"""The dictionaries that come with the library: of the embedded model's block 12, an autoencoder and a transcoder.

Their folders have a model card each; `benchmarks/make_dictionaries.py` is what made them.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = ("smollm2-135m-sae-12", "smollm2-135m-transcoder-12")


def shipped_folder(name: str | Path) -> Path | None:
    """Where the dictionary of this name is; None when none has it."""
    return Path(__file__).parent / name if str(name) in SHIPPED else None
