// out = (x quantized per token) · weightᵀ · scales + bias, of float32 x and int8 weights.
//
// 1. Each token's row becomes int8 with one scale, exactly as `quantize_int8` rounds (int8_rows.cpp).
// 2. Tiles of a few tokens by 4 outputs add up int8 products in int32, which is exact
//    (int8_tiles.h); on AVX512-VNNI, many tokens take panels of weights (int8_panels.h).
// 3. Both scales and the bias follow in float32, in the order of the torch path: equal bit for bit.
// 4. Where there is a gate, its products for the same outputs are there meanwhile, and multiply.
//
// Both matrices are contiguous along the inner dimension, as PyTorch stores them, so no repacked
// copy of the weights is kept. AVX512-VNNI multiplies unsigned by signed bytes: weights are flipped
// to unsigned (+128) as they are loaded, and 128 · sum(x) is taken off afterwards. AVX2's byte
// product saturates; there bytes are widened to 16 bits first.
//
// Names: M tokens, K inputs, N outputs.

#include "int8_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "simd.h"

namespace r1ray {

namespace generic {
#define TARGET TARGET_GENERIC
#include "gate_row.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define TARGET TARGET_AVX2
#include "gate_row.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
#include "gate_row.h"
#undef TARGET
}  // namespace avx512

#endif  // __x86_64__

namespace {

constexpr int kTile = 4;  // outputs, and tokens at most unless there are wider registers
constexpr int64_t kOutputsPerTask = 32;  // their weights stay in the second-level cache
constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kWidest = 16;          // floats of a register
constexpr int64_t kRunsPerThread = 4;
constexpr int64_t kPanelTokens = 16;          // from here on panels are worth packing
constexpr int64_t kTokensPerPanel = 512;      // about as many for one packing, ...
constexpr int64_t kTasksPerThread = 8;        // ... but no fewer tasks than these
constexpr int64_t kSerialProducts = 1 << 17;  // below, waking threads costs more than it saves

void write(const QuantizedRows& x, const LinearPart& part, int64_t m, int64_t n, int32_t product) {
  float value = static_cast<float>(product) * x.scale[m] * part.weight_scale[n];
  if (part.bias) value += part.bias[n];
  float& out = part.out[m * part.stride + n];
  out = part.adds ? out + value : value;
}

void tile_generic(const QuantizedRows& x, const LinearPart& part, int64_t m0, int64_t m1,
                  int64_t n0, int64_t n1) {
  for (int64_t m = m0; m < m1; ++m) {
    const int8_t* q = x.q + m * x.stride;
    for (int64_t n = n0; n < n1; ++n) {
      const int8_t* weight = part.weight + n * x.K;
      int32_t sum = 0;
      for (int64_t k = 0; k < x.K; ++k) sum += int32_t{q[k]} * int32_t{weight[k]};
      write(x, part, m, n, sum);
    }
  }
}

#if defined(__x86_64__)

#define AVX512 TARGET_AVX512
#define AVX2 __attribute__((target("avx2")))

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

AVX512 inline void write_avx512(const QuantizedRows& x, const LinearPart& part, int64_t m, int64_t n,
                                int64_t count, __m128i sums) {
  const __mmask8 mask = static_cast<__mmask8>((1u << count) - 1);
  const __m128i product = _mm_sub_epi32(sums, _mm_set1_epi32(128 * x.sum[m]));
  __m128 value = _mm_mul_ps(_mm_cvtepi32_ps(product), _mm_set1_ps(x.scale[m]));
  value = _mm_mul_ps(value, _mm_maskz_loadu_ps(mask, part.weight_scale + n));
  if (part.bias) value = _mm_add_ps(value, _mm_maskz_loadu_ps(mask, part.bias + n));
  float* const out = part.out + m * part.stride + n;
  if (part.adds) value = _mm_add_ps(_mm_maskz_loadu_ps(mask, out), value);
  _mm_mask_storeu_ps(out, mask, value);
}

// One token by up to kTile outputs, output by output: weights come from memory in one run, which is
// twice as fast as in kTile of them side by side.
AVX512 void row_avx512(const QuantizedRows& x, const LinearPart& part, int64_t m, int64_t n0,
                       int64_t n1) {
  const int8_t* q = x.q + m * x.stride;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t whole = x.K / kAlign * kAlign;
  const __mmask64 mask = (uint64_t{1} << (x.K - whole)) - 1;
  __m512i sums[kTile];
  for (int j = 0; j < kTile; ++j) {
    const int8_t* weight = part.weight + (n0 + j < n1 ? n0 + j : n1 - 1) * x.K;
    sums[j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < whole; k += kAlign)
      sums[j] = _mm512_dpbusd_epi32(
          sums[j], _mm512_xor_si512(_mm512_loadu_si512(weight + k), flip), _mm512_loadu_si512(q + k));
    if (whole < x.K)  // x is padded with zeros, the weights are not
      sums[j] = _mm512_dpbusd_epi32(
          sums[j], _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weight + whole), flip),
          _mm512_loadu_si512(q + whole));
  }
  write_avx512(x, part, m, n0, n1 - n0,
               add_lanes(add_within_lanes(sums[0], sums[1], sums[2], sums[3])));
}

