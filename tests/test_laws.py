"""The laws of structure, read off the source: who may name what, and how large a thing may grow.

Strings are compared with docstrings left out: prose may speak of anything.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import knowpatch
from knowpatch.deltas import FORMS
from knowpatch.method import METHODS
from knowpatch.models import roles

ROOT = Path(knowpatch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FUNCTION_LINES, MODULE_LINES = 50, 350
HEAVY = ("torch", "transformers", "pydantic", "numpy", "safetensors", "yaml", "huggingface_hub")
FORMATS = {"lora"}
"""Methods whose name is that of a file format as well, which adapters are shipped in."""
DATASETS = ("zsre", "counterfact", "knowedit")

every_file = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES]
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def within(path: Path, folder: str) -> bool:
    return path.relative_to(ROOT).parts[0] == folder


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string, those in f-strings included; bare ones are documentation."""
    tree = tree_of(path)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that is named: variables, attributes, arguments, definitions."""
    for node in ast.walk(tree_of(path)):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield line, name


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported, with the name behind `from` added."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides what it imports"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def named_methods(text: str) -> set[str]:
    """What a string may name: each part of it if it is one word; of prose, what is in capitals.

    Many methods are called like ordinary words (ice), which a sentence may use.
    """
    parts = re.split(r"[^0-9A-Za-z]+", text)
    if len(text.split()) > 1:
        parts = [p for p in parts if p.isupper()] + re.findall(r"method[ =]['\"]?(\w+)", text)
    return {part.lower() for part in parts}


def module_names() -> set[str]:
    """The names that decoders give to their parts: the tables of models/roles.py, and the ends."""
    tables = {
        name
        for key, table in vars(roles).items()
        if key.isupper() and key != "ROLES" and isinstance(table, tuple)
        for name in table
    }
    return tables | {"lm_head", "embed_tokens", "embed_out", "wte", "model.layers", "transformer.h"}


# -- who may name what -----------------------------------------------------------------------------


def test_there_are_methods_and_files():
    """The laws below look at something."""
    assert len(FILES) > 20
    assert len(METHODS.names()) >= 3
    assert "down_proj" in module_names()
    assert named_modules("model.layers.0.mlp.c_proj.weight") == {"mlp", "c_proj", "model.layers"}
    assert not named_modules("the dense attention of the mlp")


@every_file
def test_only_methods_name_a_method(path: Path):
    """No string outside methods/ is a method's name, or speaks of one."""
    if within(path, "methods"):
        return
    names = set(METHODS.names()) - FORMATS
    assert not [(line, text) for line, text in strings(path) if named_methods(text) & names]


@pytest.mark.parametrize(
    "text", ["rome", " ROME ", "rome.layer", "see ROME", "--method rome", "ft-m"]
)
def test_the_search_for_methods_finds_them(text: str):
    """A name alone, as a part of a word, in capitals or behind `method` is seen; prose is not."""
    assert named_methods(text) & {"rome", "ft"}
    assert not named_methods("to Rome, on thin ice: a chrome method") & {"rome", "ice"}


@every_file
def test_only_methods_import_a_method(path: Path):
    """Outside methods/ nothing below the package of methods is imported or spelled."""
    if within(path, "methods"):
        return
    methods = {f"{folder}.{name}" for folder in families() for name in METHODS.names()}
    below = re.compile(rf"^knowpatch\.methods\.({'|'.join(families())})\b")
    found = [(line, name) for line, name in imports(path) if below.match(name)]
    found += [(line, text) for line, text in strings(path) if below.match(text)]
    found += [(line, text) for line, text in strings(path) if text in methods]
    assert not found


def families() -> list[str]:
    return sorted(
        path.name for path in (ROOT / "methods").iterdir() if (path / "__init__.py").exists()
    )


@every_file
def test_a_method_imports_no_other_method(path: Path):
    """What two methods share is in parts/: no method imports another."""
    if not within(path, "methods"):
        return
    below = re.compile(rf"^knowpatch\.methods\.({'|'.join(families())})\.")
    assert not [(line, name) for line, name in imports(path) if below.match(name)]


@every_file
def test_only_models_names_a_module_path(path: Path):
    """No string outside models/ is, or holds as a part of a path, the name of a model's module."""
    if within(path, "models"):
        return
    allowed = {*roles.ROLES, *FORMS}
    found = [
        (line, text) for line, text in strings(path) if text not in allowed and named_modules(text)
    ]
    assert not found


def named_modules(text: str) -> set[str]:
    """Names of modules in a string: as parts of a path, or, where no one else says so, in prose."""
    parts = set(text.split(".")) if re.fullmatch(r"[\w.{}*\\]+", text) else set()
    telling = {name for name in module_names() if re.search(r"[_\d.]", name)}
    return (parts & module_names()) | {
        n for n in telling if re.search(rf"\b{re.escape(n)}\b", text)
    }


@every_file
def test_only_models_walks_the_module_tree(path: Path):
    """Outside models/ no attribute leads to a model's part by its name (`model.lm_head`)."""
    if within(path, "models"):
        return
    telling = {name for name in module_names() if re.search(r"[_\d]", name)}
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
    assert not [(node.lineno, node.attr) for node in nodes if node.attr in telling]


@every_file
def test_only_data_names_a_dataset(path: Path):
    """No identifier or string outside data/ holds a dataset's name."""
    if within(path, "data"):
        return
    named = [*strings(path), *identifiers(path), *imports(path)]
    assert not [(line, text) for line, text in named if any(d in text.lower() for d in DATASETS)]


