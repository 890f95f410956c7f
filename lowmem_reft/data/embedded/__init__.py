"""What the package ships to try itself on: a tiny Llama and a small task, from Python's own text.

``recipes/pretrain_tiny.py`` and ``recipes/embedded_task.py`` made the files; the ``README.md``
beside this module says how, and the text's licence is ``LICENSE-PYTHON.txt``. No torch here.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def model_dir() -> Path:
    """Directory of the model and its tokenizer, as ``from_pretrained`` takes it."""
    return _HERE / "model"


def task_files() -> tuple[Path, Path]:
    """Training and test rows ``{"prompt", "choices", "answer"}``, as JSONL."""
    return _HERE / "task" / "train.jsonl", _HERE / "task" / "test.jsonl"


def validation_file() -> Path:
    """Rows to choose settings on, so that the test rows stay unseen until the end."""
    return _HERE / "task" / "validation.jsonl"
