// out = (x quantized per token) · weightᵀ · scales + bias, of float32 x and int8 weights.
//
// 1. Each token's row becomes int8 with one scale, exactly as `quantize_int8` rounds.
// 2. Tiles of 4 tokens by 4 outputs add up int8 products in int32, which is exact.
// 3. Both scales and the bias follow in float32, in the order of the torch path: equal bit for bit.
//
// Both matrices are contiguous along the inner dimension, as PyTorch stores them, so no repacked
// copy of the weights is kept. AVX512-VNNI multiplies unsigned by signed bytes: weights are flipped
// to unsigned (+128) as they are loaded, and 128 · sum(x) is taken off afterwards. AVX2's byte
// product saturates; there bytes are widened to 16 bits first.
//
// Names: M tokens, K inputs, N outputs.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace r1ray;

constexpr int kTile = 4;
constexpr int64_t kAlign = 64;            // bytes of one AVX512 register: rows of x are padded to it
constexpr int64_t kOutputsPerTask = 32;   // their weights stay in the second-level cache
constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kSerialProducts = 1 << 17;  // below, waking threads costs more than it saves

struct Job {
  const float* x;
  int64_t M, K;
  const int8_t* weight;
  const float* weight_scale;
  const float* bias;
  int64_t N;
  float* out;
  int64_t stride;  // bytes of a padded row of x
  int8_t* q;
  int16_t* wide;   // q in 16 bits, for AVX2 alone
  float* scale;
  int32_t* sum;
  int64_t outputs_per_task, tokens_per_task;
  std::atomic<int64_t> next_row{0}, next_task{0};
};

// One row of x as int8: its scale is 1 where it is zero throughout, NaN where it is not finite.
void finish_row(Job& job, int64_t m, float largest) {
  const float* x = job.x + m * job.K;
  int8_t* q = job.q + m * job.stride;
  float scale = largest / 127.0f;
  if (scale == 0.0f) scale = 1.0f;
  job.scale[m] = scale;
  if (!std::isfinite(scale)) {
    job.scale[m] = NAN;
    std::memset(q, 0, static_cast<size_t>(job.stride));
    job.sum[m] = 0;
    return;
  }
  int32_t sum = 0;
  for (int64_t k = 0; k < job.K; ++k) {
    float rounded = std::nearbyint(x[k] / scale);
    rounded = rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded;
    q[k] = static_cast<int8_t>(rounded);
    sum += q[k];
  }
  std::memset(q + job.K, 0, static_cast<size_t>(job.stride - job.K));
  job.sum[m] = sum;
}

void quantize_row_generic(Job& job, int64_t m) {
  const float* x = job.x + m * job.K;
  float largest = 0.0f;
  for (int64_t k = 0; k < job.K; ++k) {
    const float size = std::fabs(x[k]);
    if (!(size <= largest)) largest = size;  // NaN gets in, and stays below
    if (std::isnan(largest)) break;
  }
  finish_row(job, m, largest);
}

void write(const Job& job, int64_t m, int64_t n, int32_t product) {
  const float scaled = static_cast<float>(product) * job.scale[m] * job.weight_scale[n];
  job.out[m * job.N + n] = job.bias ? scaled + job.bias[n] : scaled;
}

void tile_generic(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  for (int64_t m = m0; m < m1; ++m) {
    const int8_t* q = job.q + m * job.stride;
    for (int64_t n = n0; n < n1; ++n) {
      const int8_t* weight = job.weight + n * job.K;
      int32_t sum = 0;
      for (int64_t k = 0; k < job.K; ++k) sum += int32_t{q[k]} * int32_t{weight[k]};
      write(job, m, n, sum);
    }
  }
}

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))

AVX512 void quantize_row_avx512(Job& job, int64_t m) {
  const float* x = job.x + m * job.K;
  int8_t* q = job.q + m * job.stride;
  __m512 largest = _mm512_setzero_ps();
  __mmask16 is_nan = 0;
  for (int64_t k = 0; k < job.K; k += 16) {
    const __mmask16 mask = job.K - k >= 16 ? 0xffff : (1u << (job.K - k)) - 1;
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    is_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  const float scale = _mm512_reduce_max_ps(largest) / 127.0f;
  if (is_nan || !std::isfinite(scale) || scale == 0.0f) {
    finish_row(job, m, is_nan ? NAN : scale * 127.0f);
    return;
  }
  job.scale[m] = scale;
  const __m512 divisor = _mm512_set1_ps(scale);
  const __m512i lowest = _mm512_set1_epi32(-127), highest = _mm512_set1_epi32(127);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < job.stride; k += 16) {
    const int64_t left = job.K - k;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(value, divisor));
    rounded = _mm512_max_epi32(lowest, _mm512_min_epi32(highest, rounded));
    sum = _mm512_add_epi32(sum, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(rounded));
  }
  job.sum[m] = _mm512_reduce_add_epi32(sum);
}

// Sums of four registers, each over all its elements within a 128-bit lane: lane i holds
// [a, b, c, d] of lane i.
AVX512 inline __m512i add_within_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

