"""The rules that keep the code readable: who may import whom, how long things may be, where state may live."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_llm"

LAYERS = {
    0: {
        "config",
        "families",
        "migrate",
        "tasks",
        "megatron",
        "kernels",
        "storage",
        "assets",
        "environment",
        "report",
        "launcher",
        "errors",
        "log",
        "processes",
    },
    1: {"parallel", "corpus", "tokenizers"},
    2: {"models", "planner", "conversation"},
    3: {"checkpoint", "data", "optim"},
    4: {"peft", "inference", "evaluation", "run", "resilience"},
    5: {"training", "convert"},
}
# Modules that stand lower than their room: they know files, and no tensors.
FILES_ALONE = ("checkpoint/folder.py", "checkpoint/manifest.py", "checkpoint/saved_run.py")
# Rooms of the same layer that must not know each other.
APART = ({"peft", "inference", "evaluation", "planner"}, {"training", "convert"})
# Rooms that could be a library of their own: they know nothing of the house but its errors and its log.
ALONE = {"kernels", "storage", "report", "megatron"}
MOST_MODULES = 20
# A module of less than these lines that one module alone imports is no room of its own: it belongs into that module.
FEWEST_LINES = 60
# Folders of which each module is an entry of a kind, such as a section, a family or a task, however short it is.
ENTRIES = (
    *("config/sections", "config/commands", "config/migrations", "data/sources"),
    *("families", "kernels", "migrate", "peft", "tasks"),
)
TORCH_FREE = (
    *FILES_ALONE,
    "config",
    "families",
    "migrate",
    "tasks",
    "planner",
    "report",
    "training/check_only.py",
    "parallel/layout.py",
    "parallel/stages.py",
    "megatron/config_fields.py",
    "environment.py",
    "errors.py",
    "log.py",
    "assets",
)
# What knows of training runs, besides the commands; the others take the sections that they read, or a `ModelSetting`.
OF_RUNS = {"config", "tasks", "training", "run", "optim", "resilience"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 6

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """First name below the package: ``config`` for nemo_llm/config/compose/load.py, ``train`` for nemo_llm/train.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    """Commands, the modules of the package itself, are above all rooms."""
    return next((layer for layer, parts in LAYERS.items() if part in parts), 1 + max(LAYERS))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports below `tree`; for ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> ast.Module:
    """`tree` without the bodies of functions, whose imports are lazy, and without ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return ast.fix_missing_locations(Strip().visit(ast.parse(ast.unparse(tree))))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_package_has_modules() -> None:
    assert len(MODULES) > 30


def test_the_page_and_the_picture_show_every_room_in_its_row() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    commands = {path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    rows = [LAYERS[layer] & rooms for layer in sorted(LAYERS, reverse=True)]
    assert set().union(*rows) == rooms
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| ([\w ]+) \| `(\w+)/` \|", page, re.MULTILINE)
    titles = list(dict.fromkeys(title for title, _ in named))
    assert [{room for title, room in named if title == wanted} for wanted in titles] == rows
    assert len(named) == len(rooms)
    picture = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'y="(\d+)" class="n">(\w+)/<', picture)
    heights = sorted({int(height) for height, _ in drawn})
    assert [{name for at, name in drawn if int(at) == height} for height in heights] == rows
    assert set(re.findall(r"(\w+)\.py", re.findall(r'class="n">([^<]+\.py)<', picture)[0])) == commands
    assert re.findall(r'class="t">([\w ]+)</text>', picture) == ["commands", *titles]


def test_a_folder_is_small_enough_to_be_read() -> None:
    # Of migrations there is one more with every change of the configuration.
    folders = Counter(path.parent for path in MODULES if path.name != "__init__.py" and "migrations" not in path.parts)
    assert not {relative(folder): number for folder, number in folders.items() if number > MOST_MODULES}


def test_a_short_module_has_several_importers() -> None:
    """Commands, the modules of the package itself, are started and not imported."""
    importers: Counter[str] = Counter()
    for path in [*MODULES, *sorted((ROOT / "tools").glob("*.py"))]:
        tree = TREES.get(path) or ast.parse(path.read_text(encoding="utf-8"))
        importers.update(set(imported_names(tree)))
    short = {
        relative(path)
        for path in MODULES
        if path.name != "__init__.py" and len(path.read_text(encoding="utf-8").splitlines()) < FEWEST_LINES
    }
    lonely = {place for place in short if importers["nemo_llm." + place.removesuffix(".py").replace("/", ".")] < 2}
    rooms = {place for place in lonely if "/" in place and place.rpartition("/")[0] not in ENTRIES}
    assert not rooms, f"merge into the module that imports them: {sorted(rooms)}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    own_layer = 0 if relative(path) in FILES_ALONE else layer_of(part)
    wrong = []
    guards = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    for_types = {name for guard in guards for name in imported_names(guard)}
    for name in imported_names(TREES[path]):
        pieces = name.split(".")
        if pieces[0] != "nemo_llm" or len(pieces) < 2 or pieces[1].startswith("__"):
            continue
        target = pieces[1]
        upward = layer_of(target) > own_layer and "/".join(pieces[1:3]) + ".py" not in FILES_ALONE
        sideways = target != part and any({target, part} <= rooms for rooms in APART)
        leaves = part in ALONE and target not in {part, "errors", "log"} and name not in for_types
        if (upward or sideways or leaves) and part != "__init__":
            wrong.append(name)
    assert not wrong, f"{relative(path)} (layer {own_layer}) imports {sorted(set(wrong))}"


@pytest.mark.parametrize("path", [p for p in MODULES if relative(p).startswith(TORCH_FREE)], ids=relative)
def test_no_torch_at_module_level(path: Path) -> None:
    heavy = {"torch", "megatron", "nemo", "transformers", "transformer_engine"}
    found = {name for name in imported_names(module_level(TREES[path])) if name.split(".")[0] in heavy}
    assert not found, f"{relative(path)} imports {sorted(found)}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_special_imports_stay_in_their_place(path: Path) -> None:
    names = set(imported_names(TREES[path]))
    place = relative(path)
    if not place.startswith(("config/", "migrate/")):
        assert not {name for name in names if name.split(".")[0] in {"hydra", "omegaconf", "pydantic"}}, place
    if place != "parallel/runtime.py":
        assert not {name for name in names if name.endswith("parallel_state")}, place


def _root(node: ast.AST) -> str | None:
    """The name that a chain of attributes begins with; no call is in it."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _of_megatron(tree: ast.AST) -> set[str]:
    """Names that stand for modules, classes or functions of Megatron's: imported, or assigned from such."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or "megatron" for a in node.names if a.name.split(".")[0] == "megatron"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            names |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (_root(node.value) in names or "'megatron." in ast.unparse(node.value)):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def touches(tree: ast.AST) -> Iterator[ast.AST]:
    """Assignments into what is Megatron's, changes of an object's class, private names of Megatron's and of others."""
    names = _of_megatron(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            if any(alias.name.startswith("_") for alias in node.names):
                yield node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr", "vars"}:
            if _root(node.args[0]) in names:
                yield node
        elif isinstance(node, ast.Attribute | ast.Subscript):
            root, stored = _root(node), not isinstance(node.ctx, ast.Load)
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            private = attribute.startswith("_") and not attribute.startswith("__")
            others_private = stored and private and root not in {"self", "cls"}
            if (root in names and (stored or private)) or (stored and attribute == "__class__") or others_private:
                yield node


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) != "megatron"], ids=relative)
def test_insides_of_megatron_are_touched_in_one_room(path: Path) -> None:
    """What replaces something in Megatron lies in megatron/; private methods that a layer overrides are named there."""
    wrong = [f"line {node.lineno}: {ast.unparse(node)}" for node in touches(TREES[path])]
    assert not wrong, f"{relative(path)} (move it to megatron/, declare it in megatron/patches.toml): {wrong}"


