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
  using Mask = typename Simd::Mask;
  static constexpr int W = Simd::kWidth;
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

  const Problem& p_;

 public:
  using Index = std::remove_cvref_t<decltype(I{}[0])>;
  const int64_t count;   // points of a query, of all levels
  const int64_t padded;

  Points(const Problem& problem, const Maps& maps)
      : p_(problem),
        count(problem.levels * problem.points),
        padded((count + kPad - 1) / kPad * kPad),
        width_(padded, T(1)),
        height_(padded, T(1)),
        inverse_width_(padded, T(1)),
        inverse_height_(padded, T(1)),
        origin_(padded, 0),
        pitch_(padded, 1),
        reference_(padded, 0) {
    for (int64_t level = 0; level < p_.levels; ++level) {
      const T height = static_cast<T>(p_.shapes[2 * level]), width = static_cast<T>(p_.shapes[2 * level + 1]);
      for (int64_t i = level * p_.points; i < (level + 1) * p_.points; ++i) {
        width_[i] = width, height_[i] = height;
        inverse_width_[i] = 1 / width, inverse_height_[i] = 1 / height;
        origin_[i] = static_cast<Index>(maps.origin[level]), pitch_[i] = static_cast<Index>(maps.pitch[level]);
        reference_[i] = static_cast<Index>(level * p_.reference_size);
      }
    }
  }

  // One thread's block: kBlock queries of `padded` points each.
  struct Block {
    explicit Block(const Points& points)
        : floats(static_cast<size_t>(kBlock) * points.padded * 7),
          integers(static_cast<size_t>(kBlock) * points.padded * 2),
          dots(4 * points.padded),
          pairs(2 * points.padded),
          scores(points.padded, kNothing),  // the padding stays: a softmax weight of zero
          reference(4 * points.p_.levels),
          grads(4 * points.padded) {
      const int64_t size = kBlock * points.padded;
      T* next = floats.data();
      for (T** array : {&weight[0], &weight[1], &weight[2], &weight[3], &score, &fraction_x, &fraction_y}) {
        *array = next, next += size;
      }
      row = integers.data(), sides = integers.data() + size;
    }
    Block(const Block&) = delete;  // the pointers below point into its vectors
    Block& operator=(const Block&) = delete;
    std::vector<T> floats;
    std::vector<Index> integers;
    std::vector<T> dots, pairs, scores, reference, grads;
    Index *row;                      // of the top left corner
    Index *sides;                    // where a corner is outside the map: left 1, right 2, top 4, bottom 8
    T *weight[4];                    // attention times bilinear: top left, top right, bottom left, bottom right
    T *score;                        // attention weight; NaN where it or the location is not finite
    T *fraction_x, *fraction_y;      // of the pixel, right of and below the top left corner
  };

  // Rows and weights of every corner of every point of some queries, at most kBlock. The numbers of a head lie H*L*P
  // apart from query to query, too far for the processor to fetch them ahead by itself.
  template <bool kInPlace, bool kBackward>
  void prepare(int64_t batch, int64_t query, int queries, int64_t head, Block& block,
               const Gradients* gradients) const {
    const int64_t last = p_.queries - 1, first = batch * p_.queries;
    for (int q = 0; q < queries; ++q) {
      const int64_t item = (first + std::min(query + kBlock + q, last)) * p_.heads + head;
      prefetch<0>(p_.coordinates, item, 2), prefetch<0>(p_.scores, item, 1);
      if constexpr (kBackward) prefetch<1>(gradients->coordinates, item, 2), prefetch<1>(gradients->scores, item, 1);
      if (padded == kPad) {
        place<kInPlace, kBackward, kPad>(first + query + q, head, q, block);
      } else {
        place<kInPlace, kBackward, 0>(first + query + q, head, q, block);
      }
    }
  }

  // Gradients of one query's locations and weights (plain) or offsets, logits and reference points (fused).
  void store_gradients(const Gradients& gradients, int64_t query, int64_t head, int q, Block& block) const {
    const int64_t slot = q * padded;
    const int64_t pair = query * p_.heads + head;
    T *const grad_x = block.grads.data(), *const grad_y = grad_x + padded, *const spare = grad_y + padded;
    const T* const score = block.score + slot;
    T* const grad_score = block.weight[0] + slot;  // no longer needed
    const T* const dots = block.dots.data();
    V mean = Simd::zero();
    for (int64_t i = 0; i < padded; i += W) {
      const V d0 = Simd::load(dots + i), d1 = Simd::load(dots + padded + i);
      const V d2 = Simd::load(dots + 2 * padded + i), d3 = Simd::load(dots + 3 * padded + i);
      const V fx = Simd::load(block.fraction_x + slot + i), fy = Simd::load(block.fraction_y + slot + i);
      const V weight = Simd::load(score + i);
      const V top = d0 + fx * (d1 - d0), bottom = d2 + fx * (d3 - d2);
      const V along = (top + fy * (bottom - top)) + (weight - weight);
      Simd::store(grad_score + i, along);
      Simd::store(grad_x + i, weight * Simd::load(&width_[i]) * ((d1 - d0) + fy * ((d3 - d2) - (d1 - d0))));
      Simd::store(grad_y + i, weight * Simd::load(&height_[i]) * (bottom - top));
      mean = Simd::fma(weight, along, mean);  // the padding's weights are zero
    }
    if (p_.reference_size != 0) {
      mean = Simd::set(Simd::sum(mean));
      for (int64_t i = 0; i < padded; i += W) {
        Simd::store(grad_score + i, Simd::load(score + i) * (Simd::load(grad_score + i) - mean));
      }
      const T* const reference = reference_of(query, block);
      if (gradients.reference != nullptr) {
        sum_reference_gradient(block, pair, grad_x, grad_y,
                               static_cast<T*>(gradients.reference) + pair * p_.levels * p_.reference_size);
      }
      for (int64_t i = 0; i < padded; i += W) {
        V scale_x, scale_y;
        scale(reference, i, scale_x, scale_y);
        Simd::store(grad_x + i, Simd::load(grad_x + i) * scale_x);
        Simd::store(grad_y + i, Simd::load(grad_y + i) * scale_y);
      }
    }
    T* const pairs = writable(gradients.coordinates, p_.point_type, whole(), 2 * pair * count, spare);
    for (int64_t i = 0; i < padded; i += W) {
      Simd::merge(Simd::load(grad_x + i), Simd::load(grad_y + i), pairs + 2 * i);
    }
    finish(pairs, spare, p_.point_type, gradients.coordinates, 2 * pair * count, 2 * count);
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

  // The numbers of an item, `each` for every point, in a tensor of the points' type. kWrite: 1 for a result.
  template <int kWrite>
  void prefetch(const void* tensor, int64_t item, int64_t each) const {
    const int64_t size = p_.point_type == ScalarType::Double ? 8 : p_.point_type == ScalarType::Float ? 4 : 2;
    const int64_t bytes = each * count * size;
    const char* const first = static_cast<const char*>(tensor) + item * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, kWrite);
  }

  // Rows and weights of every corner of every point of one query, into slot q of the block. kPoints: `padded` where
  // it is known when compiling, else 0.
  template <bool kInPlace, bool kBackward, int kPoints>
  void place(int64_t query, int64_t head, int q, Block& block) const {
    const int64_t points = kPoints != 0 ? kPoints : padded, first_slot = q * points;
    const int64_t first = (query * p_.heads + head) * count;
    const T* const pairs =
        readable(p_.coordinates, p_.point_type, whole(), 2 * first, 2 * count, block.pairs.data());
    const T* const scores = readable(p_.scores, p_.point_type, whole(), first, count, block.scores.data());
    const T* const reference = p_.reference_size != 0 ? reference_of(query, block) : nullptr;
    V norm = Simd::set(1);
    if (reference != nullptr) {
      V largest = Simd::set(kNothing), sum = Simd::zero();
      for (int64_t i = 0; i < points; i += W) largest = Simd::larger(Simd::load(scores + i), largest);
      const V top = Simd::set(Simd::largest(largest));
      for (int64_t i = 0; i < points; i += W) {
        const V next = exponential<Simd>(Simd::load(scores + i) - top);
        Simd::store(block.score + first_slot + i, next);
        sum = sum + next;
      }
      norm = Simd::set(1 / Simd::sum(sum));
    }
    const V one = Simd::set(1), least = Simd::set(-1);
    for (int64_t i = 0, slot = first_slot; i < points; i += W, slot += W) {
      V x, y, score;
      Simd::split(pairs + 2 * i, x, y);
      if (reference == nullptr) {
        score = Simd::load(scores + i);
        score = score + (score - score);
      } else {
        score = Simd::load(block.score + slot) * norm;
        V scale_x, scale_y;
        scale(reference, i, scale_x, scale_y);
        const I at = load_index(&reference_[i]);
        x = Simd::fma(x, scale_x, pick(reference, at)), y = Simd::fma(y, scale_y, pick(reference, at + 1));
      }
      score = score + ((x - x) + (y - y));
      const V width = Simd::load(&width_[i]), height = Simd::load(&height_[i]);
      V px = Simd::fma(x, width, Simd::set(-0.5)), py = Simd::fma(y, height, Simd::set(-0.5));
      const Mask inside = Simd::both(Simd::between(px, least, width), Simd::between(py, least, height));
      px = Simd::keep(inside, px), py = Simd::keep(inside, py);  // what is far outside fits no integer
      const V left = Simd::floor(px), top = Simd::floor(py);
      const V fx = px - left, fy = py - top;
      const I column = Simd::integers(left), row = Simd::integers(top);
      const I pitch = load_index(&pitch_[i]);
      const I index = Simd::keep(inside, load_index(&origin_[i]) + row * pitch + column);
      store_index(block.row + slot, index);
      if constexpr (kInPlace) {
        const I columns = Simd::integers(width), rows = Simd::integers(height);
        const I sides = ((column < 0) & 1) | ((column > columns - 2) & 2) | ((row < 0) & 4) | ((row > rows - 2) & 8);
        store_index(block.sides + slot, (I{} + 15) ^ Simd::keep(inside, sides ^ 15));
      }
      const V upper = score * (one - fy), lower = score * fy;
      Simd::store(block.weight[0] + slot, upper * (one - fx)), Simd::store(block.weight[1] + slot, upper * fx);
      Simd::store(block.weight[2] + slot, lower * (one - fx)), Simd::store(block.weight[3] + slot, lower * fx);
      if constexpr (kBackward) {
        Simd::store(block.score + slot, score);
        Simd::store(block.fraction_x + slot, fx), Simd::store(block.fraction_y + slot, fy);
      }
    }
  }

  // Fused operator: location = reference + offset * scale.

  const T* reference_of(int64_t query, Block& block) const {
    const int64_t size = p_.levels * p_.reference_size;
    return readable(p_.reference, p_.point_type, true, query * size, size, block.reference.data());
  }
  V pick(const T* reference, I at) const {
    return Simd::pick(reference, static_cast<int>(p_.levels * p_.reference_size), at);
  }
  void scale(const T* reference, int64_t i, V& x, V& y) const {
    if (p_.reference_size == 4) {
      const V share = Simd::set(T(0.5) / static_cast<T>(p_.points));
      const I at = load_index(&reference_[i]);
      x = pick(reference, at + 2) * share, y = pick(reference, at + 3) * share;
    } else {
      x = Simd::load(&inverse_width_[i]), y = Simd::load(&inverse_height_[i]);
    }
  }

  void sum_reference_gradient(Block& block, int64_t pair, const T* grad_x, const T* grad_y, T* target) const {
    const T share = T(0.5) / static_cast<T>(p_.points);
    const T* offset =
        readable(p_.coordinates, p_.point_type, true, 2 * pair * count, 2 * count, block.pairs.data());
    for (int64_t level = 0; level < p_.levels; ++level, target += p_.reference_size) {
      T x = 0, y = 0, width = 0, height = 0;
      for (int64_t i = 0; i < p_.points; ++i, ++grad_x, ++grad_y, offset += 2) {
        x += *grad_x, y += *grad_y;
        width += *grad_x * offset[0] * share, height += *grad_y * offset[1] * share;
      }
      target[0] = x, target[1] = y;
      if (p_.reference_size == 4) target[2] = width, target[3] = height;
    }
  }

  // By point.
  std::vector<T> width_, height_, inverse_width_, inverse_height_;
  std::vector<Index> origin_, pitch_;
  std::vector<Index> reference_;  // where the reference point of its level begins
};
