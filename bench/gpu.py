"""Run everything that needs a CUDA machine in one command: tests, then kernels, optimizers and quality.

Each part runs in its own process, with its output in a log beside the results, and within a share of the time. A
finished part is not run again on the same device with the same sources unless it is named. Nothing is timed if a
test fails. Tests that only ran out of time continue in the next call, when their kernels are already compiled, and
do not prevent timing, since every benchmark checks its own results. Peers' packages are installed from a folder of
wheels, because there may be no registry.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import records
from bench.common.measure import facts

BENCHMARK = "gpu"
ROOT = Path(__file__).parent.parent
PEERS = ROOT / "build" / "peers"

# Shares of the remaining time; time that a part does not use goes to the next ones.
SHARES = {"correctness": 0.35, "kernels": 0.25, "optimizers": 0.2, "quality": 0.2}
GRACE = 15.0  # seconds that an interrupted part has to write its results
EARLIER = 0.8  # share of a part's time after which it starts nothing new


class Outcome(NamedTuple):
    """The result of one part."""

    part: str
    finished: bool
    note: str
    seconds: float
    late: bool
    """Whether it timed out, with no failure before that."""


def commands(part: str, options: argparse.Namespace, folder: Path, minutes: float) -> list[list[str]]:
    """Return the commands of a part in order, as arguments of Python. On a CPU they are tiny, to test this driver.

    Args:
        part: One of `SHARES`.
        options: The command line.
        folder: Folder for the checkpoints of a run that takes several calls.
        minutes: Time limit of the part.
    """
    small = options.device.type == "cpu"
    device, out = ["--device", str(options.device)], ["--out", str(options.out)]
    commit = ["--commit", options.commit] if options.commit else []
    budget = ["--minutes", f"{EARLIER * minutes:.2f}", *commit]
    if part == "correctness":
        workers = min(8, max(1, (os.cpu_count() or 1) // 2))
        parallel = ["--numprocesses", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
        pytest = ["-m", "pytest", "-q", "--exitfirst", *parallel]
        if small:
            return [[*pytest, "tests/backends/torch/test_step.py"]]
        kernels = [
            "tests/backends/triton",
            "tests/haar/test_haar.py",
            "tests/test_functional.py",
            "tests/test_functional_arguments.py",
        ]
        kernels += [
            "tests/backends/test_control.py",
            "tests/optim/test_clipping.py",
            "tests/optim/test_telemetry.py",
        ]
        return [[*pytest, "-m", "gpu"], [*pytest, "-m", "not gpu", *kernels]]
    if part == "kernels":
        some = ["--parts", "sizes", "--sizes", "16"] if small else []
        few = ["--tensors", "20", "--repetitions", "2"] if small else []  # takes only seconds
        return [["-m", "bench.kernels", *device, *budget, *out, *some], ["-m", "bench.host", *commit, *out, *few]]
    if part == "optimizers":
        some = ["--models", "llama_60m", "--layers", "1", "--repetitions", "2"] if small else []
        return [["-m", "bench.optimizers", "--quick", *device, *budget, *out, *some]]
    preset = "cpu" if small else "small"
    some = ["--steps", "4", "--evals", "1", "--eval-windows", "8"] if small else ["--save-every", "250"]
    record = options.out / f"quality_{preset}{'_tried' if small else ''}.json"
    where = ["--out", str(folder), "--record", str(record), "--resume", "--quiet"]
    compared = ["--preset", preset, "--compare", "adamw", "gwt2"]
    return [["-m", "bench.pretrain", *compared, *device, *where, *some]]


def run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> tuple[int, bool]:
    """Run a command, its output on the terminal and at the end of a log.

    After `seconds`, or on Ctrl-C, the command gets SIGINT, and is killed if it does not end.

    Returns:
        The exit status, and whether it timed out.

    Raises:
        KeyboardInterrupt: after the command has ended.
    """
    late, interrupted = threading.Event(), False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as nohup and background shells leave it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else the command inherits the ignored SIGINT
    with (
        log.open("a") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C at the terminal reaches this process alone, which passes it on
        ) as process,
    ):

        def stop() -> None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            _signal(process, signal.SIGKILL)  # with all of its children that still run

        def stop_late() -> None:
            late.set()
            stop()

        def copy() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                print(line, end="", flush=True)

        timer = threading.Timer(max(0.0, seconds), stop_late)
        timer.start()
        try:
            copy()
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            threading.Thread(target=stop).start()
            copy()
        finally:
            timer.cancel()
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode, late.is_set()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def install(wheels: Path, environment: dict[str, str]) -> str:
    """Install the wheels of a folder into `build/peers`, unless installed; return the error, or ""."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return f"--wheels {wheels}: there are no wheels"
    listing, done = "\n".join(f"{file.name} {file.stat().st_size}" for file in files), PEERS / ".installed"
    if done.exists() and done.read_text() == listing:
        return ""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    command = [*pip, "--target", str(PEERS), *map(str, files)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        return f"--wheels {wheels}: pip failed: {found.stderr.strip()}"
    done.write_text(listing)
    return ""


def fingerprint() -> str:
    """Return a digest of the sources, which tells whether a part has finished with them; needs no git checkout."""
    digest = hashlib.sha256()
    folders, names = ("gwt_kernels", "bench", "tests"), ("*.py", "*.c", "configs/*.json")
    for file in sorted(file for folder in folders for name in names for file in (ROOT / folder).rglob(name)):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=SHARES, metavar="PART", help=f"these of {' '.join(SHARES)}, finished or not")
    add("--device", type=torch.device, default=torch.device("cuda"), help="cuda, or cpu to try the driver itself")
    add("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    add("--wheels", type=Path, metavar="FOLDER", help="packages to install into build/peers first")
    add("--out", type=Path, default=records.RESULTS, help="folder for results and logs (default: bench/results)")
    add("--commit", help="the commit measured, where the tree is no git checkout")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    options.out = options.out.resolve()
    return options


def outcomes(options: argparse.Namespace, done: dict[str, str], sources: str, log_of: Any) -> Iterator[Outcome]:
    """Run the pending parts in order, and yield the outcome of each; a failure of the tests ends the run.

    Args:
        options: The command line.
        done: When each finished part ended.
        sources: What `fingerprint` returned.
        log_of: Function from a part to the path of its log.
    """
    end = time.monotonic() + 60 * options.minutes - GRACE
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), *([str(PEERS)] if PEERS.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    chosen = [part for part in SHARES if part in (options.parts or SHARES)]
    left = [part for part in chosen if options.parts or part not in done]
    for part in chosen:
        if part not in left:
            print(f"{part}: finished on {done[part]}; name it to run it again", flush=True)
    for i, part in enumerate(left):
        started = time.monotonic()
        seconds = (end - started) * SHARES[part] / sum(SHARES[later] for later in left[i:])
        print(f"{part}: at most {seconds / 60:.1f} minutes", flush=True)
        log_of(part).unlink(missing_ok=True)
        note, late, folder = "", False, ROOT / "runs" / f"gpu_{sources}_{part}"
        if part in done:  # a finished part that is named starts from the beginning, not from its checkpoints
            shutil.rmtree(folder, ignore_errors=True)
        for command in commands(part, options, folder, seconds / 60):
            remaining = started + seconds - time.monotonic()
            status, late = run([sys.executable, *command], log_of(part), remaining, environment)
            if status or late:
                why = f"stopped after {seconds / 60:.1f} minutes" if late else f"ended with status {status}"
                note = f"{why}: python {' '.join(command)}"
                break
        yield Outcome(part, not note, note, time.monotonic() - started, late)
        if part == "correctness" and note and not late:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if one did not finish or there is no CUDA device, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device here: run this where there is one, or try the driver with --device cpu")
        return 1
    about = facts(options.device, f"bench.{BENCHMARK}", arguments, options.commit)
    if options.wheels and (problem := install(options.wheels, dict(os.environ))):
        print(problem)
        return 1
    stem = records.new_path(BENCHMARK, about, options.out).stem.rpartition("_")[0]  # one record, whatever the date
    path, sources = options.out / f"{stem}.json", fingerprint()
    done = {
        row["part"]: row["date"]
        for row in records.rows_of(path, BENCHMARK)
        if row["finished"] and row["sources"] == sources
    }
    options.out.mkdir(parents=True, exist_ok=True)
    ended: list[Outcome] = []
    try:
        for outcome in outcomes(options, done, sources, lambda part: options.out / f"{stem}_{part}.log"):
            ended.append(outcome)
            numbers = dict.fromkeys(("median", "p20", "p80"), outcome.seconds)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            head = {"part": outcome.part, "finished": outcome.finished, "sources": sources}
            row = head | {"metric": "time", "unit": "s", **numbers, "samples": 1, "note": outcome.note}
            records.append(path, BENCHMARK, [row | about | {"date": now}])
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, and the part that ran begins anew in the next call")
        return 130
    for outcome in ended:
        print(f"{outcome.part}: {outcome.note or 'finished'} ({outcome.seconds:.0f} s)")
    if any(outcome.part == "correctness" and not (outcome.finished or outcome.late) for outcome in ended):
        print("nothing was timed, since the tests did not pass")
    return int(not all(outcome.finished for outcome in ended))


if __name__ == "__main__":
    raise SystemExit(main())
