"""Plan: an ordered list of interventions that is attached to a model once and driven by buffers from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer import files
from steer.checks import integer, of_type, tensor_of, whole_number
from steer.errors import AttachError, ConfigError, DamagedFileError, WrongModelError
from steer.intervene.act import Count, SiteAct, check_gates
from steer.intervene.gate import Leaf
from steer.intervene.intervention import Intervention, width_error
from steer.model import hooks
from steer.model.anatomy import Anatomy, HookPoint, resolve
from steer.model.site import Site


class Plan:
    """Interventions, in the order in which those on one site are applied.

    Args:
        interventions: at least one; the plan works on copies, whose names are numbered where they repeat.
        fingerprint: `Anatomy.fingerprint()` of the model the vectors were made on; checked on attach when given.
    """

    def __init__(self, interventions: Sequence[Intervention] | Intervention, *, fingerprint: dict[str, Any] | None = None) -> None:
        given = [interventions] if isinstance(interventions, Intervention) else interventions
        of_type(given, (list, tuple), "the interventions of a plan", "pass an Intervention, or a list of them")
        for one in given:
            of_type(one, Intervention, "an intervention of a plan", "wrap operators: Intervention(Add(vector), 'layers.12.output')")
        if fingerprint is not None:
            of_type(fingerprint, dict, "the fingerprint of a plan", "pass Anatomy.find(model).fingerprint()")
        memo: dict[int, Any] = {}
        self.interventions = [one.copy(memo) for one in given]  # the same one may be in several plans, or twice in this one
        if not self.interventions:
            remedy = "pass an Intervention, or a list of them"
            raise ConfigError("a plan without interventions steers nothing", expected="at least one", found="none", remedy=remedy)
        self.fingerprint = fingerprint
        self.current_step = 0
        self._attached: Callable[[], None] | None = None
        self._count: Count | None = None
        self._paths: dict[str, str] = {}
        names: set[str] = set()
        for intervention in self.interventions:
            base, number = intervention.name, 2
            while intervention.name in names:
                intervention.name, number = f"{base}#{number}", number + 1
            names.add(intervention.name)
        scopes: dict[str, Any] = {}
        for intervention in self.interventions:
            intervention.share(scopes.setdefault(str(intervention.scope), intervention.scope))
        self.step(0)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: no model, since the hooks are the original's."""
        return vars(self) | {"_attached": None, "_count": None, "_paths": {}}

    # ---- attaching

    @property
    def is_attached(self) -> bool:
        return self._attached is not None

    def attach(self, model: nn.Module, *, stack: bool = False) -> Plan:
        """Installs one hook per hook point; nothing of the model changes but its hook dictionaries.

        Args:
            model: raw, PEFT-wrapped, compiled, DDP- or FSDP2-wrapped, or a LightningModule around it. Attach after the last wrapper.
            stack: allow it on a model that another plan is attached to.

        Raises:
            AttachError: this plan is attached already, or another one is and `stack` is False.
            SiteError, WidthError, WrongModelError: the plan does not fit the model.
        """
        if self._attached is not None:
            raise AttachError(
                "this plan is attached already",
                expected="a plan that is not",
                found=f"its hooks at {', '.join(sorted(set(self._paths.values())))}",
                remedy="detach it first, or use a copy made with Plan.load",
            )
        other = hooks.watcher_of(model)
        theirs = [] if other is None else [tap.act for tap in other.taps if isinstance(tap.act, SiteAct)]
        if theirs and not stack:
            raise AttachError(
                "another plan is attached to this model",
                expected="a model without a plan, or stack=True",
                found=f"a plan of {', '.join(one.name for act in theirs for one in act.interventions)}",
                remedy="detach it, or pass stack=True to have both",
            )
        number = 1 + max((act.number for act in theirs), default=-1)
        readers = self._readers(number)
        anatomy, points = resolve(model, [*(one.site for one in self.interventions), *(site for _, site, _ in readers)])
        self._check_model(anatomy, points[: len(self.interventions)])
        check_gates(self.interventions, readers, points)
        first = next(model.parameters(), torch.empty(0))
        self._count = count = Count(self.interventions, first)
        acts: dict[Any, tuple[HookPoint, SiteAct]] = {}

        def act_at(point: HookPoint) -> SiteAct:
            key = (id(point.module), point.side, None if point.columns is None else str(point.site))
            return acts.setdefault(key, (point, SiteAct(count, number)))[1]

        for intervention, point in zip(self.interventions, points, strict=False):
            like = next(point.module.parameters(), first)
            intervention.check_range(like.dtype)
            intervention.move(like.device)
            intervention.set_plan(number)
            act = act_at(point)
            act.interventions.append(intervention)
            act.counts |= intervention.counts_calls
            self._paths[intervention.name] = point.path
        for (leaf, _, name), point in zip(readers, points[len(self.interventions) :], strict=True):
            with torch.inference_mode(False):
                leaf.to(next(point.module.parameters(), first).device)
            act_at(point).readers.append((leaf, name))
        watcher, remove = hooks.install(model, anatomy, list(acts.values()))
        watcher.on_open.append(count.prepare)
        watcher.on_close.append(count)

        def detach() -> None:
            watcher.on_open.remove(count.prepare)
            watcher.on_close.remove(count)
            ours = [tap for tap in watcher.taps if any(tap.act is act for _, act in acts.values())]
            missed = [str(tap.point.site) for tap in ours if tap.place == "anywhere" and not tap.ever]
            if missed and count.reached and not watcher.replays:
                warnings.warn(f"{', '.join(missed)} never ran while the plan was attached: nothing was steered there", stacklevel=4)
            remove()

        self._attached = detach
        return self

    def detach(self) -> None:
        """Takes the hooks off. `fired()` stays readable. Raises AttachError when the plan is not attached."""
        if self._attached is None:
            wanted, remedy = "a plan that is on a model", "call plan.attach(model) first"
            raise AttachError("this plan is not attached", expected=wanted, found="one that is on none", remedy=remedy)
        detach, self._attached = self._attached, None
        detach()

    @contextmanager
    def attached(self, model: nn.Module, *, stack: bool = False) -> Iterator[Plan]:
        """`attach` and `detach` around a block, on every exit path. Warns when no forward pass went through the plan."""
        self.attach(model, stack=stack)
        try:
            yield self
        finally:
            if self.is_attached:  # a block may detach early
                self.detach()
        if self._count is not None and not self._count.reached:
            warnings.warn("the plan was attached, but no forward pass of its model ran: nothing was steered", stacklevel=3)

    def _readers(self, number: int) -> list[tuple[Leaf, Site, str]]:
        """Every leaf of a gate with the site it reads and the name of its decision; one that several interventions share reads once."""
        found: dict[str, tuple[Leaf, Site, str]] = {}
        order: dict[int, int] = {}
        for one in self.interventions:
            one.decisions = []
            for leaf in one.gate.leaves() if one.gate is not None else ():
                site = leaf.site or one.site
                # strings alone: torch.compile writes other objects in its own way
                name = f"plan {number} gate {order.setdefault(id(leaf), len(order))}@{site}"
                one.decisions.append(name)
                found[name] = (leaf, site, name)
        return list(found.values())

    def _check_model(self, anatomy: Anatomy | None, points: list[HookPoint]) -> None:
        for intervention, point in zip(self.interventions, points, strict=True):
            if point.width is not None and point.width != intervention.operator.width:
                raise width_error(intervention, point.width)
            if anatomy is not None and point.site.module is None:
                intervention.operator.check_model(anatomy)
        if self.fingerprint is None or anatomy is None:
            return
        found = anatomy.fingerprint()
        differing = {
            key: (value, found.get(key)) for key, value in self.fingerprint.items() if key != "embedding_digest" and value != found.get(key)
        }
        if differing:
            raise WrongModelError(
                "this plan was made for another model",
                expected={key: pair[0] for key, pair in differing.items()},
                found={key: pair[1] for key, pair in differing.items()},
                remedy="load the model named in the plan, or extract the vectors again on this one",
            )
        if None not in (digests := {self.fingerprint.get("embedding_digest"), found["embedding_digest"]}) and len(digests) == 2:
            warnings.warn("this plan was made on other weights of the same architecture (the embeddings differ)", stacklevel=4)

    # ---- driving

    def step(self, step: int) -> None:
        """Sets every strength to what its schedule says at this optimiser step, counted from 0. A callback calls it after each step."""
        step = integer(step)
        whole_number(step, "the optimiser step of a plan")
        self.current_step = step
        for intervention in self.interventions:
            intervention.refresh(step)
        if self._count is not None:
            self._count.refresh()

    def enable(self, on: bool = True, name: str | None = None) -> None:
        """Switches the plan, or one intervention, on or off without touching a hook."""
        of_type(on, bool, "the switch of a plan", "pass True or False; the name of an intervention comes second")
        for intervention in self._named(name):
            intervention.enabled = on
        self.step(self.current_step)

    def set_strength(self, strength: float | Sequence[float] | Tensor, name: str | None = None) -> None:
        """Sets the base strength of the plan or of one intervention; a list gives one per row slot."""
        for intervention in self._named(name):
            base = intervention._strengths(strength)
            if base.numel() not in (1, intervention.base.numel()):
                slots = intervention.base.numel()
                raise ConfigError(
                    f"wrong number of strengths for '{intervention.name}'",
                    expected="1" if slots == 1 else f"1 or {slots}",
                    found=base.numel(),
                    remedy="give one number for all rows, or make a new Intervention with that many row slots",
                )
            with torch.inference_mode(False):  # training may follow a validation run
                intervention.base = base.expand_as(intervention.base).clone()
        self.step(self.current_step)

    def set_window(self, start: int | None, stop: int | None, name: str | None = None) -> None:
        """Moves the window of the scopes, such as `generated[:32]`, without touching a hook.

        Args:
            start, stop: as in a slice, None for an open end.
            name: one intervention, None for all.

        Raises:
            ConfigError: a scope without a slice, or with several; a negative bound where the end is not known.
        """
        chosen, start, stop = self._named(name), integer(start), integer(stop)
        for one in chosen:
            one.check_window(start, stop)
        self._move({one: (start, stop) for one in chosen})

    def _move(self, windows: dict[Intervention, tuple[int | None, int | None]]) -> None:
        """Sets windows; those that shared one and do so no longer part."""
        for one, window in windows.items():
            if any(other.scope is one.scope and windows.get(other) != window for other in self.interventions):
                one.own_scope()
            one.scope.slices[0].set(*window)
        if self._count is not None:
            self._count.group(self.interventions)

    def set_rows(self, rows: Sequence[int] | Tensor) -> None:
        """Says which slot each row of the next batches uses.

        Args:
            rows: [batch] integers; beams and returned sequences follow the row of their prompt. So a generation over twice as many rows
                counts as two sequences for each: nothing tells it from a batch of other prompts, for which rows have to be set again.
        """
        given = tensor_of(rows, "the row slots of a batch", "pass the slot of every row, counted from 0")
        if given.numel() and (given.is_floating_point() or given.is_complex()):
            raise ConfigError(
                "row slots are no whole numbers",
                expected="the slot of every row, counted from 0",
                found=rows,
                remedy="e.g. set_rows([0, 1, 1])",
            )
        if all(one.slots == 1 for one in self.interventions):
            raise ConfigError(
                "this plan has no row slots",
                expected="an intervention with several vectors or strengths",
                found="one vector and one strength in each",
                remedy="make it with strength=[...] or with vectors of shape [slots, width]",
            )
        rows = given.to(torch.long).reshape(-1)
        for intervention in self.interventions:
            if intervention.slots == 1:
                continue
            if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= intervention.slots:
                raise ConfigError(
                    f"row slots of '{intervention.name}' are out of range",
                    expected=f"0 to {intervention.slots - 1}",
                    found=rows.tolist() or "no rows",
                    remedy="give the slot of every row of the batch, counted from 0",
                )
            with torch.inference_mode(False):  # training may follow a validation run
                here = rows.to(intervention.effective.device, copy=True)
                if intervention.rows is None or intervention.rows.shape != here.shape:
                    intervention.rows = here
                intervention.rows.copy_(here)

    def _named(self, name: str | None) -> list[Intervention]:
        chosen = [intervention for intervention in self.interventions if name in (None, intervention.name)]
        if not chosen:
            known, remedy = [one.name for one in self.interventions], "choose one of these, or leave the name out to mean all of them"
            raise ConfigError(f"no intervention is called '{name}'", expected=f"one of {', '.join(known)}", found=name, remedy=remedy)
        return chosen

    def parameters(self) -> list[nn.Parameter]:
        """What is being learned, for an optimiser; empty unless an operator or a gate was made learnable with `train()`."""
        return list({id(tensor): tensor for one in self.interventions for tensor in one.parameters.values()}.values())

    # ---- looking

    def fired(self) -> dict[str, int]:
        """On how many tokens each intervention acted since the attach, with a strength other than 0 (passes, in a model without tokens)."""
        if self._count is None:
            wanted, remedy = "a plan that is or was on a model", "call plan.attach(model) first"
            raise AttachError("this plan was never attached", expected=wanted, found="no attach so far", remedy=remedy)
        return self._count.read()

    @property
    def passes(self) -> int:
        """Forward passes that went through the plan since the attach."""
        return 0 if self._count is None else int(self._count.passes)

    def explain(self) -> str:
        """The plan in words: what acts where, on which tokens, when and how strongly."""
        state = "attached" if self.is_attached else "not attached"
        lines = [f"plan of {len(self.interventions)} intervention(s), {state}, step {self.current_step}"]
        for number, one in enumerate(self.interventions, 1):
            strength = ", ".join(f"{value:.4g}" for value in one.effective.tolist())
            path = f" ({self._paths[one.name]})" if one.name in self._paths else ""
            lines.append(f"{number}. {one.name}: {one.operator.describe()} at {one.site}{path}, width {one.operator.width}")
            lines.append(f"   strength {strength} now ({one.schedule}){'' if one.enabled else ', switched off'}")
            lines.append(f"   on {one.scope} tokens, in {', '.join(one.phases)}, for the {' and '.join(one.roles)} pass")
            modifiers = [f"gate {one.gate}"] * (one.gate is not None) + ["norm preserved"] * one.preserve_norm
            if one.parameters:
                modifiers.append(f"learned: {', '.join(one.parameters)}")
            if modifiers:
                lines.append(f"   {'; '.join(modifiers)}")
        return "\n".join(lines)

    # ---- keeping

    def state_dict(self) -> dict[str, Any]:
        """What changes while a plan runs: step, strengths, switches, windows, and tensors that are being learned. `save` has it all."""
        return {"step": self.current_step, "interventions": {one.name: one.state() for one in self.interventions}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when the state belongs to a plan with other interventions."""
        names = [one.name for one in self.interventions]
        if set(state["interventions"]) != set(names):
            raise ConfigError(
                "this state belongs to another plan",
                expected=f"the interventions {', '.join(names)}",
                found=", ".join(state["interventions"]) or "no interventions",
                remedy="load it into the plan that it was saved from, or one made in the same way",
            )
        saved = {one: state["interventions"][one.name] for one in self.interventions}
        for one, own in saved.items():
            one.check_state(own)
        windows = {one: own["window"] for one, own in saved.items() if own["window"] is not None}
        for one, window in windows.items():
            one.check_window(*window)
        for one, own in saved.items():
            one.load_state(own)
        self._move(windows)
        self.step(int(state["step"]))

    def save(self, path: str | Path) -> Path:
        """Writes manifest.json and tensors.safetensors (one file when the path ends in .safetensors), atomically."""
        tensors = {f"{i}.{key}": tensor for i, one in enumerate(self.interventions) for key, tensor in one.files().items()}
        ones = [one.to_dict() for one in self.interventions]
        manifest = {"fingerprint": self.fingerprint, "step": self.current_step, "interventions": ones, "shared": self._shared()}
        return files.save_artifact(path, "plan", tensors, manifest)

    def _shared(self) -> dict[str, str]:
        """Parameters that stand in several places, by the name in the file of each later place: the name of the first."""
        first: dict[int, str] = {}
        places = [(f"{i}.{name}", tensor) for i, one in enumerate(self.interventions) for name, tensor in one.parameters.items()]
        return {name: there for name, tensor in places if (there := first.setdefault(id(tensor), name)) != name}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises DamagedFileError, UnsafeFileError, WrongKindError or NonFiniteError; the model is checked on attach."""
        manifest, tensors = files.load_artifact(path, "plan")
        try:
            ones = [
                Intervention.from_dict(
                    spec, {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.split(".")[0] == str(i)}
                )
                for i, spec in enumerate(manifest["interventions"])
            ]
            places = {f"{i}.{name}": (one, name) for i, one in enumerate(ones) for name in one.parameters}
            for later, first in manifest["shared"].items():
                (one, name), (other, there) = places[later], places[first]
                one.tie(name, other.parameters[there])
        except (KeyError, TypeError) as error:
            raise DamagedFileError(
                f"plan '{path}' lacks a part",
                expected="for every intervention its tensors, operator, site and settings",
                found=repr(error),
                remedy="restore it from a backup, or make the plan and save it again",
            ) from error
        plan = cls(ones, fingerprint=manifest.get("fingerprint"))
        plan.step(manifest.get("step", 0))  # older files do not say
        return plan
