"""Every option of every subcommand, once: command line, help and Python API are built from these.

A value that breaks its rule is an ``InputError`` as soon as it is given, before anything is loaded.
No torch is imported here, so that ``lowmem-reft --help`` answers at once.
"""

from __future__ import annotations

from lowmem_reft.options.comparing import BaseOptions as BaseOptions
from lowmem_reft.options.comparing import CompareOptions as CompareOptions
from lowmem_reft.options.comparing import JudgeOptions as JudgeOptions
from lowmem_reft.options.comparing import MatrixOptions as MatrixOptions
from lowmem_reft.options.comparing import MethodsOptions as MethodsOptions
from lowmem_reft.options.comparing import ReportOptions as ReportOptions
from lowmem_reft.options.comparing import RowsOptions as RowsOptions
from lowmem_reft.options.comparing import ScoredOptions as ScoredOptions
from lowmem_reft.options.comparing import SearchOptions as SearchOptions
from lowmem_reft.options.comparing import SweepOptions as SweepOptions
from lowmem_reft.options.comparing import TasksOptions as TasksOptions
from lowmem_reft.options.files import ExportPyreftOptions as ExportPyreftOptions
from lowmem_reft.options.files import ImportPyreftOptions as ImportPyreftOptions
from lowmem_reft.options.files import ReuseCommandOptions as ReuseCommandOptions
from lowmem_reft.options.files import ReuseListOptions as ReuseListOptions
from lowmem_reft.options.files import ReuseRemoveOptions as ReuseRemoveOptions
from lowmem_reft.options.groups import DataOptions as DataOptions
from lowmem_reft.options.groups import EditOptions as EditOptions
from lowmem_reft.options.groups import ForgettingOptions as ForgettingOptions
from lowmem_reft.options.groups import HeldOutOptions as HeldOutOptions
from lowmem_reft.options.groups import MemoryOptions as MemoryOptions
from lowmem_reft.options.groups import MethodOptions as MethodOptions
from lowmem_reft.options.groups import ModelOptions as ModelOptions
from lowmem_reft.options.groups import OptimOptions as OptimOptions
from lowmem_reft.options.groups import PromptOptions as PromptOptions
from lowmem_reft.options.groups import ReuseOptions as ReuseOptions
from lowmem_reft.options.groups import RunOptions as RunOptions
from lowmem_reft.options.groups import ScoringOptions as ScoringOptions
from lowmem_reft.options.planning import LengthOptions as LengthOptions
from lowmem_reft.options.planning import PlannedRowsOptions as PlannedRowsOptions
from lowmem_reft.options.planning import PlanOptions as PlanOptions
from lowmem_reft.options.planning import ProfileOptions as ProfileOptions
from lowmem_reft.options.planning import ShapeOptions as ShapeOptions
from lowmem_reft.options.planning import StepOptions as StepOptions
from lowmem_reft.options.planning import StoreOptions as StoreOptions
from lowmem_reft.options.planning import TableOptions as TableOptions
from lowmem_reft.options.running import AskingOptions as AskingOptions
from lowmem_reft.options.running import BesideOptions as BesideOptions
from lowmem_reft.options.running import ChatOptions as ChatOptions
from lowmem_reft.options.running import ChoosingOptions as ChoosingOptions
from lowmem_reft.options.running import DecodingOptions as DecodingOptions
from lowmem_reft.options.running import EvaluateOptions as EvaluateOptions
from lowmem_reft.options.running import GenerateOptions as GenerateOptions
from lowmem_reft.options.running import HarnessOptions as HarnessOptions
from lowmem_reft.options.running import HubOptions as HubOptions
from lowmem_reft.options.running import ScoredDataOptions as ScoredDataOptions
from lowmem_reft.options.running import ScoredPromptOptions as ScoredPromptOptions
from lowmem_reft.options.running import ShownDataOptions as ShownDataOptions
from lowmem_reft.options.running import ShowOptions as ShowOptions
from lowmem_reft.options.running import TrainOptions as TrainOptions
from lowmem_reft.options.running import UiOptions as UiOptions
from lowmem_reft.options.values import CHAT_TEMPLATE as CHAT_TEMPLATE
from lowmem_reft.options.values import OPTIMIZERS as OPTIMIZERS
from lowmem_reft.options.values import SCHEDULES as SCHEDULES
from lowmem_reft.options.values import TRACKERS as TRACKERS
from lowmem_reft.options.values import Component as Component
from lowmem_reft.options.values import ComputeDtype as ComputeDtype
from lowmem_reft.options.values import Joint as Joint
from lowmem_reft.options.values import LongRows as LongRows
from lowmem_reft.options.values import PyreftClass as PyreftClass
from lowmem_reft.options.values import Scoring as Scoring
from lowmem_reft.options.values import Storage as Storage
from lowmem_reft.options.values import TaskType as TaskType
from lowmem_reft.options.values import Tie as Tie
from lowmem_reft.options.values import Turns as Turns
from lowmem_reft.options.values import Workers as Workers
