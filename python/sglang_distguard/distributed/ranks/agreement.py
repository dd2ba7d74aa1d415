"""Ranks agree before they create: ask under a name, take turns in one order, tell how it went.

The state is rust/core/src/agreement.rs; here is what is told to the other ranks and when. Every wait has
a deadline, and whoever gives up writes so into the log: what stands there first counts for all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.distributed.ranks import failures
from sglang_distguard.distributed.ranks.creation import creating
from sglang_distguard.distributed.ranks.log import PREFIX, Ranks
from sglang_distguard.errors import DistGuardError
from sglang_distguard.sync import waiting

#: The part of the deadline in which a turn's groups are created; the rest is for telling each other.
_CREATE = 0.8
_READER = "distguard-ranks"
#: Stages that end with an entry.
_ENDS = ("ask", "turn", "build")
#: Seconds in which a rank that lost a connection hears from the others why.
_HEAR = 5.0

#: What the running code builds a runner with, until it has told the others how that went.
_asked: ContextVar[Optional[Ask]] = ContextVar("sglang_distguard.asked", default=None)
_building: ContextVar[Optional[_Block]] = ContextVar("sglang_distguard.building", default=None)


class _Block:
    """A with block. A context that was copied inside of it, by a task, may outlive it."""

    is_over = False


@dataclass
class Ask:
    """One round of one name.

    Attributes:
        ranks: who has to agree.
        what: the name the ranks know it by: "runner NAME", "world" …
        round: how often they had tried before.
        deadline: seconds for each stage.
        creates: whether the turn is there to create something; else to compute with what there is.
        has_left_turn: whether the turn is over here.
        has_built: whether what was built with it is over here.
    """

    ranks: Ranks
    what: str
    round: int
    deadline: float
    creates: bool = True
    has_left_turn: bool = False
    has_built: bool = False

    @property
    def name(self) -> str:
        """The runner's name alone."""
        return self.what.removeprefix("runner ")

    @property
    def known_as(self) -> str:
        """The same on all ranks, and of no other runner of this world."""
        return f"{self.what} #{self.round}"

    @property
    def prefix(self) -> str:
        """Begins the names of the process groups that are created in the turn."""
        return f"{PREFIX}/{self.ranks.generation}/{self.what}/{self.round}:"

    def _key(self, stage: str, *, before: int = 0) -> str:
        return f"{self.what}/{self.round - before}/{stage}"

    def tell(self, stage: str, report: Mapping[str, Any]) -> None:
        """Report to the others; the last one to report judges and writes the end of the stage."""
        key = self._key(stage)
        if self.ranks.state.arrive(self.what, self.round, stage) and self.ranks.tell(key, report):
            judge = failures.disagree if stage == "ask" else failures.failed
            self.write(stage, judge(self.ranks.told(key)))
            self._tidy(stage)

    def _tidy(self, stage: str) -> None:
        """All ranks have told of ``stage``, and so have left what was before it."""
        left = {
            "ask": [self._key("turn", before=1), self._key("build", before=1)],
            "turn": [self._key("ask")],
            "build": [self._key("turn")],
        }[stage]
        read = self.ranks.state.outlived(self.what, self.round, stage)
        keys = [] if stage == "ask" and self.round == 0 else left
        told = [part for key in keys for part in (key, f"{key}/told")]
        self.ranks.tidy(*told, *(f"log/{index}" for index in read))

    def write(self, stage: str, failure: Optional[str]) -> None:
        """Write that ``stage`` has ended."""
        self.ranks.write(
            {"name": self.what, "round": self.round, "stage": stage, "failure": failure}
        )

    def stands(self, stage: str) -> Optional[tuple[str, Optional[str]]]:
        """How ``stage`` ended, None while it has not; this rank is in the turn when "begin" passed."""
        state = self.ranks.state
        standing = (
            state.enter(self.what, self.round)
            if stage == "begin"
            else state.stands(self.what, self.round, stage)
        )
        return None if standing[0] == "open" else standing

    def error(self, stage: str, failure: str) -> DistGuardError:
        """What this rank raises for a ``failure`` of ``stage``."""
        rank = self.ranks.rank
        return failures.error_of(self.what, stage, rank, failure, creates=self.creates)

    def time_out(self, stage: str, waited: float) -> None:
        """Write that this rank no longer waits for ``stage`` to end, and for whom it waited."""
        ranks = self.ranks
        if stage == "begin":
            self.write("turn", failures.queued(ranks.rank, ranks.state.turn(), waited))
            return
        told = ranks.told(self._key(stage))
        self.write(stage, failures.missing(ranks.rank, told, ranks.size, waited))

    def abort(self, stage: str, error: BaseException) -> None:
        """Write that this rank has left ``stage``, for ``error``. What stands already, stands."""
        with suppress(Exception):  # without a store nobody can be told
            failure = failures.failed({self.ranks.rank: failures.report(error)})
            # The others may have agreed on this stage before: then the next one is what fails.
            for later in _ENDS[_ENDS.index("turn" if stage == "begin" else stage) :]:
                self.write(later, failure)

    def may_have_begun(self) -> bool:
        """Whether some rank may have been inside of the turn."""
        return self.ranks.state.began(self.what, self.round) is not False


