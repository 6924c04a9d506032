// Rows of float32 as int8, each token with one scale, exactly as `quantize_int8` rounds.

#include <atomic>
#include <cmath>
#include <cstring>

#include "int8_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace r1ray {
namespace {

constexpr int64_t kSerialInputs = 1 << 14;  // below, waking threads costs more than it saves
constexpr int64_t kRowsPerTask = 4;

// One row of x as int8: its scale is 1 where it is zero throughout, NaN where it is not finite.
void finish_row(const QuantizedRows& rows, const float* x, int64_t m, float largest) {
  int8_t* q = rows.q + m * rows.stride;
  float scale = largest / 127.0f;
  if (scale == 0.0f) scale = 1.0f;
  rows.scale[m] = scale;
  if (!std::isfinite(scale)) {
    rows.scale[m] = NAN;
    std::memset(q, 0, static_cast<size_t>(rows.stride));
    rows.sum[m] = 0;
    return;
  }
  int32_t sum = 0;
  for (int64_t k = 0; k < rows.K; ++k) {
    float rounded = std::nearbyint(x[k] / scale);
    rounded = rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded;
    q[k] = static_cast<int8_t>(rounded);
    sum += q[k];
  }
  std::memset(q + rows.K, 0, static_cast<size_t>(rows.stride - rows.K));
  rows.sum[m] = sum;
}

void quantize_row_generic(const QuantizedRows& rows, const float* x, int64_t m) {
  float largest = 0.0f;
  for (int64_t k = 0; k < rows.K; ++k) {
    const float size = std::fabs(x[k]);
    if (!(size <= largest)) largest = size;  // NaN gets in, and stays below
    if (std::isnan(largest)) break;
  }
  finish_row(rows, x, m, largest);
}

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))

AVX512 void quantize_row_avx512(const QuantizedRows& rows, const float* x, int64_t m) {
  int8_t* q = rows.q + m * rows.stride;
  __m512 largest = _mm512_setzero_ps();
  __mmask16 is_nan = 0;
  for (int64_t k = 0; k < rows.K; k += 16) {
    const __mmask16 mask = rows.K - k >= 16 ? 0xffff : (1u << (rows.K - k)) - 1;
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    is_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  const float scale = _mm512_reduce_max_ps(largest) / 127.0f;
  if (is_nan || !std::isfinite(scale) || scale == 0.0f) {
    finish_row(rows, x, m, is_nan ? NAN : scale * 127.0f);
    return;
  }
  rows.scale[m] = scale;
  const __m512 divisor = _mm512_set1_ps(scale);
  const __m512i lowest = _mm512_set1_epi32(-127), highest = _mm512_set1_epi32(127);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < rows.stride; k += 16) {
    const int64_t left = rows.K - k;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(value, divisor));
    rounded = _mm512_max_epi32(lowest, _mm512_min_epi32(highest, rounded));
    sum = _mm512_add_epi32(sum, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(rounded));
  }
  rows.sum[m] = _mm512_reduce_add_epi32(sum);
}

AVX2 void widen_row_avx2(const QuantizedRows& rows, int64_t m) {
  const int8_t* q = rows.q + m * rows.stride;
  int16_t* wide = rows.wide + m * rows.stride;
  for (int64_t k = 0; k < rows.stride; k += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide + k), _mm256_cvtepi8_epi16(bytes));
  }
}

AVX2 void quantize_row_avx2(const QuantizedRows& rows, const float* x, int64_t m) {
  int8_t* q = rows.q + m * rows.stride;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 widest = _mm256_setzero_ps(), is_nan = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= rows.K; k += 8) {
    const __m256 value = _mm256_loadu_ps(x + k);
    is_nan = _mm256_or_ps(is_nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    widest = _mm256_max_ps(widest, _mm256_andnot_ps(sign, value));
  }
  bool has_nan = _mm256_movemask_ps(is_nan) != 0;
  float lanes[8], largest = 0.0f;
  _mm256_storeu_ps(lanes, widest);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  for (; k < rows.K; ++k) {
    has_nan |= std::isnan(x[k]);
    largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
  }
  const float scale = largest / 127.0f;
  if (has_nan || !std::isfinite(scale) || scale == 0.0f) {
    finish_row(rows, x, m, has_nan ? NAN : largest);
    widen_row_avx2(rows, m);
    return;
  }
  rows.scale[m] = scale;
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i lowest = _mm256_set1_epi32(-127), highest = _mm256_set1_epi32(127);
  for (k = 0; k + 8 <= rows.K; k += 8) {
    __m256i rounded = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + k), divisor));
    rounded = _mm256_max_epi32(lowest, _mm256_min_epi32(highest, rounded));
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + k), _mm_packs_epi16(words, words));
  }
  for (; k < rows.K; ++k) {
    const float rounded = std::nearbyint(x[k] / scale);
    q[k] = static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
  }
  std::memset(q + rows.K, 0, static_cast<size_t>(rows.stride - rows.K));
  widen_row_avx2(rows, m);
}

#endif  // __x86_64__

struct Job {
  const QuantizedRows* rows;
  ReadRow read;
  const void* data;
  int32_t isa;
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_failed{false};
};

void quantize_row(const QuantizedRows& rows, const float* x, int64_t m, int32_t isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512Vnni) return quantize_row_avx512(rows, x, m);
  if (isa == kAvx2) return quantize_row_avx2(rows, x, m);
#endif
  static_cast<void>(isa);
  quantize_row_generic(rows, x, m);
}

void run_tasks(void* data) {
  Job& job = *static_cast<Job*>(data);
  thread_local Scratch memory;
  float* const room = memory.reserve(job.rows->K + 16);
  if (!room) {
    job.has_failed = true;
    return;
  }
  for (int64_t first; (first = job.next.fetch_add(kRowsPerTask)) < job.rows->M;)
    for (int64_t m = first; m < first + kRowsPerTask && m < job.rows->M; ++m)
      quantize_row(*job.rows, job.read(job.data, m, room), m, job.isa);
}

}  // namespace

bool quantize_rows(const QuantizedRows& rows, ReadRow read, const void* data, int32_t isa,
                   int32_t num_threads) {
  Job job;
  job.rows = &rows;
  job.read = read;
  job.data = data;
  job.isa = isa;
  const bool is_small = rows.M == 1 || rows.M * rows.K < kSerialInputs;
  run_parallel(run_tasks, &job, is_small ? 1 : num_threads);
  return !job.has_failed;
}

}  // namespace r1ray
