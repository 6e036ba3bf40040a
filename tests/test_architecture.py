"""The house: which room may import which, what the package's names cost, and what keeps it safe to extend."""

import ast
import dataclasses
import pathlib
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Literal

import pytest

import armd_jax
from armd_jax.config import Config

PACKAGE = pathlib.Path(armd_jax.__file__).parent
LONGEST = 400  # lines of a file
# Single modules at the top of the package, and what each may import. They are the ground floor.
GROUND = {
    "errors": set(),
    "typed": {"errors"},
    "names": set(),
    "files": {"errors"},
    "streams": set(),
    "order_config": {"errors", "typed", "names"},
    "stores": {"errors", "files"},
    "remote": {"errors", "files", "stores"},
    "data_config": {"errors", "typed", "files", "names", "remote"},
    "config": {"errors", "typed", "files", "names", "order_config", "data_config", "remote"},
    "experiment_file": {"errors", "files", "config"},
    "sweeps": {"errors", "config"},
}
# The rooms, and what each may import beside itself. Nobody imports `cli`.
MATHEMATICS = {"errors", "typed", "names", "order_config", "config", "core"}
READERS = MATHEMATICS | {"files", "remote", "data_config", "data"}
ALLOWED = {
    "core": MATHEMATICS,
    "data": {"errors", "typed", "files", "remote", "names", "data_config", "config", "data"},
    "training": READERS | {"streams", "training"},
    "inference": READERS | {"inference"},
    "evaluation": READERS | {"training", "inference", "interop", "evaluation"},
    "interop": READERS | {"training", "inference", "interop"},
    "compilation": READERS | {"training", "inference", "compilation"},
    "report": READERS | {"training", "inference", "evaluation", "report"},
    "serving": READERS | {"inference", "evaluation", "serving"},
    "studies": {"errors", "typed", "files", "names", "config", "experiment_file", "sweeps", "core", "training"}
    | {"compilation", "studies"},
    "cli": READERS
    | {
        "experiment_file",
        "streams",
        "training",
        "inference",
        "evaluation",
        "interop",
        "compilation",
        "report",
        "serving",
        "studies",
        "cli",
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _name(file: pathlib.Path) -> str:
    """The dotted name of a module."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(file: pathlib.Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, relative imports resolved."""
    nodes = list(ast.walk(_tree(file)))
    if top_level_only:
        inside = {
            node
            for function in nodes
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        }
        nodes = [node for node in nodes if node not in inside]
    parents = list(file.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _rooms(names: set[str]) -> set[str]:
    """The rooms of ours among imported names; the package itself counts as `__init__`."""
    ours = [name.split(".") for name in names if name.split(".")[0] == "armd_jax"]
    return {parts[1] if len(parts) > 1 else "__init__" for parts in ours}


# --- arrows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    """No file of a room imports a room that the architecture does not let it, not even inside a function."""
    for file in (PACKAGE / room).rglob("*.py"):
        extra = _rooms(_imports(file)) - ALLOWED[room]
        assert not extra, f"{file.relative_to(PACKAGE)} imports {sorted(extra)}"


def test_every_room_has_a_rule():
    """Every folder of the package is one of the rooms above, so that no arrow goes unchecked."""
    folders = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and list(folder.glob("*.py"))}
    assert folders == set(ALLOWED)
    assert {file.stem for file in PACKAGE.glob("*.py")} == {"__init__", "__main__"} | GROUND.keys()


@pytest.mark.parametrize("module", GROUND)
def test_the_ground_floor_needs_no_jax(module):
    """The modules at the top of the package import one another in one direction, and no JAX."""
    names = _imports(PACKAGE / f"{module}.py")
    assert _rooms(names) <= GROUND[module]
    assert not {name for name in names if name.split(".")[0] in ("jax", "flax", "optax", "orbax", "grain")}


def test_no_modules_import_each_other():
    """There is no circle of imports between modules, not even through imports inside functions."""
    modules = {_name(file): file for file in FILES}
    arrows = {}
    for name, file in modules.items():
        found = set()
        for imported in _imports(file):
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]  # a name inside a module
            found.add(imported)
        arrows[name] = found - {"", "armd_jax", name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in arrows[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def test_the_command_line_imports_lazily():
    """At module level the command line imports the ground floor at most: `armd --help` waits for no JAX."""
    for file in [PACKAGE / "__main__.py", *(PACKAGE / "cli").glob("*.py")]:
        names = _imports(file, top_level_only=True)
        assert _rooms(names) <= {*GROUND, "cli"}, file.name
        heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "matplotlib", "torch", "tensorflow"}
        assert not heavy & {name.split(".")[0] for name in names}, file.name


def test_package_imports_nothing_of_ours_at_module_level():
    """`armd_jax/__init__.py` resolves its names on first use."""
    assert not _rooms(_imports(PACKAGE / "__init__.py", top_level_only=True))


def test_mathematics_is_pure():
    """`core` touches no files, no logging, no globals: it imports arrays and little else."""
    allowed = {"jax", "flax", "numpy", "armd_jax", "functools", "collections", "typing", "dataclasses", "math"}
    for file in (PACKAGE / "core").rglob("*.py"):
        assert {name.split(".")[0] for name in _imports(file)} <= allowed, file.name
        nodes = list(ast.walk(_tree(file)))
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"open", "print"}, file.name
        assert not [node for node in nodes if isinstance(node, ast.Global)], file.name


def test_one_door_to_files():
    """JSON is parsed, and files are replaced, in `files` alone; other modules call it."""
    # Lines of texts and prompts, bodies of requests, and the files of a vocabulary, are parsed where they are read:
    # their errors name a line, or the folder, and a vocabulary may begin with a byte order mark.
    allowed = {"files.py": {"loads", "replace", "mkstemp"}}
    allowed |= {"data/text_files.py": {"loads"}, "data/tokenizer_metadata.py": {"loads"}}
    allowed |= {"evaluation/completions.py": {"loads"}, "serving/api.py": {"loads"}}
    for file in FILES:
        called = {
            node.func.attr
            for node in ast.walk(_tree(file))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and (node.func.value.id, node.func.attr)
            in {("json", "loads"), ("json", "load"), ("os", "replace"), ("tempfile", "mkstemp")}
        }
        extra = called - allowed.get(file.relative_to(PACKAGE).as_posix(), set())
        assert not extra, f"{file.relative_to(PACKAGE)} calls {extra}"


# --- shape of the files -----------------------------------------------------------------------------------------------


def test_no_file_is_long():
    """A file holds one idea: none has more than 400 lines."""
    long = {_name(file): count for file in FILES if (count := len(file.read_text().splitlines())) > LONGEST}
    assert not long


def test_nothing_only_forwards():
    """No function merely calls another one with its own arguments, and no module merely imports names of another."""
    for file in FILES:
        tree = _tree(file)
        variables = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:  # a decorator adds something
                assert not _only_forwards(node, variables), f"{_name(file)}.{node.name}"
        body = [node for node in tree.body if not _is_docstring(node)]
        imports_only = body and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
        assert not imports_only, _name(file)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _only_forwards(function: ast.FunctionDef, variables: set[str]) -> bool:
    """Whether the body is one call that passes on exactly the function's own arguments, in order.

    A call of a module's own variable is none: the function then is what has a name.
    """
    body = [node for node in function.body if not _is_docstring(node)]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr) or not isinstance(body[0].value, ast.Call):
        return False
    call, names = body[0].value, [argument.arg for argument in function.args.args]
    called = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    if isinstance(called, ast.Name) and called.id in variables:
        return False
    if names[:1] in (["self"], ["cls"]):
        return False  # a method of a class may say what another object does
    passed = [argument.id for argument in call.args if isinstance(argument, ast.Name)]
    return bool(names) and len(call.args) == len(names) and passed == names and not call.keywords


