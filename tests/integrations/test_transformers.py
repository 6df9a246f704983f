"""GWTAdamW under Hugging Face's Trainer: options, saving, resuming, and contradictory arguments."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon
from tests.support.runs import assert_same_bits
from tests.support.tiny import assert_close_runs, assert_same_run, llama, optimizer_of, sentences
from tests.support.trainer_runs import (
    GWTTrainerMixin,
    MixedTrainer,
    arguments,
    gwt_optimizer,
    with_factory,
    with_mixin,
)

routes = pytest.mark.parametrize("route", [with_mixin, with_factory])


class Replay(TrainerCallback):
    """Pass the gradients of each of Trainer's steps to an independent optimizer."""

    def __init__(self, trainer: Trainer) -> None:
        self.model = copy.deepcopy(trainer.model)
        self.optimizer = optimizer_of(self.model)
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for p, theirs in zip(self.model.parameters(), kwargs["model"].parameters(), strict=True):
            p.grad = theirs.grad.clone()
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        self.rates.append(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


@routes
def test_every_option_reaches_the_optimizer(route, tmp_path):
    trainer = route(arguments(tmp_path), rule="foam", state_dtype=torch.bfloat16)
    made, expected = trainer.create_optimizer(), optimizer_of(llama(), rule="foam", state_dtype=torch.bfloat16)
    assert isinstance(made, GWTAdamW)
    assert made.defaults == {**expected.defaults, "weight_decay": 0.0}
    assert_same_bits(made.state_dict(), expected.state_dict())  # names, levels, scales, decay and all numbers
    levels = {n: g["level"] for g in made.param_groups for n in g["param_names"]}
    assert levels["model.embed_tokens.weight"] == levels["lm_head.weight"] == levels["model.norm.weight"] == 0
    assert levels["model.layers.1.self_attn.q_proj.weight"] == levels["model.layers.1.mlp.down_proj.weight"] == 1
    assert levels["model.layers.1.self_attn.o_proj.weight"] == 0  # excluded by its name


@routes
def test_wavelet_boundary_and_bias_correction_reach_the_optimizer(route, tmp_path):
    options = {"wavelet": "bior2.2", "boundary": "reflect", "correct_bias": False}
    made = route(arguments(tmp_path), **options).create_optimizer()
    assert all(options.items() <= group.items() for group in made.param_groups)
    with pytest.raises(ValueError, match="unknown boundary 'edge'"):
        route(arguments(tmp_path), boundary="edge")


@routes
@pytest.mark.parametrize("kind", [GWTMuon, GWTLion])
def test_a_rule_chooses_its_optimizer(route, kind, tmp_path):
    rule = kind.rules[0]
    own = {"ns_steps": 4, "workspace_bytes": 1 << 20} if kind is GWTMuon else {"betas": (0.8, 0.9)}
    options = {"rule": rule, "adamw_lr": 1e-4, "scale": 0.5, "detail_scale": 0.7, **own}
    trainer = route(arguments(tmp_path), **options)
    made = trainer.create_optimizer()
    assert type(made) is kind
    first, *rest = made.param_groups
    assert (first["rule"], first["level"], first["scale"], first["detail_scale"]) == (rule, 1, 0.5, 0.7)
    assert all(first[name] == value for name, value in own.items())
    args = trainer.args
    assert first["lr"] == args.learning_rate
    assert {(g["rule"], g["lr"], g["betas"], g["eps"]) for g in rest} == {
        ("adamw", 1e-4, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
    }
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > trainer.state.log_history[-2]["loss"]
    with pytest.raises(ValueError, match="detail_scale must be finite and at least 0"):
        route(arguments(tmp_path), rule=rule, detail_scale=-1.0)
    with pytest.raises(ValueError, match="unknown rule 'shampoo'"):
        route(arguments(tmp_path), rule="shampoo")


@routes
@pytest.mark.parametrize(
    ("rule", "kind", "scale"), [("adafactor", GWTAdafactor, 0.25), ("adam_mini", GWTAdamMini, 1.0)]
)
def test_other_rules_choose_theirs(route, rule, kind, scale, tmp_path):
    trainer = route(arguments(tmp_path, max_steps=2), rule=rule)
    made = trainer.create_optimizer()
    assert type(made) is kind
    assert made.param_groups[0]["rule"] == rule
    trainer.train()
    bare = gwt_optimizer(trainer.args, rule=rule)
    assert bare[0]()(llama(), **bare[1]).param_groups[0]["scale"] == scale


@routes
def test_adamw_at_level_0(route, tmp_path):
    trainer = route(arguments(tmp_path, max_steps=2), rule="adamw", level=0)
    assert {(group["rule"], group["level"]) for group in trainer.create_optimizer().param_groups} == {("adamw", 0)}
    trainer.train()
    with pytest.raises(ValueError, match="level is 2, but rule='adamw' transforms nothing"):
        route(arguments(tmp_path), rule="adamw", level=2)


@routes
def test_equals_the_optimizer_made_by_hand(route, tmp_path):
    """Check accumulation, clipping and schedule: bit for bit the steps of the same gradients outside Trainer."""
    trainer = route(arguments(tmp_path, max_grad_norm=0.5))
    replay = Replay(trainer)
    trainer.add_callback(replay)
    begin = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(replay.rates) == 6
    assert len(set(replay.rates)) == 5  # up, and down again by the cosine
    assert_same_bits(list(trainer.model.parameters()), list(replay.model.parameters()))
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {6}  # one step per two micro-batches
    assert any(not torch.equal(begin[k], v) for k, v in trainer.model.state_dict().items())


@routes
def test_resumes_bit_for_bit(route, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = route(arguments(tmp_path / "whole", **saving))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = route(arguments(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)

    shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    forgetful = route(arguments(tmp_path / "forgetful"))
    forgetful.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(AssertionError):  # the moments matter, so the comparison can fail
        assert_same_bits(list(whole.model.parameters()), list(forgetful.model.parameters()))


@routes
def test_a_checkpoint_that_does_not_fit_is_refused(route, tmp_path):
    route(arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)).train()
    other = route(arguments(tmp_path, max_steps=2), rule="foam")
    with pytest.raises(ValueError, match="has rule='gwt', the optimizer rule='foam'"):
        other.train(resume_from_checkpoint=True)


@routes
def test_reads_arguments_when_training_begins(route, tmp_path):
    """Check arguments changed after construction, as by Trainer's hyperparameter search."""
    trainer = route(arguments(tmp_path))
    trainer.args.learning_rate = 0.125
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.125}


@routes
def test_bfloat16_weights(route, tmp_path):
    trainer = route(arguments(tmp_path), torch.bfloat16, weight_rounding="split")
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert all(s["weight_low"].any() for s in trainer.optimizer.state.values())
    with pytest.raises(ValueError, match="weight_rounding='split' is for"):
        route(arguments(tmp_path), weight_rounding="split").create_optimizer()


def test_clipping_in_the_step(tmp_path):
    """Check that the option max_grad_norm equals that of TrainingArguments, up to rounding."""
    trainer = with_mixin(arguments(tmp_path, max_grad_norm=0.25))
    inside = with_mixin(arguments(tmp_path, max_grad_norm=0.0), max_grad_norm=0.25)
    unclipped = with_mixin(arguments(tmp_path, max_grad_norm=0.0))
    for each in (trainer, inside, unclipped):
        each.train()
    assert_close_runs(trainer.model, inside.model, unclipped.model)


def test_mixed_precision(tmp_path):
    trainer = with_mixin(arguments(tmp_path, bf16=True))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    plain = with_mixin(arguments(tmp_path))
    plain.train()
    assert not torch.equal(plain.model.lm_head.weight, trainer.model.lm_head.weight)  # autocast was active


@routes
def test_the_schedule_waits_for_skipped_steps(route, tmp_path):
    trainer = route(arguments(tmp_path, gradient_accumulation_steps=1, max_grad_norm=0.0))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # Trainer creates it only for GPUs
    bad, computed = iter((False, True, False, True, True, False)), trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: computed(*args, **kwargs) * (torch.inf if next(bad) else 1)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.lr_scheduler.last_epoch == 3
    optimizer = trainer.optimizer.optimizer
    assert {int(s["step"]) for s in optimizer.state.values()} == {3}
    assert optimizer.skipped_steps == 3


def test_groups_made_by_trainer_transform_every_matrix(tmp_path):
    """Check the reason not to pass GWTAdamW itself to Trainer, whose two groups differ only in weight decay."""
    chosen = (GWTAdamW, {"level": 1})
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=sentences(), optimizer_cls_and_kwargs=chosen)
    groups = trainer.create_optimizer().param_groups
    assert [group["level"] for group in groups] == [1, 1]
    assert {group["lr"] for group in groups} == {1e-3}  # GWTAdamW's default: the arguments' value does not reach it
    transformed = {id(p) for group in groups for p in group["params"]}
    assert id(trainer.model.model.embed_tokens.weight) in transformed
    assert id(trainer.model.model.norm.weight) in transformed


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "lr": ({}, {"lr": 0.1}, ValueError, "set learning_rate in TrainingArguments"),
    "betas": ({}, {"betas": (0.9, 0.9)}, ValueError, "set adam_beta1 and adam_beta2 in TrainingArguments"),
    "unknown": ({}, {"levels": 2}, TypeError, "levels"),
    "unknown to it": ({}, {"head_rows": 2}, TypeError, "'head_rows' is no option here: GWTAdamW has level, "),
    "params": ({}, {"params": []}, TypeError, "'params' is no option here"),
    "model": ({}, {"model": None}, TypeError, "'model' is no option here"),
    "on": ({}, {"on": "meta"}, TypeError, "'on' is no option here"),
    "rule": ({}, {"rule": ["muon"]}, ValueError, r"unknown rule \['muon'\]"),
    "range": ({}, {"level": -1}, ValueError, "level must be an integer of at least 0"),
    "depth": ({}, {"level": 99}, ValueError, "level 99 is too deep for all matrices of the model"),
    "scale": ({}, {"scale": 0.0}, ValueError, "scale must be a finite number above 0"),
    "together": ({}, {"rule": "foam", "norm_growth_limit": 1.1}, ValueError, "has no limiter"),
    "eps": ({"adam_epsilon": -1.0}, {}, ValueError, "eps must be finite"),
    "optim": ({"optim": "adafactor"}, {}, ValueError, "optim='adafactor', which GWTAdamW would replace"),
    "optim_args": ({"optim_args": "a=1"}, {}, ValueError, "optim_args='a=1' would be ignored"),
    "targets": ({"optim_target_modules": ["mlp"]}, {}, ValueError, r"name matrices to transform with include="),
    "clipping": ({}, {"max_grad_norm": 1.0}, ValueError, "set TrainingArguments' to 0"),
}


