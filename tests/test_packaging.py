"""What an installation contains, and how the library in it is found, checked and loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import oracle
import pytest
import tvm
from tvm import relax

import tvm_flashinfer
from tvm_flashinfer import LibraryError, _library

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def foreign_library(tmp_path: Path) -> Path:
    """A copy of our library whose facts say it was compiled for another TVM."""
    library = Path(shutil.copy(_library.library_path(), tmp_path))
    facts = json.loads(_library.library_path().with_name("build_info.json").read_text())
    facts["tvm_version"] = "0.1.2"
    library.with_name("build_info.json").write_text(json.dumps(facts))
    return library


def test_library_tells_what_it_was_built_from() -> None:
    loaded = dict(tvm.get_global_func("tvm_flashinfer.build_info")())
    assert loaded == vars(_library.build_info())
    assert loaded["tvm_version"] == tvm.__version__
    assert loaded["project_version"] == tvm_flashinfer.__version__


def test_no_search_path_is_baked_in() -> None:
    """The library must use the libtvm_runtime.so that `import tvm` loaded, wherever that is."""
    dynamic = subprocess.run(
        ["readelf", "-d", str(_library.library_path())], capture_output=True, text=True, check=True
    ).stdout
    assert "libtvm_runtime.so" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_import_under_another_tvm_names_both_versions(foreign_library: Path) -> None:
    result = run_python("import tvm_flashinfer", TVM_FLASHINFER_LIBRARY=str(foreign_library))
    assert result.returncode == 1
    sentence = result.stderr.strip().splitlines()[-1]
    assert "compiled for TVM 0.1.2" in sentence
    assert f"imported here is {tvm.__version__}" in sentence


def test_library_for_another_tvm_is_never_loaded(foreign_library: Path) -> None:
    code = (
        "import tvm\n"
        "try:\n    import tvm_flashinfer\nexcept ImportError:\n    pass\n"
        "print(tvm.get_global_func('tvm_flashinfer.build_info', allow_missing=True))\n"
        "print('libtvm_flashinfer' in open('/proc/self/maps').read())"
    )
    result = run_python(code, TVM_FLASHINFER_LIBRARY=str(foreign_library))
    assert result.stdout.split() == ["None", "False"], result.stderr


def test_same_version_with_another_interface_is_refused() -> None:
    facts = {**vars(_library.build_info()), "kv_state_sha256": "0" * 64}
    with pytest.raises(LibraryError, match="KV-cache interface differs"):
        _library.check_abi(_library.BuildInfo(**facts))


def test_missing_or_broken_facts_are_a_sentence(foreign_library: Path) -> None:
    facts = foreign_library.with_name("build_info.json")
    for text in ("", "[]", '{"tvm_version": "1"}'):
        facts.write_text(text)
        with pytest.raises(LibraryError, match="doesn't tell which TVM"):
            _library.BuildInfo.beside(foreign_library)
    facts.unlink()
    with pytest.raises(LibraryError, match="install tvm-flashinfer again"):
        _library.BuildInfo.beside(foreign_library)


def test_override_must_be_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TVM_FLASHINFER_LIBRARY", str(tmp_path))
    with pytest.raises(LibraryError, match=r"TVM_FLASHINFER_LIBRARY=.* is not a file"):
        _library.library_path()


def test_unloadable_library_is_a_sentence(foreign_library: Path) -> None:
    shutil.copy(_library.library_path().with_name("build_info.json"), foreign_library.parent)
    foreign_library.write_bytes(b"not a library")
    result = run_python("import tvm_flashinfer", TVM_FLASHINFER_LIBRARY=str(foreign_library))
    assert "can't be loaded" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", [["tvm-flashinfer"], [sys.executable, "-m", "tvm_flashinfer"]])
def test_command_line_survives_a_foreign_library(foreign_library: Path, command: list[str]) -> None:
    """Help needs no library; a command that does answers with the sentence, no traceback."""
    env = {**os.environ, "TVM_FLASHINFER_LIBRARY": str(foreign_library), "COLUMNS": "400"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=env, capture_output=True, text=True, timeout=120
        )

    assert run("--help").returncode == 0
    assert "0.1.2" in run("doctor").stdout
    generated = run("generate", str(ROOT), "--prompt", "x")
    assert generated.returncode != 0
    assert "Traceback" not in generated.stderr + generated.stdout


@pytest.fixture
def other_tvm(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a TVM of another distribution, which ships no sources."""
    package = tmp_path / "site" / "tvm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.26.0'\n")
    facts = package.with_name("mlc_ai_cpu-0.26.0.dist-info")
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mlc-ai-cpu\nVersion: 0.26.0\n")
    (facts / "RECORD").write_text("tvm/__init__.py,,\n")
    return package.parent


