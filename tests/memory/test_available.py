"""What is free on a machine, and a bound that is never below a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.memory.available import _available_bytes, _left_by_groups, free_card, most_bytes
from lowmem_reft.memory.planner import Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.options import MethodOptions, written


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ({"method": "loreft"}, {}),
        ({"method": "loreft", "positions": "f7+l7", "rank": 64, "tie": "positions"}, {}),
        ({"method": "lora_reft"}, {"device_type": "cpu", "compute_dtype": "fp32"}),
        ({"method": "qlora", "rank": 256}, {"attn_implementation": "eager"}),
        ({"method": "ln_tuning"}, {"storage": "int8"}),
        ({"method": "prefix", "num_virtual_tokens": 64}, {}),
        ({"method": "p_tuning"}, {}),
        ({"method": "full"}, {"storage": "fp32", "compute_dtype": "fp32"}),
        ({"method": "full"}, {"storage": "fp32", "compute_dtype": "fp32", "chunked_loss": False}),
    ],
)
@pytest.mark.parametrize("lengths", [Lengths(seq_len=8), Lengths(seq_len=512, batch_size=8)])
def test_the_bound_is_above_the_prediction(
    config_file: Path, method: dict[str, Any], setting: dict[str, Any], lengths: Lengths
) -> None:
    config = read_config(config_file)
    planned = Setting(method=written.build(MethodOptions, **method), **setting)
    virtual = method.get("num_virtual_tokens", 20 if method["method"] == "p_tuning" else 0)
    bound = most_bytes(config, planned, lengths, num_virtual=virtual)
    needed = Planner(config).needed_bytes(planned, lengths)
    assert needed < bound < 200 * needed


def test_available_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:    3000 kB\n")
    assert _available_bytes(meminfo) == 3000 * 1024
    assert _available_bytes(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpu,memory:/a/b",
            "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_limit_of_a_control_group_above_counts_too(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    own, group = tmp_path / "cgroup", tmp_path / folder
    (group / "b").mkdir(parents=True)
    own.write_text(f"{line}\n")
    (group / "b" / names[0]).write_text("max\n" if "max" in names[0] else f"{2**63 - 4096}\n")
    (group / "b" / names[1]).write_text("100\n")
    (group / names[0]).write_text("5000\n")
    (group / names[1]).write_text("2000\n")
    (group / "memory.stat").write_text(f"anon 1500\n{names[2]} 400\n")
    assert list(_left_by_groups(own, tmp_path)) == [3400]


def test_this_machine_has_some_memory_left() -> None:
    card = free_card(torch.device("cpu"))
    if card is not None:  # elsewhere than on Linux it is not known
        assert card.memory_bytes > 2**20
        assert card.context_bytes == 0
