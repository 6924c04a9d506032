// One unit of a block of queries, by tiles: included once for each instruction set (simd.h).
//
// 1. The queries of a head become a panel: step by step of H, a row of 64 queries. Scores are then
//    tiles of keys by queries with the keys as they lie, and the softmax runs down columns.
// 2. A block of keys and values at a time: widened to Words, scored, and turned into shares against
//    the highest score up to this block (online softmax), in place.
// 3. Sums of values are tiles of queries by columns of H; what a tile had is first scaled to the
//    new highest score. At the end all is divided by the sum of shares.
//
// bfloat16 has int8 keys and values exactly; their scales multiply scores and shares in float32.

struct BlockScratch {
  int64_t steps, width;  // Words of a query; columns of values, padded to whole vectors
  Word *panels;          // [G][steps][64]
  Word *keys, *values;   // [64][steps], [64 / kPair][width]
  float *scores;         // [64][64]; shares as Words [64 / kPair][64] in its place
  float *sums;           // [G][64][width]
  float *peaks, *totals;  // [G][64]
  float *next, *factors;  // [64]
};

inline int64_t lay_out(const AttentionArguments& job, float* memory, BlockScratch& scratch) {
  const int64_t heads = job.N / job.K;
  scratch.steps = round_up(job.H, kPair) / kPair;
  scratch.width = round_up(job.H, kLanes);
  float* at = memory;
  const auto take = [&at](int64_t count) {
    float* const taken = at;
    at += round_up(count, 16);
    return taken;
  };
  scratch.panels = reinterpret_cast<Word*>(take(heads * scratch.steps * kBlock));
  scratch.keys = reinterpret_cast<Word*>(take(kBlock * scratch.steps));
  scratch.values = reinterpret_cast<Word*>(take(kBlock / kPair * scratch.width));
  scratch.scores = take(kBlock * kBlock);
  scratch.sums = take(heads * kBlock * scratch.width);
  scratch.peaks = take(heads * kBlock);
  scratch.totals = take(heads * kBlock);
  scratch.next = take(kBlock);
  scratch.factors = take(kBlock);
  return at - memory;
}

#if R1RAY_BF16

TARGET inline uint32_t narrow(float value) {
  return static_cast<uint32_t>(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)))) &
         0xffffu;
}

TARGET inline void pack_query(const float* q, int64_t size, float scale, Word* panel) {
  int64_t h = 0;
  alignas(64) Word words[kLanes];
  const Vec factor = broadcast(scale);
  for (; h + 2 * kLanes <= size; h += 2 * kLanes) {
    _mm512_store_si512(words, join(load(q + h) * factor, load(q + h + kLanes) * factor));
    for (int i = 0; i < kLanes; ++i) panel[(h / 2 + i) * kBlock] = words[i];
  }
  for (; h < size; h += 2) {
    const uint32_t high = h + 1 < size ? narrow(q[h + 1] * scale) << 16 : 0;
    panel[h / 2 * kBlock] = narrow(q[h] * scale) | high;
  }
}

// Keys as they lie, two columns a Word.
TARGET inline void pack_keys(const int8_t* keys, const float*, int64_t count, int64_t size,
                             Word* to, int64_t steps) {
  for (int64_t key = 0; key < count; ++key, keys += size, to += steps) {
    int64_t h = 0;
    for (; h + 2 * kLanes <= size; h += 2 * kLanes)
      store_words(to + h / 2, join(load_values(keys + h), load_values(keys + h + kLanes)));
    for (; h < size; h += 2) {
      const uint32_t high = h + 1 < size ? narrow(keys[h + 1]) << 16 : 0;
      to[h / 2] = narrow(keys[h]) | high;
    }
  }
  std::memset(to, 0, static_cast<size_t>((kBlock - count) * steps) * sizeof(Word));
}

// Values of two keys a Word, and zeros behind the last.
TARGET inline void pack_values(const int8_t* values, const float*, int64_t count, int64_t size,
                               Word* to, int64_t width) {
  for (int64_t key = 0; key < kBlock; key += 2, values += 2 * size, to += width) {
    const int64_t rows = count - key;
    int64_t h = 0;
    if (rows >= 2)
      for (; h + kLanes <= size; h += kLanes)
        store_words(to + h, zip(load_values(values + h), load_values(values + size + h)));
    for (; h < width; ++h) {
      const uint32_t low = rows > 0 && h < size ? narrow(values[h]) : 0;
      const uint32_t high = rows > 1 && h < size ? narrow(values[size + h]) << 16 : 0;
      to[h] = low | high;
    }
  }
}

#else

