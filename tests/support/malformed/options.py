"""Options with values that they must not have."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lowmem_reft.cli import _COMMANDS
from lowmem_reft.options import written
from lowmem_reft.options.files import ReuseListOptions, ReuseRemoveOptions
from malformed.commands import valid
from malformed.fault import Fault, Verdict
from malformed.world import World

KINDS_OF_OPTIONS: dict[str, Any] = {
    **{n: command.options for n, command in _COMMANDS.items() if n not in ("reuse", "ui")},
    "reuse ls": ReuseListOptions,
    "reuse rm": ReuseRemoveOptions,
}
"""By subcommand; ui has tests of its own: it serves until it is ended."""
POSITIONAL = {"sources", "first", "second", "directory", "adapter_dir", "keys"}
NOT_WHOLE = (
    "x",
    "",
    " ",
    "1.5",
    "nan",
    "inf",
    "1e3",
    "0x10",
    "9" * 5000,
    "1 2",
    "None",
    "--",
    "٣x",
)
NO_NUMBER = ("x", "", " ", "nan", "-nan", "1,5", "1e", "None", "--", "0x1p3", "1 2")
NOT_FINITE = ("inf", "-inf", "1e999", "-1e999", "Infinity")
NAMES = ("unknown", "", " ", "\n", "ünknown", "-", ",", "a,b", "None", "../..", "%s", "x" * 500)
NAMED = {
    *("metric", "extractor", "device", "method", "act", "schedule", "optim", "report_to"),
    *("layers", "positions", "methods", "seeds", "gpu", "space", "lm_eval", "tasks", "task"),
    *("train_task", "budget_reference", "attn_implementation", "extra_metrics"),
}
"""Options that take names or a small language."""
SWITCHES = ("x", "maybe", "1", "yes", "")
SPECIAL: dict[str, tuple[str, ...]] = {
    "layers": ("-1", "9999", "1;;2", "0;0", "upper:0", "upper:2", "upper:nan", "upper:", "1..3"),
    "positions": ("f0", "l0", "f-1", "f1+f2", "l1+f1", "f1.5", "all+l1", "f", "+", "f1+", "fl"),
    "template": ("no prompt in it", "{prompt", "{other}", "{prompt} {other}", "", "{}"),
    "answer_pattern": ("(", "[", "(a)(b", "*", "(?P<x>", ""),
    "seeds": ("-1", "0,0", "1.5", "x", "0,,1", str(2**32), "9" * 5000),
    "lr_search": ("1", "1,1.0", "0,1", "-1,1", "1,x", "1,nan", "1,inf", "", ",", "1,,2", "1;2"),
    "device": ("cuda:99", "cuda:-1", "gpu", "cpu:x", "tpu", "meta", "mps", "CUDA:0", "disk"),
    "space": (
        "rank",
        "rank=",
        "rank=x",
        "rank=0",
        "zzz=1",
        "rank=4..2",
        "rank=1,1",
        "lr=0..1:log",
        "rank=1,2 rank=3",
        "lr=nan,1",
        "lr=-1,1",
        "lr=1..inf",
        "rank=1..9:0",
        "lora.rank=2",
        "=",
        "rank=" + "9" * 5000 + ",1",
        "dropout=0..2:0.5",
        "optim=x,y",
        "rank=1,2,",
        "rank=1e3,2",
    ),
    "methods": (
        "lora[",
        "lora]",
        "lora[rank]",
        "lora[rank=x]",
        "lora[rank=0]",
        "lora,lora",
        "all,x",
        "lora[zzz=1]",
        "loreft[lr=nan]",
        "loreft[lr=-1]",
        "lora[rank=1,rank=2]",
        "lora[rank=9e9]",
        "loreft,lora[equal=memory]",
    ),
    "extra_metrics": ("accuracy,zzz", "accuracy,", ",,", "accuracy,accuracy "),
    "target_modules": ("zzz", ",", "q_proj,zzz", ""),
    "optim": ("adamw", "galore_adamw", "adamw_torch_npu_fused", "sgd,sgd"),
    "schedule": ("cosine_with_min_lr", "reduce_lr_on_plateau", "warmup_stable_decay"),
    "report_to": ("wandbb", "tensorboard,zzz", "none,zzz"),
    "max_steps": ("0", "-2", "-1.0"),
    "seed": ("-1", str(2**32), str(10**30)),
    "num_fewshot": ("-1",),
    "older_than_days": ("0", "-1"),
    "top_p": ("0", "1.1", "-0.5"),
    "warmup_ratio": ("1.1", "-0.1"),
    "dropout": ("1", "1.0", "-0.1", "2"),
    "workers": ("0", "-1", "Ray", "1.5"),
    "tasks": ("boolq,boolq", "zzz,boolq", "boolq,,rte"),
    "stop": ("",),
}
"""Values that the options in question refuse, whatever the command."""
FREE = {"temperature", "weight_decay", "num_fewshot", "seed", "max_steps", "older_than_days"}
"""Numbers that may be 0, or have rules of their own."""
UNUSED = {
    *("split", "validation_split", "eval_split", "command", "prompt", "system", "adapter"),
    *("data", "model", "input", "output", "keys", "target_modules", "template", "answer_pattern"),
}
"""Texts that mean what they say; some have their own values above or their own kinds."""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _leaf(hint: Any) -> Any:
    """Return the type without None, or the first of several."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _wrong(name: str, hint: Any) -> list[str]:
    """Return values that the option must not have."""
    kind, found = _leaf(hint), list(SPECIAL.get(name, ()))
    if kind is int:
        found += NOT_WHOLE
        if name not in FREE:
            found += ["0", "-1", "-9999999999"]
    elif kind is float:
        found += [*NO_NUMBER, *NOT_FINITE, "-1"]
        if name not in FREE and name not in ("warmup_ratio", "dropout"):
            found += ["0", "-0.0"]
    elif get_origin(kind) is Literal:
        found += NAMES
        found += [str(choice).swapcase() for choice in get_args(kind)]
    elif name in NAMED:
        found += NAMES
    return found


