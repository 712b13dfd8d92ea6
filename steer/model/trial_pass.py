"""A trial pass: a few random tokens go through a model once, to see how its modules are called and what they give.

Nothing of the model is changed by it and nobody is told: evaluation mode, no gradients, no autocast, random numbers as before, and the
hooks of everybody but those that bring weights where they are needed (sharding, offloading) are put aside.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.model.devices import input_device
from steer.model.hook_registration import OwnHook
from steer.model.restoring import restoring, restoring_all

# few and different, so that the axes of a tensor can be told apart
ROWS, TOKENS = 3, 5
_LARGEST_BUFFER = 1 << 22  # numbers in a buffer that is copied before a pass
# packages whose hooks move weights; without them a pass would not run
_CARRIERS = ("torch", "accelerate", "deepspeed")

Argument = int | str  # of a call: its place, or its name
# by module: what its forward was said to take
EXAMPLES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class Run(Protocol):
    """One way to run a model: calls before(module, args, kwargs) and after(module, args, kwargs, output) around every call of some modules.

    change: gives other arguments for the model, from those of this way by name.
    """

    def __call__(
        self, modules: Sequence[nn.Module], before: Any, after: Any, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None, /
    ) -> None: ...


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the forward of a module gives them, `*0`, `*1` ... where it gives none."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:  # it is called in a way that its signature does not show
        return dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"*{place}": entry for place, entry in enumerate(value)}
        else:
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def by_place(named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call again, of what `named_arguments` gave: by name, but for those without one and what comes before them."""
    names = list(named)
    placed = max((number + 1 for number, name in enumerate(names) if name.startswith("*")), default=0)
    return tuple(named[name] for name in names[:placed]), {name: named[name] for name in names[placed:]}


def first_tensor(value: Any) -> Tensor | None:
    """What a site reads of a module's output: a tensor, or the first entry of a tuple or list."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Argument, Tensor]:
    """The floating-point tensors that a module was called with, by place or name."""
    given: list[tuple[Argument, Any]] = [*enumerate(args), *kwargs.items()]
    return {place: value for place, value in given if isinstance(value, Tensor) and value.is_floating_point()}


def integers_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Copy of the first argument of a call when that is a tensor of integers, such as token ids."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    return given.detach().clone() if isinstance(given, Tensor) and not given.is_floating_point() else None


def is_transformers_model(module: nn.Module) -> bool:
    """True for a model of transformers; it is not imported for that, which takes a second."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def runners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost models of transformers in a model, with their paths; the model itself where there are none."""
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inside and is_transformers_model(module):
            found.append((path, module))
            inside |= set(module.modules())
    return found or [("", model)]