def test_an_installation_requires_the_tvm_it_was_built_against(other_tvm: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'cmake')!r}); import tvm_requirement as t; "
    code += "print(t.dynamic_metadata('dependencies', {'always': ['a'], 'default': 'b'}))"
    here = f"apache-tvm=={tvm.__version__}"
    assert run_python(code).stdout.strip() == str(["a", here])
    assert (
        run_python(code, PYTHONPATH=str(other_tvm)).stdout.strip() == "['a', 'mlc-ai-cpu==0.26.0']"
    )
    shutil.rmtree(other_tvm / "mlc_ai_cpu-0.26.0.dist-info")  # as a checkout
    assert run_python(code, PYTHONPATH=str(other_tvm)).stdout.strip() == "['a']"


def find_tvm(site: Path, checkout: Path | None = None) -> str:
    """What cmake/find_tvm.py says of a TVM that can't be built against."""
    env = os.environ | {"PYTHONPATH": str(site), "TVM_SOURCE_DIR": str(checkout or "")}
    command = [sys.executable, str(ROOT / "cmake" / "find_tvm.py")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    return result.stderr


def test_what_a_tvm_lacks_is_a_sentence(other_tvm: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    assert "set TVM_SOURCE_DIR to a checkout of the same" in find_tvm(other_tvm)
    assert "name a checkout of TVM" in find_tvm(other_tvm, checkout)
    headers = checkout / "include/tvm/runtime"
    headers.mkdir(parents=True)
    (headers / "tensor.h").touch()
    assert "of an unknown version, and tvm 0.26.0" in find_tvm(other_tvm, checkout)
    (headers / "base.h").write_text('#define TVM_VERSION "0.27.0"\n')
    assert "checkout of TVM 0.27.0, and tvm 0.26.0 is imported" in find_tvm(other_tvm, checkout)
    (headers / "base.h").write_text('#define TVM_VERSION "0.26.dev0"\n')
    assert "holds no src/runtime/vm/kv_state.h" in find_tvm(other_tvm, checkout)
    (other_tvm / "tvm" / "__init__.py").write_text("__version__ = '0.19.0'\n")
    assert "tvm 0.19.0 is imported; 0.26 and later" in find_tvm(other_tvm)


def test_wheel_is_complete_and_works_where_it_is_unpacked(tmp_path: Path) -> None:
    """The library, its facts, the kernel headers and the type markers are inside."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    command += ["--config-settings", "cmake.build-type=Debug"]  # compiles in half the time
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    headers = {
        f"tvm_flashinfer/include/{path.relative_to(ROOT / 'cuda_src/include').as_posix()}"
        for path in (ROOT / "cuda_src/include").rglob("*.*h")
    }
    assert headers <= names
    assert {"tvm_flashinfer/py.typed", "relax_passes/py.typed"} <= names
    assert not {name.split("/")[0] for name in names} - {
        "tvm_flashinfer",
        "relax_passes",
        f"tvm_flashinfer-{tvm_flashinfer.__version__}.dist-info",
    }
    # Without this environment's own editable install, which would be found first.
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in repr(f)]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "import tvm_flashinfer as t; print(t.library_path()); print(t.include_dir())"
    )
    result = run_python(code, TVM_FLASHINFER_LIBRARY="")
    assert result.stdout.split() == [
        str(site / "tvm_flashinfer/lib/libtvm_flashinfer.so"),
        str(site / "tvm_flashinfer/include"),
    ], result.stderr


def test_passes_under_an_older_tvm_are_a_sentence() -> None:
    """TVM 0.26 has no GenericConst."""
    result = run_python(
        "import tvm.ir; vars(tvm.ir).pop('GenericConst', None); import relax_passes.inject"
    )
    assert "relax_passes, which compile models, need TVM 0.27 or later" in result.stderr


@pytest.fixture(scope="module")
def tvm_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with TVM as a machine that only runs models may have it."""
    site = tmp_path_factory.mktemp("runtime_only")
    installed = Path(tvm.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__", "lib", "include", "3rdparty", "src", "licenses")
    shutil.copytree(installed, site / "tvm", ignore=skipped)
    (site / "tvm" / "lib").mkdir()
    for library in (installed / "lib").iterdir():
        if "compiler" not in library.name:
            (site / "tvm" / "lib" / library.name).symlink_to(library)
    return site


SHAPE = (2, 40, 4, 32)


@pytest.fixture(scope="module")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention of ``q @ w``, k and v, compiled by our passes in one's own pipeline."""
    inject = pytest.importorskip("relax_passes.inject", exc_type=ImportError)
    from relax_passes.dispatch_linear import DispatchLinear
    from relax_passes.targets import resolve_target

    builder = relax.BlockBuilder()
    operands = [relax.Var(name, relax.TensorType(SHAPE, "float32")) for name in "qkv"]
    w = relax.Var("w", relax.TensorType(SHAPE[-1:] * 2, "float32"))
    with builder.function("main", [*operands, w], {"num_input": 3}):
        with builder.dataflow():
            q = builder.emit(relax.op.matmul(operands[0], w))
            attention = relax.op.nn.attention(q, *operands[1:], causal_mask="TopLeft")
            out = builder.emit_output(attention)
        builder.emit_func_output(out)
    target = resolve_target("native")
    passes = [inject.InjectAttention(target=target, strict=True), DispatchLinear(target)]
    mod = tvm.transform.Sequential(passes)(builder.get())
    library = tmp_path_factory.mktemp("exported") / "model.so"
    tvm.compile(mod, target=target).export_library(str(library))
    return library


def run_exported(
    library: Path,
    tvm_without_compiler: Path,
    arrays: list[np.ndarray],
    begin: str = "",
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The model's output, in out.npy beside it, by a process that has TVM's runtime alone."""
    np.savez(library.with_name("operands.npz"), *arrays)
    return run_python(
        f"""
import sys
import numpy as np, tvm
from tvm.runtime import vm
assert tvm.__file__.startswith({str(tvm_without_compiler)!r}), tvm.__file__
try:
    from tvm import relax
except Exception:
    pass
else:
    raise AssertionError("the compiler is there after all")
{begin}
arrays = np.load({str(library.with_name("operands.npz"))!r})
machine = vm.VirtualMachine(tvm.runtime.load_module({str(library)!r}), tvm.cpu())
out = machine["main"](*(tvm.runtime.tensor(a) for a in arrays.values()))
assert ("tvm_flashinfer" in sys.modules) == {bool(begin)}
np.save({str(library.with_name("out.npy"))!r}, out.numpy())
""",
        PYTHONPATH=str(tvm_without_compiler),
        **env,
    )


def test_a_compiled_model_needs_no_compiler_and_no_import(
    exported_model: Path, tvm_without_compiler: Path, tmp_path: Path
) -> None:
    """Its kernels are linked in, and it loads our library: from where that was, or beside it."""
    rng = np.random.default_rng(0)
    q, k, v = arrays = [rng.standard_normal(SHAPE, dtype="f4") for _ in range(3)]
    arrays.append(rng.standard_normal(SHAPE[-1:] * 2, dtype="f4"))
    moved = Path(shutil.copy(exported_model, tmp_path))
    shutil.copy(_library.library_path(), tmp_path)
    default = {"TVM_FLASHINFER_LIBRARY": ""}
    for library, begin in ((exported_model, ""), (moved, ""), (moved, "import tvm_flashinfer")):
        done = run_exported(library, tvm_without_compiler, arrays, begin, **default)
        assert done.returncode == 0, done.stderr
        out = np.load(library.with_name("out.npy"))
        for b in range(SHAPE[0]):
            projected = q[b].astype(np.float64) @ arrays[3]
            visible = oracle.bottom_right(40, 40)
            expected, _ = oracle.attend(projected, k[b], v[b], 32**-0.5, visible)
            oracle.assert_close(out[b], expected, 1e-5)


def test_a_model_without_our_library_says_what_to_do(
    exported_model: Path, tvm_without_compiler: Path, tmp_path: Path
) -> None:
    arrays = [np.zeros(SHAPE, "f4")] * 3 + [np.zeros(SHAPE[-1:] * 2, "f4")]
    for wrong, why in (
        (tmp_path / "gone.so", "cannot open shared object file"),
        (exported_model, "is another library"),
    ):
        named = {"TVM_FLASHINFER_LIBRARY": str(wrong)}
        done = run_exported(exported_model, tvm_without_compiler, arrays, **named)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert "this model was compiled with tvm-flashinfer and calls tvm_flashinfer." in last
        assert "put the file beside the model's library, or name it in TVM_FLASH" in last
        assert str(wrong) in last
        assert why in last


def test_our_package_comes_after_a_model(exported_model: Path, tmp_path: Path) -> None:
    """One that found no library, and one that loaded a library of another build."""
    found_none = f"""
import os, tvm
tvm.runtime.load_module({str(exported_model)!r})
del os.environ["TVM_FLASHINFER_LIBRARY"]
import tvm_flashinfer
try:
    tvm.get_global_func("tvm_flashinfer.merge_states")(1)
except TypeError as error:
    print(error)
"""
    done = run_python(found_none, TVM_FLASHINFER_LIBRARY=str(tmp_path / "gone.so"))
    assert "merge_states takes" in done.stdout, done.stderr
    facts = json.loads(_library.library_path().with_name("build_info.json").read_text())
    (tmp_path / "build_info.json").write_text(json.dumps(facts | {"compiler": "another"}))
    other = shutil.copy(_library.library_path(), tmp_path)
    found_ours = f"""
import os, tvm
tvm.runtime.load_module({str(exported_model)!r})
os.environ["TVM_FLASHINFER_LIBRARY"] = {str(other)!r}
import tvm_flashinfer
"""
    done = run_python(found_ours, TVM_FLASHINFER_LIBRARY=str(_library.library_path()))
    assert "a compiled model has loaded another libtvm_flashinfer.so" in done.stderr
