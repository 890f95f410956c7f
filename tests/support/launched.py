"""What the tests of several processes launch instead of ``lowmem_reft.cli``: it, and a record.

Each process notes in ``RECORD_DIR`` that it has written to a store; process 1 kills itself at the
end of step ``DIE_AT``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lowmem_reft import cli
from lowmem_reft.reuse.store import Store
from lowmem_reft.runs import fit

write, on_step_end = Store.write, fit._StepWatch.on_step_end


def noted_write(self: Store, *args: Any) -> None:
    """Write as before, and note it."""
    with Path(os.environ["RECORD_DIR"], f"writes-{os.environ['RANK']}").open("a") as file:
        file.write("shard\n")
    write(self, *args)


def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Die where it was asked for."""
    if os.environ["RANK"] == "1" and str(state.global_step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    on_step_end(self, args, state, control, **kwargs)


if __name__ == "__main__":
    Store.write, fit._StepWatch.on_step_end = noted_write, dying  # type: ignore[method-assign]
    sys.exit(cli.main())
