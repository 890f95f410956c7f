"""train --push-to-hub: what can fail is tried before the training; nothing is lost after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.options import HubOptions, TrainOptions
from lowmem_reft.runs import publish
from lowmem_reft.runs.train import run_training
from small_runs import small_run, with_optim, with_run


class Hub:
    """Stands in for HfApi: keeps what it is asked, and fails where it is told to."""

    asked: list[tuple[str, dict[str, Any]]]
    fails_in = ""

    def create_repo(self, repo_id: str, **chosen: Any) -> None:
        self._ask("create_repo", repo_id=repo_id, **chosen)

    def upload_folder(self, **chosen: Any) -> Any:
        files = {path.name for path in Path(chosen["folder_path"]).iterdir()}
        self._ask("upload_folder", **{**chosen, "files": files})
        return SimpleNamespace(repo_url="https://hub/me/adapter")

    def _ask(self, what: str, **chosen: Any) -> None:
        self.asked.append((what, chosen))
        if what == self.fails_in:
            raise OSError("403 Forbidden")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    class Own(Hub):
        asked = []  # noqa: RUF012 - of one test

    monkeypatch.setattr(publish, "HfApi", Own)
    monkeypatch.setattr(publish, "get_token", lambda: "hf_token")
    monkeypatch.setattr(publish.constants, "HF_HUB_OFFLINE", False)
    return Own


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    run = with_optim(small_run(tiny_llama_dir, tmp_path), max_steps=1)
    return replace(run, hub=HubOptions(push_to_hub="me/adapter"))


def test_the_adapter_and_its_card_are_pushed_to_a_private_repository(
    hub: type[Hub], options: TrainOptions
) -> None:
    result = run_training(options)
    (made, of_made), (pushed, of_pushed) = hub.asked
    assert (made, pushed) == ("create_repo", "upload_folder")
    assert of_made == {"repo_id": "me/adapter", "private": True, "exist_ok": True}
    assert of_pushed["repo_id"] == "me/adapter"
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert wanted <= of_pushed["files"]
    assert result["hub_url"] == "https://hub/me/adapter"


def test_a_repository_that_is_made_is_public_where_that_is_asked_for(
    hub: type[Hub], options: TrainOptions
) -> None:
    chosen = HubOptions(push_to_hub="me/adapter", hub_private_repo=False)
    run_training(replace(options, hub=chosen))
    assert hub.asked[0][1] == {"repo_id": "me/adapter", "private": False, "exist_ok": True}


def test_a_repository_is_not_made_public_without_being_named() -> None:
    with pytest.raises(InputError, match="hub_private_repo must come with push_to_hub, got False"):
        HubOptions(hub_private_repo=False)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("a/b/c", {}, r"push_to_hub must be the id of a repository, got 'a/b/c'; write NAME or US"),
        ("me/adapter", {"get_token": lambda: None}, r"must come with a token .* hf auth login"),
        ("me/adapter", {"constants.HF_HUB_OFFLINE": True}, r"got 'me/adapter' with HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_rows_are_read(
    hub: type[Hub],
    options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    told: str,
) -> None:
    for what, value in changes.items():
        monkeypatch.setattr(f"lowmem_reft.runs.publish.{what}", value)
    monkeypatch.setattr("lowmem_reft.runs.train.resolve", lambda _: pytest.fail("read"))
    with pytest.raises(InputError, match=told):
        run_training(replace(options, hub=HubOptions(push_to_hub=name)))
    assert hub.asked == []


def test_a_repository_that_cannot_be_made_ends_the_run_before_its_base_is_loaded(
    hub: type[Hub], options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_reft.runs.train._attach", lambda _: pytest.fail("loaded"))
    hub.fails_in = "create_repo"
    with pytest.raises(InputError, match=r"may write to, got 'me/adapter'; .* \(403 Forbidden\)"):
        run_training(options)


def test_an_upload_that_fails_leaves_the_adapter_and_says_how_to_do_it_by_hand(
    hub: type[Hub], options: TrainOptions
) -> None:
    hub.fails_in = "upload_folder"
    adapter = options.run.output_dir / "adapter"
    with pytest.raises(InputError, match=f"403 Forbidden.*hf upload me/adapter {adapter}"):
        run_training(options)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (options.run.output_dir / "result.json").is_file()


def test_a_dry_run_makes_no_repository(hub: type[Hub], options: TrainOptions) -> None:
    run_training(with_run(options, dry_run=True))
    assert hub.asked == []
