"""Sections of ``gpu_breadth.py`` whose subjects are engines: drafts, new weights, a pool."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_breadth_common import (
    NATIVE,
    ROUNDS,
    Asked,
    Counted,
    Section,
    arguments,
    at_once,
    checkpoint,
    has_card,
    install,
    made_of_llama,
    same,
    use_torchs_own_operations,
    wrong_of,
)

STEPS = 16
#: Tokens that a draft proposes for each verification.
DRAFTED = 3
_DRAFTS: Mapping[str, Any] = {
    "speculative_num_steps": DRAFTED - 1,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": DRAFTED,
}
#: Returns the ``ServerArgs`` of the engine with this seed.
Args = Callable[[Path, int], Any]


def answers(engine: Any, *, drafts: bool = False) -> list[Any]:
    """Tokens and log probabilities of each prompt, one request after another.

    ``drafts``: also how often drafts were verified; raise an error if they never were.
    """
    from sglang_distguard.testing.steps import PROMPTS

    how = {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True}
    made: list[Any] = []
    for prompt in PROMPTS:
        answer = engine.generate(input_ids=list(prompt), sampling_params=how, return_logprob=True)
        told = answer["meta_info"]
        chances = [it[0] for it in told["output_token_logprobs"]]
        made.append([list(answer["output_ids"]), chances])
        if drafts:
            if not told.get("spec_verify_ct"):
                raise RuntimeError("no draft was verified")
            made[-1].append(told["spec_verify_ct"])
    return made


def scheduler_with_torchs_own_operations(*args: Any, **kwargs: Any) -> None:
    """SGLang's process of a Scheduler, whose models use torch's own operations."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    use_torchs_own_operations()
    run_scheduler_process(*args, **kwargs)


def _alone(args: Args, drafts: bool, models: Path, seed: int, *, times: int = 1) -> Any:
    """Ask SGLang's own engine, in processes of its own; the answers of one time or of several."""
    from sglang.srt.entrypoints import engine as sgl

    if not has_card():
        # Its processes are forked from this one, which has SGLang's stub of sgl_kernel.
        multiprocessing.set_start_method("fork", force=True)
        setattr(multiprocessing, "set_start_method", lambda *_args, **_kwargs: None)

    class Engine(sgl.Engine):
        run_scheduler_process_func = staticmethod(scheduler_with_torchs_own_operations)

    engine: Any = Engine(server_args=args(models, seed))
    try:
        made = [answers(engine, drafts=drafts) for _ in range(times)]
        return made if times > 1 else made[0]
    finally:
        engine.shutdown()


def _guarded(
    args: Args, drafts: bool, models: Path, expected: Sequence[Any], *, in_order: bool = False
) -> Counted:
    """Open both engines at once, and ask both at once.

    ``in_order``: an answer depends on those before, and each is compared with its own; otherwise
    ``ROUNDS`` answers of each engine are compared with its one answer alone.
    """
    engines = opened(args, models, range(len(expected)))
    rounds = [those if in_order else [those] * ROUNDS for those in expected]

    def wrong(seed: int) -> int:
        return sum(not same(answers(engines[seed], drafts=drafts), it) for it in rounds[seed])

    found = at_once([partial(wrong, seed) for seed in range(len(engines))])
    for engine in engines:
        engine.close()
    alone = [answer for those in expected for answer in (those if in_order else [those])]
    verified = sum(it[2] for answer in alone for it in answer) if drafts else 0
    note = f"{verified} verifications for {_tokens(alone)} tokens alone" if drafts else ""
    return Counted(sum(found), sum(map(len, rounds)), note)


def _tokens(expected: Sequence[Any]) -> int:
    return sum(len(it[0]) for answer in expected for it in answer)


def opened(args: Args, models: Path, seeds: Sequence[int]) -> list[Any]:
    """Open the engines of this process at once, from a thread each."""
    import sglang_distguard

    install()
    use_torchs_own_operations()

    def opened(seed: int) -> Any:
        return sglang_distguard.Engine(name=f"engine {seed}", server_args=args(models, seed))

    return at_once([partial(opened, seed) for seed in seeds])


