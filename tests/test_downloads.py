"""Data files: what is known of them is checked, and what is not is said."""

import hashlib

import pooch
import pytest

from examples import imdb, mnist, qm9, shakespeare
from examples.harness.downloads import fetch
from examples.harness.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_file_without_a_known_hash_is_said_to_be_unchecked_once(cache, tmp_path, monkeypatch, capsys):
    def retrieve(url, known_hash, fname, path):
        assert known_hash is None
        path.mkdir(exist_ok=True)
        (path / fname).write_text(url)
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):
        assert (
            fetch({"a.zip": None}, ["https://example.org/"], None)["a.zip"].read_text() == "https://example.org/a.zip"
        )
    assert capsys.readouterr().err.splitlines() == [
        "note: no checksum of a.zip is known, so what arrives is not checked by one"
    ]


def test_a_damaged_file_in_the_users_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("right")
    known = hashlib.sha256(b"right").hexdigest()
    assert fetch({"a": known}, ["https://example.org/"], tmp_path) == {"a": tmp_path / "a"}
    (tmp_path / "a").write_text("wrong")
    with pytest.raises(
        UserError, match=r"a is damaged \(its hash is not .*\); get it again from https://example.org/a"
    ):
        fetch({"a": known}, ["https://example.org/"], tmp_path)
    with pytest.raises(UserError, match=r"b is missing; put it there \(from https://example.org/b\) or leave out"):
        fetch({"b": None}, ["https://example.org/"], tmp_path)


def test_every_archive_has_a_hash_but_for_one_and_no_address_moves():
    files = mnist.FILES | shakespeare.FILES | qm9.FILES | {imdb.ARCHIVE: imdb.MD5}
    assert [name for name, known in files.items() if known is None] == ["qm9.zip"]
    addresses = (*mnist.SOURCES, *shakespeare.SOURCES, *qm9.SOURCES, imdb.SOURCE)
    assert not [address for address in addresses if "/master/" in address or "/main/" in address]
