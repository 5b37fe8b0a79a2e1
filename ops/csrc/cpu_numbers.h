// Numbers for cpu_kernel.h: storage types to and from float, floor and exp in vectors, and large buffers.
//
// Like cpu_kernel.h, read once for every instruction set: no include guard.

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// Calls body with a null pointer of the storage type.
template <class T, class Body>
void with_storage(ScalarType type, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(static_cast<double*>(nullptr));
  } else if (type == ScalarType::Half) {
    body(static_cast<Half*>(nullptr));
  } else if (type == ScalarType::BFloat16) {
    body(static_cast<BFloat16*>(nullptr));
  } else {
    body(static_cast<float*>(nullptr));
  }
}

template <class T>
inline void widen(const T* source, T* target, int64_t count) {
  std::memcpy(target, source, count * sizeof(T));
}
template <class T>
inline void narrow(const T* source, T* target, int64_t count) {
  std::memcpy(target, source, count * sizeof(T));
}
inline void widen(const BFloat16* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = std::bit_cast<float>(static_cast<uint32_t>(source[i].x) << 16);
}
inline void narrow(const float* source, BFloat16* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(source[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
    target[i].x = static_cast<uint16_t>(source[i] != source[i] ? 0x7fc0 : rounded);
  }
}

// Each instruction set brings its own.
inline void widen(const Half* source, float* target, int64_t count);
inline void narrow(const float* source, Half* target, int64_t count);

template <class T>
constexpr ScalarType kTypeOf = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <class T>
void load(const void* source, ScalarType type, int64_t first, int64_t count, T* target) {
  with_storage<T>(type, [&](auto* storage) {
    using Stored = std::remove_pointer_t<decltype(storage)>;
    widen(static_cast<const Stored*>(source) + first, target, count);
  });
}
template <class T>
void store(const T* source, ScalarType type, void* target, int64_t first, int64_t count) {
  with_storage<T>(type, [&](auto* storage) {
    narrow(source, static_cast<decltype(storage)>(target) + first, count);
  });
}

// Where to read `count` numbers from index `first` on: in the tensor itself if they are of type T and fill whole
// vectors (`whole`), else widened into scratch. writable() is the same for results; finish() then narrows them.
template <class T>
const T* readable(const void* tensor, ScalarType type, bool whole, int64_t first, int64_t count, T* scratch) {
  if (whole && type == kTypeOf<T>) return static_cast<const T*>(tensor) + first;
  load(tensor, type, first, count, scratch);
  return scratch;
}
template <class T>
T* writable(void* tensor, ScalarType type, bool whole, int64_t first, T* scratch) {
  return whole && type == kTypeOf<T> ? static_cast<T*>(tensor) + first : scratch;
}
template <class T>
void finish(const T* result, const T* scratch, ScalarType type, void* tensor, int64_t first, int64_t count) {
  if (result == scratch) store(scratch, type, tensor, first, count);
}

// Half a vector's width of 16-bit numbers, and the integers that they widen to.
template <class Simd>
struct Halves {
  typedef uint16_t Narrow __attribute__((vector_size(2 * Simd::kWidth)));
  typedef uint32_t Wide __attribute__((vector_size(4 * Simd::kWidth)));
};

// bfloat16 to nearest even, in the upper half of every lane.
template <class Simd>
inline typename Halves<Simd>::Wide rounded_bits(typename Simd::V x) {
  using Wide = typename Halves<Simd>::Wide;
  const Wide bits = std::bit_cast<Wide>(x);
  const Wide result = bits + 0x7fff + ((bits >> 16) & 1);
  return x != x ? Wide{} + 0x7fc00000u : result;
}

// C vectors of channels between memory and registers. bfloat16 goes two vectors at a time, even channels into one and
// odd ones into the other, which costs less than keeping their order: whoever works on a row sees the same order.
template <class Simd, int C>
inline void load_row(const typename Simd::T* source, typename Simd::V (&row)[C]) {
  for (int c = 0; c < C; ++c) row[c] = Simd::load(source + c * Simd::kWidth);
}
template <class Simd, int C>
inline void store_row(const typename Simd::V (&row)[C], typename Simd::T* target) {
  for (int c = 0; c < C; ++c) Simd::store(target + c * Simd::kWidth, row[c]);
}
template <class Simd, int C>
inline void load_row(const Half* source, typename Simd::V (&row)[C]) {
  for (int c = 0; c < C; ++c) row[c] = Simd::load(source + c * Simd::kWidth);
}
template <class Simd, int C>
inline void store_row(const typename Simd::V (&row)[C], Half* target) {
  for (int c = 0; c < C; ++c) Simd::store(target + c * Simd::kWidth, row[c]);
}
template <class Simd, int C>
inline void load_row(const BFloat16* source, typename Simd::V (&row)[C]) {
  using V = typename Simd::V;
  using Narrow = typename Halves<Simd>::Narrow;
  using Wide = typename Halves<Simd>::Wide;
  if constexpr (C % 2 == 0) {
    for (int c = 0; c < C; c += 2) {
      Wide both;
      std::memcpy(&both, source + c * Simd::kWidth, sizeof(both));
      row[c] = std::bit_cast<V>(both << 16), row[c + 1] = std::bit_cast<V>(both & 0xffff0000u);
    }
  } else {
    static_assert(C == 1);
    Narrow bits;
    std::memcpy(&bits, source, sizeof(bits));
    row[0] = std::bit_cast<V>(__builtin_convertvector(bits, Wide) << 16);
  }
}
template <class Simd, int C>
inline void store_row(const typename Simd::V (&row)[C], BFloat16* target) {
  using Narrow = typename Halves<Simd>::Narrow;
  using Wide = typename Halves<Simd>::Wide;
  if constexpr (C % 2 == 0) {
    for (int c = 0; c < C; c += 2) {
      const Wide both = (rounded_bits<Simd>(row[c]) >> 16) | (rounded_bits<Simd>(row[c + 1]) & 0xffff0000u);
      std::memcpy(target + c * Simd::kWidth, &both, sizeof(both));
    }
  } else {
    static_assert(C == 1);
    const Narrow bits = __builtin_convertvector(rounded_bits<Simd>(row[0]) >> 16, Narrow);
    std::memcpy(target, &bits, sizeof(bits));
  }
}

// exp of x <= 0 (or NaN), within 2 units in the last place. After Cephes.
template <class Simd>
inline typename Simd::V exponential(typename Simd::V x) {
  using V = typename Simd::V;
  using I = typename Simd::I;
  if constexpr (std::is_same_v<typename Simd::T, double>) {
    for (int lane = 0; lane < Simd::kWidth; ++lane) x[lane] = std::exp(x[lane]);
    return x;
  } else {
    const V lowest = Simd::set(-87.0f);
    const V bounded = x > lowest ? x : lowest;  // a NaN becomes -87 here and returns at the end
    const V whole = Simd::floor(bounded * 1.44269504088896341f + 0.5f);
    const V rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    V sum = Simd::fma(Simd::set(1.9875691500e-4f), rest, Simd::set(1.3981999507e-3f));
    sum = Simd::fma(sum, rest, Simd::set(8.3334519073e-3f));
    sum = Simd::fma(sum, rest, Simd::set(4.1665795894e-2f));
    sum = Simd::fma(sum, rest, Simd::set(1.6666665459e-1f));
    sum = Simd::fma(sum, rest, Simd::set(5.0000001201e-1f));
    sum = Simd::fma(sum, rest * rest, rest + 1.0f);
    const I power = (__builtin_convertvector(whole, I) + 127) << 23;
    const V result = sum * std::bit_cast<V>(power);
    return x < lowest ? Simd::zero() : result + (x - x);
  }
}

// Aligned memory that the system may back with huge pages.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t huge = size_t{2} << 20;
    const size_t bytes = count * sizeof(T) + 64;
    const size_t alignment = bytes >= huge ? huge : 64;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == huge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};