def _all() -> list[tuple[str, str, Any]]:
    found = []
    for command, kind in KINDS_OF_OPTIONS.items():
        for name, hint in written.types(kind).items():
            if name not in POSITIONAL and (_leaf(hint) is bool or _wrong(name, hint)):
                found.append((command, name, hint))
    return found


ALL = _all()
_QUIET = {("train", "layers"): ("layers",)}


def _without(argv: list[str], flag: str) -> list[str]:
    """Leave out an option and its value."""
    if flag not in argv:
        return argv
    place = argv.index(flag)
    return argv[:place] + argv[place + 2 :]


def _named(name: str) -> tuple[str, ...]:
    return (name, _flag(name))


def value(random: Random, world: World) -> Fault:
    """An option has a value of another kind, or one that it must not have."""
    command, name, hint = random.choice(ALL)
    argv = valid(world, command)
    if _leaf(hint) is bool:
        word = random.choice(SWITCHES)
        more = [f"{_flag(name)}={word}"]
        argv = [word for word in argv if word != _flag(name)]
    else:
        word = random.choice(_wrong(name, hint))
        more = [f"{_flag(name)}={word}"] if word.startswith("-") else [_flag(name), word]
        argv = _without(argv, _flag(name))
    names: tuple[str, ...] = (*_named(name), word) if _leaf(hint) is bool else _named(name)
    verdict: Verdict = "refused"
    if (command, name, word) in TAKEN or (name, word) in TAKEN or _unread(command, name):
        verdict = "any"
    if word.strip() and len(word) < 100:
        names = (*names, f"got {word!r}")
    if name in ("methods", "budget_reference"):
        names = (*names, "method", "rank", "overrides")
    if (command, name) == ("plan", "methods"):
        argv = [*argv, "--table", "--memory-gib", "4"]
    if name in ("act", "init", "tie", "component") and command in ("train", "plan", "profile"):
        names = (*names, "method")
    if name in ("task", "tasks", "train_task", "lm_eval"):
        argv = _without(_without(_without(argv, "--data"), "--eval-data"), "--validation-data")
    if name == "train_task":
        argv += ["--tasks", "boolq"]
    if name == "budget_reference":
        argv += ["--equal", "params"]
    if name == "metric" and command == "sweep":
        names = (*names, "scoring")
    return Fault(
        what=f"{command} {_flag(name)} {word!r:.40}",
        argv=[*argv, *more],
        verdict=verdict,
        names=(*names, "Unrecognized"),
        stdin="what is it?\n",
    )


TAKEN: set[tuple[str, ...]] = {
    ("device", ""),
    ("report_to", "-"),
    ("plan", "device", "CUDA:0"),
    ("compare", "device", "cuda:99"),  # the cells say so
    ("sweep", "device", "cuda:99"),
    ("template", "{prompt} {other}"),  # prompts of code have braces
    ("extra_metrics", "accuracy,accuracy "),
}
"""Values that are right after all, or in some command."""


