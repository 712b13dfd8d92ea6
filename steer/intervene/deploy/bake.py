"""Baking: a plan becomes part of the weights. A constant goes into a bias, an ablation turns W into W - Q Q^T W.

Rounding aside (`steer.intervene.deploy.check.TOLERANCE`) the model then does without hooks what it did with the plan, for every token that
is not padding, while dropout is off. That is tried on random tokens before the model is handed out. In half precision the two round
differently, but neither is nearer to the exact result than the other.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from steer.errors import DeployError
from steer.intervene.deploy.check import Check
from steer.intervene.deploy.constant import AT_RUN_TIME, cannot_carry, constant_edits
from steer.intervene.deploy.fold import Fold, check_sites, fold
from steer.intervene.deploy.savable import make_savable
from steer.intervene.plan import Plan
from steer.model.anatomy import Anatomy

_UNTIE = "load it with tie_word_embeddings=False and give it a copy of the embedding as head, or use steer.to_adapter"


def bake(plan: Plan, model: nn.Module, *, savable: bool = True) -> Baked:
    """Moves a plan into the weights of a model.

    A plan can be baked when all its interventions act alike in every pass (scope `all`, constant strength, no gate, one row slot, all
    phases), are affine functions of the activation, and stand where a linear map takes or gives exactly their activation: constants at
    embed, the residual stream, attention and MLP; ablation and other projections at embed, attention and MLP.

    Args:
        plan: not attached.
        model: dense weights, raw or wrapped. Under PEFT, constants only, and only for interventions with the role `reference`, since
            the pass without adapters has the same weights.
        savable: refuse what `save_pretrained` and `from_pretrained` would lose: a bias that the family has no setting for. Where it
            has one (`mlp_bias`, `attention_bias`), the setting is switched on and the other maps that it speaks of get a bias of 0.
            False for a model that stays in this process.

    Returns:
        A handle that undoes it to the bit, by `undo()` or at the end of a `with` block.

    Raises:
        DeployError: a plan, model or site for which it would not be exact; the model is as it was.
        AttachError: something is attached to the model.
        SiteError, WidthError, WrongModelError: the plan does not fit the model.
    """
    anatomy, carrier = Anatomy.find(model), "a bake"
    edits = constant_edits(plan, carrier)
    check_sites(edits, carrier)
    check = Check(anatomy, [one for one, _ in edits], plan.fingerprint)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        for one, _ in edits:
            if "reference" not in one.roles:
                expected = "roles=('policy', 'reference'): the pass without adapters has the same weights"
                raise cannot_carry(one, carrier, expected, f"only {', '.join(one.roles)} on a PEFT model", "give it both roles")
    folds = fold(anatomy, edits, carrier)
    for made in folds:
        _check_untied(model, made)
    baked = Baked()
    try:
        for made in folds:
            baked.apply(made)
        if savable:
            make_savable(anatomy, baked)
        baked.error = check.compare(carrier)
    except BaseException:
        baked.undo()
        raise
    return baked


class Baked:
    """A plan in the weights.

    Attributes:
        changed: names of the parameters that it changed or made.
        error: relative difference of the final hidden states from those of the plan, when it was tried.
    """

    def __init__(self) -> None:
        self.error = 0.0
        self._weights: list[tuple[str, nn.Parameter, Tensor, int]] = []
        self._biases: list[tuple[str, nn.Module]] = []
        self._settings: list[tuple[object, str, object]] = []

    @property
    def changed(self) -> list[str]:
        return [name for name, *_ in self._weights] + [name for name, _ in self._biases]

    @property
    def new_biases(self) -> list[str]:
        """Paths of the maps that had no bias before."""
        return [name.removesuffix(".bias") for name, _ in self._biases]

    @torch.no_grad()
    def apply(self, made: Fold) -> None:
        """Puts one fold into its map."""
        a, b, shift = made.change()
        if not made.keeps_weight:
            new = made.weight.to(a) + b @ a
            if made.kind == "table":
                new += shift[:, None]
            name = "down_proj" if made.kind == "experts" else "weight"
            self._write(f"{made.path}.{name}", made.parameter, new.mT if made.transposed else new)
        if made.kind == "linear" and bool((shift != 0).any()):
            if made.bias is None:
                self.add_bias(made.path, made.module, shift)
            else:
                self._write(f"{made.path}.bias", made.bias, made.bias.to(shift) + shift)

    def add_bias(self, path: str, module: nn.Module, value: Tensor | float) -> None:
        """Gives a map without a bias one that is not trained. value: [out], or a number for all of it."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        out = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        bias = torch.empty(out, dtype=weight.dtype, device=weight.device)
        bias.copy_(torch.as_tensor(value))
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        self._biases.append((f"{path}.bias", module))

    def set(self, config: object, name: str, value: object) -> None:
        """Changes a setting of the model."""
        self._settings.append((config, name, getattr(config, name)))
        setattr(config, name, value)

    def _write(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        old = parameter.detach().clone()
        parameter.copy_(new)
        self._weights.append((name, parameter, old, parameter._version))

    @torch.no_grad()
    def undo(self) -> None:
        """Puts every weight back to the bit; doing it again does nothing.

        Raises:
            DeployError: a weight was changed since, and would lose that; nothing is undone.
        """
        if moved := [name for name, parameter, _, version in self._weights if parameter._version != version]:
            raise DeployError(
                "weights were changed after the bake",
                expected="the weights that the bake wrote",
                found=f"{len(moved)} others, e.g. {moved[0]}",
                remedy="undo before training or loading weights; what was learned since would be lost",
            )
        for _, parameter, old, _ in self._weights:
            parameter.copy_(old)
        for _, module in self._biases:
            module.register_parameter("bias", None)
        for config, name, value in reversed(self._settings):
            setattr(config, name, value)
        self._weights, self._biases, self._settings = [], [], []

    def __enter__(self) -> Baked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def _check_untied(model: nn.Module, made: Fold) -> None:
    """Raises DeployError when a weight that changes is used by another module too."""
    if made.keeps_weight:
        return
    users = [path for path, module in model.named_modules() if any(one is made.parameter for one in module._parameters.values())]
    if len(users) > 1:
        raise DeployError(
            f"a bake cannot change '{made.path}', whose weight other modules use too",
            expected="a weight of its own",
            found=f"one weight in {' and '.join(users)}",
            remedy=f"{_UNTIE}, or {AT_RUN_TIME}",
        )
