"""The layout is the architecture: who may import whom, how long a file may be, what each package offers."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "esam_dist"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A file or folder imports only from lower floors, files of one folder also from each other (docs/architecture.md).
FLOORS = [
    {
        "errors",
        "checksum",
        "clock",
        "schedule",
        "randomness",
        "progress",
        "averaging",
        "files",
        "soundness",
        "flops",
        "process",
    },
    {"ranks", "section", "skips"},
    {"step", "run_keys", "train_keys", "agreement"},
    {"methods"},
    {"models", "checkpoint", "data", "metrics", "engine", "lock"},
    {"config"},
    {"run_folder", "launch", "network"},
    {"sharpness_aware", "evaluate", "report", "resume"},
    {"window", "training"},
    {"saving", "validation"},
    {"train"},
    {"compare"},
    {"cli"},
    {"__main__"},
]
MAX_LINES = 300


def part(module):
    """The file or folder directly below `esam_dist` that holds `module`; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def floor(wanted):
    """The number of the floor on which a part stands; the package itself, which only names what it offers, is above."""
    return (
        len(FLOORS) if wanted == "" else next((number for number, parts in enumerate(FLOORS) if wanted in parts), None)
    )


def module_name(path):
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def imports(path):
    """Names of our modules that the file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("esam_dist"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "esam_dist":
                yield from (f"esam_dist.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            elif node.module and node.module.startswith("esam_dist."):
                yield node.module


def test_every_part_has_a_floor():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(parts - {"__init__", "__pycache__", "py.typed"}) == sorted(part for floor in FLOORS for part in floor)


def test_the_wheel_holds_every_package():
    text = (ROOT / "pyproject.toml").read_text().partition("\npackages = [")[2].partition("]")[0]
    folders = {".".join(path.relative_to(ROOT).parts) for path in PACKAGE.rglob("*") if (path / "__init__.py").exists()}
    assert set(re.findall('"(.*?)"', text)) == {"esam_dist", "esam_dist.launch.files"} | folders


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_come_from_lower_floors(path):
    here = part(module_name(path))
    for imported in imports(path):
        there = part(imported)
        if here != there:
            assert floor(here) is not None, f"{here} has no floor yet: give it one"
            assert floor(there) < floor(here), f"{here} (floor {floor(here)}) imports {there} (floor {floor(there)})"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_is_long_and_all_are_ascii(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_the_engine_package_knows_deepspeed(path):
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert part(module_name(path)) == "engine" or not any(name.partition(".")[0] == "deepspeed" for name in names)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("esam_dist.checkpoint", ["Checkpoints", "Outcome", "STEP", "Writer", "read"]),
        ("esam_dist.config", ["Config", "dump", "flat", "keys", "load", "parse"]),
        ("esam_dist.data", ["Batch", "TrainData", "ValidationData", "open_train", "open_validation"]),
        ("esam_dist.data.prepare", ["add_arguments", "prepare_digits", "run"]),
        ("esam_dist.engine", ["MicroBatches", "build_engine"]),
        ("esam_dist.metrics", ["Metrics", "TrainRow", "ValidationRow", "rewind"]),
        (
            "esam_dist.methods",
            [
                *(
                    "ASAM",
                    "AnyMethod",
                    "ESAM",
                    "FSAM",
                    "GSAM",
                    "LookSAM",
                    "METHODS",
                    "MSAM",
                    "Method",
                    "Phase",
                ),
                *("Recycled", "S2SAM", "SAM", "SGD", "Setup", "Sharp", "VaSSO"),
            ],
        ),
        ("esam_dist.step", ["Engine", "Examples", "MethodState", "Moment", "Step", "StepStats"]),
        ("esam_dist.models", ["Classifier", "build_model", "compile_network", "model_names"]),
    ],
)
def test_each_package_offers_these_names(module, names):
    package = importlib.import_module(module)
    assert sorted(package.__all__) == names
    assert all(hasattr(package, name) for name in names)
