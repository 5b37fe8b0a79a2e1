"""What a batch holds, and what it is when it crosses from one process to another."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from ddetr.data.batch import PackedBatch, Sample, collate, layout, nothing
from torch.utils.data import DataLoader, IterableDataset


def samples() -> list[Sample]:
    """Of three sizes, with two, no and five objects."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (height, width, objects) in enumerate([(5, 9, 2), (7, 4, 0), (6, 6, 5)]):
        image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        boxes = torch.rand(objects, 4, generator=generator)
        labels = torch.randint(9, (objects,), generator=generator)
        made.append(Sample(image, boxes, labels, 2**40 + number, (10 * height, 10 * width)))
    return made


def assert_holds(packed: PackedBatch, given: list[Sample]) -> None:
    batch = packed.batch()
    assert batch.images.shape == (3, 3, 7, 9)
    for n, sample in enumerate(given):
        h, w = sample.image.shape[1:]
        assert torch.equal(batch.images[n, :, :h, :w], sample.image)
        assert int(batch.images[n].count_nonzero()) == 3 * h * w  # none of the images' own pixels is zero
        expected = torch.ones(7, 9, dtype=torch.bool)
        expected[:h, :w] = False
        assert torch.equal(batch.padding_mask[n], expected)
    assert torch.equal(batch.boxes_cxcywh, torch.cat([sample.boxes_cxcywh for sample in given]))
    assert torch.equal(batch.labels, torch.cat([sample.labels for sample in given]))
    assert batch.num_boxes.tolist() == [2, 0, 5]
    assert batch.image_ids.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    assert batch.original_sizes.tolist() == [[50, 90], [70, 40], [60, 60]]
    assert batch.is_real.tolist() == [True, True, True]


def test_images_are_padded_and_boxes_in_a_row() -> None:
    assert_holds(collate(samples()), samples())


def test_a_place_without_image_is_marked() -> None:
    batch = collate([samples()[0], nothing()], ["shard-000000.tar: sample 7: damaged"]).batch()
    assert batch.is_real.tolist() == [True, False]
    assert batch.image_ids.tolist() == [2**40, -1]
    assert batch.bad_samples == ("shard-000000.tar: sample 7: damaged",)
    assert int(batch.images[1].count_nonzero()) == 0


def test_a_batch_without_objects_and_one_without_samples() -> None:
    batch = collate([nothing(), nothing()]).batch()
    assert batch.boxes_cxcywh.shape == (0, 4)
    assert batch.labels.shape == (0,)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


@pytest.mark.parametrize("images", [1, 2, 3, 7])
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_each_tensor_begins_where_its_type_may(images: int, objects: int) -> None:
    start = 0
    for dtype, shape in layout(images, 3, 5, objects).values():
        assert start % dtype.itemsize == 0
        start += dtype.itemsize * torch.Size(shape).numel()


class Worker(IterableDataset[PackedBatch]):
    def __iter__(self):
        yield collate(samples(), ["a message"])


@pytest.mark.integration
def test_a_worker_hands_over_one_tensor_in_shared_memory() -> None:
    (packed,) = DataLoader(Worker(), batch_size=None, num_workers=1)
    assert packed.packed.is_shared()
    assert packed.bad_samples == ("a message",)
    assert_holds(packed, samples())
    # Each tensor that crosses is rebuilt by one call of this function.
    assert bytes(ForkingPickler.dumps(packed)).count(b"rebuild_tensor") == 1


def test_it_can_be_stored_and_read_again() -> None:
    assert_holds(pickle.loads(pickle.dumps(collate(samples()))), samples())
