"""Releases and resumes the memory of two runners on one GPU in turn, as SGLang's Scheduler does.

``python verify/gpu_memory.py MODELS`` makes small checkpoints in the folder MODELS. While the
memory of one runner is released, the other must compute the same bits as before. When the memory is
resumed and the weights are loaded again, the first must do so too. The same is then run with
SGLang's own tags, where releasing one runner's memory also takes the other's. That run must fail.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def work(models: Path, *, own_tags: bool) -> None:
    import sglang_distguard
    import torch
    from sglang_distguard.hooks import memory_saver
    from sglang_distguard.testing import bit_equal, create_model, server_args, steps
    from sglang_distguard.testing.updates import memory_of, weights_of

    if not own_tags:
        memory_saver.tag_of_scope = lambda tag: tag
    sglang_distguard.install()
    folders = [create_model("gpt2", models, seed=seed) for seed in (0, 1)]
    settings = {"mem_fraction_static": 0.1, "enable_memory_saver": True}
    runners = [
        sglang_distguard.build_runner(server_args(it, dtype="bfloat16", **settings))
        for it in folders
    ]

    def logits(runner: Any) -> Any:
        return steps.generate(runner, steps=3).logits

    before = [logits(it) for it in runners]
    asked = SimpleNamespace(tags=["kv_cache", "weights"])
    for mine, other in ((0, 1), (1, 0)):
        memory = memory_of(runners[mine], saves=True)
        free = torch.cuda.mem_get_info()[0]
        memory.release_memory_occupation(asked)
        released = (torch.cuda.mem_get_info()[0] - free) / 2**20
        meanwhile = bit_equal(logits(runners[other]), before[other])
        memory.resume_memory_occupation(asked)
        updater = runners[mine].weight_updater
        assert updater.update_weights_from_tensor(weights_of(folders[mine]))[0]
        afterwards = [bit_equal(logits(it), was) for it, was in zip(runners, before, strict=True)]
        print(
            f"runner {mine}: {released:.0f} MiB released; the same bits of the other meanwhile: "
            f"{meanwhile}; of both afterwards: {afterwards}",
            flush=True,
        )
        assert released > 0
        assert meanwhile
        assert all(afterwards)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--tags", choices=["own", "shared"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tags:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        work(options.models, own_tags=options.tags == "own")
        return 0
    import torch

    if not torch.cuda.is_available():
        parser.exit(message="skipped: there is no GPU here\n")
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    from torch_memory_saver import configure_subprocess

    ended = {}
    for tags in ("own", "shared"):
        command = [sys.executable, __file__, str(options.models), "--tags", tags]
        with configure_subprocess():
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        ended[tags] = done.returncode
        said = done.stdout.strip() or "nothing printed"
        print(f"{tags} tags: exit code {done.returncode}\n{said}", flush=True)
        if done.returncode:
            print(done.stderr.strip()[-500:])
    return 0 if ended["own"] == 0 and ended["shared"] != 0 else 1


if __name__ == "__main__":
    sys.exit(main())