@routes
@pytest.mark.parametrize("case", BAD)
def test_contradictions_fail_at_construction(route, case, tmp_path):
    args, options, kind, message = BAD[case]
    chosen = arguments(tmp_path, **args)
    with pytest.raises(kind, match=message):
        route(chosen, **options)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("deepspeed_plugin", object(), "DeepSpeed flattens"), ("fsdp_plugin_args", {"fsdp_version": 1}, "FSDP1")],
)
def test_flattened_parameters_are_refused(attribute, value, message, tmp_path):
    args = arguments(tmp_path)
    setattr(args, attribute, value)  # neither can be set up in one process on a CPU
    with pytest.raises(ValueError, match=message):
        gwt_optimizer(args)


def test_mixin_validates_the_model_at_construction(tmp_path):
    with pytest.raises(ValueError, match="the pattern 'nowhere' matches no parameter"):
        with_mixin(arguments(tmp_path), include=["nowhere"])


def test_mixin_evaluates_a_frozen_model(tmp_path):
    frozen = llama().requires_grad_(False)
    trainer = MixedTrainer(frozen, arguments(tmp_path), eval_dataset=sentences(8), gwt_options={"level": 1})
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.filterwarnings("error:gwt_param_groups found nothing")
def test_factory_tries_options_on_a_matrix_that_is_transformed(tmp_path):
    """Check that options are accepted that only the model's own matrices can contradict."""
    made = gwt_optimizer(arguments(tmp_path), level=3, rule="adam_mini", head_rows=7)
    assert made[1]["head_rows"] == 7
    for rule in ("gwt", "foam", "muon", "lion", "adafactor"):
        gwt_optimizer(arguments(tmp_path), rule=rule, state_dtype=torch.bfloat16, weight_rounding="stochastic")


