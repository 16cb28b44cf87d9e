#include "tile_gather.h"

#include <algorithm>
#include <cmath>
#include <vector>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// Everything but the entry point has internal linkage: the same file is compiled for several instruction sets.
namespace tile_gather {
namespace {

// The taps of each output pixel along one axis: indices into the source array and weights that add up to 1.
struct Taps {
  std::vector<int64_t> first;  // source index of the first tap, per output pixel
  std::vector<int32_t> count;  // 0 where the output pixel lies outside the raster
  std::vector<float> weight;   // [out, stride]
  int64_t stride = 0, lo = 0, hi = 0;  // [lo, hi): source range any tap touches
};

Taps make_taps(double start, double end, int64_t out, int64_t origin, int64_t source_size, int64_t raster_size) {
  const double scale = (end - start) / static_cast<double>(out);
  const double support = std::max(scale, 1.0);
  Taps taps;
  taps.stride = static_cast<int64_t>(std::ceil(support)) * 2 + 2;
  taps.first.assign(out, 0);
  taps.count.assign(out, 0);
  taps.weight.assign(out * taps.stride, 0.f);
  taps.lo = source_size;
  std::vector<double> w(taps.stride);
  for (int64_t i = 0; i < out; ++i) {
    const double centre = start + (static_cast<double>(i) + 0.5) * scale;
    if (!(centre >= 0.0 && centre < static_cast<double>(raster_size))) continue;
    const int64_t first = std::max({static_cast<int64_t>(std::floor(centre - support)), int64_t{0}, origin});
    const int64_t last = std::min({static_cast<int64_t>(std::ceil(centre + support)), raster_size, origin + source_size});
    double sum = 0.0;
    for (int64_t j = first; j < last; ++j) {
      w[j - first] = std::max(0.0, 1.0 - std::abs((static_cast<double>(j) + 0.5 - centre) / support));
      sum += w[j - first];
    }
    if (!(sum > 0.0)) continue;
    taps.first[i] = first - origin;
    taps.count[i] = static_cast<int32_t>(last - first);
    for (int64_t j = 0; j < last - first; ++j) taps.weight[i * taps.stride + j] = static_cast<float>(w[j] / sum);
    taps.lo = std::min(taps.lo, first - origin);
    taps.hi = std::max(taps.hi, last - origin);
  }
  return taps;
}

// Scratch of one tile: one vertically resampled row in the source's own layout, and its validity.
struct Row {
  std::vector<float> value, validity;
};

template <typename T>
void add_line(const T *line, const uint8_t *valid, int64_t pixels, int64_t per_pixel, float w, float *sum) {
  if (!valid) {
    for (int64_t i = 0; i < pixels * per_pixel; ++i) sum[i] += w * static_cast<float>(line[i]);
    return;
  }
  for (int64_t x = 0; x < pixels; ++x) {
    if (!valid[x]) continue;  // a select would let NaN through
    for (int64_t c = 0; c < per_pixel; ++c) sum[x * per_pixel + c] += w * static_cast<float>(line[x * per_pixel + c]);
  }
}

template <typename T>
void resample_vertically(const Source &s, const Taps &ty, int64_t oy, int64_t lo, int64_t hi, Row &row) {
  const T *data = static_cast<const T *>(s.data);
  const int64_t pixels = hi - lo;
  std::fill(row.value.begin(), row.value.end(), 0.f);
  std::fill(row.validity.begin(), row.validity.end(), 0.f);
  for (int32_t t = 0; t < ty.count[oy]; ++t) {
    const int64_t y = ty.first[oy] + t;
    const float w = ty.weight[oy * ty.stride + t];
    const uint8_t *valid = s.valid_HW ? s.valid_HW + y * s.width + lo : nullptr;
    if (valid)
      for (int64_t x = 0; x < pixels; ++x) row.validity[x] += valid[x] ? w : 0.f;
    if (s.interleaved) {
      add_line(data + (y * s.width + lo) * s.bands, valid, pixels, s.bands, w, row.value.data());
    } else {
      for (int64_t b = 0; b < s.bands; ++b)
        add_line(data + (b * s.height + y) * s.width + lo, valid, pixels, 1, w, row.value.data() + b * pixels);
    }
  }
}

struct Moments {  // of the mean scaled band over valid pixels: texture is its standard deviation
  double sum = 0, sum2 = 0;
  int64_t count = 0;
};

void store(const Target &t, int64_t index, float v) {
  if (t.as_u8)
    static_cast<uint8_t *>(t.tiles_NCHW)[index] =
        static_cast<uint8_t>(std::min(255.f, std::max(0.f, std::nearbyint(v))));
  else
    static_cast<float *>(t.tiles_NCHW)[index] = v;
}

void resample_horizontally(const Source &s, const Taps &tx, int64_t lo, int64_t pixels, const Row &row,
                           const Target &t, int64_t out0, Moments &m) {
  const int64_t plane = t.height * t.width;
  const int64_t step = s.interleaved ? s.bands : 1;
  const int64_t band_step = s.interleaved ? 1 : pixels;
  for (int64_t ox = 0; ox < t.width; ++ox) {
    const int32_t count = tx.count[ox];
    if (count == 0) continue;
    const int64_t x0 = tx.first[ox] - lo;
    const float *w = &tx.weight[ox * tx.stride];
    float validity = 1.f;
    if (s.valid_HW) {
      validity = 0.f;
      for (int32_t k = 0; k < count; ++k) validity += w[k] * row.validity[x0 + k];
      if (validity < 0.5f) continue;
    }
    const float scale = 1.f / validity;
    float brightness = 0.f;
    int real_bands = 0;
    for (int64_t c = 0; c < t.channels; ++c) {
      const int32_t band = t.bands_C[c];
      if (band == kAbsentBand) continue;
      if (band == kValidityBand) {
        store(t, out0 + c * plane + ox, 1.f);
        continue;
      }
      const float *v = row.value.data() + band * band_step + x0 * step;
      float sum = 0.f;
      for (int32_t k = 0; k < count; ++k) sum += w[k] * v[k * step];
      const float value = sum * scale * t.gain_C[c];
      brightness += value;
      ++real_bands;
      store(t, out0 + c * plane + ox, value + t.bias_C[c]);
    }
    if (real_bands) brightness /= static_cast<float>(real_bands);
    m.sum += brightness;
    m.sum2 += static_cast<double>(brightness) * brightness;
    ++m.count;
  }
}

template <typename T>
void gather(const Source &s, const double *box, int64_t n, const Target &t) {
  const int64_t tile = t.channels * t.height * t.width;
  const size_t item = t.as_u8 ? 1 : sizeof(float);
  std::fill_n(static_cast<uint8_t *>(t.tiles_NCHW) + n * tile * item, tile * item, uint8_t{0});
  const Taps tx = make_taps(box[0], box[2], t.width, s.origin_col, s.width, s.raster_width);
  const Taps ty = make_taps(box[1], box[3], t.height, s.origin_row, s.height, s.raster_height);
  Moments m;
  if (tx.hi > tx.lo) {
    const int64_t pixels = tx.hi - tx.lo;
    Row row;
    row.value.resize(pixels * s.bands);
    row.validity.resize(s.valid_HW ? pixels : 0);
    for (int64_t oy = 0; oy < t.height; ++oy) {
      if (ty.count[oy] == 0) continue;
      resample_vertically<T>(s, ty, oy, tx.lo, tx.hi, row);
      resample_horizontally(s, tx, tx.lo, pixels, row, t, n * tile + oy * t.width, m);
    }
  }
  t.valid_fraction_N[n] = static_cast<float>(static_cast<double>(m.count) / static_cast<double>(t.height * t.width));
  const double mean = m.count ? m.sum / m.count : 0.0;
  t.texture_N[n] = m.count ? static_cast<float>(std::sqrt(std::max(0.0, m.sum2 / m.count - mean * mean))) : 0.f;
}

}  // namespace

void JOIN(gather_, VARIANT)(const Source &s, const double *box_4, int64_t n, const Target &t) {
  switch (s.type) {
    case SourceType::u8: return gather<uint8_t>(s, box_4, n, t);
    case SourceType::u16: return gather<uint16_t>(s, box_4, n, t);
    case SourceType::f32: return gather<float>(s, box_4, n, t);
  }
}

}  // namespace tile_gather
