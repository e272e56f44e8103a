import pytest

from kvfetcher.errors import ConfigError
from kvfetcher.transform.commands import split_texts
from kvfetcher.transform.texts import (
    HELD_OUT,
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    Text,
    default_texts,
    load_texts,
    texts_digest,
)


@pytest.fixture(scope="module")
def texts():
    return default_texts()


@pytest.fixture(scope="module")
def held_out():
    return default_texts(held_out=True)


def test_default_texts_mix_kinds_from_the_start(texts):
    assert len({t.kind for t in texts[:4]}) >= 3
    assert all(MIN_CHARACTERS <= len(t.text) <= MAX_CHARACTERS for t in texts)
    assert len({t.name for t in texts}) == len(texts)


def test_enough_text_for_a_calibration_on_any_python(texts, held_out):
    assert len(texts) >= 40
    assert sum(len(t.text) >= 12_000 for t in held_out) >= 3


def test_held_out_texts_share_nothing_with_the_others(texts, held_out):
    assert {t.name.split("/")[1] for t in held_out} <= HELD_OUT
    assert not {t.name for t in held_out} & {t.name for t in texts}
    known = set()
    for text in held_out:
        words = text.text.split()
        known |= {tuple(words[i : i + 20]) for i in range(len(words) - 19)}
    for text in texts:
        words = text.text.split()
        shared = sum(tuple(words[i : i + 20]) in known for i in range(len(words) - 19))
        assert shared <= 0.03 * len(words), text.name


def test_same_texts_have_the_same_digest(texts):
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
