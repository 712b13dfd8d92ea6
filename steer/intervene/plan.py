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
from steer.errors import AttachError, ConfigError, DamagedFileError, WrongModelError
from steer.intervene.intervention import Intervention, width_error
from steer.model import hooks
from steer.model.anatomy import Anatomy, HookPoint, resolve
from steer.model.context import ForwardContext, in_backward
from steer.model.site import Site


class Plan:
    """Interventions, in the order in which those on one site are applied.

    Args:
        interventions: at least one; names must differ (repeated default names are numbered).
        fingerprint: `Anatomy.fingerprint()` of the model the vectors were made on; checked on attach when given.
    """

    def __init__(self, interventions: Sequence[Intervention] | Intervention, *, fingerprint: dict[str, Any] | None = None) -> None:
        self.interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        if not self.interventions:
            remedy = "pass an Intervention, or a list of them"
            raise ConfigError("a plan without interventions steers nothing", expected="at least one", found="none", remedy=remedy)
        self.fingerprint = fingerprint
        self.current_step = 0
        self._attached: Callable[[], None] | None = None
        self._count: _Count | None = None
        self._paths: dict[str, str] = {}
        names: set[str] = set()
        for intervention in self.interventions:
            base, number = intervention.name, 2
            while intervention.name in names:
                intervention.name, number = f"{base}#{number}", number + 1
            names.add(intervention.name)
        self.step(0)

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
        theirs = [] if other is None else [tap.act for tap in other.taps if isinstance(tap.act, _SiteAct)]
        if theirs and not stack:
            raise AttachError(
                "another plan is attached to this model",
                expected="a model without a plan, or stack=True",
                found=f"a plan of {', '.join(one.name for act in theirs for one in act.interventions)}",
                remedy="detach it, or pass stack=True to have both",
            )
        anatomy, points = resolve(model, [Site.parse(intervention.site) for intervention in self.interventions])
        self._check_model(anatomy, points)
        first = next(model.parameters(), torch.empty(0))
        groups: dict[Any, tuple[HookPoint, list[Intervention]]] = {}
        for intervention, point in zip(self.interventions, points, strict=True):
            intervention.move(next(point.module.parameters(), first).device)
            key = (id(point.module), point.side, None if point.columns is None else str(point.site))
            groups.setdefault(key, (point, []))[1].append(intervention)
            self._paths[intervention.name] = point.path
        self._count = count = _Count(self.interventions, first)
        acts: list[tuple[HookPoint, hooks.Act]] = [(point, _SiteAct(group, count)) for point, group in groups.values()]
        watcher, remove = hooks.install(model, anatomy, acts)
        watcher.on_open.append(count.prepare)
        watcher.on_close.append(count)

        def detach() -> None:
            watcher.on_open.remove(count.prepare)
            watcher.on_close.remove(count)
            ours = [tap for tap in watcher.taps if any(tap.act is act for _, act in acts)]
            missed = [str(tap.point.site) for tap in ours if tap.place == "anywhere" and not tap.ever]
            if missed and count.reached and not watcher.replays:
                warnings.warn(f"{', '.join(missed)} never ran while the plan was attached: nothing was steered there", stacklevel=4)
            remove()

        self._attached = detach
        return self

    def detach(self) -> None:
        """Takes the hooks off. `fired()` stays readable. Raises AttachError when the plan is not attached."""
        if self._attached is None:
            raise AttachError(
                "this plan is not attached",
                expected="a plan that is on a model",
                found="one that is on none",
                remedy="call plan.attach(model) first",
            )
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

    def _check_model(self, anatomy: Anatomy | None, points: list[HookPoint]) -> None:
        for intervention, point in zip(self.interventions, points, strict=True):
            if point.width is not None and point.width != intervention.operator.width:
                raise width_error(intervention, point.width)
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
        """Sets every strength to what its schedule says at this optimiser step."""
        self.current_step = step
        for intervention in self.interventions:
            intervention.refresh(step)
        if self._count is not None:
            self._count.refresh()

    def enable(self, on: bool = True, name: str | None = None) -> None:
        """Switches the plan, or one intervention, on or off without touching a hook."""
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

    def set_rows(self, rows: Sequence[int] | Tensor) -> None:
        """Says which slot each row of the next batches uses.

        Args:
            rows: [batch] integers; beams and returned sequences follow the row of their prompt.
        """
        rows = torch.as_tensor(rows, dtype=torch.long).reshape(-1)
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
            raise ConfigError(
                f"no intervention is called '{name}'",
                expected=f"one of {', '.join(one.name for one in self.interventions)}",
                found=name,
                remedy="choose one of these, or leave the name out to mean all of them",
            )
        return chosen

    # ---- looking

    def fired(self) -> dict[str, int]:
        """On how many tokens each intervention acted since the attach, with a strength other than 0 (passes, in a model without tokens)."""
        if self._count is None:
            raise AttachError(
                "this plan was never attached",
                expected="a plan that is or was on a model",
                found="no attach so far",
                remedy="call plan.attach(model) first",
            )
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
        return "\n".join(lines)

    # ---- keeping

    def state_dict(self) -> dict[str, Any]:
        """What changes while a plan runs: step, strengths and switches. Vectors are in `save`."""
        ones = {one.name: {"base": one.base.clone(), "enabled": one.enabled} for one in self.interventions}
        return {"step": self.current_step, "interventions": ones}

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
        for one in self.interventions:
            saved = state["interventions"][one.name]
            one.base, one.enabled = saved["base"].clone().cpu(), bool(saved["enabled"])
        self.step(int(state["step"]))

    def save(self, path: str | Path) -> Path:
        """Writes manifest.json and tensors.safetensors (one file when the path ends in .safetensors), atomically."""
        tensors = {f"{i}.{key}": tensor.cpu() for i, one in enumerate(self.interventions) for key, tensor in one.operator.tensors.items()}
        manifest = {"fingerprint": self.fingerprint, "interventions": [one.to_dict() for one in self.interventions]}
        return files.save_artifact(path, "plan", tensors, manifest)

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
        except (KeyError, TypeError) as error:
            raise DamagedFileError(
                f"plan '{path}' lacks a part",
                expected="for every intervention its tensors, operator, site and settings",
                found=repr(error),
                remedy="restore it from a backup, or make the plan and save it again",
            ) from error
        return cls(ones, fingerprint=manifest.get("fingerprint"))