AVX512 inline __m128i add_lanes(__m512i lanes) {
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

AVX512 inline void write_avx512(const Job& job, int64_t m, int64_t n, int64_t count, __m128i sums) {
  const __mmask8 mask = static_cast<__mmask8>((1u << count) - 1);
  const __m128i product = _mm_sub_epi32(sums, _mm_set1_epi32(128 * job.sum[m]));
  __m128 value = _mm_mul_ps(_mm_cvtepi32_ps(product), _mm_set1_ps(job.scale[m]));
  value = _mm_mul_ps(value, _mm_maskz_loadu_ps(mask, job.weight_scale + n));
  if (job.bias) value = _mm_add_ps(value, _mm_maskz_loadu_ps(mask, job.bias + n));
  _mm_mask_storeu_ps(job.out + m * job.N + n, mask, value);
}

// Up to kTile tokens by up to kTile outputs. Rows beyond the last repeat it and are not written.
template <int kRows>
AVX512 void tile_avx512(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int8_t* rows[kRows];
  const int8_t* weights[kTile];
  for (int i = 0; i < kRows; ++i) rows[i] = job.q + (m0 + i < m1 ? m0 + i : m1 - 1) * job.stride;
  for (int j = 0; j < kTile; ++j) weights[j] = job.weight + (n0 + j < n1 ? n0 + j : n1 - 1) * job.K;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i sums[kRows][kTile];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + kAlign <= job.K; k += kAlign) {
    __m512i weight[kTile];
    for (int j = 0; j < kTile; ++j)
      weight[j] = _mm512_xor_si512(_mm512_loadu_si512(weights[j] + k), flip);
    for (int i = 0; i < kRows; ++i) {
      const __m512i q = _mm512_loadu_si512(rows[i] + k);
      for (int j = 0; j < kTile; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], weight[j], q);
    }
  }
  if (k < job.K) {  // x is padded with zeros, the weights are not
    const __mmask64 mask = (uint64_t{1} << (job.K - k)) - 1;
    __m512i weight[kTile];
    for (int j = 0; j < kTile; ++j)
      weight[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weights[j] + k), flip);
    for (int i = 0; i < kRows; ++i) {
      const __m512i q = _mm512_loadu_si512(rows[i] + k);
      for (int j = 0; j < kTile; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], weight[j], q);
    }
  }
  const int64_t count = n1 - n0;
  for (int i = 0; i < kRows && m0 + i < m1; ++i)
    write_avx512(job, m0 + i, n0, count,
                 add_lanes(add_within_lanes(sums[i][0], sums[i][1], sums[i][2], sums[i][3])));
}

AVX2 void widen_row_avx2(Job& job, int64_t m) {
  const int8_t* q = job.q + m * job.stride;
  int16_t* wide = job.wide + m * job.stride;
  for (int64_t k = 0; k < job.stride; k += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide + k), _mm256_cvtepi8_epi16(bytes));
  }
}

AVX2 void quantize_row_avx2(Job& job, int64_t m) {
  const float* x = job.x + m * job.K;
  int8_t* q = job.q + m * job.stride;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 widest = _mm256_setzero_ps(), is_nan = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= job.K; k += 8) {
    const __m256 value = _mm256_loadu_ps(x + k);
    is_nan = _mm256_or_ps(is_nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    widest = _mm256_max_ps(widest, _mm256_andnot_ps(sign, value));
  }
  bool has_nan = _mm256_movemask_ps(is_nan) != 0;
  float lanes[8], largest = 0.0f;
  _mm256_storeu_ps(lanes, widest);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  for (; k < job.K; ++k) {
    has_nan |= std::isnan(x[k]);
    largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
  }
  const float scale = largest / 127.0f;
  if (has_nan || !std::isfinite(scale) || scale == 0.0f) {
    finish_row(job, m, has_nan ? NAN : largest);
    widen_row_avx2(job, m);
    return;
  }
  job.scale[m] = scale;
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i lowest = _mm256_set1_epi32(-127), highest = _mm256_set1_epi32(127);
  for (k = 0; k + 8 <= job.K; k += 8) {
    __m256i rounded = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + k), divisor));
    rounded = _mm256_max_epi32(lowest, _mm256_min_epi32(highest, rounded));
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + k), _mm_packs_epi16(words, words));
  }
  for (; k < job.K; ++k) {
    const float rounded = std::nearbyint(x[k] / scale);
    q[k] = static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
  }
  std::memset(q + job.K, 0, static_cast<size_t>(job.stride - job.K));
  widen_row_avx2(job, m);
}

AVX2 inline int32_t add_all(__m256i sums) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

