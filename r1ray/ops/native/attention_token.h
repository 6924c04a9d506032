// One query of every head of a group, in float32: included once for each instruction set (simd.h).
//
// So few queries do not pay for panels: keys are multiplied as they lie, four at a time, and the
// four sums of lanes are added up together. All scores are kept, then all shares.

// out[head] += sum of shares[head][row] * rows[row], for kCols vectors of columns from `h` on.
template <int kHeads, int kCols, bool kIsTail, class Value>
TARGET inline void add_rows(const Value* rows, int64_t count, int64_t size, const float* shares,
                            int64_t stride, float* out, int64_t width, int64_t h) {
  Vec sums[kHeads][kCols];
  for (int g = 0; g < kHeads; ++g)
    for (int c = 0; c < kCols; ++c) sums[g][c] = load(out + g * width + h + c * kLanes);
  for (int64_t row = 0; row < count; ++row, rows += size) {
    Vec values[kCols];
    for (int c = 0; c < kCols; ++c)
      values[c] = kIsTail ? load_some(rows + h, size - h) : load_values(rows + h + c * kLanes);
    for (int g = 0; g < kHeads; ++g) {
      const Vec part = broadcast(shares[g * stride + row]);
      for (int c = 0; c < kCols; ++c) sums[g][c] = fma(part, values[c], sums[g][c]);
    }
  }
  for (int g = 0; g < kHeads; ++g)
    for (int c = 0; c < kCols; ++c) store(out + g * width + h + c * kLanes, sums[g][c]);
}

struct TokenScratch {
  int64_t width, most;  // of a query, padded to whole vectors; keys that there is room for
  float *queries, *sums;  // [kHeadsTogether][width]
  float* scores;          // [kHeadsTogether][most]
};

inline int64_t lay_out(const AttentionArguments& job, float* memory, TokenScratch& scratch) {
  scratch.width = round_up(job.H, 16);
  scratch.most = (job.M + 2) * kBlock;
  scratch.queries = memory;
  scratch.sums = scratch.queries + kHeadsTogether * scratch.width;
  scratch.scores = scratch.sums + kHeadsTogether * scratch.width;
  return kHeadsTogether * (2 * scratch.width + scratch.most);
}

