// What a call of the kernel that runs decoder layers is given.

#pragma once

#include <cstdint>

namespace r1ray {

struct LinearWeights {
  const int8_t* weight;
  const float* scale;
  const float* bias;  // or null
};

// In the order of `NAMES` in models/native_weights.py.
struct LayerWeights {
  const float *input_norm, *post_norm;
  LinearWeights q, k, v, o, gate, up, down;
  const float *q_norm, *k_norm;              // null without
  const float *query_weight, *query_norm;    // of the layer's gate; null without
  const float *key_weight, *key_norm;
  const bool* is_marked;  // [N]: heads that choose by the keys in blocks
};

// Queries that are attended together: those of one row in whole blocks or one by one, or of all.
struct Piece {
  int64_t row, rows;      // the first, and how many
  int64_t token, tokens;  // the first of each row's new ones, and how many
  int64_t unit;           // tokens: 64, or 1
  int64_t most, room;     // blocks that any unit chooses; where its layer has marked heads
  int64_t starts;         // in `numbers`: the position of each row's first
  int64_t counts;         // in `numbers`: blocks to choose, [rows][units]
  int64_t marked;         // in `numbers`: the same in groups with a marked head
};

// Blocks of one row that are complete with the new tokens.
struct Completed {
  int64_t row, first, count;
  const float *cos, *sin;  // [count · 64, H]
};

// The caller's fields, in the order of the Python structure of the same name.
struct LayersArguments {
  const LayerWeights* layers;
  float* x;                // [B, T, D]: hidden states, replaced
  const float *cos, *sin;  // [B or 1, T, H]
  int64_t rotary_row;
  void *keys, *values;  // [L, K, pages, 64, H] float, or int8 where there are scales
  float *key_scale, *value_scale;  // [L, K, pages, 64], or null
  float* summaries;                // [L, K, pages, H]; null where no blocks are kept
  const int32_t* pages;            // [B, row_pages]: where the blocks of each row lie
  int64_t row_pages;
  int64_t layer_pages;  // of a layer
  const int64_t* numbers;  // the rows' starts, and what pieces refer to
  const Piece* pieces;
  const Completed* completed;
  int64_t num_pieces, num_completed, num_layers;
  int64_t B, T, D, F, N, K, H;
  int64_t chooses;  // whether by score; else every earlier block
  const float* final_norm;  // with the head's weights, for num_last tokens
  LinearWeights head;
  const int64_t* last;  // their numbers in [B, T]
  float* logits;        // [num_last, V]
  int64_t num_last, V;
  double eps;
  int32_t isa, num_threads;
};

}  // namespace r1ray
