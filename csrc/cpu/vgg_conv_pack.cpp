// Weights of a convolution in the order that its kernels read. In fp64, rounded once.
#include <algorithm>
#include <cmath>

#include "cpu/vgg_plan.h"

namespace vaeops::cpu {
namespace {

// w[o][i] of the convolution that runs: of the backward one, the weights are transposed and turned by 180 degrees.
struct Weights {
  const float* data;  // [K, C, 3, 3]
  int64_t in, out;    // C, K
  bool backward;

  int64_t reads() const { return backward ? out : in; }
  int64_t writes() const { return backward ? in : out; }
  double at(int64_t o, int64_t i, int row, int column) const {
    return backward ? data[((i * in + o) * 3 + 2 - row) * 3 + 2 - column] : data[((o * in + i) * 3 + row) * 3 + column];
  }
};

void transform(const Weights& weights, int64_t o, int64_t i, double (&u)[kPoints]) {
  constexpr double a = kPointA, b = kPointB, na = 1 / (2 * a * a * (a * a - b * b)),
                   nb = 1 / (2 * b * b * (b * b - a * a));
  constexpr double g[6][3] = {{1 / (a * a * b * b), 0, 0}, {na, na * a, na * a * a},  {na, -na * a, na * a * a},
                              {nb, nb * b, nb * b * b},    {nb, -nb * b, nb * b * b}, {0, 0, 1}};
  double half[6][3];
  for (int p = 0; p < 6; ++p) {
    for (int column = 0; column < 3; ++column) {
      half[p][column] = g[p][0] * weights.at(o, i, 0, column) + g[p][1] * weights.at(o, i, 1, column) +
                        g[p][2] * weights.at(o, i, 2, column);
    }
  }
  for (int p = 0; p < 6; ++p) {
    for (int q = 0; q < 6; ++q) u[6 * p + q] = half[p][0] * g[q][0] + half[p][1] * g[q][1] + half[p][2] * g[q][2];
  }
}

// [out / 32][9][channels / 32][2][16][16][2]
void pack_tiles(const Weights& w, bf16* packed) {
  const int64_t channels = round_up(w.reads(), 32), outputs = round_up(w.writes(), kPanel);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      bf16* const to = packed + (o / kPanel * 9 + tap) * channels * kPanel + o % kPanel / 16 * 512 + o % 16 * 2;
      for (int64_t i = 0; i < channels; ++i) {
        const bool real = o < w.writes() && i < w.reads();
        to[i / 32 * 1024 + i % 32 / 2 * 32 + i % 2] =
            to_bf16(real ? static_cast<float>(w.at(o, i, tap / 3, tap % 3)) : 0);
      }
    }
  }
}

void put_bias(const float* bias, int64_t out, float* to) {
  for (int64_t o = 0; o < out; ++o) to[o] = bias != nullptr ? bias[o] : 0.0f;
}

}  // namespace

int64_t conv_packed_floats(VggAlgorithm algorithm, int64_t in, int64_t out, bool backward) {
  if (in == 3) return backward ? 27 * out : 27 * round_up(out, kPanel) + out;
  const int64_t reads = backward ? out : in, writes = backward ? in : out;
  if (algorithm == VggAlgorithm::bf16) {
    return 9 * round_up(reads, 32) * round_up(writes, kPanel) / 2 + (backward ? 0 : out);
  }
  const int64_t taps = algorithm == VggAlgorithm::winograd ? kPoints : 9;
  return taps * reads * round_up(writes, kPanel) + (backward ? 0 : out);
}

void conv_pack(VggAlgorithm algorithm, const float* weight, const float* bias, int64_t in, int64_t out, bool backward,
               float* packed) {
  const Weights w{weight, in, out, backward};
  const int64_t reads = w.reads(), writes = w.writes(), panels = round_up(writes, kPanel);
  const auto at = [&](int64_t taps, int64_t o, int64_t tap, int64_t i) -> float& {
    return packed[((o / kPanel * taps + tap) * reads + i) * kPanel + o % kPanel];
  };
  if (in == 3 && backward) {
    for (int tap = 0; tap < 9; ++tap) {
      for (int64_t o = 0; o < 3; ++o) {
        for (int64_t i = 0; i < out; ++i) {
          packed[(tap * 3 + o) * out + i] = static_cast<float>(w.at(o, i, tap / 3, tap % 3));
        }
      }
    }
    return;
  }
  if (in != 3 && algorithm == VggAlgorithm::bf16) {
    pack_tiles(w, reinterpret_cast<bf16*>(packed));
    if (!backward) put_bias(bias, out, packed + conv_packed_floats(algorithm, in, out, false) - out);
    return;
  }
  const int64_t taps = in != 3 && algorithm == VggAlgorithm::winograd ? kPoints : 9;
  std::fill(packed, packed + taps * reads * panels, 0.0f);
  for (int64_t o = 0; o < writes; ++o) {
    for (int64_t i = 0; i < reads; ++i) {
      if (in == 3) {
        for (int tap = 0; tap < 9; ++tap) {
          packed[(o / kPanel * 27 + i * 9 + tap) * kPanel + o % kPanel] =
              static_cast<float>(w.at(o, i, tap / 3, tap % 3));
        }
      } else if (algorithm == VggAlgorithm::winograd) {
        double u[kPoints];
        transform(w, o, i, u);
        for (int64_t k = 0; k < kPoints; ++k) at(kPoints, o, k, i) = static_cast<float>(u[k]);
      } else {
        for (int tap = 0; tap < 9; ++tap) at(9, o, tap, i) = static_cast<float>(w.at(o, i, tap / 3, tap % 3));
      }
    }
  }
  if (!backward) put_bias(bias, out, packed + conv_packed_floats(algorithm, in, out, false) - out);
}

}  // namespace vaeops::cpu
