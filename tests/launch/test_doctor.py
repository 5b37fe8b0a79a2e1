"""`ddetr doctor` on this machine, and on machines that lack something."""

import shutil
import subprocess
import sys
from pathlib import Path

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
    built, stuck = tmp_path / "built_op", tmp_path / "stuck_op"
    for folder in (built, stuck):
        folder.mkdir()
        (folder / "build.ninja").touch()
    (built / "built_op.so").touch()
    (stuck / "lock").touch()
    found = {finding.subject: finding for finding in doctor.deepspeed_cache()}
    assert found["built_op"].state == "ok"
    assert found["stuck_op"].state == "note"
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
