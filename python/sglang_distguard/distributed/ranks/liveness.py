"""Signs of life: a rank that has an ask in flight counts under a key of the world's store.

Waits for ranks have a deadline, but a rank that is inside of a turn does not wait in the store: it
computes, and may sleep in a collective, or for a GPU, for a rank that has ended. And each wait that
begins after that would take a deadline of its own. So while any thread of this process has an
ask in flight, one thread beats: it counts, and reads what the other ranks have counted.

- A rank that is idle has said "off", and is never silent.
- A rank is silent when its count has stood still for the deadline of the ask that needs it, by the
  clock of the rank that listens. A pause of the listener itself (it was stopped, or its interpreter
  was held) counts for two beats at most, because the other ranks may have paused with it.
- The beating thread needs the interpreter from time to time. A rank that holds it for the whole
  deadline, in native code, is silent, too.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Optional, Protocol

from sglang_distguard import _core

THREAD = "distguard-alive"
#: What a rank says that has nothing in flight.
_OFF = "off"
#: Beats in the deadline of an ask, and the seconds between two of them.
_BEATS = 8
_SHORTEST, _LONGEST = 0.05, 2.0


class Flight(Protocol):
    """Something for which this rank needs the others.

    Attributes:
        deadline: seconds after which a rank that gives no sign of life is missing.
    """

    deadline: float

    def look(self) -> None:
        """Look whether a rank that it needs is silent; the beating thread calls this."""
        ...


class _Other:
    """What this rank has heard of another one."""

    def __init__(self) -> None:
        self.said = _OFF
        self.interval = _LONGEST
        self.silent = 0.0

    def hear(self, said: str, passed: float) -> None:
        """Note what it says now, ``passed`` seconds after it was heard the last time."""
        if said == self.said and said != _OFF:
            self.silent += passed
            return
        self.silent, self.said = 0.0, said
        if said != _OFF:
            self.interval = float(said.split()[1])


class Liveness:
    """The signs of life of the ranks of one world, as one of them gives and hears them.

    Attributes:
        beats: how many this rank has given.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        """Begin with nothing in flight.

        Args:
            rank: rank of this process.
            size: number of ranks.
            store: store of the world under its prefix. No request to it sleeps.
        """
        self._rank, self._store = rank, store
        self._others = {other: _Other() for other in range(size) if other != rank}
        self.beats = 0
        self._said = _OFF
        self._have_keys = False
        self._is_closed = False
        self._interval = _LONGEST
        self._flights: dict[int, Flight] = {}
        self._changed = threading.Condition()
        self._thread: Optional[threading.Thread] = None

    def start_afresh(self) -> None:
        """Give no more signs: this is a forked child, in which the beating thread does not exist."""
        self._is_closed = True
        self._flights = {}
        self._changed = threading.Condition()
        self._thread = None

    def begin(self, flight: Flight) -> None:
        """Give signs of life until ``end``, and let ``flight`` look at those of the others."""
        if not self._others:
            return
        with self._changed:
            self._flights[id(flight)] = flight
            if self._thread is None:
                self._start()
            elif _interval(flight.deadline) < self._interval:
                self._changed.notify()

    def end(self, flight: Flight) -> None:
        """Give no signs of life for ``flight`` any more; does nothing if it has ended before."""
        # The thread is not woken: steps that follow each other at once find it beating.
        with self._changed:
            self._flights.pop(id(flight), None)

    def silent(self, deadline: float) -> dict[int, float]:
        """Return the ranks that are silent for ``deadline`` seconds, and for how long they are."""
        return {
            rank: other.silent
            for rank, other in self._others.items()
            # A rank whose asks have longer deadlines beats less often.
            if other.silent >= max(deadline, _BEATS * other.interval)
        }

    def close(self, seconds: float) -> None:
        """End the beating thread, and wait up to ``seconds`` seconds until it has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)

    def _start(self) -> None:
        if self._is_closed:
            return
        self._thread = threading.Thread(target=self._beat, name=THREAD, daemon=True)
        try:
            with _core.run_as(None):  # a thread carries the execution of the code that starts it
                self._thread.start()
        except BaseException as error:
            self._thread = None
            if not isinstance(error, RuntimeError):  # an interrupt
                raise
            # No thread can be started. The deadlines hold without it.

    def _beat(self) -> None:
        heard = time.monotonic()
        try:
            while True:
                with self._changed:
                    flights = list(self._flights.values())
                self._say(flights)
                if flights:
                    heard = self._listen(heard)
                    for flight in flights:
                        with suppress(Exception):  # a lost store raises again at the next beat
                            flight.look()
                if not self._rest(is_off=not flights):
                    return
        except RuntimeError:
            return  # the store is lost, as the threads that wait notice, too
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            if self._thread is threading.current_thread():
                self._thread = None

    def _say(self, flights: list[Flight]) -> None:
        said = _OFF
        if flights:
            self._interval = min(_interval(flight.deadline) for flight in flights)
            self.beats += 1
            said = f"{self.beats} {self._interval:.3f}"
        if said != self._said:
            self._store.set(_key(self._rank), said)
            self._said = said

    def _listen(self, before: float) -> float:
        """Read what the others have counted; return when, as ``before`` is for the last time."""
        now = time.monotonic()
        passed = min(now - before, 2 * self._interval)
        for other, said in zip(self._others.values(), self._read(), strict=True):
            other.hear(said, passed)
        return now

    def _read(self) -> list[str]:
        """Return what the other ranks say now; after the first time in one request, if it can."""
        keys = [_key(rank) for rank in self._others]
        if self._have_keys and self._store.has_extended_api():
            return [said.decode() for said in self._store.multi_get(keys)]
        # A key that does not exist is made: a plain read would wait for it.
        read = [self._store.compare_set(key, "", _OFF).decode() for key in keys]
        self._have_keys = True
        return read

    def _rest(self, *, is_off: bool) -> bool:
        """Sleep until the next beat; False if the thread is to end."""
        with self._changed:
            if self._is_closed or (is_off and not self._flights):
                # At once, so that an ask that begins now starts another thread.
                self._thread = None
                return False
            if not is_off:
                self._changed.wait(self._interval)
            return True


def _interval(deadline: float) -> float:
    """Return the seconds between beats for an ask with this deadline."""
    return min(max(deadline / _BEATS, _SHORTEST), _LONGEST)


def _key(rank: int) -> str:
    return f"alive/{rank}"
