"""Every public call says what it takes, what it gives and what it raises, and the examples in docstrings and in docs/ run."""
import doctest
import importlib
import inspect
import re
import shutil
import textwrap
from pathlib import Path

import pytest

import modelq

DOCS = Path(__file__).resolve().parents[1] / "docs"
PUBLIC = ["modelq", "modelq.quantization", "modelq.quantization.config", "modelq.quantization.utils", "modelq.export", "modelq.calib",
          "modelq.nn", "modelq.utils", "modelq.utils.dataset_utils", "modelq.verify", "modelq.plots"]
OBVIOUS = {"self", "model"}
WITH_EXAMPLES = ["modelq.calib", "modelq.packed_array", "modelq.config", "modelq.array_files"]


def public_things():
    """(name, function, class or property) of what users import and of its methods, each once."""
    seen = set()
    for place in PUBLIC:
        module = importlib.import_module(place)
        names = getattr(module, "__all__", None) or [name for name, thing in vars(module).items()
                                                     if name[0] != "_" and getattr(thing, "__module__", "") == place]
        for name in names:
            thing = getattr(module, name)
            if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing in seen:
                continue
            seen.add(thing)
            yield f"{place}.{name}", thing
            if inspect.isclass(thing):
                yield from methods_of(f"{place}.{name}", thing, seen)


def methods_of(name, cls, seen):
    for attribute, member in inspect.getmembers(cls):
        function = member.fget if isinstance(member, property) else member
        if (attribute[0] == "_" and attribute != "__call__") or not inspect.isfunction(function) or function in seen:
            continue
        if function.__module__.startswith("modelq"):
            seen.add(function)
            yield f"{name}.{attribute}", member


THINGS = dict(public_things())


def test_the_walk_finds_what_there_is():
    assert {"modelq.load", "modelq.Model", "modelq.Model.generate", "modelq.quantization.quantize", "modelq.quantization.auto_quantize",
            "modelq.export.export_hf_checkpoint", "modelq.calib.MaxCalibrator.collect", "modelq.nn.TensorQuantizer.amax",
            "modelq.utils.dataset_utils.get_dataset_dataloader"} <= THINGS.keys() and len(THINGS) > 100


@pytest.mark.parametrize("name", THINGS)
def test_it_says_what_it_is_takes_and_raises(name):
    thing = THINGS[name]
    said = inspect.cleandoc(thing.__doc__ or "")
    assert len(said) > 10 and said.rstrip()[-1] in ".`\"])};0123456789", "a docstring of whole sentences"
    if inspect.isclass(thing):      # what one takes is what its attributes are
        return
    function = thing.fget if isinstance(thing, property) else thing
    parameters, code = inspect.signature(function).parameters.values(), textwrap.dedent(inspect.getsource(function))
    unnamed = [p.name for p in parameters if p.name not in OBVIOUS and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
               and not re.search(rf"\b{p.name}\b", said)]
    assert not unnamed, "its docstring does not name them"
    unsaid = [error for error in set(re.findall(r"raise (\w+Error)\(", code)) if error not in said]
    assert not unsaid, "its docstring does not say when it raises them"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


def test_there_are_no_others():
    """Modules with examples are all in the list above."""
    found = {path for path in Path(modelq.__file__).parent.rglob("*.py") if re.search(r"^ +>>> ", path.read_text(), flags=re.M)}
    names = {".".join(("modelq", *path.relative_to(Path(modelq.__file__).parent).with_suffix("").parts)) for path in found}
    assert names == set(WITH_EXAMPLES)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_examples_in_docs(page, tiny_checkpoint, tmp_path, monkeypatch):
    """`>>>` on a page runs where the checkpoint that it names is."""
    shutil.copytree(tiny_checkpoint, tmp_path / "path" / "to" / "checkpoint", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0 and tried == page.read_text(encoding="utf-8").count("    >>> ") and (tried > 20 or page.stem != "quickstart")
