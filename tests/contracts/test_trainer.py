"""transformers: what the Trainer does inside, and what it asks of its subclasses and callbacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from breaking import contract, doing_nothing, with_value, without, wrapped
from lowmem_reft.machine.contracts.contract import tiny_llama

TRAINER = "transformers:Trainer."
ROWS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "number": i} for i in range(4)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def without_numbers(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in collate(rows).items() if name != "number"}


def arguments(directory: Path, **fields: Any) -> TrainingArguments:
    common: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(directory), **{**common, **fields})


def trainer(directory: Path, kind: Any = Trainer, callbacks: Any = (), **fields: Any) -> Any:
    return kind(
        model=tiny_llama(),
        args=arguments(directory, **fields),
        train_dataset=ROWS,
        data_collator=without_numbers if kind is Trainer else collate,
        callbacks=list(callbacks),
    )


class Inside(Trainer):
    """Takes its own column out and runs another callable in the model's place."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.numbers = [*getattr(self, "numbers", []), *inputs.pop("number").tolist()]
        return super().compute_loss(partial(self.stand_in, model), inputs, *args, **kwargs)

    def stand_in(self, model: Any, **inputs: Any) -> Any:
        self.given = inputs
        return model(**inputs)


@contract(
    "transformers",
    used_by="reuse/mixins.py",
    broken_by=wrapped(
        f"{TRAINER}compute_loss",
        lambda compute: (
            lambda self, model, inputs, *a, **k: compute(self, self.model, inputs, *a, **k)
        ),
    ),
)
def test_compute_loss_calls_what_it_is_given_with_the_batch(tmp_path: Path) -> None:
    training = trainer(tmp_path, Inside)
    training.train()
    assert len(training.numbers) == 2
    assert {"input_ids", "labels"} <= {*training.given}
    assert {*training.given} <= {"input_ids", "labels", "num_items_in_batch"}


@contract(
    "transformers",
    used_by="base/loss.py reuse/mixins.py",
    broken_by=doing_nothing(f"{TRAINER}_get_num_items_in_batch"),
)
def test_accumulated_losses_are_divided_by_the_tokens_of_all_batches(tmp_path: Path) -> None:
    training = trainer(tmp_path, Inside, gradient_accumulation_steps=2, max_steps=1)
    training.train()
    assert int(training.given["num_items_in_batch"]) == 4


@contract(
    "transformers",
    used_by="reuse/mixins.py",
    broken_by=without(f"{TRAINER}_set_signature_columns_if_needed"),
)
def test_columns_to_keep_are_a_list_that_can_be_added_to(tmp_path: Path) -> None:
    class Keeping(Inside):
        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            if "number" not in columns:
                columns.append("number")

    from datasets import Dataset

    training = Keeping(
        model=tiny_llama(),
        args=arguments(tmp_path, remove_unused_columns=True),
        train_dataset=Dataset.from_list(ROWS),
        data_collator=collate,
    )
    training.train()
    assert len(training.numbers) == 2


@contract(
    "transformers",
    used_by="reuse/mixins.py",
    broken_by=wrapped(
        f"{TRAINER}__init__", lambda init: lambda self, **kwargs: _hidden(self, init, kwargs)
    ),
)
def test_a_trainer_knows_batch_size_smoother_and_loss_function(tmp_path: Path) -> None:
    training = trainer(tmp_path, per_device_train_batch_size=2)
    assert training._train_batch_size == 2
    assert training.label_smoother is None
    assert training.compute_loss_func is None
    assert trainer(tmp_path, label_smoothing_factor=0.1).label_smoother is not None
    assert training.args.world_size == 1
    assert training.accelerator.autocast is not None


def _hidden(self: Any, init: Any, kwargs: Any) -> None:
    init(self, **kwargs)
    del self._train_batch_size


