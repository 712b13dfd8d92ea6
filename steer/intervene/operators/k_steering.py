"""K-steering: steps along the gradient of a multi-label probe (Oozeer et al. 2025, arXiv 2505.24535)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from steer.checks import finite_number, of_type, tensor_of, whole_number
from steer.errors import ConfigError, WidthError
from steer.intervene.low_rank import widened, without_autocast
from steer.intervene.operator import OPERATORS, Operator, RowTensors, same_slots, slotted

Labels = Sequence[int] | Sequence[Sequence[int]]


@OPERATORS.register("k_steering")
class KSteering(Operator):
    """h_(k+1) = h_k + strength * decay^k grad L(h_k): climbs a ReLU probe towards some labels and away from others (K-steering).

    L is the mean logit of the labels wanted less that of the labels to avoid. With one hidden layer, logits W2 relu(W1 h + b1) + b2, and
    c the weights of the logits in L, its gradient is (1[W1 h + b1 > 0] * (c W2)) W1; deeper probes go on likewise. It is worked out for
    each token by itself, without autograd.

    Args:
        weights: of each layer, [out, in] as in `nn.Linear`, the last of them [labels, in].
        biases: [out] of the hidden layers, one fewer; that of the logits has no gradient.
        targets: labels to move towards; a list of lists gives one per row slot.
        avoid: labels to move away from, in the same way.
        steps: number of steps K.
        decay: factor of the step size from one step to the next.

    Raises:
        ConfigError: no hidden layer, no label, a label that does not exist, no step. WidthError: layers that do not fit.

    Example:
        >>> hidden, logits = torch.nn.Linear(vector.shape[0], 16), torch.nn.Linear(16, 3)  # a probe of three labels
        >>> climb = steer.KSteering([hidden.weight, logits.weight], [hidden.bias], targets=[2], avoid=[0])
        >>> plan = steer.Plan(steer.Intervention(climb, "layers.12.output"))
    """

    parts = ("weight0", "bias0", "readout")
    settings = ("steps", "decay")

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        targets: Labels,
        avoid: Labels = (),
        steps: int = 1,
        decay: float = 1.0,
    ) -> None:
        whole_number(steps, "steps of 'k_steering'", least=1)
        finite_number(decay, "decay of 'k_steering'")
        for what, layers in (("weights", weights), ("biases", biases)):
            of_type(layers, Collection, f"the {what} of 'k_steering'", "pass a list with the tensors of each nn.Linear")
        if len(weights) < 2 or len(biases) != len(weights) - 1:
            raise ConfigError(
                "'k_steering' needs a probe with a hidden layer",
                expected="two weights or more, and one bias fewer",
                found=f"{len(weights)} weights, {len(biases)} biases",
                remedy="leave out the bias of the logits; the gradient of a linear probe is the same everywhere, so add that",
            )
        weights, biases = (
            [tensor_of(tensor, f"a {what} of the probe", "pass the tensors of nn.Linear") for tensor in layers]
            for what, layers in (("weight", weights), ("bias", biases))
        )
        sizes = [weights[0].shape[-1], *(len(bias) for bias in biases), len(weights[-1])]
        tensors: dict[str, Tensor] = {}
        for i, weight in enumerate(weights):
            if list(weight.shape) != (wanted := [sizes[i + 1], sizes[i]]):
                raise WidthError(
                    f"layer {i} of the probe does not fit the one before",
                    expected=f"a weight of shape {wanted}",
                    found=list(weight.shape),
                    remedy="give weights as nn.Linear has them, [out, in], from the activation to the logits",
                )
            tensors[f"weight{i}"] = slotted(weight, 3, "weight of the probe")
        for i, bias in enumerate(biases):
            tensors[f"bias{i}"] = slotted(bias, 2, "bias of the probe")
        towards, away = _label_weights(targets, sizes[-1]), _label_weights(avoid, sizes[-1])
        same_slots(self.name, targets=towards, avoid=away)
        if not bool((towards - away).any(-1).all()):
            raise ConfigError(
                "'k_steering' has no labels", expected="targets, or labels to avoid", found="neither", remedy="e.g. targets=[0]"
            )
        last = tensors.pop(f"weight{len(biases)}")
        tensors["readout"] = ((towards - away).unsqueeze(1).double() @ last.double()).float()
        self.steps, self.decay = steps, decay
        super().__init__(tensors, sizes[0])

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        wide = widened(h)
        layers = [(per_row[f"weight{i}"][0].to(wide.dtype), per_row[f"bias{i}"][0].to(wide.dtype)) for i in range(len(self.tensors) // 2)]
        readout = per_row["readout"].to(wide.dtype)
        with without_autocast(h):
            change = strength * _gradient(wide, layers, readout)
            for k in range(1, self.steps):
                change = change + strength * self.decay**k * _gradient(wide + change, layers, readout)
        return (wide + change if mask is None else torch.addcmul(wide, mask.to(wide.dtype), change)).to(h.dtype)

    def describe(self) -> str:
        hidden = " and ".join(str(self.tensors[f"bias{i}"].shape[-1]) for i in range(len(self.tensors) // 2))
        return f"{self.steps} step(s) along the gradient of a probe with {hidden} hidden units"


def _gradient(h: Tensor, layers: list[tuple[Tensor, Tensor]], readout: Tensor) -> Tensor:
    """d L / d h, [batch, tokens, width]."""
    active = []
    for weight, bias in layers:
        before = linear(h, weight, bias)
        active.append(before > 0)
        h = before.relu()
    slope = readout
    for (weight, _), on in zip(reversed(layers), reversed(active), strict=True):
        slope = torch.where(on, slope, 0.0) @ weight
    return slope


def _label_weights(labels: Labels, n_labels: int) -> Tensor:
    """[slots, labels]: 1 / n at the n labels of a row slot."""
    nested = [entry for entry in labels if isinstance(entry, Sequence)]
    per_slot: list[list[int]] = [list(chosen) for chosen in nested] or [[label for label in labels if not isinstance(label, Sequence)]]
    weights = torch.zeros(len(per_slot), n_labels)
    for slot, chosen in enumerate(per_slot):
        if not all(0 <= label < n_labels for label in chosen):
            raise ConfigError(
                "no such label", expected=f"0 to {n_labels - 1}", found=chosen, remedy="labels are the rows of the last weight"
            )
        weights[slot, chosen] = 1 / max(len(chosen), 1)
    return weights
