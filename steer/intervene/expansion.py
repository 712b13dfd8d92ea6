"""Expansion: from an intervention at a pattern of sites to one at each site that a model has there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from steer.intervene.intervention import Intervention
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.sites import Sites


def at_single_sites(interventions: Sequence[Intervention], model: nn.Module, anatomy: Anatomy | None = None) -> list[list[Intervention]]:
    """Each intervention as one for each of its sites, `<name>@<site>`, which share its operator and gate; one at a single site is itself.

    Args:
        anatomy: of the model; looked for when it is needed.

    Raises:
        SiteError: a site that the model does not have; a pattern that none of its layers fits.
        AnatomyError: a pattern of layers for a model in which none were found.
    """
    several = [intervention.site for intervention in interventions if isinstance(intervention.site, Sites)]
    if anatomy is None and any(not isinstance(entry, Site) or entry.module is None for sites in several for entry in sites.entries):
        anatomy = Anatomy.find(model)
    return expanded(interventions, lambda sites: sites.in_model(model, anatomy))


def expanded(interventions: Sequence[Intervention], meant: Callable[[Sites], Iterable[Site]]) -> list[list[Intervention]]:
    """See `at_single_sites`. meant: the sites of a model that were described."""
    taken = {intervention.name for intervention in interventions}
    groups = []
    for intervention in interventions:
        if not isinstance(intervention.site, Sites):
            groups.append([intervention])
            continue
        group = []
        for site in meant(intervention.site):
            name = _not_taken(f"{intervention.name}@{site}", taken)
            taken.add(name)
            group.append(intervention.at(site, name))
        groups.append(group)
    return groups


def _not_taken(name: str, taken: set[str]) -> str:
    """The name, or `<name>#2`, ... where another intervention was called that by hand."""
    numbers = itertools.count(2)
    free = name
    while free in taken:
        free = f"{name}#{next(numbers)}"
    return free


def sites_in(intervention: Intervention, anatomy: Anatomy) -> list[Site]:
    """Where an intervention acts in a model, layers counted from the start."""
    [placed] = at_single_sites([intervention], anatomy.model, anatomy)
    return [anatomy.point(entry.single_site).site for entry in placed]


def modules_in_words(paths: Sequence[str]) -> str:
    """`model.layers.{0-3,7}.mlp` for modules that differ in one number, and how many they are."""
    if len(paths) == 1:
        return paths[0]
    numbers: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        match = re.search(r"(?<![^.])\d+(?![^.])", path)
        before, after = (path[: match.start()], path[match.end() :]) if match else (path, "")
        numbers.setdefault((before, after), []).extend([int(match[0])] if match else [])
    names = [
        f"{before}{'{' * (len(found) > 1)}{_ranges(found)}{'}' * (len(found) > 1)}{after}" for (before, after), found in numbers.items()
    ]
    return f"{len(paths)} modules: {', '.join(names)}"


def _ranges(numbers: list[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
