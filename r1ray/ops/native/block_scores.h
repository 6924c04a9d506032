// Scores of blocks by one unit of queries: included once for each instruction set (simd.h).

// kCount projected queries [kCount][width] from `token` on.
template <int kCount, int kCols>
TARGET inline void project_columns(const ChoiceJob& job, const ChoiceTask& task, int64_t token,
                                   int64_t width, int64_t column, float* to) {
  const int64_t heads = job.N / job.K;
  const float* q = job.q + task.row * job.q_row + task.group * heads * job.q_head +
                   (task.unit * job.unit + token) * job.q_token;
  const float* weight = job.weight + task.group * heads * job.H * width;
  Vec sums[kCount][kCols];
  clear(sums);
  for (int64_t head = 0; head < heads; ++head)
    multiply<kCount, kCols>(q + head * job.q_head, job.q_token, 1,
                            weight + head * job.H * width + column, width, job.H, sums);
  for (int r = 0; r < kCount; ++r)
    for (int c = 0; c < kCols; ++c) store(to + r * width + column + c * kLanes, sums[r][c]);
}

template <int kCount>
TARGET inline void project(const ChoiceJob& job, const ChoiceTask& task, int64_t token,
                           int64_t width, float* to) {
  int64_t column = 0;
  for (; column + kVecs * kLanes <= width; column += kVecs * kLanes)
    project_columns<kCount, kVecs>(job, task, token, width, column, to);
  for (; column < width; column += kLanes)
    project_columns<kCount, 1>(job, task, token, width, column, to);
}

// A projected query normed and rotated in place; there are zeros behind its end.
TARGET inline void norm_and_rotate(const ChoiceJob& job, const ChoiceTask& task, int64_t token,
                                   int64_t width, float* query) {
  Vec squares = Vec{};
  for (int64_t h = 0; h < width; h += kLanes)
    squares = fma(load(query + h), load(query + h), squares);
  float sums[4];
  add_across4(squares, squares, squares, squares, sums);
  const float part = 1.0f / std::sqrt(sums[0] / static_cast<float>(job.H) + 1e-6f);
  const int64_t at = task.row * job.rotary_row + (task.unit * job.unit + token) * job.rotary_token;
  const float *cos = job.cos + at, *sin = job.sin + at, *norm = job.norm;
  const int64_t half = job.H / 2;
  for (int64_t h = 0; h < half; ++h) {
    const float first = query[h] * part * norm[h];
    const float second = query[h + half] * part * norm[h + half];
    query[h] = first * cos[h] - second * sin[h];
    query[h + half] = second * cos[h + half] + first * sin[h + half];
  }
}

// The largest score of each of kCount blocks over the queries of the panel.
template <int kCount>
TARGET inline void score_rows(const float* keys, int64_t size, const float* panel, float* scores) {
  Vec most[kRows];
  for (int r = 0; r < kRows; ++r) most[r] = broadcast(-INFINITY);
  for (int64_t column = 0; column < kBlock; column += kVecs * kLanes) {
    Vec sums[kCount][kVecs];
    clear(sums);
    multiply<kCount, kVecs>(keys, size, 1, panel + column, kBlock, size, sums);
    for (int r = 0; r < kCount; ++r)
      for (int c = 0; c < kVecs; ++c) most[r] = larger(most[r], sums[r][c]);
  }
  larger_across4(most[0], most[1], most[2], most[3], scores);  // there is room for four
}

TARGET inline void score_blocks(const ChoiceJob& job, const ChoiceTask& task,
                                const ChoiceScratch& scratch) {
  const int64_t width = scratch.width;
  int64_t token = 0;
  for (; token + kRows <= task.tokens; token += kRows)
    project<kRows>(job, task, token, width, scratch.queries + token * width);
  for (; token < task.tokens; ++token)
    project<1>(job, task, token, width, scratch.queries + token * width);
  for (token = 0; token < task.tokens; ++token)
    norm_and_rotate(job, task, token, width, scratch.queries + token * width);
  const float* keys = job.keys + task.row * job.key_row + task.group * job.key_head;
  if (job.pages.table) {
    for (int64_t block = 0; block < task.early; ++block)
      std::memcpy(scratch.keys + block * job.H,
                  job.keys + place_block(job.pages, task.row, block).row * job.key_row +
                      task.group * job.key_head,
                  sizeof(float) * static_cast<size_t>(job.H));
    keys = scratch.keys;
  }
  if (task.tokens == 1)
    return dot_rows<1>(keys, task.early, job.H, scratch.queries, width, scratch.scores, 0);
  for (token = 0; token < kBlock; ++token) {  // behind the last, the first once more
    const float* query = scratch.queries + (token < task.tokens ? token : 0) * width;
    for (int64_t h = 0; h < job.H; ++h) scratch.panel[h * kBlock + token] = query[h];
  }
  int64_t block = 0;
  for (; block + kRows <= task.early; block += kRows)
    score_rows<kRows>(keys + block * job.H, job.H, scratch.panel, scratch.scores + block);
  for (; block < task.early; ++block)
    score_rows<1>(keys + block * job.H, job.H, scratch.panel, scratch.scores + block);
}
