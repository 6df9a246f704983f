"""Fine-tune a pre-trained model with several optimizers on the same batches, and print loss and state of each.

python -m bench.finetune                                     # MiniLM-L6 on film reviews, each at its recorded best
python -m bench.finetune --preset kernel_docs                # SmolLM2-135M goes on with the kernel's documentation
python -m bench.finetune --sweep --seeds 3 --record          # what the recorded best come from
python -m bench.finetune --model FOLDER --data train.tsv --test-data dev.tsv --text-column sentence --lr 1e-4
python -m bench.finetune --step-times                        # times of a step, on a machine that is idle
python -m bench.finetune --preset glue --task sst2 --model FOLDER --data train.tsv --test-data dev.tsv
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from bench.common import records, step_times
from bench.common.arguments import above_zero, at_least, share
from bench.common.grids import settings_of
from bench.common.measure import chosen_device, facts, is_present
from bench.common.models import CONFIGS
from bench.common.places import check_out, check_record
from bench.finetune import models, results
from bench.finetune.examples import Columns, labels_of, read_examples
from bench.finetune.table import print_table
from bench.finetune.tasks import Sizes, Task, load_classification, load_plain_text
from bench.finetune.training import MODULE, RunConfig, train_apart
from bench.pretrain.optimizers import swept_name

RATES = ("lr", "scale")
_OF_PRESET = Path()  # stands for the preset's own record, which the parser does not know yet


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with every option; those set by a preset have no default here."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    presets = sorted(file.stem.removeprefix("finetune_") for file in CONFIGS.glob("finetune_*.json"))
    add("--preset", default="reviews", choices=presets, help="where the other options' defaults come from")
    add("--task", help="a task of preset glue, such as sst2")
    add("--optimizers", nargs="+", metavar="NAME", help="adamw, gwtL or foamL, and what else bench.pretrain knows")
    add(
        "--recipes",
        nargs="+",
        metavar="NAME",
        help="; ".join(f"{name}: {what}" for name, what in models.RECIPES.items()),
    )
    add("--lr", nargs="+", type=above_zero, help="peak rates of head, embeddings and norms; else the recorded best")
    add(
        "--scale",
        nargs="+",
        type=above_zero,
        help="rates of matrices, or adapters, over --lr; else the recorded best",
    )
    add(
        "--sweep",
        action="store_true",
        help="every setting of the preset's grid under one seed, the best under --seeds",
    )
    add("--seed", type=at_least(0), default=0, help="the first seed: new head, dropout, order of batches")
    add("--seeds", type=at_least(1), default=1, help="how many seeds")
    add(
        "--step-times",
        type=at_least(1),
        nargs="?",
        const=step_times.ROUNDS,
        metavar="STEPS",
        help="train nothing: time steps of all optimizers and recipes of the preset, or those named, in turns",
    )
    add(
        "--record",
        type=Path,
        nargs="?",
        const=_OF_PRESET,
        metavar="FILE",
        help="record of raw results: finetune_PRESET.json, or "
        "step_times_PRESET.json, without FILE; else results.json in --out",
    )
    add("--again", action="store_true", help="repeat runs that the record holds")
    add("--out", type=Path, help="folder of results; runs/finetune/PRESET if not given")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=Path, help="folder of a pre-trained model, as save_pretrained writes it")
    add("--tokenizer", type=Path, help="folder of its tokenizer, where it is another")
    add("--kind", choices=("classify", "text"), help="labelled examples, or plain text to go on with")
    add("--data", type=Path, help="TSV or JSON lines of labelled examples; a file or folder of plain text")
    add("--test-data", type=Path, help="examples to report on; some of --data if not given")
    add(
        "--text-column",
        default="sentence",
        help="name of the column of texts; a number from 0 without a line of names",
    )
    add("--pair-column", help="column of the second text, where there are two")
    add("--label-column", default="label")
    add("--examples", type=at_least(1), help="training examples at most")
    add(
        "--validation",
        type=at_least(0),
        help="examples, or windows of text, to choose settings by; 0: those of the test",
    )
    add("--test", type=at_least(1), help="examples, or windows of text, to report on")
    add("--max-length", type=at_least(1), help="tokens of an example at most, or of a window of text")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=above_zero, help="passes over the training data")
    add("--steps", type=at_least(1), help="optimizer steps, in place of --epochs")
    add("--batch", type=at_least(1))
    add("--warmup", type=share, help="share of the steps over which the rate rises")
    add("--weight-decay", type=at_least(0.0, float), default=0.0)
    add("--grad-clip", type=at_least(0.0, float), default=0.0, help="largest gradient norm; 0 for no clipping")
    add("--rank", type=at_least(1), default=8, help="rank of the adapters of recipe lora")
    add(
        "--precision", choices=("float32", "mixed", "bfloat16"), help="mixed: float32 weights, bfloat16 activations"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=at_least(1), help="CPU threads")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with the preset's values where none were given.

    Raises:
        ValueError: A task is missing, or is none of the preset's.
    """
    parser = make_parser()
    known = parser.parse_known_args(argv)[0]
    values = json.loads((CONFIGS / f"finetune_{known.preset}.json").read_text())
    del values["about"]
    tasks = values.pop("tasks", {})
    if tasks and known.task not in tasks:
        raise ValueError(f"--task {known.task}: preset {known.preset!r} has the tasks {', '.join(tasks)}; name one")
    if known.task and not tasks:
        raise ValueError(f"--task {known.task}: preset {known.preset!r} has no tasks; leave it out")
    values |= tasks.get(known.task, {})
    preset_rates = {"lr": values.pop("lr"), "scale": values.pop("scale")}
    grids, fetch = values.pop("grids"), values.pop("fetch", None)
    for key in ("model", "data"):
        if key in values:
            values[key] = Path(values[key])
    parser.set_defaults(**values)
    options = parser.parse_args(argv)
    options.preset_rates, options.grids, options.fetch = preset_rates, grids, fetch
    options.own = {key: values.get(key) for key in ("model", "data")}
    options.name = f"{options.preset}_{options.task}" if options.task else options.preset
    if options.model not in (None, options.own["model"]) or options.data not in (None, options.own["data"]):
        options.name += "_own"  # neither the preset's record nor its best settings are for other models or data
    options.out = options.out or Path("runs") / "finetune" / options.name
    if options.step_times:
        options.recipes = known.recipes or [name for name in models.RECIPES if name in grids]
        if options.record in (None, _OF_PRESET):
            options.record = step_times.default_path(options.name)
    if options.record == _OF_PRESET:
        options.record = results.default_path(options.name)
    return options


