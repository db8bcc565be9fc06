"""The sections that show merges: recipe, parents, coefficients over depth; rounding, time and memory; provenance."""

from __future__ import annotations

import re
from collections.abc import Sequence

from geomerge.report.coefficients import Coefficients, coefficients_figure, read_coefficients
from geomerge.report.runs import Run
from geomerge.report.section import Code, Facts, Folded, Heading, Part, Row, Section, Table
from geomerge.report.sheet import Sheet
from geomerge.report.words import MISSING, amount, count, lines, number, percent, seconds, short_hash, visible
from geomerge.version import __version__

_OPEN = 3
"""So many runs are shown open, the others folded."""

_MOST_RUNS = 40
_WORST = 5
_ROUNDING = (
    "Writing a merge in its dtype rounds it. What rounding takes is given as a share of the change to the reference model "
    "(of its norm), estimated on a sample of every tensor."
)


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """How the models were merged, and what rounding took."""
    if not runs:
        return []
    shown = [(run, _how(run, f"{i}-" if len(runs) > 1 else "")) for i, run in enumerate(runs[:_MOST_RUNS], 1)]
    parts: list[Part] = []
    for i, (run, how) in enumerate(shown):
        if len(shown) == 1:
            parts += how
        else:
            parts.append(Folded(_titled(run), how) if i >= _OPEN else Heading(_titled(run)))
            parts += how if i < _OPEN else []
    if len(runs) > _MOST_RUNS:
        parts.append(f"{count(len(runs) - _MOST_RUNS, 'further merge')} not shown.")
    made = [Section("How it was merged" if len(runs) == 1 else "How they were merged", parts, "merged")]
    rounding = _rounding(runs)
    return made + ([rounding] if rounding is not None else [])


def _titled(run: Run) -> str:
    name, method = visible(run.name, 60), visible(run.method)
    return name if name == method else f"{name}: {method}"


def _how(run: Run, prefix: str) -> list[Part]:
    facts = [("method", _title(run))]
    paper = _paper(run)
    if paper:
        facts.append(("published in", paper))
    stages = run.manifest["stages"]
    if len(stages) > 1:
        facts.append(("stages", " → ".join(visible(s["method"]) for s in stages)))
    if stages[-1].get("compat"):
        facts.append(("profile", f"compat: {visible(stages[-1]['compat'])}"))
    size = [count(len(run.manifest["tensors"]), "tensor")]
    if run.parameters is not None:
        size.append(count(run.parameters, "parameter"))
    facts.append(("output", ", ".join(size)))
    found = read_coefficients(run)
    facts += [(visible(c.quantity, 40), _same(run, c)) for c in found if not c.vary and _worth_saying(c)]
    parts: list[Part] = [Facts(facts), _parents(run)]
    varying = [c for c in found if c.vary]
    parts += [
        coefficients_figure(run, c, f"{prefix}{re.sub(r'[^a-z0-9]+', '-', c.quantity.lower()) or 'parameter'}")
        for c in varying[:3]
    ]
    notes = [visible(note, 400) for note in run.manifest.get("notes", []) if isinstance(note, str)]
    parts += [f"Note: {note}." if not note.endswith(".") else f"Note: {note}" for note in notes[:10]]
    if run.recipe:
        parts.append(Code(lines(run.recipe.strip("\n")), "The recipe"))
    return parts


def _worth_saying(found: Coefficients) -> bool:
    return found.quantity in {
        "coefficient",
        "weight",
        "density",
        "t",
        "lambda",
        "gamma",
        "epsilon",
        "select_topk",
    } and not (found.quantity == "epsilon" and len(found.grids) == 1)


def _same(run: Run, found: Coefficients) -> str:
    """``0.5 expert-a, 0.5 expert-b in every tensor``, or about that much in each, or in those that have any."""
    said = []
    for grid in found.grids[:12]:
        values = grid.values.values()
        value = number(round(sum(values) / len(values), 4), 3)
        said.append(f"{value} {grid.title}" if len(found.grids) > 1 else value)
    about = "" if all(grid.spread == 0 for grid in found.grids) else "about "
    merged = sum(1 for entry in run.manifest["tensors"].values() if entry.get("method") is not None)
    where = "every tensor" if found.tensors >= merged else f"{found.tensors:,} of {merged:,} tensors"
    return f"{about}{', '.join(dict.fromkeys(said))}{', …' if len(found.grids) > 12 else ''} in {where}"


def _title(run: Run) -> str:
    from geomerge.errors import GeomergeError
    from geomerge.methods import registry

    try:
        return f"{registry.get(run.method).title} ({run.method})"
    except (GeomergeError, KeyError):
        return visible(run.method)


def _paper(run: Run) -> str | None:
    from geomerge.errors import GeomergeError
    from geomerge.methods import registry

    try:
        return registry.get(run.method).paper or None
    except (GeomergeError, KeyError):
        return None


def _parents(run: Run) -> Table:
    rows = []
    for name, model in zip(run.parents, run.inputs, strict=True):
        files = model.get("files")
        sizes = [f.get("size") for f in files.values() if isinstance(f, dict)] if isinstance(files, dict) else []
        nbytes = sum(s for s in sizes if isinstance(s, int))
        rows.append(
            Row(
                [
                    visible(name, 60),
                    amount(nbytes) if nbytes else MISSING,
                    short_hash(model.get("revision")),
                    short_hash(model.get("fingerprint")),
                ]
            )
        )
    return Table(("parent", "weights", "revision", "fingerprint"), rows, frozenset({0, 2, 3}))


