"""geomerge.tokens.chat: where a chat template comes from, and what the bundled ones render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from geomerge.errors import RecipeError
from geomerge.tokens.chat import BUNDLED, bundled, read, resolve
from token_samples import ENGLISH, bpe, save

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}
WITHOUT_SYSTEM = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "mistral": "<s>[INST] Hi [/INST]",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nHi\n\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n",
}


def tokenizer_with(template: str, folder: Path) -> Any:
    """A transformers tokenizer that has this chat template."""
    from transformers import AutoTokenizer

    save(folder, bpe(ENGLISH, 260), bos_token="<s>", eos_token="</s>")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_templates_render_the_published_formats(name: str, tmp_path: Path) -> None:
    """With transformers' own Jinja environment: a talk with a system message, and a single user turn."""
    tokenizer = tokenizer_with(bundled(name), tmp_path)
    render = tokenizer.apply_chat_template
    assert render(TALK, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    assert render(TALK[1:2], tokenize=False) == WITHOUT_SYSTEM[name]


@pytest.mark.parametrize(("name", "talk"), [("mistral", TALK[2:]), ("alpaca", [TALK[1], {**TALK[1], "role": "tool"}])])
def test_bundled_templates_refuse_what_their_format_lacks(
    name: str, talk: list[dict[str, str]], tmp_path: Path
) -> None:
    """A turn that the format cannot express is an error, not silently dropped."""
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="format"):
        tokenizer_with(bundled(name), tmp_path).apply_chat_template(talk, tokenize=False)


def model(folder: Path, template: object, *, as_file: bool = False) -> Path:
    """A model's directory with a chat template in one of the places where it may be."""
    folder.mkdir()
    if as_file:
        (folder / "chat_template.jinja").write_text(str(template))
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_read_finds_every_place(tmp_path: Path) -> None:
    """The jinja file first; the config's text; the default of several named ones; the processor's JSON; nothing."""
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert read(model(tmp_path / "config", "c")) == "c"
    assert read(model(tmp_path / "named", named)) == "d"
    assert read(model(tmp_path / "rag", named[:1])) is None
    both = model(tmp_path / "both", "c")
    (both / "chat_template.jinja").write_text("j")
    assert read(both) == "j"
    processor = tmp_path / "processor"
    processor.mkdir()
    (processor / "chat_template.json").write_text('{"chat_template": "p"}')
    assert read(processor) == "p"
    assert read(tmp_path) is None


def test_auto_takes_the_most_common(tmp_path: Path) -> None:
    """Inputs without a template do not vote; a tie goes to the first; nobody's is None."""
    x, y = model(tmp_path / "x", "X"), model(tmp_path / "y", "Y", as_file=True)
    z, none = model(tmp_path / "z", "Y"), tmp_path / "none"
    none.mkdir()
    assert resolve("auto", [x, y, z, none, none, None]) == "Y"
    assert resolve("auto", [none, x, y]) == "X"
    assert resolve("auto", [none, None]) is None
    assert resolve(None, [x]) is None


def test_names_text_and_files(tmp_path: Path) -> None:
    """A bundled name, Jinja text as it is, and a file relative to the recipe's folder."""
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    assert resolve("chatml", []) == bundled("chatml")
    assert resolve("{% for m in messages %}{{ m }}{% endfor %}", []) == "{% for m in messages %}{{ m }}{% endfor %}"
    assert resolve("my.jinja", [], folder=tmp_path) == "{{ messages }}"
    assert resolve(str(tmp_path / "my.jinja"), []) == "{{ messages }}"


def test_transformers_extensions_are_valid() -> None:
    """Loop controls and the generation block, which only transformers knows, pass the syntax check unchanged."""
    text = (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{%- generation -%}{{ m }}{% endgeneration %}{% endfor %}"
    )
    assert resolve(text, []) == text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("", "not a bundled name"),
        ("no/such/file.jinja", "not a file"),
        ("just\ntext", "not Jinja text"),
        ("x" * 5000, "not a file"),
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("{{ messages", "not valid Jinja"),
    ],
)
def test_wrong_values_are_refused(value: str, says: str) -> None:
    """Misspelt names, missing files and broken Jinja name the recipe's line."""
    with pytest.raises(RecipeError, match=says) as caught:
        resolve(value, [], where="recipe.yml:3")
    assert caught.value.where == "recipe.yml:3"


def test_broken_jinja_in_a_file_names_the_file(tmp_path: Path) -> None:
    """The place of the mistake is the file, not the recipe."""
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(RecipeError) as caught:
        resolve("bad.jinja", [], where="recipe.yml:3", folder=tmp_path)
    assert caught.value.where == str(tmp_path / "bad.jinja")
