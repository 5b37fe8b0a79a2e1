// Runs the CUDA kernels' own sources on the CPU: problems from the standard input, results to the standard output.
//
// It exists because most machines on which the kernels are changed have no GPU. It shows that they compute what the
// specification says, stay inside their memory (built with the address sanitizer) and meet as warps must. It shows
// nothing about speed, about warps that run at the same time, about code under __CUDA_ARCH__, or about a __syncwarp
// that is missed only because a shuffle, at which lanes meet too, orders no memory.
//
// A problem is a Header, 2 * levels sizes, then the tensors of problem.h in their order. Results are in the order of
// forward() and backward() of cuda.cpp, which the functions of that name repeat, after one integer: 1 where the tuned
// path ran. With an argument the program makes one mistake on purpose instead (see `mistake`).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_tuned.cu"
#include "cuda_generic.cu"

namespace ddetr::cuda {
namespace {

alignas(16) char shared[emulation::kSharedBytes];  // what the kernels declare as extern

struct Header {
  int64_t backward, value_type, point_type, batch, positions, heads, channels, queries, levels, points;
  int64_t reference_size, needs_reference_gradient;
};

// An allocation of its own, exactly as long as the tensor, so that the sanitizer sees a read beyond either end. Not a
// number until written.
using Tensor = std::vector<unsigned char>;
Tensor empty(int64_t bytes) { return Tensor(bytes, 0xff); }
Tensor zeros(int64_t bytes) { return Tensor(bytes, 0); }

void read(void* target, size_t bytes) {
  if (std::fread(target, 1, bytes, stdin) != bytes) std::exit(std::feof(stdin) ? 0 : 1);
}
Tensor read(int64_t bytes) {
  Tensor tensor = empty(bytes);
  read(tensor.data(), tensor.size());
  return tensor;
}
void write(const Tensor& tensor) { std::fwrite(tensor.data(), 1, tensor.size(), stdout); }

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "a launch failed with error %d\n", error);
  std::exit(1);
}

int64_t bytes_of(int64_t type) { return type == kDouble ? 8 : type == kFloat ? 4 : 2; }

struct Problem {
  Header header;
  Call call{};
  Tensor value, reference, coordinates, scores, grad_output;
  int64_t sum_bytes, all_points, outputs;
  bool tuned;

  Problem() {
    read(&header, sizeof(header));
    const Header& h = header;
    const int64_t value_bytes = bytes_of(h.value_type), point_bytes = bytes_of(h.point_type);
    call.items = h.batch * h.queries * h.heads, call.queries = h.queries, call.positions = h.positions;
    call.heads = h.heads, call.channels = h.channels, call.levels = h.levels, call.points = h.points;
    call.reference_size = h.reference_size, call.points_are_wide = h.point_type == kFloat;
    for (int level = 0, start = 0; level < h.levels; ++level) {
      int64_t shape[2];
      read(shape, sizeof(shape));
      call.height[level] = shape[0], call.width[level] = shape[1], call.start[level] = start;
      start += shape[0] * shape[1];
    }
    sum_bytes = h.value_type == kDouble ? 8 : 4;
    all_points = call.items * h.levels * h.points, outputs = call.items * h.channels;
    value = read(h.batch * h.positions * h.heads * h.channels * value_bytes);
    reference = read(h.batch * h.queries * h.levels * h.reference_size * point_bytes);
    coordinates = read(all_points * 2 * point_bytes);
    scores = read(all_points * point_bytes);
    if (h.backward) grad_output = read(outputs * value_bytes);
    call.value = value.data(), call.coordinates = coordinates.data(), call.scores = scores.data();
    call.reference = h.reference_size ? reference.data() : nullptr;
    tuned = (h.channels == 16 || h.channels == 32 || h.channels == 64) && h.levels * h.points <= 32 &&
            h.value_type != kDouble;
  }
};

struct Located {
  Tensor locations, weights;
  explicit Located(const Problem& p) : locations(p.coordinates), weights(p.scores) {
    if (p.header.reference_size == 0 && bytes_of(p.header.point_type) == p.sum_bytes) return;
    locations = empty(p.all_points * 2 * p.sum_bytes), weights = empty(p.all_points * p.sum_bytes);
    check(locate(p.call, p.header.point_type, locations.data(), weights.data(), nullptr));
  }
};

