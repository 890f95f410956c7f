"""A child of ``benchmarks.real_rows``: trains as ``lowmem-reft train`` does, or with TRL.

Run by it: ``python -m benchmarks.real_rows_child '{"specs": [...]}'``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers
from transformers import Trainer, TrainerCallback

from benchmarks.common import peak_rss_bytes, reset_peak_rss, serve
from lowmem_reft.data.packing import is_of_rows
from lowmem_reft.memory.measure import measure
from lowmem_reft.options import TrainOptions, written

if TYPE_CHECKING:
    from collections.abc import Iterator

LOREFT, REUSED = "LoReFT r8, train", "LoReFT r8, upper half, trunk reused, train"
OWN_QLORA = "QLoRA r8, train"
PADDED, PACKED = "QLoRA r8, TRL padded", "QLoRA r8, TRL packed"
ACCUMULATED = "QLoRA r8, TRL packed, a row at a time"
TRL = (PADDED, PACKED, ACCUMULATED)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one child process trains, on rows of one kind."""

    method: str
    model: str
    name: str
    """The kind of rows."""
    directory: str
    """Where the rows are, and runs may write."""
    template: str
    batch_size: int
    max_length: int
    packed_rows: int
    """Packed rows of an optimizer step of TRL."""
    checkpointing: bool

    def file(self, *, longest: bool) -> Path:
        """Rows with prompt and response, none longer than max_length: all, or a longest batch."""
        return Path(self.directory) / f"{self.name}{'-longest' if longest else ''}.jsonl"

    def place(self, number: int) -> Path:
        """Return where the run of that number writes."""
        return Path(self.directory) / f"{self.name}, {self.method}, {number}"

    def options(self, number: int) -> TrainOptions:
        """Return the run of ``lowmem-reft train``: one pass over the rows, or the longest first."""
        chosen: dict[str, Any] = {"method": "loreft", "reuse": "off"}
        if self.method == REUSED:
            chosen |= {"layers": "upper:0.5", "reuse": "trunk"}
        elif self.method != LOREFT:
            chosen["method"] = "qlora"
        return written.build(
            TrainOptions,
            model=self.model,
            data=str(self.file(longest=number == 1)),
            output_dir=self.place(number),
            storage="nf4",
            compute_dtype="fp32",
            device="cpu",
            template=self.template,
            max_length=self.max_length,
            rank=8,
            epochs=1,
            batch_size=self.batch_size,
            packing="auto",
            activation_checkpointing=self.checkpointing,
            logging_steps=1,
            no_fit=True,
            quiet=True,
            **chosen,
        )


@dataclass
class Watch(TrainerCallback):  # type: ignore[misc]
    """Times the steps of whichever Trainer trains, and counts its tokens."""

    began: float = 0.0
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    num_real: int = 0
    num_computed: int = 0
    num_rows: int = 0
    measuring: bool = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step began."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the step ended."""
        if self.measuring:
            gc.collect()  # which is off while memory is measured
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def count(self, batch: dict[str, Any]) -> None:
        """Count the tokens of a batch, padded or packed."""
        real = is_of_rows(batch)
        self.num_computed += real.numel()
        self.num_real += int(real.sum())
        self.num_rows += len(real)

    def figures(self) -> dict[str, Any]:
        """Return what was seen from the beginning of the first step to the end of the last."""
        return {
            "seconds": self.ends[-1] - self.began,
            "num_steps": len(self.ends),
            "num_real_tokens": self.num_real,
            "num_computed_tokens": self.num_computed,
            "real_share": self.num_real / self.num_computed,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "peak_rss_bytes": peak_rss_bytes(),
            **({} if self.peak_bytes is None else {"peak_over_weights_bytes": self.peak_bytes}),
        }


