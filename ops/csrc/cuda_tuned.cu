// Tuned CUDA path: heads of 16, 32 or 64 channels, L*P <= 32, float32, float16 or bfloat16.
//
// A group of 2 to 16 lanes handles one item; each lane holds 16 bytes of its channels, so that a corner is one
// 16-byte load per lane. First the lanes share the points: softmax by shuffles, locations, corners, staged in shared
// memory. Then every lane walks all points, reading the staged numbers as broadcasts. Backward sums the gradients of
// location and weight over the lanes by shuffles and stores them once; only the gradient of value is atomic.
#include "cuda_kernels.cuh"

#include <type_traits>

namespace ddetr::cuda {
namespace {

constexpr int kMaxPoints = 32;  // L*P
constexpr int kBlock = 128;     // threads of a block; half of them where they would need too much shared memory

// 16 bytes of channels as floats.
template <class V>
struct Pack {
  static constexpr int kCount = 16 / sizeof(V);
  float x[kCount];

  __device__ explicit Pack(const uint4& bits) {
    if constexpr (std::is_same_v<V, BFloat16>) {
      // A bfloat16 is the upper half of a float32: one instruction each, where the conversion takes more.
      const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[j] = __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u);
      }
    } else {
      V numbers[kCount];
      memcpy(numbers, &bits, sizeof(bits));
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = widened(numbers[j]);
    }
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

// The same pointer, with its origin hidden from the compiler. Otherwise the compiler adds every corner's offset to the
// index that the pointer was made from: five instructions in place of one.
template <class T>
__device__ inline T* opaque(T* pointer) {
#ifdef __CUDA_ARCH__
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return pointer;
#endif
}

// The four corners of a point, zeros where an offset is negative. All are asked for before the first is used, and
// without a branch: a warp that waits for one corner after the other spends its time waiting.
struct CornerBits {
  uint4 corner[4];

  template <class V>
  __device__ CornerBits(const V* base, const int4& offsets) {
    const int offset[4] = {offsets.x, offsets.y, offsets.z, offsets.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      corner[c] = make_uint4(0, 0, 0, 0);
      if (offset[c] >= 0) corner[c] = __ldg(reinterpret_cast<const uint4*>(base + offset[c]));
    }
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

// Calls body with a null pointer of the type that reference, coordinates and scores have.
template <class V, class Body>
__device__ inline void with_point_type(const Call& call, const Body& body) {
  if (std::is_same_v<V, float> || call.points_are_wide) {
    body(static_cast<const float*>(nullptr));
  } else {
    body(static_cast<const V*>(nullptr));
  }
}

// Reference point and scale of offsets for one level of one query, as (x, y).
template <class V>
__device__ inline void read_reference(const Call& call, unsigned query, int level, float2& origin, float2& scale) {
  const int64_t first = static_cast<int64_t>(query) * (call.levels * call.reference_size);
  with_point_type<V>(call, [&](auto* type) {
    const auto* reference = static_cast<decltype(type)>(call.reference) + first + level * call.reference_size;
    reference_and_scale(call, reference, level, 0, origin.x, scale.x);
    reference_and_scale(call, reference, level, 1, origin.y, scale.y);
  });
}

// What a group of lanes works on. The tuned path takes no more items than 31 bits can count.
template <class V, int kLanes>
struct Item {
  int group, lane;              // of the block, of the group
  unsigned index, query;        // query: of all batches together
  bool valid;                   // false beyond the last item

  __device__ explicit Item(const Call& call) {
    group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    index = blockIdx.x * (blockDim.x / kLanes) + group;
    valid = index < static_cast<unsigned>(call.items);
    query = index / static_cast<unsigned>(call.heads);
  }
  // Where the lane's channels are in the first position.
  __device__ int64_t channel(const Call& call) const {
    const unsigned head = index % static_cast<unsigned>(call.heads);
    const unsigned batch = query / static_cast<unsigned>(call.queries);
    return (batch * call.positions * call.heads + head) * call.channels + lane * Pack<V>::kCount;
  }
};

// Shared memory of one group: for every point four floats and four offsets. The padding of 16 bytes puts the
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

// First part, both directions: stages, for every point, the corners' offsets in elements (negative outside the map) and
// four numbers: forward the weights of the corners, backward (fx, fy, weight, 0). A non-finite location or weight makes
// the staged weights NaN. The points of an invalid item have no corners. Every lane of the warp must call this.
template <bool kBackward, class V, int kLanes>
__device__ inline void stage_points(const Call& call, const Item<V, kLanes>& item, const Stage& stage) {
  constexpr int kPerLane = kMaxPoints / kLanes;
  const int all_points = call.levels * call.points;
  const int64_t first = static_cast<int64_t>(item.index) * all_points;
  float weight[kPerLane];
  float2 place[kPerLane];
  with_point_type<V>(call, [&](auto* type) {
    const auto* scores = static_cast<decltype(type)>(call.scores) + first;
    const auto* coordinates = static_cast<decltype(type)>(call.coordinates) + 2 * first;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = item.lane + k * kLanes;
      weight[k] = -INFINITY, place[k] = make_float2(0, 0);
      if (item.valid && i < all_points) weight[k] = widened(scores[i]), place[k] = read_pair(coordinates + 2 * i);
    }
  });
  if (call.reference_size != 0) {
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) largest = fmaxf(largest, weight[k]);
    largest = max_over_group<kLanes>(largest);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      weight[k] = item.lane + k * kLanes < all_points ? expf(weight[k] - largest) : 0.0f;
      sum += weight[k];
    }
    sum = sum_over_group<kLanes>(sum);
    const float scale = 1 / sum;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) weight[k] *= scale;
  }
  // Through shared memory, because the code of what follows is long: once, and not for every k.
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int i = item.lane + k * kLanes;
    if (i < all_points) stage.numbers[i] = make_float4(place[k].x, place[k].y, weight[k], 0);
  }
