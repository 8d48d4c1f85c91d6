"""Drawn templates and conversations: texts, refusals, marks and masks are those of transformers."""

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_llm.conversation.masks import ChatEncoder
from nemo_llm.conversation.messages import BadChatError, ChatRecord
from nemo_llm.conversation.template import ChatTemplate, load_template, save_template
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import HuggingFaceTokenizer, load_tokenizer, load_tokenizer_from_folder
from tests.data.conftest import CHAT

SPECIAL = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
# No word ends with a character of several tokens: at the end of a mark transformers learns its first token alone.
WORDS = (
    "Hello",
    "wörld",
    "日本.",
    "🐋 whale",
    "a\n\nb",
    " spaces  ",
    "<b>",
    "{{ x }}",
    "'quote\"",
    "1 < 2 & 3",
    "\ttab",
)
OPENINGS = (
    "{{ bos_token }}",
    "{{- nothing }}\n",
    "{%- if tools %}{{ tools | tojson }}\n{%- endif %}\n",
    "{% if tools is defined and tools is not none %}\n  {% for tool in tools %}\n{{ tool | tojson(indent=2) }}\n"
    "  {% endfor %}\n{% endif %}\n",
    "{% for d in documents or [] %}\n[{{ loop.index }}] {{ d.title }}: {{ d['text'] }}\n{% endfor %}",
    "{{ documents is none }}|{{ documents is defined }}|{{ pad_token is defined }}|{{ missing | default('-') }}",
    "{% set space = namespace(turns=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set space.turns = space.turns + 1 %}{% endif %}{% endfor %}{{ space.turns }} turns\n",
    "{% macro shown(m) -%}\n<{{ m.role }}{{ m.name }}>\n{%- endmacro %}{{ shown(messages[-1]) }}",
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim | upper }}\n{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ rest | length }}",
    "{% if messages | length > 5 %}{{ raise_exception('no more than 5 messages') }}{% endif %}",
    "{{ strftime_now('%Y') | length }}"
    "{{ dict(b=[none, true, 2.5], a=1) | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ messages.nothing.at_all }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ range(3) | list }}{{ '%s-%s' | format(1, 'x') }}",
)
HEADS = (
    "<|im_start|>{{ m.role }}\n",
    "\n  {%- if loop.first %}first {% elif loop.last %}last {% endif %}\n  {{- '[' ~ m['role'] ~ ']' }}",
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role | capitalize }}: ",
    "{% if loop.index > 6 %}{% break %}{% endif %}{{ loop.index0 }}. {{ loop.previtem.role }}>{{ m.role }} ",
    "{{ m.role[0] }}{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }}"
    "({{ call.function.arguments | tojson }}){% if not loop.last %}, {% endif %}{% endfor %}{% endif %} ",
    "{% if m.reasoning_content is defined and m.thinking %}<think>{{ m.reasoning_content }}</think>{% endif %}",
    "{% if m.role == 'tool' and loop.previtem is defined and loop.previtem.role == 'tool' %}+{% endif %}{{ m.name }}|",
)
CONTENT = (
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}",
    "{%- if m['content'] is string %}\n{{ m['content'] | trim }}\n{%- else %}\n"
    "{%- for part in m['content'] or [] if part.type == 'text' %}"
    "{{ part['text'] }}{%- endfor %}\n{%- endif %}",
)
MARKED = (
    "{% generation %}BODY<|endoftext|>{% endgeneration %}\n",
    "{%- generation -%}\n  BODY\n{%- endgeneration -%}\n<|endoftext|>\n",
    "{% generation %}BODY{% endgeneration %}{% generation %}{{ eos_token }}\n{% endgeneration %}",
    "{% generation %}{% generation %}BODY{% endgeneration %}{{ eos_token }}{% endgeneration %}\n",
    "{% generation %}({% generation %}BODY{% endgeneration %}){{ eos_token }}{% endgeneration %}\n",
    "{% if loop.last %}{% generation %}BODY{{ eos_token }}{% endgeneration %}{% else %}BODY{% endif %}",
    "{% generation %}{% for line in ['x', 'y', 'z'] %}{% if line == 'z' %}{% break %}{% endif %}{{ line }}{% endfor %}"
    "BODY{{ eos_token }}{% endgeneration %}",
    "{% generation %}{% endgeneration %}BODY{{ eos_token }}",
)
ENDINGS = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{%- if add_generation_prompt -%}\n  [assistant]\n{%- endif -%}\n",
    "\n\n",
    "",
)


def draw_template(draw: random.Random, marked: bool) -> str:
    """A template of parts that published ones are made of."""
    opening = "".join(draw.sample(OPENINGS, draw.randint(0, 3)))
    body = draw.choice(CONTENT)
    answer = draw.choice(MARKED).replace("BODY", body) if marked else body + "{{ eos_token }}\n"
    turn = f"{draw.choice(HEADS)}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{body}\n{{% endif %}}"
    return f"{opening}{{% for m in messages %}}{turn}{{% endfor %}}{draw.choice(ENDINGS)}"


def draw_text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))


