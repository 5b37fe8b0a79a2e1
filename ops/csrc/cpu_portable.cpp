// Path for any processor: 16-byte vectors, which every 64-bit processor has; and the path in double.
#include "cpu_includes.h"

namespace ddetr::cpu {
namespace {

#include "cpu_kernel.h"

inline void widen(const Half* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(source[i]);
}
inline void narrow(const float* source, Half* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = Half(source[i]);
}

template <class Number>
struct Simd {
  using T = Number;
  typedef Number V __attribute__((vector_size(16)));
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> I __attribute__((vector_size(16)));
  static constexpr int kWidth = 16 / sizeof(T);
  using Mask = I;
  static V zero() { return V{}; }
  static V set(T number) { return V{} + number; }
  static V load(const T* source) {
    V vector;
    std::memcpy(&vector, source, sizeof(V));
    return vector;
  }
  static void store(T* target, V vector) { std::memcpy(target, &vector, sizeof(V)); }
  static V add(V a, V b) { return a + b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V load(const Half* source) {
    V vector;
    for (int lane = 0; lane < kWidth; ++lane) vector[lane] = static_cast<float>(source[lane]);
    return vector;
  }
  static void store(Half* target, V vector) {
    for (int lane = 0; lane < kWidth; ++lane) target[lane] = Half(static_cast<float>(vector[lane]));
  }
  static V larger(V a, V b) { return a > b ? a : b; }  // b where a is NaN
  static V floor(V a) {
    for (int lane = 0; lane < kWidth; ++lane) a[lane] = std::floor(a[lane]);
    return a;
  }
  static I integers(V a) { return __builtin_convertvector(a, I); }
  static Mask between(V x, V low, V high) { return (x > low) & (x < high); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static V keep(Mask mask, V a) { return std::bit_cast<V>(mask & std::bit_cast<I>(a)); }
  static I keep(Mask mask, I a) { return mask & a; }
  // Numbers `at` of a table.
  static V pick(const T* table, int, I at) {
    V vector;
    for (int lane = 0; lane < kWidth; ++lane) vector[lane] = table[at[lane]];
    return vector;
  }
  // x0 y0 x1 y1 ... to vectors of x and of y, and back.
  static void split(const T* pairs, V& x, V& y) {
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = pairs[2 * lane], y[lane] = pairs[2 * lane + 1];
  }
  static void merge(V x, V y, T* pairs) {
    for (int lane = 0; lane < kWidth; ++lane) pairs[2 * lane] = x[lane], pairs[2 * lane + 1] = y[lane];
  }
  static T sum(V v) {
    T sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) sum += v[lane];
    return sum;
  }
  static T largest(V v) {
    T largest = v[0];
    for (int lane = 1; lane < kWidth; ++lane) largest = v[lane] > largest ? v[lane] : largest;
    return largest;
  }
  static void sums(const V (&vectors)[4], T (&sums)[4]) {
    for (int k = 0; k < 4; ++k) sums[k] = sum(vectors[k]);
  }
};

}  // namespace

const Path portable{run_forward<Simd<float>>, run_backward<Simd<float>>};
const Path portable_double{run_forward<Simd<double>>, run_backward<Simd<double>>};

}  // namespace ddetr::cpu
