// The operators of rows_native.py, on the LibTorch stable ABI: what rows.cpp sweeps becomes statistics,
// coefficients and gradients, row by row, in the threads of ATen.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <vector>

#include "coefficient.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr double LN2 = 0.6931471805599453;
constexpr double FAR = 1 << 24;  // fp32 has no fractions beyond

// The best that this processor runs, or the one that PERL_NATIVE_ISA names.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    std::vector<const Kernels*> here;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      here.push_back(&rows_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) here.push_back(&rows_avx2);
#endif
    here.push_back(&rows_portable);
    const char* wanted = std::getenv("PERL_NATIVE_ISA");
    if (!wanted) return *here.front();
    for (const Kernels* one : here)
      if (std::string_view(one->name) == wanted) return *one;
    STD_TORCH_CHECK(false, "PERL_NATIVE_ISA is ", wanted, ", which this processor or this build does not have");
  }();
  return chosen;
}

Buffer buffer_of(const Tensor& tensor) {
  const bool bf16 = tensor.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16 || tensor.scalar_type() == ScalarType::Float, "rows are fp32 or bf16");
  return {tensor.data_ptr(), tensor.stride(0), bf16};
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
float* floats(const Optional& tensor) { return tensor ? floats(*tensor) : nullptr; }

struct Rows {
  Tile tile;
  int64_t count;
  const int64_t* targets;
  const float* temperatures;
  double temperature;

  Rows(const Tensor& logits, const Tensor& targets, const Optional& bias, const Optional& temperatures,
       double temperature, double softcap)
      : tile{buffer_of(logits), logits.size(1), floats(bias), float(softcap)},
        count(logits.size(0)),
        targets(static_cast<const int64_t*>(targets.data_ptr())),
        temperatures(floats(temperatures)),
        temperature(temperature) {}

  Row operator[](int64_t i) const {
    const double tau = temperatures ? temperatures[i] : temperature;
    // A temperature that a check could not look at: the row becomes NaN, not a plausible number.
    return {i, targets[i], tau > 0 && tau < INFINITY ? tau : NAN};
  }

  bool inside(const Row& row) const { return row.target >= 0 && row.target < tile.columns; }

  // f(row, room) for each row, where `room` is a thread's own, of `size` numbers.
  template <class F>
  void each(int64_t size, F f) const {
    const int64_t together = 1 + (1 << 14) / (tile.columns + 1);
    const int64_t wanted = (count + together - 1) / together;
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), wanted);
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      std::vector<float> room(size);
      for (int64_t i; (i = next.fetch_add(together)) < count;)
        for (int64_t j = i; j < std::min(i + together, count); j++) f((*this)[j], room.data());
    });
  }
};

// Statistics of a row as values.RowStats has them, in fp64; `log_sum` is by the exact top.
struct Found {
  double top, logprob, entropy, log_sum;

  Found(const Sums& sums, const Row& row, bool inside) : top(sums.top / row.tau) {
    log_sum = std::isfinite(float(top)) ? std::log(sums.z) : NAN;
    entropy = log_sum - LN2 * sums.w / sums.z;
    logprob = inside ? (double(sums.chosen) - sums.top) / row.tau - log_sum : NAN;
  }

  void write(const std::vector<Tensor>& stats, int64_t i) const {
    floats(stats[0])[i] = float(logprob);
    floats(stats[1])[i] = float(entropy);
    floats(stats[2])[i] = float(top);
    floats(stats[3])[i] = float(log_sum + (std::fabs(float(top)) < FAR ? top - float(top) : 0));
  }
};

// What the token-level loss depends on beside the log-prob, one number a row.
struct Inputs {
  Axes axes;
  Numbers numbers;
  const float *scale, *advantages, *old, *ref, *rollout;  // the last three may be null

  float by_logprob(int64_t i, double logprob) const {
    if (scale[i] == 0) return 0;
    const double before = old ? old[i] : logprob;
    Real correction = 1;
    if (rollout) correction = correction_weight(axes, numbers, Real(before - rollout[i]));
    const Real reference = ref ? ref[i] : logprob;
    const Token token = {logprob - before, logprob, before, reference, advantages[i], correction, 1};
    const Term term = token_term(axes, numbers, token);
    return float((scale[i] * (term.by_ratio + term.kl_by_ratio + term.by_logprob)).value);
  }

  float by_entropy(int64_t i) const {
    return scale[i] == 0 ? 0 : float(-numbers.entropy_coef * scale[i]);
  }
};

void row_stats(Tensor tile, Tensor targets, Optional bias, Optional temperatures, double temperature,
               double softcap, std::vector<Tensor> stats) {
  const Rows rows(tile, targets, bias, temperatures, temperature, softcap);
  const Kernels& level = kernels();
  rows.each(0, [&](const Row& row, float*) {
    const Sums sums = level.sums(rows.tile, row, nullptr, nullptr);
    Found(sums, row, rows.inside(row)).write(stats, row.index);
  });
}

