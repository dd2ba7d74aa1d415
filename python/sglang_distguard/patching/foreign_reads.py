"""Make functions read scoped attributes of other modules and of classes through their accessors.

``m.X`` becomes ``m._distguard_scoped_X.value``. ``C.X`` is changed alike, also as ``cls.X`` in a
class method of ``C``. ``from m import X`` inside a function imports the accessor and takes its
value. So the name has the value of the scope in which the function runs.
"""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterable, Iterator
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import Function, ScopeTransformer, accessor_name, own_nodes


class Elsewhere(ScopeTransformer):
    """Redirect the ``wanted`` (owner, attribute) pairs; ``visit`` takes the whole module.

    ``_meaning`` maps names at the node being visited to the module, or object of a module, that
    each means.
    """

    def __init__(
        self,
        source: ModuleSource,
        wanted: frozenset[tuple[str, str]],
        table: symtable.SymbolTable,
    ) -> None:
        super().__init__(table)
        self._source = source
        self._wanted = wanted
        self._meaning: dict[str, str] = {}
        self._outer: list[dict[str, str]] = []
        self._classes: list[str] = []

    def visit_Module(self, node: ast.Module) -> ast.AST:
        own = list(own_nodes(node))
        self._meaning = dict(_imported(own))
        for it in own:
            if isinstance(it, ast.ClassDef):
                self._meaning[it.name] = f"{self._source.module}.{it.name}"
        return super().generic_visit(node)

    def entering_class(self, node: ast.ClassDef) -> None:
        self._classes.append(node.name)

    def leaving_class(self, node: ast.ClassDef) -> None:
        self._classes.pop()

    def entering_function(self, node: Function) -> None:
        self._outer.append(self._meaning)
        self._meaning = {
            name: it for name, it in self._meaning.items() if not self.is_bound_here(name)
        }
        self._meaning |= dict(_imported(own_nodes(node)))
        if _is_class_method(node) and self._classes:
            first = [*node.args.posonlyargs, *node.args.args][0].arg
            self._meaning[first] = ".".join([self._source.module, *self._classes])

    def leaving_function(self, node: Function) -> None:
        self._meaning = self._outer.pop()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        found = [it for it in node.names if (node.module, it.name) in self._wanted]
        if not found:
            return node
        self._refuse_at_import(node, f"{node.module}.{found[0].name}")
        rest = [it for it in node.names if it not in found]
        made: list[ast.stmt] = [ast.ImportFrom(node.module, rest, 0)] if rest else []
        for alias in found:
            local = alias.asname or alias.name
            accessor = ast.alias(accessor_name(alias.name), local)
            value = ast.Attribute(ast.Name(local, ast.Load()), "value", ast.Load())
            made.append(ast.ImportFrom(node.module, [accessor], 0))
            made.append(ast.Assign([ast.Name(local, ast.Store())], value))
        return [ast.copy_location(it, node) for it in made]

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        owner = self._owner_of(node.value)
        if owner is None or (owner, node.attr) not in self._wanted:
            return node
        self._refuse_at_import(node, f"{owner}.{node.attr}")
        accessor = ast.Attribute(node.value, accessor_name(node.attr), ast.Load())
        ast.copy_location(accessor, node)
        return ast.copy_location(ast.Attribute(accessor, "value", node.ctx), node)

    def _owner_of(self, node: ast.expr) -> Optional[str]:
        """The dotted name of the module, or of the object in a module, that ``node`` means."""
        if isinstance(node, ast.Name):
            return self._meaning.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._owner_of(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    def _refuse_at_import(self, node: ast.stmt | ast.expr, name: str) -> None:
        if not self.in_function:
            raise NotSupported(
                f"{self._source.module}, line {node.lineno}, copies {name} when it is imported: "
                "every runner would see that copy",
                module=self._source.module,
            )


def _is_class_method(node: Function) -> bool:
    return not isinstance(node, ast.Lambda) and any(
        isinstance(it, ast.Name) and it.id == "classmethod" for it in node.decorator_list
    )


def _imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """Yield (name, its dotted meaning) of absolute imports; SGLang 0.5.23 has no other imports."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for it in node.names:
                first = it.name.partition(".")[0]
                yield (it.asname, it.name) if it.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for it in node.names:
                yield it.asname or it.name, f"{node.module}.{it.name}"
