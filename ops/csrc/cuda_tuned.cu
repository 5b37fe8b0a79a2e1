// Tuned CUDA path: heads of 16, 32 or 64 channels, L*P <= 32, float32, float16 or bfloat16.
//
// A group of 2 to 16 lanes handles one item; each lane holds 16 bytes of its channels, so that a corner is one
// 16-byte load per lane. First the lanes share the points: softmax by shuffles, locations, corners, staged in shared
// memory. Then every lane walks all points, reading the staged numbers as broadcasts. Backward sums the gradients of
// location and weight over the lanes by shuffles and stores them once; only the gradient of value is atomic.
#include "cuda_kernels.cuh"

namespace ddetr::cuda {
namespace {

constexpr int kMaxPoints = 32;  // L*P

// 16 bytes of channels as floats.
template <class V>
struct Pack {
  static constexpr int kCount = 16 / sizeof(V);
  float x[kCount];

  __device__ static Pack load(const V* source) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(source));
    V numbers[kCount];
    memcpy(numbers, &bits, sizeof(bits));
    Pack pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.x[j] = widened(numbers[j]);
    return pack;
  }
  __device__ void store(V* target) const {
    V numbers[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) numbers[j] = narrowed<V>(x[j]);
    uint4 bits;
    memcpy(&bits, numbers, sizeof(bits));
    *reinterpret_cast<uint4*>(target) = bits;
  }
};

__device__ inline void add4(float* target, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
#else
  atomicAdd(target, a), atomicAdd(target + 1, b), atomicAdd(target + 2, c), atomicAdd(target + 3, d);
#endif
}

template <int kLanes>
__device__ inline float sum_over_group(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step, kLanes);
  return x;
}
template <int kLanes>
__device__ inline float max_over_group(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step, kLanes));
  return x;
}

// Numbers i and i + 1 of a tensor that holds float32 or V.
template <class V>
__device__ inline float2 read_pair(const Call& call, const void* tensor, int64_t i) {
  if (call.points_are_wide) return *reinterpret_cast<const float2*>(static_cast<const float*>(tensor) + i);
  const V* source = static_cast<const V*>(tensor) + i;
  return make_float2(widened(source[0]), widened(source[1]));
}
template <class V>
__device__ inline float read(const Call& call, const void* tensor, int64_t i) {
  return call.points_are_wide ? static_cast<const float*>(tensor)[i] : widened(static_cast<const V*>(tensor)[i]);
}
template <class V>
__device__ inline void write(const Call& call, void* tensor, int64_t i, float x) {
  if (call.points_are_wide) {
    static_cast<float*>(tensor)[i] = x;
  } else {
    static_cast<V*>(tensor)[i] = narrowed<V>(x);
  }
}

// Reference point and scale of offsets for one level of one item, as (x, y).
template <class V>
__device__ inline void read_reference(const Call& call, int64_t item, int level, float2& origin, float2& scale) {
  const int64_t first = (item / call.heads * call.levels + level) * call.reference_size;
  if (call.points_are_wide) {
    const float* reference = static_cast<const float*>(call.reference) + first;
    reference_and_scale(call, reference, level, 0, origin.x, scale.x);
    reference_and_scale(call, reference, level, 1, origin.y, scale.y);
  } else {
    const V* reference = static_cast<const V*>(call.reference) + first;
    reference_and_scale(call, reference, level, 0, origin.x, scale.x);
    reference_and_scale(call, reference, level, 1, origin.y, scale.y);
  }
}

// Shared memory of one group: for every point four floats and four row offsets. The padding of 16 bytes puts the
// groups of a warp on different banks.
struct Stage {
  float4* numbers;
  int4* offsets;

  __host__ __device__ static size_t bytes_per_group(int points) { return 2 * (points + 1) * sizeof(float4); }
  __device__ Stage(char* shared, int group, int points) {
    numbers = reinterpret_cast<float4*>(shared + group * bytes_per_group(points));
    offsets = reinterpret_cast<int4*>(numbers + points + 1);
  }
};

// First part, both directions: stages, for every point, (fx, fy, weight, 0) and the corners' offsets in elements.
// A non-finite location or weight makes the staged weight NaN. Every lane of the warp must call this.
template <class V, int kLanes>
__device__ inline void stage_points(const Call& call, int64_t item, bool valid, int lane, const Stage& stage) {
  constexpr int kPerLane = kMaxPoints / kLanes;
  const int all_points = call.levels * call.points;
  float weight[kPerLane];
  float largest = -INFINITY;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int i = lane + k * kLanes;
    weight[k] = valid && i < all_points ? read<V>(call, call.scores, item * all_points + i) : -INFINITY;
    largest = fmaxf(largest, weight[k]);
  }
  if (call.reference_size != 0) {
    largest = max_over_group<kLanes>(largest);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      weight[k] = lane + k * kLanes < all_points ? expf(weight[k] - largest) : 0.0f;
      sum += weight[k];
    }
    sum = sum_over_group<kLanes>(sum);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) weight[k] /= sum;
  }
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int i = lane + k * kLanes;
    if (!valid || i >= all_points) continue;
    const int level = i / call.points;
    float2 location = read_pair<V>(call, call.coordinates, 2 * (item * all_points + i));
    if (call.reference_size != 0) {
      float2 origin, scale;
      read_reference<V>(call, item, level, origin, scale);
      location = make_float2(origin.x + location.x * scale.x, origin.y + location.y * scale.y);
    }
    const Corners<float> corners(location.x, location.y, call.height[level], call.width[level], call.start[level]);
    const int stride = call.heads * call.channels;
    int offset[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) offset[c] = corners.row[c] < 0 ? -1 : corners.row[c] * stride;
    const float poisoned = weight[k] + corners.poison + (weight[k] - weight[k]);
    stage.numbers[i] = make_float4(corners.fx, corners.fy, poisoned, 0.0f);
    stage.offsets[i] = make_int4(offset[0], offset[1], offset[2], offset[3]);
  }
  __syncwarp();
}

