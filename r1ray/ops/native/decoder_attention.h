// What a decoder layer's new queries attend to: the calls of the kernels that choose and attend.
// Included once, by decoder_layers.cpp, behind `Forward`.

int64_t count_units(const Piece& piece) { return (piece.tokens + piece.unit - 1) / piece.unit; }

bool has_marks(const Forward& forward) {
  const bool* const marks = forward.weights->is_marked;
  return forward.chooses && std::count(marks, marks + forward.N, true) > 0;
}

// Room for the blocks that a unit chooses.
int64_t room_of(const Forward& forward, const Piece& piece) {
  return has_marks(forward) ? piece.room : piece.most;
}

// Where a token's keys or values begin.
const void* state_at(const Forward& forward, const void* states, int64_t token) {
  const int64_t bytes = token * forward.H * (forward.key_scale ? 1 : int64_t{sizeof(float)});
  return static_cast<const char*>(states) + bytes;
}

int32_t choose(const Forward& forward, const Piece& piece, int64_t* chosen) {
  ChoiceArguments job = {};
  const int64_t first = piece.row * forward.T + piece.token;
  job.q = forward.qkv + first * forward.width;
  job.q_row = forward.T * forward.width;
  job.q_token = forward.width;
  job.q_head = forward.H;
  const int64_t rotary = piece.row * forward.rotary_row + piece.token * forward.H;
  job.cos = forward.cos + rotary;
  job.sin = forward.sin + rotary;
  job.rotary_row = forward.rotary_row;
  job.rotary_token = forward.H;
  if (forward.chooses) {
    job.weight = forward.weights->query_weight;
    job.norm = forward.weights->query_norm;
    job.keys = forward.summaries + forward.layer * forward.layer_pages * forward.K * forward.H;
    job.key_row = forward.H;
    job.key_head = forward.layer_pages * forward.H;
    job.C = forward.row_pages;
    job.pages = forward.pages_of(piece.row);
  }
  job.counts = forward.numbers + piece.counts;
  job.starts = forward.numbers + piece.starts;
  job.out = chosen;
  job.B = piece.rows;
  job.T = piece.tokens;
  job.N = forward.N;
  job.K = forward.K;
  job.H = forward.H;
  job.U = count_units(piece);
  job.M = room_of(forward, piece);
  job.unit = piece.unit;
  job.isa = forward.isa;
  job.num_threads = forward.num_threads;
  return r1ray_choose_blocks(&job);
}

// What attention and the choice by keys are both told: queries, keys where they lie, and units.
template <class Job>
Job describe(const Forward& forward, const Piece& piece) {
  Job job = {};
  job.q = forward.rotated + (piece.row * forward.T + piece.token) * forward.N * forward.H;
  job.q_row = forward.T * forward.N * forward.H;
  job.q_token = forward.N * forward.H;
  job.q_head = forward.H;
  const int64_t at = forward.layer * forward.layer_pages * forward.K * kBlock;
  job.keys = state_at(forward, forward.keys, at);
  job.key_row = kBlock * forward.H;
  job.key_head = forward.layer_pages * kBlock * forward.H;
  if (forward.key_scale) {
    job.key_scale = forward.key_scale + at;
    job.key_scale_row = kBlock;
    job.key_scale_head = forward.layer_pages * kBlock;
  }
  job.pages = forward.pages_of(piece.row);
  job.starts = forward.numbers + piece.starts;
  job.B = piece.rows;
  job.N = forward.N;
  job.K = forward.K;
  job.T = piece.tokens;
  job.H = forward.H;
  job.U = count_units(piece);
  job.M = room_of(forward, piece);
  job.unit = piece.unit;
  job.isa = forward.isa;
  job.num_threads = forward.num_threads;
  return job;
}

// For groups with a marked head, instead of what was chosen for them; for single queries, besides.
int32_t choose_exactly(const Forward& forward, const Piece& piece, int64_t* chosen) {
  if (!has_marks(forward)) return kNone;
  ExactArguments job = describe<ExactArguments>(forward, piece);
  job.is_marked = forward.weights->is_marked;
  job.counts = forward.numbers + piece.marked;
  job.out = chosen;
  return r1ray_choose_exact(&job);
}

int32_t attend(const Forward& forward, const Piece& piece, const int64_t* chosen) {
  AttentionArguments job = describe<AttentionArguments>(forward, piece);
  const int64_t at = forward.layer * forward.layer_pages * forward.K * kBlock;
  job.values = state_at(forward, forward.values, at);
  job.value_row = job.key_row;
  job.value_head = job.key_head;
  if (forward.value_scale) job.value_scale = forward.value_scale + at;
  job.value_scale_row = job.key_scale_row;
  job.value_scale_head = job.key_scale_head;
  job.S = forward.row_pages * kBlock;
  job.chosen = chosen;
  // A piece of several rows has all their tokens.
  job.out = forward.attended + (piece.row * forward.T + piece.token) * forward.N * forward.H;
  return r1ray_sparse_attention(&job);
}

void attend_pieces(Forward& forward) {
  int64_t* chosen = forward.chosen;
  const bool is_new = forward.chooses || forward.layer == 0;
  for (int64_t i = 0; i < forward.num_pieces && forward.failure == kNone; ++i) {
    const Piece& piece = forward.pieces[i];
    if (is_new) forward.failure = choose(forward, piece, chosen);
    if (forward.failure == kNone) forward.failure = choose_exactly(forward, piece, chosen);
    if (forward.failure == kNone) forward.failure = attend(forward, piece, chosen);
    chosen += piece.rows * forward.K * count_units(piece) * room_of(forward, piece);
  }
}
