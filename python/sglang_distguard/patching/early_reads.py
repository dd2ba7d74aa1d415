"""Functions that make all their reads of scoped globals at once, before any other code can run.

Such a function is right without a change while no scope exists. Its frame began in the default
scope, and only code that it calls could lead it into another one, after its reads. So it keeps its
own code until the first scope, and a forward of the only runner reads as in plain SGLang
(docs/COST.md). Most are getters: `return _CONTEXT`.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from types import CodeType

from sglang_distguard.patching.instructions import ATTRIBUTES, GLOBALS, reached

_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
#: Instructions that run no other code (CPython 3.11 to 3.14). A global is stored in place of an
#: object that is dropped: its destructor is the one exception.
_RUN_NOTHING = frozenset(
    [
        "RESUME",
        "NOP",
        "NOT_TAKEN",
        "EXTENDED_ARG",
        "PUSH_NULL",
        "COPY",
        "SWAP",
        "IS_OP",
        "LOAD_CONST",
        "LOAD_SMALL_INT",
        "LOAD_ASSERTION_ERROR",
        "LOAD_COMMON_CONSTANT",
        "LOAD_GLOBAL",
        "STORE_GLOBAL",
        "LOAD_FAST",
        "LOAD_FAST_BORROW",
        "LOAD_FAST_CHECK",
        "JUMP_FORWARD",
        "POP_JUMP_IF_NONE",
        "POP_JUMP_IF_NOT_NONE",
        "POP_JUMP_FORWARD_IF_NONE",
        "POP_JUMP_FORWARD_IF_NOT_NONE",
    ]
)
_END = frozenset(["RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"])
_ALWAYS = frozenset(["JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"])


def are_early(
    code: CodeType, names: frozenset[str], others: frozenset[str], fixed: frozenset[str]
) -> bool:
    """Whether a module's function uses ``names`` only before other code can run in its frame.

    Args:
        code: as Python compiles SGLang's text.
        names: scoped globals of the module.
        others: flags, and attributes of other owners, that must be reached through accessors.
        fixed: classes and modules that the module names; reading their attributes runs nothing.
    """
    if not code.co_flags & inspect.CO_OPTIMIZED or code.co_flags & _SUSPENDED:
        return False
    if code.co_exceptiontable or any(isinstance(it, CodeType) for it in code.co_consts):
        return False
    if reached(code, GLOBALS + ATTRIBUTES, others) or not reached(code, GLOBALS, names):
        return False
    instructions = list(dis.get_instructions(code))
    at = {it.offset: index for index, it in enumerate(instructions)}
    pending, seen = [(0, False)], set()
    while pending:
        index, late = step = pending.pop()
        if step in seen:
            continue
        seen.add(step)
        it = instructions[index]
        if late and it.opname in GLOBALS and it.argval in names:
            return False
        late = late or not _runs_nothing(instructions, index, fixed)
        pending += ((following, late) for following in _after(instructions, index, at))
    return True


def _runs_nothing(
    instructions: Sequence[dis.Instruction], index: int, fixed: frozenset[str]
) -> bool:
    it, before = instructions[index], instructions[index - 1]
    if it.opname == "LOAD_ATTR" and not it.is_jump_target:  # such as a member of an enumeration
        return before.opname == "LOAD_GLOBAL" and before.argval in fixed
    return it.opname in _RUN_NOTHING


def _after(
    instructions: Sequence[dis.Instruction], index: int, at: dict[int, int]
) -> Iterator[int]:
    it = instructions[index]
    if it.opcode in dis.hasjrel or it.opcode in dis.hasjabs:
        yield at[it.argval]
    if it.opname not in _END and it.opname not in _ALWAYS:
        yield index + 1
