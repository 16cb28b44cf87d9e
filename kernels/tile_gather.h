// tile_gather: cut, resample, select bands, normalise, fill nodata and lay out NCHW in one pass.
// The specification is edge_rsvlm/tiles/reference.py; this file must match it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tile_gather {

enum class SourceType : int { u8, u16, f32 };
enum class Filter : int { nearest, bilinear, bicubic, lanczos3, gaussian };

inline constexpr int32_t kAbsentBand = -1;
inline constexpr int32_t kValidityBand = -2;

struct Source {
  const void *data;
  SourceType type;
  bool interleaved;         // HWC when true, CHW when false
  int64_t height, width, bands;
  const uint8_t *valid_HW;  // null: every pixel is valid
  int64_t origin_col, origin_row;
  int64_t raster_width, raster_height;
  Filter filter;
  bool pillow_rounding;     // needs u8, the whole raster, and no valid_HW
};

struct Target {
  void *tiles_NCHW;         // float or uint8_t
  bool as_u8;
  int64_t channels, height, width;
  const int32_t *bands_C;   // source band, kAbsentBand or kValidityBand
  const float *gain_C, *bias_C;
  float *valid_fraction_N, *texture_N;
};

// Writes tile n of `target` from the raster box (x0, y0, x1, y1) at box_4. Thread-safe for distinct n.
using GatherOne = void (*)(const Source &, const double *box_4, int64_t n, const Target &);

void gather_portable(const Source &, const double *, int64_t, const Target &);
void gather_avx2(const Source &, const double *, int64_t, const Target &);

}  // namespace tile_gather