@every_file
def test_only_the_command_line_prints(path: Path):
    """`print` and the standard streams belong to cli/."""
    if within(path, "cli"):
        return
    streams = {"stdout", "stderr", "stdin"}
    found = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Name) and node.id in ("print", "input"))
        or (
            isinstance(node, ast.Attribute)
            and node.attr in streams
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )
    ]
    assert not found


@every_file
def test_only_the_command_line_draws(path: Path):
    """The libraries of the terminal are imported in cli/ only."""
    if within(path, "cli"):
        return
    assert not [item for item in imports(path) if item[1].split(".")[0] in ("typer", "rich")]


# -- who may write a weight ------------------------------------------------------------------------

FACTORIES = re.compile(r"(zeros|ones|empty|full|rand|randn)(_like)?|tensor|clone|eye|arange")
WRITES_ELSEWHERE = {
    ("models/load.py", "requires_grad_"),  # turned off for the whole model as it is loaded
    ("models/gguf.py", "load_state_dict"),  # a checkpoint is made, before there is a model
}


def own_tensors(path: Path) -> set[str]:
    """Names that this file binds to tensors that it has just made: its leaves and buffers."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            made = node.value.func
            name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if FACTORIES.fullmatch(name):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def is_own(node: ast.AST, own: set[str]) -> bool:
    """Whether a write goes to a tensor of the file's own: a plain name, or entries of it."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id in own


def writes(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that changes a tensor that this file has not made itself."""
    own = own_tensors(path)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            in_place = re.fullmatch(r"[a-z]\w*[a-z0-9]_", name) or name == "load_state_dict"
            if in_place and not is_own(node.func.value, own):
                yield node.lineno, name
            if name in ("register_parameter", "register_buffer", "set_"):
                yield node.lineno, name
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            below = target
            while isinstance(below, ast.Subscript):
                below = below.value
            if isinstance(below, ast.Attribute) and below.attr in ("data", "weight", "bias"):
                yield node.lineno, f".{below.attr} ="
            if isinstance(target, ast.Subscript) and isinstance(below, ast.Call):
                yield node.lineno, "[...] = of what a call returned"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            yield node.lineno, "setattr"


@every_file
def test_only_edited_writes_a_parameter(path: Path):
    """Outside edited.py nothing is changed in place but a file's own leaves and buffers."""
    name = path.relative_to(ROOT).as_posix()
    if name == "edited.py":
        return
    assert not [(line, what) for line, what in writes(path) if (name, what) not in WRITES_ELSEWHERE]


def test_the_writer_writes_in_one_place():
    """In edited.py there is one statement that changes a parameter."""
    assert [what for _, what in writes(ROOT / "edited.py")] == ["copy_"]


def test_the_search_for_writes_finds_them(tmp_path: Path):
    """Each way to write a parameter is seen, and work on a file's own tensors is not."""
    lines = [
        "view.parameter(name).copy_(new)",
        "model.layer.weight.data = new",
        "model.layer.weight.data[0] += new",
        "model.get_parameter(name)[0] = new",
        "weight.add_(new)",
        "module.weight = new",
        "model.requires_grad_(True)",
        "model.load_state_dict(new)",
        "setattr(module, name, new)",
    ]
    for line in lines:
        (tmp_path / "bad.py").write_text(f"def f():\n    {line}\n")
        tree_of.cache_clear()
        assert len(list(writes(tmp_path / "bad.py"))) == 1, line
    (tmp_path / "good.py").write_text("a = torch.zeros(2)\na.requires_grad_()\na[0] = 1\na.data\n")
    assert not list(writes(tmp_path / "good.py"))
    tree_of.cache_clear()


# -- how large, how told ---------------------------------------------------------------------------


@every_file
def test_no_module_is_long(path: Path):
    """A module fits into 350 lines."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MODULE_LINES


@every_file
def test_no_function_is_long(path: Path):
    """A function's body, its docstring included, fits into 50 lines."""
    found = {
        node.name: length
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.body[0].lineno + 1) > FUNCTION_LINES
    }
    assert not found


@every_file
def test_every_module_says_what_it_is(path: Path):
    """Every module opens with a docstring."""
    assert (ast.get_docstring(tree_of(path)) or "").strip()


@every_file
def test_there_are_no_globals_to_change(path: Path):
    """No function rebinds a name of its module."""
    assert not [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]


# -- what an import costs --------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after `code`."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps([m for m in sys.modules if '.' not in m]))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    """`import knowpatch` and asking for its names loads no torch, transformers or pydantic."""
    loaded = loaded_after("import knowpatch; dir(knowpatch); knowpatch.__version__")
    assert "knowpatch" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["ask", "--help"], []])
def test_help_loads_no_torch(arguments: list[str]):
    """Help comes without torch and transformers, for the program and for a verb."""
    code = (
        "from knowpatch.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert end.code in (0, 2), end.code\n"
    )
    assert not loaded_after(code) & {"torch", "transformers"}


def test_errors_load_nothing_heavy():
    """What the command line needs to tell of an error is light."""
    code = "import knowpatch.errors, knowpatch.files, knowpatch.progress, knowpatch.registry"
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize("name", knowpatch.__all__)
def test_every_public_name_resolves(name: str):
    """Each name of `__all__` is there, and listed by dir()."""
    assert getattr(knowpatch, name) is not None
    assert name in dir(knowpatch)


def test_an_unknown_name_is_an_attribute_error():
    """The lazy package refuses other names as any module does."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = knowpatch.nothing
