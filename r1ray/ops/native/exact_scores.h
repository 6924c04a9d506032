// What one unit of a block of queries scores with the keys of every block up to its own: included once
// for each instruction set (simd.h).
//
// Queries of a head become a panel, as in attention_blocks.h. Of a block's scores only the largest of
// each query leaves the registers.
//
// Four int8 a Word: queries are rounded like keys, by a scale each. The processor multiplies unsigned
// by signed: keys have 128 added, and sums begin at what that will have been too much.

#if R1RAY_INT8

// Queries of one head from `q` on, of which `scale` is set; `offsets` are where their sums begin.
TARGET inline void pack_panel(const float* q, int64_t token_stride, int64_t size, float unit_scale,
                              Word* panel, float* scale, float* offsets) {
  const int64_t steps = round_up(size, kPair) / kPair;
  for (int64_t token = 0; token < kBlock; ++token) {
    const float* const x = q + token * token_stride;
    float largest = 0.0f;
    for (int64_t h = 0; h < size; ++h) largest = std::fmax(largest, std::fabs(x[h]));
    const float factor = largest > 0.0f && largest < INFINITY ? 127.0f / largest : 0.0f;
    scale[token] = factor > 0.0f ? unit_scale / factor : 0.0f;
    int32_t sum = 0;
    for (int64_t step = 0; step < steps; ++step) {
      Word word = 0;
      for (int64_t i = 0; i < kPair && step * kPair + i < size; ++i) {
        const float value = x[step * kPair + i] * factor;  // NaN has a factor as well
        const int32_t whole = value == value ? static_cast<int32_t>(std::lrintf(value)) : 0;
        sum += whole;
        word |= (static_cast<uint32_t>(whole) & 0xffu) << (8 * i);
      }
      panel[step * kBlock + token] = word;
    }
    sum *= -128;
    std::memcpy(offsets + token, &sum, sizeof sum);
  }
}

TARGET inline void pack_keys(const int8_t* keys, const float*, int64_t size, Word* to) {
  const int64_t steps = round_up(size, kPair) / kPair;
  if (size % kPair == 0) {
    const Words sign = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    for (int64_t at = 0; at < kBlock * steps; at += kLanes)
      store_words(to + at, _mm512_xor_si512(_mm512_loadu_si512(keys + at * kPair), sign));
    return;
  }
  for (int64_t key = 0; key < kBlock; ++key)
    for (int64_t step = 0; step < steps; ++step) {
      Word word = 0x80808080u;
      for (int64_t i = 0; i < kPair && step * kPair + i < size; ++i)
        word ^= static_cast<uint32_t>(static_cast<uint8_t>(keys[key * size + step * kPair + i]))
                << (8 * i);
      to[key * steps + step] = word;
    }
}

#else

TARGET inline void pack_panel(const float* q, int64_t token_stride, int64_t size, float unit_scale,
                              Word* panel, float* scale, float* offsets) {
  for (int64_t token = 0; token < kBlock; ++token) {
    const float* const x = q + token * token_stride;
    for (int64_t h = 0; h < size; ++h) panel[h * kBlock + token] = x[h];
    scale[token] = unit_scale;
    offsets[token] = 0.0f;
  }
}

template <class Key>
TARGET inline void pack_keys(const Key* keys, const float* scale, int64_t size, Word* to) {
  for (int64_t key = 0; key < kBlock; ++key)
    for (int64_t h = 0; h < size; ++h)
      to[key * size + h] = static_cast<float>(keys[key * size + h]) * (scale ? scale[key] : 1.0f);
}

#endif  // R1RAY_INT8

