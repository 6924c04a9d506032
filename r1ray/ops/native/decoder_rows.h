// What a decoder layer does to single rows, in float32: included once for each instruction set
// (simd.h). Loops without sums across their elements are left to the compiler.

// `to` may be `x`. Squares are added up lane by lane.
TARGET inline void norm_row(const float* x, const float* weight, float eps, int64_t size,
                            float* to) {
  Vec lanes[2] = {Vec{}, Vec{}};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    lanes[0] = fma(load(x + i), load(x + i), lanes[0]);
    lanes[1] = fma(load(x + i + kLanes), load(x + i + kLanes), lanes[1]);
  }
  alignas(64) float sums[kLanes];
  store(sums, lanes[0] + lanes[1]);
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < size; ++i) total += x[i] * x[i];
  const float part = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) to[i] = x[i] * part * weight[i];
}

// As `apply_rotary`; `to` is not `x`.
TARGET inline void rotate_row(const float* __restrict x, const float* __restrict cos,
                              const float* __restrict sin, int64_t size, float* __restrict to) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < half; ++h) to[h] = x[h] * cos[h] - x[h + half] * sin[h];
  for (int64_t h = half; h < size; ++h) to[h] = x[h] * cos[h] + x[h - half] * sin[h];
}

// As `quantize_states`; a row that is not finite has no finite scale.
TARGET inline void quantize_state(const float* __restrict x, int64_t size, int8_t* __restrict to,
                                  float* scale_out) {
  float largest = 0.0f;
  bool has_nan = false;
  for (int64_t i = 0; i < size; ++i) {
    const float value = std::fabs(x[i]);
    largest = value > largest ? value : largest;
    has_nan |= value != value;
  }
  float scale = largest / 127.0f;
  if (scale == 0.0f) scale = 1.0f;
  if (has_nan || !(scale < INFINITY)) {
    *scale_out = NAN;
    for (int64_t i = 0; i < size; ++i) to[i] = 0;
    return;
  }
  *scale_out = scale;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: no bits are left behind the point
  for (int64_t i = 0; i < size; ++i) {
    float rounded = (x[i] / scale + kShift) - kShift;
    rounded = rounded > 127.0f ? 127.0f : rounded;
    rounded = rounded < -127.0f ? -127.0f : rounded;
    to[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
}

// One block's summary, as `BlockGate.summarize`, of keys as they lie in the cache. `room` has 6·size
// floats.
template <class Value>
TARGET inline void summarize_block(const Value* keys, const float* scales, const float* cos,
                                   const float* sin, const float* key_weight,
                                   const float* key_norm, int64_t size, float* room, float* to) {
  const int64_t half = size / 2;
  float* const most = room;
  float* const least = room + size;
  float* const mean = room + 2 * size;
  float* const key = room + 3 * size;
  float* const turned = room + 4 * size;
  for (int64_t h = 0; h < size; ++h)
    most[h] = -INFINITY, least[h] = INFINITY, mean[h] = 0.0f;
  for (int64_t token = 0; token < kBlock; ++token) {
    const float* const c = cos + token * size;
    const float* const s = sin + token * size;
    const float scale = scales ? scales[token] : 1.0f;
    for (int64_t h = 0; h < size; ++h) key[h] = static_cast<float>(keys[token * size + h]) * scale;
    for (int64_t h = 0; h < half; ++h) turned[h] = key[h] * c[h] + key[h + half] * s[h];
    for (int64_t h = half; h < size; ++h) turned[h] = key[h] * c[h] - key[h - half] * s[h];
    for (int64_t h = 0; h < size; ++h) {
      const float value = turned[h] / (c[h] * c[h] + s[h] * s[h]);
      most[h] = value > most[h] ? value : most[h];
      least[h] = value < least[h] ? value : least[h];
      mean[h] += value;
    }
  }
  for (int64_t h = 0; h < size; ++h) mean[h] /= static_cast<float>(kBlock), turned[h] = 0.0f;
  for (int64_t p = 0; p < 3 * size; ++p) {
    const float factor = room[p];
    const float* const weight = key_weight + p * size;
    for (int64_t h = 0; h < size; ++h) turned[h] += factor * weight[h];
  }
  norm_row(turned, key_norm, kGateEps, size, turned);
  rotate_row(turned, cos, sin, size, to);
}
