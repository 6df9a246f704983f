"""Every console block of README and the guides runs, or is listed with a reason why not; synopses are complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bench.finetune import __main__ as finetune
from gwt_kernels.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    r"pip install \.( transformers)?": "tests/test_package.py installs the wheel, without the network",
    r"gwt-kernels doctor": "tests/test_doctor.py runs it",
    r"make test": "this test is part of it",
    r"make demo": ".ci/run runs it, with fewer steps",
    r"make package": ".ci/run runs it",
    r"make finetune": ".ci/run runs it, with fewer steps and optimizers",
    r"make finetune PAIR=kernel_docs": "130 MB from Debian and PyPI; .ci/run runs it on the other pair",
    r"python -m bench\.finetune .*": "minutes, and a model of the reader's",
    r"python -m bench\.report( --check)?": ".ci/run runs it in `make docs`",
    r"git (tag|push) .*": "a release is a person's to make",
}


def ci() -> tuple[set[str], dict[str, str]]:
    """Return the targets that .ci/run makes, and the variables that it gives them."""
    targets, variables = set(), {}
    for line in (ROOT / ".ci" / "run").read_text().replace("\\\n", " ").splitlines():
        if line.startswith("make "):
            for word in shlex.split(line)[1:]:
                name, given, value = word.partition("=")
                if given and not name.startswith("-"):
                    variables[name] = value
                elif not given and not name.isdecimal():
                    targets.add(name)
    return targets - {"--jobs"}, variables


def blocks() -> list[tuple[str, str, str]]:
    """Return page, command and printed text of every command in a console block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            assert block.startswith("$ "), f"{page.name}: a console block begins with a command: {block[:60]}"
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, printed = part.replace("\\\n", " ").partition("\n")
                found.append((page.name, re.sub(r"\s+#.*", "", command).strip(), printed))
    return found


BLOCKS = blocks()


def test_blocks_are_found() -> None:
    assert {"README.md", "index.md", "memory.md", "scaling.md"} <= {page for page, _, _ in BLOCKS}


@pytest.mark.parametrize(("page", "command", "printed"), BLOCKS, ids=[f"{p}-{c[:40]}" for p, c, _ in BLOCKS])
def test_command(page: str, command: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the planner prints what the page shows, options of long runs parse, and others have a reason."""
    if any(re.fullmatch(pattern, command) for pattern in NOT_RUN):
        assert not printed, f"{page} shows output of {command}, which no test compares"
        return
    words = shlex.split(command)
    if words[0] == "gwt-kernels":
        main(words[1:])
        captured = capsys.readouterr()
        said = captured.out or captured.err
        if printed.startswith("...\n"):
            assert said.endswith(printed.removeprefix("...\n"))
        else:
            assert said == printed
    elif words[:2] == ["python", "-m"] and not printed:
        importlib.import_module(f"{words[2]}.__main__").make_parser().parse_args(words[3:])
    else:
        pytest.fail(f"{page}: nothing runs {command!r}: add it here, or to NOT_RUN with a reason")


def test_ci_runs_what_is_said_to_run_there() -> None:
    targets, _ = ci()
    assert targets == {"test", "lint", "docs", "package", "finetune", "demo"}
    for pattern, reason in NOT_RUN.items():
        if reason.startswith(".ci/run runs it"):
            named = re.search(r"in `(.*)`", reason)
            target = (named[1] if named else pattern).removeprefix("make ")
            assert target in targets, f"{reason!r}, of {pattern!r}"


def test_ci_fine_tunes_briefly_and_records_nothing() -> None:
    options = finetune.parse(shlex.split(ci()[1]["FINETUNE_ARGS"]))
    assert (options.preset, options.record, options.out.parts[0]) == ("reviews", None, "runs")
    assert len(finetune.pairs_of(options)) == 2
    assert options.steps <= 10
    assert options.again  # also where an earlier run left its results


@pytest.mark.parametrize("command", ["plan", "migrate"])
def test_synopsis_has_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    page = (ROOT / "docs" / "interface.md").read_text()
    synopsis = re.search(rf"^```\n(gwt-kernels {command} .*?)```", page, re.DOTALL | re.MULTILINE)
    assert synopsis is not None
    assert set(re.findall(r"--[a-z-]+", synopsis[1])) == options
