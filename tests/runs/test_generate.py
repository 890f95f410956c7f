"""Generation from files and the command line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.methods.several import answering, find_adapters, load_together
from lowmem_reft.options import AskingOptions, DecodingOptions, GenerateOptions, ModelOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.layer import ReftLayer
from lowmem_reft.reft.selection import Selector
from lowmem_reft.runs import generate
from lowmem_reft.runs.generate import continue_prompts, generate_batches, run_generation, until_stop


def test_batched_generation_equals_a_manual_greedy_loop_that_edits_the_prompt_only(
    tiny_llama_dir: Path,
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper"),
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    prompts = [tokenizer(text)["input_ids"] for text in ("is it good?", "the lazy dog and a fox")]
    texts = generate_batches(model, tokenizer, prompts, batch_size=2, max_new_tokens=5)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(5):
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            mask[0, [0, len(prompt) - 2, len(prompt) - 1]] = True
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), intervention_mask=mask).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_decode_steps_neither_select_tokens_nor_look_at_interventions(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper"),
    ).eval()
    calls = {"select": 0, "edited": 0, "restore_full_precision": 0}

    def count(owner: type, name: str) -> None:
        own = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(Selector, "select")
    count(ReftLayer, "edited")
    count(ReftLayer, "restore_full_precision")
    ids = torch.tensor([[5, 6, 7, 8]])
    tokens = model.generate(
        input_ids=ids, attention_mask=ids > 0, min_new_tokens=6, max_new_tokens=6, use_cache=True
    )
    assert tokens.shape[1] == 10
    assert calls == {"select": 1, "edited": 4, "restore_full_precision": 4}  # of four layers


def test_a_file_of_prompts_becomes_a_file_of_responses(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "is it good?"}\n{"prompt": "the lazy dog"}\n{"prompt": "a"}\n')
    result = run_generation(
        GenerateOptions(
            model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
            input=source,
            output=output,
            decoding=DecodingOptions(max_new_tokens=4),
            batch_size=2,
            quiet=True,
        )
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["is it good?", "the lazy dog", "a"]
    assert (result["num_examples"], result["num_cut_prompts"]) == (3, 0)


def test_prompts_that_are_cut_are_counted_and_said_once(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["a", "the lazy dog " * 9, "the quick fox " * 9]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = GenerateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
        input=source,
        output=output,
        max_length=16,
        decoding=DecodingOptions(max_new_tokens=2),
        quiet=True,
    )
    with pytest.warns(UserWarning, match="2 of 3 prompts had more than max_length 16") as said:
        result = run_generation(options)
    assert len(said) == 1
    assert result["num_cut_prompts"] == 2
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == prompts
    again = replace(options, max_length=None, overwrite=True)
    assert run_generation(again)["num_cut_prompts"] == 0


@pytest.mark.parametrize("trained", [False, True])
def test_a_classifier_does_not_generate(
    tiny_llama_dir: Path, tmp_path: Path, trained: bool
) -> None:
    model = ModelOptions(
        model=str(tiny_llama_dir), device="cpu", task_type=None if trained else "SEQ_CLS"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    TrainingCard(base=model.model, storage="nf4", task_type="SEQ_CLS").save(tmp_path)
    adapter = str(tmp_path) if trained else None
    with pytest.raises(InputError, match="task_type must be CAUSAL_LM to generate, got 'SEQ_CLS'"):
        run_generation(GenerateOptions(model=model, adapter=adapter, prompt="a"))


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "input": Path("b.jsonl")}])
def test_exactly_one_source_of_prompts_is_wanted(tiny_llama_dir: Path, given: dict) -> None:
    with pytest.raises(InputError, match="input must be given, or prompt"):
        run_generation(GenerateOptions(model=ModelOptions(model=str(tiny_llama_dir)), **given))


# Files that are completed.

PROMPTS = ["is it good?", "the lazy dog", "a", "once upon", "question: what"]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> GenerateOptions:
    """Five prompts, two in a batch, drawn so that answers depend on the batch and its seed."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return GenerateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu", storage="fp32"),
        input=source,
        output=tmp_path / "out" / "answers.jsonl",
        decoding=DecodingOptions(max_new_tokens=5, temperature=1.0),
        batch_size=2,
        quiet=True,
    )


