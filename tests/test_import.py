"""What importing the package needs, and what it leaves alone. Each test imports in a fresh
interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_fsa

# Behaves as if the named packages were not installed, and not as if they had been removed from a
# list: a package that is already imported, or that another one drags in, fails just the same.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            message = f"No module named {{name!r}} (blocked by the test)"
            raise ModuleNotFoundError(message, name=name)

sys.meta_path.insert(0, Block())
"""


def run_python(code: str, tmp_path: Path, blocked: tuple[str, ...] = (), **env: str) -> str:
    """Runs code in a fresh interpreter, outside the repository, with the package under test
    on its path.
    """
    source = Path(nsa_fsa.__file__).parents[1]
    search = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=set(blocked)) + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("package", ["triton", "transformers", "flash_attn"])
def test_imports_without(package, tmp_path):
    code = f"""
try:
    import {package}
except ImportError:
    pass
else:
    raise AssertionError("the test did not block {package}")
import nsa_fsa
import nsa_fsa.ops
from nsa_fsa import NSAConfig
config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2)
print(config.group_size, len(nsa_fsa.ops.__all__) > 0)
"""
    assert run_python(code, tmp_path, blocked=(package,)) == "2 True\n"


def test_imports_without_a_gpu_and_asks_for_none(tmp_path):
    # A CPU-only machine passes anything, so every way to ask about the GPU raises: a probe at
    # import initialises CUDA in the parent of a data loader's forked workers, and costs seconds
    # where a driver is slow.
    code = """
import torch

def probe(*args, **kwargs):
    raise AssertionError("the import asked for the GPU")

for name in (
    "is_available", "device_count", "get_device_capability", "get_device_properties",
    "current_device", "_lazy_init",
):
    assert callable(getattr(torch.cuda, name))
    setattr(torch.cuda, name, probe)
import nsa_fsa
import nsa_fsa.ops
print(torch.cuda.is_initialized())
"""
    assert run_python(code, tmp_path, CUDA_VISIBLE_DEVICES="") == "False\n"


def imported_by(statement: str, tmp_path: Path) -> set[str]:
    code = f"{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run_python(code, tmp_path).split())


def test_import_is_light(tmp_path):
    # PyTorch itself may import Triton or yaml where they are installed:
    # only what nsa_fsa adds counts.
    added = imported_by("import nsa_fsa", tmp_path) - imported_by("import torch", tmp_path)
    assert "nsa_fsa" in added
    heavy = {
        "transformers",
        "flash_attn",
        "matplotlib",
        "peft",
        "typer",
        "yaml",
        "triton",
        "accelerate",
    }
    heavy |= {"pandas", "seaborn"}
    assert not added & heavy, f"import nsa_fsa imports {sorted(added & heavy)}"


def test_import_leaves_the_command_line_and_the_benchmark_alone(tmp_path):
    code = "import nsa_fsa, nsa_fsa.ops\nprint(*sys.modules)"
    loaded = set(run_python(code, tmp_path).split())
    assert not {"nsa_fsa.benchmarking", "nsa_fsa.cli"} & loaded


def test_the_command_line_needs_nothing_of_the_extras(tmp_path):
    """pandas and seaborn are of benchmarks/ in a checkout alone."""
    blocked = ("pandas", "seaborn", "matplotlib", "transformers")
    code = "import nsa_fsa.cli\nprint('pandas' in sys.modules)"
    assert run_python(code, tmp_path, blocked=blocked) == "False\n"


def test_patch_model_without_transformers_names_the_extra(tmp_path):
    code = """
import nsa_fsa
try:
    nsa_fsa.patch_model
except ImportError as error:
    print(error)
"""
    message = run_python(code, tmp_path, blocked=("transformers",))
    assert "nsa-fsa[transformers]" in message, f"patch_model without transformers says {message!r}"


def test_public_names_resolve():
    assert len(set(nsa_fsa.__all__)) == len(nsa_fsa.__all__)
    for name in nsa_fsa.__all__:
        assert getattr(nsa_fsa, name).__doc__, f"nsa_fsa.{name} has no docstring"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = nsa_fsa.no_such_name