def _updated(args: Args, models: Path, expected: Sequence[Any]) -> Counted:
    """Give the first of two engines the weights of a third checkpoint while the other serves."""
    from sglang_distguard.testing.updates import weights_of

    one, other = opened(args, models, (0, 1))
    with Asked(partial(answers, other), expected[1]) as asked:
        wrong = wrong_of(partial(answers, one), expected[0], ROUNDS // 2)
        for answer in (
            one.begin_weight_update(),
            one.update_weights_from_tensor(weights_of(checkpoint(models, "gpt2", 2))),
            one.end_weight_update(),
        ):
            if not answer[0]:
                raise RuntimeError(f"SGLang refuses the new weights: {answer}")
        after = wrong_of(partial(answers, one), expected[2], ROUNDS // 2)
    one.close()
    other.close()
    note = f"{after} of {ROUNDS // 2} after the update, {asked.wrong} of {asked.total} of the other"
    return Counted(wrong + after + asked.wrong, 2 * (ROUNDS // 2) + asked.total, note)


def _replaced(args: Args, models: Path, expected: Sequence[Any]) -> Counted:
    """Load two engines of a pool at once, and replace the first while the other serves."""
    import sglang_distguard

    install()
    use_torchs_own_operations()
    names = ("one", "other")
    with sglang_distguard.Pool() as pool:

        def load(seed: int) -> None:
            pool.load(names[seed], server_args=args(models, seed))

        at_once([partial(load, seed) for seed in (0, 1)])
        with Asked(lambda: answers(pool["other"]), expected[1]) as asked:
            wrong = wrong_of(lambda: answers(pool["one"]), expected[0], ROUNDS // 2)
            pool.replace("one", server_args=args(models, 2))
            after = wrong_of(lambda: answers(pool["one"]), expected[2], ROUNDS // 2)
    note = f"{after} of {ROUNDS // 2} after replacing, {asked.wrong} of {asked.total} of the other"
    return Counted(wrong + after + asked.wrong, 2 * (ROUNDS // 2) + asked.total, note)


def _graphs() -> Mapping[str, Any]:
    from sglang_distguard.testing import graphs

    return {**graphs.CUDA_GRAPHS, "disable_prefill_cuda_graph": True} if has_card() else {}


def plain(models: Path, seed: int) -> Any:
    """GPT-2 with decode graphs."""
    return arguments(checkpoint(models, "gpt2", seed), **_graphs())


def _standalone(models: Path, seed: int, *, graphs: bool) -> Any:
    """OPT that drafts for itself (seed 0: all is accepted), or that another OPT drafts for."""
    draft = checkpoint(models, "opt", 10 * seed)
    return arguments(
        checkpoint(models, "opt", seed),
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=str(draft),
        **_DRAFTS,
        **(_graphs() if graphs else {}),
    )


def _ngram(models: Path, seed: int) -> Any:
    """OPT whose drafts are what followed the same tokens before."""
    return arguments(
        checkpoint(models, "opt", seed),
        speculative_algorithm="NGRAM",
        speculative_num_draft_tokens=4,
    )


def _eagle(models: Path, seed: int) -> Any:
    """Llama with an EAGLE head of its own."""
    return arguments(
        checkpoint(models, "llama", seed),
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=str(_head(models, seed)),
        **_DRAFTS,
    )


def _head(models: Path, seed: int) -> Path:
    """Return the folder of an EAGLE head of Llama with random weights."""
    return made_of_llama(models, "heads", seed, _write_head)


def _write_head(base: Path, weights: dict[str, Any], generator: Any, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    width = config["hidden_size"]
    # As in the published heads: one layer without its first norm, named without "model.".
    tensors = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name == "model.embed_tokens.weight"
        or (name.startswith("model.layers.0.") and "input_layernorm" not in name)
    }
    tensors["fc.weight"] = torch.randn(width, 2 * width, generator=generator) * 0.1
    tensors["fc.bias"] = torch.randn(width, generator=generator) * 0.1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config.update(architectures=["LlamaForCausalLMEagle"], num_hidden_layers=1)
    (target / "config.json").write_text(json.dumps(config))
    if (base / "generation_config.json").exists():
        shutil.copy(base / "generation_config.json", target)


def section(
    name: str,
    args: Args,
    make: Callable[[Path, int], object],
    *,
    drafts: bool = True,
    **others: Any,
) -> Section:
    """A section of two engines, which draft unless ``drafts`` is false."""
    alone = others.pop("alone", partial(_alone, args, drafts))
    guarded = others.pop("guarded", partial(_guarded, args, drafts))
    # SGLang's own engine has processes for its Scheduler and its detokenizer.
    others = {"needs_cuda": drafts, "processes": 3, "limit": 120.0, **others}
    return Section(name, make, alone, guarded, **others)


def sections() -> list[Section]:
    """All sections whose subjects are engines."""

    def opt(models: Path, seed: int) -> None:
        for it in (seed, 10 * seed):
            checkpoint(models, "opt", it)

    def gpt2(models: Path, seed: int) -> None:
        checkpoint(models, "gpt2", seed)

    several: dict[str, Any] = {"drafts": False, "seeds": 3}
    return [
        section("standalone", partial(_standalone, graphs=False), opt),
        section("standalone_graphs", partial(_standalone, graphs=True), opt),
        # Drafts are what followed earlier: with their number, bits of a batch change.
        section(
            "ngram",
            _ngram,
            opt,
            alone=partial(_alone, _ngram, True, times=ROUNDS),
            guarded=partial(_guarded, _ngram, True, in_order=True),
        ),
        section("eagle", _eagle, _head, note=NATIVE),
        section("updates", plain, gpt2, guarded=partial(_updated, plain), **several),
        section("pool", plain, gpt2, guarded=partial(_replaced, plain), **several),
    ]