TARGET inline void pack_query(const float* q, int64_t size, float scale, Word* panel) {
  for (int64_t h = 0; h < size; ++h) panel[h * kBlock] = q[h] * scale;
}

// Rows as they lie, times their scales if any; zeros behind each and behind the last.
template <class Value>
TARGET inline void widen(const Value* rows, const float* scale, int64_t count, int64_t size,
                         float* to, int64_t width) {
  for (int64_t row = 0; row < count; ++row, rows += size, to += width) {
    const float factor = scale ? scale[row] : 1.0f;
    int64_t h = 0;
    for (; h + kLanes <= size; h += kLanes) store(to + h, load_values(rows + h) * broadcast(factor));
    for (; h < size; ++h) to[h] = static_cast<float>(rows[h]) * factor;
    for (; h < width; ++h) to[h] = 0.0f;
  }
  std::memset(to, 0, static_cast<size_t>((kBlock - count) * width) * sizeof(float));
}

template <class Value>
TARGET inline void pack_keys(const Value* keys, const float* scale, int64_t count, int64_t size,
                             Word* to, int64_t steps) {
  widen(keys, scale, count, size, to, steps);
}

template <class Value>
TARGET inline void pack_values(const Value* values, const float* scale, int64_t count, int64_t size,
                               Word* to, int64_t width) {
  widen(values, scale, count, size, to, width);
}

#endif  // R1RAY_BF16

// Scores of a block's keys for kCols vectors of queries from `column` on, and the highest of each.
template <int kCols, bool kIsOwn>
TARGET inline void score_columns(const BlockScratch& scratch, const Word* panel, const float* scale,
                                 const float* peaks, int64_t column) {
  alignas(64) static constexpr float kColumns[kBlock] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  Vec most[kCols];
  for (int c = 0; c < kCols; ++c) most[c] = load(peaks + column + c * kLanes);
  for (int64_t key = 0; key < kBlock; key += kRows) {
    Vec sums[kRows][kCols];
    clear(sums);
    multiply<kRows, kCols>(scratch.keys + key * scratch.steps, scratch.steps, 1, panel + column,
                           kBlock, scratch.steps, sums);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCols; ++c) {
        Vec score = sums[r][c];
        if constexpr (kPair == 2) score = score * broadcast(scale[key + r]);
        if constexpr (kIsOwn)  // a query sees no key behind itself
          score = load(kColumns + column + c * kLanes) < broadcast(static_cast<float>(key + r))
                      ? broadcast(kHidden)
                      : score;
        most[c] = larger(most[c], score);
        store(scratch.scores + (key + r) * kBlock + column + c * kLanes, score);
      }
  }
  for (int c = 0; c < kCols; ++c) store(scratch.next + column + c * kLanes, most[c]);
}

// Scores become shares; `factors` are what earlier sums are worth now.
TARGET inline void share(const BlockScratch& scratch, const float* scale, float* peaks,
                         float* totals) {
  for (int64_t column = 0; column < kBlock; column += kLanes) {
    const Vec peak = load(scratch.next + column);
    const Vec factor = exp2(load(peaks + column) - peak);
    store(peaks + column, peak);
    store(scratch.factors + column, factor);
    Vec total[2] = {load(totals + column) * factor, Vec{}};
    const float* scores = scratch.scores + column;
    for (int64_t key = 0; key < kBlock; key += 2, scores += 2 * kBlock) {
      const Vec even = exp2(load(scores) - peak), odd = exp2(load(scores + kBlock) - peak);
      total[0] = total[0] + even;
      total[1] = total[1] + odd;
#if R1RAY_BF16
      store_words(reinterpret_cast<Word*>(scratch.scores) + key / 2 * kBlock + column,
                  zip(even * broadcast(scale[key]), odd * broadcast(scale[key + 1])));
#else
      static_cast<void>(scale);
      store(scratch.scores + key * kBlock + column, even);
      store(scratch.scores + (key + 1) * kBlock + column, odd);
#endif
    }
    store(totals + column, total[0] + total[1]);
  }
}

// Adds shares · values to kCols vectors of columns of the sums, of `queries` queries.
template <int kCols, bool kIsOwn>
TARGET inline void add_columns(const BlockScratch& scratch, float* sums_out, int64_t queries,
                               int64_t column) {
  const Word* shares = reinterpret_cast<const Word*>(scratch.scores);
  for (int64_t query = 0; query < queries; query += kRows) {
    float* out = sums_out + query * scratch.width + column;
    Vec sums[kRows][kCols];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCols; ++c)
        sums[r][c] = load(out + r * scratch.width + c * kLanes) * broadcast(scratch.factors[query + r]);
    const int64_t keys = kIsOwn ? query + kRows : kBlock;
    multiply<kRows, kCols>(shares + query, 1, kBlock, scratch.values + column, scratch.width,
                           keys / kPair, sums);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCols; ++c) store(out + r * scratch.width + c * kLanes, sums[r][c]);
  }
}

