"""One process at a time writes to a directory; a killed one leaves it free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.machine.locks import alone

HOLDING = """
import sys, time
from pathlib import Path
from lowmem_reft.machine.locks import alone
with alone(Path(sys.argv[1]), Path(sys.argv[1]) / "lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_which_one_is_there_until_it_is_killed(
    tmp_path: Path,
) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(InputError, match=rf"output_dir must be .* \(process {other.pid} on"),
        alone(tmp_path, tmp_path / "lock"),
    ):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with alone(tmp_path, tmp_path / "lock"):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_directory_that_cannot_be_made_and_a_lock_that_is_a_link_are_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for directory, lock in ((tmp_path / "file" / "run", "lock"), (tmp_path, "link")):
        with (
            pytest.raises(InputError, match="output_dir must be a directory that can be written"),
            alone(directory, directory / lock),
        ):
            pass
