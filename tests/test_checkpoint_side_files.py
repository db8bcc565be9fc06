"""The files around the weights: which belong to the model, of what kind, and which must not be followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_samples import write
from geomerge.checkpoint.side_files import KINDS, side_files
from geomerge.errors import DamagedCheckpoint, UsageError

FILES = {
    "tokenizer": [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "vocab.json",
        "spiece.model",
        "added_tokens.json",
    ],
    "chat_template": ["chat_template.jinja", "additional_chat_templates/tool.jinja"],
    "generation": ["generation_config.json"],
    "processor": ["preprocessor_config.json", "video_preprocessor_config.json"],
    "licence": ["LICENSE", "LICENSE.txt", "NOTICE"],
    "code": [],
    "other": ["sentence_bert_config.json", "config_sentence_transformers.json"],
}


def names(folder: Path, kind: str | None = None, config: dict[str, object] | None = None) -> list[str]:
    """Relative names of the side files."""
    return [str(p.relative_to(folder)) for p in side_files(folder, config, kind)]  # type: ignore[arg-type]


def test_every_kind_finds_its_own(tmp_path: Path) -> None:
    """Each file has one kind; weights, config, the parent's card and unnamed code are not copied."""
    for files in FILES.values():
        for name in files:
            write(tmp_path / name, b"{}")
    for name in (
        "model.safetensors",
        "config.json",
        "README.md",
        "modeling_x.py",
        "training_args.bin",
        ".gitattributes",
    ):
        write(tmp_path / name, b"{}")
    for kind in KINDS:
        assert names(tmp_path, kind) == sorted(FILES[kind])
    assert names(tmp_path) == sorted(name for files in FILES.values() for name in files)
    with pytest.raises(UsageError, match="known: tokenizer"):
        side_files(tmp_path, None, "tokeniser")  # type: ignore[arg-type]


def test_code_that_auto_map_names_and_what_it_imports(tmp_path: Path) -> None:
    """The named modules and their relative imports, transitively; nothing else, and no other repository's."""
    write(tmp_path / "modeling_x.py", b"from .layers_x import Layer\nfrom . import ops_x, config_x\nimport torch\n")
    write(tmp_path / "layers_x.py", b"from .modeling_x import Model\n")
    for name in ("ops_x.py", "config_x.py", "unrelated.py", "tokenization_x.py"):
        write(tmp_path / name, b"")
    config = {"auto_map": {"AutoModel": "modeling_x.Model", "AutoConfig": "someone/else--elsewhere.Config"}}
    assert names(tmp_path, "code", config) == ["config_x.py", "layers_x.py", "modeling_x.py", "ops_x.py"]
    write(tmp_path / "tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": [null, "tokenization_x.T"]}}')
    assert names(tmp_path, "code", None) == ["tokenization_x.py"]
    assert names(tmp_path, "code", {"auto_map": {"AutoModel": "../../x.Model"}}) == ["tokenization_x.py"]


def test_sentence_transformers_modules(tmp_path: Path) -> None:
    """The folders that modules.json lists, with a dense layer's weights; the transformer itself is not one of them."""
    write(
        tmp_path / "modules.json",
        b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]',
    )
    write(tmp_path / "1_Pooling" / "config.json", b"{}")
    write(tmp_path / "2_Dense" / "config.json", b"{}")
    write(tmp_path / "2_Dense" / "model.safetensors", b"{}")
    write(tmp_path / "model.safetensors", b"{}")
    assert names(tmp_path) == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "modules.json",
    ]


@pytest.mark.parametrize(
    "content", [b'[{"path": "../x"}]', b'[{"path": "/etc"}]', b'{"path": 1}', b"[", b'[{"path": 1}]']
)
def test_hostile_modules(tmp_path: Path, content: bytes) -> None:
    """modules.json must be a list of names inside the directory."""
    write(tmp_path / "modules.json", content)
    with pytest.raises(DamagedCheckpoint, match=r"modules\.json"):
        side_files(tmp_path, None)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "modeling_x.py"])
def test_link_out_of_the_directory_is_not_copied(tmp_path: Path, name: str) -> None:
    """A side file that links to the user's secrets would publish them."""
    secret = write(tmp_path / "secret", b"")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / name).symlink_to(secret)
    with pytest.raises(DamagedCheckpoint, match="symbolic link"):
        side_files(folder, {"auto_map": {"AutoModel": "modeling_x.Model"}})
