"""One HTML page from sections: nothing in it is loaded from anywhere, every text is escaped, figures follow the theme."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

from geomerge.report.drawing import NARROW, WIDE, to_svg
from geomerge.report.section import Figure, Section, figures_in
from geomerge.version import __version__

if TYPE_CHECKING:
    from markupsafe import Markup

MARK = '<meta name="generator" content="geomerge '
"""What tells a page of ours from any other file."""


def render(title: str, sections: Sequence[Section], *, headline: str = "", lead: Sequence[str] = ()) -> str:
    """Write a page.

    Args:
        title: The page's title, small above the headline.
        sections: What it shows, in order.
        headline: What came of it, in one sentence; by default the title again.
        lead: Sentences below the headline.

    Returns:
        HTML. The same arguments give the same text.

    Raises:
        ValueError: Two figures have the same name.
    """
    import jinja2

    names = [figure.name for section in sections for figure in figures_in(section.parts)]
    if len(set(names)) < len(names):
        raise ValueError(f"two figures have the same name: {sorted(names)}")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        title=title,
        headline=headline or title,
        lead=list(lead),
        sections=sections,
        anchors=_anchors(sections),
        css=_css(),
        svg=_svg,
        version=__version__,
    )


def _svg(figure: Figure) -> dict[str, Markup]:
    """The figure for both widths. Its texts were escaped by matplotlib."""
    from markupsafe import Markup

    return {"wide": Markup(to_svg(figure, WIDE)), "narrow": Markup(to_svg(figure, NARROW))}


def _css() -> Markup:
    from markupsafe import Markup

    return Markup(_read("report.css").strip())


@functools.cache
def _read(name: str) -> str:
    return resources.files("geomerge.report").joinpath("templates", name).read_text("utf-8")


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Each section's ``id``, numbered where two would be the same."""
    found: list[str] = []
    for section in sections:
        anchor, n = section.anchor, 2
        while anchor in found:
            anchor, n = f"{section.anchor}-{n}", n + 1
        found.append(anchor)
    return found
