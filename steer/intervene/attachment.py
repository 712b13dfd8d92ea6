"""Attachment: the life of a plan on one model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import integer, level_of_caller, of_type, tensor_of, whole_number
from steer.errors import AttachError, ConfigError, SteerError
from steer.intervene import attachment_state
from steer.intervene.active import ActiveIntervention
from steer.intervene.expansion import modules_in_words
from steer.intervene.intervention import Intervention, checked_strengths
from steer.intervene.pass_events import PassEvents
from steer.intervene.plan import Plan, explained, summary_of, unknown_intervention
from steer.intervene.scope import Scope
from steer.intervene.scope_mask import ScopeMask
from steer.model.hooks import Installation


class Attachment:
    """A plan on one model, as `Plan.attach` gives it: strengths, switches, row slots, windows, step and counts.

    Once it is detached it can be read and takes over a state, and driving it raises AttachError.

    Args:
        by_name, events: what was attached; `Plan.attach` makes the attachment.

    Attributes:
        plan: as it was attached; nothing of it changes.
        interventions: the plan's, with the buffers that drive their hooks; of one at several sites, each site as `<name>@<site>`. They are
            driven together, by the name in the plan.
        paths: name of the hooked module of each of these interventions, by its name.
        current_step: optimiser step that the schedules are at.

    Example:
        >>> attachment = plan.attach(model)
        >>> attachment.set_strength(0.5)
        >>> model.generate(**prompt)
        >>> attachment.detach()
    """

    def __init__(self, plan: Plan, by_name: dict[str, list[ActiveIntervention]], events: list[PassEvents], paths: dict[str, str]) -> None:
        self.plan = plan
        self.interventions = [active for at_sites in by_name.values() for active in at_sites]
        self.paths = paths
        self.current_step = plan.step
        self._by_name = by_name  # as in the plan
        self._events = events
        self._installation: Installation | None = None
        self._is_over = False
        self.set_step(plan.step)

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "not attached"
        first = [_as_it_is(intervention, self[intervention.name]) for intervention in self.plan.interventions[:3]]
        return f"Attachment({state}, step {self.current_step}; {summary_of(first, len(self.plan.interventions))})"

    def __getitem__(self, name: str) -> ActiveIntervention:
        """The intervention of that name; at the first of several sites, since strength, switch and window are the same at all of them.

        Raises:
            ConfigError: an unknown name; it says those that are known.
        """
        return self.at_sites(name)[0]

    def at_sites(self, name: str) -> list[ActiveIntervention]:
        """The intervention of that name at each of its sites. Raises ConfigError with the known names."""
        return self._named(name)

    # ---- hooks on and off

    def installed(self, installation: Installation) -> None:
        """Notes the hooks that are on the model."""
        self._installation = installation

    @property
    def is_attached(self) -> bool:
        """Its hooks are on the model."""
        return self._installation is not None

    def detach(self) -> None:
        """Takes the hooks off; `fired()` stays readable. Interrupted on the way, it may be called again.

        Raises:
            AttachError: they are off already.
        """
        if self._installation is None:
            raise _detached()
        hooks = self._installation.hooks
        missed = [str(hook.point.site) for hook in hooks if hook.place == "anywhere" and not hook.ever_ran]
        replays = any(hook.watcher.replays for hook in hooks)
        for of_stack in self._events:
            of_stack.disconnect()
        self._installation.remove()
        self._installation = None  # it would keep the model in memory
        self._is_over = True
        if missed and any(of_stack.counter.reached for of_stack in self._events) and not replays:
            warnings.warn(f"{', '.join(missed)} never ran while the plan was attached: nothing was steered there", stacklevel=3)

    def warn_if_idle(self) -> None:
        """Warns when no forward pass of the model ran while it was attached."""
        if not any(of_stack.counter.reached for of_stack in self._events):
            warnings.warn("the plan was attached, but no forward pass of its model ran: nothing was steered", stacklevel=level_of_caller())

    # ---- driving

    def step(self, step: int) -> None:
        """Sets every strength to what its schedule says at this optimiser step, counted from 0. A callback calls it after each step."""
        self._check_drives()
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """`step`, also of an attachment that is detached: a run that begins again takes its state over from there."""
        step = integer(step)
        whole_number(step, "the optimiser step of a plan")
        factors = [intervention.factor(step) for intervention in self.interventions]  # all of them, before anything changes
        self.current_step = step
        self._write(factors)

    def _check_drives(self) -> None:
        """Raises AttachError when it was detached, where a strength that is set would steer nothing."""
        if self._is_over:
            raise _detached()

    def _refresh(self) -> None:
        self._write([intervention.factor(self.current_step) for intervention in self.interventions])

    def _write(self, factors: list[float]) -> None:
        for intervention, factor in zip(self.interventions, factors, strict=True):
            intervention.write_strength(factor)
        for of_stack in self._events:
            of_stack.strengths_changed()

    def enable(self, on: bool = True, name: str | None = None) -> None:
        """Switches the plan, or one intervention, on or off without touching a hook."""
        self._check_drives()
        of_type(on, bool, "the switch of a plan", "pass True or False; the name of an intervention comes second")
        chosen = self._named(name)
        before = [intervention.enabled for intervention in chosen]
        try:
            for intervention in chosen:
                intervention.enabled = on
            self._refresh()
        except SteerError:  # from a schedule that was not asked while it was off
            for intervention, enabled in zip(chosen, before, strict=True):
                intervention.enabled = enabled
            raise

    def set_strength(self, strength: float | Sequence[float] | Tensor, name: str | None = None) -> None:
        """Sets the base strength of the plan or of one intervention; a list gives one per row slot.

        Raises:
            ConfigError: another number of strengths than the intervention has row slots. NonFiniteError.
        """
        self._check_drives()
        chosen = self._named(name)
        checked = [checked_strengths(strength, active.operator.slots, active.name) for active in chosen]
        for active, base in zip(chosen, checked, strict=True):
            if len(base) not in (1, len(active.base)):
                raise _wrong_number_of_strengths(active.name, len(active.base), len(base))
            active.factor(self.current_step, base)
        for active, base in zip(chosen, checked, strict=True):
            active.set_base(base)
        self._refresh()

    def set_rows(self, rows: Sequence[int] | Tensor) -> None:
        """Says which slot each row of the next batches uses.

        Args:
            rows: [batch] integers; beams and returned sequences follow the row of their prompt. So a generation over twice as many rows
                counts as two sequences for each: nothing tells it from a batch of other prompts, for which rows have to be set again.

        Raises:
            ConfigError: numbers that are no row slots.
        """
        self._check_drives()
        with_slots = [active for active in self.interventions if active.slots > 1]
        slots = _checked_rows(rows, with_slots)
        for of_stack in self._events:
            of_stack.rows_about_to_change()
        for active in with_slots:
            active.set_rows(slots)

    def set_window(self, start: int | None, stop: int | None, name: str | None = None) -> None:
        """Moves the window of the scopes, such as `generated[:32]`, without touching a hook.

        Args:
            start, stop: as in a slice, None for an open end.
            name: one intervention, None for all.

        Raises:
            ConfigError: a scope without a slice, or with several; a negative bound where the end is not known.
        """
        self._check_drives()
        start, stop = integer(start), integer(stop)
        self.move_windows({active: (start, stop) for active in self._named(name)})

    def move_windows(self, windows: dict[ActiveIntervention, tuple[int | None, int | None]]) -> None:
        """Sets windows; interventions that shared one and do so no longer part. Raises ConfigError as `set_window`."""
        moved: dict[tuple[int, int | None, int | None], Scope] = {}  # by scope mask and bounds
        for active, (start, stop) in windows.items():
            place = (id(active.scope_mask), start, stop)
            if place not in moved:
                moved[place] = _moved_scope(active, start, stop)
        users: dict[int, list[ActiveIntervention]] = {}
        for active in self.interventions:
            users.setdefault(id(active.scope_mask), []).append(active)
        parted: dict[ActiveIntervention, Scope] = {}
        for members in users.values():
            bounds = {windows.get(member) for member in members}
            if bounds == {None}:
                continue
            if len(bounds) == 1:
                members[0].scope_mask.set_window(moved[(id(members[0].scope_mask), *windows[members[0]])])
            else:
                parted |= {member: moved[(id(member.scope_mask), *windows[member])] for member in members if member in windows}
        for name, at_sites in self._by_name.items():
            if (scope := parted.get(at_sites[0])) is not None:
                scope_mask = ScopeMask(scope)
                for active in at_sites:
                    active.share(scope_mask, f"{scope} of {name}")
        for of_stack in self._events:
            of_stack.windows_moved(parted=bool(parted))

    def _named(self, name: str | None) -> list[ActiveIntervention]:
        if name is None:
            return self.interventions
        of_type(name, str, "the name of an intervention", "pass one name, or leave it out for all of them")
        if name not in self._by_name:
            raise unknown_intervention(name, list(self._by_name))
        return self._by_name[name]

    def __reduce__(self) -> Any:
        raise _copied()

    # ---- looking

    def fired(self, *, by_site: bool = False) -> dict[str, int]:
        """On how many tokens each intervention acted since the attach, with a strength other than 0 (passes, in a model without tokens).

        Args:
            by_site: one number for each site of an intervention that has several, by `<name>@<site>`. Without it such an intervention has
                the number of the site where it acted on most tokens: they differ only where a gate reads each site for itself, at
                modules that are not called in every pass, and where the sites are in several stacks.
        """
        counts = {name: count for of_stack in self._events for name, count in of_stack.counter.read().items()}
        if by_site:
            return {active.name: counts[active.name] for active in self.interventions}
        return {name: max(counts[active.name] for active in at_sites) for name, at_sites in self._by_name.items()}

    @property
    def passes(self) -> int:
        """Forward passes that went through the plan since the attach; of several stacks, those of the one that ran most often."""
        return max(of_stack.counter.passes for of_stack in self._events)

    def explain(self) -> str:
        """The plan in words, with the strengths, switches and windows of now, the modules that are hooked, and the phases and schedules
        that it was attached with."""
        state = "attached" if self.is_attached else "not attached"
        now = {name: at_sites[0].strength.flatten().tolist() for name, at_sites in self._by_name.items()}
        modules = {name: modules_in_words([self.paths[active.name] for active in at_sites]) for name, at_sites in self._by_name.items()}
        acting = [_as_attached(intervention, self._by_name[intervention.name][0]) for intervention in self.as_plan().interventions]
        return explained(acting, f"{state}, step {self.current_step}", modules, now)

    def parameters(self) -> list[nn.Parameter]:
        """What is being learned, see `Plan.parameters`."""
        return self.plan.parameters()

    # ---- keeping

    def as_plan(self) -> Plan:
        """The plan as it is now: with the strengths, switches and windows that were set, at this step."""
        now = [_as_it_is(intervention, self[intervention.name]) for intervention in self.plan.interventions]
        return Plan(now, fingerprint=self.plan.fingerprint, step=self.current_step)

    def state_dict(self) -> dict[str, Any]:
        """What changes while a plan runs: step, strengths, switches, windows, and tensors that are being learned. `Plan.save` has all."""
        return attachment_state.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state. Raises ConfigError, before anything changes, when it belongs to a plan with other interventions."""
        attachment_state.load_state_dict(self, state)


