"""Cache what is made from SGLang's text between processes, as Python caches .pyc files.

There is one file per value. Its name is a digest of everything that it was made from: what the
caller names, Python and this package's own code. A file is written whole or not at all. A file that
does not match, or is damaged, is made again. None is removed. A folder that other users may write
to is not used, because its content is run as code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import marshal
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

#: Environment variable with the path of the folder; "0" or empty: nothing is cached.
VARIABLE = "SGLANG_DISTGUARD_CACHE"
_DIGEST = 32  # bytes


@functools.cache
def _folder() -> Optional[Path]:
    """The folder of the cached files; None when nothing is cached."""
    named = os.environ.get(VARIABLE)
    if named is not None and named.strip() in ("", "0"):
        return None
    default = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = Path(named or os.path.join(default, "sglang_distguard")).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # not writable, or the user has no home folder
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if found.st_uid != os.getuid() or others_write else folder


@functools.cache
def _made_by() -> bytes:
    """Digest of what computes the values: this Python, and the text of this package's modules."""
    python = f"{sys.implementation.cache_tag} {sys.hexversion}"
    return (python + digest_of(Path(__file__).parent.glob("*.py"))).encode()


def digest_of(files: Iterable[Path]) -> str:
    """A digest of the texts of ``files``, for ``kept``: of code outside this package's modules."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept(made_from: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return the value of ``make()``, computed now or by an earlier process.

    Args:
        made_from: everything that the value depends on; unequal items must have unequal ``repr``.
        make: returns a value that ``marshal`` supports.
    """
    folder = _folder()
    if folder is None:
        return make()
    name = hashlib.sha256(_made_by() + repr(made_from).encode()).hexdigest()
    file = folder / f"{name}.marshal"
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
        content = file.read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return marshal.loads(content[_DIGEST:])
    value = make()
    with contextlib.suppress(OSError):
        _write(file, marshal.dumps(value))
    return value


def _write(file: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(content).digest() + content)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
