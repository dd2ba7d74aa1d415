"""One attempt of the ranks to agree on something: what this rank reports of it, and looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Optional

from sglang_distguard.distributed.ranks import failures, reader
from sglang_distguard.distributed.ranks.creation import Creation, NotTogether
from sglang_distguard.distributed.ranks.log import PREFIX, Ranks
from sglang_distguard.errors import DistGuardError

#: Stages that end with an entry in the log.
ENDS = ("ask", "turn", "build")
#: The stage of a rank that is in the with block of its turn; it has not reported "turn" yet.
_INSIDE = "inside"


@dataclass
class Ask:
    """One round of one name.

    Attributes:
        ranks: the ranks that must agree.
        what: the name that all ranks use: "runner NAME", "world" …
        round: number of earlier attempts under this name.
        deadline: seconds for each stage.
        creates: whether the turn creates something; otherwise it computes with what exists.
        undo: what ``undo_once`` calls, with the reason in words.
        users: what the code that took the turn keeps with it.
        is_block: whether the with block of the turn is one of user code, with several steps.
        stage: the stage that this rank is in.
        creation: names of what is created in the turn.
        was_ended: whether the beating thread has ended the turn while this rank was inside.
        is_decided: whether the other ranks can know how the turn ended here, or has ended.
        has_left_turn: whether the turn is over on this rank.
        has_built: whether the build that uses it is over on this rank.
    """

    ranks: Ranks
    what: str
    round: int
    deadline: float
    creates: bool = True
    undo: Callable[[str], object] = lambda _: None
    users: Any = None
    is_block: bool = False
    stage: str = "ask"
    creation: Optional[Creation] = None
    was_ended: bool = False
    is_decided: bool = False
    has_left_turn: bool = False
    has_built: bool = False
    _is_undone: bool = False
    _waits_for_entries: bool = False
    #: Held while the beating thread ends the turn, so that this rank leaves it afterwards. One that
    #: an interrupt leaves held is taken again by the same thread.
    _leaving: Any = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        """The runner's name without "runner "."""
        return self.what.removeprefix("runner ")

    @property
    def known_as(self) -> str:
        """Name and round: equal on all ranks, and unique in this world."""
        return f"{self.what} #{self.round}"

    @property
    def prefix(self) -> str:
        """Prefix of the names of process groups that are created in the turn."""
        return f"{PREFIX}/{self.ranks.generation}/{self.what}/{self.round}:"

    def _key(self, stage: str, *, before: int = 0) -> str:
        return f"{self.what}/{self.round - before}/{stage}"

    def tell(self, stage: str, report: Mapping[str, Any]) -> None:
        """Report to the other ranks; the last rank to report judges and writes the stage's end."""
        key = self._key(stage)
        if self.ranks.state.arrive(self.what, self.round, stage) and self.ranks.tell(key, report):
            judge = failures.disagree if stage == "ask" else failures.failed
            self.write(stage, judge(self.ranks.told(key)))
            self._leave_behind(stage)
        if stage != "ask":
            self.is_decided = True

    def _leave_behind(self, stage: str) -> None:
        """Have earlier stages deleted from the store: all ranks have reported ``stage``."""
        built = [self._key("build", before=1)] if self.creates else []
        left = {
            "ask": [self._key("turn", before=1), *built],
            "turn": [self._key("ask")],
            "build": [self._key("turn")],
        }[stage]
        read = self.ranks.state.outlived(self.what, self.round, stage)
        keys = [] if stage == "ask" and self.round == 0 else left
        told = [part for key in keys for part in (key, f"{key}/told")]
        self.ranks.left.extend([*told, *(f"log/{index}" for index in read)])

    def write(self, stage: str, failure: Optional[str]) -> None:
        """Write into the log that ``stage`` has ended; ``failure`` is None if it passed."""
        self.ranks.write(
            {"name": self.what, "round": self.round, "stage": stage, "failure": failure}
        )

    def stands(self, stage: str) -> Optional[tuple[str, Optional[str]]]:
        """Return how ``stage`` ended; None while it is open.

        When "begin" has passed, this rank is in the turn.
        """
        state = self.ranks.state
        standing = (
            state.enter(self.what, self.round)
            if stage == "begin"
            else state.stands(self.what, self.round, stage)
        )
        return None if standing[0] == "open" else standing

    def error(self, stage: str, failure: str) -> DistGuardError:
        """Return the error that this rank raises for a ``failure`` of ``stage``."""
        rank = self.ranks.rank
        return failures.error_of(self.what, stage, rank, failure, creates=self.creates)

    def time_out(self, stage: str, waited: float) -> None:
        """Write that ``stage`` timed out here after ``waited`` seconds, and what is missing."""
        ranks = self.ranks
        if stage == "begin":
            self.write("turn", failures.queued(ranks.rank, ranks.state.turn(), waited))
            return
        told = ranks.told(self._key(stage))
        self.write(stage, failures.missing(ranks.rank, told, ranks.size, waited))

    def abort(self, stage: str, error: BaseException) -> None:
        """Write that this rank left ``stage`` because of ``error``; earlier entries still count."""
        with suppress(Exception):  # without a store no rank can be told
            failure = failures.failed({self.ranks.rank: failures.report(error)})
            # The stage may have passed on the other ranks already: then the next stage fails.
            for later in ENDS[ENDS.index("turn" if stage in ("begin", _INSIDE) else stage) :]:
                self.write(later, failure)
            self.is_decided = True

    def may_have_begun(self) -> bool:
        """Whether any rank may have entered the turn."""
        return self.ranks.state.began(self.what, self.round) is not False

    def enter_turn(self) -> None:
        """Note that this rank enters the with block of the turn.

        Raises:
            NotTogether: another rank is silent, so the turn has been ended.
        """
        self.stage = _INSIDE
        if self.ranks.alive.silent(self.deadline):
            self.look()
            if self.was_ended:
                raise NotTogether("a rank that takes part gives no sign of life")

    def leave_turn(self) -> None:
        """Note that this rank has left the with block of the turn."""
        with self._after_its_end():
            self.stage = "turn"
            if self._waits_for_entries:
                self._waits_for_entries = False
                self.ranks.state.end_wait(self.what, self.round, "turn")

    def undo_once(self, error: BaseException) -> None:
        """Undo what this rank did in the turn, because of ``error``, unless that is done."""
        with self._after_its_end():
            self._undo(error)

    @contextmanager
    def _after_its_end(self) -> Iterator[None]:
        """Wait until the beating thread has ended the turn, for the deadline; then go on anyway.

        What it destroys is being destroyed then, and refuses its users already.
        """
        is_held = self._leaving.acquire(timeout=self.deadline)
        try:
            yield
        finally:
            if is_held:
                self._leaving.release()

    def _undo(self, error: BaseException) -> None:
        if not self._is_undone:
            self.undo(failures.in_short(error))
            self._is_undone = True

    def look(self) -> None:
        """End what this rank waits for, or the turn that it is in, if another rank cannot go on.

        The beating thread calls this. A thread in the turn may be asleep in a collective.
        """
        silent = self.ranks.alive.silent(self.deadline)
        if not self._leaving.acquire(blocking=False):
            return  # this rank is leaving; the next beat looks again
        try:
            if self.stage == _INSIDE:
                self._look_inside(silent)
            elif silent and self.stage in ENDS and self.stands(self.stage) is None:
                failure = self._silence(self.stage, silent)
                if failure is not None:
                    self.write(self.stage, failure)
        finally:
            self._leaving.release()

    def _look_inside(self, silent: Mapping[int, float]) -> None:
        if self.was_ended:
            return
        if not self._waits_for_entries:  # no thread waits for entries while this rank computes
            self._waits_for_entries = True
            if self.ranks.state.begin_wait(self.what, self.round, "turn"):
                reader.start(self.ranks)
        standing = self.stands("turn")
        failure = None if standing is None else standing[1]
        if standing is None:
            failure = self._cause() or (self._silence("turn", silent) if silent else None)
            if failure is None:
                return
            self.write("turn", failure)
        self.was_ended = True
        if self.creation is not None:
            self.creation.fail()
        if not self.creates:  # otherwise a thread may be creating what would be undone
            with suppress(Exception):  # this rank does it again when it leaves
                self._undo(self.error("turn", failure or ""))

    def _cause(self) -> Optional[str]:
        """Return the failure of ranks that have raised in the turn, if any has."""
        return failures.cause(self.ranks.told(self._key("turn")))

    def _silence(self, stage: str, silent: Mapping[int, float]) -> Optional[str]:
        """Return the failure of ``silent`` ranks that have not reported ``stage``, if any has not."""
        told = self.ranks.told(self._key(stage))
        absent = {rank: seconds for rank, seconds in silent.items() if rank not in told}
        return failures.silent(self.ranks.rank, absent, told) if absent else None
