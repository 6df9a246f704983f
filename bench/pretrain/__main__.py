"""Pre-train a LLaMA model on real text with one optimizer, or with several on the same batches.

python -m bench.pretrain                                          # one run of the cpu preset with gwt2
python -m bench.pretrain --compare adamw gwt2 gwt3 galore apollo --seeds 3 --record
python -m bench.pretrain --preset llama_60m --optimizer gwt2 --steps 1000
python -m bench.pretrain --sweep adamw gwt2 gwt3                  # the sweep behind the cpu preset's settings
python -m bench.pretrain --step-times                             # times of a step, on a machine that is idle
torchrun --standalone --nproc-per-node 2 -m bench.pretrain --parallel fsdp2 --device cpu
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from bench.common import records, step_times
from bench.common.arguments import above_zero, at_least, share
from bench.common.measure import chosen_device, facts, is_present
from bench.common.models import CONFIGS, build_model, load_config
from bench.common.names import PEERS, RULES
from bench.common.places import check_out, check_record
from bench.common.records import RESULTS
from bench.pretrain import low_rank, parallel, quality
from bench.pretrain.compare import compare
from bench.pretrain.data import (
    CORPORA,
    ByteTokenizer,
    Corpus,
    PretrainedTokenizer,
    folder_of,
    load_stream,
    load_text,
)
from bench.pretrain.optimizers import build_optimizer, check_name, swept_name
from bench.pretrain.sweep import best_settings, read_runs, settings_of, sweep
from bench.pretrain.training import Run, RunConfig, train

_RECORD_OF_PRESET = object()  # --record without a file: the preset's own, which is known after parsing


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with every option; those set by a preset have no default here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    presets = sorted(file.stem.removeprefix("preset_") for file in CONFIGS.glob("preset_*.json"))
    add("--preset", default="cpu", choices=presets, help="where the other options' defaults come from")
    add(
        "--optimizer",
        default="gwt2",
        help=f"{', '.join(PEERS)}, or one of {', '.join(f'{rule}L' for rule in RULES)} with a level L",
    )
    add(
        "--compare",
        nargs="+",
        metavar="OPTIMIZER",
        help="run each on the same batches, then a table and a figure",
    )
    add(
        "--sweep",
        nargs="+",
        metavar="OPTIMIZER",
        help="run the preset's grid of settings and record every run",
    )
    add("--sweep-record", type=Path, help="the record of --sweep, and where lr and scale are taken from")
    add("--sweep-steps", type=at_least(1), help="length of a sweep's runs; by default --steps")
    add("--sweep-settings", type=at_least(1), help="how many settings of each grid to try; by default all")
    add("--sweep-seeds", type=at_least(1), default=3, help="seeds for the best setting of a sweep")
    add("--seeds", type=at_least(1), default=1, help="how many seeds --compare runs each under, from --seed on")
    add(
        "--step-times",
        type=at_least(1),
        nargs="?",
        const=step_times.ROUNDS,
        metavar="STEPS",
        help="train nothing: time steps of those after --compare or --sweep, else of the preset's grids, in turns",
    )
    add(
        "--record",
        type=Path,
        nargs="?",
        const=_RECORD_OF_PRESET,
        metavar="FILE",
        help="add every finished run to this record of raw results; quality_PRESET.json, "
        "or step_times_PRESET.json, without FILE",
    )
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")

    group = parser.add_argument_group("model and text")
    add = group.add_argument
    add("--model", help="a name such as llama_60m, or a JSON file of LlamaConfig fields")
    text = group.add_mutually_exclusive_group()
    named = ", ".join(f"{name} ({said})" for name, said in CORPORA.items())
    text.add_argument("--corpus", choices=CORPORA, default="stdlib", help=f"the text by name: {named}")
    text.add_argument("--text", type=Path, help="a file or folder of text instead")
    add("--heldout-fraction", type=share, help="share of the text that is only evaluated on")
    add("--dataset", help="stream this Hugging Face data set instead, such as allenai/c4")
    add("--dataset-config", help="its configuration, such as en")
    add("--heldout-split", default="validation", help="its split to evaluate on")
    add("--tokenizer", help="a transformers tokenizer; by default each byte is a token")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--lr", type=at_least(0.0, float), help="peak rate of embeddings, head and norms")
    add("--scale", type=above_zero, help="rate of attention and MLP matrices over --lr")
    add("--steps", type=at_least(1), help="optimizer steps")
    add("--batch", type=at_least(1), help="windows per forward pass")
    add("--accumulate", type=at_least(1), help="forward passes per optimizer step")
    add("--context", type=at_least(1), help="tokens predicted per window")
    add("--warmup", type=share, help="share of the steps over which the rate rises")
    add("--min-lr", type=share, help="share of the peak rate that the cosine ends at")
    add("--weight-decay", type=at_least(0.0, float))
    add("--momentum", type=at_least(0.0, float), help="Muon's; by default that of the sweep, or 0.95")
    add("--projection-gap", type=at_least(1), help="steps between new projections of GaLore and APOLLO")
    add("--grad-clip", type=at_least(0.0, float), help="largest gradient norm; 0 for no clipping")
    add("--evals", type=at_least(1), help="evaluations, evenly spaced")
    add("--eval-windows", type=at_least(1), help="held-out windows per evaluation")
    add("--seed", type=int, default=0, help="decides initial weights and order of the text")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--parallel", choices=parallel.MODES, help="divide the run among the processes that torchrun starts")
    add("--precision", choices=("float32", "bfloat16", "mixed"), help="bfloat16 on CUDA, float32 on a CPU")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--threads", type=at_least(1), help="CPU threads; by default PyTorch's choice")
    add("--resume", action="store_true", help="continue from the checkpoint in --out where there is one")
    add("--stop-at", type=at_least(1), help="end early after this step, to be resumed")
    add("--save-every", type=at_least(0), default=0, help="steps between checkpoints; 0 for one at the end only")
    add("--log-every", type=at_least(1), default=10, help="steps between lines of training loss in the log")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse options, fill in the preset's values, and return them with the preset's sweep grids."""
    parser = make_parser()
    preset = parser.parse_known_args(argv)[0].preset
    values = json.loads((CONFIGS / f"preset_{preset}.json").read_text())
    del values["about"]
    grids = values.pop("grids", {})
    if "sweep_record" in values:
        values["sweep_record"] = RESULTS / values["sweep_record"]
    defaults = {key: value for key, value in values.items() if key not in ("lr", "scale")}
    parser.set_defaults(heldout_fraction=0.05)
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    if options.step_times and options.record in (None, _RECORD_OF_PRESET):
        options.record = step_times.default_path(options.preset)
    if options.record is _RECORD_OF_PRESET:
        options.record = quality.default_path(options.preset)
    options.preset_rates = {"lr": values["lr"], "scale": values["scale"]}
    return options, grids


