"""Runs every probe twice: as the library is, and with the library broken."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.machine.contracts.contract import some_tokens, tiny_llama

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "contract(library, used_by, broken_by): a probe of another library, see breaking.py",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let libraries announce what they will give up: a probe asks what holds today."""
    for item in items:
        if HERE in item.path.parents:
            for kind in ("FutureWarning", "DeprecationWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("contract")
    if mark is not None:
        ways = [None, mark.kwargs["broken_by"]]
        metafunc.parametrize("breach", ways, ids=["holds", "broken"], indirect=True)


@pytest.fixture(autouse=True)
def breach(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the library is broken in this test, by now."""
    mark = request.node.get_closest_marker("contract")
    if mark is not None:
        try:
            metadata.version(mark.kwargs["library"])
        except metadata.PackageNotFoundError:
            pytest.skip(f"{mark.kwargs['library']} is not installed")
    break_it = getattr(request, "param", None)
    if break_it is not None:
        break_it(monkeypatch)
    return break_it is not None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    mark = pyfuncitem.get_closest_marker("contract")
    if mark is None:
        return (yield)
    is_broken = pyfuncitem.funcargs["breach"]
    try:
        result = yield
    except (Exception, pytest.fail.Exception) as error:
        if is_broken:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            pyfuncitem.add_report_section("call", "how it failed (pytest -rP)", reason)
            return True
        library = mark.kwargs["library"]
        raise AssertionError(
            f"{library} {metadata.version(library)}: {_sentence(pyfuncitem)} no more "
            f"({type(error).__name__}: {error}); {', '.join(mark.kwargs['used_by'])} rely on it"
        ) from error
    assert not is_broken, "the probe holds although the library is broken: it cannot fail"
    return result


def _sentence(item: Any) -> str:
    return item.originalname.removeprefix("test_").replace("_", " ")


@pytest.fixture
def llama(breach: bool) -> Any:
    """A Llama of two blocks, width 16 and 24 tokens."""
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 5) tokens."""
    return some_tokens()