def pairs_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return pairs of optimizer and recipe to run; recipes that train no matrix run with AdamW only.

    Raises:
        ValueError: There is no such optimizer or recipe, or none that go together.
        ModuleNotFoundError: A package is missing.
    """
    pairs = []
    for recipe, optimizer in dict.fromkeys(product(options.recipes, options.optimizers)):
        if recipe in models.WHOLE or optimizer == "adamw" or len(options.optimizers) == len(options.recipes) == 1:
            models.check_pair(optimizer, recipe)
            pairs.append((optimizer, recipe))
    if not pairs:
        raise ValueError(f"--recipes {' '.join(options.recipes)}: go with adamw alone; name it among --optimizers")
    return pairs


def load_task(options: argparse.Namespace) -> Task:
    """Load the data, after checks of everything that can be wrong with model, tokenizer and data.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: Model, tokenizer or data cannot be used, or do not fit each other.
    """
    check_paths(options)
    folder = options.tokenizer or options.model
    tokenizer = models.load_tokenizer(folder)
    models.check_tokenizer(options.model, folder, len(tokenizer))
    sizes = Sizes(options.examples, options.validation, options.test, options.max_length)
    columns = columns_of(options)
    task: Task
    if options.kind == "classify":
        task = load_classification(options.data, options.test_data, columns, tokenizer, sizes)
    else:
        task = load_plain_text(options.data, str(folder), sizes, heldout_fraction=0.05)
    models.check_fit(options.model, folder, task.largest_id, options.max_length)
    task.facts["model_digest"] = models.digest_of(options.model)
    return task


def columns_of(options: argparse.Namespace) -> Columns:
    """Return the columns of the data's texts and labels."""
    return Columns(options.text_column, options.pair_column, options.label_column)


