"""install() during the import of a module that it patches."""

from __future__ import annotations

import pytest
from interpreters import Has, run_well

#: The import of a module calls ``meanwhile`` in its finder, and before the module's first line.
_HALF_IMPORTED = """
    import sys, threading
    from importlib.machinery import PathFinder, SourceFileLoader
    import sglang.srt.distributed
    import sglang_distguard as dg
    from sglang_distguard.context.accessors import accessor
    from sglang_distguard.patching import imports

    NAME = "sglang.srt.distributed.bootstrap"
    sys.modules.pop(NAME, None)
    inside, go_on = threading.Event(), threading.Event()

    class Loader(SourceFileLoader):
        def exec_module(self, module):
            meanwhile("executing")
            super().exec_module(module)

    class Finder:
        @staticmethod
        def find_spec(name, path, target=None):
            if name == NAME:
                meanwhile("finding")
            spec = PathFinder.find_spec(name, path, target) if name == NAME else None
            if spec is not None:
                spec.loader = Loader(name, spec.origin)
            return spec

    sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("where", ["finding", "executing", "failing"])
def test_install_waits_for_an_import_that_another_thread_had_begun_before(where: str) -> None:
    run_well(
        f"WHERE = {where!r}\n",
        _HALF_IMPORTED,
        """
        def meanwhile(where):
            if where == {"failing": "executing"}.get(WHERE, WHERE) and not go_on.is_set():
                inside.set()
                go_on.wait()
                if WHERE == "failing":
                    raise ImportError("half way")

        def import_it():
            try:
                __import__(NAME)
            except ImportError as error:
                assert str(error) == "half way"

        importer = threading.Thread(target=import_it)
        importer.start()
        inside.wait()
        waits, let_finish = threading.Event(), imports.let_finish

        def noted(name, timeout):
            if name == NAME:
                waits.set()
            return let_finish(name, timeout)

        def install():
            try:
                dg.install()
            finally:
                waits.set()  # it did not wait

        imports.let_finish = noted
        installer = threading.Thread(target=install)
        installer.start()
        waits.wait()
        go_on.set()
        importer.join()
        installer.join()
        assert dg.is_installed()
        assert (NAME in sys.modules) == (WHERE != "failing")
        __import__(NAME)
        assert accessor(NAME, "_PARALLEL_INITIALISED").value is False
        """,
        has=Has.SGLANG,
    )


def test_install_is_refused_inside_of_the_import_of_a_module_to_be_patched() -> None:
    run_well(
        _HALF_IMPORTED,
        """
        refused = []

        def try_to_install():
            try:
                dg.install()
            except dg.StateInUse as error:
                refused.append(error)

        def meanwhile(where):
            try_to_install()  # as code of the module, of a loader, or of a finder would

        __import__(NAME)
        assert len(refused) == 2, refused
        assert NAME in str(refused[0]) and refused[0].details["holders"] == [NAME]
        assert not dg.is_installed()
        dg.install()
        assert accessor(NAME, "_PARALLEL_INITIALISED").value is False
        """,
        has=Has.SGLANG,
    )
