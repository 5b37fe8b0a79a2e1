"""The map between category ids and labels."""

import pytest
from ddetr.data.categories import Categories

COCO = [{"id": 56, "name": "broccoli"}, {"id": 1, "name": "person"}, {"id": 23, "name": "bear"}]


def test_labels_follow_sparse_ids_in_order():
    categories = Categories.from_coco(COCO)
    assert categories.ids == (1, 23, 56)
    assert categories.names == ("person", "bear", "broccoli")
    assert [categories.label(i) for i in (1, 23, 56)] == [0, 1, 2]
    assert len(categories) == 3
    assert 23 in categories
    assert 2 not in categories


def test_json_keeps_the_order_of_labels():
    categories = Categories(ids=(9, 2), names=("b", "a"))
    assert Categories.from_json(categories.to_json()) == categories


def test_unknown_and_repeated_ids_are_named():
    with pytest.raises(ValueError, match=r"category id 7 .*\[1, 23, 56\]"):
        Categories.from_coco(COCO).label(7)
    with pytest.raises(ValueError, match=r"unique, repeated: \[1\]"):
        Categories.from_coco([*COCO, {"id": 1, "name": "again"}])
    with pytest.raises(ValueError, match='integer "id"'):
        Categories.from_coco([{"id": "one", "name": "person"}])
