"""What the extra `report` installs, imported only when something is drawn or written."""

from __future__ import annotations

import importlib
from typing import Any

from steer.errors import ConfigError


def extra(module: str) -> Any:
    """Imports a module of matplotlib or jinja2. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the report needs '{module.partition('.')[0]}'",
            expected="matplotlib and jinja2, which the extra `report` installs",
            found=f"no module '{error.name}'",
            remedy="pip install 'torchsteer[report]'",
        ) from error
