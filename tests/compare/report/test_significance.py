"""The paired bootstrap against exact results, simulations and the metrics it resamples."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lowmem_reft.compare.report.answers import Example, MethodAnswers, TaskAnswers
from lowmem_reft.compare.report.resampled import METRICS
from lowmem_reft.compare.report.sections import ranking
from lowmem_reft.compare.report.significance import compare_with, draw_counts, holm
from lowmem_reft.data.tasks.metrics import compute


def task(metric="accuracy", references=None, **predictions):
    """Answers of methods; each is a list of seeds, each a list of predictions."""
    references = references or [1] * len(next(iter(predictions.values()))[0])
    methods = {}
    for name, seeds in predictions.items():
        correct = [[p == r for p, r in zip(row, references, strict=True)] for row in seeds]
        methods[name] = MethodAnswers(
            seeds=tuple(range(len(seeds))),
            values=tuple(compute(metric, row, references) for row in seeds),
            correct=np.array(correct),
            predictions=[list(row) for row in seeds],
            texts=[[str(p) for p in row] for row in seeds],
        )
    examples = [
        Example(source=f"f:{i}", prompt="", reference=r, reference_text=str(r))
        for i, r in enumerate(references)
    ]
    return TaskAnswers(task="t", metric=metric, examples=examples, methods=methods, num_left_out=0)


def binomial(num, successes, share):
    return math.comb(num, successes) * share**successes * (1 - share) ** (num - successes)


def random_classes(seed, num=60, num_classes=2):
    generator = np.random.default_rng(seed)
    references = generator.integers(0, num_classes, num)
    noise = generator.integers(0, num_classes, (4, num))
    rows = np.where(generator.random((4, num)) < 0.6, references, noise)
    return references.tolist(), rows.tolist()


def test_p_and_interval_are_those_of_the_binomial_where_one_method_is_never_wrong():
    # d is 1 on k of n examples and 0 elsewhere: n · d* is Binomial(n, k / n), and d* <= 0 only if
    # none of the k is drawn.
    n, k = 40, 3
    answers = task(ours=[[1] * n], theirs=[[0] * k + [1] * (n - k)])
    difference = compare_with(answers, "theirs", ["ours"]).differences["ours"]
    assert difference.value == pytest.approx(k / n)
    assert difference.p == pytest.approx(2 * (1 - k / n) ** n, rel=0.1)
    cumulative = np.cumsum([binomial(n, i, k / n) for i in range(n + 1)])
    low, high = np.searchsorted(cumulative, [0.025, 0.975])
    assert (difference.low, difference.high) == pytest.approx((low / n, high / n))


def test_p_is_near_the_exact_sign_test_on_discordant_examples():
    wins, losses, n = 70, 45, 1000
    ours = [1] * wins + [0] * losses + [1] * (n - wins - losses)
    theirs = [0] * wins + [1] * losses + [1] * (n - wins - losses)
    difference = compare_with(task(a=[ours], b=[theirs]), "b", ["a"]).differences["a"]
    num = wins + losses
    exact = 2 * sum(binomial(num, i, 0.5) for i in range(losses + 1))
    assert difference.p == pytest.approx(exact, abs=0.01)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered, rejected, num_trials, n = 0, 0, 400, 150
    for trial in range(num_trials):
        easy = generator.random(n)  # examples are hard or easy for both: the pairs are correlated
        ours, theirs = (easy + generator.normal(0, 0.3, (2, n)) > 0.3).astype(int).tolist()
        answers = task(ours=[ours], theirs=[theirs])
        difference = compare_with(
            answers, "theirs", ["ours"], num_resamples=1000, seed=trial
        ).differences["ours"]
        covered += difference.low <= 0 <= difference.high
        rejected += difference.p < 0.05
    assert 0.92 <= covered / num_trials <= 0.98
    assert 0.02 <= rejected / num_trials <= 0.08


def test_equal_answers_do_not_differ():
    row = [1, 0, 1, 1, 0]
    found = compare_with(task(ours=[row], theirs=[row]), "theirs", ["ours"])
    difference = found.differences["ours"]
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    assert not difference.is_clear


def test_pairs_are_kept_together():
    # The same scores on other examples differ less surely than on the same ones.
    n = 400
    theirs = [1] * 300 + [0] * 100
    nested = [1] * 312 + [0] * 88
    apart = [0] * 88 + [1] * 312
    found = compare_with(task(a=[nested], b=[apart], c=[theirs]), "c", ["a", "b"])
    assert found.differences["a"].value == found.differences["b"].value == pytest.approx(12 / n)
    assert found.differences["a"].is_clear
    assert not found.differences["b"].is_clear


def test_seeds_are_averaged_and_may_differ_in_number():
    answers = task(a=[[1, 1, 0, 1], [1, 0, 0, 1]], b=[[1, 0, 0, 0]])
    difference = compare_with(answers, "b", ["a"]).differences["a"]
    assert difference.value == pytest.approx((0.75 + 0.5) / 2 - 0.25)


def test_a_method_that_lacks_seeds_is_the_mean_over_those_that_it_has():
    # The interval is the same as if each of its seeds had been there twice.
    generator = np.random.default_rng(5)
    a, b, c, d = (generator.random((4, 50)) < 0.6).astype(int).tolist()
    few = compare_with(task(x=[a, b], y=[c, d]), "y", ["x"]).differences["x"]
    many = compare_with(task(x=[a, b, a, b], y=[c, d]), "y", ["x"]).differences["x"]
    assert (few.value, few.low, few.high, few.p) == pytest.approx(
        (many.value, many.low, many.high, many.p)
    )


def test_what_wins_as_often_as_it_loses_is_not_told_apart():
    # d* is symmetric, so that as many draws are on either side; draws at 0 count on both.
    ours, theirs = [1] * 10 + [0] * 10 + [1] * 20, [0] * 10 + [1] * 10 + [1] * 20
    difference = compare_with(task(a=[ours], b=[theirs]), "b", ["a"]).differences["a"]
    assert difference.value == 0
    assert difference.p > 0.9
    assert difference.low == pytest.approx(-difference.high, abs=0.03)


def test_the_same_seed_gives_the_same_result_and_swapping_turns_the_sign():
    references, rows = random_classes(3)
    answers = task(references=references, a=rows[:2], b=rows[2:])
    one = compare_with(answers, "b", ["a"])
    assert one == compare_with(answers, "b", ["a"])
    [there], [back] = (
        one.differences.values(),
        compare_with(answers, "a", ["b"]).differences.values(),
    )
    assert (there.value, there.low, there.high, there.p) == pytest.approx(
        (-back.value, -back.high, -back.low, back.p)
    )


def test_holms_correction_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_each_draw_has_as_many_examples_as_there_are_also_in_parts(monkeypatch):
    monkeypatch.setattr("lowmem_reft.compare.report.significance._COUNTS_AT_ONCE", 70)
    parts = list(draw_counts(20, 10, seed=0))
    assert [part.shape for part in parts] == [(3, 20), (3, 20), (3, 20), (1, 20)]
    counts = np.concatenate(parts)
    assert (counts.sum(axis=1) == 20).all()
    assert counts.max() > 1


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_metric_of_counts_is_that_of_the_examples_drawn(name, num_classes):
    references, rows = random_classes(num_classes, num_classes=num_classes)
    right, predicted = np.array(references, float), np.array(rows[0], float)
    if name in ("pearson", "spearman"):  # with ties, and far from 0
        predicted = predicted + np.random.default_rng(0).integers(0, 5, len(right)) * 0.25 + 1e4
    [counts] = draw_counts(len(right), 50, seed=2)
    measured = METRICS[name](counts, predicted, right)
    for row, value in zip(counts.astype(int), measured, strict=True):
        drawn = np.repeat(np.arange(len(row)), row)
        expected = compute(name, predicted[drawn].tolist(), right[drawn].tolist())
        assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_a_draw_in_which_one_side_is_constant_counts_as_nothing_learned(name):
    constant, varied = np.zeros(6), np.array([0.0, 1, 0, 1, 1, 0])
    assert METRICS[name](np.ones((1, 6)), constant, varied).tolist() == [0]
    assert METRICS[name](np.ones((1, 6)), varied, constant).tolist() == [0]


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_other_metrics_are_computed_anew_on_each_draw(metric):
    references, rows = random_classes(7)
    answers = task(metric, references, a=rows[:2], b=rows[2:])
    found = compare_with(answers, "b", ["a"], num_resamples=300)
    drawn = [
        np.mean([compute(metric, [row[i] for i in places], [references[i] for i in places])
                 for row in rows[:2]])
        - np.mean([compute(metric, [row[i] for i in places], [references[i] for i in places])
                   for row in rows[2:]])
        for [counts] in [list(draw_counts(60, 300, seed=0))]
        for places in (np.repeat(np.arange(60), row.astype(int)) for row in counts)
    ]  # fmt: skip
    difference = found.differences["a"]
    assert difference.low == pytest.approx(np.percentile(drawn, 2.5))
    assert difference.high == pytest.approx(np.percentile(drawn, 97.5))


def test_the_loss_is_that_of_all_tokens_of_each_draw_and_a_lower_one_is_a_gain():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 50, 30).astype(float)
    ours, theirs = (tokens * generator.uniform(0.5, top, (2, 30)) for top in (1.0, 3.0))
    answers = task(references=[0] * 30, a=[[0] * 30] * 2, b=[[0] * 30] * 2)
    methods = {
        name: replace(
            answers.methods[name],
            losses=losses,
            num_tokens=np.stack([tokens, tokens]),
            values=tuple(float(row.sum() / tokens.sum()) for row in losses),
        )
        for name, losses in (("a", ours), ("b", theirs))
    }
    found = compare_with(replace(answers, metric="loss", methods=methods), "b", ["a"])
    difference = found.differences["a"]
    draws = np.concatenate([*draw_counts(30, 10_000, 0)])

    def on(counts, losses):  # in plain words: sum over the drawn examples, then over the tokens
        return np.mean([(counts * row).sum(1) / (counts * tokens).sum(1) for row in losses], 0)

    whole = np.ones((1, 30))
    assert difference.value == pytest.approx(float((on(whole, ours) - on(whole, theirs))[0]))
    expected = np.percentile(on(draws, ours) - on(draws, theirs), [2.5, 97.5])
    assert (difference.low, difference.high) == pytest.approx(tuple(expected))
    assert difference.value < 0
    assert difference.is_clear
    assert ranking._sign(found, "a") == ("▲ ", "good")


def test_methods_without_the_losses_of_their_examples_are_not_compared():
    answers = task(references=[0] * 4, a=[[0] * 4], b=[[0] * 4])
    assert compare_with(replace(answers, metric="loss"), "b", ["a"]) is None


def test_metrics_of_texts_are_means_over_examples():
    references = ["the cat sat", "a dog", "Two", "no"]
    one = ["the cat sat", "a cat", "two", "yes"]
    two = ["nothing", "dog", "three", "no"]
    for metric in ("exact_match", "overlap"):
        found = compare_with(task(metric, references, a=[one], b=[two]), "b", ["a"])
        expected = compute(metric, one, references) - compute(metric, two, references)
        assert found.differences["a"].value == pytest.approx(expected)


def test_answers_that_do_not_give_the_measured_value_are_left_out():
    answers = task(a=[[1, 1, 0]], b=[[1, 0, 0]], c=[[1, 1, 1]])
    stale = answers.methods["a"]
    answers.methods["a"] = MethodAnswers(
        seeds=stale.seeds,
        values=(0.9,),
        correct=stale.correct,
        predictions=stale.predictions,
        texts=stale.texts,
    )
    assert list(compare_with(answers, "b", ["a", "c"]).differences) == ["c"]
    assert compare_with(answers, "a", ["b", "c"]) is None


def test_there_is_nothing_to_compare_without_a_metric_a_second_method_or_examples():
    answers = task(a=[[1, 0, 1]], b=[[1, 1, 1]])
    assert compare_with(answers, "b", ["c"]) is None
    assert compare_with(answers, "c", ["a"]) is None
    unknown = TaskAnswers(
        task="t",
        metric="charm",
        examples=answers.examples,
        methods=answers.methods,
        num_left_out=0,
    )
    assert compare_with(unknown, "b", ["a"]) is None
    assert compare_with(task(a=[[1]], b=[[0]]), "b", ["a"]) is None


def test_many_examples_take_seconds_and_little_memory():
    generator = np.random.default_rng(0)
    n = 10_000
    rows = (generator.random((3, n)) < 0.8).astype(int).tolist()
    found = compare_with(task(a=[rows[0]], b=[rows[1]], c=[rows[2]]), "c", ["a", "b"])
    difference = found.differences["a"]
    # The normal approximation is good at this size.
    deviation = np.std(np.subtract(rows[0], rows[2])) / math.sqrt(n)
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
