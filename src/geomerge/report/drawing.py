"""Colours and type of all figures, and the way from a matplotlib figure to SVG that follows the page's theme, or to PNG.

Every colour is drawn as the light theme's and becomes a CSS variable in the SVG, so the page decides; text stays text and
takes the page's font. matplotlib's global state is left as it was found, and pyplot is never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from geomerge.report.section import Figure
from geomerge.report.words import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDE, NARROW = 7.6, 3.65
"""Inches: a page's column, and a phone's."""

_DPI = 200


class Colour:
    """The palette: one accent for the merge, greys for what it is compared with. Safe for colour-blind readers."""

    PAPER = "#fefefd"
    INK = "#1b1f24"
    MUTED = "#6a727c"  # text and lines of less weight
    PARENT = "#9aa3ad"
    BASE = "#ccd1d7"
    RULE = "#e2e5e9"  # grid lines
    ACCENT = "#0b62ab"  # the merge
    SOFT = "#8fbbe0"  # other merges
    WARM = "#c2570c"  # the other sign


VARIABLES = {
    Colour.PAPER: "--paper",
    Colour.INK: "--ink",
    Colour.MUTED: "--muted",
    Colour.PARENT: "--parent",
    Colour.BASE: "--base",
    Colour.RULE: "--rule",
    Colour.ACCENT: "--accent",
    Colour.SOFT: "--soft",
    Colour.WARM: "--warm",
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model may be called $x$
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": Colour.INK,
    "axes.labelcolor": Colour.MUTED,
    "axes.titlecolor": Colour.INK,
    "axes.edgecolor": Colour.RULE,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.use_mathtext": False,
    "xtick.color": Colour.RULE,
    "ytick.color": Colour.RULE,
    "xtick.labelcolor": Colour.MUTED,
    "ytick.labelcolor": Colour.INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": Colour.RULE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 100,
    "path.simplify": True,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The figures' style, for as long as the context lasts. Glyphs that the font lacks are the browser's business."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        for name, value in _STYLE.items():
            mpl.rcParams[name] = value  # type: ignore[index]
        yield


def canvas(width: float, height: float, *, hspace: float = 0.02, wspace: float = 0.02) -> Drawing:
    """An empty drawing of so many inches that finds its own margins."""
    from matplotlib.figure import Figure as Drawing
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, hspace=hspace, wspace=wspace)
    return Drawing(figsize=(width, height), layout=engine)


def label(text: object, longest: int = 26) -> str:
    """A name short enough to stand in a figure."""
    return visible(text, longest)


def percent_axis(axes: Axes, *, vertical: bool = False) -> None:
    """Shares as per cent, few ticks."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def to_svg(figure: Figure, width: float) -> str:
    """The figure as an ``<svg>`` element for a page: themed, without anything that would be loaded from elsewhere."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    with style():
        # The ids of clip paths come from this salt: no two drawings of a page may share one.
        mpl.rcParams["svg.hashsalt"] = f"{figure.name}/{width}"
        drawing = figure.draw(min(width, figure.width))
        FigureCanvasSVG(drawing).print_svg(written, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
        wide, high = (round(96 * float(inches), 1) for inches in drawing.get_size_inches())
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    start, rest = text.split(">", 1)
    box = re.search(r'viewBox="[\d. -]+"', start)
    salt = hashlib.sha256(f"{figure.name}/{width}".encode()).hexdigest()[:8]
    rest = re.sub(r'\bid="([\w.-]+)"', rf'id="f{salt}-\1"', rest)
    rest = re.sub(r'xlink:href="#', rf'href="#f{salt}-', rest)
    rest = re.sub(r"url\(#", rf"url(#f{salt}-", rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    rest = re.sub(r"\"?'DejaVu Sans'\"?|&quot;DejaVu Sans&quot;", "var(--sans)", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    return f'<svg width="{wide}" height="{high}" {box[0] if box else ""} aria-hidden="true" focusable="false">{rest.strip()}'


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of the light theme."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = io.BytesIO()
    with style():
        drawing = figure.draw(figure.width)
        drawing.set_dpi(_DPI)
        drawing.set_facecolor("#ffffff")
        FigureCanvasAgg(drawing).print_png(written, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return written.getvalue()
