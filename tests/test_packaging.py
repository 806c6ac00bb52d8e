import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import keras_peft

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy to build in: setuptools leaves `build/` and would reuse it."""
    copy = tmp_path_factory.mktemp("checkout") / "keras_peft"
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout):
    return build(checkout, "--wheel", pattern="*.whl")


@pytest.fixture(scope="module")
def sdist(checkout):
    return build(checkout, "--sdist", pattern="*.tar.gz")


@pytest.fixture(scope="module")
def repository_files(checkout):
    """What an install must hold, by its path in the install."""
    return {
        *files_below(checkout / "keras_peft", "keras_peft"),
        *files_below(checkout / "keras_peft_cli", "keras_peft_cli"),
        *files_below(checkout / "export", "keras_peft/export"),
    }


def test_wheel_holds_every_file(wheel, repository_files):
    assert files_in_wheel(wheel) == repository_files


def test_sdist_makes_the_same_wheel(sdist, repository_files, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, "--wheel", pattern="*.whl")
    assert files_in_wheel(again) == repository_files


def test_every_module_imports_from_an_installed_wheel(
    wheel, repository_files, tmp_path
):
    python = new_environment(tmp_path)
    pip_install(python, str(wheel))
    modules = module_names(repository_files)
    assert {"keras_peft.export", "keras_peft.export.passes"} <= set(modules)
    for name, file in import_from(tmp_path, python, modules).items():
        assert Path(file).is_relative_to(tmp_path / "environment"), name


def test_every_module_imports_from_an_editable_install(
    checkout, repository_files, tmp_path
):
    python = new_environment(tmp_path)
    pip_install(python, "--editable", str(checkout))
    modules = module_names(repository_files)
    for name, file in import_from(tmp_path, python, modules).items():
        assert Path(file).is_relative_to(checkout), name


def test_every_module_imports_from_a_bare_checkout(
    checkout, repository_files, tmp_path
):
    python = new_environment(tmp_path)
    modules = module_names(repository_files)
    import_from(checkout, python, modules, isolated=False)


@pytest.mark.slice
def test_importing_changes_nothing(tmp_path):
    before, after = run_python(tmp_path, sys.executable, IMPORT_AND_LOOK)
    assert before == after


@pytest.mark.slice
def test_importing_is_cheap(tmp_path):
    """No heavier package comes along: Keras brings what it needs itself."""
    new = run_python(tmp_path, sys.executable, LIST_NEW_PACKAGES)
    assert set(new) - sys.stdlib_module_names <= {
        "keras",
        "keras_peft",
        "rich",
        "safetensors",
    }


@pytest.mark.parametrize("name", keras_peft.__all__)
def test_public_functions_are_annotated(name):
    promised = getattr(keras_peft, name)
    if inspect.isfunction(promised):
        signature = inspect.signature(promised)
        annotations = {
            parameter.name: parameter.annotation
            for parameter in signature.parameters.values()
        }
        annotations["return"] = signature.return_annotation
        bare = [
            k for k, v in annotations.items() if v is inspect.Parameter.empty
        ]
        assert not bare


IMPORT_AND_LOOK = """
import json, logging, os, random, sys, warnings
import keras, numpy

def state():
    return dict(
        environment=dict(os.environ),
        path=sys.path,
        filters=repr(warnings.filters),
        logging=[repr(logging.root), repr(logging.root.handlers)],
        random=[repr(random.getstate()), repr(numpy.random.get_state())],
        backend=keras.backend.backend(),
        floatx=keras.config.floatx(),
        epsilon=keras.config.epsilon(),
        data_format=keras.config.image_data_format(),
        dtype=keras.config.dtype_policy().name,
        traceback_filtering=keras.config.is_traceback_filtering_enabled(),
        interactive_logging=keras.config.is_interactive_logging_enabled(),
    )

before = json.dumps(state())
import keras_peft
print(json.dumps([before, json.dumps(state())]))
"""

LIST_NEW_PACKAGES = """
import json, sys
import keras
before = set(sys.modules)
import keras_peft
print(json.dumps([name.split(".")[0] for name in set(sys.modules) - before]))
"""

IMPORT_EACH = """
import importlib, json
files = {{name: importlib.import_module(name).__file__ for name in {names}}}
print(json.dumps(files))
"""


def build(source, kind, pattern):
    """Builds with the tools installed here, so that no network is needed."""
    run(
        sys.executable,
        *("-m", "build", "--no-isolation", kind),
        *("--outdir", source.parent / "built", source),
    )
    (built,) = (source.parent / "built").glob(pattern)
    return built


def new_environment(folder):
    """A venv that sees the packages installed here, editable ones left out.

    An editable install hangs on a `.pth` file, and Python reads none in a
    folder that it knows from a `.pth` file.
    """
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("[Ll]ib/**/site-packages")
    neighbors = sysconfig.get_path("purelib")
    (site_packages / "neighbors.pth").write_text(neighbors)
    return environment / "bin" / "python"


def pip_install(python, *what):
    """`--ignore-installed`: the neighbors hold a keras_peft of their own."""
    run(
        python,
        *("-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--ignore-installed", *what),
    )


def import_from(folder, python, names, isolated=True):
    code = IMPORT_EACH.format(names=names)
    return run_python(folder, python, code, isolated)


def run_python(folder, python, code, isolated=True):
    """What `code` printed as JSON; isolated, it does not see `folder`."""
    flags = ["-I"] if isolated else []
    return json.loads(run(python, *flags, "-c", code, cwd=folder))


def run(*command, cwd=None):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_below(folder, prefix):
    """Every file, as setuptools is to install it; links are not followed."""
    return {
        f"{prefix}/{file.relative_to(folder).as_posix()}"
        for file in folder.rglob("*")
        if file.is_file()
    }


def files_in_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {
            name for name in archive.namelist() if ".dist-info/" not in name
        }


def module_names(files):
    modules = (Path(file) for file in sorted(files) if file.endswith(".py"))
    return [
        ".".join(module.with_suffix("").parts).removesuffix(".__init__")
        for module in modules
    ]
