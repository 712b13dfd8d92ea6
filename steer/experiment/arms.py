"""Arms of an experiment: a treatment, and when it acts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import ConfigError, SteerError, did_you_mean
from steer.experiment.treatment import BAKED, BOTH, INFERENCE, NEVER, TRAIN, TREATMENTS, WHEN, Bench, Treatment

KEYS = ("label", "treatment", "when", "uses", "controls", "draws", "doses")
_OLD_KEYS = ("direction", "strength")  # of configurations before treatments were registered
_OLD_DIRECTIONS = ("none", "trait", "random")
DRAWS = 8
_LONGEST_NAME = 100  # bytes; a cell's folder adds draw, seed and key


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name, label: short name, and a phrase for the page.
        treatment: what is done; of a control, what it is the random partner of.
        when: `never`, in training (`train`), at `inference`, in `both`, or `baked` into the weights after training.
        uses: the arm whose weights an arm that does nothing in training uses; None for the base model, or for weights of its own.
        control_of: the arm whose matched random partner it is.
        draws: number of random partners; 1 for an arm that is no control.
        sweep, dose: of an arm of a sweep, the name that its doses share, and its own.
    """

    name: str
    label: str
    treatment: Treatment
    when: str = NEVER
    uses: str | None = None
    control_of: str | None = None
    draws: int = 1
    sweep: str | None = None
    dose: float | None = None

    def __post_init__(self) -> None:
        self.treatment.check_when(self.when, self.name)
        if self.uses is not None and self.when not in (INFERENCE, BAKED):
            raise _needs_no_weights(self)

    @property
    def is_trained(self) -> bool:
        """It has weights of its own in an experiment that trains."""
        return self.uses is None

    @property
    def acts_in_training(self) -> bool:
        return self.when in (TRAIN, BOTH)

    @property
    def acts_at_inference(self) -> bool:
        return self.when in (INFERENCE, BOTH)

    def treatments(self, bench: Bench) -> list[Treatment]:
        """Its treatment, ready to act; of a control one random partner for each draw, each as large as what it is compared with.

        Raises:
            ConfigError: no partner can be made, or one that does not match.
        """
        treatment = self.treatment.prepare(bench)
        if self.control_of is None:
            return [treatment]
        partners = [treatment.control(bench, seed).prepare(bench) for seed in range(self.draws)]
        wanted = treatment.size(bench)
        for partner in partners:
            check_size(self, treatment, wanted, partner.size(bench))
        return partners


def check_training(arms: Sequence[Arm], trains: bool) -> None:
    """Raises ConfigError for an arm that acts in training where nothing is trained."""
    for arm in arms:
        if arm.acts_in_training and not trains:
            raise _never_trained(arm)


TOLERANCE = 0.02


def check_size(arm: Arm, treatment: Treatment, wanted: Mapping[str, float], reached: Mapping[str, float]) -> None:
    """Raises ConfigError when the quantity in which a control is matched differs by more than 2 %."""
    for part, value in wanted.items():
        other = reached.get(part, math.nan)
        if not abs(other - value) <= TOLERANCE * abs(value):
            raise _not_matched(arm, treatment, part, value, other)


# ---- from a configuration


def read_arms(specs: Any, *, trait: Mapping[str, Any] | None = None, scope: str = "all") -> list[Arm]:
    """Arms from their configuration, name -> keys of `Arm`; a name that is set to null is left out.

    Configurations from before treatments were registered are read as well: `direction: trait` with a `strength` is a plan that adds the
    trait direction, `direction: random` a control of it.

    Args:
        trait: `experiment.trait`, with the name and the site of the direction that old configurations mean.
        scope: of their edits.

    Raises:
        ConfigError: no arms, an unknown key, a treatment that cannot act then, a control of nothing, an arm whose weights nobody trains.
    """
    chosen = {str(name): spec for name, spec in (specs or {}).items() if spec is not None}
    for name, spec in chosen.items():
        check_name(name)
        known = (*KEYS, *_OLD_KEYS)
        if not isinstance(spec, Mapping) or set(spec) - set(known):
            raise _unknown_keys(name, spec, known)
    if not chosen:
        raise _no_arms()
    new = _swept({name: _renewed(name, spec, chosen, trait or {}, scope) for name, spec in chosen.items()})
    arms: dict[str, Arm] = {}
    for name in sorted(new, key=lambda name: "controls" in new[name]):  # an arm before its controls
        arms[name] = _arm(name, new[name], arms)
    ordered = [arms[name] for name in new]
    for arm in ordered:
        if arm.uses is not None and not (arm.uses in arms and arms[arm.uses].is_trained):
            raise _untrained(arm, [other.name for other in ordered if other.is_trained])
    return ordered


