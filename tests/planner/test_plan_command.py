"""`gwt-kernels plan`: what it prints, and the input that it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from gwt_kernels.cli import main
from gwt_kernels.plan import plan
from tests.support.planned_models import Small, config_file

ROOT = Path(__file__).parents[2]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_llama_1b_from_its_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "llama_1b")
    weights_and_states = {
        (found[1], found[2]): found[3]
        for found in re.finditer(
            r"^>? +(AdamW|GWT level \d+) +(\w+)(?: \*)? +[\d.]+ +([\d.]+) +[\d.]+ %$", text, re.M
        )
    }
    assert "Memory, GiB" in text
    assert weights_and_states["AdamW", "bfloat16"] == "7.48"
    assert weights_and_states["GWT level 2", "bfloat16"] == "4.11"
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj\.weight +24 +\(2048, 5461\) +2 +yes +MLP matrix", text)
    assert "transformed: 168 tensors, 1,207,910,400 elements (90.2 %)" in text


def test_command_prints_step_times_and_every_parameter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = config_file(tmp_path, "llama")
    planned = plan(path, level=1, norm_growth_limit=None)
    text = printed(capsys, str(path), "--level", "1", "--no-limiter", "--bandwidth", "1MB/s", "--verbose")
    assert "layers.0.mlp.up_proj.weight" in text
    assert "layers.1.mlp.up_proj.weight" in text
    assert f"{planned.chosen.moved_bytes / 1e3:.0f}" in re.search(r"^>.*\d$", text, re.M)[0].split()
    assert "A step (give --bandwidth or --measure for its time)" in printed(capsys, str(path))
    assert "GB/s" in printed(capsys, str(path), "--measure")
    options = ("--rule", "adam_mini", "--head-rows", "all", "--weight-rounding", "stochastic", "--json")
    heads = plan(path, rule="adam_mini", head_rows=None, weight_rounding="stochastic")
    assert json.loads(printed(capsys, str(path), *options)) == json.loads(json.dumps(heads.as_dict()))


def test_command_prints_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = config_file(tmp_path, "llama")
    arguments = ("--dtype", "fp32", "--state-dtype", "fp64", "--exclude", r"layers\.0", "--include", "lm_head")
    found = json.loads(printed(capsys, str(path), *arguments, "--bandwidth", "1GB/s", "--json"))
    planned = plan(
        path, dtype=torch.float32, state_dtype=torch.float64, exclude=[r"layers\.0"], include=["lm_head"],
        bandwidth=1e9,
    )  # fmt: skip
    assert found == json.loads(json.dumps(planned.as_dict()))
    assert (found["chosen"]["moments"], found["chosen"]["seconds"]) == ("float64", planned.chosen.moved_bytes / 1e9)
    assert {p["level"] for p in found["parameters"] if ".layers.0." in p["name"]} == {0}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, ["nowhere.json"], "no file or preset 'nowhere.json'.*one of llama_60m, .*llama_405b"),
        (None, ["FOLDER"], "no file or preset"),
        ("{", ["FILE"], "is not JSON"),
        ("[" * 100_000, ["FILE"], "is not JSON"),
        ("\x80", ["FILE"], "is not JSON"),
        ("[1]", ["FILE"], "no model configuration.*'model_type'"),
        ('{"name": "left-pad"}', ["FILE"], "no model configuration.*'model_type'"),
        ('{"model_type": "abacus"}', ["FILE"], "model_type 'abacus' is unknown to transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', ["FILE"], "cannot build a 'llama' model.*hidden_size"),
        (
            '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}',
            ["FILE"],
            "cannot build.*multiple",
        ),
        (None, ["llama_60m", "--level", "40"], r"level 40 is too deep for all 56.*model\.layers\.0\..*level 0"),
        (None, ["llama_60m", "--level", "-1"], "level must be an integer of at least 0"),
        (None, ["llama_60m", "--include", "("], "not a regular expression"),
        (None, ["llama_60m", "--exclude", "nothing"], "matches no parameter"),
        (None, ["llama_60m", "--bandwidth", "3000"], "such as 3350GB/s"),
        (None, ["llama_60m", "--bandwidth", ""], "bandwidth '' is not understood"),
        (None, ["llama_60m", "--matrix-flops", "0"], "--matrix-flops needs --world-size or --mesh"),
        (None, ["llama_60m", "--latency", ""], "--latency needs --world-size or --mesh"),
        (None, ["llama_60m", "--rule", "adamw"], "rule='adamw' transforms nothing"),
        (None, ["llama_60m", "--head-rows", "2"], "no option 'head_rows' of GWTAdamW's"),
        (None, ["llama_60m", "--rule", "adam_mini", "--head-rows", "5"], "head_rows"),
        (None, ["llama_60m", "--dtype", "fp32", "--weight-rounding", "split"], "split"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2(
    content: str | None, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.json").write_text(content or "", encoding="latin-1")
    places = {"FILE": str(tmp_path / "file.json"), "FOLDER": str(tmp_path)}
    assert main(["plan", *(places.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("gwt-kernels plan: ")
    assert re.search(message, captured.err)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", "llama_60m"]) == 2
    assert "pip install transformers" in capsys.readouterr().err
    assert plan(Small()).state_bytes > 0


def test_docs_show_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.memory import level_table

    page = (ROOT / "docs" / "memory.md").read_text()
    assert re.search(r"<!-- levels -->\n(.*)\n<!-- /levels -->", page, re.DOTALL)[1] == level_table()
    command, shown = re.search(r"```console\n\$ gwt-kernels plan ([^\n]*)\n(.*?)```", page, re.DOTALL).groups()
    assert shown == printed(capsys, *command.split())
