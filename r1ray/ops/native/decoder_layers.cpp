// All layers of a decoder, in INT8, for the new tokens of some rows of a KV cache.
//
// For each layer, in stages that the threads share:
// 1. RMSNorm and quantization of each token; queries, keys and values are products of these.
// 2. Queries and keys are normed (Qwen3) and rotated; keys and values go into the cache, as float32
//    or as int8 exactly as `quantize_states` rounds.
// 3. Blocks that are complete now are summarized from what the cache holds (`BlockGate.summarize`).
// 4. Blocks are chosen (block_choice.cpp, exact_choice.cpp) and attended to (sparse_attention.cpp).
//    Where all earlier blocks are, the choice is that of the first layer.
// 5. The outputs' product is added to the hidden states.
// 6. RMSNorm and quantization; silu(gate) · up; quantization; down, added.
//
// Behind the last layer, RMSNorm and the head's product for those tokens whose logits are wanted.
//
// One token a row is one fork: threads stay together through all layers (`with_threads`). What
// takes less than sharing it is done by one.
//
// Price: that of its products and attention; hidden states, norms and caches go through memory once
// a stage. Room for F + 3·N·H + 2·K·H floats and the quantized row of each token, kept for the
// thread's next call.
//
// Names: B rows, T new tokens, M = B·T, D hidden size, F width of the MLP, N query heads, K groups,
// H head dimension.

#include "decoder_layers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "attention.h"
#include "block_choice.h"
#include "exact_choice.h"
#include "int8_linear.h"
#include "runtime.h"
#include "simd.h"

namespace r1ray {

constexpr float kGateEps = 1e-6f;  // as in ops/block_gate.py

namespace generic {
#define TARGET TARGET_GENERIC
#include "decoder_rows.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define TARGET TARGET_AVX2
#include "decoder_rows.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET TARGET_AVX512
#include "decoder_rows.h"
#undef TARGET
}  // namespace avx512

#endif  // __x86_64__

namespace {

constexpr int64_t kTokensPerTask = 8;
constexpr int64_t kSerialTokens = 8;  // below, waking threads costs more than it saves
constexpr int64_t kPad = 16;          // floats of the widest register

struct RowFunctions {
  decltype(&generic::norm_row) norm;
  decltype(&generic::rotate_row) rotate;
  decltype(&generic::quantize_state) quantize;
  decltype(&generic::summarize_block<float>) summarize_float;
  decltype(&generic::summarize_block<int8_t>) summarize_int8;
};

#define R1RAY_ROWS(isa)                                                       \
  {                                                                           \
    isa::norm_row, isa::rotate_row, isa::quantize_state,                      \
        isa::summarize_block<float>, isa::summarize_block<int8_t>             \
  }
constexpr RowFunctions kGenericRows = R1RAY_ROWS(generic);
#if defined(__x86_64__)
constexpr RowFunctions kAvx2Rows = R1RAY_ROWS(avx2), kAvx512Rows = R1RAY_ROWS(avx512);
#endif

const RowFunctions& find_rows(int32_t isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512Vnni) return kAvx512Rows;
  if (isa == kAvx2) return kAvx2Rows;
#endif
  static_cast<void>(isa);
  return kGenericRows;
}

// One call, and the layer that it is at.
struct Forward : LayersArguments {
  RowFunctions rows;
  int64_t M, width;  // tokens; floats of a token's queries, keys and values
  int64_t layer = 0;
  const LayerWeights* weights = nullptr;
  RowMemory* memory;
  float *qkv, *rotated, *attended, *hidden;  // [M, width], [M, N, H], [M, N, H], [M, F]
  int64_t* chosen;                           // of every piece, one after the other
  int32_t failure = kNone;
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_failed{false};

