// The arithmetic of sampling points for one instruction set: from what an operator is given to rows and weights, and
// from their gradients back. All points of a query go through vectors together.
//
// Like cpu_kernel.h, read once for every instruction set: no include guard.

constexpr int kBlock = 8;  // queries of a block
constexpr int kPad = 16;   // points of a query are padded to full vectors, whatever the instruction set

template <class Simd>
class Points {
  using T = typename Simd::T;
  using V = typename Simd::V;
  using I = typename Simd::I;
  static constexpr int W = Simd::kWidth;
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

  const Problem& p_;

 public:
  using Index = std::remove_cvref_t<decltype(I{}[0])>;
  const int64_t count;   // points of a query, of all levels
  const int64_t padded;

  explicit Points(const Problem& problem)
      : p_(problem),
        count(problem.levels * problem.points),
        padded((count + kPad - 1) / kPad * kPad),
        inverse_width_(problem.levels),
        inverse_height_(problem.levels),
        width_(padded, T(1)),
        height_(padded, T(1)),
        columns_(padded, 1),
        rows_(padded, 1),
        start_(padded, 0) {
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
  }

  // One thread's block: kBlock queries of `padded` points each.
  struct Block {
    explicit Block(const Points& points)
        : floats(static_cast<size_t>(kBlock) * points.padded * 12),
          integers(static_cast<size_t>(kBlock) * points.padded * 4),
          dots(4 * points.padded),
          pairs(2 * points.padded),
          scores(points.padded, kNothing),  // the padding stays: a softmax weight of zero
          expanded(4 * (kBlock * points.padded + 4)),
          reference(4 * points.p_.levels) {
      const int64_t count = kBlock * points.padded;
      T* next = floats.data();
      for (T** array : {&x, &y, &score, &fraction_x, &fraction_y, &poison, &offset_x, &offset_y}) {
        *array = next, next += count;
      }
      for (int k = 0; k < 4; ++k) weight[k] = next + k * count, row[k] = integers.data() + k * count;
      next = expanded.data();
      for (T** array : {&reference_x, &reference_y, &scale_x, &scale_y}) *array = next, next += count + 4;
    }
    Block(const Block&) = delete;  // the pointers below point into its vectors
    Block& operator=(const Block&) = delete;
    std::vector<T> floats;
    std::vector<Index> integers;
    std::vector<T> dots, pairs, scores, expanded, reference;
    T *x, *y, *score;                // location in [0, 1], attention weight
    T *fraction_x, *fraction_y;      // of the pixel, right of and below the top left corner
    T *poison;                       // 0, or NaN where location or weight is not finite
    T *offset_x, *offset_y;          // fused operator
    T *reference_x, *reference_y, *scale_x, *scale_y;  // fused operator: location = reference + offset * scale
    T *weight[4];                    // attention times bilinear: top left, top right, bottom left, bottom right
    Index* row[4];                   // of that corner, or the index that stands for "outside"
  };

  // Rows and weights of every corner of every point of some queries, at most kBlock. The numbers of a head lie H*L*P
  // apart from query to query, too far for the processor to fetch them ahead by itself.
  void prepare(int64_t batch, int64_t query, int queries, int64_t head, Block& block) const {
    const int64_t last = p_.queries - 1, first = batch * p_.queries;
    for (int q = 0; q < queries; ++q) {
      prefetch((first + std::min(query + kBlock + q, last)) * p_.heads + head);
      // All of them before the first is used: a wide load must wait for narrow stores that are still on their way.
      if (p_.reference_size != 0) load_reference(batch, query + q, q * padded, block);
    }
    for (int q = 0; q < queries; ++q) place(batch, query + q, head, q, block);
  }

