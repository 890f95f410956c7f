"""Faults: kills, full disks, flipped bytes, other processes, edited data.

Nothing wrong is ever trained on, and nothing is built again that need not be.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from lowmem_reft.base.loading import load_base, load_tokenizer
from lowmem_reft.data.embedded import model_dir, task_files
from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
)
from lowmem_reft.reuse import layout
from lowmem_reft.reuse.disk import NoRoomError, remove
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.reuse.store import CorruptShardError, Store
from lowmem_reft.runs.train import run_training
from tiny_models import adapted, make_examples, make_model, reft, saved, stacked

# Python 3.12 warns of every fork of a process that has threads; the children start none.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

# A fork is ready at once. Where torch has CUDA, its backward passes cannot be forked.
CONTEXT: Any = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")

NUM_KILLS = 20
PATIENCE_S = 40
"""How long a process may seem to hang."""
SHARD_BYTES = 1
"""Every example has a shard of its own."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "SHARD_BYTES", SHARD_BYTES)
    yield
    for process in multiprocessing.active_children():  # of a test that failed
        process.kill()


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved") / "model")


@dataclass(frozen=True)
class Job:
    """What a process builds and trains; equal jobs share a model where processes are forked."""

    saved_model: Path | None = None
    """Checkpoint of which only upper blocks are loaded; None: the whole base of random weights."""
    positions: str = "l1"
    num_examples: int = 5
    num_lower: int = 3
    """Blocks that are not loaded."""

    @property
    def model(self) -> Any:
        return _model(self.saved_model, self.positions, self.num_lower)

    @property
    def examples(self) -> list[dict[str, Any]]:
        return make_examples(self.num_examples)

    def reuse(self, root: Path) -> Reuse:
        return Reuse(self.model, self.examples, root)


@cache
def _model(saved_model: Path | None, positions: str, num_lower: int) -> Any:
    layers = f"{num_lower - 1};4"
    if saved_model is None:
        return make_model(peft_config=reft(positions, layers))
    base = load_base(
        saved_model,
        storage="fp32",
        compute_dtype="fp32",
        device="cpu",
        resident="upper",
        first_resident=num_lower,
    )
    return adapted(base, layers, positions)


@pytest.fixture(params=["all", "upper"])
def job(request: pytest.FixtureRequest, saved_model: Path) -> Job:
    return Job(saved_model if request.param == "upper" else None)


@pytest.fixture
def upper(saved_model: Path) -> Job:
    return Job(saved_model)


class Child:
    """A function that runs in another process and is told, first, how to talk to this one."""

    def __init__(self, function: Callable[..., Any], job: Job, *args: Any) -> None:
        job.model  # noqa: B018 - forks have it, too
        self.connection, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_call, args=(function, other, (job, *args)), daemon=True
        )
        self.process.start()
        other.close()

    def wait_for(self, message: str) -> None:
        assert self.connection.poll(PATIENCE_S)
        assert self.connection.recv() == message

    def say(self, message: str) -> None:
        self.connection.send(message)

    def kill(self) -> None:
        self.process.kill()
        self._join(-signal.SIGKILL)

    def expect_killed(self) -> None:
        self._join(-signal.SIGKILL)

    def result(self) -> Any:
        assert self.connection.poll(PATIENCE_S), "it hangs"
        with suppress(EOFError):
            value = self.connection.recv()
            self._join(0)
            return value
        return self._join(0)  # it failed; its traceback is on standard error

    def _join(self, exitcode: int) -> None:
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == exitcode
        self.connection.close()


def _call(function: Callable[..., Any], connection: Any, args: Sequence[Any]) -> None:
    signal.alarm(2 * PATIENCE_S)
    disable_progress_bar()  # its lock is one for all forks: a killed one would keep it
    torch.set_num_threads(1)
    layout.SHARD_BYTES = SHARD_BYTES
    connection.send(function(connection, *args))


