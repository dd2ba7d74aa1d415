"""Makes functions read scoped attributes, of other modules and of classes, through their accessors.

``m.X`` becomes ``m._distguard_scoped_X.value``, and so does ``C.X``, also as ``cls.X`` in a class method
of ``C``; ``from m import X`` inside a function imports the accessor and takes its value, so that it is
the value of the scope in which the function runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Optional

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.source import ModuleSource
from sglang_distguard.patching.syntax import Function, accessor_name, bound_names, own_nodes


class Elsewhere(ast.NodeTransformer):
    """Redirects ``wanted``, (owner, attribute); ``visit`` the whole module.

    ``_meaning`` has the names that mean a module, or something of one, at the node being visited.
    """

    def __init__(self, source: ModuleSource, wanted: frozenset[tuple[str, str]]) -> None:
        self._source = source
        self._wanted = wanted
        self._meaning: dict[str, str] = {}
        self._classes: list[str] = []
        self._in_function = False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        own = list(own_nodes(node))
        self._meaning = dict(_imported(own))
        for it in own:
            if isinstance(it, ast.ClassDef):
                self._meaning[it.name] = f"{self._source.module}.{it.name}"
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._classes.append(node.name)
        self.generic_visit(node)
        self._classes.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._function(node)

    def _function(self, node: Function) -> ast.AST:
        # Decorators and defaults belong to the enclosing scope.
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.args = self.visit(node.args)
        outer = self._meaning, self._in_function
        bound = bound_names(node)
        self._meaning = {name: it for name, it in self._meaning.items() if name not in bound}
        self._meaning |= dict(_imported(own_nodes(node)))
        if _is_class_method(node) and self._classes:
            first = [*node.args.posonlyargs, *node.args.args][0].arg
            self._meaning[first] = ".".join([self._source.module, *self._classes])
        self._in_function = True
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [made for it in node.body for made in _statements(self.visit(it))]
        self._meaning, self._in_function = outer
        return node

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
        """The dotted name of what ``node`` is, if it is a module or something in one."""
        if isinstance(node, ast.Name):
            return self._meaning.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._owner_of(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    def _refuse_at_import(self, node: ast.stmt | ast.expr, name: str) -> None:
        if not self._in_function:
            raise NotSupported(
                f"{self._source.module}, line {node.lineno}, copies {name} when it is imported: every "
                "runner would see that copy",
                module=self._source.module,
            )


def _is_class_method(node: Function) -> bool:
    return not isinstance(node, ast.Lambda) and any(
        isinstance(it, ast.Name) and it.id == "classmethod" for it in node.decorator_list
    )


def _statements(made: ast.AST | list[ast.stmt]) -> list[ast.stmt]:
    return made if isinstance(made, list) else [made]  # type: ignore[list-item]


def _imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """(name, what it means) of absolute imports; SGLang 0.5.23 has no others."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for it in node.names:
                first = it.name.partition(".")[0]
                yield (it.asname, it.name) if it.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for it in node.names:
                yield it.asname or it.name, f"{node.module}.{it.name}"
