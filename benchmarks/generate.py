"""What an adapter costs in generation, beside the bare base and PEFT's QLoRA.

Run ``python -m benchmarks.generate``. A randomly initialised NF4 Llama (d = 1024, 16 layers, 246 M
parameters) continues 8 prompts of 128 tokens by 64 tokens, greedily and without an end. Methods
take turns, forwards and backwards, after a round that is a warm-up; a sample is one whole call of
``generate``, and a ratio the median over rounds of samples that were taken next to each other.

Goals: LoReFT r4 on every layer (``l1``, ``f7+l7``, ``all``) takes at most 1.02 times as long as the
bare base, and 1.03 times where new tokens are edited too (``every``); a batch in which every row
has an adapter of its own at least 0.9 times the throughput of one adapter for all rows. LoRA r16 on
all linear layers is not merged: a 4-bit base cannot take it up without rounding, and several
adapters share the base. ``--model`` takes the shape of a real one, for a card: every method has a
base of its own, which are eight.

``prefill_s`` is what comes before the first new token; ``decode_step_s`` the median of what each
further one takes. Every method is shown to change the logits of the base (``max_logit_change``).
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peft import LoraConfig, get_peft_model
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import environment, ratio, report, summarize
from benchmarks.reuse_rounds import config_of
from lowmem_reft import ReftConfig
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.memory.planner import read_config
from lowmem_reft.methods.several import BASE, answering

BARE = "bare base"
LOREFT = {positions: f"LoReFT r4, {positions}" for positions in ("l1", "f7+l7", "all", "every")}
LOREFT_MIXED = "LoReFT r4, f7+l7, an adapter per row"
LORA, LORA_MIXED = "LoRA r16, not merged", "LoRA r16, not merged, an adapter per row"
OVERHEAD_GOAL = 1.02
EDITED_GOAL = 1.03
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

    model: str | None = None
    """Measure at this model's shape: short name, hub id, directory or config.json."""
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


def shape_of(options: GenerateBenchmark) -> Any:
    """Return the configuration of the base."""
    if options.model is not None and not options.small:
        return read_config(options.model)
    return config_of(small=options.small)


def random_base(options: GenerateBenchmark) -> Any:
    """Return the same random NF4 base every time, which never ends a text."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.compute_dtype]
    base: Any = base_with_random_weights(
        shape_of(options),
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
    give_random_values(model)
    return model.eval()


def give_random_values(model: Any) -> None:
    """Change every adapter's values, by the same on every device."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".reft_phi." in key or ".lora_" in key:
                noise = torch.randn(value.shape, generator=generator)
                value.add_(0.02 * noise.to(value))


def methods_of(options: GenerateBenchmark) -> list[Method]:
    """Return the methods: the bare base, LoReFT and LoRA, each on a base of its own."""
    rows = tuple(f"row_{number}" for number in range(options.batch_size))

    def method(label: str, adapters: tuple[str, ...], config: Any) -> Method:
        model = random_base(options)
        if config is not None:
            model = with_adapters(model, dict.fromkeys(adapters, config))
        return Method(label=label, model=model, adapters=adapters)

    return [
        method(BARE, (BASE,), None),
        *(method(label, rows[:1], loreft_config(at)) for at, label in LOREFT.items()),
        method(LOREFT_MIXED, rows, loreft_config("f7+l7")),
        method(LORA, rows[:1], lora_config()),
        method(LORA_MIXED, rows, lora_config()),
    ]


def loreft_config(positions: str) -> ReftConfig:
    """Return LoReFT on every layer."""
    return ReftConfig(
        task_type="CAUSAL_LM", rank=4, layers="all", positions=positions, init="paper"
    )


def lora_config() -> LoraConfig:
    """Return LoRA on all linear layers, with PEFT's defaults."""
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")


