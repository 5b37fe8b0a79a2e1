"""Boxes against torchvision's operators and hand-made cases."""

import pytest
import torch
from ddetr.data import boxes
from torchvision import ops
from torchvision.ops import box_convert


def random_xyxy(*shape: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((corners.amin(-2), corners.amax(-2)), dim=-1)


@pytest.mark.parametrize(
    ("function", "source", "target"),
    [
        (boxes.cxcywh_to_xyxy, "cxcywh", "xyxy"),
        (boxes.xyxy_to_cxcywh, "xyxy", "cxcywh"),
        (boxes.xywh_to_xyxy, "xywh", "xyxy"),
        (boxes.xyxy_to_xywh, "xyxy", "xywh"),
    ],
)
def test_conversions_agree_with_torchvision(function, source, target):
    given = box_convert(random_xyxy(50), "xyxy", source)
    torch.testing.assert_close(function(given), box_convert(given, source, target))


def test_clip_keeps_the_part_inside_and_area_is_never_negative():
    given = torch.tensor([[-5.0, -5, 5, 5], [90, 40, 120, 60], [200, 10, 210, 20], [10, 10, 4, 4]])
    clipped = boxes.clip(given, height=50, width=100)
    assert clipped.tolist() == [[0, 0, 5, 5], [90, 40, 100, 50], [100, 10, 100, 20], [10, 10, 4, 4]]
    assert boxes.area(clipped).tolist() == [25, 100, 0, 0]
    assert boxes.is_degenerate(clipped).tolist() == [False, False, True, True]


def test_numbers_that_are_not_finite_are_degenerate():
    given = torch.tensor([[0.0, 0, 1, 1], [0, 0, float("nan"), 1], [0, 0, float("inf"), 1]])
    assert boxes.is_degenerate(given).tolist() == [False, True, True]


def test_overlap_agrees_with_torchvision():
    a, b = random_xyxy(30), random_xyxy(40, seed=1)
    torch.testing.assert_close(boxes.box_iou(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(boxes.generalized_box_iou(a, b), ops.generalized_box_iou(a, b))


def test_overlap_broadcasts_over_leading_dimensions_and_pairs():
    a, b = random_xyxy(3, 1, 5), random_xyxy(4, 6, seed=1)
    every = boxes.generalized_box_iou(a, b)
    assert every.shape == (3, 4, 5, 6)
    torch.testing.assert_close(every[2, 3], ops.generalized_box_iou(a[2, 0], b[3]))
    paired = boxes.paired_generalized_box_iou(a[:, 0], b[:3, :5])
    torch.testing.assert_close(paired[1, 4], ops.generalized_box_iou(a[1, :, 4], b[1, 4:5])[0, 0])


def test_half_precision_is_computed_in_float32():
    a, b = random_xyxy(5).bfloat16(), random_xyxy(5, seed=1).bfloat16()
    result = boxes.generalized_box_iou(a, b)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, ops.generalized_box_iou(a.float(), b.float()))


def test_boxes_without_area_give_finite_values_and_gradients():
    a = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.4]], requires_grad=True)
    result = boxes.paired_generalized_box_iou(a, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.3, 0.3]]))
    result.sum().backward()
    assert result.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_gradient_of_generalized_iou_against_finite_differences():
    a, b = random_xyxy(4).double().requires_grad_(), random_xyxy(3, seed=1).double()
    assert torch.autograd.gradcheck(lambda a: boxes.generalized_box_iou(a, b), (a,))
