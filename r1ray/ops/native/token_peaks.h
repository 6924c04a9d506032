// What one query scores with the keys up to its own, in float32: included once for each instruction set
// (simd.h). Keys are multiplied as they lie (tiles.h); the largest score of each block is kept.

// The largest score of each of kHeads queries with the first `count` keys of a block.
template <int kHeads, class Key>
TARGET inline void peak_heads(const Key* keys, const float* scale, int64_t count, int64_t size,
                              const float* queries, int64_t width, float* scores, float* peaks,
                              int64_t peak_row) {
  dot_rows<kHeads>(keys, count, size, queries, width, scores, kBlock);
  for (int g = 0; g < kHeads; ++g) {
    float* const of_head = scores + g * kBlock;
    if (scale) multiply_by(scale, count, of_head);
    std::fill(of_head + count, of_head + kBlock, kHidden);
    Vec most = broadcast(kHidden);
    for (int64_t i = 0; i < kBlock; i += kLanes) most = larger(most, load(of_head + i));
    alignas(64) float lanes[kLanes];
    store(lanes, most);
    peaks[g * peak_row] = *std::max_element(lanes, lanes + kLanes);
  }
}

// Of blocks `begin` to `end`, into `peaks` [heads][peak_row]. `memory` has room for the queries and two
// blocks of scores.
template <class Key>
TARGET inline void find_token_peaks(const ExactJob& job, const ExactTask& task, int64_t begin,
                                    int64_t end, float* memory, float* peaks) {
  const int64_t width = round_up(job.H, 16), group = job.N / job.K, first = task.group * group;
  float* const queries = memory;
  float* const scores = memory + task.heads * width;
  const float* q = job.q + task.row * job.q_row + task.unit * job.q_token;
  for (int64_t head = first, at = 0; head < first + group; ++head) {
    if (!job.is_marked[head]) continue;
    for (int64_t h = 0; h < width; ++h)
      queries[at * width + h] = h < job.H ? q[head * job.q_head + h] * job.q_scale : 0.0f;
    ++at;
  }
  const Key* keys = static_cast<const Key*>(job.keys) + task.group * job.key_head;
  for (int64_t block = begin; block < end; ++block) {
    const BlockPlace at = place_block(job.pages, task.row, block);
    const Key* of_block = keys + at.row * job.key_row + at.token * job.H;
    const float* const scale = job.key_scale ? job.key_scale + task.group * job.key_scale_head +
                                                   at.row * job.key_scale_row + at.token
                                             : nullptr;
    const int64_t count = block == task.early + 1 ? task.first % kBlock + 1 : kBlock;
    int64_t head = 0;
    for (; head + 2 <= task.heads; head += 2)
      peak_heads<2>(of_block, scale, count, job.H, queries + head * width, width, scores,
                    peaks + head * job.peak_row + block, job.peak_row);
    if (head < task.heads)
      peak_heads<1>(of_block, scale, count, job.H, queries + head * width, width, scores,
                    peaks + head * job.peak_row + block, job.peak_row);
  }
}

// As `score_exactly`, of a single query, whose peaks are in `scratch`; of what it keeps, the first and what is
// in `chosen` come first.
TARGET inline void score_peaks(const ExactJob& job, const ExactTask& task,
                               const ExactScratch& scratch) {
  const int64_t blocks = task.early + 2, end = round_up(blocks, kLanes);
  for (int64_t i = 0; i < end; i += kLanes) store(scratch.scores + i, Vec{});
  for (int64_t head = 0; head < task.heads; ++head) {
    float* const peaks = scratch.peaks + head * job.peak_row;
    std::fill(peaks + blocks, peaks + end, kHidden);
    const float most = *std::max_element(peaks, peaks + blocks);
    Vec totals = Vec{};
    for (int64_t i = 0; i < end; i += kLanes) {
      const Vec share = exp2(load(peaks + i) - broadcast(most));
      store(peaks + i, share);
      totals = totals + share;
    }
    alignas(64) float lanes[kLanes];
    store(lanes, totals);
    const Vec part = broadcast(1.0f / std::accumulate(lanes, lanes + kLanes, 0.0f));
    for (int64_t i = 0; i < end; i += kLanes) {
      const Vec share = load(peaks + i) * part;
      store(scratch.scores + i, larger(share, load(scratch.scores + i)));  // NaN is worth nothing
    }
  }
  for (int64_t i = 0; i < job.M && task.chosen[i] >= 0; ++i)
    if (task.chosen[i] < task.early) scratch.scores[task.chosen[i]] = INFINITY;
}
