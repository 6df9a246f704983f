"""``gwt-kernels migrate`` on checkpoint files: sources and written files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gwt_kernels import GWTAdamW, gwt_param_groups, migrate
from tests.support.migrated_files import file_of, groups_of, read, run, step
from tests.support.runs import assert_same_bits


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--state-dtype", "bf16"], {"state_dtype": torch.bfloat16}),
        (["--state-dtype", "int8", "--rule", "foam"], {"state_dtype": "int8", "rule": "foam"}),
        (["--no-limiter"], {"norm_growth_limit": None}),
        (["--dtype", "bf16", "--weight-rounding", "split"], {"weight_rounding": "split"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_the_written_file_equals_the_result_of_the_library(flags, options, trained, tmp_path, capsys):
    checkpoint, out = file_of(tmp_path, trained.state), tmp_path / "gwt.pt"
    bytes_before = checkpoint.read_bytes()
    assert run(checkpoint, out, trained.config, *flags) == 0
    model = trained.model
    if "split" in flags:
        trained = SimpleNamespace(
            model=AutoModelForCausalLM.from_config(model.config).bfloat16(), state=trained.state
        )
    optimizer = groups_of(trained, **options)
    migration = migrate(trained.state, optimizer, names=trained.model)
    written = read(out)
    assert_same_bits(written["state"], migration.state_dict["state"])
    assert written["param_groups"] == migration.state_dict["param_groups"]
    optimizer.load_state_dict(written)
    step(trained.model, optimizer, 3)
    said = capsys.readouterr().out
    assert said.startswith(str(migration))
    assert f"{out}: {out.stat().st_size:,} bytes; {checkpoint}: {len(bytes_before):,} bytes, unchanged" in said
    assert checkpoint.read_bytes() == bytes_before
    assert sorted(os.listdir(tmp_path)) == ["gwt.pt", "optimizer.pt"]  # no temporary file remains


def test_options_default_to_those_of_the_checkpoint(trained, tmp_path):
    checkpoint = file_of(tmp_path, trained.state)
    run(checkpoint, tmp_path / "a.pt", trained.config, "--level", 1)
    run(
        checkpoint, tmp_path / "b.pt", trained.config, "--lr", 0.01, "--betas", 0.7, 0.6, "--eps", 1e-5,
        "--weight-decay", 0.5, "--scale", 2, "--exclude", "self_attn",
    )  # fmt: skip
    a, b = (read(tmp_path / name)["param_groups"] for name in ("a.pt", "b.pt"))
    keys = ("level", "lr", "betas", "eps", "weight_decay", "scale")
    assert [a[0][key] for key in keys] == [1, 0.003, (0.8, 0.9), 1e-7, 0.1, 0.25]
    assert [b[0][key] for key in keys] == [2, 0.01, (0.7, 0.6), 1e-5, 0.5, 2]
    assert [group["weight_decay"] for group in a] == [0.1, 0.1, 0]
    assert not any("self_attn" in name for name in b[0]["param_names"])


@pytest.mark.parametrize("place", [("optimizer",), ("optimizer_states", 0)], ids=str)
def test_the_rest_of_a_checkpoint_is_unchanged(place, trained, tmp_path):
    inner = trained.state if len(place) == 1 else [trained.state]
    rest = {"model": {"weight": torch.ones(3)}, "epoch": 3, "lr_scheduler": {"state": {"last": [0.1]}}}
    out = tmp_path / "out.pt"
    assert run(file_of(tmp_path, {**rest, place[0]: inner}), out, trained.config) == 0
    written = read(out)
    found = written.pop(place[0])
    assert_same_bits(written, rest)
    groups_of(trained).load_state_dict(found if len(place) == 1 else found[0])


def test_a_checkpoint_of_trainer(trained, tmp_path):
    """Check the two groups of Hugging Face's Trainer, created by Trainer itself."""
    names = {p: name for name, p in trained.model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), weight_decay=0.1, learning_rate=0.003, report_to=[]
    )
    optimizer = Trainer(trained.model, arguments).create_optimizer()
    step(trained.model, optimizer, 5, 6)
    out = tmp_path / "gwt.pt"
    assert run(file_of(tmp_path, optimizer.state_dict()), out, trained.config, "--level", 0) == 0
    written = read(out)
    order = [name for group in written["param_groups"] for name in group["param_names"]]
    by_name = {names[p]: state["exp_avg"] for p, state in optimizer.state.items()}
    assert len(order) == len(by_name) == len(names)
    for i, name in enumerate(order):
        assert torch.equal(written["state"][i]["exp_avg"], by_name[name]), name


def test_scale_is_kept_from_one_level_to_another(trained, tmp_path):
    first = GWTAdamW(gwt_param_groups(trained.model, level=1, scale=0.5), lr=0.003, seed=7)
    step(trained.model, first, 8)
    out = tmp_path / "gwt.pt"
    assert run(file_of(tmp_path, first.state_dict()), out, trained.config, "--level", 3) == 0
    group = read(out)["param_groups"][0]
    assert (group["level"], group["scale"], group["seed"]) == (3, 0.5, 7)


