// Forward and backward of both operators for one instruction set, given by the template argument Simd.
//
// Included by cpu_portable.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each inside its own namespace and after it has
// switched the compiler to its instruction set; hence no include guard here, nor in cpu_numbers.h
// and cpu_points.h.
//
// A task owns one (batch, head), so the gradient of its values is its own: no atomics, and the same bits whatever
// the number of threads. A task copies its values, which lie H*D apart, into a dense buffer first: gathering from the
// original would miss the TLB at every corner. Then blocks of queries go through two phases, arithmetic
// (cpu_points.h) and gathers (here), so that loads do not wait for weights.
// In the dense buffer zeros surround every map, and a point that touches none of its map's pixels goes to zeros of
// its own: the gathers have no branch, and a NaN in value cannot reach a query that does not sample it. With few
// queries the copy would cost more than the gathers: these then read value in place and check the map's sides.

#include "cpu_numbers.h"

// Where the maps of one (batch, head) lie, in rows of channels: pixel (x, y) of a level at origin + y * pitch + x.
struct Maps {
  std::vector<int64_t> origin, pitch;
  int64_t rows = 0;

  Maps(const Problem& problem, bool dense) {
    int64_t widest = 0, before = 0;
    for (int64_t level = 0; level < problem.levels; ++level) widest = std::max(widest, problem.shapes[2 * level + 1]);
    if (dense) before = widest + 3;  // row 0 stands for "outside": the four corners around it are zeros in every pitch
    for (int64_t level = 0; level < problem.levels; ++level) {
      const int64_t height = problem.shapes[2 * level], width = problem.shapes[2 * level + 1];
      // A column of zeros right of each line is also the one left of the next.
      pitch.push_back(width + dense);
      origin.push_back(rows + (dense ? std::max(before, width + 2) : 0));
      rows = origin.back() + height * pitch.back();
      before = width + 1;
    }
    if (dense) rows += before;
    STD_TORCH_CHECK(rows < INT32_MAX, "the maps are too large: one batch element may hold about 2^31 positions");
  }
};

#include "cpu_points.h"

template <class Simd, class Stored, bool kInPlace>
class Kernel {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using Block = typename Points<Simd>::Block;
  static constexpr int W = Simd::kWidth;

 public:
  explicit Kernel(const Problem& problem)
      : p_(problem),
        maps_(problem, !kInPlace),
        points_(problem, maps_),
        stride_((problem.channels + W - 1) / W * W),
        row_stride_(kInPlace ? problem.heads * problem.channels : stride_) {}

