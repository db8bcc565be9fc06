"""The page: escaped, self-contained, small, and drawn without errors or overflow at a desk's and a phone's width."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
from chromium import PROGRAM, Chromium
from samples import TASKS, merged, scores

from geomerge.report import Cell, Code, Facts, Figure, Folded, Heading, Row, Section, Table, build, read_inputs, render
from geomerge.report.build import Inputs
from geomerge.report.drawing import VARIABLES, canvas, to_png, to_svg
from geomerge.report.sheet import combine

HOSTILE = "\"><script>alert(1)</script></style><img src=x onerror=alert(1)>'&amp;${7*7}{{7*7}}"


class Seen(html.parser.HTMLParser):
    """Every element, attribute and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two merges and their scores."""
    made = tmp_path_factory.mktemp("report")
    merged(made, "slerp")
    merged(made, "ties")
    scores(("slerp", "ties")).write(made / "scores.json")
    return made


def test_the_best_merge_is_shown_first(folder: Path) -> None:
    """In whatever order the directories are given; a merge that is called as its method is titled once."""
    given = [folder / "ties", folder / "slerp", folder / "scores.json"]
    page = build(read_inputs(given)).html()
    assert page.index("<h3>slerp</h3>") < page.index("<h3>ties</h3>")
    assert "dotted line is what guessing scores" in page


def nothing_loaded(page: str) -> None:
    """The page names no address outside of itself."""
    seen = Seen(page)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "style"}
    for tag, name, value in seen.attributes:
        if name in loading:
            for address in re.findall(r"url\(([^)]*)\)", value) if name == "style" else [value]:
                assert address.startswith("#"), (tag, name, value)
    assert not {"script", "link", "iframe", "object", "embed", "base", "img", "image"} & set(seen.tags)
    css = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css


def test_is_self_contained(folder: Path) -> None:
    """Nothing is loaded, and every reference within the page has its target."""
    page = build(read_inputs([folder / "slerp", folder / "ties", folder / "scores.json"])).html()
    nothing_loaded(page)
    seen = Seen(page)
    ids = [value for _, name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for _, name, value in seen.attributes if name == "href"}
    referred |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert referred
    assert referred <= set(ids)
    assert "http:" not in page
    assert "https:" not in page


def test_same_inputs_same_bytes(folder: Path) -> None:
    """Two pages from the same files are equal."""
    inputs = [folder / "slerp", folder / "scores.json"]
    assert build(read_inputs(inputs)).html() == build(read_inputs(inputs)).html()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """A name full of markup makes no element anywhere, and can be read on the page as it is."""
    names = {
        "merges": (HOSTILE, f"{HOSTILE}2"),
        "parents": (f"{HOSTILE}3", "$x^$"),
        "tasks": (f"{HOSTILE}4", "a\nb\u202e\x1b[2J"),
    }
    page = build(Inputs((), tuple(combine([(HOSTILE, scores(**names))])), (HOSTILE,)), command=HOSTILE).html()  # type: ignore[arg-type]
    nothing_loaded(page)
    seen = Seen(page)
    assert not any(name.startswith("on") for _, name, _ in seen.attributes)
    assert page.count("</style>") == 1
    assert HOSTILE[:20] in seen.text
    assert "$x^$" in seen.text
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "49" not in re.findall(r"<h1>.*?</h1>", page)[0]


def test_hostile_recipe_and_notes(folder: Path) -> None:
    """What a manifest and a recipe hold is text, too."""
    run = read_inputs([folder / "slerp"]).runs[0]
    bad = dict(run.manifest) | {"notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    bad["inputs"] = [dict(i) | {"model": HOSTILE + str(n), "revision": HOSTILE} for n, i in enumerate(bad["inputs"])]
    hostile = dataclasses.replace(run, recipe=HOSTILE, manifest=bad, path=Path(HOSTILE.replace("/", "-")))
    page = build(Inputs((hostile,), ())).html()
    nothing_loaded(page)
    assert HOSTILE in Seen(page).text


def test_every_part_is_shown() -> None:
    """Each kind of part is on the page with its text escaped; the sections' anchors differ."""
    figure = Figure("plain", lambda width: canvas(width, 1.0), alt="an <empty> drawing", caption="nothing <here>")
    table = Table(("name", "n"), (Row(("x<y", Cell("1.5", "1–2", "strong")), "accent"),), caption="cap<", note="note<")
    parts = ("text<", figure, table, Code("a<b", "code<"), Heading("head<"), Facts((("k<", "v<"),)))
    page = render("T<", [Section("One", parts), Section("One", (Folded("fold<", ("inside<",)),)), Section("Two")])
    text = Seen(page).text
    said = (
        "text<",
        "nothing <here>",
        "x<y",
        "1.5",
        "1–2",
        "cap<",
        "note<",
        "a<b",
        "code<",
        "head<",
        "k<",
        "v<",
        "fold<",
        "inside<",
    )
    for word in (*said, "T<"):
        assert word in text
    assert [v for t, n, v in Seen(page).attributes if (t, n) == ("section", "id")] == ["one", "one-2", "two"]
    assert ("div", "aria-label", "an <empty> drawing") in Seen(page).attributes
    with pytest.raises(ValueError, match="two figures"):
        render("T", [Section("One", (figure, Folded("more", (figure,))))])


