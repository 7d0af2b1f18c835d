"""The schema of the JSON form, and a check of documents against it, with the few keywords that the schema uses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from privet.errors import ConfigurationError

__all__ = ["check_report", "schema"]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "array": (list,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}
_KNOWN = {
    *("$schema", "title", "description", "type", "const", "enum", "anyOf", "minimum", "maximum", "pattern"),
    *("properties", "required", "additionalProperties", "items"),
}


@cache
def schema() -> Mapping[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of the JSON form of a report."""
    text = resources.files("privet.report").joinpath("schema.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


def check_report(document: object) -> Mapping[str, Any]:
    """Returns the document if it is the JSON form of a report.

    Raises:
        ConfigurationError: if it is not, with the first place that does not fit.
    """
    wrong = _wrong(document, schema(), "the report")
    if wrong is not None:
        raise ConfigurationError(f"This is no report of privet, or it was changed: {wrong}.")
    assert isinstance(document, Mapping)
    return document


def _wrong(value: object, rule: Mapping[str, Any], place: str) -> str | None:
    """Returns what does not fit, or None."""
    unknown = set(rule) - _KNOWN
    assert not unknown, f"the schema uses {unknown}, which this check does not know"
    if "anyOf" in rule:
        found = [_wrong(value, each, place) for each in rule["anyOf"]]
        return None if None in found else found[0]
    if "const" in rule and value != rule["const"]:
        return f"{place} must be {rule['const']!r}, got {value!r}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{place} must be one of {rule['enum']}, got {value!r}"
    kind = rule.get("type")
    if kind is not None and (isinstance(value, bool) or not isinstance(value, _TYPES[kind])):
        return f"{place} must be of the type {kind}, got {value!r}"
    if isinstance(value, int | float) and not rule.get("minimum", value) <= value <= rule.get("maximum", value):
        return f"{place} is out of range: {value!r}"
    if isinstance(value, str) and "pattern" in rule and not re.search(rule["pattern"], value):
        return f"{place} does not have its form: {value!r}"
    if isinstance(value, list) and "items" in rule:
        return _first(_wrong(each, rule["items"], f"{place}[{index}]") for index, each in enumerate(value))
    if isinstance(value, dict):
        return _wrong_object(value, rule, place)
    return None


def _wrong_object(value: dict[str, object], rule: Mapping[str, Any], place: str) -> str | None:
    missing = [key for key in rule.get("required", ()) if key not in value]
    if missing:
        return f"{place} lacks {', '.join(missing)}"
    known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
    surplus = [key for key in value if key not in known]
    if others is False and surplus:
        return f"{place} has unknown keys: {', '.join(map(str, surplus))}"
    return _first(_wrong(each, known.get(key, others or {}), f"{place}.{key}") for key, each in value.items())


def _first(found: Any) -> str | None:
    """Returns the first that is not None."""
    return next((each for each in found if each is not None), None)
