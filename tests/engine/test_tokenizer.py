"""Tokenizer and chat template, against transformers', which the engine doesn't need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_tokenizer

from tvm_flashinfer.engine.tokenizer import Tokenizer
from tvm_flashinfer.errors import UserError

TEMPLATES = [
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    # Block tags on lines of their own leave no blank lines behind.
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n    {% else %}\n"
    "A: {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}{{ bos_token }}",
    "{%- for m in messages %}{{ loop.index }}{{ m.content }}{%- if loop.index == 2 %}{%- break %}"
    "{%- endif %}{%- endfor %}",
]
CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " Hi, wörld \n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


def with_template(directory: Path, template: object, **config: object) -> Tokenizer:
    make_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": template, **config}))
    return Tokenizer(directory)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_transformers_does(template: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bos = {"__type": "AddedToken", "content": "<s>", "special": True}
    ours = with_template(tmp_path, template, bos_token=bos)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    want = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert ours.render(CONVERSATION) == want


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    with_template(tmp_path, "config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).render([]) == "file"


def test_named_templates_mean_the_default_one(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert with_template(tmp_path, named).render([]) == "d"


def test_no_template(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render(CONVERSATION)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% if %}"])
def test_a_template_that_refuses(template: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(UserError, match="chat template refused the conversation"):
        tokenizer.render(CONVERSATION)


def test_a_template_cannot_reach_into_python(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="refused"):
        tokenizer.render(CONVERSATION)


def test_text_to_tokens_and_back(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("wörld</s>")
    assert ids[-1] == 0
    assert tokenizer.decode(ids) == "wörld"
    assert tokenizer.decode(ids, special=True) == "wörld</s>"


def test_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read as a tokenizer"):
        Tokenizer(tmp_path)
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        Tokenizer(tmp_path)
