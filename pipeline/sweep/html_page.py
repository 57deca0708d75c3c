"""The answer of a sweep as one HTML file that loads nothing, from the template ``page.html``.

What MLflow knows is text of its users, and is escaped; a content security policy lets the page's
own script run, by its hash, and nothing else be run or loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple


class PageFigure(NamedTuple):
    """A figure of the page; ``drawn`` is markup, ``caption`` is text."""

    drawn: Any
    caption: str


def render(**parts: Any) -> str:
    """Fill the template: title, lead, figures, no_figure, tables, ids of their rows, notes."""
    from jinja2 import Environment

    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True).from_string(source)
    return template.render(digest=f"sha256-{digest}", **parts)


def svg_figure(draw: Callable[[IO[str]], None], caption: str) -> PageFigure:
    """Draw a figure into the page, so that its marks can be links."""
    from markupsafe import Markup

    file = io.StringIO()
    draw(file)
    return PageFigure(Markup("<svg" + file.getvalue().partition("<svg")[2]), caption)


def image_figure(draw: Callable[[IO[bytes]], None], caption: str) -> PageFigure:
    """Draw a figure as an image: a second SVG in the page would repeat the ids of the first."""
    from markupsafe import Markup

    file = io.BytesIO()
    draw(file)
    data = base64.b64encode(file.getvalue()).decode()
    image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, data)
    return PageFigure(image, caption)
