"""The harness's tasks on an adapted model: what it counts equals our own scores, item by item."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from lowmem_reft import cli
from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import Collator, encode_choices, encode_prompts
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.options import (
    BesideOptions,
    DataOptions,
    EvaluateOptions,
    HarnessOptions,
    ModelOptions,
    ReuseOptions,
    ScoredDataOptions,
    ScoringOptions,
)
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.runs import harness_model
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.generate import generate_batches
from lowmem_reft.runs.harness_model import AdaptedModel
from lowmem_reft.runs.score import ScoringSettings, score
from snippets import read_blocks

ROWS = [
    ("is the film good or bad? label:", ["good", "bad", "lazy dog"], 1),
    ("what is two and two?", ["four", "five"], 0),
    ("once upon a time there was a little", ["cat", "answer", "film", "fox"], 0),
    ("the quick brown fox jumps over the lazy", ["fox", "c", "d", "e"], 3),
    ("fox?", ["a", "b"], 1),
]

CHOICE_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: {kind}
doc_to_text: prompt
metadata:
  version: 3.0
"""


@pytest.fixture(scope="module", autouse=True)
def _no_network() -> Any:
    """The harness reads rows by ``datasets``, which would ask the hub whether it knows the file."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with a task of choices, one of generation, and one of whole texts."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = directory / "rows.jsonl"
    keys = ("prompt", "choices", "answer")
    rows.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in ROWS))
    write = {
        "films": ("multiple_choice", "doc_to_target: answer\ndoc_to_choice: choices\n"),
        "stories": (
            "generate_until",
            "doc_to_target: '{{choices[answer]}}'\n"
            "generation_kwargs: {until: ['</s>'], max_gen_toks: 6}\n",
        ),
        "texts": ("loglikelihood_rolling", "doc_to_target: prompt\ndoc_to_text: ''\n"),
    }
    for name, (kind, more) in write.items():
        head = CHOICE_TASK.format(name=name, file=rows, kind=kind)
        if "doc_to_text" in more:
            head = head.replace("doc_to_text: prompt\n", "")
        (directory / f"{name}.yaml").write_text(head + more)
    return directory


ADAPTERS = {
    "none": None,
    "loreft": ReftConfig(task_type="CAUSAL_LM", positions="f2+l3", init="paper"),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path: Path) -> Path | None:
    config = ADAPTERS[getattr(request, "param", "loreft")]
    if config is None:
        return None
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    TrainingCard(base=str(tiny_llama_dir), storage="fp32").save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def evaluation(tiny_llama_dir: Path, adapter: Path | None, tasks: Path, tmp_path: Path) -> Any:
    return EvaluateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu", storage="fp32"),
        harness=HarnessOptions(lm_eval="films", include_path=tasks),
        adapter=adapter,
        batch_size=3,
        predictions=tmp_path / "samples.jsonl",
        quiet=True,
    )


def loaded(evaluation: EvaluateOptions) -> tuple[Any, Any]:
    card = TrainingCard(base=evaluation.model.model, storage="fp32")
    return load_adapted(evaluation.model, evaluation.adapter, card)


def samples(evaluation: EvaluateOptions) -> list[dict[str, Any]]:
    assert evaluation.predictions is not None
    return [json.loads(line) for line in evaluation.predictions.read_text().splitlines()]


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
def test_choices_get_the_log_likelihoods_of_our_own_scorer_item_by_item(
    evaluation: EvaluateOptions,
) -> None:
    result = run_evaluation(evaluation)
    model, tokenizer = loaded(evaluation)
    rows = [
        Row(source=str(i), prompt=p, choices=tuple(c), answer=a, response=c[a])
        for i, (p, c, a) in enumerate(ROWS)
    ]
    card = TrainingCard(base="", storage="fp32")
    ours = score(model, tokenizer, rows, card, ScoringSettings())
    for row, sample in zip(rows, samples(evaluation), strict=True):
        batch = Collator(tokenizer)(encode_choices(row, tokenizer).examples)
        sums, _ = response_log_likelihood(model, batch)
        theirs = [float(answer[0]) for (answer,) in sample["resps"]]
        assert theirs == pytest.approx(sums.tolist(), abs=1e-4)
    assert result["results"]["films"]["acc,none"] == pytest.approx(ours.value)
    assert result["num_examples"] == {"films": len(ROWS)}
    assert result["task_versions"] == {"films": 3.0}
    assert result["num_cut_contexts"] == 0


def test_choices_that_begin_with_a_space_need_the_empty_delimiter_that_the_documentation_names(
    evaluation: EvaluateOptions, tasks: Path
) -> None:
    answers = []
    for space, delimiter in (("", " "), (" ", " "), (" ", "")):
        lines = [
            json.dumps(
                {"prompt": prompt, "choices": [space + c for c in choices], "answer": answer}
            )
            for prompt, choices, answer in ROWS
        ]
        rows = tasks / f"rows{len(answers)}.jsonl"
        rows.write_text("\n".join(lines))
        head = CHOICE_TASK.format(name="films", file=rows, kind="multiple_choice")
        more = f"doc_to_target: answer\ndoc_to_choice: choices\ntarget_delimiter: '{delimiter}'\n"
        (tasks / "films.yaml").write_text(head + more)
        run_evaluation(evaluation)
        answers.append([sample["resps"] for sample in samples(evaluation)])
    page = Path(__file__).parents[2] / "docs" / "how-to" / "lm-eval.md"
    assert 'set `target_delimiter: ""`' in page.read_text(encoding="utf-8")
    assert answers[2] == answers[0]  # what --data scores, with and without the space
    assert answers[1] != answers[0]


def test_git_does_not_complain_where_there_is_no_repository(
    evaluation: EvaluateOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run_evaluation(evaluation)
    assert "git" not in capfd.readouterr().err


def test_the_task_of_the_documentation_runs(
    evaluation: EvaluateOptions, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "lm-eval.md"
    (task,) = (block.code for block in read_blocks(page) if block.language == "yaml")
    (tasks / "films.yaml").write_text(task)
    (tasks / "rows.jsonl").rename(tasks / "films.jsonl")
    monkeypatch.chdir(tasks)
    assert run_evaluation(evaluation)["num_examples"] == {"films": len(ROWS)}


@pytest.mark.parametrize("adapter", ["loreft", "prompt"], indirect=True)
def test_generated_answers_are_those_of_generate(evaluation: EvaluateOptions) -> None:
    run_evaluation(replace(evaluation, harness=replace(evaluation.harness, lm_eval="stories")))
    model, tokenizer = loaded(evaluation)
    prompts = encode_prompts([Row(source="", prompt=row[0]) for row in ROWS], tokenizer)
    ids = [example["input_ids"] for example in prompts.examples]
    ours = list(generate_batches(model, tokenizer, ids, batch_size=2, max_new_tokens=6))
    assert [sample["resps"][0][0] for sample in samples(evaluation)] == ours


@pytest.mark.parametrize("adapter", ["none", "loreft", "prompt"], indirect=True)
def test_generated_answers_do_not_depend_on_what_the_base_says_of_generation(
    evaluation: EvaluateOptions, tmp_path: Path
) -> None:
    stories = replace(evaluation, harness=replace(evaluation.harness, lm_eval="stories"))
    run_evaluation(stories)
    expected = [sample["resps"] for sample in samples(evaluation)]
    other = tmp_path / "other"
    shutil.copytree(evaluation.model.model, other)
    says = {"repetition_penalty": 1.5, "num_beams": 2, "min_new_tokens": 5, "max_time": 1e-6}
    ends = {"eos_token_id": [*range(3, 90)]}
    (other / "generation_config.json").write_text(json.dumps(says | ends))
    run_evaluation(replace(stories, model=replace(evaluation.model, model=str(other))))
    assert [sample["resps"] for sample in samples(evaluation)] == expected


TEMPLATES = {
    "without BOS": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "with BOS": "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "no generation prompt": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["plain", *TEMPLATES])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompts_have_the_tokens_that_they_have_in_training(
    evaluation: EvaluateOptions, template: str | None, adds_bos: bool
) -> None:
    model, tokenizer = loaded(evaluation)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s>:0 $A </s>:0" if adds_bos else "$A </s>:0",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    tokenizer.chat_template = template
    lm = AdaptedModel(model, tokenizer, batch_size=2, chats=template is not None)
    texts = ["is it good? ", "the lazy dog and a fox"]
    rows = [Row(source="", prompt=text) for text in texts]
    if template is not None:
        chats = [[{"role": "user", "content": text}] for text in texts]
        as_chats = [Row(source="", messages=tuple(chat)) for chat in chats]
        assert encode_prompts(as_chats, tokenizer) == encode_prompts(
            rows, tokenizer, template="chat"
        )
        texts = [lm.apply_chat_template(chat) for chat in chats]
    asked = encode_prompts(rows, tokenizer, template="{prompt}" if template is None else "chat")
    expected = [example["input_ids"] for example in asked.examples]
    assert (expected[0][0] == tokenizer.bos_token_id) == (
        template == TEMPLATES["with BOS"] or (adds_bos and template is None)
    )
    ids, mask = lm.tok_batch_encode(texts)
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)] == expected
    pairs = [lm._encode_pair(text, " four </s>") for text in texts]
    assert [context for context, _ in pairs] == expected
    if template is None:  # what a chat template writes comes as text, which has no frame to keep
        short, _ = lm.tok_batch_encode(texts, left_truncate_len=4)
        cut = encode_prompts(rows, tokenizer, max_length=4).examples
        assert short.tolist() == [example["input_ids"] for example in cut]


def test_a_continuation_that_would_merge_with_its_context_leaves_the_prompt_as_it_is(
    evaluation: EvaluateOptions,
) -> None:
    model, tokenizer = loaded(evaluation)
    lm = AdaptedModel(model, tokenizer, batch_size=2)
    context, merged = (lm.tok_encode(text) for text in ("up o", "up on"))
    assert merged[: len(context)] != context
    row = Row(source="1", prompt="up o", choices=("n", "x"), answer=0, response="n")
    encoded = encode_choices(row, tokenizer, joint="none").examples
    assert all(example["input_ids"][: len(context)] == context for example in encoded)
    ours, _ = response_log_likelihood(model, Collator(tokenizer)(encoded))
    requests = [Instance("loglikelihood", {}, ("up o", choice), 0) for choice in row.choices]
    theirs = lm.loglikelihood(requests, disable_tqdm=True)
    assert [total for total, _ in theirs] == pytest.approx(ours.tolist(), abs=1e-4)
    with pytest.raises(InputError, match="a context must have a token of its own"):
        lm._encode_pair("", "a")


def test_a_text_that_is_scored_whole_has_no_prompt_so_nothing_is_edited_and_that_is_said(
    evaluation: EvaluateOptions, caplog: pytest.LogCaptureFixture
) -> None:
    whole = replace(evaluation, harness=replace(evaluation.harness, lm_eval="texts"))
    adapted = run_evaluation(whole)["results"]
    assert "tasks that score whole texts have no prompt" in caplog.text
    assert run_evaluation(replace(whole, adapter=None))["results"] == adapted


def test_the_same_tokens_with_another_end_of_the_prompt_are_edited_there(
    evaluation: EvaluateOptions,
) -> None:
    model, tokenizer = loaded(evaluation)
    lm = AdaptedModel(model, tokenizer, batch_size=4)
    tokens = tokenizer("the quick brown fox")["input_ids"]
    requests = [(("", ""), tokens[:end], tokens[end:]) for end in (3, 6)]
    together = lm._loglikelihood_tokens(requests)
    alone = [lm._loglikelihood_tokens([request])[0][0] for request in requests]
    assert [total for total, _ in together] == pytest.approx(alone, abs=1e-5)
    with model.disable_adapter():
        plain = [lm._loglikelihood_tokens([request])[0][0] for request in requests]
    assert all(abs(a - b) > 1e-3 for a, b in zip(alone, plain, strict=True))


@pytest.mark.parametrize("continues", [True, False])
def test_answers_that_differ_in_their_last_token_share_a_forward_pass(
    evaluation: EvaluateOptions, monkeypatch: pytest.MonkeyPatch, continues: bool
) -> None:
    model, tokenizer = loaded(evaluation)
    lm = AdaptedModel(model, tokenizer, batch_size=4)
    shapes = []
    if not continues:
        monkeypatch.setattr(harness_model, "continues_from_cache", lambda *_: False)
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: shapes.append(args[0].shape)
    )
    answers = lm._loglikelihood_tokens([(("", ""), [5, 6, 7], [token]) for token in range(128)])
    assert shapes == [(1, 3)]
    assert sum(torch.tensor([total for total, _ in answers]).exp().tolist()) == pytest.approx(1.0)
    assert [is_greedy for _, is_greedy in answers].count(True) == 1


def test_a_context_is_read_once_for_all_continuations_and_both_ways_agree(
    evaluation: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(evaluation)
    lm = AdaptedModel(model, tokenizer, batch_size=4)
    first, second = [11, 12, 13, 14], [21, 22, 23]
    # One begins another, one comes twice, and contexts come in no order.
    continuations = [[5, 6, 7], [5, 6], [8], [5, 6, 7], [9, 10, 11, 12]]
    requests = [(("", ""), context, c) for c in continuations for context in (first, second)]
    lengths = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: lengths.append(args[0].numel())
    )
    shared = lm._loglikelihood_tokens(requests)
    # The contexts, padded, and behind each three tokens of the longest and two, one and two more.
    assert sum(lengths) <= 8 + 2 * 4 * 3
    monkeypatch.setattr(harness_model, "continues_from_cache", lambda *_: False)
    whole = lm._loglikelihood_tokens(requests)
    assert [total for total, _ in shared] == pytest.approx([total for total, _ in whole], rel=1e-5)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in whole]


def test_no_requests_have_no_answers(evaluation: EvaluateOptions) -> None:
    model, tokenizer = loaded(evaluation)
    assert AdaptedModel(model, tokenizer, batch_size=2)._loglikelihood_tokens([]) == []


def test_contexts_that_do_not_fit_are_cut_from_the_left_and_counted(
    evaluation: EvaluateOptions,
) -> None:
    lm = AdaptedModel(*loaded(evaluation), batch_size=4)
    fits, cut = [*range(3, 101)] * 2, [7] * 300
    requests = [(("", ""), context, [5, 6]) for context in (fits, cut, [7] * 255)]
    answers = lm._loglikelihood_tokens(requests)
    assert lm.num_cut_contexts == 1
    assert answers[1] == answers[2]
    with pytest.raises(InputError, match="a continuation must leave room for its context in 256"):
        lm._loglikelihood_tokens([(("", ""), [5], [6] * 257)])


@pytest.mark.parametrize("adapter", ["none"], indirect=True)
def test_the_command_prints_the_metrics_and_one_json_line_without_control_characters(
    evaluation: EvaluateOptions, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", evaluation.model.model, "--storage", "nf4"]
    command += ["--device", "cpu", "--lm-eval", "films", "--include-path", str(tasks)]
    assert cli.main([*command, "--limit", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["num_examples"] == {"films": 2}
    assert set(result["results"]["films"]) >= {"acc,none", "acc_stderr,none"}
    assert "\r" not in err
    assert "\x1b" not in out + err
    assert cli.main(command) == 0
    assert re.search(r"films +acc,none +0\.\d+", capfd.readouterr().out)


@pytest.mark.usefixtures("no_base")
def test_what_cannot_be_scored_is_refused_before_the_base_is_loaded(
    evaluation: EvaluateOptions, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def running(**changes: Any) -> EvaluateOptions:
        return replace(evaluation, harness=replace(evaluation.harness, **changes))

    monkeypatch.setattr(
        "lowmem_reft.runs.harness.TaskManager", partial(TaskManager, include_defaults=False)
    )
    with pytest.raises(InputError, match=r"lm_eval must name tasks .* got 'film'; `lm-eval ls"):
        run_evaluation(running(lm_eval="films,film"))
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="lm_eval must name tasks that can be loaded, got 'films'"):
        run_evaluation(running())
    classifier = replace(evaluation.model, task_type="SEQ_CLS")
    with pytest.raises(InputError, match="task_type must be CAUSAL_LM with --lm-eval"):
        run_evaluation(replace(evaluation, model=classifier, adapter=None))


def test_options_that_contradict_each_other_are_refused(tasks: Path) -> None:
    model, films = ModelOptions(model="m"), HarnessOptions(lm_eval="films")
    with pytest.raises(InputError, match="data must be given, or lm_eval, and not both"):
        EvaluateOptions(model=model)
    with pytest.raises(InputError, match="data must be given, or lm_eval, and not both"):
        EvaluateOptions(model=model, data=DataOptions(data="d.jsonl"), harness=films)
    with pytest.raises(InputError, match="include_path must come with lm_eval"):
        HarnessOptions(include_path=tasks)
    with pytest.raises(InputError, match="num_fewshot must come with lm_eval, got 0 alone"):
        HarnessOptions(num_fewshot=0)
    with pytest.raises(InputError, match="include_path must be a directory"):
        HarnessOptions(lm_eval="films", include_path=tasks / "films.yaml")


@pytest.mark.parametrize(
    ("ignored", "named"),
    [
        ({"data": ScoredDataOptions(split="test", template="Q: {prompt}")}, "split, template"),
        ({"data": ScoredDataOptions(max_length=64)}, "max_length"),
        ({"scoring": ScoringOptions(metric="f1", max_new_tokens=8)}, "metric, max_new_tokens"),
        ({"reuse": ReuseOptions(resident="upper")}, "resident"),
        ({"reuse": ReuseOptions(reuse_dir=Path("r"), dequantize_upper="on")}, "reuse_dir, dequan"),
        ({"beside": BesideOptions(only_given_storage=True)}, "only_given_storage"),
        ({"beside": BesideOptions(forgetting="wiki.txt")}, "forgetting"),
    ],
)
def test_what_the_harness_would_ignore_is_refused(ignored: dict[str, Any], named: str) -> None:
    model, films = ModelOptions(model="m"), HarnessOptions(lm_eval="films")
    EvaluateOptions(model=model, harness=films, data=ScoredDataOptions(limit=3), batch_size=2)
    with pytest.raises(InputError, match=f"^{named}.* must be left out with lm_eval, got "):
        EvaluateOptions(model=model, harness=films, **ignored)


def test_without_the_harness_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_reft.options.running.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'lowmem-reft\[eval\]'"):
        HarnessOptions(lm_eval="films")
