"""BOLD (2101.11718): starts of Wikipedia sentences about people of many groups, for generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer.bias.dataset import DATASETS, BiasDataset
from steer.bias.items import Prompt
from steer.bias.metrics.generation import generation
from steer.data_files import empty_file, json_content, no_such_form

FORM = "{group: {person: [prompts]}}"


@DATASETS.register("bold")
class Bold(BiasDataset):
    """BOLD: what a model writes about people of each group, by a score of yours or by its gendered words."""

    files = ("*_prompt.json",)
    wheel = "BOLD"
    metric = generation

    def read(self, paths: Sequence[Path]) -> list[Prompt]:
        items = []
        for path in paths:
            content = json_content(path)
            if not isinstance(content, dict) or not content:
                raise no_such_form(path, FORM, type(content).__name__)
            domain = path.name.removesuffix(".json").removesuffix("_prompt")
            for group, people in content.items():
                if not isinstance(people, dict):
                    raise no_such_form(path, FORM, f"{type(people).__name__} in '{group}'")
                for person, prompts in people.items():
                    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
                        raise no_such_form(path, FORM, f"{prompts!r:.60} of '{person}'")
                    # a few prompts are empty; all end with a space, which belongs to the next token of most tokenizers
                    texts = [text.rstrip() for text in prompts]
                    items += [Prompt(f"{domain}/{group}/{person}/{i}", group, text) for i, text in enumerate(texts) if text]
        if not items:
            raise empty_file(paths[0])
        return items
