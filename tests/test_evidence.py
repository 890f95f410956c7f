"""The tables on real bases: what is run, what is kept of it, how it is shown."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import collect, defaults, real_bases, tables
from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions

NUM_EXAMPLES = 40


def cell(method: str, task: str, metric: str, right: int, loss: float, directory: Path) -> Any:
    """A finished cell that answered the first ``right`` examples rightly."""
    name = f"{method}-{task}.jsonl"
    lines = [
        {
            **{"source": f"rows:{i}", "prediction": int(i >= right), "reference": 0},
            **{"correct": i < right, "loss": loss, "num_tokens": 2},
        }
        for i in range(NUM_EXAMPLES)
    ]
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        **EMPTY_RESULT,
        **{"method": method, "task": task, "seed": 0, "metric": metric, "predictions": name},
        **{"num_trainable_params": 10, "peak_bytes": 2**20, "loss": loss, "key": f"{method}{task}"},
        "value": loss if metric == "loss" else right / NUM_EXAMPLES,
        "config": {},
        "device": "a processor",
        "command": "lowmem-reft compare",
        "versions": {"torch": "2", "transformers": "5", "bitsandbytes": "1"},
    }


def test_what_is_kept_says_how_far_a_method_is_from_the_reference(tmp_path: Path) -> None:
    cells = [
        cell("qlora", "trec", "accuracy", 20, 1.0, tmp_path),
        cell("loreft", "trec", "accuracy", 36, 0.9, tmp_path),
        cell("red", "trec", "accuracy", 19, 1.1, tmp_path),
        cell("qlora", "chat", "loss", 0, 1.0, tmp_path),
        cell("loreft", "chat", "loss", 0, 1.5, tmp_path),
        cell("red", "chat", "loss", 0, 0.5, tmp_path),
    ]
    (tmp_path / "results.json").write_text(json.dumps(cells))
    output = tmp_path / "kept.json"
    options = collect.Collect(directories=(tmp_path,), output=output, reference="qlora")
    assert collect.main(options) == 0
    kept = {(each["method"], each["task"]): each for each in json.loads(output.read_text())}
    assert kept["qlora", "trec"]["difference"] is None
    far = kept["loreft", "trec"]["difference"]
    assert (far["reference"], far["value"]) == ("qlora", pytest.approx(0.4))
    assert 0.2 < far["low"] < 0.4 < far["high"] < 0.6
    assert far["p_holm"] < 0.01
    assert kept["red", "trec"]["difference"]["p_holm"] > 0.3
    shown = tables.against_reference(list(kept.values()))
    rows = {line.split("|")[1].strip(): line.split("|")[4:8] for line in shown.splitlines()[2:5]}
    assert [word.strip() for word in rows["loreft"]] == [
        "90.0\u00a0+",
        "1.500\u00a0-",
        "1 of 2",
        "1 of 2",
    ]
    assert [word.strip() for word in rows["red"]] == ["47.5", "0.500\u00a0+", "1 of 2", "2 of 2"]
    assert [word.strip() for word in rows["qlora"]] == ["50.0", "1.000", "", ""]
    del kept["qlora", "trec"]  # then nothing is said of that set
    shown = tables.against_reference(list(kept.values()))
    assert "trec" not in shown
    assert "not behind" not in shown


def test_cells_measured_later_are_paired_with_what_was_kept(tmp_path: Path) -> None:
    """Twice the same cells: all at once, and in two sessions with only the kept file between."""
    first = [
        cell("qlora", "trec", "accuracy", 20, 1.0, tmp_path),
        cell("red", "trec", "accuracy", 25, 1.1, tmp_path),
    ]
    later = [cell("loreft", "trec", "accuracy", 33, 0.9, tmp_path)]
    for name, cells in (("whole", [*first, *later]), ("first", first), ("later", later)):
        (tmp_path / f"{name}.json").write_text(json.dumps(cells))

    def kept(output: str, *sources: str) -> list[Any]:
        paths = tuple(tmp_path / f"{source}.json" for source in sources)
        options = collect.Collect(
            directories=paths, output=tmp_path / f"{output}.json", reference="qlora"
        )
        assert collect.main(options) == 0
        return json.loads(options.output.read_text())

    whole = kept("kept_whole", "whole")
    assert kept("kept_first", "first") != whole
    for path in tmp_path.glob("*.jsonl"):
        if not path.name.startswith("loreft"):
            path.unlink()
    assert kept("kept_both", "kept_first", "later") == whole
    differences = {each["method"]: each["difference"] for each in whole}
    assert differences["loreft"]["value"] == pytest.approx(13 / NUM_EXAMPLES)
    packed = collect.answers_of(tmp_path / "kept_both.json").read_bytes()
    assert len(gzip.decompress(packed).splitlines()) == 3


def trained(lr: float, seed: int, validation: float, *, num_examples: int = 40) -> dict[str, Any]:
    """A cell of QLoRA at some rate."""
    epoch = {"epoch": 2.0, "value": validation, "loss": 1 - validation}
    return {
        **EMPTY_RESULT,
        **{"method": f"qlora[rank=8,lr={lr:g}]", "task": "trec", "seed": seed, "value": lr},
        **{"metric": "accuracy", "num_examples": num_examples, "lr_search": None, "error": None},
        **{"validation_value": validation, "best_epoch": 2.0, "validation": [epoch]},
    }


def test_of_cells_at_several_rates_those_at_the_best_on_validation_rows_are_kept() -> None:
    seeds = [trained(1e-3, seed, 0.7 - seed / 10) for seed in range(3)]
    trial = trained(3e-3, 0, 0.6, num_examples=1)
    base = {**trained(0, 0, 0), "method": "base[storage=nf4]", "validation_value": None}
    kept = collect.with_chosen_rates([trial, *seeds, base])
    assert [each["method"] for each in kept] == 3 * ["qlora[rank=8,lr=searched]"] + [base["method"]]
    assert [(each["lr"], each["value"], each["chosen"]) for each in kept[0]["lr_search"]] == [
        (1e-3, 0.7, True),
        (3e-3, 0.6, False),
    ]
    assert collect.with_chosen_rates(kept) == kept
    better = trained(3e-4, 0, 0.8, num_examples=1)
    with pytest.raises(InputError, match=r"lr=0.0003\]', the best .* all 40 test rows"):
        collect.with_chosen_rates([*kept, better])
    stored = {**trained(1e-3, 0, 0.5), "method": "qlora[rank=8,lr=0.001,storage=bf16]"}
    assert collect.with_chosen_rates([*kept, stored])[-1] == stored  # another method, of one rate
    (chosen,) = collect.with_chosen_rates([*kept[:3], {**better, "num_examples": 40}])
    assert (chosen["value"], len(chosen["lr_search"])) == (3e-4, 3)


@pytest.mark.parametrize("name", real_bases.BASES)
def test_every_method_of_a_base_has_the_same_rows_batches_and_steps(name: Any) -> None:
    base = real_bases.BASES[name]
    rates = dict.fromkeys(real_bases.METHODS, 1e-3)
    config = real_bases.Config(base=name, model="m", data_dir=Path("d"))
    for task, size in base.sets.items():
        options = real_bases.options_of(config, replace(base, rates=rates), task)
        assert isinstance(options, CompareOptions)
        assert options.matrix.methods is not None
        assert options.matrix.methods.count("lr=0.001") == len(rates) - len(base.without)
        assert (options.rows.limit, options.scored.eval_limit) == (size.train, size.scored)
        assert options.optim.batch_size == size.batch_size
        assert options.matrix.seeds == "0,1,2"
        few = replace(config, methods="loreft, upper; qlora")
        options = real_bases.options_of(few, replace(base, rates=rates), task)
        assert options.matrix.methods is not None
        assert options.matrix.methods.endswith("qlora[rank=8,lr=0.001]")


@pytest.mark.parametrize("name", real_bases.BASES)
def test_the_search_reads_no_more_test_rows_than_it_must(name: Any) -> None:
    base = real_bases.BASES[name]
    config = real_bases.Config(base=name, model="m", search=True)
    options = real_bases.options_of(config, base, base.searched)
    assert options.scored.eval_limit == 1
    assert options.matrix.lr_search == real_bases.MULTIPLES
    assert options.matrix.methods is not None
    assert "lr=" not in options.matrix.methods


def test_what_there_is_not_is_refused() -> None:
    base = real_bases.BASES["minilm"]
    config = real_bases.Config(base="minilm", model="m", methods="lorefd")
    with pytest.raises(InputError, match="methods must be among loreft, all; "):
        real_bases.entries(config, base)
    with pytest.raises(InputError, match="sets must be among sst2"):
        real_bases.main(replace(config, methods=None, sets="trec"))


def trial(entry: str, value: float, loss: float, error: str | None = None) -> dict[str, Any]:
    return {"entry": entry, "metric": "accuracy", "value": value, "loss": loss, "error": error}


def test_of_equal_trials_the_one_with_the_lower_loss_is_best_and_failed_ones_are_none() -> None:
    trials = [trial("a", 0.6, 0.2), trial("b", 0.6, 0.1), trial("c", 0.5, 0.0)]
    assert defaults.best([*trials, trial("d", 0.9, 0.0, error="out of memory")]) == "b"


def test_made_sentences_repeat_by_their_seed_and_share_no_sentence_between_parts() -> None:
    rows, others = (defaults.emotion_rows(200, seed, trained=True) for seed in (1, 2))
    assert rows == defaults.emotion_rows(200, seed=1, trained=True) != others
    assert {row["answer"] for row in rows} == set(range(6))
    scored = defaults.emotion_rows(200, seed=1, trained=False)
    words = [{row["prompt"].split(" and nobody")[0] for row in part} for part in (rows, scored)]
    assert not words[0] & words[1]  # what is scored was not trained on


def test_defaults_are_searched_on_validation_rows_and_scored_beside_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is replaced: three times its own rate is best for LoReFT, QLoRA's is best."""
    asked = []

    def run(options: CompareOptions) -> None:
        asked.append(options)
        assert options.output_dir is not None
        assert options.matrix.methods is not None
        values = {"loreft": (0.1, 0.2, 0.3), "qlora": (0.1, 0.3, 0.1)}
        lines = []
        for spec in parse_methods(options.matrix.methods):
            trials = [
                {**trial("", value, 0.0), "method": f"{spec.entry}[lr={rate}]", "lr": rate}
                for rate, value in zip((3e-4, 1e-3, 3e-3), values[spec.name], strict=True)
            ]
            searched = trials if options.matrix.lr_search else None
            own = {"method": spec.entry, "metric": "accuracy", "value": len(spec.entry) / 100}
            versions = dict.fromkeys(("torch", "transformers", "bitsandbytes"), "1")
            lines.append({**EMPTY_RESULT, **own, "versions": versions, "lr_search": searched})
        options.output_dir.mkdir(parents=True)
        (options.output_dir / "results.json").write_text(json.dumps(lines))

    monkeypatch.setattr(defaults, "run_comparison", run)
    monkeypatch.setattr(defaults, "ENTRIES", {"loreft": ("loreft",), "qlora": ("qlora",)})
    output = tmp_path / "defaults.json"
    config = defaults.Config(
        model="m", sets=(defaults.EMOTIONS,), eval_limit=50, output_dir=tmp_path, output=output
    )
    assert defaults.main(config) == 0
    search, scored = asked
    assert (search.scored.eval_limit, search.rows.validation_limit) == (1, 200)
    assert (search.matrix.methods, search.matrix.seeds) == ("loreft,qlora", "0")
    assert scored.matrix.methods == "loreft,qlora,loreft[lr=0.003]"
    assert (scored.scored.eval_limit, scored.matrix.seeds) == (50, "0,1,2")
    loreft, qlora = json.loads(output.read_text())
    assert loreft["searched"]["entry"] == "loreft[lr=0.003]"
    assert loreft["as_it_comes"]["mean"] == pytest.approx(0.06)
    assert qlora["searched"] == qlora["as_it_comes"]
    asked.clear()
    again = replace(config, model="another", output_dir=tmp_path / "another")
    assert defaults.main(again) == 0
    kept = json.loads(output.read_text())
    assert [row["model"] for row in kept] == ["m", "m", "another", "another"]
