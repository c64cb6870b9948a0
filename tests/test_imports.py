"""Imports go one way, and importing the package or asking for help loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launched import PATIENCE
from modules import ROOT, SOURCES, imports

# what each part may import of the project, besides itself and ldm.errors
MODELS = {"ldm.models"}
LOW = MODELS | {
    "ldm.process", "ldm.families", "ldm.weights", "ldm.sampling", "ldm.patches", "ldm.runtime", "ldm.runtime.kernels",
    "ldm.images", "ldm.sheets", "ldm.files", "ldm.caches", "ldm.conditions", "ldm.threads",
    "ldm.launch", "ldm.limits", "ldm.signing", "ldm.watermark",
}  # fmt: skip
BUNDLE = LOW | {"ldm.latent_diffusion"}
BESIDE = BUNDLE | {"ldm.data", "ldm.evaluation", "ldm.training"}
ALLOWED = {
    "ldm.errors": set(),
    "ldm.caches": set(),
    "ldm.files": set(),
    "ldm.launch": set(),
    "ldm.limits": set(),
    "ldm.threads": {"ldm.launch", "ldm.limits"},
    "ldm.models": MODELS,
    "ldm.process": set(),
    "ldm.families": LOW,
    "ldm.weights": LOW,
    "ldm.sampling": LOW,
    "ldm.patches": LOW,
    "ldm.runtime": LOW,
    "ldm.runtime.kernels": {"ldm.caches"},
    "ldm.images": LOW,
    "ldm.sheets": set(),
    "ldm.signing": set(),
    "ldm.watermark": set(),
    "ldm.conditions": {"ldm.conditions", "ldm.images"},
    "ldm.latent_diffusion": BUNDLE,
    "ldm.data": BUNDLE | {"ldm.data"},
    "ldm.training": BESIDE,
    "ldm.evaluation": BUNDLE | {"ldm.data", "ldm.evaluation"},
    "pipelines": BUNDLE | {"pipelines"},
    "ldm.bench": BESIDE | {"pipelines", "ldm.bench"},
    "ldm.server": BESIDE | {"pipelines", "ldm.server"},
    "ldm.cli": BESIDE | {"pipelines", "ldm.bench", "ldm.server", "ldm.cli"},
    "ldm.__main__": {"ldm.cli"},
    "ldm": {"ldm.latent_diffusion", "ldm.threads"},
}


def part(module: str) -> str:
    """The entry of `ALLOWED` that a module belongs to."""
    return max((name for name in ALLOWED if module == name or module.startswith(name + ".")), key=len)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    allowed = ALLOWED[part(module)] | {"ldm.errors", "ldm", part(module)}
    wrong = [f"line {line}: {name}" for name, line in imports(path) if part(name) not in allowed]
    assert not wrong, f"{module} may not import {wrong}"


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert set(listed) == packages


@pytest.mark.parametrize(
    "code",
    [
        "import ldm",
        "import sys; sys.argv = ['ldm', '--help']; from ldm.cli.main import app; app(standalone_mode=False)",
        "import sys; sys.argv = ['ldm', 'generate', '-h']; from ldm.cli.main import app; app(standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    check = (
        "import sys; heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'rich', 'yaml', 'PIL'}; "
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True, capture_output=True, timeout=PATIENCE)


HEAVY = """
import sys
import torch

there = set(sys.modules)
sys.argv = ["ldm", "generate", "a fox", "--steps", "2", "--out", sys.argv[1]]
from ldm.cli.main import app

app(standalone_mode=False)
heavy = (
    "transformers", "diffusers", "accelerate", "scipy", "sympy", "torchvision", "open_clip", "huggingface_hub",
    "datasets", "torchao", "torch._dynamo", "torch._inductor", "torch.distributed", "pydantic", "rich", "yaml",
    "pyarrow", "jinja2", "cv2", "onnxruntime", "torchmetrics", "PIL.TiffImagePlugin",
)
found = [name for name in sys.modules.keys() - there for part in heavy if (name + ".").startswith(part + ".")]
assert not found, found
"""


def test_an_image_needs_little_beside_torch(tmp_path: Path) -> None:
    """With the built-in model and its own scheduler; what `import torch` brings does not count."""
    image = tmp_path / "fox.png"
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, str(image)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert image.is_file()


TRAINING = """
import sys
import torch

there = set(sys.modules)
import ldm.training.run
import ldm.cli.evaluate
heavy = (
    "torchmetrics", "open_clip", "diffusers", "torch.distributed.tensor", "torch.distributed.checkpoint",
    "torch._dynamo", "triton", "sympy",
)
found = [name for name in sys.modules.keys() - there for part in heavy if (name + ".").startswith(part + ".")]
assert not found, found
"""


def test_training_and_evaluation_begin_without_what_few_runs_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_of_the_package() -> None:
    import ldm

    assert ldm.LatentDiffusion.__name__ == "LatentDiffusion"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ldm.nonsense


def test_the_second_command_of_the_readme_is_what_ci_runs() -> None:
    command = 'pip install -c constraints.txt ".[test]" && pytest -n 2 --dist loadfile'
    assert f"\n    {command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command.replace("pip install", "pip install -q") in script
