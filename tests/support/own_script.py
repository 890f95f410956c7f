"""A user's own script with the stock Trainer; the tests of several processes launch it.

Beside training it writes down which examples this process saw, and which of their tokens it edited.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, set_seed

from lowmem_reft import ReftConfig, load_base
from lowmem_reft.machine.processes import process_index, shard_on_cpu


def examples() -> list[dict[str, Any]]:
    """Return 24 examples with prompts and padding of several lengths; their first token is their
    number."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(24):
        ids = torch.randint(30, 120, (16,), generator=generator)
        ids[0] = 3 + index
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[: 6 + index % 5] = -100
        mask[16 - index % 4 :], labels[16 - index % 4 :] = 0, -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def main(model: str, output_dir: str, accumulation: int) -> None:
    """Train one adapter and save it."""
    base = load_base(model, storage="nf4", compute_dtype="fp32", device="cpu")
    set_seed(0)
    adapted: Any = get_peft_model(
        base, ReftConfig(rank=4, layers="1;2;3", positions="f2+l2", task_type="CAUSAL_LM")
    )
    seen: list[tuple[int, list[int]]] = []
    selector = adapted.base_model.current.selector
    select = selector.select

    def noted_select(active: Any, args: Any, kwargs: Any, **more: Any) -> Any:
        selection, kwargs = select(active, args, kwargs, **more)
        if "input_ids" in kwargs:
            (edited,) = selection["default"]
            for row, ids in enumerate(kwargs["input_ids"]):
                seen.append((int(ids[0]), edited[1][edited[0] == row].tolist()))
        return selection, kwargs

    selector.select = noted_select
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    shard_on_cpu(arguments)  # cards need no such line
    trainer = Trainer(model=adapted, args=arguments, train_dataset=examples())
    trainer.train()
    trainer.save_model(output_dir)
    Path(output_dir).mkdir(exist_ok=True, parents=True)
    packed = next(p for name, p in trainer.model.named_parameters() if "q_proj" in name)
    held = packed.to_local() if isinstance(packed, DTensor) else packed
    noted = {"seen": seen, "share": held.numel() / packed.numel()}
    Path(output_dir, f"seen-{process_index()}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