class Continuation(BaseStreamer):
    """A call of ``generate`` in a thread of its own that stops after each token.

    Args:
        method: Who continues.
        ids: (batch, sequence), the prompts.
        num_tokens: By how many tokens.
    """

    def __init__(self, method: Method, ids: torch.Tensor, num_tokens: int) -> None:
        """Wait for the first turn."""
        self._method = method
        self._ids = ids
        self._num_tokens = num_tokens
        self._threads = torch.get_num_threads()
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def advance(self) -> float:
        """Go on until the next token is there and return the seconds that it took.

        The first call goes as far as the prompt, the second one includes the prefill.

        Raises:
            RuntimeError: ``generate`` failed.
        """
        started = time.perf_counter()
        self._go.release()
        self._stopped.acquire()
        seconds = time.perf_counter() - started
        if self._error is not None:
            raise RuntimeError(f"{self._method.label} failed in generate") from self._error
        return seconds

    def put(self, value: torch.Tensor) -> None:
        """Stop until the next turn; ``generate`` calls it with the prompt and with each token."""
        self._stopped.release()
        self._go.acquire()

    def end(self) -> None:
        """Do nothing: the call is over."""

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)
        try:
            self._generate()
        except BaseException as error:
            self._error = error
        self._stopped.release()

    def _generate(self) -> None:
        method, ids = self._method, self._ids
        with torch.no_grad(), answering(method.model, method.adapters[0]):
            output = method.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._num_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                streamer=self,
                **_mixed(method),
            )
        if output.shape[1] != ids.shape[1] + self._num_tokens:
            raise RuntimeError(f"{output.shape[1] - ids.shape[1]} tokens came")


def _mixed(method: Method) -> dict[str, Any]:
    return {"adapter_names": list(method.adapters)} if len(method.adapters) > 1 else {}


def continue_together(
    methods: list[Method], ids: torch.Tensor, num_tokens: int
) -> dict[str, list[float]]:
    """Return, by method, the seconds of the prefill and of each further token, taken in turns."""
    running = {each.label: Continuation(each, ids, num_tokens) for each in methods}
    turns: dict[str, list[float]] = {label: [] for label in running}
    for number in range(num_tokens + 1):  # the first turn ends at the prompt
        for label in running if number % 2 else reversed(running):
            turns[label].append(running[label].advance())
    for label, continuation in running.items():
        turns[label][:2] = [sum(turns[label][:2])]
        turns[label][-1] += continuation.advance()  # what generate does after the last token
    return turns


def logits_of(method: Method, ids: torch.Tensor) -> torch.Tensor:
    """Return (batch, vocabulary): what comes after the prompts."""
    with torch.no_grad(), answering(method.model, method.adapters[0]):
        logits: torch.Tensor = method.model(input_ids=ids, **_mixed(method)).logits[:, -1]
    return logits.float()


def measure(options: GenerateBenchmark) -> list[dict[str, Any]]:
    """Let the methods take turns and return a row for each.

    Raises:
        RuntimeError: a method does not change what the base says.
    """
    methods = methods_of(options)
    vocab = shape_of(options).vocab_size
    ids = torch.randint(
        3, vocab, (options.batch_size, options.prompt), generator=torch.Generator().manual_seed(1)
    ).to(options.device)
    bare = logits_of(methods[0], ids)
    changes = {each.label: (logits_of(each, ids) - bare).abs().amax(1) for each in methods[1:]}
    for label, change in changes.items():
        if not bool((change > 0).all()):
            raise RuntimeError(f"{label} has no effect on some row: {change.tolist()}")
    samples: dict[str, list[list[float]]] = {each.label: [] for each in methods}
    for number in range(options.repeats + 1):
        print(f"round {number} of {options.repeats}", file=sys.stderr, flush=True)
        for label, turns in continue_together(methods, ids, options.new_tokens).items():
            if number:
                samples[label].append(turns)
    num_tokens = options.batch_size * options.new_tokens
    rows = []
    for label, rounds in samples.items():
        whole = summarize([sum(turns) for turns in rounds])
        change = changes.get(label)
        rows.append(
            {
                "method": label,
                **whole,
                "prefill_s": statistics.median(turns[0] for turns in rounds),
                "decode_step_s": statistics.median(step for turns in rounds for step in turns[1:]),
                "tokens_per_s": num_tokens / whole["median_s"],
                "max_logit_change": None if change is None else float(change.max()),
            }
        )
    return rows


def run(options: GenerateBenchmark) -> dict[str, Any]:
    """Measure all methods and return the result."""
    record = environment(options.device)
    rows = measure(options)
    goals = [
        (label, BARE, EDITED_GOAL if at == "every" else OVERHEAD_GOAL)
        for at, label in LOREFT.items()
    ]
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
