"""The one result of an evaluation: a file in its checkpoint's folder, whichever command evaluated it.

A checkpoint may be evaluated on several sets and with several settings; the file has the newest result of each. Only
results of one measure, the same set and settings, can be compared.
"""

import errno
import fcntl
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ...data.documents import as_json, parse_json
from ...data.files import file_sha256, write_whole
from ...data.index import ShardIndex
from ...data.protocols import ProtocolName, protocol_in
from ...data.text import file_name, visible
from ...data.values import described, is_number, member, whole
from ..checkpoint.manifest import MANIFEST, read_manifest
from ..checkpoint.weights import WEIGHTS
from ..config import Config
from .scores import departure, most_detections
from .tally import LONGEST_SCORE, MOST_SCORES

EVALUATION = "evaluation.json"
_VERSION = 2
_OF_FIRST_RELEASE = "metrics.json"  # of its `ddetr eval`
_MOST_BYTES = 1 << 20
_LOCK_SECONDS = 60.0
SHOWN_HOSTS = 4
PARTS = ("decoding", "model", "scoring")  # of an evaluation's work


@dataclass(frozen=True)
class Measure:
    """What a score was measured on, as SHA-256 digests: the shards, and the settings that change the detections."""

    shards: str
    settings: str

    @staticmethod
    def of(config: Config, index: ShardIndex) -> "Measure":
        """The measure of an evaluation with this configuration on these shards."""
        seen = {name: getattr(config.data, name) for name in ("validation_short_side", "long_side")}
        counted = {"top_k": most_detections(config.eval, index.protocol)}
        if index.protocol != "coco":  # the same shards may have another index
            counted |= {"protocol": index.protocol, "categories": index.categories.to_json()}
        settings = json.dumps({**seen, **counted}, sort_keys=True)
        shards = "\n".join(shard.sha256 for shard in index.shards)
        return Measure(*(hashlib.sha256(text.encode()).hexdigest() for text in (shards, settings)))


UNKNOWN = Measure("", "")  # of what `ddetr eval` of the first release wrote, whatever it was on


@dataclass(frozen=True)
class Result:
    """The scores of one checkpoint, and what they were measured on. In a file NaN is null."""

    metrics: dict[str, float]  # by name, 0 to 1; -1 without such objects, NaN where the model was not finite
    headline: str  # the name of the score that checkpoints are compared by
    images: int
    num_not_finite: int  # queries that detect nothing because the model gave infinities or NaN for them
    seconds: float  # from begin to end
    time: float  # since 1970, when it was done
    step: int | None  # of the checkpoint; None for published weights
    epochs: int | None  # that were done then
    weights: str | None  # sha256 of the file of weights; None: of the first release
    measure: Measure | None  # None: of the first release, by the run itself
    protocol: ProtocolName = "coco"  # of the set
    top_k: int | None = None  # most detections of an image; None: not recorded, by earlier versions
    num_bad: int = 0  # damaged images, which are left out
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds of each of PARTS, of all processes together
    by: str = ""  # who evaluated: "train", or the command; empty: by earlier versions, which did not say
    hosts: tuple[str, ...] = ()  # that found the detections

    def score(self, name: str) -> float:
        """The score of this name, 0 to 1; NaN if there is none."""
        score = self.metrics.get(name, math.nan)
        return score if score >= 0 else math.nan

    @property
    def departure(self) -> str:
        """What is to be said beside the numbers where they are not of as many detections as the protocol counts."""
        return departure(self.protocol, self.top_k)

    @property
    def where(self) -> str:
        """The hosts that evaluated: "on node1, node2 and 6 more"; empty if it is not recorded."""
        more = f" and {len(self.hosts) - SHOWN_HOSTS} more" if len(self.hosts) > SHOWN_HOSTS else ""
        return f"on {', '.join(map(visible, self.hosts[:SHOWN_HOSTS]))}{more}" if self.hosts else ""

    @property
    def duration(self) -> str:
        """How long it took, and each part's share: "4.2 s (decoding 31 %, model 62 %, scoring 7 %)"."""
        total = sum(self.parts.values())
        shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in self.parts.items() if total)
        return f"{self.seconds:.1f} s" + (f" ({shares})" if shares else "")

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | (values.pop("measure") or {"shards": None, "settings": None})


