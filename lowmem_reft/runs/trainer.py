"""The stock Trainer for a run: it ends at what is not finite, and goes on to the bit.

What the Trainer keeps to itself, and this must know, is named here alone (tests/contracts).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from lowmem_reft.machine import processes
from lowmem_reft.machine.files import check_writable
from lowmem_reft.reuse.mixins import ReuseTrainer
from lowmem_reft.runs import checkpoints
from lowmem_reft.runs.checkpoints import BEST, OWN, Checkpoint
from lowmem_reft.runs.finite import check_weights, not_finite, rows_of
from lowmem_reft.runs.lengths import LikeLengths

if TYPE_CHECKING:
    from lowmem_reft.runs.resolve import Run
    from lowmem_reft.runs.spent import Spent
    from lowmem_reft.runs.validation import BestEpoch

    _Trainer = Trainer
else:
    _Trainer = object


class RunMixin(_Trainer):
    """Adds to a Trainer what a run promises.

    Args:
        run: What is trained.
        run_id: Which run a checkpoint is of.
        begun: Where it goes on from; None begins.
        best: Whose epochs and weights a checkpoint holds.
        spent: Counts the tokens; a checkpoint holds what was spent before it.
    """

    def __init__(
        self,
        *args: Any,
        run: Run,
        run_id: str,
        begun: Checkpoint | None,
        best: BestEpoch | None,
        spent: Spent,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._of_run, self._run_id, self._best, self._spent = run, run_id, best, spent
        self._batches: list[dict[str, Any]] = []
        if begun is not None:
            self.add_callback(_GoOn(self, begun, quiet=run.options.run.quiet))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return what orders the examples of an epoch; see ``transformers.Trainer``."""
        run = self._of_run
        if not run.optim.group_by_length:
            return super()._get_train_sampler(*args, **kwargs)
        lengths = [len(example["input_ids"]) for example in run.examples]
        return LikeLengths(lengths, run.optim.batch_size, run.options.run.seed)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run one batch and remember it until the step ends; see ``transformers.Trainer``."""
        self._spent.count(inputs)
        self._batches.append({**inputs})
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Return the norm of the gradient of a step, before which no weight has changed.

        Every loss since the last report is in ``_tr_loss``, so that one look at both numbers is
        enough. With a scaler the norm of a step that it skips may be infinite.
        """
        trainer: Any = super()  # whose inside has no types
        norm = trainer._get_grad_norm(*args, **kwargs)
        batches, self._batches = self._batches, []
        loss = self._tr_loss.detach()
        both = loss
        if getattr(self.accelerator, "scaler", None) is None:
            both = loss + processes.whole(torch.as_tensor(norm).detach()).to(loss.device)
        if processes.any_of(not bool(torch.isfinite(both))):
            what = "gradient" if bool(torch.isfinite(loss)) else "loss"
            where = f"at step {self.state.global_step + 1} of {self.state.max_steps}"
            run = self._of_run
            rows = sorted({row for batch in batches for row in rows_of(batch, run.examples)})
            raise not_finite(what, where, run, rows)
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the run had taken its last step before it was ended.

        In an epoch of which ``max_steps`` left a part, or after validation rows have ended the run,
        the Trainer would take another step.
        """
        is_over = self.control.should_training_stop
        if self.state.global_step < self.state.max_steps and not is_over:
            trainer: Any = super()
            trainer._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint where nobody looks for it, and give it its name once it is whole."""
        assert self.model is not None
        check_weights(self.model, f"after step {self.state.global_step}", self._of_run)
        arguments: Any = self.args
        directory = arguments.output_dir
        arguments.output_dir = str(Path(directory) / OWN)
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError:
            check_writable(Path(directory))
            raise
        finally:
            arguments.output_dir = directory
        # Every process has written its part once all of them have answered.
        losses = processes.everyones([float(self._tr_loss), float(self._total_loss_scalar)])
        spent = self._spent.of_all()
        if processes.is_main():
            self._put_in_place(Path(directory), losses, spent)
        processes.wait()

    def _put_in_place(
        self, directory: Path, losses: list[list[float]], spent: dict[str, float | None]
    ) -> None:
        step = self.state.global_step
        made = directory / OWN / f"checkpoint-{step}"
        note = {
            "run": self._run_id,
            "step": step,
            "max_steps": self.state.max_steps,
            "losses": losses,
            "since": self._globalstep_last_logged,
            "spent": spent,
            "epochs": [] if self._best is None else self._best.epochs,
        }
        if note["epochs"]:
            shutil.copyfile(directory / BEST, made / BEST)
        checkpoints.put_in_place(made, directory, note)


class RunTrainer(RunMixin, Trainer):
    """The stock Trainer."""


class ReusingRunTrainer(RunMixin, ReuseTrainer):
    """The one whose batches begin behind what is constant."""


class _GoOn(TrainerCallback):
    """Gives a Trainer what its own checkpoints lack."""

    def __init__(self, trainer: Any, begun: Checkpoint, *, quiet: bool) -> None:
        self._trainer, self._begun, self._quiet = trainer, begun, quiet

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Restore the losses that no report has shown, and follow the schedule of this run."""
        trainer, note = self._trainer, self._begun.note
        losses = note["losses"]
        if len(losses) == processes.num_processes():
            pending, total = losses[processes.process_index()]
        else:  # a report shows the mean over all processes
            pending, total = (sum(part) / len(losses) for part in zip(*losses, strict=True))
        trainer._tr_loss = torch.full_like(trainer._tr_loss, pending)
        trainer._total_loss_scalar = total
        trainer._globalstep_last_logged = note["since"]
        trainer._initial_global_step = 0  # the mean loss is that of all steps
        self._follow_schedule(optimizer, lr_scheduler)
        before, now = note["max_steps"], state.max_steps
        if before != now and args.lr_scheduler_type != "constant" and not self._quiet:
            print(
                f"the learning rate follows the schedule of {now} steps from step "
                f"{state.global_step + 1} on; up to there it was that of {before} steps",
                file=sys.stderr,
            )

    def _follow_schedule(self, optimizer: Any, scheduler: Any) -> None:
        """Set the rate of the next step; a checkpoint has that of the schedule it was saved in."""
        factors = getattr(scheduler, "lr_lambdas", None)
        if factors is None:
            return
        pairs = zip(scheduler.base_lrs, factors, strict=True)
        rates = [base * factor(scheduler.last_epoch) for base, factor in pairs]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})