template <int kRows, int kColumns>
AVX2 void tile_avx2(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int16_t* rows[kRows];
  const int8_t* weights[kColumns];
  for (int i = 0; i < kRows; ++i) rows[i] = job.wide + (m0 + i < m1 ? m0 + i : m1 - 1) * job.stride;
  for (int j = 0; j < kColumns; ++j)
    weights[j] = job.weight + (n0 + j < n1 ? n0 + j : n1 - 1) * job.K;
  __m256i sums[kRows][kColumns];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 16 <= job.K; k += 16) {
    __m256i weight[kColumns];
    for (int j = 0; j < kColumns; ++j)
      weight[j] = _mm256_cvtepi8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights[j] + k)));
    for (int i = 0; i < kRows; ++i) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + k));
      for (int j = 0; j < kColumns; ++j)
        sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(weight[j], q));
    }
  }
  for (int i = 0; i < kRows && m0 + i < m1; ++i)
    for (int j = 0; j < kColumns && n0 + j < n1; ++j) {
      int32_t sum = add_all(sums[i][j]);
      for (int64_t rest = k; rest < job.K; ++rest)
        sum += int32_t{rows[i][rest]} * int32_t{weights[j][rest]};
      write(job, m0 + i, n0 + j, sum);
    }
}

#endif  // __x86_64__

template <Isa isa>
void quantize_row(Job& job, int64_t m) {
#if defined(__x86_64__)
  if constexpr (isa == kAvx512Vnni) return quantize_row_avx512(job, m);
  if constexpr (isa == kAvx2) return quantize_row_avx2(job, m);
#endif
  quantize_row_generic(job, m);
}

template <Isa isa>
void multiply(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
#if defined(__x86_64__)
  if constexpr (isa == kAvx512Vnni)
    return m1 - m0 == 1 ? tile_avx512<1>(job, m0, m1, n0, n1)
                        : tile_avx512<kTile>(job, m0, m1, n0, n1);
  if constexpr (isa == kAvx2) {
    for (int64_t n = n0; n < n1; n += 2) {
      const int64_t end = n + 2 < n1 ? n + 2 : n1;
      m1 - m0 == 1 ? tile_avx2<1, 2>(job, m0, m1, n, end)
                   : tile_avx2<kTile, 2>(job, m0, m1, n, end);
    }
    return;
  }
#endif
  tile_generic(job, m0, m1, n0, n1);
}

template <Isa isa>
void quantize_rows(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int64_t m; (m = job.next_row.fetch_add(1)) < job.M;) quantize_row<isa>(job, m);
}

template <Isa isa>
void multiply_tasks(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int64_t columns = (job.N + job.outputs_per_task - 1) / job.outputs_per_task;
  const int64_t tasks = columns * ((job.M + job.tokens_per_task - 1) / job.tokens_per_task);
  for (int64_t task; (task = job.next_task.fetch_add(1)) < tasks;) {
    const int64_t n_begin = task % columns * job.outputs_per_task;
    const int64_t m_begin = task / columns * job.tokens_per_task;
    const int64_t n_end = n_begin + job.outputs_per_task < job.N ? n_begin + job.outputs_per_task : job.N;
    const int64_t m_end = m_begin + job.tokens_per_task < job.M ? m_begin + job.tokens_per_task : job.M;
    for (int64_t m = m_begin; m < m_end; m += kTile)
      for (int64_t n = n_begin; n < n_end; n += kTile)
        multiply<isa>(job, m, m + kTile < m_end ? m + kTile : m_end, n,
                      n + kTile < n_end ? n + kTile : n_end);
  }
}

template <Isa isa>
void run(Job& job, int32_t num_threads) {
  if (job.M * job.N * job.K < kSerialProducts) num_threads = 1;
  run_parallel(quantize_rows<isa>, &job, job.M == 1 ? 1 : num_threads);
  run_parallel(multiply_tasks<isa>, &job, num_threads);
}

}  // namespace

extern "C" {

// x [M, K], weight [N, K], weight_scale and bias [N] (bias may be null), out [M, N]: contiguous.
// K is at most 65,536, so that no sum leaves int32. Returns 0, or 1 where there was no memory.
int32_t r1ray_int8_linear(const float* x, int64_t M, int64_t K, const int8_t* weight,
                       const float* weight_scale, const float* bias, int64_t N, float* out,
                       int32_t isa, int32_t num_threads) {
  thread_local std::vector<int8_t> q;
  thread_local std::vector<int16_t> wide;
  thread_local std::vector<float> scale;
  thread_local std::vector<int32_t> sum;
  Job job;
  job.x = x;
  job.M = M;
  job.K = K;
  job.N = N;
  job.weight = weight;
  job.weight_scale = weight_scale;
  job.bias = bias;
  job.out = out;
  job.stride = round_up(K, kAlign);
  try {
    q.resize(static_cast<size_t>(M * job.stride));
    if (isa == kAvx2) wide.resize(static_cast<size_t>(M * job.stride));
    scale.resize(static_cast<size_t>(M));
    sum.resize(static_cast<size_t>(M));
  } catch (const std::bad_alloc&) {
    return 1;
  }
  job.q = q.data();
  job.wide = wide.data();
  job.scale = scale.data();
  job.sum = sum.data();
  job.tokens_per_task = kTokensPerTask;
  job.outputs_per_task = kOutputsPerTask;
#if defined(__x86_64__)
  if (isa >= kAvx512Vnni) {
    run<kAvx512Vnni>(job, num_threads);
    return 0;
  }
  if (isa == kAvx2) {
    run<kAvx2>(job, num_threads);
    return 0;
  }
#endif
  run<kGeneric>(job, num_threads);
  return 0;
}

}  // extern "C"
