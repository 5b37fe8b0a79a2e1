// Forward and backward of both operators for one instruction set, given by the template argument Simd.
//
// Included by cpu_portable.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each inside its own namespace and after it has
// switched the compiler to its instruction set; hence no include guard here, nor in cpu_numbers.h
// and cpu_points.h.
//
// A task owns one (batch, head), so the gradient of its values is its own: no atomics, and the same bits whatever
// the number of threads. A task copies its values, which lie H*D apart, into a dense float buffer first: gathering
// from the original would miss the TLB at every corner. Then blocks of queries go through two phases, arithmetic
// (cpu_points.h) and gathers (here), so that loads do not wait for weights.
// A corner outside the map points at a row of zeros (a waste row for gradients): the gathers have no branch, and a
// NaN in value cannot reach a query that does not sample it.

#include "cpu_numbers.h"
#include "cpu_points.h"

template <class Simd>
class Kernel {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Index = typename Points<Simd>::Index;
  using Block = typename Points<Simd>::Block;
  static constexpr int W = Simd::kWidth;

 public:
  explicit Kernel(const Problem& problem)
      : p_(problem),
        points_(problem),
        stride_((problem.channels + W - 1) / W * W) {
    // Copying pays when the rows are read several times; vectors need whole rows of the sum's type.
    const bool reads_are_few = 2 * p_.queries * points_.count < p_.positions;
    const bool rows_are_vectors = p_.value_type == p_.sum_type && stride_ == p_.channels;
    in_place_ = reads_are_few && rows_are_vectors;
  }