def write(folder: Path, result: Result) -> None:
    """Put a result into the file in `folder`, in the place of one of the same measure, whose other scores stay.

    Raises OSError when it cannot be written, and ValueError when what is there is none of ours.
    """
    with _alone(folder):
        others = []
        for other in _read(folder / EVALUATION):
            if other.measure != result.measure:
                others.append(other)
            elif other.weights == result.weights:  # perhaps by a program with protocols of its own
                kept = {name: score for name, score in other.metrics.items() if name not in result.metrics}
                result = replace(result, metrics=result.metrics | kept)
        values = {"version": _VERSION, "results": [other.to_json() for other in (*others, result)]}
        write_whole(folder / EVALUATION, as_json(values, indent=1).encode())


def read(folder: Path) -> list[Result]:
    """The results in a folder of a checkpoint or of results, the newest last; none of other weights than it holds now.

    Raises ValueError that names the file when it cannot be read.
    """
    return _of_weights(_read(folder / EVALUATION), _stated_digest(folder, WEIGHTS))


def folder_of(file: Path) -> Path:
    """The folder into which `ddetr eval` writes results of a file of weights: in its run, or in the file's folder."""
    checkpoint = file.parent
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "eval" / checkpoint.name
    return checkpoint / file_name(file.stem, "_eval")


def known(file: Path) -> list[Result]:
    """The newest result of each measure of a file of weights, even if its checkpoint was deleted.

    Raises ValueError and OSError as `read`.
    """
    elsewhere = folder_of(file)
    found = [*_read(elsewhere / _OF_FIRST_RELEASE), *_read(elsewhere / EVALUATION), *_read(file.parent / EVALUATION)]
    found = _of_weights(found, weights_digest(file) if file.is_file() else None)
    return list({result.measure: result for result in sorted(found, key=lambda result: result.time)}.values())


def is_evaluated(checkpoint: Path, measure: Measure) -> bool:
    """Whether a checkpoint has a result of this measure, or one that cannot be read and may be of it."""
    try:
        return any(result.measure in (measure, None) for result in read(checkpoint))
    except (OSError, ValueError):
        return True


def counted(own: Measure | None, found: Iterable[Measure | None]) -> set[Measure | None]:
    """The measures whose scores are compared: a run's `own`, and None, which the first release recorded for that.

    If no result has one of these, the most frequent measure.
    """
    found = list(found)
    if own in found or None in found:
        return {own, None}
    return {measure for measure, _ in Counter(found).most_common(1)}


def comparable(results: Mapping[Path, list[Result]], own: Measure | None = None) -> dict[Path, Result]:
    """The newest result of each checkpoint that is of a `counted` measure."""
    measures = counted(own, (result.measure for found in results.values() for result in found))
    chosen = {path: [result for result in found if result.measure in measures] for path, found in results.items()}
    return {path: found[-1] for path, found in chosen.items() if found}


def without_score(num_not_finite: int) -> str:
    """The message of an evaluation in which so many queries gave numbers that are not finite."""
    return (
        f"{num_not_finite} queries gave infinities or NaN and detect nothing, so this evaluation has no score: the "
        "model has diverged, or its numbers overflow. Go on from an earlier checkpoint"
    )


def weights_digest(file: Path) -> str:
    """sha256 of a file of weights; from the manifest in its folder where there is one."""
    return _stated_digest(file.parent, file.name) or file_sha256(file)


def _stated_digest(folder: Path, name: str) -> str | None:
    """The SHA-256 of a file by the manifest; None without a usable one."""
    try:
        return member(member(read_manifest(folder)["files"], name, dict), "sha256", str)
    except (OSError, ValueError):
        return None


def _of_weights(found: list[Result], weights: str | None) -> list[Result]:
    return [result for result in found if None in (result.weights, weights) or result.weights == weights]