def _as_it_is(intervention: Intervention, active: ActiveIntervention) -> Intervention:
    return dataclasses.replace(intervention, strength=active.base, enabled=active.enabled, scope=active.scope_mask.scope)


def _as_attached(intervention: Intervention, active: ActiveIntervention) -> Intervention:
    """An intervention in the phases, and with the schedule, that a training run gave it; a plan of it may have no phase left."""
    return intervention.unchecked(phases=active.phases, schedule=active.schedule)


def _checked_rows(rows: Sequence[int] | Tensor, with_slots: list[ActiveIntervention]) -> Tensor:
    """[batch] row slots, which every intervention with row slots has."""
    slots = tensor_of(rows, "the row slots of a batch", "pass the slot of every row, counted from 0")
    if slots.numel() and (slots.is_floating_point() or slots.is_complex() or slots.dtype is torch.bool) or slots.dim() != 1:
        raise _no_whole_numbers(rows)
    if not with_slots:
        raise _no_row_slots()
    slots = slots.to(torch.long).reshape(-1)
    fewest = min(with_slots, key=lambda active: active.slots)
    if slots.numel() == 0 or int(slots.min()) < 0 or int(slots.max()) >= fewest.slots:
        raise _rows_out_of_range(fewest, slots)
    return slots


def _moved_scope(active: ActiveIntervention, start: int | None, stop: int | None) -> Scope:
    for bound in (start, stop):
        if bound is not None and (type(bound) is not int or abs(bound) >= 10**9):
            raise _no_bound(active.name, bound)
    scope = active.scope_mask.scope
    if scope.window is None:
        raise _no_window(active.name, scope)
    return scope.with_window(start, stop)


