// Compiled for each instruction set, ISA, with ROWS the name of its `Kernels`. Nothing here may be a function
// that the linker could share with another instruction set: no templates of the standard library.
#include "rows.h"

#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

namespace {

typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

constexpr int64_t STEP = 4 * WIDTH;  // four independent chains hide the latency
// Columns of a block: at most 8 KB of fp32, which stay in L1, and 32 numbers to a running sum in fp32.
constexpr int64_t BLOCK = 32 * STEP;
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline V all(float x) { return x - V{}; }
inline int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

// `b` if either is NaN, as the instruction has it.
inline V larger(V a, V b) { return a > b ? a : b; }

// t to the nearest integer n (|t| < 2^22) and 2^n; the sum's low bits hold n.
inline V nearest(V t, V& power) {
  V sum = t + 12582912.0f;
  power = (V)(((U)sum << 23) + 0x3F800000u);
  return sum - 12582912.0f;
}

// 2^f - 1 for |f| <= 1/2, to 2e-8 of 2^f.
inline V exp2m1(V f) {
  V p = all(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f;
}

// 2^t for t up to 0 or little more: exactly 0 of -inf, NaN of NaN. `t` becomes finite.
inline V exp2(V& t) {
#if WIDTH == 16  // a fifth faster than what is right for all
  t = _mm512_maskz_max_ps(-1, all(-200.0f), t);
  const V n = _mm512_maskz_roundscale_ps(-1, t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(-1, exp2m1(t - n) + 1.0f, n);
#else
  t = larger(all(-127.0f), t);
  V power, n = nearest(t, power);
  return (exp2m1(t - n) + 1.0f) * power;
#endif
}

inline V tanh(V x) {
  const U sign = (U)x & 0x80000000u;
  // Large enough for 1, small enough to be finite; NaN stays.
  V t = -larger(all(-40.0f), -(V)((U)x ^ sign) * float(2 * LOG2E));
  V power, n = nearest(t, power);
  V e = exp2m1(t - n) * power + (power - 1.0f);
  return (V)((U)(e / (e + 2.0f)) | sign);
}

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  out.bits = x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
}

// Levels of n columns, followed by -inf up to a multiple of STEP: the logits themselves where they are
// that already, else in `buffer`.
template <class T>
const float* levels(const Tile& tile, int64_t row, int64_t start, int64_t n, float* buffer) {
  const T* x = static_cast<const T*>(tile.logits.data) + row * tile.logits.stride + start;
  if constexpr (sizeof(T) == sizeof(float))
    if (!tile.bias && tile.softcap == 0 && n == padded(n)) return reinterpret_cast<const float*>(x);
  for (int64_t i = 0; i < n; i++) buffer[i] = widen(x[i]);
  if (tile.bias)
    for (int64_t i = 0; i < n; i++) buffer[i] += tile.bias[start + i];
  for (int64_t i = n; i < padded(n); i++) buffer[i] = -INFINITY;
  if (tile.softcap != 0) {
    const float cap = tile.softcap;
    for (int64_t i = 0; i < n; i += WIDTH) store(buffer + i, cap * tanh(load(buffer + i) / cap));
    for (int64_t i = n; i < padded(n); i++) buffer[i] = -INFINITY;
  }
  return buffer;
}

float largest(const float* x, int64_t n) {
  V top[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
  for (int64_t i = 0; i < n; i += STEP)
    for (int j = 0; j < 4; j++) top[j] = larger(top[j], load(x + i + j * WIDTH));
  const V both = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  float found = both[0];
  for (int j = 1; j < WIDTH; j++) found = both[j] > found ? both[j] : found;
  return found;
}

double total(const V* parts) {
  const V sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  double found = 0;
  for (int j = 0; j < WIDTH; j++) found += sum[j];
  return found;
}

// Adds 2^t and 2^t t of n columns, n a multiple of STEP, to z and w, and has `next`, the logits of the
// next block, brought to the cache meanwhile.
template <bool KEEP, class T>
void add(const float* x, int64_t n, float top, float rate, float* kept, const T* next, double& z, double& w) {
  V zs[4] = {}, ws[4] = {};
  for (int64_t i = 0; i < n; i += STEP)
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch(next + i + j * WIDTH);
      V t = (load(x + i + j * WIDTH) - top) * rate;
      const V e = exp2(t);
      if constexpr (KEEP) store(kept + i + j * WIDTH, e);
      zs[j] += e;
      ws[j] += e * t;
    }
  z += total(zs);
  w += total(ws);
}

template <class T>
Sums sums_of(const Tile& tile, const Row& row, float* exponentials, float* tops) {
  alignas(64) float buffer[BLOCK], kept[BLOCK];
  const double rate = LOG2E / row.tau;
  Sums found = {-INFINITY, 0, 0, NAN};
  for (int64_t start = 0; start < tile.columns; start += BLOCK) {
    const int64_t n = tile.columns - start < BLOCK ? tile.columns - start : BLOCK;
    const float* x = levels<T>(tile, row.index, start, n, buffer);
    if (row.target >= start && row.target < start + n) found.chosen = x[row.target - start];
    // A NaN may be lost here, and is found by the sums.
    const float peak = largest(x, padded(n));
    if (peak > found.top) {
      if (found.z > 0) {
        const double rise = (double(found.top) - peak) * rate, factor = ::exp2(rise);
        found.w = factor * (found.w + rise * found.z);
        found.z *= factor;
      }
      found.top = peak;
    }
    // In a block after blocks of nothing but -inf every difference would be NaN.
    const float top = found.top == -INFINITY ? 0 : found.top;
    const T* next = static_cast<const T*>(tile.logits.data) + row.index * tile.logits.stride + start + n;
    if (exponentials) {
      float* place = n == padded(n) ? exponentials + start : kept;
      add<true>(x, padded(n), top, float(rate), place, next, found.z, found.w);
      if (place == kept) memcpy(exponentials + start, kept, n * sizeof(float));
      tops[start / BLOCK] = found.top;
    } else {
      add<false>(x, padded(n), top, float(rate), nullptr, next, found.z, found.w);
    }
  }
  return found;
}

template <class T, class O>
void gradient_of(const Tile& tile, const Row& row, const Slopes& slopes, O* out, const float* exponentials,
                 const float* tops) {
  alignas(64) float buffer[BLOCK], place[BLOCK];
  const auto [by_logprob, by_entropy, entropy, log_sum, top, chosen] = slopes;
  const float cap = tile.softcap, rate = float(LOG2E / row.tau);
  // dL/dlevel = -p (by_logprob + by_entropy (log p + entropy)) / tau = 2^t (flat + steep t)
  const double unit = -::exp(-log_sum) / row.tau;
  const float flat = float(unit * (by_logprob + by_entropy * (entropy - log_sum)));
  const float steep = float(unit * by_entropy * LN2);
  for (int64_t start = 0; start < tile.columns; start += BLOCK) {
    const int64_t n = tile.columns - start < BLOCK ? tile.columns - start : BLOCK;
    float* grad = place;
    if constexpr (sizeof(O) == sizeof(float))
      if (n == padded(n)) grad = reinterpret_cast<float*>(out + start);
    float level = chosen;
    if (exponentials) {
      const double rise = (double(tops[start / BLOCK]) - top) / row.tau;
      const float factor = float(unit * by_logprob * ::exp(rise));
      for (int64_t i = 0; i < n; i++) grad[i] = exponentials[start + i] * factor;
    } else {
      const float* x = levels<T>(tile, row.index, start, n, buffer);
      if (row.target >= start && row.target < start + n) level = x[row.target - start];
      for (int64_t i = 0; i < padded(n); i += WIDTH) {
        const V here = load(x + i);
        V t = (here - top) * rate;
        V g = exp2(t);
        g *= flat + steep * t;
        store(grad + i, g);
      }
      if (cap != 0)
        for (int64_t i = 0; i < padded(n); i += WIDTH) {
          const V share = load(x + i) / cap;
          store(grad + i, load(grad + i) * (1.0f - share * share));
        }
    }
    if (grad == place)
      for (int64_t i = 0; i < n; i++) narrow(place[i], out[start + i]);
    if (row.target >= start && row.target < start + n) {
      const double log_p = (double(level) - top) / row.tau - log_sum, p = ::exp(log_p);
      double g = -by_logprob * ::expm1(log_p) - by_entropy * (p == 0 ? 0 : p * (log_p + entropy));
      if (cap != 0) g *= 1 - double(level) / cap * (double(level) / cap);
      narrow(float(g / row.tau), out[row.target]);
    }
  }
}

Sums sums(const Tile& tile, const Row& row, float* exponentials, float* tops) {
  return (tile.logits.bf16 ? sums_of<bf16> : sums_of<float>)(tile, row, exponentials, tops);
}

template <class O>
void gradient_to(const Tile& tile, const Row& row, const Slopes& slopes, const Buffer& out,
                 const float* exponentials, const float* tops) {
  O* place = static_cast<O*>(out.data) + row.index * out.stride;
  if (slopes.by_logprob == 0 && slopes.by_entropy == 0)
    memset(place, 0, tile.columns * sizeof(O));
  else
    (tile.logits.bf16 ? gradient_of<bf16, O> : gradient_of<float, O>)(tile, row, slopes, place, exponentials, tops);
}

void gradient(const Tile& tile, const Row& row, const Slopes& slopes, const Buffer& out,
              const float* exponentials, const float* tops) {
  (out.bf16 ? gradient_to<bf16> : gradient_to<float>)(tile, row, slopes, out, exponentials, tops);
}

}  // namespace

const Kernels ROWS = {ISA, BLOCK, sums, gradient};
