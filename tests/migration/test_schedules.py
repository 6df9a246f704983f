"""Learning-rate schedules of a run that changes its optimizer: built again, and in the files of the command."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from gwt_kernels import GWTAdamW, GWTMuon, gwt_param_groups, migrate
from tests.support.migrated_files import file_of, read, run
from tests.support.tiny import llama, sentences

KINDS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, 20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=1e-4),
}


def steps(model, optimizer, schedule, count):
    """Take steps, and return the learning rate of each."""
    tokens = torch.stack([each["input_ids"] for each in sentences(4)])
    rates = []
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return rates


@pytest.fixture
def began(tmp_path):
    """Return a model, and the folder of its configuration."""
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "model")
    return SimpleNamespace(model=model, config=tmp_path / "model")


def beside(model):
    """Return AdamW with the two groups of Trainer."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01
    )


def gone_on(model, make, count):
    """Return the rates of a run that keeps its optimizer."""
    optimizer = beside(model)
    schedule = make(optimizer)
    return steps(model, optimizer, schedule, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_one_file", [False, True], ids=("beside", "in one file"))
def test_a_schedule_goes_on_where_the_run_was(kind, in_one_file, began, tmp_path, capsys):
    make = KINDS[kind]
    expected = gone_on(copy.deepcopy(began.model), make, 8)
    optimizer = beside(began.model)
    schedule = make(optimizer)
    steps(began.model, optimizer, schedule, 4)
    out = tmp_path / "gwt_optimizer.pt"
    if in_one_file:
        file = file_of(tmp_path, {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()})
    else:
        file = file_of(tmp_path, optimizer.state_dict())
        file_of(tmp_path, schedule.state_dict(), "scheduler.pt")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert run(file, out, began.config, "--dtype", "fp32") == 0
    said = capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    if in_one_file:
        states = read(out)
        assert "scheduler: the schedule, for the new groups" in said
    else:
        states = {"optimizer": read(out), "scheduler": read(tmp_path / "gwt_scheduler.pt")}
        assert f"{tmp_path / 'gwt_scheduler.pt'}: the schedule of {tmp_path / 'scheduler.pt'}" in said
    new = GWTAdamW(gwt_param_groups(began.model, weight_decay=0.1), lr=0.01)
    again = make(new)
    new.load_state_dict(states["optimizer"])
    again.load_state_dict(states["scheduler"])
    assert len(new.param_groups) == 3
    assert steps(began.model, new, again, 4) == pytest.approx(expected[4:], rel=1e-12)
    rates = [group["lr"] for group in new.param_groups]
    assert rates == [rates[0]] * 3


def test_a_schedule_is_built_again_over_the_new_optimizer(began):
    """Check the code of the page, with the state's rate, or with a given one."""

    def make(o, last=-1):
        return lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t), last_epoch=last)

    optimizer = torch.optim.AdamW(began.model.parameters(), lr=0.01)
    schedule = make(optimizer)
    steps(began.model, optimizer, schedule, 4)
    now = optimizer.param_groups[0]["lr"]
    groups = gwt_param_groups(began.model)
    for lr, first in ((now, 0.01), (0.01, 0.01), (0.03, 0.03)):
        new = GWTAdamW(gwt_param_groups(began.model), lr=lr)
        new.load_state_dict(migrate(optimizer.state_dict(), new, names=began.model).state_dict)
        assert [group["initial_lr"] for group in new.param_groups] == [first] * len(groups)
        again = make(new, schedule.last_epoch - 1)
        assert again.base_lrs == [first] * len(groups)
        assert [group["lr"] for group in new.param_groups] == pytest.approx([first / 5] * len(groups))
    del optimizer.param_groups[0]["initial_lr"]  # as in a run without a schedule
    new = GWTAdamW(gwt_param_groups(began.model), lr=0.01)
    plain = migrate(optimizer.state_dict(), new, names=began.model).state_dict
    assert all("initial_lr" not in group for group in plain["param_groups"])


