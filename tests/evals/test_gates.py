"""Gates are claims of a line each; they are parsed, never run."""

import pytest

from hubforge.evals._gates import GateSyntaxError, parse_gate


@pytest.mark.parametrize(
    ("text", "eval_", "on", "metric", "operator"),
    [
        ("ifeval.prompt_level_strict_acc >= baseline - 0.02", "ifeval", None, "prompt_level_strict_acc", ">="),
        ("style/healed.slop <= 1.1 * baseline", "style", "healed", "slop", "<="),
        ("ifeval/gguf/Q6_K.prompt_level_strict_acc>=0.5", "ifeval", "gguf/Q6_K", "prompt_level_strict_acc", ">="),
        ("  suite.gsm8k/exact_match,strict-match > .5", "suite", None, "gsm8k/exact_match,strict-match", ">"),
        ("ifeval/qwen2.5.inst_level_loose_acc≤1", "ifeval", "qwen2.5", "inst_level_loose_acc", "<="),
        ("my-eval.chrf++ ≥ 3", "my-eval", None, "chrf++", ">="),
    ],
    ids=["eval", "model", "quant", "task and filter", "dotted name", "sign"],
)
def test_parts_of_a_gate(text: str, eval_: str, on: str | None, metric: str, operator: str) -> None:
    gate = parse_gate(text)
    assert (gate.eval, gate.on, gate.metric, gate.operator) == (eval_, on, metric, operator)
    assert gate.text == text.strip()


@pytest.mark.parametrize(
    ("expression", "baseline", "threshold"),
    [
        ("0.5", None, 0.5),
        ("baseline - 0.02", 0.6, 0.58),
        ("1.1 * baseline", 3.0, 3.3),
        ("baseline - 2 * 0.1 - 0.1", 1.0, 0.7),
        ("(baseline + 1) / 2", 0.5, 0.75),
        ("-baseline + 1e-1", 0.5, -0.4),
        ("12 / 2 / 3", None, 2.0),
    ],
)
def test_threshold(expression: str, baseline: float | None, threshold: float) -> None:
    assert parse_gate(f"e.m >= {expression}").holds(0.0, baseline)[1] == pytest.approx(threshold, abs=1e-15)


@pytest.mark.parametrize(
    ("operator", "value", "holds", "margin"),
    [
        (">=", 0.58, True, 0.0),
        (">=", 0.57, False, -0.01),
        (">", 0.58, False, 0.0),
        (">", 0.59, True, 0.01),
        ("<=", 0.58, True, 0.0),
        ("<=", 0.60, False, -0.02),
        ("<", 0.57, True, 0.01),
    ],
)
def test_margin_is_negative_when_a_gate_fails(operator: str, value: float, holds: bool, margin: float) -> None:
    got = parse_gate(f"e.m {operator} baseline - 0.02").holds(value, 0.6)
    assert got[0] is holds
    assert got[2] == pytest.approx(margin, abs=1e-12)


def test_a_gate_without_baseline_needs_none() -> None:
    assert not parse_gate("e.m > 0.5").uses_baseline
    with pytest.raises(ValueError, match="speaks of a baseline, and the eval has none"):
        parse_gate("e.m > baseline").holds(1.0)
    with pytest.raises(ValueError, match="divides by zero"):
        parse_gate("e.m > 1 / baseline").holds(1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "column", "what", "mend"),
    [
        ("ifeval >= 0.5", 1, "does not begin with an eval and a metric", "eval.metric"),
        ("e.m", 4, "no comparison after 'e.m'", "eval.metric"),
        ("e.m == 0.5", 5, "'==' is no comparison", ">=, <=, > or <"),
        ("e.m >= ", 7, "the gate ends where", "eval.metric"),
        ("e.m >= baselin - 1", 8, "'baselin' is neither", "Did you mean 'baseline'?"),
        ("e.m >= (baseline", 8, "not closed", "eval.metric"),
        ("e.m >= 0.5 0.6", 12, "'0.6' is not expected here", "eval.metric"),
        ("e.m >= 50 %", 8, "'50 %' is no number", "Write it as a share: 0.5."),
        ("e.m >= __import__('os')", 8, "'__import__' is neither", "eval.metric"),
        ("e.m >= " + "(" * 1000, 301, "too long", "eval.metric"),
        ("e.m >= 2 ** 3", 11, "'*' is neither", "eval.metric"),
    ],
)
def test_what_is_no_gate(text: str, column: int, what: str, mend: str) -> None:
    with pytest.raises(GateSyntaxError) as error:
        parse_gate(text)
    assert error.value.column == column
    assert what in error.value.what
    assert mend in error.value.mend
