// The CUDA operators: allocate, choose the path, launch on the current stream, raise what a launch reports.
//
// Nothing here waits for the device. A library of its own, because it links libtorch_cuda.
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda_kernels.cuh"
#include "operators.h"

namespace ddetr::cuda {
namespace {

// The device's code is chosen when a kernel is first looked up: say what to do when there is none.
#define DDETR_CHECK_LAUNCH(expression)                                                                             \
  do {                                                                                                             \
    const cudaError_t error = (expression);                                                                        \
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&         \
                        error != cudaErrorUnsupportedPtxVersion,                                                   \
                    "ops/_C_cuda.so has no code for this GPU (compute capability ", capability_of_device(),        \
                    "); it was built for " DDETR_CUDA_ARCHITECTURES ". Build it again with\n"                      \
                    "    TORCH_CUDA_ARCH_LIST=", capability_of_device(),                                           \
                    " pip install --no-build-isolation --no-deps --force-reinstall PATH_TO_THE_DDETR_SOURCES");    \
    STD_CUDA_CHECK(error);                                                                                         \
  } while (0)

std::string capability_of_device() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return std::to_string(major) + "." + std::to_string(minor);
}

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Half: return kHalf;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Double: return kDouble;
    default: STD_TORCH_CHECK(false, "tensors must be float64, float32, float16 or bfloat16");
  }
  return kFloat;
}

Call call_of(const Problem& p) {
  STD_TORCH_CHECK(p.levels <= kMaxLevels, "on CUDA there may be at most ", kMaxLevels, " levels, got ", p.levels);
  STD_TORCH_CHECK(p.heads <= INT32_MAX && p.channels <= INT32_MAX && p.levels * p.points <= INT32_MAX,
                  "heads, channels and points must each fit 31 bits");
  Call call{};
  call.items = p.batch * p.queries * p.heads;
  call.queries = p.queries, call.positions = p.positions;
  call.heads = static_cast<int>(p.heads), call.channels = static_cast<int>(p.channels);
  call.levels = static_cast<int>(p.levels), call.points = static_cast<int>(p.points);
  call.reference_size = static_cast<int>(p.reference_size);
  call.points_are_wide = p.point_type == ScalarType::Float;
  int64_t start = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    call.height[level] = static_cast<int>(p.shapes[2 * level]);
    call.width[level] = static_cast<int>(p.shapes[2 * level + 1]);
    call.start[level] = static_cast<int>(start);
    start += p.shapes[2 * level] * p.shapes[2 * level + 1];
  }
  call.value = p.value, call.reference = p.reference, call.coordinates = p.coordinates, call.scores = p.scores;
  return call;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The tuned kernels load 16 bytes at a time and hold offsets within one batch element in 31 bits.
bool fits_tuned(const Problem& p, const void* output) {
  return (p.channels == 16 || p.channels == 32 || p.channels == 64) && p.levels * p.points <= 32 &&
         p.value_type != ScalarType::Double && p.positions * p.heads * p.channels <= INT32_MAX &&
         p.batch * p.queries * p.heads <= INT32_MAX && aligned(p.value) && aligned(p.coordinates) &&
         aligned(p.scores) && aligned(output) && (p.reference == nullptr || aligned(p.reference));
}

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
};

// Locations and weights in the sum's type, for the generic path.
struct Located {
  Tensor locations, weights;
  Located(const Arguments& arguments, const Call& call, cudaStream_t stream)
      : locations(arguments.coordinates), weights(arguments.scores) {
    const Problem& p = arguments.problem;
    if (p.reference_size == 0 && p.point_type == p.sum_type) return;
    locations = torch::stable::new_empty(arguments.coordinates, arguments.coordinates.sizes(), p.sum_type);
    weights = torch::stable::new_empty(arguments.scores, arguments.scores.sizes(), p.sum_type);
    DDETR_CHECK_LAUNCH(
        locate(call, type_of(p.point_type), locations.mutable_data_ptr(), weights.mutable_data_ptr(), stream));
  }
};