def run_config(options: argparse.Namespace, optimizer: str, seed: int | None = None) -> RunConfig:
    """Return the settings of one run, with `--seed` as the default seed.

    `lr` and `scale` come from the command line, else from the best of the model's sweep, else from the preset.
    """
    record = read_runs(options.sweep_record) if options.sweep_record else []
    of_this_model = [run for run in record if run["model"] == options.model]
    named_by = next((f"--{each}" for each in ("sweep", "compare") if getattr(options, each)), "--optimizer")
    tuned = best_settings(of_this_model, swept_name(optimizer)) or options.preset_rates
    return RunConfig(
        model=options.model,
        optimizer=check_name(optimizer, named_by),
        lr=tuned["lr"] if options.lr is None else options.lr,
        scale=tuned["scale"] if options.scale is None else options.scale,
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        context=options.context,
        warmup=options.warmup,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        grad_clip=options.grad_clip,
        evals=options.evals,
        seed=options.seed if seed is None else seed,
        precision=options.precision,
        projection_gap=options.projection_gap if optimizer in low_rank.NAMES else None,
        momentum=tuned.get("momentum") if options.momentum is None else options.momentum,
    )


def load_corpus(options: argparse.Namespace, seed: int) -> Corpus:
    """Load the text that the options select, positioned at its beginning."""
    tokenizer = PretrainedTokenizer(options.tokenizer) if options.tokenizer else ByteTokenizer()
    sizes = {"context": options.context, "eval_windows": options.eval_windows}
    if options.dataset:
        split = options.heldout_split
        return load_stream(options.dataset, options.dataset_config, tokenizer, heldout_split=split, **sizes)
    named = options.corpus if options.text is None else None
    path, called = (options.text, None) if named is None else (folder_of(named), f"({CORPORA[named]})")
    sizes |= {"heldout_fraction": options.heldout_fraction, "seed": seed}
    return load_text(path, tokenizer, called=called, **sizes)


