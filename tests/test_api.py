"""The public names: each can be had, shows how it is used, and costs no import before its use."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sparseffn_jax as sf

HEAVY = {
    "datasets", "grain", "lm_eval", "matplotlib", "orbax", "rich", "tensorboardX", "transformers",
}  # fmt: skip


def names_with_docstrings():
    """Yields (name, home, value) of classes and functions; a constant has no docstring."""
    for name, home in sf._HOMES.items():
        value = getattr(sf, name)
        if callable(value):
            yield name, home.partition(":")[0], value


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout.split()


def loaded_by(code):
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return HEAVY.intersection(run_python(code))


def test_every_public_name_has_an_example():
    without = [
        name
        for name, home, value in names_with_docstrings()
        if "Example:\n" not in (value.__doc__ or "")
    ]
    assert without == []


def test_every_example_is_run():
    finder, missed = doctest.DocTestFinder(exclude_empty=True), []
    for name, home, value in names_with_docstrings():
        if "Example:\n" not in (value.__doc__ or ""):
            continue
        module = importlib.import_module(f"sparseffn_jax.{home}")
        tests = {test.name: test for test in finder.find(module)}
        found = tests.get(f"{module.__name__}.{value.__name__}")
        if found is None or not found.examples:
            missed.append(name)
    assert missed == []


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import sparseffn_jax") == set()


def test_a_layer_alone_loads_nothing_heavy():
    loaded = loaded_by("import sparseffn_jax as sf; sf.SparseFFN, sf.SparseFFNConfig")
    # Flax itself prints its tables with rich.
    assert loaded <= {"rich"}


def test_every_name_can_be_had():
    assert set(sf.__all__) == {*sf._HOMES, "__version__"}
    assert set(sf.__all__) <= set(dir(sf))
    for name in sf.__all__:
        assert getattr(sf, name) is not None


@pytest.mark.parametrize("name", ["no_such_name", "_no_such_name"])
def test_an_unknown_name_raises(name):
    with pytest.raises(AttributeError, match=f"'sparseffn_jax' has no attribute '{name}'"):
        getattr(sf, name)


@pytest.mark.parametrize("first", ["", "sf.train, sf.sparsify"], ids=["unused", "used"])
def test_functions_keep_the_names_that_they_share_with_packages(first):
    code = f"""
import sparseffn_jax as sf
{first}
import sparseffn_jax.sparsify.convert
import sparseffn_jax.train.loop
print(type(sf.train).__name__, type(sf.sparsify).__name__)
"""
    assert run_python(code) == ["function", "function"]


def test_type_checkers_are_told_the_same_homes():
    tree = ast.parse(Path(sf.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = node.module.removeprefix("sparseffn_jax.")
        for alias in node.names:
            renamed = f":{alias.name}" if alias.asname else ""
            homes[alias.asname or alias.name] = module + renamed
    assert homes == sf._HOMES
