"""``python -m sglang_distguard``: demo, status, version."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional


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
    status = commands.add_parser(
        "status", help="whether this environment is supported, and the settings in force"
    )
    status.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("version", help="versions of distguard, sglang and torch")
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        from sglang_distguard import demo as program

        return (
            program.unguarded(arguments.cache)
            if arguments.unguarded
            else program.run(arguments.cache)
        )
    if arguments.command == "status":
        return _status(as_json=arguments.json)
    return _version()


def _status(*, as_json: bool) -> int:
    """Whether ``install()`` would work here; exit status 1 when it would not."""
    from sglang_distguard import adapters, settings
    from sglang_distguard.adapters.generations import installed_version
    from sglang_distguard.errors import NotSupported

    try:
        plans = adapters.choose()
        supported, reason = True, f"{len(plans)} modules would be patched"
    except NotSupported as error:
        supported, reason = False, str(error)
    try:
        reuse = settings.reuse_from_environment()
        chosen = settings.choose(again=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = {
        "sglang": installed_version(),
        "supported": supported,
        "detail": reason,
        settings.REUSE_VARIABLE: reuse,
        settings.TIMEOUT_VARIABLE: chosen.timeout,
        settings.SLOW_VARIABLE: chosen.slow_after,
        settings.AGREEMENT_VARIABLE: chosen.agreement_timeout,
        "installed by SGLang's own processes": bool(reuse),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:36} {value}")
    return 0 if supported else 1


def _version() -> int:
    from importlib import metadata

    for name in ("sglang-distguard", "sglang", "torch"):
        try:
            print(f"{name:18} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name:18} (not installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
