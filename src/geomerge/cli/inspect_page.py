"""A model's anatomy for people."""

from __future__ import annotations

from typing import Any

from geomerge.cli.console import amount, clean, count, facts, heading, show, table

_LINES = 60
"""The most lines of a table."""


def show_model(model: dict[str, Any]) -> None:
    """The page on stdout.

    Args:
        model: What ``geomerge inspect --json`` prints.
    """
    show(facts(_header(model)), heading("modules"), _modules(model))
    if model["components"]:
        show(heading("components"), _components(model))
    show(heading("tensors"), *_shapes(model))
    if model["not_finite"]:
        show(heading("not finite"), *_not_finite(model["not_finite"]))


def _header(model: dict[str, Any]) -> list[tuple[str, str]]:
    files = model["files"]
    rows = [("model", clean(model["hub_id"] or model["model"]))]
    if model["revision"]:
        rows.append(("revision", clean(model["revision"])))
    guessed = " (guessed from the tensors' names: no known family fits)" if model["guessed"] else ""
    rows.append(("family", clean(model["family"]) + guessed))
    if model["architectures"]:
        rows.append(("architecture", clean(", ".join(map(str, model["architectures"])))))
    size = f"{amount(model['bytes'])}" + (f" in {count(len(files), 'file')}" if files else "")
    rows.append(("size", f"{_number(model['parameters'])} parameters, {count(model['tensors'], 'tensor')}, {size}"))
    rows.append(("dtypes", ", ".join(f"{clean(name)} ({c['tensors']:,})" for name, c in model["dtypes"].items())))
    rows.append(("vocabulary", _vocabulary(model["vocabulary"])))
    twice = set(model["stored_twice"])
    for alias, stored in model["tied"].items():
        rows.append(("tied", f"{clean(alias)} = {clean(stored)}" + (" (stored twice)" if alias in twice else "")))
    if model["buffers"]:
        rows.append(("buffers", f"{count(len(model['buffers']), 'tensor')} never merged: {clean(model['buffers'][0])}"))
    if model["quantization"]:
        method = clean(model["quantization"].get("quant_method", "unknown"))
        why = model["undecodable"]
        what = "its codes are decoded for a merge" if why is None else f"it cannot be merged: {clean(why)}"
        rows.append(("quantised", f"{method}: {what}"))
    if model["adapter"]:
        rows.append(("adapter", _adapter(model["adapter"])))
        rows += [("note", clean(note)) for note in model["adapter"]["notes"]]
    if model["not_finite"] is not None:
        bad = model["not_finite"]
        rows.append(("numbers", f"{count(len(bad), 'tensor')} with NaN or Inf" if bad else "all finite"))
    rows.append(("fingerprint", model["fingerprint"]))
    if model["sha256"]:
        rows.append(("sha256", model["sha256"]))
    return rows


def _adapter(adapter: dict[str, Any]) -> str:
    said = [f"{count(adapter['changed'], 'tensor')} changed"]
    if adapter["replaced"]:
        said.append(f"{adapter['replaced']:,} replaced")
    if adapter["ranks"]:
        ranks, scales = (
            [f"{n:.4g}" for n in dict.fromkeys((values[0], values[-1]))]
            for values in (adapter["ranks"], adapter["scales"])
        )
        said += [f"rank {' to '.join(ranks)}", f"scale {' to '.join(scales)}"]
    return f"{clean(adapter['path'])} ({', '.join([*said, *(['DoRA'] if adapter['dora'] else [])])})"


def _vocabulary(vocabulary: dict[str, Any]) -> str:
    if not vocabulary["tensors"]:
        return "none"
    rows = "the tensors disagree" if vocabulary["rows"] is None else f"{vocabulary['rows']:,} rows"
    return f"{rows} ({clean(', '.join(vocabulary['tensors']))})"


def _modules(model: dict[str, Any]) -> Any:
    rows = []
    for name, module in model["modules"].items():
        first = (clean(name) or "(the only one)", str(module["blocks"]))
        for role, counts in module["roles"].items():
            rows.append((*first, clean(role), f"{counts['tensors']:,}", _number(counts["parameters"])))
            first = ("", "")
    columns = ("module", "blocks", "role", "tensors", "parameters")
    return table(columns, rows, right=("blocks", "tensors", "parameters"))


def _components(model: dict[str, Any]) -> Any:
    rows = [
        (clean(name), clean(", ".join(m for m in c["modules"] if m)), f"{c['tensors']:,}", _number(c["parameters"]))
        for name, c in model["components"].items()
    ]
    return table(("component", "modules", "tensors", "parameters"), rows, right=("tensors", "parameters"))


def _shapes(model: dict[str, Any]) -> list[Any]:
    shapes = model["shapes"]
    several = len(model["dtypes"]) > 1
    rows = []
    for s in shapes[:_LINES]:
        shape = " × ".join(map(str, s["shape"])) or "one number"
        dtype = [s["dtype"]] if several else []
        rows.append((clean(s["pattern"]), f"{s['tensors']:,}", shape, *dtype, clean(s["role"])))
    more = [] if len(shapes) <= _LINES else [f"... and {len(shapes) - _LINES:,} more lines: --json has them all"]
    columns = ("tensors", "number", "shape", *(["dtype"] if several else []), "role")
    return [table(columns, rows, right=("number",)), *more]


def _not_finite(bad: dict[str, dict[str, int]]) -> list[Any]:
    rows = [(clean(name), f"{c['nan']:,}", f"{c['inf']:,}") for name, c in list(bad.items())[:_LINES]]
    more = [] if len(bad) <= _LINES else [f"... and {len(bad) - _LINES:,} more: --json has them all"]
    return [table(("tensor", "NaN", "Inf"), rows, right=("NaN", "Inf")), *more]


def _number(parameters: int) -> str:
    """``1.54 billion``, ``494 million``, ``12,288``."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return f"{parameters:,}"
