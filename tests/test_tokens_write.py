"""geomerge.tokens.write: the output's tokenizer loads and gives the planned ids, in tokenizers and in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from geomerge.errors import IncompatibleModels
from geomerge.recipe.values import ModelRef, TokenizerSpec
from geomerge.tokens.policy import build
from geomerge.tokens.rows import TokenPlan
from geomerge.tokens.vocabulary import AddedToken as Added
from geomerge.tokens.vocabulary import Vocabulary
from geomerge.tokens.write import OutputTokenizer, files, write
from token_samples import ENGLISH, GERMAN, SCRIPTS, bpe, load, rule, save, spec, special, unigram, wordpiece

SAMPLES = {
    "bpe": (bpe(ENGLISH, 290, special("<|end|>")), bpe(GERMAN, 300, special("<|im_start|>"), AddedToken("<note>"))),
    "wordpiece": (wordpiece(ENGLISH, 70, special("[CLS]")), wordpiece(GERMAN, 70, special("<|im_start|>"))),
    "unigram": (unigram(ENGLISH, 45, special("</s>")), unigram(GERMAN, 45, special("<|im_start|>"))),
}


@pytest.fixture(params=SAMPLES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two models' directories with tokenizers of one kind."""
    first, second = SAMPLES[request.param]
    return save(tmp_path / "a", first), save(tmp_path / "b", second)


def plan_for(policy: TokenizerSpec, *directories: Path) -> TokenPlan:
    """The plan for these models; the first is the base."""
    vocabularies = [load(directory) for directory in directories]
    return build(policy, [(ModelRef(d.name), v, v.size) for d, v in zip(directories, vocabularies)], 0)


def check_ids(out: Path, plan: TokenPlan) -> Tokenizer:
    """tokenizers and transformers know exactly the plan's tokens under the plan's rows."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    planned = {token: row for row, token in enumerate(plan.names) if token is not None}
    assert tokenizer.get_vocab() == planned
    assert AutoTokenizer.from_pretrained(out).get_vocab() == planned
    assert load(out).ids == planned
    return tokenizer


@pytest.mark.parametrize(("source", "donor"), [("base", 0), ("b", 1)])
def test_one_models_tokenizer_is_copied(pair: tuple[Path, Path], tmp_path: Path, source: str, donor: int) -> None:
    """The donor's files byte for byte, and its ids for texts in several scripts."""
    plan = plan_for(spec(source), *pair)
    write(plan.tokenizer, tmp_path / "out")
    for file in pair[donor].iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    check_ids(tmp_path / "out", plan)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    reference = Tokenizer.from_file(str(pair[donor] / "tokenizer.json"))
    for text in SCRIPTS:
        assert loaded(text, add_special_tokens=False)["input_ids"] == reference.encode(text).ids