  void forward(Stored* output) const {
    const int64_t pairs = p_.batch * p_.heads, blocks = (p_.queries + kBlock - 1) / kBlock;
    if constexpr (kInPlace) {
      // Nothing is copied, so that any thread may take any block.
      torch::stable::parallel_for(0, p_.batch * blocks, 1, [&](int64_t begin, int64_t end) {
        Thread thread(*this);
        for (int64_t task = begin; task < end; ++task) {
          for (int64_t head = 0; head < p_.heads; ++head) {
            const int64_t batch = task / blocks;
            sum_block(of_pair(p_.value, batch, head), batch, head, task % blocks * kBlock, thread, output);
          }
        }
      });
    } else {
      // With more threads than (batch, head) pairs, the queries of a pair are split too; each part copies for itself.
      const int64_t parts = std::clamp<int64_t>(torch::stable::get_num_threads() / pairs, 1, blocks);
      torch::stable::parallel_for(0, pairs * parts, 1, [&](int64_t begin, int64_t end) {
        Thread thread(*this);
        Buffer<Stored> values(maps_.rows * stride_);
        int64_t copied = -1;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t pair = task / parts, part = task % parts;
          const int64_t batch = pair / p_.heads, head = pair % p_.heads;
          if (copied != pair) copy_values(batch, head, values.data()), copied = pair;
          for (int64_t index = blocks * part / parts; index < blocks * (part + 1) / parts; ++index) {
            sum_block(values.data(), batch, head, index * kBlock, thread, output);
          }
        }
      });
    }
  }

  void backward(const Gradients& gradients) const {
    const int64_t pairs = p_.batch * p_.heads;
    if constexpr (kInPlace) {
      static_assert(std::is_same_v<Stored, T>);
      const int64_t size = p_.positions * p_.channels;  // of a pair, though not its own part
      torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<T*>(gradients.value) + begin * size, 0, (end - begin) * size * sizeof(T));
      });
    }
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      Thread thread(*this);
      Buffer<Stored> dense(kInPlace ? 0 : maps_.rows * stride_);
      Buffer<T> dense_sums(kInPlace ? 0 : maps_.rows * stride_);
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t batch = pair / p_.heads, head = pair % p_.heads;
        const Stored* values = dense.data();
        T* sums = dense_sums.data();
        if constexpr (kInPlace) {
          values = of_pair(p_.value, batch, head), sums = const_cast<T*>(of_pair(gradients.value, batch, head));
        } else {
          copy_values(batch, head, dense.data());
          std::memset(sums, 0, maps_.rows * stride_ * sizeof(T));
        }
        for (int64_t query = 0; query < p_.queries; query += kBlock) {
          spread_block(values, sums, batch, head, query, thread, gradients);
        }
        if constexpr (!kInPlace) store_sums(sums, batch, head, static_cast<Stored*>(gradients.value));
      }
    });
  }

 private:
  // What one thread needs. Zeros and waste stand for the channels of corners outside the map.
  struct Thread {
    explicit Thread(const Kernel& kernel)
        : block(kernel.points_), zeros(kernel.stride_), spare(kernel.stride_), waste(kernel.stride_) {}
    Block block;
    std::vector<Stored> zeros, spare;
    std::vector<T> waste;
  };

  // Value rows (or their gradients) of one (batch, head).
  template <class Number>
  struct Rows {
    Number* base;
    Number* outside;
  };

  // The rows of a point's four corners.
  template <class Number>
  struct Corners {
    Number* at[4];
    Corners(const Rows<Number>& rows, const Block& block, int64_t i, int64_t right, int64_t below) {
      Number* const first = rows.base + block.row[i] * right;
      at[0] = first, at[1] = first + right, at[2] = first + below, at[3] = first + below + right;
      if constexpr (kInPlace) {
        if (const int sides = static_cast<int>(block.sides[i]); sides != 0) {
          if (sides & (1 | 4)) at[0] = rows.outside;
          if (sides & (2 | 4)) at[1] = rows.outside;
          if (sides & (1 | 8)) at[2] = rows.outside;
          if (sides & (2 | 8)) at[3] = rows.outside;
        }
      }
    }
  };

  const Stored* of_pair(const void* tensor, int64_t batch, int64_t head) const {
    return static_cast<const Stored*>(tensor) + (batch * p_.positions * p_.heads + head) * p_.channels;
  }
  bool whole_channels() const { return p_.channels == stride_; }

  void prefetch_row(const void* row) const {
    const char* const first = static_cast<const char*>(row);
    for (size_t i = 0; i < p_.channels * sizeof(Stored); i += 64) __builtin_prefetch(first + i);
  }

  void copy_values(int64_t batch, int64_t head, Stored* dense) const {
    const Stored* from = of_pair(p_.value, batch, head);
    const size_t bytes = p_.channels * sizeof(Stored);
    Stored* filled = dense;
    for (int64_t level = 0; level < p_.levels; ++level) {
      const int64_t height = p_.shapes[2 * level], width = p_.shapes[2 * level + 1];
      Stored* to = dense + maps_.origin[level] * stride_;
      for (int64_t y = 0; y < height; ++y) {
        std::memset(filled, 0, reinterpret_cast<char*>(to) - reinterpret_cast<char*>(filled));
        for (int64_t x = 0; x < width; ++x, from += p_.heads * p_.channels, to += stride_) {
          __builtin_prefetch(from + 16 * p_.heads * p_.channels);
          copy_row(from, to, bytes);
        }
        filled = to, to += stride_;
      }
    }
    Stored* const end = dense + maps_.rows * stride_;
    std::memset(filled, 0, reinterpret_cast<char*>(end) - reinterpret_cast<char*>(filled));
  }
  void copy_row(const Stored* from, Stored* to, size_t bytes) const {
    if (bytes == 128) {
      std::memcpy(to, from, 128);
    } else if (bytes == 64) {
      std::memcpy(to, from, 64);
    } else {
      std::memcpy(to, from, bytes);
      std::memset(to + p_.channels, 0, (stride_ - p_.channels) * sizeof(Stored));
    }
  }

  void store_sums(const T* sums, int64_t batch, int64_t head, Stored* grad_value) const {
    Stored* to = grad_value + (batch * p_.positions * p_.heads + head) * p_.channels;
    std::vector<Stored> spare(stride_);
    for (int64_t level = 0; level < p_.levels; ++level) {
      const int64_t height = p_.shapes[2 * level], width = p_.shapes[2 * level + 1];
      for (int64_t y = 0; y < height; ++y) {
        const T* from = sums + (maps_.origin[level] + y * maps_.pitch[level]) * stride_;
        for (int64_t x = 0; x < width; ++x, from += stride_, to += p_.heads * p_.channels) {
          Stored* const target = whole_channels() ? to : spare.data();
          for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
            V row[C];
            load_row<Simd>(from + channel, row);
            store_row<Simd>(row, target + channel);
          });
          if (!whole_channels()) std::memcpy(to, target, p_.channels * sizeof(Stored));
        }
      }
    }
  }

  // Forward of one block of queries.
  void sum_block(const Stored* base, int64_t batch, int64_t head, int64_t query, Thread& thread,
                 Stored* output) const {
    const Rows<const Stored> values{base, thread.zeros.data()};
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p_.queries - query));
    points_.template prepare<kInPlace, false>(batch, query, count, head, thread.block, nullptr);
    for (int q = 0; q < count; ++q) {
      Stored* const target = output + ((batch * p_.queries + query + q) * p_.heads + head) * p_.channels;
      Stored* const sums = whole_channels() ? target : thread.spare.data();
      sum_points(values, thread.block, q, sums);
      if (!whole_channels()) std::memcpy(target, sums, p_.channels * sizeof(Stored));
    }
  }

  // Backward of one block of queries.
  void spread_block(const Stored* base, T* sums, int64_t batch, int64_t head, int64_t query, Thread& thread,
                    const Gradients& gradients) const {
    const Rows<const Stored> values{base, thread.zeros.data()};
    const Rows<T> grads{sums, thread.waste.data()};
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p_.queries - query));
    points_.template prepare<kInPlace, true>(batch, query, count, head, thread.block, &gradients);
    for (int q = 0; q < count; ++q) {
      const int64_t place = batch * p_.queries + query + q;
      const Stored* gradient =
          static_cast<const Stored*>(gradients.output) + (place * p_.heads + head) * p_.channels;
      prefetch_row(gradient + kBlock * p_.heads * p_.channels);
      if (!whole_channels()) {
        std::memcpy(thread.spare.data(), gradient, p_.channels * sizeof(Stored));
        gradient = thread.spare.data();
      }
      spread_gradient(values, grads, gradient, thread.block, q);
      points_.store_gradients(gradients, place, head, q, thread.block);
    }
  }

  // The weighted sum of all corners.
  void sum_points(const Rows<const Stored>& values, const Block& block, int q, Stored* target) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      constexpr int kChains = C >= 4 ? 2 : 4;  // of additions that do not wait for each other
      V sums[kChains][C];
      for (auto& chain : sums) {
        for (V& sum : chain) sum = Simd::zero();
      }
      int64_t i = q * points_.padded;
      for (int64_t level = 0; level < p_.levels; ++level) {
        const int64_t below = maps_.pitch[level] * row_stride_;
        for (const int64_t end = i + p_.points; i < end; ++i) {
          const Corners<const Stored> corners(values, block, i, row_stride_, below);
          for (int k = 0; k < 4; ++k) {
            V row[C];
            load_row<Simd>(corners.at[k] + channel, row);
            const V weight = Simd::set(block.weight[k][i]);
            for (int c = 0; c < C; ++c) sums[k % kChains][c] = Simd::fma(weight, row[c], sums[k % kChains][c]);
          }
        }
      }
      for (int c = 0; c < C; ++c) {
        sums[0][c] = Simd::add(sums[0][c], sums[1][c]);
        if constexpr (kChains == 4) sums[0][c] = Simd::add(sums[0][c], Simd::add(sums[2][c], sums[3][c]));
      }
      store_row<Simd>(sums[0], target + channel);
    });
  }

  // Adds weight * gradient to the corners' rows, and leaves gradient . value in block.dots.
  void spread_gradient(const Rows<const Stored>& values, const Rows<T>& grads, const Stored* grad_output,
                       Block& block, int q) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      V gradient[C];
      load_row<Simd>(grad_output + channel, gradient);
      T* dots = block.dots.data();
      int64_t i = q * points_.padded;
      for (int64_t level = 0; level < p_.levels; ++level) {
        const int64_t below = maps_.pitch[level] * row_stride_;
        for (const int64_t end = i + p_.points; i < end; ++i, ++dots) {
          const Corners<const Stored> from(values, block, i, row_stride_, below);
          const Corners<T> to(grads, block, i, row_stride_, below);
          V products[4];
          for (int k = 0; k < 4; ++k) {
            V row[C];
            load_row<Simd>(from.at[k] + channel, row);
            T* const target = to.at[k] + channel;
            const V weight = Simd::set(block.weight[k][i]);
            products[k] = Simd::zero();
            for (int c = 0; c < C; ++c) {
              products[k] = Simd::fma(gradient[c], row[c], products[k]);
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
      }
    });
  }

  // Calls body with as many vectors of channels at a time as there are registers for.
  template <class Body>
  void for_channels(const Body& body) const {
    int64_t channel = 0;
    for (; channel + 4 * W <= stride_; channel += 4 * W) body(std::integral_constant<int, 4>(), channel);
    if (channel + 2 * W <= stride_) body(std::integral_constant<int, 2>(), channel), channel += 2 * W;
    if (channel < stride_) body(std::integral_constant<int, 1>(), channel);
  }

  const Problem& p_;
  const Maps maps_;
  const Points<Simd> points_;
  const int64_t stride_;      // channels, padded to vectors
  const int64_t row_stride_;  // from one position to the next, where rows are gathered
};

