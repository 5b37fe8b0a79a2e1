"""Pretrained weights of backbones: where timm looks for them, and what to do when they are not there.

timm takes them from the Hugging Face hub, through its cache, or from another address, through torch's cache.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from timm.models import get_pretrained_cfg, parse_model_name

log = logging.getLogger("ddetr")

PATIENCE_SECONDS = 5.0  # for the hub to say anything at all, where its own client would try for 40
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the first one found is taken


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone come from, and the file that holds them, in its cache and at its origin."""

    address: str
    cache: str
    setting: str  # environment variables that name another cache
    bring: str  # how the file gets into the cache by hand
    is_cached: bool
    is_hub: bool


def source(backbone: str) -> Source | None:
    """Where timm fetches a backbone's weights; None for a model of a local folder and one without weights."""
    kind, name = parse_model_name(backbone)
    config = get_pretrained_cfg(name, allow_unregistered=True) if kind is None else None
    repository = name.partition("@")[0] if kind == "hf-hub" else (config.hf_hub_id if config else None)
    if repository:
        files = (config.hf_hub_filename,) if config and config.hf_hub_filename else _HUB_FILES
        cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
        if kind == "hf-hub":
            cached &= isinstance(try_to_load_from_cache(repository, "config.json"), str)
        folder = f"models--{repository.replace('/', '--')}"
        return Source(
            address=f"{constants.ENDPOINT}/{repository}",
            cache=constants.HF_HUB_CACHE,
            setting="HF_HOME",
            bring=f"run `hf download {repository}`, and copy the folder {folder} of its cache",
            is_cached=cached,
            is_hub=True,
        )
    if not config or not config.url or not isinstance(config.url, str):
        return None
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / Path(urlsplit(config.url).path).name
    return Source(config.url, str(cache), "TORCH_HOME", "download the file, and copy it", file.exists(), False)


@contextlib.contextmanager
def fetching(backbone: str, weights: bool) -> Iterator[None]:
    """A context in which timm may fetch a backbone's weights, and its configuration if only the hub has that.

    What is in the cache is taken without asking the hub. Raises OSError that says where the weights are looked for and
    how to do with or without them; if the hub does not answer, after PATIENCE_SECONDS.
    """
    found = source(backbone) if weights or ":" in backbone else None
    if found is None:
        yield
        return
    offline, silence = constants.HF_HUB_OFFLINE, None
    if not found.is_cached and not offline:
        log.info("model.backbone=%s: fetching its weights from %s into %s", backbone, found.address, found.cache)
        silence = _silence(found)
    constants.HF_HUB_OFFLINE = offline or found.is_cached or silence is not None
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, AssertionError, KeyError, IndexError):  # timm cannot build it
        raise
    except Exception as error:  # each of the libraries that fetch has kinds of its own
        raise OSError(_advice(backbone, found, silence or error)) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def check(backbone: str) -> None:
    """Check that the weights are cached or the hub answers, without fetching them. Raises OSError as `fetching`."""
    found = source(backbone)
    if found is not None and not found.is_cached and (silence := _silence(found)) is not None:
        raise OSError(_advice(backbone, found, silence))


def _silence(found: Source) -> Exception | None:
    """The error that keeps the hub from answering; None for any answer, and for other servers, which are not asked."""
    if not found.is_hub:
        return None
    try:
        get_session().head(found.address, timeout=PATIENCE_SECONDS)
    except Exception as error:  # whatever library the hub's client is made of raises
        return error
    return None


def _advice(backbone: str, found: Source, error: Exception) -> str:
    what = f"model.backbone={backbone}: its pretrained weights"
    anew = "Without them: model.pretrained_backbone=false, and model.backbone_norm=group to train all of it"
    if ":" in backbone:
        anew = "Without them: a model.backbone that timm itself knows, with model.pretrained_backbone=false"
    cause = f"{type(error).__name__}: {error}".split("\n")[0]
    if isinstance(error, OSError) and error.filename:  # of the cache: nothing else is written
        return f"{what} cannot be kept in {found.cache} ({cause}). Set {found.setting} to a folder of yours. {anew}"
    return (
        f"{what} are not in {found.cache}, and {found.address} cannot be reached ({cause}). On a machine that reaches "
        f"it {found.bring} to {found.cache} here ({found.setting} names another place). {anew}"
    )
