"""Rules of the tree that a compiler does not check: which way includes and imports point, and how large things may be.

The sizes come from C code that people point at as readable (docs/architecture.md); a function over the limit is listed here by name, with
the reason, and there may be ten of them.
"""
import ast
import re
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["core", "format", "kernels", "quant", "calib", "model", "export", "backend", "py", "testing"]
LONGEST_FUNCTION, LONGEST_FILE, LONGEST_LINE, WIDEST_TABLE, MOST_PARAMETERS = 100, 700, 120, 150, 8
LONGEST_PYTHON_FILE, LONGEST_PYTHON_LINE = 300, 140
LONG_FUNCTIONS: dict[str, str] = {}     # name: why it is one loop of arithmetic that reads worse in pieces
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "huggingface_hub", "pandas", "scipy", "pyarrow", "ml_dtypes", "gguf",
         "tokenizers", "tqdm", "yaml", "rich", "jinja2"}

# What a part of modelq/ may import when it is imported itself: its own kind and those before it. Files not named are "model".
PYTHON_LAYERS = [{"_core", "_version", "algorithms", "attributes", "calib", "config", "cuda", "measure", "plot_labels", "plots", "presets", "progress", "rules",
                  "tables", "utils"},
                 {"checkpoint"}, {"model"}, {"quantization", "export"}, {"choices", "preset_table", "estimate"},
                 {"bench_commands", "chat_commands", "cli", "commands", "completion", "parsers", "quantize_commands", "report_commands",
                  "search_commands", "__main__", "__init__"}]

C_FILES = sorted(path for suffix in ("c", "h", "inc", "def") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))
CUDA_FILES = sorted(path for suffix in ("cu", "cuh", "h", "cc") for path in (ROOT / "cuda").rglob(f"*.{suffix}"))
CUDA_MAY_INCLUDE = {"core", "format", "kernels", "shim"}      # of csrc/ what both compilers read, and nothing that runs on a pool
PYTHON_FILES = sorted((ROOT / "modelq").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Function:
    file: str
    name: str
    lines: int
    parameters: int


def bare(text: str) -> str:
    """C without comments, strings and preprocessor lines; line breaks stay where they were."""
    text = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.M)


def count_parameters(signature: str) -> int:
    """Of the last parenthesised group."""
    end = signature.rindex(")")
    depth, count, start = 0, 1, end
    for start in range(end, -1, -1):
        depth += {")": 1, "(": -1}.get(signature[start], 0)
        count += signature[start] == "," and depth == 1
        if depth == 0:
            break
    return 0 if signature[start + 1:end].strip() in ("", "void") else count


def functions_of(text: str, file: str) -> list[Function]:
    text, found, depth, head_start, head, opened = bare(text), [], 0, 0, "", 0
    for position, character in enumerate(text):
        if character == "{":
            if depth == 0:
                head, opened = text[head_start:position], head_start
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                called = re.search(r"(\w+)\s*(?:\([^(){}]*\)\s*)?\([^{}]*\)\s*$", head)
                if called and "=" not in head and not re.match(r"\s*(typedef|struct|enum|union)\b[^(]*$", head):
                    first = opened + len(head) - len(head.lstrip())
                    found.append(Function(file, called.group(1), text.count("\n", first, position) + 1, count_parameters(head)))
                head_start = position + 1
        elif character == ";" and depth == 0:
            head_start = position + 1
    assert depth == 0, f"{file}: braces do not balance once comments and preprocessor lines are gone"
    return found


@cache
def functions() -> list[Function]:
    return [function for path in C_FILES + CUDA_FILES if path.suffix != ".def" for function in functions_of(path.read_text(), name(path))]


def test_the_counter_counts():
    text = 'static int f(int a, void (*g)(int, int), char c)\n{\n    if (a) { g(1, 2); } /* } */\n    return "}"[0];\n}\n' \
           "struct s { int x; };\nstatic const int t[] = { 1, 2 };\nvoid MQ_NAME(h)(void)\n{\n}\n"
    assert functions_of(text, "x.c") == [Function("x.c", "f", 5, 3), Function("x.c", "MQ_NAME", 3, 0)]


def test_functions_are_short():
    sizes = sorted(function.lines for function in functions())
    long = [f"{f.file}: {f.name} has {f.lines} lines" for f in functions() if f.lines > LONGEST_FUNCTION and f.name not in LONG_FUNCTIONS]
    assert not long
    assert len(LONG_FUNCTIONS) <= 10 and set(LONG_FUNCTIONS) <= {f.name for f in functions() if f.lines > LONGEST_FUNCTION}
    assert statistics.median(sizes) <= 20
    assert sizes[int(len(sizes) * 0.9)] <= 50


