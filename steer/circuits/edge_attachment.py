"""Ablated edges of a circuit on a model, for generation and training."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from steer.checks import finite_number
from steer.circuits.edge_ablation import EdgeAblation
from steer.circuits.stream_readers import stream_readers
from steer.errors import AttachError, ConfigError
from steer.model.anatomy import Anatomy
from steer.model.hooks import Installation
from steer.model.restoring import restoring
from steer.model.site import Site

if TYPE_CHECKING:
    from steer.circuits.circuit import Circuit

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, EdgesAblated] = weakref.WeakKeyDictionary()  # by the first block of its model


class EdgesAblated:
    """The edges of a circuit, cut in every pass of a model while it is attached; `Circuit.edges_ablated` makes it.

    What a token's readers lose depends on what is written at that token alone, so that a cache, beams and padding change nothing.
    Gradients flow through what is cut as through the rest.

    Args:
        strength: 1 cuts, 0 leaves, above 1 goes past the constants.

    Attributes:
        readers: names of the readers that lost an edge, all that is touched.

    Raises:
        ConfigError: no edges, no ablation, or one towards another prompt, which no text that is being written has.
        WrongModelError: the circuit of another model.

    Example:
        >>> edges = scores.top_edges(20).with_ablation(mean_ablation(model, texts))
        >>> with edges.edges_ablated(model):
        ...     model.generate(**prompt, max_new_tokens=2)
        >>> handle = edges.edges_ablated(model, strength=0.5).attach()
        >>> handle.detach()
    """

    @torch.inference_mode(False)  # of the caller: training may follow
    def __init__(self, circuit: Circuit, model: nn.Module, strength: float = 1.0) -> None:
        anatomy = circuit.check_model(model)
        if circuit.edges is None:
            raise _no_edges(circuit)
        if circuit.ablation is None:
            raise _no_ablation()
        constants = circuit.ablation.constants()
        on_device: dict[tuple[Site, torch.device, torch.dtype], Tensor] = {}

        def replacement(site: Site, h: Tensor) -> Tensor:
            key = (site, h.device, h.dtype)
            if key not in on_device:
                with torch.inference_mode(False):
                    on_device[key] = constants(site, h.shape[-1]).to(h.device, h.dtype)
            return on_device[key]

        finite_number(strength, "the strength of an ablation")
        self.strength = float(strength)
        blocks = stream_readers(model, anatomy)
        self._anatomy = anatomy
        self._edges = EdgeAblation(anatomy, circuit.graph, blocks, circuit.edges, replacement, self.strength)
        self.readers = [circuit.graph.readers[place].name for place in circuit.edges.any(0).nonzero().flatten().tolist()]
        points = [(anatomy.point(site), function) for site, function in self._edges.functions().items()]
        self._installation = Installation(model, anatomy, points)
        self.is_attached = False

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "not attached"
        return f"EdgesAblated({state}, {len(self.readers)} readers, strength {self.strength:g})"

    def attach(self) -> Self:
        """Puts the hooks on. Raises AttachError where they are on, or those of other edges."""
        if self.is_attached:
            raise _is_attached()
        check_no_edges_ablated(self._anatomy)
        try:
            self.is_attached = True
            _ATTACHED[_first_block(self._anatomy)] = self
            self._installation.install()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Takes the hooks off; done again, it does nothing."""
        with restoring(self._installation.remove):
            self._edges.forget()
        self._installation.hooks.clear()
        if self.is_attached:
            _ATTACHED.pop(_first_block(self._anatomy), None)
        self.is_attached = False

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        with restoring(self.detach):
            pass


def check_no_edges_ablated(anatomy: Anatomy) -> None:
    """Raises AttachError where edges of the model are ablated: behind a norm, two corrections of one reader do not add up."""
    if (attached := _ATTACHED.get(_first_block(anatomy))) is not None:
        raise _others_attached(attached)


def _first_block(anatomy: Anatomy) -> nn.Module:
    return anatomy.point(Site("output", 0)).module


# ---- errors


def _no_edges(circuit: Circuit) -> ConfigError:
    return ConfigError("the circuit has no edges to ablate", expected="a circuit of edges", found=repr(circuit),
                       remedy="choose one with scores.top_edges(200), or ablate its nodes: circuit.ablation_plan(model)")  # fmt: skip


def _no_ablation() -> ConfigError:
    return ConfigError("the circuit does not say what takes the place of what its edges carry", expected="an ablation", found="none",
                       remedy="circuit.with_ablation(mean_ablation(model, texts)), or zero_ablation()")  # fmt: skip


def _is_attached() -> AttachError:
    return AttachError("these edges are ablated already", expected="edges that are not attached", found="attached",
                       remedy="detach first, or use it as a context manager")  # fmt: skip


def _others_attached(attached: EdgesAblated) -> AttachError:
    return AttachError(
        "edges of this model are ablated already",
        expected="a model without ablated edges",
        found=f"ablated edges into {', '.join(attached.readers[:4])}{', ...' if len(attached.readers) > 4 else ''}",
        remedy="detach those, or ablate the edges of both as one circuit: dataclasses.replace(circuit, edges=circuit.edges | other.edges)",
    )
