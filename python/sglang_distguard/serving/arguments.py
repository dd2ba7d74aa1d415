"""``--model NAME=PATH`` and ``--set [NAME.]FIELD=VALUE``: which models, with which settings."""

from __future__ import annotations

import difflib
import functools
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from sglang_distguard.config.checks import check_name, shown

#: Fields of ServerArgs that the server has one of, for all models.
_OF_THE_SERVER = {
    "model_path": "--model NAME=PATH",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key",
    "admin_api_key": "--admin-key",
}


def models(given: Sequence[str]) -> dict[str, str]:
    """Return name -> path of ``NAME=PATH`` texts.

    Raises:
        ValueError: one is not of that form, or two have one name.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ValueError(f"--model takes NAME=PATH, not {text!r}")
        check_name(name)
        if name in found:
            raise ValueError(
                f"--model has the name {name!r} twice: {found[name]} and {path}; each model has a "
                "name of its own"
            )
        found[name] = path
    return found


def settings(given: Sequence[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return name -> fields of ``[NAME.]FIELD=VALUE`` texts; without NAME for every model.

    Args:
        given: the texts; a later one wins, and one with a name wins over one without.
        names: of the models; the result also has the key "", for models of later.

    Raises:
        ValueError: a form, a name, a field or a value is wrong.
    """
    known = list(names)
    found: dict[str, dict[str, Any]] = {name: {} for name in ("", *known)}
    own: dict[str, dict[str, Any]] = {name: {} for name in known}
    for text in given:
        where, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE or NAME.FIELD=VALUE, not {text!r}")
        name, _, field = where.rpartition(".")
        if name and name not in own:
            raise ValueError(f"--set {text}: no model is named {name!r}{_closest(name, known)}")
        typed_value = typed(field, value)
        if name:
            own[name][field] = typed_value
        else:
            for fields in found.values():
                fields[field] = typed_value
    for name, fields in own.items():
        found[name].update(fields)
    return found


def fields_of(name: str, model_path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``Pool.load`` for one model of a server.

    Args:
        name: of the model; clients, and SGLang's answers, use it.
        model_path: path of the checkpoint.
        given: fields of ``ServerArgs``, which win over the server's own.

    Raises:
        TypeError, ValueError: the name, a field or a value is wrong.
    """
    check_name(name)
    fields = {field: typed(field, value) for field, value in given.items()}
    return {
        "served_model_name": name,
        "enable_metrics": True,
        **fields,
        "model_path": model_path,
    }


def typed(field: str, value: Any) -> Any:
    """Return ``value`` as the type of this field of SGLang's ServerArgs.

    Args:
        field: its name.
        value: JSON or text, or a value of its type.

    Raises:
        ValueError: there is no such field, it is the server's, or the value does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = _hints()
    if field in _OF_THE_SERVER:
        raise ValueError(f"{field} is not set by model; use {_OF_THE_SERVER[field]}")
    if field not in hints:
        raise ValueError(f"SGLang's ServerArgs has no field {field!r}{_closest(field, hints)}")
    adapter = TypeAdapter(hints[field])
    forms = [value]
    if isinstance(value, str):
        try:
            forms.insert(0, json.loads(value))
        except ValueError:
            pass
    reason = ""
    for form in forms:
        try:
            return adapter.validate_python(form)
        except ValidationError as error:
            reason = "; ".join(dict.fromkeys(str(it["msg"]) for it in error.errors()))
    raise ValueError(f"{field} of SGLang's ServerArgs cannot be {shown(value)}: {reason}")


@functools.cache
def _hints() -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs

    return {**typing.get_type_hints(ServerArgs), "replicas": int, "memory": Union[int, float]}


def _closest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"; is it {' or '.join(close)}?"
    return f"; known: {', '.join(names) or 'none'}" if len(names) <= 20 else ""