#include "int8_tiles.h"
#include "int8_panels.h"

AVX2 inline int32_t add_all(__m256i sums) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

template <int kRows, int kColumns>
AVX2 void tile_avx2(const QuantizedRows& x, const LinearPart& part, int64_t m0, int64_t m1,
                    int64_t n0, int64_t n1) {
  const int16_t* rows[kRows];
  const int8_t* weights[kColumns];
  for (int i = 0; i < kRows; ++i) rows[i] = x.wide + (m0 + i < m1 ? m0 + i : m1 - 1) * x.stride;
  for (int j = 0; j < kColumns; ++j)
    weights[j] = part.weight + (n0 + j < n1 ? n0 + j : n1 - 1) * x.K;
  __m256i sums[kRows][kColumns];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 16 <= x.K; k += 16) {
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
      for (int64_t rest = k; rest < x.K; ++rest)
        sum += int32_t{rows[i][rest]} * int32_t{weights[j][rest]};
      write(x, part, m0 + i, n0 + j, sum);
    }
}

#endif  // __x86_64__

struct Job {
  const QuantizedRows* x;
  const LinearPart* parts;
  int num_parts;
  int32_t isa;
  bool has_panels;
  int64_t outputs_per_task, tokens_per_task;
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_failed{false};
};

template <Isa isa>
void multiply(const QuantizedRows& x, const LinearPart& part, int64_t m0, int64_t m1, int64_t n0,
              int64_t n1) {
#if defined(__x86_64__)
  if constexpr (isa == kAvx512Vnni)
    return m1 - m0 == 1   ? row_avx512(x, part, m0, n0, n1)
           : m1 - m0 <= 4 ? multiply_tile<4>(x, part, m0, m1, n0, n1)
                          : multiply_tile<8>(x, part, m0, m1, n0, n1);
  if constexpr (isa == kAvx2) {
    for (int64_t n = n0; n < n1; n += 2) {
      const int64_t end = n + 2 < n1 ? n + 2 : n1;
      m1 - m0 == 1 ? tile_avx2<1, 2>(x, part, m0, m1, n, end)
                   : tile_avx2<kTile, 2>(x, part, m0, m1, n, end);
    }
    return;
  }
#endif
  tile_generic(x, part, m0, m1, n0, n1);
}

template <Isa isa>
void multiply_task(Job& job, const LinearPart& part, int64_t m0, int64_t m1, int64_t n0,
                   int64_t n1) {
#if defined(__x86_64__)
  if constexpr (isa == kAvx512Vnni)
    if (job.has_panels) {
      if (!multiply_with_panels(*job.x, part, m0, m1, n0, n1)) job.has_failed = true;
      return;
    }
#endif
  constexpr int64_t kRows = isa == kAvx512Vnni ? kTileRows : kTile;
  for (int64_t n = n0; n < n1; n += kTile)
    for (int64_t m = m0; m < m1; m += kRows)
      multiply<isa>(*job.x, part, m, m + kRows < m1 ? m + kRows : m1, n,
                    n + kTile < n1 ? n + kTile : n1);
}

template <Isa isa>
void gate(const float* by, int64_t size, float* x) {
#if defined(__x86_64__)
  if constexpr (isa == kAvx512Vnni) return avx512::gate_row(by, size, x);
  if constexpr (isa == kAvx2) return avx2::gate_row(by, size, x);
#endif
  generic::gate_row(by, size, x);
}