def test_wavelet_boundary_and_bias_correction_are_kept_by_default(trained, tmp_path):
    options = {"wavelet": "bior2.2", "boundary": "periodic", "correct_bias": False}
    first = GWTAdamW(gwt_param_groups(trained.model, level=1), lr=0.003, **options)
    step(trained.model, first, 8)
    checkpoint = file_of(tmp_path, first.state_dict())
    written = {}
    for name, more in {"kept": (), "corrected": ("--correct-bias",), "left": ("--wavelet", "haar")}.items():
        out = tmp_path / f"{name}.pt"
        written[name] = (run(checkpoint, out, trained.config, "--level", 2, *more), out.exists() and read(out))
    assert [status for status, _ in written.values()] == [0, 0, 2]  # bior2.2 cannot be converted to Haar
    for name, correct_bias in (("kept", False), ("corrected", True)):
        groups = written[name][1]["param_groups"]
        assert {(g["wavelet"], g["boundary"], g["correct_bias"]) for g in groups} == {
            ("bior2.2", "periodic", correct_bias)
        }
    resumed = GWTAdamW(gwt_param_groups(trained.model, level=2), lr=0.003, **options)
    resumed.load_state_dict(written["kept"][1])
    step(trained.model, resumed, 9)


def test_options_of_the_new_optimizer_may_differ_from_adamws(trained, tmp_path):
    out = tmp_path / "gwt.pt"
    more = ("--wavelet", "db2", "--boundary", "symmetric", "--no-correct-bias")
    assert run(file_of(tmp_path, trained.state), out, trained.config, *more) == 0
    options = {"wavelet": "db2", "boundary": "symmetric", "correct_bias": False}
    resumed = GWTAdamW(gwt_param_groups(trained.model, level=2), lr=0.003, **options)
    resumed.load_state_dict(read(out))


def test_unusual_names_of_entries_and_of_parameters(trained, tmp_path):
    source = GWTAdamW([{"params": [p], "level": 0} for p in reversed(list(trained.model.parameters()))], lr=0.003)
    step(trained.model, source, 9)
    state = source.state_dict()
    for each in state["state"].values():
        each["norm"], each["note"] = 0.0, "left behind"
    for group in state["param_groups"]:
        for ours in ("level", "rule", "wavelet"):
            del group[ours]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(name for name, _ in reversed(list(trained.model.named_parameters()))))
    out = tmp_path / "gwt.pt"
    renames = ("--rename", "norm=limiter_norm", "--rename", "note=")
    assert run(file_of(tmp_path, state), out, trained.config, "--names", names, *renames) == 0
    assert len(read(out)["state"]) == len(list(trained.model.parameters()))


@pytest.mark.parametrize("several", [False, True])
def test_states_keyed_by_name_as_in_distributed_checkpoints(several, trained, tmp_path):
    """Check states whose keys are names, with another order and other groups than the model's."""
    named = list(trained.model.named_parameters())
    halves = [[p for _, p in half] for half in (named[5:][::-1], named[:5])]
    optimizers = [torch.optim.AdamW(half, lr=0.003) for half in halves]
    for optimizer in optimizers:
        step(trained.model, optimizer, 5)
    if several:
        payload = [get_optimizer_state_dict(trained.model, each) for each in optimizers]
        payload, keys = dict(zip("ab", payload, strict=True)), ("--key", "a", "--key", "b")
    else:
        payload, keys = get_optimizer_state_dict(trained.model, optimizers), ()
    out = tmp_path / "gwt.pt"
    assert run(file_of(tmp_path, payload), out, trained.config, "--level", 0, *keys) == 0
    written = read(out)["a"] if several else read(out)
    order = [name for group in written["param_groups"] for name in group["param_names"]]
    assert sorted(order) == sorted(name for name, _ in named)
    held = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    parameters = dict(named)
    for i, name in enumerate(order):
        assert torch.equal(written["state"][i]["exp_avg"], held[parameters[name]]["exp_avg"]), name


def test_adamw_at_level_0(trained, tmp_path, capsys):
    checkpoint, out = file_of(tmp_path, trained.state), tmp_path / "gwt.pt"
    assert run(checkpoint, out, trained.config, "--rule", "adamw") == 2
    assert "level is 2, but rule='adamw' transforms nothing: say --level 0" in capsys.readouterr().err
    assert run(checkpoint, out, trained.config, "--rule", "adamw", "--level", 0) == 0
    for options in ({"rule": "adamw", "level": 0}, {}):
        optimizer = GWTAdamW(gwt_param_groups(trained.model, level=0, weight_decay=0.1), lr=0.003, **options)
        optimizer.load_state_dict(read(out))
        assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_command_in_a_new_process(trained, tmp_path):
    checkpoint = file_of(tmp_path, trained.state)
    command = [sys.executable, "-m", "gwt_kernels", "migrate", str(checkpoint), "--config", str(trained.config)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "gwt.pt")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "exp_avg_sq    approximate" in done.stdout


def test_the_examples_of_the_page(capsys):
    page = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
    code, printed, of_schedule, of_muon = re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)[:4]
    names: dict = {}
    torch.manual_seed(0)
    exec(code, names)
    assert capsys.readouterr().out == printed
    assert names["after"] < names["before"]
    exec(of_schedule, names)
    assert (names["scheduler"].last_epoch, names["scheduler"].base_lrs) == (10, [1e-3] * 3)
    assert [group["lr"] for group in names["optimizer"].param_groups] == pytest.approx([1e-3 / 1.1] * 3)
    exec(of_muon, names)
    assert names["migration"].tensors[0].notes == {"exp_avg": "exact: sums of blocks"}
    assert names["optimizer"].state[names["mlp"].weight]["exp_avg"].shape == (32, 8)
