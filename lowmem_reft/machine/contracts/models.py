"""What is relied on inside transformers: blocks, checkpoints, ``generate`` and caches."""

from __future__ import annotations

import inspect
from typing import Any

from lowmem_reft.machine.contracts.contract import expect, relied_on, some_tokens, tiny_llama


@relied_on("transformers", leaned_on_by="base/blocks.py reft/layer.py base/partial.py")
def _blocks_take_and_return_hidden_states() -> None:
    """decoder blocks are one list, and take and return hidden states first."""
    model = tiny_llama()
    lists = [module for module in model.modules() if type(module).__name__ == "ModuleList"]
    sizes = [len(each) for each in lists]
    wanted = [model.config.get_text_config().num_hidden_layers]
    expect(sizes == wanted, f"lists of {sizes} modules in a model of {wanted} blocks")
    seen: list[tuple[Any, Any]] = []
    for block in lists[0]:
        block.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    model(input_ids=some_tokens())
    expect(len(seen) == len(lists[0]), f"{len(seen)} calls of {len(lists[0])} blocks")
    shape = (*some_tokens().shape, model.config.hidden_size)
    for args, output in seen:
        hidden = output[0] if isinstance(output, tuple) else output
        for what, value in (("returns", hidden), ("is given", args[0] if args else None)):
            found = tuple(getattr(value, "shape", ()))
            expect(found == shape, f"a block {what} {type(value).__name__}{found} first")


@relied_on("transformers", "torch", leaned_on_by="reft/recompute.py base/checkpointing.py")
def _checkpoints_run_blocks_once() -> None:
    """a checkpointed block runs once, through its own checkpoint function."""
    # Hooks are outside and the block is an argument (since 5.23), or hooks are inside.
    model = tiny_llama().train()
    block = model.model.layers[0]
    events: list[str] = []

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(function, "args", None)
        events.append("a block" if given and given[0] is block else "a function")
        output = function(*args, **kwargs)
        events.append("its end")
        return output

    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})
    keywords = getattr(block._gradient_checkpointing_func, "keywords", {})
    expect(keywords.get("use_reentrant") is False, f"a checkpoint function with {keywords}")
    block._gradient_checkpointing_func = checkpoint
    block.register_forward_hook(lambda *_: events.append("a hook"))
    model(input_ids=some_tokens(), use_cache=False)
    known = (["a block", "its end", "a hook"], ["a function", "a hook", "its end"])
    expect(events in known, f"a checkpoint that runs {events}")


def cache_parameter(model: Any) -> str:
    """Return the name of the argument under which a model takes a cache, by its annotation."""
    parameters = inspect.signature(model.forward).parameters.items()
    names = [name for name, value in parameters if "Cache" in str(value.annotation)]
    expect(len(names) == 1, f"arguments {names} that are annotated as a Cache")
    return names[0]


@relied_on("transformers", leaned_on_by="reft/selection.py reft/tuner.py")
def _generate_passes_through_the_model() -> None:
    """every pass of generate goes through the model, with the one cache of its tokens."""
    import torch
    from transformers.cache_utils import Cache, DynamicCache

    model, ids = tiny_llama(), some_tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    own = DynamicCache(config=model.config)
    passes: list[tuple[Any, ...]] = []
    returned: list[bool] = []

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        expect(len(caches) == 1 and caches[0] is own, f"caches {caches} and not the one given")
        seen = kwargs["attention_mask"].shape
        passes.append((tuple(kwargs["input_ids"].shape), own.get_seq_length(), tuple(seen)))

    def after(_: Any, __: Any, output: Any) -> None:
        returned.append(any(part is own for part in output.values()))

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    options: dict[str, Any] = {cache_parameter(model): own, "do_sample": False}
    model.generate(ids, attention_mask=mask, max_new_tokens=3, **options)
    wanted = [((2, 5), 0, (2, 5)), ((2, 1), 5, (2, 6)), ((2, 1), 6, (2, 7))]
    expect(passes == wanted, f"passes over (tokens, tokens in the cache, mask) {passes}")
    expect(returned == [True] * 3, "an output without the cache that was given")


@relied_on("transformers", "torch", leaned_on_by="reft/selection.py reuse/batch.py base/partial.py")
def _cached_tokens_continue() -> None:
    """tokens behind a cache are computed as in one pass, and it says their number."""
    import torch

    model, ids = tiny_llama(), some_tokens()
    with torch.no_grad():
        whole = model(input_ids=ids)
        first = model(input_ids=ids[:, :3], use_cache=True)
        caches = [part for part in first.values() if hasattr(part, "get_seq_length")]
        expect(len(caches) == 1, f"an output with {len(caches)} caches")
        cache = caches[0]
        lengths = [cache.get_seq_length()]
        more: dict[str, Any] = {cache_parameter(model): cache, "use_cache": True}
        rest = model(input_ids=ids[:, 3:], **more)
        lengths.append(cache.get_seq_length())
    expect(lengths == [3, 5], f"lengths {lengths} of a cache with 3 and 5 tokens")
    difference = float((whole.logits[:, 3:] - rest.logits).abs().max())
    expect(difference < 1e-4, f"logits that differ by {difference:.2g}")
