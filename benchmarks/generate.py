"""What an adapter costs in generation, beside the bare base and PEFT's QLoRA.

Run ``python -m benchmarks.generate``. A randomly initialised NF4 Llama (d = 1024, 16 layers, 246 M
parameters) continues 8 prompts of 128 tokens by 64 tokens, greedily and without an end. Methods
take turns, forwards and backwards, after a round that is a warm-up; a sample is one whole call of
``generate``, and a ratio the median over rounds of samples that were taken next to each other.

Goals: LoReFT r4 on every layer (``l1``, ``f7+l7``, ``all``) takes at most 1.02 times as long as the
bare base, and a batch in which every row has an adapter of its own at least 0.9 times the
throughput of one adapter for all rows. LoRA r16 on all linear layers is not merged: a 4-bit base
cannot take it up without rounding, and several adapters share the base.

``prefill_s`` is a call for one new token; ``decode_step_s`` what each further one takes. Every
method is shown to change the logits of the base (``max_logit_change``).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peft import LoraConfig, get_peft_model

from benchmarks.common import environment, ratio, report, summarize
from benchmarks.reuse import config_of
from lowmem_reft import ReftConfig
from lowmem_reft.adapters import BASE, answering
from lowmem_reft.synthetic import base_with_random_weights

BARE = "bare base"
LOREFT = {positions: f"LoReFT r4, {positions}" for positions in ("l1", "f7+l7", "all")}
LOREFT_MIXED = "LoReFT r4, f7+l7, an adapter per row"
LORA, LORA_MIXED = "LoRA r16, not merged", "LoRA r16, not merged, an adapter per row"
OVERHEAD_GOAL = 1.02
MIXED_GOAL = 1 / 0.9

COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "median s": lambda row: f"{row['median_s']:.3f}",
    "min s": lambda row: f"{row['min_s']:.3f}",
    "max s": lambda row: f"{row['max_s']:.3f}",
    "prefill s": lambda row: f"{row['prefill_s']:.3f}",
    "decode step ms": lambda row: f"{1000 * row['decode_step_s']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:.1f}",
}


@dataclass(frozen=True, kw_only=True)
class GenerateBenchmark:
    """Time generation with and without adapters."""

    batch_size: int = 8
    """Prompts."""
    prompt: int = 128
    """Tokens of each."""
    new_tokens: int = 64
    """Tokens that each is continued by."""
    repeats: int = 5
    """Timed rounds after one that is not counted."""
    device: str = "cpu"
    """cpu or cuda."""
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the base."""
    threads: int = 2
    """Threads."""
    small: bool = False
    """A tiny base and short texts, which only show that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/generate.json)."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Who continues the prompts."""

    label: str
    """For people."""
    model: Any
    """The base, or a PEFT model."""
    adapters: tuple[str, ...]
    """One that all rows have, or one for each."""


def random_base(options: GenerateBenchmark) -> Any:
    """Return the same random NF4 base every time, which never ends a text."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.compute_dtype]
    base: Any = base_with_random_weights(
        config_of(small=options.small),
        device=torch.device(options.device),
        storage="nf4",
        compute_dtype=dtype,
    ).eval()
    base.generation_config.eos_token_id = None
    return base


def with_adapters(base: Any, configs: Mapping[str, Any]) -> Any:
    """Return the base with adapters of random values."""
    model: Any = None
    for name, config in configs.items():
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".reft_phi." in key or ".lora_" in key:
                noise = torch.randn(value.shape, generator=generator)
                value.add_(0.02 * noise.to(value))
    return model.eval()


def methods_of(options: GenerateBenchmark) -> list[Method]:
    """Return the methods: the bare base, LoReFT and LoRA, each on a base of its own."""
    rows = tuple(f"row_{number}" for number in range(options.batch_size))
    names = {f"all_rows_{number}": positions for number, positions in enumerate(LOREFT)}
    names |= dict.fromkeys(rows, "f7+l7")
    loreft = with_adapters(
        random_base(options), {name: loreft_config(positions) for name, positions in names.items()}
    )
    lora = with_adapters(random_base(options), {name: lora_config() for name in rows})
    return [
        Method(label=BARE, model=random_base(options), adapters=(BASE,)),
        *(
            Method(label=label, model=loreft, adapters=(name,))
            for label, name in zip(LOREFT.values(), names, strict=False)
        ),
        Method(label=LOREFT_MIXED, model=loreft, adapters=rows),
        Method(label=LORA, model=lora, adapters=rows[:1]),
        Method(label=LORA_MIXED, model=lora, adapters=rows),
    ]


def loreft_config(positions: str) -> ReftConfig:
    """Return LoReFT on every layer."""
    return ReftConfig(
        task_type="CAUSAL_LM", rank=4, layers="all", positions=positions, init="paper"
    )


def lora_config() -> LoraConfig:
    """Return LoRA on all linear layers, with PEFT's defaults."""
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")


