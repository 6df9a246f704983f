"""``gwt-kernels migrate`` for every optimizer: runs that continue from written files, options, and refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Adafactor, AutoConfig, AutoModelForCausalLM

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon, gwt_param_groups, migrate
from tests.support.migrated_files import LLAMA, file_of, read, run, step
from tests.support.runs import assert_same_bits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a model and its configuration file."""
    config = tmp_path_factory.mktemp("model") / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **LLAMA}))
    torch.manual_seed(0)
    return SimpleNamespace(
        config=config, model=AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    )


def stepped(model, optimizer):
    step(model, optimizer, 1, 2)
    return optimizer.state_dict()


def of_muon(model, **options):
    """Return states with names: of torch's Muon over the recipe's matrices, and of AdamW over the rest."""
    first, *rest = gwt_param_groups(model, rule="muon")
    muon = torch.optim.Muon(zip(first["param_names"], first["params"], strict=True), lr=0.02, **options)
    others = [pair for group in rest for pair in zip(group["param_names"], group["params"], strict=True)]
    adamw = torch.optim.AdamW(others, lr=0.004, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    for seed in (1, 2):
        for each in (muon, adamw):
            step(model, each, seed)
    return {"muon": muon.state_dict(), "adamw": adamw.state_dict()}


def groups(model, rule, scale=1.0, decay=0.1, **more):
    return gwt_param_groups(model, rule=rule, scale=scale, weight_decay=decay, **more)


def of_heads(model, *head_rows, **more):
    """Return an Adam-mini whose matrices, in several groups, have the given ``head_rows``."""
    first, *rest = groups(model, "adam_mini", **more)
    n = len(head_rows)
    parts = [
        {**first, **{key: first[key][i::n] for key in ("params", "param_names")}, "head_rows": each}
        for i, each in enumerate(head_rows)
    ]
    return GWTAdamMini([*parts, *rest], lr=0.003)


ADAMW = {"lr": 0.003, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1}
OF_ADAMW = {"adamw_betas": (0.8, 0.9), "adamw_eps": 1e-7}
CASES = {
    "Muon and AdamW to GWTMuon": (
        lambda m: of_muon(m, momentum=0.9, nesterov=False),
        ["--rule", "muon", "--key", "muon", "--key", "adamw"],
        lambda m: GWTMuon(groups(m, "muon", adamw_lr=0.004), lr=0.02, momentum=0.9, nesterov=False, **OF_ADAMW),
    ),
    "AdamW to GWTMuon": (
        lambda m: stepped(m, torch.optim.AdamW(m.parameters(), **ADAMW)),
        ["--rule", "muon", "--lr", "0.02", "--momentum", "0.8", "--level", "3"],
        lambda m: GWTMuon(groups(m, "muon", level=3, adamw_lr=0.003), lr=0.02, momentum=0.8, **OF_ADAMW),
    ),
    "GWTMuon to another level and dtype": (
        lambda m: stepped(m, GWTMuon(groups(m, "muon", 0.5, level=1, adamw_lr=0.001), lr=0.02, ns_steps=4)),
        ["--rule", "muon", "--level", "2", "--state-dtype", "bf16"],
        lambda m: GWTMuon(groups(m, "muon", 0.5, adamw_lr=0.001), lr=0.02, ns_steps=4, state_dtype=torch.bfloat16),
    ),
    "GWTMuon to GWTLion": (
        lambda m: stepped(m, GWTMuon(groups(m, "muon", adamw_lr=0.001), lr=0.02)),
        ["--rule", "lion", "--lr", "1e-4", "--betas", "0.95", "0.98"],
        lambda m: GWTLion(groups(m, "lion", adamw_lr=0.001), lr=1e-4, betas=(0.95, 0.98)),
    ),
    "GWTAdamW to GWTLion": (
        lambda m: stepped(m, GWTAdamW(gwt_param_groups(m), lr=0.003, betas=(0.8, 0.9), eps=1e-7)),
        ["--rule", "lion", "--lr", "1e-4", "--adamw-lr", "0.002"],
        lambda m: GWTLion(groups(m, "lion", decay=0.0, adamw_lr=0.002), lr=1e-4, **OF_ADAMW),
    ),
    "AdamW to GWTAdamMini": (
        lambda m: stepped(m, torch.optim.AdamW(m.parameters(), **ADAMW)),
        ["--rule", "adam_mini"],
        lambda m: GWTAdamMini(groups(m, "adam_mini"), lr=0.003, betas=(0.8, 0.9), eps=1e-7),
    ),
    **{
        f"GWTAdamMini of {head_rows} rows to another level": (
            lambda m, head_rows=head_rows: stepped(m, of_heads(m, head_rows, level=1)),
            ["--rule", "adam_mini", "--level", "2"],
            lambda m, head_rows=head_rows: GWTAdamMini(groups(m, "adam_mini"), lr=0.003, head_rows=head_rows),
        )
        for head_rows in (5, None)
    },
    "torch's Adafactor to GWTAdafactor": (
        lambda m: stepped(m, torch.optim.Adafactor(m.parameters(), weight_decay=0.1)),
        ["--rule", "adafactor", "--adamw-lr", "0.001"],
        lambda m: GWTAdafactor(
            groups(m, "adafactor", 0.25, adamw_lr=0.001), lr=0.01, eps=(2.0**-23, 1e-3), beta1=None,
            scale_parameter=True, relative_step=True,
        ),
    ),
    "transformers' Adafactor to GWTAdafactor": (
        lambda m: stepped(m, Adafactor(m.parameters(), weight_decay=0.1, beta1=0.8)),
        ["--rule", "adafactor", "--adamw-lr", "0.001"],
        lambda m: GWTAdafactor(
            groups(m, "adafactor", 0.25, adamw_lr=0.001), lr=None, beta1=0.8, scale_parameter=True,
            relative_step=True,
        ),
    ),
    "transformers' Adafactor to GWTAdamW": (
        lambda m: stepped(m, Adafactor(m.parameters(), lr=0.01, relative_step=False, beta1=0.8)),
        ["--lr", "0.002"],
        lambda m: GWTAdamW(gwt_param_groups(m), lr=0.002),
    ),
    "AdamW to GWTAdafactor": (
        lambda m: stepped(m, torch.optim.AdamW(m.parameters(), **ADAMW)),
        ["--rule", "adafactor", "--lr", "0.01", "--state-dtype", "bf16"],
        lambda m: GWTAdafactor(
            groups(m, "adafactor", 0.25, adamw_lr=0.003), lr=0.01, state_dtype=torch.bfloat16, **OF_ADAMW
        ),
    ),
    "GWTAdafactor to another level": (
        lambda m: stepped(
            m, GWTAdafactor(groups(m, "adafactor", 0.5, level=1, adamw_lr=0.001), lr=0.02, details="published")
        ),
        ["--rule", "adafactor", "--level", "3"],
        lambda m: GWTAdafactor(
            groups(m, "adafactor", 0.5, level=3, adamw_lr=0.001), lr=0.02, details="published"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_written_file_is_what_the_library_makes_and_is_loaded(case, llama, tmp_path, capsys):
    make, flags, build = CASES[case]
    checkpoint, out = file_of(tmp_path, state := make(llama.model)), tmp_path / "out.pt"
    assert run(checkpoint, out, llama.config, *flags) == 0, capsys.readouterr().err
    optimizer = build(llama.model)
    states = list(state.values()) if "muon" in state else state
    migration = migrate(states, optimizer, names=None if "muon" in state else llama.model)
    written = read(out)
    if "muon" in state:
        assert list(written) == ["muon"]  # the other state's place is left out
        written = written["muon"]
    assert_same_bits(written["state"], migration.state_dict["state"])
    assert written["param_groups"] == migration.state_dict["param_groups"]
    optimizer.load_state_dict(written)
    step(llama.model, optimizer, 3)
    said = capsys.readouterr().out
    assert said.startswith(str(migration))
    assert all(f"    {key:<13} {note}" in said for each in migration.tensors for key, note in each.notes.items())


def adamw(model):
    return stepped(model, torch.optim.AdamW(model.parameters(), **ADAMW))


def muons(model, rates=(0.001, 0.002)):
    first, *rest = gwt_param_groups(model, rule="muon", weight_decay=0.1)
    return stepped(model, GWTMuon([first, *({**g, "lr": r} for g, r in zip(rest, rates, strict=True))], lr=0.02))


def split_matrices(model):
    first, *rest = gwt_param_groups(model, rule="muon", weight_decay=0.1, adamw_lr=0.001)
    parts = [
        {**first, "params": first["params"][i::2], "param_names": first["param_names"][i::2], "ns_steps": 4 + i}
        for i in range(2)
    ]
    return stepped(model, GWTMuon([*parts, *rest], lr=0.02))


REFUSED = {
    "no rate of Muon's": (adamw, ["--rule", "muon"], ("of Adam", "GWTMuon", "--lr")),
    "no rate of Lion's": (muons, ["--rule", "lion"], ("Adam and Muon", "GWTLion", "--lr")),
    "no rate of AdamW's": (
        lambda m: stepped(m, torch.optim.Adafactor(m.parameters())),
        ["--rule", "adafactor"],
        ("no learning rate of AdamW", "GWTAdafactor", "--adamw-lr"),
    ),
    "two rates of AdamW's": (muons, ["--rule", "muon"], ("differ in lr", "[0.001, 0.002]", "--adamw-lr")),
    "an option without a flag": (
        split_matrices, ["--rule", "muon"], ("differ in ns_steps", "[4, 5]", "in Python", "gwt_kernels.migrate"),
    ),
    "an option that is None in one group": (
        lambda m: stepped(m, of_heads(m, 5, None)), ["--rule", "adam_mini"], ("differ in head_rows", "[5, None]"),
    ),
    "an option of others": (
        adamw, ["--rule", "muon", "--lr", "1", "--wavelet", "db2"], ("GWTMuon has no wavelet", "--wavelet"),
    ),
    "one eps of Adafactor's two": (
        adamw, ["--rule", "adafactor", "--lr", "1", "--eps", "1e-7"], ("GWTAdafactor's eps", "leave out --eps"),
    ),
    "momentum of Adam": (adamw, ["--momentum", "0.9"], ("GWTAdamW has no momentum", "--momentum", "--rule")),
    "a second rate of Adam": (adamw, ["--adamw-lr", "0.1"], ("GWTAdamW has one learning rate", "--adamw-lr")),
    "Muon to Adam": (
        lambda m: muons(m, (0.001, 0.001)), ["--level", "2"], ("keeps no exp_avg_sq", "self_attn.q_proj.weight"),
    ),
    "rows of Adafactor": (
        adamw, ["--rule", "adafactor", "--lr", "1", "--level", "row"], ("level='row'",),
    ),
    "a second key that is not there": (
        of_muon, ["--rule", "muon", "--key", "muon", "--key", "adam"], ("'adam'", "holds no optimizer's state"),
    ),
    "a key given twice": (of_muon, ["--rule", "muon", "--key", "muon", "--key", "muon"], ("twice", "muon")),
    "two states without a key": (of_muon, ["--rule", "muon"], ("at muon, adamw", "--key")),
    "Muon's state without the rest": (
        of_muon,
        ["--rule", "muon", "--key", "muon", "--adamw-lr", "1"],
        ("nothing named 'model.embed_tokens.weight'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_by_name_with_the_remedy(case, llama, tmp_path, capsys):
    make, flags, words = REFUSED[case]
    out = tmp_path / "out.pt"
    assert run(file_of(tmp_path, make(llama.model)), out, llama.config, *flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith("gwt-kernels migrate: ")
    assert said.out == ""
    for word in words:
        assert word in said.err, said.err
    assert not out.exists()


def test_states_in_a_list_become_one_in_the_place_of_the_first(llama, tmp_path):
    states, out = of_muon(llama.model), tmp_path / "out.pt"
    payload = {"optimizer_states": [states["adamw"], states["muon"]], "epoch": 3}
    flags = ("--rule", "muon", "--key", "optimizer_states.0", "--key", "optimizer_states.1")
    assert run(file_of(tmp_path, payload), out, llama.config, *flags) == 0
    written = read(out)
    assert (written["epoch"], len(written["optimizer_states"])) == (3, 1)
    assert {group["rule"] for group in written["optimizer_states"][0]["param_groups"]} == {"muon", "adamw"}