  // In the pool: the block's place among those of all layers and groups.
  int64_t block_at(int64_t row, int64_t block, int64_t group) const {
    return (layer * K + group) * layer_pages + pages[row * row_pages + block];
  }
  Pages pages_of(int64_t row) const { return {pages + row * row_pages, row_pages}; }
};

struct Norm {
  const Forward* forward;
  const float* weight;
};

const float* read_normed(const void* data, int64_t m, float* room) {
  const Norm& norm = *static_cast<const Norm*>(data);
  const Forward& forward = *norm.forward;
  forward.rows.norm(forward.x + m * forward.D, norm.weight, static_cast<float>(forward.eps),
                    forward.D, room);
  return room;
}

const float* read_last(const void* data, int64_t i, float* room) {
  return read_normed(data, static_cast<const Norm*>(data)->forward->last[i], room);
}

// The products of the rows that `read` gives with some weights.
void multiply(Forward& forward, int64_t count, int64_t inputs, ReadRow read, const void* data,
              const LinearPart* parts, int num_parts) {
  const QuantizedRows rows = forward.memory->reserve(count, inputs, forward.isa);
  if (!quantize_rows(rows, read, data, forward.isa, forward.num_threads) ||
      !multiply_rows(rows, parts, num_parts, forward.isa, forward.num_threads))
    forward.failure = kNoMemory;
}

LinearPart part_of(const LinearWeights& weights, int64_t outputs, float* out, int64_t stride,
                   bool adds = false) {
  return {weights.weight, weights.scale, weights.bias, outputs, out, stride, adds, nullptr};
}

void store_state(const Forward& forward, void* states, float* scales, int64_t at, const float* x) {
  const size_t size = static_cast<size_t>(forward.H);
  if (scales)
    forward.rows.quantize(x, forward.H, static_cast<int8_t*>(states) + at * forward.H, scales + at);
  else
    std::memcpy(static_cast<float*>(states) + at * forward.H, x, size * sizeof(float));
}

// A token's queries and keys normed and rotated; keys and values into the cache.
void place_token(const Forward& forward, int64_t m, float* room) {
  const int64_t row = m / forward.T, t = m % forward.T, H = forward.H;
  const int64_t at = row * forward.rotary_row + t * H;
  const float *cos = forward.cos + at, *sin = forward.sin + at;
  const float eps = static_cast<float>(forward.eps);
  float* x = forward.qkv + m * forward.width;
  for (int64_t head = 0; head < forward.N; ++head, x += H) {
    if (forward.weights->q_norm) forward.rows.norm(x, forward.weights->q_norm, eps, H, x);
    forward.rows.rotate(x, cos, sin, H, forward.rotated + (m * forward.N + head) * H);
  }
  const int64_t slot = forward.numbers[row] + t;
  const int64_t block = slot / kBlock, within = slot % kBlock;
  for (int64_t group = 0; group < forward.K; ++group, x += H) {
    if (forward.weights->k_norm) forward.rows.norm(x, forward.weights->k_norm, eps, H, x);
    forward.rows.rotate(x, cos, sin, H, room);
    store_state(forward, forward.keys, forward.key_scale,
                forward.block_at(row, block, group) * kBlock + within, room);
  }
  for (int64_t group = 0; group < forward.K; ++group, x += H)
    store_state(forward, forward.values, forward.value_scale,
                forward.block_at(row, block, group) * kBlock + within, x);
}

void place_tokens(void* data) {
  Forward& forward = *static_cast<Forward*>(data);
  thread_local Scratch memory;
  float* const room = memory.reserve(forward.H + kPad);
  if (!room) {
    forward.has_failed = true;
    return;
  }
  for (int64_t m; (m = forward.next.fetch_add(kTokensPerTask)) < forward.M;)
    for (int64_t i = m; i < m + kTokensPerTask && i < forward.M; ++i)
      place_token(forward, i, room);
}

void summarize(const Forward& forward, const Completed& done, int64_t block, int64_t group,
               float* room) {
  const LayerWeights& weights = *forward.weights;
  const int64_t H = forward.H, place = forward.block_at(done.row, block, group);
  const int64_t at = place * kBlock;
  const int64_t table = (block - done.first) * kBlock * H;
  const float* key_weight = weights.key_weight + group * 3 * H * H;
  float* to = forward.summaries + place * H;
  if (forward.key_scale)
    forward.rows.summarize_int8(static_cast<const int8_t*>(forward.keys) + at * H,
                                forward.key_scale + at, done.cos + table, done.sin + table,
                                key_weight, weights.key_norm, H, room, to);
  else
    forward.rows.summarize_float(static_cast<const float*>(forward.keys) + at * H, nullptr,
                                 done.cos + table, done.sin + table, key_weight, weights.key_norm,
                                 H, room, to);
}

void summarize_blocks(void* data) {
  Forward& forward = *static_cast<Forward*>(data);
  thread_local Scratch memory;
  float* const room = memory.reserve(6 * forward.H);
  if (!room) {
    forward.has_failed = true;
    return;
  }
  int64_t before = 0, task = forward.next.fetch_add(1);
  for (int64_t i = 0; i < forward.num_completed; ++i) {
    const Completed& done = forward.completed[i];
    const int64_t tasks = done.count * forward.K;
    for (; task < before + tasks; task = forward.next.fetch_add(1))
      summarize(forward, done, done.first + (task - before) / forward.K,
                (task - before) % forward.K, room);
    before += tasks;
  }
}

void run_stage(Forward& forward, void (*body)(void*), int32_t num_threads) {
  forward.next = 0;
  run_parallel(body, &forward, num_threads);
  if (forward.has_failed) forward.failure = kNoMemory;
}

#include "decoder_attention.h"

void run_layer(Forward& forward) {
  const LayerWeights& weights = *forward.weights;
  const int64_t queries = forward.N * forward.H, keys = forward.K * forward.H;
  const int64_t D = forward.D, F = forward.F, width = forward.width;
  const int32_t threads = forward.M < kSerialTokens ? 1 : forward.num_threads;
  Norm norm = {&forward, weights.input_norm};
  const LinearPart states[] = {
      part_of(weights.q, queries, forward.qkv, width),
      part_of(weights.k, keys, forward.qkv + queries, width),
      part_of(weights.v, keys, forward.qkv + queries + keys, width),
  };
  multiply(forward, forward.M, D, read_normed, &norm, states, 3);
  run_stage(forward, place_tokens, threads);
  if (forward.num_completed)
    run_stage(forward, summarize_blocks, forward.num_threads);
  if (forward.failure == kNone) attend_pieces(forward);

  const FloatRows attended = {forward.attended, queries};
  const LinearPart out = part_of(weights.o, D, forward.x, D, true);
  multiply(forward, forward.M, queries, read_float_row, &attended, &out, 1);

  norm.weight = weights.post_norm;
  const LinearPart gate = part_of(weights.gate, F, nullptr, 0);
  LinearPart up = part_of(weights.up, F, forward.hidden, F);
  up.gate = &gate;
  multiply(forward, forward.M, D, read_normed, &norm, &up, 1);
  const FloatRows hidden = {forward.hidden, F};
  const LinearPart down = part_of(weights.down, D, forward.x, D, true);
  multiply(forward, forward.M, F, read_float_row, &hidden, &down, 1);
}

void run_head(Forward& forward) {
  const Norm norm = {&forward, forward.final_norm};
  const LinearPart head = part_of(forward.head, forward.V, forward.logits, forward.V);
  multiply(forward, forward.num_last, forward.D, read_last, &norm, &head, 1);
}

void run_layers(void* data) {
  Forward& forward = *static_cast<Forward*>(data);
  try {
    for (; forward.layer < forward.num_layers && forward.failure == kNone; ++forward.layer) {
      forward.weights = forward.layers + forward.layer;
      run_layer(forward);
    }
    if (forward.num_last && forward.failure == kNone) run_head(forward);
  } catch (const std::bad_alloc&) {
    forward.failure = kNoMemory;
  }
}

}  // namespace
}  // namespace r1ray

