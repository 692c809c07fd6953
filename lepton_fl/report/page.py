"""One HTML page that needs no network, now or in ten years; a run's report and a sweep's are each one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any


def render_page(template: str, styles: Sequence[str], **values: Any) -> str:
    """The whole page: style, plotly.js, figures and tables in one string.

    Guarantee: the page loads nothing. Its content security policy allows no address at all and only
    the two scripts below, by digest, so that text from a study or a site can neither run nor call
    home even if it were to slip past the template's escaping.
    """
    # Imported here: a command that writes no report should not wait for them.
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    scripts = {"plotly": str(get_plotlyjs()), "charts": _resource("report.js")}
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_resource(template))
    return page.render(
        style="".join(map(_resource, styles)),
        scripts=scripts,
        policy=_content_security_policy(list(scripts.values())),
        **values,
    )


def _content_security_policy(scripts: list[str]) -> str:
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("lepton_fl.report").joinpath(name).read_text(encoding="utf-8")