def generator_of(method: Method, ids: torch.Tensor) -> Callable[[int], float]:
    """Return what continues the prompts by so many tokens, and says how many seconds it took."""
    mixed = {"adapter_names": list(method.adapters)} if len(method.adapters) > 1 else {}

    def generate(num_tokens: int) -> float:
        with torch.no_grad(), answering(method.model, method.adapters[0]):
            _wait_for(ids.device)
            started = time.perf_counter()
            output = method.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **mixed,
            )
            _wait_for(ids.device)
            seconds = time.perf_counter() - started
        assert output.shape[1] == ids.shape[1] + num_tokens
        return seconds

    return generate


def logits_of(method: Method, ids: torch.Tensor) -> torch.Tensor:
    """Return (batch, vocabulary): what comes after the prompts."""
    mixed = {"adapter_names": list(method.adapters)} if len(method.adapters) > 1 else {}
    with torch.no_grad(), answering(method.model, method.adapters[0]):
        logits: torch.Tensor = method.model(input_ids=ids, **mixed).logits[:, -1]
    return logits.float()


def measure(options: GenerateBenchmark) -> list[dict[str, Any]]:
    """Let the methods take turns and return a row for each.

    Raises:
        RuntimeError: a method does not change what the base says.
    """
    methods = methods_of(options)
    vocab = config_of(small=options.small).vocab_size
    ids = torch.randint(
        3, vocab, (options.batch_size, options.prompt), generator=torch.Generator().manual_seed(1)
    ).to(options.device)
    bare = logits_of(methods[0], ids)
    changes = {each.label: (logits_of(each, ids) - bare).abs().amax(1) for each in methods[1:]}
    for label, change in changes.items():
        if not bool((change > 0).all()):
            raise RuntimeError(f"{label} has no effect on some row: {change.tolist()}")
    generators = {each.label: generator_of(each, ids) for each in methods}
    samples: dict[str, list[tuple[float, float]]] = {label: [] for label in generators}
    for number in range(options.repeats + 1):
        for label in generators if number % 2 else reversed(list(generators)):
            print(f"round {number}: {label}", file=sys.stderr, flush=True)
            taken = (generators[label](options.new_tokens), generators[label](1))
            if number:
                samples[label].append(taken)
    num_tokens = options.batch_size * options.new_tokens
    rows = []
    for label, pairs in samples.items():
        whole = summarize([pair[0] for pair in pairs])
        prefill = statistics.median(pair[1] for pair in pairs)
        change = changes.get(label)
        rows.append(
            {
                "method": label,
                **whole,
                "prefill_s": prefill,
                "decode_step_s": (whole["median_s"] - prefill) / (options.new_tokens - 1),
                "tokens_per_s": num_tokens / whole["median_s"],
                "max_logit_change": None if change is None else float(change.max()),
            }
        )
    return rows


def run(options: GenerateBenchmark) -> dict[str, Any]:
    """Measure all methods and return the result."""
    record = environment(options.device)
    rows = measure(options)
    goals = [(label, BARE, OVERHEAD_GOAL) for label in LOREFT.values()]
    goals += [(LOREFT_MIXED, LOREFT["f7+l7"], MIXED_GOAL)]
    # Beside them, what PEFT's LoRA takes.
    goals += [(LORA, BARE, OVERHEAD_GOAL), (LORA_MIXED, LORA, MIXED_GOAL)]
    return {
        "benchmark": "generate",
        "options": {key: value for key, value in asdict(options).items() if key != "output"},
        "rows": rows,
        "ratios": [ratio(rows, *goal) for goal in goals],
        "environment": record,
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run the benchmark from the command line."""
    options = tyro.cli(GenerateBenchmark, prog="python -m benchmarks.generate", description=__doc__)
    if options.small:
        options = replace(options, batch_size=2, prompt=12, new_tokens=4)
    torch.set_num_threads(1 if options.small else options.threads)
    report(
        run(options),
        title="continuing prompts: an NF4 base bare, with LoReFT and with LoRA",
        columns=COLUMNS,
        json_only=options.json,
        output=options.output,
    )


if __name__ == "__main__":
    main()