struct Device {
  static Tensor forward(const Arguments& arguments);
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& arguments, const Tensor& grad_output,
                                                             bool needs_reference_gradient);
};

Tensor Device::forward(const Arguments& arguments) {
  const Problem& p = arguments.problem;
  const Launch launch(arguments.value);
  const Type value_type = type_of(p.value_type);
  const Call call = call_of(p);
  Tensor output = arguments.empty_output();
  if (output.numel() == 0) return output;
  if (p.levels * p.points == 0) return torch::stable::zero_(output);
  if (fits_tuned(p, output.const_data_ptr())) {
    DDETR_CHECK_LAUNCH(forward_tuned(call, value_type, output.mutable_data_ptr(), launch.stream));
    return output;
  }
  const Located located(arguments, call, launch.stream);
  DDETR_CHECK_LAUNCH(forward_generic(call, value_type, located.locations.const_data_ptr(),
                                     located.weights.const_data_ptr(), output.mutable_data_ptr(), launch.stream));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> Device::backward(const Arguments& arguments, const Tensor& grad_output_,
                                                            bool needs_reference_gradient) {
  const Problem& p = arguments.problem;
  const Launch launch(arguments.value);
  const Type value_type = type_of(p.value_type);
  const Call call = call_of(p);
  Tensor grad_output = arguments.contiguous_gradient(grad_output_);
  // Atomics sum in float32 (float64): half sums would lose the small parts.
  Tensor sums = torch::stable::new_zeros(arguments.value, arguments.value.sizes(), p.sum_type);
  Tensor grad_reference = arguments.empty_reference_gradient(needs_reference_gradient);
  Tensor grad_coordinates = torch::stable::empty_like(arguments.coordinates);
  Tensor grad_scores = torch::stable::empty_like(arguments.scores);
  if (arguments.scores.numel() == 0) {
    torch::stable::zero_(grad_reference);
  } else {
    const CallGradients gradients{grad_output.const_data_ptr(), sums.mutable_data_ptr(),
                                  needs_reference_gradient ? grad_reference.mutable_data_ptr() : nullptr,
                                  grad_coordinates.mutable_data_ptr(), grad_scores.mutable_data_ptr()};
    if (fits_tuned(p, grad_output.const_data_ptr())) {
      DDETR_CHECK_LAUNCH(backward_tuned(call, value_type, gradients, launch.stream));
    } else {
      const Located located(arguments, call, launch.stream);
      Tensor grad_locations = torch::stable::empty_like(located.locations);
      Tensor grad_weights = torch::stable::empty_like(located.weights);
      DDETR_CHECK_LAUNCH(backward_generic(call, value_type, located.locations.const_data_ptr(),
                                          located.weights.const_data_ptr(), gradients,
                                          grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr(),
                                          launch.stream));
      DDETR_CHECK_LAUNCH(finish(call, type_of(p.point_type), located.weights.const_data_ptr(),
                                grad_locations.const_data_ptr(), grad_weights.const_data_ptr(), gradients,
                                launch.stream));
    }
  }
  return {torch::stable::to(sums, p.value_type), grad_reference, grad_coordinates, grad_scores};
}

std::string architectures() { return DDETR_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace ddetr::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ddetr, library) { library.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ddetr, CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", TORCH_BOX(&ddetr::cuda::architectures));
}

STABLE_TORCH_LIBRARY_IMPL(ddetr, CUDA, library) {
  using Operators = ddetr::Operators<ddetr::cuda::Device>;
  library.impl("deform_attn", TORCH_BOX(&Operators::deform_attn));
  library.impl("deform_attn_backward", TORCH_BOX(&Operators::deform_attn_backward));
  library.impl("fused_deform_attn", TORCH_BOX(&Operators::fused_deform_attn));
  library.impl("fused_deform_attn_backward", TORCH_BOX(&Operators::fused_deform_attn_backward));
}
