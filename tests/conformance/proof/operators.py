"""Mistakes that nobody chose: operators that change one place of a source, as mutation testing does.

What is said to a user (messages, docstrings, types) is left alone, and so is what names things.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

__all__ = ["Change", "changes"]

_Node = TypeVar("_Node", bound=ast.AST)


@dataclass(frozen=True)
class Change:
    """One change of one source.

    Args:
        key: Its name: where it is, and what becomes what; the same as long as the place is.
        operator: Which operator made it.
        line: The line of the place.
        tree: The whole source.
        old: What is changed.
        new: What takes its place.
    """

    key: str
    operator: str
    line: int
    tree: ast.Module = field(repr=False)
    old: ast.expr | ast.stmt = field(repr=False)
    new: ast.expr | ast.stmt = field(repr=False)

    @property
    def source(self) -> str:
        """The changed source."""
        return ast.unparse(_replaced(self.tree, self.old, self.new))


_NAMES: Final = {
    "SUM": "PRODUCT",
    "MAX": "MIN",
    "MIN": "MAX",
    "any": "all",
    "all": "any",
    "min": "max",
    "max": "min",
    "maximum": "minimum",
    "zeros_like": "ones_like",
    "no_grad": "enable_grad",
    "enable_grad": "no_grad",
    "global_rank": "local_rank",
    "local_rank": "global_rank",
    "node_rank": "local_rank",
    "world_size": "local_world_size",
    "local_world_size": "world_size",
}
_TEXTS: Final = {"mean": "sum", "sum": "mean", "max": "min", "min": "max"}
_COPIES: Final = frozenset({"clone", "detach", "contiguous", "cpu", "copy"})
_COMPARED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_SAID: Final = frozenset({"where", "got", "instead", "what", "option", "known", "description", "stacklevel"})
"""Keyword arguments that only say something."""


def changes(source: str, module: str, within: frozenset[str] | None = None) -> list[Change]:
    """Give every change of a source, each once, in the order of the lines.

    Args:
        source: The source.
        module: How the keys name it.
        within: The names at the top level to stay within; ``None`` is all.
    """
    tree = ast.parse(source)
    found: list[Change] = []
    seen: Counter[str] = Counter()
    for place, scope in _places(tree, within):
        for operator, new in _variants(place, scope):
            before = _shown(place)
            after = _shown(new)
            if before == after:
                continue
            key = f"{module}.{scope.name}: {before} -> {after}"
            seen[key] += 1
            if seen[key] > 1:
                key += f" #{seen[key]}"
            found.append(Change(key, operator, place.lineno, tree, place, new))
    return sorted(found, key=lambda one: (one.line, one.key))


def _shown(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-20:]}"


@dataclass(frozen=True)
class _Scope:
    name: str = ""
    method: bool = False


def _places(tree: ast.Module, within: frozenset[str] | None) -> Iterator[tuple[ast.expr | ast.stmt, _Scope]]:
    for node in tree.body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = target.id if isinstance(target, ast.Name) else None
        if name is None or name == "__all__" or (within is not None and name not in within):
            continue
        yield from _inside(node, _Scope(name))


def _inside(  # noqa: C901, PLR0912 - one branch for each kind of node
    node: ast.AST, scope: _Scope
) -> Iterator[tuple[ast.expr | ast.stmt, _Scope]]:
    """Walk through what runs: no annotations, decorators, docstrings, imports or messages."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        inner = scope if scope.name.rpartition(".")[2] == node.name else _Scope(f"{scope.name}.{node.name}")
        if node.name in {"__repr__", "__reduce__"}:
            return
        arguments = node.args.args if isinstance(node, ast.FunctionDef) else []
        inner = _Scope(inner.name, bool(arguments) and arguments[0].arg == "self")
        for child in node.body:
            yield from _inside(child, inner)
        return
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or _is_text(node):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node, scope
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "type", "decorator_list", "handlers"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.keyword):
                if child.arg not in _SAID:
                    yield from _inside(child.value, scope)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    yield from _inside(part, scope)
            elif isinstance(child, ast.AST):
                yield from _inside(child, scope)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _variants(node: ast.expr | ast.stmt, scope: _Scope) -> Iterator[tuple[str, ast.expr | ast.stmt]]:
    if isinstance(node, ast.stmt):
        yield from _statements(node, scope)
    else:
        yield from _expressions(node)


