// Products of many rows on AVX512-VNNI: included by int8_linear.cpp.
//
// 64 outputs' weights become a panel, flipped to unsigned: step by step of 4 inputs, 64 outputs of 4
// bytes. Outputs then lie along registers, and nothing has to be added up across them. A tile is 4
// tokens by 64 outputs, a broadcast of 4 inputs of each token at a step.
//
// Price: packing takes about as long as the products of 4 tokens.

constexpr int64_t kPanel = 64;  // outputs: four registers
constexpr int kPanelRows = 4;   // tokens of a tile

AVX512 inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {  // fours[4 * i + j]: column j of each lane, of rows 4 * i on
    const __m512i even01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    rows[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

// Outputs n0 to n1 of a weight; those behind repeat the last.
AVX512 inline void pack_panel(const int8_t* weight, int64_t K, int64_t n0, int64_t n1,
                              uint8_t* panel) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t k = 0; k < K; k += kAlign, panel += 16 * 4 * kPanel) {
    const __mmask64 mask = K - k >= kAlign ? ~uint64_t{0} : (uint64_t{1} << (K - k)) - 1;
    for (int64_t group = 0; group < kPanel; group += 16) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t n = n0 + group + i < n1 ? n0 + group + i : n1 - 1;
        rows[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weight + n * K + k), flip);
      }
      transpose(rows);
      for (int64_t i = 0; i < 16; ++i)
        _mm512_storeu_si512(panel + i * 4 * kPanel + 4 * group, rows[i]);
    }
  }
}

// Both scales, the bias and what is added to, of one token's products [kPanel]. Masks cost more than
// all else, so whole panels go without.
template <bool kIsWhole>
AVX512 INLINE void write_token(const int32_t* products, int32_t flipped, float scale,
                               const float* weight_scale, const float* bias, bool adds,
                               int64_t count, float* out) {
  const __m512i taken_off = _mm512_set1_epi32(flipped);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t n = 0; n < (kIsWhole ? kPanel : count); n += 16) {
    const __mmask16 mask =
        kIsWhole || count - n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - n)) - 1);
    const __m512i product = _mm512_sub_epi32(_mm512_load_si512(products + n), taken_off);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(product), factor);
    if constexpr (kIsWhole) {
      value = _mm512_mul_ps(value, _mm512_loadu_ps(weight_scale + n));
      if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias + n));
      if (adds) value = _mm512_add_ps(_mm512_loadu_ps(out + n), value);
      _mm512_storeu_ps(out + n, value);
    } else {
      value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight_scale + n));
      if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + n));
      if (adds) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + n), value);
      _mm512_mask_storeu_ps(out + n, mask, value);
    }
  }
}

// Of kRows tokens from m0 on.
template <int kRows>
AVX512 INLINE void write_panel(const QuantizedRows& x, const LinearPart& part,
                               const int32_t* products, int64_t m0, int64_t n0, int64_t n1) {
  const float* const weight_scale = part.weight_scale + n0;
  const float* const bias = part.bias ? part.bias + n0 : nullptr;
  const bool adds = part.adds, is_whole = n1 - n0 == kPanel;
  const int64_t stride = part.stride;
  float* out = part.out + m0 * stride + n0;
  for (int64_t i = 0; i < kRows; ++i, out += stride, products += kPanel) {
    const int32_t flipped = 128 * x.sum[m0 + i];
    const float scale = x.scale[m0 + i];
    if (is_whole)
      write_token<true>(products, flipped, scale, weight_scale, bias, adds, kPanel, out);
    else
      write_token<false>(products, flipped, scale, weight_scale, bias, adds, n1 - n0, out);
  }
}

// The sums of one token by a panel. Each has a name: of an array, GCC 12 stores every sum at every
// step.
struct PanelSums {
  __m512i a, b, c, d;
};

AVX512 INLINE void add_products(const __m512i& a, const __m512i& b, const __m512i& c,
                                const __m512i& d, const int8_t* q, PanelSums& sums) {
  int32_t four;
  std::memcpy(&four, q, sizeof four);
  const __m512i inputs = _mm512_set1_epi32(four);
  sums.a = _mm512_dpbusd_epi32(sums.a, a, inputs);
  sums.b = _mm512_dpbusd_epi32(sums.b, b, inputs);
  sums.c = _mm512_dpbusd_epi32(sums.c, c, inputs);
  sums.d = _mm512_dpbusd_epi32(sums.d, d, inputs);
}

AVX512 INLINE void store_sums(const PanelSums& sums, int32_t* to) {
  _mm512_store_si512(to, sums.a);
  _mm512_store_si512(to + 16, sums.b);
  _mm512_store_si512(to + 32, sums.c);
  _mm512_store_si512(to + 48, sums.d);
}

// Tokens m0 to m0 + kRows by the outputs of a panel.
template <int kRows>
AVX512 void multiply_panel(const QuantizedRows& x, const LinearPart& part, const uint8_t* panel,
                           int64_t m0, int64_t n0, int64_t n1) {
  const __m512i zero = _mm512_setzero_si512();
  PanelSums s0 = {zero, zero, zero, zero}, s1 = s0, s2 = s0, s3 = s0;
  const int64_t stride = x.stride;
  const int8_t* q = x.q + m0 * stride;
  for (const int8_t* const end = q + stride; q < end; q += 4, panel += 4 * kPanel) {
    const __m512i a = _mm512_loadu_si512(panel), b = _mm512_loadu_si512(panel + 64);
    const __m512i c = _mm512_loadu_si512(panel + 128), d = _mm512_loadu_si512(panel + 192);
    add_products(a, b, c, d, q, s0);
    if constexpr (kRows > 1) add_products(a, b, c, d, q + stride, s1);
    if constexpr (kRows > 2) add_products(a, b, c, d, q + 2 * stride, s2);
    if constexpr (kRows > 3) add_products(a, b, c, d, q + 3 * stride, s3);
  }
  alignas(64) int32_t products[kPanelRows * kPanel];
  store_sums(s0, products);
  if constexpr (kRows > 1) store_sums(s1, products + kPanel);
  if constexpr (kRows > 2) store_sums(s2, products + 2 * kPanel);
  if constexpr (kRows > 3) store_sums(s3, products + 3 * kPanel);
  write_panel<kRows>(x, part, products, m0, n0, n1);
}

// False where there was no memory.
AVX512 inline bool multiply_with_panels(const QuantizedRows& x, const LinearPart& part, int64_t m0,
                                        int64_t m1, int64_t n0, int64_t n1) {
  thread_local Scratch memory;
  uint8_t* const panel = reinterpret_cast<uint8_t*>(memory.reserve(x.stride * kPanel / 4));
  if (!panel) return false;
  pack_panel(part.weight, x.K, n0, n1, panel);
  int64_t m = m0;
  for (; m + kPanelRows <= m1; m += kPanelRows)
    multiply_panel<kPanelRows>(x, part, panel, m, n0, n1);
  switch (m1 - m) {
    case 3: multiply_panel<3>(x, part, panel, m, n0, n1); break;
    case 2: multiply_panel<2>(x, part, panel, m, n0, n1); break;
    case 1: multiply_panel<1>(x, part, panel, m, n0, n1); break;
    default: break;
  }
  return true;
}
