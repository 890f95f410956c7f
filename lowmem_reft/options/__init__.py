"""Every option of every subcommand, once: command line, help and Python API are built from these.

A value that breaks its rule is an ``InputError`` as soon as it is given, before anything is loaded.
No torch is imported here, so that ``lowmem-reft --help`` answers at once.
"""

from __future__ import annotations

from lowmem_reft.options.comparing import (
    CompareOptions,
    JudgeOptions,
    MethodsOptions,
    ReportOptions,
    SweepOptions,
    TasksOptions,
)
from lowmem_reft.options.files import (
    ExportPyreftOptions,
    ImportPyreftOptions,
    ReuseCommandOptions,
    ReuseListOptions,
    ReuseRemoveOptions,
)
from lowmem_reft.options.groups import (
    DataOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
)
from lowmem_reft.options.planning import (
    LengthOptions,
    PlanOptions,
    ProfileOptions,
    ShapeOptions,
)
from lowmem_reft.options.running import (
    ChatOptions,
    DecodingOptions,
    EvaluateOptions,
    GenerateOptions,
    HarnessOptions,
    ScoredDataOptions,
    TrainOptions,
)
from lowmem_reft.options.values import (
    OPTIMIZERS,
    SCHEDULES,
    TRACKERS,
    Component,
    ComputeDtype,
    PyreftClass,
    Scoring,
    Storage,
    TaskType,
    Tie,
    Workers,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "TRACKERS",
    "ChatOptions",
    "CompareOptions",
    "Component",
    "ComputeDtype",
    "DataOptions",
    "DecodingOptions",
    "EvaluateOptions",
    "ExportPyreftOptions",
    "GenerateOptions",
    "HarnessOptions",
    "HeldOutOptions",
    "ImportPyreftOptions",
    "JudgeOptions",
    "LengthOptions",
    "MemoryOptions",
    "MethodOptions",
    "MethodsOptions",
    "ModelOptions",
    "OptimOptions",
    "PlanOptions",
    "ProfileOptions",
    "PyreftClass",
    "ReportOptions",
    "ReuseCommandOptions",
    "ReuseListOptions",
    "ReuseOptions",
    "ReuseRemoveOptions",
    "RunOptions",
    "ScoredDataOptions",
    "Scoring",
    "ScoringOptions",
    "ShapeOptions",
    "Storage",
    "SweepOptions",
    "TaskType",
    "TasksOptions",
    "Tie",
    "TrainOptions",
    "Workers",
]
