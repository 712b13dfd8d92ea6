"""Round trips: `from_pretrained` gives the weights that `save_pretrained` wrote only where the configuration speaks of each.

A bias that the configuration has no setting for is dropped. A head that has a weight of its own while the configuration calls it tied is
replaced by the embedding; one that shares the weight of the embedding while the configuration says otherwise comes back random, in no file.
"""

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
from steer.model.tied import tied_head, tying_configs

SETTINGS = ("attention_bias", "mlp_bias", "bias", "use_bias")


def make_savable(anatomy: Anatomy, baked: Baked) -> None:
    """Makes the configuration speak of every new bias, and of whether the embeddings are tied.

    Raises:
        DeployError: the family has no such setting, or the weights of a PEFT model changed, which are in none of its files.
    """
    if any(hasattr(module, "base_layer") for module in anatomy.model.modules()):
        raise _not_in_adapter_files()
    model = transformers_model(anatomy)
    if model is None:
        if baked.new_biases:
            raise _not_a_transformers_model(anatomy)
        return
    prefix = next(path + "." if path else "" for path, module in anatomy.model.named_modules() if module is model)
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if lost := [name for name in baked.changed if name.removeprefix(prefix) in left_out]:
        raise _in_no_file(lost)
    if (tied_head(anatomy) is not None) != bool(tying_configs(anatomy)):
        baked.untie(anatomy)
    if baked.new_biases:
        _switch_biases_on(anatomy, model, baked, prefix)
    if getattr(model, "hf_quantizer", None) is None:  # whose weights have other names in memory
        _check_configuration(model)


def _switch_biases_on(anatomy: Anatomy, model: Any, baked: Baked, prefix: str) -> None:
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


def _check_configuration(model: Any) -> None:
    """Raises DeployError unless a model made from the configuration has the same weights, of which the same are one."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.tie_weights()
    differing = model.state_dict().keys() ^ twin.state_dict().keys()
    for one in _shared_weights(model) ^ _shared_weights(twin):
        differing |= one
    if differing:
        raise _configuration_says_otherwise(model, sorted(differing))


def _shared_weights(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one and the same."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


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


def _in_no_file(names: list[str]) -> DeployError:
    return _lost(f"a change of {', '.join(names)}, which save_pretrained leaves out", "steer layers.0.output instead")


def _no_setting_for(anatomy: Anatomy, path: str) -> DeployError:
    found = f"{anatomy.kind}, whose configuration knows no bias of {path}"
    return _lost(found, "export it with steer.to_adapter")


def _configuration_says_otherwise(model: Any, names: list[str]) -> DeployError:
    found = f"a {type(model).__name__} whose configuration says otherwise of {', '.join(names[:4])}"
    return _lost(found, "make the weights what the configuration says, or correct it")


def _lost(found: str, remedy: str) -> DeployError:
    return DeployError(
        "a bake that save_pretrained and from_pretrained would lose",
        expected="a model whose configuration speaks of all its weights, and of the biases that the plan needs",
        found=found,
        remedy=f"{remedy}, pass savable=False for a model that stays in this process, or {AT_RUN_TIME}",
    )