#pragma unroll 1
  for (int i = item.lane; i < all_points; i += kLanes) {
    if (!item.valid) {
      stage.numbers[i] = make_float4(0, 0, 0, 0), stage.offsets[i] = make_int4(-1, -1, -1, -1);
      continue;
    }
    const float4 point = stage.numbers[i];
    const int level = static_cast<unsigned>(i) / static_cast<unsigned>(call.points);
    float2 origin = make_float2(0, 0), scale = make_float2(1, 1);
    if (call.reference_size != 0) read_reference<V>(call, item.query, level, origin, scale);
    const Corners<float> corners(origin.x + point.x * scale.x, origin.y + point.y * scale.y, call.height[level],
                                 call.width[level], call.start[level]);
    const int stride = call.heads * call.channels;
    stage.offsets[i] = make_int4(corners.row[0] * stride, corners.row[1] * stride, corners.row[2] * stride,
                                 corners.row[3] * stride);
    const float fx = corners.fx, fy = corners.fy;
    const float poisoned = point.z + corners.poison + (point.z - point.z);
    if (kBackward) {
      stage.numbers[i] = make_float4(fx, fy, poisoned, 0);
    } else {
      const float upper = poisoned * (1 - fy), lower = poisoned * fy;
      stage.numbers[i] = make_float4(upper * (1 - fx), upper * fx, lower * (1 - fx), lower * fx);
    }
  }
  __syncwarp();
}

template <class V, int kLanes>
__global__ void __launch_bounds__(kBlock) forward_kernel(const __grid_constant__ Call call, V* __restrict__ output) {
  using P = Pack<V>;
  extern __shared__ __align__(16) char shared[];
  const Item<V, kLanes> item(call);
  const int all_points = call.levels * call.points;
  const Stage stage(shared, item.group, all_points);
  stage_points<false>(call, item, stage);
  if (!item.valid) return;

  const V* const base = opaque(static_cast<const V*>(call.value) + item.channel(call));
  P sum(make_uint4(0, 0, 0, 0));
#pragma unroll 2
  for (int i = 0; i < all_points; ++i) {
    const float4 weights = stage.numbers[i];
    const CornerBits bits(base, stage.offsets[i]);
    const float weight[4] = {weights.x, weights.y, weights.z, weights.w};
    // A corner outside the map adds 0, or NaN to a poisoned item.
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const P value(bits.corner[c]);
#pragma unroll
      for (int j = 0; j < P::kCount; ++j) sum.x[j] = fmaf(weight[c], value.x[j], sum.x[j]);
    }
  }
  sum.store(output + static_cast<int64_t>(item.index) * call.channels + item.lane * P::kCount);
}

