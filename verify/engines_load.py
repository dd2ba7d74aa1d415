"""An hour of mixed load on engines of one process; every request is accounted for.

    .venv/bin/python verify/engines_load.py [--minutes 60] [--seed N] [--output FILE]

Threads and one asyncio loop send requests, whole, streamed, in batches; they abort, cancel and drop
some. Others open, close, replace and break engines, and change weights to others and back. In
rounds of two minutes: after each, all engines but one, which serves the whole time, are closed, and
what is left is compared with what was there before the first.

Exit code 1: a wrong token, a request that ended otherwise than as answered right or as it had to
because of what was done to it, a wait of more than `MANY` seconds, something left, or memory that
grows.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines_accounts import Accounts, Served, grown, report
from engines_common import (
    ALL,
    KINDS,
    LONG,
    MANY,
    QUESTIONS,
    SEEDS,
    Answers,
    Left,
    answers_alone,
    begin,
    machine,
)
from tqdm import tqdm

NAMES = ("a", "b", "c")
STEADY = "steady"
THREADS, TASKS, CHANGERS = 5, 5, 2
#: Resident memory may grow by this much from the first third of the rounds to the last, in MiB.
GROWTH = 24.0


class Load(Accounts):
    """Clients in threads and in a loop, and threads that change the engines."""

    def __init__(self, seed: int, alone: dict[tuple[int, int], Answers]) -> None:
        super().__init__()
        self.seed = seed
        self.alone = alone
        self.pool = self.dg.Pool()
        self.stop = threading.Event()
        self.is_over = threading.Event()

    # Clients in threads

    def client(self, chosen: random.Random) -> None:
        ways = (self.whole, self.whole, self.batch, self.stream, self.drop, self.abort)
        while not self.stop.is_set():
            served = self.pick(chosen)
            if served is None:
                self.stop.wait(0.05)
                continue
            chosen.choice(ways)(chosen, served)
            self.stop.wait(chosen.uniform(0, 0.05))

    def whole(self, chosen: random.Random, served: Served) -> None:
        number = chosen.randrange(len(QUESTIONS))
        with self.request("generate", served) as asked:
            answer = served.engine.generate(**QUESTIONS[number].given())
            self.settle(asked, number, answer, aborts=False)

    def batch(self, chosen: random.Random, served: Served) -> None:
        numbers = [chosen.randrange(len(QUESTIONS)) for _ in range(chosen.randint(2, 4))]
        with self.request("generate of a list", served) as asked:
            answers = served.engine.generate(
                input_ids=[list(QUESTIONS[it].prompt) for it in numbers],
                sampling_params=[QUESTIONS[it].params() for it in numbers],
            )
            for number, answer in zip(numbers, answers, strict=True):
                self.settle(asked, number, answer, aborts=False)

    def stream(self, chosen: random.Random, served: Served) -> None:
        number = chosen.randrange(len(QUESTIONS))
        with self.request("stream", served) as asked:
            last: dict[str, Any] = {}
            for last in served.engine.generate(**QUESTIONS[number].given(), stream=True):
                self.note_begun(asked)
                self.compare(asked, number, last["output_ids"], whole=False)
            self.settle(asked, number, last, aborts=False)

    def drop(self, chosen: random.Random, served: Served) -> None:
        number, wanted = len(ALL) - 1, chosen.randint(1, 5)
        with self.request("dropped stream", served) as asked:
            chunks = served.engine.generate(**LONG.given(), stream=True)
            for count, chunk in enumerate(chunks, 1):
                self.note_begun(asked)
                self.compare(asked, number, chunk["output_ids"], whole=False)
                if count == wanted:
                    break
            chunks.close()
            asked.outcome = "dropped by its caller, right so far"

    def abort(self, chosen: random.Random, served: Served) -> None:
        number, rid = len(ALL) - 1, uuid.uuid4().hex
        with self.request("aborted stream", served) as asked:
            chunks = served.engine.generate(**LONG.given(), stream=True, rid=rid)
            last = next(chunks)
            self.note_begun(asked)
            served.engine.abort(rid)
            *_, last = [last, *chunks]
            self.settle(asked, number, last, aborts=True)

    # Clients in one asyncio loop

    def clients_of_a_loop(self, chosen: random.Random) -> None:
        async def all_tasks() -> None:
            await asyncio.gather(*(self.task(random.Random(chosen.random())) for _ in range(TASKS)))

        asyncio.run(all_tasks())

    async def task(self, chosen: random.Random) -> None:
        ways = (self.async_whole, self.async_stream, self.async_drop, self.cancel)
        while not self.stop.is_set():
            served = self.pick(chosen)
            if served is None:
                await asyncio.sleep(0.05)
                continue
            await chosen.choice(ways)(chosen, served)
            await asyncio.sleep(chosen.uniform(0, 0.05))

    async def async_whole(self, chosen: random.Random, served: Served) -> None:
        number = chosen.randrange(len(QUESTIONS))
        with self.request("async_generate", served) as asked:
            answer = await served.engine.async_generate(**QUESTIONS[number].given())
            self.settle(asked, number, answer, aborts=False)

    async def async_stream(self, chosen: random.Random, served: Served) -> None:
        number = chosen.randrange(len(QUESTIONS))
        with self.request("asynchronous stream", served) as asked:
            last: dict[str, Any] = {}
            given = QUESTIONS[number].given()
            async for last in await served.engine.async_generate(**given, stream=True):
                self.note_begun(asked)
                self.compare(asked, number, last["output_ids"], whole=False)
            self.settle(asked, number, last, aborts=False)

    async def async_drop(self, chosen: random.Random, served: Served) -> None:
        number, wanted = len(ALL) - 1, chosen.randint(1, 5)
        with self.request("dropped asynchronous stream", served) as asked:
            chunks = await served.engine.async_generate(**LONG.given(), stream=True)
            count = 0
            async for chunk in chunks:
                self.note_begun(asked)
                self.compare(asked, number, chunk["output_ids"], whole=False)
                count += 1
                if count == wanted:
                    break
            await chunks.aclose()
            asked.outcome = "dropped by its caller, right so far"

    async def cancel(self, chosen: random.Random, served: Served) -> None:
        number = len(ALL) - 1
        with self.request("cancelled task", served) as asked:
            task = asyncio.ensure_future(served.engine.async_generate(**LONG.given()))
            await asyncio.wait([task], timeout=chosen.uniform(0, 0.5))
            task.cancel()
            try:
                answer = await task
            except asyncio.CancelledError:
                asked.outcome = "cancelled by its caller"
            else:
                self.settle(asked, number, answer, aborts=False)

    # Changes

    def changer(self, chosen: random.Random, names: Sequence[str]) -> None:
        """Change the engines of these names, which are this thread's."""
        while not self.stop.is_set():
            name = chosen.choice(names)
            served = self.live.get(name)
            try:
                if served is None:
                    self.open(chosen, name)
                else:
                    ways = (self.end, self.end, self.replace, self.fail, self.update)
                    chosen.choice(ways)(chosen, name, served)
            except BaseException as error:
                self.wrong(f"changing {name}: {type(error).__name__}: {error}")
                with self.lock:
                    self.live.pop(name, None)
                if name in self.pool:
                    self.pool.close(name, drain=0.0)
            self.stop.wait(chosen.uniform(0, 2))

    def made(self, chosen: random.Random, make: Callable[..., Any], name: str) -> Served:
        kind, seed = chosen.randrange(len(KINDS)), chosen.choice(SEEDS)
        engine = make(name, server_args=KINDS[kind].args(seed), start_timeout=MANY)
        assert self.pool[name] is engine
        self.acts["engines opened"] += 1
        return Served(engine, KINDS[kind], seed, self.alone[kind, seed])

    def open(self, chosen: random.Random, name: str) -> None:
        served = self.made(chosen, self.pool.load, name)
        with self.lock:
            self.live[name] = served

    def end(self, chosen: random.Random, name: str, served: Served) -> None:
        drains = chosen.random() < 0.5
        with self.lock:
            served.ending = "drained" if drains else "ended"
            del self.live[name]
        self.pool.close(name, drain=MANY if drains else 0)
        self.acts["closed, drained" if drains else "closed, not drained"] += 1

    def replace(self, chosen: random.Random, name: str, served: Served) -> None:
        def replaced(name: str, **given: Any) -> Any:
            with self.lock:
                served.ending = "drained"
            return self.pool.replace(name, drain=MANY, **given)

        new = self.made(chosen, replaced, name)
        with self.lock:
            self.live[name] = new
        self.acts["replaced"] += 1

    def fail(self, chosen: random.Random, name: str, served: Served) -> None:
        """Break the engine's scheduler with a planted error; then close it."""

        def breaks(*_args: Any, **_kwargs: Any) -> None:
            raise ValueError("planted")

        manager = served.engine._begun[0].manager
        with self.lock:
            served.ending = "failed"
        place = chosen.choice(("run_batch", "process_batch_result", "process_input_requests"))
        setattr(manager, place, breaks)
        until = time.monotonic() + MANY
        while served.engine.failure is None and time.monotonic() < until:
            try:
                served.engine.generate(**QUESTIONS[0].given())
            except self.dg.EngineFailed:
                break
        if served.engine.failure is None:
            self.wrong(f"{served.engine!r} did not fail")
        with self.lock:
            del self.live[name]
        self.pool.close(name)
        self.acts[f"broken in {place}"] += 1

    def update(self, chosen: random.Random, name: str, served: Served) -> None:
        """Change the weights to another seed's, ask everything, and change them back."""
        with self.lock:
            served.is_reserved = True
        try:
            for seed in (1 - served.seed, served.seed):
                self.rest(served)  # also after answers: a scheduler that overlaps runs a step more
                told = served.engine.update_weights_from_disk(str(served.kind.folder(seed)))
                expected = self.alone[KINDS.index(served.kind), seed]
                found = [served.engine.generate(**it.given())["output_ids"] for it in QUESTIONS[:4]]
                if not told[0] or tuple(map(tuple, found)) != expected[:4]:
                    self.wrong(f"new weights of {name}: {told}, {found}, alone {expected[:4]}")
            self.acts["weights changed and changed back"] += 1
        finally:
            with self.lock:
                served.is_reserved = False

    def rest(self, served: Served) -> None:
        """Wait until the engine does nothing; a request that was aborted runs for some steps."""
        until = time.monotonic() + MANY
        while served.users or not served.engine.flush_cache().success:
            if time.monotonic() > until:
                raise TimeoutError(f"{served.engine!r} does not rest: {served.users} requests")
            time.sleep(0.01)

    # Rounds

    def watch(self) -> None:
        """End the process when a request hangs."""
        while not self.is_over.wait(1.0):
            with self.lock:
                late = [it for it in self.running.values() if time.monotonic() - it.begun > MANY]
            if late:
                print(f"HANGS: {[(it.what, it.served.engine) for it in late]}", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)

    def round(self, number: int, seconds: float) -> None:
        self.stop.clear()

        def seeded(what: str) -> random.Random:
            return random.Random(f"{self.seed} {number} {what}")

        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            *((self.client, (seeded(f"client {it}"),)) for it in range(THREADS)),
            (self.clients_of_a_loop, (seeded("loop"),)),
            *(
                (self.changer, (seeded(f"changer {it}"), NAMES[it::CHANGERS]))
                for it in range(CHANGERS)
            ),
        ]
        threads = [threading.Thread(target=target, args=args) for target, args in work]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.errors:
            time.sleep(0.2)
        self.stop.set()
        for thread in threads:
            thread.join(2 * MANY)
            if thread.is_alive():
                print(f"HANGS: {thread}", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
        for name in NAMES:
            served = self.live.pop(name, None)
            if served is not None:
                served.ending = "drained"
                self.pool.close(name)

    def warm_up(self) -> None:
        """Open, ask and close each kind: imports, and threads that stay."""
        for index, kind in enumerate(KINDS):
            with self.dg.Engine(server_args=kind.args(0), name="warm") as engine:
                served = Served(engine, kind, 0, self.alone[index, 0], users=1)
                self.whole(random.Random(index), served)

    def open_steady(self) -> None:
        engine = self.pool.load(STEADY, server_args=KINDS[1].args(0), start_timeout=MANY)
        self.live[STEADY] = Served(engine, KINDS[1], 0, self.alone[1, 0])

    def look(self) -> Left:
        """What is left when only the steady engine is open, and its last batch is always the same."""
        served = self.live[STEADY]
        self.rest(served)
        served.engine.generate(**QUESTIONS[0].given())
        self.rest(served)
        return Left.now(1)

    def close_steady(self) -> None:
        self.live.pop(STEADY).ending = "drained"
        self.pool.close(STEADY)


def main() -> int:
    """Run; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="mixed load on engines of one process")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--round", type=float, default=2.0, help="minutes of a round")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--output", type=Path, help="file for the summary, in Markdown")
    given = parser.parse_args()
    faulthandler.enable()
    date = time.strftime("%Y-%m-%d %H:%M")
    head = f"{date}, {machine()}: `--minutes {given.minutes:g} --seed {given.seed}`"
    print(head, flush=True)
    begin()
    alone = {
        (index, seed): answers_alone(kind, seed)
        for index, kind in enumerate(KINDS)  # tqdm has a thread, and these are forked
        for seed in SEEDS
    }
    import sglang_distguard as dg

    dg.install()
    load = Load(given.seed, alone)
    threading.Thread(target=load.watch, name="watch", daemon=True).start()
    tqdm(disable=True).close()  # starts tqdm's own thread, which stays
    load.warm_up()
    empty = Left.now()
    load.open_steady()
    rounds = max(1, round(given.minutes / given.round))
    with tqdm(total=rounds, unit="round", disable=None) as bar:
        before = load.look()
        begun, rows, number = time.monotonic(), [], 0
        while number < rounds and not load.errors:
            load.round(number, given.minutes * 60 / rounds)
            left = load.look()
            more = left.more_than(before)
            if more:
                load.wrong(f"left after round {number}: {'; '.join(more)}")
            opened, requests = load.acts["engines opened"], load.outcomes.total()
            rows.append((time.monotonic() - begun, requests, opened, left))
            number += 1
            if given.output is not None:
                given.output.write_text(report(load, rows, f"{head} (round {number}/{rounds})"))
            bar.update()
            bar.set_postfix(requests=requests, opened=opened, rss=f"{left.rss:.0f}")
            print(f"round {number}/{rounds}: {requests} requests, {left}", flush=True)
    load.close_steady()
    load.is_over.set()
    more = Left.now().more_than(empty)
    if more:
        load.wrong(f"left at the end: {'; '.join(more)}")
    memory = [it.rss for _, _, _, it in rows]
    if len(memory) >= 6 and grown(memory) > GROWTH:
        load.wrong(f"resident memory has grown by {grown(memory):.1f} MiB: {memory}")
    text = report(load, rows, head)
    print(text)
    if given.output is not None:
        given.output.write_text(text)
    print("FAILED" if load.errors else "0 wrong, 0 lost, nothing left")
    return 1 if load.errors else 0


if __name__ == "__main__":
    sys.exit(main())
