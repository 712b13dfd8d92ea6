"""Operators: what an intervention does to an activation.

A new one is a file in `steer.intervene.operators`, or in the folder `operators` of another room whose subject it is, with one registered
subclass of `Operator`; plan files, the command line, the docs tables and the tests find it in `OPERATORS`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from steer.checks import integer, of_type, tensor_of, whole_number
from steer.errors import ConfigError, NonFiniteError, did_you_mean
from steer.intervene.file_form import with_tuples, with_tuples_marked
from steer.intervene.scope import Scope
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.registry import Registry

RowTensors = Mapping[str, Tensor]  # tensors by name, [batch or 1, ...]: for each row of a batch those of its row slot
FORMULAS = ("apply", "delta", "change", "factor", "read_and_write", "reads", "writes")  # by which a subclass may say what an edit is


class TensorHolder:
    """Holds the tensors that an operator or a gate works with.

    Attributes:
        name: under which it is registered.
        tensors: fp32 tensors by name, [row slots, ...] each; 1 slot when all rows share them.
        width: size of the activation's last dimension.
        learnable: names of the tensors that `train` may turn into parameters.

    Raises:
        ConfigError: no tensors, or a class without a registered name. NonFiniteError.
    """

    name: ClassVar[str]
    learnable: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tensors: dict[str, Tensor], width: int) -> None:
        _check_constructed(type(self), tensors, width)
        with torch.inference_mode(False):  # what inference mode made cannot have a part in training later
            self.tensors = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in tensors.items()}
        self.width = width
        for name, tensor in tensors.items():
            check_finite(tensor, f"{name} of '{type(self).name}'")

    def train(self) -> Self:
        """Makes the learnable tensors parameters, which `Plan.parameters` hands to an optimiser.

        Raises:
            ConfigError: there are none, or one that it does not have or that is of whole numbers.
        """
        if not self.learnable:
            raise _nothing_to_learn(self.name)
        for name in self.learnable:  # all of them, before anything changes
            if name not in self.tensors or not self.tensors[name].is_floating_point():
                raise _not_learnable(self.name, name, self.tensors)
        for name in self.learnable:
            if not isinstance(self.tensors[name], nn.Parameter):  # a parameter may be in an optimiser already
                self.tensors[name] = nn.Parameter(self.tensors[name])
        return self

    def __repr__(self) -> str:
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in vars(self).get("tensors", {}).items()]
        learned = [f"learned: {', '.join(self.parameters)}"] if shapes and self.parameters else []
        return f"{type(self).__name__}({', '.join([*shapes, *learned])})"

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that are being learned, by name, in the order of `learnable`: the state of an optimiser knows them by place, and
        a file returns them in another order than the constructor."""
        names = (*self.learnable, *sorted(self.tensors))
        return {name: tensor for name in names if isinstance(tensor := self.tensors.get(name), nn.Parameter)}

    def on(self, device: torch.device) -> Self:
        """This holder when its tensors are on a device, else a copy with tensors there. Parameters are moved and stay the same objects,
        which an optimiser may know."""
        for parameter in self.parameters.values():
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
        if all(tensor.device == device for tensor in self.tensors.values()):
            return self
        moved = copy.copy(self)
        with torch.inference_mode(False):  # training may follow a validation run
            moved.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}  # a parameter is there, and stays itself
        return moved

    def copy(self, memo: dict[int, Tensor]) -> Self:
        """One like it with tensors of its own; parameters stay those that an optimiser knows.

        Args:
            memo: copies by id of the original, one for all holders that are copied together: a tensor that they share stays one.
        """
        copied = copy.copy(self)
        with torch.inference_mode(False):  # training may follow
            for tensor in self.tensors.values():
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        copied.tensors = {name: memo[id(tensor)] for name, tensor in self.tensors.items()}
        return copied

    def options(self) -> dict[str, Any]:
        """Constructor arguments beyond the tensors, JSON-able, for the plan file."""
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuilds it from its file form: the constructor takes the tensors by their names."""
        arguments: dict[str, Any] = {**tensors, **options}
        return cls(**arguments)


class Operator(TensorHolder):
    """A pure, differentiable function of the activation, driven by tensors that may change between calls without recompilation.

    A subclass says how an activation changes, in `delta`. One that can do better than to make the change and add it overrides `apply`.

    Attributes:
        parts: names of the tensors it cannot do without, of which the first is [slots, ..., width], as wide as its site.
        settings: names of its other attributes that a file has to hold, JSON-able; tuples come back as tuples.
        additive: its change is strength * `vector`, whatever the activation.
        linear_in_strength: its change is strength times a function of the activation, so that a mask may be multiplied into the strength.
        slots: number of row slots, 1 when every row is treated alike.
        short_paths: names of the methods that say the edit once more, for kernels. A subclass that overrides a formula loses those that it
            inherits, since they stand for another edit.

    Raises:
        ConfigError: tensors with different numbers of row slots; `parts` that it does not have.

    Example:
        >>> from steer.intervene.operator import slotted
        >>> @steer.intervene.OPERATORS.register("tilt")
        ... class Tilt(steer.intervene.Operator):  # h + strength * |h| v
        ...     parts = ("vector",)
        ...
        ...     def __init__(self, vector):
        ...         super().__init__({"vector": slotted(vector, 2, "a vector to tilt along")}, vector.shape[-1])
        ...
        ...     def delta(self, h, strength, per_row):
        ...         return strength * h.norm(dim=-1, keepdim=True) * per_row["vector"]
        >>> plan = steer.Plan(steer.Intervention(Tilt(vector), "layers.12.output"))
    """

    parts: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = False
    linear_in_strength: ClassVar[bool] = False
    short_paths: ClassVar[tuple[str, ...]] = ("fused",)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        general = next(base for base in cls.__mro__ if "short_paths" in vars(base))
        for path in cls.short_paths:
            if getattr(cls, path) is not getattr(general, path) and not is_current(cls, path, *FORMULAS):
                setattr(cls, path, getattr(general, path))

    def __init__(self, tensors: dict[str, Tensor], width: int) -> None:
        super().__init__(tensors, width)
        _check_parts(type(self), tensors, width)
        self.slots = same_slots(self.name, **tensors)

    def delta(self, h: Tensor, strength: Tensor, per_row: RowTensors) -> Tensor:
        """The change of an activation at full mask, in the dtype of h, [batch, tokens, width] or what broadcasts to it.

        Args:
            h: [batch, tokens, width].
            strength: [batch or 1, 1, 1] fp32; the change is exactly 0 where it is 0.
            per_row: the tensors of each row of the batch.
        """
        raise NotImplementedError

    def apply(self, h: Tensor, strength: Tensor, mask: Tensor | None, per_row: RowTensors) -> Tensor:
        """[batch, tokens, width] the edited activation, in its own dtype.

        Args:
            h, strength, per_row: as in `delta`; strength 0 leaves h exactly as it is.
            mask: [batch, tokens, 1] from 0 to 1 in the dtype of h, None for 1 everywhere. 0 leaves a token exactly as it is; values in
                between, from soft gates and decay, add that share of the change.
        """
        change = self.delta(h, strength, per_row)
        return h + change if mask is None else torch.addcmul(h, mask, change)

    def fused(self, h: Tensor, strength: Tensor, mask: Tensor | None, rows: Tensor | None, preserve_norm: bool) -> Tensor | None:
        """The same edit by a kernel of `steer.kernels`, which can also keep the norm of each token; None where there is no such kernel.

        Asked in compiled code, and in eager code on a GPU where tokens are many enough (`steer.kernels.dispatch.wanted`).

        Args:
            h, strength, mask: as in `apply`.
            rows: [batch] row slot of each row; None when all rows share one.
            preserve_norm: give each token the norm that it had.
        """
        return None

    def options(self) -> dict[str, Any]:
        missing = [name for name in self.settings if not hasattr(self, name)]
        if missing:
            raise _missing_setting(self.name, missing[0])
        return {name: with_tuples_marked(getattr(self, name)) for name in self.settings}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """Rebuilds it from its file form to the bit: the tensors are what the constructor once made of its arguments."""
        missing = [name for name in (*cls.parts, *cls.settings) if name not in tensors and name not in options]
        if missing:
            raise KeyError(f"{missing[0]} of '{cls.name}'")
        unknown = options.keys() - set(cls.settings)
        if unknown:
            raise TypeError(f"'{cls.name}' has no setting '{min(unknown)}'")
        restored = cls.__new__(cls)
        vars(restored).update({name: with_tuples(options[name]) for name in cls.settings})
        Operator.__init__(restored, tensors, tensors[cls.parts[0]].shape[-1])
        return restored

    @property
    def reads_at(self) -> Site | None:
        """An earlier site that the edit depends on, whose activation a pass adds to `per_row` as `read`; None for the edited one alone.

        Before any pass, when it is tried, there is no `read`, and the edited activation stands in for it.
        """
        return None

    def narrowed(self, scope: Scope) -> Scope:
        """The tokens of a scope on which it can act: less than all where it was made without some. The same again for what it gives."""
        return scope

    def check_site(self, site: Site) -> None:
        """Raises SiteError where it would mean something else than it says."""

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises ConfigError on a decoder for which it was not made; asked at each attach, at sites that are named by their layer."""

    def words(self) -> dict[str, Any] | None:
        """What a text says of it, for `OperatorSource.operator` of what it was made of: JSON-able values by word; None for no such text."""
        return None

    def is_affine(self) -> bool:
        """The edit is an affine function of the activation at every strength, so that weights can carry it (`steer.bake`)."""
        return False

    def describe(self) -> str:
        """One phrase for `Plan.explain()`."""
        return type(self).name


