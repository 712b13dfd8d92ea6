"""Answers beside one another, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def side_by_side(console: Console, prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> None:
    """Prints one table for each prompt, one row for each who answers."""
    for number, prompt in enumerate(prompts):
        table = Table("arm", "completion", title=Text(prompt), title_justify="left", show_lines=True)
        for name, texts in answers.items():
            table.add_row(name, Text(texts[number]))  # square brackets are no markup here
        console.print(table)
