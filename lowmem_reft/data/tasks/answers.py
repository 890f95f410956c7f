r"""The answer in generated text: a number, an option's letter, true or false, a labelled choice.

The paper takes the last number and the first letter, by LLM-Adapters' patterns: ``-?\d+\.?\d*`` in
the text without commas, and ``A|B|C|D|E``. So "10-4" gives -4 there, "1, 2, 3" gives 123, and
"A train" gives A. The extractors here look in the same places, but read a text as a person does.

Reasoning comes before a number or a letter: the last one counts, unless the text marks its answer
(``####``, ``\boxed{}``, "the answer is"). A truth value or a choice is answered at once, and what
follows may be an invented next question: the first one counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal

from lowmem_reft.errors import InputError
from lowmem_reft.machine.limits import TimeLimitError, time_limit

_PATTERN_SECONDS = 5.0
"""Of the processor, for a regular expression on one answer."""

TOLERANCE = 1e-3
"""Numbers that differ by no more are equal, as in the paper."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_HASHES = re.compile(r"####[ \t]*([-−–$€£¥₹.\d][^\n]*)")

# Before numbers are looked for, everything is written in one way; in this order.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}", " "),
        (r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"⁄\1/\2"),
        (r"\\(?:times|cdot)\b", "×"),
        (r"\\([$%])", r"\1"),
        (r"\{,\}", ","),
        (r"(?<=\d)\\[,!;](?=\d)", ""),
        (r"\^\{(-?\d+)\}", r"^\1"),
        (r"[−﹣－–]", "-"),
        ("½", "⁄1/2"),
        ("⅓", "⁄1/3"),
        ("⅔", "⁄2/3"),
        ("¼", "⁄1/4"),
        ("¾", "⁄3/4"),
        (r"(?<=\d)\s?⁄", " "),  # 3½ is 3 1/2
        ("⁄", ""),
        # $ 5, US$5, Rs. 5, USD5: what the sign stands before matters, the currency does not.
        (r"(?:\bUS)?[$€£¥₹]\s?|\b(?:USD|EUR|GBP|INR|Rs\.?)\s?(?=[-.\d])", ""),
        (r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))", ","),
        (r"(?<=\d) (?=000(?!\d))", ","),  # 12 000
        (r"(?<![\d/])(\d+)/(\d+)/(\d+)", r"\1 \2 \3"),  # a date
    )
)
# 1.234,50, then 1,234,567.5 and 12,34,567; a comma in anything else separates two numbers.
_EUROPEAN = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])")
_THOUSANDS = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?!,?\d)")