def is_current(kind: type[Operator], path: str, *formulas: str) -> bool:
    """No class below the one from which an operator has a method, its short path, overrides a formula that the path stands for."""

    def depth(name: str) -> int:
        return next((depth for depth, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))

    return all(depth(path) <= depth(formula) for formula in formulas)


OPERATORS: Registry[type[Operator]] = Registry(
    "operator",
    "steer.intervene.operators",
    "steer.operators",
    further=("steer.features.operators", "steer.circuits.operators"),
    subclass_of=Operator,
)


def tensors_of_rows(tensors: Mapping[str, Tensor], rows: Tensor | None) -> RowTensors:
    """The tensors of each row of a batch, [batch or 1, ...]. rows: [batch] row slots, None when all rows share one."""
    if rows is None:
        return tensors
    return {name: tensor if tensor.shape[0] == 1 else tensor[rows] for name, tensor in tensors.items()}


# ---- checks of what a subclass hands over


def check_initialised(holder: TensorHolder, kind: str) -> None:
    """Raises ConfigError for an operator or a gate whose constructor did not call that of its base class."""
    missing = [name for name in ("tensors", "width", "slots")[: 3 if kind == "operator" else 2] if name not in vars(holder)]
    if missing:
        raise _not_initialised(type(holder), kind, missing[0])


