"""GWTAdamW under Lightning's Trainer: clipping, accumulation, schedules, checkpoints, bfloat16."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from gwt_kernels import GWTAdamW
from tests.support.lightning_runs import Language, ModelCheckpoint, fit, pl
from tests.support.runs import assert_same_bits
from tests.support.tiny import assert_close_runs, assert_same_run, sentences


@pytest.mark.parametrize("accumulated", [1, 2])
def test_equals_the_optimizer_made_by_hand(accumulated, tmp_path):
    """Check closures, clipping, accumulation and schedule: steps equal those outside Lightning bit for bit."""
    module, optimizer = fit(tmp_path, accumulate_grad_batches=accumulated)
    begin = Language()
    by_hand = copy.deepcopy(begin)
    expected = by_hand.configure_optimizers()["optimizer"]
    assert len(module.seen) == 6
    assert len(set(module.rates)) == 6
    for grads, rate in zip(module.seen, module.rates, strict=True):
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        assert norm <= 0.5 * (1 + 1e-6)  # clipped before the step
        for p, g in zip(by_hand.parameters(), grads, strict=True):
            p.grad = g
        for group in expected.param_groups:
            group["lr"] = rate
        expected.step()
    assert_same_bits(list(module.parameters()), list(by_hand.parameters()))
    assert {int(s["step"]) for s in optimizer.state.values()} == {6}
    levels = {n: g["level"] for g in optimizer.param_groups for n in g["param_names"]}
    assert levels["model.model.embed_tokens.weight"] == 0
    assert levels["model.model.layers.0.mlp.gate_proj.weight"] == 1
    assert not torch.equal(module.model.lm_head.weight, begin.model.lm_head.weight)


def test_resumes_bit_for_bit(tmp_path):
    epochs = {"max_epochs": 2, "max_steps": -1, "count": 12}  # with max_steps, Lightning repeats a batch
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    module, optimizer = fit(tmp_path, enable_checkpointing=True, callbacks=[saves], **epochs)
    checkpoint = tmp_path / "step=3.ckpt"
    resumed, resumed_optimizer = fit(tmp_path, resume=str(checkpoint), **epochs)
    assert len(resumed.seen) == 3
    assert_same_run(module, optimizer, resumed, resumed_optimizer)

    held = torch.load(checkpoint, weights_only=True)  # its contents need no code to be executed
    for state in held["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()
    torch.save(held, tmp_path / "tampered.ckpt")
    tampered, _ = fit(tmp_path, resume=str(tmp_path / "tampered.ckpt"), **epochs)
    assert len(tampered.seen) == 3
    with pytest.raises(AssertionError):  # the moments matter, so the comparison can fail
        assert_same_bits(list(module.parameters()), list(tampered.parameters()))


@pytest.mark.parametrize("make", [GWTAdamW, torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)])
def test_schedules_advance_at_skipped_steps_whatever_the_optimizer(make, tmp_path):
    class Overflowing(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean() * (torch.inf if batch_idx in (1, 3) else 1)

        def configure_optimizers(self):
            optimizer = make(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    scaling = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    trainer = pl.Trainer(
        max_steps=5, accelerator="cpu", plugins=[scaling], default_root_dir=tmp_path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.randn(40, 8))
    trainer.fit(Overflowing(), torch.utils.data.DataLoader(data, batch_size=4))
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize(
    ("precision", "clipping"),
    [("bf16-true", {"gradient_clip_val": 0.5}), ("bf16-mixed", {"gradient_clip_val": None, "max_grad_norm": 0.5})],
)
def test_bfloat16(precision, clipping, tmp_path):
    module, optimizer = fit(tmp_path, precision=precision, **clipping)
    weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {weights}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in module.parameters())
    exact, _ = fit(tmp_path)
    assert not torch.equal(exact.model.lm_head.weight, module.model.lm_head.weight.float())  # autocast was on


def test_lightning_does_not_clip_for_an_optimizer_that_unscales(tmp_path):
    """Check that Lightning refuses to clip in its mixed precision, where the optimizer has to clip."""
    with pytest.raises(RuntimeError, match="GWTAdamW, does not allow for gradient clipping"):
        fit(tmp_path, precision="bf16-mixed", gradient_clip_val=0.5)


def test_clipping_in_the_step(tmp_path):
    """Check that max_grad_norm of the optimizer equals gradient_clip_val, up to rounding."""
    module, _ = fit(tmp_path, gradient_clip_val=0.25)
    inside, optimizer = fit(tmp_path, gradient_clip_val=None, max_grad_norm=0.25)
    unclipped, _ = fit(tmp_path, gradient_clip_val=None)
    assert optimizer.grad_norm > 0.25
    assert_close_runs(module, inside, unclipped)


class Unfreezing(pl.callbacks.BaseFinetuning):
    """Trains the head first, then a layer, then the other and the embedding: added groups have no names and no
    level.
    """

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.model)

    def finetune_function(self, pl_module, epoch, optimizer):
        model = pl_module.model.model
        if epoch == 1:
            self.unfreeze_and_add_param_group(model.layers[1], optimizer, lr=0.002)
        elif epoch == 2:
            self.unfreeze_and_add_param_group([model.layers[0], model.embed_tokens], optimizer)


class FineTuned(Language):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make([(name, p) for name, p in self.named_parameters() if p.requires_grad])


def fine_tune(make, folder, resume=None):
    module = FineTuned(make)
    module.optimizer_step = partial(pl.LightningModule.optimizer_step, module)  # most have no gradient to record
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[Unfreezing(), saves], default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(sentences(8), batch_size=4), ckpt_path=resume)
    return module, trainer.optimizers[0]


def ours(params):
    return GWTAdamW(params, lr=0.01)


def theirs(params):
    """Return ``torch.optim.AdamW`` without names, since it refuses added groups that have none."""
    return torch.optim.AdamW([p for _, p in params], lr=0.01)


@pytest.mark.filterwarnings("ignore:.*without a level")
@pytest.mark.parametrize("resumed", [False, True])
def test_layers_that_a_callback_unfreezes(resumed, tmp_path):
    """Check that rates and steps of every parameter equal AdamW's; added matrices get the optimizer's level."""
    steps, rates = [], []
    for make in (ours, theirs):
        folder = tmp_path / make.__name__
        module, optimizer = fine_tune(make, folder)
        if resumed:
            module, optimizer = fine_tune(make, folder, resume=folder / "epoch=1.ckpt")
        names = {p: name for name, p in module.named_parameters()}
        steps.append({names[p]: int(state["step"]) for p, state in optimizer.state.items()})
        rates.append({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        begin = dict(Language().named_parameters())
        assert not any(torch.equal(p, begin[names[p]]) for p, state in optimizer.state.items() if state)
        if make is ours:
            levels = {names[p]: group["level"] for group in optimizer.param_groups for p in group["params"]}
            added = {name: p for p, name in names.items() if name != "model.lm_head.weight"}
            moments = {names[p]: state["exp_avg"].shape[-1] for p, state in optimizer.state.items()}
            assert all(levels[name] == (2 if p.dim() > 1 else 0) for name, p in added.items() if name in levels)
            assert all(moments[name] == p.shape[-1] >> levels[name] for name, p in added.items() if name in moments)
    assert steps[0] == steps[1]
    assert rates[0] == rates[1]
    if not resumed:
        assert rates[0].keys() == begin.keys() - {"model.model.norm.weight"}
        assert set(steps[0].values()) == {2, 4, 6}