def written(options: GenerateOptions) -> bytes:
    assert options.output is not None
    return options.output.read_bytes()


@pytest.mark.parametrize("num_kept", [0, 1, 2, 3])
@pytest.mark.parametrize("num_half", [0, 4, 25, -1])
def test_an_interrupted_file_becomes_what_it_would_have_been(
    options: GenerateOptions, num_kept: int, num_half: int
) -> None:
    run_generation(options)
    whole = written(options)
    lines = whole.splitlines(keepends=True)
    options.output.write_bytes(b"".join(lines[:num_kept]) + lines[num_kept][:num_half])
    assert run_generation(options)["num_kept"] == num_kept
    assert written(options) == whole


def test_a_whole_file_is_neither_redone_nor_overwritten(
    options: GenerateOptions, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run_generation(options)
    before = written(options)
    request.getfixturevalue("no_base")
    result = run_generation(options)
    assert (result["num_examples"], result["num_kept"], result["num_new_tokens"]) == (5, 5, 0)
    assert written(options) == before
    assert "holds all answers; --overwrite writes it anew" in capsys.readouterr().err


def run_file(options: GenerateOptions) -> Path:
    return options.output.with_name("answers.jsonl.run.json")


def begun(options: GenerateOptions, num_kept: int = 2) -> bytes:
    """Leave what an interrupted run leaves: some answers, and what made them."""
    run_generation(replace(options, overwrite=True))
    lines = written(options).splitlines(keepends=True)[:num_kept]
    options.output.write_bytes(b"".join(lines))
    return written(options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_another_process_writes_to_is_left_alone(
    options: GenerateOptions, overwrite: bool
) -> None:
    assert options.output is not None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"one process, .* another one is writing"):
            run_generation(replace(options, overwrite=overwrite))
        assert options.output.read_bytes() == b""
    assert run_generation(options)["num_kept"] == 0


def test_the_line_that_another_process_is_writing_stays(options: GenerateOptions) -> None:
    lines = begun(options).splitlines(keepends=True)
    before = lines[0] + lines[1][: len(lines[1]) // 2]
    options.output.write_bytes(before)
    with options.output.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another one is writing"):
            run_generation(options)
    assert written(options) == before
    assert run_generation(options)["num_kept"] == 1


def test_answers_that_another_process_adds_meanwhile_are_not_written_twice(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = generate.load_together

    def load_while_another_run_finishes(*arguments: Any) -> Any:
        monkeypatch.setattr(generate, "load_together", load)
        run_generation(options)
        return load(*arguments)

    monkeypatch.setattr(generate, "load_together", load_while_another_run_finishes)
    with pytest.raises(InputError, match="another one is writing"):
        run_generation(options)
    assert run_generation(options)["num_kept"] == run_generation(options)["num_examples"]


def test_overwrite_replaces_the_answers_and_what_is_known_of_them(options: GenerateOptions) -> None:
    run_generation(options)
    before = written(options)
    options.output.write_text("something else")
    run_file(options).write_text("something else")
    assert run_generation(replace(options, overwrite=True))["num_kept"] == 0
    assert written(options) == before
    assert run_generation(options)["num_kept"] == 5


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"prompt": "another", "response": "b"}\n', 1),
        ('{"prompt": "is it good?", "response": "b"}\n{"prompt": "is it good?"}\n', 2),
        ('{"prompt": "is it good?", "adapter": "run", "response": "b"}\n', 1),
        ('{"prompt": "is it good?", "response": 3}\n', 1),
        ("[]\n", 1),
        ("a text without an end of line", 1),
        ('{"prompt": "is it good?", "response": "b"}\n{"prompt": "the lazy cat', 2),
        ("".join(json.dumps({"prompt": p, "response": ""}) + "\n" for p in [*PROMPTS, "a"]), 6),
        ("".join(json.dumps({"prompt": p, "response": ""}) + "\n" for p in PROMPTS) + "{", 6),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    options: GenerateOptions, request: pytest.FixtureRequest, content: str, line: int
) -> None:
    run_generation(options)
    request.getfixturevalue("no_base")
    options.output.write_text(content)
    with pytest.raises(InputError, match=rf"line {line}; name another file, or add --overwrite"):
        run_generation(options)
    assert options.output.read_text() == content


def test_the_output_is_a_file_and_not_the_input(options: GenerateOptions) -> None:
    with pytest.raises(InputError, match="output must be another file than input"):
        run_generation(replace(options, output=options.input))
    with pytest.raises(InputError, match="output must be a file, got the directory"):
        run_generation(replace(options, output=options.input.parent))


def test_a_run_that_is_interrupted_keeps_what_it_has_and_says_so(
    options: GenerateOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_generation(options)
    whole = written(options)
    options.output.unlink()
    own, calls = torch.manual_seed, []

    def interrupted(seed: int) -> Any:
        calls.append(seed)
        if len(calls) == 3:  # before the third batch
            raise KeyboardInterrupt
        return own(seed)

    monkeypatch.setattr("lowmem_reft.runs.generate.torch.manual_seed", interrupted)
    flags = (
        f"generate --model {options.model.model} --storage fp32 --device cpu --input "
        f"{options.input} --output {options.output} --max-new-tokens 5 --temperature 1 "
        "--batch-size 2 --quiet"
    )
    assert cli.main(flags.split()) == 130
    assert f"answers in {options.output} are kept" in capsys.readouterr().err
    assert written(options) == b"".join(whole.splitlines(keepends=True)[:4])
    monkeypatch.undo()
    assert cli.main(flags.split()) == 0
    assert written(options) == whole


def greedy(options: GenerateOptions) -> GenerateOptions:
    return replace(options, decoding=DecodingOptions(max_new_tokens=5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoding": {"max_new_tokens": 12}}, r"got max_new_tokens 12 \(was 5\) for"),
        ({"decoding": {"temperature": 0.0}}, r"got temperature 0.0 \(was 1.0\) for"),
        ({"decoding": {"top_p": 0.5}}, r"got top_p 0.5 \(was 1.0\) for"),
        ({"decoding": {"stop": ("\n", "b")}}, r"got stop \['\\n', 'b'\] \(was \[\]\) for"),
        ({"decoding": {"seed": 1}}, r"got seed 1 \(was 0\) for"),
        ({"batch_size": 4}, r"got batch_size 4 \(was 2\) for"),
        (
            {"asking": {"template": "Q: {prompt}"}},
            r"template 'Q: \{prompt\}' \(was '\{prompt\}'\) for",
        ),
        ({"max_length": 16}, r"max_length 16 \(was 512\) for"),
        (
            {"model": {"storage": "bf16"}},
            r"got storage 'bf16' \(was 'fp32'\), compute_dtype 'bf16'",
        ),
        (
            {"decoding": {"max_new_tokens": 12}, "asking": {"template": "Q: {prompt}"}},
            r"template 'Q: \{prompt\}' \(was '\{prompt\}'\), max_new_tokens 12 \(was 5\) for",
        ),
    ],
)
def test_answers_that_were_made_otherwise_are_refused_and_left_as_they_are(
    options: GenerateOptions,
    request: pytest.FixtureRequest,
    changed: dict[str, Any],
    message: str,
) -> None:
    before, run = begun(options), run_file(options).read_bytes()
    request.getfixturevalue("no_base")
    fields = {
        name: replace(getattr(options, name), **value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    with pytest.raises(InputError, match=f"{message}.*name another file, or add --overwrite"):
        run_generation(replace(options, **fields))
    assert (written(options), run_file(options).read_bytes()) == (before, run)


def test_the_dtype_of_quantized_arithmetic_is_part_of_a_run(options: GenerateOptions) -> None:
    nf4 = replace(options.model, storage="nf4", compute_dtype="fp32")
    begun(replace(options, model=nf4))
    with pytest.raises(InputError, match=r"got compute_dtype 'bf16' \(was 'fp32'\) for"):
        run_generation(replace(options, model=replace(nf4, compute_dtype="bf16")))


def test_where_nothing_is_drawn_neither_seed_nor_batch_size_is_part_of_a_run(
    options: GenerateOptions,
) -> None:
    begun(greedy(options))
    other = DecodingOptions(max_new_tokens=5, seed=1)
    assert run_generation(replace(options, decoding=other, batch_size=3))["num_kept"] == 2


def test_answers_of_another_base_are_refused(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    shutil.copytree(tiny_llama_dir, mine)
    shutil.copytree(tiny_llama_dir, other)
    asked = replace(options, model=replace(options.model, model=str(mine)))
    before = begun(asked)
    with pytest.raises(InputError, match=r"got base '.*other' \(was '.*mine'\) for"):
        run_generation(replace(options, model=replace(options.model, model=str(other))))
    model = AutoModelForCausalLM.from_pretrained(mine)
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(mine)
    with pytest.raises(InputError, match=r"got base_digest '\w+' \(was '\w+'\) for"):
        run_generation(asked)
    assert written(options) == before


def test_a_base_that_is_fetched_again_is_compared_once_it_is_there(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begun(options)

    def fetched(digest: str) -> None:  # it is in no cache at first
        digests = iter([None, digest])
        monkeypatch.setattr("lowmem_reft.runs.generate.checkpoint_digest", lambda _: next(digests))

    fetched("another")
    with pytest.raises(InputError, match="base_digest 'another'"):
        run_generation(options)
    assert written(options) == before
    fetched(json.loads(run_file(options).read_text())["base_digest"])
    assert run_generation(options)["num_kept"] == 2
    fetched("never asked for")
    assert run_generation(options)["num_kept"] == 5


@pytest.mark.parametrize("content", [None, "", "[]", '{"base": '])
def test_answers_of_which_nothing_is_known_are_refused(
    options: GenerateOptions, content: str | None
) -> None:
    before = begun(options)
    if content is None:
        run_file(options).unlink()
    else:
        run_file(options).write_text(content)
    with pytest.raises(InputError, match=r"without answers\.jsonl\.run\.json, .* add --overwrite"):
        run_generation(options)
    assert written(options) == before
    assert run_generation(replace(options, overwrite=True))["num_kept"] == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_interrupted_before_its_first_answer_binds_nobody(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        begun(greedy(options))

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lowmem_reft.runs.generate.torch.manual_seed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_generation(replace(options, overwrite=overwrite))
    assert run_file(options).is_file()
    assert written(options) == b""
    other = replace(options, batch_size=4)
    assert [run_generation(each)["num_kept"] for each in (other, other)] == [0, 5]
    options.output.unlink()  # who removes the answers is not bound either
    assert [run_generation(each)["num_kept"] for each in (options, options)] == [0, 5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said(options: GenerateOptions) -> None:
    with pytest.raises(OSError, match="No space") as said:
        run_generation(replace(options, output=Path("/dev/full")))
    assert said.value.errno == errno.ENOSPC
    assert not Path("/dev/full.run.json").exists()


# How tokens are chosen.


def test_an_answer_ends_before_a_stop_text(options: GenerateOptions) -> None:
    asked = replace(options, input=None, output=None, prompt="the lazy dog")
    free = DecodingOptions(max_new_tokens=12)
    text = run_generation(replace(asked, decoding=free))["response"]
    stopping = replace(free, stop=(text[4:6], "never there"))
    stopped = run_generation(replace(asked, decoding=stopping))["response"]
    assert stopped == text[: text.index(text[4:6])]


def test_a_text_is_cut_at_the_first_of_its_stop_texts() -> None:
    assert until_stop("one two three", ["three", "two", "four"]) == "one "
    assert until_stop("one two three", ["four"]) == "one two three"


def test_only_the_most_probable_tokens_are_drawn(options: GenerateOptions) -> None:
    greedy = DecodingOptions(max_new_tokens=5)
    run_generation(replace(options, decoding=greedy))
    expected = written(options)
    nearly = DecodingOptions(max_new_tokens=5, temperature=1.0, top_p=1e-6)
    run_generation(replace(options, decoding=nearly, overwrite=True))
    assert written(options) == expected
    run_generation(replace(options, overwrite=True))
    assert written(options) != expected


# What the base's own configuration says of generation.

DEFAULTS: dict[str, dict[str, Any]] = {
    "a penalty": {"repetition_penalty": 1.5},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "many tokens": {"min_new_tokens": 30, "min_length": 50},
    "few tokens": {"max_length": 10, "max_new_tokens": 2},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "several": {"num_return_sequences": 2, "do_sample": True, "num_beams": 2},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "a clock": {"max_time": 1e-6},
    "drawn": {"do_sample": True, "temperature": 5.0, "top_k": 3, "min_p": 0.2, "typical_p": 0.3},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
    "suppressed": {"suppress_tokens": [*range(3, 90)], "begin_suppress_tokens": [*range(60)]},
    "bad words": {"bad_words_ids": [[number] for number in range(5, 90)]},
    "biased": {"sequence_bias": [[[7], 100.0]], "exponential_decay_length_penalty": [1, 9.0]},
    "stopped": {"stop_strings": ["e", "a", "o", "the"]},
    "guided": {"guidance_scale": 3.0},
    "looked up": {"prompt_lookup_num_tokens": 2},
    "a watermark": {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0}},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "in parts": {"prefill_chunk_size": 2},
    "another end": {"eos_token_id": [*range(3, 90)], "pad_token_id": 9},
    "no end": {"eos_token_id": None},
    "healed": {"token_healing": True},
}


def with_defaults(base: Path, directory: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(base, directory)
    config = json.loads((directory / "generation_config.json").read_text()) | changes
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("changes", DEFAULTS.values(), ids=DEFAULTS)
def test_greedy_answers_do_not_depend_on_what_the_base_says_of_generation(
    options: GenerateOptions, tmp_path: Path, changes: dict[str, Any], adapted: bool
) -> None:
    base = Path(options.model.model)
    adapter = save_adapter(base, tmp_path / "one") if adapted else None
    asked = replace(greedy(options), adapter=adapter, output=tmp_path / "plain.jsonl")
    run_generation(asked)
    other = with_defaults(base, tmp_path / "other", changes)
    model = replace(options.model, model=str(other))
    run_generation(replace(asked, model=model, output=tmp_path / "changed.jsonl"))
    assert (tmp_path / "changed.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_what_is_drawn_does_not_depend_on_what_the_base_says_of_generation(
    options: GenerateOptions, tmp_path: Path
) -> None:
    run_generation(options)
    expected = written(options)
    changes = {"top_k": 1, "min_p": 0.9, "typical_p": 0.1, "repetition_penalty": 3.0}
    other = with_defaults(Path(options.model.model), tmp_path / "other", changes)
    model = replace(options.model, model=str(other))
    run_generation(replace(options, model=model, overwrite=True))
    assert written(options) == expected


class Scripted(torch.nn.Module):
    """Stands for the head of a model that answers with these tokens, one batch row each."""

    def __init__(self, model: Any, *rows: list[int]) -> None:
        super().__init__()
        self.rows, self.step = rows, -1
        self.vocab_size = model.config.vocab_size
        model.lm_head = self

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.step += 1
        logits = torch.zeros(len(hidden), 1, self.vocab_size)
        for row, ids in zip(logits, self.rows, strict=True):
            row[0, ids[self.step] if self.step < len(ids) else 11] = 1.0
        return logits


def test_answers_end_where_training_ends_them_and_tokens_are_counted_without_padding(
    tiny_llama_dir: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model.generation_config.eos_token_id = [20, 21]  # another model's: no special tokens
    decoding = DecodingOptions(max_new_tokens=6)
    text = tokenizer.decode([20, 21])
    for pad in ("<pad>", "</s>"):
        tokenizer.pad_token = pad
        for ends in ([tokenizer.eos_token_id], [tokenizer.eos_token_id, 30]):
            Scripted(model, [20, 21, ends[-1]], [20, 21, 20, 21, 20, 21, 20])
            short, long = continue_prompts(model, tokenizer, [[5], [6]], decoding, ends=ends)
            assert short[:2] == (text, 3)
            assert long == (tokenizer.decode([20, 21] * 3), 6, True)
        Scripted(model, [20, 21, 22, 23], [22] * 6)
        stop = replace(decoding, stop=(tokenizer.decode([21, 22]),))
        stopped, _ = continue_prompts(model, tokenizer, [[5], [6]], stop, ends=ends)
        assert stopped[:2] == (tokenizer.decode([20]), 3)


def test_a_base_alone_also_ends_at_the_special_tokens_that_it_names(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model.generation_config.eos_token_id = [20, tokenizer.bos_token_id]
    Scripted(model, [20, tokenizer.bos_token_id, 21, 22])
    decoding = DecodingOptions(max_new_tokens=4)
    (answer,) = continue_prompts(model, tokenizer, [[5]], decoding, ends=[tokenizer.eos_token_id])
    assert answer == (tokenizer.decode([20]), 2, False)


def test_chats_end_where_the_chat_template_ends_a_turn(
    options: GenerateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "chat"
    shutil.copytree(options.model.model, base)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}"
    )
    asked: list[Any] = []
    new = torch.tensor([[20]])
    monkeypatch.setattr(
        generate, "generate", lambda *_, eos_token_id, **__: asked.append(eos_token_id) or new
    )
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a fox"}]}\n')
    model = replace(options.model, model=str(base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    run_generation(replace(options, model=model, input=file))
    alone = replace(options, model=model, input=None, prompt="a", output=None)
    run_generation(alone)
    run_generation(replace(alone, asking=AskingOptions(raw=True)))
    ends = sorted([tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert [sorted(set(each)) for each in asked] == [ends, ends, [tokenizer.eos_token_id]]


# Several adapters.


def save_adapter(base_dir: Path, directory: Path, *, seed: int = 0, **card: Any) -> str:
    """Save an adapter of random values, of ReFT unless ``config`` says otherwise; its folder."""
    config = card.pop("config", ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.save_pretrained(directory)
    fields = {"base": str(base_dir), "storage": "fp32", **card}
    TrainingCard(**fields).save(directory)
    return str(directory)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **fields)


def test_an_adapter_that_answers_for_a_while_leaves_the_one_before_active(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    given = [save_adapter(tiny_llama_dir, tmp_path / name) for name in ("one", "two")]
    base = ModelOptions(model=str(tiny_llama_dir), device="cpu")
    adapters = find_adapters(",".join(given), base, template=None, max_length=None)
    model, _ = load_together(base, adapters)
    assert model.active_adapters == ["default"]
    with suppress(KeyboardInterrupt), answering(model, "adapter_1"):
        assert model.active_adapters == ["adapter_1"]
        raise KeyboardInterrupt
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_tokens_of_several_prompts_are_not_streamed(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    streamer, decoding = TextStreamer(tokenizer), DecodingOptions(max_new_tokens=1)
    for names in (None, ["a", "b"]):
        with pytest.raises(ValueError, match="prompts must be one with a streamer, got 2"):
            continue_prompts(
                model, tokenizer, [[5], [6]], decoding, adapters=names, ends=[], streamer=streamer
            )


def alone(options: GenerateOptions, adapter: str | None) -> list[str]:
    result = replace(options, adapter=adapter, overwrite=True, batch_size=1)
    run_generation(result)
    return [json.loads(line)["response"] for line in written(result).splitlines()]


@pytest.mark.parametrize("kind", ["reft", "lora", "dora"])
def test_every_adapter_and_the_base_answer_every_prompt(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    config = {} if kind == "reft" else {"config": lora(use_dora=kind == "dora")}
    one = save_adapter(tiny_llama_dir, tmp_path / "one", seed=1, **config)
    two = save_adapter(
        tiny_llama_dir, tmp_path / "two.5", seed=2, template="question: {prompt}", **config
    )
    options = replace(options, decoding=DecodingOptions(max_new_tokens=6), batch_size=4)
    expected = {"one": alone(options, one), "two.5": alone(options, two)}
    expected["__base__"] = alone(options, None)
    assert len(set(map(tuple, expected.values()))) == 3
    together = replace(options, adapter=f"{one},__base__,{two}", overwrite=True)
    assert run_generation(together)["num_examples"] == 15
    lines = [json.loads(line) for line in written(together).splitlines()]
    assert [line["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(3)]
    assert [line["adapter"] for line in lines] == ["one", "__base__", "two.5"] * 5
    for name, answers in expected.items():
        assert [line["response"] for line in lines if line["adapter"] == name] == answers
    whole = written(together)
    options.output.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    assert run_generation(replace(together, overwrite=False))["num_kept"] == 7
    assert written(together) == whole


def test_it_is_said_that_the_base_is_asked_as_an_adapter_is(
    options: GenerateOptions,
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "one", template="Q: {prompt}")
    asked = replace(options, input=None, prompt="a", output=None, quiet=False)
    for adapter, template, times in ((f"{one},__base__", None, 1), (one, None, 0), (None, None, 0)):
        asking = AskingOptions(template=template)
        run_generation(replace(asked, adapter=adapter, asking=asking))
        err = capsys.readouterr().err
        said = "__base__ is asked as the first adapter is: prompts are written as 'Q: {prompt}'"
        assert err.count(said) == times


def test_one_prompt_is_answered_by_name(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "one")
    asked = replace(options, adapter=f"__base__,{one}", input=None, prompt="a", output=None)
    assert list(run_generation(asked)["responses"]) == ["__base__", "one"]


def test_adapters_that_do_not_go_together_are_refused_before_the_base_is_loaded(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path, no_base: None
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "one")
    other = save_adapter(tiny_llama_dir, tmp_path / "other", config=lora())
    nf4 = save_adapter(tiny_llama_dir, tmp_path / "nf4", storage="nf4")
    refusals = {
        f"{one},{other}": r"one PEFT type to load them together, got REFT \(one\), LORA \(other",
        f"{one},{one}": "different names, got 'one' more than once",
        f"{one},{tmp_path}/nothing": "adapter must be a directory with adapter_config.json",
    }
    for adapter, message in refusals.items():
        with pytest.raises(InputError, match=message):
            run_generation(replace(options, adapter=adapter))
    unsaid = replace(options, model=replace(options.model, storage=None), adapter=f"{one},{nf4}")
    with pytest.raises(InputError, match=r"storage must be given .* got fp32 \(one\), nf4 \(nf4"):
        run_generation(unsaid)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_answers_of_an_adapter_that_was_trained_again_are_refused(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path, file: str
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "one")
    save_adapter(tiny_llama_dir, tmp_path / "two", seed=1)
    asked = replace(options, adapter=one)
    before = begun(asked)
    (tmp_path / "one" / "adapter_2").mkdir()  # as PEFT saves a second one
    content = (tmp_path / "two" / file).read_bytes()
    (tmp_path / "one" / file).write_bytes(content + b" " * file.endswith("json"))
    os.utime(tmp_path / "one" / file, (1, 1))  # also if it is older than the answers
    with pytest.raises(InputError, match=r"got one: digest '\w+' \(was '\w+'\) for"):
        run_generation(asked)
    assert written(options) == before


def test_an_adapter_in_a_folder_named_adapter_has_the_name_of_its_run(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "runA" / "adapter", seed=1)
    two = save_adapter(tiny_llama_dir, tmp_path / "runB" / "adapter", seed=2)
    run_generation(replace(options, adapter=f"{one},{two}"))
    names = [json.loads(line)["adapter"] for line in written(options).splitlines()]
    assert names == ["runA", "runB"] * 5
    whole = replace(options, adapter=str(tmp_path / "runA"), overwrite=True)
    run_generation(whole)
    assert run_generation(replace(options, adapter=one))["num_kept"] == 5
    with pytest.raises(InputError, match=r"got adapters \['runB'\] \(was \['runA'\]\) for"):
        run_generation(replace(options, adapter=two))


def test_adapters_of_bases_with_other_names_are_warned_of(
    options: GenerateOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    one = save_adapter(tiny_llama_dir, tmp_path / "one")
    two = save_adapter(tiny_llama_dir, tmp_path / "two", base="another")
    with pytest.warns(UserWarning, match=r"bases of different names, .* 'another' \(two\)"):
        run_generation(replace(options, adapter=f"{one},{two}"))
