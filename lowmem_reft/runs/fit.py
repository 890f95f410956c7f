"""The training itself: the stock Trainer with a run's arguments, timed, measured, interruptible."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lowmem_reft.base.attention import within_examples
from lowmem_reft.base.blocks import device_of
from lowmem_reft.base.trust import holding_tensors_alone
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.tokens import Collator
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import synchronize
from lowmem_reft.machine.progress import counter
from lowmem_reft.memory.live import peak_rss_bytes, track
from lowmem_reft.memory.step import optimizer_tensors
from lowmem_reft.methods.virtual_tokens import embeds_virtual_tokens, num_virtual_tokens
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.runs.finite import check_weights
from lowmem_reft.runs.packing import packing
from lowmem_reft.runs.said import Reports
from lowmem_reft.runs.spent import Spent
from lowmem_reft.runs.tracking import RunArguments
from lowmem_reft.runs.trainer import ReusingRunTrainer, RunTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel

    from lowmem_reft.reuse.reuse import Reuse
    from lowmem_reft.runs.checkpoints import Checkpoint
    from lowmem_reft.runs.resolve import Run
    from lowmem_reft.runs.tracking import Trackers
    from lowmem_reft.runs.validation import BestEpoch

logger = logging.getLogger(__name__)

NUM_WARMUP_STEPS = 2
"""Steps that are left out of the timing."""


def fit(
    model: PeftModel,
    run: Run,
    best: BestEpoch | None,
    trackers: Trackers,
    *,
    run_id: str,
    begun: Checkpoint | None,
) -> dict[str, Any]:
    """Train the adapter of ``model`` in place with the stock Trainer.

    ``best`` keeps the weights of the best epoch, where nothing else does; ``trackers`` are told the
    facts of the run and kept open. Checkpoints are of the run ``run_id``, which goes on from
    ``begun``, if there is one.

    Returns:
        The measured part of ``run_training``'s result.

    Raises:
        InputError: A loss, a gradient or a weight is not finite.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    device = device_of(model)
    virtual = num_virtual_tokens(model) if embeds_virtual_tokens(model) else 0
    spent = Spent.since(begun, num_virtual=virtual)
    watch = _StepWatch(device, spent)
    trainable, total = model.get_nb_trainable_parameters()  # of the base before it is sharded
    _say_effective_batch(run)
    collator = Collator(run.tokenizer)
    reuse = _prepare_reuse(model, collator, run)
    collator = packing(model, collator, reuse, run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    callbacks: list[TrainerCallback] = [watch] if best is None else [watch, best]
    reports = Reports(spent, quiet=run.options.run.quiet)
    callbacks.append(reports)
    if best is not None:
        best.spent, best.reports = spent, reports
    parts = {"run": run, "run_id": run_id, "begun": begun, "best": best, "spent": spent}
    trainer = _build_trainer(model, collator, reuse, callbacks, parts)
    trackers.hold(trainer)
    checkpoint = None if begun is None else str(begun.directory)
    with ExitStack() as stack:
        stack.enter_context(holding_tensors_alone("resume", checkpoint))
        stack.enter_context(_stopping_at_a_step(watch))
        stack.enter_context(reports)
        _dequantize(stack, reuse, run)
        if collator.pack is not None:
            stack.enter_context(within_examples())
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        check_weights(model, "after the last step", run)
        peak = _cuda_peak(device)
        with _signals_waiting():
            peak = {**_peak_of_a_step(trainer, collator, run.examples, reuse), **peak}
    step, max_steps = trainer.state.global_step, trainer.state.max_steps
    if best is not None and best.is_over and step < max_steps:
        reports.say(
            f"stopped after step {step} of {max_steps}: the last {run.options.choosing.patience} "
            "scores were no better than the best"
        )
    if watch.interrupted and step < max_steps:
        raise KeyboardInterrupt(
            f"a checkpoint of step {step} is in {run.directory}; add --resume to go on"
        )
    logs = trainer.state.log_history
    return {
        # transformers joins the losses of the processes at reports alone.
        "train_loss": statistics.fmean(processes.everyones(outcome.training_loss)),
        "num_trainable_params": trainable,
        "trainable_percent": 100 * trainable / total,
        "num_steps": step,
        "stopped_early": step < max_steps,
        **_speed(watch, run),
        "packing": "off" if collator.pack is None else "on",
        "real_percent": _real_percent(spent, reports),
        **peak,
        "rss_bytes": peak_rss_bytes(),
        "loss_history": [[entry["step"], entry["loss"]] for entry in logs if "loss" in entry],
        "num_examples": len(run.examples),
        "num_cut_prompts": run.encoded.num_cut_prompts,
        "num_cut_tokens": run.encoded.num_cut_tokens,
        "reuse": "off" if reuse is None else reuse.mode,
        "store_bytes": 0 if reuse is None else reuse.layout.total_bytes,
        "build_time_s": 0.0 if reuse is None else reuse.build_time_s,
        **({} if best is None else best.restore()),
    }


def _build_trainer(
    model: PeftModel,
    collator: Collator,
    reuse: Reuse | None,
    callbacks: list[TrainerCallback],
    parts: dict[str, Any],
) -> Trainer:
    """The stock Trainer, or the one whose batches begin behind what is constant.

    ``parts`` are what a run adds to it.
    """
    run = parts["run"]
    arguments = _training_arguments(run)
    if _edits_in_every_batch(model.peft_config["default"], run.examples):
        arguments.ddp_find_unused_parameters = False  # there are none
    processes.shard_on_cpu(arguments)
    kind: Any = RunTrainer if reuse is None else partial(ReusingRunTrainer, reuse=reuse)
    trainer: Trainer = kind(
        model=model,
        args=arguments,
        callbacks=callbacks,
        train_dataset=run.examples,
        data_collator=collator,
        **parts,
    )
    trainer.remove_callback(PrinterCallback)  # which prints dictionaries
    return trainer


def _training_arguments(run: Run) -> TrainingArguments:
    optim, options = run.optim, run.options.run
    assert optim.lr is not None
    arguments = RunArguments(
        output_dir=str(options.output_dir),
        num_train_epochs=run.num_epochs,
        max_steps=optim.max_steps,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.schedule,
        # A float below 1 is a share of the steps; 1 would be one step.
        warmup_steps=min(optim.warmup_ratio, math.nextafter(1.0, 0.0)),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optim=optim.optim,
        seed=options.seed,
        data_seed=options.seed,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=1,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number is not to look like one
        report_to=[name for name in options.report_to.split(",") if name != "none"],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=run.options.model.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The Trainer would split batches over all GPUs that it sees (DataParallel); the base is on one.
    # Asking for the number first makes it final.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _edits_in_every_batch(config: Any, examples: Sequence[dict[str, Any]]) -> bool:
    """Return whether each parameter is sure to have a gradient in each batch of each process.

    ReFT's do if no prompt is too short for all of a layer's interventions. Of other methods, which
    may reach into experts that no token is sent to, it is not known.
    """
    if not isinstance(config, ReftConfig):
        return False
    needed = config.num_groups - config.where.response  # a token for each; an answer always has one
    return all(_num_prompt_tokens(example) >= needed for example in examples)


def _num_prompt_tokens(example: dict[str, Any]) -> int:
    labels = example["labels"]
    if not isinstance(labels, list):  # of a classifier, all of whose tokens are prompt
        return len(example["input_ids"])
    return next(i for i, label in enumerate(labels) if label != IGNORED_LABEL)


def _say_effective_batch(run: Run) -> None:
    """Say how several processes share the examples of an optimizer step."""
    optim, number = run.optim, processes.num_processes()
    if number > 1 and processes.is_main():
        line = (
            f"effective batch: {optim.batch_size} examples x {optim.gradient_accumulation} "
            f"accumulation x {number} processes = {processes.effective_batch(optim)}"
        )
        repeated = -len(run.examples) % (optim.batch_size * number)
        if repeated:
            line += f"; each epoch ends with {repeated} repeated rows, so that all have as many"
        print(line, file=sys.stderr)


def _prepare_reuse(model: PeftModel, collator: Collator, run: Run) -> Reuse | None:
    """Store what is constant, or say why nothing is."""
    optim, quiet = run.optim, run.options.run.quiet
    why: list[str] = []
    with counter("computing what is constant", quiet=quiet) as report:
        reuse = prepare(
            model,
            run.examples,
            collator,
            run.options.reuse,
            root=run.reuse_dir,
            batch_size=optim.batch_size,
            epochs=run.num_epochs,
            report=report,
            told=why.append,
        )
    said = why if reuse is None else [reuse.describe()]
    if said and not quiet:
        print(f"reuse: {'off, ' if reuse is None else ''}{said[0]}", file=sys.stderr)
    return reuse


def _dequantize(stack: ExitStack, reuse: Reuse | None, run: Run) -> None:
    """Keep the upper blocks dequantized until the stack closes, if they are to be, and say so."""
    asked = run.options.reuse.dequantize_upper
    if asked == "auto":
        batch_size = run.optim.batch_size
        if reuse is None or processes.shards_model() or not reuse.may_stay_dequantized(batch_size):
            return
        num_bytes = stack.enter_context(reuse.dequantized())
        if not run.options.run.quiet and processes.is_main():
            print(
                f"upper blocks stay dequantized: {num_bytes / 2**20:,.1f} MiB, less than the "
                "reused step spares (--dequantize-upper off)",
                file=sys.stderr,
            )
    elif asked == "on" and (reuse is None or not stack.enter_context(reuse.dequantized())):
        why = "nothing is reused" if reuse is None else "the base has no 4-bit layers"
        logger.warning("dequantize_upper has no effect: %s", why)


def _speed(watch: _StepWatch, run: Run) -> dict[str, Any]:
    """How long steps took, and how many tokens of how many examples they had."""
    num_examples, per_step = len(run.examples), processes.effective_batch(run.optim)
    tokens = sum(len(example["input_ids"]) for example in run.examples)
    step_time = watch.step_time_s()
    tokens_of_a_step = tokens / num_examples * min(per_step, num_examples)
    return {
        "num_processes": processes.num_processes(),
        "effective_batch": per_step,
        "step_time_s": step_time,
        "tokens_per_s": tokens_of_a_step / step_time if step_time else None,
        "train_time_s": watch.spent.time_s,
    }


def _real_percent(spent: Spent, reports: Reports) -> float | None:
    """Say and return which share of the tokens that were computed is of rows; None: not known."""
    found = spent.of_all()
    computed, real = found["num_computed_tokens"], found["num_real_tokens"]
    if not computed or real is None:
        return None
    percent = 100 * real / computed
    reports.say(f"{percent:.0f} % of {computed:,.0f} computed tokens were those of rows")
    return percent


def _cuda_peak(device: torch.device) -> dict[str, Any]:
    """The most that was allocated and reserved on the device during the run; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _peak_of_a_step(
    trainer: Trainer, collator: Collator, examples: list[dict[str, Any]], reuse: Reuse | None
) -> dict[str, Any]:
    """Measure one more step on the longest examples: live storages, and what they are for.

    It changes nothing: its gradients are dropped and no optimizer step is taken.
    """
    if processes.shards_model():  # weights come and go, and cannot be told from activations
        return {"peak_bytes": None, "reserved_bytes": None, "breakdown_bytes": None}
    model: Any = trainer.model
    device = device_of(model)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    longest = order[: trainer.args.per_device_train_batch_size]
    batch = collator([examples[index] for index in longest])
    model.train()
    model.zero_grad()
    with track(device.type, model=model) as memory:
        assert trainer.optimizer is not None
        for tensor in optimizer_tensors(trainer.optimizer):
            memory.add(tensor, "optimizer")
        if reuse is not None:
            loss = reuse.loss(longest)
        else:
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        del loss
    model.zero_grad()
    memory.end()
    return {
        "peak_bytes": memory.peak_bytes,
        "reserved_bytes": None,
        "breakdown_bytes": memory.peak.breakdown_bytes,
    }


@dataclass
class _StepWatch(TrainerCallback):
    """Times optimizer steps; stops the run at the end of a step after Ctrl-C."""

    device: torch.device
    spent: Spent
    interrupted: bool = False
    _started: float = 0.0
    _steps: list[float] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize(self.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock and, after Ctrl-C, the run."""
        synchronize(self.device)
        self._steps.append(time.perf_counter() - self._started)
        self.spent.time_s += self._steps[-1]
        # All processes stop after the same step, whichever heard of it first.
        self.interrupted = processes.any_of(self.interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def step_time_s(self) -> float | None:
        """Return the median seconds per optimizer step, without the first ones."""
        steps = self._steps[NUM_WARMUP_STEPS:] or self._steps
        return statistics.median(steps) if steps else None


@contextmanager
def _stopping_at_a_step(watch: _StepWatch) -> Iterator[None]:
    """Let the first Ctrl-C end the run after the current step; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(_number: int, _frame: Any) -> None:
        watch.interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for a moment.

    Where storages are counted they would mostly arrive in a finalizer, in which Python prints an
    exception and forgets it. To block them in this thread is not enough: another one takes them,
    and Python still runs the handler in this one.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in that one
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: one that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for arrived in came:
            signal.raise_signal(arrived)