class _Wait:
    """Waits for the end of one stage (see ``waiting.Waits``)."""

    #: Seconds: the interpreter's exit does not wake it.
    patience = 1.0

    def __init__(self, ask: Ask, stage: str) -> None:
        self._ask, self._stage = ask, stage
        self._since = time.monotonic()

    def wait(self, seconds: float) -> None:
        ask = self._ask
        ask.ranks.state.wait(ask.what, ask.round, self._stage, seconds)

    def timed_out(self) -> Exception:
        return _TimedOut(time.monotonic() - self._since)


class _TimedOut(Exception):
    def __init__(self, waited: float) -> None:
        self.waited = waited


def _await(ask: Ask, stage: str, timeout: float) -> None:
    """Until all ranks have ended ``stage``; raise what it ended with, or what the wait did."""
    ranks = ask.ranks
    what = f"the other ranks ({ask.what}, {stage})"

    def wait(seconds: float) -> tuple[str, Optional[str]]:
        return waiting.until(
            lambda: ask.stands(stage), _Wait(ask, stage), timeout=seconds, what=what
        )

    try:
        if ranks.state.begin_wait(ask.what, ask.round, stage):
            _start_reader(ranks)
        try:
            standing = wait(timeout)
        except _TimedOut as error:
            ask.time_out(stage, error.waited)
            standing = wait(_HEAR)
    except _TimedOut:
        unheard = failures.unheard(_HEAR)
        raise ask.error(stage, unheard) from None
    except BaseException as error:  # interrupted, say: the others must not wait for this rank
        ask.abort(stage, error)
        if stage in ("ask", "begin"):
            _learn_whether_it_began(ask)
        raise
    finally:
        ranks.state.end_wait(ask.what, ask.round, stage)
    if standing[0] == "failed":
        raise ask.error(stage, standing[1] or "")


def _learn_whether_it_began(ask: Ask) -> None:
    """Read on until this rank's own entry at the latest: what stands before it counts."""
    state = ask.ranks.state

    def is_known() -> Optional[bool]:
        if state.began(ask.what, ask.round) is not None or ask.stands("turn") is not None:
            return True
        return None

    with suppress(Exception):
        waiting.until(
            is_known,
            _Wait(ask, "turn"),
            timeout=_HEAR,
            what=f"the log ({ask.what})",
        )


def _start_reader(ranks: Ranks) -> None:
    # Short-lived: it ends with the last wait. A daemon, for it may sleep in the store.
    try:
        threading.Thread(target=_read, args=(ranks,), name=_READER, daemon=True).start()
    except BaseException:
        ranks.state.end_reading()
        raise


def _read(ranks: Ranks) -> None:
    """Take in the log while anybody here waits for it."""
    while (index := ranks.state.next_to_read()) is not None:
        try:
            entry = ranks.read(index)
            if entry is not None:
                if entry["by"] == ranks.rank:
                    ranks.state.read_own(index)
                ranks.state.apply(
                    index, entry["name"], entry["round"], entry["stage"], entry["failure"]
                )
        except Exception as error:  # whatever it is, those who wait must hear of it
            ranks.state.lose(failures.lost(failures.describe(error)))


