"""`steer show`: a local page with the sliders of a plan, and plain and steered answers side by side."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from steer.checks import of_type
from steer.commands.config import dtype_named, listed
from steer.directions.text import plan_from_text
from steer.experiment.steering import sources_from_config
from steer.model.load import load
from steer.workbench import Workbench, WorkbenchServer

OF_THE_PAGE = ("steer", "prompts", "max_new_tokens", "port", "browser", "folder")  # keys that say nothing of what is loaded


def run(config: DictConfig) -> None:
    """Prints the address of the page, opens it where there is somebody to see it, and serves it until Ctrl-C.

    What takes its time until then is said on stderr, so that stdout has the address alone.
    """
    of_type(config.browser, (bool, type(None)), "'browser'", "set browser=true or browser=false, or leave it out")
    sections: Any = OmegaConf.to_container(config, resolve=True)
    _say("reading the plan")
    names, gates = sources_from_config(*(sections[kind] or {} for kind in ("directions", "gates", "dictionaries")))
    plan_from_text(str(config.steer), names, gates)  # what is wrong with it is said before the model is loaded, which can take minutes
    _say(f"loading {config.model.name}")
    model, tokenizer = load(config.model.name, dtype=dtype_named(config.model.dtype))
    _say("preparing the page")
    workbench = Workbench(
        *(model, tokenizer, names, gates, str(config.steer)),
        prompts=listed(config.prompts) or (),
        max_new_tokens=config.max_new_tokens,
        folder=config.folder,
        command=["steer", "say", *_loading(HydraConfig.get().overrides.task)],
    )
    with WorkbenchServer(workbench, port=config.port) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if sys.stdout.isatty() if config.browser is None else config.browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _say(step: str) -> None:
    print(f"steer show: {step}", file=sys.stderr, flush=True)


def _loading(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what is loaded, as they were typed: `++` marks keys of the user's own."""
    return [override.removeprefix("++") for override in overrides if override.lstrip("+~").partition("=")[0] not in OF_THE_PAGE]
