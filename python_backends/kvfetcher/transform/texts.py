"""Texts for calibration and for certificates that exist on any machine with Python, offline.

Five kinds, because a basis fitted to one kind costs about 10 % more bits on another: source code
(standard library), reference prose (the language reference that `pydoc` carries), documentation
strings, and what installed distributions ship: readme texts and licences. Without licences among
them, a licence's KL is 2.3 times the others' (SmolLM2-135M, `balanced`). Documents titled
as in `HELD_OUT` are never used to calibrate; certificates are measured on them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvfetcher.errors import ConfigError

TextKind = Literal["code", "reference", "docstrings", "readme", "licence", "user"]

MIN_CHARACTERS = 6000
MAX_CHARACTERS = 40000

# Titles, whatever the kind: a module's docstrings are in its source too.
HELD_OUT = frozenset(
    {"tarfile", "heapq", "difflib", "logging", "formatstrings", "types", "numpy", "LICENSE"}
)

_MODULES = (
    "ast", "asyncio/base_events", "argparse", "bdb", "calendar", "cgi", "collections/__init__",
    "concurrent/futures/process", "configparser", "csv", "ctypes/__init__", "dataclasses",
    "datetime", "difflib", "doctest", "email/message", "enum", "fractions", "ftplib", "functools",
    "gettext", "heapq", "http/client", "http/server", "inspect", "ipaddress", "json/decoder",
    "locale", "logging/__init__", "mailbox", "multiprocessing/managers", "optparse", "os",
    "pathlib", "pdb", "pickle", "platform", "random", "shutil", "smtplib", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback",
    "turtle", "typing", "unittest/case", "urllib/parse", "urllib/request", "uuid", "weakref",
    "xml/dom/minidom", "zipfile", "decimal", "_pydecimal",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """One document. ``name`` is "kind/title", of a user's file "user/path#piece"."""

    name: str
    kind: TextKind
    text: str

    @property
    def file(self) -> str:
        """What it is a piece of; its name, where it is whole."""
        return self.name.rpartition("#")[0] or self.name


def default_texts(*, held_out: bool = False) -> list[Text]:
    """Documents of this machine's Python, in an order mixed over the kinds.

    Args:
        held_out: the documents for certificates instead of those for calibration.

    Returns:
        Texts of `MIN_CHARACTERS` to `MAX_CHARACTERS` characters. Deterministic on one machine;
        another Python release has other documents, which is why artifacts store `texts_digest`.
    """
    kinds = (_code(), _reference(), _docstrings(), _readmes(), _licences())
    held = [[t for t in kind if t.name.split("/")[1] in HELD_OUT] for kind in kinds]
    if held_out:
        return _mixed(held)
    # Licences quote one another and docstrings lie in sources: titles alone do not keep apart.
    known = [t for kind in held for t in kind]
    return _mixed([keep_apart(kind, known) for kind in kinds])


def _mixed(kinds: list[list[Text]]) -> list[Text]:
    """One of each kind in turn."""
    return [k[i] for i in range(max(map(len, kinds))) for k in kinds if i < len(k)]


def _phrases(text: str) -> set[int]:
    """Every run of 12 words, hashed."""
    words = text.split()
    return {hash(tuple(words[i : i + 12])) for i in range(len(words) - 11)}


def keep_apart(texts: list[Text], others: list[Text]) -> list[Text]:
    """The texts of whose phrases at most 2 % are in the others."""
    known = set().union(*(_phrases(text.text) for text in others))
    return [t for t in texts if _is_apart(_phrases(t.text), known)]


def _is_apart(phrases: set[int], known: set[int]) -> bool:
    return len(phrases & known) <= 0.02 * max(len(phrases), 1)


def load_texts(folder: Path) -> list[Text]:
    """Every readable UTF-8 file below a folder, by name; long ones are cut into documents.

    Raises:
        ConfigError: the folder is missing or holds no text of `MIN_CHARACTERS`.
    """
    if not folder.is_dir():
        raise ConfigError(f"texts folder {folder} is not a folder; give one that holds text files")
    found: list[Text] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            content = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        name = path.relative_to(folder).as_posix()
        found += [
            Text(f"user/{name}#{start // MAX_CHARACTERS}", "user", part)
            for start in range(0, len(content), MAX_CHARACTERS)
            if len(part := content[start : start + MAX_CHARACTERS]) >= MIN_CHARACTERS
        ]
    if not found:
        raise ConfigError(
            f"texts folder {folder} holds no UTF-8 file of at least {MIN_CHARACTERS} characters"
        )
    return found


def texts_digest(texts: list[Text]) -> str:
    """Hex SHA-256 over names and contents, in order."""
    state = hashlib.sha256()
    for text in texts:
        for part in (text.name, text.text):
            data = part.encode()
            state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def _cut(name: str, kind: TextKind, content: str) -> list[Text]:
    content = content[:MAX_CHARACTERS]
    return [Text(name, kind, content)] if len(content) >= MIN_CHARACTERS else []


def _sources() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = ((module, root / f"{module}.py") for module in _MODULES)
    return [
        (module.removesuffix("/__init__").replace("/", "."), path.read_text(encoding="utf-8"))
        for module, path in paths
        if path.is_file()
    ]


def _code() -> list[Text]:
    return [t for name, source in _sources() for t in _cut(f"code/{name}", "code", source)]


def _docstrings() -> list[Text]:
    found = []
    for name, source in _sources():
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [
            ast.get_docstring(node)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, documented)
        ]
        found += _cut(f"docstrings/{name}", "docstrings", "\n\n".join(s for s in strings if s))
    return found


def _reference() -> list[Text]:
    from pydoc_data.topics import topics

    return [
        t for name in sorted(topics) for t in _cut(f"reference/{name}", "reference", topics[name])
    ]


def _readmes() -> list[Text]:
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if name and isinstance(description, str):
            found[name] = description
    return [t for name in sorted(found) for t in _cut(f"readme/{name}", "readme", found[name])]


def _licences() -> list[Text]:
    found: dict[str, str] = {}
    beginnings = set()
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if own.is_file():
        found["LICENSE"] = own.read_text(encoding="utf-8")
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if path.stem.upper() not in ("LICENSE", "LICENCE") or not path.is_file():
                continue
            content = path.read_text(encoding="utf-8", errors="replace")
            # Many ship the same licence; one copy is enough.
            beginning = "".join(content.split())[:500]
            if len(content) >= MIN_CHARACTERS and beginning not in beginnings:
                beginnings.add(beginning)
                found.setdefault(name, content)
    return [t for name in sorted(found) for t in _cut(f"licence/{name}", "licence", found[name])]
