// The CPU operators: allocate, choose the instruction set, run.
#include "cpu.h"

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ddetr::cpu {

namespace {

enum Capability : int { kPortable, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Capability detected() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  // Every processor with AVX2 and FMA converts half floats too (F16C is older).
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

std::atomic<int>& limit_in_use() {
  static std::atomic<int> limit{kAvx512};
  return limit;
}

Capability in_use() {
  static const Capability machine = detected();
  return std::min(machine, static_cast<Capability>(limit_in_use().load()));
}

const Path& path_for(const Problem& problem) {
  if (problem.sum_type == ScalarType::Double) return portable_double;
#if defined(__x86_64__)
  if (in_use() == kAvx512) return avx512;
  if (in_use() == kAvx2) return avx2;
#endif
  return portable;
}

void check_types(const Problem& problem) {
  for (ScalarType type : {problem.value_type, problem.point_type}) {
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
                        type == ScalarType::BFloat16,
                    "tensors must be float64, float32, float16 or bfloat16");
  }
}

// A result of tens of MiB lies in fresh pages at every call; to touch them 4 KiB at a time takes as long as computing.
Tensor in_huge_pages(Tensor result) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t end = begin + result.numel() * result.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  // Advice: where the system does not take it, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

}  // namespace

Tensor Device::forward(const Arguments& arguments) {
  check_types(arguments.problem);
  Tensor output = in_huge_pages(arguments.empty_output());
  if (arguments.scores.numel() == 0) return torch::stable::zero_(output);
  path_for(arguments.problem).forward(arguments.problem, output.mutable_data_ptr());
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> Device::backward(const Arguments& arguments, const Tensor& grad_output_,
                                                            bool needs_reference_gradient) {
  check_types(arguments.problem);
  Tensor grad_output = arguments.contiguous_gradient(grad_output_);
  Tensor grad_value = in_huge_pages(torch::stable::empty_like(arguments.value));
  Tensor grad_reference = arguments.empty_reference_gradient(needs_reference_gradient);
  Tensor grad_coordinates = in_huge_pages(torch::stable::empty_like(arguments.coordinates));
  Tensor grad_scores = in_huge_pages(torch::stable::empty_like(arguments.scores));
  if (arguments.scores.numel() == 0) {
    return {torch::stable::zero_(grad_value), torch::stable::zero_(grad_reference), grad_coordinates, grad_scores};
  }
  Gradients gradients{grad_output.const_data_ptr(), grad_value.mutable_data_ptr(),
                      needs_reference_gradient ? grad_reference.mutable_data_ptr() : nullptr,
                      grad_coordinates.mutable_data_ptr(), grad_scores.mutable_data_ptr()};
  path_for(arguments.problem).backward(arguments.problem, gradients);
  return {grad_value, grad_reference, grad_coordinates, grad_scores};
}

std::string capability(const std::string& limit) {
  if (!limit.empty()) {
    int chosen = -1;
    for (int i = kPortable; i <= kAvx512; ++i) {
      if (limit == kNames[i]) chosen = i;
    }
    STD_TORCH_CHECK(chosen >= 0, "limit must be portable, avx2 or avx512, got ", limit);
    limit_in_use() = chosen;
  }
  return kNames[in_use()];
}

}  // namespace ddetr::cpu