// Scores of `count` keys become shares of the highest, `peak`. Returns the sum of these.
TARGET inline float share(float* scores, int64_t count, float& peak) {
  const int64_t end = round_up(count, kLanes);
  for (int64_t i = count; i < end; ++i) scores[i] = kHidden;
  Vec most = broadcast(kHidden);
  for (int64_t i = 0; i < end; i += kLanes) most = larger(most, load(scores + i));
  alignas(64) float lanes[kLanes];
  store(lanes, most);
  peak = lanes[0];
  for (int i = 1; i < kLanes; ++i) peak = lanes[i] > peak ? lanes[i] : peak;
  Vec totals = Vec{};
  for (int64_t i = 0; i < end; i += kLanes) {
    const Vec part = exp2(load(scores + i) - broadcast(peak));
    totals = totals + part;
    store(scores + i, part);
  }
  store(lanes, totals);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

template <class Value>
struct TokenBlock {
  const Value *keys, *values;
  const float *key_scale, *value_scale;
  int64_t count;
};

// The i-th block of a task, its own last.
template <class Value>
TARGET inline TokenBlock<Value> find_block(const AttentionJob& job, const AttentionTask& task,
                                           int64_t i) {
  const bool is_own = i == task.count + 1;
  const int64_t block = kept_block(task, is_own ? 0 : i + 1);
  if (block < 0) return {};
  const BlockPlace at = place_block(job.pages, task.row, block);
  const Value* keys = static_cast<const Value*>(job.keys) + at.row * job.key_row;
  const Value* values = static_cast<const Value*>(job.values) + at.row * job.value_row;
  TokenBlock<Value> found = {keys + task.group * job.key_head + at.token * job.H,
                             values + task.group * job.value_head + at.token * job.H, nullptr,
                             nullptr, is_own ? task.first - block * kBlock + 1 : kBlock};
  if (job.key_scale) {
    found.key_scale = job.key_scale + at.row * job.key_scale_row +
                      task.group * job.key_scale_head + at.token;
    found.value_scale = job.value_scale + at.row * job.value_scale_row +
                        task.group * job.value_scale_head + at.token;
  }
  return found;
}

template <int kHeads, class Value>
TARGET inline void attend_heads(const AttentionJob& job, const AttentionTask& task, int64_t head,
                                const TokenScratch& scratch) {
  const int64_t width = scratch.width, most = scratch.most;
  for (int g = 0; g < kHeads; ++g) {
    const float* q = job.q + task.row * job.q_row + (head + g) * job.q_head + task.unit * job.q_token;
    for (int64_t h = 0; h < width; ++h)
      scratch.queries[g * width + h] = h < job.H ? q[h] * job.q_scale : 0.0f;
  }
  std::memset(scratch.sums, 0, sizeof(float) * static_cast<size_t>(kHeads * width));
  const int64_t blocks = task.part < task.parts ? task.count + 2 : 0;
  const int64_t begin = blocks * task.part / task.parts;
  const int64_t end = blocks * (task.part + 1) / task.parts;
  int64_t keys = 0;
  for (int64_t i = begin; i < end; ++i) {
    const TokenBlock<Value> block = find_block<Value>(job, task, i);
    if (!block.count) continue;
    dot_rows<kHeads>(block.keys, block.count, job.H, scratch.queries, width, scratch.scores + keys,
                     most);
    if (block.key_scale)
      for (int g = 0; g < kHeads; ++g)
        multiply_by(block.key_scale, block.count, scratch.scores + g * most + keys);
    keys += block.count;
  }
  float totals[kHeads], peaks[kHeads];
  for (int g = 0; g < kHeads; ++g) totals[g] = share(scratch.scores + g * most, keys, peaks[g]);
  keys = 0;
  for (int64_t i = begin; i < end; ++i) {
    const TokenBlock<Value> block = find_block<Value>(job, task, i);
    if (!block.count) continue;
    float* shares = scratch.scores + keys;
    if (block.value_scale)
      for (int g = 0; g < kHeads; ++g)
        multiply_by(block.value_scale, block.count, shares + g * most);
    int64_t h = 0;
    for (; h + kVecs * kLanes <= job.H; h += kVecs * kLanes)
      add_rows<kHeads, kVecs, false>(block.values, block.count, job.H, shares, most, scratch.sums,
                                     width, h);
    for (; h + kLanes <= job.H; h += kLanes)
      add_rows<kHeads, 1, false>(block.values, block.count, job.H, shares, most, scratch.sums,
                                 width, h);
    if (h < job.H)
      add_rows<kHeads, 1, true>(block.values, block.count, job.H, shares, most, scratch.sums, width,
                                h);
    keys += block.count;
  }
  for (int g = 0; g < kHeads; ++g) {
    const int64_t token = task.row * job.T + task.unit;
    const float* sums = scratch.sums + g * width;
    if (job.parts == 1) {
      const float part = 1.0f / totals[g];
      float* out = job.out + (token * job.N + head + g) * job.H;
      for (int64_t h = 0; h < job.H; ++h) out[h] = sums[h] * part;
    } else {
      float* out = job.partial + ((token * job.parts + task.part) * job.N + head + g) * (job.H + 2);
      std::memcpy(out, sums, sizeof(float) * static_cast<size_t>(job.H));
      out[job.H] = totals[g];
      out[job.H + 1] = peaks[g];
    }
  }
}

template <class Value>
TARGET inline void attend_token(const AttentionJob& job, const AttentionTask& task, float* memory) {
  TokenScratch scratch;
  lay_out(job, memory, scratch);
  const int64_t heads = job.N / job.K;
  int64_t head = task.group * heads;
  const int64_t end = head + heads;
  if constexpr (kHeadsTogether == 4) {
    for (; head + 4 <= end; head += 4) attend_heads<4, Value>(job, task, head, scratch);
    if (head + 3 == end) attend_heads<3, Value>(job, task, head, scratch), head += 3;
  }
  for (; head + 2 <= end; head += 2) attend_heads<2, Value>(job, task, head, scratch);
  if (head < end) attend_heads<1, Value>(job, task, head, scratch);
}
