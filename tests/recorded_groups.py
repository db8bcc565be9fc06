"""What the methods record most: ``python tests/recorded_groups.py`` writes the list of what is compiled into one loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

from geomerge.methods import native, program, registry
from geomerge.methods.base import Elementwise, Method
from geomerge.methods.native.build import GROUPS
from geomerge.methods.steps import Layout, Structure, groups, laid_out, ordered
from geomerge.testing.conformance import Case, cases
from geomerge.testing.inputs import merge

COUNTS = (1, 2, 3, 4)
"""Numbers of experts; 1 for methods that take no more."""


def _variants(method: type[Method]) -> Iterator[dict[str, Any]]:
    """Parameters: as they are, as mergekit has them, and each choice of what has two or more."""
    yield {}
    yield method.mergekit
    for name, p in method.parameters().items():
        if isinstance(p.default, bool):
            yield {name: not p.default}
        for choice in p.choices:
            if choice != p.default:
                yield {name: choice}


def recorded_cases() -> Iterator[Case]:
    """The methods that are recorded, for two to four experts (or the one that they take)."""
    for name, method in registry.all_methods().items():
        if issubclass(method, Elementwise) and method.recorded:
            counts = [n for n in COUNTS if n > 1 or method.models[1] == 1]
            for case in cases(name, counts=counts):
                for values in _variants(method):
                    yield Case(method, case.count, case.based, {**case.values, **values}, case.neutral)


def recorded() -> list[str]:
    """The groups of all that methods record, in alphabetic order."""
    found: set[str] = set()

    def spy(structure: Structure) -> Layout:
        found.update(text for _, text in groups(structure, ordered(structure)))
        return laid_out(structure)

    with mock.patch.object(program, "laid_out", spy):
        for case in recorded_cases():
            merge(case.made(), case.models((31, 67)))
    return sorted(found)


if __name__ == "__main__":
    assert native.available()
    GROUPS.write_text("".join(f"{text}\n" for text in recorded()))
