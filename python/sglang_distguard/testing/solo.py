"""Builds and runs the same runner alone, in a process without the guard, for the expected bits.

``python -m sglang_distguard.testing.solo`` reads a list of jobs (JSON) from standard input, runs
them and writes one file each. It prints one line to standard output when a job is done.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

from sglang_distguard.testing.children import fork
from sglang_distguard.testing.steps import PROMPTS, Generation, build, generate

STEPS = 3
_TIMEOUT_PER_RUNNER = 1200  # seconds; it takes 20 on two idle cores, most for imports
_GUARD_VARIABLE = "SGLANG_ALLOW_REUSE_DISTRIBUTED"
_MODULE = "sglang_distguard.testing.solo"
_DONE = "sglang_distguard.testing.solo: done"


@dataclasses.dataclass(frozen=True)
class Job:
    """What one runner is asked for; the arguments of ``solo``."""

    model: str
    dtype: str
    prompts: Sequence[Sequence[int]]
    steps: int
    overrides: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{Path(self.model).name} {self.dtype}"


#: Has ``run_here`` called for each job.
MakeResults = Callable[[Mapping[Path, Job]], None]


def solo(
    model: str | Path,
    dtype: str,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    steps: int = STEPS,
    server_overrides: Optional[Mapping[str, Any]] = None,
    cache_dir: Path,
    run: Optional[MakeResults] = None,
) -> Generation:
    """What this runner generates when it is built and run alone in a fresh process.

    Args:
        model: directory of the checkpoint.
        dtype: "float32" or "bfloat16".
        prompts: token ids.
        steps: decode steps after the prefill.
        server_overrides: ``ServerArgs`` fields that override the recipe's (JSON values).
        cache_dir: folder of the results, which are named by everything that decides the bits.
        run: has ``run_here`` called in a process that has built nothing, for each job whose result
            is not kept. Default: a new process.

    Raises:
        RuntimeError: the runner failed alone, or took over 20 minutes; the text has its error output.
    """
    job = Job(str(model), dtype, prompts, steps, server_overrides or {})
    return _results([job], Path(cache_dir), run or _run_in_new_process)[0]


def solo_many(
    requests: Sequence[tuple[str | Path, str]],
    cache_dir: Path,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    steps: int = STEPS,
    server_overrides: Optional[Mapping[str, Any]] = None,
) -> list[Generation]:
    """Like ``solo`` for many runners, several times faster, because sglang is imported once.

    Each missing runner is built in its own child. The children are forked one after the other from
    a process that has imported sglang and built nothing. The bits are those of a fresh process.

    Args:
        requests: (checkpoint directory, dtype).
        cache_dir: as for ``solo``; both may share it.
        prompts: token ids.
        steps: decode steps after the prefill.
        server_overrides: ``ServerArgs`` fields that override the recipe's (JSON values).

    Raises:
        RuntimeError: as ``solo``, for the first runner that failed; those before it are kept.
    """
    jobs = [Job(str(m), dtype, prompts, steps, server_overrides or {}) for m, dtype in requests]
    return _results(jobs, Path(cache_dir), _run_in_new_process)


def _results(jobs: Sequence[Job], cache: Path, run: MakeResults) -> list[Generation]:
    cache.mkdir(parents=True, exist_ok=True)
    files = [cache / f"{_fingerprint(job)}.pt" for job in jobs]

    def missing() -> dict[Path, Job]:
        return {file: job for file, job in zip(files, jobs, strict=True) if not file.is_file()}

    if missing():
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the same results
            if remaining := missing():
                run(remaining)
    return [_load(file) for file in files]


def _fingerprint(job: Job) -> str:
    """Name of everything that decides the bits: model, settings, code, versions, processor."""
    import torch

    model = Path(job.model)
    here = Path(__file__).parent
    facts = {
        "model": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (model / "config.json", *sorted(model.glob("*.safetensors")))
        },
        "job": [job.dtype, [list(p) for p in job.prompts], job.steps, dict(job.overrides)],
        "recipe": [(here / name).read_text() for name in ("recipe.py", "steps.py")],
        "versions": [version("sglang"), torch.__version__, version("transformers")],
        "threads": [len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")],
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{model.name}-{job.dtype}-{digest[:16]}"


def _load(file: Path) -> Generation:
    import torch

    data = torch.load(file, weights_only=True)
    return Generation(tokens=data["tokens"], logits=data["logits"])


def _run_in_new_process(missing: Mapping[Path, Job]) -> None:
    """Run the jobs in one new process, and report progress on stderr."""
    environment = {name: value for name, value in os.environ.items() if name != _GUARD_VARIABLE}
    with tempfile.TemporaryFile("w+") as jobs, tempfile.TemporaryFile("w+") as errors:
        json.dump([[str(file), dataclasses.asdict(job)] for file, job in missing.items()], jobs)
        jobs.seek(0)
        with subprocess.Popen(
            # runpy warns because the package, imported first, imports this module.
            [sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", _MODULE],
            env=environment,
            stdin=jobs,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            try:
                _follow(process, list(missing.values()))
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(
                f"a runner failed alone (status {process.returncode}):\n{errors.read()[-4000:]}"
            )


def _follow(process: subprocess.Popen[str], jobs: Sequence[Job]) -> None:
    started = time.monotonic()

    def say(number: int, what: str) -> None:
        seconds = time.monotonic() - started
        text = f"  alone {number}/{len(jobs)}  {seconds:5.1f} s  {what}"
        print(text, file=sys.stderr, flush=True)

    say(0, "importing sglang")
    assert process.stdout is not None
    done = 0
    for line in process.stdout:
        if line.startswith(_DONE):
            say(done + 1, str(jobs[done]))
            done += 1


def main() -> None:
    """Run the jobs of standard input, one alone or several each in a forked child."""
    from sglang_distguard.testing.recipe import prepare_environment

    jobs = [(Path(file), Job(**fields)) for file, fields in json.load(sys.stdin)]
    signal.alarm(_TIMEOUT_PER_RUNNER)  # SIGALRM ends the process wherever it hangs
    prepare_environment()
    if len(jobs) > 1:
        import_sglang()
    for file, job in jobs:
        if len(jobs) == 1:
            run_here(file, job)
        else:
            signal.alarm(0)
            _run_forked(file, job)
        print(_DONE, flush=True)


def import_sglang() -> None:
    """Import what runners import, and build nothing: OpenMP must not start before a fork."""
    from sglang.srt.model_executor import model_runner  # noqa: F401
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    gc.collect()
    gc.freeze()  # the children collect garbage while they size their pools


def _run_forked(file: Path, job: Job) -> None:
    def work() -> None:
        signal.alarm(_TIMEOUT_PER_RUNNER)
        run_here(file, job)

    child = fork(work)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"{job}: exit code {os.waitstatus_to_exitcode(status)} (-14: timed out)")


def run_here(file: Path, job: Job) -> None:
    """Build and run the runner of ``job`` in this process, and keep the result in ``file``.

    Raises:
        RuntimeError: the guard is installed.
    """
    import torch

    import sglang_distguard
    from sglang_distguard.testing.recipe import server_args

    if sglang_distguard.is_installed():
        raise RuntimeError("a reference must be made without the guard")
    args = server_args(job.model, dtype=job.dtype, **job.overrides)
    result = generate(build(args), job.prompts, job.steps)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save({"tokens": result.tokens, "logits": result.logits}, scratch)
    scratch.replace(file)


if __name__ == "__main__":
    main()
