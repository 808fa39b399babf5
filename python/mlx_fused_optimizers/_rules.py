"""metal/update_rules.h and formats.h in Python, where a value is an array or a number.

So the arithmetic has one place, the headers, which the package holds copies of. Their
language is small: functions and structs of the types T and U, declarations,
assignments, and branches on hyper-parameters. Each statement becomes a line of Python.

A number takes the dtype of the array that it meets, as in csrc/graph/node.h, of which
the functions below are the Python.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

Names = dict[str, str]  # what stands for a name of the header


def square_root(x: Any) -> mx.array:
    return mx.sqrt(_array(x))


def magnitude(x: Any) -> mx.array:
    return mx.abs(_array(x))


def sign_of(x: Any) -> mx.array:
    return mx.sign(_array(x))


def one_minus_power(beta: Any, step: Any) -> mx.array:
    return -mx.expm1(_array(step * beta.logarithm))


def differs(x: Any, number: float) -> bool:
    """Of an array nothing is known while the graph is built: it may differ."""
    return isinstance(x, mx.array) or x != number


def _array(x: Any) -> mx.array:
    return x if isinstance(x, mx.array) else mx.array(x, mx.float32)


def nearest(x: mx.array) -> mx.array:
    return mx.where(mx.isnan(x), 0.0, mx.round(x))


FUNCTIONS = {
    "as_bits": lambda x: x.view(mx.uint32),
    "as_float": lambda x: x.view(mx.float32),
    "at_least": lambda x, least: mx.where(x > least, x, least),
    "choose": mx.where,
    "clamped": lambda x, least, most: mx.minimum(mx.maximum(x, least), most),
    "differs": differs,
    "half_of": lambda x: x.astype(mx.float16).astype(mx.float32),
    "is_finite": mx.isfinite,
    "is_nan": mx.isnan,
    "is_positive": lambda x: x > 0,
    "nearest": nearest,
    "round_down": mx.floor,
    "to_float": lambda x: x.view(mx.int32).astype(mx.float32),
    "to_integer": lambda x: x.astype(mx.int32).view(mx.uint32),
    "whole": lambda x: mx.array(x, mx.uint32) if isinstance(x, int) else x,
    "larger": mx.maximum,
    "magnitude": magnitude,
    "one_minus_power": one_minus_power,
    "power": mx.power,
    "sign_of": sign_of,
    "smaller": mx.minimum,
    "square_root": square_root,
    "where_positive": lambda x, a, b: mx.where(x > 0, a, b),
}


@cache
def header() -> dict[str, Any]:
    """The functions and classes of the headers by their names."""
    code: dict[str, Any] = dict(FUNCTIONS)
    for name in ("update_rules.h", "formats.h"):
        exec(translate((Path(__file__).parent / name).read_text()), code)
    return code


@cache
def rules() -> dict[str, Any]:
    """The rules' classes by their names, in the header's order."""
    base = header()["RuleDefaults"]
    return {
        name: value
        for name, value in header().items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }


def number_of(value: Any) -> Any:
    """A hyper-parameter with what is derived from it."""
    number = header()["Number"]()
    if isinstance(value, mx.array):
        number.value, number.complement = value, 1.0 - value
        number.logarithm = mx.log(value)
        return number
    number.value = x = float(value)
    number.complement = 1 - x
    number.logarithm = math.log(x) if x > 0 else -math.inf if x == 0 else math.nan
    return number


# What is translated: not the functions of float and of the machine's integers, of which
# those above are the Python.
_ITEM = re.compile(
    r"METAL_FUNC (?P<result>T|U|void)\s(?P<function>\w+)"
    r"\((?P<parameters>(?!float|uint32_t|bool)[^)]*)\)\s*\{"
    r"|RULE\((?P<rule>\w+)\)\s*\{|struct (?P<struct>\w+)\s*\{"
)
_METHOD = re.compile(
    r"(?P<result>void|T) (?P<function>\w+)\((?P<parameters>[^)]*)\)"
    r"(?: const)? thread\s*\{"
)
_NAMES = re.compile(r"(HYPERPARAMETERS|STATES|NON_NEGATIVE)\(([^)]*)\)\s*;")
_CONSTANT = re.compile(r"static constexpr constant (?:int|bool) (\w+) = (\w+);")
_MEMBER = re.compile(r"T (\w+);")
_WORD = re.compile(
    r"(?<![\w.\[])(?:(?P<whole>0x[0-9a-f]+|\d+)u"
    r"|(?P<number>\d[\d.]*(?:e[-+]?\d+)?)f?|(?P<name>[A-Za-z_]\w*))"
)


def translate(text: str) -> str:
    """The header's text in Python."""
    text = re.sub(r"//[^\n]*", "", text)
    lines: list[str] = []
    for item in _ITEM.finditer(text):
        body = _braces(text, item.end())
        if item["function"]:
            lines += _function(item, body, {})
            continue
        base = "(RuleDefaults)" if item["rule"] else ""
        lines += [f"class {item['rule'] or item['struct']}{base}:"]
        lines += ["  number_names = state_names = non_negative_names = ()"] * (not base)
        lines += [f"  {line}" for line in _struct(body)]
    return "\n".join(lines)