def _unread(command: str, name: str) -> bool:
    """Whether the command does not look at the option as it is called here."""
    return name in ("include_path",) or (command == "evaluate" and name == "num_fewshot")


PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("train", ("--resident", "upper", "--reuse", "off"), ("reuse", "resident")),
    ("train", ("--extractor", "number", "--answer-pattern", "(a)"), ("extractor",)),
    ("train", ("--method", "lora", "--positions", "l1"), ("positions",)),
    ("train", ("--method", "lora", "--layers", "0;99"), ("layers",)),
    ("train", ("--method", "loreft", "--alpha", "2"), ("alpha",)),
    ("train", ("--method", "loreft", "--target-modules", "q_proj"), ("target_modules",)),
    ("train", ("--method", "loreft", "--num-virtual-tokens", "3"), ("num_virtual_tokens",)),
    ("train", ("--method", "prefix", "--rank", "3"), ("rank",)),
    ("train", ("--task-type", "SEQ_CLS"), ("task_type", "data")),
    ("train", ("--positions", "all", "--tie", "positions"), ("tie", "positions")),
    ("train", ("--offload-activations",), ("offload_activations", "activation_checkpointing")),
    ("train", ("--resume",), ("resume",)),
    ("train", ("--rank", "1000000"), ("rank",)),
    ("train", ("--device", "cuda"), ("device",)),
    ("train", ("--compute-dtype", "fp16"), ("compute_dtype",)),
    ("train", ("--memory-gib", "0.000001"), ("memory_gib",)),
    ("train", ("--storage", "bf16", "--compute-dtype", "fp32", "--method", "zzz"), ("method",)),
    ("evaluate", ("--lm-eval", "boolq"), ("lm_eval", "data")),
    ("evaluate", ("--num-fewshot", "3"), ("num_fewshot",)),
    ("evaluate", ("--include-path", "/nowhere"), ("include_path",)),
    ("evaluate", ("--dequantize-upper", "on"), ("dequantize_upper",)),
    ("evaluate", ("--resident", "upper"), ("resident",)),
    ("evaluate", ("--adapter", "/nowhere"), ("adapter",)),
    ("evaluate", ("--examples", "/nowhere.jsonl"), ("examples",)),
    ("evaluate", ("--task-type", "SEQ_CLS"), ("task_type", "choices", "row", "label")),
    ("generate", ("--input", "/nowhere.jsonl"), ("input",)),
    ("generate", ("--top-p", "0.5"), ("top_p",)),
    ("generate", ("--adapter", "/nowhere"), ("adapter",)),
    ("generate", ("--adapter", ","), ("adapter",)),
    ("generate", ("--adapter", "__base__,__base__"), ("adapter",)),
    ("generate", ("--task-type", "SEQ_CLS"), ("task_type",)),
    ("chat", ("--task-type", "SEQ_CLS"), ("task_type",)),
    ("chat", ("--adapter", "/nowhere"), ("adapter",)),
    ("chat", ("--top-p", "0.5"), ("top_p",)),
    ("compare", ("--tasks", "boolq"), ("tasks", "data")),
    ("compare", ("--train-task", "math10k"), ("train_task",)),
    ("compare", ("--budget-reference", "lora"), ("budget_reference",)),
    (
        "compare",
        ("--equal", "params", "--budget-reference", "ia3x"),
        ("budget_reference", "methods"),
    ),
    ("compare", ("--lr-search", "1,2"), ("lr_search",)),
    ("compare", ("--methods", "lora[equal=time]"), ("overrides",)),
    ("compare", ("--methods", "lora[equal=params]"), ("budget_reference",)),
    ("compare", ("--few-shot", "2", "--task-type", "SEQ_CLS"), ("few_shot",)),
    ("compare", ("--few-shot", "999999"), ("few_shot",)),
    ("compare", ("--workers", "ray", "--methods", "zzz"), ("method",)),
    ("sweep", ("--task", "boolq"), ("task", "data")),
    ("sweep", ("--trials", "3", "--sampler", "grid"), ("trials",)),
    ("sweep", ("--sampler", "random"), ("trials",)),
    ("sweep", ("--methods", "lora[rank=2]"), ("rank",)),
    ("judge", ("--model", "m"), ("command", "model")),
    ("plan", ("--method", "lora", "--positions", "l1"), ("positions",)),
    ("plan", ("--response-len", "99999"), ("response_len",)),
    ("plan", ("--gpu", "a10", "--memory-gib", "4"), ("gpu", "memory_gib")),
    ("plan", ("--fit",), ("fit", "gpu", "memory_gib")),
    ("plan", ("--optim", "adafactor"), ("optim",)),
    ("plan", ("--rank", "1000000"), ("rank",)),
    ("plan", ("--resident", "upper"), ("resident", "reuse")),
    ("profile", ("--rank", "1000000"), ("rank",)),
    ("profile", ("--response-len", "99999"), ("response_len",)),
    ("reuse rm", ("key",), ("keys",)),
    ("reuse ls", ("--all",), ("--all",)),
    ("import-pyreft", ("--intervention", "DireftIntervention"), ("intervention",)),
    ("methods", ("--data-dir", "x"), ("--data-dir",)),
    ("tasks", ("--data-dir", "/nowhere"), ("data_dir",)),
)


