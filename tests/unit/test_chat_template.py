"""Chat templates render as transformers renders them, and cannot reach out of their sandbox."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier_core.errors import BadRequest, ConfigError, Unsupported
from luthier_gateway.openai.chat_template import ChatTemplate
from luthier_gateway.openai.model_text import ModelText

USER = {"role": "user", "content": "<b> & 'é'"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
  {%- if message.role == 'skip' %}{% continue %}{% endif %}
  {%- if message.role == 'assistant' %}
{% generation %}{{ message.content }}
    {%- for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}
{% endgeneration %}
  {%- else %}
{{ message.role }}: {{ message.content }}
  {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}assistant:{% if enable_thinking is false %} now{% endif %}{% endif %}
"""


def letters() -> Tokenizer:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.fixture
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=letters(), bos_token="<s>", chat_template=TEMPLATE
    )


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no tools", "tools"])
def test_a_conversation_is_rendered_as_transformers_does(
    reference: PreTrainedTokenizerFast, tmp_path: Path, tools: list[dict[str, Any]]
) -> None:
    reference.save_pretrained(tmp_path)
    text = ModelText.load(files_of(tmp_path))
    variables = {"enable_thinking": False}
    expected = reference.apply_chat_template(
        CONVERSATION,
        tools=tools or None,
        add_generation_prompt=True,
        return_dict=False,
        **variables,
    )
    assert text.encode_chat(CONVERSATION, tools, variables) == expected


def test_a_developer_is_the_system_for_a_template_that_knows_none() -> None:
    message = {"role": "developer", "content": "x"}
    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert ChatTemplate(source, {}).render([message]) == "system"
    assert ChatTemplate(source + "{# developer #}", {}).render([message]) == "developer"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content.x }}",
        "{{ 1 + messages[0].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(10 ** 9) | length }}",
    ],
)
def test_what_a_template_cannot_render_is_the_callers_error(source: str) -> None:
    with pytest.raises(BadRequest, match="messages: "):
        ChatTemplate(source, {}).render([USER])


def test_variables_of_a_caller_do_not_replace_the_conversation() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ x }}", {})
    assert template.render([USER], variables={"messages": [], "x": 1}) == USER["content"] + "1"


def test_a_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate("{% if %}", {})


def test_a_model_without_a_template_says_so(
    reference: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    reference.chat_template = None
    reference.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="no chat template"):
        ModelText.load(files_of(tmp_path)).encode_chat([USER], [], {})


@pytest.mark.parametrize("settings", ['"x"', '[{"name": "default", "template": "x"}]'])
def test_templates_of_older_models_lie_in_the_tokenizers_settings(
    tmp_path: Path, settings: str
) -> None:
    letters().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {settings}}}')
    assert len(ModelText.load(files_of(tmp_path)).encode_chat([USER], [], {})) == 1