@contextmanager
def _store_errors(ask: Ask, stage: str) -> Iterator[None]:
    """Make of a store that cannot be reached an error of ours."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError as error:
        reason = failures.lost(failures.describe(error))
        raise ask.error(stage, reason) from error


@contextmanager
def turn(
    ranks: Ranks,
    what: str,
    spec: Mapping[str, Any],
    *,
    keep: bool = False,
    creates: bool = True,
    undo: Callable[[], object] = lambda: None,
) -> Iterator[Ask]:
    """Run the with block when all ranks have asked for the same, after one another in one order.

    Process groups created inside have names that the ranks agreed on, and the deadline. A turn
    inside another is a part of that.

    Args:
        ranks: who has to agree.
        what: the name by which the ranks know it.
        spec: what must be equal, JSON values.
        keep: remember the ask as what the running code builds a runner with (``building``).
        creates: whether something is created; else it computes with what there is.
        undo: called when this or another rank failed and some may have been inside of the turn;
            no other turn begins here before it returns.

    Raises:
        AmbiguousBuild: another thread of this process is at it under the same name.
        RanksDisagree, AgreementTimeout, RankFailed, StoreLost: see ``errors``. All ranks raise.
        Whatever the with block raised, on the rank where it did; the others raise RankFailed.
    """
    outer = _turn_in_force()
    if outer is not None and not outer.has_left_turn:
        yield outer
        return
    chosen = settings.current()
    deadline = chosen.agreement_timeout
    ask = Ask(ranks, what, ranks.state.begin(what), deadline, creates)
    turn_of_code = ExitStack()
    try:
        turn_of_code.enter_context(_core.in_turn(ask))
        with _store_errors(ask, "ask"):
            _tell_and_await(ask, "ask", {"spec": dict(spec)})
            # Others may have their turns first: that is a wait for them, not for ranks.
            _await(ask, "begin", chosen.timeout)
        try:
            with creating(deadline * _CREATE, ask.prefix, ranks.store):
                yield ask
        except BaseException as error:
            explain(ask, "turn", error)
        with _store_errors(ask, "turn"):
            _tell_and_await(ask, "turn", {})
    except BaseException:
        try:
            if ask.may_have_begun():
                undo()
        finally:
            ranks.state.end(what)
        raise
    finally:
        ask.has_left_turn = True
        turn_of_code.close()
        ranks.state.leave(what, ask.round)
    if keep:
        _asked.set(ask)
    else:
        ranks.state.end(what)


def _tell_and_await(ask: Ask, stage: str, report: Mapping[str, Any]) -> None:
    try:
        ask.tell(stage, report)
    except BaseException as error:  # interrupted: the others may not have been told
        ask.abort(stage, error)
        raise
    _await(ask, stage, ask.deadline)


def explain(ask: Ask, stage: str, error: BaseException) -> NoReturn:
    """Tell the others of ``error``, and raise it; or what befell another rank if it follows from that.

    Raises:
        RankFailed, AgreementTimeout: another rank failed, or is gone.
    """
    verdict = None
    with suppress(Exception):  # without a store nobody can be told, and ``error`` says enough
        ask.tell(stage, failures.report(error))
        if failures.is_consequence(error):
            verdict = _verdict(ask, stage)
    if verdict is None:
        raise error
    raise verdict from error


def _verdict(ask: Ask, stage: str) -> Optional[DistGuardError]:
    try:
        _await(ask, stage, min(_HEAR, ask.deadline) if stage == "build" else ask.deadline)
    except DistGuardError as verdict:
        return verdict
    return None


@contextmanager
def building(*, asks: bool = False) -> Iterator[None]:
    """Tell the other ranks if the with block, which builds a runner, raises.

    What is built inside another such with block is a part of that.

    Args:
        asks: the block itself asks the other ranks: what the running code asked for before, and
            built nothing with, is over.

    Raises:
        RankFailed, AgreementTimeout: it raised because another rank failed, or is gone.
    """
    outer = _building.get()
    if outer is not None and not outer.is_over:
        yield
        return
    if asks:
        _forget_asked()
    block = _Block()
    token = _building.set(block)
    try:
        yield
    except BaseException as error:
        ask = asked()
        if ask is None:
            raise
        explain(ask, "build", error)
    finally:
        block.is_over = True
        _building.reset(token)
        _forget_asked()


def _forget_asked() -> None:
    ask = asked()
    if ask is not None:
        ask.has_built = True
        _asked.set(None)
        ask.ranks.state.end(ask.what)


def built() -> None:
    """Tell the other ranks that the runner is complete here, and wait until it is everywhere.

    Raises:
        RankFailed, AgreementTimeout, StoreLost: another rank's build failed, or did not end.
    """
    ask = asked()
    if ask is not None:
        with _store_errors(ask, "build"):
            _tell_and_await(ask, "build", {})


def asked() -> Optional[Ask]:
    """What the running code builds a runner with."""
    ask = _asked.get()
    return None if ask is None or ask.has_built else ask


def has_turn() -> bool:
    """Whether the running code is in a turn."""
    ask = _turn_in_force()
    return ask is not None and not ask.has_left_turn


def _turn_in_force() -> Optional[Ask]:
    """The turn that the running execution carries, be it over or not."""
    execution = _core.current_execution()
    return None if execution is None else execution.turn


def close(ranks: Ranks, seconds: float) -> None:
    """The process exits: end the reader, within ``seconds``.

    A daemon thread that comes back from a call into torch after the interpreter has gone aborts.
    """
    ranks.state.lose(failures.lost("this process exits"))
    with suppress(Exception):
        if ranks.state.is_reading():
            ranks.write({"name": "(exit)", "round": 0, "stage": "build", "failure": None})
        until = time.monotonic() + seconds
        for thread in threading.enumerate():
            if thread.name == _READER:
                _join(thread, until)


def _join(thread: threading.Thread, until: float) -> None:
    """Join a thread, also one that another thread is just starting: that cannot be joined yet."""
    while thread in threading.enumerate():
        left = until - time.monotonic()
        if left <= 0:
            return
        try:
            thread.join(left)
        except RuntimeError:
            time.sleep(0.001)
