// Generic CUDA path: any number of channels, levels and points, 64-bit indexing, float64 too. Right, not fast.
#include "cuda_kernels.cuh"

#include <type_traits>

namespace ddetr::cuda {
namespace {

constexpr int kThreads = 256;

template <class Stored>
using Sum = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

__device__ inline int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t index_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// A thread per item: softmax and locations (fused operator), or just wider numbers (plain operator).
template <class Stored>
__global__ void locate_kernel(const __grid_constant__ Call call, Sum<Stored>* locations, Sum<Stored>* weights) {
  using T = Sum<Stored>;
  const int all_points = call.levels * call.points;
  for (int64_t item = first_index(); item < call.items; item += index_step()) {
    const Stored* scores = static_cast<const Stored*>(call.scores) + item * all_points;
    const Stored* coordinates = static_cast<const Stored*>(call.coordinates) + 2 * item * all_points;
    T* weight = weights + item * all_points;
    T* location = locations + 2 * item * all_points;
    T largest = -INFINITY, sum = 0;
    for (int i = 0; i < all_points; ++i) largest = max(largest, T(widened(scores[i])));
    if (call.reference_size != 0) {
      for (int i = 0; i < all_points; ++i) sum += exp(T(widened(scores[i])) - largest);
    }
    for (int i = 0; i < all_points; ++i) {
      const T score = widened(scores[i]);
      weight[i] = call.reference_size != 0 ? exp(score - largest) / sum : score;
      for (int axis = 0; axis < 2; ++axis) {
        T origin = 0, scale = 1;
        if (call.reference_size != 0) {
          const int level = i / call.points;
          const Stored* reference = static_cast<const Stored*>(call.reference) +
                                    (item / call.heads * call.levels + level) * call.reference_size;
          reference_and_scale(call, reference, level, axis, origin, scale);
        }
        location[2 * i + axis] = origin + T(widened(coordinates[2 * i + axis])) * scale;
      }
    }
  }
}

// A thread per (item, channel).
template <class V>
__global__ void forward_kernel(const __grid_constant__ Call call, const Sum<V>* locations, const Sum<V>* weights,
                               V* output) {
  using T = Sum<V>;
  const int all_points = call.levels * call.points;
  const int64_t stride = static_cast<int64_t>(call.heads) * call.channels;
  for (int64_t index = first_index(); index < call.items * call.channels; index += index_step()) {
    const int64_t item = index / call.channels, channel = index % call.channels;
    const int64_t head = item % call.heads, batch = item / call.heads / call.queries;
    const V* const value =
        static_cast<const V*>(call.value) + batch * call.positions * stride + head * call.channels + channel;
    T sum = 0;
    for (int i = 0; i < all_points; ++i) {
      const int level = i / call.points;
      const int64_t place = item * all_points + i;
      const Corners<T> corners(locations[2 * place], locations[2 * place + 1], call.height[level], call.width[level],
                               call.start[level]);
      const T weight = weights[place];
      sum += corners.poison + (weight - weight);
      for (int k = 0; k < 4; ++k) {
        if (corners.row[k] >= 0) sum += weight * corners.share(k) * T(widened(value[corners.row[k] * stride]));
      }
    }
    output[index] = narrowed<V>(sum);
  }
}

// A thread per (item, point).
template <class V>
__global__ void backward_kernel(const __grid_constant__ Call call, const Sum<V>* locations, const Sum<V>* weights,
                                const V* grad_output, Sum<V>* grad_value, Sum<V>* grad_locations,
                                Sum<V>* grad_weights) {
  using T = Sum<V>;
  const int all_points = call.levels * call.points;
  const int64_t stride = static_cast<int64_t>(call.heads) * call.channels;
  for (int64_t place = first_index(); place < call.items * all_points; place += index_step()) {
    const int64_t item = place / all_points;
    const int level = static_cast<int>(place % all_points) / call.points;
    const int64_t head = item % call.heads, batch = item / call.heads / call.queries;
    const int64_t first = batch * call.positions * stride + head * call.channels;
    const Corners<T> corners(locations[2 * place], locations[2 * place + 1], call.height[level], call.width[level],
                             call.start[level]);
    const T poison = corners.poison + (weights[place] - weights[place]);
    const T weight = weights[place] + poison;
    T dots[4] = {0, 0, 0, 0};
    for (int channel = 0; channel < call.channels; ++channel) {
      const T gradient = widened(grad_output[item * call.channels + channel]);
      for (int k = 0; k < 4; ++k) {
        if (corners.row[k] < 0) continue;
        const int64_t at = first + corners.row[k] * stride + channel;
        dots[k] += gradient * T(widened(static_cast<const V*>(call.value)[at]));
        atomicAdd(grad_value + at, weight * corners.share(k) * gradient);
      }
    }
    const T top = dots[0] + corners.fx * (dots[1] - dots[0]), bottom = dots[2] + corners.fx * (dots[3] - dots[2]);
    const T across = (dots[1] - dots[0]) + corners.fy * ((dots[3] - dots[2]) - (dots[1] - dots[0]));
    grad_weights[place] = top + corners.fy * (bottom - top) + poison;
    grad_locations[2 * place] = weight * T(call.width[level]) * across;
    grad_locations[2 * place + 1] = weight * T(call.height[level]) * (bottom - top);
  }
}

// A thread per item: gradients of offsets, logits and reference points (fused operator), or just narrower numbers.
template <class Stored>
__global__ void finish_kernel(const __grid_constant__ Call call, const Sum<Stored>* weights,
                              const Sum<Stored>* grad_locations, const Sum<Stored>* grad_weights,
                              const __grid_constant__ CallGradients gradients) {
  using T = Sum<Stored>;
  const int all_points = call.levels * call.points;
  for (int64_t item = first_index(); item < call.items; item += index_step()) {
    const int64_t first = item * all_points;
    const Stored* coordinates = static_cast<const Stored*>(call.coordinates) + 2 * first;
    Stored* grad_coordinates = static_cast<Stored*>(gradients.coordinates) + 2 * first;
    Stored* grad_scores = static_cast<Stored*>(gradients.scores) + first;
    T mean = 0;
    for (int i = 0; i < all_points; ++i) mean += weights[first + i] * grad_weights[first + i];
    for (int i = 0; i < all_points; ++i) {
      const T grad = grad_weights[first + i];
      grad_scores[i] = narrowed<Stored>(call.reference_size != 0 ? weights[first + i] * (grad - mean) : grad);
    }
    for (int level = 0; level < call.levels; ++level) {
      for (int axis = 0; axis < 2; ++axis) {
        T origin = 0, scale = 1, moved = 0, stretched = 0;
        if (call.reference_size != 0) {
          const Stored* reference = static_cast<const Stored*>(call.reference) +
                                    (item / call.heads * call.levels + level) * call.reference_size;
          reference_and_scale(call, reference, level, axis, origin, scale);
        }
        for (int i = level * call.points; i < (level + 1) * call.points; ++i) {
          const T grad = grad_locations[2 * (first + i) + axis];
          grad_coordinates[2 * i + axis] = narrowed<Stored>(grad * scale);
          moved += grad;
          stretched += grad * T(widened(coordinates[2 * i + axis])) * T(0.5) / T(call.points);
        }
        if (gradients.reference != nullptr) {
          T* const target =
              static_cast<T*>(gradients.reference) + (item * call.levels + level) * call.reference_size;
          target[axis] = moved;
          if (call.reference_size == 4) target[2 + axis] = stretched;
        }
      }
    }
  }
}

unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20);  // the kernels loop over the rest
}