def train(reuse: Reuse, *, announced: bool = False) -> list[float]:
    """Train a copy of the adapter for six steps and return it; the model stays as it was."""
    trained = [p for p in reuse.model.parameters() if p.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    num = len(reuse.examples)
    batches = [[step % num, (step + 1) % num] for step in range(6)]
    for step, batch in enumerate(batches):
        for ahead in batches[step : step + 2] if announced else ():
            reuse.announce(ahead)
        reuse.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.cat([parameter.detach().flatten() for parameter in trained]).tolist()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    return list(after)


def gradients(reuse: Reuse) -> list[float]:
    """Return the gradients of all examples' loss."""
    trained = [p for p in reuse.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(reuse.loss(range(len(reuse.examples))), trained)
    return list(torch.cat([gradient.flatten() for gradient in found]).tolist())


def files(root: Path) -> dict[str, Any]:
    """Return the content of all stores but for their locks."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {
        str(path.relative_to(root)): json.loads(path.read_text())
        if path.suffix == ".json"
        else path.read_bytes()
        for path in found
    }


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Return which file it is, and when it was written, of every shard that counts."""
    found = {}
    for manifest in root.glob("trunk-*/manifest.json"):
        for shard, crc in json.loads(manifest.read_text())["shards"].items():
            path = manifest.with_name(f"shard-{int(shard):05d}.bin")
            if not path.is_file():
                continue
            assert zlib.crc32(path.read_bytes()) == crc
            found[str(path.relative_to(root))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def flip(path: Path, offset: int) -> None:
    """Flip a bit in place, as a disk would."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def shards(reuse: Reuse) -> list[Path]:
    return sorted(reuse.store.directory.glob("shard-*"))


# Kills


def _build_and_train(connection: Any, job: Job, root: Path) -> Any:
    started = time.perf_counter()
    connection.send("building")
    reuse = job.reuse(root)
    build_s = time.perf_counter() - started
    connection.send("training")
    adapter = train(reuse)
    train_s = time.perf_counter() - started - build_s
    connection.send("done")
    connection.recv()  # a process that is to be killed does not get away
    return {"adapter": adapter, "build_s": build_s, "train_s": train_s}


def _undisturbed(job: Job, root: Path, function: Any = _build_and_train) -> Any:
    child = Child(function, job, root)
    for message in ("building", "training", "done"):
        child.wait_for(message)
    child.say("go")
    return child.result()


def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(
    tmp_path: Path, job: Job
) -> None:
    job = replace(job, num_examples=12)
    wanted = _undisturbed(job, tmp_path / "wanted")
    root, chance = tmp_path / "killed", random.Random(0)
    whole: dict[str, tuple[int, int]] = {}
    own = next((tmp_path / "wanted").iterdir()).name
    for number in range(NUM_KILLS):
        child = Child(_build_and_train, job, root)
        child.wait_for("building")
        if number < 14:
            time.sleep(chance.uniform(0, wanted["build_s"] / 5))
        else:
            child.wait_for("training")
            time.sleep(chance.uniform(0, wanted["train_s"]))
        child.kill()
        now = {name: stamp for name, stamp in stamps(root).items() if name.startswith(own)}
        assert whole == {name: stamp for name, stamp in now.items() if name in whole}
        whole = now
    assert _undisturbed(job, root)["adapter"] == wanted["adapter"]
    assert whole == stamps(root)
    assert files(root) == files(tmp_path / "wanted")


def _watched_build(connection: Any, job: Job, root: Path, kill_at: int, half: bool) -> list[str]:
    """Build, killed just before files are changed for the n-th time; return all changes.

    Before a rename the file may be cut to its half, as if the kill had come while it was written.
    """
    seen: list[str] = []
    numbers = count()

    def hook(event: str, args: Any) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(args[0])
        is_read = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
        is_there = os.path.exists(path)
        is_vain = (event == "os.remove" and not is_there) or (event == "os.mkdir" and is_there)
        if is_read or is_vain or not path.startswith(str(root)):
            return
        if next(numbers) == kill_at:
            if half:
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)

    sys.addaudithook(hook)
    job.reuse(root)
    return list(seen)


def test_a_kill_before_any_change_of_files_costs_what_did_not_count_yet(
    tmp_path: Path, job: Job
) -> None:
    job = replace(job, num_examples=3 if job.saved_model is None else 1)
    root = tmp_path / "wanted"
    changes = Child(_watched_build, job, root, -1, False).result()
    points = [(number, False) for number in range(len(changes))]
    points += [(number, True) for number, change in enumerate(changes) if change == "os.rename"]
    assert len(points) > 6 * job.num_examples
    wanted = files(root)
    for number, half in points:
        root = tmp_path / f"{number}-{half}"
        Child(_watched_build, job, root, number, half).expect_killed()
        before = stamps(root)
        reuse = job.reuse(root)
        assert files(root) == wanted, (number, half)
        kept = {name: stamp for name, stamp in before.items() if reuse.store.directory.name in name}
        assert kept.items() <= stamps(root).items(), (number, half)


# Full disks


class Disk:
    """Lets writing fail, in one of three ways, once there is no room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: str, rooms: int) -> None:
        self.rooms = rooms
        """Shards that there is room for."""
        self.only = ""
        """Name of the one store that gets no room; empty: all."""
        write_text, sync, open_file = Path.write_text, os.fsync, Path.open
        opened: list[Path] = []

        def writing_text(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
            if fails_at == "manifest" and self._is_full(path):
                write_text(path, text[: len(text) // 2])
                raise self.error
            return write_text(path, text, *args, **kwargs)

        def syncing(file: int) -> None:
            if fails_at == "fsync" and self._is_full(opened[-1]):
                raise self.error
            sync(file)

        def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file: Any = open_file(path, mode, *args, **kwargs)
            opened.append(path)
            if fails_at == "write" and mode == "wb" and self._is_full(path):
                file.write(b"half")
                file.close()
                raise self.error
            return file

        monkeypatch.setattr(Path, "write_text", writing_text)
        monkeypatch.setattr(Path, "open", opening)
        monkeypatch.setattr(os, "fsync", syncing)

    @property
    def error(self) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_full(self, path: Path) -> bool:
        if path.suffix != ".tmp" or self.only not in path.parent.name:
            return False
        self.rooms -= 1
        return self.rooms < 0


@pytest.mark.parametrize("fails_at", ["write", "fsync", "manifest"])
def test_a_build_goes_on_once_a_full_disk_has_room_again(
    tmp_path: Path, fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, root = Job(), tmp_path / "full"
    job.reuse(tmp_path / "wanted")
    disk = Disk(monkeypatch, fails_at, rooms=2)
    with pytest.raises(NoRoomError, match="the disk is full"):
        job.reuse(root)
    before = stamps(root)
    assert [Path(name).name for name in before] == ["shard-00000.bin", "shard-00001.bin"]
    assert not list(root.rglob("*.tmp"))
    disk.rooms = 10**6
    job.reuse(root)
    assert before.items() <= stamps(root).items()
    assert files(root) == files(tmp_path / "wanted")


def _prepared(job: Job, root: Path, reuse: Any) -> Reuse | None:
    examples = job.examples
    return prepare(
        job.model,
        examples,
        stacked,
        ReuseOptions(reuse=reuse),
        root=root,
        batch_size=2,
        epochs=3,
    )


def test_a_disk_that_gets_full_trains_from_the_smaller_store_or_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job()
    caplog.set_level(logging.INFO)
    disk = Disk(monkeypatch, "fsync", rooms=1)
    assert _prepared(job, tmp_path / "full", "auto") is None
    assert "no frozen computation is reused: the disk is full" in caplog.text
    disk.rooms = 10**6
    larger = job.reuse(tmp_path / "elsewhere")
    disk.only, disk.rooms = larger.store.directory.name, 1
    found = _prepared(job, tmp_path / "smaller", "auto")
    assert found is not None
    assert found.layout.total_bytes < larger.layout.total_bytes
    disk.only, disk.rooms = "", 1
    caplog.clear()
    assert _prepared(job, tmp_path / "full", "prefix") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the disk is full" in record.message


def test_a_full_disk_is_an_error_where_only_upper_blocks_are_resident(
    tmp_path: Path, upper: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "full"
    upper.reuse(tmp_path / "wanted")
    disk = Disk(monkeypatch, "write", rooms=7)
    with pytest.raises(InputError, match="the disk is full"):
        _prepared(upper, root, "auto")
    assert not list(root.rglob("*.tmp"))
    disk.rooms = 10**6
    upper.reuse(root)
    wanted = files(tmp_path / "wanted")
    assert wanted.items() <= files(root).items()


def test_a_damaged_shard_that_cannot_be_built_again_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    wanted = gradients(job.reuse(tmp_path))
    reuse = job.reuse(tmp_path)
    flip(shards(reuse)[2], 100)
    disk = Disk(monkeypatch, "fsync", rooms=0)
    with pytest.raises(OSError, match="No space left"):
        gradients(reuse)
    with pytest.raises(OSError, match="No space left"):
        gradients(job.reuse(tmp_path))
    disk.rooms = 10**6
    assert gradients(reuse) == wanted


# Damage


def alike(num: int = 5) -> list[dict[str, Any]]:
    """Return examples that begin alike, more and more so; the last two are equal."""
    examples = make_examples(4)
    ids = examples[-1]["input_ids"][:16]
    found = [
        {"input_ids": [*ids[: 9 + number], 7, 8, 9], "labels": [-100] * (10 + number) + [8, 9]}
        for number in range(num)
    ]
    return [*found, dict(found[-1])]


@pytest.mark.parametrize("examples", [make_examples(5), alike()], ids=["apart", "alike"])
def test_a_flipped_byte_in_any_shard_is_found_while_training_and_mended(
    tmp_path: Path, examples: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    first = Reuse(model, examples, tmp_path)
    if examples == alike():
        owners = {extent.owner for extent in first.layout.kv_extents[4]}
        assert len({first.layout.addresses[owner].shard for owner in owners}) > 2
    wanted, content, before = train(first), files(tmp_path), stamps(tmp_path)
    paths = [path for path in shards(first) if path.stat().st_size]
    assert len(paths) == 5
    for path, offset in ((path, offset) for path in paths for offset in (0, 99, -1)):
        reuse = Reuse(model, examples, tmp_path)
        reuse.loss([0])  # opens shards; the others are still to be opened
        extents = reuse.layout.kv_extents[0] + reuse.layout.hidden_extents[0]
        opened = {reuse.layout.addresses[extent.owner].shard for extent in extents}
        flip(path, offset)
        if path in (reuse.store.directory / f"shard-{shard:05d}.bin" for shard in opened):
            reuse = Reuse(model, examples, tmp_path)
        caplog.clear()
        assert train(reuse, announced=offset == 99) == wanted
        assert caplog.text.count("damaged") == 1
        assert path.name in caplog.text
        assert files(tmp_path) == content
        now, name = stamps(tmp_path), str(path.relative_to(tmp_path))
        assert {key for key in now if now[key] != before[key]} == {name}
        before = now
    assert train(Reuse(model, examples, tmp_path)) == wanted
    assert stamps(tmp_path) == before


def _with_other_crc(text: str) -> str:
    manifest = json.loads(text)
    manifest["shards"]["1"] ^= 1
    return json.dumps(manifest, indent=1)


def _without_shard(text: str) -> str:
    manifest = json.loads(text)
    del manifest["shards"]["1"]
    return json.dumps(manifest, indent=1)


MANIFESTS: dict[str, tuple[Callable[[str], str], set[int]]] = {
    "another checksum": (_with_other_crc, {1}),
    "a checksum that is no number": (lambda text: text.replace('"1": ', '"1": 0.5e'), {1}),
    "another name": (lambda text: text.replace('"1": ', '"9": '), {1}),
    "a shard less": (_without_shard, {1}),
    "no shards": (lambda text: text.replace('"shards"', '"sharts"'), set(range(5))),
    "cut": (lambda text: text[:-20], set(range(5))),
    "empty": (lambda text: "", set(range(5))),
    "no object": (lambda text: "[1]", set(range(5))),
    "no text": (lambda text: text.replace("{", "\udcff"), set(range(5))),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_vouches_for_nothing(tmp_path: Path, damage: str) -> None:
    job = Job()
    reuse = job.reuse(tmp_path)
    wanted, content, before = gradients(reuse), files(tmp_path), stamps(tmp_path)
    path = reuse.store.directory / "manifest.json"
    change, expected = MANIFESTS[damage]
    damaged = change(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged, errors="surrogateescape")
    assert gradients(job.reuse(tmp_path)) == wanted
    mended = files(tmp_path)
    assert {n: c for n, c in mended.items() if n.endswith(".bin")} == {
        name: shard for name, shard in content.items() if name.endswith(".bin")
    }
    now = stamps(tmp_path)
    assert {shard for shard, key in enumerate(sorted(now)) if now[key] != before[key]} == expected
    assert gradients(job.reuse(tmp_path)) == wanted
    assert stamps(tmp_path) == now


def test_a_damaged_shard_is_mended_where_only_upper_blocks_are_resident(
    tmp_path: Path, upper: Job
) -> None:
    wanted = gradients(upper.reuse(tmp_path))
    content, before = files(tmp_path), stamps(tmp_path)
    reuse = upper.reuse(tmp_path)
    flip(shards(reuse)[2], 100)
    assert gradients(reuse) == wanted
    assert files(tmp_path) == content
    assert len(before.items() - stamps(tmp_path).items()) == 1


def test_a_damaged_shard_of_a_lower_block_does_not_end_a_build(
    tmp_path: Path, upper: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper.reuse(tmp_path / "wanted")
    checkpoint = upper.model.get_base_model().residency.checkpoint
    root, block, damaged = tmp_path / "damaged", checkpoint.block, []

    def damaging(index: int) -> Any:
        if index == 2 and not damaged:
            damaged.append(next(root.rglob("shard-00003.bin")))
            flip(damaged[0], 100)
        return block(index)

    monkeypatch.setattr(checkpoint, "block", damaging)
    upper.reuse(root)
    assert damaged
    assert files(root) == files(tmp_path / "wanted")


# Other processes


def _slow_writes(seconds: float) -> list[int]:
    """Let writing take time, and return the list that shards are added to."""
    written: list[int] = []
    write = Store.write

    def writing(store: Store, shard: int, records: Any) -> None:
        time.sleep(seconds)
        write(store, shard, records)
        written.append(shard)

    Store.write = writing  # type: ignore[method-assign]  # in a process of its own
    return written


def _build_slowly(connection: Any, job: Job, root: Path) -> Any:
    written = _slow_writes(0.01)
    job.model  # noqa: B018 - made before both begin
    connection.send("ready")
    connection.recv()
    reuse = job.reuse(root)
    return written, gradients(reuse), reuse.store.directory.name


def test_two_processes_build_a_store_once_and_train_alike(tmp_path: Path, job: Job) -> None:
    children = [Child(_build_slowly, job, tmp_path) for _ in range(2)]
    for child in children:
        child.wait_for("ready")
    for child in children:
        child.say("go")
    (one, first, name), (two, second, _) = (child.result() for child in children)
    assert first == second == gradients(job.reuse(tmp_path))
    num_shards = len(list((tmp_path / name).glob("shard-*")))
    assert num_shards == job.num_examples
    if job.saved_model is None:
        assert Counter(one + two) == Counter(range(num_shards))
    else:
        assert sorted(map(len, (one, two)))[0] == 0
    assert not list(tmp_path.rglob("*.tmp"))


def _read_in_two_parts(connection: Any, job: Job, root: Path) -> list[float]:
    reuse = job.reuse(root)
    reuse.loss([0])
    connection.send("reading")
    connection.recv()
    return gradients(reuse)


def _rebuild(store: Store, job: Job) -> None:
    for path in store.directory.glob("shard-*"):
        flip(path, 7)
    gradients(job.reuse(store.directory.parent))


@pytest.mark.parametrize("how", ["removed", "removed by reuse rm", "damaged and built again"])
def test_a_reader_goes_on_when_another_process_changes_the_store(tmp_path: Path, how: str) -> None:
    job = Job()
    reuse = job.reuse(tmp_path)
    wanted, content = gradients(reuse), files(tmp_path)
    reader = Child(_read_in_two_parts, job, tmp_path)
    reader.wait_for("reading")
    if how == "removed":
        reuse.store.remove()
    elif how == "removed by reuse rm":
        assert remove(reuse.store.directory)
    else:
        # What the reader has open is the old file, in which a byte may not be flipped.
        for path in shards(reuse):
            copy = path.read_bytes()
            path.unlink()
            path.write_bytes(copy)
        _rebuild(reuse.store, job)
    reader.say("go")
    assert reader.result() == wanted
    assert gradients(job.reuse(tmp_path)) == wanted
    assert files(tmp_path) == content


def test_a_store_is_not_removed_while_another_process_builds_it(tmp_path: Path) -> None:
    job = Job()
    reuse = job.reuse(tmp_path / "wanted")
    store = Store(tmp_path / "built", "", reuse.layout, {})
    store.directory = tmp_path / "built" / reuse.store.directory.name
    child = Child(_build_slowly, job, tmp_path / "built")
    child.wait_for("ready")
    child.say("go")
    while not list(store.directory.glob("shard-*.bin")):
        assert child.process.is_alive()
        time.sleep(0.002)
    store.remove()
    written, found, _ = child.result()
    assert written == list(range(job.num_examples))
    assert found == gradients(reuse)
    assert files(tmp_path / "built") == files(tmp_path / "wanted")


def _build_after_waiting(connection: Any, job: Job, root: Path) -> list[int]:
    written = _slow_writes(0)
    flock = fcntl.flock

    def waiting(*args: Any) -> None:
        connection.send("waiting")
        flock(*args)
        fcntl.flock = flock

    fcntl.flock = waiting
    connection.recv()
    job.reuse(root)
    return written


def test_a_build_that_waited_for_a_removal_writes_where_it_is_found(tmp_path: Path) -> None:
    job = Job()
    reuse = job.reuse(tmp_path)
    content, directory = files(tmp_path), reuse.store.directory
    child = Child(_build_after_waiting, job, tmp_path)  # before the lock, or the fork has it, too
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child.say("go")
        child.wait_for("waiting")
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    assert child.result() == list(range(job.num_examples))
    assert files(tmp_path) == content


def test_two_processes_that_find_the_same_damage_mend_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    wanted = gradients(job.reuse(tmp_path))
    one, two = job.reuse(tmp_path), job.reuse(tmp_path)
    flip(shards(one)[1], 5)
    read, mended = one.store.read, []

    def found_by_both(index: int) -> Any:
        try:
            return read(index)
        except CorruptShardError:
            if not mended:
                two.read(index)
                mended.append(stamps(tmp_path))
            raise

    monkeypatch.setattr(one.store, "read", found_by_both)
    assert gradients(one) == wanted
    assert mended == [stamps(tmp_path)]


def test_a_trunk_is_built_once_where_only_upper_blocks_are_resident(
    tmp_path: Path, upper: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: Counter[tuple[str, int]] = Counter()
    write = Store.write

    def counting(store: Store, shard: int, records: Any) -> None:
        written[store.directory.name, shard] += 1
        write(store, shard, records)

    monkeypatch.setattr(Store, "write", counting)
    reuse = replace(upper, positions="all").reuse(tmp_path)
    assert reuse.mode == "trunk"
    assert set(written.values()) == {1}
    before = stamps(tmp_path)
    assert len(before) == upper.num_examples
    replace(upper, positions="all").reuse(tmp_path)
    assert stamps(tmp_path) == before


def test_a_build_leaves_the_stores_of_other_runs_alone(tmp_path: Path, upper: Job) -> None:
    for num_lower in (3, 2):  # what leaves a block, for its own sake
        replace(upper, positions="all", num_lower=num_lower).reuse(tmp_path)
    before = stamps(tmp_path)
    upper.reuse(tmp_path)
    assert before
    assert before.items() <= stamps(tmp_path).items()


def _build_with_a_pause(connection: Any, job: Job, root: Path, at: str) -> list[float]:
    fill = Reuse._fill

    def pausing(reuse: Reuse, store: Store, num_blocks: int, *args: Any) -> None:
        is_own = store.directory == reuse.store.directory
        if is_own if at == "its own store" else num_blocks == 2:
            connection.send("pausing")
            connection.recv()
        fill(reuse, store, num_blocks, *args)

    Reuse._fill = pausing  # type: ignore[method-assign]  # in a process of its own
    return gradients(job.reuse(root))


@pytest.mark.parametrize(
    ("positions", "at"), [("l2", "its own store"), ("all", "the second block")]
)
def test_layer_by_layer_builds_of_two_stores_do_not_get_in_each_others_way(
    tmp_path: Path, upper: Job, positions: str, at: str
) -> None:
    other = replace(upper, positions=positions)
    wanted = [gradients(which.reuse(tmp_path / str(n))) for n, which in enumerate((upper, other))]
    first = Child(_build_with_a_pause, upper, tmp_path / "both", at)
    second = Child(_build_slowly, other, tmp_path / "both")
    first.wait_for("pausing")
    second.wait_for("ready")
    second.say("go")
    second.process.join(1)  # it waits for the first, or it is done
    first.say("go")
    assert [first.result(), second.result()[1]] == wanted


# Edited data


ROWS = task_files()[0].read_text(encoding="utf-8").splitlines()[:8]


def _options(tmp_path: Path, **changes: Any) -> TrainOptions:
    data = tmp_path / "data.jsonl"
    return TrainOptions(
        model=ModelOptions(model=str(model_dir()), compute_dtype="fp32", device="cpu"),
        data=DataOptions(
            data=str(data),
            **{key: changes[key] for key in ("template", "max_length") if key in changes},
        ),
        method=MethodOptions(
            method="loreft", rank=changes.get("rank", 2), layers="upper:0.5", positions="l1"
        ),
        optim=OptimOptions(max_steps=2, batch_size=4),
        reuse=ReuseOptions(
            reuse=changes.get("reuse", "prefix"),
            reuse_dir=tmp_path / "stores",
            resident=changes.get("resident", "all"),
        ),
        run=RunOptions(
            output_dir=tmp_path / "run",
            seed=changes.get("seed", 0),
            logging_steps=1,
            quiet=True,
            overwrite=True,
        ),
    )


def _write_rows(tmp_path: Path, rows: list[str]) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _losses(result: dict[str, Any]) -> list[float]:
    return [loss for _, loss in result["loss_history"]]


def _another_row(row: str) -> str:
    """Change one letter so that there are as many tokens as before, and other ones."""
    tokens = load_tokenizer(str(model_dir()))
    for letter in "abcdefghijklmnop":
        edited = row.replace("Text: ", f"{letter}ext: ")
        if len(tokens(edited)["input_ids"]) == len(tokens(row)["input_ids"]):
            return edited
    raise AssertionError("no such letter")


@pytest.mark.parametrize("resident", ["all", "upper"])
def test_edited_rows_are_trained_on_and_reverted_ones_are_not_computed_again(
    tmp_path: Path, resident: str
) -> None:
    edited = [*ROWS]
    edited[3] = _another_row(edited[3])
    losses, kept = [], []
    for rows in (ROWS, edited, ROWS):
        _write_rows(tmp_path, rows)
        result = run_training(_options(tmp_path, resident=resident))
        assert result["reuse"] == "prefix"
        losses.append(_losses(result))
        kept.append(stamps(tmp_path / "stores"))
    first, second, third = kept
    assert first.items() < second.items()
    assert len(second) == 2 * len(ROWS)
    assert third == second
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
    _write_rows(tmp_path, edited)
    plain = _losses(run_training(_options(tmp_path, reuse="off")))
    assert losses[1] == pytest.approx(plain, rel=1e-4)


def test_a_store_belongs_to_the_tokens_and_to_nothing_else_of_a_run(tmp_path: Path) -> None:
    _write_rows(tmp_path, ROWS)
    run_training(_options(tmp_path))
    before = stamps(tmp_path / "stores")
    assert len(before) == len(ROWS)
    for changes in ({"rank": 4, "seed": 5}, {"max_length": 500}):
        run_training(_options(tmp_path, **changes))
        assert stamps(tmp_path / "stores") == before, changes
    for changes in ({"template": "{prompt}!"}, {"max_length": 20}):
        run_training(_options(tmp_path, **changes))
        after = stamps(tmp_path / "stores")
        assert before.items() < after.items(), changes
        assert len(after) > len(before)
        before = after
