"""The audit's reading of SGLang's text: the process-globals that its functions write."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit_texts import ELSEWHERE, TEXT
from sglang_distguard.audit import sources


def test_writes_are_found_in_the_text_and_local_names_are_not_taken_for_globals() -> None:
    found = {
        (it.module, it.name, it.function, it.rebinds)
        for it in sources.read("sglang.made_up", TEXT).writes
    }
    here, there = "sglang.made_up", "sglang.other"
    assert found == {
        (here, "state", "write", True),
        (here, "cache", "write", False),
        (here, "names", "write", False),
        (there, "table", "write", False),
        (there, "Shared.x", "write", True),
        (here, "Kept.made", "Kept.count", True),
        (here, "Kept.seen", "Kept.count", False),
        (here, "Kept.seen", "Kept.clear", True),
    }
    assert sources.read("sglang.made_up", TEXT).declared == {"state"}


def test_what_an_earlier_process_found_is_used_for_the_same_module_text_and_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_cache_folder: Path
) -> None:
    def found(module: str = "sglang.made_up") -> sources.Source:
        return sources.source_of.__wrapped__(module, str(file))

    def is_read(module: str = "sglang.made_up") -> bool:
        before = len(list(code_cache_folder.iterdir()))
        assert found(module) == sources.read(module, file.read_text())
        return len(list(code_cache_folder.iterdir())) > before

    file = tmp_path / "made_up.py"
    file.write_text(TEXT)
    code_cache_folder.mkdir(mode=0o700)
    assert is_read()
    assert not is_read()
    with monkeypatch.context() as patched:
        patched.setattr(sources, "read", None)
        assert found().declared == {"state"}
    assert is_read("sglang.made_up_too")
    file.write_text(TEXT.replace("global state", "global state, other"))
    assert is_read()
    monkeypatch.setattr(sources, "_reader", lambda: "another version of it")
    assert is_read()


WAYS = """
import os
import sys
import msgspec
from msgspec.structs import force_setattr
from sglang.other import settings
from sglang.srt.environ import envs

CACHE = {}
config = object()

@dataclass
class Record:
    fields: dict = field(default_factory=dict)

    def write(self, k, v):
        self.fields[k] = v

class Kept:
    seen = {}
    own = {}

    def __init__(self):
        self.own = {}
        self.mine = {}

    def write(self, k, v):
        %s

    @classmethod
    def make(klass, k, v):
        %s

def write(k, v):
    %s
