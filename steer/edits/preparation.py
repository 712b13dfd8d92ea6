"""What editors need before the first fact: layers, and the covariance of the keys there, found for a caller who names none."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steer.edits.covariance import Covariance
from steer.edits.default_layers import candidate_layers, choose_layers, default_layers, is_known
from steer.edits.edited_map import edited_maps
from steer.edits.editor import Editor
from steer.edits.running_text import shipped_texts
from steer.errors import TokenizerError, WrongModelError
from steer.model.anatomy import Anatomy
from steer.model.watcher import watchers_of

GIVEN, PUBLISHED, COVARIANCE, SWEEP = "given", "published", "covariance", "sweep"
SHIPPED_TEXT = "text that ships with the library"
LAYERS_FROM = {
    GIVEN: "as they were asked for",
    PUBLISHED: "published or measured for this model",
    COVARIANCE: "the only one of the covariance",
    SWEEP: "the best of a sweep",
}


@dataclass(frozen=True, eq=False)
class Preparation:
    """Layers and covariance for some editors.

    Attributes:
        layers: of each editor, in their order.
        covariance: of all these layers, None where no editor needs one.
        layers_from: one of `LAYERS_FROM`.

    Example:
        >>> editors = [EDITORS.get("rome")(), EDITORS.get("memit")()]
        >>> prepared = steer.edits.prepare(model, tokenizer, editors, layers=[8], covariance=covariance)
        >>> prepared.layers, prepared.layers_from
    """

    layers: tuple[list[int], ...]
    covariance: Covariance | None
    layers_from: str


def prepare(
    model: nn.Module,
    tokenizer: Any,
    editors: Sequence[Editor],
    layers: Sequence[int] | None = None,
    covariance: Covariance | None = None,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
) -> Preparation:
    """Layers and covariance for editors: those that are given, else the published ones of a known model, else the best ones of a sweep.

    A covariance is fitted once for a model, with a progress bar, and read from the cache folder from then on; in one process it also serves
    edits on top of edits, which its files are not kept for. A sweep edits a few
    well-known facts at each of five depths, see `steer.edits.layer_sweep`.

    Args:
        layers: for all editors alike.
        covariance: None fits one of the layers that are needed.
        texts, max_tokens: that it is fitted on, see `Covariance.fit`; None for text that ships with the library.

    Raises:
        EditError: layers that cannot be edited; too little text for a model of so many neurons; a model that says too little of what a
            sweep edits. Otherwise as `Covariance.fit` and `choose_layers`.

    Example:
        >>> editors = [EDITORS.get("memit")()]
        >>> prepared = prepare(model, tokenizer, editors, layers=[7, 8], covariance=covariance)
        >>> edit = steer.edit_facts(model, tokenizer, fact, layers=prepared.layers[0], covariance=prepared.covariance, contexts=contexts)
    """

    def fit(wanted: Sequence[int]) -> Covariance:
        key = tuple(wanted), None if texts is None else tuple(texts), max_tokens
        fitted = _FITTED.setdefault(model, {})
        if key not in fitted or not _holds(fitted[key], model, tokenizer):
            fitted[key] = Covariance.fit(model, tokenizer, shipped_texts() if texts is None else texts, wanted, max_tokens=max_tokens)
        return fitted[key]

    anatomy = Anatomy.find(model)
    if layers is not None:
        chosen, layers_from = [[edited.layer for edited in edited_maps(anatomy, layers)] for _ in editors], GIVEN
    elif is_known(anatomy):
        chosen, layers_from = [default_layers(anatomy, several=editor.several_layers) for editor in editors], PUBLISHED
    else:
        covariance = fit(candidate_layers(anatomy)) if covariance is None else covariance
        layers_from = SWEEP if len(covariance.layers) > 1 else COVARIANCE
        chosen = [choose_layers(model, tokenizer, covariance, several=editor.several_layers) for editor in editors]
    needed = sorted({layer for editor, of in zip(editors, chosen, strict=True) if editor.needs_covariance for layer in of})
    if covariance is None and needed:
        covariance = fit(needed)
    return Preparation(tuple(chosen), covariance, layers_from)


_FITTED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Covariance]] = weakref.WeakKeyDictionary()  # by layers and texts


def _holds(covariance: Covariance, model: nn.Module, tokenizer: Any) -> bool:
    """It is that of the model as it is now, edits aside; what is attached to a model changes its keys."""
    if watchers_of(model):
        return False
    try:
        covariance.check(model, None, tokenizer)
    except (WrongModelError, TokenizerError):
        return False
    return True
