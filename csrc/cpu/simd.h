// The vector type of one instruction set: F holds kWidth floats, I as many 32-bit integers. No include guard: included
// once per instruction set by foreach_isa.h, inside that set's namespace and target attributes. + - * on F are the
// compiler's own. Every operation here rounds exactly, so each instruction set computes the same bits.

#if VAEOPS_ISA == 2  // AVX-512

using F = __m512;
using I = __m512i;
using Mask = __mmask16;
constexpr int kWidth = 16;

VAEOPS_INLINE F set1(float x) { return _mm512_set1_ps(x); }
VAEOPS_INLINE I iset1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
VAEOPS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
VAEOPS_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
VAEOPS_INLINE F fnms(F a, F b, F c) { return _mm512_fnmsub_ps(a, b, c); }  // -a b - c
VAEOPS_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
VAEOPS_INLINE I bits(F x) { return _mm512_castps_si512(x); }
VAEOPS_INLINE F floats(I x) { return _mm512_castsi512_ps(x); }
VAEOPS_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }
VAEOPS_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
VAEOPS_INLINE F unsigned_to_float(I x) { return _mm512_cvtepu32_ps(x); }
VAEOPS_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
VAEOPS_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
VAEOPS_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
template <int kBits>
VAEOPS_INLINE I shl(I x) {
  return _mm512_slli_epi32(x, kBits);
}
VAEOPS_INLINE Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VAEOPS_INLINE Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VAEOPS_INLINE Mask above(F a, F b) {  // a > b, or a is NaN: what replaces a maximum b in PyTorch
  return static_cast<Mask>(_mm512_cmp_ps_mask(b, a, _CMP_LT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
}
VAEOPS_INLINE Mask has_bit(I x, uint32_t bit) { return _mm512_test_epi32_mask(x, iset1(bit)); }
VAEOPS_INLINE F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
VAEOPS_INLINE F select_minus(Mask m, F yes, F no) {  // m ? -yes : no
  return floats(_mm512_mask_ternarylogic_epi32(bits(no), m, bits(yes), iset1(0x80000000), 0x66));
}
VAEOPS_INLINE F xor_bit(F x, I y, I bit) {  // x ^ (y & bit)
  return floats(_mm512_ternarylogic_epi32(bits(x), y, bit, 0x78));
}
// NaN in x stays: min and max return their second operand when either is NaN.
VAEOPS_INLINE F at_most(F x, float bound) { return _mm512_min_ps(set1(bound), x); }
VAEOPS_INLINE F at_least(F x, float bound) { return _mm512_max_ps(set1(bound), x); }
// 2^j; j integral, in [-150, 127]: subnormal at the low end
VAEOPS_INLINE F power_of_two(F j) { return _mm512_scalef_ps(set1(1.0f), j); }

VAEOPS_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
VAEOPS_INLINE F load(const bf16* p) {
  return floats(shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
}
VAEOPS_INLINE F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
VAEOPS_INLINE F load(const uint8_t* p) {
  return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
VAEOPS_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
// Round to nearest even in integers: VCVTNEPS2BF16 would flush subnormal inputs to zero, and needs AVX512_BF16.
VAEOPS_INLINE void store(bf16* p, F x) {
  const I b = bits(x);
  const I odd = iand(_mm512_srli_epi32(b, 16), iset1(1));
  const I rounded = _mm512_srli_epi32(iadd(b, iadd(odd, iset1(0x7FFF))), 16);
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const I half = _mm512_mask_mov_epi32(rounded, nan, iset1(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
}
VAEOPS_INLINE void store(f16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif VAEOPS_ISA == 1  // AVX2 + FMA + F16C

using F = __m256;
using I = __m256i;
using Mask = __m256;
constexpr int kWidth = 8;

VAEOPS_INLINE F set1(float x) { return _mm256_set1_ps(x); }
VAEOPS_INLINE I iset1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
VAEOPS_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
VAEOPS_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
VAEOPS_INLINE F fnms(F a, F b, F c) { return _mm256_fnmsub_ps(a, b, c); }
VAEOPS_INLINE F sqrt(F x) { return _mm256_sqrt_ps(x); }
VAEOPS_INLINE I bits(F x) { return _mm256_castps_si256(x); }
VAEOPS_INLINE F floats(I x) { return _mm256_castsi256_ps(x); }
VAEOPS_INLINE I to_int(F x) { return _mm256_cvtps_epi32(x); }
VAEOPS_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
VAEOPS_INLINE I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
VAEOPS_INLINE I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
VAEOPS_INLINE I iand(I a, I b) { return _mm256_and_si256(a, b); }
template <int kBits>
VAEOPS_INLINE I shl(I x) {
  return _mm256_slli_epi32(x, kBits);
}
VAEOPS_INLINE F unsigned_to_float(I x) {  // both halves are exact in fp32, their sum rounds once
  const F high = to_float(_mm256_srli_epi32(x, 16)) * set1(65536.0f);
  return high + to_float(iand(x, iset1(0xFFFF)));
}
VAEOPS_INLINE Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
VAEOPS_INLINE Mask equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
VAEOPS_INLINE Mask above(F a, F b) {
  return _mm256_or_ps(_mm256_cmp_ps(b, a, _CMP_LT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
VAEOPS_INLINE Mask has_bit(I x, uint32_t bit) { return floats(_mm256_cmpeq_epi32(iand(x, iset1(bit)), iset1(bit))); }
VAEOPS_INLINE F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
VAEOPS_INLINE F select_minus(Mask m, F yes, F no) { return select(m, _mm256_xor_ps(yes, set1(-0.0f)), no); }
VAEOPS_INLINE F xor_bit(F x, I y, I bit) { return floats(_mm256_xor_si256(bits(x), iand(y, bit))); }
VAEOPS_INLINE F at_most(F x, float bound) { return _mm256_min_ps(set1(bound), x); }
VAEOPS_INLINE F at_least(F x, float bound) { return _mm256_max_ps(set1(bound), x); }
VAEOPS_INLINE F normal_power(F j) { return floats(shl<23>(iadd(to_int(j), iset1(127)))); }
VAEOPS_INLINE F power_of_two(F j) {  // two normal factors, whose product may be subnormal and is exact
  const F normal = at_least(j, -100.0f);
  return normal_power(normal) * normal_power(j - normal);
}

VAEOPS_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
VAEOPS_INLINE F load(const bf16* p) {
  return floats(shl<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
VAEOPS_INLINE F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
VAEOPS_INLINE F load(const uint8_t* p) {
  return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
VAEOPS_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
VAEOPS_INLINE void store(bf16* p, F x) {
  const I b = bits(x);
  const I odd = iand(_mm256_srli_epi32(b, 16), iset1(1));
  const I rounded = _mm256_srli_epi32(iadd(b, iadd(odd, iset1(0x7FFF))), 16);
  const Mask nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const I half = bits(select(nan, floats(iset1(0x7FC0)), floats(rounded)));
  const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
VAEOPS_INLINE void store(f16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else  // any machine, one element at a time

using F = float;
using I = uint32_t;
using Mask = bool;
constexpr int kWidth = 1;

VAEOPS_INLINE F set1(float x) { return x; }
VAEOPS_INLINE I iset1(uint32_t x) { return x; }
VAEOPS_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
VAEOPS_INLINE F fnma(F a, F b, F c) { return __builtin_fmaf(-a, b, c); }
VAEOPS_INLINE F fnms(F a, F b, F c) { return __builtin_fmaf(-a, b, -c); }
VAEOPS_INLINE F sqrt(F x) { return __builtin_sqrtf(x); }
VAEOPS_INLINE I bits(F x) { return float_bits(x); }
VAEOPS_INLINE F floats(I x) { return bits_float(x); }
VAEOPS_INLINE I to_int(F x) { return x == x ? static_cast<uint32_t>(static_cast<int32_t>(x)) : 0; }
VAEOPS_INLINE F to_float(I x) { return static_cast<float>(static_cast<int32_t>(x)); }
VAEOPS_INLINE F unsigned_to_float(I x) { return static_cast<float>(x); }
VAEOPS_INLINE I iadd(I a, I b) { return a + b; }
VAEOPS_INLINE I isub(I a, I b) { return a - b; }
VAEOPS_INLINE I iand(I a, I b) { return a & b; }
template <int kBits>
VAEOPS_INLINE I shl(I x) {
  return x << kBits;
}
VAEOPS_INLINE Mask less(F a, F b) { return a < b; }
VAEOPS_INLINE Mask equal(F a, F b) { return a == b; }
VAEOPS_INLINE Mask above(F a, F b) { return b < a || a != a; }
VAEOPS_INLINE Mask has_bit(I x, uint32_t bit) { return (x & bit) != 0; }
VAEOPS_INLINE F select(Mask m, F yes, F no) { return m ? yes : no; }
VAEOPS_INLINE F select_minus(Mask m, F yes, F no) { return m ? -yes : no; }
VAEOPS_INLINE F xor_bit(F x, I y, I bit) { return floats(bits(x) ^ (y & bit)); }
VAEOPS_INLINE F at_most(F x, float bound) { return bound < x ? bound : x; }
VAEOPS_INLINE F at_least(F x, float bound) { return x < bound ? bound : x; }
VAEOPS_INLINE F normal_power(F j) { return floats((to_int(j) + 127u) << 23); }
VAEOPS_INLINE F power_of_two(F j) {
  const F normal = at_least(j, -100.0f);
  return normal_power(normal) * normal_power(j - normal);
}

VAEOPS_INLINE F load(const float* p) { return *p; }
VAEOPS_INLINE F load(const bf16* p) { return widen(*p); }
VAEOPS_INLINE F load(const f16* p) { return widen(*p); }
VAEOPS_INLINE F load(const uint8_t* p) { return *p; }
VAEOPS_INLINE void store(float* p, F x) { *p = x; }
VAEOPS_INLINE void store(bf16* p, F x) { *p = to_bf16(x); }
VAEOPS_INLINE void store(f16* p, F x) { *p = to_f16(x); }

#endif

VAEOPS_INLINE F absolute(F x) { return floats(iand(bits(x), iset1(0x7FFFFFFF))); }

template <class... Rest>
VAEOPS_INLINE F horner(F x, F acc, Rest... coefficients) {
  ((acc = fma(x, acc, set1(coefficients))), ...);
  return acc;
}