template <class V, int kLanes>
__global__ void __launch_bounds__(kBlock) backward_kernel(const __grid_constant__ Call call,
                                                          const __grid_constant__ CallGradients gradients) {
  using P = Pack<V>;
  extern __shared__ __align__(16) char shared[];
  const Item<V, kLanes> item(call);
  const int all_points = call.levels * call.points;
  const Stage stage(shared, item.group, all_points);
  stage_points<true>(call, item, stage);

  const V* const base = opaque(static_cast<const V*>(call.value) + item.channel(call));
  float* const grad_base = opaque(static_cast<float*>(gradients.value) + item.channel(call));
  uint4 gradient_bits = make_uint4(0, 0, 0, 0);
  if (item.valid) {
    const V* const source = static_cast<const V*>(gradients.output) + static_cast<int64_t>(item.index) * call.channels;
    gradient_bits = __ldg(reinterpret_cast<const uint4*>(source + item.lane * P::kCount));
  }
  const P gradient(gradient_bits);

  // Every lane of the warp walks all points, because the shuffles need them all.
  for (int i = 0; i < all_points; ++i) {
    const float4 point = stage.numbers[i];
    const int4 offsets = stage.offsets[i];
    const float fx = point.x, fy = point.y, weight = point.z;
    const CornerBits bits(base, offsets);
    const auto visit = [&](const uint4& corner, int offset, float share) {
      const P value(corner);
      float dot = 0;
#pragma unroll
      for (int j = 0; j < P::kCount; ++j) dot = fmaf(gradient.x[j], value.x[j], dot);
      if (offset < 0) return dot;
      const float scale = weight * share;
#pragma unroll
      for (int j = 0; j < P::kCount; j += 4) {
        add4(grad_base + offset + j, scale * gradient.x[j], scale * gradient.x[j + 1], scale * gradient.x[j + 2],
             scale * gradient.x[j + 3]);
      }
      return dot;
    };
    const float d0 = visit(bits.corner[0], offsets.x, (1 - fx) * (1 - fy));
    const float d1 = visit(bits.corner[1], offsets.y, fx * (1 - fy));
    const float d2 = visit(bits.corner[2], offsets.z, (1 - fx) * fy);
    const float d3 = visit(bits.corner[3], offsets.w, fx * fy);
    const float top = d0 + fx * (d1 - d0), bottom = d2 + fx * (d3 - d2);
    const float grad_weight = sum_over_group<kLanes>(top + fy * (bottom - top));
    const float grad_px = sum_over_group<kLanes>((d1 - d0) + fy * ((d3 - d2) - (d1 - d0)));
    const float grad_py = sum_over_group<kLanes>(bottom - top);
    __syncwarp();  // all lanes have read point i
    // (weight - weight) is 0, or NaN for a poisoned point.
    if (item.lane == 0) {
      stage.numbers[i] = make_float4(weight * grad_px, weight * grad_py, weight, grad_weight + (weight - weight));
    }
  }
  __syncwarp();

  // Now the lanes share the points again: numbers[i] = gradient in pixels (x, y), weight, gradient of the weight.
  float mean = 0;
  if (call.reference_size != 0) {
#pragma unroll 1
    for (int i = item.lane; i < all_points; i += kLanes) mean += stage.numbers[i].z * stage.numbers[i].w;
    mean = sum_over_group<kLanes>(mean);
  }
  if (!item.valid) return;
  const int64_t first_point = static_cast<int64_t>(item.index) * all_points;
#pragma unroll 1
  for (int i = item.lane; i < all_points; i += kLanes) {
    const int level = static_cast<unsigned>(i) / static_cast<unsigned>(call.points);
    const float4 point = stage.numbers[i];
    float2 scale = make_float2(1, 1), origin;
    float grad_score = point.w;
    if (call.reference_size != 0) {
      read_reference<V>(call, item.query, level, origin, scale);
      grad_score = point.z * (point.w - mean);
    }
    with_point_type<V>(call, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      write_pair(static_cast<T*>(gradients.coordinates) + 2 * (first_point + i),
                 point.x * call.width[level] * scale.x, point.y * call.height[level] * scale.y);
      static_cast<T*>(gradients.scores)[first_point + i] = narrowed<T>(grad_score);
    });
  }
  if (gradients.reference == nullptr) return;