void row_gradient(Tensor tile, Tensor targets, Optional bias, Optional temperatures, double temperature,
                  double softcap, Tensor shift, Tensor log_sum, Optional entropy, Tensor by_logprob,
                  Optional by_entropy, Tensor out) {
  const Rows rows(tile, targets, bias, temperatures, temperature, softcap);
  const Kernels& level = kernels();
  const Buffer target = buffer_of(out);
  rows.each(0, [&](const Row& row, float*) {
    const int64_t i = row.index;
    // The level that `shift` was rounded from, or one close to it; what differs is left in log_sum.
    const float from = floats(shift)[i];
    float top = float(from * row.tau);
    double rest = from - top / row.tau;
    if (std::fabs(from) >= FAR) {
      // Close is not close enough: it is this row's largest, unless that is in another rank's columns.
      const float own = level.sums(rows.tile, row, nullptr, nullptr).top;
      if (float(own / row.tau) == from) top = own;
      rest = 0;
    }
    Slopes slopes = {floats(by_logprob)[i], 0, 0, 0, top, NAN};
    slopes.log_sum = floats(log_sum)[i] + rest;
    if (by_entropy) slopes.by_entropy = floats(*by_entropy)[i], slopes.entropy = floats(*entropy)[i];
    level.gradient(rows.tile, row, slopes, target, nullptr, nullptr);
  });
}

void row_loss(Tensor tile, Tensor targets, Optional bias, Optional temperatures, double temperature,
              double softcap, std::vector<std::string> axes, std::vector<double> numbers, Tensor scale,
              Tensor advantages, Optional old, Optional ref, Optional rollout, std::vector<Tensor> stats,
              Tensor by_logprob, Optional by_entropy, Optional out) {
  const Rows rows(tile, targets, bias, temperatures, temperature, softcap);
  const Inputs inputs = {Axes::of(axes),     Numbers::of(numbers), floats(scale),  floats(advantages),
                         floats(old),        floats(ref),          floats(rollout)};
  const Kernels& level = kernels();
  const Buffer target = out ? buffer_of(*out) : Buffer{};
  // Exponentials that are kept save the second sweep their computation, where it needs nothing else.
  const bool keeps = out && !by_entropy && rows.tile.softcap == 0;
  const int64_t blocks = rows.tile.columns / level.block + 1;
  rows.each(blocks + (keeps && target.bf16 ? rows.tile.columns : 0), [&](const Row& row, float* tops) {
    const int64_t i = row.index;
    float* kept = nullptr;
    if (keeps && inputs.scale[i] != 0)
      kept = target.bf16 ? tops + blocks : static_cast<float*>(target.data) + i * target.stride;
    const Sums sums = level.sums(rows.tile, row, kept, tops);
    const Found found(sums, row, rows.inside(row));
    found.write(stats, i);
    const float slope = floats(by_logprob)[i] = inputs.by_logprob(i, float(found.logprob));
    const float bonus = by_entropy ? floats(*by_entropy)[i] = inputs.by_entropy(i) : 0;
    if (!out) return;
    const Slopes slopes = {slope, bonus, found.entropy, found.log_sum, sums.top, sums.chosen};
    level.gradient(rows.tile, row, slopes, target, kept, tops);
  });
}

std::string instruction_set() { return kernels().name; }
int64_t source() { return SOURCE; }

STABLE_TORCH_LIBRARY(perl_native, m) {
  const std::string scoring =
      "Tensor tile, Tensor targets, Tensor? bias, Tensor? temperatures, float temperature, float softcap";
  m.def(("row_stats(" + scoring + ", Tensor(a!)[] stats) -> ()").c_str());
  m.def(("row_gradient(" + scoring +
         ", Tensor shift, Tensor log_sum, Tensor? entropy, Tensor by_logprob, Tensor? by_entropy, "
         "Tensor(a!) out) -> ()").c_str());
  m.def(("row_loss(" + scoring +
         ", str[] axes, float[] numbers, Tensor scale, Tensor advantages, Tensor? old, Tensor? ref, "
         "Tensor? rollout, Tensor(a!)[] stats, Tensor(b!) by_logprob, Tensor(c!)? by_entropy, "
         "Tensor(d!)? out) -> ()").c_str());
  m.def("instruction_set() -> str");
  m.def("source() -> int");  // checksum of the coefficient.py that this was built from
}

STABLE_TORCH_LIBRARY_IMPL(perl_native, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("row_gradient", TORCH_BOX(&row_gradient));
  m.impl("row_loss", TORCH_BOX(&row_loss));
}

STABLE_TORCH_LIBRARY_IMPL(perl_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("source", TORCH_BOX(&source));
}

}  // namespace
