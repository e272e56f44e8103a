import functools
import gzip

import pytest

from kvfetcher.calibration import texts as module
from kvfetcher.calibration.commands import split_texts
from kvfetcher.calibration.texts import (
    HELD_OUT,
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    Text,
    default_texts,
    load_texts,
    texts_digest,
)
from kvfetcher.errors import ConfigError

SCANS = ("_code", "_reference", "_docstrings", "_readmes", "_licences")


@pytest.fixture(scope="module")
def _scanned_once():
    """Reading all of this machine's Python takes seconds, and finds the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SCANS:
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def texts(_scanned_once):
    return default_texts()


@pytest.fixture(scope="module")
def held_out(_scanned_once):
    return default_texts(held_out=True)


def test_default_texts_mix_kinds_from_the_start(texts):
    assert len({t.kind for t in texts[:4]}) >= 3
    assert all(MIN_CHARACTERS <= len(t.text) <= MAX_CHARACTERS for t in texts)
    assert len({t.name for t in texts}) == len(texts)


def test_enough_text_for_a_calibration_on_any_python(texts, held_out):
    assert len(texts) >= 40
    assert sum(len(t.text) >= 12_000 for t in held_out) >= 3


def test_held_out_texts_share_nothing_with_the_others(texts, held_out):
    assert not {t.name for t in held_out} & {t.name for t in texts}
    own_kinds = {t.kind for t in texts}
    assert {t.name.split("/")[1] for t in held_out if t.kind in own_kinds} <= HELD_OUT
    for some, others in ((texts, held_out), (held_out, texts)):
        known = {run for text in others for run in runs(text)}
        for text in some:
            found = runs(text)
            assert sum(run in known for run in found) <= 0.03 * len(found), text.name


def runs(text):
    words = text.text.split()
    return [tuple(words[i : i + 20]) for i in range(len(words) - 19)]


def test_held_out_texts_begin_with_one_of_each_kind_and_never_with_twins(held_out):
    kinds = [t.kind for t in held_out]
    assert len(set(kinds[: len(set(kinds))])) == len(set(kinds)) >= 3
    titles = [t.name.split("/")[1] for t in held_out]
    assert len(set(titles)) == len(titles)


def test_held_out_texts_need_nothing_but_python(monkeypatch, held_out):
    for name in ("_MANUALS", "_HEADERS", "_SCRIPTS"):
        monkeypatch.setattr(module, name, ("absent.1",))
    found = default_texts(held_out=True)
    assert {"code", "reference"} <= {t.kind for t in found} <= {t.kind for t in held_out}
    assert sum(len(t.text) >= 12_000 for t in found) >= 3


def test_manual_pages_are_read_as_a_terminal_shows_them(tmp_path, monkeypatch):
    page = tmp_path / "man1" / "x.1.gz"
    page.parent.mkdir()
    source = '.\\" comment\n.SH NAME\n\\fBx\\fR \\- of \\f(CW\\-y\\fP\n.PP\n' + "word " * 2000
    page.write_bytes(gzip.compress(source.encode()))
    (tmp_path / "man1" / "cut.1.gz").write_bytes(page.read_bytes()[:40])
    monkeypatch.setattr(module, "_MANUAL_FOLDER", tmp_path)
    monkeypatch.setattr(module, "_MANUALS", ("x.1", "cut.1", "absent.1"))
    (text,) = module._manuals()
    assert text.name == "manual/x.1"
    assert text.text.startswith("\nNAME\nx - of -y\n\nword word")


def test_same_texts_have_the_same_digest(texts, monkeypatch):
    for name in SCANS:  # read again
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    assert texts_digest(texts) == texts_digest(default_texts())
    assert texts_digest(texts) != texts_digest(texts[1:])


def test_folder_of_texts_is_read_by_name_and_cut(tmp_path):
    (tmp_path / "b.txt").write_text("word " * 20_000)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("other " * 2_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 9000)
    (tmp_path / "short.txt").write_text("too short")
    found = load_texts(tmp_path)
    assert [t.name for t in found] == [
        "user/a/x.md#0", "user/b.txt#0", "user/b.txt#1", "user/b.txt#2",
    ]  # fmt: skip


def test_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no UTF-8 file"):
        load_texts(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        load_texts(tmp_path / "none")


def user_text(file, piece=0, content=None):
    words = content or " ".join(f"{file}.{piece}.{i}" for i in range(500))
    return Text(f"user/{file}#{piece}", "user", words)


def test_every_fifth_file_of_a_user_is_held_out_with_all_its_pieces():
    texts = [user_text(f"{file}.txt", piece) for file in range(12) for piece in range(3)]
    kept, held_out = split_texts(texts)
    assert [t.name for t in held_out] == [
        f"user/{file}.txt#{piece}" for file in (4, 9) for piece in range(3)
    ]
    assert kept == [t for t in texts if t not in held_out]


def test_of_few_files_the_last_is_held_out():
    texts = [user_text("a"), user_text("b"), user_text("b", 1)]
    assert split_texts(texts) == (texts[:1], texts[1:])


@pytest.mark.parametrize("texts", [[], [user_text("a"), user_text("a", 1)]])
def test_files_that_cannot_be_split_are_refused(texts):
    with pytest.raises(ConfigError, match="five or more"):
        split_texts(texts)


def test_files_that_repeat_what_is_held_out_are_left_out():
    texts = [user_text(f"{i}") for i in range(5)]
    copied = user_text("copy", content=texts[4].text[:600] + texts[0].text)
    kept, held_out = split_texts([copied, *texts[1:]])
    assert (kept, held_out) == (texts[1:4], texts[4:])
    with pytest.raises(ConfigError, match="does not repeat them"):
        split_texts([copied, texts[4]])