template <bool kIsOwn>
TARGET inline void attend_head(const BlockScratch& scratch, int64_t head, int64_t tokens,
                               const float* key_scale, const float* value_scale) {
  const Word* panel = scratch.panels + head * scratch.steps * kBlock;
  float* const peaks = scratch.peaks + head * kBlock;
  for (int64_t column = 0; column < kBlock; column += kVecs * kLanes)
    score_columns<kVecs, kIsOwn>(scratch, panel, key_scale, peaks, column);
  share(scratch, value_scale, peaks, scratch.totals + head * kBlock);
  float* const sums = scratch.sums + head * kBlock * scratch.width;
  int64_t column = 0;
  for (; column + kVecs * kLanes <= scratch.width; column += kVecs * kLanes)
    add_columns<kVecs, kIsOwn>(scratch, sums, tokens, column);
  for (; column + 2 * kLanes <= scratch.width; column += 2 * kLanes)
    add_columns<2, kIsOwn>(scratch, sums, tokens, column);
  for (; column < scratch.width; column += kLanes)
    add_columns<1, kIsOwn>(scratch, sums, tokens, column);
}

template <class Value>
TARGET inline void attend_unit(const AttentionJob& job, const AttentionTask& task, float* memory) {
  BlockScratch scratch;
  lay_out(job, memory, scratch);
  const int64_t heads = job.N / job.K;
  const float* q = job.q + task.row * job.q_row + task.group * heads * job.q_head +
                   task.unit * job.unit * job.q_token;
  if (task.tokens < kBlock)
    std::memset(scratch.panels, 0, sizeof(Word) * static_cast<size_t>(heads * scratch.steps * kBlock));
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < task.tokens; ++token)
      pack_query(q + head * job.q_head + token * job.q_token, job.H, job.q_scale,
                 scratch.panels + head * scratch.steps * kBlock + token);
  for (int64_t i = 0; i < heads * kBlock; ++i) scratch.peaks[i] = kHidden, scratch.totals[i] = 0.0f;
  std::memset(scratch.sums, 0, sizeof(float) * static_cast<size_t>(heads * kBlock * scratch.width));

  const Value* keys = static_cast<const Value*>(job.keys) + task.group * job.key_head;
  const Value* values = static_cast<const Value*>(job.values) + task.group * job.value_head;
  alignas(64) float own_scales[2][kBlock] = {};
  for (int64_t i = 0; i < task.count + 2; ++i) {
    const int64_t block = kept_block(task, i);
    if (block < 0) continue;  // there is none before the first
    const BlockPlace at = place_block(job.pages, task.row, block);
    const int64_t count = i ? kBlock : task.tokens;
    const float *key_scale = nullptr, *value_scale = nullptr;
    if (job.key_scale) {
      key_scale = job.key_scale + at.row * job.key_scale_row + task.group * job.key_scale_head +
                  at.token;
      value_scale = job.value_scale + at.row * job.value_scale_row +
                    task.group * job.value_scale_head + at.token;
      if (count < kBlock) {  // beyond may be the end of memory
        std::memcpy(own_scales[0], key_scale, sizeof(float) * static_cast<size_t>(count));
        std::memcpy(own_scales[1], value_scale, sizeof(float) * static_cast<size_t>(count));
        key_scale = own_scales[0], value_scale = own_scales[1];
      }
    }
    pack_keys(keys + at.row * job.key_row + at.token * job.H, key_scale, count, job.H, scratch.keys,
              scratch.steps);
    pack_values(values + at.row * job.value_row + at.token * job.H, value_scale, count, job.H,
                scratch.values, scratch.width);
    for (int64_t head = 0; head < heads; ++head)
      if (i == 0)
        attend_head<true>(scratch, head, task.tokens, key_scale, value_scale);
      else
        attend_head<false>(scratch, head, task.tokens, key_scale, value_scale);
  }

  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < task.tokens; ++token) {
      const float* sums = scratch.sums + (head * kBlock + token) * scratch.width;
      const float part = 1.0f / scratch.totals[head * kBlock + token];
      float* out = job.out + ((task.row * job.T + task.unit * job.unit + token) * job.N +
                              task.group * heads + head) * job.H;
      for (int64_t h = 0; h < job.H; ++h) out[h] = sums[h] * part;
    }
}