def _check_constructed(kind: type[TensorHolder], tensors: Any, width: Any) -> None:
    if not isinstance(getattr(kind, "name", None), str):
        raise _without_name(kind)
    of_type(tensors, dict, f"the tensors of '{kind.name}'", "pass {name: tensor} to super().__init__")
    whole_number(integer(width), f"the width of '{kind.name}'", least=1)
    if not isinstance(kind.learnable, tuple) or not all(isinstance(name, str) for name in kind.learnable):
        raise _wrong_learnable(kind.name, kind.learnable, tensors)
    for name, tensor in tensors.items():
        is_plain = isinstance(tensor, Tensor) and not tensor.is_meta and not tensor.is_complex() and tensor.layout is torch.strided
        if not is_plain or not tensor.dim():
            raise _unfit_tensor(kind.name, name, tensor)


def _check_parts(kind: type[Operator], tensors: dict[str, Tensor], width: int) -> None:
    parts = getattr(kind, "parts", ())
    if not isinstance(parts, tuple) or not parts or not set(parts) <= tensors.keys():
        raise _wrong_parts(kind.name, parts, tensors)
    first = tensors[parts[0]]
    if first.dim() < 2 or first.shape[-1] != width:
        raise _no_slots(kind.name, parts[0], first, width)


# ---- what constructors make of their arguments


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises NonFiniteError with the number of bad entries."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = int((~finite).sum())
        raise NonFiniteError(
            f"{what} is not finite",
            expected="finite numbers",
            found=f"{bad} of {tensor.numel()} entries are NaN or infinite",
            remedy="give finite numbers; overflow in half precision and division by zero are the usual causes",
        )


def same_slots(what: str, **tensors: Tensor) -> int:
    """The number of row slots of tensors of which some may have one for all. Raises ConfigError when they differ."""
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
    most = max(sizes.values())
    if not set(sizes.values()) <= {1, most}:
        raise _different_slots(what, sizes, most)
    return most


def slotted(tensor: Tensor, ndim: int, what: str) -> Tensor:
    """fp32 copy of a tensor with `ndim` dimensions, a slot dimension put in front where it is missing."""
    tensor = tensor_of(tensor, what, "pass the vector itself, e.g. Add(direction.vector)")
    if tensor.dim() == ndim - 1:
        tensor = tensor[None]  # [1, ...]
    if tensor.dim() != ndim or 0 in tensor.shape:
        raise _wrong_shape(what, ndim, tensor)
    check_finite(tensor, what)
    return tensor.detach().to(torch.float32, copy=True).contiguous()