def test_figures_follow_the_theme(folder: Path) -> None:
    """Both themes define every variable; a figure's SVG has variables in place of the palette and its text as text."""
    page = build(read_inputs([folder / "scores.json"])).html()
    css = page[page.index("<style>") : page.index("</style>")]
    for variable in VARIABLES.values():
        assert css.count(f"{variable}:") == 3  # light, dark, print
    figure = build(read_inputs([folder / "scores.json"])).sections[0].parts[0]
    assert isinstance(figure, Figure)
    svg = to_svg(figure, 7.6)
    assert "expert-a</text>" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}
    assert "var(--accent)" in svg


def test_pngs_are_pictures(folder: Path) -> None:
    """Every figure is a PNG of a print's density that is not blank."""
    import io

    from PIL import Image

    made = build(read_inputs([folder / "slerp", folder / "scores.json"])).pngs()
    assert set(made) == {"means.png", "tasks.png", "kept.png", "synergy.png", "coefficient.png"}
    for name, data in made.items():
        picture = Image.open(io.BytesIO(data))
        picture.verify()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        assert picture.width >= 900, name
        assert len(picture.getcolors(1 << 24) or ()) > 10, name


def test_matplotlib_is_left_as_it_was() -> None:
    """Drawing changes no global setting and opens no window's figure."""
    import sys

    before = dict(mpl.rcParams)
    to_png(Figure("plain", lambda width: canvas(width, 1.0), alt=""))
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.slow
def test_sixty_models_on_twenty_tasks_fit() -> None:
    """The page of a large study stays under 2 MB."""
    many = scores(
        [f"merge-{i}" for i in range(40)], [f"expert-{i}" for i in range(19)], [f"task_{i}" for i in range(20)]
    )
    page = build(Inputs((), tuple(combine([("big.json", many)])))).html()
    assert 100_000 < len(page.encode()) < 2_000_000
    assert "merge-39" in page


def pages(folder: Path) -> dict[str, Callable[[], str]]:
    """Pages that differ in what they have."""
    mixed = scores(tasks=TASKS[:2])
    lower = dataclasses.replace(mixed.tasks[1], metric="perplexity", higher_is_better=False)
    rows = tuple(dataclasses.replace(s, value=30 + s.value) if s.task == lower.name else s for s in mixed.scores)
    mixed = dataclasses.replace(mixed, tasks=(mixed.tasks[0], lower), scores=rows, means=())
    long = scores((HOSTILE + "x" * 300,), ("W" * 200, "名前" * 40), ("t" * 150, "b"))

    def of(*found: object) -> Callable[[], str]:
        return lambda: build(Inputs((), tuple(combine([(f"{i}.json", s) for i, s in enumerate(found)])))).html()  # type: ignore[misc]

    return {
        "everything": lambda: build(
            read_inputs([folder / n for n in ("slerp", "ties", "scores.json")]), command="geomerge report " + "x" * 400
        ).html(),
        "runs": lambda: build(read_inputs([folder / "slerp"])).html(),
        "mixed": of(mixed),
        "long names": of(long),
        "one model": of(scores(("only",), (), ("one",), base=None)),
        "parents only": of(scores((), ("a", "b"))),
        "two sheets": of(scores(), scores(tasks=("other",))),
    }


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed: the pages are not looked at")
def test_pages_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """No script error, no request, no horizontal overflow; narrow and wide, light, dark and in print."""
    with Chromium() as browser:
        probe = tmp_path / "probe.html"
        probe.write_text("<script>nonsense()</script><p style='width: 2000px'>wide</p>")
        browser.open(probe, 390)
        assert browser.errors()
        assert browser.evaluate("document.documentElement.scrollWidth") > 390  # the measurement can fail
        for name, make in pages(folder).items():
            place = tmp_path / "page.html"
            place.write_text(make(), "utf-8")
            for width, dark, printed in ((1280, False, False), (390, True, False), (760, False, True)):
                browser.open(place, width, dark=dark, printed=printed)
                assert browser.errors() == [], name
                assert browser.requests() == [place.resolve().as_uri()], name
                assert browser.evaluate("innerWidth") == width
                if not printed:
                    over = browser.evaluate("document.documentElement.scrollWidth - innerWidth")
                    assert over <= 0, f"{name} is {over} pixels too wide at {width}"
                colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (max(map(int, re.findall(r"\d+", colour)[:3])) < 60) is dark
                shown = "narrow" if width < 800 and not printed else "wide"
                state = browser.evaluate(
                    "[...document.querySelectorAll('.drawing > div')].filter(d => d.offsetHeight).map(d => d.className)"
                )
                assert set(state) <= {shown}, (name, width)
