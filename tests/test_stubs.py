"""modelq/_core.pyi says what the extension has: the same names, and for functions the same parameters in the same order."""
import ast
import inspect
from pathlib import Path

import modelq
import modelq._core as core

STUB = ast.parse((Path(modelq.__file__).parent / "_core.pyi").read_text())


def stub_parameters(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    """(name, has a default) of each parameter but self."""
    args = node.args
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    both = list(zip(positional, defaults)) + list(zip(args.kwonlyargs, args.kw_defaults))
    return [(argument.arg, default is not None) for argument, default in both if argument.arg not in ("self", "cls")]


def real_parameters(function) -> list[tuple[str, bool]] | None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return None
    return [(p.name, p.default is not p.empty) for p in signature.parameters.values() if p.name not in ("self", "$self")]


def overloads_left_out(body):
    return {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_name_is_in_the_stub_and_no_other():
    stated = {node.name for node in STUB.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stated |= {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    real = {name for name in dir(core) if name == "__version__" or name.startswith("_alloc") or not name.startswith("_")}
    assert real - stated == set(), "missing from modelq/_core.pyi"
    assert stated - real == set(), "in modelq/_core.pyi only"


def test_functions_have_the_parameters_that_the_stub_says():
    for name, node in overloads_left_out(STUB.body).items():
        if isinstance(node, ast.FunctionDef):
            real = real_parameters(getattr(core, name))
            assert real is not None, f"{name}: its docstring must begin with '{name}(...)\\n--\\n\\n'"
            assert [p for p, _ in real] == [p for p, _ in stub_parameters(node)], name
            assert real == stub_parameters(node), f"{name}: defaults differ"


def test_methods_have_the_parameters_that_the_stub_says():
    for name, node in overloads_left_out(STUB.body).items():
        if not isinstance(node, ast.ClassDef):
            continue
        kind = getattr(core, name)
        real_names = {attribute for attribute in vars(kind) if not attribute.startswith("_")}
        stated = overloads_left_out(node.body)
        fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        assert real_names - fields - {n for n in stated if not n.startswith("_")} == set(), f"{name}: missing from the stub"
        for method, item in stated.items():
            real = real_parameters(getattr(kind, method))
            if real is not None and not method.startswith("__") and callable(getattr(kind, method)):
                assert [p for p, _ in real] == [p for p, _ in stub_parameters(item)], f"{name}.{method}"
