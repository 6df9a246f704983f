"""GWTAdamW in Hugging Face's Trainer: by the mixin, then by optimizer_cls_and_kwargs from its checkpoint."""

import tempfile

import tiny
from transformers import Trainer, TrainingArguments

from gwt_kernels.integrations.transformers import GWTTrainerMixin, gwt_optimizer

args = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=2,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=0.02,
    weight_decay=0.1,
    adam_epsilon=1e-6,  # GWTAdamW's own default; TrainingArguments' is 1e-8
    warmup_steps=10,
    lr_scheduler_type="constant_with_warmup",
    logging_steps=1,
    save_strategy="epoch",
    disable_tqdm=True,
    report_to="none",
)


class GWTTrainer(GWTTrainerMixin, Trainer):
    pass


trainer = GWTTrainer(tiny.model(), args, train_dataset=tiny.Text(), gwt_options={"level": 2})
trainer.train()
first = trainer.state.log_history[0]["loss"]

args.num_train_epochs = 4
trainer = Trainer(
    tiny.model(),
    args,
    train_dataset=tiny.Text(),
    optimizer_cls_and_kwargs=gwt_optimizer(args, level=2),
)
trainer.train(resume_from_checkpoint=True)
last = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]

print(f"loss {first:.2f} -> {last:.2f}")
