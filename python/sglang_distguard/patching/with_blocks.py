"""Put the body of functions into a with block, in place and without an additional frame.

``def f(self, x): BODY`` becomes ``def f(self, x): with MANAGER(self): BODY``. Nothing else differs:
name, parameters, file and lines stay the same. A docstring stays a docstring.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import NamedTuple, Optional

from sglang_distguard.patching.syntax import Function


class Block(NamedTuple):
    """The with block that a function's body runs in.

    Attributes:
        manager: name of a module global that is called with the argument and returns a context
            manager.
        argument: name of a parameter; None for the first.
    """

    manager: str
    argument: Optional[str]


class Enclose(ast.NodeTransformer):
    """Enclose the functions in ``blocks``, by qualified name; ``visit`` takes the whole module."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = blocks
        self._path: list[str] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._path.append(node.name)
        self.generic_visit(node)
        self._path.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: Function) -> ast.AST:
        # Functions inside functions have no qualified name by which ``blocks`` could select them.
        assert not isinstance(node, ast.Lambda)
        block = self._blocks.get(".".join([*self._path, node.name]))
        if block is not None:
            documented = ast.get_docstring(node, clean=False) is not None
            head, body = node.body[:documented], node.body[documented:]
            body = body or [ast.copy_location(ast.Pass(), head[0])]
            node.body = [*head, _with(node, block, body)]
        return node


def _with(function: Function, block: Block, body: list[ast.stmt]) -> ast.With:
    argument = block.argument
    if argument is None:
        argument = [*function.args.posonlyargs, *function.args.args][0].arg
    name, given = ast.Name(block.manager, ast.Load()), ast.Name(argument, ast.Load())
    item = ast.withitem(ast.Call(name, [given], []))
    made = ast.With(items=[item], body=body)
    for node in (made, item.context_expr, name, given):
        ast.copy_location(node, body[0])
    return made
