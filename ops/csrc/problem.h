// One call of an operator, as the CPU and CUDA kernels see it: sizes and pointers to contiguous data.
//
// N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
// Plain operator: coordinates are locations in [0, 1], scores are attention weights, reference_size is 0.
// Fused operator: coordinates are offsets, scores are logits, reference points have 2 or 4 numbers.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace ddetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Problem {
  int64_t batch, positions, heads, channels, queries, levels, points;
  int64_t reference_size;            // 0 (plain operator), 2 or 4
  std::vector<int64_t> shapes;       // height and width of every level, flat
  ScalarType value_type;             // of value, output and their gradients
  ScalarType point_type;             // of reference, coordinates, scores and their gradients
  ScalarType sum_type;               // float, or double when value is double
  const void* value;                 // (N, S, H, D)
  const void* reference;             // (N, Q, L, 2 or 4), null for the plain operator
  const void* coordinates;           // (N, Q, H, L, P, 2)
  const void* scores;                // (N, Q, H, L, P)
};

struct Gradients {
  const void* output;                // (N, Q, H*D), read
  void* value;                       // as the tensors of Problem, written
  void* reference;                   // (N, Q, H, L, 2 or 4) in sum_type: by head; null when not wanted
  void* coordinates;
  void* scores;
};

// Contiguous copies (or the tensors themselves) and the Problem that points into them.
struct Arguments {
  Tensor value, reference, coordinates, scores;
  Problem problem;

  // The public Python functions explain mistakes; these checks only keep a direct call of torch.ops.ddetr.*
  // from reading outside the tensors.
  Arguments(const Tensor& value_, const std::vector<int64_t>& shapes, const Tensor* reference_,
            const Tensor& coordinates_, const Tensor& scores_)
      : value(torch::stable::contiguous(value_)),
        reference(reference_ ? torch::stable::contiguous(*reference_) : value),
        coordinates(torch::stable::contiguous(coordinates_)),
        scores(torch::stable::contiguous(scores_)) {
    STD_TORCH_CHECK(value.dim() == 4 && coordinates.dim() == 6, "value must be 4-d and coordinates 6-d");
    Problem& p = problem;
    p.batch = value.size(0), p.positions = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
    p.queries = coordinates.size(1), p.levels = coordinates.size(3), p.points = coordinates.size(4);
    p.reference_size = reference_ ? reference.size(reference.dim() - 1) : 0;
    p.shapes = shapes;
    p.value_type = value.scalar_type();
    p.point_type = coordinates.scalar_type();
    p.sum_type = p.value_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    p.value = value.const_data_ptr();
    p.reference = reference_ ? reference.const_data_ptr() : nullptr;
    p.coordinates = coordinates.const_data_ptr();
    p.scores = scores.const_data_ptr();

    int64_t positions = 0;
    for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
      STD_TORCH_CHECK(shapes[i] > 0 && shapes[i + 1] > 0, "spatial_shapes must be positive");
      positions += shapes[i] * shapes[i + 1];
    }
    STD_TORCH_CHECK(static_cast<int64_t>(shapes.size()) == 2 * p.levels && positions == p.positions,
                    "spatial_shapes must hold L pairs whose areas sum to S = ", p.positions);
    STD_TORCH_CHECK(p.positions < INT32_MAX, "one batch element may hold at most 2^31 - 2 positions");
    STD_TORCH_CHECK(coordinates.size(0) == p.batch && coordinates.size(2) == p.heads && coordinates.size(5) == 2,
                    "coordinates must have shape (N, Q, H, L, P, 2)");
    STD_TORCH_CHECK(scores.numel() == p.batch * p.queries * p.heads * p.levels * p.points,
                    "scores must have N*Q*H*L*P elements");
    STD_TORCH_CHECK(p.point_type == p.value_type ||
                        (p.point_type == ScalarType::Float && p.value_type != ScalarType::Double),
                    "coordinates must have value's type, or float32 beside a half value");
    STD_TORCH_CHECK(scores.scalar_type() == p.point_type && (!reference_ || reference.scalar_type() == p.point_type),
                    "reference points, coordinates and scores must have one type");
    STD_TORCH_CHECK(!reference_ || ((p.reference_size == 2 || p.reference_size == 4) &&
                                    reference.numel() == p.batch * p.queries * p.levels * p.reference_size),
                    "reference points must have shape (N, Q, L, 2 or 4)");
    for (const Tensor* tensor : {&reference, &coordinates, &scores}) {
      STD_TORCH_CHECK(tensor->is_cuda() == value.is_cuda() && tensor->get_device_index() == value.get_device_index(),
                      "all tensors must be on one device");
    }
  }

  Tensor empty_output() const {
    return torch::stable::new_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  }

  Tensor contiguous_gradient(const Tensor& grad_output) const {
    STD_TORCH_CHECK(grad_output.numel() == problem.batch * problem.queries * problem.heads * problem.channels &&
                        grad_output.scalar_type() == problem.value_type &&
                        grad_output.is_cuda() == value.is_cuda(),
                    "grad_output must have shape (N, Q, H*D), value's type and its device");
    return torch::stable::contiguous(grad_output);
  }

  Tensor empty_reference_gradient(bool wanted) const {
    const Problem& p = problem;
    if (!wanted) return torch::stable::new_empty(reference, {0}, p.sum_type);
    return torch::stable::new_empty(reference, {p.batch, p.queries, p.heads, p.levels, p.reference_size}, p.sum_type);
  }
};

}  // namespace ddetr
