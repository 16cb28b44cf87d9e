// Filters, as taps along one axis. Part of tile_gather.cpp: internal linkage, compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tile_gather.h"

namespace tile_gather {
namespace {

constexpr int kFixedBits = 22;  // of Pillow's weights for 8-bit images

// The taps of each output pixel along one axis: indices into the source array and weights that add up to 1.
struct Taps {
  std::vector<int64_t> first;  // source index of the first tap, per output pixel
  std::vector<int32_t> count;  // 0 where the output pixel lies outside the raster
  std::vector<float> weight;   // [out, stride]
  std::vector<int32_t> fixed;  // the same in fixed point, where Pillow's rounding is asked for
  int64_t stride = 0, lo = 0, hi = 0;  // [lo, hi): source range any tap touches
  int64_t begin = 0, end = 0;          // output pixels inside the raster
};

struct Axis {
  double start, end;  // of the box, in raster pixels
  int64_t out, origin, source_size, raster_size;
};

double sinc(double x) {
  const double t = 3.14159265358979323846 * x;
  return x == 0.0 ? 1.0 : std::sin(t) / t;
}

// Distance x >= 0 in source pixels times min(1, 1 / scale).
double interpolate(Filter filter, double x) {
  constexpr double a = -0.5;
  switch (filter) {
    case Filter::bicubic:
      if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
      return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
    case Filter::lanczos3: return x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
    default: return std::max(0.0, 1.0 - x);
  }
}

int64_t mirror(int64_t i, int64_t size) {  // c b | a b c | b a
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1), p = std::abs(i) % period;
  return std::min(p, period - p);
}

struct Bell {  // one half of a Gaussian, cut at four sigma; its whole sums up to 1
  std::vector<double> weight;
  explicit Bell(double scale) {
    const double sigma = std::max(0.0, (scale - 1.0) / 2.0);
    const auto radius = static_cast<int64_t>(4.0 * sigma + 0.5);
    weight.assign(radius + 1, 1.0);
    double sum = 1.0;
    for (int64_t k = 1; k <= radius; ++k) {
      weight[k] = std::exp(-0.5 * static_cast<double>(k * k) / (sigma * sigma));
      sum += 2.0 * weight[k];
    }
    for (double &w : weight) w /= sum;
  }
  int64_t radius() const { return static_cast<int64_t>(weight.size()) - 1; }
  double at(int64_t k) const { return std::abs(k) <= radius() ? weight[std::abs(k)] : 0.0; }
};

// Weights of source pixels [first, last) for the output pixel at `centre`, not yet normalised.
class Weights {
 public:
  Weights(Filter filter, double scale, int64_t raster_size)
      : filter_(filter), support_(std::max(scale, 1.0)), raster_size_(raster_size), bell_(gaussian() ? scale : 1.0) {}

  double reach() const {
    if (gaussian()) return static_cast<double>(bell_.radius()) + 1.0;
    return filter_ == Filter::lanczos3 ? 3.0 * support_ : filter_ == Filter::bicubic ? 2.0 * support_ : support_;
  }

  void fill(double centre, int64_t first, int64_t last, double *w) const {
    if (filter_ == Filter::nearest) {
      for (int64_t j = first; j < last; ++j) w[j - first] = j == static_cast<int64_t>(centre) ? 1.0 : 0.0;
    } else if (gaussian()) {
      fill_gaussian(centre, first, last, w);
    } else {
      for (int64_t j = first; j < last; ++j)
        w[j - first] = interpolate(filter_, std::abs((static_cast<double>(j) + 0.5 - centre) / support_));
    }
  }

 private:
  bool gaussian() const { return filter_ == Filter::gaussian; }

  void fill_gaussian(double centre, int64_t first, int64_t last, double *w) const {
    std::fill_n(w, last - first, 0.0);
    const auto left = static_cast<int64_t>(std::floor(centre - 0.5));
    const double share = centre - 0.5 - static_cast<double>(left);
    for (int64_t k = -bell_.radius(); k <= bell_.radius() + 1; ++k) {
      const int64_t j = mirror(left + k, raster_size_);
      if (j >= first && j < last) w[j - first] += (1.0 - share) * bell_.at(k) + share * bell_.at(k - 1);
    }
  }

  Filter filter_;
  double support_;
  int64_t raster_size_;
  Bell bell_;
};

Taps make_taps(const Axis &a, Filter filter, bool fixed) {
  const double scale = (a.end - a.start) / static_cast<double>(a.out);
  const Weights weights(filter, scale, a.raster_size);
  Taps taps;
  taps.stride = static_cast<int64_t>(std::ceil(weights.reach())) * 2 + 2;
  taps.first.assign(a.out, 0);
  taps.count.assign(a.out, 0);
  taps.weight.assign(a.out * taps.stride, 0.f);
  taps.fixed.assign(fixed ? a.out * taps.stride : 0, 0);
  taps.lo = a.source_size;
  std::vector<double> w(taps.stride);
  double stepped = a.start + 0.5 * scale;  // as Pillow steps to the nearest pixel: ties fall the same way
  for (int64_t i = 0; i < a.out; ++i, stepped += scale) {
    const double centre = filter == Filter::nearest ? stepped : a.start + (static_cast<double>(i) + 0.5) * scale;
    if (!(centre >= 0.0 && centre < static_cast<double>(a.raster_size))) continue;
    const int64_t first =
        std::max({static_cast<int64_t>(std::floor(centre - weights.reach())), int64_t{0}, a.origin});
    const int64_t last = std::min({static_cast<int64_t>(std::ceil(centre + weights.reach())), a.raster_size,
                                   a.origin + a.source_size});
    if (first >= last) continue;
    weights.fill(centre, first, last, w.data());
    double sum = 0.0, absolute = 0.0;
    for (int64_t j = 0; j < last - first; ++j) {
      sum += w[j];
      absolute += std::abs(w[j]);
    }
    if (!(sum > 0.0 && sum >= 0.5 * absolute)) continue;  // the window holds little more than negative lobes
    int64_t begin = 0, end = last - first;
    if (fixed) {  // integers lose nothing without the zeros at both ends
      while (w[begin] == 0.0) ++begin;
      while (w[end - 1] == 0.0) --end;
    }
    taps.first[i] = first + begin - a.origin;
    taps.count[i] = static_cast<int32_t>(end - begin);
    for (int64_t j = begin; j < end; ++j) {
      taps.weight[i * taps.stride + j - begin] = static_cast<float>(w[j] / sum);
      if (fixed)
        taps.fixed[i * taps.stride + j - begin] = static_cast<int32_t>(std::round(w[j] / sum * (1 << kFixedBits)));
    }
    taps.lo = std::min(taps.lo, taps.first[i]);
    taps.hi = std::max(taps.hi, taps.first[i] + taps.count[i]);
    if (taps.begin == taps.end) taps.begin = i;
    taps.end = i + 1;
  }
  return taps;
}

}  // namespace
}  // namespace tile_gather