@contract(
    "transformers",
    used_by="reuse/mixins.py reft/selection.py",
    broken_by=wrapped(
        f"{TRAINER}compute_loss",
        lambda compute: (
            lambda self, model, inputs, *a, **k: compute(
                self, model, {**inputs, "labels": None}, *a, **k
            )
        ),
    ),
)
def test_only_label_smoothing_takes_the_labels_from_the_model(tmp_path: Path) -> None:
    for smoothing, has_labels in ((0.0, True), (0.1, False)):
        given: list[Any] = []
        training = trainer(tmp_path, label_smoothing_factor=smoothing)
        training.model.register_forward_pre_hook(
            lambda _, __, kwargs, given=given: given.append(kwargs), with_kwargs=True
        )
        training.train()
        assert [kwargs.get("labels") is not None for kwargs in given] == [has_labels] * 2


class Events(TrainerCallback):
    """Notes the events that the package goes by, and what they are told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        assert model is not None
        self.seen.append(("begin", state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("before", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("end", state.global_step))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("epoch", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("train", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(logs)


@contract(
    "transformers",
    used_by="runs/fit.py runs/validation.py memory/callback.py",
    broken_by=wrapped(
        "transformers.trainer_callback:CallbackHandler.on_pre_optimizer_step",
        lambda _: lambda self, args, state, control: control,
    ),
)
def test_callbacks_hear_of_a_step_three_times_with_the_steps_that_are_done(tmp_path: Path) -> None:
    events = Events()
    trainer(tmp_path, callbacks=[events], max_steps=-1, num_train_epochs=1).train()
    steps = [(name, n + (name == "end")) for n in range(4) for name in ("begin", "before", "end")]
    assert events.seen == [*steps, ("epoch", 4), ("train", 4)]
    losses = [logs for logs in events.logs if "loss" in logs]
    assert len(losses) == 4
    assert {"learning_rate", "epoch", "grad_norm"} <= {*losses[0]}


@contract(
    "transformers",
    used_by="runs/fit.py",
    broken_by=with_value(
        "transformers:TrainerControl.should_training_stop",
        property(lambda _: False, lambda *_: None),
    ),
)
def test_a_callback_can_have_a_checkpoint_saved_and_the_training_stopped(tmp_path: Path) -> None:
    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = control.should_training_stop = True

    training = trainer(tmp_path, callbacks=[Stopping()], max_steps=4)
    training.train()
    assert training.state.global_step == 1
    assert training.state.max_steps == 4
    assert (tmp_path / "checkpoint-1").is_dir()


@contract(
    "transformers",
    used_by="runs/fit.py",
    broken_by=doing_nothing(f"{TRAINER}pop_callback"),
)
def test_losses_are_printed_by_a_callback_that_can_be_taken_away(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    assert isinstance(training.pop_callback(PrinterCallback), PrinterCallback)
    assert training.pop_callback(PrinterCallback) is None
    assert trainer(tmp_path, disable_tqdm=False).pop_callback(PrinterCallback) is None


@contract(
    "transformers",
    used_by="runs/tracking.py",
    broken_by=wrapped(
        "transformers.trainer_callback:CallbackHandler.call_event",
        lambda _: lambda self, event, args, state, control, **kwargs: control,
    ),
)
def test_an_event_is_looked_up_in_the_callback_itself(tmp_path: Path) -> None:
    events, ended = Events(), []
    training = trainer(tmp_path, callbacks=[events])
    assert any(callback is events for callback in training.callback_handler.callbacks)
    events.on_train_end = lambda *_args, **_kwargs: ended.append(1)  # type: ignore[method-assign]
    training.train()
    assert ended == [1]
    assert ("train", 2) not in events.seen


@contract(
    "transformers",
    used_by="runs/tracking.py",
    broken_by=with_value(
        "transformers.integrations.integration_utils:TensorBoardCallback.on_log", None
    ),
)
def test_trackers_are_callbacks_with_on_log_and_on_train_end(breach: bool) -> None:
    assert {"tensorboard", "wandb", "trackio", "mlflow"} <= {*INTEGRATION_TO_CALLBACK}
    for name in ("tensorboard", "wandb", "mlflow"):
        kind = INTEGRATION_TO_CALLBACK[name]
        assert callable(kind.on_log)
        assert callable(kind.on_train_end)


@contract(
    "transformers",
    used_by="runs/tracking.py runs/fit.py",
    broken_by=with_value("transformers:TrainingArguments.to_dict", lambda self: {}),
)
def test_arguments_of_a_subclass_are_told_to_trackers(tmp_path: Path) -> None:
    from dataclasses import dataclass, field

    @dataclass
    class More(TrainingArguments):
        facts: dict[str, Any] = field(default_factory=dict)

    more = More(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    more.facts = {"rank": 4}
    assert more.to_dict()["facts"] == {"rank": 4}


@contract(
    "transformers",
    used_by="runs/fit.py",
    broken_by=with_value("transformers:TrainingArguments.n_gpu", property(lambda self: 3)),
)
def test_the_number_of_gpus_can_be_set_once_it_was_asked_for(tmp_path: Path) -> None:
    made = arguments(tmp_path)
    assert made.n_gpu <= 1
    made._n_gpu = 7
    assert made.n_gpu == 7


@contract(
    "transformers",
    used_by="runs/fit.py",
    broken_by=with_value("transformers:TrainingArguments.get_warmup_steps", lambda self, n: 1),
)
def test_a_warmup_below_one_is_a_share_of_the_steps(tmp_path: Path) -> None:
    assert arguments(tmp_path, warmup_steps=0.25).get_warmup_steps(100) == 25
    assert arguments(tmp_path, warmup_steps=0.0).get_warmup_steps(100) == 0


@contract(
    "transformers",
    used_by="machine/processes.py runs/fit.py",
    broken_by=without("transformers:TrainingArguments.world_size"),
)
def test_arguments_hold_the_state_of_accelerate(tmp_path: Path) -> None:
    from accelerate import PartialState

    made = arguments(tmp_path)
    assert made.device.type == "cpu"
    assert isinstance(made.distributed_state, PartialState)
    assert made.world_size == 1
    assert hasattr(made, "ddp_find_unused_parameters")


def _without_flags(self: Any, init: Any, fields: dict[str, Any]) -> None:
    init(self, **fields)
    self.activation_checkpointing = self.gradient_checkpointing = None


@contract(
    "transformers",
    used_by="reuse/mixins.py base/checkpointing.py",
    broken_by=wrapped(
        "transformers:TrainingArguments.__init__",
        lambda init: lambda self, **fields: _without_flags(self, init, fields),
    ),
)
def test_checkpointing_goes_by_one_of_two_names(tmp_path: Path) -> None:
    made = arguments(tmp_path)
    name = "activation_checkpointing"
    name = name if hasattr(made, name) else "gradient_checkpointing"
    assert getattr(made, name) is False


@contract(
    "transformers",
    used_by="reuse/mixins.py",
    broken_by=with_value(
        "accelerate.data_loader:DataLoaderShard.__iter__", torch.utils.data.DataLoader.__iter__
    ),
)
def test_a_batch_is_collated_before_the_one_before_it_is_trained_on(tmp_path: Path) -> None:
    order: list[str] = []

    def collating(rows: list[dict[str, Any]]) -> Any:
        order.append("collate")
        return collate(rows)

    class Noting(Inside):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            order.append("train")
            return super().compute_loss(*args, **kwargs)

    training = Noting(
        model=tiny_llama(),
        args=arguments(tmp_path, max_steps=3),
        train_dataset=ROWS,
        data_collator=collating,
    )
    training.train()
    assert order[:4] == ["collate", "collate", "train", "collate"]


class Telling(Trainer):
    """Notes what goes through the methods that a run's trainer overrides."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[tuple[float, float, int]] = []
        self.num_epochs = 0

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.norms.append((float(norm), float(self._tr_loss), self._globalstep_last_logged))
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.num_epochs += 1
        super()._run_epoch(*args, **kwargs)


