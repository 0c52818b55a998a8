"""The ten operators: what each puts in a node's place, and where it applies."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

OTHER_COMPARISON = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OTHER_DTYPE = {
    "float32": "bfloat16", "bfloat16": "float32", "float64": "float32", "float16": "float32", "int64": "int32", "int32": "int16",
    "uint64": "uint32", "uint32": "uint16", "uint16": "uint8", "uint8": "int8", "int8": "uint8",
}  # fmt: skip
AXIS_KEYWORDS = {
    "axis", "axes", "dim", "dimension", "in_axes", "out_axes", "split_axis", "concat_axis", "source", "destination",
    "scatter_dimension", "all_gather_dimension", "variable_axes",
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "max", "min", "any", "all", "argmax", "argmin", "argsort", "sort", "cumsum", "prod", "squeeze", "std"}
AXIS_FUNCTIONS = REDUCTIONS | {
    "stack", "concatenate", "expand_dims", "split", "softmax", "log_softmax", "logsumexp", "moveaxis", "swapaxes", "take",
    "take_along_axis", "roll", "repeat", "flip",
}  # fmt: skip
ARRAY_MODULES = {"jnp", "np", "lax", "nn"}
DTYPE_KEYWORDS = {"dtype", "param_dtype", "preferred_element_type"}
COMMUTATIVE = {"maximum", "minimum", "max", "min", "logical_and", "logical_or", "isclose", "gcd", "add", "multiply"}
CHANGES_TYPE = {
    "isinstance",
    "issubclass",
    "len",
    "range",
    "enumerate",
    "zip",
    "open",
    "super",
    "getattr",
    "hasattr",
    "iter",
    "next",
}
LOGS = {"print", "warn", "info", "warning", "debug", "error", "exception", "log", "say"}
ATOMS = (ast.Name, ast.Constant, ast.Attribute, ast.Call, ast.Subscript, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp)


@dataclass(frozen=True)
class Changes:
    """An operator that applies to a node: new nodes, any of which may stand in its place."""

    operator: str
    node: ast.AST
    new: list[ast.AST] = field(default_factory=list)

    def replacements(self, source: str, offsets) -> Iterator[str]:
        """The texts of the new nodes: as they stand in the source where they come from there."""
        for new in self.new:
            if isinstance(new, ast.stmt) or not hasattr(new, "lineno") or getattr(new, "changed", False):
                text = ast.unparse(new)
            else:
                start, end = offsets.span(new)
                text = source[start:end]
            bare = isinstance(new, (ast.stmt, *ATOMS)) and not isinstance(new, ast.Tuple)
            yield text if bare else f"({text})"


def changes_of(node: ast.AST, context: str, imported: frozenset[str]) -> Iterator[Changes]:
    """Every operator that applies to the node where it stands."""
    for operator, rule in RULES.items():
        new = [n for n in rule(node, context, imported) if n is not None]
        if new:
            yield Changes(operator, node, new)
    if isinstance(node, ast.Compare):  # one site for each of its signs
        for i in range(len(node.ops)):
            yield Changes("comparison", node, [_with(node, ops=_replaced(node.ops, i, OTHER_COMPARISON[type(node.ops[i])]()))])


def context_of(parent: ast.AST, field_: str, child: ast.AST, context: str) -> str:
    """What a child is to its parent: an "axis", a "default" value, or nothing special."""
    if isinstance(parent, ast.keyword):
        return "axis" if parent.arg in AXIS_KEYWORDS else "default" if parent.arg in ("default", "default_factory") else ""
    if isinstance(parent, ast.arguments) or (isinstance(parent, ast.AnnAssign) and field_ == "value"):
        return "default" if field_ in ("defaults", "kw_defaults", "value") else ""
    if isinstance(parent, ast.Call) and field_ == "args":
        return "axis" if _is_axis_argument(parent, child) else ""
    if isinstance(parent, ast.UnaryOp) and _integer(parent) is not None:
        return "signed"  # the number is the minus and the digits together
    return context if isinstance(parent, ast.Tuple) and context == "axis" else ""


def is_text(parent: ast.AST, field_: str, child: ast.AST) -> bool:
    """Whether a child is for people or for type checkers only, or out of any test's reach."""
    if isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom) or field_ in ("annotation", "returns", "msg"):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
        return True
    if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__":
        return True
    called = _called(child.value if isinstance(child, ast.Expr) else child)
    if called in LOGS or called.endswith(("Error", "Warning")):
        return True
    return _called(parent) == "check" and field_ == "args" and child is not parent.args[0]


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _is_axis_argument(call: ast.Call, argument: ast.AST) -> bool:
    name = _called(call)
    if name not in AXIS_FUNCTIONS or not isinstance(call.func, ast.Attribute):
        return False
    of_module = isinstance(call.func.value, ast.Name) and call.func.value.id in ARRAY_MODULES
    return any(argument is a for a in call.args[1 if of_module or name not in REDUCTIONS | {"swapaxes", "repeat"} else 0 :])