class _SiteAct:
    """All interventions of one plan on one hook point, as one call."""

    def __init__(self, interventions: list[Intervention], count: _Count) -> None:
        self.interventions, self.count = interventions, count
        self.counts = any(one.site.module is not None for one in interventions)

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        for intervention in self.interventions:
            h = intervention(h, ctx)
        if self.counts and not in_backward():
            self.count.call(self.interventions, ctx)
        return h


class _Count:
    """Counts steered tokens. Sites of a decoder are reached in every pass (the watcher proves it), so they are counted once per pass and
    key; any other module may be left out of a pass, so its calls are counted where they happen."""

    def __init__(self, interventions: list[Intervention], like: Tensor) -> None:
        self.dtype, self.reached = like.dtype, False
        groups: dict[Any, list[Intervention]] = {}
        for one in interventions:
            alone = one.slots > 1 or one.site.module is not None
            groups.setdefault(one.name if alone else one.key, []).append(one)
        with torch.inference_mode(False):
            self.groups = [(group, *torch.zeros(2, len(group), dtype=torch.long)) for group in groups.values()]
            self.passes = torch.zeros((), dtype=torch.long)
        self.move(like.device)
        self.refresh()

    def move(self, device: torch.device) -> None:
        """Puts the counts where the model is; it may be moved after the attach."""
        with torch.inference_mode(False):
            self.groups = [(group, counts.to(device), active.to(device)) for group, counts, active in self.groups]
            self.passes = self.passes.to(device)

    def refresh(self) -> None:
        """Notes which interventions have a strength other than 0."""
        for group, _, active in self.groups:
            active.copy_(torch.tensor([bool((one.effective != 0).any()) for one in group]))

    def prepare(self, ctx: ForwardContext) -> None:
        self.reached = True
        if ctx.device is not None and ctx.device != self.passes.device:
            self.move(ctx.device)
        for group, _, _ in self.groups:
            if ctx.tokens:
                group[0].prepare(ctx, self.dtype)

    def __call__(self, ctx: ForwardContext) -> None:
        self.passes.add_(1)
        for group, counts, active in self.groups:
            if group[0].site.module is None:
                self._add(group[0], counts, active, ctx)

    def call(self, interventions: list[Intervention], ctx: ForwardContext) -> None:
        self.reached = True
        for group, counts, active in self.groups:
            if any(group[0] is one for one in interventions):
                self._add(group[0], counts, active, ctx)

    def _add(self, one: Intervention, counts: Tensor, active: Tensor, ctx: ForwardContext) -> None:
        mask = one.tokens(ctx)
        if mask is False:
            return
        if one.slots > 1 and ctx.tokens:
            acting = (one.effective != 0).expand(one.slots)[one.rows_of(ctx, ctx.batch)][:, None].expand(-1, ctx.tokens)
            mask = acting if mask is True else mask & acting
        counts.add_(active * (mask.sum() if isinstance(mask, Tensor) else max(ctx.batch * ctx.tokens, 1)))

    def read(self) -> dict[str, int]:
        return {one.name: int(count) for group, counts, _ in self.groups for one, count in zip(group, counts, strict=True)}
