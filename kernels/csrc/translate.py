"""Make a C++ header of `coefficient.py`, the one source of the loss mathematics.

    python translate.py coefficient.py coefficient.h

Named tuples become structs, functions become templates over their arguments, and what is a tensor
there, of numbers or of Booleans, is a `Real` for one token (`real.h`, which also has `tl`). Only
what the docstring of `coefficient.py` allows is known; anything else ends the build with its line.
"""

from __future__ import annotations

import ast
import sys
import zlib
from pathlib import Path

FIELDS = {"str": "std::string", "bool": "bool", "float": "double", "Any": "Real"}
TRUE = ' == "True"'
OPERATORS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|",
    ast.USub: "-", ast.Invert: "~", ast.And: "&&", ast.Or: "||", ast.Eq: "==", ast.NotEq: "!=",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip


class Translator:
    def __init__(self) -> None:
        self.structs: set[str] = set()

    def expression(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=str()):
                return f'"{node.value}"'
            case ast.Constant(value=int() | float()):
                return repr(float(node.value))
            case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value="inf" | "nan")]):
                return {"inf": "INFINITY", "nan": "NAN"}[node.args[0].value]
            case ast.Name():
                return node.id
            case ast.Attribute(value=ast.Name(id="tl")):
                return f"tl::{node.attr}"
            case ast.Attribute():
                return f"{self.expression(node.value)}.{node.attr}"
            case ast.Call(func=ast.Name() | ast.Attribute(), keywords=[]):
                opening, closing = "{}" if ast.unparse(node.func) in self.structs else "()"
                return self.expression(node.func) + opening + self.listed(node.args) + closing
            case ast.UnaryOp(op=op) if type(op) in OPERATORS:
                return f"({OPERATORS[type(op)]}{self.expression(node.operand)})"
            case ast.BinOp(op=op) if type(op) in OPERATORS:
                return self.joined(op, [node.left, node.right])
            case ast.BoolOp():
                return self.joined(node.op, node.values)
            case ast.Compare(ops=[op], comparators=[right]) if type(op) in OPERATORS:
                return self.joined(op, [node.left, right])
        raise SyntaxError(f"line {node.lineno}: no C++ for {ast.unparse(node)}")

    def joined(self, operator: ast.AST, operands: list[ast.expr]) -> str:
        return f"({f' {OPERATORS[type(operator)]} '.join(map(self.expression, operands))})"

    def listed(self, nodes: list[ast.expr]) -> str:
        return ", ".join(map(self.expression, nodes))

    def statement(self, node: ast.stmt, scalars: set[str]) -> str:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                return ""
            case ast.Assign(targets=[ast.Name(id=name)]):
                declared = "" if name in scalars else "auto "
                return f"{declared}{name} = {self.expression(node.value)};"
            case ast.Assign(targets=[ast.Tuple(elts=names)]):
                return f"std::tie({self.listed(names)}) = {self.expression(node.value)};"
            case ast.If():
                text = f"if ({self.expression(node.test)}) {{{self.block(node.body, scalars)}}}"
                return text + f" else {{{self.block(node.orelse, scalars)}}}"
            case ast.Return(value=ast.Tuple(elts=values)):
                return f"return std::tuple{{{', '.join(f'Real({v})' for v in map(self.expression, values))}}};"
            case ast.Return(value=ast.expr()):
                return f"return {self.expression(node.value)};"
        raise SyntaxError(f"line {node.lineno}: no C++ for {ast.unparse(node)}")

    def block(self, body: list[ast.stmt], scalars: set[str]) -> str:
        return "\n".join(["", *(self.statement(node, scalars) for node in body), ""])

    def function(self, node: ast.FunctionDef) -> str:
        parameters = [argument.arg for argument in node.args.args]
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        # A name whose fields are read is a struct, and declared where it gets its value.
        attributes = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
        structs = {part.value.id for part in attributes if isinstance(part.value, ast.Name)}
        declared = "".join(f"\nReal {name};" for name in sorted(stored - structs - {*parameters}))
        listed = ", ".join(
            f"auto {name}" if name in stored else f"const auto& {name}" for name in parameters
        )
        body = self.block(node.body, stored - structs)
        return f"auto {node.name}({listed}) {{{declared}{body}}}"

    def struct(self, node: ast.ClassDef) -> str:
        self.structs.add(node.name)
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        kinds = [ast.unparse(field.annotation) for field in fields]
        lines = [f"{FIELDS[k]} {f.target.id};" for k, f in zip(kinds, fields, strict=True)]
        if "Any" not in kinds:  # what a call brings, as texts or as numbers
            values = [f"from.at({i}){TRUE if k == 'bool' else ''}" for i, k in enumerate(kinds)]
            result = f"{node.name}{{{', '.join(values)}}}"
            lines.append(f"static {node.name} of(const auto& from) {{ return {result}; }}")
        return f"struct {node.name} {{\n" + "\n".join(lines) + "\n};"

    def module(self, source: str) -> str:
        parts = ['#pragma once\n#include "real.h"\nnamespace {']
        # So that nobody computes with the mathematics of another version.
        parts.append(f"constexpr int64_t SOURCE = {zlib.crc32(source.encode())};")
        for node in ast.parse(source).body:
            match node:
                case ast.ClassDef(bases=[ast.Name(id="NamedTuple")]):
                    parts.append(self.struct(node))
                case ast.FunctionDef():
                    parts.append(self.function(node))
                case ast.Assign(targets=[ast.Name(id=name)]) if name.isupper():
                    parts.append(f"constexpr double {name} = {self.expression(node.value)};")
        return "\n".join([*parts, "}"]) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(Translator().module(source.read_text()))