  // Gradients of one query's locations and weights (plain) or offsets, logits and reference points (fused).
  void store_gradients(const Gradients& gradients, int64_t batch, int64_t query, int64_t head, int q,
                       Block& block) const {
    const int64_t slot = q * padded;
    const int64_t pair = (batch * p_.queries + query) * p_.heads + head;
    T *const grad_x = block.x + slot, *const grad_y = block.y + slot;  // the locations are no longer needed
    T *const score = block.score + slot, *const grad_score = block.weight[0] + slot;
    const T* const dots = block.dots.data();
    for (int64_t i = 0; i < padded; i += W) {
      const V d0 = Simd::load(dots + i), d1 = Simd::load(dots + padded + i);
      const V d2 = Simd::load(dots + 2 * padded + i), d3 = Simd::load(dots + 3 * padded + i);
      const V fx = Simd::load(block.fraction_x + slot + i), fy = Simd::load(block.fraction_y + slot + i);
      const V poison = Simd::load(block.poison + slot + i), weight = Simd::load(score + i) + poison;
      const V top = d0 + fx * (d1 - d0), bottom = d2 + fx * (d3 - d2);
      Simd::store(grad_score + i, top + fy * (bottom - top) + poison);
      Simd::store(grad_x + i, weight * Simd::load(&width_[i]) * ((d1 - d0) + fy * ((d3 - d2) - (d1 - d0))));
      Simd::store(grad_y + i, weight * Simd::load(&height_[i]) * (bottom - top));
    }
    if (p_.reference_size != 0) {
      V mean = Simd::zero();
      for (int64_t i = 0; i < padded; i += W) {  // the padding's weights are zero
        mean = Simd::fma(Simd::load(score + i), Simd::load(grad_score + i), mean);
      }
      mean = Simd::set(Simd::sum(mean));
      for (int64_t i = 0; i < padded; i += W) {
        Simd::store(grad_score + i, Simd::load(score + i) * (Simd::load(grad_score + i) - mean));
      }
      if (gradients.reference != nullptr) {
        const int64_t size = p_.reference_size;
        sum_reference_gradient(block, slot, static_cast<T*>(gradients.reference) + pair * p_.levels * size);
      }
      for (int64_t i = 0; i < padded; i += W) {
        Simd::store(grad_x + i, Simd::load(grad_x + i) * Simd::load(block.scale_x + slot + i));
        Simd::store(grad_y + i, Simd::load(grad_y + i) * Simd::load(block.scale_y + slot + i));
      }
    }
    T* const pairs = writable(gradients.coordinates, p_.point_type, whole(), 2 * pair * count, block.pairs.data());
    for (int64_t i = 0; i < padded; i += W) {
      Simd::merge(Simd::load(grad_x + i), Simd::load(grad_y + i), pairs + 2 * i);
    }
    finish(pairs, block.pairs.data(), p_.point_type, gradients.coordinates, 2 * pair * count, 2 * count);
    store(grad_score, p_.point_type, gradients.scores, pair * count, count);
  }

 private:
  bool whole() const { return count == padded; }
  static I load_index(const Index* source) {
    I vector;
    std::memcpy(&vector, source, sizeof(I));
    return vector;
  }
  static void store_index(Index* target, I vector) { std::memcpy(target, &vector, sizeof(I)); }

  void prefetch(int64_t item) const {
    const int64_t bytes = p_.point_type == ScalarType::Double ? 8 : p_.point_type == ScalarType::Float ? 4 : 2;
    const char* const coordinates = static_cast<const char*>(p_.coordinates) + 2 * item * count * bytes;
    const char* const scores = static_cast<const char*>(p_.scores) + item * count * bytes;
    for (int64_t i = 0; i < 2 * count * bytes; i += 64) __builtin_prefetch(coordinates + i);
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(scores + i);
  }

  // Rows and weights of every corner of every point of one query, into slot q of the block.
  void place(int64_t batch, int64_t query, int64_t head, int q, Block& block) const {
    load_points(batch, query, head, q * padded, block);
    const V one = Simd::set(1), lowest = Simd::set(-2);
    const I outside = I{} + static_cast<Index>(p_.positions);
    for (int64_t i = 0, slot = q * padded; i < padded; i += W, slot += W) {
      const V x = Simd::load(block.x + slot), y = Simd::load(block.y + slot), score = Simd::load(block.score + slot);
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
      store_index(block.row[0] + slot, outside + (index & on0 & in0));
      store_index(block.row[1] + slot, outside + ((index + 1) & on0 & in1));
      store_index(block.row[2] + slot, outside + ((index + columns) & on1 & in0));
      store_index(block.row[3] + slot, outside + ((index + columns + 1) & on1 & in1));
      const V poison = (x - x) + (y - y) + (score - score);
      const V upper = (score + poison) * (one - fy), lower = (score + poison) * fy;
      Simd::store(block.weight[0] + slot, upper * (one - fx)), Simd::store(block.weight[1] + slot, upper * fx);
      Simd::store(block.weight[2] + slot, lower * (one - fx)), Simd::store(block.weight[3] + slot, lower * fx);
      Simd::store(block.fraction_x + slot, fx), Simd::store(block.fraction_y + slot, fy);
      Simd::store(block.poison + slot, poison);
    }
  }