def obstacle_around(model: nn.Module, path: str) -> str | None:
    """Why a part of a model must not run by itself: FSDP takes the first module that is called for the outermost it has sharded."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    names = path.split(".") if path else []
    for depth in range(len(names)) if fsdp is not None else ():
        outer = model.get_submodule(".".join(names[:depth]))
        if isinstance(outer, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            return f"a {type(outer).__name__} around it is sharded; find its sites before sharding: steer.Anatomy.find(model).parts"
    return None


def token_parameters(module: nn.Module) -> set[str]:
    """Which of the names that transformers gives to token ids and embeddings are arguments of a module."""
    return {"input_ids", "inputs_embeds"} & inspect.signature(module.forward).parameters.keys()


def is_mask_name(name: str) -> bool:
    """The name of an argument that may say which tokens are padding."""
    return any(word in name.lower() for word in ("mask", "pad"))


def example_lead(model: nn.Module) -> tuple[int, int] | None:
    """Sizes of the first two axes of what a model was said to take; None where nothing was said."""
    example = EXAMPLES.get(model)
    entries = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    first = next((entry for entry in entries if isinstance(entry, Tensor) and entry.dim() > 1), None)
    return None if first is None else (first.shape[0], first.shape[1])


def trial_calls(model: nn.Module) -> Iterator[tuple[str, functools.partial[Any]]]:
    """Ways to call a model, the likeliest first, each with a description. All are with the same random tokens."""
    for name, example in (("the example", EXAMPLES.get(model)), ("example_input_array", getattr(model, "example_input_array", None))):
        if example is not None:
            args, kwargs = ((), example) if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,), {})
            yield name, functools.partial(model, *args, **kwargs)
    yield from _transformers_calls(model) if is_transformers_model(model) else _guessed_calls(model)


def _transformers_calls(model: Any) -> Iterator[tuple[str, functools.partial[Any]]]:
    accepted = set(inspect.signature(model.forward).parameters)
    settings = {"use_cache": False} if "use_cache" in accepted or "kwargs" in accepted else {}
    name = getattr(model, "main_input_name", "input_ids")
    decoder = {"decoder_input_ids"} & accepted
    ids, pixels = functools.partial(_random_ids, model), functools.partial(_random_pixels, model)
    wanted: list[tuple[str, Mapping[str, Callable[[], Tensor]]]] = []
    if "input_ids" in accepted or name == "input_ids" and "pixel_values" not in accepted:
        texts: dict[str, Callable[[], Tensor]] = {"input_ids": ids} | dict.fromkeys(decoder, lambda: ids().flip(0))
        wanted.append((f"random tokens, {sorted(texts)}", texts))
        if "pixel_values" in accepted and hasattr(model.config, "vision_config"):
            wanted.append((f"random tokens and pixels, {sorted([*texts, 'pixel_values'])}", {**texts, "pixel_values": pixels}))
    if name == "pixel_values" or "pixel_values" in accepted and "input_ids" not in accepted:
        wanted.append(("random pixels", {"pixel_values": pixels} | dict.fromkeys(decoder, ids)))
    if name == "input_features":
        length = 2 * getattr(model.config, "max_source_positions", 2 * TOKENS)
        bands = getattr(model.config, "num_mel_bins", None) or getattr(model.config, "input_feat_per_channel", 80)
        for shape in ((ROWS, bands, length), (ROWS, length, bands)):
            features = functools.partial(_random, model, *shape)
            wanted.append((f"random audio features {list(shape)}", {"input_features": features} | dict.fromkeys(decoder, ids)))
    if name == "input_values" and (strides := getattr(model.config, "conv_stride", None)):
        sound = functools.partial(_random, model, ROWS, 12 * math.prod(strides))
        wanted.append(("random sound", {"input_values": sound} | dict.fromkeys(decoder, ids)))
    for description, inputs in wanted:
        with suppress(AttributeError, TypeError, ValueError):  # its config has no such sizes
            given = {argument: make() for argument, make in inputs.items()}
            is_text = "input_ids" in given
            yield description, functools.partial(model, **given, **(settings if is_text else {}))


def _guessed_calls(model: nn.Module) -> Iterator[tuple[str, functools.partial[Any]]]:
    """Calls of a module nobody knows, with what its first layers take."""
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    by_name = first is not None and first.kind is first.KEYWORD_ONLY
    for description, tensor in _guessed_inputs(model):
        for filled, others in _other_arguments(model):
            given = {first.name: tensor} if first is not None and by_name else {}
            yield description + filled, functools.partial(model, *(() if by_name else (tensor,)), **given, **others)


def _guessed_inputs(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if embeddings:
        ids = _random_ids(model, min(module.num_embeddings for module in embeddings))
        yield f"token ids [{ROWS}, {TOKENS}]", ids
    size = next((module.in_features for module in model.modules() if isinstance(module, nn.Linear)), None)
    if size is not None:
        yield f"numbers [{ROWS}, {TOKENS}, {size}]", _random(model, ROWS, TOKENS, size)
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if channels is not None:
        yield f"pixels [{ROWS}, {channels}, 32, 32]", _random(model, ROWS, channels, 32, 32)


def _other_arguments(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Masks and positions for the arguments that follow the first, with a description: first those that may be left out, too."""
    following = list(inspect.signature(model.forward).parameters.values())[1:]
    named = [parameter for parameter in following if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    masks = [parameter for parameter in named if is_mask_name(parameter.name)]
    positions = {p.name: _positions(model) for p in named if p.default is p.empty and "pos" in p.name.lower()}
    needed = [parameter for parameter in masks if parameter.default is parameter.empty]
    for chosen in [masks, needed] if len(needed) < len(masks) else [needed]:
        if not chosen:
            yield " and their positions" * bool(positions), positions
            continue
        for real in (False, True) if any("pad" in parameter.name for parameter in chosen) else (True, False):
            for kind in (torch.bool, torch.long):  # some are inverted by ~, some subtracted from 1
                mask = torch.full((ROWS, TOKENS), real, dtype=kind, device=input_device(model))
                yield f" and a mask of {real}, {kind}", {**positions, **{parameter.name: mask for parameter in chosen}}


def _positions(model: nn.Module) -> Tensor:
    return torch.arange(TOKENS, device=input_device(model)).expand(ROWS, TOKENS)


def _random(model: nn.Module, *shape: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), numbers)
    return numbers.to(input_device(model), like.dtype)