def _read(file: Path) -> list[Result]:
    try:
        if not file.is_file():
            return []
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        values = parse_json(file.read_bytes())
        if isinstance(values, dict) and "version" not in values:
            return [_of_first_release(values, file)]
        if (version := whole(values, "version")) != _VERSION:
            raise ValueError(f"version {version}, this release reads {_VERSION}")
        return [_result(item) for item in member(values, "results", list)]
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({visible(str(error))}): move it away, then evaluate anew") from error


def _of_first_release(values: dict[str, Any], file: Path) -> Result:
    """It wrote COCO's numbers alone."""
    measure = UNKNOWN if file.name == _OF_FIRST_RELEASE else None
    return Result(_metrics(values, "AP"), "AP", 0, 0, 0.0, file.stat().st_mtime, None, None, None, measure)


def _result(item: Any) -> Result:
    headline = member(item, "headline", str)
    times = {name: item.get(name) for name in ("seconds", "time")}
    if bad := [name for name, value in times.items() if not is_number(value)]:
        raise ValueError(f"{bad[0]!r} is {described(times[bad[0]])}")
    digests = {name: item.get(name) for name in ("weights", "shards", "settings")}
    for name, value in digests.items():
        if not (value is None or (isinstance(value, str) and len(value) == 64)):
            raise ValueError(f"{name!r} is {described(value)}")
    shards, settings = digests["shards"], digests["settings"]
    return Result(
        metrics=_metrics(member(item, "metrics", dict), headline),
        headline=headline,
        images=whole(item, "images"),
        num_not_finite=whole(item, "num_not_finite"),
        step=None if item.get("step") is None else whole(item, "step"),
        epochs=None if item.get("epochs") is None else whole(item, "epochs"),
        weights=digests["weights"],
        measure=Measure(shards, settings) if shards and settings else None,
        protocol=protocol_in(item),
        top_k=None if item.get("top_k") is None else whole(item, "top_k", least=1),
        num_bad=whole(item, "num_bad") if "num_bad" in item else 0,
        parts=seconds_in(item, "parts") if "parts" in item else {},
        by=member(item, "by", str) if "by" in item else "",
        hosts=tuple(texts_in(item, "hosts")) if "hosts" in item else (),
        **times,
    )


def texts_in(values: dict[str, Any], name: str) -> list[str]:
    """values[name], a list of texts. Raises ValueError for anything else."""
    texts = member(values, name, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name!r} is {described(texts)}")
    return texts


def seconds_in(values: dict[str, Any], name: str) -> dict[str, float]:
    """values[name], the seconds of PARTS. Raises ValueError for anything else."""
    values = member(values, name, dict)
    if not (set(values) <= set(PARTS) and all(map(is_number, values.values()))):
        raise ValueError(f"{name!r} is {described(values)}")
    return {name: float(value) for name, value in values.items()}


def _metrics(values: dict[str, Any], headline: str) -> dict[str, float]:
    if headline not in values:
        raise ValueError(f"it has no {headline!r}")
    if len(values) > MOST_SCORES or (long := [name for name in values if len(name) > LONGEST_SCORE]):
        what = f"{len(values)} scores" if len(values) > MOST_SCORES else f"a score called {described(long[0])}"
        raise ValueError(f"it has {what}; at most {MOST_SCORES} of {LONGEST_SCORE} characters are read")
    found = {}
    for name, value in values.items():
        missing = value is None or value != value  # NaN, as earlier versions wrote it
        if not (missing or is_number(value)):
            raise ValueError(f"{visible(name)} is {described(value)}")
        found[name] = math.nan if value is None else float(value)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock on the results of a checkpoint, which its run and `ddetr eval` may read and rewrite at once.

    Raises OSError when another program holds the manifest's lock for longer than _LOCK_SECONDS.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        yield
        return
    try:
        file = manifest.open("r+b")  # NFS locks nothing that is opened to be read alone
    except PermissionError:
        file = manifest.open("rb")
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _is_locked(file):
            if time.monotonic() > deadline:
                raise OSError(errno.EWOULDBLOCK, "another program holds its lock", str(manifest))
            time.sleep(0.05)
        yield


def _is_locked(file: BinaryIO) -> bool:
    """Whether this process has the lock now; also where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
