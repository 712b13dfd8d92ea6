"""Plan: an ordered list of interventions, as it is written down; `attach` gives it a life on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steer import files
from steer.checks import errors_of, integer, of_type, whole_number
from steer.errors import ConfigError, DamagedFileError, SteerError, in_file
from steer.intervene.intervention import Intervention
from steer.intervene.operator import Operator

if TYPE_CHECKING:
    from steer.intervene.attachment import Attachment


class Plan:
    """Interventions, in the order in which those on one site are applied. Attaching changes nothing of a plan.

    Args:
        interventions: at least one; names that repeat are numbered. The plan has tensors of its own, but for those that are being learned.
        fingerprint: `Anatomy.fingerprint()` of the model the vectors were made on; checked on attach when given.
        step: optimiser step at which its schedules start when it is attached.

    Raises:
        ConfigError: no intervention, or something else in the place of one.

    Example:
        >>> plan = steer.Plan(steer.Intervention(steer.Add(vector), "layers.12.output"))
        >>> with plan.attached(model) as attachment:
        ...     model.generate(**prompt)
        ...     print(attachment.fired())
    """

    def __init__(
        self, interventions: Sequence[Intervention] | Intervention, *, fingerprint: dict[str, Any] | None = None, step: int = 0
    ) -> None:
        listed = [interventions] if isinstance(interventions, Intervention) else interventions
        of_type(listed, (list, tuple), "the interventions of a plan", "pass an Intervention, or a list of them")
        for intervention in listed:
            remedy = "wrap operators: Intervention(Add(vector), 'layers.12.output')"
            of_type(intervention, Intervention, "an intervention of a plan", remedy)
        if not listed:
            raise _no_interventions()
        if fingerprint is not None:
            of_type(fingerprint, dict, "the fingerprint of a plan", "pass Anatomy.find(model).fingerprint()")
        step = integer(step)
        whole_number(step, "the optimiser step of a plan")
        self.interventions = _with_unique_names(_with_own_tensors(listed))
        self.fingerprint = fingerprint
        self.step = step

    def __repr__(self) -> str:
        return f"Plan({summary_of(self.interventions[:3], len(self.interventions))})"

    def __getitem__(self, name: str) -> Intervention:
        """The intervention of that name. Raises ConfigError with the known names."""
        for intervention in self.interventions:
            if intervention.name == name:
                return intervention
        raise unknown_intervention(name, [intervention.name for intervention in self.interventions])

    def parameters(self) -> list[nn.Parameter]:
        """What is being learned, for an optimiser; empty unless an operator or a gate was made learnable with `train()`."""
        learned = (parameter for intervention in self.interventions for parameter in intervention.parameters.values())
        return list({id(parameter): parameter for parameter in learned}.values())

    # ---- on a model

    def validate(self, model: nn.Module) -> None:
        """Checks that the plan fits a model, as `attach` does, and leaves the model alone.

        Raises:
            SiteError, WidthError, NonFiniteError, ConfigError, WrongModelError.
        """
        from steer.intervene.attaching import validate

        validate(self, model)

    def attach(self, model: nn.Module, *, stack: bool = False, phases: Sequence[str] | None = None, schedule: Any = None) -> Attachment:
        """Installs one hook per hook point; nothing of the model changes but its hook dictionaries, and nothing of the plan.

        Args:
            model: raw, PEFT-wrapped, compiled, DDP- or FSDP2-wrapped, or a LightningModule around it. Attach after the last wrapper.
            stack: allow it on a model that another plan is attached to.
            phases: where it acts on this model; those of an intervention that are not among them are left out.
            schedule: takes the place of the interventions' schedules on this model.

        Raises:
            AttachError: another plan is attached and `stack` is False.
            SiteError, WidthError, NonFiniteError, ConfigError, WrongModelError: the plan does not fit the model.
        """
        from steer.intervene.attaching import attach

        return attach(self, model, stack=stack, phases=phases, schedule=schedule)

    @contextmanager
    def attached(
        self, model: nn.Module, *, stack: bool = False, phases: Sequence[str] | None = None, schedule: Any = None
    ) -> Iterator[Attachment]:
        """`attach` and `detach` around a block, on every exit path. Warns when no forward pass went through the plan."""
        attachment = None
        try:
            try:
                attachment = self.attach(model, stack=stack, phases=phases, schedule=schedule)
                yield attachment
            finally:
                if attachment is not None and attachment.is_attached:  # a block may detach early
                    attachment.detach()
        except BaseException:
            if attachment is not None and attachment.is_attached:  # it was interrupted on the way out
                attachment.detach()
            raise
        attachment.warn_if_idle()

    def expanded(self, model: nn.Module) -> Plan:
        """The same plan with an intervention of its own for each site of a model that a pattern stands for, named `<name>@<site>`.

        Raises:
            SiteError: a site that the model does not have; a pattern that none of its layers fits.
        """
        from steer.intervene.expansion import at_single_sites

        groups = at_single_sites(self.interventions, model)
        return Plan([intervention for group in groups for intervention in group], fingerprint=self.fingerprint, step=self.step)

    # ---- looking

    def explain(self) -> str:
        """The plan in words: what acts where, on which tokens, when and how strongly."""
        return explained(self.interventions, f"not attached, step {self.step}", {})

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Writes manifest.json and tensors.safetensors (one file when the path ends in .safetensors), atomically."""
        manifest, tensors = self.file_form()
        return files.save_artifact(path, "plan", tensors, manifest)

    def file_form(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `save` writes: a JSON-able manifest, and the tensors. Raises ConfigError for a method that would not come back as it was."""
        tensors = {
            f"{i}.{name}": tensor.detach().cpu()
            for i, intervention in enumerate(self.interventions)
            for name, tensor in intervention.tensors.items()
        }
        manifest = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "interventions": [intervention.to_dict() for intervention in self.interventions],
            "shared": self._shared_parameters(),
        }
        return manifest, tensors

    def _shared_parameters(self) -> dict[str, str]:
        """Parameters that stand in several places, by the name in the file of each later place: the name of the first."""
        first_place: dict[int, str] = {}
        shared: dict[str, str] = {}
        for i, intervention in enumerate(self.interventions):
            for name, parameter in intervention.parameters.items():
                first = first_place.setdefault(id(parameter), f"{i}.{name}")
                if first != f"{i}.{name}":
                    shared[f"{i}.{name}"] = first
        return shared

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote; the model is checked on attach.

        Raises:
            DamagedFileError, UnsafeFileError, WrongKindError, NonFiniteError. ConfigError, SiteError: a part that no plan can have.
        """
        manifest, tensors = files.load_artifact(path, "plan")
        by_intervention: dict[str, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            by_intervention.setdefault(number, {})[name] = tensor
        try:
            if unknown := manifest.keys() - {"fingerprint", "step", "interventions", "shared"}:
                raise TypeError(f"a plan has no '{min(unknown)}'")
            interventions = [
                Intervention.from_dict(spec, by_intervention.pop(str(i), {})) for i, spec in enumerate(manifest["interventions"])
            ]
            if by_intervention:
                raise TypeError(f"tensors of an intervention {min(by_intervention)}, which the plan does not have")
            _tie_shared_parameters(interventions, manifest["shared"])
            return cls(interventions, fingerprint=manifest.get("fingerprint"), step=manifest.get("step", 0))  # older files do not say
        except SteerError as error:
            raise in_file(error, path) from error
        except KeyError as error:
            raise _lacking_part(path, error) from error
        except Exception as error:  # whatever code stumbles over that expects what `save` writes
            raise _unfitting_part(path, error) from error


def summary_of(first: Sequence[Intervention], total: int) -> str:
    """One line. first: those that are shown, of `total` in the plan."""
    shown = "; ".join(intervention.summary() for intervention in first)
    return shown if len(first) == total else f"{total} interventions: {shown}; ..."


def explained(interventions: Sequence[Intervention], state: str, paths: Mapping[str, str], now: Mapping[str, Sequence[float]] = {}) -> str:
    """Interventions in words.

    Args:
        state: what is said of the plan as a whole.
        paths: module of each intervention, by name, as far as it is known.
        now: strengths that the hooks use, by name, where they may differ from those written down.
    """
    lines = [f"plan of {len(interventions)} intervention(s), {state}"]
    for number, intervention in enumerate(interventions, 1):
        name = intervention.name
        strength = ", ".join(f"{value:.4g}" for value in now.get(name, intervention.strength))
        path = f" ({paths[name]})" if name in paths else ""
        width = intervention.operator.width
        switch = "" if intervention.enabled else ", switched off"
        lines.append(f"{number}. {name}: {_described(intervention.operator)} at {intervention.site}{path}, width {width}")
        lines.append(f"   strength {strength}{' now' if name in now else ''} ({intervention.schedule}){switch}")
        roles = " and ".join(intervention.roles)
        lines.append(f"   on {intervention.scope} tokens, in {', '.join(intervention.phases) or 'no phase'}, for the {roles} pass")
        modifiers = [f"gate {intervention.gate}"] * (intervention.gate is not None) + ["norm preserved"] * intervention.preserve_norm
        if intervention.parameters:
            modifiers.append(f"learned: {', '.join(intervention.parameters)}")
        if modifiers:
            lines.append(f"   {'; '.join(modifiers)}")
    return "\n".join(lines)


def _with_own_tensors(interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions with copies of their tensors; tensors, and gates, that they share stay shared, and parameters themselves."""
    tensors: dict[int, Any] = {}
    gates: dict[int, Any] = {}
    owned = []
    for intervention in interventions:
        gate = None if intervention.gate is None else intervention.gate.copied(tensors, gates)
        owned.append(intervention.unchecked(operator=intervention.operator.copy(tensors), gate=gate))
    return owned


def _with_unique_names(interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The interventions, those whose name repeats renamed to `<name>#2`, `<name>#3`, ..."""
    taken: set[str] = set()
    next_number: dict[str, int] = {}
    unique = []
    for intervention in interventions:
        name = intervention.name
        number = next_number.get(name, 2)
        while name in taken:
            name = f"{intervention.name}#{number}"
            number += 1
        next_number[intervention.name] = number
        taken.add(name)
        unique.append(intervention if name == intervention.name else intervention.unchecked(name=name))
    return tuple(unique)


def _described(operator: Operator) -> str:
    what = f"`describe` of operator '{operator.name}'"
    with errors_of(what, "return one phrase"):
        phrase = operator.describe()
    of_type(phrase, str, what, "return one phrase")
    return phrase


def _tie_shared_parameters(interventions: Sequence[Intervention], shared: Mapping[str, str]) -> None:
    places = {f"{i}.{name}": (intervention, name) for i, intervention in enumerate(interventions) for name in intervention.parameters}
    for later, first in shared.items():
        later_intervention, later_name = places[later]
        first_intervention, first_name = places[first]
        later_intervention.tie(later_name, first_intervention.parameters[first_name])


# ---- errors


def _no_interventions() -> ConfigError:
    return ConfigError(
        "a plan without interventions steers nothing",
        expected="at least one",
        found="none",
        remedy="pass an Intervention, or a list of them",
    )


def unknown_intervention(name: Any, known: Sequence[str]) -> ConfigError:
    """The error of a name that no intervention of a plan has."""
    return ConfigError(
        f"no intervention is called '{name}'",
        expected=f"one of {', '.join(known)}",
        found=name,
        remedy="choose one of these, or leave the name out to mean all of them",
    )


def _lacking_part(path: str | Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"plan '{path}' lacks a part",
        expected="for every intervention its tensors, operator, site and settings",
        found=repr(error),
        remedy="restore it from a backup, or make the plan and save it again",
    )


def _unfitting_part(path: str | Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"plan '{path}' holds a part that does not fit",
        expected="for every intervention its tensors, operator, site and settings, and nothing else",
        found=f"{type(error).__name__}: {error}",
        remedy="load it with the version that wrote it, restore it from a backup, or make the plan and save it again",
    )