def check_name(name: Any) -> None:
    """Raises ConfigError for what cannot be the name of an arm: it stands in sentences, tables and the names of folders."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise _no_name(name)


def _swept(specs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An arm with `doses` as one for each dose, and its controls with it."""
    doses = {name: spec.pop("doses") for name, spec in specs.items() if "doses" in spec}
    swept: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        of = spec.get("controls", name)
        if of not in doses:
            _put(swept, name, spec)
            continue
        if not _are_doses(doses[of]):
            raise _no_doses(of, doses[of])
        for dose in doses[of]:
            one = {**spec, "label": f"{spec.get('label') or name}, dose {dose:.15g}", "sweep": (name, dose)}
            if "controls" in spec:
                one["controls"] = _dosed_name(of, dose)
            elif not isinstance(spec.get("treatment"), Mapping):
                raise _no_dose_of(name, spec.get("treatment"))
            else:
                one["treatment"] = {**spec["treatment"], "dose": dose}
            _put(swept, _dosed_name(name, dose), one)
    return swept


def _put(specs: dict[str, dict[str, Any]], name: str, spec: dict[str, Any]) -> None:
    if name in specs:
        raise _same_name(name)
    specs[name] = spec


def _are_doses(doses: Any) -> bool:
    """Finite numbers, each once."""
    if not isinstance(doses, Sequence) or isinstance(doses, str) or not doses:
        return False
    are_numbers = all(isinstance(dose, int | float) and not isinstance(dose, bool) and math.isfinite(dose) for dose in doses)
    return are_numbers and len(set(doses)) == len(doses)


def _dosed_name(name: str, dose: float) -> str:
    return f"{name} x{dose:.15g}"


def _arm(name: str, spec: Mapping[str, Any], arms: Mapping[str, Arm]) -> Arm:
    label = str(spec.get("label") or name)
    sweep, dose = spec.get("sweep", (None, None))
    of = spec.get("controls")
    if of is None:
        if "draws" in spec:
            raise _contradiction(name, "draws", "draws only with controls")
        treatment = treatment_of(spec.get("treatment"), name)
        when = str(spec.get("when") or (NEVER if not treatment.when else INFERENCE))
        return Arm(name, label, treatment, when, spec.get("uses"), sweep=sweep, dose=dose)
    if of not in arms:
        raise _no_such_arm(name, of, list(arms))
    if "treatment" in spec:
        raise _contradiction(name, "treatment", "either controls or treatment")
    draws = spec.get("draws", DRAWS)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise _no_draws(name, draws)
    like = arms[of]
    if not like.treatment.when:
        raise _control_of_nothing(name, of)
    if like.control_of is not None:
        raise _control_of_a_control(name, like)
    for key, value in {"when": like.when, "uses": like.uses}.items():
        if spec.get(key) not in (None, value):
            raise _contradiction(name, key, f"{key}={value}, as '{of}', whose control it is")
    return Arm(name, label, like.treatment, like.when, like.uses, of, draws, sweep, dose)


def treatment_of(spec: Any, arm: str) -> Treatment:
    """A treatment from its configuration: its name, or `kind` and the options of that kind. Raises ConfigError."""
    if isinstance(spec, Treatment):
        return spec
    if spec is None:
        spec = "none"
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("kind", None)
    if kind not in TREATMENTS:
        raise _unknown_treatment(arm, kind)
    treatment_class: Any = TREATMENTS.get(kind)
    known = list(inspect.signature(treatment_class).parameters)
    if unknown := sorted(set(options) - set(known)):
        raise _unknown_option(arm, kind, unknown[0], known)
    try:
        return treatment_class(**options)
    except SteerError:
        raise
    except (TypeError, ValueError) as error:
        raise _impossible(arm, kind, error) from error