template <class V, int kLanes>
__global__ void __launch_bounds__(128) forward_kernel(const __grid_constant__ Call call, V* __restrict__ output) {
  using P = Pack<V>;
  extern __shared__ __align__(16) char shared[];
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + group;
  const bool valid = item < call.items;
  const int all_points = call.levels * call.points;
  const Stage stage(shared, group, all_points);
  stage_points<V, kLanes>(call, item, valid, lane, stage);
  if (!valid) return;

  const int64_t head = item % call.heads, batch = item / call.heads / call.queries;
  const V* const base = static_cast<const V*>(call.value) +
                        (batch * call.positions * call.heads + head) * call.channels + lane * P::kCount;
  P sum = {};
  float poison = 0;
#pragma unroll 4
  for (int i = 0; i < all_points; ++i) {
    const float4 point = stage.numbers[i];
    const int4 offset = stage.offsets[i];
    const float upper = point.z * (1 - point.y), lower = point.z * point.y;
    poison += point.z - point.z;
    const auto add = [&](int from, float weight) {
      if (from < 0) return;
      const P value = P::load(base + from);
#pragma unroll
      for (int j = 0; j < P::kCount; ++j) sum.x[j] = fmaf(weight, value.x[j], sum.x[j]);
    };
    add(offset.x, upper * (1 - point.x));
    add(offset.y, upper * point.x);
    add(offset.z, lower * (1 - point.x));
    add(offset.w, lower * point.x);
  }
#pragma unroll
  for (int j = 0; j < P::kCount; ++j) sum.x[j] += poison;
  sum.store(output + item * call.channels + lane * P::kCount);
}

template <class V, int kLanes>
__global__ void __launch_bounds__(128) backward_kernel(const __grid_constant__ Call call,
                                                       const __grid_constant__ CallGradients gradients) {
  using P = Pack<V>;
  extern __shared__ __align__(16) char shared[];
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + group;
  const bool valid = item < call.items;
  const int all_points = call.levels * call.points;
  const Stage stage(shared, group, all_points);
  stage_points<V, kLanes>(call, item, valid, lane, stage);

  const int64_t head = item % call.heads, batch = item / call.heads / call.queries;
  const int64_t first = (batch * call.positions * call.heads + head) * call.channels + lane * P::kCount;
  const V* const base = static_cast<const V*>(call.value) + first;
  float* const grad_base = static_cast<float*>(gradients.value) + first;
  P gradient = {};
  if (valid) gradient = P::load(static_cast<const V*>(gradients.output) + item * call.channels + lane * P::kCount);

  // Every lane of the warp walks all points, because the shuffles need them all; only valid items touch memory.
  for (int i = 0; i < all_points; ++i) {
    const float4 point = valid ? stage.numbers[i] : make_float4(0, 0, 0, 0);
    const int4 offset = valid ? stage.offsets[i] : make_int4(-1, -1, -1, -1);
    const float fx = point.x, fy = point.y, weight = point.z;
    const auto visit = [&](int from, float share) {
      float dot = 0;
      if (from < 0) return dot;
      const P value = P::load(base + from);
#pragma unroll
      for (int j = 0; j < P::kCount; ++j) dot = fmaf(gradient.x[j], value.x[j], dot);
      const float scale = weight * share;
#pragma unroll
      for (int j = 0; j < P::kCount; j += 4) {
        add4(grad_base + from + j, scale * gradient.x[j], scale * gradient.x[j + 1], scale * gradient.x[j + 2],
             scale * gradient.x[j + 3]);
      }
      return dot;
    };
    const float d0 = visit(offset.x, (1 - fx) * (1 - fy)), d1 = visit(offset.y, fx * (1 - fy));
    const float d2 = visit(offset.z, (1 - fx) * fy), d3 = visit(offset.w, fx * fy);
    const float top = d0 + fx * (d1 - d0), bottom = d2 + fx * (d3 - d2);
    const float grad_weight = sum_over_group<kLanes>(top + fy * (bottom - top));
    const float grad_px = sum_over_group<kLanes>((d1 - d0) + fy * ((d3 - d2) - (d1 - d0)));
    const float grad_py = sum_over_group<kLanes>(bottom - top);
    __syncwarp();  // all lanes have read point i
    // (weight - weight) is 0, or NaN for a poisoned point.
    if (valid && lane == 0) {
      stage.numbers[i] = make_float4(weight * grad_px, weight * grad_py, weight, grad_weight + (weight - weight));
    }
  }
  __syncwarp();

  // Now the lanes share the points again: numbers[i] = gradient in pixels (x, y), weight, gradient of the weight.
  constexpr int kPerLane = kMaxPoints / kLanes;
  float mean = 0;
  if (call.reference_size != 0) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = lane + k * kLanes;
      if (valid && i < all_points) mean += stage.numbers[i].z * stage.numbers[i].w;
    }
    mean = sum_over_group<kLanes>(mean);
  }
  if (!valid) return;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int i = lane + k * kLanes;
    if (i >= all_points) continue;
    const int level = i / call.points;
    const float4 point = stage.numbers[i];
    float2 scale = make_float2(1, 1), origin;
    float grad_score = point.w;
    if (call.reference_size != 0) {
      read_reference<V>(call, item, level, origin, scale);
      grad_score = point.z * (point.w - mean);
    }
    const int64_t place = item * all_points + i;
    write<V>(call, gradients.coordinates, 2 * place, point.x * call.width[level] * scale.x);
    write<V>(call, gradients.coordinates, 2 * place + 1, point.y * call.height[level] * scale.y);
    write<V>(call, gradients.scores, place, grad_score);
  }
  if (gradients.reference == nullptr) return;
  for (int level = lane; level < call.levels; level += kLanes) {
    float x = 0, y = 0, width = 0, height = 0;
    for (int i = level * call.points; i < (level + 1) * call.points; ++i) {
      const float grad_x = stage.numbers[i].x * call.width[level], grad_y = stage.numbers[i].y * call.height[level];
      x += grad_x, y += grad_y;
      if (call.reference_size == 4) {
        const float2 offset = read_pair<V>(call, call.coordinates, 2 * (item * all_points + i));
        width += grad_x * offset.x * 0.5f / call.points, height += grad_y * offset.y * 0.5f / call.points;
      }
    }
    float* const target =
        static_cast<float*>(gradients.reference) + (item * call.levels + level) * call.reference_size;
    target[0] = x, target[1] = y;
    if (call.reference_size == 4) target[2] = width, target[3] = height;
  }
}

