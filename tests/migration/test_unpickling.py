"""Checkpoint files with more than tensors: plain data is kept, all other classes are named and not executed."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import os
import pathlib
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdamW, gwt_param_groups
from gwt_kernels.cli import main
from gwt_kernels.migration import unpickling
from gwt_kernels.migration.checkpoints import read, write
from gwt_kernels.models.files import build_on_meta

KEPT = {
    "scalar": np.float64(1.5),
    "bool": np.bool_(True),
    "complex": np.complex64(1j),
    "text": np.str_("abc"),
    "date": np.datetime64(3, "s"),
    "array": np.arange(6.0).reshape(2, 3),
    "array of objects": np.array(["a", 3, None], dtype=object),
    "structure": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "dtype": np.dtype(">f4"),
    "random state": np.random.get_state(),  # noqa: NPY002  # as training programs save it
    "Namespace": argparse.Namespace(lr=np.float32(0.1), out=pathlib.Path("/tmp/run")),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "Path": pathlib.Path("a/b"),
    "times": [datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.date(2024, 1, 2)],
    "builtins": [frozenset([1]), range(3), {2}, slice(1, 2)],
}


@pytest.mark.parametrize("kind", KEPT)
def test_plain_data_is_read_and_written_unchanged(kind, tmp_path):
    torch.save({"kept": KEPT[kind], "tensor": torch.ones(2)}, tmp_path / "a.pt")
    write(tmp_path / "b.pt", read(tmp_path / "a.pt"))
    back = torch.load(tmp_path / "b.pt", weights_only=False)
    assert torch.equal(back["tensor"], torch.ones(2))
    assert type(back["kept"]) is type(KEPT[kind])
    assert repr(back["kept"]) == repr(KEPT[kind])


def test_numpy_scalars_count_as_numbers(tmp_path):
    torch.save([np.float64(0.1), np.int32(-3)], tmp_path / "a.pt")
    assert read(tmp_path / "a.pt") == [0.1, -3]


def migrate(path, *more):
    return main(["migrate", str(path), "--config", "llama_60m", "--out", f"{path}.out", *more])


class Mine:
    pass


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


class OfAScript:
    """A class of the script that wrote the file, according to its module."""


OfAScript.__module__ = "__main__"


class Evil:
    """A scalar for which numpy's own unpickling would use eight bytes of the file as the address of an object."""

    def __reduce__(self):
        make, (_, data), *_ = np.float64(1).__reduce__()
        return make, (np.dtype("O"), data)


ALLOWABLE = {"Mine": (Mine(), f"{__name__}.Mine"), "Fraction": (fractions.Fraction(1, 2), "fractions.Fraction")}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("kind", ALLOWABLE)
def test_a_class_is_named_with_the_way_to_allow_it(kind, archive, tmp_path, capsys):
    held, name = ALLOWABLE[kind]
    path = tmp_path / ("a" * 90) / "a.pt"  # a long name is not truncated
    path.parent.mkdir()
    torch.save({"args": held}, path, _use_new_zipfile_serialization=archive)
    assert migrate(path) == 2
    said = capsys.readouterr().err
    assert f"holds {name}, which" in said
    assert f"add --allow {name}; or give the optimizer's state alone" in said
    assert "\x1b" not in said
    assert len(said.splitlines()) == 1
    assert type(read(path, [name])["args"]) is type(held)
    assert migrate(path, "--allow", name) == 2
    assert "holds no optimizer's state" in capsys.readouterr().err  # the file was read


