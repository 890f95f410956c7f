"""Metrics against scikit-learn and scipy, on random and on degenerate predictions."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from lowmem_reft.data.tasks.metrics import METRICS, compute
from lowmem_reft.errors import InputError

REFERENCES = {
    "accuracy": lambda p, r: sklearn.metrics.accuracy_score(r, p),
    "f1": lambda p, r: sklearn.metrics.f1_score(r, p),
    "matthews": lambda p, r: sklearn.metrics.matthews_corrcoef(r, p),
    "pearson": lambda p, r: scipy.stats.pearsonr(p, r).statistic,
    "spearman": lambda p, r: scipy.stats.spearmanr(p, r).statistic,
}

CONSTANT = {
    "all 0": ([0] * 6, [0] * 6),
    "all 1": ([1] * 6, [1] * 6),
    "0 for 1": ([0] * 6, [1] * 6),
    "constant predictions": ([0] * 6, [0, 1, 0, 1, 1, 1]),
    "constant positive predictions": ([1] * 6, [0, 1, 0, 1, 1, 1]),
    "constant references": ([0, 1, 0, 1, 1, 1], [1] * 6),
    "all right": ([0, 1, 1, 0], [0, 1, 1, 0]),
    "all wrong": ([1, 0, 0, 1], [0, 1, 1, 0]),
}


def reference(name: str, predictions: Any, references: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn where a metric is undefined
        return float(REFERENCES[name](predictions, references))


def random_cases(name: str, generator: np.random.Generator) -> Any:
    for size in (2, 3, 10, 1000):
        for num_classes in (2,) if name == "f1" else (2, 3, 6):
            yield generator.integers(num_classes, size=(2, size))
        if METRICS[name].of == "numbers":
            yield generator.normal(size=(2, size))
            yield generator.normal(size=(2, size)).round(1)  # with ties
            yield 1e6 + 1e-3 * generator.normal(size=(2, size))


@pytest.mark.parametrize("name", REFERENCES)
def test_random_predictions_score_as_in_the_reference_library(name: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        for predictions, references in random_cases(name, generator):
            assert compute(name, predictions.tolist(), references.tolist()) == pytest.approx(
                reference(name, predictions, references), abs=1e-7, nan_ok=True
            )


@pytest.mark.parametrize("case", CONSTANT)
@pytest.mark.parametrize("name", REFERENCES)
def test_degenerate_predictions_score_as_in_the_reference_library(name: str, case: str) -> None:
    predictions, references = CONSTANT[case]
    assert compute(name, predictions, references) == pytest.approx(
        reference(name, predictions, references), nan_ok=True
    )


NAN = math.nan


@pytest.mark.parametrize(
    ("predictions", "references", "values"),  # of f1, matthews, pearson, spearman
    [
        ([1], [1], (1.0, 0.0, NAN, NAN)),
        ([1], [0], (0.0, 0.0, NAN, NAN)),
        ([0], [0], (0.0, 0.0, NAN, NAN)),
        ([0, 0], [0, 0], (0.0, 0.0, NAN, NAN)),
        ([2, 2, 2], [2, 2, 2], (0.0, 0.0, NAN, NAN)),
        ([0, 0, 0], [0, 1, 2], (0.0, 0.0, NAN, NAN)),
        ([1, 1, 1], [0, 1, 2], (0.5, 0.0, NAN, NAN)),
        ([0, 1, 2], [1, 1, 1], (0.5, 0.0, NAN, NAN)),
        ([0, 0, 2], [0, 2, 2], (0.0, 0.5, 0.5, 0.5)),
        ([0, 1, 2], [2, 1, 0], (1.0, 0.0, -1.0, -1.0)),
        ([1, 0], [0, 1], (0.0, -1.0, -1.0, -1.0)),
        ([0, 1], [0, 1], (1.0, 1.0, 1.0, 1.0)),
        ([True, False, True], [1, 0, 0], (2 / 3, 0.5, 0.5, 0.5)),
        ([3, 4, 5, 3], [3, 4, 5, 5], (0.0, 0.7, 5 / 11, 7 / 18)),
    ],
)
def test_degenerate_inputs_have_these_values(
    predictions: list[int], references: list[int], values: tuple[float, ...]
) -> None:
    names = ("f1", "matthews", "pearson", "spearman")
    found = tuple(compute(name, predictions, references) for name in names)
    assert found == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([1e300, 1e300], [0.0, 1.0]), ([1.0, 1.0 + 1e-15], [0.0, 1.0]), ([0.0, math.inf], [0.0, 1.0])],
)
def test_a_correlation_of_extreme_numbers_gives_no_warning(
    predictions: list[float], references: list[float]
) -> None:
    for name in ("pearson", "spearman"):
        value = compute(name, predictions, references)
        assert math.isnan(value) or value == pytest.approx(1.0)


def test_accuracy_compares_what_is_no_class_too() -> None:
    assert compute("accuracy", ["1", None, 2.5], ["1", "2", 2.5]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_missing_numbers_is_undefined(name: str) -> None:
    assert math.isnan(compute(name, [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))


def test_exact_match_ignores_case_and_white_space_and_counts_no_answer_as_wrong() -> None:
    assert compute("exact_match", ["A  dog", "a cat", None], ["a dog\n", "a dog", "x"]) == 1 / 3


@pytest.mark.parametrize(
    ("prediction", "wanted", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat.", "the cat sat", 1.0),
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("a b", "c d", 0.0),
        ("", "a b", 0.0),
        ("a", "a b c", 2 / 4),
    ],
)
def test_overlap_is_the_f1_of_the_longest_common_subsequence(
    prediction: str, wanted: str, score: float
) -> None:
    assert compute("overlap", [prediction], [wanted]) == pytest.approx(score)


def test_overlap_finds_the_longest_subsequence_that_trying_all_finds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        first, second = ("".join(generator.choice(list("abc"), 7)) for _ in range(2))
        subsequences = [
            {sub for size in range(8) for sub in itertools.combinations(side, size)}
            for side in (first, second)
        ]
        longest = max(map(len, subsequences[0] & subsequences[1]))
        assert compute("overlap", [" ".join(first)], [" ".join(second)]) == pytest.approx(
            2 * longest / 14
        )


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("acuracy", [1], [1], "metric must be one of accuracy, f1, .*got 'acuracy'"),
        ("accuracy", [1, 0], [1], "predictions must be as many as references .*got 2 for 1"),
        ("accuracy", [], [], "at least one, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    name: str, predictions: list[int], references: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compute(name, predictions, references)
