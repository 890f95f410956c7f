"""The memory that is free for a run, and a bound of what a run takes that costs no prediction."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.base.heads import from_config, set_labels
from lowmem_reft.memory.cards import CONTEXT_BYTES
from lowmem_reft.memory.planner import Card
from lowmem_reft.methods.table import all_options, find_method

if TYPE_CHECKING:
    from lowmem_reft.memory.predict import Lengths, Setting

_NO_LIMIT = 2**60
"""What a control group says where there is no limit is above this."""


def free_card(device: torch.device) -> Card | None:
    """Return what is free on a device, as a card to fit into; None where it is not known.

    On CUDA what torch holds and does not use counts as free; asking makes the driver's context, so
    that half of `CONTEXT_BYTES` is left to come: kernels and handles. On a CPU it is what Linux
    calls available, or what the limit of a control group (container, service) leaves of it;
    elsewhere it is not known.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Card(name=str(device), memory_bytes=free + held, context_bytes=CONTEXT_BYTES // 2)
    available = _available_bytes(Path("/proc/meminfo"))
    if available is None:
        return None
    left = [available, *_left_by_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return Card(name="this computer", memory_bytes=max(0, min(left)), context_bytes=0)


def _available_bytes(meminfo: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(meminfo), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _left_by_groups(own: Path, root: Path) -> Iterator[int]:
    """Yield what each limited control group of this process leaves: of version 2, then of 1."""
    for line in _text(own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / name.lstrip("/")
        # In a container the name is that of the outside, and the group's files are at the top.
        for directory in (group, *group.parents):
            if directory == top or top in directory.parents:
                left = _left(directory, *files)
                if left is not None:
                    yield left


def _left(directory: Path, limit: str, usage: str, reclaimed: str) -> int | None:
    """Return what a group's limit leaves, with the pages of files that would make way."""
    most, used = _text(directory / limit).strip(), _text(directory / usage).strip()
    if not most.isdecimal() or not used.isdecimal() or int(most) > _NO_LIMIT:
        return None
    statistics = _text(directory / "memory.stat")
    cached = re.search(rf"^{reclaimed} (\d+)$", statistics, re.MULTILINE)
    return int(most) - int(used) + (0 if cached is None else int(cached[1]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def most_bytes(config: Any, setting: Setting, lengths: Lengths, *, num_virtual: int = 0) -> int:
    """Return more than a training needs: a bound in place of a prediction, in milliseconds.

    With M matrices of the base (expert by expert) of n rows and m columns, N parameters, T tokens
    of a forward pass and S of an example, all in fp32: the base loaded twice, 8·N; what is trained
    with its gradients, states and copies, 24·r·(n + m) for each matrix (24·N where the base's own
    weights are); four copies of every matrix's input and output, 16·T·(n + m); eight matrices of
    attention for each head of each block, 32·T·S, as if none were left out; and half as much again.
    """
    sizes, num_parameters, num_heads = _sizes(config, setting)
    tokens = lengths.batch_size * (lengths.seq_len + num_virtual)
    width = sum(count * (rows + columns) for count, rows, columns in sizes)
    trained = 24 * (_rank(setting) + num_virtual) * width
    if find_method(setting.method.method).family in ("weights", "ln_tuning", "ia3"):
        trained = max(trained, 24 * num_parameters)
    attention = 32 * tokens * (lengths.seq_len + num_virtual) * num_heads
    return int(1.5 * (8 * num_parameters + trained + 16 * tokens * width + attention))


def _sizes(config: Any, setting: Setting) -> tuple[list[tuple[int, int, int]], int, int]:
    """Return count, rows and columns of matrices, the parameters, and heads times blocks."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    set_labels(config, setting.task_type, setting.num_labels)
    with torch.device("meta"):
        model = from_config(config, setting.task_type)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    matrices = [(math.prod(s[:-2]), s[-2], s[-1]) for s in shapes if len(s) > 1]
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    return matrices, sum(map(math.prod, shapes)), heads * int(text.num_hidden_layers)


def _rank(setting: Setting) -> int:
    """Return no less than the width of what is trained beside each matrix: ranks and groups."""
    options = all_options(setting.method)
    ranks = [options.get(name) or 0 for name in ("rank", "lora_rank", "num_virtual_tokens")]
    groups = 1 + sum(map(int, re.findall(r"\d+", str(options.get("positions") or ""))))
    return int(max(128, groups * (16 + sum(ranks))))
