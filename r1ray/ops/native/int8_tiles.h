// Products of a few rows on AVX512-VNNI: included by int8_linear.cpp.
//
// A tile is four or eight tokens by four outputs, two outputs at a time, whose sums stay in
// registers; then those of each token are added up across the registers. The next tile's weights are
// asked for meanwhile: rows of weights are short, and what reads ahead by itself begins anew in each.
//
// Price: the reading of the weights up to 8 tokens; beyond, about that of the products.

constexpr int64_t kAhead = 4096;  // bytes of weights

// Sums of the tokens of a tile by one output. Each has a name: of an array, GCC 12 stores every sum
// at every step.
struct TokenSums {
  __m512i a, b, c, d, e, f, g, h;
};

template <int kRows>
AVX512 INLINE void add_tokens(const __m512i& weight, const int8_t* q, int64_t stride,
                              TokenSums& sums) {
  sums.a = _mm512_dpbusd_epi32(sums.a, weight, _mm512_loadu_si512(q));
  sums.b = _mm512_dpbusd_epi32(sums.b, weight, _mm512_loadu_si512(q + stride));
  sums.c = _mm512_dpbusd_epi32(sums.c, weight, _mm512_loadu_si512(q + 2 * stride));
  sums.d = _mm512_dpbusd_epi32(sums.d, weight, _mm512_loadu_si512(q + 3 * stride));
  if constexpr (kRows == 8) {
    q += 4 * stride;
    sums.e = _mm512_dpbusd_epi32(sums.e, weight, _mm512_loadu_si512(q));
    sums.f = _mm512_dpbusd_epi32(sums.f, weight, _mm512_loadu_si512(q + stride));
    sums.g = _mm512_dpbusd_epi32(sums.g, weight, _mm512_loadu_si512(q + 2 * stride));
    sums.h = _mm512_dpbusd_epi32(sums.h, weight, _mm512_loadu_si512(q + 3 * stride));
  }
}

// `to` has kTile sums for each token.
template <int kRows>
AVX512 INLINE void keep_sums(const TokenSums& sums, __m512i* to) {
  to[0] = sums.a;
  to[kTile] = sums.b;
  to[2 * kTile] = sums.c;
  to[3 * kTile] = sums.d;
  if constexpr (kRows == 8) {
    to[4 * kTile] = sums.e;
    to[5 * kTile] = sums.f;
    to[6 * kTile] = sums.g;
    to[7 * kTile] = sums.h;
  }
}

// Tokens m0 to m1, at most kRows, by up to kTile outputs. Outputs beyond the last repeat it; rows
// beyond the last are there (`RowMemory`); neither is written.
template <int kRows>
AVX512 void multiply_tile(const QuantizedRows& x, const LinearPart& part, int64_t m0, int64_t m1,
                          int64_t n0, int64_t n1) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), zero = _mm512_setzero_si512();
  const int64_t whole = x.K / kAlign * kAlign;
  const __mmask64 mask = (uint64_t{1} << (x.K - whole)) - 1;
  const int8_t* const q = x.q + m0 * x.stride;
  __m512i kept[kRows * kTile];
  for (int j = 0; j < kTile; ++j) {
    const int8_t* const weights = part.weight + (n0 + j < n1 ? n0 + j : n1 - 1) * x.K;
    TokenSums sums = {zero, zero, zero, zero, zero, zero, zero, zero};
    for (int64_t k = 0; k < whole; k += kAlign) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + k + kAhead), _MM_HINT_T0);
      add_tokens<kRows>(_mm512_xor_si512(_mm512_loadu_si512(weights + k), flip), q + k, x.stride,
                        sums);
    }
    if (whole < x.K)  // x is padded with zeros, the weights are not
      add_tokens<kRows>(_mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weights + whole), flip),
                        q + whole, x.stride, sums);
    keep_sums<kRows>(sums, kept + j);
  }
  for (int64_t i = 0; i < kRows && m0 + i < m1; ++i) {
    const __m512i* const sums = kept + i * kTile;
    write_avx512(x, part, m0 + i, n0, n1 - n0,
                 add_lanes(add_within_lanes(sums[0], sums[1], sums[2], sums[3])));
  }
}