def _with(node: ast.AST, **fields) -> ast.AST:
    new = copy.copy(node)
    for name, value in {**fields, "changed": True}.items():
        setattr(new, name, value)
    return new


def _replaced(items: list, i: int, item) -> list:
    return [*items[:i], item, *items[i + 1 :]]


def _integer(node: ast.AST) -> int | None:
    """The integer that a constant, or minus a constant, stands for."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _integer(node.operand)
        return None if value is None else -value
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _no_number(*nodes: ast.AST) -> bool:
    """Whether one of the operands is seen to be text or a list, to which + and / mean something else."""
    return any(
        isinstance(n, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp | ast.Dict)
        or (isinstance(n, ast.Constant) and isinstance(n.value, str | bytes))
        for n in nodes
    )


def _operands(node: ast.BinOp | ast.AugAssign) -> tuple[ast.AST, ...]:
    return (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)


def sign(node, context, imported):
    """+ becomes -, - becomes +, and a minus before a term goes."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub) and not _no_number(*_operands(node)):
        yield _with(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _integer(node) is None:
        yield node.operand


def off_by_one(node, context, imported):
    """An integer becomes the next, or the one before."""
    value = _integer(node)
    if value is None or context:
        return
    yield ast.Constant(value + 1)
    if value > 0:
        yield ast.Constant(value - 1)


def dropped_term(node, context, imported):
    """One operand of a sum, product, quotient, or of "and" and "or", is all that stays."""
    if isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else _with(node, values=rest)
    elif isinstance(node, ast.BinOp) and not _no_number(node.left, node.right):
        yield node.left
        if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
            yield node.right
    elif isinstance(node, ast.AugAssign) and not _no_number(node.value):
        yield ast.Pass()


def dropped_call(node, context, imported):
    """A call becomes its first argument, or the object that it is a method of; a call for its effect goes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    name = _called(node)
    if not name or name in CHANGES_TYPE or name in ("stop_gradient", "astype", "check") or name[0].isupper():
        return
    root = node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    of_module = isinstance(root, ast.Name) and (root.id in imported or root.id == "self")
    if isinstance(node.func, ast.Name) or of_module:
        yield node.args[0] if node.args and not isinstance(node.args[0], ast.Starred) else None
    elif isinstance(node.func, ast.Attribute):
        yield node.func.value


def axis(node, context, imported):
    """An axis becomes its neighbour; of several, the last goes."""
    if context != "axis":
        return
    value = _integer(node)
    if value is not None:
        yield ast.Constant({0: 1, -1: -2}.get(value, value - 1 if value > 0 else value + 1))
    elif isinstance(node, ast.Tuple) and len(node.elts) > 1 and all(_integer(e) is not None for e in node.elts):
        yield _with(node, elts=node.elts[:-1])


def dtype(node, context, imported):
    """A type becomes a narrower or wider one; a cast goes; a call's type is left to its default."""
    if isinstance(node, ast.Attribute) and node.attr in OTHER_DTYPE and getattr(node.value, "id", "") in ("jnp", "np"):
        other = OTHER_DTYPE[node.attr] if node.value.id == "jnp" or node.attr != "float32" else "float16"
        yield _with(node, attr=other)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in OTHER_DTYPE:
        yield ast.Constant(OTHER_DTYPE[node.value])
    elif _called(node) == "astype":
        yield node.func.value
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg in DTYPE_KEYWORDS and not isinstance(keyword.value, ast.Constant):
                yield _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def default(node, context, imported):
    """A default is turned round, one more, or twice as large."""
    if context != "default" or not isinstance(node, ast.Constant):
        return
    if type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif type(node.value) is int:
        yield ast.Constant(node.value + 1)
    elif type(node.value) is float:
        yield ast.Constant(node.value * 2 or 1.0)


def swapped_arguments(node, context, imported):
    """Two neighbouring arguments change places."""
    name = _called(node)
    if not name or name in COMMUTATIVE or name in CHANGES_TYPE or name == "check":
        return
    for i in range(min(len(node.args) - 1, 2)):
        pair = node.args[i : i + 2]
        if not any(isinstance(a, ast.Starred) for a in pair):
            yield _with(node, args=[*node.args[:i], pair[1], pair[0], *node.args[i + 2 :]])


def removed_stop_gradient(node, context, imported):
    """A gradient flows where it was stopped."""
    if _called(node) == "stop_gradient":
        yield node.args[0]


Rule = Callable[[ast.AST, str, frozenset[str]], Iterator[ast.AST | None]]
RULES: dict[str, Rule] = {  # and "comparison", which is one site for each sign
    "sign": sign, "off by one": off_by_one, "dropped term": dropped_term, "dropped call": dropped_call, "axis": axis,
    "dtype": dtype, "default": default, "swapped arguments": swapped_arguments, "removed stop_gradient": removed_stop_gradient,
}  # fmt: skip
OPERATORS = ("comparison", *RULES)