def _renewed(name: str, spec: Mapping[str, Any], specs: Mapping[str, Any], trait: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """An arm in today's keys."""
    if not set(spec) & set(_OLD_KEYS):
        return dict(spec)
    kept = {key: value for key, value in spec.items() if key not in _OLD_KEYS}
    direction = spec.get("direction", "none")
    if direction not in _OLD_DIRECTIONS:
        raise _unknown_word(name, "direction", direction, _OLD_DIRECTIONS)
    when = spec.get("when", NEVER)
    if when not in WHEN:
        raise _unknown_word(name, "when", when, WHEN)
    if (when == NEVER) != (direction == "none"):
        raise _contradiction(name, "direction", "a direction exactly when it is steered")
    if direction == "none":
        return kept
    strength = spec.get("strength", 0.0)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise _no_strength(name, strength)
    if (when == INFERENCE) != (spec.get("uses") is not None):
        raise _contradiction(name, "uses", "`uses` exactly with when=inference")
    if direction == "random":
        if (partner := _old_partner(spec, specs)) is None:
            raise _control_of_no_arm(name, spec)
        return {**kept, "controls": partner, "draws": 1}
    place = f":{trait['site']}" if trait.get("site") else ""
    text = f"{'-' if strength < 0 else ''}{abs(float(strength)):g} {trait.get('name')}{place}@{scope}"
    return {**kept, "treatment": {"kind": "plan", "plan": text}}


def _old_partner(spec: Mapping[str, Any], specs: Mapping[str, Any]) -> str | None:
    """The arm that an old random arm was compared with: along the trait, as strong, at the same time."""
    for name, other in specs.items():
        strength = other.get("strength", 0.0)
        is_as_strong = isinstance(strength, int | float) and math.isclose(abs(strength), abs(spec.get("strength", 0.0)))
        if other.get("direction") == "trait" and is_as_strong and other.get("when") == spec.get("when"):
            return name
    return None


# ---- errors


def _no_name(name: Any) -> ConfigError:
    return ConfigError(
        "this cannot be the name of an arm",
        expected=f"a text in one line, not empty, of at most {_LONGEST_NAME} bytes",
        found=repr(name),
        remedy="call it in a word or two; what is longer belongs into its label",
    )


def _never_trained(arm: Arm) -> ConfigError:
    return ConfigError(
        f"arm '{arm.name}' acts in training, and this experiment trains nothing",
        expected="when=inference or when=baked, or experiment.train",
        found=f"when={arm.when}",
        remedy=f"set experiment.arms.{arm.name}.when, or say in experiment.train how long arms are trained",
    )


def _same_name(name: str) -> ConfigError:
    remedy = "give one of them another name"
    return ConfigError(f"two arms are called '{name}'", expected="a name for each arm and dose", found=name, remedy=remedy)


def _no_arms() -> ConfigError:
    return ConfigError("an experiment needs an arm", expected="one or more", found="none", remedy="name arms in experiment.arms")


def _needs_no_weights(arm: Arm) -> ConfigError:
    return ConfigError(
        f"arm '{arm.name}' is contradictory",
        expected="`uses` only with when=inference or when=baked",
        found=f"when={arm.when}, uses={arm.uses}",
        remedy=f"set experiment.arms.{arm.name}.when or .uses",
    )


def _not_matched(arm: Arm, treatment: Treatment, part: str, value: float, other: float) -> ConfigError:
    return ConfigError(
        f"arm '{arm.name}' is no matched control of '{arm.control_of}': {treatment.unit} of '{part}'",
        expected=f"{value:.4g}, within {TOLERANCE:.0%}",
        found=f"{other:.4g}",
        remedy="measure it on more texts, or write the control as an arm with a treatment of its own",
    )


def _unknown_word(name: str, key: str, word: Any, known: Sequence[str]) -> ConfigError:
    remedy = f"set experiment.arms.{name}.{key} to one of these"
    return ConfigError(f"arm '{name}': unknown {key} '{word}'", expected=", ".join(known), found=word, remedy=remedy)


def _contradiction(name: str, key: str, expected: str) -> ConfigError:
    what = f"arm '{name}' is contradictory"
    return ConfigError(what, expected=expected, found=f"{key} as it is", remedy=f"set or leave out experiment.arms.{name}.{key}")


def _no_strength(name: str, strength: Any) -> ConfigError:
    remedy = f"set experiment.arms.{name}.strength"
    return ConfigError(f"arm '{name}': strength is no number", expected="a finite number", found=strength, remedy=remedy)


def _unknown_keys(name: str, spec: Any, known: Sequence[str]) -> ConfigError:
    found = sorted(set(spec) - set(known)) if isinstance(spec, Mapping) else spec
    near = did_you_mean(str(found[0]), KEYS) if isinstance(found, list) else None
    remedy = near or f"correct experiment.arms.{name}"
    return ConfigError(f"arm '{name}' has unknown keys", expected=", ".join(KEYS), found=found, remedy=remedy)


def _untrained(arm: Arm, trained: list[str]) -> ConfigError:
    return ConfigError(
        f"arm '{arm.name}' uses '{arm.uses}', which is not trained",
        expected=f"one of {', '.join(trained)}",
        found=arm.uses,
        remedy=f"set experiment.arms.{arm.name}.uses, or leave the arm out with experiment.arms.{arm.name}=null",
    )


def _no_such_arm(name: str, of: Any, arms: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"arm '{name}' controls '{of}', which is no arm with a treatment",
        expected=f"one of {', '.join(arms) or 'the other arms'}",
        found=of,
        remedy=did_you_mean(str(of), arms) or f"set experiment.arms.{name}.controls",
    )


def _control_of_nothing(name: str, of: str) -> ConfigError:
    what = f"arm '{name}' controls '{of}', to which nothing is done"
    return ConfigError(what, expected="an arm with a treatment", found="none", remedy=f"set experiment.arms.{name}.controls")


def _control_of_a_control(name: str, like: Arm) -> ConfigError:
    what = f"arm '{name}' controls '{like.name}', which is a control itself"
    return ConfigError(what, expected="an arm with a treatment", found=f"a control of {like.control_of}", remedy="raise its draws instead")


def _control_of_no_arm(name: str, spec: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"arm '{name}' is the control of no arm",
        expected="an arm along the trait with the same strength and when",
        found=f"strength={spec.get('strength')}, when={spec.get('when')}",
        remedy=f"name the arm that it is held against: experiment.arms.{name}.controls=<arm>, without direction and strength",
    )


def _no_doses(name: str, doses: Any) -> ConfigError:
    return ConfigError(
        f"arm '{name}' needs doses", expected="numbers, each once", found=doses, remedy=f"set experiment.arms.{name}.doses=[0.5,1,2]"
    )


def _no_dose_of(name: str, treatment: Any) -> ConfigError:
    return ConfigError(
        f"arm '{name}' has doses of nothing",
        expected="a treatment that has a dose, such as kind: plan",
        found=treatment,
        remedy=f"set experiment.arms.{name}.treatment, or leave its doses out",
    )


def _no_draws(name: str, draws: Any) -> ConfigError:
    return ConfigError(f"arm '{name}' needs draws", expected="1 or more", found=draws, remedy=f"set experiment.arms.{name}.draws")


def _unknown_treatment(arm: str, kind: Any) -> ConfigError:
    remedy = did_you_mean(str(kind), TREATMENTS) or f"set experiment.arms.{arm}.treatment.kind to one of these"
    return ConfigError(f"arm '{arm}': unknown treatment '{kind}'", expected=", ".join(TREATMENTS), found=kind, remedy=remedy)


def _unknown_option(arm: str, kind: str, option: str, known: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(option, known) or f"leave experiment.arms.{arm}.treatment.{option} out"
    return ConfigError(f"arm '{arm}': treatment '{kind}' has no option '{option}'", expected=", ".join(known), found=option, remedy=remedy)


def _impossible(arm: str, kind: str, error: Exception) -> ConfigError:
    what = f"arm '{arm}': treatment '{kind}' cannot be made"
    return ConfigError(what, expected="the options that it needs", found=error, remedy=f"correct experiment.arms.{arm}.treatment")