def _rounding(runs: Sequence[Run]) -> Section | None:
    known = [run for run in runs if run.rounding_loss is not None]
    if not known:
        return None
    worst = []
    for run in known[:_OPEN]:
        losses = [
            (float(e["rounding_loss"]), name)
            for name, e in run.manifest["tensors"].items()
            if e.get("rounding_loss") is not None
        ]
        for loss, name in sorted(losses, key=lambda pair: (-pair[0], pair[1]))[:_WORST]:
            worst.append(Row([visible(name, 80), visible(run.name, 40), f"{percent(loss)} %"]))
    rows = [Row([visible(run.name, 60), f"{percent(run.rounding_loss)} %"]) for run in known]
    parts: list[Part] = [
        _ROUNDING,
        Table(("merge", "lost by rounding"), rows),
    ]
    if worst:
        parts.append(
            Folded("The tensors that lose most", (Table(("tensor", "merge", "lost"), worst, frozenset({0, 1})),))
        )
    return Section("Rounding", parts)


def cost_section(sheets: Sequence[Sheet], runs: Sequence[Run]) -> Section | None:
    """Time and memory, as far as they were measured."""
    rows = [
        Row(
            [
                visible(run.name, 60),
                "merge",
                MISSING if run.parameters is None else f"{run.parameters:,}",
                MISSING if run.nbytes is None else amount(run.nbytes),
                seconds(run.timing.seconds),
                amount(run.timing.peak_memory) if run.timing.peak_memory else MISSING,
            ]
        )
        for run in runs
        if run.timing is not None
    ]
    seen = False
    for sheet in sheets:
        for model in [*sheet.merges, *sheet.parents, *sheet.base][:60]:
            found = [s for t in sheet.tasks if (s := sheet.score(model.name, t.name)) is not None]
            seen = seen or bool(found)
            rows.append(
                Row(
                    [
                        visible(model.name, 60),
                        "evaluation",
                        f"{model.parameters:,}",
                        MISSING,
                        seconds(sum(s.seconds for s in found)) if found else MISSING,
                        MISSING,
                    ]
                )
            )
    if not rows:
        return None
    notes = ["Evaluation: all tasks together, when they were first run." if seen else ""]
    if any(run.timing is None for run in runs):
        notes.append(
            "A merge's time is not part of its record; it is shown when the output of “geomerge merge --json” is given too."
        )
    table = Table(
        ("model", "step", "parameters", "weights", "time", "peak memory"),
        rows,
        frozenset({0, 1}),
        note=" ".join(note for note in notes if note),
    )
    return Section("Time and memory", (table,))


def provenance_section(sheets: Sequence[Sheet], runs: Sequence[Run], command: str, files: Sequence[str]) -> Section:
    """Versions, hashes, seeds, settings and the command: what is needed to do it again."""
    parts: list[Part] = []
    if command:
        parts.append(Code(visible(command, 4000), "The command that made this page"))
    facts = [("report", f"geomerge {__version__}"), ("read from", ", ".join(visible(f, 200) for f in files[:20]))]
    parts.append(Facts([f for f in facts if f[1]]))
    parts += [
        Folded(f"Merge {visible(run.name, 60)}", (Facts(_run_facts(run)), _hashes(run))) for run in runs[:_MOST_RUNS]
    ]
    parts += [
        Folded(f"Evaluation {visible(', '.join(sheet.labels), 80)}", (Facts(_sheet_facts(sheet)), *_identities(sheet)))
        for sheet in sheets
    ]
    return Section("Provenance", parts)


def _run_facts(run: Run) -> list[tuple[str, str]]:
    stage = run.manifest["stages"][-1]
    versions = run.manifest.get("versions", {})
    return [
        ("geomerge", visible(run.manifest["geomerge"])),
        *((visible(k, 40), visible(v)) for k, v in list(versions.items())[:20]),
        ("seed", visible(stage.get("seed", MISSING))),
        ("rounding", visible(stage.get("rounding", MISSING))),
        ("plan", visible(run.manifest["plan"])),
    ]


def _hashes(run: Run) -> Table:
    rows = [
        Row([visible(name, 60), visible(i.get("fingerprint", MISSING))])
        for name, i in zip(run.parents, run.inputs, strict=True)
    ]
    return Table(("parent", "fingerprint"), rows, frozenset({0, 1}))


def _sheet_facts(sheet: Sheet) -> list[tuple[str, str]]:
    facts = [("geomerge", visible(sheet.scores.geomerge)), ("made", visible(sheet.scores.made or MISSING))]
    for key, value in list(sheet.scores.settings.items())[:40]:
        said = ", ".join(f"{k} {v}" for k, v in list(value.items())[:40]) if isinstance(value, dict) else value
        facts.append((visible(key, 40), visible(MISSING if said in (None, "") else said, 600)))
    return facts


def _identities(sheet: Sheet) -> tuple[Part, ...]:
    models = [
        Row([visible(m.name, 60), visible(m.source, 120), visible(m.hash, 80)]) for m in sheet.scores.models[:100]
    ]
    tasks = [
        Row(
            [
                visible(t.name, 60),
                visible(t.source, 60),
                f"{t.samples:,}",
                short_hash(t.version),
                short_hash(t.sample_hash),
            ]
        )
        for t in sheet.tasks[:100]
    ]
    return (
        Table(("model", "source", "hash"), models, frozenset({0, 1, 2})),
        Table(("task", "source", "samples", "version", "sample hash"), tasks, frozenset({0, 1, 3, 4})),
    )