def test_each_group_takes_the_values_of_the_group_its_parameters_came_from(began, tmp_path):
    """Check the groups of Muon and of AdamW in one optimizer; a given rate replaces theirs."""
    optimizer = beside(began.model)
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda t: 1 / (1 + t), lambda t: 1 / (1 + t)])
    steps(began.model, optimizer, schedule, 3)
    file_of(tmp_path, schedule.state_dict(), "scheduler.pt")
    file, out = file_of(tmp_path, optimizer.state_dict()), tmp_path / "new.pt"
    assert run(file, out, began.config, "--dtype", "fp32", "--rule", "muon", "--lr", "0.04") == 0
    groups, new = read(out)["param_groups"], read(tmp_path / "new.scheduler.pt")
    rates = {group["rule"]: (group["lr"], group["initial_lr"]) for group in groups}
    assert rates == {"muon": (0.04, 0.04), "adamw": (0.0025, 0.01)}
    assert new["base_lrs"] == pytest.approx([group["initial_lr"] for group in groups])
    assert new["_last_lr"] == [group["lr"] for group in groups]
    assert (new["last_epoch"], len(new["lr_lambdas"])) == (3, len(groups))
    muon = GWTMuon(gwt_param_groups(began.model, rule="muon", scale=1.0, adamw_lr=0.01, weight_decay=0.1), lr=0.04)
    muon.load_state_dict(read(out))


def test_files_beside_that_are_no_schedule_are_left_alone(began, tmp_path, capsys):
    optimizer = beside(began.model)
    steps(began.model, optimizer, lr_scheduler.StepLR(optimizer, 1), 1)
    file = file_of(tmp_path, optimizer.state_dict())
    for i, other in enumerate(({"a": 1}, lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 1).state_dict())):
        file_of(tmp_path, other, "scheduler.pt")
        assert run(file, tmp_path / f"optimizer_{i}.pt", began.config) == 0
        assert "no schedule of the 2 groups of before, so left alone" in capsys.readouterr().out
        assert not (tmp_path / f"scheduler_{i}.pt").exists()
    file_of(tmp_path, lr_scheduler.StepLR(optimizer, 1).state_dict(), "scheduler.pt")
    (tmp_path / "scheduler_2.pt").write_text("mine")
    assert run(file, tmp_path / "optimizer_2.pt", began.config) == 2
    assert f"{tmp_path / 'scheduler_2.pt'} exists" in capsys.readouterr().err
    assert not (tmp_path / "optimizer_2.pt").exists()
    assert (tmp_path / "scheduler_2.pt").read_text() == "mine"


def test_schedules_of_several_optimizers(began, tmp_path, capsys):
    """Check schedules that are identified only by their positions in lists."""
    optimizer, other = beside(began.model), beside(llama(1))
    schedules = [lr_scheduler.StepLR(each, 1).state_dict() for each in (other, optimizer)]
    steps(began.model, optimizer, lr_scheduler.StepLR(optimizer, 1), 1)
    states = [other.state_dict(), optimizer.state_dict()]
    lists = {"optimizer_states": states, "lr_schedulers": schedules}
    flags = ("--key", "optimizer_states.1")
    assert run(file_of(tmp_path, lists), tmp_path / "a.pt", began.config, *flags) == 0
    assert "lr_schedulers.1: the schedule, for the new groups" in capsys.readouterr().out
    assert [len(each["base_lrs"]) for each in read(tmp_path / "a.pt")["lr_schedulers"]] == [2, 3]
    named = {"a": states[0], "b": states[1], "of_a": schedules[0], "of_b": schedules[1]}
    assert run(file_of(tmp_path, named), tmp_path / "b.pt", began.config, "--key", "b") == 0
    said = capsys.readouterr().out
    for name in ("of_a", "of_b"):
        assert f"{name}: the schedule as it was, of other groups or another optimizer" in said
        assert read(tmp_path / "b.pt")[name] == named[name]