@contract(
    "transformers",
    used_by="runs/trainer.py",
    broken_by=doing_nothing(f"{TRAINER}_get_grad_norm"),
)
def test_the_norm_of_a_step_is_known_when_its_losses_are_added_up_and_no_weight_has_changed(
    tmp_path: Path,
) -> None:
    before: list[dict[str, torch.Tensor]] = []

    class Unchanged(Telling):
        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            now = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            before.append(now)
            return super()._get_grad_norm(*args, **kwargs)

    training = trainer(tmp_path, Unchanged, logging_steps=2, max_steps=3, max_grad_norm=0.0)
    training.data_collator = without_numbers
    start = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.train()
    assert all(torch.equal(start[name], value) for name, value in before[0].items())
    assert any(not torch.equal(start[name], value) for name, value in before[1].items())
    assert all(norm > 0 for norm, _, _ in training.norms)
    (_, first, _), (_, second, _), (_, third, since) = training.norms
    assert 0 < first < second
    assert third < second  # a report was made
    assert since == 2


@contract(
    "transformers",
    used_by="runs/trainer.py",
    broken_by=doing_nothing(f"{TRAINER}_run_epoch"),
)
def test_an_epoch_is_one_call(tmp_path: Path) -> None:
    training = trainer(tmp_path, Telling, max_steps=-1, num_train_epochs=3)
    training.data_collator = without_numbers
    training.train()
    assert (training.num_epochs, training.state.global_step) == (3, 12)


