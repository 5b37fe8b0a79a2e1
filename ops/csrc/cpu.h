// The CPU operators, and the instruction-set paths behind them.
#pragma once

#include <string>

#include "problem.h"

namespace ddetr::cpu {

struct Device {
  static Tensor forward(const Arguments& arguments);
  // Gradients of value, reference points (by head; empty when not wanted), coordinates and scores.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& arguments, const Tensor& grad_output,
                                                             bool needs_reference_gradient);
};

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