def test_trainer_resumes_from_what_the_command_writes(tmp_path):
    """Check ``optimizer.pt`` and ``scheduler.pt`` of a checkpoint, replaced as the page says."""
    runs = pytest.importorskip("tests.support.trainer_runs")
    began = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = runs.Trainer(llama(), runs.arguments(tmp_path, **began), train_dataset=sentences())
    whole.train()
    rates = [each["learning_rate"] for each in whole.state.log_history if "learning_rate" in each]
    checkpoint = tmp_path / "checkpoint-3"
    for name, flags, make in (
        ("gwt", ["--level", "1", "--scale", "0.5", "--exclude", "o_proj"], runs.with_mixin),
        ("foam", ["--level", "1", "--scale", "0.5", "--exclude", "o_proj", "--rule", "foam"], runs.with_factory),
    ):
        folder = tmp_path / name
        folder.mkdir()
        assert run(checkpoint / "optimizer.pt", folder / "optimizer.pt", checkpoint, *flags) == 0
        assert sorted(os.listdir(folder)) == ["optimizer.pt", "scheduler.pt"]
        copied = tmp_path / f"{name}-checkpoint"
        copied.mkdir()
        for file in checkpoint.iterdir():
            source = folder / file.name if (folder / file.name).exists() else file
            (copied / file.name).write_bytes(source.read_bytes())
        options = {} if name == "gwt" else {"rule": "foam"}
        trainer = make(runs.arguments(tmp_path / f"{name}-run", max_steps=6), **options)
        trainer.train(resume_from_checkpoint=str(copied))
        optimizer = trainer.optimizer.optimizer
        assert {int(state["step"]) for state in optimizer.state.values()} == {6}
        assert trainer.lr_scheduler.base_lrs == [0.01] * len(optimizer.param_groups)
        own = [each["learning_rate"] for each in trainer.state.log_history if "learning_rate" in each]
        assert own[-3:] == pytest.approx(rates[-3:])


def test_accelerate_resumes_from_what_the_command_writes(began, tmp_path):
    """Check ``optimizer.bin`` and ``scheduler.bin`` of ``save_state``."""
    accelerate = pytest.importorskip("accelerate")

    def prepared(optimizer):
        schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(began.model, optimizer, schedule)

    accelerator, model, optimizer, schedule = prepared(torch.optim.AdamW(began.model.parameters(), lr=0.01))
    steps(model, optimizer, schedule, 3)
    accelerator.save_state(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "optimizer.bin"
    assert run(file, tmp_path / "optimizer.bin", began.config, "--dtype", "fp32") == 0
    for name in ("optimizer.bin", "scheduler.bin"):
        os.replace(tmp_path / name, tmp_path / "saved" / name)
    accelerator, model, optimizer, schedule = prepared(GWTAdamW(gwt_param_groups(began.model), lr=0.01))
    accelerator.load_state(str(tmp_path / "saved"))
    assert steps(model, optimizer, schedule, 3) == pytest.approx([0.01 / 4, 0.01 / 5, 0.01 / 6])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=("over self.model", "over the LightningModule"))
def test_lightning_resumes_from_what_the_command_writes(named, whole, began, tmp_path, capsys):
    """Check a model that is an attribute of the LightningModule, with and without ``--prefix``."""
    pl = pytest.importorskip("pytorch_lightning")

    class Language(pl.LightningModule):
        def __init__(self, is_gwt):
            super().__init__()
            self.model, self.is_gwt = llama(), is_gwt

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            over = self if whole else self.model
            if self.is_gwt:
                made = GWTAdamW(gwt_param_groups(over), lr=1e-3)
            else:
                made = torch.optim.AdamW(over.named_parameters() if named else over.parameters(), lr=1e-3)
            schedule = lr_scheduler.LambdaLR(made, lambda t: 1 / (1 + t))
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(is_gwt, epochs, **more):
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Language(is_gwt), torch.utils.data.DataLoader(sentences(12), batch_size=4), **more)
        return trainer

    fit(False, 1).save_checkpoint(tmp_path / "run.ckpt")
    out = tmp_path / "gwt.ckpt"
    flags = ("--dtype", "fp32", *(("--prefix", "model") if whole else ()))
    assert run(tmp_path / "run.ckpt", out, began.config, *flags) == 0
    assert "lr_schedulers.0: the schedule, for the new groups" in capsys.readouterr().out
    trainer = fit(True, 2, ckpt_path=out)
    (optimizer,) = trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 7] * 3)


def test_a_prefix_that_is_none_is_refused(began, tmp_path, capsys):
    optimizer = torch.optim.AdamW(began.model.parameters())
    for prefix in ("", "a..b", "forward"):
        assert (
            run(file_of(tmp_path, optimizer.state_dict()), tmp_path / "o.pt", began.config, "--prefix", prefix) == 2
        )
        assert f"--prefix {prefix!r} is no path of attributes" in capsys.readouterr().err