@pytest.mark.parametrize(
    "code",
    [
        "from megatron.core.transformer import mlp\nmlp.bias_swiglu_impl = f",
        "import megatron.core.optimizer as o\no.Adam, o.OTHER = f, False",
        "import megatron.core.optimizer\nmegatron.core.optimizer.Adam = f",
        "def f():\n    from megatron.core.tensor_parallel import random\n    random.C.__init__.__defaults__ = (None,)",
        "from megatron.core.transformer.mlp import MLP\nforward = MLP\nforward.forward = f",
        "from megatron.core.transformer.mlp import MLP\nMLP.calls += 1",
        "from megatron.core.transformer.mlp import MLP\ndel MLP.forward",
        "from megatron.core.transformer.mlp import MLP\nsetattr(MLP, 'forward', f)",
        "from megatron.core.transformer import mlp\nvars(mlp)['bias_swiglu_impl'] = f",
        "from megatron.core.transformer import mlp\nmlp.TABLE['silu'] = f",
        "m = importlib.import_module('megatron.core.optimizer')\nm.Adam = f",
        "m = sys.modules['megatron.core.optimizer']\nm.Adam = f",
        "from megatron.core.optimizer.optimizer import _multi_tensor_copy_this_to_that",
        "from megatron.core.optimizer import optimizer\noptimizer._multi_tensor_copy_this_to_that(a, b)",
        "linear.__class__ = Ours",
        "part._copy_main_params_to_model_params = f",
    ],
)
def test_a_touch_of_megatron_is_seen(code: str) -> None:
    assert list(touches(ast.parse(code)))


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent != PACKAGE and part_of(p) not in OF_RUNS], ids=relative
)
def test_a_model_needs_no_run(path: Path) -> None:
    """Rooms that neither train nor configure name no `RunConfig`, and compose no run of a shipped model."""
    if relative(path) != "checkpoint/saved_run.py":  # the reader of saved runs
        assert "RunConfig" not in {name.rpartition(".")[2] for name in imported_names(TREES[path])}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Constant) and str(node.value).startswith(("model=", "+model=")):
            assert node.value == "+model=from_hf", f"{relative(path)}:{node.lineno} composes {node.value}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_sizes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines"
    for function in functions(TREES[path]):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert length <= MAX_FUNCTION_LINES, f"{relative(path)}: {function.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_configuration_is_read_without_defaults(path: Path) -> None:
    """A default lives in conf/ alone: no ``getattr(cfg, key, default)`` and no ``cfg.section.get(key)``."""
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            assert not names_configuration(node.args[0]), f"{relative(path)}:{node.lineno} getattr with a default"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            assert not names_configuration(node.func.value), f"{relative(path)}:{node.lineno} .get on configuration"