# ---- errors


def _detached() -> AttachError:
    return AttachError(
        "this plan is not attached",
        expected="an attachment whose hooks are on its model",
        found="one that was detached",
        remedy="call plan.attach(model) again",
    )


def _copied() -> AttachError:
    return AttachError(
        "an attachment cannot be copied or pickled",
        expected="a plan, which can be",
        found="an attachment, whose hooks are on one model",
        remedy="copy attachment.as_plan(), or save attachment.state_dict(); then attach the plan to the other model",
    )


def _wrong_number_of_strengths(name: str, slots: int, found: int) -> ConfigError:
    return ConfigError(
        f"wrong number of strengths for '{name}'",
        expected="1" if slots == 1 else f"1 or {slots}",
        found=found,
        remedy="give one number for all rows, or make a new Intervention with that many row slots",
    )


def _no_whole_numbers(rows: Any) -> ConfigError:
    return ConfigError(
        "row slots are no whole numbers",
        expected="a flat list with the slot of every row, counted from 0",
        found=rows,
        remedy="e.g. set_rows([0, 1, 1])",
    )


def _no_row_slots() -> ConfigError:
    return ConfigError(
        "this plan has no row slots",
        expected="an intervention with several vectors or strengths",
        found="one vector and one strength in each",
        remedy="make it with strength=[...] or with vectors of shape [slots, width]",
    )


def _rows_out_of_range(active: ActiveIntervention, rows: Tensor) -> ConfigError:
    return ConfigError(
        f"row slots of '{active.name}' are out of range",
        expected=f"0 to {active.slots - 1}",
        found=rows.tolist() or "no rows",
        remedy="give the slot of every row of the batch, counted from 0",
    )


def _no_bound(name: str, bound: Any) -> ConfigError:
    return ConfigError(
        f"the window of '{name}' has no such bound",
        expected="whole numbers of tokens, or None for an open end",
        found=repr(bound),
        remedy="e.g. attachment.set_window(0, 32)",
    )


def _no_window(name: str, scope: Scope) -> ConfigError:
    return ConfigError(
        f"'{name}' has no window to move",
        expected="a scope with one slice, e.g. generated[:32]",
        found=str(scope),
        remedy="make the intervention with such a scope",
    )