def test_factory_refuses_a_level_that_is_too_deep_for_the_model(tmp_path):
    trainer = with_factory(arguments(tmp_path), level=9)
    with pytest.raises(ValueError, match="level 9 is too deep for all matrices of the model"):
        trainer.train()


def test_mixin_builds_the_optimizer_alone(tmp_path):
    other = torch.optim.SGD(llama().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave out optimizers"):
        MixedTrainer(llama(), arguments(tmp_path), optimizers=(other, None))
    with pytest.raises(ValueError, match="leave out optimizers"):
        MixedTrainer(llama(), arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {}))


@pytest.mark.parametrize("options", ["level=2", ["level"], 2])
def test_options_of_the_mixin_are_a_dict(options, tmp_path):
    with pytest.raises(TypeError, match=r"gwt_options must be a dict, such as {'level': 2}, got "):
        MixedTrainer(llama(), arguments(tmp_path), gwt_options=options)


def test_mixin_has_to_come_first():
    with pytest.raises(TypeError, match=r"write class Wrong\(GWTTrainerMixin, Trainer\)"):

        class Wrong(Trainer, GWTTrainerMixin):
            pass


def test_error_of_a_trainer_without_factories(tmp_path):
    """Check the error with transformers 5.0, which calls every class as an optimizer, with groups of parameters."""
    factory, options = gwt_optimizer(arguments(tmp_path))
    with pytest.raises(RuntimeError, match="use GWTTrainerMixin"):
        factory([{"params": list(llama().parameters())}], **options)


def test_trackers_are_those_of_transformers():
    """Check the names by which the telemetry callback finds trackers."""
    assert INTEGRATION_TO_CALLBACK["tensorboard"] is TensorBoardCallback