_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_NUMBER = re.compile(
    r"""
    (?<![A-Za-z_^\d])(?<!\d\.)                      # no part of a word, a unit or a version
    (?P<number>\d+(?:\.\d+)?|\.\d+)
    (?: \ (?P<top>\d+)/(?P<bottom>\d+)              # 3 1/2
      | /(?P<under>\d+(?:\.\d+)?)                     # 3/4
      | [eE](?P<exponent>[+-]?\d{1,4})(?![\dA-Za-z])  # 1.5e3
      | \ ?[×xX*]\ ?10\^(?P<power>-?\d{1,4})          # 1.5 × 10^3
      | \^(?P<raised>-?\d{1,4})                       # 10^3
    )?
    (?:\ (?P<scale>hundred|thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.ASCII,
)


def number(text: str) -> str | None:
    r"""Return the number that a text answers with, in plain digits; None if it has none.

    That is the last one; but where the text marks an answer, the one after the first ``####`` or in
    the last ``\boxed{}``. Understood are thousands separators, currency, units, percent signs,
    fractions, powers of ten, LaTeX and scale words ("2.5 million"). A "-" after a number or a word
    is no sign. Digits within a word or a unit ("H2O", "cm^2") are no number.
    """
    for place in (_first(_HASHES, text), _last(_BOXED, text), text):
        values = _values(place)
        if values:
            return _digits(values[-1])
    return None


def option_letter(text: str) -> str | None:
    """Return the option, A to E, that a text chooses; None if it chooses none.

    In this order: a boxed letter; the last "answer is B" or "Answer: (b)"; a text that begins with
    an option ("B", "C) 62"); the last letter in brackets or after "option"; a letter at the end.
    An article ("A train") is no option, nor is a list of all of them.
    """
    text = re.sub(r"[*`$]|\\(?:text|mathrm|textbf|mathbf)\b", "", text)
    boxed = re.match(r"[\W_]*([A-E])(?![A-Za-z])", _last(_BOXED, text) or "")
    if boxed:
        return boxed[1]
    answers = [match["letter"] for match in _LETTER.finditer(text) if not _is_article(match)]
    if answers:
        return answers[-1].upper()
    text = re.sub(r"(?im)^.*\b(?:choices|options)\s*:.*$", "", text)
    for pattern in _LETTER_FORMS:
        found = pattern.findall(text)
        if found:
            return str(found[-1]).upper()
    return None


_LETTER = re.compile(
    r"""
    \b(?:[Aa]nswer|ANSWER|[Aa]ns\.?|correct\ (?:option|choice)|[Rr]ight\ (?:option|choice))
    (?P<joint>\s*[:=]\s*|\s+(?:is|was|must\ be|should\ be|would\ be)\s*:?\s*)
    (?:(?:therefore|thus|clearly|hence|probably|most\ likely|simply)[\s,]+)?
    (?:(?:the\ )?(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s*:?\s*)?
    (?P<open>[(\[{"']?)\s*(?P<letter>[A-Ea-e])(?![\w'’])(?=(?P<after>[^\n]{0,12}))
    """,
    re.VERBOSE,
)
_LETTER_FORMS = (
    re.compile(r"\A\W*([A-Ea-e])\W*\Z"),
    re.compile(r"\A\s*[(\[]?([A-E])(?:[).\]:]|\s+[-–]\s|\s+\d)"),
    re.compile(r"\A\s*\(([a-e])\)"),
    re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice)\s+\(?|(?<![A-Za-z])(?=[A-E][)\]]))([A-E])(?![\w:])"),
    re.compile(r"(?<![\w(])([A-E])\s*[.!]?\s*\Z"),
)


def _is_article(match: re.Match[str]) -> bool:
    """Whether the letter after "answer is" or "answer:" is a word instead."""
    if match["open"]:
        return False
    if match["letter"].islower():  # "the answer is a number", but "the answer is a."
        return re.match(r"\s*(?:[.,;:!)]|\Z)", match["after"]) is None
    starts = ":" in match["joint"] or "=" in match["joint"]
    follows = re.match(r"\s+(?!because|since|as\b|is\b|and\b|with\b)[a-z]", match["after"])
    return match["letter"] == "A" and starts and follows is not None


def true_false(text: str) -> str | None:
    """Return "true" or "false", the first that a text says, not counting a list of both.

    "Not true" is false. "The answer is ..." comes before other mentions.
    """
    text = re.sub(r"(?i)\btrue\s*(?:/|or)\s*false\b", "", text)
    found = _ANSWER_TRUTH.search(text) or _TRUTH.search(text)
    if found is None:
        return None
    said = found["truth"].lower()
    return said if not found["negation"] else {"true": "false", "false": "true"}[said]


_TRUTH = re.compile(r"(?i)(?P<negation>\bnot\s+|n['’]t\s+)?\b(?P<truth>true|false)\b")
_ANSWER_TRUTH = re.compile(
    r"(?i)\banswer(?:\s+is|\s*[:=])[\s:\"'*]*" + _TRUTH.pattern.removeprefix("(?i)")
)


def choice_word(text: str) -> str | None:
    """Return the labelled choice that a text names, such as "solution1" or "answer3".

    The first one counts, but "the answer is ..." comes before other mentions, and neither a list of
    labels ("answer1/answer2") nor their repetition ("Answer1: a dog Answer2: a cat") counts.
    """
    text = _LABEL_LIST.sub("", text)
    found = _ANSWER_LABEL.search(text)
    if found is None:
        labels = list(_LABEL.finditer(text))
        names = {_label_name(label) for label in labels}
        free = [label for label in labels if not text[label.end() :].lstrip().startswith(":")]
        if not free and len(names) != 1:
            return None
        found = (free or labels)[0]
    return _label_name(found)


def choice_or_truth(text: str) -> str | None:
    """Return the labelled choice that a text names, else its truth value: for a mix of both."""
    return choice_word(text) or true_false(text)


def number_or_letter(text: str) -> str | None:
    """Return the letter that a text calls its answer, else its number: for a mix of both."""
    said = [match["letter"] for match in _LETTER.finditer(text) if not _is_article(match)]
    return str(said[-1]).upper() if said else number(text) or option_letter(text)


def _label_name(match: re.Match[str]) -> str:
    return f"{match['word']}{match['digit']}".lower()


_LABEL = re.compile(r"(?i)\b(?P<word>solution|ending|answer|option|choice)[ \t]?(?P<digit>[1-9])\b")
_LABEL_LIST = re.compile(r"(?i)\b(?:solution|ending|answer|option|choice)\d(?:/[a-z]+\d)+")
_ANSWER_LABEL = re.compile(
    r"(?i)\banswer(?:\s+is|\s*[:=])[\s:\"'*(]*" + _LABEL.pattern.removeprefix(r"(?i)\b")
)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "number": number,
    "option_letter": option_letter,
    "true_false": true_false,
    "choice_word": choice_word,
    "choice_or_truth": choice_or_truth,
    "number_or_letter": number_or_letter,
}
"""What finds the answer in generated text, by the name that tasks use."""


def find_extractor(name: str) -> Callable[[str], str | None]:
    """Return the extractor of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in EXTRACTORS:
        raise InputError(
            f"extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}; choose one"
        )
    return EXTRACTORS[name]


def answers_equal(kind: str | None, first: str | None, second: str | None) -> bool:
    """Whether two answers are the same: numbers within ``TOLERANCE``, other texts but for case.

    Args:
        kind: Key in ``EXTRACTORS``; None: whole texts.
        first: An extracted answer; None, where there was none, equals nothing.
        second: Another one.
    """
    if first is None or second is None:
        return False
    if kind == "number":
        return abs(float(first) - float(second)) <= TOLERANCE
    return first.casefold().split() == second.casefold().split()


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.findall(text)
    return str(found[-1]) if found else ""


def _values(text: str) -> list[float]:
    """The numbers of a text in their order."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _EUROPEAN.sub(lambda match: match[1].replace(".", "") + "." + match[2], text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    values = []
    for match in _NUMBER.finditer(text):
        try:
            value = _value(match)
        except (ArithmeticError, ValueError):  # 1/0, or too large for a float
            continue
        if math.isfinite(value):
            values.append(
                -value if _is_negative(text[max(0, match.start() - 9) : match.start()]) else value
            )
    return values


def _value(match: re.Match[str]) -> float:
    value = float(match["number"])
    if match["bottom"]:
        part = int(match["top"]) / int(match["bottom"])
        value = value + part if part < 1 else part
    elif match["under"]:
        value /= float(match["under"])
    elif match["raised"]:
        value **= int(match["raised"])
    else:
        value *= 10.0 ** int(match["exponent"] or match["power"] or 0)
    return value * _SCALES.get(match["scale"] or "", 1.0)


def _is_negative(before: str) -> bool:
    """Whether the text before a number ends in a minus sign rather than in a dash."""
    if before.endswith("- "):
        return before[:-2].rstrip().endswith(("=", "("))
    if not before.endswith("-"):
        return False
    before = before[:-1]
    if before.endswith(" "):  # "5 -3", but "it fell to -3"
        return re.search(r"[\d)\]}%] +\Z", before) is None
    return re.search(r"[\w)\]}%-]\Z", before) is None


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return format(Decimal(repr(value)), "f")


def extract_answer(text: str, pattern: str | None) -> str | None:
    """Return the last match's first group (or the whole text), lower-cased, white space folded.

    It is the whole text without a pattern, and None if the pattern, a regular expression, does not
    match.

    Raises:
        InputError: The pattern is not a regular expression, or takes too long.
    """
    if pattern is not None:
        try:
            with time_limit(_PATTERN_SECONDS):
                matches = list(re.finditer(pattern, text))
        except TimeLimitError:
            raise InputError(
                f"answer_pattern must match within {_PATTERN_SECONDS:g} s, got {pattern!r}, which "
                f"does not on an answer of {len(text)} characters; write it without repetitions "
                "in repetitions"
            ) from None
        except re.error as error:
            raise InputError(
                f"answer_pattern must be a regular expression, got {pattern!r}; mend it ({error})"
            ) from error
        if not matches:
            return None
        text = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
    return " ".join((text or "").lower().split())
