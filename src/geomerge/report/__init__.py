"""Reports: one HTML page that stands by itself, its figures, and the scores of a model card.

`render` makes a page from sections; `build` makes the sections from merges and their scores. Importing this costs next to
nothing: matplotlib and jinja2 are imported when something is drawn.
"""

from geomerge.report.build import Inputs, Report, build, read_inputs, write
from geomerge.report.card import model_index, scores_table, update_card
from geomerge.report.page import render
from geomerge.report.section import Cell, Code, Facts, Figure, Folded, Heading, Part, Row, Section, Table

__all__ = [
    "Cell",
    "Code",
    "Facts",
    "Figure",
    "Folded",
    "Heading",
    "Inputs",
    "Part",
    "Report",
    "Row",
    "Section",
    "Table",
    "build",
    "model_index",
    "read_inputs",
    "render",
    "scores_table",
    "update_card",
    "write",
]