"""


@pytest.mark.parametrize(
    ("where", "line", "name"),
    [
        ("function", "CACHE[k][1] = v", "CACHE"),
        ("function", "CACHE[k].x = v", "CACHE"),
        ("function", "CACHE[k].append(v)", "CACHE"),
        ("function", "CACHE.setdefault(k, []).append(v)", "CACHE"),
        ("function", "CACHE.get(k).x = v", "CACHE"),
        ("function", "del CACHE[k]", "CACHE"),
        ("function", "CACHE[k] += v", "CACHE"),
        ("function", "config.x = v", "config"),
        ("function", "config.items[k] = v", "config"),
        ("function", "setattr(config, 'x', v)", "config"),
        ("function", "write.calls = v", "write"),
        ("function", "globals()['CACHE'] = v", "CACHE"),
        ("function", "globals()['CACHE'][k] = v", "CACHE"),
        ("function", "globals()['CACHE'].append(v)", "CACHE"),
        ("function", "globals()['config'].x = v", "config"),
        ("function", "object.__setattr__(config, 'x', v)", "config"),
        ("function", "force_setattr(config, 'x', v)", "config"),
        ("function", "msgspec.structs.force_setattr(config, 'x', v)", "config"),
        ("function", "msgspec.structs.force_setattr(Kept, 'seen', v)", "Kept.seen"),
        ("function", "Kept.seen[k] = v", "Kept.seen"),
        ("method", "self.seen[k] = v", "Kept.seen"),
        ("method", "self.seen.pop(k)", "Kept.seen"),
        ("method", "type(self).seen = v", "Kept.seen"),
        ("method", "self.__class__.seen = v", "Kept.seen"),
        ("function", "envs.MADE_UP.set(v)", "envs.MADE_UP"),
        ("function", "with envs.MADE_UP.override(v): pass", "envs.MADE_UP"),
        ("function", "os.environ.pop('MADE_UP', None)", "environ['MADE_UP']"),
        ("function", "os.environ.setdefault('MADE_UP', v)", "environ['MADE_UP']"),
        ("function", "del os.environ['MADE_UP']", "environ['MADE_UP']"),
        ("function", "os.environ[k.name] = v", "environ[k.name]"),
        ("function", "setattr(config, k, v)", "config"),
        ("function", "setattr(Kept, k, v)", "Kept.[k]"),
        ("function", "setattr(os, k, v)", "[k]"),
        ("function", "globals()[k] = v", "[k]"),
        ("function", "globals().update(k)", "[update]"),
        ("function", "vars(config)[k] = v", "config"),
        ("function", "vars(os)['made_up'] = v", "made_up"),
        ("function", "Kept.__dict__[k] = v", "Kept.[k]"),
        ("function", "os.__dict__.update(k)", "[update]"),
        ("function", "sys.modules[__name__].made_up = v", "made_up"),
        ("function", "setattr(sys.modules[__name__], k, v)", "[k]"),
        ("function", "it = CACHE; it[k] = v", "CACHE"),
        ("function", "it = CACHE[k]; it.x = v", "CACHE"),
        ("function", "it = CACHE.get(k); it.append(v)", "CACHE"),
        ("function", "it = other = 1; it = CACHE; same = it; same.append(v)", "CACHE"),
        ("function", "if (it := CACHE.get(k)): it.append(v)", "CACHE"),
        ("function", "for it in CACHE: it.x = v", "CACHE"),
        ("function", "for k, it in CACHE.items(): it.append(v)", "CACHE"),
        ("function", "it = Kept.seen; it[k] = v", "Kept.seen"),
        ("function", "it = config.items; it[k] = v", "config"),
        ("function", "it = CACHE; it = {}", None),
        ("function", "it = v; it[k] = 1", None),
        ("method", "it = self.seen; it[k] = v", "Kept.seen"),
        ("method", "it = self.mine; it[k] = v", None),
        ("class method", "klass.seen = v", "Kept.seen"),
        ("class method", "klass.seen[k] = v", "Kept.seen"),
        ("class method", "setattr(klass, 'seen', v)", "Kept.seen"),
        ("class method", "list(map(lambda it: klass.seen.append(it), k))", "Kept.seen"),
        ("class method", "k.seen = v", None),
        ("class method", "list(map(lambda klass: klass.seen.append(1), k))", None),
        ("method", "object.__setattr__(self, 'seen', v)", None),
        ("method", "self.own[k] = v", None),
        ("method", "self.mine[k] = v", None),
        ("method", "self.seen = v", None),
        ("function", "k.seen = v", None),
        ("function", "CACHE.get(k)", None),
        ("function", "CACHE = {}", None),
    ],
)
def test_a_write_is_found_however_it_is_written(where: str, line: str, name: str | None) -> None:
    lines = [line if it == where else "pass" for it in ("method", "class method", "function")]
    found = {it.name for it in sources.read("sglang.made_up", WAYS % tuple(lines)).writes}
    assert found == ({name} if name else set())


def test_writes_to_objects_outside_sglang_are_found_in_its_text() -> None:
    found = {(it.module, it.name) for it in sources.read("sglang.made_up", ELSEWHERE).writes}
    assert found == {
        ("torch.nn", "Module.extra_repr"),
        ("torch.nn", "made_up"),
        ("torch._dynamo.config", "cache_size_limit"),
        ("torch.backends.cuda.matmul", "allow_tf32"),
        ("os", "environ['MADE_UP']"),
        ("os", "environ[name]"),
    }
