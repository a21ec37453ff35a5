// The 16-bit floating types, and what every instruction set shares.
#pragma once
#include <cstdint>
#include <cstring>

#define VAEOPS_INLINE static inline __attribute__((always_inline))
#define VAEOPS_INLINE_METHOD inline __attribute__((always_inline))

namespace vaeops::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  // Read the half's exponent and fraction as a float's, which is 2^112 too small; infinities and NaNs keep their
  // exponent.
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(sign | (magnitude >= 0x7C00u ? 0x7F800000u | (magnitude << 13) : float_bits(scaled)));
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(uint8_t x) { return x; }

inline bf16 to_bf16(float x) {  // round to nearest even
  const uint32_t b = float_bits(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16)};
}
inline f16 to_f16(float x) {  // round to nearest even
  const uint32_t b = float_bits(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu))};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 aligns the fraction to the subnormal grid and rounds it
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13))};
}

template <class T>
inline void copy(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// Philox4x32-10 of one counter block, in place.
inline void philox_words(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The type to compute in.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

}  // namespace vaeops::cpu
