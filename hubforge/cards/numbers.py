"""Numbers as a reader wants them: sizes, counts, measurements with their interval, times."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit: a narrow table cell must not part them
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: object) -> str:
    """Bytes as "15.9 GB" (powers of 1000, as the Hub shows them); "" when unknown."""
    if not _is_number(count):
        return ""
    value, unit = float(count), 0  # type: ignore[arg-type]
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f}{SPACE}{_UNITS[unit]}" if unit == 0 else f"{value:.3g}{SPACE}{_UNITS[unit]}"


def count(value: object) -> str:
    """A count with thin spaces between thousands, "12 345"; what is no number stays as it is; "" when unknown."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)
    return str(value)


def big_count(value: object) -> str:
    """A large count in words: 7996156490 -> "8.00 B", 12500000 -> "12.5 M"; "" when unknown."""
    if not _is_number(value):
        return ""
    number = float(value)  # type: ignore[arg-type]
    for limit, unit, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{_significant(number / unit, 3)}{SPACE}{letter}"
    return count(int(number)) if number.is_integer() else f"{number:.3g}"


def decimals(values: Sequence[float | None], spread: float | None = None) -> int:
    """How many decimals to show: two digits of the spread (half an interval) when known, else four digits in all."""
    if spread and math.isfinite(spread) and spread > 0:
        return min(6, max(0, 1 - math.floor(math.log10(spread))))
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if all(value is None or float(value).is_integer() for value in values) and largest >= 10:
        return 0
    return min(6, max(0, 3 - math.floor(math.log10(largest)))) if largest >= 1e-3 else (0 if largest == 0 else 6)


def fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    """The value with that many decimals and a true minus sign; "" when it is None or not finite."""
    if value is None or not math.isfinite(value):
        return ""
    shown = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    if not shown.strip("+-0."):  # never "-0.00"
        shown = shown.replace("-", "").replace("+", "")
    return shown.replace("-", MINUS)


def short(value: object, digits: int = 4) -> str:
    """Any plain number with at most that many significant digits; other values as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return count(value)
    if not math.isfinite(value):
        return ""
    return _significant(value, digits).replace("-", MINUS)


def share(value: object) -> str:
    """A share of one as a percentage: 0.9312 -> "93.1 %"; "" when unknown."""
    if not _is_number(value):
        return ""
    percent = 100 * float(value)  # type: ignore[arg-type]
    return f"{percent:.4g}{SPACE}%" if 99 < percent < 100 else f"{percent:.3g}{SPACE}%"


def plain(value: object, digits: int = 3) -> str:
    """A number with that many significant digits and no exponent: 2e-5 -> "0.00002"; "" when unknown."""
    if not _is_number(value):
        return ""
    number = float(value)  # type: ignore[arg-type]
    places = max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0
    shown = f"{number:.{min(places, 9)}f}"
    return (shown.rstrip("0").rstrip(".") if "." in shown else shown).replace("-", MINUS)


def duration(seconds: object) -> str:
    """Seconds as "0.4 s", "43 s", "12 min 5 s", "3 h 20 min"; "" when unknown or zero."""
    if not _is_number(seconds) or float(seconds) <= 0:  # type: ignore[arg-type]
        return ""
    value = float(seconds)  # type: ignore[arg-type]
    if value < 9.95:
        return f"{max(value, 0.1):.1f} s"
    whole = round(value)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {left} s" if left else f"{minutes} min"
    return f"{left} s"


def _significant(value: float, digits: int) -> str:
    if value and (abs(value) < 1e-4 or abs(value) >= 1e7):
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
    return f"{value:.{digits}g}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
