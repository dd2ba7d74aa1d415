"""Options of `serve`, and who may ask an application: what is refused, and with which words."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest
from sglang_distguard import DistGuardError, Pool
from sglang_distguard.__main__ import main
from sglang_distguard.serving import application, arguments


def test_models_are_names_and_paths() -> None:
    assert arguments.models(["chat=a=b", "qwen2.5=c"]) == {"chat": "a=b", "qwen2.5": "c"}
    for given, said in (
        (["chat"], "takes NAME=PATH, not 'chat'"),
        (["chat="], "takes NAME=PATH"),
        (["=path"], "name must be 1 to 200 printable characters"),
        (["chat=a", "chat=b"], "'chat' twice: a and b"),
    ):
        with pytest.raises(ValueError, match=said):
            arguments.models(given)


def test_settings_are_typed_by_sglangs_fields(sglang: None) -> None:
    found = arguments.settings(
        [
            "qwen2.5.dtype=bfloat16",
            "dtype=float32",
            "max_total_tokens=1024",
            "mem_fraction_static=0.5",
            "is_embedding=true",
            "revision=7",
            "qwen2.5.numa_node=[0, 1]",
        ],
        ["chat", "qwen2.5"],
    )
    shared = {
        "dtype": "float32",
        "max_total_tokens": 1024,
        "mem_fraction_static": 0.5,
        "is_embedding": True,
        "revision": "7",
    }
    own = {"dtype": "bfloat16", "numa_node": [0, 1]}
    assert found == {"": shared, "chat": shared, "qwen2.5": {**shared, **own}}
    fields = arguments.fields_of("chat", "path", {"enable_metrics": "false"})
    assert fields == {
        "served_model_name": "chat",
        "enable_metrics": False,
        "model_path": "path",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dtype", r"takes FIELD=VALUE or NAME\.FIELD=VALUE, not 'dtype'"),
        ("chatt.dtype=auto", r"no model is named 'chatt'; is it chat\?"),
        ("dtyp=auto", r"has no field 'dtyp'; is it dtype\?"),
        ("max_total_tokens=many", r"max_total_tokens .* cannot be 'many' \(str\): .*integer"),
        ("chat.port=1", "port is not set by model; use --port"),
        ("model_path=x", "model_path is not set by model; use --model NAME=PATH"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_right(sglang: None, given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        arguments.settings([given], ["chat"])


def test_the_command_refuses_before_it_loads(
    sglang: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for given, said in (
            ([], "error: there is nothing to serve: give --model"),
            (["--model", "chat"], "error: --model takes NAME=PATH"),
            (["--model", "chat=x", "--drain", "-1"], "error: --drain must be 0 or more"),
            (["--model", "chat=x", "--port", "99999"], "error: cannot bind to 127.0.0.1:99999"),
            (["--model", "chat=x", "--set", "chat.dtyp=1"], "error: SGLang's ServerArgs has no"),
            (["--model", "chat=x", "--port", port], f"error: cannot bind to 127.0.0.1:{port}"),
        ):
            assert main(["serve", *given]) == 2
            assert said in capsys.readouterr().err


def asked(app: Any, method: str, path: str, key: str = "") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


def test_routes_of_the_administrator_are_off_without_a_key(guard: None) -> None:
    app = application(Pool())
    for key in ("", "anything"):
        for method, path in (("GET", "/admin/models"), ("DELETE", "/admin/models/x")):
            refused = asked(app, method, path, key)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "administration_off",
            )
    assert asked(app, "GET", "/v1/models").json()["data"] == []
    assert asked(app, "GET", "/health").json() == {"status": "serving", "models": {}}
    assert asked(app, "GET", "/metrics").text == ""
    assert asked(app, "GET", "/openapi.json").status_code == 200


def test_a_mounted_application_asks_for_its_keys_wherever_it_is(guard: None) -> None:
    from fastapi import FastAPI

    app = FastAPI()
    # SGLang's middleware would leave these open: their paths begin with those of health and metrics.
    for place in ("/models", "/healthy", "/metrics"):
        app.mount(place, application(Pool(), api_key="a-key", admin_key="another"))
        for path in ("/v1/models", "/admin/models", "/openapi.json", "/nothing"):
            assert asked(app, "GET", place + path).status_code == 401, place + path
        assert asked(app, "GET", f"{place}/v1/models", "a-key").status_code == 200
        assert asked(app, "GET", f"{place}/admin/models", "a-key").status_code == 401
        assert asked(app, "GET", f"{place}/admin/models", "another").status_code == 200
        assert asked(app, "GET", f"{place}/openapi.json", "a-key").status_code == 404
        assert asked(app, "GET", f"{place}/health").status_code == 200


def test_keys_that_no_client_can_send_are_refused(guard: None) -> None:
    wrong: list[Any] = [
        ("", ValueError),
        ("a key", ValueError),
        ("schlüssel", ValueError),
        (7, TypeError),
    ]
    for key, error in wrong:
        for name in ("api_key", "admin_key"):
            with pytest.raises(error, match=f"{name} must be"):
                application(Pool(), **{name: key})


def test_an_application_needs_the_guard(sglang: None) -> None:
    with pytest.raises(DistGuardError, match=r"call sglang_distguard.install\(\) first"):
        application(Pool())
