"""The tensors that a recipe trains, their rates, and errors of folders that cannot be used."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.finetune import models
from bench.pretrain.optimizers import measured_state_bytes, predicted_state_bytes
from tests.support.finetuning import write_bert, write_llama, write_tokenizer


def built(folder: Path, classes: int, recipe: str, rank: int = 2) -> nn.Module:
    return models.build_model(str(folder), classes, recipe, rank=rank, dtype=torch.float32, pad=0)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_recipes_of_a_classifier(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    full, matrices, head = (trained(built(folder, 3, recipe)) for recipe in ("full", "matrices", "head"))
    assert head == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert all("encoder.layer" in name and name.endswith(".weight") for name in matrices - head)
    assert len(matrices - head) == 2 * 6  # query, key, value, attention's output, and two of the MLP
    assert {name for name in full - matrices if name.endswith("embeddings.weight")} != set()
    assert head < matrices < full


def test_recipes_of_a_language_model(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    assert trained(built(folder, 0, "head")) == {"model.embed_tokens.weight"}  # tied to the output matrix
    assert len(trained(built(folder, 0, "matrices"))) == 7
    assert "model.norm.weight" in trained(built(folder, 0, "full"))


def test_pretrained_weights_are_kept_and_the_head_is_the_seeds(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")

    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return built(folder, 2, "full").state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    body = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(one[body], other[body])
    assert torch.equal(one["classifier.weight"], again["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("name", ["adamw", "gwt2", "foam2"])
@pytest.mark.parametrize("recipe", models.WHOLE)
def test_scale_sets_the_matrices_apart_for_every_optimizer(tmp_path: Path, name: str, recipe: str) -> None:
    model = built(write_bert(tmp_path / "bert"), 2, recipe)
    optimizer = models.optimizer_of(model, name, recipe, lr=0.01, scale=0.5, weight_decay=0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = names[id(parameter)]
            inside = "encoder.layer" in own and parameter.ndim == 2
            assert group["lr"] * (1.0 if name == "adamw" else group["scale"]) == (0.005 if inside else 0.01)
            seen.add(own)
    assert seen == trained(model)


def test_state_is_what_the_rule_says(tmp_path: Path) -> None:
    model = built(write_bert(tmp_path / "bert"), 2, "matrices")
    matrices = {id(p): p for n, p in model.named_parameters() if "encoder.layer" in n and p.requires_grad}
    for name, share in (("adamw", 1), ("gwt2", 4)):
        optimizer = models.optimizer_of(model, name, "matrices", lr=0.01, scale=0.5, weight_decay=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        assert measured_state_bytes(optimizer) == predicted_state_bytes(optimizer)
        for parameter, state in optimizer.state.items():
            fewer = share if id(parameter) in matrices else 1
            assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == parameter.numel() // fewer


def test_adapters_train_at_the_scaled_rate(tmp_path: Path) -> None:
    pytest.importorskip(
        "peft", reason="peft is not installed; make finetune installs it in build/finetune/packages"
    )
    model = built(write_bert(tmp_path / "bert"), 2, "lora")
    names = trained(model)
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or "classifier" in name for name in names)
    optimizer = models.optimizer_of(model, "adamw", "lora", lr=0.01, scale=3.0, weight_decay=0.1)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        adapters = {"lora_" in by_id[id(parameter)] for parameter in group["params"]}
        assert adapters == {group["lr"] == pytest.approx(0.03)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_head_alone_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = built(write_bert(tmp_path / "bert"), 2, "head")
    optimizer = models.optimizer_of(model, "adamw", "head", lr=0.01, scale=3.0, weight_decay=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert not [warning for warning in recwarn if "found nothing to transform" in str(warning.message)]


def test_pairs_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"recipe 'head' trains no matrix that gwt2 would .*: use adamw with it"):
        models.check_pair("gwt2", "head")
    with pytest.raises(
        ValueError, match=r"^--recipes: unknown recipe 'all': choose from head, lora, matrices, full"
    ):
        models.check_pair("adamw", "all")
    with pytest.raises(ValueError, match=r"^--optimizers: unknown optimizer 'sgd': choose adamw"):
        models.check_pair("sgd", "full")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"recipe 'lora' needs peft .*pip install peft"):
        models.check_pair("adamw", "lora")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises((FileNotFoundError, ValueError), match=match) as caught:
            models.check_folder(folder)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "bert"
    refused(r"--model .*bert: no such folder; give one that")
    write_bert(folder)
    models.check_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    refused(r"--model .*bert: has no weights \(model\.safetensors or pytorch_model\.bin\); download them")
    (tmp_path / "weights").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    refused(r"--model .*bert: transformers cannot read its config\.json \(.*\); give the folder of a model")
    (folder / "config.json").write_text("{")
    refused(r"--model .*bert: transformers cannot read its config\.json")
    (folder / "config.json").unlink()
    refused(r"--model .*bert: has no config\.json; give a folder")


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    words = tmp_path / "words"
    with pytest.raises(
        ValueError, match=r"--tokenizer .*words: token id 15 is outside .*bert, 15 ids; give the tok"
    ):
        models.check_fit(folder, words, 15, 16)
    models.check_fit(folder, words, 14, 24)
    with pytest.raises(ValueError, match=r"--max-length 25: --model .*bert takes 24 tokens at most"):
        models.check_fit(folder, words, 14, 25)
    with pytest.raises(FileNotFoundError, match=r"--tokenizer .*none: has no tokenizer\.json; name the folder"):
        models.load_tokenizer(tmp_path / "none")
    write_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--tokenizer .*words: cannot be read \(.*\); give another folder"):
        models.load_tokenizer(tmp_path / "words")


@pytest.mark.parametrize(
    ("rows", "ids", "fits"),
    [
        (49_152, 49_152, True),
        (50_304, 50_257, True),  # GPT-2: rows padded to a multiple of 128
        (51_200, 50_295, True),  # Phi
        (50_257, 50_258, True),  # a padding token was added
        (152_064, 151_665, True),  # Qwen2.5
        (30, 15, True),
        (49_152, 9, False),
        (49_152, 30_522, False),
        (30_522, 49_152, False),
        (256, 9, False),
    ],
)
def test_a_tokenizer_is_about_as_large_as_the_embedding(tmp_path: Path, rows: int, ids: int, fits: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    if fits:
        models.check_tokenizer(tmp_path, tmp_path / "words", ids)
    else:
        match = (
            rf"--tokenizer .*words: has {ids:,} token ids, and .*--model .* {rows:,} rows; give the tokenizer that"
        )
        with pytest.raises(ValueError, match=match):
            models.check_tokenizer(tmp_path, tmp_path / "words", ids)


@pytest.mark.parametrize("index", [name for name in models.WEIGHTS if name.endswith(".index.json")])
def test_shards_that_are_missing(tmp_path: Path, index: str) -> None:
    folder = write_bert(tmp_path / "bert")
    listed = folder / index
    listed.write_text(json.dumps({"weight_map": {"a": "gone-1", "b": "gone-2", "c": "gone-2"}}))
    models.check_folder(folder)  # transformers takes the single file that is there
    (folder / "model.safetensors").unlink()
    for name, match in {"gone-1": "gone-1, one of 2 missing of the 2", "gone-2": "gone-2, one of 1"}.items():
        with pytest.raises(
            FileNotFoundError, match=rf"--model .*bert: lacks {match} .* {index} names; download them"
        ):
            models.check_folder(folder)
        (folder / name).write_text("")
    models.check_folder(folder)
    for broken in ("{", "[]", '{"weight_map": 1}'):
        listed.write_text(broken)
        with pytest.raises(
            ValueError, match=rf"--model .*bert: cannot read which files .* {index} \(.*; download it"
        ):
            models.check_folder(folder)


def test_digest_is_of_the_weights(tmp_path: Path) -> None:
    one, other = write_bert(tmp_path / "one"), write_bert(tmp_path / "other")
    assert models.digest_of(one) == models.digest_of(other)
    wider = write_bert(tmp_path / "wider", intermediate_size=96)
    assert models.digest_of(one) != models.digest_of(wider)


def test_weights_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    def refused(match: str, folder: Path) -> None:
        with pytest.raises(ValueError, match=rf"--model {folder}: {match}") as caught:
            built(folder, 2, "full")
        assert "\n" not in str(caught.value)

    def changed(name: str, **options: Any) -> Path:
        folder = write_bert(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))
        return folder

    cut = changed("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(r"cannot be loaded \(SafetensorError: .*\); give a whole folder", cut)
    (cut / "model.safetensors").unlink()
    (cut / "pytorch_model.bin").write_bytes(b"no pickle")
    refused(r"cannot be loaded \(UnpicklingError: ", cut)
    (cut / "pytorch_model.bin").unlink()
    (cut / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    refused(r"cannot be loaded \(FileNotFoundError: .*gone\.safetensors", cut)
    refused(r"cannot be loaded \(RuntimeError: its weights have other shapes", changed("wide", hidden_size=64))
    refused(r"its weights lack 16 of the tensors of its config\.json, such as bert\.encoder\.layer\.2\.",
            changed("deep", num_hidden_layers=3))  # fmt: skip
    another = changed("another")
    shutil.copy(write_llama(tmp_path / "llama") / "model.safetensors", another / "model.safetensors")
    refused(r"its weights lack 37 of the tensors", another)
