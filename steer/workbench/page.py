"""The page of the workbench: one HTML text with its style and its script inside, and the policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from steer.report import palette

SCRIPTS = ("requests.js", "plan.js", "answers.js", "controls.js")  # one script, in this order, behind that of the reports


def page() -> tuple[str, str]:
    """The page, and its content security policy: this script, this style, requests to the server that it came from, and nothing else.

    It holds nothing of a model or a plan: the script asks for that, and puts it there as text.
    """
    script = _resource("steer.report", "element.js") + "".join(_resource("steer.workbench", name) for name in SCRIPTS)
    style = "\n".join([palette.css(), _resource("steer.report", "style.css"), _resource("steer.workbench", "workbench.css")])
    html = _resource("steer.workbench", "page.html").replace("{{ style }}", style).replace("{{ script }}", script)
    return html, "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _resource(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")
