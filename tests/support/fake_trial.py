"""A process that scores a trial without training it: by its rank."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
BAD_RANK, FAILS_RANK, SLOW_RANK = 3, 5, 7

FAKE_CELL = f"""
import json, sys, time
from pathlib import Path
from lowmem_reft.compare import cell
from lowmem_reft.compare.engines.launch import leave_result

def run_cell(todo):
    rank, lr = todo.train.method.rank or 4, todo.train.optim.lr
    out = todo.train.run.output_dir
    out.mkdir(parents=True)
    with Path({{runs!r}}).open("a") as file:
        file.write(todo.record["method"] + "\\n")
    print(todo.train.data.data, todo.train.held_out.validation_data, todo.evaluate.data.data)
    if rank == {SLOW_RANK} and not Path({{runs!r}} + ".fast").exists():
        time.sleep(600)
    if rank == {FAILS_RANK} and not Path({{runs!r}} + ".fast").exists():
        raise RuntimeError("out of luck")
    best = 0.9 - abs(rank - 8) / 100 - abs(lr - 4e-3)
    value = 0.1 if rank == {BAD_RANK} else best
    epochs = [dict(epoch=n, metric="accuracy", value=value - 0.1 + n / 20) for n in (1, 2)]
    with (out / "epochs.jsonl").open("w") as file:
        file.write(json.dumps(epochs[0]) + "\\n")
        file.flush()
        if rank == {BAD_RANK}:
            time.sleep(600)
        file.write(json.dumps(epochs[1]) + "\\n")
    measured = dict(metric="accuracy", value=value, loss=1.0, validation=epochs, wall_time_s=1.0,
                    num_trainable_params=rank)
    return {{**cell.EMPTY_RESULT, **measured, **todo.record}}

sys.exit(leave_result(Path(sys.argv[1]), run_cell))
"""
