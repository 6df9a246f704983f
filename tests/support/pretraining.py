"""Small pre-training runs for tests: a model of one layer and ten steps on real text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.pretrain import __main__ as pretrain
from bench.pretrain.optimizers import measured_state_bytes, predicted_state_bytes
from bench.pretrain.training import Run, RunConfig, train

TEXT = Path(argparse.__file__)  # real text of 100 kB that is always present


def tiny_model(folder: Path, **changed: Any) -> Path:
    """Write the configuration of a model of one layer; its odd MLP width leaves a short last block."""
    fields = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 27,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
        **changed,
    }
    path = folder / "tiny.json"
    path.write_text(json.dumps(fields))
    return path


def tiny_options(folder: Path) -> list[str]:
    """Return a command line of ten small steps on the CPU."""
    line = f"--model {tiny_model(folder)} --text {TEXT} --device cpu --threads 1 --steps 10 --batch 2 --context 16"
    return [*line.split(), "--evals", "5", "--eval-windows", "4", "--log-every", "4", "--quiet"]


def config_of(options: list[str], optimizer: str = "gwt2", *more: str) -> RunConfig:
    """Return an optimizer's settings from a command line."""
    return pretrain.run_config(pretrain.parse([*options, *more])[0], optimizer)


def run_of(options: list[str], optimizer: str = "gwt2", *more: str) -> Run:
    """Return a run in memory before its first step."""
    parsed = pretrain.parse([*options, *more])[0]
    config = pretrain.run_config(parsed, optimizer)
    return Run(config, pretrain.load_corpus(parsed, config.seed), torch.device("cpu"))


def assert_scale_is_of_matrices(options: list[str], optimizer: str, *more: str) -> None:
    """Assert that three times the scale makes the first update three times as long, for matrices only."""

    def first_update(scale: str) -> dict[str, torch.Tensor]:
        run = run_of(options, optimizer, "--lr", "0.01", "--scale", scale, *more)
        before = {key: p.detach().double() for key, p in run.model.named_parameters()}
        run.train_step()
        return {key: before[key] - p.detach().double() for key, p in run.model.named_parameters()}

    one, three = first_update("0.5"), first_update("1.5")
    for key, update in one.items():
        factor = 3.0 if "proj" in key else 1.0
        assert update.norm() > 0, key
        assert (three[key] - factor * update).norm() < 1e-4 * update.norm(), key  # float32 weights round the update


def trained(options: list[str], out: Path, **how: Any) -> dict[str, Any]:
    """Train one run without the table and the figure."""
    parsed = pretrain.parse(options)[0]
    config = pretrain.run_config(parsed, parsed.optimizer)
    corpus = pretrain.load_corpus(parsed, config.seed)
    return train(Run(config, corpus, torch.device("cpu")), out, log_every=4, progress=False, **how)


def tensors(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a nested structure by their path."""
    if isinstance(tree, dict):
        pairs = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        pairs = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {path: tree}
    return {key: leaf for name, value in pairs for key, leaf in tensors(value, f"{path}/{name}").items()}


def assert_predicted_state_bytes(run: Run) -> None:
    """Raise AssertionError unless two steps create exactly the predicted bytes of state."""
    predicted = predicted_state_bytes(run.optimizer)
    assert measured_state_bytes(run.optimizer) == 0
    run.train_step()
    run.train_step()
    assert measured_state_bytes(run.optimizer) == predicted


def assert_same_leaves(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise AssertionError unless all tensors and numbers are equal bit for bit, under the same names."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


def assert_same_run(one: Any, other: Any) -> None:
    """Raise AssertionError unless two checkpoints are equal bit for bit, except for their seconds."""
    # torch.optim.Optimizer may add its own default `differentiable` to the groups it loads.
    ours, theirs = (
        {n: leaf for n, leaf in tensors(tree).items() if n != "/seconds" and not n.endswith("/differentiable")}
        for tree in (one, other)
    )
    assert_same_leaves(ours, theirs)
