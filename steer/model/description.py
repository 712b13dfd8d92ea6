"""Descriptions: what a user says of the layers of a model, and the proof that it is so."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steer.checks import of_type
from steer.errors import AnatomyError, did_you_mean
from steer.model.stacks import Stack, same
from steer.model.trial_pass import first_tensor, trial_passes
from steer.model.writers import BlockParts, Writer

ATTRIBUTE = "steer_description"  # of a class, with the arguments of `describe`


@dataclass(frozen=True, eq=False)
class Description:
    """What `describe` was told; paths in the described module, `attn` and `mlp` in a block.

    Attributes:
        layers: of the list that holds the blocks.
        embed, norm: of the token embedding and of the norm behind the last block; None for what the trial pass shows.
        attn, mlp: of the modules that write to the residual stream; None likewise.
        example: what the forward takes: a tensor, a tuple of arguments, or a dictionary of them by name.
    """

    layers: str
    embed: str | None = None
    norm: str | None = None
    attn: str | None = None
    mlp: str | None = None
    example: Any = None


_DESCRIPTIONS: weakref.WeakKeyDictionary[nn.Module, Description] = weakref.WeakKeyDictionary()


def set_description(model: nn.Module, description: Description | None) -> Description | None:
    """Notes a description, or forgets it; returns the one before."""
    before = _DESCRIPTIONS.pop(model, None)
    if description is not None:
        _DESCRIPTIONS[model] = description
    return before


def described_in(model: nn.Module) -> tuple[str, Description] | None:
    """The outermost module that was described, by its path."""
    for path, module in model.named_modules():
        if (description := _DESCRIPTIONS.get(module)) is not None:
            return path, description
        if (said := getattr(type(module), ATTRIBUTE, None)) is not None:
            return path, checked_description(module, said)
    return None


def checked_description(model: nn.Module, said: Any) -> Description:
    """A description whose paths are those of modules. Raises AnatomyError, and ConfigError for values of other types."""
    remedy = f"write the arguments of steer.describe, e.g. {ATTRIBUTE} = {{'layers': 'blocks', 'attn': 'attn'}}"
    of_type(said, Mapping, f"{type(model).__name__}.{ATTRIBUTE}", remedy)
    known = [field.name for field in dataclasses.fields(Description)]
    if unknown := [name for name in said if name not in known]:
        raise _unknown_part(str(unknown[0]), known)
    if "layers" not in said:
        raise _unknown_part("no 'layers'", known)
    for name, value in said.items():
        if name != "example":
            of_type(value, str if name == "layers" else (str, type(None)), f"'{name}' of a description", "pass a dotted path as text")
    description = Description(**said)
    paths = [path for path, _ in model.named_modules()]
    for name, path in (("layers", description.layers), ("embed", description.embed), ("norm", description.norm)):
        if path is not None and path not in paths:
            raise _no_module(model, name, path, paths)
    blocks = list(model.get_submodule(description.layers).children())
    if not blocks:
        raise _no_module(model, "layers", description.layers, paths)
    in_blocks = [path for block in blocks for path, _ in block.named_modules()]
    for name, path in (("attn", description.attn), ("mlp", description.mlp)):
        if path is not None and path not in in_blocks:
            raise _no_module(blocks[0], name, path, in_blocks)
    return description


# ---- proof


def described_stack(model: nn.Module, stack: Stack, embed: str | None, norm: str | None) -> Stack:
    """A stack with the embedding and the norm that it was said to have. Raises AnatomyError when a trial pass shows otherwise."""
    if embed is None and norm is None:
        return stack
    watched = {path: model.get_submodule(path) for path in (embed, norm, stack.block_paths[-1]) if path is not None}
    inputs: dict[str, Tensor | None] = {}
    outputs: dict[str, Tensor | None] = {}
    paths = {module: path for path, module in watched.items()}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.setdefault(paths[module], first_tensor([*args, *kwargs.values()]))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs.setdefault(paths[module], first_tensor(output))

    for _, run in trial_passes(model):
        try:
            run(list(watched.values()), before, after)
            break
        except Exception:  # this way of calling it did not work in the survey either
            continue
    last = outputs.get(stack.block_paths[-1])
    if embed is not None:
        rows = outputs.get(embed)
        if rows is None or last is None or rows.shape[:-1] != last.shape[:-1]:
            raise _not_so("embed", embed, "a module that gives one row for every token of the stream", _shape(rows))
    if norm is not None and not same(inputs.get(norm), last):
        raise _not_so("norm", norm, "a module that takes what the last block gives", _shape(inputs.get(norm)))
    return dataclasses.replace(stack, embedding=embed or stack.embedding, final_norm=norm or stack.final_norm)


def described_parts(parts: tuple[BlockParts, ...], description: Description, blocks: list[nn.Module]) -> tuple[BlockParts, ...]:
    """The parts of each block, attention and MLP being those that were named. Raises AnatomyError when the sums show otherwise."""
    for name, path in (("attn", description.attn), ("mlp", description.mlp)):
        if path is None:
            continue
        parts = tuple(
            _with_role(number, of_block, name, path) if path in dict(block.named_modules()) else of_block
            for number, (of_block, block) in enumerate(zip(parts, blocks, strict=True))
        )
    return parts


def _with_role(layer: int, parts: BlockParts, name: str, path: str) -> BlockParts:
    place = f"{name}' of block {layer}, '{path}"
    expected = "a module whose output is added to the residual stream as it is: input + what is added = output"
    if not parts.writers:
        raise _not_so(place, "", expected, parts.reason)
    named = [writer for writer in parts.writers if path in (writer.path, writer.part, writer.projection)]
    if not named:
        raise _not_so(place, "", expected, f"what is added comes from {', '.join(writer.path for writer in parts.writers)}")
    (writer,) = named
    if writer.mixes != (name == "attn"):
        mixing = "tokens from one another" if name == "attn" else "each token alone"
        found = "what it gives for a token does not depend on the others" if name == "attn" else "what it gives depends on other tokens"
        raise _not_so(place, "", f"a module that works on {mixing}", found)
    return dataclasses.replace(parts, writers=tuple(_in_role(other, other is writer, name) for other in parts.writers))


def _in_role(writer: Writer, is_named: bool, name: str) -> Writer:
    """The named writer is the one of its role; another that was taken for it by its name is a mixer or works on tokens alone."""
    if name == "attn":
        return dataclasses.replace(writer, attends=is_named)
    return writer if is_named or writer.mixes else dataclasses.replace(writer, attends=True)


def _shape(tensor: Tensor | None) -> str:
    return "it did not run, or without a tensor" if tensor is None else f"a tensor {list(tensor.shape)}"


# ---- errors


def _unknown_part(found: str, known: list[str]) -> AnatomyError:
    return AnatomyError(
        "a description of a model has another form",
        expected=f"'layers', and what is wanted of {', '.join(known[1:])}",
        found=found,
        remedy=did_you_mean(found, known) or "steer.describe(model, layers='blocks')",
    )


def _no_module(module: nn.Module, name: str, path: str, paths: list[str]) -> AnatomyError:
    return AnatomyError(
        f"'{name}' of the description of a {type(module).__name__} is no module in it",
        expected="the path of a module that holds blocks" if name == "layers" else "the path of a module",
        found=path,
        remedy=did_you_mean(path, paths) or "take a path of model.named_modules(); attn and mlp are paths in a block",
    )


def _not_so(name: str, path: str, expected: str, found: str) -> AnatomyError:
    return AnatomyError(
        f"'{name}'{f' ({path})' if path else ''} of the description is not what it is said to be",
        expected=expected,
        found=found,
        remedy="correct the path, or leave it out: what the model itself shows is used then",
    )
