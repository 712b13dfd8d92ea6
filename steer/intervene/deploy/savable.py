"""Round trips: a bias survives `save_pretrained` and `from_pretrained` only where the family's configuration speaks of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steer.errors import DeployError
from steer.intervene.deploy.constant import AT_RUN_TIME
from steer.intervene.deploy.fold import transformers_model
from steer.model.anatomy import Anatomy

if TYPE_CHECKING:
    from steer.intervene.deploy.bake import Baked

SETTINGS = ("attention_bias", "mlp_bias", "bias", "use_bias")


def make_savable(anatomy: Anatomy, baked: Baked) -> None:
    """Switches on the settings that make the configuration speak of every new bias.

    Raises:
        DeployError: the family has no such setting, or the weights of a PEFT model changed, which are in none of its files.
    """
    if any(hasattr(module, "base_layer") for module in anatomy.model.modules()):
        raise _lost("a PEFT model, whose files hold the adapter and not the weights below it", "merge the adapter first")
    if not baked.new_biases:
        return
    top = transformers_model(anatomy)
    if top is None:
        raise _lost(f"a {type(anatomy.model).__name__}, of which that is not known", "bake the transformers model itself")
    prefix = next(path + "." if path else "" for path, module in anatomy.model.named_modules() if module is top)
    wanted = {path.removeprefix(prefix) for path in baked.new_biases}
    before = _biases(top) - wanted
    chosen = [name for name in SETTINGS if wanted & _added_by(top, [name], before)]
    found = _added_by(top, chosen, before)
    if not wanted <= found:
        found_here = f"{anatomy.config.model_type}, whose configuration knows no bias of {sorted(wanted - found)[0]}"
        raise _lost(found_here, "export it with steer.to_adapter")
    for path in sorted(found - wanted):
        baked.add_bias(prefix + path, top.get_submodule(path), 0.0)
    for name in chosen:
        baked.set(anatomy.config, name, True)


def _biases(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if module._parameters.get("bias") is not None}


def _added_by(model: Any, settings: list[str], before: set[str]) -> set[str]:
    """The linear maps that get a bias when settings that are off are switched on; none when other things change with them."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name in settings:
        if getattr(text, name, None) is not False:
            return set()
        setattr(text, name, True)
    with torch.device("meta"):
        twin = type(model)(config)
    added = _biases(twin) - before
    linear = all(isinstance(twin.get_submodule(path), nn.Linear) for path in added)
    same = {name for name, _ in twin.named_parameters()} - {f"{path}.bias" for path in added}
    ours = {name for name, _ in model.named_parameters() if name.removesuffix(".bias") in before or not name.endswith(".bias")}
    return added if linear and same == ours else set()


def _lost(found: str, remedy: str) -> DeployError:
    return DeployError(
        "a bake that save_pretrained and from_pretrained would lose",
        expected="a model whose configuration has every bias that the plan needs",
        found=found,
        remedy=f"{remedy}, pass savable=False for a model that stays in this process, or {AT_RUN_TIME}",
    )