def _random_ids(model: Any, size: int | None = None) -> Tensor:
    """[rows, tokens] of ordinary tokens, all different where the vocabulary is large enough."""
    special: set[Any] = set()
    if size is None:
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:
            embedding = None
        size = int(getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size)
        configs = [model.config, model.config.get_text_config()]
        special = {value for config in configs for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))
                   if isinstance(value, int)}  # fmt: skip
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    ordinary = [number for number in order if number not in special] or order
    rows = ROWS * getattr(getattr(model, "config", None), "num_codebooks", 1)  # each of which has a row of its own
    chosen = (ordinary * (rows * TOKENS))[: rows * TOKENS]
    return torch.tensor(chosen, device=input_device(model)).view(rows, TOKENS)


def _random_pixels(model: Any) -> Tensor:
    config = next((part for name in ("vision_config", "encoder") if (part := getattr(model.config, name, None)) is not None), model.config)
    size = config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _random(model, ROWS, getattr(config, "num_channels", 3), height, width)


# ---- the surroundings


def trial_passes(model: nn.Module) -> Iterator[tuple[str, Run]]:
    """Passes to try, each with a description.

    Where a pass fails without the hooks that others have on the model, which may move tensors between devices, it is tried with them.
    """
    for description, call in trial_calls(model):
        for keep_hooks in (False, True) if _has_foreign_hooks(model) else (False,):
            yield description + " and the hooks on it" * keep_hooks, functools.partial(_run, model, call, keep_hooks)


def _run(
    model: nn.Module,
    call: functools.partial[Any],
    keep_hooks: bool,
    modules: Sequence[nn.Module],
    before: Any,
    after: Any,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    if change is not None:
        args, kwargs = by_place(change(named_arguments(model, call.args, call.keywords)))
        call = functools.partial(model, *args, **kwargs)
    with _undisturbed(model, keep_hooks), _hooked(modules, before, after):
        call()


@contextmanager
def _undisturbed(model: nn.Module, keep_hooks: bool) -> Iterator[None]:
    """Surroundings of a trial pass; everything is as before on every exit path."""
    devices = {parameter.device for parameter in model.parameters()}
    cuda = [device for device in devices if device.type == "cuda"]
    kinds = {device.type for device in devices if torch.amp.is_autocast_available(device.type)} | {"cpu"}
    with restoring_all() as restore:
        restore.enter_context(torch.random.fork_rng(devices=cuda))
        restore.enter_context(torch.no_grad())
        for kind in kinds:
            restore.enter_context(torch.autocast(kind, enabled=False))
        restore.enter_context(torch.compiler.set_stance("force_eager"))
        restore.enter_context(without_fast_path())
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        restore.enter_context(_quiet("transformers"))
        restore.enter_context(without_hooks(model, _is_ours if keep_hooks else _is_foreign))
        for module in model.modules():
            if module.training:
                restore.callback(setattr, module, "training", True)
                module.training = False
        restore.callback(_shard_again, model)
        if not is_transformers_model(model):
            restore.enter_context(_kept_buffers(model))
        yield


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Puts buffers back that a forward writes to, such as counters and caches in the module; large ones may be quantised weights."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.numel() <= _LARGEST_BUFFER
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer
            if not buffer.is_meta and not torch.equal(buffer, before):
                buffer.copy_(before)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """torch's TransformerEncoder packs padded texts into nested tensors, and skips the modules in its layers, where it can."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _shard_again(model: nn.Module) -> None:
    """FSDP leaves the weights of its outermost module whole after a pass."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_hooks(model: nn.Module, leaves_out: Callable[[Any], bool]) -> Iterator[None]:
    """Puts hooks aside, and back in their order."""
    before: list[tuple[Any, dict[int, Any]]] = []

    def put_back() -> None:
        for hooks, complete in before:
            hooks.clear()
            hooks.update(complete)

    with restoring(put_back):
        for hooks in _hook_dictionaries(model):
            left_out = [number for number, hook in hooks.items() if leaves_out(hook)]
            if left_out:
                before.append((hooks, dict(hooks)))
            for number in left_out:
                del hooks[number]
        yield


def _hook_dictionaries(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module._forward_pre_hooks
        yield module._forward_hooks


def _has_foreign_hooks(model: nn.Module) -> bool:
    return any(_is_foreign(hook) and not _is_ours(hook) for hooks in _hook_dictionaries(model) for hook in hooks.values())


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, OwnHook)


def _is_foreign(hook: Any) -> bool:
    """It counts, reads or edits, for all we know, and does not come from what brings weights where they are needed."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.split(".")[0] not in _CARRIERS


@contextmanager
def _hooked(modules: Sequence[nn.Module], before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Calls before(module, args, kwargs) and after(module, args, kwargs, output) around every call of some modules."""
    with restoring_all() as restore:
        for module in modules:
            restore.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            restore.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