void forward(const Problem& p) {
  Tensor output = empty(p.outputs * bytes_of(p.header.value_type));
  if (p.outputs > 0 && p.all_points == 0) {
    output = zeros(p.outputs * bytes_of(p.header.value_type));
  } else if (p.outputs > 0 && p.tuned) {
    check(forward_tuned(p.call, p.header.value_type, output.data(), nullptr));
  } else if (p.outputs > 0) {
    const Located located(p);
    check(forward_generic(p.call, p.header.value_type, located.locations.data(), located.weights.data(),
                          output.data(), nullptr));
  }
  write(output);
}

void backward(const Problem& p) {
  const Header& h = p.header;
  Tensor sums = zeros(h.batch * h.positions * h.heads * h.channels * p.sum_bytes);
  Tensor grad_reference = empty(h.needs_reference_gradient * p.call.items * h.levels * h.reference_size * p.sum_bytes);
  Tensor grad_coordinates = empty(p.coordinates.size()), grad_scores = empty(p.scores.size());
  if (p.all_points == 0) {
    grad_reference = zeros(grad_reference.size());
  } else {
    const CallGradients gradients{p.grad_output.data(), sums.data(),
                                  h.needs_reference_gradient ? grad_reference.data() : nullptr,
                                  grad_coordinates.data(), grad_scores.data()};
    if (p.tuned) {
      check(backward_tuned(p.call, h.value_type, gradients, nullptr));
    } else {
      const Located located(p);
      Tensor grad_locations = empty(located.locations.size()), grad_weights = empty(located.weights.size());
      check(backward_generic(p.call, h.value_type, located.locations.data(), located.weights.data(), gradients,
                             grad_locations.data(), grad_weights.data(), nullptr));
      check(finish(p.call, h.point_type, located.weights.data(), grad_locations.data(), grad_weights.data(), gradients,
                   nullptr));
    }
  }
  write(sums), write(grad_reference), write(grad_coordinates), write(grad_scores);
}

// Kernels that do what the emulation must notice.
__global__ void read_beyond(const float* source, float* target) { target[threadIdx.x] = source[threadIdx.x + 1]; }
__global__ void read_misaligned(const float* source, float* target) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(source + 1));
  target[threadIdx.x] = four.x;
}
__global__ void read_beyond_shared(float* target) {
  extern __shared__ __align__(16) char shared[];
  target[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x + 1];
}
__global__ void return_before_a_shuffle(float* target) {
  if (threadIdx.x == 5) return;
  target[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
__global__ void shuffle_in_two_places(float* target) {
  if (threadIdx.x == 5) {
    target[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else {
    target[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}
__global__ void read_without_syncwarp(float* target) {
  extern __shared__ __align__(16) char shared[];
  float* const numbers = reinterpret_cast<float*>(shared);
  numbers[threadIdx.x] = 1;
  target[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

void mistake(const std::string& name) {
  std::vector<float> source(emulation::kLanes), target(emulation::kLanes);
  const auto run = [&](auto kernel, auto... arguments) {
    check(launch(kernel, 1, emulation::kLanes, emulation::kLanes * sizeof(float), nullptr, arguments...));
  };
  if (name == "read_beyond") run(read_beyond, source.data(), target.data());
  if (name == "read_misaligned") run(read_misaligned, source.data(), target.data());
  if (name == "read_beyond_shared") run(read_beyond_shared, target.data());
  if (name == "return_before_a_shuffle") run(return_before_a_shuffle, target.data());
  if (name == "shuffle_in_two_places") run(shuffle_in_two_places, target.data());
  if (name == "read_without_syncwarp") run(read_without_syncwarp, target.data());
  if (std::none_of(target.begin(), target.end(), [](float x) { return std::isnan(x); })) return;
  std::fprintf(stderr, "a result is not a number\n");
  std::exit(1);
}

}  // namespace
}  // namespace ddetr::cuda

char* emulation::shared_memory() { return ddetr::cuda::shared; }

int main(int count, char** arguments) {
  using namespace ddetr::cuda;
  if (count > 1) {
    mistake(arguments[1]);
    return 0;
  }
  while (true) {
    const Problem problem;
    const int64_t tuned = problem.tuned;
    std::fwrite(&tuned, sizeof(tuned), 1, stdout);
    problem.header.backward ? backward(problem) : forward(problem);
    std::fflush(stdout);
  }
}
