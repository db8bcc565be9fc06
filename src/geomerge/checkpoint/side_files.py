"""The files of a model directory that are neither weights nor ``config.json``: what the output needs a copy of.

Each file has a kind, so that the tokenizer can come from one parent and the rest from another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from geomerge.checkpoint.folder import check_contained, check_name
from geomerge.checkpoint.strict_json import parse_json, read_json
from geomerge.errors import DamagedCheckpoint, UsageError

Kind = Literal["tokenizer", "chat_template", "generation", "processor", "licence", "code", "other"]
"""``code`` is custom Python that ``auto_map`` names; ``other`` is what sentence-transformers and open_clip need."""

KINDS: tuple[Kind, ...] = get_args(Kind)

_PATTERNS: dict[Kind, tuple[str, ...]] = {
    "tokenizer": (
        *("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer_config.json", "tekken.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes"),
        *("spiece.model", "sentencepiece.bpe.model", "spm.model", "*.spm", "*.tiktoken", "normalizer.json"),
    ),
    "chat_template": (
        *("chat_template.jinja", "chat_template.json", "chat_templates/*.jinja"),
        "additional_chat_templates/*.jinja",
    ),
    "generation": ("generation_config.json",),
    "processor": (
        *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
        *("video_preprocessor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json"),
    ),
    "licence": ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
    "other": (
        "modules.json",
        "sentence_bert_config.json",
        "sentence_*_config.json",
        "config_sentence_transformers.json",
        "open_clip_config.json",
    ),
}
_RELATIVE_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]+(.+)", re.MULTILINE)


def side_files(folder: Path, config: dict[str, Any] | None, kind: Kind | None = None) -> list[Path]:
    """List a model directory's side files.

    Args:
        folder: The directory.
        config: Its ``config.json``, whose ``auto_map`` may name custom code.
        kind: Only files of this kind; all when ``None``.

    Returns:
        Paths below `folder` in the order of their names.

    Raises:
        DamagedCheckpoint: A name or a link that leads out of the directory, or a damaged ``modules.json``.
        UsageError: An unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown kind of file {kind!r}", hint=f"known: {', '.join(KINDS)}")
    found: set[Path] = set()
    for this, patterns in _PATTERNS.items():
        if kind in (None, this):
            found.update(_matching(folder, patterns))
    if kind in (None, "other"):
        found.update(_sentence_transformers(folder))
    if kind in (None, "code"):
        found.update(_code(folder, config))
    for path in found:
        check_contained(path, folder)
    return sorted(found)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        subfolder, _, name = pattern.rpartition("/")
        place = folder / subfolder
        if place.is_dir():
            yield from (
                p
                for p in place.iterdir()
                if (p.name == name or ("*" in name and fnmatchcase(p.name, name))) and p.is_file()
            )


def _sentence_transformers(folder: Path) -> Iterator[Path]:
    """The files of the modules that ``modules.json`` lists: ``1_Pooling/config.json``, ``2_Dense`` with its weights."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    check_contained(path, folder)
    # The file is a list, which the strict parser takes only inside an object.
    modules = parse_json(b'{"modules":' + path.read_bytes() + b"}", str(path), what="modules.json")["modules"]
    if not isinstance(modules, list):
        raise DamagedCheckpoint("modules.json must be a list", where=str(path))
    for module in modules:
        name = module.get("path") if isinstance(module, dict) else None
        if not name:  # the transformer itself lies in the directory
            continue
        if not isinstance(name, str):
            raise DamagedCheckpoint(f"modules.json has the path {name!r:.100}", where=str(path))
        check_name(name, str(path), what="modules.json")
        place = folder / name
        if place.is_dir() and place.resolve() != folder.resolve():
            yield from (p for p in place.iterdir() if p.suffix in (".json", ".safetensors", ".txt") and p.is_file())


def _code(folder: Path, config: dict[str, Any] | None) -> Iterator[Path]:
    """The Python files that an ``auto_map`` names, and the files of the same directory that those import."""
    configs = [config]
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            check_contained(path, folder)
            configs.append(read_json(path, what=name, constants=True))
    waiting = [module for c in configs if c for module in _modules_of(c.get("auto_map"))]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        path = folder / f"{module}.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        check_contained(path, folder)
        yield path
        source = path.read_text("utf-8", errors="replace")
        for package, names in _RELATIVE_IMPORT.findall(source):
            waiting.extend([package.split(".")[0]] if package else re.findall(r"\w+", names))


def _modules_of(auto_map: Any) -> Iterator[str]:
    """Module names in ``{"AutoModel": "modeling_x.Model"}``; ``owner/name--module.Class`` is another repository's."""
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map if isinstance(auto_map, list) else ()
    for value in values:
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and re.fullmatch(r"\w+\.\w+", entry):
                yield entry.split(".")[0]
