"""Win rates: orders, ties, control for length, intervals; judges that are programs or models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.machine import files as files_module
from lowmem_reft.runs.judge import (
    PENALTY,
    Question,
    command_judge,
    judge_files,
    length_controlled_win_rate,
    model_judge,
    verdict,
)

LONGER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    first, second = len(asked["first"]), len(asked["second"])
    print(json.dumps({"preferred": "tie" if first == second else
                      "first" if first > second else "second"}))
"""


def write(path: Path, responses: Sequence[str]) -> Path:
    lines = [
        json.dumps({"prompt": f"do {i}", "prediction": text}) for i, text in enumerate(responses)
    ]
    path.write_text("\n".join(lines))
    return path


def program(path: Path, code: str) -> str:
    path.write_text(code)
    return f"{sys.executable} '{path}'"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write(tmp_path / "first.jsonl", ["long", "s", "same", "{second}"]),
        write(tmp_path / "second.jsonl", ["x", "longer", "size", ""]),
    )


def test_a_program_judges_and_ties_count_half(files: tuple[Path, Path], tmp_path: Path) -> None:
    found = judge_files(*files, command_judge(program(tmp_path / "judge.py", LONGER)))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.num_examples == 4
    assert found.win_rate == pytest.approx(2.5 / 4)
    assert found.win_rate_interval[0] <= found.win_rate <= found.win_rate_interval[1]
    assert found.mean_length_difference == pytest.approx((3 - 5 + 0 + 8) / 4)


def test_a_win_rate_is_printed_with_its_interval(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = program(tmp_path / "judge.py", LONGER)
    assert cli.main(["judge", *map(str, files), "--command", judge]) == 0
    assert "win_rate_interval           0.25 to 1\n" in capsys.readouterr().out


def test_a_judge_who_prefers_the_first_place_says_nothing(files: tuple[Path, Path]) -> None:
    found = judge_files(*files, lambda questions: [1.0] * len(questions))
    assert (found.win_rate, found.ties) == (0.5, 4)
    assert found.length_controlled_win_rate == pytest.approx(0.5)


def test_the_judge_sees_every_pair_in_both_orders(files: tuple[Path, Path]) -> None:
    seen: list[Question] = []

    def judge(questions: Sequence[Question]) -> list[float]:
        seen.extend(questions)
        return [0.5] * len(questions)

    judge_files(*files, judge)
    assert [(q.first, q.second) for q in seen[:4]] == [(q.second, q.first) for q in seen[4:]]
    assert [q.prompt for q in seen[:4]] == [q.prompt for q in seen[4:]]


def test_a_preference_for_length_alone_is_controlled_away() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.normal(50, 40, size=4000)  # the first is mostly longer
    chances = 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std())))
    found = verdict((generator.random(4000) < chances).astype(float), lengths)
    assert found.win_rate > 0.65
    assert found.length_controlled_win_rate == pytest.approx(0.5, abs=0.04)
    low, high = found.length_controlled_interval
    assert low < 0.5 < high
    assert high - low < 0.15


def test_the_regression_is_scikit_learns() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.normal(10, 30, size=300)
    wins = (generator.random(300) < 0.7).astype(float)
    features = np.stack([np.ones(300), np.tanh(lengths / lengths.std())], axis=1)
    fitted = LogisticRegression(C=1 / PENALTY, fit_intercept=False, tol=1e-10).fit(features, wins)
    assert length_controlled_win_rate(wins, lengths) == pytest.approx(
        1 / (1 + np.exp(-fitted.coef_[0, 0])), abs=1e-5
    )


@pytest.mark.parametrize("size", [1, 5, 200])
def test_one_side_that_wins_everything_has_a_finite_fit(size: int) -> None:
    lengths = np.arange(size, dtype=np.float64)
    assert 0.9 < length_controlled_win_rate(np.ones(size), lengths) <= 1
    assert 0 <= length_controlled_win_rate(np.zeros(size), lengths) < 0.1


