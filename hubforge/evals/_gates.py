"""Gates: `ifeval.prompt_level_strict_acc >= baseline - 0.02`, read without ever running anything.

gate        eval[/on].metric  operator  expression
operator    >=  <=  >  <
expression  numbers and `baseline`, with + - * / and parentheses
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hubforge.op import Op

# The last dot ends the model's name: names may have dots (`qwen2.5`), metrics have none.
_SUBJECT = re.compile(r"(?P<eval>[\w-]+)(?:/(?P<on>[^\s<>=≥≤]+))?\.(?P<metric>[^\s<>=≥≤.]+)")
_OPERATOR = re.compile(r"[<>=!]+|≥|≤")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)(?P<percent>\s*%)?|(?P<name>\w+)|(?P<sign>\S))"
)
_EXAMPLE = "A gate reads `eval.metric >= baseline - 0.02` or `eval/model.metric <= 3.5`."
_LONGEST = 300  # letters; parentheses nest no deeper than that
_ROUNDING = 1e-9  # 0.6 - 0.02 is a little under 0.58 in binary: a value on the threshold must not fall off it.


class GateSyntaxError(ValueError):
    """The line is not a gate: what is wrong, at which column (from 1), and how to mend it."""

    def __init__(self, what: str, column: int, mend: str = _EXAMPLE) -> None:
        self.what, self.column, self.mend = what, column, mend
        super().__init__(f"{what} (column {column}). {mend}")


@dataclass(frozen=True)
class Gate:
    """A claim on one metric, which must hold before anything is pushed."""

    text: str
    eval: str
    on: str | None  # None: the model that the eval names first
    metric: str
    operator: str  # >=  <=  >  <
    expression: Expression

    @property
    def uses_baseline(self) -> bool:
        return self.expression.uses_baseline

    def holds(self, value: float, baseline: float | None = None) -> tuple[bool, float, float]:
        """Whether it holds, the threshold, and the margin: how far inside the value lies, negative when it fails.

        Raises ValueError when the expression needs a baseline and there is none, or divides by zero.
        """
        threshold = self.expression.value(baseline)
        margin = value - threshold if self.operator.startswith(">") else threshold - value
        strict = self.operator in ("<", ">")
        return (margin > _ROUNDING if strict else margin >= -_ROUNDING), threshold, margin


@dataclass(frozen=True)
class Expression:
    """The right side of a gate: a constant, or a function of the baseline's value."""

    text: str
    uses_baseline: bool
    compute: Callable[[float], float]

    def value(self, baseline: float | None) -> float:
        if self.uses_baseline and baseline is None:
            raise ValueError(f"`{self.text}` speaks of a baseline, and the eval has none")
        try:
            return self.compute(0.0 if baseline is None else baseline)
        except ZeroDivisionError as error:
            raise ValueError(f"`{self.text}` divides by zero at baseline = {baseline}") from error


def parse_gate(text: str) -> Gate:
    """The gate that a line of the recipe spells. Raises GateSyntaxError."""
    start = len(text) - len(text.lstrip())
    if len(text) > _LONGEST:
        raise GateSyntaxError(f"a gate of {len(text)} letters is too long", _LONGEST + 1)
    subject = _SUBJECT.match(text, start)
    if subject is None:
        raise GateSyntaxError(f"{text.strip()!r} does not begin with an eval and a metric, `eval.metric`", start + 1)
    at = subject.end() + len(text[subject.end() :]) - len(text[subject.end() :].lstrip())
    found = _OPERATOR.match(text, at)
    if found is None:
        raise GateSyntaxError(f"no comparison after {subject[0]!r}", at + 1)
    operator = {"≥": ">=", "≤": "<="}.get(found[0], found[0])
    if operator not in (">=", "<=", ">", "<"):
        raise GateSyntaxError(
            f"{found[0]!r} is no comparison of a gate", at + 1, "Use >=, <=, > or <: measured values are rarely equal."
        )
    return Gate(
        text=text.strip(),
        eval=subject["eval"],
        on=subject["on"],
        metric=subject["metric"],
        operator=operator,
        expression=_Parser(text, found.end()).whole(),
    )


def known_metrics(op: Op) -> set[str] | None:
    """The metrics that an eval will have, as far as its fields tell; None where only a run shows them."""
    ask = getattr(op, "known_metrics", None)
    return None if ask is None else ask()


class _Parser:
    """Recursive descent: sum -> product -> factor."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.start, self.at, self.uses_baseline = text, start, start, False

    def whole(self) -> Expression:
        compute = self._sum()
        if token := self._peek():
            raise GateSyntaxError(f"{token[0].strip()!r} is not expected here", self._column(token))
        return Expression(self.text[self.start :].strip(), self.uses_baseline, compute)

    def _sum(self) -> Callable[[float], float]:
        left = self._product()
        while sign := self._take("+-"):
            left = _add(left, self._product()) if sign == "+" else _subtract(left, self._product())
        return left

    def _product(self) -> Callable[[float], float]:
        left = self._factor()
        while sign := self._take("*/"):
            left = _multiply(left, self._factor()) if sign == "*" else _divide(left, self._factor())
        return left

    def _factor(self) -> Callable[[float], float]:
        token = self._peek()
        if token is None:
            raise GateSyntaxError(
                "the gate ends where a number or `baseline` should stand", len(self.text.rstrip()) + 1
            )
        if self._take("-"):
            return _subtract(lambda baseline: 0.0, self._factor())
        if self._take("("):
            inner = self._sum()
            if not self._take(")"):
                raise GateSyntaxError("a parenthesis is opened and not closed", self._column(token))
            return inner
        if token["number"]:
            if token["percent"]:
                raise GateSyntaxError(
                    f"{token[0].strip()!r} is no number of a gate",
                    self._column(token),
                    f"Write it as a share: {float(token['number']) / 100:g}.",
                )
            self.at = token.end()
            number = float(token["number"])
            return lambda baseline: number
        if token["name"] == "baseline":
            self.at, self.uses_baseline = token.end(), True
            return lambda baseline: baseline
        raise GateSyntaxError(
            f"{token[0].strip()!r} is neither a number nor `baseline`",
            self._column(token),
            "Did you mean 'baseline'?" if (token["name"] or "").lower().startswith("base") else _EXAMPLE,
        )

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.at)

    def _take(self, signs: str) -> str | None:
        """The sign that comes next, if it is one of these."""
        token = self._peek()
        if token is None or not token["sign"] or token["sign"] not in signs:
            return None
        self.at = token.end()
        return token["sign"]

    def _column(self, token: re.Match[str]) -> int:
        return token.start() + len(token[0]) - len(token[0].lstrip()) + 1


_Compute = Callable[[float], float]


def _add(a: _Compute, b: _Compute) -> _Compute:
    return lambda baseline: a(baseline) + b(baseline)


def _subtract(a: _Compute, b: _Compute) -> _Compute:
    return lambda baseline: a(baseline) - b(baseline)


def _multiply(a: _Compute, b: _Compute) -> _Compute:
    return lambda baseline: a(baseline) * b(baseline)


def _divide(a: _Compute, b: _Compute) -> _Compute:
    return lambda baseline: a(baseline) / b(baseline)
