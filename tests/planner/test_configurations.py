"""Models built from configurations: nothing that a configuration names is fetched."""

from __future__ import annotations

import json
import socket

import huggingface_hub.constants
import pytest

from gwt_kernels.cli import main
from gwt_kernels.models.files import build_on_meta

NAMED = {
    "detr": {"use_timm_backbone": False, "backbone": "microsoft/resnet-50", "use_pretrained_backbone": True},
    "dpt": {"backbone": "facebook/dinov2-base", "use_pretrained_backbone": True},
}
SMALL = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Return a list of hosts that are looked up, none of which is found; without a cache of the Hub."""
    hosts: list[object] = []

    def refuse(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hosts


def written(folder, kind, fields):
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": kind, **fields}))
    return path


@pytest.mark.parametrize("kind", NAMED)
def test_a_backbone_elsewhere_is_refused_without_asking_for_it(kind, asked, tmp_path, capsys):
    path = written(tmp_path, kind, NAMED[kind])
    assert main(["plan", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"the {kind!r} model has the backbone {NAMED[kind]['backbone']!r}" in said
    assert "give it as backbone_config" in said
    assert asked == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False  # as it was


def test_a_described_backbone_is_built_without_its_weights(asked, tmp_path):
    fields = {"use_timm_backbone": False, "backbone_config": SMALL, "use_pretrained_backbone": True}
    model = build_on_meta(written(tmp_path, "detr", {**fields, "backbone": None}))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert any("backbone" in name for name, _ in model.named_parameters())
    assert asked == []
