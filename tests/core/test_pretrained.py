"""Pretrained weights without a network: taken from the cache, or an error that says how they get there."""

import contextlib
import http.server
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from ddetr.core.config import ModelConfig
from ddetr.core.model.backbone import Backbone
from ddetr.core.model.pretrained import check, source
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.processes import finished
from tests.servers import LoopbackServer

NAME = "test_resnet.r160_in1k"
REPOSITORY = f"timm/{NAME}"
NOWHERE = "http://127.0.0.1:1"  # nothing listens there


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which does not answer."""
    for name in ("HF_HUB_CACHE", "ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name))  # as it was, after the test
    without_hub(tmp_path / "hub")
    return tmp_path / "hub"


def test_what_is_in_the_cache_is_taken(cache: Path) -> None:
    """As `hf download` leaves it, and as the advice has it copied."""
    torch.manual_seed(1)
    state = timm.create_model(NAME).state_dict()
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    save_file(state, folder / "snapshots" / commit / "model.safetensors")
    found = source(NAME)
    assert found is not None
    assert found.is_cached
    backbone = Backbone(ModelConfig(backbone=NAME))
    taken = dict(backbone.body.named_parameters())
    assert len(taken) > 10
    for name, weight in taken.items():
        assert torch.equal(weight, state[name]), name
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("backbone", [NAME, f"hf-hub:{REPOSITORY}"])
def test_what_is_not_there_is_said_with_what_to_do(backbone: str, cache: Path) -> None:
    with pytest.raises(OSError, match="its pretrained weights are not in") as raised:
        Backbone(ModelConfig(backbone=backbone))
    message = str(raised.value)
    for part in (
        f"model.backbone={backbone}: ",
        f"not in {cache}, and {NOWHERE}/{REPOSITORY} cannot be reached (Connect",
        f"run `hf download {REPOSITORY}`, and copy the folder models--timm--{NAME} of its cache to {cache} here",
        "HF_HOME",
        "model.pretrained_backbone=false",
    ):
        assert part in message
    assert not cache.exists()
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_says_nothing_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, and no more."""
    silent = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            silent.wait(60)

    with contextlib.closing(LoopbackServer(Handler)) as server:
        server.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("ddetr.core.model.pretrained.PATIENCE_SECONDS", 0.5)
        with pytest.raises(OSError, match="cannot be reached \\(ReadTimeout"):
            Backbone(ModelConfig(backbone=NAME))
        silent.set()


class Hub(http.server.BaseHTTPRequestHandler):
    """Says of every file that it is there."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("X-Repo-Commit", "0" * 40), ("ETag", "1"), ("Content-Length", "9")):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_cache_that_cannot_be_written_to_is_said_to_be_the_reason(cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    with contextlib.closing(LoopbackServer(Hub)) as server:
        server.start()
        constants.ENDPOINT = f"http://127.0.0.1:{server.server_port}"
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        with pytest.raises(
            OSError, match=rf"cannot be kept in {cache} \(.*\)\. Set HF_HOME to a folder of yours\. With"
        ):
            Backbone(ModelConfig(backbone=NAME))
        check(NAME)  # the hub answers


def test_what_timm_cannot_build_is_no_question_of_weights(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"timm cannot build it as a feature extractor with model.dilation=true"):
        Backbone(ModelConfig(backbone="dla34", levels=1, dilation=True))


def test_weights_beside_the_hub_are_looked_for_in_the_cache_of_torch(cache: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = source("legacy_seresnet18")
    assert found is not None
    assert (found.is_hub, found.is_cached, found.setting) == (False, False, "TORCH_HOME")
    file = Path(found.cache) / found.address.rpartition("/")[2]
    assert file.is_relative_to(tmp_path)
    file.parent.mkdir(parents=True)
    file.touch()
    assert source("legacy_seresnet18") == replace(found, is_cached=True)
    check("legacy_seresnet18")
    file.unlink()
    check("legacy_seresnet18")  # other servers are not asked
    assert source("resnet5000") is None


def without_hub(cache: Path) -> None:
    """As the variables HF_HOME and HF_ENDPOINT do at the import."""
    constants.HF_HUB_CACHE = str(cache)
    constants.ENDPOINT = NOWHERE
    constants.HUGGINGFACE_CO_URL_TEMPLATE = NOWHERE + "/{repo_id}/resolve/{revision}/{filename}"


@pytest.mark.integration
def test_a_run_says_so_before_it_writes_anything(synthetic_shards: Path, tmp_path: Path) -> None:
    line = ["train", "r50", f"data.train={synthetic_shards}", "train.batch_size=4", f"train.output={tmp_path}/runs"]
    line += ["train.device=cpu", "train.name=run", "train.precision=fp32", "monitor.port=0"]
    for options in (["--dry-run"], []):
        result = finished(*line, *options, first=partial(without_hub, tmp_path / "hub"))
        assert result.returncode == 2, result.stdout + result.stderr
        said = result.stderr.splitlines()[-1]
        assert said.startswith("ddetr: model.backbone=resnet50.tv_in1k: its pretrained weights are not in"), said
        assert "model.pretrained_backbone=false" in said
        assert "Traceback" not in result.stderr
        assert "Retrying" not in result.stderr
        assert not (tmp_path / "runs").exists()
    assert f"fetching its weights from {NOWHERE}/timm/resnet50.tv_in1k into {tmp_path}/hub" in result.stdout