  // Locations and attention weights of one query; for the fused operator from offsets and logits.
  void load_points(int64_t batch, int64_t query, int64_t head, int64_t slot, Block& block) const {
    const int64_t first = ((batch * p_.queries + query) * p_.heads + head) * count;
    const T* const pairs =
        readable(p_.coordinates, p_.point_type, whole(), 2 * first, 2 * count, block.pairs.data());
    const T* const scores = readable(p_.scores, p_.point_type, whole(), first, count, block.scores.data());
    if (p_.reference_size != 0) {
      softmax(scores, block.score + slot);
    }
    for (int64_t i = 0; i < padded; i += W) {
      V x, y;
      Simd::split(pairs + 2 * i, x, y);
      if (p_.reference_size == 0) {
        Simd::store(block.score + slot + i, Simd::load(scores + i));
      } else {
        Simd::store(block.offset_x + slot + i, x), Simd::store(block.offset_y + slot + i, y);
        x = Simd::fma(x, Simd::load(block.scale_x + slot + i), Simd::load(block.reference_x + slot + i));
        y = Simd::fma(y, Simd::load(block.scale_y + slot + i), Simd::load(block.reference_y + slot + i));
      }
      Simd::store(block.x + slot + i, x), Simd::store(block.y + slot + i, y);
    }
  }

  // Reference point and what an offset is multiplied with, for every point of one query.
  void load_reference(int64_t batch, int64_t query, int64_t slot, Block& block) const {
    const int64_t size = p_.reference_size;
    const T share = T(0.5) / static_cast<T>(p_.points);
    const T* reference = block.reference.data();
    load(p_.reference, p_.point_type, (batch * p_.queries + query) * p_.levels * size, p_.levels * size,
         block.reference.data());
    for (int64_t level = 0; level < p_.levels; ++level, reference += size) {
      const int64_t start = slot + level * p_.points, end = start + p_.points;
      const T scale_x = size == 4 ? reference[2] * share : inverse_width_[level];
      const T scale_y = size == 4 ? reference[3] * share : inverse_height_[level];
      // Four at a time: what spills over belongs to the next level or query, which overwrites it, or to the padding.
      for (int64_t i = start; i < end; i += 4) {
        for (int j = 0; j < 4; ++j) {
          block.reference_x[i + j] = reference[0], block.reference_y[i + j] = reference[1];
          block.scale_x[i + j] = scale_x, block.scale_y[i + j] = scale_y;
        }
      }
    }
  }

  void softmax(const T* logits, T* score) const {
    V largest = Simd::set(kNothing), sum = Simd::zero();
    for (int64_t i = 0; i < padded; i += W) {
      const V next = Simd::load(logits + i);
      largest = next > largest ? next : largest;
    }
    const V top = Simd::set(Simd::largest(largest));
    for (int64_t i = 0; i < padded; i += W) {
      const V next = exponential<Simd>(Simd::load(logits + i) - top);
      Simd::store(score + i, next);
      sum = sum + next;
    }
    const V inverse = Simd::set(1 / Simd::sum(sum));
    for (int64_t i = 0; i < padded; i += W) Simd::store(score + i, Simd::load(score + i) * inverse);
  }

  void sum_reference_gradient(const Block& block, int64_t slot, T* target) const {
    const T share = T(0.5) / static_cast<T>(p_.points);
    for (int64_t level = 0, i = slot; level < p_.levels; ++level, target += p_.reference_size) {
      T x = 0, y = 0, width = 0, height = 0;
      for (int64_t end = i + p_.points; i < end; ++i) {
        x += block.x[i], y += block.y[i];
        width += block.x[i] * block.offset_x[i] * share, height += block.y[i] * block.offset_y[i] * share;
      }
      target[0] = x, target[1] = y;
      if (p_.reference_size == 4) target[2] = width, target[3] = height;
    }
  }

  std::vector<T> inverse_width_, inverse_height_;  // by level
  std::vector<T> width_, height_;                  // by point, as are the next three
  std::vector<Index> columns_, rows_, start_;
};
