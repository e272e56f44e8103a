"""Chat messages -> the prompt that a model was trained on, by the template in its folder.

Hugging Face folders carry a Jinja template (``chat_template.jinja``, or ``chat_template`` in
``tokenizer_config.json``). It is rendered as transformers renders it: in Jinja's immutable sandbox,
with `raise_exception`, `strftime_now` and `tojson`, blocks trimmed. transformers itself is not
needed, so that a process may render without torch.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import EngineError, RequestError, UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate:
    """The chat template of one model. Thread-safe.

    Args:
        folder: a Hugging Face model folder.

    Raises:
        UnsupportedRequestError: the model has no chat template.
        EngineError: its template, or a file that it needs, cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

        facts = _read_json(folder / "tokenizer_config.json")
        source = _source(folder, facts)
        if source is None:
            raise UnsupportedRequestError(
                f"model {folder.name} has no chat template; send text_input, or put a"
                " chat_template.jinja into its folder"
            )
        named = {**_read_json(folder / "special_tokens_map.json"), **facts}
        self._tokens = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(named.get(name)))
        }
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_ignoring_generation_tags(), jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._errors: type[Exception] = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as exc:
            raise EngineError(f"the chat template of {folder.name} is not valid: {exc}") from exc

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for the assistant's next message.

        Args:
            messages: each with ``role`` and ``content``, as `parse_messages` gives them.

        Raises:
            RequestError: the template refuses these messages.

        Example:
            >>> import pathlib, tempfile
            >>> with tempfile.TemporaryDirectory() as name:
            ...     folder = pathlib.Path(name)
            ...     _ = (folder / "chat_template.jinja").write_text(
            ...         "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            ...     )
            ...     ChatTemplate(folder).render([{"role": "user", "content": "Hello"}])
            '<user>Hello'
        """
        try:
            text: str = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._tokens
            )
        except (self._errors, TypeError, ValueError, KeyError, AttributeError) as exc:
            raise RequestError(f"the model's chat template refuses these messages: {exc}") from exc
        return text


def parse_messages(text: str) -> list[dict[str, Any]]:
    """Check messages as OpenAI writes them, and join their text parts.

    Args:
        text: a JSON list of ``{"role": ..., "content": TEXT or [{"type": "text", "text": ...}]}``.

    Raises:
        RequestError: names the message and what is wrong with it.
    """
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"messages must be a JSON list: {exc}") from exc
    return check_messages(messages)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """`parse_messages` for what is parsed already."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content")
    if (role := message.get("role")) not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
    return {**message, "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(
                f'{where}[{i}] must be {{"type": "text", "text": ...}}; this model reads text alone'
            )
        texts.append(text)
    return "".join(texts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise EngineError(f"{path} cannot be read: {exc}") from exc
    return facts if isinstance(facts, dict) else {}


def _source(folder: Path, facts: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as exc:
        raise EngineError(f"the chat template of {folder} cannot be read: {exc}") from exc
    found = facts.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _ignoring_generation_tags() -> Any:
    """``{% generation %}`` marks what training is to learn; when asking it means nothing."""
    import jinja2.ext

    class IgnoreGeneration(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return IgnoreGeneration


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes for HTML; templates want plain JSON."""
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


def _raise(message: str) -> None:
    raise RequestError(message)


def _now(format_: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format_)