def test_functions_have_few_parameters():
    """But for cuBLASLt's own calls, which cuda/shim emulates."""
    own = [f for f in functions() if not f.name.startswith("cublasLt")]
    assert not [f"{f.file}: {f.name} has {f.parameters} parameters" for f in own if f.parameters > MOST_PARAMETERS]


@pytest.mark.parametrize("path", C_FILES, ids=name)
def test_c_file(path):
    text = path.read_text()
    lines = text.split("\n")
    layer = path.relative_to(ROOT / "csrc").parts[0]
    assert len(lines) <= LONGEST_FILE + 1, f"{len(lines)} lines"
    limit = WIDEST_TABLE if path.suffix == ".def" else LONGEST_LINE
    wide = [number for number, line in enumerate(lines, 1) if len(line) > limit]
    assert not wide, f"lines over {limit} columns: {wide}"
    for included in re.findall(r'#\s*include\s+"(\w+)/', text):
        assert LAYERS.index(included) <= LAYERS.index(layer), f"{layer}/ may not include {included}/"
    if layer not in ("py", "testing"):
        assert "Python.h" not in text
    if path.name != "ndarray.c":
        assert "numpy/" not in bare_includes(text), "only py/ndarray.c includes NumPy's headers"


@pytest.mark.parametrize("path", CUDA_FILES, ids=name)
def test_cuda_file(path):
    text = path.read_text()
    lines = text.split("\n")
    assert text.startswith("/*"), "a file says what it is"
    assert len(lines) <= LONGEST_FILE + 1, f"{len(lines)} lines"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not wide, f"lines over {LONGEST_LINE} columns: {wide}"
    assert set(re.findall(r'#\s*include\s+"(\w+)/', text)) <= CUDA_MAY_INCLUDE
    if path.name != "common.cuh" and "shim" not in path.parts:
        known = re.findall(r"<<<|cuda_runtime|\b__shared__\b|\bMQ_CUDA_SHIM\b", text)
        assert not known, f"only common.cuh knows which compiler reads it, but here is {known}"


def bare_includes(text: str) -> str:
    return "\n".join(re.findall(r"#\s*include\s+[<\"](.+?)[>\"]", text))


@pytest.mark.parametrize("path", [p for p in C_FILES if p.relative_to(ROOT / "csrc").parts[0] in ("py", "testing")], ids=name)
def test_python_api_use(path):
    text = bare(path.read_text())
    for begin, end in (("Py_BEGIN_ALLOW_THREADS", "Py_END_ALLOW_THREADS"),):
        assert len(re.findall(begin, text)) == len(re.findall(end, text))
        for body in re.findall(f"{begin}(.*?){end}", text, flags=re.S):
            assert not re.search(r"\breturn\b|\bgoto\b|\bPy[A-Z]\w+\(", body), "no return, goto or Python call without the GIL"
    borrowed = re.findall(r"\b(PyList_GetItem|PyDict_GetItem|PyDict_GetItemString|PyImport_AddModule)\b", text)
    assert not borrowed, "these give borrowed references: use a call that gives a new one"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_python_file(path):
    text = path.read_text()
    lines = text.split("\n")
    assert len(lines) <= LONGEST_PYTHON_FILE + 1, f"{len(lines)} lines"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_PYTHON_LINE]
    assert not wide, f"lines over {LONGEST_PYTHON_LINE} columns: {wide}"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) is not None or path.name == "_version.py", "a file says what it is"
    allowed = {"torch"} if "torch_models" in path.parts else set()       # imported for who has a torch model, and so torch
    heavy = [imported for imported in module_level_imports(tree) if imported.split(".")[0] in HEAVY - allowed]
    assert not heavy, f"imported when the module is: {heavy}"


def python_layer(part: str) -> int:
    named = [layer for layer, parts in enumerate(PYTHON_LAYERS) if part in parts]
    return named[0] if named else 2


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_python_imports_point_down(path):
    part = path.relative_to(ROOT / "modelq").with_suffix("").parts[0]
    for imported in module_level_imports(ast.parse(path.read_text())):
        if imported.startswith("modelq."):
            other = imported.split(".")[1]
            assert python_layer(other) <= python_layer(part), f"{part} may not import {other}"
            assert part != "utils" or other in ("utils", "_core"), "data knows nothing of models"


def module_level_imports(tree: ast.Module) -> list[str]:
    """What is imported when the module is: also inside if and try, but not inside a function, nor for type checking only."""
    found, queue = [], list(tree.body)
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"modelq.{alias.name}" for alias in node.names] if node.module == "modelq" else [node.module or ""]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    return found


def test_module_level_imports_are_found():
    code = "import a\ntry:\n    from b import c\nexcept ImportError:\n    import d\nif TYPE_CHECKING:\n    import e\n" \
           "class K:\n    import f\n    def m(self):\n        import g\n"
    assert sorted(module_level_imports(ast.parse(code))) == ["a", "b", "d", "f"]