def test_all_classes_are_named_at_once(tmp_path):
    torch.save([Mine(), fractions.Fraction(1, 2)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"--allow fractions.Fraction --allow {__name__}.Mine; or"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Trap(), "holds posix.mkdir, which is more than tensors and plain data, and posix.mkdir cannot be allowed"),
        (print, "holds builtins.print, which is more than tensors and plain data, and builtins.print cannot be"),
        (
            OfAScript(),
            "is more than tensors and plain data, and __main__.OfAScript cannot be allowed",
        ),
    ],
    ids=["trap", "function", "a script's class"],
)
def test_classes_that_cannot_be_allowed(held: Any, words: str, archive: bool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "OfAScript", OfAScript, raising=False)  # for writing the file only
    torch.save({"args": held}, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
    monkeypatch.delattr(sys.modules["__main__"], "OfAScript")
    assert migrate(tmp_path / "a.pt") == 2
    said = capsys.readouterr().err
    assert words in said
    assert "give the optimizer's state alone, as torch.save(" in said
    assert "\x1b" not in said
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.Config", "no such class to import"),
        ("datetime.nothing", "no such class to import"),
        ("__main__.Config", "no such class to import"),
        ("posix.mkdir", "PyTorch allows nothing of that module"),
        ("builtins.eval", "is no class but a builtin_function_or_method"),
        ("Config", "is not module.Class"),
    ],
)
def test_names_that_cannot_be_allowed(name, words, tmp_path, capsys):
    torch.save({}, tmp_path / "a.pt")
    assert migrate(tmp_path / "a.pt", "--allow", name) == 2
    said = capsys.readouterr().err
    assert f"--allow {name}" in said.replace("'", "")
    assert words in said


def test_size_in_the_file_does_not_decide_numpys_memory(tmp_path):
    torch.save({"args": Evil()}, tmp_path / "a.pt")
    held = read(tmp_path / "a.pt")["args"]
    assert not isinstance(held, np.generic)  # no array was allocated


def test_control_characters_in_a_file_are_escaped(tmp_path, capsys):
    torch.save({"\x1b[31mred": 1}, tmp_path / "a.pt")
    assert migrate(tmp_path / "a.pt") == 2
    torch.save({key: {"state": {}, "param_groups": []} for key in ("\x1b[31mred", "\x07")}, tmp_path / "a.pt")
    assert migrate(tmp_path / "a.pt") == 2
    said = capsys.readouterr().err
    assert not {"\x1b", "\x07"} & set(said)
    assert r"\x1b[31mred" in said


def test_allowed_classes_are_forgotten_afterwards(tmp_path):
    torch.save(argparse.Namespace(a=1), tmp_path / "a.pt")
    read(tmp_path / "a.pt", ["fractions.Fraction"])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_an_optimizers_numbers_may_be_numpy_scalars(tmp_path, capsys):
    """Check a state with a numpy scalar as learning rate, saved with a Namespace, as by training programs."""
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, '
        '"num_hidden_layers": 1, "num_attention_heads": 2}'
    )
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    adamw = torch.optim.AdamW(model.parameters(), lr=np.float64(0.01))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    args = argparse.Namespace(out=pathlib.Path("run"), seed=np.int64(3))
    torch.save({"optimizer": adamw.state_dict(), "args": args}, tmp_path / "a.pt")
    out = tmp_path / "out.pt"
    assert main(["migrate", str(tmp_path / "a.pt"), "--config", str(config), "--out", str(out)]) == 0
    written = torch.load(out, weights_only=False)
    assert written["args"] == args
    assert {group["lr"] for group in written["optimizer"]["param_groups"]} == {0.01}
    GWTAdamW(gwt_param_groups(model)).load_state_dict(written["optimizer"])


@pytest.mark.parametrize("archive", [True, False])
def test_a_defaultdict_is_read_as_a_dict(archive: bool, tmp_path):
    held = {"state": collections.defaultdict(dict, {0: {"step": torch.ones(())}})}
    torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
    found = unpickling.load(tmp_path / "a.pt")
    assert type(found["state"]) is dict
    assert found == {"state": {0: {"step": torch.ones(())}}}


def test_error_of_an_allowed_class_that_torch_cannot_fill(tmp_path):
    torch.save({"last": collections.deque([1, 2])}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds collections\.deque.*--allow collections\.deque"):
        unpickling.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"collections\.deque.* torch\.load cannot fill.*state alone"):
        unpickling.load(tmp_path / "a.pt", ["collections.deque"])


def test_numpy_arrays_are_named_where_numbers_are_expected(tmp_path):
    torch.save({"lr": np.array([1e-3])}, tmp_path / "a.pt")
    assert repr(unpickling.load(tmp_path / "a.pt")["lr"]).startswith("a numpy array, which is not read")