def _struct(body: str) -> list[str]:
    lines = [
        f"{name} = {'True' if x == 'true' else 'False' if x == 'false' else x}"
        for name, x in _CONSTANT.findall(body)
    ]
    members: set[str] = set()
    for kind, arguments in _NAMES.findall(body):
        names = tuple(re.findall(r"\w+", arguments))
        if kind == "STATES":
            lines.append(f"state_names = {names}")
        elif kind == "NON_NEGATIVE":
            lines.append(f"non_negative_names = {names}")
        else:
            lines.append(f"number_names = {names}")
            members |= {*names}
    methods = [(m, _braces(body, m.end())) for m in _METHOD.finditer(body)]
    outside = body
    for _, inner in methods:
        outside = outside.replace(inner, "", 1)
    members |= {*_MEMBER.findall(outside)} | {m["function"] for m, _ in methods}
    for method, inner in methods:
        lines += _function(method, inner, {name: f"self.{name}" for name in members})
    return lines


def _function(head: re.Match[str], body: str, names: Names) -> list[str]:
    """A function, or with names of members a method.

    It returns what the header passes by reference, if that has no result.
    """
    parameters = head["parameters"].split(",")
    arguments = [re.findall(r"\w+", parameter)[-1] for parameter in parameters]
    references = [
        f"{name}, "
        for name, parameter in zip(arguments, parameters, strict=True)
        if re.search("[&*]", parameter)
    ]
    own = ["self"] if names else []
    names = {**names, **{name: name for name in arguments}, "T": "", "U": "whole"}
    lines = [f"def {head['function']}({', '.join(own + arguments)}):"]
    lines += _statements(body, names)
    if head["result"] == "void":
        lines.append(f"  return ({''.join(references)})")
    return lines


def _statements(body: str, names: Names) -> list[str]:
    lines: list[str] = []
    indent = "  "
    for text, end in re.findall(r"([^;{}]*)([;{}])", body):
        statement = " ".join(text.split())
        if end == "}" and not statement:
            indent = indent[2:]
        elif end == "{" and (branch := re.fullmatch(r"if \((.*)\)|else", statement)):
            lines.append(f"{indent}{_branch(branch[1], names)}:")
            indent += "  "
        elif end == ";":
            lines += [f"{indent}{line}" for line in _statement(statement, names)]
        else:
            raise _untranslatable(statement + end)
    return lines


def _branch(condition: str | None, names: Names) -> str:
    if condition is None:
        return "else"
    comparison = re.fullmatch(r"([\w.]+) != (\d+)", condition)
    if comparison is None:
        raise _untranslatable(condition)
    return f"if differs({_expression(comparison[1], names)}, {comparison[2]})"


def _statement(text: str, names: Names) -> list[str]:
    """A line of Python, or none: names then has what the statement declares."""
    if result := re.fullmatch(r"return (.+)", text):
        return [f"return {_expression(result[1], names)}"]
    if alias := re.fullmatch(r"thread T ?& ?(\w+) = (\w+\[\d+\])", text):
        names[alias[1]] = alias[2]
        return []
    if number := re.fullmatch(r"Number<T> (\w+)", text):
        names[number[1]] = number[1]
        return [f"{number[1]} = Number()"]
    if local := re.fullmatch(r"(?:const )?[TU] (\w+)(.*)", text):
        names[local[1]] = local[1]
        text = local[1] + local[2]
        if not local[2]:
            return []
    if assignment := re.fullmatch(r"([\w.\[\]]+) = (.+)", text):
        target, value = (_expression(x, names) for x in assignment.groups())
        return [f"{target} = {value}"]
    raise _untranslatable(text)


def _expression(text: str, names: Names) -> str:
    text = re.sub(r"<[TU](?:, [TU])*>", "", text)
    if re.search(r"[^\w\s.,()+*/\[\]&|^-]", text.replace(">>", "").replace("<<", "")):
        raise _untranslatable(text)

    def word(match: re.Match[str]) -> str:
        if match["whole"]:
            return match["whole"]
        if match["number"]:
            return repr(float(match["number"]))
        return names.get(match["name"], match["name"])

    return _WORD.sub(word, text)


def _braces(text: str, start: int) -> str:
    """What stands in the braces that open before start."""
    depth = 1
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise _untranslatable(text[start : start + 40])


def _untranslatable(text: str) -> ValueError:
    return ValueError(f"a header has {text!r}, which _rules.py cannot translate")
