"""``gwt-kernels migrate`` refuses files, and places for its output, by name, and writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gwt_kernels.migration.checkpoints import read as read_checkpoint
from gwt_kernels.migration.checkpoints import write
from tests.support.migrated_files import file_of, read, run


class Trap:
    """Creates a folder if unpickled without restrictions."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def truncated(folder, trained):
    path = file_of(folder, trained.state)
    whole = path.read_bytes()
    for length in range(1, len(whole), len(whole) // 40):  # cut at many lengths
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            read_checkpoint(path)
    return path


def text(folder, content="not a checkpoint"):
    (folder / "optimizer.pt").write_text(content)
    return folder / "optimizer.pt"


def as_saved(folder, trained):
    return file_of(folder, trained.state)


def two_states(folder, trained):
    return file_of(folder, {"first": trained.state, "second": trained.state})


def of_shards(folder, trained):
    (folder / ".metadata").touch()
    return folder


def with_two_rates(state):
    """Return a state with the same parameters in two groups."""
    group = state["param_groups"][0]
    parts = (group["params"][:3], 1.0), (group["params"][3:], 2.0)
    return {**state, "param_groups": [{**group, "params": part, "lr": lr} for part, lr in parts]}


def cut(trained):
    state = trained.state
    short = {**state["state"][0], "exp_avg": state["state"][0]["exp_avg"][:5]}
    return {**state, "state": {**state["state"], 0: short}}


FILES = {
    "truncated": (truncated, [], ("optimizer.pt", "cut short")),
    "empty": (lambda folder, _: text(folder, ""), [], ("optimizer.pt", "empty")),
    "text": (lambda folder, _: text(folder), [], ("optimizer.pt", "not a checkpoint")),
    "code in it": (lambda folder, _: file_of(folder, {"state": Trap()}), [], ("optimizer.pt", "plain data")),
    "no file": (lambda folder, _: folder / "nowhere.pt", [], ("nowhere.pt", "No such file")),
    "a folder": (lambda folder, _: folder, [], ("directory",)),
    "a folder of shards": (of_shards, [], ("torch.distributed.checkpoint", "dcp_to_torch", "FILE")),
    "a model's": (
        lambda folder, trained: file_of(folder, trained.model.state_dict()),
        [],
        ("holds no optimizer's state", "lm_head.weight", "optimizer.pt"),
    ),
    "a tensor": (lambda folder, _: file_of(folder, torch.ones(3)), [], ("holds no optimizer's state", "Tensor")),
    "two states": (two_states, [], ("first, second", "--key")),
    "a key that is not there": (two_states, ["--key", "third"], ("'third'", "first")),
    "no steps yet": (
        lambda folder, trained: file_of(folder, torch.optim.AdamW(trained.model.parameters()).state_dict()),
        [],
        ("nothing to migrate",),
    ),
    "another model's": (
        as_saved,
        ["--config", "llama_60m"],
        ("[20]", "--names"),
    ),
    "a tensor cut short": (
        lambda folder, trained: file_of(folder, cut(trained)),
        [],
        ("'model.embed_tokens.weight'", "(5, 40)", "(61, 40)"),
    ),
    "too deep": (
        as_saved,
        ["--level", "9", "--include", "up_proj"],
        ("up_proj", "level 9"),
    ),
    "two learning rates": (
        lambda folder, trained: file_of(folder, with_two_rates(trained.state)),
        ["--names", "NAMES"],
        ("lr", "1.0", "2.0", "--lr"),
    ),
    "a rename that is none": (
        as_saved,
        ["--rename", "norm"],
        ("'norm'", "OLD=NEW"),
    ),
    "names that are no text": (
        as_saved,
        ["--names", "optimizer.pt"],
        ("--names optimizer.pt is no text", "a name per line"),
    ),
    "no configuration": (
        as_saved,
        ["--config", "nowhere.json"],
        ("'nowhere.json'", "config.json"),
    ),
    "split weights of float32": (
        as_saved,
        ["--weight-rounding", "split", "--dtype", "fp32"],
        ("split", "float32"),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_refused_by_name_and_nothing_is_written(kind, trained, tmp_path, monkeypatch, capsys):
    make, flags, words = FILES[kind]
    names = tmp_path / "names"
    names.write_text("\n".join(name for name, _ in trained.model.named_parameters()))
    checkpoint = make(tmp_path, trained)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    flags = [str(names) if flag == "NAMES" else flag for flag in flags]
    assert run(checkpoint, tmp_path / "gwt.pt", trained.config, *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gwt-kernels migrate: ")
    for word in words:
        assert word in said.err, said.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # and the trap was not executed


def test_existing_files_are_not_overwritten(trained, tmp_path, capsys):
    checkpoint = file_of(tmp_path, trained.state)
    before = checkpoint.read_bytes()
    os.symlink(checkpoint, tmp_path / "link.pt")
    os.symlink(tmp_path / "nowhere.pt", tmp_path / "dangling.pt")
    for out in (checkpoint, tmp_path / "link.pt", tmp_path / "dangling.pt"):
        assert run(checkpoint, out, trained.config) == 2
        assert f"{out} exists" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("links", [True, False], ids=("hard links", "no hard links"))
def test_a_file_that_appears_meanwhile_is_not_overwritten(links, trained, tmp_path, monkeypatch, capsys):
    checkpoint, out = file_of(tmp_path, trained.state), tmp_path / "gwt.pt"
    save, link = torch.save, os.link

    def saved_while_another_writes(payload, file):
        save(payload, file)
        out.write_text("another's")

    def without_links(*names):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link if links else without_links)
    assert run(checkpoint, tmp_path / "first.pt", trained.config) == 0
    assert set(read(tmp_path / "first.pt")) == {"state", "param_groups"}
    monkeypatch.setattr(torch, "save", saved_while_another_writes)
    assert run(checkpoint, out, trained.config) == 2
    assert f"{out} exists, and nothing is overwritten" in capsys.readouterr().err
    assert out.read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["first.pt", "gwt.pt", "optimizer.pt"]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def half(payload, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"gwt.pt cannot be written: no space left: give --out"):
        write(tmp_path / "gwt.pt", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_nothing_is_written(trained, tmp_path):
    """Check a disk that is full at any place in the file: PyTorch's archive raises errors of its own."""
    rooms = (1, 1000, 10_000, 30_000)
    checkpoint, out = file_of(tmp_path, trained.state), tmp_path / "gwt.pt"
    limited = (
        "import resource, signal, sys\n"
        "from gwt_kernels.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"for room in {rooms}:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))\n"
        "    assert main(sys.argv[1:]) == 2\n"
    )
    command = [sys.executable, "-c", limited, "migrate", str(checkpoint), "--config", str(trained.config)]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    said = f"gwt-kernels migrate: {out} cannot be written: [Errno 27] File too large"
    assert [line[: len(said)] for line in done.stderr.splitlines()] == [said] * len(rooms)
    assert os.listdir(tmp_path) == ["optimizer.pt"]
