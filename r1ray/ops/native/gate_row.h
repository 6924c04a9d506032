// x = silu(gate) · x, of `size` floats; `gate` is readable to whole vectors. Included once for each
// instruction set (simd.h).

TARGET INLINE Vec gate_lanes(Vec gate, Vec x) {
  const Vec log2e = broadcast(-1.44269504f), one = broadcast(1.0f), least = broadcast(-126.0f);
  const Vec power = Vec{} - larger(least, Vec{} - gate * log2e);  // at most 126: exp2 is finite there
  return gate / (one + exp2(power)) * x;
}

TARGET inline void gate_row(const float* gate, int64_t size, float* x) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, gate_lanes(load(gate + i), load(x + i)));
  if (i == size) return;
  alignas(64) float rest[kLanes] = {};
  const size_t bytes = static_cast<size_t>(size - i) * sizeof(float);
  std::memcpy(rest, x + i, bytes);
  store(rest, gate_lanes(load(gate + i), load(rest)));
  std::memcpy(x + i, rest, bytes);
}