// Calls run with a null pointer of the type.
template <class Run>
cudaError_t with_type(int type, const Run& run) {
  switch (type) {
    case kFloat: return run(static_cast<float*>(nullptr));
    case kHalf: return run(static_cast<Half*>(nullptr));
    case kBFloat16: return run(static_cast<BFloat16*>(nullptr));
    case kDouble: return run(static_cast<double*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t locate(const Call& call, int point_type, void* locations, void* weights, cudaStream_t stream) {
  return with_type(point_type, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using T = Sum<Stored>;
    return launch(locate_kernel<Stored>, blocks_for(call.items), kThreads, 0, stream, call,
                  static_cast<T*>(locations), static_cast<T*>(weights));
  });
}

cudaError_t forward_generic(const Call& call, int value_type, const void* locations, const void* weights, void* output,
                            cudaStream_t stream) {
  return with_type(value_type, [&](auto* type) {
    using V = std::remove_pointer_t<decltype(type)>;
    using T = Sum<V>;
    return launch(forward_kernel<V>, blocks_for(call.items * call.channels), kThreads, 0, stream, call,
                  static_cast<const T*>(locations), static_cast<const T*>(weights), static_cast<V*>(output));
  });
}

cudaError_t backward_generic(const Call& call, int value_type, const void* locations, const void* weights,
                             const CallGradients& gradients, void* grad_locations, void* grad_weights,
                             cudaStream_t stream) {
  return with_type(value_type, [&](auto* type) {
    using V = std::remove_pointer_t<decltype(type)>;
    using T = Sum<V>;
    return launch(backward_kernel<V>, blocks_for(call.items * call.levels * call.points), kThreads, 0, stream, call,
                  static_cast<const T*>(locations), static_cast<const T*>(weights),
                  static_cast<const V*>(gradients.output), static_cast<T*>(gradients.value),
                  static_cast<T*>(grad_locations), static_cast<T*>(grad_weights));
  });
}

cudaError_t finish(const Call& call, int point_type, const void* weights, const void* grad_locations,
                   const void* grad_weights, const CallGradients& gradients, cudaStream_t stream) {
  return with_type(point_type, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using T = Sum<Stored>;
    return launch(finish_kernel<Stored>, blocks_for(call.items), kThreads, 0, stream, call,
                  static_cast<const T*>(weights), static_cast<const T*>(grad_locations),
                  static_cast<const T*>(grad_weights), gradients);
  });
}

}  // namespace ddetr::cuda
