"""Workbench: a local page with the sliders of a plan, plain and steered answers side by side, tokens coloured by what they hold."""

from steer.workbench.server import WorkbenchServer
from steer.workbench.workbench import Workbench

__all__ = ["Workbench", "WorkbenchServer"]
