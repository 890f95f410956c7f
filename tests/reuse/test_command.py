"""``lowmem-reft reuse``: stores are listed and removed, and nothing that is not a store is."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.options import ReuseCommandOptions, ReuseListOptions, ReuseRemoveOptions
from lowmem_reft.reuse import command
from lowmem_reft.reuse.command import run_reuse
from lowmem_reft.reuse.disk import find_stores, locked
from lowmem_reft.reuse.disk import remove as remove_store
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.store import Record, Store, key_of

FACTS = {"architecture": "LlamaForCausalLM", "num_blocks": 8, "dtype": "bf16", "version": 1}
KEYS = ("aa11" + 20 * "0", "aa22" + 20 * "0", "bb33" + 20 * "0")
DAY_S = 24 * 3600


def make_store(root: Path, key: str, *, kind: str = "trunk", days: float = 0) -> Path:
    """Write two shards of 100 bytes, as ``Store`` does."""
    directory = root / f"{kind}-{key}"
    directory.mkdir(parents=True)
    (directory / "lock").touch()
    for shard in range(2):
        (directory / f"shard-{shard:05d}.bin").write_bytes(bytes(100))
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({**FACTS, "shards": {"0": 1, "1": 2}}))
    last_used_s = time.time() - days * DAY_S
    os.utime(manifest, (last_used_s, last_used_s))
    return directory


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    """Three stores, used now, 10 and 20 days ago, in ``tmp_path``."""
    return [make_store(tmp_path, key, days=10 * n) for n, key in enumerate(KEYS)]


@contextmanager
def locked_by_another_process(directory: Path) -> Iterator[None]:
    code = (
        "import fcntl, sys\n"
        "handle = open(sys.argv[1], 'w')\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.communicate()


def remove(root: Path, *keys: str, **options: Any) -> dict[str, Any]:
    action = ReuseRemoveOptions(keys=keys, reuse_dir=root, **options)
    return run_reuse(ReuseCommandOptions(action=action))


def content(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_torch_is_not_imported() -> None:
    code = "import sys, lowmem_reft.reuse.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stores_are_listed_with_what_they_hold(stores: list[Path], tmp_path: Path) -> None:
    result = run_reuse(ReuseCommandOptions(action=ReuseListOptions(reuse_dir=tmp_path)))
    assert [store["key"] for store in result["stores"]] == list(KEYS)  # last used first
    size = 200 + (stores[0] / "manifest.json").stat().st_size
    first = dict(result["stores"][0])
    assert first.pop("last_used").endswith("+00:00")
    assert first == {
        "name": stores[0].name,
        "key": KEYS[0],
        "architecture": "LlamaForCausalLM",
        "num_blocks": 8,
        "dtype": "bf16",
        "num_shards": 2,
        "size_bytes": size,
        "locked": False,
    }
    assert result["total_bytes"] == 3 * size


def test_what_training_writes_is_a_store(tmp_path: Path) -> None:
    store, tensors = written_store(tmp_path)
    (found,) = find_stores(tmp_path)
    assert found.directory == store.directory
    assert FACTS.items() <= {**found.manifest, "version": 1}.items()
    assert found.num_shards == 1
    files = [path for path in store.directory.iterdir() if path.name != "lock"]
    assert found.num_bytes == sum(path.stat().st_size for path in files)
    assert found.num_bytes > tensors.hidden.nbytes
    with store.locked():
        (found,) = find_stores(tmp_path)
        assert found.locked


def written_store(root: Path) -> tuple[Store, Record]:
    layout = Layout(
        shapes=[Shape(0, 3)],
        hidden_size=4,
        num_cached_layers=0,
        num_kv_heads=1,
        head_dim=4,
        dtype="fp32",
    )
    nothing = torch.empty(0, 1, 0, 4)
    record = Record(torch.randn(3, 4), nothing, nothing)
    store = Store(root, key_of(FACTS), layout, FACTS)
    with store.locked():
        store.write(0, [record])
    return store, record


def test_a_shard_counts_if_it_is_there_and_the_manifest_names_it(
    stores: list[Path], tmp_path: Path
) -> None:
    (stores[0] / "shard-00000.bin").unlink()
    (stores[0] / "shard-00002.bin").touch()
    assert find_stores(tmp_path)[0].num_shards == 1


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"shards": 3}'])
def test_a_store_without_a_sound_manifest_has_no_shards_and_can_be_removed(
    manifest: str | None, tmp_path: Path
) -> None:
    directory = make_store(tmp_path, KEYS[0])
    (directory / "manifest.json").unlink()
    if manifest is not None:
        (directory / "manifest.json").write_text(manifest)
    (found,) = find_stores(tmp_path)
    assert (found.num_shards, found.manifest, found.locked) == (0, {}, False)
    assert remove(tmp_path, "aa11")["removed"] == [directory.name]
    assert not directory.exists()


def test_names_keys_and_unique_beginnings_name_a_store(stores: list[Path], tmp_path: Path) -> None:
    other = make_store(tmp_path, KEYS[0], kind="prefix-cache")
    assert remove(tmp_path, f"trunk-{KEYS[0][:6]}")["removed"] == [stores[0].name]
    assert remove(tmp_path, KEYS[1], "aa22")["removed"] == [stores[1].name]
    assert content(tmp_path) == content_of(tmp_path, stores[2], other)
    assert remove(tmp_path, "aa")["removed"] == [other.name]


def content_of(root: Path, *directories: Path) -> list[str]:
    return sorted(
        name
        for directory in directories
        for name in (
            directory.name,
            *(f"{directory.name}/{path}" for path in content(root / directory.name)),
        )
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cc", "keys must name stores, got 'cc', which is none; lowmem-reft reuse ls lists them"),
        ("aa", "keys must name one store each, got 'aa', which is trunk-aa11.*, trunk-aa22"),
        ("trunk-", "keys must name one store each, got 'trunk-'"),
        ("", "keys must name stores, got ''"),
        ("..", "keys must name stores, got '..'"),
    ],
)
def test_an_unknown_or_ambiguous_key_removes_nothing(
    key: str, message: str, stores: list[Path], tmp_path: Path
) -> None:
    before = content(tmp_path)
    with pytest.raises(InputError, match=message):
        remove(tmp_path, "bb33", key)
    assert content(tmp_path) == before


def test_all_stores_are_removed_and_nothing_else(stores: list[Path], tmp_path: Path) -> None:
    foreign = ["trunk-notakey/manifest.json", "trunk/lock", f"trunk-{30 * 'a'}/lock", "notes.txt"]
    foreign += [f"trunk-{24 * 'e'}/notes.txt", f"trunk-{24 * 'f'}/manifest.json/x", "a.tmp"]
    for name in foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    linked = make_store(tmp_path / "elsewhere", KEYS[0])
    (tmp_path / f"link-{KEYS[0]}").symlink_to(linked)
    names = [store.name for store in stores]
    kept = [name for name in content(tmp_path) if name.split("/")[0] not in names]
    result = remove(tmp_path, all=True)
    assert result["removed"] == names
    assert result["freed_bytes"] > 600
    assert content(tmp_path) == kept


def test_files_in_a_store_that_are_not_its_own_stay(stores: list[Path], tmp_path: Path) -> None:
    (stores[0] / "notes.txt").write_text("mine")
    remove(tmp_path, KEYS[0])
    assert content(stores[0]) == ["notes.txt"]
    assert stores[0] not in [store.directory for store in find_stores(tmp_path)]


def test_stores_that_were_used_lately_are_kept(stores: list[Path], tmp_path: Path) -> None:
    assert remove(tmp_path, KEYS[0], older_than_days=5)["removed"] == []
    assert remove(tmp_path, older_than_days=15)["removed"] == [stores[2].name]
    assert remove(tmp_path, older_than_days=5, all=True)["removed"] == [stores[1].name]
    assert [store.directory for store in find_stores(tmp_path)] == [stores[0]]


def test_a_store_that_is_being_built_is_kept_and_named(
    stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(stores[1])
    with locked_by_another_process(stores[1]):
        assert [store.locked for store in find_stores(tmp_path)] == [False, True, False]
        result = remove(tmp_path, all=True)
    assert result["removed"] == [stores[0].name, stores[2].name]
    assert result["kept"] == [stores[1].name]
    assert f"kept {stores[1].name}: a running process is building it" in capsys.readouterr().out
    assert content(stores[1]) == before
    assert [store.locked for store in find_stores(tmp_path)] == [False]


def test_listing_does_not_look_like_building(stores: list[Path], tmp_path: Path) -> None:
    with (stores[0] / "lock").open() as other_listing:
        fcntl.flock(other_listing, fcntl.LOCK_SH)
        assert not find_stores(tmp_path)[0].locked


def test_a_reader_in_another_process_keeps_what_it_has_mapped(tmp_path: Path) -> None:
    store, record = written_store(tmp_path)
    mapped = store.read(0).hidden
    command = [sys.executable, "-m", "lowmem_reft.cli", "reuse", "rm", "--reuse-dir", str(tmp_path)]
    subprocess.run([*command, "--all"], check=True, capture_output=True)
    assert not store.directory.exists()
    assert torch.equal(mapped, record.hidden)
    assert torch.equal(store.read(0).hidden, record.hidden)


@pytest.mark.parametrize("num_removed", range(5))
def test_a_removal_that_is_killed_leaves_a_store_without_shards_that_can_be_removed(
    num_removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_store(tmp_path, KEYS[0])
    unlink, unlinked = Path.unlink, []

    def unlink_some(path: Path, **options: Any) -> None:
        if len(unlinked) == num_removed:
            raise KeyboardInterrupt
        unlinked.append(path.name)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)
        if num_removed < 4:
            with pytest.raises(KeyboardInterrupt):
                remove_store(directory)
        else:  # all but the directory itself
            patch.setattr(Path, "rmdir", lambda _: None)
            assert remove_store(directory)
    (found,) = find_stores(tmp_path)
    assert found.num_shards == (2 if num_removed == 0 else 0)
    assert remove(tmp_path, all=True)["removed"] == [directory.name]
    assert not directory.exists()


def test_temporary_files_of_killed_builds_are_removed_from_all_stores(
    stores: list[Path], tmp_path: Path
) -> None:
    for store in stores:
        (store / "shard-00002.4711.tmp").touch()
    with locked_by_another_process(stores[1]):
        result = remove(tmp_path, KEYS[0])
    assert result["num_temporary_files"] == 1
    assert not (stores[2] / "shard-00002.4711.tmp").exists()
    assert (stores[1] / "shard-00002.4711.tmp").exists()


def test_a_store_that_another_process_has_removed_meanwhile_is_no_error(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_stores(tmp_path)
    monkeypatch.setattr(command, "find_stores", lambda _: found)
    assert remove_store(stores[0])
    assert remove(tmp_path, all=True)["removed"] == [stores[1].name, stores[2].name]


def test_stores_that_may_not_be_removed_are_an_input_error(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command, "remove", refuse)
    with pytest.raises(InputError, match="reuse_dir must hold stores that may be removed, got"):
        remove(tmp_path, all=True)


@pytest.mark.parametrize("words", [["ls"], ["rm", "--all"]])
def test_a_directory_that_is_not_there_exits_with_2(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reuse", *words, "--reuse-dir", str(tmp_path / "none")]) == 2
    assert "reuse: error: reuse_dir must be an existing directory" in capsys.readouterr().err


def test_keys_beside_all_exit_with_2(stores: list[Path], tmp_path: Path) -> None:
    assert cli.main(["reuse", "rm", "aa11", "--all", "--reuse-dir", str(tmp_path)]) == 2
    assert len(find_stores(tmp_path)) == 3


def test_the_last_line_with_json_is_the_result(
    stores: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ["--reuse-dir", str(tmp_path), "--json"]
    assert cli.main(["reuse", "ls", *where]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [store["name"] for store in listed["stores"]] == [store.name for store in stores]
    assert cli.main(["reuse", "rm", "aa11", "bb33", *where]) == 0
    removed = json.loads(capfd.readouterr().out)
    assert removed["removed"] == [stores[0].name, stores[2].name]


def test_a_person_sees_one_line_for_each_store(
    stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reuse", "ls", "--reuse-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:6] == [stores[0].name, "LlamaForCausalLM", "8", "bf16", "0.0", "2"]
    assert len(lines) == 5
    assert cli.main(["reuse", "rm", "--all", "--reuse-dir", str(tmp_path)]) == 0
    assert f"removed {stores[0].name}\n" in capsys.readouterr().out
    assert cli.main(["reuse", "ls", "--reuse-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no stores\n"


def test_the_former_name_does_the_same_and_says_the_new_one(
    stores: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ["--reuse-dir", str(tmp_path), "--json"]
    assert cli.main(["reuse", "ls", *where]) == 0
    wanted = capfd.readouterr()
    assert cli.main(["cache", "ls", *where]) == 0
    found = capfd.readouterr()
    assert found.out == wanted.out
    assert found.err == "lowmem-reft cache: this is now lowmem-reft reuse; use that name\n"
    assert wanted.err == ""
    assert cli.main(["cache", "rm", "--reuse-dir", str(tmp_path)]) == 2
    assert "keys must name what to remove" in capfd.readouterr().err
    assert cli.main(["cache", "rm", "aa11", *where]) == 0
    assert not stores[0].exists()


@pytest.mark.parametrize("place", ["store", "lock"])
def test_a_store_is_not_built_through_a_link(tmp_path: Path, place: str) -> None:
    mine, store = tmp_path / "mine", tmp_path / "stores" / f"trunk-{KEYS[0]}"
    (mine if place == "store" else store).mkdir(parents=True)
    store.parent.mkdir(exist_ok=True)
    if place == "lock":
        mine.write_text("mine")
    (store if place == "store" else store / "lock").symlink_to(mine)
    with pytest.raises(InputError, match=r"must not (hold links|be a link)"), locked(store):
        pytest.fail("it was built")
    assert list(mine.iterdir()) == [] if place == "store" else mine.read_text() == "mine"
