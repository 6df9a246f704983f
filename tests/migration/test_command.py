"""``gwt-kernels migrate`` on checkpoint files: sources, written files, and refused files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gwt_kernels import GWTAdamW, gwt_param_groups, migrate
from gwt_kernels.cli import main
from gwt_kernels.migration.checkpoints import read as read_checkpoint
from gwt_kernels.migration.checkpoints import write
from tests.support.runs import assert_same_bits

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a model, its configuration file, and AdamW's state after two steps over ``model.parameters()``."""
    folder = tmp_path_factory.mktemp("model")
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "llama", **LLAMA}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    step(model, optimizer, 0, 1)
    return SimpleNamespace(config=config, model=model, state=optimizer.state_dict())


def step(model, optimizer, *seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        tokens = torch.randint(0, 61, (2, 16))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def run(checkpoint, out, config, *more):
    return main(["migrate", str(checkpoint), "--config", str(config), "--out", str(out), *map(str, more)])


def file_of(folder, payload, name="optimizer.pt"):
    torch.save(payload, folder / name)
    return folder / name


def read(path):
    return torch.load(path, weights_only=True)


def groups_of(trained, **options):
    return GWTAdamW(
        gwt_param_groups(trained.model, weight_decay=0.1), lr=0.003, betas=(0.8, 0.9), eps=1e-7, **options
    )


# Written files ----------------------------------------------------------------------------------------------


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


# Refused files ----------------------------------------------------------------------------------------------


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
        lambda folder, trained: file_of(folder, trained.state),
        ["--config", "llama_60m"],
        ("[20]", "--names"),
    ),
    "a tensor cut short": (
        lambda folder, trained: file_of(folder, cut(trained)),
        [],
        ("'model.embed_tokens.weight'", "(5, 40)", "(61, 40)"),
    ),
    "too deep": (
        lambda folder, trained: file_of(folder, trained.state),
        ["--level", "9", "--include", "up_proj"],
        ("up_proj", "level 9"),
    ),
    "two learning rates": (
        lambda folder, trained: file_of(folder, with_two_rates(trained.state)),
        ["--names", "NAMES"],
        ("lr", "1.0", "2.0", "--lr"),
    ),
    "a rename that is none": (
        lambda folder, trained: file_of(folder, trained.state),
        ["--rename", "norm"],
        ("'norm'", "OLD=NEW"),
    ),
    "names that are no text": (
        lambda folder, trained: file_of(folder, trained.state),
        ["--names", "optimizer.pt"],
        ("--names optimizer.pt is no text", "a name per line"),
    ),
    "no configuration": (
        lambda folder, trained: file_of(folder, trained.state),
        ["--config", "nowhere.json"],
        ("'nowhere.json'", "config.json"),
    ),
    "split weights of float32": (
        lambda folder, trained: file_of(folder, trained.state),
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
