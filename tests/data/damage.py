"""Damage to shards, as disks and networks do it."""

from ddetr.data.index import ShardIndex


def cut_image(index: ShardIndex, image_id: int) -> tuple[str, str]:
    """Zero the second half of an image inside its shard, which keeps its size; returns shard and key."""
    for shard in index.shards:
        for row in range(len(shard.samples)):
            sample = shard.samples[row]
            if sample["image_id"] == image_id:
                half = int(sample["image_bytes"]) // 2
                with shard.path.open("r+b") as file:
                    file.seek(int(sample["image_offset"]) + half)
                    file.write(bytes(int(sample["image_bytes"]) - half))
                return shard.name, shard.key(row)
    raise AssertionError(image_id)
