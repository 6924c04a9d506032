// Products of few rows, from which the kernels are built: included once for each instruction set
// (simd.h).

constexpr int kRows = 4;  // of a tile

// Not `= {}`, which GCC makes a call in memory of what else stays in registers.
template <int kRows, int kCols>
TARGET INLINE void clear(Vec (&sums)[kRows][kCols]) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) sums[r][c] = Vec{};
}

// Sums of kRows of the left side by kCols vectors of the right side's columns.
template <int kRows, int kCols>
TARGET INLINE void multiply(const Word* left, int64_t left_row, int64_t left_step,
                            const Word* right, int64_t right_step, int64_t steps,
                            Vec (&sums)[kRows][kCols]) {
  for (int64_t step = 0; step < steps; ++step) {
    Words columns[kCols];
    for (int c = 0; c < kCols; ++c) columns[c] = load_words(right + step * right_step + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Words row = broadcast_word(left[r * left_row + step * left_step]);
      for (int c = 0; c < kCols; ++c) sums[r][c] = dot(sums[r][c], row, columns[c]);
    }
  }
}

#if !R1RAY_BF16 && !R1RAY_INT8

// Up to kLanes values behind `from` as floats, zeros behind `count`.
template <class Value>
TARGET INLINE Vec load_some(const Value* from, int64_t count) {
  if (count >= kLanes) return load_values(from);
  Value padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load_values(padded);
}

// out[head][row] = queries[head] · rows[row]; up to three more are written than there are rows.
template <int kHeads, class Value>
TARGET inline void dot_rows(const Value* rows, int64_t count, int64_t size, const float* queries,
                            int64_t width, float* out, int64_t out_stride) {
  for (int64_t row = 0; row < count; row += 4) {
    const Value* four[4];
    for (int r = 0; r < 4; ++r) four[r] = rows + (row + r < count ? row + r : count - 1) * size;
    Vec sums[4][kHeads];
    clear(sums);
    int64_t h = 0;
    for (; h + kLanes <= size; h += kLanes) {
      Vec columns[kHeads];
      for (int g = 0; g < kHeads; ++g) columns[g] = load(queries + g * width + h);
      for (int r = 0; r < 4; ++r) {
        const Vec values = load_values(four[r] + h);
        for (int g = 0; g < kHeads; ++g) sums[r][g] = fma(values, columns[g], sums[r][g]);
      }
    }
    if (h < size)
      for (int r = 0; r < 4; ++r) {
        const Vec values = load_some(four[r] + h, size - h);
        for (int g = 0; g < kHeads; ++g)
          sums[r][g] = fma(values, load(queries + g * width + h), sums[r][g]);
      }
    for (int g = 0; g < kHeads; ++g)
      add_across4(sums[0][g], sums[1][g], sums[2][g], sums[3][g], out + g * out_stride + row);
  }
}

// out[i] *= scales[i]; there is room for whole vectors in `out` alone.
TARGET inline void multiply_by(const float* scales, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(out + i) * load(scales + i));
  for (; i < count; ++i) out[i] *= scales[i];
}

#endif  // !R1RAY_BF16 && !R1RAY_INT8
