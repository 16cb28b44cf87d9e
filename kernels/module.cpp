// Python bindings, run-time choice of the instruction set, and threads over tiles.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tile_gather.h"

namespace nb = nanobind;
using namespace tile_gather;

namespace {

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

std::vector<std::string> variants() {  // best first
  std::vector<std::string> names;
#ifdef HAVE_AVX2_VARIANT
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

GatherOne find_variant(const std::string &name) {
  const auto names = variants();
  if (std::find(names.begin(), names.end(), name) == names.end())
    throw std::invalid_argument("kernel variant '" + name + "' does not run on this CPU");
#ifdef HAVE_AVX2_VARIANT
  if (name == "avx2") return gather_avx2;
#endif
  return gather_portable;
}

SourceType source_type(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> &a) {
  if (a.dtype() == nb::dtype<uint8_t>()) return SourceType::u8;
  if (a.dtype() == nb::dtype<uint16_t>()) return SourceType::u16;
  if (a.dtype() == nb::dtype<float>()) return SourceType::f32;
  throw std::invalid_argument("source must be uint8, uint16 or float32");
}

Filter find_filter(const std::string &name) {
  static const std::map<std::string, Filter> filters{{"nearest", Filter::nearest},
                                                     {"bilinear", Filter::bilinear},
                                                     {"bicubic", Filter::bicubic},
                                                     {"lanczos3", Filter::lanczos3},
                                                     {"gaussian", Filter::gaussian}};
  const auto found = filters.find(name);
  if (found == filters.end()) throw std::invalid_argument("filter '" + name + "' is not known");
  return found->second;
}

// Shapes are checked by the Python wrapper, which is the only caller.
void tile_gather_into(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> &source, bool interleaved,
                      const std::optional<Array<const uint8_t>> &valid_HW, const Array<const double> &boxes_N4,
                      const Array<const int32_t> &bands_C, const Array<const float> &gain_C,
                      const Array<const float> &bias_C, const std::vector<int64_t> &origin,
                      const std::vector<int64_t> &raster_size, const nb::ndarray<nb::c_contig, nb::device::cpu> &tiles,
                      const Array<float> &valid_fraction_N, const Array<float> &texture_N,
                      const std::string &resampling, bool pillow_rounding, int threads, const std::string &variant) {
  const GatherOne gather = find_variant(variant);
  const int rows = interleaved ? 0 : 1, cols = interleaved ? 1 : 2, bands = interleaved ? 2 : 0;
  const Source s{source.data(), source_type(source), interleaved,
                 static_cast<int64_t>(source.shape(rows)), static_cast<int64_t>(source.shape(cols)),
                 static_cast<int64_t>(source.shape(bands)), valid_HW ? valid_HW->data() : nullptr,
                 origin.at(0), origin.at(1), raster_size.at(0), raster_size.at(1),
                 find_filter(resampling), pillow_rounding};
  const Target t{tiles.data(), tiles.dtype() == nb::dtype<uint8_t>(), static_cast<int64_t>(tiles.shape(1)),
                 static_cast<int64_t>(tiles.shape(2)), static_cast<int64_t>(tiles.shape(3)), bands_C.data(),
                 gain_C.data(), bias_C.data(), valid_fraction_N.data(), texture_N.data()};
  const auto count = static_cast<int64_t>(boxes_N4.shape(0));
  const double *boxes = boxes_N4.data();

  nb::gil_scoped_release release;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t n = next++; n < count; n = next++) gather(s, boxes + 4 * n, n, t);
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) pool.emplace_back(work);
  work();
  for (auto &thread : pool) thread.join();
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.def("variants", &variants, "Kernel variants that run on this CPU, best first.");
  m.def("tile_gather_into", &tile_gather_into, nb::arg("source"), nb::arg("interleaved"), nb::arg("valid_HW").none(),
        nb::arg("boxes_N4"), nb::arg("bands_C"), nb::arg("gain_C"), nb::arg("bias_C"), nb::arg("origin"),
        nb::arg("raster_size"), nb::arg("tiles"), nb::arg("valid_fraction_N"), nb::arg("texture_N"),
        nb::arg("resampling"), nb::arg("pillow_rounding"), nb::arg("threads"), nb::arg("variant"));
}
