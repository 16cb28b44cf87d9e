#include "tile_gather.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "taps.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// Everything but the entry point has internal linkage: the same file is compiled for several instruction sets.
namespace tile_gather {
namespace {

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

  void add(float brightness) {
    sum += brightness;
    sum2 += static_cast<double>(brightness) * brightness;
    ++count;
  }
};

template <typename Out>
Out cast(float v) {
  return v;
}
template <>
uint8_t cast<uint8_t>(float v) {
  return static_cast<uint8_t>(std::min(255.f, std::max(0.f, std::nearbyint(v))));
}

void store(const Target &t, int64_t index, float v) {
  if (t.as_u8)
    static_cast<uint8_t *>(t.tiles_NCHW)[index] = cast<uint8_t>(v);
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
    m.add(brightness);
  }
}

template <typename T>
void gather_once(const Source &s, const Taps &tx, const Taps &ty, int64_t out0, const Target &t, Moments &m) {
  const int64_t pixels = tx.hi - tx.lo;
  Row row;
  row.value.resize(pixels * s.bands);
  row.validity.resize(s.valid_HW ? pixels : 0);
  for (int64_t oy = 0; oy < t.height; ++oy) {
    if (ty.count[oy] == 0) continue;
    resample_vertically<T>(s, ty, oy, tx.lo, tx.hi, row);
    resample_horizontally(s, tx, tx.lo, pixels, row, t, out0 + oy * t.width, m);
  }
}

// 8-bit pixels of one band, from the first row and column that any tap touches.
struct Plane {
  const uint8_t *data;
  int64_t row, step;
};

constexpr int32_t kHalf = 1 << (kFixedBits - 1);
constexpr int64_t kLanes = 8;
using Lanes = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));  // as wide as the machine, or in pieces

// One pass along the rows of Pillow's resize into to_HW [rows, out]. Eight rows go side by side.
void pass_across(const Plane &from, int64_t rows, const Taps &tx, int64_t out, uint8_t *to_HW) {
  std::vector<Lanes> lanes(tx.hi - tx.lo);
  for (int64_t y = 0; y < rows; y += kLanes) {
    const int64_t n = std::min(kLanes, rows - y);
    for (int64_t r = 0; r < n; ++r) {
      const uint8_t *line = from.data + (y + r) * from.row;
      int32_t *lane = reinterpret_cast<int32_t *>(lanes.data()) + r;
      for (int64_t x = 0; x < tx.hi - tx.lo; ++x) lane[x * kLanes] = line[x * from.step];
    }
    for (int64_t ox = tx.begin; ox < tx.end; ++ox) {
      const int32_t *w = &tx.fixed[ox * tx.stride];
      const Lanes *v = &lanes[tx.first[ox] - tx.lo];
      Lanes sum = Lanes{} + kHalf;
      for (int32_t k = 0; k < tx.count[ox]; ++k) sum += w[k] * v[k];
      sum >>= kFixedBits;
      sum = sum < 0 ? Lanes{} : sum;
      sum = sum > 255 ? Lanes{} + 255 : sum;
      for (int64_t r = 0; r < n; ++r) to_HW[(y + r) * out + ox] = static_cast<uint8_t>(sum[r]);
    }
  }
}

// One pass along the columns of Pillow's resize into to_HW [out, cols].
void pass_down(const Plane &from, int64_t cols, const Taps &ty, uint8_t *to_HW) {
  std::vector<int32_t> sum(cols);
  for (int64_t oy = ty.begin; oy < ty.end; ++oy) {
    std::fill(sum.begin(), sum.end(), kHalf);
    for (int32_t k = 0; k < ty.count[oy]; ++k) {
      const int32_t w = ty.fixed[oy * ty.stride + k];
      const uint8_t *line = from.data + (ty.first[oy] - ty.lo + k) * from.row;
      for (int64_t x = 0; x < cols; ++x) sum[x] += w * line[x * from.step];
    }
    for (int64_t x = 0; x < cols; ++x)
      to_HW[oy * cols + x] = static_cast<uint8_t>(std::clamp(sum[x] >> kFixedBits, 0, 255));
  }
}

