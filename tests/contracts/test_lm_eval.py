"""lm-eval: what HFLM asks of a model, and what the evaluator and its tasks return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from breaking import contract, with_result, with_value, without, wrapped
from lowmem_reft.machine.contracts.contract import tiny_llama

pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
evaluator = pytest.importorskip("lm_eval.evaluator")

HFLM = "lm_eval.models.huggingface:HFLM."
EVALUATOR = "lm_eval.evaluator:"


class Noting(huggingface.HFLM):
    """Notes what reaches the methods that are ours."""

    def __init__(self) -> None:
        self.scored: list[Any] = []
        self.generated: list[Any] = []
        super().__init__(pretrained=tiny_llama(), backend="causal", tokenizer=words(), batch_size=2)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None
    ) -> Any:
        self.scored.append((list(requests), override_bs))
        return [(-1.0, True)] * len(requests)

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        self.generated.append((context, max_length, stop, options))
        new = torch.full((len(context), max_length - context.shape[1]), 3)
        return torch.cat([context, new], 1)


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<p>": 0, "<e>": 1, "a": 2, "b": 3, "c": 4, "<u>": 5}
    tokenizer = Tokenizer(models.WordLevel(known, "<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<p>", eos_token="<e>", unk_token="<u>"
    )


class Request:
    """As much of an instance of the harness as a model reads."""

    task_name = "task"

    def __init__(self, *args: Any) -> None:
        self.args = args


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=wrapped(
        "lm_eval.api.model:TemplateLM.loglikelihood",
        lambda _: lambda self, requests, disable_tqdm=False: [(0.0, True)] * len(requests),
    ),
)
def test_likelihoods_are_asked_for_as_texts_context_and_continuation(breach: bool) -> None:
    lm = Noting()
    assert lm.loglikelihood([Request("a b", " c")], disable_tqdm=True) == [(-1.0, True)]
    [(requests, size)] = lm.scored
    assert requests == [(("a b", " c"), [2, 3], [4])]
    assert size is None


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=with_value(
        "lm_eval.api.model:TemplateLM.loglikelihood",
        lambda self, requests, **_: self._loglikelihood_tokens([(("a b", " c"), [2, 3], [4])]),
    ),
)
def test_a_model_says_how_a_pair_and_a_batch_of_prompts_are_tokenized(breach: bool) -> None:
    class Encoding(Noting):
        def _encode_pair(self, context: str, continuation: str) -> Any:
            assert (context, continuation) == ("a b", " c")
            return [3], [5, 5]

        def tok_batch_encode(self, strings: Any, left_truncate_len: int, **_: Any) -> Any:
            assert strings == ("a b",)
            return torch.tensor([[4, 4]]), torch.ones(1, 2)

    lm = Encoding()
    lm.loglikelihood([Request("a b", " c")], disable_tqdm=True)
    [(requests, _)] = lm.scored
    assert requests == [(("a b", " c"), [3], [5, 5])]
    lm.generate_until([Request("a b", {"until": ["<e>"], "max_gen_toks": 2})], disable_tqdm=True)
    assert lm.generated[0][0].tolist() == [[4, 4]]


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=with_value(f"{HFLM}loglikelihood_rolling", lambda self, requests, **_: [-1.0]),
)
def test_whole_texts_are_scored_without_texts_and_as_one_batch(breach: bool) -> None:
    lm = Noting()
    assert lm.loglikelihood_rolling([Request("a b c")], disable_tqdm=True) == [-1.0]
    [(requests, size)] = lm.scored
    assert [texts for texts, _, _ in requests] == [None]
    assert size == len(requests)
    assert requests[0][2] == [2, 3, 4]


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=with_value(
        f"{HFLM}tok_batch_encode", lambda self, texts, **_: (torch.ones(1, 2), None)
    ),
)
def test_texts_are_generated_from_left_padded_contexts_with_a_mask(breach: bool) -> None:
    lm = Noting()
    options = {"until": ["<e>"], "max_gen_toks": 2, "do_sample": False}
    requests = [Request("a b c", options), Request("a", options)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert [text.split() for text in texts] == [["b", "b"]] * 2
    [(context, max_length, stop, more)] = lm.generated
    assert max_length == context.shape[1] + 2
    assert stop[0] == "<e>"
    assert more["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert more["do_sample"] is False
    assert context[1].tolist() == [0, 0, 2]


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=with_value(
        "lm_eval.models.utils_hf:MultiTokenEOSCriteria.__call__", lambda self, ids, scores: False
    ),
)
def test_stop_texts_are_looked_for_past_the_prompt_in_every_row(breach: bool) -> None:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    stops = stop_sequences_criteria(words(), ["c"], 1, 2)
    ended = [bool(stop(torch.tensor(ids), None)) for stop in stops for ids in STEPS]
    assert ended == [False, False, True]


STEPS = ([[4], [4]], [[4, 4], [4, 3]], [[4, 4, 3], [4, 3, 4]])


@contract(
    "lm_eval",
    used_by="runs/harness_model.py",
    broken_by=with_value(f"{HFLM}max_length", property(lambda self: 64)),
)
def test_the_longest_input_can_be_set(breach: bool) -> None:
    lm = Noting()
    lm._max_length = lm.max_length - 4
    assert lm.max_length == 60
    assert int(lm.batch_size) == 2
    assert lm.tokenizer.pad_token_id == 0


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"prompt": "a b", "choices": ["c", "a"], "answer": 0}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (
        "task: probe",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}",
        "test_split: train",
        "output_type: multiple_choice",
        "doc_to_text: prompt",
        "doc_to_choice: choices",
        "doc_to_target: answer",
        "metadata: {version: 3}",
    )
    (tmp_path / "probe.yaml").write_text("\n".join(lines))
    return tmp_path


@contract(
    "lm_eval",
    used_by="runs/harness.py",
    broken_by=without("lm_eval.tasks:TaskManager.load"),
)
def test_tasks_of_a_folder_are_found_and_loaded_by_name(task: Path, breach: bool) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    assert manager.all_tasks == ["probe"]
    loaded = manager.load("probe")
    assert loaded["groups"] == {}
    assert [*loaded["tasks"]] == ["probe"]


@contract(
    "lm_eval",
    used_by="runs/harness.py",
    broken_by=with_result(f"{EVALUATOR}evaluate", lambda found: {"results": found["results"]}),
)
def test_the_evaluator_returns_what_is_shown_and_asks_git_by_one_function(
    task: Path, monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    from lm_eval.tasks import TaskManager

    asked: list[int] = []
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: asked.append(1))
    monkeypatch.setattr(Noting, "get_model_info", lambda self: {})
    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = evaluator.simple_evaluate(
        Noting(),
        tasks=list(manager.load("probe")["tasks"].values()),
        task_manager=manager,
        num_fewshot=None,
        limit=None,
        apply_chat_template=False,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found["results"]["probe"]["acc,none"] == 1.0
    assert found["versions"] == {"probe": 3}
    assert found["n-shot"] == {"probe": 0}
    assert found["n-samples"]["probe"]["effective"] == 2
    assert len(found["samples"]["probe"]) == 2
    assert asked == [1]


@contract(
    "lm_eval",
    used_by="runs/harness.py",
    broken_by=with_value("lm_eval.api.model:tqdm", lambda items, **_: items),
)
def test_bars_of_the_harness_are_of_one_class(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    from tqdm import tqdm

    started: list[bool] = []
    start = tqdm.__init__

    def note(bar: Any, *args: Any, **options: Any) -> None:
        started.append(True)
        start(bar, *args, **{**options, "disable": True})

    monkeypatch.setattr(tqdm, "__init__", note)
    Noting().loglikelihood([Request("a b", " c")])
    assert started