# ---- errors


def _without_name(kind: type[TensorHolder]) -> ConfigError:
    return ConfigError(
        f"'{kind.__name__}' has no name, by which plan files would know it",
        expected="a registered class",
        found=f"{kind.__module__}.{kind.__qualname__}",
        remedy="decorate the class with @OPERATORS.register('<name>'), or @GATES.register for a gate",
    )


def _not_initialised(kind: type[TensorHolder], what: str, missing: str) -> ConfigError:
    return ConfigError(
        f"{what} '{getattr(kind, 'name', kind.__name__)}' was not initialised",
        expected=f"`{missing}`, which the constructor of its base class sets",
        found=f"a constructor of {kind.__name__} that does not call it",
        remedy="call super().__init__({'vector': vector[None]}, width) in the constructor",
    )


def _unfit_tensor(kind: str, name: str, tensor: Any) -> ConfigError:
    found = f"{tensor.dtype} of the shape {list(tensor.shape)}, {tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else None
    return ConfigError(
        f"'{name}' of '{kind}' is no tensor to work with",
        expected="a dense tensor of real numbers in memory, [row slots, ...], 1 slot when all rows share it",
        found=found or f"{type(tensor).__name__} {str(tensor)[:60]!r}",
        remedy="make it with torch.as_tensor, and put the slot dimension in front: vector[None]",
    )


def _wrong_parts(kind: str, parts: Any, tensors: Mapping[str, Tensor]) -> ConfigError:
    return ConfigError(
        f"operator '{kind}' does not say by `parts` which tensors it needs",
        expected=f"a tuple with some of {', '.join(tensors) or 'its tensors'}, the one as wide as its site first",
        found=repr(parts) if parts != () else "no `parts`",
        remedy=f"write parts = ({next(iter(tensors), 'vector')!r},) into the class",
    )


def _wrong_learnable(kind: str, learnable: Any, tensors: Mapping[str, Tensor]) -> ConfigError:
    return ConfigError(
        f"'{kind}' does not say by `learnable` which tensors can be learned",
        expected=f"a tuple with some of {', '.join(tensors) or 'its tensors'}, or an empty one",
        found=repr(learnable),
        remedy=f"write learnable = ({next(iter(tensors), 'vector')!r},) into the class; a tuple of one name needs its comma",
    )


def _not_learnable(kind: str, name: str, tensors: Mapping[str, Tensor]) -> ConfigError:
    return ConfigError(
        f"'{name}' of '{kind}' cannot be learned",
        expected=f"`learnable` with names of its tensors in floating point: {', '.join(tensors) or 'none'}",
        found=f"a tensor of {tensors[name].dtype}" if name in tensors else f"no tensor '{name}'",
        remedy=did_you_mean(name, tensors) or "correct `learnable` in the class, or make the tensor with .float()",
    )


def _no_slots(kind: str, name: str, tensor: Tensor, width: int) -> ConfigError:
    return ConfigError(
        f"'{name}' of operator '{kind}' has the wrong shape",
        expected=f"[row slots, ..., {width}], 1 slot when all rows share it",
        found=list(tensor.shape),
        remedy="put the slot dimension in front, vector[None], and give super().__init__ the width of the last one",
    )


def _missing_setting(kind: str, name: str) -> ConfigError:
    return ConfigError(
        f"operator '{kind}' lacks its setting '{name}'",
        expected="an attribute for each of its `settings`",
        found="none of that name",
        remedy="set it in the constructor, or take it out of `settings`",
    )


def _nothing_to_learn(name: str) -> ConfigError:
    return ConfigError(
        f"'{name}' has nothing to learn",
        expected="an operator or a gate with learnable tensors, such as add, loreft, scale or a soft probe",
        found=name,
        remedy="train one of those, or extract the vectors of this one",
    )


def _different_slots(what: str, sizes: dict[str, int], most: int) -> ConfigError:
    return ConfigError(
        f"row slots of the tensors of '{what}' differ",
        expected=f"1 or {most} in each",
        found=", ".join(f"{size} in {name}" for name, size in sizes.items()),
        remedy="give every tensor one entry per row slot, or one for all of them",
    )


def _wrong_shape(what: str, ndim: int, tensor: Tensor) -> ConfigError:
    return ConfigError(
        f"{what} has the wrong shape",
        expected=f"{ndim - 1} dimensions, or {ndim} with row slots, none of them empty",
        found=list(tensor.shape),
        remedy="reshape it so that the width of the site comes last, and row slots first",
    )
