// The four operators of a device, as the schema has them; the device brings forward() and backward().
#pragma once

#include "problem.h"

namespace ddetr {

template <class Device>
struct Operators {
  static Tensor deform_attn(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                            const Tensor& sampling_locations, const Tensor& attention_weights) {
    return Device::forward(Arguments(value, spatial_shapes, nullptr, sampling_locations, attention_weights));
  }

  static std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                                 const std::vector<int64_t>& spatial_shapes,
                                                                 const Tensor& sampling_locations,
                                                                 const Tensor& attention_weights) {
    const Arguments arguments(value, spatial_shapes, nullptr, sampling_locations, attention_weights);
    auto [grad_value, unused, grad_locations, grad_weights] = Device::backward(arguments, grad_output, false);
    return {grad_value, grad_locations, grad_weights};
  }

  static Tensor fused_deform_attn(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                                  const Tensor& reference_points, const Tensor& sampling_offsets,
                                  const Tensor& attention_logits) {
    return Device::forward(Arguments(value, spatial_shapes, &reference_points, sampling_offsets, attention_logits));
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, const std::vector<int64_t>& spatial_shapes,
      const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
      bool needs_reference_gradient) {
    const Arguments arguments(value, spatial_shapes, &reference_points, sampling_offsets, attention_logits);
    return Device::backward(arguments, grad_output, needs_reference_gradient);
  }
};

}  // namespace ddetr
