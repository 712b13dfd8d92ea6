"""Attaching: from a plan and a model to hooks, with every check that can be made before a forward pass."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import errors_of
from steer.errors import AttachError, ConfigError, NonFiniteError, WidthError, WrongModelError
from steer.intervene import schedule as schedules
from steer.intervene.active import ActiveIntervention
from steer.intervene.attachment import Attachment
from steer.intervene.dry_run import check_own_methods
from steer.intervene.expansion import at_single_sites
from steer.intervene.gate import SiteGate
from steer.intervene.intervention import Intervention, checked_names, width_error
from steer.intervene.pass_events import PassEvents
from steer.intervene.plan import Plan
from steer.intervene.prepared import PreparedEdits, prepared_for
from steer.intervene.schedule import Schedule
from steer.intervene.scope_mask import ScopeMask, no_images
from steer.intervene.site_edits import SiteEdits
from steer.intervene.token_counter import TokenCounter
from steer.model import hooks
from steer.model.anatomy import Anatomy, HookPoint, resolve
from steer.model.context import PHASES
from steer.model.devices import input_device
from steer.model.fingerprint import DIGEST, differing, warn_of_cast
from steer.model.site import Site
from steer.model.watcher import image_token_ids, watchers_of


class _Resolved:
    """Where a plan meets a model.

    Attributes:
        model: as it was given.
        anatomy: of the model; None when it is no decoder.
        at_sites: the interventions of the plan, each as one for each of its sites.
        interventions: all of those.
        points: hook point of each.
        readers: every site gate with its site, the name of its decision and its hook point; one that several interventions share reads
            once.
        decisions: names of the decisions that the gate of each intervention is made of, from left to right.
        readings: name and hook point of the earlier activation that each intervention depends on, or None.
    """

    def __init__(self, plan: Plan, model: nn.Module, plan_number: int) -> None:
        self.model = model
        self.at_sites = at_single_sites(plan.interventions, model)
        self.interventions = [intervention for at_sites in self.at_sites for intervention in at_sites]
        readers, self.decisions = _named_decisions(self.interventions, plan_number)
        sites = [intervention.single_site for intervention in self.interventions]
        read = [intervention.operator.reads_at for intervention in self.interventions]
        self.anatomy, points = resolve(model, [*sites, *(site for _, site, _ in readers), *(site for site in read if site is not None)])
        self.points = points[: len(sites)]
        of_readings = iter(points[len(sites) + len(readers) :])
        self.readers = [(*reader, point) for reader, point in zip(readers, points[len(sites) :], strict=False)]
        self.readings = [None if site is None else (f"plan {plan_number} reading {site}", next(of_readings)) for site in read]
        _check_widths(self)
        _check_fingerprint(plan, self.anatomy)
        _check_gates(self)
        _check_readings(self)
        _check_scopes(plan, self.readers, self.anatomy)
        check_own_methods(plan.interventions, model)

    def root(self, point: HookPoint) -> nn.Module:
        """The module whose passes a hook point belongs to."""
        anatomy = point.anatomy or self.anatomy
        return self.model if anatomy is None else anatomy.decoder


def validate(plan: Plan, model: nn.Module) -> None:
    """Raises as `attach` does where a plan does not fit a model, and leaves the model alone."""
    resolved = _Resolved(plan, model, 0)
    first = next(model.parameters(), torch.empty(0))
    for intervention, point in zip(resolved.interventions, resolved.points, strict=True):
        like = next(point.module.parameters(), first)
        active = ActiveIntervention(
            intervention, ScopeMask(intervention.scope), torch.device("cpu"), 0, phases=intervention.phases, schedule=intervention.schedule
        )
        _check_range(active, like.dtype)


def attach(plan: Plan, model: nn.Module, *, stack: bool, phases: Sequence[str] | None, schedule: Any) -> Attachment:
    """See `Plan.attach`."""
    allowed = PHASES if phases is None else checked_names(phases, PHASES, "phase")
    replacement = None if schedule is None else schedules.from_dict(schedule)
    stacked = attached_edits(model)
    if stacked and not stack:
        raise _another_plan(stacked)
    plan_number = 1 + max((edits.plan_number for edits in stacked), default=-1)
    resolved = _Resolved(plan, model, plan_number)
    first = next(model.parameters(), torch.empty(0))
    if first.is_meta:  # offloaded: nothing but its type can be read between calls
        first = torch.empty(0, dtype=first.dtype, device=input_device(model))
    active = _activate(resolved, first, plan_number, allowed, replacement)
    events = _events_by_stack(active, resolved, first)
    functions = _edits_by_point(active, resolved, first, events, plan_number)
    paths = {intervention.name: point.path for intervention, point in zip(active, resolved.points, strict=True)}
    attachment = Attachment(plan, _by_name(plan, resolved, active), list(events.values()), paths)
    installation = hooks.Installation(model, resolved.anatomy, functions)
    try:
        installation.install()
        for root, of_stack in events.items():
            of_stack.connect(installation.watchers[root])
        attachment.installed(installation)
        return attachment
    except BaseException:
        for of_stack in events.values():
            of_stack.disconnect()
        installation.remove()
        raise


def attached_edits(model: nn.Module) -> list[SiteEdits]:
    """Those of all plans that are attached to a model."""
    hooks_at_sites = [hook for watcher in watchers_of(model) for hook in watcher.site_hooks]
    return [hook.function for hook in hooks_at_sites if isinstance(hook.function, SiteEdits)]


def _named_decisions(
    interventions: Sequence[Intervention], plan_number: int
) -> tuple[list[tuple[SiteGate, Site, str]], list[tuple[str, ...]]]:
    readers: dict[str, tuple[SiteGate, Site, str]] = {}
    numbers: dict[int, int] = {}
    decisions = []
    for intervention in interventions:
        names = []
        for gate in intervention.gate.site_gates() if intervention.gate is not None else ():
            site = gate.site or intervention.single_site
            # strings alone: torch.compile writes other objects in its own way
            name = f"plan {plan_number} gate {numbers.setdefault(id(gate), len(numbers))}@{site}"
            names.append(name)
            readers[name] = (gate, site, name)
        decisions.append(tuple(names))
    return list(readers.values()), decisions


def _activate(
    resolved: _Resolved, first: Tensor, plan_number: int, allowed: Sequence[str], replacement: Schedule | None
) -> list[ActiveIntervention]:
    """The interventions with their buffers, each on the device of its module. Those that name the same tokens share a scope mask."""
    scope_masks: dict[str, ScopeMask] = {}
    activated = []
    described = zip(resolved.interventions, resolved.points, resolved.decisions, resolved.readings, strict=True)
    for intervention, point, decisions, reading in described:
        like = next(point.module.parameters(), first)
        text = str(intervention.scope)
        if text not in scope_masks:
            scope_masks[text] = ScopeMask(intervention.scope)
        active = ActiveIntervention(
            intervention,
            scope_masks[text],
            input_device(point.module) if like.is_meta else like.device,
            plan_number,
            phases=tuple(phase for phase in intervention.phases if phase in allowed),
            schedule=replacement or intervention.schedule,
        )
        active.decisions = decisions
        active.reading = None if reading is None else reading[0]
        _check_range(active, like.dtype)
        active.prepared = prepared_for(active, first.dtype)
        activated.append(active)
    return activated


def _by_name(plan: Plan, resolved: _Resolved, active: list[ActiveIntervention]) -> dict[str, list[ActiveIntervention]]:
    """What the name of each intervention of the plan stands for: the intervention at each of its sites."""
    waiting = iter(active)
    return {
        intervention.name: list(itertools.islice(waiting, len(at_sites)))
        for intervention, at_sites in zip(plan.interventions, resolved.at_sites, strict=True)
    }


def _events_by_stack(active: list[ActiveIntervention], resolved: _Resolved, first: Tensor) -> dict[nn.Module, PassEvents]:
    """What happens in the passes of each stack that the plan has sites in, by the root of the stack."""
    events = {}
    for root in dict.fromkeys(map(resolved.root, resolved.points)):
        members = [intervention for intervention, point in zip(active, resolved.points, strict=True) if resolved.root(point) is root]
        gates = [gate for gate, _, _, point in resolved.readers if resolved.root(point) is root]
        events[root] = PassEvents(members, gates, TokenCounter(members, first.device), PreparedEdits(members), first)
    return events


def _edits_by_point(
    active: list[ActiveIntervention], resolved: _Resolved, first: Tensor, events: dict[nn.Module, PassEvents], plan_number: int
) -> list[tuple[HookPoint, SiteEdits]]:
    by_point: dict[Any, tuple[HookPoint, SiteEdits]] = {}

    def edits_at(point: HookPoint) -> SiteEdits:
        key = (id(point.module), point.side, None if point.columns is None else str(point.site))
        return by_point.setdefault(key, (point, SiteEdits(events[resolved.root(point)].counter, plan_number)))[1]

    for intervention, point in zip(active, resolved.points, strict=True):
        edits = edits_at(point)
        edits.interventions.append(intervention)
        edits.counts_calls |= intervention.counts_in_calls
    for gate, _, name, point in resolved.readers:
        like = next(point.module.parameters(), first)
        device = input_device(point.module) if like.is_meta else like.device
        edits_at(point).gates.append((gate.on(device), name))
    for name, point in dict(reading for reading in resolved.readings if reading is not None).items():
        edits_at(point).readings.append(name)
    return sorted(by_point.values(), key=lambda entry: _place_in_fused_module(entry[0]))


def _place_in_fused_module(point: HookPoint) -> tuple[int, int]:
    """Queries before keys before values, so that a gate reads one before another is edited, as where each has a module of its own."""
    return (-2, 0) if point.columns is None else point.site.order


# ---- checks


def _check_widths(resolved: _Resolved) -> None:
    for intervention, point in zip(resolved.interventions, resolved.points, strict=True):
        if point.width is not None and point.width != intervention.operator.width:
            raise width_error(intervention, point.width)
        if resolved.anatomy is not None and point.site.module is None:
            operator = intervention.operator
            with errors_of(
                f"`check_model` of operator '{operator.name}'", "raise ConfigError for a model that does not fit, and nothing else"
            ):
                operator.check_model(resolved.anatomy)


def _check_fingerprint(plan: Plan, anatomy: Anatomy | None) -> None:
    if plan.fingerprint is None or anatomy is None:
        return
    fingerprint = anatomy.fingerprint()
    entries = differing(plan.fingerprint, fingerprint)
    has_other_weights = entries.pop(DIGEST, None) is not None
    if entries:
        raise _another_model(entries)
    if has_other_weights:
        warnings.warn("this plan was made on other weights of the same architecture (the embeddings differ)", stacklevel=5)
    warn_of_cast("this plan was", plan.fingerprint, fingerprint, stacklevel=6)


def _check_scopes(plan: Plan, readers: list[tuple[SiteGate, Site, str, HookPoint]], anatomy: Anatomy | None) -> None:
    """A model that reads images has what `image` means."""
    scopes = [*(intervention.scope for intervention in plan.interventions), *(gate.over for gate, *_ in readers)]
    for scope in scopes:
        if any(selector.kind == "image" for selector in scope.selectors) and not (anatomy and image_token_ids(anatomy.chain)):
            raise no_images(str(scope))


def _check_gates(resolved: _Resolved) -> None:
    """A gate fits the site that it reads, and does not decide after the edit that it is for."""
    read_at = {name: point for _, _, name, point in resolved.readers}
    for gate, site, _, point in resolved.readers:
        if point.width not in (None, gate.width):
            raise _gate_width(gate, site, point)
    for intervention, steered, names in zip(resolved.interventions, resolved.points, resolved.decisions, strict=True):
        for name in names:
            read = read_at[name].site
            if resolved.root(read_at[name]) is not resolved.root(steered):
                raise _gate_in_another_stack(intervention.name, read, steered.site)
            if read.module is None and steered.site.module is None and read.order > steered.site.order:
                raise _late_gate(intervention.name, read, steered.site)


def _check_readings(resolved: _Resolved) -> None:
    """An edit depends on nothing that comes after it."""
    for intervention, steered, reading in zip(resolved.interventions, resolved.points, resolved.readings, strict=True):
        if reading is None:
            continue
        read = reading[1]
        if resolved.root(read) is not resolved.root(steered):
            raise _gate_in_another_stack(intervention.name, read.site, steered.site)
        if read.site.order >= steered.site.order:
            raise _late_reading(intervention.name, read.site, steered.site)


def _check_range(active: ActiveIntervention, dtype: torch.dtype) -> None:
    """Raises NonFiniteError when what an intervention adds is beyond what activations of this type hold."""
    if not active.operator.additive or not dtype.is_floating_point:
        return
    largest = max(map(abs, active.base)) * float(active.description.operator.tensors["vector"].detach().abs().max())
    if largest > torch.finfo(dtype).max:
        raise _beyond_range(active.name, dtype, largest)


# ---- errors


def _another_plan(stacked: list[SiteEdits]) -> AttachError:
    names = ", ".join(intervention.name for edits in stacked for intervention in edits.interventions)
    return AttachError(
        "a plan is attached to this model already",
        expected="a model without a plan, or stack=True",
        found=f"a plan of {names}",
        remedy="detach that one, or pass stack=True to have both; the same plan twice steers twice",
    )


def _another_model(differing: dict[str, tuple[Any, Any]]) -> WrongModelError:
    return WrongModelError(
        "this plan was made for another model",
        expected={key: pair[0] for key, pair in differing.items()},
        found={key: pair[1] for key, pair in differing.items()},
        remedy="load the model named in the plan, or extract the vectors again on this one",
    )


def _gate_width(gate: SiteGate, site: Site, point: HookPoint) -> WidthError:
    return WidthError(
        f"gate '{gate.name}' does not fit site '{site}'",
        expected=f"width {point.width}",
        found=f"width {gate.width}",
        remedy="give the gate a vector that was made for this site",
    )


def _gate_in_another_stack(name: str, read: Site, steered: Site) -> ConfigError:
    return ConfigError(
        f"the gate of '{name}' reads another stack, whose tokens are not those of '{steered}'",
        expected="a site of the same stack",
        found=str(read),
        remedy="let the gate read the stack that is steered",
    )


def _late_gate(name: str, read: Site, steered: Site) -> ConfigError:
    return ConfigError(
        f"the gate of '{name}' would decide after the edit it is for",
        expected=f"a site at or before {steered}",
        found=str(read),
        remedy="let the gate read an earlier site, or steer a later one",
    )


def _late_reading(name: str, read: Site, steered: Site) -> ConfigError:
    return ConfigError(
        f"'{name}' depends on an activation that comes after the one it edits",
        expected=f"a site before {steered}",
        found=str(read),
        remedy="check the sites of the dictionary: reads= and writes= of load_dictionary",
    )


def _beyond_range(name: str, dtype: torch.dtype, largest: float) -> NonFiniteError:
    return NonFiniteError(
        f"'{name}' adds more than {dtype} holds",
        expected=f"at most {torch.finfo(dtype).max:g} for each channel",
        found=f"{largest:g}",
        remedy="lower the strength or the vector, or run the model in bfloat16 or float32",
    )
