"""The wheel in an environment of its own, as a newcomer meets it, and what README.md shows."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import arc_topk

README = Path(__file__).parents[1] / "README.md"
PACKAGE = Path(arc_topk.__file__).parent
_TARGET = Path(os.environ.get("ARC_BIN", Path(__file__).parents[3] / "target" / "debug")).parent


def snippets() -> list[str]:
    """The Python that README.md shows."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: Any) -> Path:
    """The Python of a new environment with the wheel, and with PyTorch borrowed from the one around it."""
    wheels = list((_TARGET / "wheels").glob("arc_topk-*.whl"))
    assert len(wheels) == 1, f"`make python` builds one wheel; there are {wheels}"
    directory = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-index", str(wheels[0])], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    # Searched after the environment's own, so that its arc_topk comes first.
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def run(python: Path, *arguments: str) -> str:
    """What it prints, with nothing on PATH but the environment, so without a compiler, and without a GPU."""
    environment = {"PATH": str(python.parent), "HOME": str(python.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), *arguments], env=environment, cwd=python.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_is_imported_from_its_own_environment(fresh):
    said = run(
        fresh,
        "-c",
        "import shutil, torch, arc_topk; from arc_topk import _native\n"
        "print([shutil.which(name) for name in ('cc', 'gcc', 'g++', 'clang')], torch.cuda.is_available())\n"
        "print(arc_topk.__version__, arc_topk.__file__, _native.__file__, sep='\\n')",
    ).splitlines()
    assert said[0] == "[None, None, None, None] False"
    assert said[1] == arc_topk.__version__
    environment = str(fresh.parents[1])
    assert all(file.startswith(environment) for file in said[2:])
    assert not str(PACKAGE).startswith(environment)


def test_the_wheel_has_all_of_the_package(fresh):
    (installed,) = fresh.parents[1].glob("lib/python*/site-packages/arc_topk")
    sources = README.parent / "arc_topk"
    wanted = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.suffix in (".py", ".pyi", ".typed")}
    assert "integrations/lightning.py" in wanted
    assert wanted - {str(path.relative_to(installed)) for path in installed.rglob("*")} == set()


def test_the_script_of_the_readme_runs(fresh, tmp_path):
    scripts = [code for code in snippets() if "__main__" in code]
    assert len(scripts) == 1
    script = tmp_path / "train.py"
    script.write_text(scripts[0])
    said = run(fresh, str(script))
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", said, re.MULTILINE)]
    assert len(losses) == 3 and losses[2] < losses[0] < 1.0
    moved = re.findall(r"^worker (\d) moved (\S+) times fewer bytes than dense training$", said, re.MULTILINE)
    assert [worker for worker, _ in moved] == ["0", "1"]
    assert all(float(times) > 4.0 for _, times in moved)


def test_what_the_readme_names_is_there():
    for code in snippets():
        compile(code, "README.md", "exec")
    names = set(re.findall(r"arc_topk((?:\.[A-Za-z_]\w*)+)", README.read_text()))
    assert len(names) > 10 and ".integrations.transformers.register" in names
    for name in names:
        found: Any = arc_topk
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


class _AtImport(ast.NodeVisitor):
    """Names of modules that a module needs while it is imported: not what functions and type checkers do."""

    def __init__(self) -> None:
        self.needs: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if part is not None:
                self.visit(part)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.needs += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.needs += [f"{node.module}.{alias.name}" for alias in node.names]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.needs.append(ast.unparse(node))
        self.generic_visit(node)


def distributed(code: str) -> list[str]:
    """What the module needs of torch.distributed in order to be imported."""
    visitor = _AtImport()
    visitor.visit(ast.parse(code))
    return [name for name in visitor.needs if name.startswith(("torch.distributed", "torch.nn.parallel"))]


@pytest.mark.parametrize(
    ("code", "needs"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("if True:\n    from torch.nn.parallel import DistributedDataParallel", True),
        ("def f(group=torch.distributed.group.WORLD):\n    pass", True),
        ("class A:\n    group = torch.distributed.group.WORLD", True),
        ("def f():\n    import torch.distributed", False),
        ("import torch", False),
    ],
)
def test_such_imports_are_found(code, needs):
    assert bool(distributed(code)) == needs


def test_no_module_needs_torch_distributed_to_be_imported():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 12
    assert {str(file): found for file in files if (found := distributed(file.read_text()))} == {}


WITHOUT = """
import sys
import torch
# What a build without it lacks, and by which torch.distributed knows: imported again, it offers what it offers there.
del torch._C._c10d_init
sys.modules["torch._C._distributed_c10d"] = None
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
import torch.distributed
assert not torch.distributed.is_available() and not hasattr(torch.distributed, "init_process_group")
import arc_topk
net = torch.nn.Linear(40, 40)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), warmup_updates=0)
for _ in range(2):
    net(torch.ones(40)).sum().backward()
    optimizer.step()
print(arc_topk.summary().steps)
"""


def test_a_worker_trains_without_torch_distributed(shards, tmp_path):
    environment = os.environ | shards(1, 1).environment() | {"RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", WITHOUT]
    # Not here, where the sources lie, which have no native half.
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
