"""Colours by role, light and dark: Okabe and Ito's colour-blind safe hues, darkened or lightened until they read on both papers."""

from __future__ import annotations

ROLES = {
    "paper": ("#ffffff", "#14171b"),
    "ink": ("#1a1e23", "#e9ebee"),
    "muted": ("#59626c", "#a3acb6"),
    "rule": ("#dce0e5", "#313841"),
    "band": ("#e4e8ec", "#2a3038"),
    "other": ("#b4bcc5", "#56606b"),
    "arm-0": ("#0069a6", "#5ab6ec"),
    "arm-1": ("#c85200", "#ff9450"),
    "arm-2": ("#00805c", "#35cca0"),
    "arm-3": ("#a3458a", "#e592d0"),
    "arm-4": ("#856100", "#e2c04e"),
    "arm-5": ("#4a57c0", "#a2adff"),
}
LIGHT = {role: light for role, (light, _) in ROLES.items()}
ARMS = tuple(role for role in ROLES if role.startswith("arm-"))
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 2), (3, 1.5, 1, 1.5, 1, 1.5))


def css() -> str:
    """The colours as custom properties of `:root`; paper stays white in print."""

    light = ";".join(f"--{role}:{colour}" for role, (colour, _) in ROLES.items())
    dark = ";".join(f"--{role}:{colour}" for role, (_, colour) in ROLES.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"
