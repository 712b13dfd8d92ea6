"""Reading of one text through a lens: at every site and token what the model would say, and how far that is from what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.checks import of_type, whole_number
from steer.errors import ConfigError
from steer.lens.fitting import divergence
from steer.lens.lens import Lens
from steer.lens.plot import draw
from steer.model.capture import evaluating
from steer.model.site import Site
from steer.model.tokens import Row, check_rows


@dataclass(frozen=True, eq=False)
class Reading:
    """What a lens says of one text; every tensor is on the CPU.

    Attributes:
        lens: its registered name. sites: where it read, in the order of the model.
        ids: [tokens] of the text.
        top: [sites, tokens, k] token ids, the likeliest first. probabilities: [sites, tokens, k].
        entropy: [sites, tokens] of the next token, in nat. kl: [sites, tokens], KL(model || lens) in nat.

    Example:
        >>> reading = steer.lens_reading(steer.LogitLens.of(model), rows[0], sites=["layers.12.output"])
        >>> reading.words(tokenizer)[0][-1]  # the likeliest next tokens behind block 12, at the last token
    """

    lens: str
    sites: tuple[Site, ...]
    ids: Tensor
    top: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor

    def __repr__(self) -> str:
        return f"Reading({self.lens} lens, {len(self.sites)} sites, {len(self.ids)} tokens, top {self.top.shape[-1]})"

    def words(self, tokenizer: Any) -> list[list[list[str]]]:
        """The likeliest tokens as text, by site and token."""
        return [[[tokenizer.decode([int(token)]) for token in of_token] for of_token in of_site] for of_site in self.top]

    def plot(self, tokenizer: Any, path: str | Path | None = None, *, colour: str = "probability", width: float = 9.8) -> Any:
        """A figure of sites by tokens: each cell says the likeliest token. The extra `report` draws it.

        Args:
            path: where it is written, the ending being the format (`.svg`, `.png`, `.pdf`); None to only return it.
            colour: what a cell is shaded by, `probability`, `entropy` or `kl`.
            width: of the figure, in inches; more where the tokens need it.

        Raises:
            ConfigError: matplotlib is missing; another colour.
        """
        shades = {"probability": self.probabilities[..., 0], "entropy": self.entropy, "kl": self.kl}
        if colour not in shades:
            raise _no_such_colour(colour, list(shades))
        tokens = [tokenizer.decode([int(token)]) for token in self.ids]
        words = [[of_token[0] for of_token in of_site] for of_site in self.words(tokenizer)]
        title = f"{self.lens} lens: likeliest next token, shaded by {colour}{'' if colour == 'probability' else ', in nat'}"
        return draw(
            list(map(str, self.sites)), tokens, words, shades[colour].numpy(), title, path, width, dark_is_high=colour == "probability"
        )


def lens_reading(lens: Lens, row: Row, *, sites: Sequence[str | Site] | None = None, top: int = 5) -> Reading:
    """Reads one text through a lens in one pass; plans that are attached stay in force.

    Args:
        row: the text, see `steer.model.tokens.encode` and `plain`.
        sites: some that the lens reads, or patterns; all of them when not given.
        top: how many of the likeliest tokens are kept.

    Raises:
        SiteError: a site that the lens does not read. ConfigError.

    Example:
        >>> reading = steer.lens_reading(steer.LogitLens.of(model), rows[0])
        >>> reading.top.shape, reading.kl.shape  # [sites, tokens, k], [sites, tokens]
    """
    of_type(lens, Lens, "the lens of a reading", "make one with LogitLens.of(model), or load it with load_lens")
    check_rows([row], "the text of a reading")
    readout = lens.readout
    whole_number(top, "the number of tokens that are kept", least=1)
    chosen = lens.sites if sites is None else readout.anatomy.sites(*map(str, sites))
    depths = [readout.depth_of(site) for site in chosen]
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with evaluating(readout.anatomy.model):
        streams, logits = readout.run([row], depths)
        if top > logits.shape[-1]:
            raise _too_many(top, logits.shape[-1])
        for depth, site in zip(depths, chosen, strict=True):
            said = lens.logits(streams[depth][0], site).float()  # [tokens, vocabulary]
            logprobs = said.log_softmax(-1)
            best = logprobs.topk(top, -1)
            entropy = -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(-1)
            rows.append(tuple(tensor.cpu() for tensor in (best.indices, best.values.exp(), entropy, divergence(logits[0], said))))  # type: ignore[arg-type]
    top_ids, probabilities, entropy, kl = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return Reading(lens.name, tuple(chosen), torch.tensor(row.ids), top_ids, probabilities, entropy, kl)


# ---- errors


def _no_such_colour(colour: str, known: list[str]) -> ConfigError:
    return ConfigError(
        "unknown colour of a reading's cells", expected=f"one of {', '.join(known)}", found=repr(colour), remedy="use one of these"
    )


def _too_many(top: int, vocabulary: int) -> ConfigError:
    return ConfigError("more tokens than there are", expected=f"top of 1 to {vocabulary}", found=top, remedy="lower top=")