// The largest score of each query of a panel with the 64 keys of a block; of the queries' own block,
// with those up to itself. `hidden` has 64 values that hide a key from a query, and 64 zeros.
template <bool kIsOwn>
TARGET inline void find_peaks(const Word* keys, const float* key_scale, const Word* panel,
                              const float* offsets, int64_t steps, const float* hidden,
                              float* peaks) {
  for (int64_t column = 0; column < kBlock; column += kVecs * kLanes) {
    Vec most[kVecs];
    for (int c = 0; c < kVecs; ++c) most[c] = broadcast(kHidden);
    for (int64_t key = 0; key < kBlock; key += kRows) {
      Vec sums[kRows][kVecs];
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kVecs; ++c) sums[r][c] = load(offsets + column + c * kLanes);
      multiply<kRows, kVecs>(keys + key * steps, steps, 1, panel + column, kBlock, steps, sums);
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kVecs; ++c) {
#if R1RAY_INT8
          Vec score = to_floats(sums[r][c]) * broadcast(key_scale[key + r]);
#else
          static_cast<void>(key_scale);  // it is in the keys
          Vec score = sums[r][c];
#endif
          if (kIsOwn) score = score + load(hidden + kBlock - key - r + column + c * kLanes);
          most[c] = larger(most[c], score);
        }
    }
    for (int c = 0; c < kVecs; ++c) store(peaks + column + c * kLanes, most[c]);
  }
}

// Scores of the blocks that a unit chooses from: the largest share of any of its queries. A share is
// the softmax over all blocks up to its own of the largest score in each.
template <class Key>
TARGET inline void score_exactly(const ExactJob& job, const ExactTask& task,
                                 const ExactScratch& scratch) {
  const int64_t heads = task.heads, steps = round_up(job.H, kPair) / kPair;
  const int64_t blocks = task.early + 2, queries = heads * kBlock;
  const int64_t group = job.N / job.K, first = task.group * group;
  Word* const panels = reinterpret_cast<Word*>(scratch.panels);
  Word* const words = reinterpret_cast<Word*>(scratch.keys);
  const float* q = job.q + task.row * job.q_row + task.unit * job.unit * job.q_token;
  for (int64_t head = first, at = 0; head < first + group; ++head) {
    if (!job.is_marked[head]) continue;
    pack_panel(q + head * job.q_head, job.q_token, job.H, job.q_scale,
               panels + at * steps * kBlock, scratch.query_scale + at * kBlock,
               scratch.offsets + at * kBlock);
    ++at;
  }
  const Key* keys = static_cast<const Key*>(job.keys) + task.group * job.key_head;
  const float* key_scale =
      job.key_scale ? job.key_scale + task.group * job.key_scale_head : nullptr;
  float* const most = scratch.most;
  for (int64_t i = 0; i < queries; i += kLanes) store(most + i, broadcast(kHidden));
  alignas(64) float hidden[2 * kBlock] = {};
  std::fill_n(hidden, kBlock, kHidden);
  for (int64_t block = 0; block < blocks; ++block) {
    const BlockPlace at = place_block(job.pages, task.row, block);
    const float* const scale =
        key_scale ? key_scale + at.row * job.key_scale_row + at.token : nullptr;
    pack_keys(keys + at.row * job.key_row + at.token * job.H, scale, job.H, words);
    float* const peaks = scratch.peaks + block * queries;
    const auto find = block == blocks - 1 ? find_peaks<true> : find_peaks<false>;
    for (int64_t head = 0; head < heads; ++head)
      find(words, scale, panels + head * steps * kBlock, scratch.offsets + head * kBlock, steps,
           hidden, peaks + head * kBlock);
    for (int64_t i = 0; i < queries; i += kLanes)
      store(most + i, larger(load(most + i), load(peaks + i)));
  }
  // Of each query: its shares of the blocks, then of them all.
  float* const totals = scratch.offsets;
  for (int64_t i = 0; i < queries; i += kLanes) store(totals + i, Vec{});
  for (int64_t block = 0; block < blocks; ++block) {
    float* const peaks = scratch.peaks + block * queries;
    for (int64_t i = 0; i < queries; i += kLanes) {
      const Vec share = exp2((load(peaks + i) - load(most + i)) * load(scratch.query_scale + i));
      store(peaks + i, share);
      store(totals + i, load(totals + i) + share);
    }
  }
  for (int64_t i = 0; i < queries; i += kLanes)
    store(totals + i, broadcast(1.0f) / load(totals + i));
  for (int64_t block = 1; block < task.early; ++block) {
    const float* const shares = scratch.peaks + block * queries;
    Vec largest = Vec{};
    for (int64_t i = 0; i < queries; i += kLanes)
      largest = larger(load(shares + i) * load(totals + i), largest);  // NaN is worth nothing
    alignas(64) float lanes[kLanes];
    store(lanes, largest);
    scratch.scores[block] = *std::max_element(lanes, lanes + kLanes);
  }
}