// One band resized as Pillow does; out_HW is undefined outside the raster.
void resize_plane(const Source &s, int64_t band, const Taps &tx, const Taps &ty, const Target &t,
                  std::vector<uint8_t> &between, uint8_t *out_HW) {
  const int64_t step = s.interleaved ? s.bands : 1, row = s.width * step;
  const int64_t rows = ty.hi - ty.lo, cols = tx.hi - tx.lo;
  const uint8_t *data = static_cast<const uint8_t *>(s.data) + (s.interleaved ? band : band * s.height * s.width);
  const Plane source{data + ty.lo * row + tx.lo * step, row, step};
  const int64_t less_high = s.raster_height - t.height, less_wide = s.raster_width - t.width;
  if (less_high > 0 && less_high > 2 * less_wide) {  // Pillow 13 shrinks tall images along their columns first
    between.resize(t.height * cols);
    pass_down(source, cols, ty, between.data());
    pass_across({between.data(), cols, 1}, t.height, tx, t.width, out_HW);
  } else {
    between.resize(rows * t.width);
    pass_across(source, rows, tx, t.width, between.data());
    pass_down({between.data(), t.width, 1}, t.width, ty, out_HW);
  }
}

template <typename Out>
void store_row(const uint8_t *row, float gain, float bias, int64_t begin, int64_t end, float *brightness, Out *to) {
  for (int64_t x = begin; x < end; ++x) {
    const float value = row[x] * gain;
    brightness[x] += value;
    to[x] = cast<Out>(value + bias);
  }
}

template <typename Out>
void gather_pillow(const Source &s, const Taps &tx, const Taps &ty, Out *tile_CHW, const Target &t, Moments &m) {
  const int64_t plane = t.height * t.width;
  std::vector<uint8_t> between, resized_HW(plane);
  std::vector<float> brightness_HW(plane, 0.f);
  int real_bands = 0;
  for (int64_t c = 0; c < t.channels; ++c) {
    if (t.bands_C[c] == kAbsentBand) continue;
    const bool real = t.bands_C[c] != kValidityBand;
    if (real) resize_plane(s, t.bands_C[c], tx, ty, t, between, resized_HW.data());
    real_bands += real;
    for (int64_t oy = ty.begin, row = oy * t.width; oy < ty.end; ++oy, row += t.width) {
      Out *to = tile_CHW + c * plane + row;
      if (real)
        store_row(&resized_HW[row], t.gain_C[c], t.bias_C[c], tx.begin, tx.end, &brightness_HW[row], to);
      else
        std::fill(to + tx.begin, to + tx.end, Out{1});
    }
  }
  const float share = real_bands ? 1.f / static_cast<float>(real_bands) : 0.f;
  for (int64_t oy = ty.begin; oy < ty.end; ++oy)
    for (int64_t ox = tx.begin; ox < tx.end; ++ox) m.add(brightness_HW[oy * t.width + ox] * share);
}

template <typename T>
void gather(const Source &s, const double *box, int64_t n, const Target &t) {
  const int64_t tile = t.channels * t.height * t.width;
  const size_t item = t.as_u8 ? 1 : sizeof(float);
  std::fill_n(static_cast<uint8_t *>(t.tiles_NCHW) + n * tile * item, tile * item, uint8_t{0});
  const Taps tx =
      make_taps({box[0], box[2], t.width, s.origin_col, s.width, s.raster_width}, s.filter, s.pillow_rounding);
  const Taps ty =
      make_taps({box[1], box[3], t.height, s.origin_row, s.height, s.raster_height}, s.filter, s.pillow_rounding);
  Moments m;
  if (tx.hi > tx.lo && ty.hi > ty.lo) {
    if (s.pillow_rounding && t.as_u8)
      gather_pillow(s, tx, ty, static_cast<uint8_t *>(t.tiles_NCHW) + n * tile, t, m);
    else if (s.pillow_rounding)
      gather_pillow(s, tx, ty, static_cast<float *>(t.tiles_NCHW) + n * tile, t, m);
    else
      gather_once<T>(s, tx, ty, n * tile, t, m);
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
