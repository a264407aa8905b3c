// Sweeps over one row of logits. rows.cpp is compiled once for each instruction set.
//
// The level of a column is its score times the temperature: softcap tanh((logit + bias) / softcap).
// The sweeps compare levels, so that the largest is exact, and t = (level - top) / tau log2(e).
#pragma once
#include <cstdint>

struct Buffer {
  void* data;
  int64_t stride;  // elements from row to row; those of a row are adjacent
  bool bf16;       // else fp32
};

struct Tile {
  Buffer logits;
  int64_t columns;
  const float* bias;  // or null
  float softcap;      // or 0
};

struct Row {
  int64_t index, target;  // a target outside the columns belongs to no column
  double tau;
};

struct Sums {
  float top;     // the largest level
  double z, w;   // sums of 2^t and of 2^t t
  float chosen;  // level of the target
};

// log p = (level - top) / tau - log_sum; `chosen` is read with `exponentials` only.
struct Slopes {
  double by_logprob, by_entropy, entropy, log_sum;
  float top, chosen;
};

struct Kernels {
  const char* name;
  int64_t block;  // columns
  // With `exponentials` [columns], 2^t is left there, where the top of a block is the largest level up
  // to its end, which goes to `tops`. They may be the row itself.
  Sums (*sums)(const Tile&, const Row&, float* exponentials, float* tops);
  // Writes the gradient by the logits to `out`, which may be the tile. With `exponentials`, of those that
  // `sums` has left, which may be in `out`; not with a softcap or an entropy gradient: these need levels.
  void (*gradient)(const Tile&, const Row&, const Slopes&, const Buffer& out, const float* exponentials,
                   const float* tops);
};

extern const Kernels rows_portable, rows_avx2, rows_avx512;
