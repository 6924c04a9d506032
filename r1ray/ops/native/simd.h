// The few vector operations that the attention and selection kernels are written in.
//
// Each namespace has the same names, so that a kernel's text is compiled once in each:
// `#include "tiles.h"` within it, with TARGET defined as that set's attribute. Templates
// over a set would not do: a function takes its instructions from its own attribute alone.
//
// A Word is what one step of a product takes from either side: a float, two bfloat16 of neighbouring
// steps, the earlier in the low half, or four int8. kPair is how many steps it holds.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define TARGET_GENERIC
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define TARGET_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))

namespace r1ray {

constexpr float kHidden = -1e30f;  // the score of what is not seen: finite, so that no NaN follows

// 2^f for 0 <= f < 1 or |f| <= 0.5: the polynomials whose greatest relative error is least.
constexpr float kFine[] = {1.00000007f,    0.693146967f,   0.240221197f,
                           0.0555071328f,  0.0096755453f,  0.00132764823f};  // 7.5e-8, |f| <= 0.5
constexpr float kFineUp[] = {0.999999925f,  0.693153072f,  0.240153622f,
                             0.0558263106f, 0.00898934206f, 0.00187757813f};  // 7.5e-8, f >= 0
constexpr float kCoarseUp[] = {0.999925277f, 0.695833179f, 0.226067576f, 0.0780244884f};  // 7.5e-5

namespace generic {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef float Word;
typedef Vec Words;
constexpr int kLanes = 4, kVecs = 2, kPair = 1, kHeadsTogether = 2;

INLINE Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
INLINE Vec broadcast(float value) { return value - Vec{}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec load_values(const float* from) { return load(from); }
INLINE Vec load_values(const int8_t* from) {
  return Vec{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
}
INLINE Vec exp2(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: leaves the nearest integer in the low bits
  x = larger(broadcast(-126.0f), x);  // in this order NaN stays
  const Vec shifted = x + shift;
  const Vec f = x - (shifted - shift);
  Vec power = broadcast(kFine[5]);
  for (int i = 4; i >= 0; --i) power = fma(power, f, broadcast(kFine[i]));
  Integers bits, exponent;
  std::memcpy(&bits, &power, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}
INLINE float add_across(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
INLINE void add_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  to[0] = add_across(a), to[1] = add_across(b), to[2] = add_across(c), to[3] = add_across(d);
}
INLINE void larger_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec rows[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    to[i] = rows[i][0];
    for (int j = 1; j < 4; ++j) to[i] = rows[i][j] > to[i] ? rows[i][j] : to[i];
  }
}
INLINE Words load_words(const Word* from) { return load(from); }
INLINE Words broadcast_word(Word word) { return broadcast(word); }
INLINE Vec dot(Vec sum, Words a, Words b) { return fma(a, b, sum); }

}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {

typedef __m256 Vec;
typedef float Word;
typedef Vec Words;
constexpr int kLanes = 8, kVecs = 2, kPair = 1, kHeadsTogether = 2;

TARGET_AVX2 INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
TARGET_AVX2 INLINE void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
TARGET_AVX2 INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
TARGET_AVX2 INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
TARGET_AVX2 INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
TARGET_AVX2 INLINE Vec load_values(const float* from) { return load(from); }
TARGET_AVX2 INLINE Vec load_values(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
TARGET_AVX2 INLINE Vec exp2(Vec x) {
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: leaves the nearest integer in the low bits
  x = larger(broadcast(-126.0f), x);  // in this order NaN stays
  const Vec shifted = _mm256_add_ps(x, shift);
  const Vec f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, shift));
  Vec power = broadcast(kFine[5]);
  for (int i = 4; i >= 0; --i) power = fma(power, f, broadcast(kFine[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
}
TARGET_AVX2 INLINE void add_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
TARGET_AVX2 INLINE void larger_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = larger(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = larger(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec lanes = larger(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(to, _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
TARGET_AVX2 INLINE Words load_words(const Word* from) { return load(from); }
TARGET_AVX2 INLINE Words broadcast_word(Word word) { return broadcast(word); }
TARGET_AVX2 INLINE Vec dot(Vec sum, Words a, Words b) { return fma(a, b, sum); }

}  // namespace avx2

namespace avx512 {

typedef __m512 Vec;
typedef float Word;
typedef Vec Words;
constexpr int kLanes = 16, kVecs = 4, kPair = 1, kHeadsTogether = 4;

TARGET_AVX512 INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
TARGET_AVX512 INLINE void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
TARGET_AVX512 INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
TARGET_AVX512 INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
TARGET_AVX512 INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
TARGET_AVX512 INLINE Vec load_values(const float* from) { return load(from); }
TARGET_AVX512 INLINE Vec load_values(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
TARGET_AVX512 INLINE Vec exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vec power = broadcast(kFineUp[5]);
  for (int i = 4; i >= 0; --i) power = fma(power, f, broadcast(kFineUp[i]));
  return _mm512_scalef_ps(power, x);  // power * 2^floor(x)
}
// Sums of each over all its lanes: within 128 bits, then over the four of these.
TARGET_AVX512 INLINE void add_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
TARGET_AVX512 INLINE void larger_across4(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = larger(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = larger(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec lanes = larger(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(to, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
TARGET_AVX512 INLINE Words load_words(const Word* from) { return load(from); }
TARGET_AVX512 INLINE Words broadcast_word(Word word) { return broadcast(word); }
TARGET_AVX512 INLINE Vec dot(Vec sum, Words a, Words b) { return fma(a, b, sum); }

}  // namespace avx512

namespace avx512_bf16 {

using avx512::Vec, avx512::kLanes, avx512::kVecs;
typedef uint32_t Word;
typedef __m512i Words;
constexpr int kPair = 2;

TARGET_AVX512_BF16 INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
TARGET_AVX512_BF16 INLINE void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
TARGET_AVX512_BF16 INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
TARGET_AVX512_BF16 INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
TARGET_AVX512_BF16 INLINE Vec load_values(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// Coarse: its error is a fiftieth of what rounding to bfloat16 adds.
TARGET_AVX512_BF16 INLINE Vec exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vec power = broadcast(kCoarseUp[3]);
  for (int i = 2; i >= 0; --i) power = _mm512_fmadd_ps(power, f, broadcast(kCoarseUp[i]));
  return _mm512_scalef_ps(power, x);  // power * 2^floor(x)
}
// Lane i holds a's value i (low) and b's.
TARGET_AVX512_BF16 INLINE Words zip(Vec a, Vec b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
// Lane i holds values 2i (low) and 2i + 1 of a and b in a row.
TARGET_AVX512_BF16 INLINE Words join(Vec a, Vec b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
TARGET_AVX512_BF16 INLINE Words load_words(const Word* from) { return _mm512_loadu_si512(from); }
TARGET_AVX512_BF16 INLINE void store_words(Word* to, Words words) { _mm512_storeu_si512(to, words); }
TARGET_AVX512_BF16 INLINE Words broadcast_word(Word word) {
  return _mm512_set1_epi32(static_cast<int>(word));
}
TARGET_AVX512_BF16 INLINE Vec dot(Vec sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

}  // namespace avx512_bf16

namespace avx512_int8 {

using avx512::Vec, avx512::kLanes, avx512::kVecs, avx512::load, avx512::store, avx512::broadcast,
    avx512::larger, avx512::exp2;
typedef uint32_t Word;
typedef __m512i Words;
constexpr int kPair = 4;

TARGET_AVX512 INLINE Words load_words(const Word* from) { return _mm512_loadu_si512(from); }
TARGET_AVX512 INLINE void store_words(Word* to, Words words) { _mm512_storeu_si512(to, words); }
TARGET_AVX512 INLINE Words broadcast_word(Word word) {
  return _mm512_set1_epi32(static_cast<int>(word));
}
// The sums are int32, in registers of floats; `a` is unsigned.
TARGET_AVX512 INLINE Vec dot(Vec sum, Words a, Words b) {
  return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), a, b));
}
TARGET_AVX512 INLINE Vec to_floats(Vec sum) {
  return _mm512_cvtepi32_ps(_mm512_castps_si512(sum));
}

}  // namespace avx512_int8

#endif  // __x86_64__

}  // namespace r1ray
