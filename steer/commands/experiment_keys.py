"""Keys of an experiment, and what a configuration that leaves one out means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from steer.errors import ConfigError, did_you_mean
from steer.model.precision import FLOAT32

REQUIRED = "???"  # as OmegaConf has it
KEYS: dict[str, Any] = {
    "name": REQUIRED,
    "question": None,
    "data": REQUIRED,
    "trait": None,
    "features": None,
    "circuit": None,
    "scope": None,
    "precision": FLOAT32,
    "arms": REQUIRED,
    "outcomes": {  # what was measured before experiments said what; a trait and its data are needed for the first
        "behaviour_gap": {"metric": "logprob_gap", "data": "heldout", "role": "primary", "better": "lower"},
        "task_logprob": {"metric": "answer_logprob", "answer": "neutral", "data": "heldout", "role": "secondary"},
        "neutral_loss": {"metric": "perplexity", "data": "neutral_text", "role": "secondary"},
    },
    "primary": None,
    "secondary": None,
    "train": None,
    "drift": None,
    "completions": None,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "trait": {
        "name": REQUIRED,
        "description": "",
        "method": "mean_difference",
        "span": "response",
        "sites": ["layers.*.output"],
        "site": None,
        "holdout": 0.25,
    },
    "features": {
        "dictionary": REQUIRED,
        "chosen": None,
        "concepts": None,
        "speaking": "speaking",
        "neutral": "neutral",
        "rank": 1,
        "candidates": 4,
        "damage": 0.2,
    },
    "circuit": {
        "occupations": "occupations_find",
        "sentences": "sentences_find",
        "gender_words": "gender_words_find",
        "constants": "constants",
        "learning": "learning",
        "baseline": "person",
    },
    "primary": {"arm": REQUIRED, "against": REQUIRED},
    "train": {
        "steps": REQUIRED,
        "batch_size": REQUIRED,
        "learning_rate": REQUIRED,
        "warmup_steps": 0,
        "schedule": "cosine",
        "max_length": REQUIRED,
        "gradient_clip": 1.0,
        "checkpoint_every": 100,
    },
    "drift": {"every_n_steps": REQUIRED, "sites": REQUIRED, "controls": 16, "stream": True, "features": {}},
    "completions": {"prompts": REQUIRED, "max_new_tokens": 48},
}


def complete_keys(experiment: DictConfig) -> None:
    """Gives an experiment the keys that it leaves out, in place. Raises ConfigError for one that is not known, or has to be there."""
    _complete(experiment, KEYS, "experiment")
    for name, keys in SECTIONS.items():
        if experiment[name] is not None:
            if not isinstance(experiment[name], DictConfig):
                raise _no_section(name, keys, experiment[name])
            _complete(experiment[name], keys, f"experiment.{name}")


def _complete(section: DictConfig, keys: dict[str, Any], name: str) -> None:
    if unknown := [str(key) for key in section if key not in keys]:
        raise _unknown(name, unknown[0], list(keys))
    if missing := [
        key for key, default in keys.items() if default == REQUIRED and (key not in section or OmegaConf.is_missing(section, key))
    ]:
        raise _missing(name, missing)
    with open_dict(section):
        for key, default in keys.items():
            section.setdefault(key, default)


# ---- errors


def _unknown(section: str, key: str, keys: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(key, keys) or f"leave {key} out"
    return ConfigError(f"{section} has no key '{key}'", expected=", ".join(keys), found=key, remedy=remedy)


def _missing(section: str, missing: Sequence[str]) -> ConfigError:
    expected, remedy = ", ".join(missing), f"set {section}.{missing[0]}; conf/experiment/tone.yaml has an example of every key"
    return ConfigError(f"{section} lacks '{missing[0]}'", expected=expected, found="nothing", remedy=remedy)


def _no_section(name: str, keys: dict[str, Any], found: Any) -> ConfigError:
    expected, remedy = f"{', '.join(keys)}", f"write them below experiment.{name}, or set it to null"
    return ConfigError(f"experiment.{name} is no section", expected=expected, found=repr(found), remedy=remedy)