// Calls launch with a null pointer of the value type and the number of lanes of a group as an integral constant.
template <int kLanes>
struct Lanes {
  static constexpr int value = kLanes;
};
template <class V, class Launch>
cudaError_t with_lanes(int channels, const Launch& launch) {
  constexpr int kPerLane = 16 / sizeof(V);
  switch (channels) {
    case 16: return launch(static_cast<V*>(nullptr), Lanes<16 / kPerLane>());
    case 32: return launch(static_cast<V*>(nullptr), Lanes<32 / kPerLane>());
    case 64: return launch(static_cast<V*>(nullptr), Lanes<64 / kPerLane>());
  }
  return cudaErrorInvalidValue;
}
template <class Launch>
cudaError_t with_kernel(int value_type, int channels, const Launch& launch) {
  switch (value_type) {
    case kFloat: return with_lanes<float>(channels, launch);
    case kHalf: return with_lanes<Half>(channels, launch);
    case kBFloat16: return with_lanes<BFloat16>(channels, launch);
  }
  return cudaErrorInvalidValue;
}

struct Grid {
  unsigned blocks, threads;
  size_t shared;
  Grid(const Call& call, int lanes) {
    const size_t bytes = Stage::bytes_per_group(call.levels * call.points);
    threads = 128 / lanes * bytes <= 48 * 1024 ? 128 : 64;  // 48 KiB need no opting in
    const int64_t groups = threads / lanes;
    blocks = static_cast<unsigned>((call.items + groups - 1) / groups);
    shared = groups * bytes;
  }
};

}  // namespace

cudaError_t forward_tuned(const Call& call, int value_type, void* output, cudaStream_t stream) {
  return with_kernel(value_type, call.channels, [&](auto* type, auto lanes) {
    using V = std::remove_pointer_t<decltype(type)>;
    constexpr int kLanes = decltype(lanes)::value;
    const Grid grid(call, kLanes);
    forward_kernel<V, kLanes><<<grid.blocks, grid.threads, grid.shared, stream>>>(call, static_cast<V*>(output));
    return cudaGetLastError();
  });
}

cudaError_t backward_tuned(const Call& call, int value_type, const CallGradients& gradients, cudaStream_t stream) {
  return with_kernel(value_type, call.channels, [&](auto* type, auto lanes) {
    using V = std::remove_pointer_t<decltype(type)>;
    constexpr int kLanes = decltype(lanes)::value;
    const Grid grid(call, kLanes);
    backward_kernel<V, kLanes><<<grid.blocks, grid.threads, grid.shared, stream>>>(call, gradients);
    return cudaGetLastError();
  });
}

}  // namespace ddetr::cuda