def run_sweep(options: argparse.Namespace, grids: dict[str, Any], device: torch.device) -> None:
    """Sweep the optimizers that `--sweep` names.

    Raises:
        ValueError: There is no record to write to, or no grid for an optimizer.
    """
    if options.sweep_record is None:
        raise ValueError(f"--sweep: preset {options.preset!r} names no record; give --sweep-record FILE")

    if missing := [name for name in options.sweep if name not in grids]:
        raise ValueError(
            f"--sweep: no sweep grid for {missing[0]!r} in the preset: it has {', '.join(grids)}; add one"
        )
    settings = {name: settings_of(grids[name])[: options.sweep_settings] for name in options.sweep}

    def once(config: RunConfig) -> dict[str, Any]:
        corpus = load_corpus(options, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(replace(config, evals=1), corpus, device, compiled=options.compile)
            return train(run, Path(folder), progress=False)

    steps = options.sweep_steps or options.steps
    bases = {name: replace(run_config(options, name), steps=steps) for name in options.sweep}
    text = {"text": load_corpus(options, options.seed).facts["text"]}
    sweep(settings, bases, options.sweep_record, once, seeds=options.sweep_seeds, device=device, on=text)


def time_steps(options: argparse.Namespace, grids: dict[str, Any], device: torch.device) -> None:
    """Time steps of the optimizers that are named, or else of the preset's grids, and record them.

    GaLore and APOLLO are left out, with a message, if their packages are missing.

    Raises:
        ValueError: No optimizer is left, or the model's file is no configuration of a LLaMA.
    """
    named = list(dict.fromkeys(options.compare or options.sweep or grids))
    lacking = {name: said for name in named if name in low_rank.NAMES and (said := low_rank.missing(name))}
    for said in lacking.values():
        print(f"left out: {said}", file=sys.stderr)
    if not (names := [name for name in named if name not in lacking]):
        raise ValueError("--step-times: nothing to time is left; name optimizers after --compare")
    load = {"dtype": torch.bfloat16 if options.precision == "bfloat16" else torch.float32, "device": device}
    model_config = load_config(options.model)

    def contender(name: str) -> step_times.Contender:
        config = run_config(options, name)

        def build() -> tuple[nn.Module, Optimizer]:
            model = build_model(model_config, seed=config.seed, **load)
            how = {key: getattr(config, key) for key in ("lr", "scale", "projection_gap", "momentum")}
            return model, step_times.fused(build_optimizer(name, model, **how))

        gap = config.projection_gap
        untimed = gap is not None and gap >= step_times.WARM_UP + options.step_times
        note = f"new projections every {gap} steps, none among those timed" if untimed else ""
        return step_times.Contender(name, None, build, note)

    what = {"of": "pretrain", "preset": options.preset, "model": options.model, "precision": options.precision}
    found = step_times.measure([contender(name) for name in names], device, rounds=options.step_times)
    about = facts(device, "bench.pretrain", sys.argv[1:])
    step_times.record(options.record, step_times.rows_of(found, what, about))


def run_one(
    options: argparse.Namespace,
    config: RunConfig,
    out: Path,
    device: torch.device,
    processes: parallel.Processes | None = None,
) -> dict[str, Any]:
    """Train under one configuration.

    Returns:
        The result of `train`. In a comparison, a run that diverges, lacks a package or runs out of memory is
        returned as its settings with `failed` and `note`, and the comparison continues.
    """
    corpus = load_corpus(options, config.seed)
    try:
        result = train(
            Run(config, corpus, device, compiled=options.compile, processes=processes),
            out,
            resume=options.resume,
            stop_at=options.stop_at,
            save_every=options.save_every,
            log_every=options.log_every,
            progress=not options.quiet and (processes is None or processes.is_first),
        )
    except (FloatingPointError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        if not options.compare:
            raise
        kinds = {FloatingPointError: "diverged", ModuleNotFoundError: "package missing"}
        about = facts(device, "bench.pretrain", sys.argv[1:])
        failure = {"failed": kinds.get(type(error), "out of memory"), "note": str(error)}
        result = {**asdict(config), **corpus.facts, **about, "heldout_loss": None, **failure}
        print(f"{config.optimizer}, seed {config.seed}: {failure['failed']}; going on", file=sys.stderr)
    if options.record and result.get("step", result["steps"]) == result["steps"]:
        quality.record(options.record, options.preset, result)
    return result


def run_on_several(options: argparse.Namespace) -> None:
    """Run this process's part of a run divided by `--parallel`.

    Raises:
        ValueError: The run cannot be divided in this way.
    """
    if options.sweep or options.compare:
        raise ValueError("--parallel divides a single run: leave out --sweep and --compare")
    if options.parallel != "ddp" and options.optimizer in low_rank.NAMES:
        raise ValueError(f"--optimizer {options.optimizer} needs whole matrices: use --parallel ddp")
    processes = parallel.start(options.parallel, options.device)
    try:
        config = run_config(options, options.optimizer)
        if not processes.is_first:
            options.record = None
        result = run_one(options, config, options.out, processes.device, processes)
        if processes.is_first:
            compare([result], options.out)
    finally:
        dist.destroy_process_group()


def run_comparison(options: argparse.Namespace, device: torch.device) -> None:
    """Run every optimizer with every seed; an interrupted comparison shows the runs that have ended."""
    seeds = range(options.seed, options.seed + options.seeds)
    configs = [run_config(options, name, seed) for seed in seeds for name in dict.fromkeys(options.compare)]
    results: list[dict[str, Any]] = []
    try:
        for config in configs:
            folder = options.out / config.optimizer / f"seed{config.seed}"
            results.append(run_one(options, config, folder, device))
    finally:
        if results:
            compare(results, options.out)


def check_places(options: argparse.Namespace) -> None:
    """Make the folders of the run's output, and check that the record can be written and is of this benchmark.

    Raises:
        ValueError: One of these is impossible.
    """
    record, benchmark = options.record, quality.BENCHMARK
    if options.step_times:
        benchmark = step_times.BENCHMARK
    elif options.sweep:
        record, benchmark = options.sweep_record, "sweep"
    else:
        check_out(options.out)
    if record is not None:
        check_record(record)
        records.rows_of(record, benchmark)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options, grids = parse(argv)
    check_places(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.parallel:
        run_on_several(options)
        return
    if parallel.started_by_torchrun():
        raise ValueError("torchrun has started several processes: say how they divide the run with --parallel")
    device = chosen_device(options.device)
    if not is_present(device):
        raise ValueError(f"--device {options.device}: PyTorch sees no such device here; use --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.step_times:
        time_steps(options, grids, device)
    elif options.sweep:
        run_sweep(options, grids, device)
    elif options.compare:
        run_comparison(options, device)
    else:
        compare([run_one(options, run_config(options, options.optimizer), options.out, device)], options.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last checkpoint; a sweep goes on by the same command")
