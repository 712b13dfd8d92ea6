"""What libraries say about one another, kept out of the output of commands."""

from __future__ import annotations

import logging
import warnings

# Said by libraries about one another; a reader of our output can do nothing about them.
NOISE = (
    "`isinstance\\(treespec",
    "`is_gradient_checkpointing` is deprecated",
    "The 'train_dataloader' does not have many workers",
    "Checkpoint directory .* exists and is not empty",
)


def quieten_libraries() -> None:
    """Keeps from the output what libraries say about one another."""
    for package in ("pytorch_lightning", "lightning.pytorch"):  # where both are installed, one speaks by the logger of the other
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
