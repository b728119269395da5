"""Twelve answers that stop, crash or slow down math-verify, for the benchmark and the tests."""

from typing import NamedTuple


class Hostile(NamedTuple):
    """One completion, its reference, and the reward it is due if there were time enough."""

    name: str
    completion: str
    reference: str
    reward: float


def _box(content: str) -> str:
    return rf"\boxed{{{content}}}"


_THIRD = r"\frac{1}{3}"
_INTEGRAL = r"\int_0^1 \frac{\sin(x^x)}{\log(x+2)^x} dx"
_PARENTHESES = "(" * 3000 + "1" + ")" * 3000
_SET = r"\{" + ",".join(map(str, range(3000))) + r"\}"
_UNION = r" \cup ".join(f"({2 * i},{2 * i + 1})" for i in range(200))
_FRACTIONS = r"\frac{1}{1+" * 300 + "1" + "}" * 300
_MATRIX = r"\\".join("&".join(["1"] * 40) for _ in range(40))

HOSTILE = [
    Hostile("power tower", _box("9^{9^{9^{9}}}"), _THIRD, 0.0),
    Hostile("factorial", _box("(10^{7})!"), _THIRD, 0.0),
    Hostile("big power", _box("7^{10^{8}}"), "7^{100000001}", 0.0),
    Hostile("long sum", _box(r"\sum_{k=1}^{10^9} \sin k"), r"\pi", 0.0),
    Hostile("integral", _box(_INTEGRAL), "0.3", 0.0),
    Hostile("3000 parentheses", _box(_PARENTHESES), _THIRD, 0.0),
    Hostile("set of 3000", _box(_SET), r"\{1, 2, 3\}", 0.0),
    Hostile("200 intervals", _box(_UNION), _THIRD, 0.0),
    Hostile("300 fractions", _box(_FRACTIONS), _THIRD, 0.0),
    Hostile("20000 digits", _box("7" * 20000), _THIRD, 0.0),
    Hostile("40 × 40 matrix", _box(rf"\begin{{pmatrix}}{_MATRIX}\end{{pmatrix}}"), _THIRD, 0.0),
    Hostile("5000 boxes", " ".join(_box(str(i)) for i in range(5000)), _THIRD, 0.0),
]