// The gate's products come first, into memory of the thread: the cache has them until they multiply.
template <Isa isa>
void multiply_gated(Job& job, const LinearPart& part, int64_t m0, int64_t m1, int64_t n0,
                    int64_t n1) {
  thread_local Scratch memory;
  LinearPart by = *part.gate;
  by.stride = round_up(n1 - n0, kWidest);
  float* const room = memory.reserve((m1 - m0) * by.stride);
  if (!room) {
    job.has_failed = true;
    return;
  }
  by.out = room - m0 * by.stride - n0;
  multiply_task<isa>(job, by, m0, m1, n0, n1);
  multiply_task<isa>(job, part, m0, m1, n0, n1);
  for (int64_t m = m0; m < m1; ++m)
    gate<isa>(room + (m - m0) * by.stride, n1 - n0, part.out + m * part.stride + n0);
}

// Tasks go through the outputs of all parts, then to the next tokens.
template <Isa isa>
void run_tasks(void* data) {
  Job& job = *static_cast<Job*>(data);
  int64_t columns[kMostParts], all = 0;
  for (int i = 0; i < job.num_parts; ++i)
    all += columns[i] = (job.parts[i].N + job.outputs_per_task - 1) / job.outputs_per_task;
  const int64_t M = job.x->M, tasks = all * ((M + job.tokens_per_task - 1) / job.tokens_per_task);
  for (int64_t task; (task = job.next.fetch_add(1)) < tasks;) {
    int64_t column = task % all;
    int i = 0;
    for (; column >= columns[i]; ++i) column -= columns[i];
    const LinearPart& part = job.parts[i];
    const int64_t n0 = column * job.outputs_per_task, m0 = task / all * job.tokens_per_task;
    const int64_t n1 = n0 + job.outputs_per_task, m1 = m0 + job.tokens_per_task;
    const auto run = part.gate ? multiply_gated<isa> : multiply_task<isa>;
    run(job, part, m0, m1 < M ? m1 : M, n0, n1 < part.N ? n1 : part.N);
  }
}

}  // namespace

bool multiply_rows(const QuantizedRows& rows, const LinearPart* parts, int num_parts, int32_t isa,
                   int32_t num_threads) {
  Job job;
  job.x = &rows;
  job.parts = parts;
  job.num_parts = num_parts;
  job.isa = isa;
  job.has_panels = isa >= kAvx512Vnni && rows.M >= kPanelTokens;
  job.outputs_per_task = kOutputsPerTask;
  job.tokens_per_task = kTokensPerTask;
  int64_t outputs = 0;
  for (int i = 0; i < num_parts; ++i) outputs += parts[i].N;
  if (rows.M <= kTileRows) {  // weights are read once: in long runs
    const int64_t share = outputs / (kRunsPerThread * (num_threads > 1 ? num_threads : 1));
    job.outputs_per_task = std::max(kOutputsPerTask, round_up(share, kTile));
  }
#if defined(__x86_64__)
  if (job.has_panels) {
    const int64_t wanted = kTasksPerThread * num_threads * kPanel / std::max<int64_t>(outputs, 1);
    const int64_t most = (rows.M + kPanelTokens - 1) / kPanelTokens;
    const int64_t slices = std::max((rows.M + kTokensPerPanel - 1) / kTokensPerPanel,
                                    std::min(wanted, most));
    job.outputs_per_task = kPanel;
    job.tokens_per_task = round_up((rows.M + slices - 1) / slices, kPanelRows);
  }
#endif
  if (rows.M * outputs * rows.K < kSerialProducts) num_threads = 1;
  auto* body = run_tasks<kGeneric>;
#if defined(__x86_64__)
  if (isa >= kAvx512Vnni) body = run_tasks<kAvx512Vnni>;
  if (isa == kAvx2) body = run_tasks<kAvx2>;
#endif
  run_parallel(body, &job, num_threads);
  return !job.has_failed;
}

}  // namespace r1ray

extern "C" {

// x [M, K], weight [N, K], weight_scale and bias [N] (bias may be null), out [M, N]: contiguous.
// K is at most 65,536, so that no sum leaves int32. Returns 0, or 1 where there was no memory.
int32_t r1ray_int8_linear(const float* x, int64_t M, int64_t K, const int8_t* weight,
                          const float* weight_scale, const float* bias, int64_t N, float* out,
                          int32_t isa, int32_t num_threads) {
  using namespace r1ray;
  thread_local RowMemory memory;
  const FloatRows source = {x, K};
  const LinearPart part = {weight, weight_scale, bias, N, out, N, false, nullptr};
  try {
    const QuantizedRows rows = memory.reserve(M, K, isa);
    const bool is_small = M * N * K < kSerialProducts;
    return !quantize_rows(rows, read_float_row, &source, isa, is_small ? 1 : num_threads) ||
           !multiply_rows(rows, &part, 1, isa, num_threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // extern "C"
