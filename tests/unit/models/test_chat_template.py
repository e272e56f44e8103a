"""Chats become the prompts that transformers would make, and hostile ones are refused."""

import json

import pytest
import transformers

from kvfetcher.errors import EngineError, RequestError, UnsupportedRequestError
from kvfetcher.models.chat_template import ChatTemplate, check_messages, parse_messages

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}\n"
    "    {% endif %}\n"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOJSON = "{{ bos_token }}{% for m in messages %}{{ m | tojson(indent=1) }}{% endfor %}"
GENERATION = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Grüße & <b>1 < 2</b>"},
    {"role": "assistant", "content": "  Hello\n"},
    {"role": "user", "content": "'quoted' \"twice\""},
]


def write(folder, template, **facts):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **facts}
    config["eos_token"] = {"content": "</s>", "lstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template", [CHATML, TOJSON, GENERATION])
def test_it_renders_as_transformers_does(tmp_path, template, tokenizer):
    expected = transformers.utils.chat_template_utils.render_jinja_template(
        [CHAT],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )[0][0]
    assert ChatTemplate(write(tmp_path, template)).render(CHAT) == expected


def test_the_template_may_stand_in_the_tokenizers_configuration(tmp_path):
    folder = write(tmp_path, None, chat_template="{{ messages[0].content }}!")
    assert ChatTemplate(folder).render(CHAT[:1]) == CHAT[0]["content"] + "!"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert ChatTemplate(write(tmp_path, None, chat_template=several)).render(CHAT) == "y"


@pytest.mark.parametrize("facts", [{}, {"chat_template": 7}, {"chat_template": []}])
def test_a_model_without_one_is_unsupported(tmp_path, facts):
    with pytest.raises(UnsupportedRequestError, match="has no chat template"):
        ChatTemplate(write(tmp_path, None, **facts))


def test_what_the_template_refuses_is_the_senders_fault(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate(write(tmp_path, template)).render(CHAT)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses"):
        ChatTemplate(write(tmp_path, template)).render(CHAT)


def test_a_broken_template_is_the_models_fault(tmp_path):
    with pytest.raises(EngineError, match="is not valid"):
        ChatTemplate(write(tmp_path, "{% if %}"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        ChatTemplate(tmp_path)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = json.dumps([{"role": "user", "content": parts, "name": "x"}])
    assert parse_messages(text) == [{"role": "user", "content": "ab", "name": "x"}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "1 to 4096"),
        ({}, "1 to 4096"),
        ([{"role": "user", "content": ""}] * 4097, "1 to 4096"),
        ([7], r"messages\[0\] must be an object"),
        ([{"role": "king", "content": ""}], "role must be one of"),
        ([{"content": ""}], "role must be one of"),
        ([{"role": [], "content": ""}], "role must be one of"),
        ([{"role": "user"}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": 3}], "must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text alone"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "reads text alone"),
    ],
)
def test_wrong_messages_are_named(messages, reason):
    with pytest.raises(RequestError, match=reason):
        check_messages(messages)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null"])
def test_what_is_no_json_list_is_refused(text):
    with pytest.raises(RequestError, match="messages must be"):
        parse_messages(text)
