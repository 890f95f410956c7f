"""Versions that were not tested are said in one line, and what breaks with them is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

import lowmem_reft
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions, versions
from lowmem_reft.machine.contracts.contract import BrokenContractError, Contract, apart, tiny_llama

BOUNDS = [
    "transformers>=5.17,<5.25",
    "peft>=0.21,<0.22",
    "torch>=2.11",
    "matplotlib>=3.9",
    "lm-eval>=0.4.13,<0.5; extra == 'eval'",
    "trl>=1.16,<1.17; (python_version >= '3.11') and extra == 'dev'",
    "trl>=1.16,<1.17; extra == 'trl'",
]
TESTED = {"transformers": "5.24.0", "peft": "0.21.2", "torch": "2.13.0+cpu", "trl": "1.16.0"}


class Installed:
    """Stands for what is installed; forges versions and counts the probes that run."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = dict(TESTED)
        self.requirements: list[str] | None = list(BOUNDS)
        self.ran: list[str] = []

    def version(self, name: str) -> str:
        if name == "lowmem-reft":
            return lowmem_reft.__version__
        try:
            return self.versions[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    def requires(self, name: str) -> list[str] | None:
        assert name == "lowmem-reft"
        return self.requirements

    def probe(self, sentence: str, *libraries: str, found: str | None = None) -> Contract:
        def check() -> None:
            self.ran.append(sentence)
            if found is not None:
                raise BrokenContractError(found)

        return Contract(
            sentence=sentence, libraries=libraries, leaned_on_by=("tuner.py",), check=check
        )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    fake = Installed()
    monkeypatch.setattr(versions.metadata, "version", fake.version)
    monkeypatch.setattr(versions.metadata, "requires", fake.requires)
    probes = (
        fake.probe("blocks are blocks", "transformers"),
        fake.probe("hooks are hooks", "peft", "transformers"),
        fake.probe("sums are sums", "torch"),
        fake.probe("scores are scores", "lm_eval"),
        fake.probe("trainers train", "trl"),
    )
    monkeypatch.setattr(versions, "CONTRACTS", probes)
    versions._check.cache_clear()
    yield fake
    versions._check.cache_clear()


def test_inside_the_tested_range_nothing_runs_and_nothing_is_said(installed: Installed) -> None:
    check_versions()
    check_versions("eval")
    assert installed.ran == []


@pytest.mark.parametrize(
    ("version", "is_inside"),
    [
        ("5.17.0", True),
        ("5.24.9", True),
        ("5.24.0.dev0", True),
        ("5.25.0.dev0", False),
        ("5.25.0", False),
        ("5.16.4", False),
    ],
)
def test_versions_are_compared_as_pip_compares_them(
    installed: Installed, version: str, is_inside: bool
) -> None:
    installed.versions["transformers"] = version
    untested = versions.find_untested()
    assert [each.installed for each in untested] == ([] if is_inside else [version])


def test_a_version_outside_is_said_once_and_its_contracts_run(installed: Installed) -> None:
    installed.versions["transformers"] = "5.25.0"
    with pytest.warns(UserWarning, match="transformers") as said:
        check_versions()
    assert len(said) == 1
    message = str(said[0].message)
    assert "\n" not in message
    assert "transformers>=5.17,<5.25" in message
    assert "transformers 5.25.0" in message
    assert lowmem_reft.__version__ in message
    assert installed.ran == ["blocks are blocks", "hooks are hooks"]
    check_versions()
    assert len(installed.ran) == 2


def test_several_versions_outside_are_said_in_one_line(installed: Installed) -> None:
    installed.versions |= {"transformers": "6.0", "peft": "0.22.0", "torch": "2.10.0"}
    with pytest.warns(UserWarning, match="peft 0.22.0") as said:
        check_versions()
    assert len(said) == 1
    assert installed.ran == ["blocks are blocks", "hooks are hooks", "sums are sums"]


def test_a_broken_contract_is_refused_with_library_versions_and_remedy(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.versions["transformers"] = "5.25.0"
    broken = installed.probe("hooks are hooks", "peft", "transformers", found="no hooks\nat all")
    monkeypatch.setattr(versions, "CONTRACTS", (broken,))
    for _ in range(2):  # whoever asks again is refused again
        with (
            pytest.warns(UserWarning, match="transformers 5.25.0"),
            pytest.raises(InputError) as refused,
        ):
            check_versions()
    message = str(refused.value)
    for words in (
        "transformers must be >=5.17,<5.25 for lowmem-reft",
        lowmem_reft.__version__,
        "got 5.25.0",
        "hooks are hooks (BrokenContractError: no hooks)",
        "pip install 'transformers>=5.17,<5.25'",
    ):
        assert words in message
    assert "\n" not in message


def test_what_a_probe_meets_is_a_broken_contract_but_for_a_lack_of_memory(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.versions["transformers"] = "5.25.0"

    def contract(error: Exception) -> Contract:
        def check() -> None:
            raise error

        return Contract(sentence="a", libraries=("transformers",), leaned_on_by=(), check=check)

    for error, kind in (
        (AttributeError("no such name"), InputError),
        (MemoryError(), MemoryError),
    ):
        monkeypatch.setattr(versions, "CONTRACTS", (contract(error),))
        with pytest.warns(UserWarning, match="5.25.0"), pytest.raises(kind):
            check_versions()


def test_an_optional_library_is_checked_where_it_is_asked_for(installed: Installed) -> None:
    installed.versions["lm-eval"] = "0.5.0"
    check_versions()
    assert installed.ran == []
    with pytest.warns(UserWarning, match="lm_eval 0.5.0"):
        check_versions("eval")
    assert installed.ran == ["scores are scores"]


def test_trl_is_checked_once_it_was_imported(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.versions["trl"] = "1.17.0"
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    check_versions()
    assert installed.ran == []
    monkeypatch.setitem(sys.modules, "trl", sys)
    with pytest.warns(UserWarning, match="trl 1.17.0"):
        check_versions()
    assert installed.ran == ["trainers train"]


def test_what_is_not_installed_is_not_checked(installed: Installed) -> None:
    del installed.versions["peft"]
    check_versions()
    check_versions("eval")
    assert installed.ran == []


@pytest.mark.parametrize("requirements", [None, []])
def test_a_tree_without_bounds_has_nothing_to_check(
    installed: Installed, requirements: list[str] | None
) -> None:
    installed.requirements = requirements
    installed.versions["transformers"] = "99.0"
    check_versions()
    assert installed.ran == []


def test_a_tree_that_was_never_installed_has_nothing_to_check(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "requires", missing)
    installed.versions["transformers"] = "99.0"
    check_versions()
    assert installed.ran == []


def test_the_real_contracts_hold_with_a_forged_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    forged = {"transformers": "99.0", "peft": "99.0", "bitsandbytes": "99.0", "accelerate": "99.0"}
    monkeypatch.setattr(versions.metadata, "version", lambda name: forged.get(name) or real(name))
    monkeypatch.setattr(versions.metadata, "requires", lambda _: [f"{name}<98" for name in forged])
    versions._check.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    try:
        with pytest.warns(UserWarning, match=r"transformers 99\.0, peft 99\.0"):
            check_versions()
    finally:
        versions._check.cache_clear()
    assert torch.equal(torch.rand(2), expected), "probes drew from the caller's random numbers"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_real_contracts_refuse_a_sabotaged_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    real = metadata.version
    monkeypatch.setattr(
        versions.metadata, "version", lambda name: "0.30" if name == "peft" else real(name)
    )
    monkeypatch.setattr(versions.metadata, "requires", lambda _: ["peft>=0.21,<0.22"])
    monkeypatch.setattr(BaseTuner, "inject_adapter", lambda *_, **__: None)
    versions._check.cache_clear()
    with pytest.raises(InputError, match=r"peft must be >=0\.21,<0\.22 .* got 0\.30, .* hooks"):
        check_versions()
    versions._check.cache_clear()


def test_a_probe_leaves_modes_and_warnings_as_they_are() -> None:
    before = list(warnings.filters)
    with torch.device("meta"), torch.no_grad():
        with apart():
            assert torch.zeros(1).device.type == "cpu"
            assert torch.is_grad_enabled()
            assert not tiny_llama().lm_head.weight.is_meta
        assert torch.zeros(1).is_meta
        assert not torch.is_grad_enabled()
    assert warnings.filters == before


def test_checking_imports_no_torch_and_takes_no_time_again() -> None:
    code = """
import sys, time
from lowmem_reft.machine.contracts import check_versions
check_versions()
assert "torch" not in sys.modules, "torch was imported"
start = time.perf_counter()
for _ in range(1000):
    check_versions()
seconds = (time.perf_counter() - start) / 1000
assert seconds < 1e-4, seconds
"""
    done: Any = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
