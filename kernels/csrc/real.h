// What stands for a tensor when coefficient.py is translated: one number, or one truth value as 1 or 0.
#pragma once
#include <cmath>
#include <string>
#include <tuple>

namespace {

struct Real {
  double value;
  Real(double x = 0) : value(x) {}
  friend Real operator+(Real a, Real b) { return a.value + b.value; }
  friend Real operator-(Real a, Real b) { return a.value - b.value; }
  friend Real operator*(Real a, Real b) { return a.value * b.value; }
  friend Real operator/(Real a, Real b) { return a.value / b.value; }
  friend Real operator-(Real a) { return -a.value; }
  friend Real operator<(Real a, Real b) { return a.value < b.value; }
  friend Real operator>(Real a, Real b) { return a.value > b.value; }
  friend Real operator<=(Real a, Real b) { return a.value <= b.value; }
  friend Real operator>=(Real a, Real b) { return a.value >= b.value; }
  friend Real operator==(Real a, Real b) { return a.value == b.value; }
  friend Real operator&(Real a, Real b) { return a.value != 0 && b.value != 0; }
  friend Real operator|(Real a, Real b) { return a.value != 0 || b.value != 0; }
  friend Real operator~(Real a) { return a.value == 0; }
};

namespace tl {
Real abs(Real x) { return std::fabs(x.value); }
Real exp(Real x) { return std::exp(x.value); }
Real log(Real x) { return std::log(x.value); }
Real sigmoid(Real x) { return 1 / (1 + std::exp(-x.value)); }
Real where(Real condition, Real yes, Real no) { return condition.value != 0 ? yes : no; }
}  // namespace tl

}  // namespace
