"""What `steer train` asks of its configuration, as far as it can be said before minutes of work: seed, folder, sites, adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from steer.drift.feature_groups import TrackedFeatures
from steer.errors import ConfigError, SiteError, did_you_mean
from steer.features.load import load_dictionary
from steer.model.anatomy import Anatomy
from steer.model.site import Site

RUN_FILES = ("metrics.json", "report.html", "plans", "adapters")  # of a finished run, or of one of an older version


def texts(value: Any) -> list[str]:
    """A list of texts out of the configuration; null is an empty one."""
    return [str(text) for text in value or ()]


def check_seed(seed: Any) -> None:
    """Raises ConfigError for a seed that not every generator of random numbers takes."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError("this cannot be a seed", expected=f"a whole number from 0 to {2**32 - 1}", found=repr(seed), remedy="set seed=0")


def check_seeds(seeds: Any) -> list[int]:
    """The seeds of an experiment. Raises ConfigError for none, one twice, or one that is no seed."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        seeds = [seeds]
    for seed in seeds:
        check_seed(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise _no_seeds(list(seeds))
    return list(seeds)


def check_unused(out: Path) -> None:
    """Raises ConfigError when a folder holds a finished run, which this one would overwrite. One that was interrupted goes on."""
    if files := [name for name in RUN_FILES if (out / name).exists()]:
        raise _used_folder(out, files)


def tracked_sites(anatomy: Anatomy, experiment: DictConfig) -> list[Site]:
    """Sites of experiment.drift.sites, which may be patterns.

    Raises:
        ConfigError: none. SiteError: a site that cannot be read or is not in this model, or at which no direction will be read; the site
            where the arms are steered is checked too.
    """
    trait = experiment.trait
    patterns = texts(experiment.drift.sites)
    if not patterns:  # the anatomy takes no site as all sites
        raise _nothing_tracked()
    read = anatomy.sites(*texts(trait.sites))
    tracked = anatomy.sites(*patterns)
    steered = anatomy.sites(trait.site) if trait.site else []
    for key, sites in (("experiment.drift.sites", tracked), ("experiment.trait.site", steered)):
        if missing := [str(site) for site in sites if site not in read]:
            raise _no_direction_there(key, missing, texts(trait.sites))
    return tracked


def features_to_track(features: Any) -> dict[str, TrackedFeatures]:
    """Dictionaries and features of experiment.drift.features, loaded.

    Raises:
        ConfigError: an entry without a dictionary or features. FileError and what derives from it: a dictionary that cannot be loaded.
    """
    tracked = {}
    for name, entry in (features or {}).items():
        if not isinstance(entry, DictConfig) or set(entry) != {"dictionary", "features"}:
            raise _no_features(str(name), entry)
        chosen = list(entry.features) if isinstance(entry.features, ListConfig) else entry.features
        tracked[str(name)] = TrackedFeatures(load_dictionary(str(entry.dictionary)), chosen)
    return tracked


def lora_config(anatomy: Anatomy, peft: DictConfig) -> LoraConfig:
    """The adapters of every arm.

    Raises:
        ConfigError: a target that names no module of the model, a layer that it does not have, or a number out of range. PEFT looks at
            that when the first arm begins, and lets a target pass that fits nothing while another one fits.
    """
    targets = texts(peft.targets)
    layers = None if peft.layers is None else list(peft.layers)
    modules = dict(anatomy.model.named_modules())
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]
    if unknown or not targets:
        linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
        raise _unknown_targets(unknown, linear)
    if layers is not None and (not layers or not all(0 <= layer < anatomy.n_layers for layer in layers)):
        raise _unknown_layers(layers, anatomy.n_layers)
    if peft.r is None or peft.r < 1 or peft.alpha is None or peft.dropout is None or not 0 <= peft.dropout < 1:
        raise _impossible_adapters(peft)
    return LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


# ---- errors


def _no_seeds(seeds: list[int]) -> ConfigError:
    expected = "one seed or more, each once"
    return ConfigError("these cannot be the seeds of an experiment", expected=expected, found=seeds or "none", remedy="set seeds=[0,1,2]")


def _used_folder(out: Path, files: list[str]) -> ConfigError:
    return ConfigError(
        f"'{out}' holds a run already",
        expected="a folder without one",
        found=", ".join(files),
        remedy="leave hydra.run.dir out, which makes a new folder for each run, or name another",
    )


def _nothing_tracked() -> ConfigError:
    remedy = "set experiment.drift.sites=[layers.*.output], or to some of them"
    return ConfigError("nothing is tracked", expected="a site or more in experiment.drift.sites", found="none", remedy=remedy)


def _no_features(name: str, entry: object) -> ConfigError:
    return ConfigError(
        f"experiment.drift.features.{name} says not which features are tracked",
        expected="{dictionary: <path or name>, features: [12, 400]}",
        found=f"{entry}"[:80],
        remedy="give both; the dictionary is what steer.load_dictionary takes",
    )


def _no_direction_there(key: str, missing: list[str], patterns: list[str]) -> SiteError:
    return SiteError(
        f"no direction is read at {', '.join(missing)}, which {key} names",
        expected=f"sites out of experiment.trait.sites, {', '.join(patterns) or 'which is empty'}",
        found=", ".join(missing),
        remedy=f"add it to experiment.trait.sites, or correct {key}",
    )


def _unknown_targets(unknown: list[str], linear: Iterable[str]) -> ConfigError:
    near = did_you_mean(unknown[0], linear) if unknown else None
    expected = f"some of {', '.join(sorted(linear))}"
    remedy = near or "set peft.targets to some of these"
    return ConfigError("peft.targets names no module", expected=expected, found=unknown or "none", remedy=remedy)


def _unknown_layers(layers: list[int], n_layers: int) -> ConfigError:
    expected = f"indices from 0 to {n_layers - 1}, or null for all"
    return ConfigError("peft.layers names no layer", expected=expected, found=layers, remedy="correct peft.layers")


def _impossible_adapters(peft: DictConfig) -> ConfigError:
    found = f"r={peft.r}, alpha={peft.alpha}, dropout={peft.dropout}"
    return ConfigError("such adapters cannot be made", expected="r >= 1, 0 <= dropout < 1", found=found, remedy="set these keys of peft")