def test_union_has_every_token_under_its_row(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every input's tokens exist, the base's ids are kept, and rows point at the right tokens in each input."""
    plan = plan_for(spec("union"), *pair)
    write(plan.tokenizer, tmp_path / "out")
    ids = check_ids(tmp_path / "out", plan).get_vocab()
    for k, directory in enumerate(pair):
        own = load(directory).ids
        assert ids.keys() >= own.keys()
        assert {token: plan.row_maps[k][ids[token]] for token in own} == own
    base = load(pair[0]).ids
    assert {token: ids[token] for token in base} == base


def test_union_keeps_special_flags(tmp_path: Path) -> None:
    """Another model's special token stays special: it is one id, and decoding skips it."""
    a, b = save(tmp_path / "a", SAMPLES["bpe"][0]), save(tmp_path / "b", SAMPLES["bpe"][1])
    write(plan_for(spec("union"), a, b).tokenizer, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    (index,) = loaded("<|im_start|>")["input_ids"]
    assert loaded.convert_ids_to_tokens(index) == "<|im_start|>"
    assert loaded.decode([index], skip_special_tokens=True) == ""
    assert loaded.decode(loaded("<note>")["input_ids"], skip_special_tokens=True) == "<note>"


def test_union_that_adds_only_special_tokens_segments_like_the_base(tmp_path: Path) -> None:
    """The common case, a base and a chat fine-tune: ordinary text gets the base's ids."""
    a = save(tmp_path / "a", bpe(ENGLISH, 290, special("<|end|>")))
    b = save(tmp_path / "b", bpe(ENGLISH, 290, special("<|im_start|>"), special("<|end|>")))
    plan = plan_for(spec("union"), a, b)
    write(plan.tokenizer, tmp_path / "out")
    out, base = (Tokenizer.from_file(str(d / "tokenizer.json")) for d in (tmp_path / "out", a))
    for sample in SCRIPTS:
        text = sample.replace("<|im_start|>", "")
        assert out.encode(text).ids == base.encode(text).ids
    assert plan.names[-1] == "<|im_start|>"


def test_the_configs_lists_follow(tmp_path: Path) -> None:
    """added_tokens_decoder gains the new tokens; unknown fields survive; older formats that disagree are left out."""
    a = save(tmp_path / "a", SAMPLES["bpe"][0], model_max_length=77, added_tokens_decoder={}, chat_template="{{ x }}")
    b = save(tmp_path / "b", SAMPLES["bpe"][1])
    (a / "vocab.json").write_text("{}")
    (a / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    plan = plan_for(spec("union"), a, b)
    written = write(plan.tokenizer, tmp_path / "out")
    names = {file.name for file in written}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 77
    assert config["chat_template"] == "{{ x }}"
    index = str(plan.names.index("<|im_start|>"))
    assert config["added_tokens_decoder"][index] == {
        "content": "<|im_start|>",
        **Added("", True, normalized=False).flags(),
    }
    check_ids(tmp_path / "out", plan)


@pytest.mark.parametrize("declared", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
def test_model_specific_tokenizer_classes_load(tmp_path: Path, declared: str) -> None:
    """Classes that rebuild the tokenizer from the file's parts give the planned ids to the appended tokens too."""
    a = save(tmp_path / "a", bpe(ENGLISH, 290, special("<|end|>")), tokenizer_class=declared, eos_token="<|end|>")
    b = save(tmp_path / "b", bpe(ENGLISH, 290, special("<|im_start|>"), special("<|im_end|>")))
    before = AutoTokenizer.from_pretrained(a).get_vocab()
    plan = plan_for(spec("union"), a, b)
    write(plan.tokenizer, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    for token, row in load(a).ids.items():
        assert ids[token] == before[token] == row
    for token in ("<|im_start|>", "<|im_end|>"):
        assert ids[token] == plan.names.index(token)


def test_ids_with_holes(tmp_path: Path) -> None:
    """Appended tokens come after the largest id although tokenizers itself would reuse a hole."""
    a = save(tmp_path / "a", bpe(ENGLISH, 270))
    document = json.loads((a / "tokenizer.json").read_text())
    last = max(document["model"]["vocab"], key=document["model"]["vocab"].get)
    document["model"]["vocab"][last] = 280
    (a / "tokenizer.json").write_text(json.dumps(document))
    b = save(tmp_path / "b", bpe(ENGLISH, 270, *(special(f"<{index}>") for index in range(15))))
    plan = plan_for(spec("union"), a, b)
    assert plan.names[269:282] == (*(None,) * 11, last, "<0>")
    write(plan.tokenizer, tmp_path / "out")
    tokenizer = check_ids(tmp_path / "out", plan)
    assert tokenizer.encode("<3>").ids == [284]
    assert tokenizer.decode([281], skip_special_tokens=True) == ""


@pytest.mark.parametrize("rows", [291, 290, 270])
def test_tokens_without_rows_are_removed(tmp_path: Path, rows: int) -> None:
    """An embedding that was never resized: added tokens go, then ordinary BPE tokens with their merges."""
    full = bpe(ENGLISH, 290, special("<|end|>"), special("<pad>"))
    a = save(tmp_path / "a", full, eos_token="<|end|>", pad_token="<pad>", extra_special_tokens=["<pad>"])
    (a / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    plan = build(spec("base"), [(ModelRef("a"), load(a), rows)], 0)
    assert plan.size == rows
    write(plan.tokenizer, tmp_path / "out")
    tokenizer = check_ids(tmp_path / "out", plan)
    for text in SCRIPTS:
        assert all(index < rows for index in tokenizer.encode(text).ids)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "pad_token" not in config
    assert config["extra_special_tokens"] == []
    assert ("eos_token" in config) == (rows > 290)
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {}


def test_tokens_known_only_to_the_config_are_written_into_the_tokenizer(tmp_path: Path) -> None:
    """Editing makes tokenizer.json complete, so that every loader gives the same ids."""
    a = save(tmp_path / "a", bpe(ENGLISH, 270), pad_token="<pad>")
    b = save(tmp_path / "b", bpe(ENGLISH, 270, special("<|im_start|>")))
    plan = plan_for(spec("union"), a, b)
    assert plan.names[270:] == ("<pad>", "<|im_start|>")
    write(plan.tokenizer, tmp_path / "out")
    check_ids(tmp_path / "out", plan)


def test_a_token_around_every_text_cannot_be_removed(tmp_path: Path) -> None:
    """The post-processor would go on to emit an id without a row."""
    full = bpe(ENGLISH, 270, special("<s>"))
    full.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 270)])
    plan = build(spec("base"), [(ModelRef("a"), load(save(tmp_path, full)), 270)], 0)
    with pytest.raises(IncompatibleModels, match="'<s>' around every text"):
        files(plan.tokenizer)


def test_a_rules_new_token_is_written(tmp_path: Path) -> None:
    """A token that no input knows gets a row and an id."""
    a = save(tmp_path / "a", SAMPLES["bpe"][0])
    plan = plan_for(spec("base", rule("<|tool|>", "zero")), a)
    write(plan.tokenizer, tmp_path / "out")
    assert check_ids(tmp_path / "out", plan).encode("<|tool|>").ids == [plan.size - 1]


def test_a_chat_template_replaces_every_other(tmp_path: Path) -> None:
    """One place holds the template, and transformers uses it."""
    a = save(tmp_path / "a", SAMPLES["bpe"][0], chat_template="old", keep=1)
    (a / "chat_template.jinja").write_text("older")
    (a / "additional_chat_templates").mkdir()
    (a / "additional_chat_templates" / "tool_use.jinja").write_text("oldest")
    kept = files(OutputTokenizer(load(a)))
    assert kept["additional_chat_templates/tool_use.jinja"] == a / "additional_chat_templates" / "tool_use.jinja"
    for tokenizer in (OutputTokenizer(load(a)), OutputTokenizer(load(a), {Added("<x>"): 291})):
        out = tmp_path / f"out{len(tokenizer.appended)}"
        write(tokenizer, out, chat_template="{{ messages[0]['content'] }}!")
        loaded = AutoTokenizer.from_pretrained(out)
        assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
        assert json.loads((out / "tokenizer_config.json").read_text())["keep"] == 1
        assert {file.name for file in out.rglob("*")} == {
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json",
        }


def test_template_folders_and_code_are_copied(tmp_path: Path) -> None:
    """Named templates and a tokenizer's own Python code belong to the tokenizer."""
    a = save(tmp_path / "a", SAMPLES["bpe"][0], auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    (a / "tokenization_x.py").write_text("X = 1")
    (a / "modeling_x.py").write_text("Y = 1")
    (a / "additional_chat_templates").mkdir()
    (a / "additional_chat_templates" / "rag.jinja").write_text("r")
    written = write(OutputTokenizer(load(a)), tmp_path / "out")
    names = {file.relative_to(tmp_path / "out").as_posix() for file in written}
    code = {"tokenization_x.py", "additional_chat_templates/rag.jinja"}
    assert names == code | {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("content", [{"vocab.json": "{}"}, {"tokenizer.model": "x"}])
def test_only_a_tokenizer_json_can_be_edited(tmp_path: Path, content: dict[str, str]) -> None:
    """The way to make one is named."""
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(IncompatibleModels, match=r"no tokenizer\.json") as caught:
        files(OutputTokenizer(load(tmp_path), {Added("<x>"): 0}))
    assert "save_pretrained" in str(caught.value)


def test_a_change_that_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    """A Unigram vocabulary is a list: its ids cannot have holes."""
    vocabulary: Vocabulary = load(save(tmp_path, unigram(ENGLISH, 40)))
    tokens: dict[Any, int] = {Added("<x>"): vocabulary.size + 3}
    with pytest.raises(IncompatibleModels, match="cannot be expressed"):
        files(OutputTokenizer(vocabulary, tokens))
