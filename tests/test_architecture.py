"""The house: which room may import which, what the package's names cost, and which modules are pure."""

import ast
import pathlib
import subprocess
import sys

import pytest

import armd_jax

PACKAGE = pathlib.Path(armd_jax.__file__).parent
# Single modules at the top of the package, and what each may import. They are the ground floor.
GROUND = {
    "errors": set(),
    "typed": {"errors"},
    "files": {"errors"},
    "config": {"errors", "typed", "files"},
    "experiment_file": {"errors", "config"},
}
MATHEMATICS = {"errors", "typed", "config", "core"}
READERS = MATHEMATICS | {"files", "data"}
ALLOWED = {
    "core": MATHEMATICS,
    "data": {"errors", "typed", "files", "config", "data"},
    "training": READERS | {"training"},
    "inference": READERS | {"inference"},
    "evaluation": READERS | {"training", "inference", "evaluation"},
    "report": READERS | {"training", "inference", "evaluation", "report"},
    "interop": READERS | {"training", "inference", "interop"},
    "compilation": READERS | {"training", "inference", "compilation"},
}


def _modules(room: str) -> list[pathlib.Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def _imports(file: pathlib.Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, relative imports resolved."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
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


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    """No file of a room imports a room that the architecture does not let it, not even inside a function."""
    for file in _modules(room):
        extra = _rooms(_imports(file)) - ALLOWED[room]
        assert not extra, f"{file.relative_to(PACKAGE)} imports {sorted(extra)}"


def test_every_room_has_a_rule():
    """Every folder of the package is one of the rooms above, so that no arrow goes unchecked."""
    folders = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and list(folder.glob("*.py"))}
    assert folders <= set(ALLOWED)
    assert {"core", "data"} <= folders
    assert {file.stem for file in PACKAGE.glob("*.py")} <= {"__init__", "__main__", "cli"} | GROUND.keys()


@pytest.mark.parametrize("module", GROUND)
def test_the_ground_floor_needs_no_jax(module):
    """The modules at the top of the package import one another in one direction, and no JAX."""
    names = _imports(PACKAGE / f"{module}.py")
    assert _rooms(names) <= GROUND[module]
    assert not {name for name in names if name.split(".")[0] in ("jax", "flax", "optax", "orbax", "grain")}


def test_cli_imports_lazily():
    """At module level the command line imports the configuration at most: `armd --help` waits for no JAX."""
    for file in [path for name in ("cli.py", "__main__.py") if (path := PACKAGE / name).exists()]:
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
    for file in _modules("core"):
        assert {name.split(".")[0] for name in _imports(file)} <= allowed, file.name
        tree = ast.parse(file.read_text(encoding="utf-8"))
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"open", "print"}, file.name
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], file.name


def test_prefix_rule_lives_in_one_place():
    """Block ids are read in `order` and `block_mask` alone: nothing else derives a mask from them."""
    for room in ALLOWED:
        for file in _modules(room):
            if file.relative_to(PACKAGE).as_posix() not in ("core/order.py", "core/block_mask.py"):
                text = file.read_text(encoding="utf-8")
                assert "strict_len_BN=" not in text and "causal_len_BN=" not in text, file.name


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


def test_names_resolve_and_start_no_backend():
    """Using the public names starts no JAX backend: a program may still choose its devices, or start distributed."""
    code = """
import armd_jax as armd
assert armd.ModelConfig(vocab_size=3, max_length=4, num_layers=2, two_stream_layers=1, width=8, num_heads=2)
for name in ("left_to_right", "strided", "uniform", "from_blocks"):
    assert callable(getattr(armd.order, name))
assert armd.objective.loss_sums and armd.network.forward and armd.block_mask.build
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
