"""Pre-training: schedule, exact resume, fair comparison, and errors that name the remedy."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import places, records
from bench.common.models import build_model, load_config
from bench.pretrain import __main__ as pretrain
from bench.pretrain import checkpoint
from bench.pretrain.optimizers import build_optimizer
from bench.pretrain.training import Run, lr_factor, read_log
from tests.support.pretraining import (
    TEXT,
    assert_predicted_state_bytes,
    assert_same_run,
    assert_scale_is_of_matrices,
    run_of,
    tensors,
    tiny_model,
    tiny_options,
    trained,
)

CONTENDERS = ("adamw", "gwt1", "gwt2", "gwt3")
OTHERS = (
    *("gwt0", "gwt-row", "foam0", "foam-row", "foam-row-bf16", "lion2", "lion-row", "muon0", "muon2"),
    *("adam_mini0", "adam_mini2", "adam_mini-row"),
    *("adafactor0", "adafactor2", "adafactor2-published", "adafactor2-bf16", "torch_adafactor"),
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return tiny_options(tmp_path)


# Tokenizer


def test_a_pretrained_tokenizer_by_folder(tmp_path: Path, options: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train([str(TEXT)], trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet))
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)

    parsed = pretrain.parse([*options, "--tokenizer", str(folder)])[0]
    corpus = pretrain.load_corpus(parsed, seed=0)
    assert 255 < int(corpus.train.take(50).max()) < 400
    held = bpe.decode(corpus.heldout[:, :-1].flatten().tolist())
    assert held in TEXT.read_text()
    assert len(held) > corpus.heldout[:, :-1].numel()  # more than one byte per token
    assert corpus.facts["train_tokens"] < load_corpus_tokens(options)


def load_corpus_tokens(options: list[str]) -> int:
    return int(pretrain.load_corpus(pretrain.parse(options)[0], seed=0).facts["train_tokens"])


# Training


def test_learning_rate_schedule() -> None:
    at = {step: lr_factor(step, steps=100, warmup=0.1, min_lr=0.1) for step in range(1, 101)}
    assert [at[1], at[5], at[10], at[100]] == pytest.approx([0.1, 0.5, 1.0, 0.1], rel=1e-12)
    assert at[55] == pytest.approx(0.55, rel=1e-12)  # half-way down the cosine
    assert all(one > other for one, other in itertools.pairwise(at[step] for step in range(10, 101)))
    assert lr_factor(1, steps=1, warmup=0.0, min_lr=0.0) == 1.0


@pytest.mark.parametrize("optimizer", [*CONTENDERS, "foam-row", "muon2", "adafactor2", "torch_adafactor"])
def test_resume_is_exact(tmp_path: Path, options: list[str], optimizer: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained([*options, "--optimizer", optimizer], whole)
    # Step 5 is between two lines of the log, and not the last of the warm-up.
    trained([*options, "--optimizer", optimizer], parts, stop_at=5)
    half = checkpoint.read(parts / "checkpoint.pt")
    assert half["step"] == 5
    trained([*options, "--optimizer", optimizer], parts, resume=True)

    end, expected = checkpoint.read(parts / "checkpoint.pt"), checkpoint.read(whole / "checkpoint.pt")
    assert_same_run(end, expected)
    assert not torch.equal(half["model"]["lm_head.weight"], end["model"]["lm_head.weight"])
    for kind in ("run", "train", "eval"):
        ours, theirs = read_log(parts / "log.jsonl", kind), read_log(whole / "log.jsonl", kind)
        for line in ours + theirs:
            line.pop("seconds", None)
        assert ours == theirs
    kinds = {type(leaf) for leaf in tensors(expected).values()}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}


def test_resume_after_a_crash(tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    trained(options, whole)
    honest_step = Run.train_step

    def crash_at_eight(run: Run) -> None:
        if run.step == 8:
            raise KeyboardInterrupt
        honest_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", crash_at_eight)
        with pytest.raises(KeyboardInterrupt):
            trained(options, crashed, save_every=3)
    assert read_log(crashed / "log.jsonl", "eval")[-1]["step"] == 8  # past the checkpoint of step 6
    trained(options, crashed, resume=True)
    end, expected = (checkpoint.read(out / "checkpoint.pt") for out in (crashed, whole))
    assert_same_run(end, expected)
    assert [e["step"] for e in read_log(crashed / "log.jsonl", "eval")] == [2, 4, 6, 8, 10]


def test_checkpoint_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_atomically(path, {"step": 1})

    def fail(payload: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, {"step": 2})
    assert checkpoint.read(path) == {"step": 1}


def test_accumulation_equals_a_larger_batch(options: list[str]) -> None:
    # After one step without clipping AdamW's first moment is a tenth of the gradient.
    def gradient(batch: int, accumulate: int) -> torch.Tensor:
        sizes = ("--batch", str(batch), "--accumulate", str(accumulate), "--grad-clip", "0")
        run = run_of(options, "adamw", *sizes)
        run.train_step()
        return torch.cat([run.optimizer.state[p]["exp_avg"].flatten() for p in run.model.parameters()])

    big, accumulated, small = gradient(6, 1), gradient(2, 3), gradient(2, 1)
    assert (accumulated - big).norm() < 1e-6 * big.norm()
    assert (small - big).norm() > 1e-2 * big.norm()


def test_log_holds_the_schedule(tmp_path: Path, options: list[str]) -> None:
    pretrain.main([*options, "--optimizer", "adamw", "--lr", "0.01", "--scale", "0.5", "--out", str(tmp_path)])
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in entries if e["kind"] != "eval"] == [
        ("run", 0),
        ("train", 4),
        ("train", 8),
        ("train", 10),
    ]
    assert entries[0]["optimizer"] == "adamw"
    for entry in read_log(tmp_path / "log.jsonl", "train"):
        factor = lr_factor(entry["step"], steps=10, warmup=0.3, min_lr=0.1)
        assert set(entry["lr"]) == {0.01 * factor, 0.005 * factor}
        assert 1.0 < entry["loss"] < 8.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("optimizer", CONTENDERS)
def test_predicted_state_bytes_are_exact(options: list[str], optimizer: str, precision: str) -> None:
    assert_predicted_state_bytes(run_of(options, optimizer, "--precision", precision))


@pytest.mark.parametrize("optimizer", OTHERS)
def test_scale_multiplies_the_first_update_of_matrices_alone(options: list[str], optimizer: str) -> None:
    assert_scale_is_of_matrices(options, optimizer)


@pytest.mark.parametrize("optimizer", OTHERS)
def test_predicted_state_bytes_of_the_others_are_exact(options: list[str], optimizer: str) -> None:
    assert_predicted_state_bytes(run_of(options, optimizer))


def test_names_choose_rule_level_and_details(tiny: Path) -> None:
    model = build_model(load_config(str(tiny)), seed=0, device=torch.device("cpu"), dtype=torch.bfloat16)

    def of_matrices(name: str) -> dict[str, Any]:
        groups = build_optimizer(name, model, lr=0.01, scale=0.5).param_groups
        (group,) = (group for group in groups if any("q_proj" in each for each in group.get("param_names", [])))
        return group

    assert [of_matrices(name)["details"] for name in ("adafactor2", "adafactor2-published")] == [
        "divided",
        "published",
    ]
    for rule in ("gwt", "foam", "lion", "adam_mini"):
        assert (of_matrices(f"{rule}-row")["rule"], of_matrices(f"{rule}-row")["level"]) == (rule, "row")
        assert of_matrices(f"{rule}3")["level"] == 3
    group = of_matrices("adafactor1-published-bf16-split")
    assert (group["level"], group["details"], group["state_dtype"]) == (1, "published", "bfloat16")
    assert group["weight_rounding"] == "split"
    assert type(build_optimizer("torch_adafactor", model, lr=0.01, scale=0.5)) is torch.optim.Adafactor
    for name in ("muon-row", "adafactor-row", "gwt2-published", "gwt", "gwt22", "row", "gwt2-fp8", "adam_mini"):
        with pytest.raises(ValueError, match=f"unknown optimizer '{name}'.*foam-row"):
            build_optimizer(name, model, lr=0.01, scale=0.5)


def test_scale_sets_the_rate_of_matrices_for_every_optimizer(tiny: Path) -> None:
    model = build_model(load_config(str(tiny)), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    matrices = {id(p) for name, p in model.named_parameters() if "proj" in name}
    for name in CONTENDERS:
        optimizer = build_optimizer(name, model, lr=0.01, scale=0.5)
        for group in optimizer.param_groups:
            inside = {id(p) for p in group["params"]} <= matrices
            rate = group["lr"] * (1.0 if name == "adamw" else group["scale"])
            assert rate == (0.005 if inside else 0.01)


# Comparison


def test_heldout_loss_does_not_depend_on_the_batch(options: list[str]) -> None:
    even, uneven = (run_of(options, "adamw", "--batch", batch).heldout_loss() for batch in ("2", "3"))
    assert even == pytest.approx(uneven, rel=1e-6)


def test_batches_depend_on_the_seed_alone(options: list[str]) -> None:
    def digest(optimizer: str, seed: str) -> int:
        run = run_of(options, optimizer, "--seed", seed)
        run.train_step()
        return run.data_digest

    assert digest("adamw", "0") == digest("gwt2", "0") != digest("gwt2", "1")


# Errors


def test_errors_name_the_value_and_the_remedy(tmp_path: Path, options: list[str], tiny: Path) -> None:
    def fails(kind: type[Exception], match: str, *more: str) -> None:
        with pytest.raises(kind, match=match):
            pretrain.main([*options, "--out", str(tmp_path / "out"), *more])

    fails(FileNotFoundError, r"no-such: no such file or folder; give one", "--text", str(tmp_path / "no-such"))
    (tmp_path / "empty").mkdir()
    fails(ValueError, r"empty: holds no UTF-8 text files; give", "--text", str(tmp_path / "empty"))
    (tmp_path / "short.txt").write_text("too short")
    fails(
        ValueError,
        r"short.txt: \d+ training tokens are too few .* give more",
        "--text",
        str(tmp_path / "short.txt"),
    )
    fails(ValueError, r"held-out tokens are too few for 9999 windows.*--eval-windows", "--eval-windows", "9999")
    fails(ValueError, r"^--optimizer: unknown optimizer 'sgd': choose adamw", "--optimizer", "sgd")
    fails(ValueError, r"^--compare: unknown optimizer 'gwt': choose adamw", "--compare", "adamw", "gwt")
    fails(FileNotFoundError, r"--model llama_9b: .*llama_60m", "--model", "llama_9b")
    narrow = tmp_path / "narrow.json"
    narrow.write_text(tiny.read_text().replace("256", "64"))
    fails(ValueError, r"token id 1\d\d is outside .* 64 ids; choose another --tokenizer", "--model", str(narrow))
    fails(ValueError, r"^--sweep: no sweep grid for 'gwt7'.*add one", "--sweep", "gwt7")
    fails(ValueError, r"--heldout-split 'train'.*another", "--dataset", "some/text", "--heldout-split", "train")


def test_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        pretrain.main([*options, "--dataset", "some/text"])


def test_resuming_another_run_is_refused(tmp_path: Path, options: list[str]) -> None:
    trained([*options, "--lr", "0.01"], tmp_path / "out", stop_at=2)
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    for more, message in (
        (["--lr", "0.02"], r"lr=0.01 there, 0.02 here.*same settings, or start a new run"),
        (["--lr", "0.01", "--optimizer", "adamw"], r"optimizer='gwt2' there, 'adamw' here"),
        (["--lr", "0.01", "--text", str(Path(types.__file__))], r"text_digest="),
    ):
        with pytest.raises(ValueError, match=message):
            trained([*options, *more], tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == before


def test_places_are_looked_at_before_training(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "train", lambda *args, **more: pytest.fail("it trains"))
    out, file = ["--out", str(tmp_path / "out")], tmp_path / "file"
    file.write_text("{")

    def refused(match: str, *more: str) -> None:
        for line in ([*out, *more], [*out, *more, "--compare", "adamw", "gwt2"]):
            with pytest.raises(ValueError, match=match):
                pretrain.main([*options, *line])

    refused(r"--out .*file: cannot be written .*; give another folder", "--out", str(file))
    refused(r"--record .*: is a folder; name a file in it", "--record", str(tmp_path))
    refused(r"--record .*file/r\.json: cannot be written .*; give another file", "--record", str(file / "r.json"))
    refused(r"file is not JSON", "--record", str(file))
    refused(r"file is not JSON", "--record", str(file), "--step-times", "1")
    refused(r"file is not JSON", "--sweep", "gwt2", "--sweep-record", str(file))
    records.append(tmp_path / "other.json", "kernels", [])
    refused(r"is a record of 'kernels', not of 'quality'", "--record", str(tmp_path / "other.json"))

    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(places.tempfile, "TemporaryFile", read_only)
    refused(r"--out .*out: cannot be written \(Read-only file system\); give another folder")


def test_models_tokenizers_and_devices_that_are_none(tmp_path: Path, options: list[str]) -> None:
    def refused(match: str, *more: str) -> None:
        with pytest.raises(ValueError, match=match):
            pretrain.main([*options, "--out", str(tmp_path / "out"), *more])

    for content, match in (
        ("{", r"is not JSON .*; give a file of LlamaConfig fields"),
        ("[]", r"is no configuration of a LLaMA; give"),
        ('{"format": "gwt_kernels results 1"}', r"is no configuration of a LLaMA; give"),  # else it builds LLaMA-7B
        ('{"model_type": "gpt2", "hidden_size": 8}', r"is no configuration of a LLaMA; give"),
    ):
        (tmp_path / "model.json").write_text(content)
        refused(rf"^--model .*model\.json: {match}", "--model", str(tmp_path / "model.json"))
    nowhere = str(tmp_path / "nowhere")
    refused(r"^--tokenizer .*nowhere: cannot be read \(.*\); give another", "--tokenizer", nowhere)
    refused(r"^--device nonsense: PyTorch knows no such device; use", "--device", "nonsense")
    refused(r"^--device mps: PyTorch sees no such device here; use", "--device", "mps")


@pytest.mark.parametrize(
    "line",
    [
        *(["--lr", "nan"], ["--lr", "-1"], ["--scale", "0"], ["--grad-clip", "-1"], ["--save-every", "-1"]),
        *(["--steps", "0"], ["--steps", "x"], ["--weight-decay", "inf"], ["--warmup", "2"], ["--momentum", "-0.1"]),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.parse(line)
    assert f"argument {line[0]}: {line[1]!r}: give a " in capsys.readouterr().err


def test_an_interrupted_comparison_shows_what_it_measured(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, record = tmp_path / "out", tmp_path / "r.json"
    real = pretrain.train

    def interrupted(run: Run, *args: Any, **more: Any) -> dict[str, Any]:
        if run.config.optimizer == "gwt2":
            raise KeyboardInterrupt
        return real(run, *args, **more)

    line = [*options, "--out", str(out), "--record", str(record), "--compare", "adamw", "gwt2", "adamw"]
    monkeypatch.setattr(pretrain, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(line)
    assert [result["optimizer"] for result in json.loads((out / "compare.json").read_text())] == ["adamw"]
    assert "adamw" in (out / "table.txt").read_text()
    before = records.rows_of(record, "quality")
    assert {row["optimizer"] for row in before} == {"adamw"}

    monkeypatch.setattr(pretrain, "train", real)
    pretrain.main([*line, "--resume"])
    names = [result["optimizer"] for result in json.loads((out / "compare.json").read_text())]
    assert names == ["adamw", "gwt2"]  # each once, even if named twice
    assert [row for row in records.rows_of(record, "quality") if row["optimizer"] == "adamw"] == before


def test_a_run_that_stops_before_its_first_evaluation(tmp_path: Path, options: list[str]) -> None:
    pretrain.main([*options, "--out", str(tmp_path / "out"), "--evals", "1", "--stop-at", "2"])
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    assert json.loads((tmp_path / "out" / "compare.json").read_text())[0]["heldout_loss"] is None


def test_damaged_files_of_a_run(tmp_path: Path, options: list[str]) -> None:
    """Check that a log whose last line was cut goes on, and that any other damaged file is refused by name."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    trained(options, whole)
    trained(options, out, stop_at=4)
    files = {name: (out / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")}

    def refused(name: str, content: bytes, match: str = "is damaged") -> None:
        before = (out / name).read_bytes()
        (out / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} {match}.*(restore it|in another --out)"):
            trained(options, out, resume=True)
        (out / name).write_bytes(before)

    saved = files["checkpoint.pt"]
    for content in (b"", b"hello", saved[:5000], saved[:-50]):
        refused("checkpoint.pt", content)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    refused("checkpoint.pt", (tmp_path / "other.pt").read_bytes(), "is no checkpoint of a run")
    refused("log.jsonl", b'{"kind": "ru\n' + files["log.jsonl"])
    (out / "log.jsonl").write_bytes(files["log.jsonl"] + b'{"kind": "tra')
    trained(options, out, resume=True)
    assert read_log(out / "log.jsonl", "train") == read_log(whole / "log.jsonl", "train")
    refused("result.json", b'{"model"')


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [[], ["--compile"]])
def test_bfloat16_on_cuda(tmp_path: Path, options: list[str], extra: list[str]) -> None:
    line = [
        *options,
        "--device",
        "cuda",
        "--steps",
        "30",
        "--compare",
        "adamw",
        "gwt2",
        "--out",
        str(tmp_path),
    ]
    pretrain.main([*line, *extra])
    for result in json.loads((tmp_path / "compare.json").read_text()):
        assert result["precision"] == "bfloat16"
        assert result["state_bytes_measured"] == result["state_bytes_predicted"]
        assert result["heldout_loss"] < 5.0  # below the 5.55 of a uniform guess
        assert result["optimizer_ms"]["median"] > 0
