// Stands in for CUDA's header, so that a C++ compiler builds the kernels for the CPU: the keywords, the types and the
// functions that they use, and the launch. A kernel that uses more than this does not compile here: add it.
//
// Blocks run one after the other, the warps of a block too; see warp.h for the lanes of a warp. Global memory is
// ordinary memory. Shared memory is one array; the sanitizer lets nobody touch what a launch did not ask for.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <utility>

#include <sanitizer/asan_interface.h>

#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::exp, std::floor;
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
template <class T>
T __ldg(const T* source) { return *source; }
// Lanes take turns and never run at once.
template <class T>
void atomicAdd(T* target, T x) { *target += x; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncwarp(unsigned mask = ~0u, std::source_location at = std::source_location::current()) {
  emulation::Warp::meet({"__syncwarp", static_cast<int>(at.line()), mask, 0, emulation::kLanes, 0});
}
inline float __shfl_xor_sync(unsigned mask, float x, int lane_mask, int width = emulation::kLanes,
                             std::source_location at = std::source_location::current()) {
  return emulation::Warp::meet({"__shfl_xor_sync", static_cast<int>(at.line()), mask, lane_mask, width, x});
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// The launch leaves no error behind.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulation {

constexpr size_t kSharedBytes = 48 * 1024;  // what a block may have without opting in
char* shared_memory();                      // of this many bytes, at least as aligned as the kernels ask for

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using emulation::kLanes, emulation::kSharedBytes, emulation::shared_memory;
  if (config->gridDim.x == 0 || config->gridDim.x > INT32_MAX || config->blockDim.x == 0 ||
      config->blockDim.x > 1024 || config->blockDim.x % kLanes != 0 || config->dynamicSmemBytes > kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::Warp warp;
  gridDim = config->gridDim, blockDim = config->blockDim;
  char* const unused = shared_memory() + config->dynamicSmemBytes;
  ASAN_POISON_MEMORY_REGION(unused, kSharedBytes - config->dynamicSmemBytes);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    // Not a number, until the block writes one.
    std::memset(shared_memory(), 0xff, config->dynamicSmemBytes);
    for (unsigned first = 0; first < blockDim.x; first += kLanes) {
      warp.run([&](int) { kernel(Parameters(arguments)...); }, [&](int lane) { threadIdx.x = first + lane; });
    }
  }
  ASAN_UNPOISON_MEMORY_REGION(unused, kSharedBytes - config->dynamicSmemBytes);
  return cudaSuccess;
}
