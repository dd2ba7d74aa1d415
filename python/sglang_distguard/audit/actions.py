"""Actions of an audited runner besides prefill and decode: weight changes and sampling."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_Activate = Callable[[Any], AbstractContextManager[Any]]


def _ignore(phase: str) -> None:
    pass


def _of_weights(change: Callable[[Any], tuple[bool, str]]) -> Callable[..., None]:
    def act(
        runner: Any, *, activate: _Activate = nullcontext, after: Callable[[str], None] = _ignore
    ) -> None:
        with activate(runner):
            succeeded, said = change(runner)
        if not succeeded:
            raise RuntimeError(f"{change.__name__}: {said}")
        after("weights")

    return act


def _from_disk(runner: Any) -> tuple[bool, str]:
    path = runner.model_config.model_path
    return runner.weight_updater.update_weights_from_disk(path, "auto")


def _from_tensor(runner: Any) -> tuple[bool, str]:
    name = "model.norm.weight"
    weight = dict(runner.model.named_parameters())[name].detach().clone()
    return runner.weight_updater.update_weights_from_tensor([(name, weight)])


def _group_for_updates(runner: Any) -> tuple[bool, str]:
    """Make and destroy the group over which a trainer sends weights, with this member only."""
    from sglang_distguard.testing import free_port

    updater, name = runner.weight_updater, f"audit {id(runner)}"
    made = updater.init_weights_update_group("127.0.0.1", free_port(), 0, 1, name, backend="gloo")
    return updater.destroy_weights_update_group(name) if made[0] else made


def _save(runner: Any) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        runner.weight_exporter.save_sharded_model(folder)
    return True, ""


def _sample(
    runner: Any, *, activate: _Activate = nullcontext, after: Callable[[str], None] = _ignore
) -> None:
    """Use everything that a request can ask of the sampler, except what needs a tokenizer."""
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
    from sglang.srt.sampling.sampling_params import SamplingParams

    from sglang_distguard.testing import steps

    wishes = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias={"3": 1.0},
        max_new_tokens=64,
        custom_params={"token_ids": [5]},
    )
    request = {
        "vocab_size": runner.model_config.vocab_size,
        "sampling_params": wishes,
        "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
    }
    steps.generate(runner, request=request, activate=activate, after=after)


#: Name -> ``act(runner, activate=..., after=...)``, which calls ``after`` with each finished phase.
ACTIONS: Mapping[str, Callable[..., None]] = {
    "update weights from disk": _of_weights(_from_disk),
    "update weights from tensors": _of_weights(_from_tensor),
    "make a group for updates": _of_weights(_group_for_updates),
    "save weights": _of_weights(_save),
    "sample": _sample,
}
