// Forward and backward of both operators for one instruction set, given by the template argument Simd.
//
// Included by cpu_portable.cpp, cpu_avx2.cpp and cpu_avx512.cpp, each inside its own namespace and after it has
// switched the compiler to its instruction set; hence no include guard here, nor in cpu_numbers.h.
//
// A task owns one (batch, head), so the gradient of its values is its own: no atomics, and the same bits whatever
// the number of threads. A task copies its values, which lie H*D apart, into a dense float buffer first: gathering
// from the original would miss the TLB at every corner. Then blocks of queries go through two phases, arithmetic
// (all points of a query in vectors) and gathers, so that loads do not wait for weights.
// A corner outside the map points at a row of zeros (a waste row for gradients): the gathers have no branch, and a
// NaN in value cannot reach a query that does not sample it.

#include "cpu_numbers.h"

constexpr int kBlock = 8;     // queries of a block
constexpr int kPad = 16;      // points of a query are padded to full vectors, whatever the instruction set

template <class Simd>
class Kernel {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using I = typename Simd::I;
  using Index = std::remove_cvref_t<decltype(I{}[0])>;
  static constexpr int W = Simd::kWidth;
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

 public:
  explicit Kernel(const Problem& problem)
      : p_(problem),
        points_(problem.levels * problem.points),
        padded_((points_ + kPad - 1) / kPad * kPad),
        stride_((problem.channels + W - 1) / W * W),
        inverse_width_(problem.levels),
        inverse_height_(problem.levels),
        width_(padded_, T(1)),
        height_(padded_, T(1)),
        columns_(padded_, 1),
        rows_(padded_, 1),
        start_(padded_, 0) {
    int64_t start = 0;
    for (int64_t level = 0; level < p_.levels; ++level) {
      const int64_t height = p_.shapes[2 * level], width = p_.shapes[2 * level + 1];
      inverse_width_[level] = 1 / static_cast<T>(width), inverse_height_[level] = 1 / static_cast<T>(height);
      for (int64_t i = level * p_.points; i < (level + 1) * p_.points; ++i) {
        width_[i] = static_cast<T>(width), height_[i] = static_cast<T>(height);
        columns_[i] = static_cast<Index>(width), rows_[i] = static_cast<Index>(height);
        start_[i] = static_cast<Index>(start);
      }
      start += height * width;
    }
    // Copying pays when the rows are read several times; vectors need whole rows of the sum's type.
    const bool reads_are_few = 2 * p_.queries * points_ < p_.positions;
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
          prepare_block(batch, query, count, head, scratch);
          for (int q = 0; q < count; ++q) {
            const int64_t place = ((batch * p_.queries + query + q) * p_.heads + head) * p_.channels;
            T* const spare = scratch.channels.data();
            T* const sums = writable(output, p_.value_type, whole_channels(), place, spare);
            sum_points(values, scratch, q, sums);
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
          prepare_block(batch, query, count, head, scratch);
          for (int q = 0; q < count; ++q) {
            const int64_t pair_index = (batch * p_.queries + query + q) * p_.heads + head;
            const T* const gradient_of_sums = readable(gradients.output, p_.value_type, whole_channels(),
                                                       pair_index * p_.channels, p_.channels, scratch.channels.data());
            spread_gradient(values, grads, gradient_of_sums, scratch, q);
            store_gradients(gradients, batch, query + q, head, scratch, q);
          }
        }
        if (!in_place_) store_value_gradient(sums.data(), batch, head, gradients.value);
      }
    });
  }

 private:
  // Value rows (or their gradients) of one (batch, head).
  struct Rows {
    T* base;
    T* outside;
    int64_t stride;
    Index outside_index;
    T* at(Index index) const { return index == outside_index ? outside : base + index * stride; }
  };

  // What one thread needs, for kBlock queries of padded_ points each.
  struct Scratch {
    explicit Scratch(const Kernel& kernel)
        : floats(static_cast<size_t>(kBlock) * kernel.padded_ * 12),
          integers(static_cast<size_t>(kBlock) * kernel.padded_ * 4),
          dots(4 * kernel.padded_),
          pairs(2 * kernel.padded_),
          scores(kernel.padded_, kNothing),  // the padding stays: a softmax weight of zero
          expanded(4 * (kBlock * kernel.padded_ + 4)),
          reference(4 * kernel.p_.levels),
          zeros(kernel.stride_),
          waste(kernel.stride_),
          channels(kernel.stride_) {
      const int64_t count = kBlock * kernel.padded_;
      T* next = floats.data();
      for (T** array : {&x, &y, &score, &fraction_x, &fraction_y, &poison, &offset_x, &offset_y}) {
        *array = next, next += count;
      }
      for (int k = 0; k < 4; ++k) weight[k] = next + k * count, row[k] = integers.data() + k * count;
      next = expanded.data();
      for (T** array : {&reference_x, &reference_y, &scale_x, &scale_y}) *array = next, next += count + 4;
    }
    std::vector<T> floats;
    std::vector<Index> integers;
    std::vector<T> dots, pairs, scores, expanded, reference, zeros, waste, channels;
    T *x, *y, *score;                // location in [0, 1], attention weight
    T *fraction_x, *fraction_y;      // of the pixel, right of and below the top left corner
    T *poison;                       // 0, or NaN where location or weight is not finite
    T *offset_x, *offset_y;          // fused operator
    T *reference_x, *reference_y, *scale_x, *scale_y;  // fused operator: location = reference + offset * scale
    T *weight[4];                    // attention times bilinear: top left, top right, bottom left, bottom right
    Index* row[4];                 // of that corner, or the index that stands for "outside"
  };

  const T* in_place(const void* tensor, int64_t batch, int64_t head) const {
    return static_cast<const T*>(tensor) + (batch * p_.positions * p_.heads + head) * p_.channels;
  }
  static I load_index(const Index* source) {
    I vector;
    std::memcpy(&vector, source, sizeof(I));
    return vector;
  }
  static void store_index(Index* target, I vector) { std::memcpy(target, &vector, sizeof(I)); }
  int64_t row_stride() const { return in_place_ ? p_.heads * p_.channels : stride_; }
  Rows rows_of(const T* base, T* outside) const {
    return {const_cast<T*>(base), outside, row_stride(), static_cast<Index>(p_.positions)};
  }

  // Where to read `count` numbers from index `first` on: in the tensor itself if they are of type T and fill whole
  // vectors (`whole`), else widened into scratch. writable() is the same for results; finish() then narrows them.
  const T* readable(const void* tensor, ScalarType type, bool whole, int64_t first, int64_t count, T* scratch) const {
    if (whole && type == p_.sum_type) return static_cast<const T*>(tensor) + first;
    load(tensor, type, first, count, scratch);
    return scratch;
  }
  T* writable(void* tensor, ScalarType type, bool whole, int64_t first, T* scratch) const {
    return whole && type == p_.sum_type ? static_cast<T*>(tensor) + first : scratch;
  }
  static void finish(const T* result, const T* scratch, ScalarType type, void* tensor, int64_t first, int64_t count) {
    if (result == scratch) store(scratch, type, tensor, first, count);
  }
  bool whole_points() const { return points_ == padded_; }
  bool whole_channels() const { return p_.channels == stride_; }

  static void load(const void* source, ScalarType type, int64_t first, int64_t count, T* target) {
    with_storage<T>(type, [&](auto* storage) {
      using Stored = std::remove_pointer_t<decltype(storage)>;
      widen(static_cast<const Stored*>(source) + first, target, count);
    });
  }
  static void store(const T* source, ScalarType type, void* target, int64_t first, int64_t count) {
    with_storage<T>(type, [&](auto* storage) {
      narrow(source, static_cast<decltype(storage)>(target) + first, count);
    });
  }

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

  // Phase one, of one block. The numbers of a head lie H*L*P apart from query to query, too far for the processor to
  // fetch them ahead by itself.
  void prepare_block(int64_t batch, int64_t query, int count, int64_t head, Scratch& s) const {
    const int64_t last = p_.queries - 1, first = batch * p_.queries;
    for (int q = 0; q < count; ++q) {
      prefetch((first + std::min(query + kBlock + q, last)) * p_.heads + head);
      // All of them before the first is used: a wide load must wait for narrow stores that are still on their way.
      if (p_.reference_size != 0) load_reference(batch, query + q, q * padded_, s);
    }
    for (int q = 0; q < count; ++q) prepare(batch, query + q, head, q, s);
  }

  void prefetch(int64_t item) const {
    const int64_t bytes = p_.point_type == ScalarType::Double ? 8 : p_.point_type == ScalarType::Float ? 4 : 2;
    const char* const coordinates = static_cast<const char*>(p_.coordinates) + 2 * item * points_ * bytes;
    const char* const scores = static_cast<const char*>(p_.scores) + item * points_ * bytes;
    for (int64_t i = 0; i < 2 * points_ * bytes; i += 64) __builtin_prefetch(coordinates + i);
    for (int64_t i = 0; i < points_ * bytes; i += 64) __builtin_prefetch(scores + i);
  }

  // Rows and weights of every corner of every point of one query, into slot q of the block.
  void prepare(int64_t batch, int64_t query, int64_t head, int q, Scratch& s) const {
    load_points(batch, query, head, q * padded_, s);
    const V one = Simd::set(1), lowest = Simd::set(-2);
    const I outside = I{} + static_cast<Index>(p_.positions);
    for (int64_t i = 0, slot = q * padded_; i < padded_; i += W, slot += W) {
      const V x = Simd::load(s.x + slot), y = Simd::load(s.y + slot), score = Simd::load(s.score + slot);
      const V width = Simd::load(&width_[i]), height = Simd::load(&height_[i]);
      const I columns = load_index(&columns_[i]), rows = load_index(&rows_[i]);
      V px = x * width - T(0.5), py = y * height - T(0.5);
      // Bounded so that the integers below cannot overflow; a NaN becomes -2, which is outside.
      px = px > lowest ? px : lowest, py = py > lowest ? py : lowest;
      px = px < width + one ? px : width + one, py = py < height + one ? py : height + one;
      const V left = floored<Simd>(px), top = floored<Simd>(py);
      const V fx = px - left, fy = py - top;
      const I column = __builtin_convertvector(left, I), row = __builtin_convertvector(top, I);
      const I in0 = (column >= 0) & (column < columns), in1 = (column >= -1) & (column < columns - 1);
      const I on0 = (row >= 0) & (row < rows), on1 = (row >= -1) & (row < rows - 1);
      const I index = load_index(&start_[i]) + row * columns + column - outside;
      store_index(s.row[0] + slot, outside + (index & on0 & in0));
      store_index(s.row[1] + slot, outside + ((index + 1) & on0 & in1));
      store_index(s.row[2] + slot, outside + ((index + columns) & on1 & in0));
      store_index(s.row[3] + slot, outside + ((index + columns + 1) & on1 & in1));
      const V poison = (x - x) + (y - y) + (score - score);
      const V upper = (score + poison) * (one - fy), lower = (score + poison) * fy;
      Simd::store(s.weight[0] + slot, upper * (one - fx)), Simd::store(s.weight[1] + slot, upper * fx);
      Simd::store(s.weight[2] + slot, lower * (one - fx)), Simd::store(s.weight[3] + slot, lower * fx);
      Simd::store(s.fraction_x + slot, fx), Simd::store(s.fraction_y + slot, fy);
      Simd::store(s.poison + slot, poison);
    }
  }

  // Locations and attention weights of one query; for the fused operator from offsets and logits.
  void load_points(int64_t batch, int64_t query, int64_t head, int64_t slot, Scratch& s) const {
    const int64_t first = ((batch * p_.queries + query) * p_.heads + head) * points_;
    const T* const pairs =
        readable(p_.coordinates, p_.point_type, whole_points(), 2 * first, 2 * points_, s.pairs.data());
    const T* const scores = readable(p_.scores, p_.point_type, whole_points(), first, points_, s.scores.data());
    if (p_.reference_size != 0) {
      softmax(scores, s.score + slot);
    }
    for (int64_t i = 0; i < padded_; i += W) {
      V x, y;
      Simd::split(pairs + 2 * i, x, y);
      if (p_.reference_size == 0) {
        Simd::store(s.score + slot + i, Simd::load(scores + i));
      } else {
        Simd::store(s.offset_x + slot + i, x), Simd::store(s.offset_y + slot + i, y);
        x = Simd::fma(x, Simd::load(s.scale_x + slot + i), Simd::load(s.reference_x + slot + i));
        y = Simd::fma(y, Simd::load(s.scale_y + slot + i), Simd::load(s.reference_y + slot + i));
      }
      Simd::store(s.x + slot + i, x), Simd::store(s.y + slot + i, y);
    }
  }

  // Reference point and what an offset is multiplied with, for every point of one query.
  void load_reference(int64_t batch, int64_t query, int64_t slot, Scratch& s) const {
    const int64_t size = p_.reference_size;
    const T share = T(0.5) / static_cast<T>(p_.points);
    const T* reference = s.reference.data();
    load(p_.reference, p_.point_type, (batch * p_.queries + query) * p_.levels * size, p_.levels * size,
         s.reference.data());
    for (int64_t level = 0; level < p_.levels; ++level, reference += size) {
      const int64_t start = slot + level * p_.points, end = start + p_.points;
      const T scale_x = size == 4 ? reference[2] * share : inverse_width_[level];
      const T scale_y = size == 4 ? reference[3] * share : inverse_height_[level];
      // Four at a time: what spills over belongs to the next level or query, which overwrites it, or to the padding.
      for (int64_t i = start; i < end; i += 4) {
        for (int j = 0; j < 4; ++j) {
          s.reference_x[i + j] = reference[0], s.reference_y[i + j] = reference[1];
          s.scale_x[i + j] = scale_x, s.scale_y[i + j] = scale_y;
        }
      }
    }
  }

  void softmax(const T* logits, T* score) const {
    V largest = Simd::set(kNothing), sum = Simd::zero();
    for (int64_t i = 0; i < padded_; i += W) {
      const V next = Simd::load(logits + i);
      largest = next > largest ? next : largest;
    }
    const V top = Simd::set(Simd::largest(largest));
    for (int64_t i = 0; i < padded_; i += W) {
      const V next = exponential<Simd>(Simd::load(logits + i) - top);
      Simd::store(score + i, next);
      sum = sum + next;
    }
    const V inverse = Simd::set(1 / Simd::sum(sum));
    for (int64_t i = 0; i < padded_; i += W) Simd::store(score + i, Simd::load(score + i) * inverse);
  }

  // Phase two, forward: the weighted sum of all corners.
  void sum_points(const Rows& values, const Scratch& s, int q, T* target) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      V sums[4][C];
      for (int k = 0; k < 4; ++k) {
        for (int c = 0; c < C; ++c) sums[k][c] = Simd::zero();
      }
      for (int64_t i = q * padded_, end = i + points_; i < end; ++i) {
        for (int k = 0; k < 4; ++k) {
          const T* const source = values.at(s.row[k][i]) + channel;
          const V weight = Simd::set(s.weight[k][i]);
          for (int c = 0; c < C; ++c) sums[k][c] = Simd::fma(weight, Simd::load(source + c * W), sums[k][c]);
        }
      }
      for (int c = 0; c < C; ++c) {
        Simd::store(target + channel + c * W,
                    Simd::add(Simd::add(sums[0][c], sums[1][c]), Simd::add(sums[2][c], sums[3][c])));
      }
    });
  }

  // Phase two, backward: adds weight * gradient to the corners' rows, and leaves gradient . value in scratch.dots.
  void spread_gradient(const Rows& values, const Rows& grads, const T* grad_output, Scratch& s, int q) const {
    for_channels([&]<int C>(std::integral_constant<int, C>, int64_t channel) {
      V gradient[C];
      for (int c = 0; c < C; ++c) gradient[c] = Simd::load(grad_output + channel + c * W);
      T* dots = s.dots.data();
      for (int64_t i = q * padded_, end = i + points_; i < end; ++i, ++dots) {
        V products[4];
        for (int k = 0; k < 4; ++k) {
          const T* const source = values.at(s.row[k][i]) + channel;
          T* const target = grads.at(s.row[k][i]) + channel;
          const V weight = Simd::set(s.weight[k][i]);
          products[k] = Simd::zero();
          for (int c = 0; c < C; ++c) {
            products[k] = Simd::fma(gradient[c], Simd::load(source + c * W), products[k]);
            Simd::store(target + c * W, Simd::fma(weight, gradient[c], Simd::load(target + c * W)));
          }
        }
        T sums[4];
        Simd::sums(products, sums);
        for (int k = 0; k < 4; ++k) dots[k * padded_] = channel == 0 ? sums[k] : dots[k * padded_] + sums[k];
      }
    });
  }

  // Gradients of one query's locations and weights (plain) or offsets, logits and reference points (fused).
  void store_gradients(const Gradients& gradients, int64_t batch, int64_t query, int64_t head, Scratch& s,
                       int q) const {
    const int64_t slot = q * padded_;
    const int64_t pair = (batch * p_.queries + query) * p_.heads + head;
    T *const grad_x = s.x + slot, *const grad_y = s.y + slot;  // the locations are no longer needed
    T *const score = s.score + slot, *const grad_score = s.weight[0] + slot;
    const T* const dots = s.dots.data();
    for (int64_t i = 0; i < padded_; i += W) {
      const V d0 = Simd::load(dots + i), d1 = Simd::load(dots + padded_ + i);
      const V d2 = Simd::load(dots + 2 * padded_ + i), d3 = Simd::load(dots + 3 * padded_ + i);
      const V fx = Simd::load(s.fraction_x + slot + i), fy = Simd::load(s.fraction_y + slot + i);
      const V poison = Simd::load(s.poison + slot + i), weight = Simd::load(score + i) + poison;
      const V top = d0 + fx * (d1 - d0), bottom = d2 + fx * (d3 - d2);
      Simd::store(grad_score + i, top + fy * (bottom - top) + poison);
      Simd::store(grad_x + i, weight * Simd::load(&width_[i]) * ((d1 - d0) + fy * ((d3 - d2) - (d1 - d0))));
      Simd::store(grad_y + i, weight * Simd::load(&height_[i]) * (bottom - top));
    }
    if (p_.reference_size != 0) {
      V mean = Simd::zero();
      for (int64_t i = 0; i < padded_; i += W) {  // the padding's weights are zero
        mean = Simd::fma(Simd::load(score + i), Simd::load(grad_score + i), mean);
      }
      mean = Simd::set(Simd::sum(mean));
      for (int64_t i = 0; i < padded_; i += W) {
        Simd::store(grad_score + i, Simd::load(score + i) * (Simd::load(grad_score + i) - mean));
      }
      if (gradients.reference != nullptr) {
        const int64_t size = p_.reference_size;
        sum_reference_gradient(s, slot, static_cast<T*>(gradients.reference) + pair * p_.levels * size);
      }
      for (int64_t i = 0; i < padded_; i += W) {
        Simd::store(grad_x + i, Simd::load(grad_x + i) * Simd::load(s.scale_x + slot + i));
        Simd::store(grad_y + i, Simd::load(grad_y + i) * Simd::load(s.scale_y + slot + i));
      }
    }
    T* const pairs = writable(gradients.coordinates, p_.point_type, whole_points(), 2 * pair * points_, s.pairs.data());
    for (int64_t i = 0; i < padded_; i += W) {
      Simd::merge(Simd::load(grad_x + i), Simd::load(grad_y + i), pairs + 2 * i);
    }
    finish(pairs, s.pairs.data(), p_.point_type, gradients.coordinates, 2 * pair * points_, 2 * points_);
    store(grad_score, p_.point_type, gradients.scores, pair * points_, points_);
  }

  void sum_reference_gradient(const Scratch& s, int64_t slot, T* target) const {
    const T share = T(0.5) / static_cast<T>(p_.points);
    for (int64_t level = 0, i = slot; level < p_.levels; ++level, target += p_.reference_size) {
      T x = 0, y = 0, width = 0, height = 0;
      for (int64_t end = i + p_.points; i < end; ++i) {
        x += s.x[i], y += s.y[i];
        width += s.x[i] * s.offset_x[i] * share, height += s.y[i] * s.offset_y[i] * share;
      }
      target[0] = x, target[1] = y;
      if (p_.reference_size == 4) target[2] = width, target[3] = height;
    }
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
  const int64_t points_;  // of all levels
  const int64_t padded_;
  const int64_t stride_;  // channels, padded to vectors
  bool in_place_;
  std::vector<T> inverse_width_, inverse_height_;  // by level
  std::vector<T> width_, height_;                  // by point, as are the next three
  std::vector<Index> columns_, rows_, start_;
};

template <class Simd>
void run_forward(const Problem& problem, void* output) {
  Kernel<Simd>(problem).forward(output);
}

template <class Simd>
void run_backward(const Problem& problem, const Gradients& gradients) {
  Kernel<Simd>(problem).backward(gradients);
}
