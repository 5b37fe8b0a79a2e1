// Path for x86-64 with AVX2, FMA and F16C: 8 floats a vector.
#include "cpu_includes.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ddetr::cpu {
namespace {

#include "cpu_kernel.h"

inline void widen(const Half* source, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < count; ++i) target[i] = _cvtsh_ss(source[i].x);
}
inline void narrow(const float* source, Half* target, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) target[i].x = _cvtss_sh(source[i], _MM_FROUND_TO_NEAREST_INT);
}

struct Simd {
  using T = float;
  using V = __m256;
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int kWidth = 8;
  using Mask = __m256;
  static V zero() { return _mm256_setzero_ps(); }
  static V set(T number) { return _mm256_set1_ps(number); }
  static V load(const T* source) { return _mm256_loadu_ps(source); }
  static void store(T* target, V vector) { _mm256_storeu_ps(target, vector); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V load(const Half* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static void store(Half* target, V vector) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
  }
  static V larger(V a, V b) { return _mm256_max_ps(a, b); }  // b where a is NaN
  static V floor(V a) { return _mm256_floor_ps(a); }
  static I integers(V a) { return std::bit_cast<I>(_mm256_cvttps_epi32(a)); }
  static Mask between(V x, V low, V high) {
    return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GT_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ));
  }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static V keep(Mask mask, V a) { return _mm256_and_ps(mask, a); }
  static I keep(Mask mask, I a) { return std::bit_cast<I>(mask) & a; }
  // Numbers `at` of a table.
  static V pick(const T* table, int size, I at) {
    const __m256i index = std::bit_cast<__m256i>(at);
    if (size > 8) return _mm256_i32gather_ps(table, index, 4);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(size), lane);
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(table, present), index);
  }
  // x0 y0 x1 y1 ... to vectors of x and of y, and back.
  static void split(const T* pairs, V& x, V& y) {
    const V a = load(pairs), b = load(pairs + 8);
    const V low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    x = _mm256_shuffle_ps(low, high, 0x88), y = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void merge(V x, V y, T* pairs) {
    const V low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
    store(pairs, _mm256_permute2f128_ps(low, high, 0x20)), store(pairs + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  static T sum(V v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  static T largest(V v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }
  static void sums(const V (&v)[4], T (&sums)[4]) {
    const V both = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }
};

}  // namespace

const Path avx2{run_forward<Simd>, run_backward<Simd>};

}  // namespace ddetr::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