#pragma unroll 1
  for (int level = item.lane; level < call.levels; level += kLanes) {
    float x = 0, y = 0, width = 0, height = 0;
#pragma unroll 1
    for (int i = level * call.points; i < (level + 1) * call.points; ++i) {
      const float grad_x = stage.numbers[i].x * call.width[level], grad_y = stage.numbers[i].y * call.height[level];
      x += grad_x, y += grad_y;
      if (call.reference_size == 4) {
        with_point_type<V>(call, [&](auto* type) {
          const float2 offset = read_pair(static_cast<decltype(type)>(call.coordinates) + 2 * (first_point + i));
          width += grad_x * offset.x, height += grad_y * offset.y;
        });
      }
    }
    float* const target =
        static_cast<float*>(gradients.reference) +
        (static_cast<int64_t>(item.index) * call.levels + level) * call.reference_size;
    target[0] = x, target[1] = y;
    if (call.reference_size == 4) target[2] = width * 0.5f / call.points, target[3] = height * 0.5f / call.points;
  }
}

// Calls run with a null pointer of the value type and the number of lanes of a group as an integral constant.
template <class V, class Run>
cudaError_t with_lanes(int channels, const Run& run) {
  constexpr int kCount = Pack<V>::kCount;
  switch (channels) {
    case 16: return run(static_cast<V*>(nullptr), std::integral_constant<int, 16 / kCount>());
    case 32: return run(static_cast<V*>(nullptr), std::integral_constant<int, 32 / kCount>());
    case 64: return run(static_cast<V*>(nullptr), std::integral_constant<int, 64 / kCount>());
  }
  return cudaErrorInvalidValue;
}
template <class Run>
cudaError_t with_kernel(int value_type, int channels, const Run& run) {
  switch (value_type) {
    case kFloat: return with_lanes<float>(channels, run);
    case kHalf: return with_lanes<Half>(channels, run);
    case kBFloat16: return with_lanes<BFloat16>(channels, run);
  }
  return cudaErrorInvalidValue;
}

template <class Kernel, class... Arguments>
cudaError_t launch_groups(Kernel kernel, int lanes, cudaStream_t stream, const Call& call, Arguments... arguments) {
  const size_t bytes = Stage::bytes_per_group(call.levels * call.points);
  const int threads = kBlock / lanes * bytes <= 48 * 1024 ? kBlock : kBlock / 2;  // 48 KiB need no opting in
  const int groups = threads / lanes;
  const auto blocks = static_cast<unsigned>((call.items + groups - 1) / groups);
  return launch(kernel, blocks, threads, groups * bytes, stream, call, arguments...);
}

}  // namespace

cudaError_t forward_tuned(const Call& call, int value_type, void* output, cudaStream_t stream) {
  return with_kernel(value_type, call.channels, [&](auto* type, auto lanes) {
    using V = std::remove_pointer_t<decltype(type)>;
    return launch_groups(forward_kernel<V, lanes.value>, lanes.value, stream, call, static_cast<V*>(output));
  });
}

cudaError_t backward_tuned(const Call& call, int value_type, const CallGradients& gradients, cudaStream_t stream) {
  return with_kernel(value_type, call.channels, [&](auto* type, auto lanes) {
    using V = std::remove_pointer_t<decltype(type)>;
    return launch_groups(backward_kernel<V, lanes.value>, lanes.value, stream, call, gradients);
  });
}

}  // namespace ddetr::cuda
