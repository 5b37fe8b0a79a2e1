// The CPU operators, and the instruction-set paths behind them.
#pragma once

#include <string>

#include "problem.h"

namespace ddetr::cpu {

Tensor deform_attn(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& sampling_locations,
                   const Tensor& attention_weights);
std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(const Tensor& grad_output, const Tensor& value,
                                                        const std::vector<int64_t>& spatial_shapes,
                                                        const Tensor& sampling_locations,
                                                        const Tensor& attention_weights);
Tensor fused_deform_attn(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                         const Tensor& reference_points, const Tensor& sampling_offsets,
                         const Tensor& attention_logits);
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const std::vector<int64_t>& spatial_shapes,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
    bool needs_reference_gradient);

// The instruction set in use; a non-empty limit ("avx512", "avx2", "portable") caps it first.
std::string capability(const std::string& limit);

// Each path is one translation unit around cpu_kernel.h. All compute in float; portable_double in double.
using Forward = void (*)(const Problem&, void* output);
using Backward = void (*)(const Problem&, const Gradients&);
struct Path {
  Forward forward;
  Backward backward;
};
extern const Path portable, portable_double;
#if defined(__x86_64__)
extern const Path avx2, avx512;
#endif

}  // namespace ddetr::cpu
