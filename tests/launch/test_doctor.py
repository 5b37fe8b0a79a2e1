"""`ddetr doctor` on this machine, and on machines that lack something."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ddetr.ops
import pytest
import torch
from ddetr.launch import doctor

DDETR = Path(sys.executable).with_name("ddetr")


@pytest.mark.integration
def test_a_healthy_installation_passes() -> None:
    result = subprocess.run([DDETR, "doctor"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout
    assert torch.__version__.split("+")[0] in result.stdout
    assert "self-test on cpu" in result.stdout
    assert "times faster than the reference" in result.stdout
    assert f"CUDA {torch.version.cuda}" in result.stdout
    assert "nothing essential is broken" in result.stdout


def test_the_self_test_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.largest_difference(torch.device("cpu")) < 1e-5

    def shifted(value, spatial_shapes, sampling_locations, attention_weights):
        return ddetr.ops.deform_attn(value, spatial_shapes, sampling_locations + 0.01, attention_weights)

    monkeypatch.setattr(doctor, "deform_attn", shifted)
    assert next(doctor.parity()).state == "broken"


NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver that works has nothing to say")
@pytest.mark.parametrize(
    ("hidden", "cuda", "fix"),
    [(None, "13.2", "older than CUDA 13.2"), ("", "13.2", "CUDA_VISIBLE_DEVICES=''"), (None, None, "built for CUDA")],
)
def test_a_driver_that_torch_cannot_use_is_explained(
    hidden: str | None, cuda: str | None, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(NVRM)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (finding,) = doctor.driver()
    assert finding.state == "broken"
    assert "535.104.05" in finding.result
    assert fix in finding.fix


def test_a_slow_op_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SPEED_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "fused_deform_attn", doctor.reference.fused_deform_attn)
    finding = next(doctor.speed())
    assert finding.state == "note"
    assert "run it again" in finding.fix


@pytest.mark.integration
def test_a_missing_binary_is_named_with_the_command_that_builds_it(tmp_path: Path) -> None:
    """The product's files without the compiled op, as after copying the sources by hand."""
    repository = Path(doctor.__file__).parent.parent
    for folder in ("core", "data", "launch", "monitoring", "ops"):
        shutil.copytree(repository / folder, tmp_path / "ddetr" / folder, ignore=shutil.ignore_patterns("*.so"))
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.meta_path[:] = [finder for finder in sys.meta_path"
        " if 'Editable' not in getattr(finder, '__name__', '')]; from ddetr.launch.doctor import doctor; doctor()"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "ddetr/ops/_C.so") in result.stdout.replace("\n", "")
    assert "pip install" in result.stdout
    assert "1 broken" in result.stdout


def test_a_lock_left_by_a_killed_build_is_shown_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert list(doctor.deepspeed_cache()) == []
    built, stuck, half = tmp_path / "built_op", tmp_path / "stuck_op", tmp_path / "half_op"
    for folder in (built, stuck, half):
        folder.mkdir()
        (folder / "build.ninja").touch()
    (built / "built_op.so").touch()
    (stuck / "lock").touch()
    found = {finding.subject: finding for finding in doctor.deepspeed_cache()}
    assert found["built_op"].state == "ok"
    assert found["stuck_op"].state == "note"
    assert (found["half_op"].state, found["half_op"].fix) == ("note", "")
    assert found["stuck_op"].fix.endswith(f"rm {stuck / 'lock'}")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["8.0", "9.0"], (9, 0), True),
        (["8.0", "9.0"], (8, 6), True),  # machine code runs on later minor versions of its major version
        (["8.6"], (8, 0), False),
        (["8.0", "9.0"], (10, 0), False),
        (["8.0", "9.0+PTX"], (10, 0), True),
        (["9.0+PTX"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpus_a_binary_runs_on(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert doctor.runs_on(architectures, capability) == runs


def test_requirements_that_are_missing_or_of_another_version_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2", "numpy>=9999", "no-such-thing-of-ours>=2", "also-none; extra == 's3'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needed)
    python, torch_, numpy, missing = doctor.packages()
    assert (python.state, torch_.state) == ("ok", "ok")
    assert (numpy.state, numpy.fix) == ("broken", "pip install 'numpy>=9999'")
    assert numpy.result.endswith(", where >=9999 is needed")
    assert (missing.state, missing.result) == ("broken", "not installed")
    assert missing.fix == "pip install 'no-such-thing-of-ours>=2'"


@pytest.mark.parametrize(
    ("unavailable", "gpu", "states"),
    [
        ({"cpu": "no compiler", "cuda": "no compiler"}, False, [("op on CPU", "broken")]),
        ({"cuda": "no nvcc"}, True, [("op on CPU", "ok"), ("op on CUDA", "broken")]),
        ({"cuda": "no nvcc"}, False, [("op on CPU", "ok"), ("op on CUDA", "note")]),
    ],
)
def test_a_binary_that_is_missing_is_broken_where_it_is_needed(
    unavailable: dict[str, str], gpu: bool, states: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.library, "UNAVAILABLE", unavailable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = list(doctor.operators())
    assert [(finding.subject, finding.state) for finding in found] == states
    assert all(finding.fix == unavailable["cuda"] for finding in found if finding.state == "broken")


def test_each_gpu_is_compared_with_the_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text(NVRM)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [
        SimpleNamespace(name=name, total_memory=80 << 30, major=major, minor=0) for name, major in (("A", 8), ("H", 9))
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(doctor.library, "UNAVAILABLE", {})
    monkeypatch.setattr(doctor.library, "cuda_architectures", lambda: ["8.0"])
    (driver,) = doctor.driver()
    assert (driver.state, driver.result.partition(",")[0]) == ("ok", "535.104.05")
    first, second = doctor.devices()
    assert (first.state, first.result) == ("ok", "A, 80 GiB, capability 8.0")
    assert (second.state, second.result) == ("broken", "H, 80 GiB, capability 9.0; the op is built for 8.0")
    assert second.fix.startswith("TORCH_CUDA_ARCH_LIST=9.0 pip install ")


@pytest.mark.parametrize("examine", [doctor.parity, doctor.speed])
def test_an_op_that_fails_is_a_finding_and_not_the_end(examine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(doctor, "largest_difference", fail)
    monkeypatch.setattr(doctor, "least_seconds", fail)
    found = list(examine())
    assert {(finding.state, finding.result) for finding in found} == {("broken", "no kernel image is available")}


def test_findings_come_before_their_fixes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("operators", "driver", "devices", "parity", "speed", "deepspeed_cache"):
        monkeypatch.setattr(doctor, name, lambda: ())
    findings = [
        doctor.Finding("torch", "ok", "2.10"),
        doctor.Finding("timm", "broken", "not installed", "pip install timm"),
    ]
    monkeypatch.setattr(doctor, "packages", lambda: findings)
    assert not doctor.doctor()
    *table, fix, broken = capsys.readouterr().out.splitlines()
    assert any("timm" in line and "not installed" in line for line in table)
    assert (fix, broken) == ("timm: pip install timm", "1 broken")
    findings.pop()
    assert doctor.doctor()
    assert capsys.readouterr().out.splitlines()[-1] == "nothing essential is broken"
