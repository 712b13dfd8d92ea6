"""Learned gates of components: how much of each head, MLP or neuron is ablated is a parameter.

Hard-concrete gates are those of Louizos, Welling & Kingma 2018 (arXiv 1712.01312), as subnetwork probing uses them (Cao, Sanh & Rush 2021,
arXiv 2104.03514).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steer.checks import one_of
from steer.circuits.operators.ablate_components import AblateComponents
from steer.errors import ConfigError
from steer.intervene.low_rank import same_width
from steer.intervene.operator import OPERATORS, Operator, RowTensors, same_slots, slotted

SIGMOID, HARD_CONCRETE, LINEAR = FORMS = ("sigmoid", "hard_concrete", "linear")
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # of the hard-concrete distribution, before it is cut off at 0 and 1


@OPERATORS.register("gate_components")
class GateComponents(Operator):
    """h + strength * amount(g) * (constant - h): learns how much of each component to ablate (subnetwork probing).

    Gates g give amounts: `sigmoid`, sigmoid(g); `hard_concrete`, sigmoid(g) stretched to [-.1, 1.1] and cut off at 0 and 1, with noise on g
    in passes that record gradients while the gates learn; `linear`, g itself cut off, whose gradient goes on where it is cut off.

    Args:
        gates: [components] or [slots, components].
        component: [width] or [slots, width] which gate a channel has, counted from 1; 0 for none, which leaves it alone.
        constant: the same shape, what takes the place of an activation.
        form: how gates give amounts.
        alone: the amounts say what stays: 1 - amount is ablated.

    Raises:
        ConfigError: no component, one without a gate, or another form. WidthError.

    Example:
        >>> heads, channels = 9, 36
        >>> component = 1 + torch.arange(channels) // (channels // heads)  # which head each channel of z belongs to, from 1
        >>> gates = steer.GateComponents(torch.full((heads,), -2.0), component, torch.zeros(channels)).train()
        >>> plan = steer.Plan(steer.Intervention(gates, "layers.12.attn.z"))
    """

    parts = ("constant", "component", "gates")
    learnable = ("gates",)
    settings = ("form", "alone")
    linear_in_strength = True

    def __init__(self, gates: Tensor, component: Tensor, constant: Tensor, form: str = SIGMOID, alone: bool = False) -> None:
        gates, component, constant = slotted(gates, 2, "gates"), slotted(component, 2, "component"), slotted(constant, 2, "constant")
        same_width(self.name, component=component, constant=constant)
        same_slots(self.name, gates=gates, component=component, constant=constant)
        if not bool(component.any()) or int(component.max()) > gates.shape[-1] or bool((component < 0).any()):
            raise _unfit_components(gates, component)
        self.form, self.alone = one_of(form, FORMS, "the form of gates"), bool(alone)
        super().__init__({"constant": constant, "component": component.long(), "gates": gates}, constant.shape[-1])

    def amounts(self, gates: Tensor | None = None) -> Tensor:
        """[slots, components] from 0 to 1: how much of each is in the circuit; without noise unless gradients are recorded.

        Args:
            gates: those of the rows of a batch; its own for None.
        """
        own = self.tensors["gates"]
        gates = own if gates is None else gates
        if self.form == SIGMOID:
            return gates.sigmoid()
        if self.form == LINEAR:
            return gates + (gates.detach().clamp(0, 1) - gates.detach())
        if torch.is_grad_enabled() and isinstance(own, nn.Parameter) and own.requires_grad:
            noise = torch.rand_like(gates).clamp(1e-6, 1 - 1e-6)
            gates = (gates + noise.logit()) / TEMPERATURE
        return (gates.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def sizes(self) -> Tensor:
        """[slots, components] for a penalty: amounts; of hard-concrete gates the probability that an amount is not 0 (expected L0)."""
        gates = self.tensors["gates"]
        return (gates - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid() if self.form == HARD_CONCRETE else self.amounts()

    @torch.no_grad()
    def cut_off(self) -> None:
        """Brings linear gates back to between 0 and 1, after an optimiser step."""
        if self.form == LINEAR:
            self.tensors["gates"].clamp_(0, 1)

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        amounts = self.amounts(per_row["gates"])  # [batch or 1, components]
        ablated = nn.functional.pad(1 - amounts if self.alone else amounts, (1, 0))  # 0 for the channels without a gate
        component = per_row["component"].expand(len(ablated), -1)
        amount = ablated.expand(len(component), -1).gather(1, component).unsqueeze(1)  # [batch or 1, 1, width]
        return (strength * amount * (per_row["constant"].unsqueeze(1) - h)).to(h.dtype)

    def settled(self) -> AblateComponents:
        """The same edit as numbers that are no longer learned. Raises ConfigError where all of them are 0."""
        with torch.no_grad():
            strength = torch.ones(1, 1, 1)
            zeros = torch.zeros(self.slots, 1, self.width)
            tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
            # the change of 0 towards a constant of 1 is the amount
            amount = self.delta(zeros, strength, {**tensors, "constant": torch.ones_like(tensors["constant"])})
        return AblateComponents(amount.squeeze(1), tensors["constant"])

    def is_affine(self) -> bool:
        return True

    def describe(self) -> str:
        what = "all but the learned share of" if self.alone else "the learned share of"
        return f"ablate {what} {self.tensors['gates'].shape[-1]} components to constants ({self.form} gates)"


def gates_of(amounts: Tensor, form: str) -> Tensor:
    """Gates that give amounts between 0 and 1."""
    if form == LINEAR:
        return amounts.clone()
    return ((amounts - LOW) / (HIGH - LOW) if form == HARD_CONCRETE else amounts).logit()


def _unfit_components(gates: Tensor, component: Tensor) -> ConfigError:
    return ConfigError(
        "the channels of 'gate_components' and its gates do not fit together",
        expected=f"for each channel the number of one of {gates.shape[-1]} gates, from 1, or 0 for none, and a channel with one",
        found=f"{int(component.min())} to {int(component.max())}",
        remedy="number the components of a site from 1",
    )
