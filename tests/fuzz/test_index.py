"""index.json, annotations and tars of a stranger: read rightly or refused, and no damage is overlooked."""

import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from ddetr.data.doctor import check_shards
from ddetr.data.findings import FIXES, summary
from ddetr.data.index import ShardIndex, ShardReader, tar_members
from ddetr.data.layout import INDEX_NAME, SAMPLE_LIMITS, sample_key
from ddetr.data.text import visible
from hypothesis import strategies as st

from tests.fuzz.strategies import DAMAGES, Damage, Effort, changed, damaged, listing, outcome, watched

ENTRY = {
    "image_id": 7,
    "file_name": "a/b.jpg",
    "height": 16,
    "width": 24,
    "annotations": [
        {"id": 1, "bbox": [1, 2.5, 9, 9], "category_id": 3, "area": 81, "iscrowd": 0},
        {"id": 2, "bbox": [0, 0, 24, 16], "category_id": 5, "area": 384.0, "iscrowd": 1},
    ],
    "orientation": 6,
}


@pytest.fixture
def shards(synthetic_shards: Path, tmp_path: Path) -> Path:
    """A copy that an example may write to."""
    return Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))


def assert_index_is(index: ShardIndex, values: Any, folder: Path) -> None:
    assert [shard.path for shard in index.shards] == [folder / shard["name"] for shard in values["shards"]]
    assert all(path.resolve().parent == folder.resolve() for path in (shard.path for shard in index.shards))
    assert len({shard.name for shard in index.shards}) == len(index.shards)
    for shard, said in zip(index.shards, values["shards"], strict=True):
        assert (shard.bytes, shard.sha256, shard.fingerprint) == (said["bytes"], said["sha256"], said["fingerprint"])
        for name, (least, most) in SAMPLE_LIMITS.items():
            column = [row[name] for row in said["samples"]]
            assert shard.samples[name].tolist() == column
            assert all(type(value) is int and least <= value <= most for value in column)
        for member in ("image", "annotations"):
            assert all(row[f"{member}_offset"] + row[f"{member}_bytes"] <= shard.bytes for row in said["samples"])
    assert index.categories.to_json() == [{"id": item["id"], "name": item["name"]} for item in values["categories"]]
    assert len(set(index.categories.ids)) == len(index.categories)


def test_an_index_is_what_its_json_says_or_refused(effort: Effort, synthetic_shards: Path, tmp_path: Path) -> None:
    values = json.loads((synthetic_shards / INDEX_NAME).read_text())
    values["shards"] = [shard | {"samples": shard["samples"][:3]} for shard in values["shards"][:2]]

    def holds(document: Any) -> None:
        text = json.dumps(document).encode()
        with watched():
            index = outcome(lambda: ShardIndex.parse(text, tmp_path, tmp_path), f"{tmp_path}/{INDEX_NAME}")
        if index is not None:
            assert_index_is(index, document, tmp_path)

    effort(holds, changed(values))


def test_a_damaged_index_gives_no_other_samples(effort: Effort, shards: Path) -> None:
    whole = (shards / INDEX_NAME).read_bytes()
    packed = {_compared(*sample) for sample in _samples(ShardIndex.load(shards))}
    assert len(packed) == 24

    def holds(damage: Damage) -> None:
        (shards / INDEX_NAME).write_bytes(damaged(whole, damage))
        before = listing(shards)
        with watched():
            index = outcome(lambda: ShardIndex.load(shards), shards)
            read = index and outcome(lambda: _samples(index), shards)
        assert listing(shards) == before
        assert {_compared(*sample) for sample in read or ()} <= packed

    effort(holds, DAMAGES)


def _samples(index: ShardIndex) -> list[tuple[bytes, dict[str, Any]]]:
    reader = ShardReader(index)
    try:
        return [reader.sample(n, row) for n, shard in enumerate(index.shards) for row in range(len(shard.samples))]
    finally:
        reader.close()


def _compared(image: bytes, entry: dict[str, Any]) -> tuple[bytes, str]:
    return image, json.dumps(entry)