@contextmanager
def watched(*, measuring: bool) -> Iterator[Watch]:
    """Watch the stock Trainer, and all that is built on it; memory only if it is to be measured."""
    watch = Watch(measuring=measuring)
    step, train, known = (
        Trainer.training_step,
        Trainer.train,
        transformers.trainer.DEFAULT_CALLBACKS,
    )

    def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        watch.count(inputs)
        return step(trainer, model, inputs, *args, **kwargs)

    def trained(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        outcome: list[Any] = []

        def run() -> None:
            outcome.append(train(trainer, *args, **kwargs))

        if measuring:
            watch.peak_bytes = measure(torch.device("cpu"), run).allocated_bytes
        else:
            run()
        return outcome[0]

    with ExitStack() as stack:
        for place, name, value in (
            (Trainer, "training_step", counted),
            (Trainer, "train", trained),
            (transformers.trainer, "DEFAULT_CALLBACKS", [*known, watch]),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield watch


def prepare(specs: Sequence[Spec]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Return what a child answers: all its runs so far, by kind of rows.

    The first run of each kind is on the longest rows: memory is measured, and time does not count.
    """
    training = {
        spec.name: trl_training(spec) if spec.method in TRL else own_training(spec)
        for spec in specs
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in training}

    def sample() -> dict[str, Any]:
        for name, train in training.items():
            gc.collect()
            reset_peak_rss()
            number = len(runs[name]) + 1
            with watched(measuring=number == 1) as watch:
                facts = train(number)
            runs[name].append({**watch.figures(), **facts})
        return {"seconds": sum(of[-1]["seconds"] for of in runs.values()), "runs": runs}

    return {}, sample


def own_training(spec: Spec) -> Callable[[int], dict[str, Any]]:
    """Return what trains as ``lowmem-reft train`` does."""
    from lowmem_reft.runs import fit
    from lowmem_reft.runs.train import run_training

    def train(number: int) -> dict[str, Any]:
        # It would measure one more step after the training.
        with mock.patch.object(fit, "_peak_of_a_step", return_value={"peak_bytes": None}):
            result = run_training(spec.options(number))
        names = ("num_trainable_params", "packing", "reuse", "build_time_s")
        return {name: result[name] for name in names}

    return train


def trl_training(spec: Spec) -> Callable[[int], dict[str, Any]]:
    """Return what trains with TRL, on the tokens and the stored base that ``train`` has."""
    os.environ.setdefault("CI", "1")  # keeps TRL from reporting its use
    import trl
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig

    from lowmem_reft.base.loading import load_base
    from lowmem_reft.runs.resolve import resolve

    disable_progress_bars()
    size, passes = spec.batch_size, 1
    if spec.method == PACKED:
        size = spec.packed_rows
    elif spec.method == ACCUMULATED:
        size, passes = 1, spec.packed_rows

    def train(number: int) -> dict[str, Any]:
        run = resolve(spec.options(number))
        optim = run.optim
        arguments = trl.SFTConfig(
            output_dir=str(spec.place(number)),
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            packing=spec.method != PADDED,
            max_length=spec.max_length,
            learning_rate=optim.lr,
            optim=optim.optim,
            max_grad_norm=optim.max_grad_norm,
            gradient_checkpointing=spec.checkpointing,
            bf16=False,
            use_cpu=True,
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        torch.manual_seed(0)
        base = load_base(spec.model, storage="nf4", compute_dtype="fp32", device="cpu")
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        with heard() as said:
            trainer: Any = trl.SFTTrainer(
                base,
                args=arguments,
                train_dataset=Dataset.from_list(run.examples),
                processing_class=run.tokenizer,
                peft_config=config,
            )
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            for parameter in trained:  # which TRL casts to bf16; the base computes in fp32
                parameter.data = parameter.data.float()
            trainer.train()
        return {
            "num_trainable_params": sum(parameter.numel() for parameter in trained),
            "packing": "off" if spec.method == PADDED else "on",
            "said": sorted(said),
        }

    return train


@contextmanager
def heard() -> Iterator[set[str]]:
    """Collect what TRL, PEFT and transformers warn of."""
    said: set[str] = set()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.add(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("trl", "peft", "transformers")]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            yield said
        said.update(str(warning.message) for warning in warned)
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


if __name__ == "__main__":
    serve(lambda: prepare([Spec(**spec) for spec in json.loads(sys.argv[1])["specs"]]))
