"""Plans against sums done by hand and against each other; the command line's refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from lowmem_reft import InputError, cli
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data.rows import load_rows
from lowmem_reft.data.tokens import encode_rows
from lowmem_reft.memory.planner import GIB, Card, Planner, plan, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.reuse import ReusePlan
from lowmem_reft.memory.search import Candidate, describe, fit, longest_seq_len, memory_ladder
from lowmem_reft.memory.shapes import config_of, nearest_names
from lowmem_reft.memory.verdict import run_plan
from lowmem_reft.options import MemoryOptions, MethodOptions, PlanOptions, written
from planned_llama import LLAMA

LOREFT = MethodOptions(method="loreft", rank=4, positions="f7+l7")


def card(mebibytes: float) -> Card:
    return Card(name="test", memory_bytes=round(mebibytes * 2**20), context_bytes=0)


def test_the_weights_of_llama_8b_are_the_sum_of_its_matrices() -> None:
    found = plan("llama-3.1-8b", lengths=Lengths(seq_len=256), method=LOREFT)
    per_block = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    quantized = 32 * per_block // 2
    plain = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)
    constants = 32 * per_block / 64 * (1 + 4 / 256)
    weights = found.breakdown_bytes["weights"]
    assert abs(weights - quantized - plain) < 100_000  # rotary tables and rounding
    assert abs(found.breakdown_bytes["quantization_constants"] / constants - 1) < 0.01
    assert sum(found.breakdown_bytes.values()) == found.peak_bytes
    assert found.num_trainable_params == 32 * (2 * 4 * 4096 + 4)
    assert found.fits is None


def test_llama_8b_fits_where_unsloths_table_says_so_and_with_longer_examples() -> None:
    setting = Setting(method=LOREFT)
    memory = MemoryOptions(
        activation_checkpointing=True,
        mlp_tokens=4096,
        offload_activations=True,
        embedding_on_host=True,
    )
    for gib, tokens in ((8, 2_972), (12, 21_848), (16, 40_724), (24, 78_475)):
        found = Card.find(memory_gib=gib)
        assert found is not None
        planner = Planner(read_config("llama-3.1-8b"), found)
        peak = planner.training_peak_bytes(
            replace(setting, memory=replace(memory, mlp_tokens=max(4096, tokens // 8))),
            Lengths(seq_len=tokens),
        )
        assert found.required_bytes(peak) <= found.memory_bytes, gib


def test_more_tokens_more_examples_and_less_saving_need_more_memory(config_file: Path) -> None:
    planner = Planner(read_config(config_file), None)
    setting = Setting(method=LOREFT)

    def peak(memory: MemoryOptions | None = None, **lengths: int) -> int:
        return planner.training_peak_bytes(
            replace(setting, memory=memory or MemoryOptions()), Lengths(**lengths)
        )

    assert peak(seq_len=256) < peak(seq_len=512) < peak(seq_len=512, batch_size=2)
    checkpointed = MemoryOptions(activation_checkpointing=True)
    chunked = MemoryOptions(activation_checkpointing=True, mlp_tokens=256)
    offloaded = MemoryOptions(
        activation_checkpointing=True, mlp_tokens=256, offload_activations=True
    )
    on_host = replace(offloaded, embedding_on_host=True)
    ladder = [MemoryOptions(), checkpointed, chunked, offloaded, on_host]
    peaks = [peak(memory, seq_len=2048) for memory in ladder]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_eager_attention_needs_the_matrix_that_flash_attention_does_not(config_file: Path) -> None:
    def peak(implementation: str) -> int:
        found = plan(
            config_file,
            lengths=Lengths(seq_len=1024),
            method=LOREFT,
            attn_implementation=implementation,
        )
        return found.peak_bytes

    scores = 8 * 1024 * 1024 * 2  # heads x seq x seq in bf16, at least once per block
    assert peak("eager") - peak("sdpa") > 4 * scores


def test_generation_keeps_keys_and_values_of_every_token(config_file: Path) -> None:
    def peak(tokens: int) -> int:
        found = plan(config_file, lengths=Lengths(seq_len=64, max_new_tokens=tokens), method=LOREFT)
        assert found.generation_peak_bytes is not None
        return found.generation_peak_bytes

    per_token = 2 * 4 * 4 * 32 * 2  # keys and values, blocks, heads, width, bytes
    assert (peak(4096) - peak(2048)) / (2048 * per_token) == pytest.approx(1, abs=0.3)


def reuse_of(
    model: str | Path, lengths: Lengths, num_examples: int = 1000, **method: str
) -> ReusePlan | None:
    options = MethodOptions(**{"method": "loreft", **method})
    return plan(model, lengths=lengths, method=options, num_examples=num_examples).reuse


def test_a_store_of_llama_8b_holds_the_vectors_keys_and_values_of_a_sum_by_hand() -> None:
    found = reuse_of(
        "llama-3.1-8b", Lengths(seq_len=512, response_len=128), 500, layers="15", positions="l1"
    )
    assert found is not None
    assert (found.mode, found.num_constant_blocks) == ("prefix", 16)
    prefix = 512 - 128 - 1  # all of the prompt but its last token, which is edited
    vectors = (512 - prefix) * 4096
    keys_and_values = prefix * 2 * (32 - 16) * 8 * 128
    assert found.store_bytes_per_example == 2 * (vectors + keys_and_values)
    assert found.store_bytes == 500 * found.store_bytes_per_example


def test_a_reused_step_needs_the_upper_blocks_norms_and_head_of_llama_8b() -> None:
    found = reuse_of("llama-3.1-8b", Lengths(seq_len=256), layers="15", positions="l1")
    assert found is not None
    per_block = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    quantized = 16 * per_block * (1 / 2 + 1 / 64 * (1 + 4 / 256))
    plain = 2 * (128256 * 4096 + (2 * 16 + 1) * 4096)
    assert abs(found.resident_bytes / (quantized + plain) - 1) < 0.001


def test_an_embedding_that_the_head_shares_stays(tmp_path: Path) -> None:
    def resident(tied: bool) -> int:
        path = tmp_path / f"{tied}.json"
        path.write_text(json.dumps({**LLAMA, "tie_word_embeddings": tied}))
        found = reuse_of(path, Lengths(seq_len=64), layers="2")
        assert found is not None
        return found.resident_bytes

    assert resident(tied=True) == resident(tied=False)


def test_the_arithmetic_of_a_prefix_is_that_of_a_sum_by_hand(config_file: Path) -> None:
    lengths = Lengths(seq_len=512, response_len=128, batch_size=4, gradient_accumulation=2)
    found = reuse_of(config_file, lengths, 800, layers="1", positions="l1")
    assert found is not None
    attention = 2 * 256 * 256 + 2 * 256 * 128
    block = attention + 3 * 256 * 688 + 2 * 256
    head = 128 * 2048 * 256 / block  # supervised tokens, as blocks times tokens
    plain = 4 * 512 + 2 * 512 + 2 * head  # forward, backward above the trunk, head
    reused = 2 * 2 * (512 - 383) + 2 * head
    assert found.speedup_per_epoch == pytest.approx(plain / reused)
    # Keys and values of the upper blocks are stored, so the build runs all four.
    assert found.build_steps == pytest.approx(800 / 8 * 4 * 512 / plain)


def test_checkpointed_blocks_read_no_prefix_and_are_run_once_more(config_file: Path) -> None:
    found = plan(
        config_file,
        lengths=Lengths(seq_len=512, batch_size=8),
        method=MethodOptions(method="loreft", layers="1", positions="l1"),
        memory=MemoryOptions(activation_checkpointing=True),
        chunked_loss=False,
        task_type="SEQ_CLS",
        num_labels=2,
    ).reuse
    assert found is not None
    assert (found.mode, found.store_bytes_per_example) == ("trunk", 2 * 512 * 256)
    # The head of a classifier is next to nothing: 2 x 256 weights, and one token.
    assert found.speedup_per_epoch == pytest.approx((4 + 2 + 2) / (2 + 2 + 2), rel=1e-4)
    assert found.build_steps == pytest.approx(1000 / 8 * 2 / (4 + 2 + 2), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "mode", "num_constant_blocks"),
    [
        ({"positions": "all"}, "trunk", 1),  # the output of block 0, before its edit
        ({"positions": "l3"}, "prefix", 1),
        ({"positions": "f1+l1", "layers": "3"}, "trunk", 4),
        ({"method": "qlora", "layers": "2;3"}, "trunk", 2),
    ],
)
def test_what_is_constant_decides_what_is_stored(
    config_file: Path, method: dict[str, str], mode: str, num_constant_blocks: int
) -> None:
    found = reuse_of(config_file, Lengths(seq_len=64), **method)
    assert found is not None
    assert (found.mode, found.num_constant_blocks) == (mode, num_constant_blocks)


def test_there_is_nothing_to_reuse_where_the_first_block_is_trained(config_file: Path) -> None:
    assert reuse_of(config_file, Lengths(seq_len=64), method="qlora") is None


def test_fit_finds_the_fastest_setting_that_the_card_holds(config_file: Path) -> None:
    planner = Planner(read_config(config_file), None)
    setting, lengths = Setting(method=LOREFT), Lengths(seq_len=1024, batch_size=8)
    needed = planner.training_peak_bytes(setting, lengths) / 2**20
    planner.card = card(needed * 1.05)
    plain = fit(planner, setting, lengths)
    assert plain is not None
    assert plain.lengths.batch_size == 8
    assert plain.setting.memory == MemoryOptions()
    planner.card = card(needed * 0.4)
    saved = fit(planner, setting, lengths)
    assert saved is not None
    assert saved.lengths.batch_size * saved.lengths.gradient_accumulation == 8
    assert saved.cost > plain.cost
    peak = planner.training_peak_bytes(saved.setting, saved.lengths)
    assert planner.card.required_bytes(peak) <= planner.card.memory_bytes
    planner.card = card(1)
    assert fit(planner, setting, lengths) is None


def test_the_longest_context_fits_and_one_step_more_does_not(config_file: Path) -> None:
    config = read_config(config_file)
    config.max_position_embeddings = 65536
    planner, setting = Planner(config, card(64)), Setting(method=LOREFT)
    longest = longest_seq_len(planner, setting)
    assert 64 < longest < 65536
    assert longest % 64 == 0
    assert planner.card is not None
    tried: list[str] = []
    larger = Planner(config, card(96))
    assert longest_seq_len(larger, setting, report=tried.append) > longest
    assert len(tried) < 25
    assert longest_seq_len(Planner(config, card(1)), setting) == 0
    assert longest_seq_len(Planner(config, card(1e6)), setting) == 65536


def test_train_flags_say_what_was_chosen(config_file: Path) -> None:
    planner = Planner(read_config(config_file), card(48))
    chosen = fit(planner, Setting(method=LOREFT), Lengths(seq_len=2048, batch_size=4))
    assert chosen is not None
    flags = describe(chosen)
    assert f"--batch-size {chosen.lengths.batch_size}" in flags
    assert ("--activation-checkpointing" in flags) == chosen.setting.memory.activation_checkpointing


def test_train_flags_hold_every_way_to_save_memory() -> None:
    every = MemoryOptions(
        activation_checkpointing=True,
        checkpoint_every=3,
        offload_activations=True,
        mlp_tokens=512,
        embedding_on_host=True,
    )
    default = MemoryOptions()
    changed = {name for name in asdict(every) if getattr(every, name) != getattr(default, name)}
    assert changed == set(asdict(default)) - {"memory_gib"}
    setting = Setting(method=LOREFT, memory=every)
    flags = describe(Candidate(setting=setting, lengths=Lengths(), cost=1))
    assert flags.endswith(
        "--activation-checkpointing --checkpoint-every 3 --offload-activations --mlp-tokens 512 "
        "--embedding-on-host"
    )


def test_ways_to_save_memory_that_were_given_stay(config_file: Path) -> None:
    config = read_config(config_file)
    given = MemoryOptions(
        activation_checkpointing=True, checkpoint_every=2, mlp_tokens=512, embedding_on_host=True
    )
    ladder = memory_ladder(config, 4096, Setting(memory=replace(given, memory_gib=8.0)))
    assert ladder[0] == given
    assert all(rung.checkpoint_every <= 2 for rung in ladder)
    assert all(rung.mlp_tokens == 512 and rung.embedding_on_host for rung in ladder)
    assert ladder[-1] == replace(given, checkpoint_every=1, offload_activations=True)
    assert len(set(ladder)) == len(ladder) == 3


def test_dequantized_blocks_of_llama_8b_take_two_bytes_a_weight() -> None:
    found = reuse_of("llama-3.1-8b", Lengths(seq_len=256), layers="15", positions="l1")
    assert found is not None
    per_block = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert found.dequantized_bytes == 16 * 2 * per_block
    long = Lengths(seq_len=2048)
    method = MethodOptions(layers="15", positions="l1")
    planned = plan("llama-3.1-8b", gpu="4090", method=method, lengths=long)
    assert (planned.fits, planned.fits_dequantized) == (True, True)
    method = MethodOptions(layers="15")
    planned = plan("llama-3.1-8b", memory_gib=12, method=method, lengths=long)
    assert planned.fits_dequantized is False


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_has_the_names_that_scripts_rely_on(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", str(config_file), "--seq-len", "128", "--json")
    code, out, _ = run(capsys, *common)
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["fits"] is None
    assert set(result["reuse"]) == {
        "mode",
        "num_constant_blocks",
        "num_examples",
        "store_bytes_per_example",
        "store_bytes",
        "build_steps",
        "resident_bytes",
        "dequantized_bytes",
        "speedup_per_epoch",
    }
    assert sum(result["breakdown_bytes"].values()) == result["peak_bytes"]
    code, out, _ = run(capsys, *common, "--memory-gib", "1", "--fit")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["fits"] is True
    assert result["longest_seq_len"] > 128
    assert result["train_command"].startswith("lowmem-reft train --model ")
    assert (result["nothing_fits"], result["upper"]) == (False, None)
    code, out, _ = run(capsys, *common, "--method", "qlora")
    assert json.loads(out.splitlines()[-1])["reuse"] is None
    code, out, _ = run(capsys, *common, "--gpu", "a10")
    assert json.loads(out.splitlines()[-1])["fits"] is True


def test_people_get_a_table_the_line_of_the_peak_and_a_verdict(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(config_file), "--seq-len", "512", "--gpu", "RTX 4090", "--fit")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for words in (
        "activations",
        ".py:",
        "fits: RTX 4090",
        "--reuse trunk would store what leaves the first block, for 1,000 examples:",
        "lowmem-reft train --model",
    ):
        assert words in out


def test_what_fits_nowhere_is_said_after_the_upper_blocks_were_tried(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(memory_gib: str) -> tuple[dict[str, Any], str]:
        arguments = ("--model", str(config_file), "--fit", "--memory-gib", memory_gib)
        options = written.build(
            PlanOptions, model=str(config_file), fit=True, memory_gib=float(memory_gib)
        )
        return run_plan(options), capsys.readouterr().out + " ".join(arguments)

    result, said = found("0.4")
    assert result["nothing_fits"]
    assert result["train_command"] is None
    assert result["upper"] is None
    assert "nor with the last block alone on the card (--resident upper)" in said


def test_the_upper_half_is_offered_as_another_training(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = Planner(read_config(config_file)).predictor(Setting()).base_bytes
    needed_gib = 0.95 * held / GIB + 0.5
    options = written.build(
        PlanOptions, model=str(config_file), seq_len=32, fit=True, memory_gib=needed_gib
    )
    result, said = run_plan(options), capsys.readouterr().out
    assert result["train_command"] is None
    assert not result["nothing_fits"]
    assert result["upper"]["num_blocks"] == 2
    for words in ("with only the upper half edited: another training", "--resident upper"):
        assert words in said
    # It has looked, and of that training not the shortest example fits.
    assert "--fit looks for" not in said
    assert "longest example" not in said
    assert "--layers upper:0.5 " in result["upper"]["command"]


def test_an_unknown_model_is_answered_with_the_short_names_nearest_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_config(model: str) -> None:
        raise InputError(f"model must be a hub id, got {model!r}")

    monkeypatch.setattr("lowmem_reft.memory.planner.load_config", load_config)
    code, _, err = run(capsys, "--model", "llama-3.1-7b")
    assert code == 2
    assert "got 'llama-3.1-7b', or take a short name: llama-3.1-8b, llama-3." in err
    assert nearest_names("Qwen/Qwen3-14B")[0] == "qwen3-14b"


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (LocalEntryNotFoundError("no connection"), "the hub cannot be reached"),
        (GatedRepoError("403", response=MagicMock()), "its repository on the hub is gated"),
        (RepositoryNotFoundError("404", response=MagicMock()), None),
    ],
)
def test_a_hub_id_that_is_closed_has_the_shape_that_is_known_by_a_short_name(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, why: str | None
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise OSError("nothing") from cause

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", closed)
    name = "meta-llama/Llama-3.1-8B"
    if why is None:
        with pytest.raises(InputError, match="no such repository"):
            read_config(name)
        return
    said = rf"^{why}: {name} is planned by the shape that is known as llama-3\.1-8b$"
    with pytest.warns(UserWarning, match=said):
        found = read_config(name)
    assert found.to_dict() == read_config("llama-3.1-8b").to_dict()
    with pytest.raises(InputError, match=rf"and {why}; check name"):
        read_config("meta-llama/Llama-3.1-9B-Instruct")


def test_what_a_hub_id_holds_is_taken_before_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    own = read_config("llama-3.2-1b")
    monkeypatch.setattr("lowmem_reft.memory.planner.load_config", lambda _: own)
    assert read_config("meta-llama/Llama-3.1-8B") is own


def test_the_lengths_are_those_of_the_rows(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "the lazy dog is", "response": word} for word in ("good", "bad " * 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", str(tiny_llama_dir), "--data", str(path), "--device", "cpu")
    code, out, _ = run(capsys, *common, "--template", "Q: {prompt}", "--layers", "2")
    assert code == 0
    tokenizer = load_tokenizer(tiny_llama_dir)
    encoded = encode_rows(load_rows(path), tokenizer, template="Q: {prompt}", max_length=512)
    longest = max(len(example["input_ids"]) for example in encoded.examples)
    assert f"8 × {longest} tokens per forward pass" in out
    assert "for 2 examples:" in out
    assert "the process itself: about" in out
    code, _, err = run(capsys, *common, "--seq-len", "64")
    assert code == 2
    assert "seq_len must be left out with data, got 64" in err


def test_rows_of_the_table_are_shown_as_they_come(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def longest(*_: Any) -> int:
        shown.append(capsys.readouterr().out)
        return 1024

    monkeypatch.setattr("lowmem_reft.memory.verdict.longest_seq_len", longest)
    assert run(capsys, "--table", "--model", str(config_file))[0] == 0
    assert "8 GiB" in shown[0]  # the titles come first
    assert "1,024" in shown[6]  # and the first row before the second is begun
    assert not any(shown[1:6])


def test_the_table_has_a_row_per_model_and_method(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "--table", "--model", str(config_file), "--methods", "loreft,qlora", "--json"
    )
    rows = json.loads(out.splitlines()[-1])["table"]
    assert code == 0
    assert [row["method"] for row in rows] == ["loreft", "qlora"]
    assert set(rows[0]["longest_seq_len"]) == {"8", "12", "16", "24", "48", "80"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "voodoo2"), "gpu must be a card that is known"),
        (("--gpu", "a10", "--memory-gib", "8"), "gpu must be given without memory_gib"),
        (("--memory-gib", "-1"), "memory_gib must be"),
        (("--fit",), "gpu must be given with fit"),
        (("--seq-len", "0"), "seq_len must be at least 1"),
        (("--num-examples", "0"), "num_examples must be at least 1"),
        (("--optim", "adafactor"), "optim must be one of adamw_torch"),
        (("--max-length", "64"), "max_length must come with data"),
        (("--fit", "--loss", "model"), "loss must be chunked with fit"),
        (("--storage", "bf16", "--compute-dtype", "fp32"), "compute_dtype must be auto or bf16"),
        (("--positions", "x3"), "positions"),
        (("--model", "/nonexistent/config.json"), "model must be a config.json"),
    ],
)
def test_bad_input_is_refused_with_code_2_and_no_traceback(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    first = () if "--model" in arguments else ("--model", str(config_file))
    code, _, err = run(capsys, *first, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json:1: model must be a JSON object"),
        ("{}", "model must name its architecture"),
        ('{"model_type": "llama"}', "model must give hidden_size, num_hidden_layers, vocab_size"),
        (json.dumps({**LLAMA, "model_type": "no_such"}), "model must be one that transformers"),
        (
            json.dumps(
                {"model_type": "t5", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
            ),
            "T5",
        ),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    code, _, err = run(capsys, "--model", str(path))
    assert code == 2
    assert message in err


def test_short_names_are_models_and_others_are_not() -> None:
    known = config_of("Llama-3.1-8B")
    assert known is not None
    assert known.hidden_size == 4096
    assert config_of("llama") is None


def test_required_memory_includes_context_and_gaps() -> None:
    found = Card.find(memory_gib=8)
    assert found is not None
    assert found.required_bytes(GIB) == int(1.02 * GIB) + GIB // 2
