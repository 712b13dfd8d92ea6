"""Cells of causal tracing: what is set back to its clean value, in which layers and at which token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.checks import integer, of_type, one_of, whole_number
from steer.errors import ConfigError
from steer.model.anatomy import Anatomy
from steer.model.site import Site

KINDS = ("hidden", "mlp", "attn")
HIDDEN, MLP, ATTENTION = KINDS
SEVERABLE = (MLP, ATTENTION)
_PARTS = {HIDDEN: "output", MLP: "mlp.output", ATTENTION: "attn.output"}


@dataclass(frozen=True)
class Cell:
    """One thing that is restored.

    Attributes:
        kind: `hidden` for the output of one block, `mlp` or `attn` for what such parts of several blocks add.
        token: at which it is restored. layer: of the block, or in the middle of the window.
        layers: in which it is restored.
    """

    kind: str
    token: int
    layer: int
    layers: range

    @property
    def joins(self) -> int:
        """The first block whose input or part the cell changes: all below it runs as in the corrupted run."""
        return self.layers.stop if self.kind == HIDDEN else self.layers.start


def site_of(kind: str, layer: int) -> Site:
    """What a kind restores in a layer."""
    return Site(_PARTS[kind], layer)


@dataclass(frozen=True)
class Restoring:
    """What a trace restores in every run, and what it severs.

    Attributes:
        kinds: of cells, in the order of their results.
        window: number of layers in which parts are restored together, [l - window / 2, l + window / 2), cut off at the ends of the model.
        severed: `mlp` or `attn`, whose outputs at the restored token are set back to their corrupted values in all layers; None for none.

    Raises:
        ConfigError: no kinds, unknown ones, one that is severed; a window below 1.
    """

    kinds: tuple[str, ...]
    window: int
    severed: str | None

    def __post_init__(self) -> None:
        if not self.kinds:
            raise _no_kinds()
        for kind in self.kinds:
            one_of(kind, KINDS, "a kind of causal tracing")
        whole_number(self.window, "the window of causal tracing", least=1)
        if self.severed is not None:
            one_of(self.severed, SEVERABLE, "what causal tracing severs")
            if self.severed in self.kinds:
                raise _severed_kind(self.severed)

    @classmethod
    def of(cls, kinds: str | Sequence[str], window: int, severed: str | None) -> Restoring:
        """From the arguments of `causal_trace`. Raises ConfigError."""
        of_type(kinds, (str, list, tuple), "the kinds of causal tracing", f"pass some of {', '.join(KINDS)}")
        return cls(tuple(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds)), integer(window), severed)

    def cells(self, token: int, n_layers: int) -> list[Cell]:
        """All cells at a token, kind by kind and layer by layer."""
        return [Cell(kind, token, layer, self._layers(kind, layer, n_layers)) for kind in self.kinds for layer in range(n_layers)]

    def _layers(self, kind: str, layer: int, n_layers: int) -> range:
        if kind == HIDDEN:
            return range(layer, layer + 1)
        start = layer - self.window // 2
        return range(max(0, start), min(n_layers, start + self.window))

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Sites of the parts that are restored or severed, in all layers. Raises SiteError for what a block does not have."""
        named = [*self.kinds, *([] if self.severed is None else [self.severed])]
        sites = [site_of(kind, layer) for layer in range(anatomy.n_layers) for kind in named]
        for site in sites:
            anatomy.point(site)
        return [site for site in sites if site.part != _PARTS[HIDDEN]]


# ---- errors


def _no_kinds() -> ConfigError:
    return ConfigError("causal tracing restores nothing", expected=f"some of {', '.join(KINDS)}", found="no kinds", remedy="name some")


def _severed_kind(kind: str) -> ConfigError:
    return ConfigError(
        f"'{kind}' is severed and restored at the same time",
        expected="other kinds than the one that is severed",
        found=f"kinds with '{kind}', severed='{kind}'",
        remedy="trace kinds='hidden' where a part is severed",
    )