def names_configuration(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in {"cfg", "setting", "run_config", "model_config"}


MUTATING = {"append", "appendleft", "add", "update", "clear", "pop", "popitem", "setdefault", "extend", "insert"}
MUTATING |= {"remove", "discard", "move_to_end"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_functions_leave_module_level_names_alone(path: Path) -> None:
    """Module-level values are constants; what changes lives in objects that are handed on."""
    tree = TREES[path]
    constants = {name.id for node in tree.body for name in ast.walk(node) if is_stored(name) and in_module(node)}
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for function in functions(tree):
        arguments = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
        local = arguments | {node.id for node in ast.walk(function) if is_stored(node)}
        found += [node.lineno for node in ast.walk(function) if names_of_changed(node) & (constants - local)]
    assert not found, f"{relative(path)}: module-level names change at lines {sorted(set(found))}"


def in_module(node: ast.stmt) -> bool:
    return not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def names_of_changed(node: ast.AST) -> set[str]:
    """Names whose value this node changes: ``x[...] = ``, ``x.y = ``, ``del x[...]``, ``x.append(...)``."""
    changed: list[ast.AST] = []
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        changed = [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
        changed = [node.func.value]
    names = set()
    for value in changed:
        while isinstance(value, ast.Subscript | ast.Attribute):
            value = value.value
        names |= {value.id} if isinstance(value, ast.Name) else set()
    return names


def test_a_public_class_name_means_one_class() -> None:
    places: dict[str, list[str]] = {}
    for path in [*MODULES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]:
        tree = TREES.get(path) or ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert len(places) > 100
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_annotations_are_complete(path: Path) -> None:
    """For mypy, which leaves the kernels out: Triton takes no Python type for a pointer. Their callers have types."""
    for function in functions(TREES[path]):
        if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        missing = [p.arg for p in parameters if p.annotation is None and p.arg not in {"self", "cls", "ctx"}]
        missing += [] if function.returns or function.name == "__init__" else ["return"]
        assert not missing, f"{relative(path)}:{function.lineno} {function.name}: {missing}"