def test_probabilities_of_a_program_are_taken_as_they_are(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    code = "import sys\nfor line in sys.stdin: print('{\"probability\": 0.25}')"
    judge = command_judge(program(tmp_path / "judge.py", code))
    assert judge([Question(prompt="p", first="a", second="b")]) == [0.25]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('{}')", "judge must write a line per question, got 1"),
        ("import sys\nsys.exit('no key')", r"judge must exit with 0, got 1 .*\(no key\)"),
        ("import sys\nfor line in sys.stdin: print('A')", "got 'A' in line 1"),
        ('import sys\nfor line in sys.stdin: print(\'{"preferred": "A"}\')', "in line 1"),
        ("import sys\nfor line in sys.stdin: print('{\"probability\": 2}')", "in line 1"),
    ],
)
def test_a_program_that_does_not_judge_is_refused(
    code: str, message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        judge_files(*files, command_judge(program(tmp_path / "judge.py", code)))


def test_a_program_that_is_not_there_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="judge must be a command that can be run"):
        judge_files(*files, command_judge("no-such-program-anywhere --judge"))


def test_files_of_other_prompts_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    shorter = write(tmp_path / "shorter.jsonl", ["x"])
    with pytest.raises(InputError, match="both files must have the same prompts"):
        judge_files(files[0], shorter, lambda questions: [0.5] * len(questions))
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"prompt": "do 0", "prediction": 1}\n')
    with pytest.raises(InputError, match=r"choices.jsonl:1: response must be a text, got 1"):
        judge_files(choices, files[1], lambda questions: [0.5] * len(questions))


def test_answers_of_generate_are_judged_too(tmp_path: Path) -> None:
    asked: list[Question] = []

    def judge(questions: Sequence[Question]) -> list[float]:
        asked.extend(questions)
        return [0.5] * len(questions)

    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    for name, response in (("a", "Hi"), ("b", "No")):
        lines = [{"prompt": "do", "response": response}]
        lines += [{"messages": messages, "response": response}]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge_files(tmp_path / "a", tmp_path / "b", judge)
    assert asked[0] == Question(prompt="do", first="Hi", second="No")
    assert asked[1].prompt == "system: Be kind.\n\nuser: Hello"
    (tmp_path / "b").write_text('{"messages": [1], "response": ""}')
    with pytest.raises(InputError, match=r"b:1: messages must be a list of role and content"):
        judge_files(tmp_path / "a", tmp_path / "b", judge)


def test_the_command_line_judges_by_a_program_or_a_model(
    files: tuple[Path, Path],
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = program(tmp_path / "judge.py", LONGER)
    words = ["judge", *map(str, files), "--json"]
    assert cli.main([*words, "--command", command]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == files_module.plain(asdict(judge_files(*files, command_judge(command))))
    assert cli.main([*words, "--model", str(tiny_llama_dir), "--storage", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 4
    for both in ([], ["--command", command, "--model", str(tiny_llama_dir)]):
        assert cli.main([*words, *both]) == 2
        assert "command or model must be given" in capsys.readouterr().err


def test_a_language_model_judges_by_the_likelihoods_of_a_and_b(
    tiny_llama_dir: Path, files: tuple[Path, Path]
) -> None:
    import torch

    from lowmem_reft.base.loading import load_base, load_tokenizer

    template = "{prompt}|{first}|{second}|Better:"
    judge = model_judge(tiny_llama_dir, storage="fp32", template=template, batch_size=3)
    question = Question(prompt="do", first="{second}", second="a dog")
    (chance,) = judge([question])
    base, tokenizer = load_base(tiny_llama_dir, storage="fp32"), load_tokenizer(tiny_llama_dir)
    sums = []
    for choice in ("A", "B"):
        prompt = tokenizer("do|{second}|a dog|Better:", return_tensors="pt")["input_ids"]
        whole = tokenizer(f"do|{{second}}|a dog|Better: {choice}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = base(whole).logits[0, :-1].log_softmax(-1)
        picked = logs.gather(1, whole[0, 1:, None])[:, 0]
        sums.append(float(picked[prompt.shape[1] - 1 :].sum()))
    assert chance == pytest.approx(1 / (1 + np.exp(sums[1] - sums[0])), abs=1e-4)
    found = judge_files(*files, judge)
    assert 0 < found.win_rate < 1


def test_a_template_without_a_response_is_refused() -> None:
    with pytest.raises(InputError, match=r"template must contain \{second\}"):
        model_judge("m", template="{prompt} {first}")