def check_paths(options: argparse.Namespace) -> None:
    """Check that model and data are named and present, and that the model's folder can be used.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: Model or data are not named, or the model cannot be used.
    """
    for key in ("model", "data"):
        path = getattr(options, key)
        if path is None:
            raise ValueError(
                f"--{key}: preset {options.preset!r} names none; give a {'folder' if key == 'model' else 'file'}"
            )
        if options.fetch and path == options.own[key] and not path.exists():
            raise FileNotFoundError(
                f"--{key} {path}: is not there yet; run python -m {MODULE}.fetch {options.fetch}"
            )
    models.check_folder(options.model)


class Comparison:
    """Runs of one preset. Each is recorded when it ends, and none is repeated."""

    def __init__(self, options: argparse.Namespace, task: Task, device: torch.device) -> None:
        self.options, self.task, self.device = options, task, device
        self.path = options.record or options.out / "results.json"
        self.about = facts(device, MODULE, sys.argv[1:])
        self.rows: list[results.Row] = []
        """Rows of this comparison's runs, new or read from the record."""

    def config(self, optimizer: str, recipe: str, lr: float, scale: float, seed: int) -> RunConfig:
        """Return the settings of one run."""
        options = self.options
        return RunConfig(
            model=str(options.model),
            optimizer=optimizer,
            recipe=recipe,
            lr=lr,
            scale=scale,
            steps=options.steps or self.task.steps_of(options.epochs, options.batch),
            batch=options.batch,
            warmup=options.warmup,
            weight_decay=options.weight_decay,
            grad_clip=options.grad_clip,
            seed=seed,
            precision=options.precision,
            rank=options.rank if recipe == "lora" else 0,
        )

    def once(self, config: RunConfig) -> list[results.Row]:
        """Return the rows of a run: from the record, or from a new run if it has none or with `--again`."""
        run = results.identity(self.options.name, config, self.task.facts, self.about["device"])
        done = [row for row in records.rows_of(self.path, results.BENCHMARK) if results.is_of(row, run)]
        if done and not self.options.again:
            self.rows += done
            return done
        name = f"{config.optimizer}, {config.recipe}, lr {config.lr:g}, scale {config.scale:g}, seed {config.seed}"
        print(f"{name}: {config.steps} steps", flush=True)
        try:
            result = train_apart(config, self.task, self.device, self.options.threads)
        except FloatingPointError as error:
            result = {**run, **self.about, "failed": str(error)}
        except (MemoryError, torch.OutOfMemoryError) as error:  # may succeed another time, so nothing is recorded
            print(f"  not finished: {error}", file=sys.stderr)
            return []
        new = results.rows_of(self.options.name, result)
        records.append(self.path, results.BENCHMARK, new, keep=lambda row: not results.is_of(row, run))
        for row in new:
            if row["metric"] in ("validation_loss", "test_loss", "test_accuracy"):
                print(
                    f"  {row['metric']}: {row['note'] if row['median'] is None else format(row['median'], '.4f')}"
                )
        self.rows += new
        return new

    def rates(self, optimizer: str, recipe: str) -> list[tuple[float | None, ...]]:
        """Return the pairs of lr and scale to run: from options, the grid, the best recorded one, or the preset.

        If the preset's value is not in the grid of optimizer and recipe, it is replaced by the middle of the grid.
        """
        options = self.options
        given = {"lr": options.lr, "scale": options.scale}
        rule = swept_name(optimizer).rstrip("0123456789")
        grid = options.grids.get(f"{recipe} {rule}") or options.grids.get(recipe)
        if options.sweep:
            if grid is None:
                raise ValueError(
                    f"--sweep: preset {options.preset!r} has no grid for recipe {recipe!r}; give --lr and --scale"
                )
            return settings_of(grid, RATES, given)
        recorded = records.rows_of(results.default_path(options.name), results.BENCHMARK)
        best = results.best_setting(recorded, optimizer, recipe)
        known = {"lr": [best["lr"]], "scale": [best["scale"]]} if best else dict(options.preset_rates)
        if best is None and grid is not None:
            for key, tried in (grid if isinstance(grid, Mapping) else grid[0]).items():
                if not set(known[key]) <= set(tried):
                    known[key] = [tried[(len(tried) - 1) // 2]]
        return settings_of(known, RATES, given)

    def run(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Run every setting with the first seed, then the best of each optimizer and recipe with the others."""
        for optimizer, recipe in pairs:
            own: list[results.Row] = []
            for lr, scale in self.rates(optimizer, recipe):
                own += self.once(self.config(optimizer, recipe, lr, scale, self.options.seed))
            best = results.best_setting(own, optimizer, recipe)
            if best is not None:
                config = self.config(optimizer, recipe, best["lr"], best["scale"], self.options.seed)
                for seed in range(self.options.seed + 1, self.options.seed + self.options.seeds):
                    self.once(replace(config, seed=seed))


def time_steps(options: argparse.Namespace, pairs: Sequence[tuple[str, str]], device: torch.device) -> None:
    """Time steps of optimizers and recipes over the preset's model, and record them."""
    check_paths(options)
    classes = 0
    if options.kind == "classify":
        examples = read_examples(options.data, columns_of(options))
        classes = len(labels_of(examples, f"--data {options.data}"))
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    how = {"lr": options.preset_rates["lr"][0], "scale": options.preset_rates["scale"][0], "weight_decay": 0.0}

    def contender(optimizer: str, recipe: str) -> step_times.Contender:
        def build() -> tuple[nn.Module, Optimizer]:
            torch.manual_seed(options.seed)
            model = models.build_model(str(options.model), classes, recipe, rank=options.rank, dtype=dtype)
            model = model.to(device)
            return model, step_times.fused(models.optimizer_of(model, optimizer, recipe, **how))

        return step_times.Contender(optimizer, recipe, build)

    if options.threads:
        torch.set_num_threads(options.threads)
    what = {"of": "finetune", "preset": options.name, "model": str(options.model), "precision": options.precision}
    found = step_times.measure([contender(*pair) for pair in pairs], device, rounds=options.step_times)
    step_times.record(options.record, step_times.rows_of(found, what, facts(device, MODULE, sys.argv[1:])))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(argv)
    device = chosen_device(options.device)
    if not is_present(device):
        raise ValueError(f"--device {options.device}: PyTorch sees no such device here; use --device cpu")
    if options.threads and options.threads > (most := os.cpu_count() or 1):
        raise ValueError(f"--threads {options.threads}: this machine has {most} cores; give at most {most}")
    pairs = pairs_of(options)
    check_out(options.out)
    if options.record:
        check_record(options.record)
    if options.step_times:
        time_steps(options, pairs, device)
        return
    comparison = Comparison(options, load_task(options), device)
    records.rows_of(comparison.path, results.BENCHMARK)  # another file's format is an error now, not after a run
    for pair in pairs:
        comparison.rates(*pair)
    try:
        comparison.run(pairs)
    finally:
        if comparison.rows:
            print_table(comparison.rows, options.out / "table.txt")
            print(f"numbers: {comparison.path}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # when a job ends, the run's own process ends too
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from what is recorded")
