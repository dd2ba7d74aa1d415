"""``python -m sglang_distguard``: serve, demo, audit, status, version."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

#: Modules that ``serve``, ``demo`` and ``audit`` need, and on which this package does not depend.
_BROUGHT_BY_SGLANG = frozenset(
    {"sglang", "torch", "transformers", "safetensors", "tqdm", "fastapi", "uvicorn", "pydantic"}
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_distguard",
        description="Many SGLang ModelRunners in one process: built and run concurrently.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="8 runners of 5 architectures from 8 threads, then the same without the guard"
    )
    demo.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache"),
        help="folder for the small models and reference results (default: %(default)s)",
    )
    demo.add_argument("--unguarded", action="store_true", help=argparse.SUPPRESS)
    _add_serve(commands)
    _add_audit(commands)
    status = commands.add_parser(
        "status", help="show whether this environment is supported, and the settings in force"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("version", help="show the versions of distguard, sglang and torch")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in _BROUGHT_BY_SGLANG:  # a part of a package that is there
            raise
        from sglang_distguard.hooks.releases import INSTALL

        print(
            f"error: {arguments.command} needs {error.name}, which is not installed here. sglang "
            f"brings it: {INSTALL}",
            file=sys.stderr,
        )
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "demo":
        from sglang_distguard import demo as program

        return (
            program.unguarded(arguments.cache)
            if arguments.unguarded
            else program.run(arguments.cache)
        )
    if arguments.command == "serve":
        return _serve(arguments)
    if arguments.command == "audit":
        from sglang_distguard.audit import program

        return program.main(
            model=arguments.model,
            architectures=arguments.arch or [],
            settings=arguments.set or [],
            cache=arguments.cache,
            json_file=arguments.json,
            ledger_file=arguments.ledger,
            update=arguments.update,
        )
    if arguments.command == "status":
        return _status(as_json=arguments.json)
    return _version()


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve several models from this process, over OpenAI's routes (docs/serving.md)",
        description="Loads models into one process and serves them over HTTP with SGLang's own "
        "OpenAI routes. A request names its model. SIGTERM and SIGINT end it when pending requests "
        "have been answered.",
        epilog="examples:\n"
        "  python -m sglang_distguard serve --tiny\n"
        "  python -m sglang_distguard serve --model chat=PATH --model embed=PATH "
        "--set embed.is_embedding=true\n"
        "  python -m sglang_distguard serve --model chat=PATH --set mem_fraction_static=0.4 "
        "--api-key KEY --port 8000\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a checkpoint, and the name under which clients ask for it; may be repeated",
    )
    serve.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[NAME.]FIELD=VALUE",
        help="a field of SGLang's ServerArgs, as JSON or text, for one model or for all; may be "
        "repeated",
    )
    serve.add_argument(
        "--tiny",
        action="store_true",
        help="also serve two small models with random weights, chat and embed, which are made here "
        "without a network",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    serve.add_argument(
        "--port", type=int, default=30000, help="TCP port; 0: a free one (default: %(default)s)"
    )
    serve.add_argument("--api-key", metavar="KEY", help="clients must send this bearer token")
    serve.add_argument(
        "--admin-key",
        metavar="KEY",
        help="bearer token of the routes that load, replace and unload models; without it they are "
        "off",
    )
    serve.add_argument(
        "--drain",
        type=int,
        default=30,
        metavar="SECONDS",
        help="how long pending requests may take after SIGTERM (default: %(default)s)",
    )
    serve.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long one model may take to load (default: %(default)s)",
    )
    serve.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache"),
        help="folder for the small models (default: %(default)s)",
    )


def _serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal; exit status 1 when a model cannot be loaded, 2 for a wrong option."""
    import torch

    from sglang_distguard.serving import arguments as given
    from sglang_distguard.testing import prepare_environment, recipe

    if not (arguments.model or arguments.tiny or arguments.admin_key):
        print(
            "error: there is nothing to serve: give --model NAME=PATH, --tiny, or an --admin-key to "
            "load models later",
            file=sys.stderr,
        )
        return 2
    small: dict[str, Any] = {}
    if not torch.cuda.is_available():
        prepare_environment()  # SGLang's CPU engine, and its own stub of sgl_kernel
    try:
        models = given.models(arguments.model)
        if arguments.tiny:
            from sglang_distguard.testing.talking import create_talking_models

            made = create_talking_models(arguments.cache / "models")
            models = {**{name: str(folder) for name, folder in made.items()}, **models}
            small = {**recipe.settings(), "skip_tokenizer_init": False}
        settings = given.settings(arguments.set, models)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {name: {**small, **fields} for name, fields in settings.items()}
    from sglang_distguard.serving import command

    return command.run(
        command.Options(
            models=models,
            settings=settings,
            host=arguments.host,
            port=arguments.port,
            api_key=arguments.api_key,
            admin_key=arguments.admin_key,
            drain=arguments.drain,
            start_timeout=arguments.start_timeout,
        )
    )


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="list the process-globals that change while runners are built and run, with treatment",
        description="Builds and runs runners alone and together, in processes of their own, and "
        "reports every process-global that changed, or that could change according to SGLang's "
        "text. Exit status: 1 if one is UNCOVERED or differs from the ledger, 2 if a run failed.",
    )
    which = audit.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="folder of a checkpoint")
    which.add_argument(
        "--arch",
        action="append",
        help="one of the small models that this package makes; may be repeated (default: all, and "
        "some of them with more features switched on)",
    )
    audit.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="a field of SGLang's ServerArgs, as JSON or text, for every runner; may be repeated",
    )
    audit.add_argument("--json", type=Path, metavar="FILE", help="write every finding to this file")
    audit.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="compare with the known process-globals of this SGLang version",
    )
    audit.add_argument(
        "--update", action="store_true", help="write the ledger instead of comparing with it"
    )
    audit.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache"),
        help="folder for the small models (default: %(default)s)",
    )


def _status(*, as_json: bool) -> int:
    """Whether ``install()`` would work here; exit status 1 when it would not."""
    from sglang_distguard_plugin import VARIABLE

    from sglang_distguard.config import settings
    from sglang_distguard.errors import NotSupported
    from sglang_distguard.hooks import releases, versions

    try:
        plan = versions.choose()
        supported, reason = True, f"{len(plan.modules)} modules would be patched"
    except NotSupported as error:
        plan, supported, reason = None, False, str(error)
    try:
        reuse = settings.reuse_from_environment()
        chosen = settings.choose(again=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = {
        "sglang": releases.installed_version(),
        "supported": supported,
        "verified": releases.is_verified(releases.installed_version()),
        "detail": reason,
        "dropped": [f"{it.module}.{it.name}" for it in plan.absent] if plan else [],
        "warnings": plan.warnings() if plan else [],
        VARIABLE: reuse,
        settings.TIMEOUT_VARIABLE: chosen.timeout,
        settings.SLOW_VARIABLE: chosen.slow_after,
        settings.AGREEMENT_VARIABLE: chosen.agreement_timeout,
        "installed by SGLang's own processes": bool(reuse),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            for line in (value or ["none"]) if isinstance(value, list) else [value]:
                print(f"{name:36} {line}")
    return 0 if supported else 1


def _version() -> int:
    from importlib import metadata

    from sglang_distguard import __version__

    print(f"{'sglang-distguard':18} {__version__}")
    for name in ("sglang", "torch"):
        try:
            print(f"{name:18} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name:18} (not installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
