// Path for x86-64 with AVX-512 (F, BW, DQ, VL): 16 floats a vector.
#include "cpu_includes.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace ddetr::cpu {
namespace {

#include "cpu_kernel.h"

inline void widen(const Half* source, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(target + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
  }
  for (; i < count; ++i) target[i] = _cvtsh_ss(source[i].x);
}
inline void narrow(const float* source, Half* target, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) target[i].x = _cvtss_sh(source[i], _MM_FROUND_TO_NEAREST_INT);
}

struct Simd {
  using T = float;
  using V = __m512;
  typedef int32_t I __attribute__((vector_size(64)));
  static constexpr int kWidth = 16;
  using Mask = __mmask16;
  static V zero() { return _mm512_setzero_ps(); }
  static V set(T number) { return _mm512_set1_ps(number); }
  static V load(const T* source) { return _mm512_loadu_ps(source); }
  static void store(T* target, V vector) { _mm512_storeu_ps(target, vector); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V load(const Half* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  static void store(Half* target, V vector) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
  }
  static V larger(V a, V b) { return _mm512_max_ps(a, b); }  // b where a is NaN
  static V floor(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static I integers(V a) { return std::bit_cast<I>(_mm512_cvttps_epi32(a)); }
  static Mask between(V x, V low, V high) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GT_OQ), x, high, _CMP_LT_OQ);
  }
  static Mask both(Mask a, Mask b) { return a & b; }
  static V keep(Mask mask, V a) { return _mm512_maskz_mov_ps(mask, a); }
  static I keep(Mask mask, I a) { return std::bit_cast<I>(_mm512_maskz_mov_epi32(mask, std::bit_cast<__m512i>(a))); }
  // Numbers `at` of a table.
  static V pick(const T* table, int size, I at) {
    const __m512i index = std::bit_cast<__m512i>(at);
    if (size > 16) return _mm512_i32gather_ps(index, table, 4);
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(static_cast<Mask>((1u << size) - 1), table));
  }
  static __m256 halves(V v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  // x0 y0 x1 y1 ... to vectors of x and of y, and back.
  static void split(const T* pairs, V& x, V& y) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const V a = load(pairs), b = load(pairs + 16);
    x = _mm512_permutex2var_ps(a, even, b);
    y = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
  }
  static void merge(V x, V y, T* pairs) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    store(pairs, _mm512_permutex2var_ps(x, low, y));
    store(pairs + 16, _mm512_permutex2var_ps(x, _mm512_add_epi32(low, _mm512_set1_epi32(8)), y));
  }
  static T sum(V v) { return _mm512_reduce_add_ps(v); }
  static T largest(V v) { return _mm512_reduce_max_ps(v); }
  static void sums(const V (&v)[4], T (&sums)[4]) {
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(halves(v[0]), halves(v[1])),
                                       _mm256_hadd_ps(halves(v[2]), halves(v[3])));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }
};

}  // namespace

const Path avx512{run_forward<Simd>, run_backward<Simd>};

}  // namespace ddetr::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