def pair(random: Random, world: World) -> Fault:
    """Options contradict each other, or one needs another."""
    command, more, names = random.choice(PAIRS)
    argv = valid(world, command)
    for word in more:
        argv = _without(argv, word) if word.startswith("--") else argv
    return Fault(
        what=f"{command} {' '.join(more)}",
        argv=[*argv, *more],
        verdict="refused",
        names=[name for known in names for name in _named(known)],
        stdin="what is it?\n",
    )


def words(random: Random, world: World) -> Fault:
    """The words of a command line are no command line."""
    command = random.choice(list(KINDS_OF_OPTIONS))
    argv = valid(world, command)
    names: list[str]
    what = random.choice(["typo", "no value", "word", "missing", "command", "prefix", "twice"])
    flags = [word for word in argv if word.startswith("--") and word not in ("--json", "--quiet")]
    if what == "typo" or not flags:
        argv, names = [*argv, "--zzz", "3"], ["--zzz"]
    elif what == "no value":
        flag = random.choice([flag for flag in flags if flag != "--all"] or ["--reuse-dir"])
        argv, names = [*_without(argv, flag), flag], [flag]
    elif what == "word":
        argv, names = [*argv, "zzz"], ["zzz"]
        if command in ("report", "reuse rm"):
            names += ["keys", "sources"]
    elif what == "missing":
        required = {"--model", "--output-dir", "--data", "--reuse-dir", "--space", "--positions"}
        if command in ("compare", "sweep", "plan", "profile"):
            required &= {"--space"} if command == "sweep" else {"--zzz"}
            required |= {"--model"} if command == "profile" else set()
        gone = [flag for flag in flags if flag in required]
        if gone:
            flag = random.choice(gone)
            argv, names = _without(argv, flag), [flag, flag[2:]]
        else:
            argv, names = [*argv, "--zzz"], ["--zzz"]
    elif what == "command":
        argv, names = [f"{command.split()[0]}x", *argv[1:]], [f"{command.split()[0]}x"]
    elif what == "prefix":
        flag = random.choice(flags)
        argv, names = [*_without(argv, flag), flag[:-1] + "zz", "3"], [flag[:-1], flag[2:]]
    else:
        argv, names = [argv[0], *argv], [argv[0], "Unrecognized"]
        if command == "report":
            names += ["sources"]
        if command in ("judge", "import-pyreft", "export-pyreft"):
            names += ["Unrecognized", "directory", "adapter"]
    return Fault(what=f"{command}: {what}", argv=argv, verdict="refused", names=names, stdin="x\n")