  void forward(void* output) const {
    // With more threads than (batch, head) pairs, the queries of a pair are split too; each part copies for itself.
    const int64_t pairs = p_.batch * p_.heads;
    if (pairs == 0 || p_.queries == 0) return;
    const int64_t blocks = (p_.queries + kBlock - 1) / kBlock;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = std::clamp<int64_t>(threads / pairs, 1, blocks);
    torch::stable::parallel_for(0, pairs * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      Buffer<T> copy(in_place_ ? 1 : p_.positions * stride_);
      int64_t copied = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / parts, part = task % parts;
        const int64_t batch = pair / p_.heads, head = pair % p_.heads;
        if (!in_place_ && copied != pair) {
          copy_values(batch, head, copy.data());
          copied = pair;
        }
        const Rows values = rows_of(in_place_ ? in_place(p_.value, batch, head) : copy.data(), scratch.zeros.data());
        const int64_t first = blocks * part / parts * kBlock;
        const int64_t last = std::min(blocks * (part + 1) / parts * kBlock, p_.queries);
        for (int64_t query = first; query < last; query += kBlock) {
          const int count = static_cast<int>(std::min<int64_t>(kBlock, last - query));
          points_.prepare(batch, query, count, head, scratch.block);
          for (int q = 0; q < count; ++q) {
            const int64_t place = ((batch * p_.queries + query + q) * p_.heads + head) * p_.channels;
            T* const spare = scratch.channels.data();
            T* const sums = writable(output, p_.value_type, whole_channels(), place, spare);
            sum_points(values, scratch.block, q, sums);
            finish(sums, spare, p_.value_type, output, place, p_.channels);
          }
        }
      }
    });
  }

  void backward(const Gradients& gradients) const {
    const int64_t pairs = p_.batch * p_.heads;
    if (pairs == 0) return;
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      Buffer<T> copy(in_place_ ? 1 : p_.positions * stride_);
      Buffer<T> sums(in_place_ ? 1 : p_.positions * stride_);
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t batch = pair / p_.heads, head = pair % p_.heads;
        T* const gradient = in_place_ ? const_cast<T*>(in_place(gradients.value, batch, head)) : sums.data();
        if (!in_place_) copy_values(batch, head, copy.data());
        const Rows values = rows_of(in_place_ ? in_place(p_.value, batch, head) : copy.data(), scratch.zeros.data());
        const Rows grads = rows_of(gradient, scratch.waste.data());
        for (int64_t row = 0; row < p_.positions; ++row) {
          std::memset(gradient + row * row_stride(), 0, stride_ * sizeof(T));
        }
        for (int64_t query = 0; query < p_.queries; query += kBlock) {
          const int count = static_cast<int>(std::min<int64_t>(kBlock, p_.queries - query));
          points_.prepare(batch, query, count, head, scratch.block);
          for (int q = 0; q < count; ++q) {
            const int64_t pair_index = (batch * p_.queries + query + q) * p_.heads + head;
            const T* const gradient_of_sums = readable(gradients.output, p_.value_type, whole_channels(),
                                                       pair_index * p_.channels, p_.channels, scratch.channels.data());
            spread_gradient(values, grads, gradient_of_sums, scratch.block, q);
            points_.store_gradients(gradients, batch, query + q, head, q, scratch.block);
          }
        }
        if (!in_place_) store_value_gradient(sums.data(), batch, head, gradients.value);
      }
    });
  }

 private:
  // What one thread needs.
  struct Scratch {
    explicit Scratch(const Kernel& kernel)
        : block(kernel.points_), zeros(kernel.stride_), waste(kernel.stride_), channels(kernel.stride_) {}
    Block block;
    std::vector<T> zeros, waste, channels;
  };

  // Value rows (or their gradients) of one (batch, head).
  struct Rows {
    T* base;
    T* outside;
    int64_t stride;
    Index outside_index;
    T* at(Index index) const { return index == outside_index ? outside : base + index * stride; }
  };

  const T* in_place(const void* tensor, int64_t batch, int64_t head) const {
    return static_cast<const T*>(tensor) + (batch * p_.positions * p_.heads + head) * p_.channels;
  }
  int64_t row_stride() const { return in_place_ ? p_.heads * p_.channels : stride_; }
  Rows rows_of(const T* base, T* outside) const {
    return {const_cast<T*>(base), outside, row_stride(), static_cast<Index>(p_.positions)};
  }

  bool whole_channels() const { return p_.channels == stride_; }

  void copy_values(int64_t batch, int64_t head, T* target) const {
    with_storage<T>(p_.value_type, [&](auto* storage) {
      const auto* source = static_cast<const std::remove_pointer_t<decltype(storage)>*>(p_.value) +
                           (batch * p_.positions * p_.heads + head) * p_.channels;
      for (int64_t row = 0; row < p_.positions; ++row) {
        const auto* const from = source + row * p_.heads * p_.channels;
        T* const to = target + row * stride_;
        __builtin_prefetch(from + 16 * p_.heads * p_.channels);
        if constexpr (std::is_same_v<decltype(storage), T*>) {
          if (whole_channels()) {  // memcpy is a call, for two vectors
            for (int64_t c = 0; c < stride_; c += W) Simd::store(to + c, Simd::load(from + c));
            continue;
          }
        }
        widen(from, to, p_.channels);
        for (int64_t c = p_.channels; c < stride_; ++c) to[c] = T(0);
      }
    });
  }

  void store_value_gradient(const T* source, int64_t batch, int64_t head, void* tensor) const {
    with_storage<T>(p_.value_type, [&](auto* storage) {
      auto* target = static_cast<decltype(storage)>(tensor) + (batch * p_.positions * p_.heads + head) * p_.channels;
      for (int64_t row = 0; row < p_.positions; ++row) {
        narrow(source + row * stride_, target + row * p_.heads * p_.channels, p_.channels);
      }
    });
  }

  // Forward: the weighted sum of all corners.
  void sum_points(const Rows& values, const Block& block, int q, T* target) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      V sums[4][C];
      for (int k = 0; k < 4; ++k) {
        for (int c = 0; c < C; ++c) sums[k][c] = Simd::zero();
      }
      for (int64_t i = q * points_.padded, end = i + points_.count; i < end; ++i) {
        for (int k = 0; k < 4; ++k) {
          const T* const source = values.at(block.row[k][i]) + channel;
          const V weight = Simd::set(block.weight[k][i]);
          for (int c = 0; c < C; ++c) sums[k][c] = Simd::fma(weight, Simd::load(source + c * W), sums[k][c]);
        }
      }
      for (int c = 0; c < C; ++c) {
        Simd::store(target + channel + c * W,
                    Simd::add(Simd::add(sums[0][c], sums[1][c]), Simd::add(sums[2][c], sums[3][c])));
      }
    });
  }

  // Backward: adds weight * gradient to the corners' rows, and leaves gradient . value in block.dots.
  void spread_gradient(const Rows& values, const Rows& grads, const T* grad_output, Block& block, int q) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      V gradient[C];
      for (int c = 0; c < C; ++c) gradient[c] = Simd::load(grad_output + channel + c * W);
      T* dots = block.dots.data();
      for (int64_t i = q * points_.padded, end = i + points_.count; i < end; ++i, ++dots) {
        V products[4];
        for (int k = 0; k < 4; ++k) {
          const T* const source = values.at(block.row[k][i]) + channel;
          T* const target = grads.at(block.row[k][i]) + channel;
          const V weight = Simd::set(block.weight[k][i]);
          products[k] = Simd::zero();
          for (int c = 0; c < C; ++c) {
            products[k] = Simd::fma(gradient[c], Simd::load(source + c * W), products[k]);
            Simd::store(target + c * W, Simd::fma(weight, gradient[c], Simd::load(target + c * W)));
          }
        }
        T sums[4];
        Simd::sums(products, sums);
        for (int k = 0; k < 4; ++k) {
          T& dot = dots[k * points_.padded];
          dot = channel == 0 ? sums[k] : dot + sums[k];
        }
      }
    });
  }

  // Calls body with as many vectors of channels at a time as there are registers for.
  template <class Body>
  void for_channels(const Body& body) const {
    for (int64_t channel = 0; channel < stride_;) {
      const int64_t vectors = (stride_ - channel) / W;
      if (Simd::kMaxVectors >= 4 && vectors >= 4) {
        body(std::integral_constant<int, Simd::kMaxVectors >= 4 ? 4 : 1>(), channel), channel += 4 * W;
      } else if (vectors >= 2) {
        body(std::integral_constant<int, 2>(), channel), channel += 2 * W;
      } else {
        body(std::integral_constant<int, 1>(), channel), channel += W;
      }
    }
  }

  const Problem& p_;
  const Points<Simd> points_;
  const int64_t stride_;  // channels, padded to vectors
  bool in_place_;
};

template <class Simd>
void run_forward(const Problem& problem, void* output) {
  Kernel<Simd>(problem).forward(output);
}

template <class Simd>
void run_backward(const Problem& problem, const Gradients& gradients) {
  Kernel<Simd>(problem).backward(gradients);
}
