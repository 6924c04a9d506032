// What a call of the attention kernel is given, and one of its tasks: one unit of one group.

#pragma once

#include <atomic>
#include <cstdint>

namespace r1ray {

constexpr int64_t kBlock = 64;  // tokens of a block of keys, as in ops/block_sparse.py

// Where the blocks of a row lie: one behind the other, or each in a page of its own. With pages, keys
// and values are [K, pages, 64, H] and their scales [K, pages, 64]: what is said of a row's stride is
// a page's. Groups come first, so that pages in a row are read as one run.
struct Pages {
  const int32_t* table;  // [B, blocks]; null without
  int64_t row;           // entries of a row
};

// A block's first token: in which row or page, and behind how many tokens of it.
struct BlockPlace {
  int64_t row, token;
};

inline BlockPlace place_block(const Pages& pages, int64_t row, int64_t block) {
  if (pages.table) return {pages.table[row * pages.row + block], 0};
  return {row, block * kBlock};
}

// The caller's fields, in the order of the Python structure of the same name.
struct AttentionArguments {
  const float* q;  // [B, N, T, H], strides in elements
  int64_t q_row, q_head, q_token;
  const void* keys;  // [B, K, S, H] float, or int8 where there are scales; or pages (Pages)
  int64_t key_row, key_head;
  const void* values;
  int64_t value_row, value_head;
  const float* key_scale;  // [B, K, S]; null with float keys
  int64_t key_scale_row, key_scale_head;
  const float* value_scale;
  int64_t value_scale_row, value_scale_head;
  Pages pages;
  const int64_t* chosen;  // [B, K, U, M] contiguous
  const int64_t* starts;  // [B]
  float* out;             // [B, T, N, H] contiguous
  int64_t B, N, K, T, S, H, U, M;
  int64_t unit;  // tokens: 64, or 1
  int32_t isa, num_threads;
};

enum Failure : int32_t { kNone = 0, kNoMemory = 1, kBadBlock = 2 };

struct AttentionJob : AttentionArguments {
  float q_scale;   // log2(e) / sqrt(H): scores are powers of two
  int64_t parts;   // that the blocks of a unit are split into at most
  float* partial;  // where there are several: [B, T, part, N, H + 2], the sums not yet divided,
                   // the total of the shares, and the score that these are relative to
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> failure{kNone};
};

struct AttentionTask {
  int64_t row, unit, group, part;
  int64_t parts;          // of this unit: later ones are empty
  int64_t tokens;         // queries of each head
  int64_t first;          // position of the first
  int64_t own;            // block it is in
  const int64_t* chosen;  // blocks, `count` of them
  int64_t count;
};

// Number of the i-th block that a task keeps, its own first; -1 for none.
inline int64_t kept_block(const AttentionTask& task, int64_t i) {
  return i < 2 ? task.own - i : task.chosen[i - 2];
}

}  // namespace r1ray

extern "C" {

// Returns 0, or what failed. Every start + T is at most S.
int32_t r1ray_sparse_attention(const r1ray::AttentionArguments* arguments);

}  // extern "C"