extern "C" {

// Returns 0, or what failed (attention.h); hidden states and the new tokens of the cache are then
// of no use.
int32_t r1ray_decoder_layers(const r1ray::LayersArguments* arguments) {
  using namespace r1ray;
  thread_local RowMemory memory;
  thread_local Scratch scratch, numbers;
  Forward forward;
  static_cast<LayersArguments&>(forward) = *arguments;
  forward.rows = find_rows(forward.isa);
  forward.M = forward.B * forward.T;
  forward.width = (forward.N + 2 * forward.K) * forward.H;
  forward.memory = &memory;
  const int64_t queries = forward.N * forward.H;
  int64_t choices = 0;
  for (int64_t i = 0; i < forward.num_pieces; ++i) {
    const Piece& piece = forward.pieces[i];
    choices += piece.rows * forward.K * count_units(piece) * piece.room;
  }
  float* const room =
      scratch.reserve(forward.M * (forward.width + 2 * queries + forward.F) + kPad);
  forward.chosen = reinterpret_cast<int64_t*>(numbers.reserve(2 * choices + kPad));
  if (!room || !forward.chosen) return kNoMemory;
  forward.qkv = room;
  forward.rotated = forward.qkv + forward.M * forward.width;
  forward.attended = forward.rotated + forward.M * queries;
  forward.hidden = forward.attended + forward.M * queries;
  with_threads(run_layers, &forward, forward.num_threads);
  return forward.failure;
}

}  // extern "C"