def _statements(node: ast.stmt, scope: _Scope) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete | ast.Raise | ast.For) and not _yields(node):
        yield "drop a statement", ast.Pass()
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
        yield "drop a statement", ast.Pass()
    if isinstance(node, ast.If | ast.While):
        yield "negate a condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Try) and node.finalbody:
        yield "forget an undo", _with(node, finalbody=[ast.Pass()])
    if isinstance(node, ast.With):
        yield "drop a context", ast.If(ast.Constant(True), node.body, []) if _needless(node) else node
    if isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
        yield "swap an operation", _with(node, op=_COMPUTED[type(node.op)]())
    if isinstance(node, ast.Return) and node.value is not None and scope.method and _computes(node.value):
        kept = ast.parse('self.__dict__.setdefault("_stale", 0)', mode="eval").body
        assert isinstance(kept, ast.Call)
        kept.args[0] = ast.Constant(f"_stale_{scope.name.rpartition('.')[2]}")
        kept.args[1] = node.value
        yield "reuse a stale value", ast.Return(kept)


def _yields(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Yield | ast.YieldFrom) for one in ast.walk(node))


def _needless(node: ast.With) -> bool:
    return all(item.optional_vars is None for item in node.items)


def _computes(node: ast.expr) -> bool:
    return any(isinstance(one, ast.Call | ast.BinOp | ast.Subscript) for one in ast.walk(node))


def _expressions(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:  # noqa: C901, PLR0912 - one for each operator
    match node:
        case ast.IfExp():
            yield "negate a condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            for index, part in enumerate(node.generators):
                if part.ifs:
                    new = copy.deepcopy(node)
                    new.generators[index].ifs = []
                    yield "drop a condition", new
        case ast.BoolOp():
            swapped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "swap and with or", _with(node, op=swapped)
        case ast.UnaryOp(op=ast.Not()):
            yield "negate a condition", node.operand
        case ast.Compare(ops=[operation]) if type(operation) in _COMPARED:
            yield "compare otherwise", _with(node, ops=[_COMPARED[type(operation)]()])
        case ast.BinOp() if type(node.op) in _COMPUTED:
            yield "swap an operation", _with(node, op=_COMPUTED[type(node.op)]())
        case ast.Constant(value=bool(value)):
            yield "flip a constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "off by one", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "double a number", ast.Constant(value * 2 or 1.0)
        case ast.Constant(value=str(value)) if value in _TEXTS:
            yield "swap a name", ast.Constant(_TEXTS[value])
        case ast.Attribute() if node.attr in _NAMES and isinstance(node.ctx, ast.Load):
            yield "swap a name", _with(node, attr=_NAMES[node.attr])
        case ast.Name() if node.id in _NAMES and isinstance(node.ctx, ast.Load) and "rank" not in node.id:
            yield "swap a name", _with(node, id=_NAMES[node.id])
        case ast.Call():
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _SAID:
            yield "ignore an argument", _with(node, keywords=node.keywords[:index] + node.keywords[index + 1 :])
    if isinstance(node.func, ast.Attribute) and node.func.attr in _COPIES and not node.args:
        yield "drop a copy", node.func.value
    if isinstance(node.func, ast.Name) and node.func.id in {"sorted", "reversed"} and len(node.args) == 1:
        yield "drop an order", ast.Call(ast.Name("list", ast.Load()), node.args, [])


def _with(node: _Node, **fields: object) -> _Node:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


class _Replacer(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        """Put the new node in the place of the old one."""
        return self._new if node is self._old else super().visit(node)


def _replaced(tree: ast.Module, old: ast.AST, new: ast.AST) -> ast.Module:
    """Give the tree with one node replaced, and leave the tree as it is."""
    places = {id(one): index for index, one in enumerate(ast.walk(tree))}
    mirrored = copy.deepcopy(tree)
    twin = list(ast.walk(mirrored))[places[id(old)]]
    _Replacer(twin, copy.deepcopy(new)).visit(mirrored)
    return ast.fix_missing_locations(mirrored)