@contract(
    "transformers",
    used_by="runs/trainer.py",
    broken_by=without(f"{TRAINER}_get_train_sampler"),
)
def test_a_trainer_asks_for_the_order_and_tells_it_the_epoch(tmp_path: Path) -> None:
    told: list[int] = []

    class Backwards:
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

        def __len__(self) -> int:
            return len(ROWS)

        def __iter__(self) -> Any:
            return iter(range(len(ROWS) - 1, -1, -1))

    class Ordered(Inside):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            super()._get_train_sampler(*args, **kwargs)
            return Backwards()

    training = trainer(tmp_path, Ordered, max_steps=-1, num_train_epochs=2)
    training.train()
    assert training.numbers == [3, 2, 1, 0] * 2
    assert sorted({*told}) == [0, 1]


@contract(
    "transformers",
    used_by="runs/trainer.py",
    broken_by=doing_nothing(f"{TRAINER}_save_checkpoint"),
)
def test_a_checkpoint_is_saved_below_the_output_directory_of_that_moment(tmp_path: Path) -> None:
    class Elsewhere(Telling):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.args.output_dir = str(tmp_path / "elsewhere")
            super()._save_checkpoint(*args, **kwargs)
            self.args.output_dir = str(tmp_path)

    training = trainer(tmp_path, Elsewhere, save_strategy="steps", save_steps=2)
    training.data_collator = without_numbers
    training.train()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    (checkpoint,) = (tmp_path / "elsewhere").iterdir()
    assert checkpoint.name == "checkpoint-2"
    assert (checkpoint / "trainer_state.json").is_file()


@contract(
    "transformers",
    used_by="runs/trainer.py",
    broken_by=doing_nothing(f"{TRAINER}_finalize_training"),
)
def test_losses_of_a_run_before_can_be_given_at_its_begin(tmp_path: Path) -> None:
    class Given(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            training._tr_loss = torch.full_like(training._tr_loss, 100.0)
            training._total_loss_scalar = 1000.0
            training._globalstep_last_logged = -3
            training._initial_global_step = 0

    events = Events()
    training = trainer(tmp_path, callbacks=[Given(), events], logging_steps=2)
    result = training.train()
    (reported,) = [logs["loss"] for logs in events.logs if "loss" in logs]
    assert 20 < reported < 30  # of five steps
    assert result.training_loss > 500


@contract(
    "torch",
    used_by="runs/trainer.py",
    broken_by=doing_nothing("torch.optim.lr_scheduler:LambdaLR.load_state_dict"),
)
def test_schedules_are_factors_of_a_rate_whose_last_one_can_be_set(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    training.train()
    scheduler = training.lr_scheduler
    assert len(scheduler.lr_lambdas) == len(scheduler.base_lrs) == 2
    assert scheduler.last_epoch == 2
    scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": [0.5, 0.5]})
    assert scheduler.get_last_lr() == [0.5, 0.5]


@contract(
    "transformers",
    used_by="reft/peft_method.py",
    broken_by=doing_nothing(f"{TRAINER}_load_best_model"),
)
def test_best_weights_are_loaded_by_a_method_from_the_checkpoint_of_the_state(
    tmp_path: Path,
) -> None:
    training = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=None)
    training.train()
    last = training.model.lm_head.weight.detach().clone()
    training.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    training._load_best_model()
    assert not training.is_fsdp_enabled
    assert not torch.equal(training.model.lm_head.weight, last)
