"""Options of the subcommands for files of pyreft and stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowmem_reft.errors import InputError, check_positive
from lowmem_reft.options.values import PyreftClass, Switches, TaskType, check_directory


@dataclass(frozen=True, kw_only=True)
class ImportPyreftOptions(Switches):
    """Turn a checkpoint of pyreft into an adapter. What it does not hold has to be said here."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What pyreft saved: a directory with intkey_*.bin, or a checkpoint-N of its Trainer."""
    positions: str
    """Prompt tokens that it was trained to edit: f7+l7, f3, l1 or all."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where the adapter goes: a new or an empty directory."""
    tie: Literal["tied", "sides"] | None = None
    """tied: share_weights in pyreft; sides: one intervention for fN, one for lM. Default: by how
    many the directory has per layer."""
    act: Literal["none", "relu", "gelu", "silu", "tanh"] | None = None
    """act_fn that it was trained with, or none; needed where the class has one."""
    intervention: PyreftClass | None = None
    """pyreft's class, where neither config.json nor the tensors tell."""
    model: str | None = None
    """Hub id or directory of the base; default: any whose blocks are at model.layers."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS where a classification head was trained with it."""

    def __post_init__(self) -> None:
        """Check that a directory can be there."""
        check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class ExportPyreftOptions(Switches):
    """Write an adapter as pyreft 0.1.0 saves it, and a README with what pyreft does not store."""

    adapter_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER_DIR")]
    """Adapter directory, or that of the run that trained it."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where the files go: a new or an empty directory."""

    def __post_init__(self) -> None:
        """Check that a directory can be there."""
        check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class ReuseListOptions(Switches):
    """List the stores in a directory: what they hold, their size, when they were last used."""

    reuse_dir: Path
    """Directory of stores: --reuse-dir of train, or reuse in a run's --output-dir."""


@dataclass(frozen=True, kw_only=True)
class ReuseRemoveOptions(Switches):
    """Remove stores; training builds again what it needs. One that is being built is kept."""

    keys: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY ...]")] = ()
    """Names or keys, as ls shows them, or their beginnings."""
    reuse_dir: Path
    """Directory of stores: --reuse-dir of train, or reuse in a run's --output-dir."""
    all: bool = False
    """Remove all stores in the directory."""
    older_than_days: float | None = None
    """Remove only stores, of those named or else of all, last used more than N days ago."""

    def __post_init__(self) -> None:
        """Check that it is said what to remove, and only once."""
        check_positive(older_than_days=self.older_than_days)
        if self.all and self.keys:
            raise InputError(
                f"keys must be left out with all, got {' '.join(self.keys)!r}; leave out one of "
                "the two"
            )
        if not (self.all or self.keys or self.older_than_days):
            raise InputError(
                "keys must name what to remove, got none; give keys, --older-than-days or --all"
            )


@dataclass(frozen=True, kw_only=True)
class ReuseCommandOptions:
    """List or remove what train --reuse has stored."""

    action: (
        Annotated[ReuseListOptions, tyro.conf.subcommand("ls", prefix_name=False)]
        | Annotated[ReuseRemoveOptions, tyro.conf.subcommand("rm", prefix_name=False)]
    )