def one_sample(folder: Path, entry: bytes) -> ShardIndex:
    """A shard of one image with this entry, and an index that fits it."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for suffix, data in (("jpg", b"picture"), ("json", entry)):
            member = tarfile.TarInfo(f"{sample_key(7)}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    row = {"image_id": 7, "height": 16, "width": 24, "num_boxes": 2, "key": sample_key(7)}
    row |= {"image_offset": 512, "image_bytes": 7, "image_crc32": zlib.crc32(b"picture")}
    row |= {"annotations_offset": 1536, "annotations_bytes": len(entry), "annotations_crc32": zlib.crc32(entry)}
    size = (folder / "shard-000000.tar").stat().st_size
    shard = {"name": "shard-000000.tar", "bytes": size, "sha256": "0" * 64, "fingerprint": "0" * 64, "samples": [row]}
    values = {"version": 1, "source": {}, "categories": [{"id": 3, "name": "a"}], "shards": [shard]}
    return ShardIndex.parse(json.dumps(values).encode(), folder, folder)


def test_annotations_in_a_shard_are_of_the_right_types_or_refused(effort: Effort, tmp_path: Path) -> None:
    good = json.dumps(ENTRY).encode()
    assert ShardReader(one_sample(tmp_path / "set", good)).sample(0, 0) == (b"picture", ENTRY)

    def holds(text: bytes) -> None:
        if not text:
            return  # the index has no members of no bytes
        reader = ShardReader(one_sample(tmp_path / "set", text))
        with watched():
            read = outcome(lambda: reader.annotations(0, 0), f"shard-000000.tar: sample {sample_key(7)}: ")
        reader.close()
        if read is None:
            return
        said = {"orientation": 1, **json.loads(text)}
        assert all(read[name] == said[name] for name in read if name != "annotations")
        assert all(type(read[name]) is type(ENTRY[name]) for name in ENTRY)
        for annotation, other in zip(read["annotations"], said["annotations"], strict=True):
            assert annotation == {name: other[name] for name in annotation}
            numbers = [*annotation["bbox"], annotation["area"], annotation["category_id"], annotation["id"]]
            assert len(numbers) == 7
            assert all(type(number) in (int, float) and abs(number) <= 2**63 for number in numbers)
            assert annotation["iscrowd"] in (0, 1)
            assert set(annotation) == set(ENTRY["annotations"][0])

    texts = st.one_of(
        changed(ENTRY).map(lambda values: json.dumps(values).encode()),
        DAMAGES.map(lambda damage: damaged(good, damage)),
    )
    effort(holds, texts)


HEADER_FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155)]
HEADER_VALUES = [b"\0", b"9", b"L", b"K", b"x", b"g", b"S", b"5", b"2", b"V", b"\x80", b"\xff", b"\x80" + b"\x7f" * 11]
HEADER_VALUES += [b"77777777777", b"00000000000", b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\1", b"../../x", b" ", b"-1"]


def test_a_changed_tar_is_read_within_itself_or_refused(effort: Effort, shards: Path, tmp_path: Path) -> None:
    whole = (shards / "shard-000000.tar").read_bytes()
    file = tmp_path / "changed.tar"

    def holds(changes: list[tuple[int, tuple[int, int], bytes]], damage: Damage, signed: bool) -> None:
        data = bytearray(damaged(whole, damage))
        for block, (start, size), value in changes:
            at = block * 512 % (len(data) + 1) + start
            data[at : at + min(size, len(value))] = value[:size]
        for at in range(0, len(data) - 511, 512) if signed else ():  # a header with a right sum is read further
            header = data[at : at + 512]
            if any(header[257:262]):
                header[148:156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % (sum(header) % 8**6)
        file.write_bytes(data)
        with watched():
            members = outcome(lambda: _members(file))
        assert all(
            isinstance(key, str) and offset >= 512 and size >= 0
            for key, places in (members or {}).items()
            for offset, size in places.values()
        )

    change = st.tuples(st.integers(0, 40), st.sampled_from(HEADER_FIELDS), st.sampled_from(HEADER_VALUES))
    effort(holds, st.lists(change, max_size=4), st.just([]) | DAMAGES, st.booleans())


def _members(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    try:
        return tar_members(file)
    except tarfile.TarError as error:  # what it raises, for whoever names the file
        raise ValueError(str(error)) from error


def test_check_finds_every_damage_of_a_folder(effort: Effort, shards: Path) -> None:
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    names = sorted(files)
    assert check_shards(shards, workers=1) == []

    def holds(name: str, damage: Damage | None, added: str | None) -> None:
        for file, data in files.items():
            (shards / file).write_bytes(data)
        for extra in shards.iterdir():
            if extra.name not in files:
                extra.unlink()
        if damage is None:
            (shards / name).unlink()
        else:
            (shards / name).write_bytes(damaged(files[name], damage))
        if added:
            (shards / added).write_bytes(b"added")
        before = listing(shards)
        with watched():
            findings = outcome(lambda: check_shards(shards, workers=1), shards)
        assert listing(shards) == before
        if findings is None:
            assert name == INDEX_NAME
            return
        assert {finding.kind for finding in findings} <= set(FIXES)
        assert all(visible(line) == line for line in summary(findings).split("\n"))
        errors = [finding for finding in findings if finding.severity == "error"]
        if name != INDEX_NAME and (damage is None or damaged(files[name], damage) != files[name]):
            assert any(name in finding.where for finding in errors)
        assert ("extra shard" in {finding.kind for finding in errors}) >= bool(added)

    effort(holds, st.sampled_from(names), st.none() | DAMAGES, st.sampled_from([None, None, "x.tar", "a\nb.tar"]))