# --- safe to extend ---------------------------------------------------------------------------------------------------


def _closed_fields() -> Iterator[tuple[str, str]]:
    """(section, field) of every config field that is one of a closed set of names."""
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is Literal:
                yield section.name, name


def test_closed_sets_are_literals():
    """A text field whose default is one of a few known names is a `Literal`; free texts are listed here."""
    free = {"data.path", "data.text_field", "data.tfds_data_dir", "data.tokenizer", "data.cache_dir"}
    free |= {"training.init_from", "training.wandb_project"}
    texts = {
        f"{section.name}.{name}"
        for section in dataclasses.fields(Config)
        for name, hint in typing.get_type_hints(type(getattr(Config(), section.name))).items()
        if hint is str
    }
    assert texts == free
    assert len(set(_closed_fields())) >= 14


def test_no_branch_compares_a_name_of_a_closed_set():
    """A branch over a closed set is a `match`, which the type checker can find incomplete; `==` it cannot.

    Comparisons of an attribute with the name of a closed set's field (`config.kind == "strided"`) are searched for.
    """
    names = {name for _, name in _closed_fields()}
    for file in FILES:
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                literal = any(_is_text(side) for side in sides)
                field = any(isinstance(side, ast.Attribute) and side.attr in names for side in sides)
                assert not (literal and field), f"{_name(file)}, line {node.lineno}: use match"


def _is_text(node: ast.expr) -> bool:
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)


def test_prefix_rule_lives_in_one_place():
    """Block ids are read in `order` and `block_mask` alone: nothing else derives a mask from them."""
    for file in FILES:
        if file.relative_to(PACKAGE).as_posix() not in ("core/order.py", "core/block_mask.py"):
            text = file.read_text(encoding="utf-8")
            assert "strict_len_BN=" not in text and "causal_len_BN=" not in text, file.name


# --- what the names cost ----------------------------------------------------------------------------------------------


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_cheap():
    """`import armd_jax` loads no JAX and none of our modules."""
    code = """
import sys
import armd_jax
print([name for name in sys.modules if name.split('.')[0] in ('jax', 'flax', 'optax') or name.startswith('armd_jax.')])
"""
    assert _python(code).strip() == "[]"


@pytest.mark.slow
def test_names_resolve_and_start_no_backend():
    """Using the public names starts no JAX backend: a program may still choose its devices, or start distributed."""
    code = """
import armd_jax as armd
assert armd.ModelConfig(vocab_size=3, max_length=4, num_layers=2, two_stream_layers=1, width=8, num_heads=2)
for name in ("left_to_right", "strided", "uniform", "from_blocks"):
    assert callable(getattr(armd.order, name))
assert armd.objective.loss_sums and armd.network.forward and armd.block_mask.build and armd.parameters.init
assert issubclass(armd.UserError, ValueError) and armd.Order and armd.Config
assert {"load", "LanguageModel", "ModelConfig", "order"} <= set(dir(armd))
try:
    armd.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("an unknown name must be an AttributeError")
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    _python(code)


def test_every_public_name_exists():
    """Each name in `__all__` resolves, `load` and `LanguageModel` of the promised surface among them."""
    for name in armd_jax.__all__:
        assert getattr(armd_jax, name) is not None
    assert {"load", "LanguageModel"} <= set(armd_jax.__all__)
