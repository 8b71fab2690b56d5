"""What Triton's interpreter hides, which runs one program at a time and fills no large memory, by the sources alone.

Offsets: a product of two numbers that grow with a sequence or model is int64 where it becomes part of an address.
Threads: memory that a loop both writes and reads has a barrier wherever one turns into the other, as other threads may
have written what a thread reads.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "kernels" / "triton_kernels"
READS, WRITES = {"load": 0, "load_rows": 0}, {"store": 0, "store_rows": 0}
"""Functions by which memory is read and written, and their argument that is the address."""
ROWS_OF = {"load_rows": 1, "store_rows": 2}
"""Those that take the number of a row beside it."""
SMALL = {
    # Heads, lists and blocks are far fewer than 2^31.
    "i_kv_head * share", "i_kv_head * scores.num_blocks", "i_head * num_documents", "i_search * num_groups",
    "num_down * num_across", "i_group * num_tiles", "tl.load(portion.part + i_group) * num_tiles",
    "tl.load(plan.lists.group + i_head) * plan.num_tiles", "scores.heads * num_documents",
    # Rows and tokens of a sequence are, too, and columns of a state.
    "i_chunk * chunk_rows", "i_span * span_rows", "tl.program_id(2) * COLUMNS",
    "tl.program_id(0) // HEADS * BLOCK", "tl.program_id(0) % HEADS * WIDTH", "i_head * num_tokens",
    # Places within a tile, whose start is int64.
    "o_nth[:, None] * x.row_stride", "o_row[:, None] * width", "o_row[:, None] * half", "o_row * heads",
    "o_row * heads * width", "o_row * token_stride", "o_a[:, None] * b.width", "step * q.column_stride",
    "step * scores.num_blocks",
    # int64 as they come: the number of a row of a head, and of a token.
    "o_result[:, None] * like.width", "i_token * heads", "i_token * heads * width", "i_token * token_stride",
}  # fmt: skip
"""Products that are int32, or whose int64 comes from a caller."""
OWN = {("linear_attention.span_outputs", "out.pointer")}
"""Memory, by kernel, each row of which a loop meets once: nothing comes back to a thread that another has written."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function of Triton's language, of a file."""

    file: str
    tree: ast.FunctionDef

    @cached_property
    def parameters(self) -> list[str]:
        return [argument.arg for argument in self.tree.args.args]

    @cached_property
    def values(self) -> dict[str, list[ast.expr]]:
        """What each local name is set to."""
        found: dict[str, list[ast.expr]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=True))
                    for name, value in pairs:
                        for of in ast.walk(name):
                            if isinstance(of, ast.Name):
                                found.setdefault(of.id, []).append(value)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, []).append(ast.BinOp(node.target, node.op, node.value))
        return found

    def expanded(self, value: ast.AST) -> Iterator[ast.AST]:
        """Yield the nodes of an expression and of what its names stand for, but for blocks of values and masks."""
        seen, left = set[str](), [value]
        while left:
            for node in ast.walk(left.pop()):
                yield node
                if isinstance(node, ast.Name) and not node.id.startswith(("b_", "m_")) and node.id not in seen:
                    seen.add(node.id)
                    left += self.values.get(node.id, [])

    def calls(self, tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
        """Yield the calls in the order of the source, each with the function's own name."""
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            yield call, name

    def memory(self, address: ast.expr, seen: frozenset[str] = frozenset()) -> set[str]:
        """Return the parameters that an address starts from: the left side of a sum, the first argument of a call."""
        if isinstance(address, ast.BinOp):
            return self.memory(address.left, seen)
        if isinstance(address, ast.Call):
            return set().union(*(self.memory(argument, seen) for argument in address.args[:1]))
        if isinstance(address, ast.Attribute):
            # Of a tuple of tensors, each is memory of its own.
            return {ast.unparse(address)}
        if not isinstance(address, ast.Name) or address.id in seen:
            return set()
        if address.id in self.parameters:
            return {address.id}
        seen |= {address.id}
        return set().union(*(self.memory(value, seen) for value in self.values.get(address.id, [])))

    def events(self, tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
        """Yield what happens in the order of the source: "barrier", or "read" or "write" with the memory."""
        for call, name in self.calls(tree):
            if name == "debug_barrier":
                yield "barrier", set()
            elif name in READS or name in WRITES:
                yield "read" if name in READS else "write", self.memory(call.args[0])
            elif (called := self.find(name)) is not None:
                given = dict(zip(called.parameters, call.args, strict=False))
                for kind, memory in called.events(called.tree):
                    yield kind, set().union(*(self.memory(given[x]) for x in memory if x in given))

    def find(self, name: str) -> "Function | None":
        """Return the function of a name: of this file or, if it has none, of another."""
        found = [function for function in FUNCTIONS if function.tree.name == name]
        return next((function for function in found if function.file == self.file), found[0] if found else None)

    @property
    def name(self) -> str:
        return f"{self.file}.{self.tree.name}"


def functions() -> Iterator[Function]:
    for path in sorted(FOLDER.glob("*.py")):
        for tree in ast.walk(ast.parse(path.read_text())):
            if isinstance(tree, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in tree.decorator_list):
                yield Function(file=path.stem, tree=tree)


FUNCTIONS = list(functions())


def large_products(function: Function) -> set[str]:
    """Return products of two numbers that are not known to be small, and not int64, in addresses."""
    # Of reads and writes, and those that are kept or handed on by names of addresses and offsets.
    addresses = [
        call.args[place]
        for call, name in function.calls(function.tree)
        for places in (READS, WRITES, ROWS_OF)
        if (place := places.get(name)) is not None and place < len(call.args)
    ]
    returned = [node.value for node in ast.walk(function.tree) if isinstance(node, ast.Return) and node.value]
    addresses += [value for value in returned if "o_" in ast.unparse(value) or "pointer" in ast.unparse(value)]
    addresses += [
        value for name, values in function.values.items() if name.startswith(("p_", "o_")) for value in values
    ]
    found = set[str]()
    for address in addresses:
        for node in function.expanded(address):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                sides = ast.unparse(node.left), ast.unparse(node.right)
                # A constant of the kernel times a few; programs are many.
                constant = any(x.isupper() or x.isdecimal() for x in sides) and not sides[0].startswith("tl.program_id")
                is_wide = any("int64" in ast.unparse(x) for x in function.expanded(node))
                if not constant and not is_wide:
                    found.add(ast.unparse(node))
    return found


def test_products_in_addresses_are_int64() -> None:
    found = {function.name: large_products(function) for function in FUNCTIONS}
    assert {name: new for name, products in found.items() if (new := products - SMALL)} == {}
    assert set().union(*found.values()) == SMALL, "these occur no more"


def unordered(function: Function) -> set[str]:
    """Return the memory that a loop of a function writes and reads, without a barrier from one to the other."""
    found = set[str]()
    for loop in ast.walk(function.tree):
        if not isinstance(loop, ast.For):
            continue
        events = [*function.events(loop)] * 2  # the next turn follows
        for memory in set().union(*(of for kind, of in events if kind == "write")):
            of_it = [kind for kind, of in events if kind == "barrier" or memory in of]
            found |= {memory for before, after in pairwise(of_it) if {before, after} == {"read", "write"}}
    return found


def test_barriers_are_between_writing_and_reading() -> None:
    found = {(function.name, memory) for function in FUNCTIONS for memory in unordered(function)}
    assert found == OWN
