# ruff: noqa: E501
"""What the package says and writes, as digests: recorded before the folders, compared after.

``python tests/house/record.py EMBEDDED OUT.json``; deleted with the test when the move is done.
"""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MOVING = re.compile(
    r"_time_s$|^tokens_per_s|^commit$|^versions$|rss_bytes$|^step_time|^device$|_s$|^seconds"
)
METHODS = {
    "loreft": "--method loreft --rank 4 --positions f2+l2 --storage nf4",
    "loreft-all": "--method loreft --rank 4 --positions all --storage int8 --checkpointing",
    "noreft": "--method noreft --rank 4 --storage bf16",
    "lora": "--method lora --rank 4 --storage fp32",
    "qlora": "--method qlora --rank 4 --storage nf4",
    "lora_reft": "--method lora_reft --rank 4 --lora-rank 4 --storage nf4",
    "prefix": "--method prefix --storage nf4 --num-virtual-tokens 3",
    "reused": "--method loreft --rank 4 --layers upper:0.5 --positions f2+l2 --storage nf4 --reuse auto --reuse-dir DIR/stores",
    "trunk": "--method loreft --rank 4 --layers upper:0.5 --positions all --storage nf4 --reuse trunk --reuse-dir DIR/stores",
    "validated": "--method loreft --rank 4 --storage nf4 --validation-data DIR/validation.jsonl --validation-limit 16",
}
PLANS = [
    f"--model {model} --seq-len {length} --batch-size {batch} --storage {storage} {more}"
    for model, length, batch in (("llama-3.1-8b", 512, 4), ("DIR/model", 64, 8))
    for storage in ("nf4", "int8", "bf16")
    for more in (
        "--method loreft --positions f7+l7 --gpu 4060",
        "--method lora --checkpointing --gpu 4090",
        "--method loreft --layers upper:0.5 --positions all --reuse trunk --gpu a10",
        "--method qlora --mlp-tokens 64 --checkpointing --offload-activations --gpu 3060",
    )
]


def cleaned(value, folder):
    if isinstance(value, dict):
        return {k: cleaned(v, folder) for k, v in value.items() if not MOVING.search(k)}
    if isinstance(value, list):
        return [cleaned(v, folder) for v in value]
    return (
        re.sub(r"\.py:\d+", ".py", value.replace(str(folder), "DIR"))
        if isinstance(value, str)
        else value
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(words, folder):
    words = words.replace("DIR", str(folder)).split()
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_reft.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode not in (0, 3):
        return {"failed": done.returncode, "said": done.stderr.replace(str(folder), "DIR")[-2000:]}
    return cleaned(json.loads(done.stdout.splitlines()[-1]), folder)


def visible(page):
    """The words of a page, without figures' bytes, scripts, times and space."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return re.sub(r"\s+", " ", text).strip()


def adapter(folder):
    config = (folder / "adapter_config.json").read_text(encoding="utf-8")
    return {
        "weights": digest(folder / "adapter_model.safetensors"),
        "config": cleaned(json.loads(config), folder.parent.parent),
        "files": sorted(path.name for path in folder.iterdir()),
    }


def record(embedded):
    folder = Path("/tmp/lowmem-house")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(embedded / "model", folder / "model")
    for name in ("train", "test", "validation"):
        shutil.copy(embedded / "task" / f"{name}.jsonl", folder)
    found = {"train": {}, "adapter": {}, "loss": {}, "evaluate": {}}
    common = "--model DIR/model --data DIR/train.jsonl --limit 64 --epochs 1 --batch-size 8 --logging-steps 1 --json"
    for name, words in METHODS.items():
        out = folder / "runs" / name
        found["train"][name] = command(f"train {words} {common} --output-dir {out}", folder)
        if (out / "adapter").is_dir():
            found["adapter"][name] = adapter(out / "adapter")
    for name in ("loreft", "qlora", "reused", "prefix"):
        found["evaluate"][name] = command(
            f"evaluate --model DIR/model --adapter DIR/runs/{name}/adapter --data DIR/test.jsonl --limit 40 --storage nf4"
            f" --predictions DIR/{name}.jsonl --json",
            folder,
        )
        found["evaluate"][name + " predictions"] = digest(folder / f"{name}.jsonl")
    found["generate"] = command(
        "generate --model DIR/model --adapter DIR/runs/loreft/adapter --prompt Returns --max-new-tokens 8 --json",
        folder,
    )
    found["stores"] = sorted(path.name for path in (folder / "stores").iterdir())
    found["cache"] = [
        sorted(entry) if isinstance(entry, dict) else entry
        for entry in command("cache ls --reuse-dir DIR/stores --json", folder).get("stores", [])
    ]
    found["plans"] = [command(f"plan {words} --json", folder) for words in PLANS]
    found["fit"] = command("plan --model llama-3.1-8b --gpu 4060 --fit --json", folder)
    found["methods"] = command("methods --json", folder)
    found["tasks"] = command("tasks --json", folder)
    found["sweep"] = command(
        "sweep --model DIR/model --data DIR/train.jsonl --validation-data DIR/validation.jsonl --eval-data DIR/test.jsonl"
        " --methods loreft --space lr=1e-3,4e-3 --sampler grid --prune none --limit 32 --validation-limit 8"
        " --output-dir DIR/sweep --epochs 1 --json",
        folder,
    )
    found["compare"] = command(
        "compare --model DIR/model --data DIR/train.jsonl --eval-data DIR/test.jsonl --limit 32 --eval-limit 16 --seeds 0,1"
        " --methods loreft[rank=8,lr=4e-3],qlora[rank=8,lr=2e-3] --output-dir DIR/compare --json",
        folder,
    )
    results = json.loads((folder / "compare/results.json").read_text())
    found["cells"] = {f"{r['method']} {r['seed']}": r["key"] for r in results}
    found["cell values"] = cleaned(results, folder)
    return found


def report(folder):
    """The words of the report of fixed results."""
    out = Path(tempfile.mkdtemp()) / "report"
    shutil.copytree(folder, out)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lowmem_reft.cli",
            "report",
            str(out),
            "--output-dir",
            str(out),
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    page = (out / "report.html").read_text(encoding="utf-8")
    return {
        "words": visible(page).replace(str(out), "DIR"),
        "csv": (out / "results.csv").read_text(),
        "rc": done.returncode,
        "figures": sorted(p.name for p in out.glob("*.png")),
    }


if __name__ == "__main__":
    found = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
