"""Texts for calibration and for certificates that exist on any machine with Python, offline.

Five kinds to calibrate with, because a basis fitted to one kind costs about 10 % more bits on another: source code
(standard library), reference prose (the language reference that `pydoc` carries), documentation
strings, and what installed distributions ship: readme texts and licences. Without licences among
them, a licence's KL is 2.3 times the others' (SmolLM2-135M, `balanced`). Documents titled
as in `HELD_OUT` are never used to calibrate; certificates are measured on them, and on kinds that
calibration has not seen at all: manual pages, C headers and shell scripts of this machine.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import re
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

TextKind = Literal[
    "code", "reference", "docstrings", "readme", "licence", "manual", "header", "shell", "user"
]

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
        held_out: the documents for certificates instead of those for calibration; of each kind
            that the machine has, and of a module either its source or its docstrings.

    Returns:
        Texts of `MIN_CHARACTERS` to `MAX_CHARACTERS` characters. Deterministic on one machine;
        another Python release has other documents, which is why artifacts store `texts_digest`.
    """
    kinds = (_code(), _reference(), _docstrings(), _readmes(), _licences())
    held = [[t for t in kind if t.name.split("/")[1] in HELD_OUT] for kind in kinds]
    # Licences quote one another and docstrings lie in sources: titles alone do not keep apart.
    known = _phrases_of(t for kind in held for t in kind)
    read = [[t for t in kind if _is_apart(t, known)] for kind in kinds]
    if not held_out:
        return _mixed(read)
    code, reference, _, readmes, licences = held
    others = (code, _manuals(), licences, _headers(), reference, _scripts(), readmes)
    known = _phrases_of(t for kind in read for t in kind)
    return _mixed([[t for t in kind if _is_apart(t, known)] for kind in others])


def _mixed(kinds: list[list[Text]]) -> list[Text]:
    """One of each kind in turn."""
    return [k[i] for i in range(max(map(len, kinds))) for k in kinds if i < len(k)]


def _phrases(text: str) -> set[int]:
    """Every run of 12 words, hashed."""
    words = text.split()
    return {hash(tuple(words[i : i + 12])) for i in range(len(words) - 11)}


def _phrases_of(texts: Iterable[Text]) -> set[int]:
    return set().union(*(_phrases(text.text) for text in texts))


def _is_apart(text: Text, known: set[int]) -> bool:
    """Whether at most 2 % of a text's phrases are known."""
    phrases = _phrases(text.text)
    return len(phrases & known) <= 0.02 * max(len(phrases), 1)


def keep_apart(texts: list[Text], others: list[Text]) -> list[Text]:
    """The texts that do not repeat the others."""
    known = _phrases_of(others)
    return [text for text in texts if _is_apart(text, known)]


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


# Of Debian's base system; machines without them certify on the other kinds.
_MANUAL_FOLDER = Path("/usr/share/man")
_MANUALS = ("bash.1", "tar.1", "find.1", "dpkg.1", "perlretut.1", "sed.1", "apt-get.8", "fstab.5")
_SCRIPTS = ("dpkg-maintscript-helper", "savelog", "xzgrep", "zgrep", "ldd")
_HEADERS = ("unicodeobject", "object", "abstract", "pyport")


def _manuals() -> list[Text]:
    found = []
    for page in _MANUALS:
        path = _MANUAL_FOLDER / f"man{page[-1]}" / f"{page}.gz"
        try:
            source = gzip.decompress(path.read_bytes()).decode(errors="replace")
        except (OSError, EOFError, zlib.error):
            continue
        # What a terminal shows, nearly: without comments, names of macros and changes of font.
        plain = re.sub(r"""^[.'](\\".*|[A-Za-z]+ ?)""", "", source, flags=re.MULTILINE)
        plain = re.sub(r"\\f(\w|\[\w*\]|\(\w\w)|\\[&|^]", "", plain).replace("\\", "")
        found += _cut(f"manual/{page}", "manual", plain)
    return found


def _headers() -> list[Text]:
    root = Path(sysconfig.get_path("include"))
    return _files("header", {name: root / f"{name}.h" for name in _HEADERS})


def _scripts() -> list[Text]:
    return _files("shell", {name: Path("/usr/bin") / name for name in _SCRIPTS})


def _files(kind: TextKind, paths: dict[str, Path]) -> list[Text]:
    found = []
    for name, path in paths.items():
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found += _cut(f"{kind}/{name}", kind, content)
    return found
