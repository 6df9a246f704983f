"""Optimizers of this package in Hugging Face's Trainer: a mixin, a factory, a telemetry callback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gwt_kernels.integrations.telemetry import HasTelemetry, check_every, missing, scalars, with_telemetry
from gwt_kernels.optim.adamw import GWTAdamW
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.by_rule import optimizer_of
from gwt_kernels.optim.param_groups import gwt_param_groups
from gwt_kernels.rules import ADAMW

try:
    import accelerate  # noqa: F401  # Trainer cannot be built without it
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import INTEGRATION_TO_CALLBACK
except ModuleNotFoundError as error:
    raise missing(__name__, error.name or "transformers", "transformers accelerate") from error

__all__ = ["GWTTrainerMixin", "TelemetryCallback", "gwt_optimizer"]

_GROUPING = ("level", "scale", "include", "exclude", "adamw_lr")
"""Options of gwt_param_groups; all others are options of the optimizer."""
_OF_SHAPES = ("include", "exclude", "row_splits", "head_rows", "workspace_bytes")
"""Options that can be checked only against the model's own tensors."""

_TRAINING_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def _taken_over(kind: type[PlannedOptimizer]) -> dict[str, str]:
    """Return the options of an optimizer that TrainingArguments sets, with their names there."""
    apart = "adamw_betas" in inspect.signature(kind).parameters
    betas, eps = ("adamw_betas", "adamw_eps") if apart else ("betas", "eps")
    return {**_TRAINING_ARGUMENTS, betas: "adam_beta1 and adam_beta2", eps: "adam_epsilon"}


class GWTTrainerMixin:
    """Make a Trainer optimize with an optimizer of this package over the groups of `gwt_param_groups`.

    ::

        class MyTrainer(GWTTrainerMixin, Trainer):
            pass

        MyTrainer(model, args, train_dataset=data, gwt_options={"level": 2, "rule": "foam"}).train()

    The ``rule`` chooses the optimizer: `GWTMuon` for ``"muon"``, `GWTLion` for ``"lion"``, and so on.
    Learning rate, betas, eps and weight decay are those of `TrainingArguments`. If an optimizer has
    ``adamw_betas``, betas and eps apply only to the tensors that are not transformed. ``adam_epsilon`` is 1e-8
    unless you set it; `GWTAdamW` and the published recipe have 1e-6.

    Args:
        *args: Trainer's arguments.
        gwt_options: Options of `gwt_param_groups` (``level``, ``scale``, ``include``, ``exclude``, ``adamw_lr``),
            ``rule``, and options of its optimizer (``state_dtype`` and so on).
        **kwargs: Trainer's keyword arguments.

    Raises:
        TypeError: an option is unknown or of the wrong type, or the mixin does not come before Trainer.
        ValueError: an option is out of range, or contradicts the training arguments.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(GWTTrainerMixin):
            raise TypeError(
                f"{cls.__name__} has Trainer before GWTTrainerMixin, so it would use Trainer's own AdamW: "
                f"write class {cls.__name__}(GWTTrainerMixin, Trainer)"
            )

    def __init__(self, *args: Any, gwt_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(gwt_options, Mapping | None):
            raise TypeError(f"gwt_options must be a dict, such as {{'level': 2}}, got {gwt_options!r}")
        self.gwt_options = dict(gwt_options or {})
        self.args: TrainingArguments
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer | None
        self.optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "GWTTrainerMixin makes the optimizer itself: leave out optimizers and optimizer_cls_and_kwargs, or "
                "use Trainer without the mixin"
            )
        _check_together(self.args, self.gwt_options)
        if any(p.requires_grad for p in self.model.parameters()):  # otherwise it may only evaluate
            _try_out(self.model, self.args, self.gwt_options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer if there is none yet; Trainer calls this before training.

        Args:
            model: The model as wrapped by Trainer; None for the Trainer's ``model``.
        """
        if self.optimizer is None:
            self.optimizer = _make(self.model if model is None else model, self.args, **self.gwt_options)
        return self.optimizer


def gwt_optimizer(args: TrainingArguments, **options: Any) -> tuple[type, dict[str, Any]]:
    """Return ``optimizer_cls_and_kwargs`` of a Trainer for an optimizer over the groups of `gwt_param_groups`.

    ::

        Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=gwt_optimizer(args, level=2))

    Do not pass `GWTAdamW` itself: Trainer would make two groups, with and without weight decay, and transform every
    tensor in them, including embeddings and norms.

    Args:
        args: The Trainer's arguments, with learning rate, betas, eps and weight decay.
        **options: As `GWTTrainerMixin`'s ``gwt_options``.

    Raises:
        TypeError, ValueError: as `GWTTrainerMixin`; those that depend on the model, at the start of training.
        RuntimeError: at the start of training, if this version of transformers passes no model to optimizers.
    """
    _check_together(args, options)
    # Wide enough for any level, with two outputs, since one is a score; bfloat16 supports every weight rounding.
    any_matrix = nn.ModuleDict({"mlp": nn.Linear(1 << 20, 2, device="meta", dtype=torch.bfloat16)})
    _try_out(any_matrix, args, {k: v for k, v in options.items() if k not in _OF_SHAPES})
    return _Factory, {"args": args, **options}


