"""The driver for CUDA machines, with small scripts as parts: order, time limits, skipped and repeated parts."""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, host
from bench.common import records
from bench.kernels import __main__ as kernels
from bench.pretrain import __main__ as pretrain

FINE = "print('fine')"
SLEEPER = """
import time
try:
    print("begun")
    time.sleep(60)
except KeyboardInterrupt:
    print("half of it")
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""
PARTS = ["correctness", "kernels", "optimizers", "quality"]


class Driver:
    """The driver with a script for each part."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = folder / "results"
        self.scripts = {part: [FINE] for part in PARTS}
        self.minutes: dict[str, float] = {}
        self.resumed: dict[str, bool] = {}
        """Whether each part found a checkpoint."""
        monkeypatch.setattr(gpu, "ROOT", folder)
        monkeypatch.setattr(gpu, "fingerprint", lambda: "these")
        monkeypatch.setattr(gpu, "commands", self._commands)
        monkeypatch.setattr(gpu, "PEERS", folder / "peers")

    def _commands(self, part: str, options: argparse.Namespace, folder: Path, minutes: float) -> list[list[str]]:
        self.minutes[part] = minutes
        assert folder.is_relative_to(gpu.ROOT / "runs")
        self.resumed[part] = (folder / "checkpoint").exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint").touch()
        return [["-c", script] for script in self.scripts[part]]

    def __call__(self, *arguments: str) -> int:
        self.minutes = {}
        return gpu.main(["--device", "cpu", "--out", str(self.out), *arguments])

    @property
    def rows(self) -> list[dict[str, Any]]:
        (path,) = self.out.glob("gpu_*.json")
        return records.rows_of(path, "gpu")

    def log(self, part: str) -> str:
        (path,) = self.out.glob(f"gpu_*_{part}.log")
        return path.read_text()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


def test_every_part_in_order(driver: Driver, capfd: pytest.CaptureFixture[str]) -> None:
    driver.scripts["kernels"] = ["print('first')", "import sys; print('second', file=sys.stderr)"]
    assert driver() == 0
    assert list(driver.minutes) == PARTS
    assert [(row["part"], row["finished"], row["note"]) for row in driver.rows] == [
        (part, True, "") for part in PARTS
    ]
    assert all(row["median"] > 0 and row["unit"] == "s" and row["torch"] for row in driver.rows)
    assert driver.log("correctness") == "fine\n"
    assert driver.log("kernels") == "first\nsecond\n"
    shown = capfd.readouterr().out
    assert "first\nsecond\n" in shown
    assert "quality: finished (" in shown


def test_each_part_gets_its_share_of_the_remaining_time(driver: Driver) -> None:
    driver("--minutes", "9")
    whole = 9 - gpu.GRACE / 60
    assert driver.minutes["correctness"] == pytest.approx(0.35 * whole, rel=0.01)
    # Time that a part leaves is divided among the later parts.
    assert driver.minutes["kernels"] == pytest.approx(0.25 / 0.65 * whole, rel=0.02)
    assert driver.minutes["quality"] == pytest.approx(whole, rel=0.05)


