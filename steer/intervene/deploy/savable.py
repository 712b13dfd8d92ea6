"""Round trips: a bias survives `save_pretrained` and `from_pretrained` only where the family's configuration speaks of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from steer.errors import DeployError
from steer.intervene.deploy.baked import Baked
from steer.intervene.deploy.constant import AT_RUN_TIME
from steer.intervene.deploy.transformers_model import transformers_model
from steer.model.anatomy import Anatomy

SETTINGS = ("attention_bias", "mlp_bias", "bias", "use_bias")


def make_savable(anatomy: Anatomy, baked: Baked) -> None:
    """Switches on the settings that make the configuration speak of every new bias.

    Raises:
        DeployError: the family has no such setting, or the weights of a PEFT model changed, which are in none of its files.
    """
    if any(hasattr(module, "base_layer") for module in anatomy.model.modules()):
        raise _not_in_adapter_files()
    if not baked.new_biases:
        return
    model = transformers_model(anatomy)
    if model is None:
        raise _not_a_transformers_model(anatomy)
    prefix = next(path + "." if path else "" for path, module in anatomy.model.named_modules() if module is model)
    needed = {path.removeprefix(prefix) for path in baked.new_biases}
    before = _biased_maps(model) - needed
    settings = [name for name in SETTINGS if needed & _maps_biased_by(model, [name], before)]
    added = _maps_biased_by(model, settings, before)
    if not needed <= added:
        raise _no_setting_for(anatomy, sorted(needed - added)[0])
    for path in sorted(added - needed):  # the setting gives these a bias too
        baked.add_bias(prefix + path, model.get_submodule(path), 0.0)
    for name in settings:
        baked.set(anatomy.config, name, True)


def _biased_maps(model: nn.Module) -> set[str]:
    """Paths of the modules that have a bias."""
    return {path for path, module in model.named_modules() if module._parameters.get("bias") is not None}


def _maps_biased_by(model: Any, settings: list[str], before: set[str]) -> set[str]:
    """The linear maps that get a bias when settings that are off are switched on; none when other things change with them.

    Args:
        before: paths of the modules that had a bias before the bake.
    """
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    for name in settings:
        if getattr(text_config, name, None) is not False:
            return set()
        setattr(text_config, name, True)
    with torch.device("meta"):
        twin = type(model)(config)
    added = _biased_maps(twin) - before
    if not all(isinstance(twin.get_submodule(path), nn.Linear) for path in added):
        return set()
    twin_without_them = {name for name, _ in twin.named_parameters()} - {f"{path}.bias" for path in added}
    original = {name for name, _ in model.named_parameters() if name.removesuffix(".bias") in before or not name.endswith(".bias")}
    return added if twin_without_them == original else set()


# ---- errors


def _not_in_adapter_files() -> DeployError:
    return _lost("a PEFT model, whose files hold the adapter and not the weights below it", "merge the adapter first")


def _not_a_transformers_model(anatomy: Anatomy) -> DeployError:
    return _lost(f"a {type(anatomy.model).__name__}, of which that is not known", "bake the transformers model itself")


def _no_setting_for(anatomy: Anatomy, path: str) -> DeployError:
    found = f"{anatomy.kind}, whose configuration knows no bias of {path}"
    return _lost(found, "export it with steer.to_adapter")


def _lost(found: str, remedy: str) -> DeployError:
    return DeployError(
        "a bake that save_pretrained and from_pretrained would lose",
        expected="a model whose configuration has every bias that the plan needs",
        found=found,
        remedy=f"{remedy}, pass savable=False for a model that stays in this process, or {AT_RUN_TIME}",
    )