// Copying pays when a row is read several times (a point reads four); vectors need whole rows.
template <class Simd>
bool reads_in_place(const Problem& problem) {
  return problem.queries * problem.levels * problem.points < 2 * problem.positions &&
         problem.channels % Simd::kWidth == 0;
}

template <class Simd>
void run_forward(const Problem& problem, void* output) {
  with_storage<typename Simd::T>(problem.value_type, [&](auto* storage) {
    using Stored = std::remove_pointer_t<decltype(storage)>;
    if (reads_in_place<Simd>(problem)) {
      Kernel<Simd, Stored, true>(problem).forward(static_cast<Stored*>(output));
    } else {
      Kernel<Simd, Stored, false>(problem).forward(static_cast<Stored*>(output));
    }
  });
}

template <class Simd>
void run_backward(const Problem& problem, const Gradients& gradients) {
  with_storage<typename Simd::T>(problem.value_type, [&](auto* storage) {
    using Stored = std::remove_pointer_t<decltype(storage)>;
    if constexpr (std::is_same_v<Stored, typename Simd::T>) {
      if (reads_in_place<Simd>(problem)) {
        Kernel<Simd, Stored, true>(problem).backward(gradients);
        return;
      }
    }
    Kernel<Simd, Stored, false>(problem).backward(gradients);
  });
}
