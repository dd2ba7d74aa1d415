"""Runs every case of the audit on one GPU, many runs at a time, and cases of kernels compiled there.

``python verify/gpu_audit.py CACHE [CASE ...]`` runs what ``python -m sglang_distguard audit`` runs
on a GPU. It differs in three things: a run that fails leaves the others, many run at a time, and
models like Llama use torch's own operations as in ``gpu_breadth.py``, because the kernels of their
norms do not compute in float32. The last cases use SGLang's and flashinfer's kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import gpu_breadth_kernels
from gpu_breadth_common import leave_out_dual_gemm, use_torchs_own_operations
from sglang_distguard.audit import findings, processes, report, runs
from sglang_distguard.audit.cases import MULTIMODAL, Case, everything
from sglang_distguard.testing import children

#: Seconds for one run, which may wait until kernels are compiled.
LIMIT = 400.0
#: So much of the card for two runners, while other runs have theirs.
FRACTION = {"mem_fraction_static": 0.45}
_IMPORT = "import"
_PREPARE: Mapping[str, Callable[[], None]] = {
    "torch": use_torchs_own_operations,
    "kernels": leave_out_dual_gemm,
}
_WIDTH = 400


def cases(cache: Path) -> Iterator[tuple[Case, str]]:
    """Yield each case, and by what its models compute: a key of ``_PREPARE``."""
    from sglang_distguard.testing.catalog import create

    for case in everything(lambda name: create(name, cache / "catalog")):
        # The default needs flash_ops of sgl_kernel (0.5.23).
        seeing = {"mm_attention_backend": "triton_attn"} if case.name in MULTIMODAL else {}
        yield replace(case, settings={**FRACTION, **seeing, **case.settings}), "torch"
    for name, folder, settings in gpu_breadth_kernels.audited(cache):
        yield Case(name, str(folder), {**FRACTION, **settings}, graphs=True), "kernels"


def run(case: Case, how: str, prepare: str, result: Path) -> None:
    """Make one run in this process; write what was observed."""
    children.print_to(result.with_suffix(".log"))
    processes._end_after(LIMIT)
    if how == _IMPORT:
        processes._write(result, runs.importing())
    else:
        runs.imported()
        _PREPARE[prepare]()
        processes._write(result, processes.HOW[how](case))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a closed runner may leave threads that no code waits for


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((it.strip()[:_WIDTH] for it in reversed(lines) if it.strip()), "nothing printed")


def whole(cache: Path, names: list[str], at_once: int, folder: Path, output: Path | None) -> int:
    """Make all runs; print findings and failures; return the exit code."""
    begun = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):  # an earlier run must not be taken for one of these
        old.unlink()
    chosen = [(it, by) for it, by in cases(cache) if not names or it.name in names]
    wanted = [(chosen[0][0], _IMPORT, "torch")]
    wanted += [(case, how, by) for case, by in chosen for how in case.runs]

    def one(case: Case, how: str, by: str) -> bool:
        name = how if how == _IMPORT else f"{case.name} {how}"
        result = folder / name.replace(" ", "_").replace(",", "")
        told = [json.dumps(asdict(case)), how, by, str(result)]
        code = subprocess.run([sys.executable, __file__, str(cache), "--run", *told]).returncode
        is_well = code == 0 and Path(f"{result}.json").exists()
        said = "ran" if is_well else f"FAILED ({code}): {_last_line(result.with_suffix('.log'))}"
        print(f"{name}: {said} [{time.perf_counter() - begun:.0f} s]", flush=True)
        return is_well

    with ThreadPoolExecutor(at_once) as pool:
        well = [it.result() for it in [pool.submit(one, *it) for it in wanted]]
    seen = [processes._read(it) for it in sorted(folder.glob("*.json"))]
    found = findings.find(seen, lambda _module: None)
    print(report.text(found))
    if output is not None:
        output.write_text(json.dumps([it.as_json() for it in found], indent=1))
    uncovered = report.uncovered(found)
    told = f"{sum(well)} of {len(well)} runs, {len(found)} process-globals"
    print(f"{told}, {len(uncovered)} UNCOVERED [{time.perf_counter() - begun:.0f} s]", flush=True)
    return int(bool(uncovered) or not all(well))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--at-once", type=int, default=len(os.sched_getaffinity(0)) - 2)
    parser.add_argument(
        "--keep", type=Path, help="folder of all runs", default=Path(".cache/audit-runs")
    )
    parser.add_argument("--json", type=Path, help="file for the findings")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("skipped: there is no GPU here; `python -m sglang_distguard audit` is for CPUs, too")
        return 0
    if options.run:
        case, how, by, result = options.run
        run(Case(**json.loads(case)), how, by, Path(result))
    return whole(options.cache, options.cases, options.at_once, options.keep, options.json)


if __name__ == "__main__":
    sys.exit(main())