def test_a_finished_part_runs_again_only_if_named(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.scripts["optimizers"] = ["raise SystemExit(3)"]
    assert driver() == 1
    assert driver.rows[2]["note"] == "ended with status 3: python -c raise SystemExit(3)"
    assert list(driver.minutes) == PARTS  # a failed part does not keep the next from running
    capsys.readouterr()
    driver.scripts["optimizers"] = [FINE]
    assert driver() == 0
    assert list(driver.minutes) == ["optimizers"]
    assert f"kernels: finished on {driver.rows[1]['date']}; name it to run it again" in capsys.readouterr().out
    assert driver() == 0
    assert list(driver.minutes) == []
    assert driver("--parts", "quality", "kernels") == 0
    assert list(driver.minutes) == ["kernels", "quality"]


def test_a_part_resumes_until_it_has_finished(driver: Driver) -> None:
    driver.scripts["quality"] = ["raise SystemExit(3)"]
    driver("--parts", "quality")
    assert not driver.resumed["quality"]
    driver.scripts["quality"] = [FINE]
    driver("--parts", "quality")
    assert driver.resumed["quality"]
    driver("--parts", "quality")
    assert not driver.resumed["quality"]


def test_parts_are_unfinished_for_other_sources(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver("--parts", "kernels") == 0
    monkeypatch.setattr(gpu, "fingerprint", lambda: "another")
    assert driver() == 0
    assert list(driver.minutes) == PARTS


def test_fingerprint_hashes_contents_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    file = tmp_path / "bench" / "one.py"
    file.parent.mkdir()
    file.write_text("1")
    found = {gpu.fingerprint()}
    file.write_text("2")
    found.add(gpu.fingerprint())
    file.rename(file.with_name("two.py"))
    found.add(gpu.fingerprint())
    assert len(found) == 3
    (tmp_path / "bench" / "notes.txt").write_text("no source")
    assert gpu.fingerprint() in found


def test_nothing_is_timed_if_the_tests_fail(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    driver.scripts["correctness"] = ["print('1 failed'); raise SystemExit(1)", "print('never')"]
    assert driver() == 1
    assert list(driver.minutes) == ["correctness"]
    assert driver.log("correctness") == "1 failed\n"
    assert "nothing was timed, since the tests did not pass" in capsys.readouterr().out
    assert driver() == 1  # the part is not finished
    assert list(driver.minutes) == ["correctness"]


def test_tests_that_run_out_of_time_do_not_prevent_timing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 5.0)
    driver.scripts["correctness"] = [SLEEPER]
    assert driver("--minutes", "0.2") == 1
    assert list(driver.minutes) == PARTS
    assert [row["finished"] for row in driver.rows] == [False, True, True, True]
    assert "nothing was timed" not in capsys.readouterr().out
    driver.scripts["correctness"] = [FINE]
    assert driver() == 0
    assert list(driver.minutes) == ["correctness"]


def test_an_interrupted_part_may_write_its_results(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 5.0)
    driver.scripts["quality"] = [SLEEPER]
    started = time.monotonic()
    assert driver("--parts", "quality", "--minutes", str(9 / 60)) == 1
    assert time.monotonic() - started < 30
    assert driver.log("quality") == "begun\nhalf of it\n"
    (row,) = driver.rows
    assert not row["finished"]
    assert row["note"].startswith("stopped after 0.1 minutes: python -c ")


def test_a_part_that_does_not_stop_is_killed_with_children(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    driver.scripts["quality"] = [f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DEAF!r}])"]
    started = time.monotonic()
    assert driver("--parts", "quality", "--minutes", str(5 / 60)) == 1
    assert time.monotonic() - started < 30
    assert "deaf\n" in driver.log("quality")


def test_an_interruption_ends_the_part_and_keeps_earlier_results(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(text: str, **_: Any) -> None:
        if text == "begun\n":
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "print", show, raising=False)
    driver.scripts["kernels"] = [SLEEPER]
    started = time.monotonic()
    assert driver() == 130
    assert time.monotonic() - started < 30
    assert driver.log("kernels") == "begun\nhalf of it\n"
    assert [row["part"] for row in driver.rows] == ["correctness"]
    driver.scripts["kernels"] = [FINE]
    assert driver() == 0
    assert list(driver.minutes) == PARTS[1:]


def test_error_without_a_cuda_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("ran something"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert said.startswith("PyTorch finds no CUDA device here")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Create a folder with a wheel of the package `tiny_peer`."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_peer.py", "WORD = 'from a wheel'\n")
        wheel.writestr("tiny_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny_peer\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_peer-1.0.dist-info/RECORD", "")
    return folder


def test_peers_are_installed_from_a_folder_of_wheels(
    driver: Driver, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.scripts["optimizers"] = ["import tiny_peer; print(tiny_peer.WORD)"]
    assert driver("--parts", "optimizers") == 1
    assert driver("--parts", "optimizers", "--wheels", str(wheels)) == 0
    assert driver.log("optimizers") == "from a wheel\n"
    assert driver("--parts", "optimizers") == 0  # installed peers stay

    installed = tmp_path / "peers" / "tiny_peer.py"
    installed.write_text("WORD = 'not installed again'\n")
    assert driver("--parts", "optimizers", "--wheels", str(wheels)) == 0
    assert driver.log("optimizers") == "not installed again\n"
    (wheels / "tiny_peer-1.0-py3-none-any.whl").rename(wheels / "tiny_peer-1.0-1-py3-none-any.whl")
    assert driver("--parts", "optimizers", "--wheels", str(wheels)) == 0
    assert driver.log("optimizers") == "from a wheel\n"


def test_wheels_that_cannot_be_installed(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    assert driver("--wheels", str(folder)) == 1
    assert f"--wheels {folder}: there are no wheels" in capsys.readouterr().out
    (folder / "broken-1.0-py3-none-any.whl").write_text("no archive")
    assert driver("--wheels", str(folder)) == 1
    assert f"--wheels {folder}: pip failed: " in capsys.readouterr().out
    assert driver.minutes == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_use_known_options(device: str, tmp_path: Path) -> None:
    from bench.optimizers import __main__ as optimizers

    options = gpu.parse(["--device", device, "--out", str(tmp_path), "--commit", "abc"])

    def of(part: str) -> list[list[str]]:
        return gpu.commands(part, options, tmp_path / "run", 2.0)

    def arguments(part: str, module: str) -> list[str]:
        (command,) = (command for command in of(part) if command[1] == module)
        assert command[0] == "-m"
        return command[2:]

    asked = kernels.parse(arguments("kernels", "bench.kernels"))
    assert (asked.minutes, asked.out, asked.device.type, asked.commit) == (1.6, tmp_path, device, "abc")
    asked = host.parse(arguments("kernels", "bench.host"))
    assert (asked.out, asked.commit, asked.tensors) == (tmp_path, "abc", 300 if device == "cuda" else 20)
    words = arguments("optimizers", "bench.optimizers")
    asked = optimizers.parse(words)
    assert (asked.minutes, asked.out, asked.device.type, asked.commit) == (1.6, tmp_path, device, "abc")
    assert asked.quick
    assert asked.models == (["llama_60m", "llama_7b"] if device == "cuda" else ["llama_60m"])
    asked, _ = pretrain.parse(arguments("quality", "bench.pretrain"))
    assert (asked.compare, asked.out, asked.device) == (["adamw", "gwt2"], tmp_path / "run", device)
    assert asked.preset == ("small" if device == "cuda" else "cpu")
    for _, module, *words in of("correctness"):
        assert module == "pytest"
        named = [word for word in words if word.startswith("tests") or word.endswith(".py")]
        assert all((gpu.ROOT / word).exists() for word in named)


def test_the_part_kernels_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., list[list[str]]] = gpu.commands

    def fewer(*arguments: Any) -> list[list[str]]:
        timed, _ = original(*arguments)  # test_host.py runs the other one
        return [[*timed, "--kernels", "step", "--threads", "1"]]

    monkeypatch.setattr(gpu, "commands", fewer)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as in a shell, without the interpreter
    arguments = ["--device", "cpu", "--parts", "kernels", "--out", str(tmp_path), "--commit", "abc"]
    assert gpu.main(arguments) == 0
    (path,) = tmp_path.glob("kernels_*.json")
    rows = records.rows_of(path, "kernels")
    assert [row["median"] is None for row in rows if row["metric"] == "time"] == [False]
    assert {row["commit"] for row in rows} == {"abc"}
