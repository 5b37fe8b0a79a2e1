// What every CUDA kernel of the operators shares: the call as plain data, number conversions, the bilinear corners.
//
// N batch, S positions of all levels together, H heads, D channels of a head, Q queries, L levels, P points.
// An item is one (batch, query, head); items are numbered in the order of the output, (N, Q, H).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace ddetr::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr int kMaxLevels = 64;

// Passed by value: the level table becomes constants of the launch, with no copy and no synchronisation.
struct Call {
  int64_t items;                // N * Q * H
  int64_t queries;
  int64_t positions;
  int heads, channels, levels, points;
  int reference_size;           // 0 (plain operator), 2 or 4
  bool points_are_wide;         // reference, coordinates and scores are float32 beside a half value
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
  const void *value, *reference, *coordinates, *scores;
};

struct CallGradients {
  const void* output;
  void* value;                  // float32 or float64 sums, zeroed
  void* reference;              // by head, or null
  void *coordinates, *scores;
};

__host__ __device__ inline float widened(float x) { return x; }
__host__ __device__ inline double widened(double x) { return x; }
__host__ __device__ inline float widened(Half x) { return __half2float(x); }
__host__ __device__ inline float widened(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__host__ __device__ inline T narrowed(float x);
template <>
__host__ __device__ inline float narrowed<float>(float x) { return x; }
template <>
__host__ __device__ inline Half narrowed<Half>(float x) { return __float2half_rn(x); }
template <>
__host__ __device__ inline BFloat16 narrowed<BFloat16>(float x) { return __float2bfloat16_rn(x); }
template <class T>
__host__ __device__ inline T narrowed(double x) { return static_cast<T>(x); }

// Two neighbours in memory, moved at once.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
template <class T>
__device__ inline float2 read_pair(const T* source) {
  const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(source);
  return make_float2(widened(pair.x), widened(pair.y));
}
template <class T>
__device__ inline void write_pair(T* target, float x, float y) {
  *reinterpret_cast<Pair<T>*>(target) = Pair<T>{narrowed<T>(x), narrowed<T>(y)};
}

// The four pixels around a location and where it lies between them. T: float or double.
template <class T>
struct Corners {
  T fx, fy;                     // right of and below the top left pixel
  int row[4];                   // top left, top right, bottom left, bottom right; -1 outside the map
  T poison;                     // 0, or NaN where the location is not finite

  __device__ Corners(T x, T y, int height, int width, int start) {
    poison = (x - x) + (y - y);
    T px = x * width - T(0.5), py = y * height - T(0.5);
    // Bounded so that the integers below cannot overflow; a NaN becomes -2, which is outside.
    px = px > T(-2) ? px : T(-2), py = py > T(-2) ? py : T(-2);
    px = px < T(width + 1) ? px : T(width + 1), py = py < T(height + 1) ? py : T(height + 1);
    const T left = floor(px), top = floor(py);
    fx = px - left, fy = py - top;
    const int column = static_cast<int>(left), line = static_cast<int>(top);
    const bool in0 = column >= 0 && column < width, in1 = column >= -1 && column + 1 < width;
    const bool on0 = line >= 0 && line < height, on1 = line >= -1 && line + 1 < height;
    const int index = start + line * width + column;
    row[0] = on0 && in0 ? index : -1, row[1] = on0 && in1 ? index + 1 : -1;
    row[2] = on1 && in0 ? index + width : -1, row[3] = on1 && in1 ? index + width + 1 : -1;
  }

  __device__ T share(int k) const { return (k & 1 ? fx : 1 - fx) * (k & 2 ? fy : 1 - fy); }
};

// Fused operator: location = reference + offset * scale, for one axis (0: x, 1: y) of one level.
template <class T, class Stored>
__device__ inline void reference_and_scale(const Call& call, const Stored* reference, int level, int axis,
                                           T& origin, T& scale) {
  origin = widened(reference[axis]);
  scale = call.reference_size == 4 ? widened(reference[2 + axis]) * T(0.5) / T(call.points)
                                   : T(1) / T(axis == 0 ? call.width[level] : call.height[level]);
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...) as a function call, because only nvcc reads that syntax:
// the tests compile these sources with a C++ compiler and run them without a GPU. Returns the launch's error and leaves
// none behind for whoever asks CUDA next.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim.x = blocks, config.blockDim.x = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Each returns the error of its launch. `stream` is a cudaStream_t.
cudaError_t forward_tuned(const Call&, int value_type, void* output, cudaStream_t stream);
cudaError_t backward_tuned(const Call&, int value_type, const CallGradients&, cudaStream_t stream);

// The generic path works on locations and weights in the sum's type (float or double); locate() makes them from
// what the call has, finish() turns their gradients into gradients of what the call has.
cudaError_t locate(const Call&, int point_type, void* locations, void* weights, cudaStream_t stream);
cudaError_t forward_generic(const Call&, int value_type, const void* locations, const void* weights, void* output,
                            cudaStream_t stream);
cudaError_t backward_generic(const Call&, int value_type, const void* locations, const void* weights,
                             const CallGradients&, void* grad_locations, void* grad_weights, cudaStream_t stream);
cudaError_t finish(const Call&, int point_type, const void* weights, const void* grad_locations,
                   const void* grad_weights, const CallGradients&, cudaStream_t stream);

enum Type : int { kFloat, kHalf, kBFloat16, kDouble };

}  // namespace ddetr::cuda