def draw_conversation(draw: random.Random) -> dict[str, Any]:
    """Messages, and perhaps tools and documents."""

    def message(role: str, **fields: Any) -> dict[str, Any]:
        text = draw_text(draw)
        parts = [{"type": "text", "text": text}, {"type": "text", "text": draw_text(draw)}]
        return {"role": role, "content": parts if draw.random() < 0.2 else text, **fields}

    messages = [message("system")] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 3)):
        messages.append(message("user"))
        if draw.random() < 0.3:
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": draw_text(draw), "n": None}}}
            messages += [message("assistant", tool_calls=[call]), *[message("tool", name="f")] * draw.randint(1, 2)]
        reasoning = draw.choice(("reasoning_content", "thinking", "reasoning", "name"))
        messages.append(message("assistant", **({reasoning: draw_text(draw)} if draw.random() < 0.4 else {})))
    tool = {"type": "function", "function": {"name": "f", "description": draw_text(draw), "parameters": {}}}
    document = {"title": draw_text(draw), "text": draw_text(draw)}
    return {
        "messages": messages,
        "tools": draw.choice((None, [], [tool], [tool, tool])),
        "documents": draw.choice((None, [], [document])),
    }


def drawn(count: int, marked: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    draw = random.Random(20)
    for _ in range(count):
        source = draw_template(draw, marked)
        yield from ((source, draw_conversation(draw)) for _ in range(3))


def spans_as_marks(spans: list[tuple[int, int]], length: int) -> list[bool]:
    return [any(low <= place < high for low, high in spans) for place in range(length)]


@pytest.mark.parametrize("marked", [False, True])
def test_texts_refusals_and_marks(marked: bool) -> None:
    compared = refused = 0
    for number, (source, chat) in enumerate(drawn(90, marked)):
        template, prompt = ChatTemplate(source, "drawn", SPECIAL), number % 2 == 0
        settings = {"tools": chat["tools"], "documents": chat["documents"]}
        try:
            (expected,), spans = render_jinja_template(
                [chat["messages"]],
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **settings,
                **SPECIAL,
            )
        except Exception:  # whatever a template leads to
            refused += 1
            with pytest.raises(InputError, match="drawn"):
                template.render(chat["messages"], add_generation_prompt=prompt, **settings)
            continue
        assert template.render(chat["messages"], add_generation_prompt=prompt, **settings) == expected, (source, chat)
        if marked and not prompt:
            text, own = template.render_with_answers(chat["messages"], **settings)
            assert text == expected
            assert covered(own) == covered(spans[0]), (source, chat)
        compared += 1
    assert compared > 150
    assert refused > 40


def covered(spans: list[tuple[int, int]]) -> set[int]:
    """Characters that lie in any of the stretches."""
    return {place for low, high in spans for place in range(low, high)}


def as_transformers(tokenizer: HuggingFaceTokenizer) -> PreTrainedTokenizerFast:
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = False
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def test_masks(demo_tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    theirs, path = as_transformers(demo_tokenizer), tmp_path / "drawn.jinja"
    compared = refused = 0
    draw = random.Random(21)
    published = [file.read_text() for file in sorted(CHAT_TEMPLATES.glob("*_training.jinja"))]
    chats = [*drawn(60, marked=True), *((source, draw_conversation(draw)) for source in published for _ in range(2))]
    for source, chat in chats:
        path.write_text(source)
        encoder = ChatEncoder(replace(CHAT, template=str(path), date=f"{date.today()}"), demo_tokenizer)
        fitting = [encoder.content_form.fit(message) for message in chat["messages"]]
        settings = {"chat_template": source, "tools": chat["tools"], "documents": chat["documents"]}
        try:
            expected = theirs.apply_chat_template(
                fitting, return_assistant_tokens_mask=True, return_dict=True, **settings
            )
            found = encoder.encode(ChatRecord(**chat))
        except BadChatError:  # an answer of which the template writes nothing would be learned as an empty one
            continue
        except Exception:  # whatever a template leads to
            refused += 1
            with pytest.raises(InputError):
                encoder.encode(ChatRecord(**chat))
            continue
        assert found.tokens == expected["input_ids"]
        assert found.learned == [bool(mark) for mark in expected["assistant_masks"]], (source, chat)
        compared += 1
    assert compared > 100
    assert refused > 10


@pytest.mark.parametrize("files", [False, True])
def test_of_several_templates_beside_a_tokenizer_the_one_for_tools_is_taken_with_tools(
    files: bool, demo_tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    draw, theirs = random.Random(22), as_transformers(demo_tokenizer)
    for number in range(12):
        parts = {name: f"{name}\n {draw_template(draw, marked=False)}\n\n " for name in ("default", "tool_use", "rag")}
        theirs.chat_template = parts
        brought, saved = tmp_path / f"brought{number}", tmp_path / f"saved{number}"
        theirs.save_pretrained(brought, save_jinja_files=files)
        assert (brought / "additional_chat_templates").is_dir() == files
        load_tokenizer(replace(demo_tokenizer.config, path=str(brought))).save(saved)
        encoder = TemplateEncoder(load_tokenizer_from_folder(saved))
        for name in ("tokenizer", "rag"):
            template = load_template(name, encoder, "chat_template")
            for _ in range(4):
                chat = draw_conversation(draw)
                settings = {"tools": chat["tools"], "documents": chat["documents"]}
                named = {} if name == "tokenizer" else {"chat_template": name}
                try:
                    expected = theirs.apply_chat_template(chat["messages"], tokenize=False, **settings, **named)
                except Exception:  # whatever a template leads to
                    continue
                assert template.render(chat["messages"], **settings) == expected
        save_template("tuned", saved)
        assert load_template("tokenizer", encoder, "chat_template").render([], tools=[]) == "tuned"
