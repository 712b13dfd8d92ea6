"""Intervention: a frozen description of one edit: an operator at a site, on some tokens, in some phases, with a strength."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import errors_of, of_type, tensor_of
from steer.errors import ConfigError, WidthError
from steer.intervene import gate as gates
from steer.intervene import schedule as schedules
from steer.intervene.file_form import file_form
from steer.intervene.gate import Gate
from steer.intervene.operator import OPERATORS, Operator, TensorHolder, check_finite, check_initialised
from steer.intervene.schedule import Schedule
from steer.intervene.schedules.constant import Constant
from steer.intervene.scope import Scope
from steer.model.context import PHASES, ROLES
from steer.model.site import Site
from steer.model.sites import Sites, examples_of, parse_sites


@dataclass(frozen=True, eq=False, init=False)
class Intervention:
    """One edit of one activation tensor. It does not change when it is attached; `dataclasses.replace` makes a changed copy.

    Args:
        operator: what is done, e.g. `Add(vector)`.
        site: where, e.g. `layers.12.output`; several at once by a pattern such as `layers.*.output` or `layers.4-9.attn.output`, or by a
            list of sites and patterns. It does the same at each of them, once, whatever names it twice.
        scope: on which tokens, see `steer.intervene.scope`.
        strength: factor of the edit; a list gives one per row slot.
        phases: subset of train, validate, generate.
        roles: subset of policy, reference; the reference pass of DPO and GRPO is left alone unless it is named here.
        schedule: factor over optimiser steps, advanced by `Attachment.step`.
        name: unique in a plan; made from operator and site when empty.
        enabled: whether it is switched on when it is attached.
        gate: decides from the model's activations whether, or how far, it acts; see `steer.intervene.gate`.
        preserve_norm: the edited activation gets the norm that it had before, whatever the operator did.

    Raises:
        ConfigError, SiteError, NonFiniteError.

    Example:
        >>> steer.Intervention(steer.Add(vector), "layers.12.output", scope="response", strength=2.0)
    """

    operator: Operator
    site: Site | Sites
    scope: Scope
    strength: tuple[float, ...]
    phases: tuple[str, ...]
    roles: tuple[str, ...]
    schedule: Schedule
    name: str
    enabled: bool
    gate: Gate | None
    preserve_norm: bool

    def __init__(
        self,
        operator: Operator,
        site: Site | Sites | str | Sequence[str | Site],
        scope: Scope | str = "all",
        strength: float | Sequence[float] | Tensor = 1.0,
        phases: Sequence[str] = PHASES,
        roles: Sequence[str] = ("policy",),
        schedule: Any = None,
        name: str = "",
        enabled: bool = True,
        gate: Gate | None = None,
        preserve_norm: bool = False,
    ) -> None:
        of_type(operator, Operator, "the operator of an intervention", "pass an operator such as Add(vector)")
        of_type(scope, (str, Scope), "the scope of an intervention", "write it as text, e.g. 'response'")
        of_type(name, str, "the name of an intervention", "pass text, or leave it out")
        for flag, value in (("enabled", enabled), ("preserve_norm", preserve_norm)):
            of_type(value, bool, f"`{flag}` of an intervention", "pass True or False")
        if gate is not None:
            of_type(gate, Gate, "the gate of an intervention", "pass a gate such as ProbeGate(vector), or leave it out")
            for site_gate in gate.site_gates():
                check_initialised(site_gate, "gate")
        check_initialised(operator, "operator")
        site = parse_sites(site)
        with errors_of(f"`check_site` of operator '{operator.name}'", "raise SiteError for a site that does not fit, and nothing else"):
            for example in examples_of(site):
                operator.check_site(example)
        scope = Scope.parse(scope)
        with errors_of(f"`narrowed` of operator '{operator.name}'", "return a Scope"):
            scope = operator.narrowed(scope)
        name = name or f"{operator.name}@{site}"
        fields: dict[str, Any] = {
            "operator": operator,
            "site": site,
            "scope": scope,
            "strength": checked_strengths(strength, operator.slots, name),
            "phases": checked_names(phases, PHASES, "phase"),
            "roles": checked_names(roles, ROLES, "role"),
            "schedule": schedules.from_dict(schedule),
            "name": name,
            "enabled": enabled,
            "gate": gate,
            "preserve_norm": preserve_norm,
        }
        schedules.check_product(fields["strength"], schedules.factor_at(fields["schedule"], 0, name), name)
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        return f"Intervention({self.summary()})"

    def summary(self) -> str:
        """One phrase, for a list of interventions."""
        strength = ", ".join(f"{value:.4g}" for value in self.strength[:4]) + ", ..." * (len(self.strength) > 4)
        modifiers = [
            *([] if self.schedule == Constant() else [f"schedule {self.schedule}"]),
            *([] if self.gate is None else [f"gate {self.gate}"]),
            *(["norm preserved"] if self.preserve_norm else []),
            *([] if self.enabled else ["switched off"]),
        ]
        what = f"'{self.name}': {self.operator.name} at {self.site} on {self.scope} tokens, strength {strength}"
        return ", ".join([what, *modifiers])

    def at(self, site: Site, name: str) -> Intervention:
        """The same, with the same operator and gate, at one of its sites."""
        return self.unchecked(site=site, name=name)

    def unchecked(self, **fields: Any) -> Intervention:
        """A copy with other fields, which are taken as they are; `dataclasses.replace` would check and convert everything again."""
        changed = object.__new__(type(self))
        vars(changed).update(vars(self), **fields)
        return changed

    @property
    def single_site(self) -> Site:
        """Its site. Raises ConfigError for several, which a model has to tell apart first."""
        if isinstance(self.site, Sites):
            raise _several_sites(self)
        return self.site

    @property
    def slots(self) -> int:
        """Number of row slots, for which `Attachment.set_rows` chooses; 1 when every row is treated alike."""
        return max(self.operator.slots, len(self.strength))

    def strength_at(self, step: int) -> Tensor:
        """[1 or slots] fp32: strength x schedule x switch at an optimiser step. Raises as `factor_at`, and NonFiniteError beyond fp32."""
        factor = schedules.factor_at(self.schedule, step) if self.enabled else 0.0
        schedules.check_product(self.strength, factor, self.name)
        return torch.tensor(self.strength) * factor

    @property
    def holders(self) -> dict[str, TensorHolder]:
        """Operator and gates that hold its tensors, by the prefix of their names in a file: none, and `gate<n>.` for the n-th site gate."""
        site_gates = self.gate.site_gates() if self.gate is not None else ()
        return {"": self.operator, **{f"gate{number}.": gate for number, gate in enumerate(site_gates)}}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, by the names that they have in a file."""
        return {prefix + name: tensor for prefix, holder in self.holders.items() for name, tensor in holder.tensors.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is being learned, by the names of `tensors`."""
        return {prefix + name: tensor for prefix, holder in self.holders.items() for name, tensor in holder.parameters.items()}

    def tie(self, name: str, parameter: nn.Parameter) -> None:
        """Puts the parameter of another intervention in the place of its own, so that one is learned for both."""
        prefix, dot, tensor_name = name.rpartition(".")
        self.holders[prefix + dot].tensors[tensor_name] = parameter

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the tensors. Raises ConfigError where it would not give back the same intervention."""
        operator_name, options = file_form(self.operator, OPERATORS)
        return {
            "name": self.name,
            "operator": operator_name,
            "options": options,
            "site": self.site.to_json() if isinstance(self.site, Sites) else str(self.site),
            "scope": str(self.scope),
            "strength": list(self.strength),
            "phases": list(self.phases),
            "roles": list(self.roles),
            "schedule": schedules.to_dict(self.schedule),
            "enabled": self.enabled,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "preserve_norm": self.preserve_norm,
            "learned": sorted(self.parameters),
            "frozen": sorted(name for name, parameter in self.parameters.items() if not parameter.requires_grad),
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
        """Inverse of `to_dict` and `tensors`. Raises KeyError for what is missing, TypeError for what there is beyond."""
        if unknown := spec.keys() - set(_KEYS):
            raise TypeError(f"an intervention has no '{min(unknown)}'")
        by_holder: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            holder, _, name = key.rpartition(".")
            if not name:
                raise TypeError("a tensor without a name")
            by_holder.setdefault(holder, {})[name] = tensor
        operator = OPERATORS.get(spec["operator"]).restore(by_holder.pop("", {}), spec["options"])
        gate = None
        if spec["gate"] is not None:
            gate = gates.from_dict(spec["gate"], (by_holder.pop(f"gate{number}", {}) for number in itertools.count()))
        if by_holder:
            raise TypeError(f"tensors of '{min(by_holder)}', which the intervention does not have")
        as_saved = ("name", "site", "scope", "strength", "phases", "roles", "schedule", "enabled", "preserve_norm")
        intervention = cls(operator, gate=gate, **{key: spec[key] for key in as_saved})
        learned = {name.rpartition(".")[0] for name in spec["learned"]}
        for prefix, tensor_holder in intervention.holders.items():
            if prefix.removesuffix(".") in learned:
                tensor_holder.train()
        if unknown := set(spec["learned"]) - intervention.parameters.keys():
            raise KeyError(f"'{min(unknown)}', which is said to be learned")
        for name in spec.get("frozen", ()):  # older files do not say
            intervention.parameters[name].requires_grad_(False)
        return intervention


_KEYS = (  # of an intervention in a manifest
    *("name", "operator", "options", "site", "scope", "strength", "phases", "roles"),
    *("schedule", "enabled", "gate", "preserve_norm", "learned", "frozen"),
)


def checked_strengths(strength: float | Sequence[float] | Tensor, slots: int, name: str) -> tuple[float, ...]:
    """One number, or one per row slot, as fp32 holds it. Raises ConfigError, NonFiniteError."""
    tensor = tensor_of(strength, f"strength of '{name}'", "pass a number, or one per row slot")
    flat = tensor.detach().to(torch.float32, copy=True).reshape(-1)
    check_finite(flat, f"strength of '{name}'")
    if flat.numel() == 0 or flat.numel() not in (1, slots) and slots > 1:
        raise _wrong_number_of_strengths(name, slots, flat.numel())
    return tuple(flat.tolist())


def checked_names(chosen: Sequence[str] | Iterable[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Some of the known names. Raises ConfigError for others, and for none."""
    of_type(chosen, (str, list, tuple, set), f"the {what}s of an intervention", f"pass names such as ('{known[0]}',)")
    names = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if not names or not set(names) <= set(known):
        remedy = f"name the {what}s in which it acts, e.g. {what}s=('{known[0]}',)"
        raise ConfigError(f"unknown or missing {what}", expected=f"some of {', '.join(known)}", found=names or "none", remedy=remedy)
    return names


# ---- errors


def _wrong_number_of_strengths(name: str, slots: int, found: int) -> ConfigError:
    return ConfigError(
        f"wrong number of strengths for '{name}'",
        expected=f"1 or {slots}" if slots > 1 else "at least 1",
        found=found,
        remedy="give one number for all rows, or one for each row slot",
    )


def _several_sites(intervention: Intervention) -> ConfigError:
    return ConfigError(
        f"'{intervention.name}' acts at several sites",
        expected="an intervention at one site",
        found=f"'{intervention.site}'",
        remedy="take plan.expanded(model), which has one intervention for each",
    )


def width_error(intervention: Intervention, found: int) -> WidthError:
    """The error of an edit whose width differs from that of its site."""
    return WidthError(
        f"the tensors of '{intervention.name}' do not fit site '{intervention.site}'",
        expected=f"width {found}",
        found=f"width {intervention.operator.width}",
        remedy="use a direction or a dictionary that was made on this model and at this site",
    )
