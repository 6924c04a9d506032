// INT8 linear layers as the other kernels call them: rows are quantized once, then multiplied by as
// many weights as there are.

#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace r1ray {

constexpr int64_t kAlign = 64;  // bytes of one AVX512 register: rows of x are padded to it
constexpr int64_t kTileRows = 8;  // tokens of the largest tile

// M rows of K inputs as int8, each with its scale.
struct QuantizedRows {
  int64_t M, K;
  int64_t stride;  // bytes of a padded row
  int8_t* q;
  int16_t* wide;  // q in 16 bits, for AVX2 alone
  float* scale;   // NaN where a row is not finite
  int32_t* sum;   // of a row's q
};

// The memory of some rows, kept for the next.
class RowMemory {
 public:
  // Throws std::bad_alloc. What was there is lost. Rows up to a whole tile are there, of anything.
  QuantizedRows reserve(int64_t M, int64_t K, int32_t isa) {
    const int64_t stride = round_up(K, kAlign), whole = round_up(M, kTileRows) * stride + kAlign;
    if (q_.size() < static_cast<size_t>(whole)) q_.resize(static_cast<size_t>(whole));
    if (isa == kAvx2 && wide_.size() < static_cast<size_t>(M * stride))
      wide_.resize(static_cast<size_t>(M * stride));
    if (scale_.size() < static_cast<size_t>(M)) {
      scale_.resize(static_cast<size_t>(M));
      sum_.resize(static_cast<size_t>(M));
    }
    // A load across two lines of the cache takes twice as long.
    int8_t* const q = q_.data() + (-reinterpret_cast<uintptr_t>(q_.data()) & (kAlign - 1));
    return {M, K, stride, q, wide_.data(), scale_.data(), sum_.data()};
  }

 private:
  std::vector<int8_t> q_;
  std::vector<int16_t> wide_;
  std::vector<float> scale_;
  std::vector<int32_t> sum_;
};

// Row m of what is to be quantized: where it lies, or computed into `room`, which has K floats and
// 16 more.
using ReadRow = const float* (*)(const void* data, int64_t m, float* room);

// Rows as they lie: a ReadRow for `data` of this type.
struct FloatRows {
  const float* x;
  int64_t stride;
};
inline const float* read_float_row(const void* data, int64_t m, float*) {
  const FloatRows& rows = *static_cast<const FloatRows*>(data);
  return rows.x + m * rows.stride;
}

// False where there was no memory.
bool quantize_rows(const QuantizedRows& rows, ReadRow read, const void* data, int32_t isa,
                   int32_t num_threads);

// One weight and where its outputs go.
struct LinearPart {
  const int8_t* weight;       // [N, K]
  const float* weight_scale;  // [N]
  const float* bias;          // [N], or null
  int64_t N;
  float* out;      // [M, N], rows `stride` floats apart
  int64_t stride;
  bool adds;  // to what is in `out`
  // With one: out = silu(its products) · these. It has as many outputs; where they go is not asked.
  const LinearPart* gate;
};

constexpr int kMostParts = 3;

// out = rows · weightᵀ · scales + bias of every part. False where there was no memory.
bool multiply_rows(const QuantizedRows& rows, const LinearPart* parts, int num_parts, int32_t isa,
                   int32_t num_threads);

}  // namespace r1ray