class _Factory:
    """Factory: Trainer instantiates a class that is no Optimizer, and calls the instance with the model."""

    def __init__(self, *groups: Any, **options: Any) -> None:
        if groups or options:
            raise RuntimeError(
                "this version of transformers gives the optimizer of optimizer_cls_and_kwargs no model, so nothing "
                "says which tensors to transform: upgrade it (5.17 is new enough), or use GWTTrainerMixin"
            )

    def __call__(self, model: nn.Module, **options: Any) -> PlannedOptimizer:
        return _make(model, **options)


class TelemetryCallback(TrainerCallback):
    """Log `GWTAdamW`'s telemetry to the trackers of a Trainer: TensorBoard, and the others of ``report_to``.

    The scalars are named ``train/telemetry/<what>/<parameter>``. They go to the trackers only, not to
    the console or ``trainer_state.json``, which four numbers per tensor would flood.

    ::

        trainer.add_callback(TelemetryCallback(trainer, every=50))

    Args:
        trainer: The Trainer that the callback is added to.
        every: Optimizer steps between two logs.

    Raises:
        ValueError: ``every`` is not an integer of at least 1, or the trainer has no tracker; after the first step:
            the optimizer's telemetry is off.
        TypeError: at the start of training: the optimizer has no telemetry.
    """

    def __init__(self, trainer: Trainer, *, every: int = 50) -> None:
        self.every = check_every(every)
        known = tuple(INTEGRATION_TO_CALLBACK.values())
        self._trackers = [c for c in trainer.callback_handler.callbacks if isinstance(c, known)]
        if not self._trackers:
            raise ValueError("there is no tracker to log to: set report_to='tensorboard' in TrainingArguments")
        self._optimizers: list[HasTelemetry] = []
        self._checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer's telemetry."""
        self._optimizers = with_telemetry([kwargs["optimizer"]])
        self._checked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log every ``every`` steps."""
        due = state.global_step % self.every == 0
        if due or not self._checked:
            logs = scalars(self._optimizers)
            self._checked = True
            for tracker in self._trackers if due else ():
                tracker.on_log(args, state, control, logs=dict(logs), **kwargs)


def _check_together(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Raise on options and training arguments that contradict each other."""
    kind = optimizer_of(options.get("rule", "gwt"))
    taken_over = _taken_over(kind)
    for option in options.keys() & taken_over.keys():
        raise ValueError(f"{option} is not an option here: set {taken_over[option]} in TrainingArguments")
    elsewhere = {"params", *taken_over}
    known = [x for x in (*_GROUPING, "rule", *inspect.signature(kind).parameters) if x not in elsewhere]
    for option in options:
        if option not in known:
            raise TypeError(f"{option!r} is no option here: {kind.__name__} has {', '.join(dict.fromkeys(known))}")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"TrainingArguments asks for optim={optim!r}, which GWTAdamW would replace: leave it out")
    if args.optim_args:
        raise ValueError(f"optim_args={args.optim_args!r} would be ignored: pass GWTAdamW's options to it instead")
    if args.optim_target_modules is not None:
        raise ValueError("optim_target_modules would be ignored: name matrices to transform with include=[...]")
    if options.get("max_grad_norm") is not None and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm would be honoured twice, by TrainingArguments ({args.max_grad_norm}) and by GWTAdamW "
            f"({options['max_grad_norm']}): set TrainingArguments' to 0"
        )
    if args.deepspeed_plugin is not None:
        raise ValueError("DeepSpeed flattens parameters, so a row's neighbours are lost: train with DDP or FSDP2")
    if (args.fsdp_plugin_args or {}).get("fsdp_version", 2) == 1:
        raise ValueError("FSDP1 flattens parameters, so a row's neighbours are lost: set version 2 in fsdp_config")


def _try_out(model: nn.Module, args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Make the optimizer on meta tensors, only to raise its errors early."""
    _make(model, args, on="meta", **options)


def _make(model: nn.Module, args: TrainingArguments, on: str | None = None, **options: Any) -> PlannedOptimizer:
    kind = optimizer_of(options.get("rule", "gwt"))
    chosen = {name: options.pop(name) for name in _GROUPING if name in options}
    *_, betas, eps = _taken_over(kind)
    if kind is not GWTAdamW:
        scale = inspect.signature(kind).parameters["scale"].default
        chosen = {"scale": scale, **chosen, "rule": options.pop("rule")}
    groups = gwt_param_groups(model, weight_decay=args.weight_decay, **chosen)
    level = chosen.get("level", 2)
    if options.get("rule") == ADAMW.name and level == 0:  # as in the groups; this rule refuses the default
        options = {"norm_growth_limit": None, **options, "level": 0}
    if level and not any(group["level"] for group in groups):
        shallow = {**chosen, "level": 1}
        if any(group["level"] for group in gwt_param_groups(model, **shallow)):
            raise ValueError(
                f"level {level} is too deep for all matrices of the model, so that nothing would be transformed: "
                f"use a lower level"
            )
    if on is not None:
        for group in groups:
            group["params"] = [torch.empty(p.shape, dtype=p.dtype, device=on) for p in group["params"]]
    numbers: dict[str, Any] = {betas: (args.adam_beta1, args.adam_beta2), eps: args.adam_epsilon}
    return kind(groups, lr=args.learning_rate, **numbers, **options)  # type: ignore[call-arg]  # options of subclasses
