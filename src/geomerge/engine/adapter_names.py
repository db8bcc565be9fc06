"""From an adapter's names to its base's tensors.

PEFT writes the names that modules have in memory. On disk a model may have one more or one less leading component
(``transformer.h.0`` and ``h.0``), or another one (``model.language_model`` and ``language_model.model``); one such change must
explain all names. kohya's names have underscores in place of dots, and a prefix that names a part of a pipeline.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from geomerge.checkpoint.lora import KOHYA_PREFIXES, Adapter
from geomerge.errors import IncompatibleModels, did_you_mean


def base_names(
    adapter: Adapter, known: Collection[str], paths: Sequence[str], ref: str
) -> tuple[dict[str, str], list[str]]:
    """The base's tensor for each of an adapter's.

    Args:
        adapter: The adapter.
        known: The base's tensors.
        paths: The adapter's names: ``MODULE.weight`` for low-rank changes, and those of whole tensors.
        ref: For messages.

    Returns:
        The names, and notes on what belongs to another part of a pipeline.

    Raises:
        IncompatibleModels: A name has no tensor, or the names can be explained in two ways.
    """
    if adapter.layout == "kohya":
        return _kohya_names(known, paths, ref)
    direct = [p for p in paths if p in known]
    if len(direct) == len(paths):
        return {p: p for p in paths}, []
    found: dict[tuple[str, ...], dict[str, str]] = {}
    lost = next(p for p in paths if p not in known)
    for cut, put in _changes_of_prefix(lost, known):
        names = {p: p if p in known else put + p.removeprefix(cut) for p in paths if p in known or p.startswith(cut)}
        if len(names) == len(paths) and all(n in known for n in names.values()):
            found[tuple(names.values())] = names
    if len(found) > 1:
        raise IncompatibleModels(
            f"the adapter's names can be explained in {len(found)} ways: {lost} may be "
            + " or ".join(sorted(names[lost] for names in found.values())),
            where=ref,
        )
    if not found:
        missing = [p for p in paths if p not in known]
        more = f" and {len(missing) - 1} more of its names" if len(missing) > 1 else ""
        said = f" (it names {adapter.base!r} as its base)" if adapter.base else ""
        raise IncompatibleModels(
            f"the base has no {missing[0]}{more}: this adapter is for another model{said}",
            where=ref,
            hint=did_you_mean(missing[0], known),
        )
    return next(iter(found.values())), []


def _changes_of_prefix(path: str, known: Collection[str]) -> list[tuple[str, str]]:
    """How leading components could be exchanged so that a name becomes a known one: the longest common end first."""
    parts = path.split(".")
    for i in range(len(parts) - 1):
        end = ".".join(parts[i:])
        ways = [n.removesuffix(end) for n in known if n == end or n.endswith("." + end)]
        if ways:
            cut = path.removesuffix(end)
            return [(cut, put) for put in sorted(ways)]
    return []


def _kohya_names(known: Collection[str], paths: Sequence[str], ref: str) -> tuple[dict[str, str], list[str]]:
    flat: dict[str, list[str]] = {}
    for name in known:
        if name.endswith(".weight"):
            flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    groups: dict[str, list[str]] = {}
    for path in paths:
        prefix = next(p for p in KOHYA_PREFIXES if path.startswith(p))
        groups.setdefault(prefix, []).append(path)
    fits: dict[str, dict[str, str]] = {}
    left: dict[str, list[str]] = {}
    for prefix, members in groups.items():
        names: dict[str, str] = {}
        for path in members:
            ways = flat.get(path.removeprefix(prefix).removesuffix(".weight"), [])
            if len(ways) > 1:
                raise IncompatibleModels(f"{path.removesuffix('.weight')} may be {' or '.join(ways)}", where=ref)
            if ways:
                names[path] = ways[0]
        if len(names) == len(members):
            fits[prefix] = names
        elif names:
            lost = next(p for p in members if p not in names)
            raise IncompatibleModels(
                f"the base has no module for {lost.removesuffix('.weight')}, though it has {len(names)} others of "
                f"{len(members)} that begin with {prefix}",
                where=ref,
                hint="is this the base that the adapter was trained on?",
            )
        else:
            left[prefix] = members
    if not fits:
        raise IncompatibleModels(
            f"the base has none of the adapter's {len(paths)} modules, such as {paths[0].removesuffix('.weight')}",
            where=ref,
            hint="give the part of the pipeline that they are for, such as its unet/ or text_encoder/",
        )
    if len(fits) > 1:
        raise IncompatibleModels(
            f"the adapter's modules of {' and of '.join(fits)} all fit this base: which are meant?", where=ref
        )
    notes = [f"{len(m)} modules of the adapter ({p}…) are for another part of the pipeline" for p, m in left.items()]
    return next(iter(fits.values())), notes
