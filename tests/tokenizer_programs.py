"""TokenizerManagers, workers and detokenizers of several engines in one process, as programs."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from typing import Any, Optional

from manager_programs import (
    DEADLINE,
    PROMPTS,
    member_args,
    of_process,
    settings_of_the_process,
)

STEPS = 8


class Engine:
    """A TokenizerManager in the caller's thread, and its Scheduler in a thread of its own."""

    def __init__(self, server_args: Any) -> None:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import PortArgs

        self.server_args = server_args
        self.port_args = PortArgs.init_new(server_args)
        self.ready = threading.Event()
        self.error: Optional[BaseException] = None
        publish(server_args, role="tokenizer")
        self.manager: Any = TokenizerManager(server_args, self.port_args)
        self.thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
        self.thread.start()
        assert self.ready.wait(DEADLINE)
        assert self.error is None, self.error

    def _serve(self) -> None:
        from sglang.srt.managers.scheduler import run_scheduler_process

        try:
            run_scheduler_process(self.server_args, self.port_args, 0, 0, 0, None, self)
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()

    def send(self, info: dict[str, Any]) -> None:
        """As the pipe to which `run_scheduler_process` writes."""
        self.manager.max_req_input_len = info["max_req_input_len"]
        self.ready.set()

    def request(self, prompt: Sequence[int], **more: Any) -> Any:
        """A request of this engine."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        wishes = {"max_new_tokens": STEPS, "temperature": 0, "ignore_eos": True}
        return GenerateReqInput(input_ids=list(prompt), sampling_params=wishes, **more)

    async def answer(self, prompt: Sequence[int], **more: Any) -> list[int]:
        """The token ids of one answer."""
        stream = self.manager.generate_request(self.request(prompt, **more))
        return [item async for item in stream][-1]["output_ids"]

    def end(self) -> None:
        """End the scheduler as SGLang does."""
        from sglang.srt.managers.io_struct import ShutdownReq

        self.manager._dispatch_to_scheduler(ShutdownReq())  # in its loop
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


def _engines(cache: str) -> tuple[Engine, Engine]:
    """Two engines, of which only the first may return hidden states. The second was made last."""
    first = member_args(cache, 0)
    first.enable_return_hidden_states = True
    return Engine(first), Engine(member_args(cache, 2))


def from_another_engine(cache: str, treated: bool) -> None:
    """Print what one engine answers to code of the other one."""
    import sglang_distguard

    if not treated:
        _leave_out_managers()
    sglang_distguard.install(timeout=DEADLINE)
    one, other = _engines(cache)

    async def work() -> dict[str, Any]:
        try:
            # This code is in the scope of the engine that was made last.
            states = await one.answer(PROMPTS[0], return_hidden_states=True)
        except ValueError as error:
            return {"refused": str(error)}
        answers = [
            await asyncio.gather(*(engine.answer(it) for it in PROMPTS)) for engine in (one, other)
        ]
        return {"with states": states, "answers": answers}

    print(json.dumps(asyncio.new_event_loop().run_until_complete(work())), flush=True)
    os._exit(0)


def _leave_out_managers() -> None:
    from sglang_distguard.hooks import generation_0_5_21, managers, versions

    left_out = {id(change) for change in managers.CHANGES if not _runs_a_process(change)}
    versions.GENERATIONS = {
        "without managers": lambda: [
            it for it in generation_0_5_21.changes() if id(it) not in left_out
        ]
    }


def _runs_a_process(change: Any) -> bool:
    return getattr(change, "qualname", "").startswith("run_")


def streams_and_ends(cache: str) -> None:
    """Print facts about streams, publishing, closing and failing of TokenizerManagers."""
    import sglang_distguard
    from sglang_distguard import _core
    from sglang_distguard.context import generation
    from sglang_distguard.runner.handle import find_handle
    from sglang_distguard.testing import server_args

    facts: dict[str, Any] = {}
    settings = settings_of_the_process()
    sglang_distguard.install(timeout=DEADLINE)
    one, other = _engines(cache)
    mine = _core.current_scope()

    async def work() -> None:
        stream = one.manager.generate_request(one.request(PROMPTS[0], stream=True))
        scopes = []
        async for _ in stream:
            scopes.append(_core.current_scope() is mine)
        facts["items in the consumer's scope"] = scopes
        # Each item may be taken in another task, whose context differs.
        stream = one.manager.generate_request(one.request(PROMPTS[0], stream=True))
        await asyncio.create_task(stream.__anext__())
        item = await asyncio.create_task(stream.__anext__())
        facts["item"] = sorted(item)
        try:
            sglang_distguard.close(one.manager, timeout=0.1)
        except sglang_distguard.StateInUse as error:
            facts["in use"] = str(error)
        await stream.aclose()
        facts["states after aclose"] = len(other.manager.rid_to_state)

        async def fails(_output: object) -> None:
            raise RuntimeError("planted")

        other.manager._handle_batch_output = fails
        try:
            await other.answer(PROMPTS[0])
        except Exception as error:
            facts["failure"] = f"{type(error).__name__}: {getattr(error, 'detail', error)}"
        try:
            await other.answer(PROMPTS[0])
        except sglang_distguard.DistGuardError as error:
            facts["afterwards"] = str(error)
        facts["still answers"] = await one.answer(PROMPTS[0])
        one.end()

    loop = asyncio.new_event_loop()
    handle = find_handle(other.manager)
    assert handle is not None
    runner = sglang_distguard.build_runner(
        server_args(other.server_args.model_path, dtype="float32")
    )
    facts["published"] = generation.current().published_in(handle.scope) is other.server_args
    sglang_distguard.close(runner)
    loop.run_until_complete(work())
    facts["settings"] = [settings, settings_of_the_process()]
    facts["closed"] = [sglang_distguard.close(one.manager) for _ in range(2)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    print(json.dumps(facts), flush=True)
    os._exit(0)  # the second scheduler still serves


def detokenizers(cache: str) -> None:
    """Print what is left of two detokenizers that were closed while they waited for messages."""
    import sglang_distguard
    from sglang.srt.managers.detokenizer_manager import (
        DetokenizerManager,
        run_detokenizer_process,
    )
    from sglang.srt.server_args import PortArgs

    sglang_distguard.install(timeout=DEADLINE)
    made: list[Any] = []
    built = threading.Semaphore(0)

    class Noted(DetokenizerManager):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)
            built.release()

    before, settings = of_process(), settings_of_the_process()
    threads = []
    for number in range(2):
        args = member_args(cache, number)
        work = (args, PortArgs.init_new(args), Noted)
        threads.append(threading.Thread(target=run_detokenizer_process, args=work, daemon=True))
        threads[-1].start()
        assert built.acquire(timeout=DEADLINE)
    closed = [sglang_distguard.close(it) for it in made]
    for thread in threads:
        thread.join(DEADLINE)
    facts = {
        "closed": closed,
        "process": [before, of_process()],
        "settings": [settings, settings_of_the_process()],
    }
    print(json.dumps(facts), flush=True)


def peers_that_leave(cache: str) -> None:
    """Print in how many rounds a context does not end whose peer leaves at the same moment.

    The sockets are made by a manager. Its peer has read one of many messages.
    """
    import sglang_distguard
    import zmq
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs
    from sglang.srt.utils.network import get_zmq_socket

    sglang_distguard.install(timeout=DEADLINE)
    args = member_args(cache, 0)
    publish(args, role="tokenizer")
    asyncio.set_event_loop(asyncio.new_event_loop())

    class Manager(TokenizerManager):
        def init_ipc_channels(self, port_args: PortArgs) -> None:
            super().init_ipc_channels(port_args)
            place = port_args.tokenizer_ipc_name
            self.ended = [self.ends(f"{place}-{number}") for number in range(300)]

        def ends(self, place: str) -> bool:
            context = zmq.Context(2)
            sender: Any = get_zmq_socket(context, zmq.PUSH, place, bind=True)
            both = threading.Barrier(2)

            def read_one_and_leave() -> None:
                with zmq.Context() as peers:
                    peer = peers.socket(zmq.PULL)
                    peer.setsockopt(zmq.RCVHWM, 1)
                    peer.connect(place)
                    peer.recv()
                    both.wait(DEADLINE)
                    peer.close(linger=0)

            peer = threading.Thread(target=read_one_and_leave)
            peer.start()
            for _ in range(50):
                sender.send(bytes(100_000))
            both.wait(DEADLINE)
            sender.close(linger=0)
            end = threading.Thread(target=context.term, daemon=True)
            end.start()
            peer.join()
            end.join(DEADLINE)
            return not end.is_alive()

    print(json.dumps(Manager(args, PortArgs.init_new(args)).ended.count(False)), flush=True)
    os._exit(0)


def workers(cache: str) -> None:
    """Print what two workers say to threads that belong to neither."""
    import sglang_distguard
    from sglang_distguard import _core
    from sglang_distguard.audit.serving import Worker
    from sglang_distguard.testing import steps

    sglang_distguard.install(timeout=DEADLINE)
    found = []

    def build(number: int) -> None:
        worker = Worker()
        args = member_args(cache, number)
        args.max_prefill_tokens = 1000 + number
        found.append((worker.build(args, lambda _: None), worker))

    for number in range(2):
        thread = threading.Thread(target=build, args=(number,))
        thread.start()
        thread.join()
    assert _core.current_scope() is None
    facts = []
    for runner, worker in found:
        of_sglang = worker._workers[id(runner)]
        facts.append(of_sglang.get_worker_info()[1])
        with sglang_distguard.activate(runner):
            assert steps.generate(runner, steps.PROMPTS).tokens
        sglang_distguard.close(runner)
    print(json.dumps(facts), flush=True)