HUGE: tuple[tuple[str, tuple[str, ...], Verdict], ...] = (
    ("evaluate", ("--batch-size", str(10**9)), "same"),
    ("evaluate", ("--max-length", str(10**9)), "sound"),
    ("evaluate", ("--limit", str(10**12)), "same"),
    ("evaluate", ("--limit", str(10**25)), "sound"),
    ("evaluate", ("--max-new-tokens", str(10**9)), "sound"),
    ("generate", ("--batch-size", str(10**15)), "same"),
    ("generate", ("--max-length", str(10**9)), "sound"),
    ("generate", ("--stop", "zzzzzz"), "same"),
    ("generate", ("--max-new-tokens", str(10**9)), "refused"),
    ("generate", ("--max-new-tokens", str(10**30)), "refused"),
    ("generate", ("--temperature", "1e300"), "any"),
    ("generate", ("--temperature", "1e-300"), "any"),
    ("generate", ("--seed", str(2**32 - 1)), "same"),
    ("train", ("--lr", "1e300"), "refused"),
    ("train", ("--weight-decay", "1e300"), "refused"),
    ("train", ("--gradient-accumulation", str(10**9)), "any"),
    ("train", ("--batch-size", str(10**9)), "any"),
    ("train", ("--logging-steps", str(10**15)), "any"),
    ("train", ("--save-steps", str(10**15)), "any"),
    ("train", ("--max-length", str(10**12)), "any"),
    ("train", ("--epochs", "1e-300"), "any"),
    ("train", ("--rank", str(10**12)), "refused"),
    ("train", ("--method", "lora", "--rank", str(10**12)), "refused"),
    ("train", ("--method", "lora", "--alpha", "1e300"), "refused"),
    ("train", ("--positions", f"f{10**12}"), "any"),
    ("train", ("--positions", f"l{10**30}"), "any"),
    ("train", ("--method", "prompt", "--num-virtual-tokens", str(10**12)), "refused"),
    ("train", ("--method", "bottleneck", "--rank", str(10**12)), "refused"),
    ("plan", ("--rank", str(10**12)), "refused"),
    ("plan", ("--batch-size", str(10**12)), "any"),
    ("plan", ("--seq-len", str(10**9)), "any"),
    ("plan", ("--max-new-tokens", str(10**9)), "any"),
    ("plan", ("--num-examples", str(10**15)), "any"),
    ("plan", ("--memory-gib", "1e300"), "any"),
    ("compare", ("--seeds", str(2**32)), "refused"),
    ("compare", ("--limit", str(10**15)), "any"),
    ("sweep", ("--trials", str(10**15), "--sampler", "grid"), "refused"),
    ("sweep", ("--seed", str(10**20)), "refused"),
    ("reuse rm", ("--older-than-days", "1e300"), "any"),
)


def huge(random: Random, world: World) -> Fault:
    """A number is far too large, or large and of no matter."""
    command, more, verdict = random.choice(HUGE)
    argv = valid(world, command)
    expected = None
    if verdict in ("same", "sound"):
        expected = world.result(argv)
    for word in more:
        argv = _without(argv, word) if word.startswith("--") else argv
    return Fault(
        what=f"{command} {' '.join(more):.60}",
        argv=[*argv, *more],
        verdict=verdict,
        valid=expected,
        names=[name for word in more for name in _named(word.lstrip("-").replace("-", "_"))],
        stdin="x\n",
    )


def paths(random: Random, world: World) -> Fault:
    """An option that names something to read names something else."""
    directory = world.fresh()
    (directory / "file").write_bytes(random.randbytes(20))
    (directory / "empty").mkdir()
    (directory / "loop").symlink_to(directory / "loop")
    wrong = {
        "nothing": directory / "nothing",
        "a file": directory / "file",
        "an empty directory": directory / "empty",
        "below a file": directory / "file" / "x",
        "a circle of links": directory / "loop",
        "a long name": directory / ("n" * 300),
        "an empty text": Path(),
        "a device": Path("/dev/null"),
    }
    what = random.choice(list(wrong))
    text = "" if what == "an empty text" else str(wrong[what])
    command, option = random.choice(
        [
            *(("train", "--model"), ("evaluate", "--model"), ("plan", "--model")),
            *(("generate", "--model"), ("generate", "--adapter"), ("evaluate", "--adapter")),
            *(("chat", "--model"), ("chat", "--adapter"), ("generate", "--input")),
            *(("compare", "--model"), ("compare", "--data"), ("sweep", "--model")),
            *(("profile", "--model"), ("tasks", "--data-dir"), ("reuse ls", "--reuse-dir")),
            *(("reuse rm", "--reuse-dir"), ("judge", "--model"), ("judge", "--command")),
            *(("report", ""), ("judge", ""), ("import-pyreft", ""), ("export-pyreft", "")),
        ]
    )
    argv, verdict = valid(world, command), "refused"
    if option:
        argv = _without(argv, option)
        if option == "--input":
            argv = _without(argv, "--prompt")
        if command == "judge":
            argv = _without(argv, "--command")
        argv += [option, text]
    else:
        argv[1] = text
    if (option in ("--data-dir", "--reuse-dir") and what == "an empty directory") or not text:
        verdict = "any"  # an empty text is the directory at hand
    return Fault(
        what=f"{command} {option or 'argument'} is {what}",
        argv=argv,
        verdict=verdict,  # type: ignore[arg-type]
        names=[
            *_named(option[2:].replace("-", "_")),
            text,
            wrong[what].name,
            {"judge": "data"}.get(command, "zzz"),
        ],
        stdin="x\n",
    )


KINDS = {
    "options: values": (value, 700),
    "options: pairs": (pair, 120),
    "options: words": (words, 120),
    "options: huge": (huge, 80),
    "options: paths": (paths, 160),
}
